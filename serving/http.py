"""HTTP/1.1 on an asyncio transport: httptools parses, this file counts, times and answers.

One `Connection` per client. A handler gets each complete `Request` and calls `request.answer` when it can, at
once or later; pipelined requests wait for the one before. No request makes a task or a timer: one sweep a
second looks at all deadlines.

| what a client does                          | what it gets                                   |
|---------------------------------------------|------------------------------------------------|
| a head that is not HTTP                     | 400, closed                                    |
| a head, or trailers, beyond HEAD_BYTES      | 431, closed                                    |
| a head or a body that does not end in time  | 408, closed                                    |
| a body beyond what `Handler.admit` allows   | the refusal at once, closed after a short wait |
| nothing for KEEP_ALIVE_SECONDS              | closed                                         |
| it does not read its answers                | closed                                         |
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from http import HTTPStatus
from typing import Any, Protocol

import httptools

HEAD_BYTES = 65_536
HEAD_SECONDS = 10.0
BODY_SECONDS = 30.0
WRITE_SECONDS = 30.0  # how long answers may wait for a client to read them
LINGER_SECONDS = 2.0  # what is still being sent is read so long: a reset would destroy the answer on its way
KEEP_ALIVE_SECONDS = 75.0  # longer than a router keeps idle connections, so that it closes them first
PIPELINED = 8  # complete requests that may wait behind one; then the client is no longer read

JSON = b"application/json"
LEFT = 499  # counted, never sent

_REASONS = {status.value: f"{status.value} {status.phrase}".encode() for status in HTTPStatus}


class Refused(Exception):
    """An answer that can be given before the body is there."""

    def __init__(self, status: int, body: bytes, headers: bytes = b"") -> None:
        self.status = status
        self.body = body
        self.headers = headers


class Handler(Protocol):
    """What a server does with requests; called on the event loop's thread."""

    closing: bool  # every answer closes its connection

    def admit(self, request: Request) -> None:
        """Called with the head. Raises `Refused`, or sets `request.body_limit`."""

    def take(self, request: Request, size: int) -> None:
        """Called with each piece of a body. Raises `Refused` where there is no room for it."""

    def handle(self, request: Request) -> None:
        """Called with the complete request; answers it once, now or later."""

    def refuse(self, request: Request, status: int, reason: str, expected: str) -> Refused:
        """The refusal of what is wrong with the protocol."""

    def done(self, request: Request, status: int) -> None:
        """Called once per request, after its answer or when its client has left."""

    def tick(self, connections: int) -> None:
        """Called once a second with the number of open connections."""


class Request:
    """One request. `answer` may be called after the client has left: it then does nothing."""

    __slots__ = (
        "_connection",
        "body",
        "body_limit",
        "finished",
        "headers",
        "held",
        "keep_alive",
        "method",
        "path",
        "refusal",
        "request_id",
        "route",
        "size",
        "started",
    )

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.method = b""
        self.path = b""
        self.headers: dict[bytes, bytes] = {}
        self.body: bytes | bytearray = b""
        self.size = 0  # bytes of the body so far
        self.held = 0  # bytes that the handler has to give back
        self.body_limit = 0
        self.keep_alive = True
        self.refusal: Refused | None = None
        self.finished = False
        self.request_id = ""
        self.route = 0
        self.started = time.perf_counter()

    def answer(self, status: int, body: bytes, content_type: bytes = JSON, headers: bytes = b"") -> None:
        """Send the one answer; `headers` are whole lines."""
        self._connection.answer(self, status, body, content_type, headers)


