"""A load held on one URL: POSTs over kept-alive connections at a steady rate, until standard input closes.

    python -m tests.flows.load URL FILE-WITH-BODY REQUESTS-PER-SECOND

Prints `started` after the first answers, and at the end one JSON object: how many requests, over how long,
which failed (an answer that is not 200, that names no release, or none at all), and how often each release
answered. A process of its own, so that what is tested cannot slow its measure down.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

CONNECTIONS = 16
TIMEOUT_SECONDS = 10.0


@dataclass
class Held:
    """What came of the load so far."""

    ends: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    releases: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0


class Clock:
    """The moments at which requests are due. One that is late is sent at once, none is left out."""

    def __init__(self, rate: float) -> None:
        self._began, self._rate, self._sent = time.monotonic(), rate, 0

    async def next(self) -> None:
        due = self._began + self._sent / self._rate
        self._sent += 1
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def hold(url: str, body: bytes, rate: float) -> Held:
    held, clock, stop = Held(), Clock(rate), asyncio.Event()
    began = time.monotonic()
    clients = [asyncio.create_task(_client(url, body, held, clock, stop)) for _ in range(CONNECTIONS)]
    while len(held.ends) < CONNECTIONS and time.monotonic() - began < TIMEOUT_SECONDS:
        await asyncio.sleep(0.01)
    print("started", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    stop.set()
    await asyncio.gather(*clients)
    print(
        json.dumps(
            {
                "requests": len(held.ends),
                "seconds": max(held.ends, default=began) - began,
                "failures": held.failures,
                "releases": held.releases,
                "slowest_seconds": held.slowest_seconds,
            }
        )
    )
    return held


async def _client(url: str, body: bytes, held: Held, clock: Clock, stop: asyncio.Event) -> None:
    where = urlsplit(url)
    request = (
        f"POST {where.path} HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    while True:
        await clock.next()
        if stop.is_set():
            break
        began = time.monotonic()
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                connection = connection or await asyncio.open_connection(where.hostname, where.port)
                release, closes = await _exchange(*connection, request)
            held.releases[release] += 1
        except (OSError, ValueError, KeyError, asyncio.IncompleteReadError, TimeoutError) as error:
            held.failures.append(f"{type(error).__name__}: {error}")
            closes = True
        held.ends.append(time.monotonic())
        held.slowest_seconds = max(held.slowest_seconds, held.ends[-1] - began)
        if closes and connection is not None:
            connection[1].close()
            connection = None
    if connection is not None:
        connection[1].close()


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
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
    return answer["release_id"], headers.get("connection", "").lower() == "close"


if __name__ == "__main__":
    asyncio.run(hold(sys.argv[1], Path(sys.argv[2]).read_bytes(), float(sys.argv[3])))
