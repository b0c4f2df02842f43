"""The prediction log: every answered row, in memory, then on local disk, then in the store.

    append ──► queue (bounded by bytes) ──► writer: record batch ──► shipper: object in the store
               full: dropped and counted     every 0.25 s            every 60 s or 16 MiB, retried for ever

`append` keeps the request's own Python objects, or of many rows the arrays that the compiled model was given;
arrow_log.py makes columns of them on the writer's thread, spool.py keeps the files, shipper.py brings them
away. A process that is killed loses what it accepted in the last 0.25 s. The threads share the interpreter
with the event loop's, so the writer works in batches and pauses often.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from serving.arrow_feeds import Kept
from serving.arrow_log import BatchEncoder
from serving.arrow_message import Part
from serving.contract import Column, Plan
from serving.decode import Feeds
from serving.shipper import Shipper
from serving.spool import Segment, create, end_stream, replace, today

logger = logging.getLogger("perennial.prediction_log")

FLUSH_SECONDS = 0.25
FLUSH_BYTES = 1_048_576  # of the queue's memory: under load it is flushed sooner, and stays small
MIB = 1_048_576
BATCH_ROWS = 2000
TAKEN_BYTES = 8 * MIB

# A busy service writes large batches. One of few requests writes a small one per flush, of more header than
# rows: those are kept in memory until the file is finished, and it is then written anew in few batches.
MERGED_ROWS, MERGED_BYTES = 2000, 4 * MIB

# Measured: what a queued request, a row and a value take in memory besides the text of the request.
REQUEST_BYTES, ROW_BYTES, VALUE_BYTES = 400, 120, 34
KEPT_BYTES, PREDICTION_BYTES = 1200, 32  # the same of a request and a row whose arrays are kept, less these

Rows = Sequence[tuple[Any, ...]]
Entry = tuple[Rows | Kept, Sequence[float], str, float, int]


@dataclass
class Counts:
    """Predictions (rows, not requests) by what became of them; `misfits` are values logged as null.

    They only grow: what was accepted, and the disk then refused or somebody removed from it, is dropped too.
    """

    accepted: int = 0
    dropped: int = 0
    stored: int = 0
    misfits: int = 0


@dataclass
class PredictionLog:
    """Accepts rows without blocking; its two threads run from `start` to `close`. Made after a fork."""

    url: str
    spool: Path
    environment: str
    project: str
    release_id: str
    columns: tuple[Column, ...]
    plan: Plan | None = None  # of a compiled model, which is given `feeds`
    counts: Counts = field(default_factory=Counts)
    queue_bytes: int = 64 * MIB  # of memory
    spool_bytes: int = 1024 * MIB  # of this process's unshipped files; beyond it, rows are dropped
    segment_bytes: int = 16 * MIB
    segment_seconds: float = 60.0

    def __post_init__(self) -> None:
        for part in (self.environment, self.project, self.release_id):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part):
                raise ValueError(f"{part!r} cannot be part of a path in the store")
        self._encoder = BatchEncoder(
            self.columns,
            {"release_id": self.release_id, "project": self.project, "environment": self.environment},
            self.plan,
        )
        self._row_bytes = ROW_BYTES + VALUE_BYTES * len(self.columns)
        self._lock = threading.Lock()
        self._queue: deque[Entry] = deque()
        self._queued_bytes = 0
        self._spool_is_full = False
        self._sequence = 0
        self._segment: Segment | None = None
        self._kept: list[list[Entry]] | None = []  # by write, all of the segment's, while they are few
        self._kept_bytes = 0
        self._closing = False
        self._wake_writer = threading.Event()
        self._failing = False
        self._shipper = Shipper(self.url, self.spool, self._count_stored, self._count_lost)
        self._writer = threading.Thread(target=self._write_until_closed, name="prediction-log", daemon=True)

    def start(self) -> None:
        """Take over what dead processes left in the spool, and begin."""
        self._shipper.start()
        self._writer.start()

    def append(
        self,
        rows: Rows,
        predictions: Sequence[float],
        request_id: str,
        size: int,
        feeds: Feeds | None = None,
    ) -> bool:
        """Accept the rows of a request of `size` bytes, or drop and count them when the queue is full.

        Costs about 1 µs, with `feeds` 15, and never waits. `feeds` are the arrays that the compiled model was
        given of these rows; they are kept instead. What is kept is kept as it is: nobody may change it.
        """
        count = len(rows)
        kept = self._encoder.keep(rows, feeds) if feeds is not None else None
        if kept is not None:
            weight = KEPT_BYTES + count * PREDICTION_BYTES + kept.memory
        else:
            weight = REQUEST_BYTES + count * self._row_bytes + size
        with self._lock:
            if self._queued_bytes + weight > self.queue_bytes or self._spool_is_full or self._closing:
                self.counts.dropped += count
                return False
            self._queue.append((rows if kept is None else kept, predictions, request_id, time.time(), weight))
            self._queued_bytes += weight
            self.counts.accepted += count
        if self._queued_bytes > FLUSH_BYTES and not self._wake_writer.is_set():
            self._wake_writer.set()
        return True

    def close(self, timeout_seconds: float = 15.0) -> bool:
        """Stop accepting and bring everything accepted to the store; what cannot go there stays in the spool.

        Returns whether the store has it all. Takes at most about `timeout_seconds`.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._lock:
            self._closing = True
        self._shipper.hurry()
        self._wake_writer.set()
        self._writer.join(timeout_seconds)
        stored = self._shipper.close(max(deadline - time.monotonic(), 0.0))
        return stored and not self._queue and not self._writer.is_alive()

    def _write_until_closed(self) -> None:
        while True:
            closing = self._closing
            failure = self._attempt(self._write_waiting)
            if self._is_due(closing, failure is not None):
                failure = self._attempt(self._finish_segment) or failure
            if failure and not self._failing:
                logger.error("cannot write to the spool %s", self.spool, exc_info=failure)
            self._failing = failure is not None
            self._look_at_spool()
            if closing and not self._queue:
                return
            if closing:
                time.sleep(FLUSH_SECONDS)  # the disk refuses: close() decides how long to wait
            self._wake_writer.wait(FLUSH_SECONDS)
            if not self._closing:
                self._wake_writer.clear()

    def _attempt(self, step: Callable[[], None]) -> Exception | None:
        try:
            step()
        except Exception as error:  # a full disk, most likely: what was lost is counted
            return error
        return None

    def _write_waiting(self) -> None:
        # What comes meanwhile waits for the next flush: it would make small batches.
        waiting = len(self._queue)
        while waiting:
            waiting -= self._write_some(waiting)

    def _is_due(self, closing: bool, failed: bool) -> bool:
        """Whether the segment, which is not full, is to be shipped."""
        segment = self._segment
        if segment is None or closing:
            return segment is not None
        if self._shipper.is_crowded:  # the store is away: rather few files, but none of two whole days
            return segment.path.parent.name != today()
        # What is shipped makes room on a full disk.
        return failed or time.monotonic() - segment.opened_at >= self.segment_seconds

    def _look_at_spool(self) -> None:
        written = self._segment.size if self._segment else 0
        self._spool_is_full = self._shipper.waiting_bytes + written > self.spool_bytes

    def _write_some(self, most: int) -> int:
        """Write a batch of at most so many of the queue's entries; how many it took."""
        entries = self._take(most)
        predictions = sum(len(entry[0]) for entry in entries)
        try:
            parts = list(chain.from_iterable(self._batches(entries)))
            segment = self._segment or self._open_segment()
            try:
                segment.write(parts)
            finally:
                if segment.descriptor < 0:
                    self._segment = None
        except Exception:
            self._count_lost(predictions)
            raise
        segment.predictions += predictions
        if self._kept is not None:
            self._kept.append(entries)
            self._kept_bytes += sum(entry[4] for entry in entries)
            if segment.predictions > MERGED_ROWS or self._kept_bytes > MERGED_BYTES:
                self._kept = None
        if segment.size >= self.segment_bytes:
            self._finish_segment()
            self._look_at_spool()
        return len(entries)

    def _take(self, most: int) -> list[Entry]:
        """The oldest entries, of about a batch's rows."""
        entries: list[Entry] = []
        rows = weight = 0
        pop = self._queue.popleft
        while len(entries) < most and rows < BATCH_ROWS and weight < TAKEN_BYTES:
            some = [pop() for _ in range(min(most - len(entries), 20))]
            entries += some
            rows += sum([len(entry[0]) for entry in some])
            weight += sum([entry[4] for entry in some])
            self._encoder.breathe()
        with self._lock:
            self._queued_bytes -= weight
        return entries

    def _batches(self, entries: Sequence[Entry]) -> Iterator[list[Part]]:
        before = self._encoder.misfits
        for some in _divided(entries):
            yield from self._encoded(some)
        if self._encoder.misfits > before:
            if not self.counts.misfits:
                logger.error("a value did not fit its column and is logged as null; perhaps there are more")
            self.counts.misfits = self._encoder.misfits

    def _encoded(self, entries: Sequence[Entry]) -> Iterator[list[Part]]:
        """One batch; several of a single request that is too long."""
        encoder = self._encoder
        by_request, predicted, ids, times, _ = zip(*entries, strict=True)
        lengths = list(map(len, by_request))
        if lengths != list(map(len, predicted)):
            predicted = tuple(map(self._predictions_of, predicted, lengths))
        predictions = list(chain.from_iterable(predicted))
        encoder.breathe()
        if len(entries) == 1 and type(by_request[0]) is not Kept:
            for first in range(0, lengths[0], BATCH_ROWS):
                part = slice(first, first + BATCH_ROWS)
                yield encoder.requests(ids, times, [by_request[0][part]], predictions[part], first)
        elif len(predictions) == len(entries) and 0 not in lengths and Kept not in set(map(type, by_request)):
            rows = list(chain.from_iterable(by_request))
            yield [encoder.batch(ids, [0] * len(rows), times, rows, predictions)]
        elif predictions:
            yield encoder.requests(ids, times, by_request, predictions)

    def _predictions_of(self, predictions: Sequence[float], length: int) -> Sequence[float | None]:
        if len(predictions) == length:
            return predictions
        self._encoder.misfits += length  # nobody can say which is whose
        return [None] * length

    def _open_segment(self) -> Segment:
        self._sequence += 1
        name = f"{self.release_id}-{{time}}-{os.getpid()}-{self._sequence}.arrows"
        segment = create(self.spool / self.environment / self.project, name)
        try:
            segment.write([self._encoder.header])
        except OSError:
            if segment.descriptor >= 0:
                segment.delete()
            raise
        self._segment, self._kept, self._kept_bytes = segment, [], 0
        return segment

    def _finish_segment(self) -> None:
        segment, kept = self._segment, self._kept
        if segment is None:
            return
        self._segment = self._kept = None
        if not segment.predictions:  # nothing but failed writes
            segment.delete()
            return
        if kept and len(kept) > 1:
            misfits = self._encoder.misfits
            entries = list(chain.from_iterable(kept))
            try:
                replace(segment, [self._encoder.header, *chain.from_iterable(self._batches(entries))])
            except Exception as error:
                logger.warning("cannot write %s anew (%s); it is shipped as it is", segment.path.name, error)
            self._encoder.misfits = self.counts.misfits = misfits
        end_stream(segment)
        if segment.descriptor >= 0:
            self._shipper.add(segment)

    def _count_stored(self, predictions: int) -> None:
        self.counts.stored += predictions

    def _count_lost(self, predictions: int) -> None:
        with self._lock:
            self.counts.dropped += predictions


def _divided(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """In order, of about a batch's rows each; a request of more is by itself."""
    begin = count = 0
    for at, entry in enumerate(entries):
        length = len(entry[0])
        if count and count + length > BATCH_ROWS:
            yield entries[begin:at]
            begin, count = at, 0
        count += length
    yield entries[begin:]
