"""A virtual environment per peer, made by uv from its pinned requirements and kept for the next run."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from perennial import process
from perennial.errors import ChildFailed

REQUIREMENTS = Path(__file__).parent
_COMPLETE = "complete"


def make(name: str, venvs: Path) -> Path:
    """The Python of the environment that `NAME.txt` pins. Raises ChildFailed when it cannot be installed."""
    requirements = REQUIREMENTS / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = venvs / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if (folder / _COMPLETE).is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venvs.mkdir(parents=True, exist_ok=True)
    _uv("venv", "--quiet", "--python", sys.executable, str(folder), folder=venvs)
    install = ("pip", "sync", "--quiet", "--compile-bytecode", str(requirements))
    _uv(*install, folder=venvs, VIRTUAL_ENV=str(folder))
    (folder / _COMPLETE).touch()
    return python


def _uv(*arguments: str, folder: Path, **extra: str) -> None:
    from uv import find_uv_bin

    argv = [find_uv_bin(), *arguments]
    environment = process.scrubbed_environment(network=True, **extra)
    try:
        process.capture(argv, cwd=folder, environment=environment, timeout_seconds=900)
    except ChildFailed as error:
        raise ChildFailed(
            f"uv {arguments[0]}: {error.found}", "a package index that has these pins"
        ) from error
