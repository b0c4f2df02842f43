"""CPU seconds of processes and of whole trees of them, from /proc (Linux)."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """One line of /proc/PID/stat. `own` and `reaped` (its ended, waited-for children) in CPU seconds."""

    parent: int
    own: float
    reaped: float


def processes() -> dict[int, Process]:
    """Every process of this machine."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        user, system, child_user, child_system = (int(value) / _TICKS for value in fields[11:15])
        found[int(folder.name)] = Process(int(fields[1]), user + system, child_user + child_system)
    return found


def tree(pid: int, table: Mapping[int, Process]) -> list[int]:
    """The process, its children, their children and so on."""
    children: dict[int, list[int]] = {}
    for child, process in table.items():
        children.setdefault(process.parent, []).append(child)
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return [pid for pid in found if pid in table]


def tree_cpu_seconds(pid: int, table: Mapping[int, Process]) -> float:
    """CPU seconds of the tree since its start: the living, and the dead that a member of it waited for."""
    return sum(table[member].own + table[member].reaped for member in tree(pid, table))


class Sampler:
    """Takes a reading many times a second, in a thread; `readings` holds (wall clock, reading)."""

    def __init__(self, read: Callable[[], dict[str, float]], interval_seconds: float = 0.05) -> None:
        self._read, self._interval = read, interval_seconds
        self.readings: list[tuple[float, dict[str, float]]] = []
        self._stop = threading.Event()

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self._loop, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self._interval):
            self.readings.append((time.time(), self._read()))

    def spent(self, name: str, start: float, end: float) -> float:
        """What `name` grew by between two moments; a process that has ended keeps its last value."""
        return self._at(name, end) - self._at(name, start)

    def _at(self, name: str, moment: float) -> float:
        value = 0.0
        for taken, reading in self.readings:
            if taken > moment:
                break
            value = reading.get(name, value)
        return value


def child_cpu_seconds(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Run a program to its end: (CPU seconds of it and its children, wall seconds)."""
    before, began = os.times(), time.monotonic()
    subprocess.run(argv, env=dict(environment), check=True, stdout=subprocess.DEVNULL)
    wall, after = time.monotonic() - began, os.times()
    used = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return used, wall


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def write_figures(path: Path, figures: Sequence[Mapping[str, Any]]) -> None:
    """A list of {figure, value, unit, target}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(figures), indent=1) + "\n")
