"""A service small enough for tests of what runs around services: it answers for a release, drains on SIGTERM.

    python service.py --release-id ID --host H --port P
                      [--starts-in S | --never-ready | --dies REASON | --leaves-child | --log]
                      [--turns BAD --after N]

POST /predict with {"seconds": S} answers after S seconds, with {"status": N} with that status, and rows
{"x": X} with `predict` of each. `--turns` makes it bad, from the first or after N requests of users: errors
(500), slow (0.3 s), constant (predictions), misshapen (answers) or dies. The other options of serving.server
are understood. Nothing but the standard library, so that it is up in a tenth of a second; `--log` alone loads
the real prediction log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from typing import Any

TURNS = ("errors", "slow", "constant", "misshapen", "dies")
SLOW_SECONDS = 0.3
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # of latency buckets
CHECK_REQUEST_ID = "perennial-check"  # of our own requests, which no user made


def predict(x: float) -> float:
    """What every release says of a row {"x": x}."""
    return 0.5 + x / 10


class Service:
    """What answers, and how many requests it is answering."""

    def __init__(
        self, release_id: str, ready: bool, turns: str = "", after: int = 0, log: Any = None
    ) -> None:
        self.release_id = release_id
        self.ready = ready
        self.turns = turns
        self.after = after
        self.log = log
        self.of_users = 0
        self.answering = 0
        self.counts: Counter[tuple[str, int]] = Counter()  # by route and status
        self.seconds: dict[str, list[float]] = {}  # by route: how many in each bucket, and their sum
        self.stopping = asyncio.Event()

    async def run(self, host: str, port: int) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stopping.set)
        server = await asyncio.start_server(self._connected, host, port)
        await self.stopping.wait()
        server.close()
        while self.answering:
            await asyncio.sleep(0.01)
        if self.log:
            self.log.close()
        os._exit(0)  # a connection that is kept alive for later holds no request

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self.answering += 1
                try:
                    await self._exchange(head, reader, writer)
                finally:
                    self.answering -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the other side has had enough
        finally:
            writer.close()

    async def _exchange(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request, *lines = head.rstrip("\r\n").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await _body(headers, reader)
        route, began = request.split()[1].partition("?")[0], time.monotonic()
        if route == "/metrics":
            status, content, kind = 200, self._metrics().encode(), "text/plain"
        else:
            status, answer = await self._answer(route, headers, body)
            content, kind = json.dumps(answer).encode(), "application/json"
        self._observe(route, status, time.monotonic() - began)
        writer.write(
            f"HTTP/1.1 {status} Said\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n"
            f"x-perennial-release: {self.release_id}\r\n\r\n".encode()
            + content
        )
        await writer.drain()

    async def _answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, Any]]:
        answer: dict[str, Any] = {"release_id": self.release_id, "predictions": [0.5], "path": path}
        if path == "/health/ready":
            return (200 if self.ready and not self.stopping.is_set() else 503), answer
        if path != "/predict":
            return 200, answer
        asked = json.loads(body or b"{}")
        rows = [row for row in asked.get("rows", []) if isinstance(row, dict)]
        if any(row.keys() - {"x"} for row in rows):
            return 422, {"error": "the rows have other columns than x"}
        if rows:
            answer["predictions"] = [predict(row.get("x", 0.0)) for row in rows]
        is_users = headers.get("x-request-id") != CHECK_REQUEST_ID
        self.of_users += is_users
        if self.turns and self.of_users > self.after:
            status = await self._turned(answer)
            if status != 200:
                return status, {"error": "it has turned"}
        if self.log and rows and is_users:
            entries = [(row.get("x"),) for row in rows]
            self.log.append(entries, answer["predictions"], headers.get("x-request-id", ""), len(body))
        await asyncio.sleep(asked.get("seconds", 0))
        return asked.get("status", 200), answer | {"bytes": len(body), "headers": headers}

    async def _turned(self, answer: dict[str, Any]) -> int:
        """Spoil the answer; the status."""
        match self.turns:
            case "errors":
                return 500
            case "slow":
                await asyncio.sleep(SLOW_SECONDS)
            case "constant":
                answer["predictions"] = [0.5] * len(answer["predictions"])
            case "misshapen":
                answer["predictions"] = [[value] for value in answer["predictions"]] * 2
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
        return 200

    def _observe(self, route: str, status: int, seconds: float) -> None:
        self.counts[route, status] += 1
        buckets = self.seconds.setdefault(route, [0.0] * (len(BOUNDS) + 2))
        buckets[bisect_left(BOUNDS, seconds)] += 1
        buckets[-1] += seconds

    def _metrics(self) -> str:
        """In the words of the real server (serving/metrics.py)."""
        release = f'release="{self.release_id}"'
        lines = [
            f'perennial_requests_total{{{release},route="{route}",code="{status}"}} {count}'
            for (route, status), count in self.counts.items()
        ]
        name = "perennial_request_duration_seconds"
        for route, buckets in self.seconds.items():
            labels, total = f'{release},route="{route}"', 0.0
            for bound, count in zip((*map(str, BOUNDS), "+Inf"), buckets, strict=False):
                total += count
                lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {total:g}')
            lines += [f"{name}_sum{{{labels}}} {buckets[-1]:g}", f"{name}_count{{{labels}}} {total:g}"]
        return "\n".join(lines) + "\n"


async def _body(headers: dict[str, str], reader: asyncio.StreamReader) -> bytes:
    if "chunked" not in headers.get("transfer-encoding", ""):
        return await reader.readexactly(int(headers.get("content-length", 0)))
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--release-id", required=True)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--starts-in", type=float, default=0.0)
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--dies", default="")
    parser.add_argument("--leaves-child", action="store_true")
    parser.add_argument("--turns", choices=TURNS, default="")
    parser.add_argument("--after", type=int, default=-1)
    parser.add_argument("--log", action="store_true")
    for name in ("--release", "--environment", "--prediction-log", "--spool"):
        parser.add_argument(name, default="")
    asked = parser.parse_args()
    print(f"{asked.release_id} starts", flush=True)
    time.sleep(asked.starts_in)
    if asked.dies:
        sys.exit(asked.dies)
    if asked.leaves_child:
        subprocess.Popen(["sleep", "3600"], env={}, start_new_session=True)
    log = _log(asked) if asked.log else None
    service = Service(asked.release_id, not asked.never_ready, asked.turns, asked.after, log)
    asyncio.run(service.run(asked.host, asked.port))


def _log(asked: argparse.Namespace) -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from serving.contract import Column
    from serving.prediction_log import PredictionLog

    log = PredictionLog(
        url=asked.prediction_log,
        spool=Path(asked.spool),
        environment=asked.environment,
        project=asked.release_id.rpartition("-")[0],
        release_id=asked.release_id,
        columns=(Column("x", "number", nullable=True),),
    )
    log.start()
    return log


if __name__ == "__main__":
    main()
