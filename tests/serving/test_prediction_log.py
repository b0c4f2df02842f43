"""The prediction log by itself, on real disks and directories."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from serving import shipper
from serving.spool import _locked as create_named
from serving.spool import adopt
from tests.serving.logs import append, log_of, numbers, rows_of, stored
from tests.serving.toys import child_environment, eventually


def test_everything_accepted_is_stored_once_and_in_order(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.start()
    before = time.time()
    assert all(append(log, number) for number in range(5000))
    assert log.close()
    rows = stored(tmp_path)
    assert [row["request_id"] for row in rows] == [str(number) for number in range(5000)]
    assert [row["prediction"] for row in rows] == [0.1 + number for number in range(5000)]
    assert all(before - 0.001 <= row["time"].timestamp() <= time.time() for row in rows)
    assert (log.counts.accepted, log.counts.dropped, log.counts.stored) == (5000, 0, 5000)
    assert not [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]


def test_a_request_of_many_rows_is_in_the_log_row_by_row(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.start()
    log.append([], [], "none", 2)
    log.append([(row, "x") for row in range(4500)], [row / 2 for row in range(4500)], "large", 90_000)
    append(log, 7)
    assert log.close()
    *large, small = stored(tmp_path)
    assert [(row["request_id"], row["row"], row["number"], row["prediction"]) for row in large] == [
        ("large", row, row, row / 2) for row in range(4500)
    ]
    assert (small["request_id"], small["row"]) == ("7", 0)
    assert log.counts.stored == 4501


def test_what_the_queue_has_no_room_for_is_dropped_and_counted(tmp_path: Path) -> None:
    log = log_of(tmp_path, queue_bytes=15_000)  # not started: nobody empties the queue
    accepted = sum(append(log, number, "x" * 900) for number in range(20))
    assert 5 <= accepted < 12
    assert (log.counts.accepted, log.counts.dropped) == (accepted, 20 - accepted)
    log.start()
    assert log.close()
    assert len(stored(tmp_path)) == accepted
    assert append(log, 99) is False
    assert log.counts.dropped == 21 - accepted


def test_a_queue_that_nobody_empties_takes_the_memory_it_says(tmp_path: Path) -> None:
    log = log_of(tmp_path, queue_bytes=32 << 20)
    before = _resident_bytes()
    number = 0
    while log.append([(number, f"text {number}")], [number / 7], f"request {number:032}", 45):
        number += 1
    assert number > 10_000
    assert _resident_bytes() - before < 48 << 20


def test_a_spool_that_cannot_be_emptied_is_bounded_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    log = log_of(tmp_path, url=(tmp_path / "file" / "store").as_uri(), spool_bytes=2000)
    log.start()
    append(log, 0, "x" * 3000)
    assert eventually(lambda: append(log, 1) is False)
    assert log.counts.dropped >= 1
    assert log.close(timeout_seconds=1.0) is False
    (kept,) = (tmp_path / "spool").rglob("*.arrows")
    assert rows_of(kept)[0]["request_id"] == "0"


@pytest.mark.parametrize("changes", [{"segment_bytes": 2000}, {"segment_seconds": 0.1}])
def test_segments_reach_the_store_while_the_service_runs(tmp_path: Path, changes: dict[str, Any]) -> None:
    log = log_of(tmp_path, **changes)
    log.start()
    for number in range(20):
        append(log, number, "x" * 200)
    assert eventually(lambda: len(stored(tmp_path)) >= 10)
    assert log.close()
    assert numbers(tmp_path) == list(range(20))


def test_rows_are_on_disk_within_a_second(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.start()
    append(log, 7)
    time.sleep(1.0)
    (file,) = (tmp_path / "spool").rglob("*.arrows")
    assert rows_of(file)[0]["request_id"] == "7"
    assert log.close()


def test_the_small_batches_of_a_quiet_service_become_one(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.start()
    for number in range(4):
        append(log, number)
        written = number + 1
        assert eventually(lambda: sum(map(len, map(rows_of, _spooled(tmp_path)))) == written)  # noqa: B023
    (spooled,) = _spooled(tmp_path)
    size = spooled.stat().st_size
    assert log.close()
    (file,) = (tmp_path / "store").rglob("*.arrows")
    with pa.ipc.open_stream(file) as stream:
        assert [len(batch) for batch in stream] == [4]
    assert file.stat().st_size < size
    assert numbers(tmp_path) == [0, 1, 2, 3]


def test_a_store_that_comes_back_gets_everything(tmp_path: Path) -> None:
    obstacle = tmp_path / "store"
    obstacle.write_text("not a directory")
    log = log_of(tmp_path, segment_seconds=0.1)
    log.start()
    append(log, 1)
    time.sleep(0.8)
    obstacle.unlink()
    append(log, 2)
    assert log.close()
    assert numbers(tmp_path) == [1, 2]


def test_what_four_threads_append_is_all_there(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.start()
    threads = [
        threading.Thread(target=lambda: [append(log, number) for number in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.close()
    assert len(stored(tmp_path)) == 2000


@pytest.mark.parametrize("project", ["", "../up", "a/b", "."])
def test_a_name_that_would_leave_its_folder_is_refused(tmp_path: Path, project: str) -> None:
    with pytest.raises(ValueError, match="path"):
        log_of(tmp_path, project=project)


def test_wrong_rows_and_predictions_cost_no_other_row(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.start()
    append(log, 0)
    log.append([(1,)], [1.5], "too short", 10)
    log.append([(2, "two")], [], "no prediction", 10)
    log.append([("three", object())], [3.5], "of other types", 10)  # type: ignore[list-item]
    append(log, 4)
    assert log.close()
    found = [(row["number"], row["text"], row["prediction"]) for row in stored(tmp_path)]
    assert found == [(0, "", 0.1), (None, None, 1.5), (2, "two", None), (None, None, 3.5), (4, "", 4.1)]
    assert log.counts.stored == 5
    assert log.counts.misfits >= 5


ENDLESS = """
import sys
import time
from pathlib import Path

