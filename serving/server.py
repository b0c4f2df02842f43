"""`python -m serving.server --release DIR …`: one release behind HTTP, in one process.

Exits 0 after SIGTERM: no longer ready, in-flight requests answered, prediction log flushed. Exits 3 with a
message when the release cannot be served or the port is taken.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import msgspec
import uvicorn
import uvloop

from serving.app import App
from serving.contract import EXPLAINED_FAILURE, GOLDEN_FILE, Golden
from serving.errors import ContractError
from serving.prediction_log import PredictionLog
from serving.scorer import Scorer, read_manifest, read_schema

logger = logging.getLogger("perennial.server")

DRAIN_GRACE_SECONDS = 1.0  # not ready, still accepting: a router's health check sees it first
KEEP_ALIVE_SECONDS = 75  # longer than a router keeps idle connections, so that it closes them first


class Server(uvicorn.Server):
    """uvicorn, with an orderly end: a first signal drains, a second one ends at once."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self.app = app
        self.drained: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the interpreter, between any two instructions of the event loop's thread."""
        if self.app.draining:
            self.force_exit = self.should_exit = True
            return
        self.app.draining = True
        self.drained = asyncio.get_running_loop().create_task(self._drain(signal.Signals(sig).name))

    async def _drain(self, signal_name: str) -> None:
        logger.info("%s: not ready any more, answering what is in flight", signal_name)
        await asyncio.sleep(DRAIN_GRACE_SECONDS)
        self.should_exit = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; the exit code of the process."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        manifest, schema = read_manifest(options.release), read_schema(options.release)
        listener = _listen(options.host, options.port)
    except ContractError as error:
        sys.stderr.write(f"{error}\n")
        return EXPLAINED_FAILURE
    log = PredictionLog(
        url=options.prediction_log,
        spool=options.spool,
        environment=options.environment,
        project=manifest.project,
        release_id=manifest.release_id,
    )
    app = App(manifest, schema, log)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(int(manifest.limits.drain_seconds), 1),
    )
    server = Server(config, app)
    failures: list[ContractError] = []
    loader = threading.Thread(
        target=_load, args=(options.release, app, server, failures), name="load", daemon=True
    )
    log.start()
    loader.start()
    host, port = listener.getsockname()[:2]
    logger.info("%s listens on http://%s:%d", manifest.release_id, host, port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve(sockets=[listener]))
    log.close(manifest.limits.drain_seconds)
    logger.info("%s has stopped", manifest.release_id)
    code = EXPLAINED_FAILURE if failures else 0
    if loader.is_alive():  # stopped while loading: an interpreter that ends would wait for it
        os._exit(code)
    return code


def _load(release: Path, app: App, server: Server, failures: list[ContractError]) -> None:
    started = time.perf_counter()
    try:
        scorer = Scorer(release)
        golden = release / GOLDEN_FILE
        if golden.exists():
            rows = msgspec.json.decode(golden.read_bytes(), type=Golden).rows[:1]
            if rows:
                scorer.predict(rows)  # libraries load much at the first prediction: not in a user's request
    except Exception as error:
        logger.exception("the release %s cannot be served", app.manifest.release_id)
        failures.append(error if isinstance(error, ContractError) else ContractError(repr(error)))
        server.should_exit = True
        return
    app.scorer = scorer
    logger.info("%s is ready after %.1f s", app.manifest.release_id, time.perf_counter() - started)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ContractError(
            f"cannot listen on {host}:{port}: {error.strerror}", "a free port", "--port"
        ) from error
    return listener


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving.server", description="Serve one release over HTTP."
    )
    parser.add_argument("--release", type=Path, required=True, help="the release directory")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0: any free one, named in the log")
    parser.add_argument("--environment", required=True, help="test or production, as the log records it")
    parser.add_argument("--prediction-log", required=True, help="file:///… or s3://bucket/prefix")
    parser.add_argument(
        "--spool",
        type=Path,
        default=Path(tempfile.gettempdir()) / "perennial-spool",
        help="where predictions wait for the store; the next service with this directory ships what is left",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
