"""The limit: our server with a handler that gives every request the same answer, one process per CPU.

    python -m benchmarks.peers.empty PORT

Everything that the server does for any request is done: limits, the request's id, the release in the head,
metrics. What is above this is the price of decoding, checking, predicting, encoding and logging.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import uvloop

from serving.app import App, common_headers
from serving.contract import Column, InputSchema, Manifest
from serving.decode import Decoder
from serving.http import JSON, Connections, Request
from serving.metrics import PREDICT, Metrics, Shared
from serving.prediction_log import PredictionLog

ANSWER = b'{"predictions":[0.5],"release_id":"flights-0000000000000000"}'
MANIFEST = Manifest(
    release_id="empty-0",
    project="empty",
    package="empty",
    task="binary",
    git_sha="",
    data_fingerprint="",
    as_of="",
    model_sha256="",
)
SCHEMA = InputSchema((Column("x", "number", False),))


class Empty(App):
    """The handler."""

    def handle(self, request: Request) -> None:
        """The same for all."""
        request.route = PREDICT
        request.answer(200, ANSWER, JSON, self._identify(request))


def _app(shared: Shared, worker: int) -> Empty:
    decoder = Decoder(SCHEMA)
    log = PredictionLog("memory:///", Path("unused"), "test", "empty", "empty-0", decoder.columns)
    return Empty(MANIFEST, SCHEMA, None, decoder, log, Metrics(shared, worker))  # the log is never started


async def _serve(port: int, app: Empty) -> None:
    connections = Connections(app, common_headers(MANIFEST), limit=4096)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(2048)
    connections.sweep()
    await asyncio.get_running_loop().create_server(connections, sock=listener)
    await asyncio.Event().wait()


def main() -> None:
    cpus = len(os.sched_getaffinity(0))
    shared = Shared(cpus)
    workers = [_fork(int(sys.argv[1]), shared, number) for number in range(cpus)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        for worker in workers:
            os.waitpid(worker, 0)
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def _fork(port: int, shared: Shared, number: int) -> int:
    worker = os.fork()
    if worker == 0:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(port, _app(shared, number)))
        os._exit(0)
    return worker


if __name__ == "__main__":
    main()
