"""One worker process: the event loop, the model, the log, and an orderly end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import uvloop

from serving import models
from serving.app import App, common_headers
from serving.contract import EXPLAINED_FAILURE, InputSchema, Manifest, Plan
from serving.decode import Decoder
from serving.engine import Model
from serving.errors import ContractError
from serving.http import Connections
from serving.metrics import Metrics, Shared

logger = logging.getLogger("perennial.server")

DRAIN_GRACE_SECONDS = 1.0  # not ready, still accepting: a router's health check sees it first
BACKLOG = 2048
QUEUE_BYTES, SPOOL_BYTES = 128 * 1_048_576, 2048 * 1_048_576  # of the prediction logs of all workers
SPARE_DESCRIPTORS = 64  # for what is not a connection


@dataclass(frozen=True)
class Options:
    """What the parent knows of the service."""

    release: Path
    manifest: Manifest
    schema: InputSchema
    plan: Plan | None
    host: str
    port: int
    environment: str
    prediction_log: str
    spool: Path


def work(options: Options, shared: Shared, index: int, again: bool) -> int:
    """Serve until SIGTERM; the exit code of the process. `again`: in the place of a worker that died."""
    from serving.prediction_log import PredictionLog  # which needs numpy; the parent has imported it

    decoder = Decoder(options.schema, options.plan)
    log = PredictionLog(
        url=options.prediction_log,
        spool=options.spool,
        environment=options.environment,
        project=options.manifest.project,
        release_id=options.manifest.release_id,
        columns=decoder.columns,
        plan=options.plan,
        queue_bytes=QUEUE_BYTES // shared.workers,
        spool_bytes=SPOOL_BYTES // shared.workers,
    )
    own = Metrics(shared, index)
    app = App(options.manifest, options.schema, options.plan, decoder, log, own)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_serve(options, app, again))
    log.close(options.manifest.limits.drain_seconds)
    return code


async def _serve(options: Options, app: App, again: bool) -> int:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    failures: list[int] = []
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # of a terminal: the parent's business
    connections = Connections(app, common_headers(options.manifest), _most_connections())
    connections.sweep()
    watch = None if sys.platform == "linux" else loop.create_task(_until_parent_is_gone())

    def loaded(model: Model) -> None:
        # A collection need not look at libraries and model again, nor run while the log's queue fills: it
        # would hold the loop for tens of milliseconds. Rows are tuples of plain values and make no cycles.
        gc.freeze()
        gc.set_threshold(100_000, 50, 1000)
        app.serve(model)

    def load() -> None:
        started = time.perf_counter()
        try:
            model = models.load(options.release, options.plan, app.decoder)
        except Exception as error:
            if isinstance(error, ContractError):
                logger.error("the release %s cannot be served: %s", options.manifest.release_id, error)
            else:
                logger.exception("the release %s cannot be served", options.manifest.release_id)
            failures.append(EXPLAINED_FAILURE)
            loop.call_soon_threadsafe(stopped.set)
            return
        loop.call_soon_threadsafe(loaded, model)
        seconds = time.perf_counter() - started
        logger.info("%s is ready after %.2f s", options.manifest.release_id, seconds)

    if again:  # the others serve; a request that came here would find no model
        load()
        await asyncio.sleep(0)
    server = await loop.create_server(connections, sock=_listen(options.host, options.port))
    if app.metrics.worker == 0 and not again:
        workers = app.shared.workers
        where = f"http://{options.host}:{options.port}"
        logger.info("%s listens on %s by %d workers", options.manifest.release_id, where, workers)
    app.log.start()
    if not again:
        threading.Thread(target=load, name="load", daemon=True).start()
    await stopped.wait()
    if not failures:
        await _drain(app, server, connections, options.manifest.limits.drain_seconds)
    connections.stop()
    if watch is not None:
        watch.cancel()
    return failures[0] if failures else 0


async def _drain(app: App, server: asyncio.Server, connections: Connections, seconds: float) -> None:
    """Every request that was accepted is answered, within the release's own limit."""
    app.closing = True
    await asyncio.sleep(DRAIN_GRACE_SECONDS)
    server.close()
    deadline = time.monotonic() + seconds
    while not connections.close_idle() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    if connections.open:
        logger.warning("%d requests were not answered within %g s", len(connections.open), seconds)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    return listener


def _most_connections() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        soft = max(soft, wanted)
    return max(soft - SPARE_DESCRIPTORS, SPARE_DESCRIPTORS)


async def _until_parent_is_gone() -> None:
    """Where the system does not tell a process that its parent has died."""
    parent = os.getppid()
    while os.getppid() == parent:
        await asyncio.sleep(1.0)
    os._exit(1)
