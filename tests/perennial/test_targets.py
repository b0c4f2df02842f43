"""Service processes under a real supervisord: started once, again after any accident, stopped for good."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from perennial import installation, leftovers
from perennial.errors import InstallationError, RolloutError
from perennial.probe import probe
from perennial.settings import Settings
from perennial.supervision import Supervisor
from perennial.targets import ProcessTarget, Running
from perennial.values import Endpoint
from tests.installations import instance, own_settings, running, until

A, B = ("toy-" + letter * 12 for letter in "ab")


@pytest.fixture(scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with running(own_settings(tmp_path_factory.mktemp("targets") / "home"), ["envoy"]) as here:
        yield here


@pytest.fixture
def here(_running: Settings) -> Iterator[Settings]:
    yield _running
    target = ProcessTarget(_running)
    for service in target.instances():
        target.stop(service.endpoint.name, 1.0)


@pytest.fixture
def target(here: Settings) -> ProcessTarget:
    return ProcessTarget(here)


def serving(here: Settings, letter: str, **more: Any) -> Endpoint:
    """A release that is ready."""
    target = ProcessTarget(here)
    endpoint = target.start(instance(here, letter, **more))
    target.wait_ready(endpoint, 20.0)
    return endpoint


def only(target: ProcessTarget) -> Running:
    [running] = target.instances()
    return running


def answers(port: int) -> str | None:
    """The release that answers there."""
    answer = probe(f"http://127.0.0.1:{port}/health/ready")
    return answer.headers["x-perennial-release"] if answer else None


def test_starting_twice_is_starting_once(here: Settings, target: ProcessTarget) -> None:
    first = serving(here, "a")
    before = only(target)
    second = serving(here, "a")
    assert first == second
    assert only(target).pid == before.pid
    assert answers(first.port) == A


def test_what_runs_is_described(here: Settings, target: ProcessTarget) -> None:
    endpoint = serving(here, "a", drain_seconds=7.5)
    running = only(target)
    assert (running.environment, running.project) == ("test", "toy")
    assert running.endpoint == endpoint
    assert endpoint.release_id == A and endpoint.name == f"svc-test-{A}"
    assert running.drain_seconds == 7.5
    assert running.state in ("STARTING", "RUNNING") and leftovers.is_alive(running.pid)
    assert leftovers.having("OMP_NUM_THREADS", "1").count(running.pid) == 1


def test_the_same_release_in_two_environments_is_two_processes(here: Settings, target: ProcessTarget) -> None:
    one = serving(here, "a")
    other = serving(here, "a", environment="production")
    assert one.port != other.port
    assert {running.environment for running in target.instances()} == {"test", "production"}
    target.stop(one.name, 5)
    assert only(target).environment == "production" and answers(other.port) == A


def test_its_variables_reach_the_process_and_ours_do_not(
    here: Settings, target: ProcessTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    awkward = """100% "of" C:\\dir;#, a=b"""
    serving(here, "a", variables={"AWKWARD": awkward})
    variables = Path(f"/proc/{only(target).pid}/environ").read_bytes().decode().split("\0")
    assert f"AWKWARD={awkward}" in variables
    assert not [one for one in variables if one.startswith(("PREFECT_", "PERENNIAL_DATABASE"))]


def test_a_variable_that_cannot_be_carried_is_named(here: Settings, target: ProcessTarget) -> None:
    with pytest.raises(InstallationError, match="the value of SECRET holds both kinds of quotes"):
        target.start(instance(here, "a", variables={"SECRET": "a\"b'c"}))


def test_a_killed_process_comes_back_on_its_port(here: Settings, target: ProcessTarget) -> None:
    endpoint = serving(here, "a")
    time.sleep(1.1)  # what dies in its first second, supervisord counts as never having started
    pid = only(target).pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: only(target).pid not in (0, pid) and answers(endpoint.port), 10, "its return")
    assert answers(endpoint.port) == A


def test_a_leftover_that_is_dead_is_started_again(here: Settings, target: ProcessTarget) -> None:
    endpoint = serving(here, "a")
    Supervisor(here).stop(endpoint.name)
    until(lambda: only(target).state == "STOPPED", 10, "its end")
    assert answers(endpoint.port) is None
    assert serving(here, "a") == endpoint
    assert answers(endpoint.port) == A


