"""What a build of an image is given: a tar whose bytes depend on the files' contents and names alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from perennial.errors import ReleaseError

_EXECUTABLE, _FILE, _FOLDER = 0o755, 0o644, 0o755


class Context:
    """A tar being written: owned by root, readable by all, without times."""

    def __init__(self, file: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w")  # noqa: SIM115 - closed by `create`

    def add_text(self, name: str, text: str) -> None:
        content = text.encode()
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), _FILE
        self._tar.addfile(member, io.BytesIO(content))

    def add_folder(self, name: str, mode: int = _FOLDER) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.mode = tarfile.DIRTYPE, mode
        self._tar.addfile(member)

    def add_tree(self, name: str, folder: Path) -> None:
        """Every file below `folder`, but bytecode: that is compiled in the image.

        Raises ReleaseError for a link, which would point elsewhere in the image.
        """
        self.add_folder(name)
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.is_symlink():
                raise ReleaseError(f"{path} is a link", "files and folders only", "build the release again")
            if "__pycache__" in inside.parts:
                continue
            if path.is_dir():
                self.add_folder(f"{name}/{inside.as_posix()}")
                continue
            found = path.stat()
            member = tarfile.TarInfo(f"{name}/{inside.as_posix()}")
            member.size, member.mode = found.st_size, _EXECUTABLE if found.st_mode & 0o100 else _FILE
            with path.open("rb") as content:
                self._tar.addfile(member, content)

    def close(self) -> None:
        self._tar.close()


@contextmanager
def create() -> Iterator[tuple[Context, IO[bytes]]]:
    """A context to fill, and the file that holds it once it is closed."""
    with TemporaryFile() as file:
        context = Context(file)
        try:
            yield context, file
        finally:
            context.close()
