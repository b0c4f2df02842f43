"""Requests that are logged by the arrays of the compiled model: the log says what it says of the rows."""

from __future__ import annotations

import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from serving import engine
from serving.arrow_feeds import Kept
from serving.arrow_log import KEPT_ROWS, BatchEncoder
from serving.contract import Column, Lookup, Plan
from serving.decode import Feeds
from serving.engine import Job
from serving.spool import MOST_PARTS
from tests.serving.logs import log_of, stored

COLUMNS = (
    Column("count", "integer", nullable=True),
    Column("speed", "number", nullable=True),
    Column("member", "boolean", nullable=True),
    Column("carrier", "string", nullable=True),
    Column("band", "number", nullable=True),
    Column("key", "string", nullable=True),
)
PLAN = Plan(
    path="compiled",
    reason="",
    batching=True,
    batching_reason="",
    numbers=("count", "speed", "member"),
    lookups=(Lookup("carrier", ("AA", "München ✈", "")), Lookup("band", (0.0, 1.5))),
)
USUAL: list[list[Any]] = [
    [0, 7, -(2**53) + 1, 2**53 - 1, None],
    [0.1, -0.0, 5e-324, 1e300, -math.inf, None],
    [True, False, None],
    ["AA", "München ✈", "", None],
    [0.0, -0.0, 1.5, 2.5, None],
    ["k1", "é", "", None],
]


def rows_of(options: list[list[Any]], count: int, seed: int = 0) -> list[tuple[Any, ...]]:
    chosen = random.Random(seed)
    return [tuple(chosen.choice(values) for values in options) for _ in range(count)]


def feeds_of(rows: list[tuple[Any, ...]]) -> Feeds:
    """As contract.Plan says."""
    codes = [
        [
            len(lookup.values) + 1
            if row[at] is None
            else lookup.values.index(row[at])
            if row[at] in lookup.values
            else len(lookup.values)
            for at, lookup in enumerate(PLAN.lookups, 3)
        ]
        for row in rows
    ]
    return {"numbers": np.array([row[:3] for row in rows], "f8"), "codes": np.array(codes, "i8")}


def table_of(encoder: BatchEncoder, rows: list[Any]) -> pa.Table:
    ids = [f"id {number}" for number in range(len(rows))]
    parts = encoder.requests(ids, [1.5] * len(ids), rows, [0.25] * sum(map(len, rows)))
    table = pa.ipc.open_stream(b"".join([encoder.header, *parts])).read_all()
    table.validate(full=True)
    return table


def both(*requests: list[tuple[Any, ...]]) -> tuple[pa.Table, pa.Table]:
    """What is logged of requests by their arrays, and by themselves."""
    encoder = BatchEncoder(COLUMNS, {}, PLAN)
    kept = [encoder.keep(rows, feeds_of(rows)) for rows in requests]
    assert all(isinstance(rows, Kept) for rows in kept)
    tables = table_of(encoder, kept), table_of(encoder, list(requests))
    assert encoder.misfits == 0
    return tables


def same(one: pa.Table, other: pa.Table) -> bool:
    """To the last bit: repr tells -0.0 from 0.0."""
    return one.schema == other.schema and repr(one.to_pylist()) == repr(other.to_pylist())


@pytest.mark.parametrize("seed", range(5))
def test_arrays_say_what_the_rows_say(seed: int) -> None:
    assert same(*both(*(rows_of(USUAL, count, seed) for count in (KEPT_ROWS, 100, 37))))


def test_strings_that_training_never_saw_are_logged_as_they_came() -> None:
    strange = [*USUAL[:3], ["AA", "Ünseen", "\ud800", None], *USUAL[4:]]
    kept, plain = both(rows_of(USUAL, 20), rows_of(strange, 50), rows_of(USUAL, 20))
    assert same(kept, plain)
    assert {"Ünseen", "?"} <= set(kept["carrier"].to_pylist())


@pytest.mark.parametrize("large", [2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)])
def test_integers_that_no_float_can_say_are_logged_as_they_came(large: int) -> None:
    rows = [*rows_of(USUAL, 20), (large, *USUAL[1][:1], True, "AA", 0.0, "k")]
    assert BatchEncoder(COLUMNS, {}, PLAN).keep(rows, feeds_of(rows)) is None


def test_columns_of_nothing_but_nulls_and_models_of_one_kind_of_input() -> None:
    assert same(*both([(None,) * 6] * 10))
    for plan in (
        Plan("compiled", "", True, "", ("count", "speed")),
        Plan("compiled", "", True, "", (), PLAN.lookups[:1]),
    ):
        names = {*plan.numbers, *(lookup.column for lookup in plan.lookups)}
        columns = sorted(COLUMNS, key=lambda column: column.name not in names)
        at = [COLUMNS.index(column) for column in columns]
        rows = [tuple(row[i] for i in at) for row in rows_of(USUAL, 30)]
        feeds = feeds_of(rows_of(USUAL, 30))
        given = {"numbers": feeds["numbers"][:, :2]} if plan.numbers else {"codes": feeds["codes"][:, :1]}
        encoder = BatchEncoder(columns, {}, plan)
        assert same(table_of(encoder, [encoder.keep(rows, given)]), table_of(encoder, [rows]))


