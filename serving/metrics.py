"""What a service counts, in memory that its worker processes share, and Prometheus's text of it.

Each worker writes its own slot, every one reads all. A slot outlives its worker: counters never go back.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

LATENCY_BOUNDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0),
)  # seconds
BATCH_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # requests

ROUTES = (
    "unknown",
    "/predict",
    "/v2/models/{name}/infer",
    "/health/live",
    "/health/ready",
    "/metadata",
    "/openapi.json",
    "/metrics",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/{name}",
    "/v2/models/{name}/ready",
)
UNKNOWN, PREDICT, INFER = 0, 1, 2
CODES = (200, 400, 404, 405, 408, 413, 415, 422, 429, 431, 499, 500, 503)

GAUGES = ("ready", "in_flight", "connections", "resident")
COUNTERS = ("predictions", "logged", "dropped", "stored", "misfits")


class Layout:
    """Where in a slot each number stands."""

    def __init__(self) -> None:
        self.gauges = {name: i for i, name in enumerate(GAUGES)}
        start = len(GAUGES)
        self.counters = {name: start + i for i, name in enumerate(COUNTERS)}
        start += len(COUNTERS)
        self.code = {code: i for i, code in enumerate(CODES)}
        self.requests = start
        start += len(ROUTES) * len(CODES)
        self.latencies = start
        self.latency_size = len(LATENCY_BOUNDS) + 2  # buckets, the one beyond, the sum
        start += len(ROUTES) * self.latency_size
        self.model = start
        start += self.latency_size
        self.batches = start
        self.size = start + len(BATCH_BOUNDS) + 2


LAYOUT = Layout()
READY, IN_FLIGHT, CONNECTIONS, RESIDENT = range(len(GAUGES))
PREDICTIONS, LOGGED, DROPPED, STORED, MISFITS = LAYOUT.counters.values()


class Shared:
    """The memory of all workers of a service; made before they are forked."""

    _DRAINING, _READY, _HEAD = 0, 1, 2

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._memory = mmap.mmap(-1, (self._HEAD + workers * LAYOUT.size) * 8)
        self._all: memoryview[float] = memoryview(self._memory).cast("d")

    def slot(self, worker: int) -> memoryview[float]:
        """The numbers of one worker."""
        start = self._HEAD + worker * LAYOUT.size
        return self._all[start : start + LAYOUT.size]

    def total(self, index: int) -> float:
        """One number, summed over all workers."""
        return sum(self._all[self._HEAD + index :: LAYOUT.size])

    def restart(self, worker: int) -> None:
        """What a worker that died was in the middle of is over."""
        slot = self.slot(worker)
        for index in range(len(GAUGES)):
            slot[index] = 0.0

    @property
    def ready(self) -> bool:
        """Whether all workers have had the model. One that is started again listens only when it has it."""
        if not self._all[self._READY] and self.total(READY) >= self.workers:
            self._all[self._READY] = 1.0
        return self._all[self._READY] > 0

    @property
    def draining(self) -> bool:
        """Whether the service has been told to stop."""
        return self._all[self._DRAINING] > 0

    def drain(self) -> None:
        """Tell all workers that the service stops."""
        self._all[self._DRAINING] = 1.0


class Metrics:
    """One worker's own numbers; touched from its event loop's thread only."""

    def __init__(self, shared: Shared, worker: int) -> None:
        self.shared = shared
        self.worker = worker
        self.own = shared.slot(worker)
        # What the log of a worker that died had counted.
        self.before = {counter: self.own[counter] for counter in (LOGGED, DROPPED, STORED, MISFITS)}

    def observe(self, route: int, status: int, seconds: float) -> None:
        """One answered request."""
        own = self.own
        own[LAYOUT.requests + route * len(CODES) + LAYOUT.code[status]] += 1
        start = LAYOUT.latencies + route * LAYOUT.latency_size
        own[start + bisect_left(LATENCY_BOUNDS, seconds)] += 1
        own[start + LAYOUT.latency_size - 1] += seconds

    def called(self, requests: int, seconds: float) -> None:
        """One call of the model, for so many requests."""
        own = self.own
        own[LAYOUT.model + bisect_left(LATENCY_BOUNDS, seconds)] += 1
        own[LAYOUT.model + LAYOUT.latency_size - 1] += seconds
        own[LAYOUT.batches + bisect_left(BATCH_BOUNDS, requests)] += 1
        own[LAYOUT.batches + len(BATCH_BOUNDS) + 1] += requests


def text(shared: Shared, release: str, path: str) -> str:
    """The exposition, every sample labelled with the release; `path` is compiled or original."""
    totals = [shared.total(index) for index in range(LAYOUT.size)]
    lines: list[str] = []

    def family(name: str, kind: str, help_: str, samples: Iterator[tuple[str, str, float]]) -> None:
        lines.extend((f"# HELP {name} {help_}", f"# TYPE {name} {kind}"))
        lines.extend(
            f'{name}{suffix}{{release="{release}"{labels}}} {value:.17g}' for suffix, labels, value in samples
        )

    def single(name: str, kind: str, help_: str, value: float, labels: str = "") -> None:
        family(name, kind, help_, iter([("", labels, value)]))

    requests = [
        (route, code, totals[LAYOUT.requests + i * len(CODES) + j])
        for i, route in enumerate(ROUTES)
        for j, code in enumerate(CODES)
    ]
    family(
        "perennial_requests_total",
        "counter",
        "Requests answered, by route and status code; 499: the client left first.",
        (("", f',route="{route}",code="{code}"', n) for route, code, n in requests if n),
    )
    # A 503 of a readiness route is an answer, not an error.
    failed = sum(n for route, code, n in requests if code >= 500 and "ready" not in route)
    single("perennial_errors_total", "counter", "Prediction requests answered with a 5xx.", failed)
    family(
        "perennial_request_duration_seconds",
        "histogram",
        "From the first byte of a request to its answer.",
        _latencies(totals),
    )
    family(
        "perennial_model_duration_seconds",
        "histogram",
        "Of the calls of the model alone.",
        _histogram(totals, LAYOUT.model, LATENCY_BOUNDS),
    )
    family(
        "perennial_batch_requests",
        "histogram",
        "Requests that one call of the model answered.",
        _histogram(totals, LAYOUT.batches, BATCH_BOUNDS),
    )
    single("perennial_requests_in_flight", "gauge", "Prediction requests at work.", totals[IN_FLIGHT])
    single("perennial_connections", "gauge", "Open connections.", totals[CONNECTIONS])
    single("perennial_workers_ready", "gauge", "Worker processes that have the model.", totals[READY])
    single("perennial_serving_path", "gauge", "How the model is served.", 1, f',path="{path}"')
    single("perennial_resident_bytes", "gauge", "Memory of all workers.", totals[RESIDENT])
    for name, help_ in (
        ("predictions", "Rows predicted."),
        ("logged", "Rows accepted by the prediction log."),
        ("dropped", "Rows that the prediction log had no room for."),
        ("stored", "Rows that the store has."),
        ("misfits", "Values that the prediction log could not hold and wrote as null."),
    ):
        full = f"perennial_predictions_{name}_total".replace("_predictions_predictions", "_predictions")
        single(full, "counter", help_, totals[LAYOUT.counters[name]])
    return "\n".join(lines) + "\n"


def _latencies(totals: Sequence[float]) -> Iterator[tuple[str, str, float]]:
    for i, route in enumerate(ROUTES):
        samples = list(
            _histogram(
                totals, LAYOUT.latencies + i * LAYOUT.latency_size, LATENCY_BOUNDS, f',route="{route}"'
            )
        )
        if samples[-1][2]:
            yield from samples


def _histogram(
    totals: Sequence[float], start: int, bounds: Sequence[float], labels: str = ""
) -> Iterator[tuple[str, str, float]]:
    """Cumulative, as Prometheus wants it."""
    count = 0.0
    for i, bound in enumerate([*(f"{bound:g}" for bound in bounds), "+Inf"]):
        count += totals[start + i]
        yield "_bucket", f'{labels},le="{bound}"', count
    yield "_sum", labels, totals[start + len(bounds) + 1]
    yield "_count", labels, count


def resident_bytes() -> float:
    """Memory of this process; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_bytes().split()[1]
    except OSError:
        return 0.0
    return float(pages) * os.sysconf("SC_PAGE_SIZE")
