"""The prediction log: one JSON line per answered request, in memory, then on local disk, then in the store.

    append ──► queue (bounded by bytes) ──► writer: spool file ──► shipper: object in the store
               full: dropped and counted     every 0.25 s           every 60 s or 16 MiB, retried for ever

A spool file lies under `SPOOL/<environment>/<project>/<date>/` and becomes the object
`predictions/<environment>/<project>/<date>/<release_id>-<utc time>-<pid>-<seq>.jsonl`; it is deleted only
after the store has it. Its owner holds a lock on it, so what a killed process left behind is shipped by the
next one with the same spool directory, and nobody ships the file of a living process.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

logger = logging.getLogger("perennial.prediction_log")

PREFIX = "predictions"
FLUSH_SECONDS = 0.25
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.5, 30.0
MIB = 1_048_576


class Record(msgspec.Struct, frozen=True):
    """What one request asked and was told; `time` is UTC, ISO 8601."""

    release_id: str
    request_id: str
    time: str
    environment: str
    rows: list[dict[str, object]]
    predictions: list[float]


@dataclass
class Counts:
    """Predictions (rows, not requests) by what became of them."""

    accepted: int = 0
    dropped: int = 0
    stored: int = 0


@dataclass
class Segment:
    """A spool file of ours: open, locked, and either being written or waiting to be shipped."""

    path: Path
    descriptor: int
    opened_at: float
    bytes: int = 0
    predictions: int = 0


@dataclass
class PredictionLog:
    """Accepts records without blocking; its two threads run from `start` to `close`."""

    url: str
    spool: Path
    environment: str
    project: str
    release_id: str
    queue_bytes: int = 64 * MIB
    spool_bytes: int = 1024 * MIB  # unshipped files; beyond it records are dropped, and counted
    segment_bytes: int = 16 * MIB
    segment_seconds: float = 60.0
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        for part in (self.environment, self.project, self.release_id):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part):
                raise ValueError(f"{part!r} cannot be part of a path in the store")
        self._encoder = msgspec.json.Encoder()
        self._lock = threading.Lock()
        self._queue: deque[tuple[bytes, int]] = deque()
        self._queued_bytes = 0
        self._spooled_bytes = 0
        self._sequence = 0
        self._segment: Segment | None = None
        self._finished: deque[Segment] = deque()
        self._writing = threading.Event()
        self._wake_shipper = threading.Event()
        self._closing = False
        self._abandon = threading.Event()
        self._writer = threading.Thread(target=self._write_until_closed, name="prediction-log", daemon=True)
        self._shipper = threading.Thread(target=self._ship_until_closed, name="prediction-ship", daemon=True)

    def start(self) -> None:
        """Take over what dead processes left in the spool, and begin."""
        self.spool.mkdir(parents=True, exist_ok=True)
        for segment in adopt(self.spool):
            logger.info("shipping %s, left by a process that ended", segment.path.name)
            self._spooled_bytes += segment.bytes
            self._finished.append(segment)
        self._writer.start()
        self._shipper.start()

    def append(self, record: Record) -> bool:
        """Accept a record, or drop and count it when the queue is full. Costs one encoding; never waits."""
        line = self._encoder.encode(record) + b"\n"
        predictions = len(record.predictions)
        with self._lock:
            full = self._queued_bytes + len(line) > self.queue_bytes
            if full or self._spooled_bytes > self.spool_bytes or self._closing:
                self.counts.dropped += predictions
                return False
            self._queue.append((line, predictions))
            self._queued_bytes += len(line)
            self.counts.accepted += predictions
        return True

    def close(self, timeout_seconds: float = 15.0) -> bool:
        """Stop accepting and bring everything accepted to the store; what cannot go there stays in the spool.

        Returns whether the store has it all. Takes at most about `timeout_seconds`.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._lock:
            self._closing = True
        self._writing.set()
        self._writer.join(timeout_seconds)
        self._wake_shipper.set()
        self._shipper.join(max(deadline - time.monotonic(), 0.0))
        self._abandon.set()
        left = [segment.path.name for segment in list(self._finished)]
        if left:
            logger.error(
                "the store %s is away: %d file(s) stay in the spool %s", self.url, len(left), self.spool
            )
        return not left and not self._queue

    def _write_until_closed(self) -> None:
        while True:
            closing = self._closing
            try:
                self._write_queued()
                segment = self._segment
                if segment and (closing or time.monotonic() - segment.opened_at >= self.segment_seconds):
                    self._finish_segment()
            except OSError:
                logger.exception("cannot write to the spool %s", self.spool)
            if closing and not self._queue:
                return
            if closing:
                time.sleep(FLUSH_SECONDS)  # the disk refuses: close() decides how long to wait
            self._writing.wait(FLUSH_SECONDS)

    def _write_queued(self) -> None:
        while self._queue:
            lines: list[tuple[bytes, int]] = []
            size = 0
            with self._lock:
                while self._queue and size < MIB:
                    lines.append(self._queue.popleft())
                    size += len(lines[-1][0])
                self._queued_bytes -= size
            written = 0
            try:
                segment = self._segment or self._open_segment()
                try:
                    _write_all(segment.descriptor, b"".join(line for line, _ in lines))
                    written = len(lines)
                except OSError:
                    written = self._cut_after_whole_lines(segment, lines)
                    raise
                finally:
                    self._count_written(segment, lines[:written])
            except OSError:
                predictions = sum(count for _, count in lines[written:])
                with self._lock:
                    self.counts.accepted -= predictions
                    self.counts.dropped += predictions
                raise
            if segment.bytes >= self.segment_bytes:
                self._finish_segment()

    def _count_written(self, segment: Segment, lines: list[tuple[bytes, int]]) -> None:
        size = sum(len(line) for line, _ in lines)
        segment.bytes += size
        segment.predictions += sum(count for _, count in lines)
        with self._lock:
            self._spooled_bytes += size

    def _cut_after_whole_lines(self, segment: Segment, lines: list[tuple[bytes, int]]) -> int:
        """After a write that failed half-way: how many of its lines are on disk, with nothing after them."""
        try:
            room = os.fstat(segment.descriptor).st_size - segment.bytes
            whole = size = 0
            for line, _ in lines:
                if size + len(line) > room:
                    break
                whole, size = whole + 1, size + len(line)
            os.ftruncate(segment.descriptor, segment.bytes + size)
        except OSError:
            # Half a line stays: this file is left as it is for the next process, which cuts what it adopts.
            self._segment = None
            os.close(segment.descriptor)
            return 0
        return whole

    def _open_segment(self) -> Segment:
        now = datetime.now(UTC)
        self._sequence += 1
        name = f"{self.release_id}-{now:%Y%m%dT%H%M%S%fZ}-{os.getpid()}-{self._sequence}.jsonl"
        path = self.spool / self.environment / self.project / f"{now:%Y-%m-%d}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Locked before it gets the name that adopters look for.
        hidden = path.with_suffix(".opening")
        descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        hidden.rename(path)
        self._segment = Segment(path, descriptor, time.monotonic())
        return self._segment

    def _finish_segment(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None and not segment.bytes:  # nothing but failed writes
            segment.path.unlink(missing_ok=True)
            os.close(segment.descriptor)
        elif segment is not None:
            self._finished.append(segment)
            self._wake_shipper.set()

    def _ship_until_closed(self) -> None:
        pause = FIRST_RETRY_SECONDS
        store: Any = None
        while not self._abandon.is_set():
            if not self._finished:
                if self._closing and not self._writer.is_alive():
                    return
                self._wake_shipper.wait(1.0)
                self._wake_shipper.clear()
                continue
            segment = self._finished[0]
            try:
                store = store or open_store(self.url)
                store.put(object_key(self.spool, segment.path), segment.path)
            except Exception as error:  # whatever the store raises, the file stays and is tried again
                reason = str(error).partition("\n")[0]
                logger.warning("cannot put %s into the store: %s", segment.path.name, reason)
                self._pause(pause)
                pause = min(pause * 2, LAST_RETRY_SECONDS)
                continue
            pause = FIRST_RETRY_SECONDS
            segment.path.unlink(missing_ok=True)
            os.close(segment.descriptor)
            with self._lock:
                self._spooled_bytes -= segment.bytes
                self.counts.stored += segment.predictions
            self._finished.popleft()

    def _pause(self, seconds: float) -> None:
        """Wait before the next try; less once `close` waits for it."""
        until = time.monotonic() + seconds
        while not self._closing and time.monotonic() < until and not self._abandon.wait(FLUSH_SECONDS):
            pass
        self._abandon.wait(FIRST_RETRY_SECONDS)


def adopt(spool: Path) -> Iterator[Segment]:
    """Spool files that no living process holds, locked for us, cut after their last whole line."""
    for path in sorted(spool.glob("*/*/*/*.jsonl")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            continue  # its owner has shipped it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink == 0:
                raise BlockingIOError  # shipped between open and lock
        except BlockingIOError:
            os.close(descriptor)
            continue
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(descriptor, whole)
        if whole == 0:
            path.unlink()
            os.close(descriptor)
            continue
        yield Segment(path, descriptor, time.monotonic(), bytes=whole)


def object_key(spool: Path, path: Path) -> str:
    """Where a spool file goes in the store."""
    return f"{PREFIX}/{path.relative_to(spool).as_posix()}"


def open_store(url: str) -> Any:
    """The store at `file:///…` or `s3://bucket/prefix`; credentials and endpoint come from AWS_*."""
    from obstore.store import from_url

    if url.startswith("file:"):
        return from_url(url, mkdir=True)
    # No client_options: with any given here, obstore no longer reads AWS_ALLOW_HTTP.
    return from_url(url, retry_config={"max_retries": 1})


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