from tests.serving.logs import append, log_of

log = log_of(Path(sys.argv[1]))
log.start()
number = 0
while True:
    append(log, number)
    print(number, time.time(), flush=True)
    number += 1
    time.sleep(0.001)
"""


def test_a_killed_process_loses_at_most_the_last_flush(tmp_path: Path) -> None:
    survivor = log_of(tmp_path, project="other")
    survivor.start()
    append(survivor, 0)
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)],
        cwd=tmp_path,
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(1200)]
        assert list(adopt(tmp_path / "spool")) == []  # both are alive
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
    killed_at = time.time()
    successor = log_of(tmp_path, release_id="toy-ba9876543210")
    successor.start()
    assert eventually(lambda: len(stored(tmp_path)) > 0)
    times = {int(number): float(second) for number, second in (line.split() for line in lines)}
    found = numbers(tmp_path)
    assert found == list(range(len(found)))
    lost = [second for number, second in times.items() if number >= len(found)]
    assert all(killed_at - second < 2.0 for second in lost)  # 0.25 s on a machine that has the time
    assert len(found) > 200
    assert successor.close()
    assert survivor.close()
    assert len(stored(tmp_path, "production/other/*/*")) == 1
    assert not [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]


def test_what_is_left_behind_later_is_shipped_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper, "ADOPT_SECONDS", 0.2)
    log = log_of(tmp_path, project="other")
    log.start()
    folder = tmp_path / "spool" / "production" / "toy" / "2013-01-01"
    folder.mkdir(parents=True)
    (folder / "toy-0123456789ab-old-1-1.jsonl").write_text('{"rows": []}\n{"rows"')
    shipped = tmp_path / "store" / "predictions" / "production" / "toy" / "2013-01-01"
    assert eventually(lambda: shipped.is_dir() and any(shipped.iterdir()))
    assert [path.read_text() for path in shipped.iterdir()] == ['{"rows": []}\n']
    assert log.close()


FULL_DISK = """
import resource
import sys
import time
from pathlib import Path

from tests.serving.logs import append, log_of

folder = Path(sys.argv[1])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
log = log_of(folder)
log.start()
for number in range(3):
    append(log, number, "x" * 900)
while not list(folder.rglob("*.arrows")):
    time.sleep(0.01)
