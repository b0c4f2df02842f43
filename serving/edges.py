"""The data that a compiled model is compared on: the holdout, and edge rows made from it.

Edge rows hold nulls, unseen and all known categories, the extremes of every type, and values at, just below
and just above the thresholds of the trees (by one step of a 64-bit and of a 32-bit float) and the constants
of the model's own code, one column at a time and mixed at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving import snapshot
from serving.constants import Constant
from serving.contract import Column, CompileRequest, InputSchema
from serving.errors import ContractError
from serving.frames import from_columns, from_table
from serving.tabulate import UNSEEN_TEXT

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

MOST_THRESHOLDS = 6_000  # values around thresholds, of all columns together
MOST_KNOWN = 1_000  # known values of one column that get an edge row each
MIXED_ROWS = 1_000
MOST_CALLED, MOST_SIZES = 1_000, 30  # rows of one call, and sizes of calls, that the code compares with
INTEGERS = (0, 1, -1, 2**31, -(2**31), 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63))
LARGEST, LARGEST_32 = 1.7976931348623157e308, 3.4028234663852886e38
NUMBERS = tuple(
    sign * size
    for size in (0.0, 5e-324, 1e-310, 1e-45, 1e-30, 1.0, 1e16, LARGEST_32, 3.5e38, 1e39, 1e300, LARGEST)
    for sign in (1.0, -1.0)
)
MOMENTS = (datetime(1700, 1, 1), datetime(1970, 1, 1), datetime(2200, 12, 31, 23, 59, 59, 999999))


class Data:
    """The features of a snapshot, as a server is sent them."""

    def __init__(
        self, request: CompileRequest, schema: InputSchema, constants: Sequence[Constant] = ()
    ) -> None:
        self.features = schema.features
        self._texts = [c for c in constants if isinstance(c, str)]
        self._numbers = _between(sorted(c for c in constants if not isinstance(c, str)))
        self._path = Path(request.parquet_path)
        self._known: dict[str, list[Any]] = {}
        table = snapshot.read(
            self._path,
            [feature.name for feature in schema.features],
            time_column=request.time_column,
            since=request.holdout_start if request.time_column else None,
            last_rows=request.holdout_rows,
        )
        table = table.select([feature.name for feature in schema.features])
        for feature in schema.features:
            if not feature.nullable:  # no server would take such a row
                table = table.filter(table.column(feature.name).is_valid())
        if not table.num_rows:
            raise ContractError(
                "the holdout has no rows that a server would take",
                "newest days like the days before",
                "the data",
            )
        self.holdout = from_table(table, schema.features)

    def known(self, column: Column) -> list[Any]:
        """The distinct values of a column in the whole snapshot, without null."""
        if column.name not in self._known:
            values = snapshot.read(self._path, [column.name]).column(column.name).unique().drop_null()
            self._known[column.name] = sorted(v for v in values.to_pylist() if not _is_nan(v))
        return self._known[column.name]

    def frame(self, columns: Sequence[Column], values: Mapping[str, list[Any]]) -> pd.DataFrame:
        """A frame of some of the features, as the server makes it."""
        return from_columns(values, columns)

    def edge_frame(self, thresholds: Mapping[str, Iterable[float]], seed: int) -> pd.DataFrame:
        """Edge rows, each a row of the holdout with other values in one column or in all."""
        import numpy as np

        random = np.random.default_rng(seed)
        around = _around(thresholds, {f.name: f for f in self.features}, random)
        pools = {f.name: [*self._extremes(f), *around.get(f.name, [])] for f in self.features}
        changes: list[dict[str, Any]] = [{name: value} for name, pool in pools.items() for value in pool]
        changes.append({feature.name: None for feature in self.features if feature.nullable})
        mixed = [_picked(random, pool, MIXED_ROWS) for pool in pools.values()]
        changes += [dict(zip(pools, values, strict=True)) for values in zip(*mixed, strict=True)]
        bases = random.integers(0, len(self.holdout), len(changes))
        columns = {}
        for feature in self.features:
            usual = python_values(self.holdout[feature.name].iloc[bases], feature)
            columns[feature.name] = [
                change.get(feature.name, value) for change, value in zip(changes, usual, strict=True)
            ]
        return self.frame(self.features, columns)

    def sizes(self) -> list[int]:
        """Rows of a call: few, some, and as many as the model's code compares with."""
        own = sorted({int(c) + d for c in self._numbers if 1 < c <= MOST_CALLED for d in (-1, 0, 1)})
        return sorted({1, 2, 3, 10, 100, *own[:MOST_SIZES]})

    def calls(self, edges: pd.DataFrame) -> list[pd.DataFrame]:
        """Frames of all `sizes`, and one of rows that are there twice."""
        import numpy as np

        frames = [self.holdout.iloc[:1], edges.iloc[-10:], edges.iloc[np.arange(20) % min(10, len(edges))]]
        frames += [edges.iloc[np.arange(size) % len(edges)] for size in self.sizes()]
        return [frame.reset_index(drop=True) for frame in frames]

    def _extremes(self, feature: Column) -> list[Any]:
        import numpy as np

        known = self.known(feature)
        spread = known[:: max(1, math.ceil(len(known) / MOST_KNOWN))]
        few = [*known[:1], *known[-1:]]
        values: list[Any]
        match feature.type:
            case "integer":
                whole = [math.floor(c) + d for c in self._numbers for d in (-1, 0, 1)]
                values = [*INTEGERS, *(v for v in whole if -(2**63) <= v < 2**63)]
                values += spread if len(known) <= MOST_KNOWN else few
            case "number":
                own = [float(c) for c in self._numbers if abs(c) < LARGEST]
                steps = [float(np.nextafter(v, way)) for v in few + own for way in (-math.inf, math.inf)]
                values = [*NUMBERS, *few, *own, *(v for v in steps if math.isfinite(v))]
            case "string":
                values = [*UNSEEN_TEXT, *spread, *(v.swapcase() for v in spread[:5]), *self._texts]
            case "boolean":
                values = [True, False]
            case "timestamp":
                values = [m.replace(tzinfo=UTC) if feature.utc else m for m in MOMENTS] + few
        return [*values, None] if feature.nullable else values


