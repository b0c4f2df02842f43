"""HTTP as bytes on a socket: what clients may do, and what they get for what they may not."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serving.toys import RELEASE_ID, ROW, Service, Toy, serve

BODY = json.dumps(ROW).encode()
JSON = b"content-type: application/json\r\n"
ASK = b"POST /predict HTTP/1.1\r\nhost: x\r\n" + JSON + b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)


@contextmanager
def connected(service: Service, timeout: float = 10) -> Iterator[socket.socket]:
    address = urlsplit(service.url)
    place = (address.hostname or "", address.port or 0)
    with socket.create_connection(place, timeout=timeout) as connection:
        yield connection


def until_closed(connection: socket.socket) -> bytes:
    said = b""
    while chunk := connection.recv(65536):
        said += chunk
    return said


def statuses(said: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+) ", said)]


def one_answer(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of the next answer."""
    said = b""
    while b"\r\n\r\n" not in said:
        said += connection.recv(65536)
    head, _, body = said.partition(b"\r\n\r\n")
    match = re.search(rb"content-length: (\d+)", head)
    assert match is not None, head
    while len(body) < int(match[1]):
        body += connection.recv(65536)
    return head, body


def test_a_connection_is_kept_and_its_answers_have_a_date_and_the_release(service: Service) -> None:
    with connected(service) as connection:
        for _ in range(3):
            connection.sendall(ASK)
            head, body = one_answer(connection)
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"connection: close" not in head
            assert re.search(rb"date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", head)
            assert f"x-perennial-release: {RELEASE_ID}".encode() in head
            assert len(json.loads(body)["predictions"]) == 1


def test_pipelined_requests_are_answered_in_their_order(service: Service) -> None:
    ids = [f"piped-{number}" for number in range(50)]
    asks = [
        ASK.replace(b"host: x", b"host: x\r\nx-request-id: " + name.encode())
        if number % 3
        else b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-request-id: %b\r\n\r\n" % name.encode()
        for number, name in enumerate(ids)
    ]
    with connected(service) as connection:
        connection.sendall(b"".join(asks) + ASK.replace(b"host: x", b"host: x\r\nconnection: close"))
        said = until_closed(connection)
    assert statuses(said) == [200] * 51
    assert re.findall(rb"x-request-id: (piped-\d+)\r\n", said) == [name.encode() for name in ids]


def test_a_refusal_in_a_pipeline_comes_after_the_answers_before_it(service: Service) -> None:
    too_long = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 999999\r\n\r\n"
    with connected(service) as connection:
        connection.sendall(ASK + ASK + too_long)
        assert statuses(until_closed(connection)) == [200, 200, 413]
    with connected(service) as connection:
        connection.sendall(ASK + b"garbage\r\n\r\n")
        assert statuses(until_closed(connection)) == [200, 400]


def test_a_chunked_body_one_byte_at_a_time_is_answered(service: Service) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\n" + JSON + b"transfer-encoding: chunked\r\n\r\n"
    with connected(service) as connection:
        for at in range(0, len(head + chunks), 7):
            connection.sendall((head + chunks)[at : at + 7])
        assert one_answer(connection)[0].startswith(b"HTTP/1.1 200")


def test_a_client_that_waits_for_leave_to_send_gets_it(service: Service) -> None:
    head, _, body = ASK.partition(b"\r\n\r\n")
    with connected(service) as connection:
        connection.sendall(head + b"\r\nexpect: 100-continue\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert one_answer(connection)[0].startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "ask",
    [
        ASK.replace(b"/predict", b"http://some.host/predict?x=1"),
        ASK.replace(b"host: x", b"host: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c"),
        ASK.replace(b"HTTP/1.1", b"HTTP/1.0"),
        ASK.replace(b"host: x", b"HOST: x\r\nX-UNUSED:  \xff\xfe "),
        b"\r\n\r\n" + ASK,
        ASK.partition(b"content-length")[0]
        + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
        + b"content-type: text/csv\r\ncontent-encoding: gzip\r\n\r\n",
    ],
    ids=["absolute-form", "upgrade", "http-1.0", "odd headers", "empty lines first", "trailers"],
)
def test_unusual_requests_are_answered(service: Service, ask: bytes) -> None:
    with connected(service) as connection:
        connection.sendall(ask)
        head, body = one_answer(connection)
        assert head.startswith(b"HTTP/1.1 200")
        assert len(json.loads(body)["predictions"]) == 1


