"""The documents of a release directory."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from serving.contract import MANIFEST_FILE, SCHEMA_FILE, InputSchema, Manifest
from serving.errors import ContractError

T = TypeVar("T")


def read_manifest(release: Path) -> Manifest:
    """The manifest of a release directory."""
    return _read(release / MANIFEST_FILE, Manifest)


def read_schema(release: Path) -> InputSchema:
    """The input schema of a release directory."""
    return _read(release / SCHEMA_FILE, InputSchema)


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise ContractError(
            f"no usable {path.name}: {error}", "a release directory", str(path.parent)
        ) from error