def test_a_leftover_that_gave_up_is_started_again(
    here: Settings, target: ProcessTarget, tmp_path: Path
) -> None:
    repaired = tmp_path / "repaired"
    script = f'test -e {repaired} && exec "$0" "$@" || echo not yet repaired'
    healthy = instance(here, "a")
    repairable = healthy.model_copy(update={"argv": ("/bin/sh", "-c", script, *healthy.argv)})
    target.start(repairable)
    until(lambda: only(target).state == "FATAL", 15, "supervisord to give up")
    repaired.touch()
    endpoint = target.start(repairable)
    target.wait_ready(endpoint, 10)
    assert answers(endpoint.port) == A


def test_what_changed_is_started_anew_with_the_change(here: Settings, target: ProcessTarget) -> None:
    before = serving(here, "a")
    pid = only(target).pid
    after = serving(here, "a", variables={"CHANGED": "yes"})
    assert after == before
    assert only(target).pid != pid
    assert only(target).pid in leftovers.having("CHANGED", "yes")


def test_stopping_what_is_absent_is_fine(here: Settings, target: ProcessTarget) -> None:
    target.stop(f"svc-test-toy-{'e' * 12}", 1.0)
    endpoint = serving(here, "a")
    target.stop(endpoint.name, 5.0)
    target.stop(endpoint.name, 5.0)
    assert target.instances() == ()
    assert Supervisor(here).process(endpoint.name) is None
    assert answers(endpoint.port) is None


