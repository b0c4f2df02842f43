"""Prediction logs on real disks, and what pyarrow reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from serving.contract import Column
from serving.prediction_log import PredictionLog

COLUMNS = (Column("number", "integer", nullable=True), Column("text", "string", nullable=True))


def log_of(folder: Path, **changes: Any) -> PredictionLog:
    options: dict[str, Any] = {
        "url": (folder / "store").as_uri(),
        "spool": folder / "spool",
        "environment": "production",
        "project": "toy",
        "release_id": "toy-0123456789ab",
        "columns": COLUMNS,
    }
    return PredictionLog(**(options | changes))


def append(log: PredictionLog, number: int, text: str = "") -> bool:
    return log.append([(number, text)], [0.1 + number], str(number), len(text) + 30)


def rows_of(path: Path) -> list[dict[str, Any]]:
    with pa.ipc.open_stream(path) as stream:
        rows: list[dict[str, Any]] = stream.read_all().to_pylist()
    return rows


def stored(folder: Path, pattern: str = "production/toy/*/toy-0123456789ab-*") -> list[dict[str, Any]]:
    paths = sorted((folder / "store" / "predictions").glob(f"{pattern}.arrows"))
    return [row for path in paths for row in rows_of(path)]


def numbers(folder: Path) -> list[int]:
    return [row["number"] for row in stored(folder)]
