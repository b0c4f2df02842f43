"""Load on one HTTP server: N keep-alive connections, each with one request under way (a closed loop).

    python -m benchmarks.load PORT REQUESTS_FILE CONNECTIONS SECONDS

REQUESTS_FILE is a msgpack list of whole requests as bytes, sent in turn. Prints a `Load` as JSON. One
process, one thread, epoll and bare sockets: what the generator uses of the machine, the server does not get.
"""

from __future__ import annotations

import gc
import select
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

WARM_SECONDS = 0.3  # the first answers count as load, not in the figures
END_SECONDS = 10.0  # for the requests under way at the end
SAMPLE_EVERY = 97  # answers that are kept, to be compared: not a divisor of anything else here
SAMPLES = 2000
RETRY_SECONDS = 0.02
_READ = 65_536  # above 128 KiB malloc maps and unmaps memory each time, which costs more than all the rest
_HEAD_END = b"\r\n\r\n"


class Sample(msgspec.Struct, frozen=True):
    """The answer to request number `request` of the file."""

    request: int
    body: str


class Load(msgspec.Struct, frozen=True):
    """What a server did under load. Latencies are from before the send to the answer's last byte."""

    rps: float
    p50_ms: float
    p99_ms: float
    answered: int  # warm-up included: what the server's CPU time is divided by
    errors: int  # answers that are not 2xx, connections that failed or ended early, no answer at all
    first_error: str
    cpu_seconds: float  # the generator's own
    samples: list[Sample]


class Connection:
    """One socket and the request that is under way on it."""

    __slots__ = ("port", "received", "request", "sent_at", "socket")

    def __init__(self, port: int) -> None:
        self.port = port
        self.received = b""
        self.request = 0
        self.sent_at = 0.0
        self.socket = socket.socket()

    def connect(self) -> None:
        """Raises OSError when nobody listens."""
        self.received = b""
        self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=END_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)

    def send(self, request: bytes) -> None:
        """All of it: a server that does not read stops the generator too."""
        sent = self.socket.send(request)
        while sent < len(request):
            select.select([], [self.socket], [], END_SECONDS)
            sent += self.socket.send(request[sent:])


def drive(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Load:
    """Load `port` for `seconds` after the warm-up."""
    run = _Run(port, requests)
    gc.disable()
    began = time.perf_counter()
    run.count_from, run.stop_at = began + WARM_SECONDS, began + WARM_SECONDS + seconds
    for _ in range(connections):
        run.start(Connection(port))
    run.loop()
    milliseconds = sorted(latency * 1000 for latency in run.latencies) or [float("nan")]
    return Load(
        rps=len(run.latencies) / seconds,
        p50_ms=milliseconds[len(milliseconds) // 2],
        p99_ms=milliseconds[int(len(milliseconds) * 0.99)],
        answered=run.answered,
        errors=run.errors,
        first_error=run.first_error,
        cpu_seconds=time.process_time(),
        samples=run.samples,
    )


class _Run:
    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self.requests = requests
        self.epoll = select.epoll()
        self.open: dict[int, Connection] = {}
        self.next = self.answered = self.errors = 0
        self.first_error = ""
        self.latencies: list[float] = []
        self.samples: list[Sample] = []
        self.count_from = self.stop_at = 0.0

    def start(self, connection: Connection) -> None:
        """Connect and send the next request; tried again for as long as the run lasts."""
        while True:
            try:
                connection.connect()
                self.open[connection.socket.fileno()] = connection
                self.epoll.register(connection.socket, select.EPOLLIN)
                self.send(connection)
                return
            except OSError as error:
                self.fail(f"{type(error).__name__}: {error}")
                self.close(connection)
            if time.perf_counter() > self.stop_at:
                return
            time.sleep(RETRY_SECONDS)

    def send(self, connection: Connection) -> None:
        connection.request = self.next
        self.next = (self.next + 1) % len(self.requests)
        connection.sent_at = time.perf_counter()
        connection.send(self.requests[connection.request])

    def close(self, connection: Connection) -> None:
        self.open.pop(connection.socket.fileno(), None)
        connection.socket.close()

    def fail(self, why: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or why

    def loop(self) -> None:
        poll, opened, read = self.epoll.poll, self.open, self.read
        while opened:
            for descriptor, _ in poll(1.0):
                if (connection := opened.get(descriptor)) is not None:
                    read(connection)
            if time.perf_counter() > self.stop_at + END_SECONDS:
                for connection in list(opened.values()):
                    self.fail(f"no answer within {END_SECONDS} s of the end")
                    self.close(connection)

    def read(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            self.again(connection, f"{type(error).__name__}: {error}")
            return
        received = connection.received + data if connection.received else data
        end = answer_end(received, ended=not data)
        if end is None and data:
            connection.received = received
            return
        if end is None:
            self.again(connection, f"connection ended after {len(received)} bytes of an answer")
            return
        now = time.perf_counter()
        connection.received = b""
        self.answered += 1
        if received[9:10] != b"2":
            self.fail(received[:200].decode("latin-1"))
        elif self.count_from <= now <= self.stop_at:
            self.latencies.append(now - connection.sent_at)
        if self.answered % SAMPLE_EVERY == 0 and len(self.samples) < SAMPLES:
            self.samples.append(Sample(connection.request, body_of(received[:end]).decode("latin-1")))
        if not data or says_close(received):
            self.again(connection)
        elif now > self.stop_at:
            self.close(connection)
        else:
            try:
                self.send(connection)
            except OSError as error:
                self.again(connection, f"{type(error).__name__}: {error}")

    def again(self, connection: Connection, why: str = "") -> None:
        """The server has closed, as is its right after an answer: a new connection."""
        if why:
            self.fail(why)
        self.close(connection)
        if time.perf_counter() < self.stop_at:
            self.start(connection)


def answer_end(received: bytes, *, ended: bool) -> int | None:
    """Where the answer ends, or None while it has not. `ended`: the server has closed the connection."""
    head = received.find(_HEAD_END)
    if head < 0:
        return None
    headers = received[:head].lower()
    at = headers.find(b"\r\ncontent-length:")
    if at >= 0:
        end = headers.find(b"\r", at + 17)
        whole = head + 4 + int(headers[at + 17 : end if end > 0 else None])
        return whole if len(received) >= whole else None
    if b"\r\ntransfer-encoding: chunked" in headers:
        return len(received) if received.endswith(b"0\r\n\r\n") else None
    return len(received) if ended else None


def says_close(received: bytes) -> bool:
    """Whether the server will close the connection after this answer."""
    return b"\r\nconnection: close" in received[: received.find(_HEAD_END)].lower()


def body_of(answer: bytes) -> bytes:
    """The body of a whole answer, its chunks joined."""
    head, _, body = answer.partition(_HEAD_END)
    if b"\r\ntransfer-encoding: chunked" not in head.lower():
        return body
    joined = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        joined, body = joined + rest[:length], rest[length + 2 :] if length else b""
    return joined


def request_of(path: str, body: bytes) -> bytes:
    """A POST of JSON as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def main() -> None:
    port, requests, connections, seconds = sys.argv[1:]
    wire = msgspec.msgpack.decode(Path(requests).read_bytes(), type=list[bytes])
    load = drive(int(port), wire, int(connections), float(seconds))
    sys.stdout.buffer.write(msgspec.json.encode(load))


if __name__ == "__main__":
    main()
