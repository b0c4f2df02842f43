"""Several workers on one port, killed at random: what users notice, and what the log keeps."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.prediction_log import FLUSH_SECONDS
from tests.serving.toys import ROW, Service, Toy, child_environment, eventually, serve

CLIENTS = 8
KILLS = 6
BODY = json.dumps({"rows": [ROW]})


def workers_of(service: Service) -> list[int]:
    """Process ids of the living workers."""
    listed = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def metric(service: Service, name: str) -> float:
    text = ""
    while not text:
        with contextlib.suppress(httpx.TransportError):  # of the worker that is killed just now
            text = httpx.get(f"{service.url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))


class Load(threading.Thread):
    """One client that asks without a pause, and asks again when its worker dies."""

    def __init__(self, service: Service, name: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.service, self.label, self.stop = service, name, stop
        self.answered: dict[str, float] = {}  # request id → when it was answered
        self.lost = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self.stop.is_set():
            with self.service.client as client:
                try:
                    while not self.stop.is_set():
                        name = f"{self.label}-{len(self.answered) + self.lost}"
                        headers = {"x-request-id": name, "content-type": "application/json"}
                        answer = client.post("/predict", content=BODY, headers=headers)
                        if answer.status_code == 200:
                            self.answered[name] = time.time()
                        else:
                            self.wrong.append(answer.text)
                except httpx.TransportError:
                    self.lost += 1


@pytest.mark.slow
def test_workers_killed_under_load_lose_no_logged_answer_but_those_of_the_last_flush(
    compiled: Toy, tmp_path: Path
) -> None:
    release = tmp_path / "release"
    release.mkdir()
    compiled.with_limits(release, workers=2)
    stop = threading.Event()
    with serve(release, tmp_path) as service:
        clients = [Load(service, f"c{number}", stop) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        kills: list[float] = []
        memory: list[float] = []
        chosen = random.Random(3)
        for _ in range(KILLS):
            time.sleep(1.5)
            assert eventually(lambda: len(workers_of(service)) == 2)
            kills.append(time.time())
            os.kill(chosen.choice(workers_of(service)), signal.SIGKILL)
            assert eventually(lambda: metric(service, "perennial_workers_ready") == 2)
            memory.append(metric(service, "perennial_resident_bytes"))
        time.sleep(1.0)
        stop.set()
        for client in clients:
            client.join(20)
        counted = metric(service, "perennial_requests_total")
        assert service.stop() == 0

        answered = {name: at for client in clients for name, at in client.answered.items()}
        assert [text for client in clients for text in client.wrong] == []
        # A kill breaks what its worker had in hand, and nothing else: the others and the next one serve on.
        assert sum(client.lost for client in clients) <= KILLS * CLIENTS
        assert len(answered) > 1000
        assert counted >= len(answered) - KILLS * CLIENTS, "counters outlive their worker"

        logged = {row["request_id"] for row in service.records()}
        for name in answered.keys() - logged:
            before = [kill - answered[name] for kill in kills if kill > answered[name] - 0.1]
            assert before and min(before) < FLUSH_SECONDS + 0.5, f"{name}: no kill had just followed"
        assert not list(service.spool.rglob("*.arrows"))
        # Flat: no more after the later kills than after the earlier ones, when all had been in use once.
        assert max(memory[KILLS // 2 :]) < 1.3 * max(memory[: KILLS // 2]), memory


def test_workers_die_with_their_parent(moody: Toy, tmp_path: Path) -> None:
    with serve(moody.release, tmp_path) as service:
        workers = workers_of(service)
        assert len(workers) >= 1
        service.stop(signal.SIGKILL)
        assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 5)


def test_workers_that_cannot_live_end_the_service(moody: Toy, tmp_path: Path) -> None:
    release, site = tmp_path / "release", tmp_path / "site"
    release.mkdir()
    moody.with_limits(release, workers=1)
    (site / "toy").mkdir(parents=True)
    code = (moody.source / "toy" / "__init__.py").read_text()
    (site / "toy" / "__init__.py").write_text("import os; os.kill(os.getpid(), 9)\n" + code)
    (release / "site").unlink()
    (release / "site").symlink_to(site)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "serving.server", "--release", str(release), "--port", "0"),
            *("--environment", "test", "--prediction-log", tmp_path.as_uri(), "--spool", str(tmp_path / "s")),
        ],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "die as soon as they start" in done.stderr


WORKERS = """
import ctypes, os, signal, subprocess, sys, time
from serving.metrics import Shared
from serving.workers import Workers

def work(shared, index, again):
    %s

ctypes.CDLL(None).prctl(36, 1)  # orphans come to this process, as to the first one of a container
sys.exit(Workers(1, Shared(1), work).run(1.0))
"""


@contextlib.contextmanager
def parent_of(work: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKERS % work],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to another process")
def test_the_end_of_a_dead_workers_child_is_not_taken_for_that_of_a_worker() -> None:
    work = """
    if not again:
        subprocess.Popen(["sleep", "0.3"])
        os._exit(1)
    time.sleep(1.0)
    print("still here", flush=True)
    signal.sigwait([signal.SIGTERM])
    return 0
    """
    with parent_of(work) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "still here\n"
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(10) == 0


def test_a_service_that_is_stopped_before_its_workers_know_signals_exits_0() -> None:
    work = """
    print("begun", flush=True)
    time.sleep(60)
    """
    with parent_of(work) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(10) == 0


def test_a_second_signal_ends_a_service_that_does_not_drain() -> None:
    work = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("begun", flush=True)
    time.sleep(60)
    """
    with parent_of(work) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        started = time.monotonic()
        parent.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        parent.send_signal(signal.SIGTERM)  # the same once more, such as to a process and to its group
        time.sleep(0.9)
        assert parent.poll() is None
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(10) != 0
        assert time.monotonic() - started < 5
