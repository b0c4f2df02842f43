"""The predictions of the last moments: of files still in the spool, of those in the store, of none twice."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from perennial import proof
from perennial.predictions import CHECK_REQUEST_ID, Recent, recent, shadow_differences
from perennial.store import Store, open_store
from serving.arrow_log import BatchEncoder
from serving.contract import Column
from serving.prediction_log import PredictionLog

RELEASE = "toy-0123456789ab"
NOW = datetime.now(UTC).replace(microsecond=0)
DISTANCE = Column("distance", "integer", nullable=False)

Row = tuple[str, float, float | None]  # request id, seconds before NOW, prediction


def content(rows: list[Row], columns: tuple[Column, ...] = (DISTANCE,)) -> bytes:
    """A file of one batch per row."""
    encoder = BatchEncoder(columns, {"release_id": RELEASE})
    values = (1,) * len(columns)
    return encoder.header + b"".join(
        encoder.batch([request_id], [0], [NOW.timestamp() - ago], [values], [prediction])
        for request_id, ago, prediction in rows
    )


def name(began: float, process: int = 7, release: str = RELEASE) -> str:
    """Of a file, with its day's folder, that was begun so many seconds before NOW."""
    at = NOW - timedelta(seconds=began)
    return f"{at:%Y-%m-%d}/{release}-{at:%Y%m%dT%H%M%S%fZ}-{process}-1.arrows"


def spooled(spool: Path, file: str, data: bytes) -> None:
    path = spool / "test" / "toy" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def shipped(store: Store, file: str, data: bytes) -> None:
    store.put_bytes(f"predictions/test/toy/{file}", data)


def ask(spool: Path, store: Store, ago: float = 60.0, until: float | None = None) -> Recent:
    """The predictions since `ago` seconds before NOW."""
    end = None if until is None else NOW - timedelta(seconds=until)
    return recent(spool, store, "test", "toy", RELEASE, NOW - timedelta(seconds=ago), end)


def test_spool_and_store_are_one_and_a_file_in_both_counts_once(
    tmp_path: Path, directory_store: Store
) -> None:
    being_shipped, finished, begun = name(50), name(55, process=8), name(5)
    both = content([("a", 50, 0.1), ("b", 49, None)])
    spooled(tmp_path, being_shipped, both)
    shipped(directory_store, being_shipped, both)
    shipped(directory_store, finished, content([("c", 40, 0.3)]))
    spooled(tmp_path, begun, content([("d", 4, 0.4), ("e", 3, 0.5)])[:-5])  # being written
    spooled(tmp_path, name(2), b"")
    spooled(tmp_path, name(1), content([])[:20])
    found = ask(tmp_path, directory_store)
    assert sorted(found.request_ids) == ["a", "b", "c", "d"]
    values = dict(zip(found.request_ids, found.predictions, strict=True))
    assert math.isnan(values.pop("b"))
    assert values == {"a": 0.1, "c": 0.3, "d": 0.4}
    assert [len(part) for part in found] == [4, 4, 4, 4]


def test_only_the_release_the_time_and_the_users_asked_for(tmp_path: Path, directory_store: Store) -> None:
    rows: list[Row] = [("old", 61, 0.1), ("first", 60, 0.2), (CHECK_REQUEST_ID, 30, 0.3), ("late", 10, 0.4)]
    spooled(tmp_path, name(70), content(rows))
    spooled(tmp_path, name(40, release="toy-aaaaaaaaaaaa"), content([("other", 30, 0.5)]))
    shipped(directory_store, name(40, release="toy-bbbbbbbbbbbb"), content([("another", 30, 0.5)]))
    directory_store.put_bytes("predictions/production/toy/" + name(40), content([("elsewhere", 30, 0.6)]))
    assert list(ask(tmp_path, directory_store).request_ids) == ["first", "late"]
    assert list(ask(tmp_path, directory_store, until=10).request_ids) == ["first"]
    nobody = ask(tmp_path, directory_store, ago=1)
    assert nobody.predictions.dtype == np.float64
    assert len(nobody.rows) == 0


