"""Small real models over one small snapshot, and the compiler at work on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from serving import snapshot
from serving.compiled import CompiledModel
from serving.compiler import compile_model
from serving.contract import CompileRequest, InputSchema, Plan
from serving.frames import columns_of, from_columns, from_table

FEATURES = ("distance", "delay", "speed", "carrier", "town", "weekend", "hour", "kind")
NUMBERS = ["distance", "delay", "hour", "speed"]
ROWS, HOLDOUT = 900, 150
TOWNS = 90  # more categories than the 64 that a word of bits holds
TOLERANCE = 1e-9

Predict = Callable[[Any, pd.DataFrame], Any]


class Model:
    """A model as the contract has it: `predict` is the test's."""

    def __init__(self, pipeline: Any, predict: Predict) -> None:
        self.pipeline = pipeline
        self._predict = predict

    def predict(self, rows: pd.DataFrame) -> Any:
        return self._predict(self, rows)


def probability(model: Any, rows: pd.DataFrame) -> Any:
    return model.pipeline.predict_proba(rows)[:, 1]


def number(model: Any, rows: pd.DataFrame) -> Any:
    return model.pipeline.predict(rows)


def data() -> pd.DataFrame:
    random, n = np.random.default_rng(1), ROWS
    frame = pd.DataFrame(
        {
            "distance": random.integers(100, 3000, n),
            "delay": np.where(random.random(n) < 0.1, np.nan, random.normal(5, 10, n)),
            "speed": random.normal(500, 50, n),
            "carrier": random.choice(["AA", "UA", "DL"], n),
            "town": np.where(
                random.random(n) < 0.05, None, random.choice([f"t{i}" for i in range(TOWNS)], n)
            ),
            "weekend": random.random(n) < 0.3,
            "hour": np.where(random.random(n) < 0.1, None, random.integers(0, 24, n)),
            "kind": random.integers(1, 7, n),
        }
    )
    frame["hour"] = frame["hour"].astype("Int64")
    score = (
        frame["distance"] / 3000
        + frame["weekend"]
        + 0.5 * (frame["carrier"] == "AA")
        + 0.7 * (frame["kind"] == 3)
    )
    town = frame["town"].str.slice(1).astype(float).fillna(0) % 7
    frame["late"] = ((score + town / 10 + random.random(n)) > 1.9).astype("int64")
    frame["minutes"] = frame["distance"] / 100 + frame["delay"].fillna(0) + 5 * (frame["kind"] == 3) + town
    return frame


@dataclass(frozen=True)
class Workbench:
    """A snapshot on disk, its training rows and its schema."""

    folder: Path
    training: pd.DataFrame
    late: np.ndarray
    minutes: np.ndarray
    schema: InputSchema

    def compile(
        self, model: Any, output: str = "serving", schema: InputSchema | None = None, **changes: Any
    ) -> Plan:
        """What the compiler makes of a model; its files are in `folder / output`."""
        request = compile_request(self.folder, **{"output": str(self.folder / output), **changes})
        return compile_model(model, schema or self.schema, request, lambda line: None)

    def compiled(self, plan: Plan, output: str = "serving") -> CompiledModel:
        return CompiledModel(self.folder / output, plan)

    def frame(self, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
        return from_columns({n: [row[n] for row in rows] for n in FEATURES}, self.schema.features)


def compile_request(folder: Path, **changes: Any) -> CompileRequest:
    request = CompileRequest(
        source="",
        package="",
        trained="",
        parquet_path=str(folder / "snapshot.parquet"),
        time_column=None,
        holdout_start=None,
        holdout_rows=HOLDOUT,
        compile=True,
        tolerance=TOLERANCE,
        seed=0,
        output="",
        result_path="",
    )
    return msgspec.structs.replace(request, **changes)


def workbench(folder: Path) -> Workbench:
    frame = data()
    snapshot.write(frame, folder / "snapshot.parquet")
    table = snapshot.read(folder / "snapshot.parquet", first_rows=ROWS - HOLDOUT)
    schema = InputSchema(columns_of(table, FEATURES))
    training = from_table(table.select(list(FEATURES)), schema.features)
    return Workbench(folder, training, table["late"].to_numpy(), table["minutes"].to_numpy(), schema)


def tuples(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Rows as the server's decoder has them."""
    names = [*plan.numbers, *(lookup.column for lookup in plan.lookups)]
    return [tuple(row[name] for name in names) for row in rows]


ROW: dict[str, Any] = {
    "distance": 1200,
    "delay": 3.5,
    "speed": 480.0,
    "carrier": "UA",
    "town": "t7",
    "weekend": False,
    "hour": 7,
    "kind": 3,
}