class Connections:
    """All connections of one handler, and the sweep over their deadlines."""

    def __init__(self, handler: Handler, common_headers: bytes, limit: int) -> None:
        self.handler = handler
        self.limit = limit
        self.open: set[Connection] = set()
        self.now = time.monotonic()  # of the last sweep: exact enough for deadlines
        self._common = common_headers
        self._heads: dict[tuple[int, bytes], bytes] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    def __call__(self) -> Connection:
        return Connection(self)

    def sweep(self) -> None:
        """Look at every deadline now, and once a second from now on."""
        self._sweeper = asyncio.get_running_loop().call_later(1.0, self.sweep)
        self.now = time.monotonic()
        self._heads.clear()  # the date in them
        for connection in [c for c in self.open if c.deadline < self.now]:
            connection.expire()
        self.handler.tick(len(self.open))

    def head(self, status: int, content_type: bytes) -> bytes:
        """The head of an answer up to the headers that differ."""
        head = self._heads.get((status, content_type))
        if head is None:
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()).encode()
            head = b"HTTP/1.1 %b\r\ndate: %b\r\ncontent-type: %b\r\n%b"
            head %= (_REASONS[status], date, content_type, self._common)
            self._heads[status, content_type] = head
        return head

    def close_idle(self) -> bool:
        """Close what waits for nothing; whether all are closed."""
        for connection in list(self.open):
            connection.close_if_idle()
        return not self.open

    def stop(self) -> None:
        """Close all, answered or not, and end the sweep."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.open):
            connection.abort()


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, connections: Connections) -> None:
        self._all = connections
        self._handler = connections.handler
        self._parser = httptools.HttpRequestParser(self)
        self._transport: Any = None
        self._request: Request | None = None  # whose head or body is being read
        self._headers: dict[bytes, bytes] = {}  # of what is being read
        self._url = b""
        self._head_bytes = 0  # of a head or of trailers that are not complete
        self._last_size = 0  # of the last complete body
        self._working: Request | None = None  # handed to the handler, not answered
        self._waiting: deque[Request] = deque()
        self._paused = False
        self._lingering = False
        self.deadline = connections.now + KEEP_ALIVE_SECONDS

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._all.open.add(self)
        if len(self._all.open) > self._all.limit:
            self._protocol_error(503, "too many connections", f"at most {self._all.limit}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.open.discard(self)
        left = [r for r in (self._request, self._working, *self._waiting) if r is not None]
        self._request = self._working = None
        self._waiting.clear()
        for request in dict.fromkeys(left):
            self._finish(request, LEFT)

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        rest: bytes | memoryview = data
        try:
            while rest:
                try:
                    self._parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    rest = memoryview(rest)[upgrade.args[0] :]
                    self._decline_upgrade()
        except httptools.HttpParserCallbackError:
            raise  # a mistake of ours
        except httptools.HttpParserError:
            self._protocol_error(400, "the request is not HTTP/1.1", "a request line, headers, a body")
        if self._head_bytes and not self._lingering:
            self._count_head(data)

    def _count_head(self, data: bytes) -> None:
        """Bound what the parser keeps of a head, or of a chunked body's trailers, until it is complete."""
        assert self._request is not None
        if self._head_bytes > 1:
            self._head_bytes += len(data)
        elif self._request.method:
            self._head_bytes += 1  # a chunk or trailers: counted from the next piece on
        else:  # other requests are before it in this piece
            start = data.rfind(b"\r\n\r\n")
            self._head_bytes += max(len(data) - (start + 4 if start >= 0 else 0) - self._last_size, 1)
        if self._head_bytes > HEAD_BYTES:
            self._protocol_error(431, f"the head has more than {HEAD_BYTES} bytes", "shorter headers")

    def _decline_upgrade(self) -> None:
        """Serve a request that offers another protocol as what it is, HTTP/1.1.

        The parser takes what follows such a head for the other protocol, so another one is given the head
        again, without the offer. Raises `HttpParserError` for CONNECT, which is nothing but the offer.
        """
        request, method = self._request, self._parser.get_method()
        if request is None or method == b"CONNECT":
            raise httptools.HttpParserInvalidMethodError
        kept = [h for h in request.headers.items() if h[0] not in (b"upgrade", b"connection")]
        if b"close" in request.headers.get(b"connection", b"").lower():
            kept.append((b"connection", b"close"))
        lines = b"".join(b"%b: %b\r\n" % header for header in kept)
        version = self._parser.get_http_version().encode()
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"%b %b HTTP/%b\r\n%b\r\n" % (method, self._url, version, lines))

    def eof_received(self) -> bool:
        if self._working is None:
            return False
        (self._waiting or [self._working])[-1].keep_alive = False
        return True  # half closed: what was asked is still answered

    def pause_writing(self) -> None:
        self.deadline = self._all.now + WRITE_SECONDS
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self._read_on()

    # httptools

    def on_message_begin(self) -> None:
        request = self._request = Request(self)
        self._headers = request.headers
        self._url = b""
        self._head_bytes = 1
        self.deadline = self._all.now + HEAD_SECONDS

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        request = self._request
        assert request is not None
        request.method = self._parser.get_method()
        request.path = _path(self._url)
        headers = request.headers
        old = (b"connection" in headers or b"expect" in headers) and self._parser.get_http_version() == "1.0"
        # Who asks for it in HTTP/1.0 wants to read so in the answer, or waits for the end of the connection.
        request.keep_alive = self._parser.should_keep_alive() and not old
        self._head_bytes = 0
        self.deadline = self._all.now + BODY_SECONDS
        try:
            self._handler.admit(request)
        except Refused as refused:
            self._refuse(request, refused)
            return
        expects = headers.get(b"expect", b"").lower() == b"100-continue"
        if expects and not old and self._working is None:  # behind another, it would be taken for its answer
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_chunk_header(self) -> None:
        self._head_bytes = 1  # until its first byte comes: trailers follow the last one
        self._headers = {}  # for them: they come too late to say anything

    def on_body(self, piece: bytes) -> None:
        request = self._request
        assert request is not None
        self._head_bytes = 0
        if request.refusal is not None:
            return
        request.size += len(piece)
        try:
            if request.size > request.body_limit:
                raise self._handler.refuse(
                    request, 413, f"the body has more than {request.body_limit} bytes", "a shorter one"
                )
            self._handler.take(request, len(piece))
        except Refused as refused:
            self._refuse(request, refused)
            return
        if not request.body:
            request.body = piece
        else:
            if not isinstance(request.body, bytearray):
                request.body = bytearray(request.body)
            request.body += piece

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        request, self._request = self._request, None
        assert request is not None
        self.deadline = self._all.now + KEEP_ALIVE_SECONDS
        self._head_bytes = 0
        self._last_size = request.size
        if self._transport.is_closing():  # the last answer of this connection is given
            self._finish(request, LEFT)
        elif request.refusal is not None:
            if request.finished:
                self.deadline = self._all.now + WRITE_SECONDS
                self._transport.close()
        elif self._working is not None:
            self._waiting.append(request)
            if len(self._waiting) >= PIPELINED:
                self._transport.pause_reading()
        else:
            self._working = request
            self._handler.handle(request)

    # answers

    def answer(self, request: Request, status: int, body: bytes, content_type: bytes, headers: bytes) -> None:
        """Send the answer of the request at work, and begin with the next one."""
        if request.finished:
            return
        closes = not request.keep_alive or (self._handler.closing and not self._waiting)
        parts = (
            self._all.head(status, content_type),
            headers,
            b"connection: close\r\n" if closes else b"",
            b"content-length: %d\r\n\r\n" % len(body),
            b"" if request.method == b"HEAD" else body,
        )
        self._transport.write(b"".join(parts))
        self._finish(request, status)
        if request is not self._working:
            return
        self._working = None
        if closes:
            self._close_with_what_waits()
        elif self._waiting:
            self._working = self._waiting.popleft()
            self._read_on()
            # Not at once: a long pipeline must not become a deep stack.
            asyncio.get_running_loop().call_soon(self._handle_next, self._working)

    def expire(self) -> None:
        """The deadline has passed."""
        request, now = self._request, self._all.now
        refused = self._lingering or (request is not None and request.refusal is not None)
        unread = len(self._waiting) >= PIPELINED
        if self._paused or self._transport.is_closing():
            self.abort()
        elif self._working is not None and (request is None or refused or unread):
            # the service's own time, not the client's
            self.deadline = now + (LINGER_SECONDS if refused else KEEP_ALIVE_SECONDS)
        elif refused:
            self.abort()
        elif request is None:
            self.deadline = now + WRITE_SECONDS
            self._transport.close()
        elif not request.method:
            self._protocol_error(408, f"the head did not arrive within {HEAD_SECONDS:.0f} s", "a whole head")
        else:
            self._protocol_error(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", "a whole body")

    def close_if_idle(self) -> None:
        """Close a connection on which nothing is under way."""
        if self._working is None and self._request is None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def _handle_next(self, request: Request) -> None:
        if request.finished:
            return
        if request.refusal is None:
            self._handler.handle(request)
        else:
            self.answer(request, request.refusal.status, request.refusal.body, JSON, request.refusal.headers)

    def _read_on(self) -> None:
        if not self._paused and len(self._waiting) < PIPELINED and not self._transport.is_closing():
            self._transport.resume_reading()

    def _refuse(self, request: Request, refusal: Refused) -> None:
        """Answer before all is there. What comes after it on this connection is not trusted."""
        request.refusal = refusal
        request.keep_alive = False
        request.body = b""
        self.deadline = self._all.now + LINGER_SECONDS
        if self._working is not None:
            self._waiting.append(request)
        else:
            self.answer(request, refusal.status, refusal.body, JSON, refusal.headers)

    def _protocol_error(self, status: int, reason: str, expected: str) -> None:
        """Answer what is no request, read on for a moment, and close."""
        if self._transport.is_closing():  # the last answer of this connection is given
            self._lingering = True
            return
        request, self._request = self._request or Request(self), None
        if request.finished:
            self.abort()
            return
        self._lingering = True
        self._refuse(request, self._handler.refuse(request, status, reason, expected))
        if request.finished and self._transport.can_write_eof():
            self._transport.write_eof()

    def _close_with_what_waits(self) -> None:
        for request in self._waiting:
            self._finish(request, LEFT)
        self._waiting.clear()
        self.deadline = self._all.now + WRITE_SECONDS
        self._transport.close()

    def _finish(self, request: Request, status: int) -> None:
        if not request.finished:
            request.finished = True
            self._handler.done(request, status)


def _path(url: bytes) -> bytes:
    if not url.startswith(b"/"):  # absolute form, as to a proxy
        try:
            url = httptools.parse_url(url).path or b"/"
        except httptools.HttpParserInvalidURLError:
            return b""
    return url.partition(b"?")[0]
