"""A service small enough for tests of what runs around services: it answers for a release, drains on SIGTERM.

    python service.py --release-id ID --host H --port P
                      [--starts-in S | --never-ready | --dies REASON | --leaves-child]

POST /predict with {"seconds": S} answers after S seconds, with {"status": N} with that status.
Nothing but the standard library, so that it is up in a tenth of a second.
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
from typing import Any


class Service:
    """What answers, and how many requests it is answering."""

    def __init__(self, release_id: str, ready: bool) -> None:
        self.release_id = release_id
        self.ready = ready
        self.answering = 0
        self.stopping = asyncio.Event()

    async def run(self, host: str, port: int) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stopping.set)
        server = await asyncio.start_server(self._connected, host, port)
        await self.stopping.wait()
        server.close()
        while self.answering:
            await asyncio.sleep(0.01)
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
        status, answer = await self._answer(request.split()[1].partition("?")[0], headers, body)
        content = json.dumps(answer).encode()
        writer.write(
            f"HTTP/1.1 {status} Said\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
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
        await asyncio.sleep(asked.get("seconds", 0))
        return asked.get("status", 200), answer | {"bytes": len(body), "headers": headers}


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
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--starts-in", type=float, default=0.0)
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--dies", default="")
    parser.add_argument("--leaves-child", action="store_true")
    asked = parser.parse_args()
    print(f"{asked.release_id} starts", flush=True)
    time.sleep(asked.starts_in)
    if asked.dies:
        sys.exit(asked.dies)
    if asked.leaves_child:
        subprocess.Popen(["sleep", "3600"], env={}, start_new_session=True)
    asyncio.run(Service(asked.release_id, not asked.never_ready).run(asked.host, asked.port))


if __name__ == "__main__":
    main()
