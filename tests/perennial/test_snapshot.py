from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perennial import snapshot
from perennial.config import ProjectConfig
from perennial.errors import DataError
from perennial.store import open_store
from perennial.validation import contract_suite, validate

CONFIG = ProjectConfig(task="binary", target="y", time_column="at", entity_id=("id",), holdout_days=7)


def table(days: int = 30) -> pa.Table:
    return pa.table(
        {
            "id": [f"i{n}" for n in range(days)],
            "at": pa.array([datetime(2024, 1, 1 + n, 12) for n in range(days)], pa.timestamp("us")),
            "y": [n % 2 for n in range(days)],
            "x": [None if n == 3 else n / 2 for n in range(days)],
        }
    )


def test_the_fingerprint_is_of_the_content_not_of_the_file(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "a.parquet", compression="zstd", row_group_size=4)
    pq.write_table(table(), tmp_path / "b.parquet", compression="none")
    one, other = (snapshot.read(tmp_path / f"{name}.parquet") for name in "ab")
    assert snapshot.content_fingerprint(one) == snapshot.content_fingerprint(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.slice(1),
        lambda t: t.rename_columns(["id", "at", "y", "z"]),
        lambda t: t.set_column(2, "y", t["y"].cast(pa.int32())),
        lambda t: t.set_column(3, "x", pa.array([n / 2 for n in range(30)])),
        lambda t: t.take(pa.array([1, 0, *range(2, 30)])),
    ],
    ids=["a row less", "another name", "another type", "no null", "another order"],
)
def test_any_change_changes_the_fingerprint(change: object) -> None:
    changed = change(table())  # type: ignore[operator]
    assert snapshot.content_fingerprint(changed) != snapshot.content_fingerprint(table())


def test_a_snapshot_is_kept_once_and_described(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    pq.write_table(table(), tmp_path / "a.parquet")
    kept = snapshot.keep(store, "toy", tmp_path / "a.parquet", date(2024, 2, 1), "at")
    again = snapshot.keep(store, "toy", tmp_path / "a.parquet", date(2024, 2, 1), "at")
    assert kept == again
    assert len(store.list("snapshots/toy")) == 1
    assert (kept.rows, kept.last_time) == (30, datetime(2024, 1, 30, 12))
    assert {c.name: (c.type, c.nullable) for c in kept.columns}["x"] == ("number", True)
    assert snapshot.features(kept, CONFIG) == ("x",)
    assert snapshot.read(snapshot.local(store, kept, tmp_path / "cache")).num_rows == 30


def test_the_holdout_is_the_newest_whole_days(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    pq.write_table(table(), tmp_path / "a.parquet")
    kept = snapshot.keep(store, "toy", tmp_path / "a.parquet", date(2024, 2, 1), "at")
    assert snapshot.split(kept, CONFIG) == (datetime(2024, 1, 24), None)
    assert snapshot.split(kept, CONFIG.model_copy(update={"time_column": None})) == (None, 6)


def test_too_little_history_is_explained(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    pq.write_table(table(10), tmp_path / "a.parquet")
    kept = snapshot.keep(store, "toy", tmp_path / "a.parquet", date(2024, 2, 1), "at")
    with pytest.raises(DataError, match=r"spans 10 days.*leaves 2") as error:
        snapshot.split(kept, CONFIG)
    assert "at least 14 days" in str(error.value)


def test_moments_in_utc_are_validated_against_the_bounds_of_the_contract(tmp_path: Path) -> None:
    moments = pa.array([datetime(2024, 1, 1 + n, 12) for n in range(30)], pa.timestamp("us", tz="UTC"))
    pq.write_table(table().set_column(1, "at", moments), tmp_path / "a.parquet")
    frame = snapshot.frame(tmp_path / "a.parquet")
    for as_of, failed in ((date(2024, 2, 1), []), (date(2024, 1, 10), ["at"])):
        report = validate(frame, contract_suite(CONFIG, as_of), "the contract")
        assert [check.column for check in report.failures] == failed
