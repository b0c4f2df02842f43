"""What the services logged (serving/prediction_log.py): Arrow IPC streams in the store, read as one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING

from perennial.store import Store

if TYPE_CHECKING:
    import pyarrow

FOLDER = "predictions"
OWN = ("request_id", "row", "time", "prediction", "release_id")


def read(store: Store, environment: str, project: str, since: date, until: date) -> pyarrow.Table:
    """The rows answered from the day `since` to before the day `until` (UTC), of all releases.

    Columns: `request_id`, `row` (its index in the request), `time` (timestamp[us, UTC]), the columns of the
    releases' schemas, `prediction`, `release_id`. A column that a release does not have is null there; one
    whose types have no common number type is text. When a release has a column named like one of the five
    that are not the model's, all five are preceded by as many underscores as keep them apart.

    Files appear in the store a minute after their first row, or later after an outage.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    tables = [
        table for key in _keys(store, environment, project, since, until) if (table := _table(store, key))
    ]
    own = {
        "request_id": pa.string(),
        "row": pa.int32(),
        "time": pa.timestamp("us", "UTC"),
        "prediction": pa.float64(),
        "release_id": pa.dictionary(pa.int32(), pa.string()),
    }
    features = {name for prefix, table in tables for name in table.column_names if not _is_own(prefix, name)}
    common = ""
    while any(common + name in features for name in OWN):
        common += "_"
    renamed = [_renamed(table, prefix, common) for prefix, table in tables]
    none = pa.schema([(common + name, kind) for name, kind in own.items()]).empty_table()
    together = _concatenated([*renamed, none])
    time = together[f"{common}time"]
    begin, end = (datetime(day.year, day.month, day.day, tzinfo=UTC) for day in (since, until))
    inside = pc.and_(pc.greater_equal(time, begin), pc.less(time, end))
    return together.filter(inside)


def _keys(store: Store, environment: str, project: str, since: date, until: date) -> Iterator[str]:
    """The files that may hold such rows: a file lies in the folder of the day on which it was begun.

    That is up to a day before its last row, and a moment after its first: a row waits for the next flush.
    """
    day = since - timedelta(days=1)
    while day <= until:
        for key in store.list(f"{FOLDER}/{environment}/{project}/{day}"):
            if key.endswith(".arrows"):
                yield key
        day += timedelta(days=1)


def _table(store: Store, key: str) -> tuple[str, pyarrow.Table] | None:
    """A file's whole batches and what precedes our columns' names; None without any batch."""
    import pyarrow as pa

    batches = []
    try:
        stream = pa.ipc.open_stream(store.get(key))
        while True:
            batches.append(stream.read_next_batch())
    except (StopIteration, pa.ArrowInvalid, OSError):  # the end, or a last batch that is not whole
        if not batches:
            return None
    metadata = {name.decode(): text.decode() for name, text in (stream.schema.metadata or {}).items()}
    prefix = metadata.get("prefix", "")
    table = pa.Table.from_batches(batches).replace_schema_metadata(None)
    release = pa.array([metadata.get("release_id", "")] * len(table)).dictionary_encode()
    return prefix, table.append_column(f"{prefix}release_id", release)


def _is_own(prefix: str, name: str) -> bool:
    return name.startswith(prefix) and name[len(prefix) :] in OWN


def _renamed(table: pyarrow.Table, prefix: str, common: str) -> pyarrow.Table:
    return table.rename_columns(
        [common + name[len(prefix) :] if _is_own(prefix, name) else name for name in table.column_names]
    )


def _concatenated(tables: Sequence[pyarrow.Table]) -> pyarrow.Table:
    import pyarrow as pa

    kinds: dict[str, set[pyarrow.DataType]] = {}
    for table in tables:
        for column in table.schema:
            kinds.setdefault(column.name, set()).add(column.type)
    numbers = {pa.int64(), pa.float64()}
    mixed = {name for name, found in kinds.items() if len(found) > 1 and not found <= numbers}
    as_text = [
        pa.schema([field.with_type(pa.string()) if field.name in mixed else field for field in table.schema])
        for table in tables
    ]
    return pa.concat_tables(
        [table.cast(schema) for table, schema in zip(tables, as_text, strict=True)],
        promote_options="permissive",
    )
