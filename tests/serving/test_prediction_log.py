"""The prediction log by itself, on real disks and directories."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from serving.prediction_log import PredictionLog, Record
from tests.serving.toys import child_environment


def log_of(folder: Path, **changes: Any) -> PredictionLog:
    options: dict[str, Any] = {
        "url": (folder / "store").as_uri(),
        "spool": folder / "spool",
        "environment": "production",
        "project": "toy",
        "release_id": "toy-0123456789ab",
    }
    return PredictionLog(**(options | changes))


def record(number: int, text: str = "") -> Record:
    return Record(
        release_id="toy-0123456789ab",
        request_id=str(number),
        time="2013-01-01T00:00:00+00:00",
        environment="production",
        rows=[{"text": text}],
        predictions=[0.1 + number],
    )


def stored(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "store").glob("predictions/production/toy/*/toy-0123456789ab-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_everything_accepted_is_stored_once_and_in_order(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.start()
    assert all(log.append(record(number)) for number in range(5000))
    assert log.close()
    lines = stored(tmp_path)
    assert [line["request_id"] for line in lines] == [str(number) for number in range(5000)]
    assert [line["predictions"] for line in lines] == [[0.1 + number] for number in range(5000)]
    assert (log.counts.accepted, log.counts.dropped, log.counts.stored) == (5000, 0, 5000)
    assert not [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]


def test_what_the_queue_has_no_room_for_is_dropped_and_counted(tmp_path: Path) -> None:
    log = log_of(tmp_path, queue_bytes=10_000)  # not started: nobody empties the queue
    accepted = sum(log.append(record(number, "x" * 900)) for number in range(20))
    assert 5 <= accepted < 12
    assert (log.counts.accepted, log.counts.dropped) == (accepted, 20 - accepted)
    log.start()
    assert log.close()
    assert len(stored(tmp_path)) == accepted
    assert log.append(record(99)) is False
    assert log.counts.dropped == 21 - accepted


def test_a_spool_that_cannot_be_emptied_is_bounded_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    log = log_of(tmp_path, url=(tmp_path / "file" / "store").as_uri(), spool_bytes=2000)
    log.start()
    log.append(record(0, "x" * 3000))
    assert _eventually(lambda: log.append(record(1)) is False)
    assert log.counts.dropped >= 1
    assert log.close(timeout_seconds=1.0) is False
    (kept,) = (tmp_path / "spool").rglob("*.jsonl")
    assert json.loads(kept.read_text().splitlines()[0])["request_id"] == "0"


@pytest.mark.parametrize("changes", [{"segment_bytes": 2000}, {"segment_seconds": 0.1}])
def test_segments_reach_the_store_while_the_service_runs(tmp_path: Path, changes: dict[str, Any]) -> None:
    log = log_of(tmp_path, **changes)
    log.start()
    for number in range(20):
        log.append(record(number, "x" * 200))
    assert _eventually(lambda: len(stored(tmp_path)) >= 10)
    assert log.close()
    assert len(stored(tmp_path)) == 20


def test_records_are_on_disk_within_a_second(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.start()
    log.append(record(7))
    time.sleep(1.0)
    (file,) = (tmp_path / "spool").rglob("*.jsonl")
    assert json.loads(file.read_text())["request_id"] == "7"
    assert log.close()


def test_a_store_that_comes_back_gets_everything(tmp_path: Path) -> None:
    obstacle = tmp_path / "store"
    obstacle.write_text("not a directory")
    log = log_of(tmp_path, segment_seconds=0.1)
    log.start()
    log.append(record(1))
    time.sleep(0.8)
    obstacle.unlink()
    log.append(record(2))
    assert log.close()
    assert [line["request_id"] for line in stored(tmp_path)] == ["1", "2"]


def test_what_four_threads_append_is_all_there(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.start()
    threads = [
        threading.Thread(target=lambda: [log.append(record(number)) for number in range(500)])
        for _ in range(4)
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


def _eventually(holds: Any, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


FULL_DISK = """
import resource
import sys
import time
from pathlib import Path

from tests.serving.test_prediction_log import log_of, record

folder = Path(sys.argv[1])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
log = log_of(folder)
for number in range(10):
    log.append(record(number, "x" * 900))
resource.setrlimit(resource.RLIMIT_FSIZE, (4500, most))  # a write beyond it stops half-way, as on a full disk
log.start()
while not log.counts.dropped:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
for number in range(10, 13):
    log.append(record(number, "x" * 900))
assert log.close()
print(log.counts.accepted, log.counts.dropped, log.counts.stored)
"""


def test_after_a_write_that_a_full_disk_cut_short_every_line_is_whole(tmp_path: Path) -> None:
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
    # Four lines of a good thousand bytes fit; what was cut is counted as dropped and nothing else is lost.
    assert [line["request_id"] for line in stored(tmp_path)] == ["0", "1", "2", "3", "10", "11", "12"]
    assert done.stdout.split() == ["7", "6", "7"]
    assert not list((tmp_path / "spool").rglob("*.jsonl"))
