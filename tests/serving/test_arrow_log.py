"""The format of the prediction log, as pyarrow reads it."""

from __future__ import annotations

import math
import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from serving.arrow_log import BatchEncoder, prefix_beside, whole_bytes
from serving.contract import Column
from serving.spool import adopt

ALL = (
    Column("integer", "integer", nullable=True),
    Column("number", "number", nullable=True),
    Column("string", "string", nullable=True),
    Column("boolean", "boolean", nullable=True),
    Column("local", "timestamp", nullable=True),
    Column("instant", "timestamp", nullable=True, utc=True),
)
NOON = datetime(2013, 6, 1, 12, 0, 0, 250_000)
ROW = (-(2**63), 0.1, "München ✈", True, NOON, NOON.replace(tzinfo=timezone(timedelta(hours=2))))
NULLS = (None,) * 6


def table_of(encoder: BatchEncoder, *batches: bytes) -> pa.Table:
    return pa.ipc.open_stream(encoder.header + b"".join(batches)).read_all()


def batch_of(encoder: BatchEncoder, *rows: tuple[Any, ...]) -> bytes:
    count = len(rows)
    return encoder.batch(["id"] * count, range(count), [1.5] * count, rows, [0.25] * count)


def test_the_schema_says_what_and_whose_it_is() -> None:
    encoder = BatchEncoder(ALL, {"release_id": "toy-1", "project": "toy", "environment": "test"})
    table = table_of(encoder, batch_of(encoder, ROW))
    assert {field.name: str(field.type) for field in table.schema} == {
        "request_id": "string",
        "row": "int32",
        "time": "timestamp[us, tz=UTC]",
        "integer": "int64",
        "number": "double",
        "string": "string",
        "boolean": "bool",
        "local": "timestamp[us]",
        "instant": "timestamp[us, tz=UTC]",
        "prediction": "double",
    }
    assert table.schema.metadata == {
        b"release_id": b"toy-1",
        b"project": b"toy",
        b"environment": b"test",
        b"prefix": b"",
    }


def test_values_of_each_type_and_nulls_are_read_back() -> None:
    encoder = BatchEncoder(ALL, {})
    ordinary = (1, 2.0, "", False, NOON, NOON.replace(tzinfo=UTC))
    table = table_of(encoder, batch_of(encoder, ROW, NULLS, ordinary), batch_of(encoder, NULLS))
    table.validate(full=True)
    names = [column.name for column in ALL]
    utc = NOON.replace(tzinfo=UTC)
    assert [tuple(row[name] for name in names) for row in table.to_pylist()] == [
        (*ROW[:5], utc - timedelta(hours=2)),
        NULLS,
        ordinary,
        NULLS,
    ]
    assert table["time"].to_pylist() == [datetime(1970, 1, 1, 0, 0, 1, 500_000, UTC)] * 4
    assert table["row"].to_pylist() == [0, 1, 2, 0]
    assert encoder.misfits == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("integer", 2**63),
        ("integer", 1.5),
        ("integer", "1"),
        ("number", "much"),
        ("number", 10**400),
        ("string", 7),
        ("boolean", "true"),
        ("local", "2013-01-01"),
    ],
)
def test_a_value_that_does_not_fit_is_null_and_the_others_stay(name: str, value: object) -> None:
    at = [column.name for column in ALL].index(name)
    wrong = (*ROW[:at], value, *ROW[at + 1 :])
    encoder = BatchEncoder(ALL, {})
    table = table_of(encoder, batch_of(encoder, ROW, wrong, ROW))
    good, bad, last = table.to_pylist()
    assert encoder.misfits == 1
    assert good | {"row": 2} == last
    assert bad | {"row": 0} == good | {name: None}
    assert good[name] is not None


def test_unusual_values_have_a_form() -> None:
    columns = (Column("text", "string", nullable=True), Column("number", "number", nullable=True))
    encoder = BatchEncoder(columns, {})
    rows = [("\ud800 alone", math.nan), ("\0", math.inf), ("x" * 100_000, -0.0), ("é", 5e-324)]
    table = table_of(encoder, batch_of(encoder, *rows))
    assert table["text"].to_pylist() == ["? alone", "\0", "x" * 100_000, "é"]
    assert table["number"].to_pylist() == [None, math.inf, -0.0, 5e-324]


@pytest.mark.parametrize(
    ("names", "prefix"),
    [((), ""), (("distance",), ""), (("time",), "_"), (("row", "_time"), "__"), (("release_id",), "_")],
)
def test_a_models_column_keeps_its_name_beside_ours(names: tuple[str, ...], prefix: str) -> None:
    encoder = BatchEncoder([Column(name, "integer", nullable=False) for name in names], {})
    assert prefix_beside(names) == prefix
    table = table_of(encoder, batch_of(encoder, tuple(range(len(names)))))
    own = [f"{prefix}request_id", f"{prefix}row", f"{prefix}time"]
    assert table.column_names == [*own, *names, f"{prefix}prediction"]
    assert table.schema.metadata[b"prefix"] == prefix.encode()


def test_a_file_cut_at_any_byte_is_cut_back_to_whole_batches(tmp_path: Path) -> None:
    encoder = BatchEncoder((Column("number", "integer", nullable=False),), {"release_id": "toy-1"})
    batches = [batch_of(encoder, *((number,) for number in range(rows))) for rows in (1, 3, 2)]
    content = encoder.header + b"".join(batches)
    ends = [len(encoder.header)]
    for batch in batches:
        ends.append(ends[-1] + len(batch))
    path = tmp_path / "production" / "toy" / "2013-01-01" / "toy-1.arrows"
    path.parent.mkdir(parents=True)
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        if whole < 2:
            assert list(adopt(tmp_path)) == []
            assert not path.exists()
            continue
        (segment,) = adopt(tmp_path)
        os.close(segment.descriptor)
        assert path.read_bytes()[: ends[whole - 1]] == content[: ends[whole - 1]]
        assert segment.size == path.stat().st_size == ends[whole - 1] + 8
        with pa.ipc.open_stream(path) as stream:
            assert [len(batch) for batch in stream] == [1, 3, 2][: whole - 1]


@pytest.mark.parametrize("rubbish", [b"\0" * 64, b"\xff" * 64, b"\xff\xff\xff\xff\x10\0\0\0" + b"\xff" * 64])
def test_what_is_no_message_is_cut_off_too(tmp_path: Path, rubbish: bytes) -> None:
    encoder = BatchEncoder((Column("number", "integer", nullable=False),), {})
    content = encoder.header + batch_of(encoder, (1,))
    path = tmp_path / "log.arrows"
    path.write_bytes(content + rubbish)
    descriptor = os.open(path, os.O_RDONLY)
    assert whole_bytes(descriptor) == (len(content), True)
    os.close(descriptor)
