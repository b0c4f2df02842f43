"""From decoded rows to predictions: requests that are there at the same time share one call of the model.

Nothing waits for a batch to fill. A compiled model is called on the event loop's thread, once per turn of the
loop, for all requests that the turn brought; what would hold the loop for longer goes to the prediction
thread. An original is called on that thread, for all requests that came while it was busy. So a lone client
is answered at once, and many are answered together.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from serving.decode import Feeds, Row
from serving.metrics import Metrics

INLINE_SECONDS = 0.002  # what one call may hold the event loop
FED_ROWS = 8  # fewer rows are told as quickly by themselves as by arrays
FIRST_GUESS = 50e-6  # seconds per row, until the first call


class Model(Protocol):
    """A loaded release, compiled or original."""

    inline: bool  # fast enough for the event loop's thread
    batching: bool  # rows of several requests in one call

    def predict(self, rows: Sequence[Row]) -> tuple[list[float], Feeds | None]:
        """One finite number per row; and, of many rows, the arrays that were made of them."""


class Job:
    """The rows of one request, and what to do with its predictions."""

    __slots__ = ("decode", "feeds", "finish", "request", "rows")

    def __init__(
        self,
        request: Any,
        finish: Callable[[Job, list[float] | BaseException], None],
        rows: list[Row] | None = None,
        decode: Callable[[], list[Row]] | None = None,
    ) -> None:
        self.request = request
        self.finish = finish
        self.rows = rows or []
        self.feeds: Feeds | None = None  # of its rows, once they are predicted
        self.decode = decode  # for a body that is too long to be decoded on the event loop


class Engine:
    """Runs the model of one worker. All but `_work` is on the event loop's thread."""

    def __init__(self, model: Model, metrics: Metrics, max_rows: int) -> None:
        self._model = model
        self._metrics = metrics
        self._max_rows = max_rows  # no call gets more: more was never promised to the model
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Job] = deque()  # for the event loop
        self._flushing = False
        self._row_seconds = FIRST_GUESS
        self._slow: deque[Job] = deque()  # for the thread
        self._busy = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="predict")

    def submit(self, job: Job) -> None:
        """Have the job's rows predicted; `job.finish` is called later, never from here."""
        if job.decode is not None or not self._model.inline:
            self._slow.append(job)
            if not self._busy:
                self._start()
            return
        self._queue.append(job)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        jobs = self._take(self._queue, min(INLINE_SECONDS / self._row_seconds, self._max_rows))
        if not jobs:
            return
        rows = _rows_of(jobs)
        if len(rows) * self._row_seconds > INLINE_SECONDS and len(rows) > 1:
            self._slow.extend(jobs)
            if not self._busy:
                self._start()
        else:
            started = time.perf_counter()
            results = _predict(self._model, jobs, rows)
            self._finish(jobs, results, time.perf_counter() - started)
        if self._queue and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _take(self, queue: deque[Job], most: float) -> list[Job]:
        """The first jobs that fit into one call; at least one. Those whose client has left are dropped."""
        jobs: list[Job] = []
        rows = 0
        while queue:
            job = queue[0]
            if job.request.finished:
                queue.popleft()
                job.finish(job, [])
                continue
            if jobs and (rows + len(job.rows) > most or not self._model.batching):
                break
            jobs.append(queue.popleft())
            rows += len(job.rows)
            if job.decode is not None:
                break  # its rows are not known yet
        return jobs

    def _start(self) -> None:
        jobs = self._take(self._slow, self._max_rows)
        self._busy = bool(jobs)
        if jobs:
            self._pool.submit(self._work, jobs)

    def _work(self, jobs: list[Job]) -> None:
        """On the prediction thread."""
        seconds = None
        try:
            if jobs[0].decode is not None:
                jobs[0].rows = jobs[0].decode()
                jobs[0].decode = None
            started = time.perf_counter()
            results = _predict(self._model, jobs, _rows_of(jobs))
            seconds = time.perf_counter() - started
        except BaseException as error:  # of the decoding, or no memory: an answer all the same
            results = [error] * len(jobs)
        self._loop.call_soon_threadsafe(self._worked, jobs, results, seconds)

    def _worked(self, jobs: list[Job], results: list[Any], seconds: float | None) -> None:
        self._start()  # first: the thread works while these are answered
        self._finish(jobs, results, seconds)

    def _finish(self, jobs: list[Job], results: list[Any], seconds: float | None) -> None:
        if seconds is not None:  # the model was called
            self._metrics.called(len(jobs), seconds)
            rows = len(jobs[0].rows) if len(jobs) == 1 else sum([len(job.rows) for job in jobs])
            # Down at once, up slowly: a moment in which the machine did something else is not the model's.
            self._row_seconds = min(seconds / (rows or 1), 1.02 * self._row_seconds)
        for job, result in zip(jobs, results, strict=True):
            job.finish(job, result)


def _rows_of(jobs: list[Job]) -> list[Row]:
    if len(jobs) == 1:
        return jobs[0].rows
    return [row for job in jobs for row in job.rows]


def _predict(model: Model, jobs: list[Job], rows: list[Row]) -> list[Any]:
    """Predictions or the error of each job. One request's rows that break the model break no other's."""
    try:
        predictions, feeds = model.predict(rows)
    except BaseException as error:  # a model's own code may do anything, exit too
        if len(jobs) == 1:
            return [error]
        halves = jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]
        return [result for half in halves for result in _predict(model, half, _rows_of(half))]
    if len(jobs) == 1:
        jobs[0].feeds = feeds
        return [predictions]
    results = []
    start = 0
    for job in jobs:
        end = start + len(job.rows)
        results.append(predictions[start:end])
        if feeds is not None and end - start >= FED_ROWS:
            # Copies: a view would keep the arrays of all jobs in memory for as long as this one is logged.
            job.feeds = {name: array[start:end].copy("K") for name, array in feeds.items()}
        start = end
    return results
