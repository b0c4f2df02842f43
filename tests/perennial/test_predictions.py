"""Logs that real services of several releases left in a store, read as one table."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

from perennial.predictions import read
from perennial.store import Store
from serving.arrow_log import BatchEncoder
from serving.contract import Column

DISTANCE = Column("distance", "integer", nullable=False)


def put(store: Store, day: str, release: str, columns: tuple[Column, ...], *rows: Any, cut: int = 0) -> None:
    """A file of one batch per row; a row is its time and its values."""
    encoder = BatchEncoder(columns, {"release_id": release})
    batches = [encoder.batch([release], [0], [at.timestamp()], [values], [0.5]) for at, values in rows]
    content = encoder.header + b"".join(batches)
    store.put_bytes(f"predictions/test/toy/{day}/{release}-1.arrows", content[: len(content) - cut])


def at(day: int, hour: int = 12) -> datetime:
    return datetime(2013, 6, day, hour, tzinfo=UTC)


def test_the_days_asked_for_are_read_from_all_files_that_hold_them(directory_store: Store) -> None:
    rows = ((at(1, 23), (1,)), (at(2, 0), (2,)))  # begun before midnight
    put(directory_store, "2013-06-01", "toy-1", (DISTANCE,), *rows)
    put(directory_store, "2013-06-02", "toy-2", (DISTANCE,), (at(2), (3,)), (at(3, 0), (4,)))
    put(directory_store, "2013-06-03", "toy-3", (DISTANCE,), (at(3), (5,)))
    directory_store.put_bytes("predictions/test/toy/2013-06-02/toy-0.jsonl", b"{}\n")  # of an earlier version
    table = read(directory_store, "test", "toy", date(2013, 6, 2), date(2013, 6, 3))
    assert table["distance"].to_pylist() == [2, 3]
    assert table["release_id"].to_pylist() == ["toy-1", "toy-2"]
    assert table["time"].to_pylist() == [at(2, 0), at(2)]


def test_a_row_that_waited_over_midnight_is_read_with_its_day(directory_store: Store) -> None:
    late = datetime(2013, 6, 1, 23, 59, 59, 900_000, tzinfo=UTC)
    put(directory_store, "2013-06-02", "toy-1", (DISTANCE,), (late, (1,)), (at(2, 0), (2,)))
    table = read(directory_store, "test", "toy", date(2013, 6, 1), date(2013, 6, 2))
    assert table["distance"].to_pylist() == [1]


def test_a_last_batch_that_is_not_whole_is_left_out(directory_store: Store) -> None:
    put(directory_store, "2013-06-01", "toy-1", (DISTANCE,), (at(1), (1,)), (at(1), (2,)), cut=5)
    put(directory_store, "2013-06-01", "toy-2", (DISTANCE,), (at(1), (1,)), cut=5)
    directory_store.put_bytes("predictions/test/toy/2013-06-01/toy-3-1.arrows", b"")
    table = read(directory_store, "test", "toy", date(2013, 6, 1), date(2013, 6, 2))
    assert table["distance"].to_pylist() == [1]


def test_no_file_is_a_table_of_no_rows(directory_store: Store) -> None:
    table = read(directory_store, "test", "toy", date(2013, 6, 1), date(2013, 6, 2))
    assert table.num_rows == 0
    assert table.column_names == ["request_id", "row", "time", "prediction", "release_id"]


def test_releases_of_different_columns_fit_into_one_table(directory_store: Store) -> None:
    first = (Column("a", "integer", nullable=False), Column("b", "boolean", nullable=False))
    second = (
        Column("a", "number", nullable=False),
        Column("b", "string", nullable=False),
        Column("time", "string", nullable=False),  # named like ours
    )
    put(directory_store, "2013-06-01", "toy-1", first, (at(1), (1, True)))
    put(directory_store, "2013-06-01", "toy-2", second, (at(1), (1.5, "yes", "noon")))
    table = read(directory_store, "test", "toy", date(2013, 6, 1), date(2013, 6, 2))
    assert table.select(["a", "b", "time", "_time", "_release_id", "_prediction"]).to_pylist() == [
        {"a": 1.0, "b": "true", "time": None, "_time": at(1), "_release_id": "toy-1", "_prediction": 0.5},
        {"a": 1.5, "b": "yes", "time": "noon", "_time": at(1), "_release_id": "toy-2", "_prediction": 0.5},
    ]
