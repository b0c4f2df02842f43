"""Finds and ends the processes of an installation: all of them, and nobody else's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

# Each process of an installation carries its folder in this variable, so that even after an accident
# (a killed supervisor) its leftovers can be told from everybody else's processes.
MARK = "PERENNIAL_INSTALLATION"


def is_alive(pid: int) -> bool:
    """Whether the process exists and has not ended (a zombie has)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self").exists()


def descendants(pid: int) -> list[int]:
    """Children, grandchildren and so on of a process. Empty where /proc is missing."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def marked(root: Path) -> list[int]:
    """All living processes that carry this installation's mark. Empty where /proc is missing."""
    return having(MARK, str(root))


def having(variable: str, value: str) -> list[int]:
    """All living processes but this one that were started with this environment variable."""
    wanted = f"{variable}={value}".encode()
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environment.read_bytes().split(b"\0")
        except OSError:
            continue
        pid = int(environment.parent.name)
        if wanted in variables and pid != os.getpid() and is_alive(pid):
            found.append(pid)
    return found


def end(pids: Iterable[int], *, grace_seconds: float = 5.0) -> None:
    """SIGTERM, then, for those that stay, SIGKILL. Returns when none of them is alive."""
    remaining = [pid for pid in pids if _send(pid, signal.SIGTERM)]
    deadline = time.monotonic() + grace_seconds
    while remaining and time.monotonic() < deadline:
        time.sleep(0.05)
        remaining = [pid for pid in remaining if is_alive(pid)]
    for pid in remaining:
        _send(pid, signal.SIGKILL)
    while any(is_alive(pid) for pid in remaining):
        time.sleep(0.02)


def _send(pid: int, signal_number: int) -> bool:
    try:
        os.kill(pid, signal_number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
