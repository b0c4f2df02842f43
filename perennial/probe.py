"""Asks a part of an installation over HTTP how it is."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple


class _Connection(http.client.HTTPConnection):
    """Refuses to talk to itself.

    A connection to a port of the ephemeral range that nobody listens on yet may be given that very port as
    its own, and TCP then connects it to itself: the server that was about to listen finds its port taken.
    """

    def connect(self) -> None:
        super().connect()
        if self.sock.getsockname() == self.sock.getpeername():
            # Reset rather than close, which would keep the port for another minute.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close()
            raise ConnectionRefusedError("nobody listens")


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


# The parts are on this machine or beside it; a proxy of the user's environment must not stand between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Handler)


class Answer(NamedTuple):
    """What came back: the status, the body, the headers with lower-case names."""

    status: int
    body: bytes
    headers: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


def probe(
    url: str,
    *,
    data: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 2.0,
) -> Answer | None:
    """GET `url`, or POST `data` to it; None when nobody answers in time. An error status is an answer."""
    request = urllib.request.Request(url, data=data, headers=dict(headers or {}))  # noqa: S310, our own parts
    try:
        with _OPENER.open(request, timeout=timeout_seconds) as response:
            return _answer(response.status, response.read(), response.headers.items())
    except urllib.error.HTTPError as error:
        with error:
            return _answer(error.code, error.read(), error.headers.items())
    except (OSError, http.client.HTTPException):
        return None


def _answer(status: int, body: bytes, headers: Any) -> Answer:
    return Answer(status, body, {name.lower(): value for name, value in headers})
