"""A load held on one URL: POSTs over kept-alive connections at a steady rate, until standard input closes.

    python -m tests.flows.load URL FILE-WITH-BODIES REQUESTS-PER-SECOND

The file has a body per line, sent in turn; what follows a tab is the predictions that the answer must hold.
Prints `started` after the first answers, and at the end, as after each line that it reads, one JSON object
of what came since the one before: how many requests, over how long, which failed (an answer that is not 200,
that names no release, that is wrong, or none at all) and when, and how often each release answered. A process
of its own, so that what is tested cannot slow its measure down.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

CONNECTIONS = 16
TIMEOUT_SECONDS = 10.0


@dataclass
class Held:
    """What came of the load so far."""

    began: float = field(default_factory=time.monotonic)
    ends: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    failed_at: list[float] = field(default_factory=list)  # of the machine's monotonic clock
    releases: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0

    def say(self) -> None:
        outcome = {
            "requests": len(self.ends),
            "seconds": max(self.ends, default=self.began) - self.began,
            "failures": self.failures,
            "failed_at": self.failed_at,
            "releases": self.releases,
            "slowest_seconds": self.slowest_seconds,
        }
        print(json.dumps(outcome), flush=True)


class Clock:
    """The moments at which requests are due. One that is late is sent at once, none is left out."""

    def __init__(self, rate: float) -> None:
        self._began, self._rate, self._sent = time.monotonic(), rate, 0

    async def next(self) -> None:
        due = self._began + self._sent / self._rate
        self._sent += 1
        await asyncio.sleep(max(0.0, due - time.monotonic()))


class Load:
    """The load on one URL."""

    def __init__(self, url: str, lines: list[bytes], rate: float) -> None:
        self._where = urlsplit(url)
        self._clock = Clock(rate)
        self._exchanges = itertools.cycle([_prepared(self._where, line) for line in lines])
        self._stop = asyncio.Event()
        self._held = Held()

    async def hold(self) -> None:
        clients = [asyncio.create_task(self._client()) for _ in range(CONNECTIONS)]
        while len(self._held.ends) < CONNECTIONS and time.monotonic() - self._held.began < TIMEOUT_SECONDS:
            await asyncio.sleep(0.01)
        print("started", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            held, self._held = self._held, Held()
            held.say()
        self._stop.set()
        await asyncio.gather(*clients)
        self._held.say()

    async def _client(self) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while True:
            await self._clock.next()
            if self._stop.is_set():
                break
            request, expected = next(self._exchanges)
            began, failure, release, closes = time.monotonic(), "", "", True
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    connection = connection or await asyncio.open_connection(
                        self._where.hostname, self._where.port
                    )
                    release, closes = await _exchange(*connection, request, expected)
            except (OSError, ValueError, KeyError, asyncio.IncompleteReadError, TimeoutError) as error:
                failure = f"{type(error).__name__}: {error}"
            ended, held = time.monotonic(), self._held
            if failure:
                held.failures.append(failure)
                held.failed_at.append(ended)
            else:
                held.releases[release] += 1
            held.ends.append(ended)
            held.slowest_seconds = max(held.slowest_seconds, ended - began)
            if closes and connection is not None:
                connection[1].close()
                connection = None
        if connection is not None:
            connection[1].close()


def _prepared(where: SplitResult, line: bytes) -> tuple[bytes, Any]:
    """A request, and the predictions that its answer must hold, if that is said."""
    body, _, expected = line.partition(b"\t")
    head = (
        f"POST {where.path} HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body, json.loads(expected) if expected else None


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, expected: Any
) -> tuple[str, bool]:
    """(the release that answered, whether the server closes the connection). Raises unless all is well."""
    writer.write(request)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers["content-length"]))
    if status.split()[1] != "200":
        raise ValueError(f"{status} {body[:200]!r}")
    answer = json.loads(body)
    if headers["x-perennial-release"] != answer["release_id"] or len(answer["predictions"]) != 1:
        raise ValueError(f"header {headers['x-perennial-release']}, body {body[:200]!r}")
    if expected is not None and answer["predictions"] != expected:
        raise ValueError(f"predictions other than {expected}: body {body[:200]!r}")
    return answer["release_id"], headers.get("connection", "").lower() == "close"


if __name__ == "__main__":
    asyncio.run(Load(sys.argv[1], Path(sys.argv[2]).read_bytes().splitlines(), float(sys.argv[3])).hold())
