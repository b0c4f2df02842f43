"""The thread that brings finished files of the prediction log from the spool to the store."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.spool import Segment, adopt, object_key

logger = logging.getLogger("perennial.prediction_log")

PART_BYTES = 5 * 1_048_576  # the least that S3 takes; one at a time: a segment must not stand in memory whole

ADOPT_SECONDS = 30.0
MOST_WAITING = 32  # each is an open file; while so many wait, none is adopted
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.5, 30.0


class Shipper:
    """Its thread, from `start` to `close`, brings finished files to the store, retrying for ever."""

    def __init__(
        self, url: str, spool: Path, stored: Callable[[int], None], lost: Callable[[int], None]
    ) -> None:
        """`stored` is told how many predictions another object holds, `lost` how many a lost file held."""
        self.url = url
        self.spool = spool
        self.waiting_bytes = 0
        self._stored = stored
        self._lost = lost
        self._lock = threading.Lock()
        self._finished: deque[Segment] = deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._last = threading.Event()
        self._abandon = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prediction-ship", daemon=True)

    @property
    def waiting(self) -> list[str]:
        return [segment.path.name for segment in list(self._finished)]

    @property
    def is_crowded(self) -> bool:
        return len(self._finished) >= MOST_WAITING

    def start(self) -> None:
        self.spool.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def add(self, segment: Segment) -> None:
        with self._lock:
            self.waiting_bytes += segment.size
        self._finished.append(segment)
        self._wake.set()

    def hurry(self) -> None:
        """No long pauses any more: somebody waits for the end."""
        self._hurry.set()

    def close(self, timeout_seconds: float) -> bool:
        """Ship what has been added, and stop. Returns whether the store has it all."""
        self._hurry.set()
        self._last.set()
        self._wake.set()
        self._thread.join(timeout_seconds)
        self._abandon.set()
        left = self.waiting
        if left:
            logger.error(
                "the store %s is away: %d file(s) stay in the spool %s", self.url, len(left), self.spool
            )
        return not left

    def _run(self) -> None:
        pause = FIRST_RETRY_SECONDS
        more = self._adopt()
        adopted_at = time.monotonic()
        store: Any = None
        while not self._abandon.is_set():
            due = time.monotonic() - adopted_at > ADOPT_SECONDS or (more and not self._finished)
            if due and not self._hurry.is_set():
                more = self._adopt()
                adopted_at = time.monotonic()
            if not self._finished:
                if self._last.is_set():
                    return
                self._wake.wait(1.0)
                self._wake.clear()
                continue
            segment = self._finished[0]
            try:
                store = store or open_store(self.url)
                key = object_key(self.spool, segment.path)
                store.put(key, segment.path, chunk_size=PART_BYTES, max_concurrency=1)
            except Exception as error:  # whatever the store raises, the file stays and is tried again
                if segment.is_gone():
                    logger.error("%s was removed before it was in the store", segment.path)
                    self._lost(segment.predictions)
                    self._forget(segment)
                    continue
                reason = str(error).partition("\n")[0]
                logger.warning("cannot put %s into the store: %s", segment.path.name, reason)
                self._finished.rotate(-1)  # if it is this file's fault, the others need not wait
                self._pause(pause)
                pause = min(pause * 2, LAST_RETRY_SECONDS)
                continue
            pause = FIRST_RETRY_SECONDS
            self._stored(segment.predictions)
            self._forget(segment)

    def _forget(self, segment: Segment) -> None:
        """Have no more to do with a file, which is the first of those that are finished."""
        try:
            segment.delete()
        except OSError as error:
            logger.warning("cannot remove %s: %s", segment.path, error.strerror)
        with self._lock:
            self.waiting_bytes -= segment.size
        self._finished.popleft()

    def _adopt(self) -> bool:
        """Take over what others left; whether there may be more of it than may be open at once."""
        if self.is_crowded:
            return True
        try:
            for segment in adopt(self.spool):
                logger.info("shipping %s, left by a process that ended", segment.path.name)
                self.add(segment)
                if self.is_crowded:
                    return True
        except Exception:  # this thread must live, whatever lies in the spool
            logger.exception("cannot look for what others left in the spool %s", self.spool)
        return False

    def _pause(self, seconds: float) -> None:
        """Wait before the next try; less once `close` waits for it."""
        self._hurry.wait(seconds)
        self._abandon.wait(FIRST_RETRY_SECONDS)


def open_store(url: str) -> Any:
    """The store at `file:///…` or `s3://bucket/prefix`; credentials and endpoint come from AWS_*."""
    from obstore.store import from_url

    if url.startswith("file:"):
        return from_url(url, mkdir=True)
    # No client_options: with any given here, obstore no longer reads AWS_ALLOW_HTTP.
    return from_url(url, retry_config={"max_retries": 1})
