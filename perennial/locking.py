"""Make a project's requirements.lock: its own requirements and the serving wheel's, with hashes."""

from __future__ import annotations

from pathlib import Path

from perennial import process
from perennial.environments import SERVING_SOURCE
from perennial.errors import ChildFailed, ProjectError
from perennial.project import LOCK_FILE


def lock(folder: Path) -> Path:
    """Write `requirements.lock` of the project in `folder` and return its path."""
    from uv import find_uv_bin

    if not (folder / "pyproject.toml").is_file():
        raise ProjectError(f"{folder} has no pyproject.toml", "the folder of a model project")
    path = (folder / LOCK_FILE).resolve()
    try:
        process.capture(
            [
                find_uv_bin(),
                *("pip", "compile", "pyproject.toml", str(SERVING_SOURCE / "pyproject.toml")),
                *("--extra", "train", "--extra", "sklearn", "--group", "pyproject.toml:dev"),
                *("--universal", "--generate-hashes", "--no-emit-index-url", "--no-header", "--no-annotate"),
                *("--quiet", "--output-file", str(path)),
            ],
            cwd=folder,
            environment=process.scrubbed_environment(network=True),
            timeout_seconds=600,
        )
    except ChildFailed as error:
        raise ProjectError(
            f"{folder.name} cannot be locked: {error.found}", "requirements that can be met together"
        ) from error
    return path