def test_stopping_lets_it_answer_what_it_accepted(here: Settings, target: ProcessTarget) -> None:
    endpoint = serving(here, "a")
    with ThreadPoolExecutor() as pool, socket.create_connection((endpoint.host, endpoint.port)) as client:
        body = b'{"seconds": 1.5}'
        client.sendall(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        time.sleep(0.3)
        stopping = pool.submit(target.stop, endpoint.name, 10.0)
        client.settimeout(10)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        stopping.result()
    assert target.instances() == ()


def test_one_that_ignores_the_signal_is_killed(here: Settings, target: ProcessTarget) -> None:
    deaf = (sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)")
    endpoint = target.start(instance(here, "a", argv=deaf, drain_seconds=0))
    time.sleep(0.5)
    pid = only(target).pid
    began = time.monotonic()
    target.stop(endpoint.name, 0)
    assert time.monotonic() - began < 8
    assert not leftovers.is_alive(pid)


def test_a_candidate_that_dies_at_its_start_is_refused_at_once_with_its_last_words(
    here: Settings, target: ProcessTarget
) -> None:
    began = time.monotonic()
    endpoint = target.start(instance(here, "a", "--dies", "no licence on this machine"))
    with pytest.raises(RolloutError, match="died before it was ready") as refused:
        target.wait_ready(endpoint, 60)
    assert time.monotonic() - began < 5
    assert "    no licence on this machine" in refused.value.found
    assert f"{endpoint.name}.log" in refused.value.next_command


def test_a_candidate_that_never_gets_ready_is_refused_after_its_time(
    here: Settings, target: ProcessTarget
) -> None:
    endpoint = target.start(instance(here, "a", "--starts-in", "60"))
    with pytest.raises(RolloutError, match=r"was not ready within 1\.2 s: nobody answers") as refused:
        target.wait_ready(endpoint, 1.2)
    assert "ready_timeout_seconds" in refused.value.next_command


def test_a_candidate_without_an_interpreter_is_refused_at_once(here: Settings, target: ProcessTarget) -> None:
    began = time.monotonic()
    missing = instance(here, "a", argv=("/no/such/python", "-m", "serving.server"))
    for _ in range(2):  # and again when supervisord has given up on it
        with pytest.raises(RolloutError, match="/no/such/python"):
            target.wait_ready(target.start(missing), 60)
    assert time.monotonic() - began < 8


def test_a_killed_start_is_finished_by_the_next(here: Settings, target: ProcessTarget) -> None:
    wanted = instance(here, "a")
    remembered = ProcessTarget(here)._configure(
        wanted
    )  # the file is written, supervisord knows nothing of it
    assert only(target).state == "STOPPED"
    endpoint = target.start(wanted)
    target.wait_ready(endpoint, 10)
    assert endpoint == remembered
    assert answers(endpoint.port) == A


def test_a_killed_change_is_finished_by_the_next(here: Settings, target: ProcessTarget) -> None:
    """Also when `up` came in between: it leaves the service alone, which may be serving."""
    endpoint = serving(here, "a")
    pid = only(target).pid
    changed = instance(here, "a", variables={"CHANGED": "yes"})
    target._configure(changed)
    installation.up(here, parts=("envoy",), say=lambda line: None)
    assert only(target).pid == pid and answers(endpoint.port) == A
    target.wait_ready(target.start(changed), 10)
    assert only(target).pid in leftovers.having("CHANGED", "yes")


def test_a_killed_stop_is_finished_by_the_next(here: Settings, target: ProcessTarget) -> None:
    endpoint = serving(here, "a")
    Supervisor(here).stop(endpoint.name)  # then killed, before the file was removed
    target.stop(endpoint.name, 5.0)
    assert target.instances() == ()
    serving(here, "a")
    (here.root / "services" / f"{endpoint.name}.conf").unlink()  # killed after it was removed
    assert target.instances() == ()
    again = serving(here, "a")
    assert answers(again.port) == A
    target.stop(again.name, 5.0)
    assert Supervisor(here).process(endpoint.name) is None


def test_two_at_once_get_a_port_each(here: Settings, target: ProcessTarget) -> None:
    with ThreadPoolExecutor(5) as pool:
        started = list(pool.map(lambda letter: serving(here, letter), "abcde"))
    assert len({endpoint.port for endpoint in started}) == 5
    assert [answers(endpoint.port) for endpoint in started] == [f"toy-{letter * 12}" for letter in "abcde"]


def test_the_same_one_started_twice_at_once_is_one_process(here: Settings, target: ProcessTarget) -> None:
    with ThreadPoolExecutor(4) as pool:
        started = set(pool.map(lambda _: serving(here, "a").port, range(4)))
    assert started == {only(target).endpoint.port}


def test_others_can_be_listed_while_some_come_and_go(here: Settings, target: ProcessTarget) -> None:
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            target._configure(instance(here, "a"))
            target._file(f"svc-test-{A}").unlink()

    churn = threading.Thread(target=come_and_go)
    churn.start()
    try:
        for _ in range(300):
            target._described()
    finally:
        over.set()
        churn.join()


def test_a_port_that_another_program_took_is_not_used(here: Settings, target: ProcessTarget) -> None:
    wanted = here.first_service_port
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", wanted))
        other.listen()
        assert serving(here, "a").port != wanted
        target.stop(only(target).endpoint.name, 5.0)
    assert serving(here, "b").port == wanted


def test_services_keep_their_ports_over_a_restart_of_supervisord(tmp_path: Path) -> None:
    with running(own_settings(tmp_path / "home"), ["envoy"]) as here:
        target = ProcessTarget(here)
        before = [serving(here, letter) for letter in "ab"]
        installation.down(here, say=lambda line: None)
        assert [answers(endpoint.port) for endpoint in before] == [None, None]
        installation.up(here, parts=["envoy"], say=lambda line: None)
        for endpoint in before:
            target.wait_ready(endpoint, 10)
        assert [service.endpoint for service in target.instances()] == before
        assert [serving(here, letter) for letter in "ab"] == before


def test_without_supervisord_the_command_to_run_is_named(tmp_path: Path) -> None:
    here = own_settings(tmp_path)
    for act in (
        lambda: ProcessTarget(here).start(instance(here, "a")),
        lambda: ProcessTarget(here).stop(f"svc-test-{A}", 1.0),
        lambda: ProcessTarget(here).instances(),
    ):
        with pytest.raises(InstallationError, match="is not running") as refused:
            act()
        assert str(here.root) in refused.value.found and refused.value.next_command == "make up"
