"""DataFrames with exactly the dtypes of a schema, for training and for serving: both build them here.

| type      | dtype                                                    |
|-----------|----------------------------------------------------------|
| integer   | int64; float64 where nulls may occur, as pandas has it   |
| number    | float64                                                  |
| string    | object with None for null (pandas 3: str)                |
| boolean   | bool; object with None where nulls may occur             |
| timestamp | datetime64[ns], or datetime64[ns, UTC] for a `utc` column |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from serving.contract import Column, ColumnType
from serving.errors import ContractError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SUPPORTED = "integers, floats, strings, booleans or timestamps"


def from_columns(columns: Mapping[str, Sequence[Any]], features: Sequence[Column]) -> pd.DataFrame:
    """A frame of the features from checked values (see rows.py), one sequence per feature."""
    import pandas as pd

    return pd.DataFrame({f.name: _array(columns[f.name], f) for f in features}, copy=False)


def _array(values: Sequence[Any], column: Column) -> Any:
    import numpy as np
    import pandas as pd

    match column.type:
        case "integer" if not column.nullable:
            return np.array(values, dtype=np.int64)
        case "integer" | "number":
            return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
        case "boolean" if not column.nullable:
            return np.array(values, dtype=np.bool_)
        case "timestamp":
            moments = [
                None if v is None else v.astimezone(UTC).replace(tzinfo=None) if v.tzinfo else v
                for v in values
            ]
            stamps = np.array(moments, dtype="datetime64[us]").astype("datetime64[ns]")
            return pd.DatetimeIndex(stamps, tz="UTC") if column.utc else stamps
        case "string" if _strings_have_a_dtype():
            return pd.array(list(values), dtype="str")
        case _:
            array = np.empty(len(values), dtype=object)
            array[:] = values
            return array


def from_table(table: pa.Table, features: Sequence[Column] = ()) -> pd.DataFrame:
    """A frame of an Arrow table, in its order; columns that are features get their dtype in any case.

    A feature that is null here and was never null in training keeps the dtype that pandas gives it.
    """
    import numpy as np

    frame: pd.DataFrame = table.to_pandas(coerce_temporal_nanoseconds=True, ignore_metadata=True)
    for feature in features:
        if feature.nullable and feature.type in ("integer", "boolean"):
            dtype = np.dtype(np.float64 if feature.type == "integer" else np.object_)
            if frame[feature.name].dtype != dtype:
                frame[feature.name] = frame[feature.name].astype(dtype)
    return frame


def json_rows(table: pa.Table) -> list[dict[str, object]]:
    """The rows of a table as JSON has them: timestamps as ISO 8601 strings, NaN as null."""
    return [{name: _json_value(value) for name, value in row.items()} for row in table.to_pylist()]


def _json_value(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def column_type(dtype: pa.DataType, name: str) -> ColumnType:
    """The type of a snapshot's column. Raises `ContractError` for one that JSON has no form for."""
    import pyarrow.types as is_

    if is_.is_integer(dtype):
        return "integer"
    if is_.is_floating(dtype):
        return "number"
    if is_.is_string(dtype) or is_.is_large_string(dtype):
        return "string"
    if is_.is_boolean(dtype):
        return "boolean"
    if is_.is_timestamp(dtype):
        return "timestamp"
    raise ContractError(f"column {name!r} has type {dtype}", SUPPORTED, name)


def columns_of(table: pa.Table, names: Sequence[str]) -> tuple[Column, ...]:
    """Types of the named columns; nullable where a null (or NaN) occurs in this table."""
    return tuple(_column_of(table, name) for name in names)


def _column_of(table: pa.Table, name: str) -> Column:
    import pyarrow.types as is_

    values = table.column(name)
    kind = column_type(values.type, name)
    nulls = values.null_count > 0
    if kind == "number" and not nulls:
        import numpy as np

        nulls = bool(np.isnan(values.to_numpy()).any())
    return Column(name, kind, nulls, utc=bool(is_.is_timestamp(values.type) and values.type.tz))


def _strings_have_a_dtype() -> bool:
    import pandas as pd

    return int(pd.__version__.partition(".")[0]) >= 3
