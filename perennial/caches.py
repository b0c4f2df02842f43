"""What this machine keeps so as to be quick: copies from the store, checkouts, environments, work folders.

All of it is fetched or made again when it is missing. A folder's own time is when it was last asked for.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from uuid import uuid4

from perennial.values import Release

KEEP_SECONDS = 86_400.0  # longer than a run that has asked for something goes without it
KEEP_WORK_SECONDS = 7 * 86_400.0  # of a failed run: long enough to look at its logs
_ASIDE = ".reaped-"


@dataclass(frozen=True)
class Unneeded:
    """A file or folder that no kept release needs, and that nobody has asked for in `keep_seconds`."""

    kind: str
    path: Path
    why: str
    age_seconds: float
    keep_seconds: float

    @property
    def half_made(self) -> bool:
        """By a process that was killed."""
        return self.path.name.startswith(".")

    def bytes(self) -> int:
        """On disk; a file that other folders hold too (uv links) counts for each."""
        if not self.path.is_dir():
            return _size(self.path)
        return sum(_size(Path(folder) / name) for folder, _, names in os.walk(self.path) for name in names)

    def remove(self) -> bool:
        """Remove it, at once for whoever looks. False when it was asked for again meanwhile."""
        with _locked(self.path) as ours:
            age = _age(self.path)
            if not ours or age is None or age < self.keep_seconds:
                return False
            if not self.path.is_dir():
                self.path.unlink(missing_ok=True)
                return True
            aside = self.path.with_name(f"{_ASIDE}{uuid4().hex}")
            self.path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        return True


def unneeded(root: Path, kept: Iterable[Release], instances: Iterable[str]) -> Iterator[Unneeded]:
    """What lies below HOME (`root`) for none of these releases, and logs of none of these instances."""
    kept = list(kept)
    commits = {(release.project, release.source.git_sha) for release in kept}
    data = {f"{release.dataset.fingerprint}.parquet" for release in kept}
    environments = {release.environment.fingerprint[:16] for release in kept}
    files = {a.sha256 for release in kept for a in (release.environment.lock, release.environment.serving)}
    releases = {release.release_id for release in kept}
    no_release, no_run = "no release that is kept needs it", "its run ended long ago"

    yield from _below(root / "releases", "release", no_release, lambda name: name in releases)
    for folder in _entries(root / "checkouts"):
        shas = {sha for project, sha in commits if project == folder.name}
        yield from _below(folder, "checkout", no_release, partial(_starts, shas))
    yield from _below(root / "snapshots", "snapshot", no_release, lambda name: name in data)
    yield from _below(root / "environments" / "cache", "environment", no_release, lambda name: name in files)
    newest = _newest_wheel(root / "environments")
    yield from _below(
        root / "environments",
        "environment",
        no_release,
        # Lock files stay: somebody may be waiting on one.
        lambda name: name.removesuffix(".log") in {*environments, newest, "cache"} or name.endswith(".lock"),
    )
    for folder in (root / "services", root / "router"):
        yield from _below(folder, "file", "half written", lambda name: not name.endswith(".tmp"))
    yield from _below(root / "images", "work folder", no_run, lambda name: name.endswith(".log"))
    yield from _below(root / "work", "work folder", no_run, lambda name: False, KEEP_WORK_SECONDS)
    of_instances = tuple(f"{name}.log" for name in instances)
    yield from _below(
        root / "logs",
        "log",
        "its instance is gone",
        lambda name: not name.startswith("svc-") or name.startswith(of_instances),
        KEEP_WORK_SECONDS,
    )


def _starts(shas: set[str], name: str) -> bool:
    """A checkout is named for its commit, a dash, and its repository."""
    return name.split("-", maxsplit=1)[0] in shas


def asked_for(path: Path) -> bool:
    """Whether it is there, and was asked for within the time that it is kept."""
    age = _age(path)
    return age is not None and age < KEEP_SECONDS


def _below(
    folder: Path, kind: str, why: str, is_kept: Callable[[str], bool], keep_seconds: float = KEEP_SECONDS
) -> Iterator[Unneeded]:
    for path in _entries(folder):
        age = _age(path)
        if age is None or age < keep_seconds or path.name == ".lock":
            continue
        found = Unneeded(kind, path, why, age, keep_seconds)
        if found.half_made:
            yield replace(found, why="half made by a process that was killed")
        elif not is_kept(path.name):
            yield found


def _newest_wheel(environments: Path) -> str:
    """The folder with the serving wheel of today's code: the next build wants it."""
    built = [(_age(path), path.name) for path in environments.glob("serving-*") if path.is_dir()]
    return min(((age, name) for age, name in built if age is not None), default=(0.0, ""))[1]


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whoever makes an environment or replaces a release's folder is alone with it; so are we.

    False when the lock is held.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        descriptor = os.open(lock if lock.exists() else path.parent, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _age(path: Path) -> float | None:
    """Seconds since it was last asked for; None when it is gone."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat(follow_symlinks=False).st_mtime
    return None


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat(follow_symlinks=False).st_size
    return 0
