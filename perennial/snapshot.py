"""A snapshot: the rows of one day's view of the data, as immutable Parquet named by what it holds."""

from __future__ import annotations

import hashlib
import os
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from perennial.config import ProjectConfig
from perennial.errors import DataError
from perennial.store import Store
from perennial.validation import column_type
from perennial.values import Column, ColumnType, Dataset

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def keep(store: Store, project: str, parquet: Path, as_of: date, time_column: str | None) -> Dataset:
    """Put a Parquet file into the store under its content's fingerprint and describe it."""
    table = read(parquet)
    fingerprint = content_fingerprint(table)
    key = f"snapshots/{project}/{as_of}-{fingerprint[:16]}.parquet"
    if not store.exists(key):
        store.put_file(key, parquet)
    first, last = _span(table, time_column)
    return Dataset(
        uri=store.uri(key),
        fingerprint=fingerprint,
        rows=table.num_rows,
        columns=tuple(
            Column(name=field.name, type=_type(field), nullable=table[field.name].null_count > 0)
            for field in table.schema
        ),
        as_of=as_of,
        first_time=first,
        last_time=last,
    )


def read(parquet: Path) -> pa.Table:
    """The whole snapshot as an Arrow table."""
    import pyarrow.parquet as pq

    return pq.read_table(parquet)


def frame(parquet: Path) -> pd.DataFrame:
    """The whole snapshot in pandas, for its validation: moments in nanoseconds where they fit, UTC without
    saying so, since a suite's bounds are written without a zone.
    """
    import pyarrow as pa

    table = read(parquet)
    whole: pd.DataFrame
    try:
        # With any other unit Great Expectations compares moments row by row, in Python.
        whole = table.to_pandas(coerce_temporal_nanoseconds=True)
    except pa.ArrowInvalid:
        whole = table.to_pandas()
    for name in whole.select_dtypes("datetimetz"):
        whole[name] = whole[name].dt.tz_convert(None)
    return whole


def content_fingerprint(table: pa.Table) -> str:
    """SHA-256 over names, types and values, whatever the file's compression, row groups or writer."""
    import pyarrow as pa

    digest = hashlib.sha256()

    class Sink:
        """A file to write to that keeps nothing but the digest."""

        closed = False

        def write(self, data: bytes) -> int:
            digest.update(data)
            return len(data)

        def writable(self) -> bool:
            return True

        def flush(self) -> None: ...

        def close(self) -> None: ...

    plain = table.replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(pa.PythonFile(Sink(), mode="w"), plain.schema) as stream:
        stream.write_table(plain)
    return digest.hexdigest()


def local(store: Store, dataset: Dataset, cache: Path) -> Path:
    """The snapshot's file on disk: the store's own where that is a directory, else a cached download."""
    key = store.key(dataset.uri)
    path = store.local_path(key)
    if path is not None:
        return path
    cached = cache / f"{dataset.fingerprint}.parquet"
    if not cached.is_file():
        store.fetch(key, cached)
    os.utime(cached)  # asked for now (see caches.py)
    return cached


def features(dataset: Dataset, config: ProjectConfig) -> tuple[str, ...]:
    """The columns the model may see: those that the project names, else all but target, entity and time."""
    apart = {config.target, config.time_column, *config.entity_id}
    return config.features or tuple(c.name for c in dataset.columns if c.name not in apart)


def split(dataset: Dataset, config: ProjectConfig) -> tuple[datetime | None, int | None]:
    """(first moment of the holdout, None), or (None, its number of rows) where the data has no time.

    The holdout is the newest whole days. Raises DataError when too little is left to train on.
    """
    if config.time_column is None:
        return None, max(1, dataset.rows // 5)
    assert dataset.first_time is not None and dataset.last_time is not None
    midnight = datetime.combine(dataset.last_time.date(), time.min, tzinfo=dataset.last_time.tzinfo)
    start = midnight - timedelta(days=config.holdout_days - 1)
    days = (start - dataset.first_time).days
    span = (dataset.last_time - dataset.first_time).days + 1
    if days < config.holdout_days:
        raise DataError(
            f"the data known on {dataset.as_of} spans {span} days, "
            f"which leaves {max(days, 0)} to train on beside a holdout of {config.holdout_days}",
            f"at least {2 * config.holdout_days} days",
            "build with a later as_of, or lower holdout_days in pyproject.toml",
        )
    return start, None


def _type(field: pa.Field) -> ColumnType:
    try:
        return column_type(field.type)
    except DataError as error:
        raise DataError(f"column {field.name!r}: {error.found}", error.expected) from error


def _span(table: pa.Table, time_column: str | None) -> tuple[datetime | None, datetime | None]:
    import pyarrow.compute as pc
    import pyarrow.types as pt

    if time_column is None or time_column not in table.column_names:
        return None, None
    if not pt.is_timestamp(table.schema.field(time_column).type):
        return None, None  # the data's validation says so, with the number of rows
    bounds = pc.min_max(table[time_column])
    return bounds["min"].as_py(), bounds["max"].as_py()
