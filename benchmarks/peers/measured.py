"""The requests of a server, its answers checked, and what was measured of all servers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.load import Load, Sample, request_of
from benchmarks.measure import median
from benchmarks.peers.flights import Flights
from benchmarks.peers.servers import Server
from perennial.installation import REPOSITORY

SINGLE_ROWS = 500  # requests of one row; the rows after these go into the requests of 100
MANY = 100
COMPARED = 100  # single-row requests that are compared without load; all requests of 100 rows are


class Cell(NamedTuple):
    """One server under one kind of load, once."""

    rps: float
    p50_ms: float
    p99_ms: float
    cpu_us: float  # of all the server's processes, per answered request
    answered: int
    errors: int
    difference: float
    generator_cpu_us: float
    logged: int  # rows
    dropped: int


@dataclass
class Measured:
    """By the servers' names; cells by name, rows of a request and connections, one per round."""

    labels: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    ready_seconds: dict[str, float] = field(default_factory=dict)
    first_rss_mb: dict[str, list[float]] = field(default_factory=dict)  # of each process, before the load
    rss_mb: dict[str, list[float]] = field(default_factory=dict)  # and after it
    differences: dict[str, float] = field(default_factory=dict)
    every_flight: float = 0.0  # the difference over all rows of the year, with no server between
    bare: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds, by path and number of rows
    cells: dict[tuple[str, int, int], list[Cell]] = field(default_factory=dict)

    def value(self, name: str, rows: int, connections: int, of: str) -> float | None:
        """The median over the rounds of one column of a cell."""
        cells = self.cells.get((name, rows, connections))
        return median([getattr(cell, of) for cell in cells]) if cells else None

    def ratio(self, name: str, other: str, rows: int, connections: int, of: str) -> float | None:
        """The median over the rounds of name / other, each pair from the same round."""
        mine, others = (self.cells.get((each, rows, connections)) for each in (name, other))
        if not mine or not others:
            return None
        pairs = zip(mine, others, strict=True)
        return median(
            [getattr(one, of) / getattr(two, of) for one, two in pairs if getattr(two, of)] or [math.nan]
        )

    def apart(self, name: str) -> float:
        """How far any compared answer was from the model's own, under load or not."""
        loaded = [cell.difference for key, cells in self.cells.items() if key[0] == name for cell in cells]
        return max([self.differences[name], *loaded])

    def dropped_percent(self, name: str, rows: int, connections: int) -> float:
        """Of the rows answered under this load, those that the prediction log had no room for."""
        cells = self.cells[name, rows, connections]
        dropped = sum(cell.dropped for cell in cells)
        return 100 * dropped / max(dropped + sum(cell.logged for cell in cells), 1)

    def errors(self, name: str) -> int:
        """Over all cells."""
        return sum(cell.errors for key, cells in self.cells.items() if key[0] == name for cell in cells)


@dataclass(frozen=True)
class Wire:
    """What a server is asked, as it goes over the wire, and what it has to answer."""

    path: str
    bodies: dict[int, list[bytes]]
    expected: dict[int, list[list[float]]]
    files: dict[int, Path]

    @classmethod
    def of(cls, server: Server, flights: Flights, work: Path) -> Wire:
        """The same rows for every server, in the form that it takes."""
        starts = {1: range(SINGLE_ROWS), MANY: range(SINGLE_ROWS, len(flights.rows) - MANY + 1, MANY)}
        bodies = {n: [server.body(flights.rows[at : at + n]) for at in found] for n, found in starts.items()}
        expected = {n: [flights.predictions[at : at + n] for at in found] for n, found in starts.items()}
        files = {n: work / f"{server.name}-{n}.msgpack" for n in starts}
        for n, file in files.items():
            file.write_bytes(msgspec.msgpack.encode([request_of(server.path, body) for body in bodies[n]]))
        return cls(server.path, bodies, expected, files)

    def compare(self, port: int) -> float:
        """The largest difference without load."""
        client = HTTPConnection("127.0.0.1", port, timeout=60)
        samples: dict[int, list[Sample]] = {}
        for rows, bodies in self.bodies.items():
            samples[rows] = []
            for number, body in enumerate(bodies[:COMPARED]):
                client.request("POST", self.path, body, {"Content-Type": "application/json"})
                answer = client.getresponse()
                text = answer.read().decode()
                if answer.status != 200:
                    raise RuntimeError(f"port {port}{self.path} answered {answer.status}: {text[:300]}")
                samples[rows].append(Sample(number, text))
        client.close()
        return max(self.apart(rows, found) for rows, found in samples.items())

    def apart(self, rows: int, samples: list[Sample]) -> float:
        """The largest difference of these answers; infinite for one that is no answer to its request."""
        largest = 0.0
        for sample in samples:
            expected = self.expected[rows][sample.request]
            try:
                found = [_last(value) for value in json.loads(sample.body)["predictions"]]
            except (ValueError, KeyError, TypeError):
                return math.inf
            if len(found) != len(expected):
                return math.inf
            largest = max([largest, *(abs(a - b) for a, b in zip(found, expected, strict=True))])
        return largest

    def load(self, port: int, rows: int, connections: int, seconds: float) -> Load:
        """Load the server from a process of its own."""
        argv = [sys.executable, "-m", "benchmarks.load", port, self.files[rows], connections, seconds]
        done = subprocess.run(
            [str(part) for part in argv], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, timeout=120
        )
        return msgspec.json.decode(done.stdout, type=Load)


def _last(value: float | list[float]) -> float:
    """A prediction, or the last of the probabilities of the classes."""
    return value[-1] if isinstance(value, list) else value
