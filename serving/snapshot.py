"""Parquet snapshots: written with plain types and equal bytes for equal data, read by time or by position."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.errors import ContractError
from serving.frames import SUPPORTED, column_type

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_GROUP = 65_536


def write(frame: object, path: Path) -> int:
    """Write what `load_data` returned; its index is dropped. Returns the number of rows."""
    import pandas as pd
    import pyarrow as pa

    if not isinstance(frame, pd.DataFrame):
        raise ContractError(f"load_data returned a {type(frame).__name__}", "a pandas DataFrame")
    names = list(frame.columns)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ContractError(
            f"load_data returned a column named {wrong[0]!r}", "column names that are strings"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ContractError(f"load_data returned column {twice[0]!r} more than once", "each column once")
    arrays = [_plain(frame[name], name) for name in names]
    write_table(pa.table(arrays, names=names), path)
    return len(frame)


def write_table(table: pa.Table, path: Path) -> None:
    """Equal tables give equal bytes: no pandas metadata, fixed row groups and compression."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(
        table.replace_schema_metadata(None), partial, row_group_size=ROWS_PER_GROUP, compression="zstd"
    )
    partial.replace(path)


def _plain(values: Any, name: str) -> pa.Array:
    """One column as int64, double, string, bool or timestamp in microseconds."""
    import pyarrow as pa
    import pyarrow.types as is_

    try:
        array = pa.Array.from_pandas(values)
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        if is_.is_dictionary(array.type):
            array = array.dictionary_decode()
        dtype = array.type
        if is_.is_integer(dtype):
            return array.cast(pa.int64())
        if is_.is_floating(dtype) or is_.is_decimal(dtype):
            return array.cast(pa.float64())
        if is_.is_null(dtype) or is_.is_large_string(dtype) or is_.is_string_view(dtype):
            return array.cast(pa.string())
        if is_.is_date(dtype):
            return array.cast(pa.timestamp("us"))
        if is_.is_timestamp(dtype):
            return array.cast(pa.timestamp("us", tz="UTC" if dtype.tz else None), safe=False)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ContractError(
            f"column {name!r} cannot be stored: {error}", f"one type: {SUPPORTED}", name
        ) from error
    column_type(array.type, name)
    return array


def read(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    time_column: str | None = None,
    before: str | None = None,
    since: str | None = None,
    first_rows: int | None = None,
    last_rows: int | None = None,
) -> pa.Table:
    """Rows of a snapshot, in its order: by time (ISO timestamps), or the first or last ones."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        need(names, [*(columns or ()), *([time_column] if time_column else ())], path.name)
        rows = file.metadata.num_rows
        if time_column is None:
            table = file.read(columns=list(columns) if columns is not None else None)
            if first_rows is not None:
                return table.slice(0, first_rows)
            return table.slice(max(rows - last_rows, 0)) if last_rows is not None else table
        time_type = file.schema_arrow.field(time_column).type
    filters = [
        (time_column, operator, _moment(text, time_type, time_column))
        for operator, text in (("<", before), (">=", since))
        if text is not None
    ]
    return pq.read_table(path, columns=columns, filters=filters or None)


def row_count(path: Path) -> int:
    """Rows of a snapshot, from its footer."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def column_names(path: Path) -> list[str]:
    """Columns of a snapshot, from its footer."""
    import pyarrow.parquet as pq

    return list(pq.read_schema(path).names)


def need(present: Sequence[str], wanted: Iterable[str], where: str) -> None:
    """Raise `ContractError` for the first wanted column that is not present, with the nearest name."""
    for name in wanted:
        if name not in present:
            nearest = difflib.get_close_matches(name, present, 1)
            hint = f"{nearest[0]!r}?" if nearest else f"one of {', '.join(present)}"
            raise ContractError(f"no column {name!r}", hint, where)


def _moment(text: str, time_type: pa.DataType, name: str) -> pa.Scalar:
    import pyarrow as pa
    import pyarrow.types as is_

    if not is_.is_timestamp(time_type):
        raise ContractError(f"time column {name!r} has type {time_type}", "timestamps", name)
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC).replace(tzinfo=None)
    return pa.scalar(moment.replace(tzinfo=UTC) if time_type.tz else moment, type=time_type)
