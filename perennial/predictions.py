"""What the services logged (serving/prediction_log.py): Arrow IPC streams in the store, read as one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perennial.store import Store

if TYPE_CHECKING:
    import pyarrow

FOLDER = "predictions"
OWN = ("request_id", "row", "time", "prediction", "release_id")
CHECK_REQUEST_ID = "perennial-check"  # of our own requests, which are not users'

_ANSWER = ("request_id", "row", "time", "prediction")
_SEGMENT_SECONDS = 60.0  # a service begins a new file after so long, unless the store is away


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


class Recent(NamedTuple):
    """Logged predictions of one release, a row each: as many entries in every array."""

    request_ids: NDArray[np.object_]
    rows: NDArray[np.int32]  # index in the request
    times: NDArray[np.datetime64]  # UTC, microseconds
    predictions: NDArray[np.float64]  # NaN where there is none


class ShadowDifferences(NamedTuple):
    """How far the answers of a shadow are from those that users got to the same rows."""

    rows: int  # compared
    max_abs: float
    mean_abs: float
    beyond: float  # share of rows that differ by more than the tolerance, or are a number in one alone


def recent(
    spool: Path,
    store: Store,
    environment: str,
    project: str,
    release_id: str,
    since: datetime,
    until: datetime | None = None,
) -> Recent:
    """What users were answered by a release from `since` to before `until` (None: now), as far as logged.

    From the spool files of this machine and from the store. A row is in the spool some 0.3 s after its
    answer, so an `until` of a second ago misses none. Our own checks are left out.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    found: dict[str, pyarrow.Table] = {}
    days = [f"{since.date() + timedelta(days=n)}" for n in range(-1, (datetime.now(UTC) - since).days + 2)]
    for day in days:
        for path in (spool / environment / project / day).glob(f"{release_id}-*.arrows"):
            with suppress(FileNotFoundError, PermissionError):  # shipped, or a container's: the store's turn
                if path.stat().st_mtime >= since.timestamp():
                    found[path.name] = _answers(path.read_bytes())
    # Only now: what is no longer in the spool is in the store.
    keys = [key for day in days for key in store.list(f"{FOLDER}/{environment}/{project}/{day}")]
    names = {name: key for key in keys if (name := key.rpartition("/")[2]).startswith(f"{release_id}-")}
    done: set[str] = set()  # processes whose further files are older than `since`
    for name in sorted((name for name in names if name.endswith(".arrows")), reverse=True):
        began, process = _began(name)
        if name in found or process in done:
            continue
        table = found[name] = _answers(store.get(names[name]))
        latest = pc.max(table["time"]).as_py() or since
        if began and latest < since and began < since - timedelta(seconds=2 * _SEGMENT_SECONDS):
            done.add(process)
    return _of_users(pa.concat_tables([_answers(b""), *found.values()]), since, until)


def shadow_differences(active: Recent, shadow: Recent, tolerance: float = 1e-9) -> ShadowDifferences:
    """Compare by request id and row. Ids that a client used twice say nothing and are left out.

    `tolerance`: absolute up to 1, above it relative. Without a row in both, all is 0.
    """
    mine, other = _by_row(active), _by_row(shadow)
    keys = mine.keys() & other.keys()
    a, b = (np.array([side[key] for key in keys], dtype=np.float64) for side in (mine, other))
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
        difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0  # infinities too
        beyond = ~(np.isfinite(difference) & (difference <= tolerance * np.fmax(1.0, np.abs(a))))
    measured = difference[np.isfinite(difference)]
    return ShadowDifferences(
        rows=len(keys),
        max_abs=float(measured.max(initial=0.0)),
        mean_abs=float(measured.mean()) if len(measured) else 0.0,
        beyond=float(beyond.mean()) if len(keys) else 0.0,
    )


def _by_row(recent: Recent) -> dict[tuple[str, int], float]:
    rows: dict[tuple[str, int], float] = {}
    twice = set()
    for request_id, row, value in zip(
        recent.request_ids.tolist(), recent.rows.tolist(), recent.predictions.tolist(), strict=True
    ):
        if (request_id, row) in rows:
            twice.add((request_id, row))
        rows[request_id, row] = value
    return {key: value for key, value in rows.items() if key not in twice}


def _answers(content: bytes) -> pyarrow.Table:
    """A file's own columns but the release, of all its whole batches."""
    import pyarrow as pa

    types = pa.string(), pa.int32(), pa.timestamp("us", "UTC"), pa.float64()
    none = pa.schema(list(zip(_ANSWER, types, strict=True))).empty_table()
    try:
        schema = pa.ipc.open_stream(content).schema
        prefix = (schema.metadata or {}).get(b"prefix", b"").decode()
        fields = [schema.get_field_index(prefix + name) for name in _ANSWER]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        stream = pa.ipc.open_stream(content, options=options)
        batches = []
        with suppress(StopIteration, pa.ArrowInvalid, OSError):  # the end, or a last batch that is not whole
            while True:
                batches.append(stream.read_next_batch())
    except (pa.ArrowInvalid, OSError):  # not even the schema is whole yet
        return none
    table = pa.Table.from_batches(batches, stream.schema).replace_schema_metadata(None)
    return table.select([prefix + name for name in _ANSWER]).rename_columns(_ANSWER)


def _of_users(table: pyarrow.Table, since: datetime, until: datetime | None) -> Recent:
    import pyarrow.compute as pc

    wanted = pc.and_(
        pc.greater_equal(table["time"], since), pc.not_equal(table["request_id"], CHECK_REQUEST_ID)
    )
    if until is not None:
        wanted = pc.and_(wanted, pc.less(table["time"], until))
    table = table.filter(wanted)
    return Recent(
        request_ids=table["request_id"].to_numpy(zero_copy_only=False),
        rows=table["row"].to_numpy(),
        times=table["time"].to_numpy(),
        predictions=table["prediction"].to_numpy(zero_copy_only=False),
    )


def _began(name: str) -> tuple[datetime | None, str]:
    """When a file was begun, and by which process, from `<release>-<utc time>-<pid>-<seq>.arrows`."""
    parts = name.rsplit("-", 3)
    try:
        return datetime.strptime(f"{parts[1]}+0000", "%Y%m%dT%H%M%S%fZ%z"), parts[2]
    except (ValueError, IndexError):
        return None, name
