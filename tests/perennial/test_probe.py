"""Asking whether something answers must not disturb what is about to."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from perennial import ports
from perennial.probe import probe

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_asking_a_port_of_the_systems_range_never_takes_it() -> None:
    """There, a connection may be given as its own the very port that it wants to reach, and reach itself."""
    low, high = (int(bound) for bound in _RANGE.read_text().split())
    port = ports.first_free("127.0.0.1", (low + high) // 2)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert probe(f"http://127.0.0.1:{port}/", timeout_seconds=0.2) is None
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        assert probe(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_seconds=0.2) is None
        connection, _ = server.accept()
        with connection:
            assert connection.recv(100).startswith(b"GET / HTTP/1.1")
