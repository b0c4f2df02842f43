"""The server's own parts in the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from serving import models
from serving.app import App, common_headers
from serving.contract import SITE_DIRECTORY, Plan
from serving.decode import Decoder
from serving.http import Connections
from serving.metrics import Metrics, Shared
from serving.prediction_log import PredictionLog
from serving.release import read_manifest, read_schema
from tests.serving.toys import Toy


@contextlib.asynccontextmanager
async def served(
    toy: Toy, folder: Path, plan: Plan | None = None
) -> AsyncIterator[tuple[App, int, Connections]]:
    """The server's own parts on this event loop, so that a test can look into them."""
    manifest, schema = read_manifest(toy.release), read_schema(toy.release)
    decoder = Decoder(schema, plan)
    log = PredictionLog(
        (folder / "store").as_uri(),
        folder / "spool",
        "test",
        manifest.project,
        manifest.release_id,
        decoder.columns,
    )
    _forget(manifest.package)  # another test's release, loaded in this process, may have the same name
    app = App(manifest, schema, plan, decoder, log, Metrics(Shared(1), 0))
    app.serve(models.load(toy.release, plan, decoder))
    connections = Connections(app, common_headers(manifest), limit=20)
    connections.sweep()
    server = await asyncio.get_running_loop().create_server(connections, "127.0.0.1", 0)
    try:
        yield app, server.sockets[0].getsockname()[1], connections
    finally:
        connections.stop()
        server.close()
        sys.path[:] = [part for part in sys.path if part != str((toy.release / SITE_DIRECTORY).resolve())]
        _forget(manifest.package)


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


async def say(port: int, *pieces: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    return reader, writer
