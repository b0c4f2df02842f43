"""TCP ports of this machine: which are free, and who holds the others."""

from __future__ import annotations

import socket
from collections.abc import Container
from pathlib import Path

from perennial.errors import InstallationError

_LAST_PORT = 65535
_LISTENING = "0A"


def is_free(host: str, port: int) -> bool:
    """Whether a server could bind the port now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: what is left of closed connections (TIME_WAIT) does not make a port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def first_free(host: str, start: int, taken: Container[int] = ()) -> int:
    """The first port from `start` upward that nobody listens on and that is not in `taken`."""
    for port in range(start, _LAST_PORT + 1):
        if port not in taken and is_free(host, port):
            return port
    raise InstallationError(
        f"no port is free on {host} from {start} upward",
        "a free port for each service process",
        "PERENNIAL_FIRST_SERVICE_PORT=… make up",
    )


def holder(port: int) -> tuple[int, str] | None:
    """The process id and command line of whoever listens on `port`; None where that cannot be read."""
    inodes = _listening_inodes(port)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = descriptor.readlink().name
        except OSError:
            continue
        if target in inodes:
            process = descriptor.parent.parent
            return int(process.name), command_line(int(process.name))
    return None


def command_line(pid: int) -> str:
    """The command line of a process, shortened to one readable line; empty where it cannot be read."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    line = " ".join(word.decode(errors="replace") for word in words).strip()
    return line if len(line) <= 120 else f"{line[:117]}..."


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in (line.split() for line in lines):
            if fields[3] == _LISTENING and int(fields[1].rsplit(":", 1)[1], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found
