"""A release on disk, loaded: from rows of JSON to predictions."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.artifact import load_model
from serving.contract import MODEL_DIRECTORY, SITE_DIRECTORY
from serving.errors import ContractError
from serving.frames import from_columns
from serving.release import read_manifest, read_schema
from serving.rows import RowChecker

if TYPE_CHECKING:
    import pandas as pd


class Scorer:
    """A loaded release. Raises `ContractError` if the directory is not one, or its model is refused."""

    def __init__(self, release: Path) -> None:
        self.manifest = read_manifest(release)
        self.schema = read_schema(release)
        self.checker = RowChecker(self.schema)
        site = str((release / SITE_DIRECTORY).resolve())
        if site not in sys.path:
            sys.path.insert(0, site)
        self.model = load_model(release / MODEL_DIRECTORY, self.manifest.package)

    def predict(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """One prediction per row. Raises `BadRequest` for rows that do not fit the schema."""
        return self.predict_columns(self.checker.columns(rows))

    def predict_columns(self, columns: Mapping[str, Sequence[Any]]) -> list[float]:
        """One prediction per row of checked values, which come by column."""
        return self.predict_frame(from_columns(columns, self.schema.features))

    def predict_frame(self, frame: pd.DataFrame) -> list[float]:
        """One prediction per row of a frame of the features."""
        return predictions_of(self.model, frame)


def predictions_of(model: Any, frame: pd.DataFrame) -> list[float]:
    """What a model says of a frame, as one finite number per row. Raises `ContractError` otherwise."""
    import numpy as np

    where = "Model.predict"
    rows = len(frame)
    answer = model.predict(frame)
    array = np.asarray(answer)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or len(array) != rows:
        raise ContractError(
            f"predict returned shape {np.shape(answer)} for {rows} rows", f"shape ({rows},)", where
        )
    if array.dtype.kind not in "fiub":
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError):
            raise ContractError(
                f"predict returned values of type {array.dtype}, such as {array[0]!r}", "numbers", where
            ) from None
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise ContractError(
            f"predict returned {array[wrong[0]]} for row {wrong[0]} and {len(wrong) - 1} more",
            "a finite number per row",
            where,
        )
    numbers: list[float] = array.astype(np.float64).tolist()
    return numbers
