"""Clients that take their time to send a body: what they hold, and what they do not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from serving import http
from serving.metrics import CODES, CONNECTIONS, LAYOUT
from tests.serving.in_process import say, served
from tests.serving.toys import ROW, Toy, serve

BODY = json.dumps(ROW).encode()


def test_clients_that_send_slowly_hold_no_slot(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    release = toy.with_limits(tmp_path / "release", max_concurrent_requests=2)
    with serve(release, tmp_path) as service, service.client as client:
        address = urlsplit(service.url)
        place = (address.hostname or "", address.port or 0)
        slow = [socket.create_connection(place, timeout=10) for _ in range(4)]
        for connection in slow:
            connection.sendall(head(len(BODY)) + BODY[:10])
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


def head(length: int) -> bytes:
    return (
        f"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n".encode()
    )


def test_bodies_beyond_the_budget_of_all_of_them_are_refused_until_others_are_answered(
    toy: Toy, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with served(toy, tmp_path) as (app, port, _):
            budget = app.bodies.limit
            app.bodies.take(budget - len(BODY) - 10)  # what other requests hold
            slow_reader, slow_writer = await say(port, head(len(BODY)) + BODY[:-1])
            await asyncio.sleep(0.1)
            assert app.bodies.held == budget - 11
            refused, writer = await say(port, head(len(BODY)) + BODY)
            answer = await refused.read()
            assert answer.startswith(b"HTTP/1.1 429")
            assert b"retry-after: 1" in answer
            writer.close()
            assert app.bodies.held == budget - 11
            slow_writer.write(BODY[-1:])
            assert (await slow_reader.read()).startswith(b"HTTP/1.1 200")
            again, writer = await say(port, head(len(BODY)) + BODY)
            assert (await again.read()).startswith(b"HTTP/1.1 200")
            assert app.bodies.held == budget - len(BODY) - 10

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"POST /predict HTTP/1.1\r\nhost: x\r\n", b"HTTP/1.1 408"),  # half a head
        (b"P", b"HTTP/1.1 408"),
        (head(len(BODY)) + BODY[:20], b"HTTP/1.1 408"),  # half a body
        (b"", b""),  # nothing at all
        (b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n", b"HTTP/1.1 200"),  # idle after an answer
    ],
    ids=["half a head", "one byte", "half a body", "nothing", "idle"],
)
def test_a_client_that_does_not_go_on_is_closed(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes, said: bytes
) -> None:
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "KEEP_ALIVE_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(http, name, 0.2)

    async def scenario() -> None:
        async with served(toy, tmp_path) as (app, port, _):
            reader, writer = await say(port, sent)
            answer = await asyncio.wait_for(reader.read(), 5)
            assert answer.startswith(said) and bool(answer) == bool(said)
            await asyncio.sleep(2.2)  # two sweeps: whoever does not close is closed
            assert not app.bodies.held
            writer.close()

    asyncio.run(scenario())


def test_a_client_that_drips_its_head_gets_no_more_time_than_one_that_stops(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.3)

    async def scenario() -> None:
        async with served(toy, tmp_path) as (_, port, _):
            reader, writer = await say(port, b"POST /predict HTTP/1.1\r\n")
            started = time.monotonic()
            read = asyncio.create_task(reader.read())
            while not read.done():
                with contextlib.suppress(ConnectionError):
                    writer.write(b"x-drip: y\r\n")
                await asyncio.sleep(0.05)
                assert time.monotonic() - started < 10
            assert (await read).startswith(b"HTTP/1.1 408")
            writer.close()

    asyncio.run(scenario())


def test_connections_beyond_the_limit_are_told_so(toy: Toy, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(toy, tmp_path) as (_, port, _):
            held = [await say(port) for _ in range(20)]
            await asyncio.sleep(0.1)
            reader, writer = await say(port)
            assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 503")
            writer.close()
            for _, other in held[:5]:
                other.close()
            await asyncio.sleep(0.1)
            reader, writer = await say(port, head(len(BODY)) + BODY)
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            for _, other in [*held[5:], (reader, writer)]:
                other.close()

    asyncio.run(scenario())


def test_a_refusal_behind_a_slow_request_waits_for_its_answer(
    moody: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "LINGER_SECONDS", 0.2)
    body = b'{"distance": 2500}'
    slow = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    too_long = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n"

    async def scenario() -> None:
        async with served(moody, tmp_path) as (_, port, _):
            for second, status in ((b"garbage\r\n\r\n", b"400"), (too_long, b"413")):
                reader, writer = await say(port, slow + second)
                answers = await asyncio.wait_for(reader.read(), 10)
                assert [line.split()[1] for line in answers.splitlines() if b"HTTP/1.1 " in line] == [
                    b"200",
                    status,
                ]
                writer.close()

    asyncio.run(scenario())


def test_what_follows_a_refused_request_is_not_served(toy: Toy, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(toy, tmp_path) as (app, port, _):
            app.bodies.held = app.bodies.limit
            for keep in (b"connection: close", b"x: y"):
                ask = head(len(BODY)).replace(b"connection: close", keep) + BODY
                reader, writer = await say(port, ask + b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n")
                answers = await asyncio.wait_for(reader.read(), 5)
                assert answers.startswith(b"HTTP/1.1 429") and answers.count(b"HTTP/1.1") == 1
                await asyncio.sleep(0.1)
                counts = [
                    sum(app.metrics.own[LAYOUT.requests + LAYOUT.code[code] : LAYOUT.latencies : len(CODES)])
                    for code in (200, 400)
                ]
                assert counts == [0, 0]
                writer.close()

    asyncio.run(scenario())


def test_a_last_answer_that_nobody_reads_holds_its_connection_for_a_while_only(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "WRITE_SECONDS", 3.0)
    ask = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"

    async def scenario() -> None:
        async with served(toy, tmp_path) as (app, port, connections):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", port))
                unread = 0
                while not unread:
                    client.sendall(ask)
                    await asyncio.sleep(0.0005)
                    unread = sum(c._transport.get_write_buffer_size() for c in connections.open)
                client.sendall(ask.replace(b"host: x", b"connection: close"))
                await asyncio.sleep(0.1)
                assert len(connections.open) == 1
                for _ in range(300):  # thirty seconds at most
                    await asyncio.sleep(0.1)
                    if not connections.open and not app.metrics.own[CONNECTIONS]:  # told once a second
                        break
                assert not connections.open
            assert app.metrics.own[CONNECTIONS] == 0

    asyncio.run(scenario())