def test_requests_of_both_kinds_and_of_any_size_stay_in_order(tmp_path: Path) -> None:
    log = log_of(tmp_path, columns=COLUMNS, plan=PLAN)
    expected = []
    for number, count in enumerate((1, 100, 1, 1, 0, 2500, 8, 30, 4100, 2)):
        rows = rows_of(USUAL, count, number)
        fed = number % 2 == 1 or count == 30
        log.append(
            rows,
            [number + row / 8192 for row in range(count)],
            f"id {number}",
            50,
            feeds_of(rows) if fed and rows else None,
        )
        expected += [(f"id {number}", row, *values, number + row / 8192) for row, values in enumerate(rows)]
    log.start()
    assert log.close()
    names = ["request_id", "row", *(column.name for column in COLUMNS), "prediction"]
    found = [tuple(row[name] for name in names) for row in stored(tmp_path)]
    assert repr(found) == repr(expected)
    assert log.counts.misfits == 0


def test_what_is_kept_of_a_request_weighs_what_it_takes(tmp_path: Path) -> None:
    rows = rows_of(USUAL, 100)
    log = log_of(tmp_path, columns=COLUMNS, plan=PLAN, queue_bytes=100_000)
    accepted = 0
    while log.append(rows, [0.5] * 100, "id", 9000, feeds_of(rows)):
        accepted += 1
    # 5 numbers of 8 bytes a row, an object and its place in a list for each of the key and the band
    assert 100_000 / 20_000 < accepted < 100_000 / 5_000
    assert log.counts.dropped == 100
    log.start()
    assert log.close()
    assert log.counts.stored == 100 * accepted


def test_what_is_counted_of_narrow_requests_is_what_they_take(tmp_path: Path) -> None:
    """The numbers of one column are the least of it."""
    plan = Plan("compiled", "", True, "", ("speed",))
    for count, keys in ((KEPT_ROWS, 0), (1000, 0), (100, 3)):
        columns = (COLUMNS[1], *(Column(f"key {at}", "string", nullable=True) for at in range(keys)))
        log = log_of(tmp_path, columns=columns, plan=plan)
        tracemalloc.start()
        for number in range(50):
            rows = [(0.5 * row, *(f"key {at} {row}" for at in range(keys))) for row in range(count)]
            feeds = {"numbers": np.array([row[:1] for row in rows])}
            assert log.append(rows, [number + 0.5 * row for row in range(count)], f"id {number}", 9, feeds)
        del rows, feeds
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert taken / 1.15 < log._queued_bytes < 3 * taken
        log.start()
        assert log.close()
        assert log._queued_bytes == 0


def test_a_logged_request_does_not_keep_the_arrays_of_those_beside_it() -> None:
    """Of a shared call, in which the others may be larger and their clients gone."""

    class Doubled:
        inline = batching = True

        def predict(self, rows: Any) -> tuple[list[float], Feeds]:
            numbers = np.array(rows)
            return (2 * numbers[:, 0]).tolist(), {"numbers": numbers}

    sizes = (KEPT_ROWS, 900, 1)
    jobs = [Job(None, lambda job, result: None, [(float(size),)] * size) for size in sizes]
    results = engine._predict(Doubled(), jobs, [row for job in jobs for row in job.rows])
    assert results == [[2.0 * size] * size for size in sizes]
    first, second, third = [job.feeds for job in jobs]
    assert first is not None
    assert second is not None
    assert third is None
    assert first["numbers"].tolist() == [[float(KEPT_ROWS)]] * KEPT_ROWS
    assert first["numbers"].base is None
    assert second["numbers"].base is None


def test_a_model_whose_columns_the_arrays_do_not_tell_is_logged_by_its_rows() -> None:
    plan = Plan("compiled", "", True, "", (), PLAN.lookups[1:])
    encoder = BatchEncoder([COLUMNS[4], COLUMNS[5]], {}, plan)
    rows: list[tuple[Any, ...]] = [(1.5, "k")] * 50
    assert encoder.keep(rows, {"codes": np.ones((50, 1), np.int64)}) is None


def test_a_batch_of_more_parts_than_one_write_takes_is_whole(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(1100)]
    columns = tuple(Column(name, "number", nullable=True) for name in names)
    plan = Plan("compiled", "", True, "", tuple(names))
    rows = [tuple(row * 1000.0 + at for at in range(len(names))) for row in range(KEPT_ROWS)]
    log = log_of(tmp_path, columns=columns, plan=plan)
    log.append(rows, [0.5] * KEPT_ROWS, "wide", 50, {"numbers": np.array(rows)})
    assert len(names) > MOST_PARTS
    log.start()
    assert log.close()
    assert [tuple(row[name] for name in names) for row in stored(tmp_path)] == rows
