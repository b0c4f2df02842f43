"""Clients that take their time to send a body: what they hold, and what they do not."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serving.app import App
from serving.prediction_log import PredictionLog
from serving.scorer import Scorer, read_manifest, read_schema
from tests.serving.toys import ROW, Toy, serve

BODY = json.dumps(ROW).encode()


def test_clients_that_send_slowly_hold_no_slot(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    release = toy.with_limits(tmp_path / "release", max_concurrent_requests=2)
    head = f"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(BODY)}\r\n\r\n"
    with serve(release, tmp_path) as service, service.client as client:
        address = urlsplit(service.url)
        place = (address.hostname or "", address.port or 0)
        slow = [socket.create_connection(place, timeout=10) for _ in range(4)]
        for connection in slow:
            connection.sendall(head.encode() + BODY[:10])
        time.sleep(0.3)
        assert client.post("/predict", json=ROW).status_code == 200
        assert any(
            line.startswith("perennial_requests_in_flight") and line.endswith(" 0")
            for line in client.get("/metrics").text.splitlines()
        )
        for connection in slow:
            with connection:
                connection.sendall(BODY[10:])
                answer = b""
                while chunk := connection.recv(65536):
                    answer += chunk
            assert answer.startswith(b"HTTP/1.1 200"), answer


def test_bodies_beyond_the_budget_of_all_of_them_are_refused_until_others_are_answered(toy: Toy) -> None:
    manifest, schema = read_manifest(toy.release), read_schema(toy.release)
    log = PredictionLog("memory:///", Path("unused"), "test", manifest.project, manifest.release_id)
    app = App(manifest, schema, log, Scorer(toy.release))
    budget = app.bodies.limit

    async def ask(*chunks: bytes, before_last: asyncio.Event | None = None) -> dict[str, Any]:
        left = list(chunks)
        answer: dict[str, Any] = {}

        async def receive() -> Mapping[str, Any]:
            if len(left) == 1 and before_last is not None:
                await before_last.wait()
            chunk = left.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(left)}

        async def send(message: dict[str, Any]) -> None:
            answer.update(message)

        await app({"type": "http", "method": "POST", "path": "/predict", "headers": []}, receive, send)
        return answer

    async def scenario() -> None:
        finish = asyncio.Event()
        app.bodies.take(budget - len(BODY) - 10)  # what other requests hold
        slow = asyncio.create_task(ask(BODY, b"", before_last=finish))
        await asyncio.sleep(0.05)
        assert app.bodies.held == budget - 10
        refused = await ask(BODY)
        assert refused["status"] == 429
        assert dict(refused["headers"])[b"retry-after"] == b"1"
        assert app.bodies.held == budget - 10
        finish.set()
        assert (await slow)["status"] == 200
        assert (await ask(BODY))["status"] == 200
        assert app.bodies.held == budget - len(BODY) - 10

    asyncio.run(scenario())