def test_our_own_checks_bear_this_name() -> None:
    assert proof.CHECK_REQUEST_ID == CHECK_REQUEST_ID


def test_a_model_with_columns_named_like_ours(tmp_path: Path, directory_store: Store) -> None:
    columns = (Column("prediction", "integer", nullable=False), Column("row", "integer", nullable=False))
    spooled(tmp_path, name(5), content([("a", 4, 0.25)], columns))
    found = ask(tmp_path, directory_store)
    assert (list(found.predictions), list(found.rows)) == ([0.25], [0])


def test_files_begun_long_before_are_read_when_they_end_within(
    tmp_path: Path, directory_store: Store
) -> None:
    """A file of an hour, as after an outage of the store, beside a process whose files are all old."""
    shipped(directory_store, name(3700), content([("begin", 3700, 0.1), ("end", 5, 0.2)]))
    for ago in range(300, 900, 100):
        shipped(directory_store, name(ago, process=8), content([(f"old-{ago}", ago, 0.3)]))
    shipped(directory_store, name(20, process=9), content([("short", 20, 0.4)]))
    assert sorted(ask(tmp_path, directory_store).request_ids) == ["end", "short"]


@pytest.mark.slow
def test_while_a_log_is_written_and_shipped_every_row_is_there_once(tmp_path: Path) -> None:
    store_url = (tmp_path / "store").as_uri()
    log = PredictionLog(
        store_url, tmp_path / "spool", "test", "toy", RELEASE, (DISTANCE,), segment_seconds=0.3
    )
    log.start()
    store, began, seen = open_store(store_url), datetime.now(UTC), 0
    sent = 0
    end = time.monotonic() + 3.0
    while time.monotonic() < end:
        for _ in range(50):
            log.append([(1,)], [float(sent)], str(sent), 10)
            sent += 1
        found = recent(tmp_path / "spool", store, "test", "toy", RELEASE, began)
        assert len(set(found.request_ids)) == len(found.request_ids) >= seen
        seen = len(found.request_ids)
    assert seen > 0.5 * sent
    assert log.close()
    found = recent(tmp_path / "spool", store, "test", "toy", RELEASE, began)
    assert sorted(found.predictions) == list(range(sent))


def answers(*rows: tuple[str, int, float]) -> Recent:
    ids, indices, values = zip(*rows, strict=True) if rows else ((), (), ())
    times = np.zeros(len(rows), dtype="datetime64[us]")
    return Recent(
        np.array(ids, dtype=object), np.array(indices, dtype=np.int32), times, np.array(values, dtype=float)
    )


def test_a_shadow_s_answers_are_compared_by_request_and_row() -> None:
    users = answers(("a", 0, 0.1), ("a", 1, 0.2), ("b", 0, 100.0), ("c", 0, 5.0))
    shadow = answers(("b", 0, 100.0 + 5e-8), ("a", 1, 0.25), ("a", 0, 0.1), ("d", 0, 7.0))
    found = shadow_differences(users, shadow)
    assert found.rows == 3
    assert found.max_abs == pytest.approx(0.05)
    assert found.mean_abs == pytest.approx(0.05 / 3, rel=1e-5)
    assert found.beyond == pytest.approx(1 / 3)
    assert shadow_differences(users, shadow, tolerance=0.1).beyond == 0.0


def test_ids_used_twice_are_left_out_and_no_number_equals_no_number() -> None:
    users = answers(("a", 0, 0.1), ("a", 0, 0.9), ("b", 0, math.nan), ("c", 0, math.nan), ("d", 0, math.inf))
    shadow = answers(("a", 0, 0.1), ("b", 0, math.nan), ("c", 0, 1.0), ("d", 0, math.inf))
    assert shadow_differences(users, shadow) == (3, 0.0, 0.0, pytest.approx(1 / 3))
    assert shadow_differences(answers(), shadow) == (0, 0.0, 0.0, 0.0)