def test_after_a_body_with_an_upgrade_the_connection_goes_on(service: Service) -> None:
    upgrade = ASK.replace(b"host: x", b"host: x\r\nconnection: upgrade\r\nupgrade: h2c")
    with connected(service) as connection:
        connection.sendall(upgrade + ASK)
        assert one_answer(connection)[0].startswith(b"HTTP/1.1 200")
        connection.sendall(ASK)
        assert one_answer(connection)[0].startswith(b"HTTP/1.1 200")


def test_many_offers_of_another_protocol_in_a_row_are_answered(service: Service) -> None:
    ask = b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: upgrade%b\r\nupgrade: h2c\r\n\r\n"
    with connected(service) as connection:
        connection.sendall(ask % b"" * 1500 + ask % b", close")
        assert statuses(until_closed(connection)) == [200] * 1501


@pytest.mark.parametrize(
    "before", [b"x: y\r\n" * 20 + b"\r\n", b"content-length: 19000\r\n\r\n" + b" " * 19000]
)
def test_a_head_that_comes_in_two_pieces_behind_many_requests_is_no_long_one(
    service: Service, before: bytes
) -> None:
    ask = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"
    many = 230_000 // len(ask + before)
    with connected(service) as connection:
        connection.sendall((ask + before) * many + ask[:30])
        time.sleep(0.2)
        connection.sendall(ask[30:] + b"connection: close\r\n\r\n")
        assert statuses(until_closed(connection)) == [200] * (many + 1)


def test_a_client_of_http_1_0_is_not_left_to_wait_for_the_end_of_the_answer(service: Service) -> None:
    with connected(service, timeout=5) as connection:
        connection.sendall(b"GET /health/live HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
        assert statuses(until_closed(connection)) == [200]


@pytest.mark.parametrize("trailers", [b"x: " + b"y" * 1_000_000, b"x: y\r\n" * 200_000], ids=["long", "many"])
def test_trailers_without_end_are_refused(service: Service, trailers: bytes) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\n" + JSON + b"transfer-encoding: chunked\r\n\r\n"
    with connected(service) as connection:
        connection.sendall(head + b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY) + trailers)
        assert statuses(until_closed(connection)) == [431]


def test_a_half_closed_client_gets_its_answer(service: Service) -> None:
    with connected(service) as connection:
        connection.sendall(ASK)
        connection.shutdown(socket.SHUT_WR)
        assert statuses(until_closed(connection)) == [200]


def test_head_has_the_length_and_no_body(service: Service) -> None:
    with connected(service) as connection:
        connection.sendall(b"HEAD /health/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        said = until_closed(connection)
    assert said.endswith(b"content-length: 18\r\n\r\n")


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # a TLS client
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 30 + b"\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 10000000000\r\n\r\n", 413),
        (b"POST /predict HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"GET /health/live HTTP/1.1\r\nx: " + b"y" * 200_000, 431),
        (b"GET /" + b"y" * 200_000, 431),
        (b"GET /health/live HTTP/1.1\r\n" + b"x: y\r\n" * 30_000, 431),
    ],
)
def test_what_is_not_a_request_gets_a_reason_and_is_closed(
    service: Service, said: bytes, status: int
) -> None:
    with connected(service) as connection:
        connection.sendall(said)
        answer = until_closed(connection)
    assert statuses(answer) == [status]
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_half_requests_leave_the_service_as_it_was(service: Service) -> None:
    for end in (1, 20, ASK.index(b"\r\n\r\n") + 4, len(ASK) - 1):
        with connected(service) as connection:
            connection.sendall(ASK[:end])
    with service.client as client:
        assert client.post("/predict", json=ROW).status_code == 200
        deadline = time.monotonic() + 5
        while "perennial_requests_in_flight{" in client.get("/metrics").text:
            if re.search(r"in_flight\{[^}]*\} 0\n", client.get("/metrics").text):
                break
            assert time.monotonic() < deadline


def test_a_client_that_never_reads_is_cut_off_and_holds_no_memory(toy: Toy, tmp_path: Path) -> None:
    """Pipelined questions without end: the service stops reading long before it has answered them all."""
    with serve(toy.release, tmp_path) as service, connected(service, timeout=1) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 50_000_000:
                sent += connection.send(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        assert sent < 20_000_000
        with service.client as client:
            assert client.post("/predict", json=ROW).status_code == 200
