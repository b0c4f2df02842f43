"""Files of the prediction log on local disk, until shipper.py has brought them to the store.

A file lies under `SPOOL/<environment>/<project>/<date>/` and becomes the object
`predictions/<environment>/<project>/<date>/<release_id>-<utc time>-<pid>-<seq>.arrows`; it is deleted only
after the store has it. Its owner holds a lock on it (flock: of this opening of the file, so a forked process
must not share it). So what a killed process left behind is shipped by any other with the same directory, at
its start or within some 30 s, and nobody ships a living process's file. `.jsonl`: an earlier format.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from serving.arrow_log import END_OF_STREAM, whole_bytes
from serving.arrow_message import Part, size_of

logger = logging.getLogger("perennial.prediction_log")

PREFIX = "predictions"
OPENING_SECONDS = 600.0  # nobody takes so long to give a file its name
MOST_PARTS = 1024  # of one write; Linux takes no more


@dataclass
class Segment:
    """A spool file of ours: open, locked, and either being written or waiting to be shipped."""

    path: Path
    descriptor: int
    opened_at: float  # of the monotonic clock
    size: int = 0
    predictions: int = 0

    def write(self, parts: Sequence[Part]) -> None:
        """Append all of it, or nothing.

        Raises OSError; when even what was written of it cannot be cut off, the file is closed and
        `descriptor` is -1: it is left as it is for the process that adopts it.
        """
        size = 0
        try:
            for start in range(0, len(parts), MOST_PARTS):
                some = parts[start : start + MOST_PARTS]
                wanted, written = sum(map(size_of, some)), os.writev(self.descriptor, some)
                size += wanted
                if written < wanted:  # a disk that is nearly full: the next call says so
                    view = memoryview(b"".join(some))[written:]
                    while view:
                        view = view[os.write(self.descriptor, view) :]
        except OSError:
            try:
                os.ftruncate(self.descriptor, self.size)
            except OSError:
                os.close(self.descriptor)
                self.descriptor = -1
            raise
        self.size += size

    def is_gone(self) -> bool:
        """Whether the file was removed, by its owner or by what tidies folders up."""
        return os.fstat(self.descriptor).st_nlink == 0

    def delete(self) -> None:
        """Remove the file, or at least let go of it: then it is adopted, and shipped to the same place."""
        try:
            self.path.unlink(missing_ok=True)
        finally:
            os.close(self.descriptor)


def today() -> str:
    """The date (UTC) as the name of a folder."""
    return f"{datetime.now(UTC):%Y-%m-%d}"


def create(folder: Path, name: str) -> Segment:
    """A new, locked file below `folder`, in a folder of today's date (UTC)."""
    now = datetime.now(UTC)
    path = folder / f"{now:%Y-%m-%d}" / name.format(time=f"{now:%Y%m%dT%H%M%S%fZ}")
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_suffix(".opening")  # locked before it gets the name that adopters look for
    return Segment(path, _locked(hidden, path), time.monotonic())


def replace(segment: Segment, content: Sequence[Part]) -> None:
    """Write a finished file anew: the old content or the new one is there at any moment. Raises OSError."""
    hidden = segment.path.with_suffix(".opening")
    hidden.unlink(missing_ok=True)
    new = Segment(hidden, os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), segment.opened_at)
    try:
        new.write(content)
        fcntl.flock(new.descriptor, fcntl.LOCK_EX)
        hidden.rename(segment.path)
    except OSError:
        hidden.unlink(missing_ok=True)
        if new.descriptor >= 0:
            os.close(new.descriptor)
        raise
    os.close(segment.descriptor)
    segment.descriptor, segment.size = new.descriptor, new.size


def _locked(hidden: Path, path: Path) -> int:
    descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        hidden.rename(path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def adopt(spool: Path) -> Iterator[Segment]:
    """Spool files that no living process holds, locked for us, cut after their last whole message or line."""
    for path in spool.glob("*/*/*/*.opening"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > OPENING_SECONDS:
                path.unlink()
    for path in sorted([*spool.glob("*/*/*/*.arrows"), *spool.glob("*/*/*/*.jsonl")]):
        try:
            segment = _adopted(path)
        except FileNotFoundError:
            continue  # its owner has shipped it
        except OSError as error:  # another user's, perhaps; the others are none the worse for it
            logger.warning("cannot take over %s: %s", path, error.strerror)
            continue
        if segment is not None:
            yield segment


def _adopted(path: Path) -> Segment | None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        segment = Segment(path, descriptor, time.monotonic())
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if segment.is_gone():
            raise BlockingIOError  # shipped between open and lock
        if path.suffix == ".jsonl":
            segment.size = path.read_bytes().rfind(b"\n") + 1
            filled = segment.size > 0
        else:
            segment.size, filled = whole_bytes(descriptor)
        if filled:
            os.ftruncate(descriptor, segment.size)
        else:
            path.unlink()
    except BlockingIOError:
        filled = False
    except OSError:
        os.close(descriptor)
        raise
    if not filled:
        os.close(descriptor)
        return None
    if path.suffix == ".arrows":
        end_stream(segment)
    return segment if segment.descriptor >= 0 else None


def end_stream(segment: Segment) -> None:
    """Mark that nothing follows. Not needed by readers, so a full disk does not matter."""
    try:
        segment.write([END_OF_STREAM])
    except OSError:
        logger.warning("cannot mark the end of %s", segment.path.name)


def object_key(spool: Path, path: Path) -> str:
    """Where a spool file goes in the store."""
    return f"{PREFIX}/{path.relative_to(spool).as_posix()}"
