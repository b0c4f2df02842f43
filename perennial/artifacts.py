"""Files and folders in the store, named by their content and never believed without their digest.

The last part of a key is kept and the digest put before it (`reports/flights/tests.xml` becomes
`reports/flights/3f2a…/tests.xml`), so nothing that a release names is overwritten by anything else.
Writing twice is harmless, and repairs what was damaged in between. The URI of a folder ends in a slash.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from perennial.errors import ReleaseError
from perennial.store import Store, checked
from perennial.values import Artifact

DIGEST_CHARACTERS = 16


def put_file(store: Store, key: str, path: Path) -> Artifact:
    """Write a file to the folder of `key`, under its digest."""
    sha256 = file_sha256(path)
    artifact = Artifact(uri=store.uri(_addressed(key, sha256)), sha256=sha256, bytes=path.stat().st_size)
    store.put_file(store.key(artifact.uri), path)
    return artifact


def put_directory(store: Store, prefix: str, directory: Path) -> Artifact:
    """Write a folder's files, with their folders, below `prefix` under the digest of all of them.

    Raises ReleaseError for a folder without a file, with a link in it, or with a name that is no key.
    """
    digests = _digests(directory)
    sha256 = _digest(digests)
    key = _addressed(prefix, sha256)
    for name in digests:
        _check_name(directory, name)
    for name in digests:
        store.put_file(f"{key}/{name}", directory / name)
    size = sum((directory / name).stat().st_size for name in digests)
    return Artifact(uri=f"{store.uri(key)}/", sha256=sha256, bytes=size)


def fetch(store: Store, artifact: Artifact, destination: Path) -> Path:
    """Bring the artifact to `destination`, its digest checked first; on any error nothing new is left there.

    A file replaces a file. A folder that is there already is kept if it is the same, else refused.

    Raises ReleaseError naming the URI and both digests when the bytes are missing or not the artifact's.
    """
    there = destination.exists()  # before it is looked at: somebody else may bring it this moment, whole
    if there and _holds(destination, artifact):
        return destination
    if there and (destination.is_dir() or artifact.uri.endswith("/")):
        raise ReleaseError(
            f"{destination} already holds something else than {artifact.uri}",
            expected="a path where nothing is yet",
            next_command=f"mv {destination} {destination}.old",
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".fetch-", dir=destination.parent) as folder:
        part = Path(folder) / "part"
        _download(store, artifact, part)
        _verify(part, artifact)
        try:
            part.replace(destination)
        except OSError:  # another process was first: a folder cannot be renamed onto a full one
            _verify(destination, artifact)
    return destination


def open_local(store: Store, artifact: Artifact, cache: Path) -> Path:
    """A path to read the artifact at, its digest checked: the store's own file, or a copy kept in `cache`.

    Raises ReleaseError as `fetch` does.
    """
    key = store.key(artifact.uri)
    if path := store.local_path(key):
        if not path.exists():
            raise _missing(artifact)
        _verify(path, artifact)
        return path
    copy = cache / artifact.sha256 / key.rpartition("/")[2]
    if copy.is_dir() and not _holds(copy, artifact):
        with alone_in(copy.parent):
            if copy.is_dir() and not _holds(copy, artifact):  # nobody has repaired it since
                damaged = copy.with_name(f".damaged-{uuid4().hex}")
                copy.rename(damaged)
                shutil.rmtree(damaged)
    return fetch(store, artifact, copy)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory_sha256(directory: Path) -> str:
    """SHA-256 over the sorted list of (relative path, SHA-256) of a folder's files.

    Raises ReleaseError for a folder without a file, or with a link in it.
    """
    return _digest(_digests(directory))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Of all processes and threads that ask for this folder, one at a time. Ends with its process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _addressed(key: str, sha256: str) -> str:
    folder, _, name = key.rstrip("/").rpartition("/")
    return "/".join(part for part in (folder, sha256[:DIGEST_CHARACTERS], name) if part)


def _check_name(directory: Path, name: str) -> None:
    try:
        checked(name)
    except ValueError as error:
        raise ReleaseError(f"{directory} holds a file that the store cannot hold: {error}") from None


def _download(store: Store, artifact: Artifact, path: Path) -> None:
    key = store.key(artifact.uri)
    names = [k.removeprefix(key) for k in store.list(key)] if artifact.uri.endswith("/") else [""]
    if not names:
        raise _missing(artifact)
    try:
        for name in names:
            store.fetch(key + name, path / name.removeprefix("/") if name else path)
    except FileNotFoundError:
        raise _missing(artifact) from None


def _verify(path: Path, artifact: Artifact) -> None:
    found = directory_sha256(path) if path.is_dir() else file_sha256(path)
    if found != artifact.sha256:
        raise ReleaseError(
            f"{artifact.uri} has sha256 {found}: it was altered after it was written",
            expected=f"sha256 {artifact.sha256}",
            next_command="build the release again, or restore the store from its backup",
        )


def _holds(path: Path, artifact: Artifact) -> bool:
    try:
        _verify(path, artifact)
    except (ReleaseError, FileNotFoundError):
        return False
    return True


def _missing(artifact: Artifact) -> ReleaseError:
    return ReleaseError(
        f"{artifact.uri} is not in the store",
        expected=f"{artifact.bytes} bytes with sha256 {artifact.sha256}",
        next_command="build the release again, or restore the store from its backup",
    )


def _digests(directory: Path) -> dict[str, str]:
    """Relative path of each file to its SHA-256, sorted by path."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise ReleaseError(f"{path} is a link", expected="files and folders only, which can be copied")
        if path.is_file():
            digests[path.relative_to(directory).as_posix()] = file_sha256(path)
    if not digests:
        raise ReleaseError(f"{directory} holds no file", expected="a folder with at least one file")
    return dict(sorted(digests.items()))


def _digest(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(list(digests.items())).encode()).hexdigest()