def python_values(values: pd.Series, column: Column) -> list[Any]:
    """A column's values as a server's decoder has them: Python's own, None for null."""
    if column.type == "timestamp":
        return [
            None if missing else v.to_pydatetime(warn=False)
            for v, missing in zip(values, values.isna(), strict=True)
        ]
    return [None if v is None or _is_nan(v) else v for v in values.tolist()]


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _around(
    thresholds: Mapping[str, Iterable[float]], features: Mapping[str, Column], random: np.random.Generator
) -> dict[str, list[Any]]:
    """Values at and beside the thresholds, a random choice of them where there are many."""
    import numpy as np

    pairs = [(name, t) for name, values in sorted(thresholds.items()) for t in sorted(set(values))]
    if len(pairs) > MOST_THRESHOLDS // 3:
        chosen = random.choice(len(pairs), MOST_THRESHOLDS // 3, replace=False)
        pairs = [pairs[index] for index in sorted(chosen)]
    around: dict[str, list[Any]] = {}
    for name, threshold in pairs:
        values = around.setdefault(name, [])
        if features[name].type == "integer":
            if abs(threshold) < 2**62:
                # Beside a tie an integer becomes another 32-bit number at once than by way of 64 bits.
                ties = [math.floor(v) + d for v in _narrow(threshold) for d in (0, 1)]
                values += [math.floor(threshold), math.ceil(threshold)]
                values += ties if abs(threshold) > 2**52 else []
        elif features[name].type == "number" and abs(threshold) < LARGEST_32:
            up, down = np.nextafter(threshold, np.inf), np.nextafter(threshold, -np.inf)
            values += [threshold, float(up), float(down), *_narrow(threshold)]
    return around


def _narrow(threshold: float) -> list[float]:
    """The nearest 32-bit numbers, and the ties between them: which one a tie is rounded to matters."""
    import numpy as np

    narrow = np.float32(threshold)
    up, down = (float(np.nextafter(narrow, np.float32(way))) for way in (np.inf, -np.inf))
    return [float(narrow), up, down, (float(narrow) + up) / 2, (float(narrow) + down) / 2]


def _between(numbers: Sequence[float]) -> list[float]:
    """Numbers, and one between each and the next."""
    middles = [low + (high - low) / 2 for low, high in pairwise(numbers)]
    return sorted({*numbers, *middles})


def _picked(random: np.random.Generator, pool: Sequence[Any], count: int) -> list[Any]:
    return [pool[index] for index in random.integers(0, len(pool), count)]
