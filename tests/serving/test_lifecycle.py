"""How a service starts, works under load, and ends."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest

from serving.server import usable_cpus
from tests.serving.toys import RELEASE_ID, Toy, child_environment, eventually, serve


def test_health_is_answered_while_the_model_works(moody: Toy, tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    release = moody.with_limits(tmp_path / "release", max_concurrent_requests=2)
    with serve(release, tmp_path) as service, service.client as client, ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(httpx.post, f"{service.url}/predict", json={"distance": 2000}) for _ in range(2)]
        time.sleep(0.2)
        started = time.monotonic()
        assert client.get("/health/ready").status_code == 200
        assert time.monotonic() - started < 1.0, "the model works for twice as long"

        refused = client.post("/predict", json={"distance": 1})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["expected"] == "at most 2 at once"
        assert [answer.result().status_code for answer in slow] == [200, 200]

        for broken in (666, 777):
            answer = client.post(
                "/predict", json={"distance": broken}, headers={"x-request-id": f"r{broken}"}
            )
            assert answer.status_code == 500
            assert answer.json()["request_id"] == f"r{broken}"
            assert "secret" not in answer.text
        assert any("r666" in line for line in service.lines)
        assert "the secret reason" in "".join(service.lines)
        assert client.post("/predict", json={"distance": 1}).status_code == 200


def test_a_service_is_live_but_not_ready_until_the_model_is_loaded(moody: Toy, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(moody.source, site)
    package = site / "toy" / "__init__.py"
    package.write_text("import time; time.sleep(1.0)\n" + package.read_text())
    release = tmp_path / "release"
    release.mkdir()
    moody.with_limits(release)
    (release / "site").unlink()
    (release / "site").symlink_to(site)
    with serve(release, tmp_path, wait=False) as service, service.client as client:
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").json() == {"status": "loading"}
        assert client.get("/health/ready").status_code == 503
        assert client.get("/v2/models/toy/ready").status_code == 503
        answer = client.post("/predict", json={"distance": 1})
        assert answer.status_code == 503
        assert answer.headers["x-perennial-release"] == RELEASE_ID
        assert service.stop() == 0


def test_after_sigterm_a_service_is_not_ready_answers_what_is_in_flight_and_exits_0(
    moody: Toy, tmp_path: Path
) -> None:
    with serve(moody.release, tmp_path) as service, service.client as client, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(httpx.post, f"{service.url}/predict", json={"distance": 2500}, timeout=10)
        time.sleep(0.3)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        answer = client.get("/health/ready")
        assert answer.status_code == 503
        assert answer.json() == {"status": "draining"}
        assert answer.headers["connection"] == "close"
        answered = slow.result()
        assert answered.status_code == 200
        assert answered.headers["connection"] == "close"
        assert service.process.wait(10) == 0
        assert [record["distance"] for record in service.records()] == [2500]


def test_every_answered_prediction_is_in_the_store_after_sigterm_under_load(toy: Toy, tmp_path: Path) -> None:
    row = json.loads((toy.release / "golden.json").read_text())["rows"][0]
    answered: dict[str, list[float]] = {}
    numbers = itertools.count()

    with serve(toy.release, tmp_path) as service:

        def load() -> None:
            with service.client as client:
                while True:
                    name = f"load-{next(numbers)}"
                    try:
                        answer = client.post("/predict", json=[row] * 3, headers={"x-request-id": name})
                    except httpx.TransportError:
                        return  # the service has stopped accepting
                    assert answer.status_code == 200
                    answered[name] = answer.json()["predictions"]

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        assert service.stop() == 0
        for thread in threads:
            thread.join(10)
        assert len(answered) > 100
        logged: dict[str, list[float]] = {}
        records = service.records()
        for record in records:
            logged.setdefault(record["request_id"], []).append(record["prediction"])
        assert answered.keys() <= logged.keys()
        assert all(logged[name] == said for name, said in answered.items())
        one = records[-1]
        assert (one["release_id"], one["environment"], one["row"]) == (RELEASE_ID, "test", 2)
        said = {name: one[name] for name in row}
        assert said == row | {"planned": datetime.fromisoformat(row["planned"])}
        assert one["time"].utcoffset() == timedelta(0)
        assert not list(service.spool.glob("*/*/*/*"))


def test_what_a_killed_service_left_in_its_spool_is_shipped_by_the_next_one(
    moody: Toy, tmp_path: Path
) -> None:
    with serve(moody.release, tmp_path) as first:
        for number in range(20):
            httpx.post(f"{first.url}/predict", json={"distance": 1}, headers={"x-request-id": f"r{number}"})
        time.sleep(1.2)  # the log's own promise: on disk within a second
        first.stop(signal.SIGKILL)
        assert first.records() == []
        left = list(first.spool.glob("*/*/*/*.arrows"))
        assert left
        with left[0].open("ab") as file:
            file.write(left[0].read_bytes()[:99])  # the kernel may have taken half of the last write
    with serve(moody.release, tmp_path) as second:
        assert eventually(lambda: len(second.records()) == 20), second.lines
        assert {record["request_id"] for record in second.records()} == {f"r{n}" for n in range(20)}
        assert second.stop() == 0
        assert not list(second.spool.glob("*/*/*/*"))


def test_two_services_share_a_spool_and_leave_each_other_alone(moody: Toy, tmp_path: Path) -> None:
    with serve(moody.release, tmp_path) as first:
        httpx.post(f"{first.url}/predict", json={"distance": 1}, headers={"x-request-id": "first"})
        time.sleep(0.6)
        with serve(moody.release, tmp_path) as second:
            time.sleep(0.5)
            assert second.records() == []
            assert len(list(first.spool.glob("*/*/*/*.arrows"))) == 1
            httpx.post(f"{second.url}/predict", json={"distance": 1}, headers={"x-request-id": "second"})
            assert second.stop() == 0
            assert [record["request_id"] for record in second.records()] == ["second"]
        assert first.stop() == 0
        assert {record["request_id"] for record in first.records()} == {"first", "second"}


def test_a_store_that_is_away_costs_no_answer_and_the_spool_keeps_the_log(moody: Toy, tmp_path: Path) -> None:
    url = "s3://bucket/prefix"
    away = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{_closed_port()}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }
    (tmp_path / "release").mkdir()
    release = moody.with_limits(tmp_path / "release", drain_seconds=2.0)
    with serve(release, tmp_path, url=url, **away) as service:
        assert httpx.post(f"{service.url}/predict", json={"distance": 1}).status_code == 200
        started = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - started < 10
        assert len(list(service.spool.glob("*/*/*/*.arrows"))) == 1
    assert any("stay in the spool" in line for line in service.lines)


def test_a_port_that_is_taken_is_named(moody: Toy, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _start(moody.release, tmp_path, port)
    assert done.returncode == 3
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_a_folder_that_is_no_release_is_named(tmp_path: Path) -> None:
    done = _start(tmp_path, tmp_path, 0)
    assert done.returncode == 3
    assert "manifest.json" in done.stderr


def test_a_release_whose_model_is_refused_ends_the_service(moody: Toy, tmp_path: Path) -> None:
    release = tmp_path / "release"
    release.mkdir()
    moody.with_limits(release)
    (release / "model").unlink()
    (release / "model").mkdir()
    (release / "model" / "format.json").write_text('{"format": "pickle"}')
    done = _start(release, tmp_path, 0)
    assert done.returncode == 3
    assert "'pickle'" in done.stderr


def _start(release: Path, folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "serving.server", "--release", str(release), "--port", str(port)),
            *("--environment", "test", "--prediction-log", folder.as_uri(), "--spool", str(folder / "spool")),
        ],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_quota_of_the_control_group_limits_the_workers(
    tmp_path: Path, files: dict[str, str], cpus: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert usable_cpus(tmp_path) == (cpus or len(os.sched_getaffinity(0)))