time.sleep(0.5)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, most))  # a write beyond it stops half-way, as on a full disk
for number in range(3, 9):
    append(log, number, "x" * 900)
while not log.counts.dropped:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
for number in range(9, 12):
    append(log, number, "x" * 900)
assert log.close()
print(log.counts.accepted, log.counts.dropped, log.counts.stored)
"""


def test_after_a_write_that_a_full_disk_cut_short_every_batch_is_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write to the spool" in done.stderr
    # What was cut is counted as dropped, and nothing else is lost.
    accepted, dropped, in_store = map(int, done.stdout.split())
    found = numbers(tmp_path)
    assert accepted == 12
    assert in_store == len(found)
    assert dropped == 12 - len(found) > 0
    assert found[:3] == [0, 1, 2] and found[-3:] == [9, 10, 11]
    assert not [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]


SMALL_DISK = """
import resource
import sys
import time
from pathlib import Path

from tests.serving.logs import append, log_of

resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))  # as on a full disk, until a file is shipped
log = log_of(Path(sys.argv[1]))
log.start()
deadline = time.monotonic() + 10
while not log.counts.stored and time.monotonic() < deadline:
    append(log, 1, "x" * 900)
    time.sleep(0.1)
print(log.counts.stored, log.counts.dropped)
"""


def test_a_disk_that_stays_full_is_emptied_into_the_store(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(tmp_path)],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    in_store, dropped = map(int, done.stdout.split())
    assert in_store > 0, done.stderr
    assert dropped > 0


def test_a_file_that_was_removed_is_counted_and_holds_up_no_other(tmp_path: Path) -> None:
    obstacle = tmp_path / "store"
    obstacle.write_text("not a directory")
    log = log_of(tmp_path, segment_seconds=0.1)
    log.start()
    append(log, 1)
    assert eventually(lambda: len(log._shipper.waiting) == 1)
    append(log, 2)
    assert eventually(lambda: len(log._shipper.waiting) == 2)
    _spooled(tmp_path)[0].unlink()
    obstacle.unlink()
    assert log.close()
    assert numbers(tmp_path) == [2]
    assert (log.counts.accepted, log.counts.dropped, log.counts.stored) == (2, 1, 1)


def test_while_the_store_is_away_few_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipper, "MOST_WAITING", 2)
    obstacle = tmp_path / "store"
    obstacle.write_text("not a directory")
    log = log_of(tmp_path, segment_seconds=0.1)
    log.start()
    for number in range(8):
        append(log, number)
        time.sleep(0.3)
    assert len(_spooled(tmp_path)) <= 3
    obstacle.unlink()
    assert log.close()
    assert sorted(numbers(tmp_path)) == list(range(8))


def test_what_many_dead_processes_left_is_shipped_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper, "MOST_WAITING", 2)
    folder = tmp_path / "spool" / "production" / "toy" / "2013-01-01"
    folder.mkdir(parents=True)
    for number in range(9):
        (folder / f"{number}.jsonl").write_text("{}\n")
    log = log_of(tmp_path)
    log.start()
    assert eventually(lambda: len(list((tmp_path / "store").rglob("*.jsonl"))) == 9)
    assert log.close()


def test_what_cannot_be_taken_over_holds_up_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "spool" / "production" / "toy" / "2013-01-01"
    (folder / "a.arrows").mkdir(parents=True)
    (folder / "b.jsonl").write_text("{}\n")
    log = log_of(tmp_path)
    log.start()
    assert log.close()
    assert [path.name for path in (tmp_path / "store").rglob("*.jsonl")] == ["b.jsonl"]


def test_a_file_that_gets_no_name_is_closed(tmp_path: Path) -> None:
    in_the_way = tmp_path / "toy.arrows"
    in_the_way.mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="toy"):
        create_named(tmp_path / "toy.opening", in_the_way)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_predictions_that_are_not_as_many_as_rows_are_counted(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.start()
    log.append([(1, "one"), (2, "two")], [1.5], "one prediction", 10)
    assert log.close()
    assert [row["prediction"] for row in stored(tmp_path)] == [None, None]
    assert log.counts.misfits == 2


def _spooled(folder: Path) -> list[Path]:
    return sorted((folder / "spool").rglob("*.arrows"))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
