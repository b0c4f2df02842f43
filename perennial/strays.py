"""Processes of an installation that its supervisord has lost sight of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from perennial import leftovers
from perennial.errors import InstallationError
from perennial.journal import started_at
from perennial.settings import Settings
from perennial.supervision import Supervisor

_SETTLED_SECONDS = 60.0  # what has just been started may not be in supervisord's list yet
_RUN = b"\0PREFECT__FLOW_RUN_ID="  # a run that outlived its worker reports its end itself


class Stray(NamedTuple):
    """A process, known again by the moment it started."""

    pid: int
    started: int  # clock ticks since the machine's start
    command: str
    why: str
    age_seconds: float

    def end(self) -> bool:
        """It and all it started, SIGTERM before SIGKILL."""
        if started_at(self.pid) == self.started:
            leftovers.end([self.pid, *leftovers.descendants(self.pid)])
        return started_at(self.pid) != self.started


def strays(settings: Settings, settled_seconds: float = _SETTLED_SECONDS) -> Iterator[Stray]:
    """What a part or service that was killed left running, and what is left of an earlier supervisord.

    None while supervisord does not run: everything is left over then, and `make down` ends it. None where
    /proc is missing.
    """
    supervisor = Supervisor(settings)
    try:
        head = supervisor.pid()
        supervised = {process.pid for process in supervisor.processes().values()}
    except InstallationError:
        return
    below = leftovers.descendants(head)
    # It adopts what its programs leave behind (see process.start_daemon).
    adopted = {pid for pid in below if _parent(pid) == head} - supervised
    for pid in sorted(adopted | set(leftovers.marked(settings.root)) - {head, *below}):
        started = started_at(pid)
        age = _uptime_seconds() - started / os.sysconf("SC_CLK_TCK")
        if started and age >= settled_seconds and _RUN not in b"\0" + _read(pid, "environ"):
            why = "whoever started it has ended" if pid in adopted else "its supervisord has ended"
            command = _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
            yield Stray(pid, started, command, why, age)


def _parent(pid: int) -> int:
    try:
        return int(_read(pid, "stat").rpartition(b")")[2].split()[1])
    except IndexError:
        return 0


def _read(pid: int, name: str) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def _uptime_seconds() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])
