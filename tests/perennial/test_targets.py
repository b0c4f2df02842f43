"""Both targets, for real: started once, again after any accident, stopped for good."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perennial import installation, leftovers
from perennial.containers import DockerTarget
from perennial.errors import InstallationError, RolloutError
from perennial.settings import Settings
from perennial.supervision import Supervisor
from perennial.targets import ProcessTarget, open_target
from tests.engines import engine_or_skip, service_image
from tests.installations import own_settings, running, until
from tests.targets import Containers, Kind, Processes, answers

A = f"toy-{'a' * 12}"


@pytest.fixture(scope="module")
def _installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with running(own_settings(tmp_path_factory.mktemp("targets") / "home"), []) as here:
        yield here


@pytest.fixture(scope="module")
def _containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    folder = tmp_path_factory.mktemp("containers")
    with engine_or_skip() as engine:
        image = service_image(engine, folder / "work")
        yield Containers(own_settings(folder / "home", target="docker"), image)
        engine.images.remove(image, force=True)


@pytest.fixture
def processes(_installation: Settings) -> Iterator[Processes]:
    kind = Processes(_installation)
    yield kind
    _stop_all(kind)


@pytest.fixture
def containers(_containers: Containers) -> Iterator[Containers]:
    yield _containers
    _stop_all(_containers)


def _stop_all(kind: Kind) -> None:
    for service in kind.target.instances():
        kind.target.stop(service.endpoint.name, 1.0)


@pytest.fixture(params=["processes", "containers"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each target; what it runs is stopped after the test."""
    found: Kind = request.getfixturevalue(request.param)
    return found


def test_the_settings_say_which(tmp_path: Path) -> None:
    assert isinstance(open_target(Settings(home=tmp_path)), ProcessTarget)
    assert isinstance(open_target(Settings(home=tmp_path, target="docker")), DockerTarget)


def test_starting_twice_is_starting_once(kind: Kind) -> None:
    first = kind.serving("a")
    before = kind.only()
    second = kind.serving("a")
    assert first == second
    assert kind.only().pid == before.pid
    assert answers(first.port) == A


def test_what_runs_is_described(kind: Kind) -> None:
    endpoint = kind.serving("a", drain_seconds=7.5)
    running = kind.only()
    assert (running.environment, running.project) == ("test", "toy")
    assert running.endpoint == endpoint
    assert endpoint.release_id == A and endpoint.name == f"svc-test-{A}"
    assert running.drain_seconds == 7.5
    assert running.image == kind.fields().get("image", "")
    assert running.state in ("STARTING", "RUNNING") and leftovers.is_alive(running.pid)
    assert 0 <= running.uptime_seconds < 20
    assert "OMP_NUM_THREADS=1" in kind.variables()


def test_the_same_release_in_two_environments_is_two_instances(kind: Kind) -> None:
    one = kind.serving("a")
    other = kind.serving("a", environment="production")
    assert one.port != other.port
    assert {running.environment for running in kind.target.instances()} == {"test", "production"}
    kind.target.stop(one.name, 5)
    assert kind.only().environment == "production" and answers(other.port) == A


def test_its_variables_reach_it_and_ours_do_not(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_DATABASE_URL", "postgresql://of-the-journal")
    awkward = """100% "of" C:\\dir;#, a=b"""
    kind.serving("a", variables={"AWKWARD": awkward})
    variables = kind.variables()
    assert f"AWKWARD={awkward}" in variables
    assert not [one for one in variables if one.startswith(("PREFECT_", "PERENNIAL_DATABASE"))]


def test_a_variable_that_supervisord_cannot_carry_is_named(processes: Processes) -> None:
    with pytest.raises(InstallationError, match="the value of SECRET holds both kinds of quotes"):
        processes.target.start(processes.instance("a", variables={"SECRET": "a\"b'c"}))


def test_one_that_is_killed_comes_back_on_its_port(kind: Kind) -> None:
    endpoint = kind.serving("a")
    time.sleep(1.1)  # what dies in its first second, supervisord counts as never having started
    killed = kind.kill()
    until(lambda: kind.only().pid not in (0, killed) and answers(endpoint.port), 10, "its return")
    assert answers(endpoint.port) == A


def test_a_leftover_that_is_dead_is_started_again(kind: Kind) -> None:
    endpoint = kind.serving("a")
    kind.end(endpoint.name)
    assert kind.only().state in ("STOPPED", "EXITED") and kind.only().pid == 0
    assert answers(endpoint.port) is None
    assert kind.serving("a") == endpoint
    assert answers(endpoint.port) == A


def test_one_that_is_dead_is_revived_as_it_was(kind: Kind) -> None:
    endpoint = kind.serving("a", variables={"KEPT": "yes"})
    pid = kind.only().pid
    kind.target.revive(endpoint.name)
    assert kind.only().pid == pid  # it runs
    kind.end(endpoint.name)
    kind.target.revive(endpoint.name)
    kind.target.wait_ready(endpoint, 10)
    assert answers(endpoint.port) == A and "KEPT=yes" in kind.variables()
    kind.target.revive(f"svc-test-toy-{'e' * 12}")
    assert kind.only().endpoint == endpoint


def test_a_leftover_that_dies_and_dies_is_started_again(kind: Kind) -> None:
    """Its reason is gone, and whoever starts it again need not wait for the next attempt."""
    healthy = kind.instance("a")
    wait_for = (
        "import os, sys; os.path.exists(sys.argv[1]) or sys.exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
    )
    argv = (kind.python, "-c", wait_for, f"{kind.spool_inside(healthy)}/repaired", *healthy.argv)
    repairable = healthy.model_copy(update={"argv": argv})
    kind.target.start(repairable)
    until(lambda: kind.only().state == kind.given_up, 15, "its giving up")
    (healthy.spool / "repaired").parent.mkdir(exist_ok=True)
    (healthy.spool / "repaired").touch()
    endpoint = kind.target.start(repairable)
    kind.target.wait_ready(endpoint, 10)
    assert answers(endpoint.port) == A
    (healthy.spool / "repaired").unlink()


def test_what_changed_is_started_anew_with_the_change(kind: Kind) -> None:
    before = kind.serving("a", variables={"CHANGED": "no"})
    pid = kind.only().pid
    after = kind.serving("a", variables={"CHANGED": "yes"})
    assert after == before
    assert kind.only().pid != pid
    assert "CHANGED=yes" in kind.variables()


def test_stopping_what_is_absent_is_fine(kind: Kind) -> None:
    kind.target.stop(f"svc-test-toy-{'e' * 12}", 1.0)
    endpoint = kind.serving("a")
    kind.target.stop(endpoint.name, 5.0)
    kind.target.stop(endpoint.name, 5.0)
    assert kind.target.instances() == ()
    assert answers(endpoint.port) is None


def test_stopping_lets_it_answer_what_it_accepted(kind: Kind) -> None:
    endpoint = kind.serving("a")
    with ThreadPoolExecutor() as pool, socket.create_connection((endpoint.host, endpoint.port)) as client:
        body = b'{"seconds": 1.5}'
        client.sendall(b"POST /predict HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        time.sleep(0.3)
        stopping = pool.submit(kind.target.stop, endpoint.name, 10.0)
        client.settimeout(10)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        stopping.result()
    assert kind.target.instances() == ()


def test_one_that_ignores_the_signal_is_killed(kind: Kind) -> None:
    deaf = (kind.python, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)")
    endpoint = kind.target.start(kind.instance("a", argv=deaf, drain_seconds=0))
    time.sleep(0.5)
    pid = kind.only().pid
    began = time.monotonic()
    kind.target.stop(endpoint.name, 0)
    assert time.monotonic() - began < 9
    assert not leftovers.is_alive(pid)


def test_a_candidate_that_dies_at_its_start_is_refused_at_once_with_its_last_words(kind: Kind) -> None:
    began = time.monotonic()
    endpoint = kind.target.start(kind.instance("a", "--dies", "no licence on this machine"))
    with pytest.raises(RolloutError, match="died before it was ready") as refused:
        kind.target.wait_ready(endpoint, 60)
    assert time.monotonic() - began < 5
    assert "    no licence on this machine" in refused.value.found
    assert kind.log_of(endpoint.name) in refused.value.next_command


def test_a_candidate_that_never_gets_ready_is_refused_after_its_time(kind: Kind) -> None:
    endpoint = kind.target.start(kind.instance("a", "--starts-in", "60"))
    with pytest.raises(RolloutError, match=r"was not ready within 1\.2 s: nobody answers") as refused:
        kind.target.wait_ready(endpoint, 1.2)
    assert "ready_timeout_seconds" in refused.value.next_command


def test_a_candidate_without_an_interpreter_is_refused_at_once(kind: Kind) -> None:
    began = time.monotonic()
    missing = kind.instance("a", argv=("/no/such/python", "-m", "serving.server"))
    for _ in range(2):  # and again when supervisord has given up on it
        with pytest.raises(RolloutError, match="/no/such/python"):
            kind.target.wait_ready(kind.target.start(missing), 60)
    assert time.monotonic() - began < 8


def test_a_killed_start_is_finished_by_the_next(kind: Kind) -> None:
    wanted = kind.instance("a")
    remembered = kind.begin(wanted)
    assert kind.only().state == "STOPPED"
    endpoint = kind.target.start(wanted)
    kind.target.wait_ready(endpoint, 10)
    assert endpoint == remembered
    assert answers(endpoint.port) == A


def test_a_killed_change_is_finished_by_the_next(processes: Processes) -> None:
    """Also when `up` came in between: it leaves the service alone, which may be serving."""
    endpoint = processes.serving("a")
    pid = processes.only().pid
    changed = processes.instance("a", variables={"CHANGED": "yes"})
    processes.begin(changed)
    installation.up(processes.settings, parts=(), say=lambda line: None)
    assert processes.only().pid == pid and answers(endpoint.port) == A
    processes.target.wait_ready(processes.target.start(changed), 10)
    assert "CHANGED=yes" in processes.variables()


def test_a_killed_stop_is_finished_by_the_next(kind: Kind) -> None:
    endpoint = kind.serving("a")
    kind.end(endpoint.name)  # and killed before it was removed
    kind.target.stop(endpoint.name, 5.0)
    assert kind.target.instances() == ()


def test_a_killed_stop_that_had_removed_the_file_is_finished_by_the_next(processes: Processes) -> None:
    endpoint = processes.serving("a")
    (processes.settings.root / "services" / f"{endpoint.name}.conf").unlink()
    assert processes.target.instances() == ()
    again = processes.serving("a")
    assert answers(again.port) == A
    processes.target.stop(again.name, 5.0)
    assert Supervisor(processes.settings).process(endpoint.name) is None


def test_three_at_once_get_a_port_each(kind: Kind) -> None:
    with ThreadPoolExecutor(3) as pool:
        started = list(pool.map(kind.serving, "abc"))
    assert len({endpoint.port for endpoint in started}) == 3
    assert [answers(endpoint.port) for endpoint in started] == [f"toy-{letter * 12}" for letter in "abc"]


def test_the_same_one_started_twice_at_once_is_one(kind: Kind) -> None:
    with ThreadPoolExecutor(4) as pool:
        started = set(pool.map(lambda _: kind.serving("a").port, range(4)))
    assert started == {kind.only().endpoint.port}


def test_others_can_be_listed_while_some_come_and_go(processes: Processes) -> None:
    over = threading.Event()
    target = processes.target

    def come_and_go() -> None:
        while not over.is_set():
            target._configure(processes.instance("a"))
            target._file(f"svc-test-{A}").unlink()

    churn = threading.Thread(target=come_and_go)
    churn.start()
    try:
        for _ in range(300):
            target._described()
    finally:
        over.set()
        churn.join()


def test_a_port_that_another_program_took_is_not_used(kind: Kind) -> None:
    wanted = kind.settings.first_service_port
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", wanted))
        other.listen()
        assert kind.serving("a").port != wanted
        kind.target.stop(kind.only().endpoint.name, 5.0)
    assert kind.serving("b").port == wanted


def test_one_that_is_down_keeps_its_port(kind: Kind) -> None:
    first = kind.serving("a")
    kind.end(first.name)
    assert kind.serving("b").port != first.port
    assert kind.serving("a") == first


def test_services_keep_their_ports_over_a_restart_of_supervisord(tmp_path: Path) -> None:
    with running(own_settings(tmp_path / "home"), []) as here:
        processes = Processes(here)
        target = processes.target
        before = [processes.serving(letter) for letter in "ab"]
        installation.down(here, say=lambda line: None)
        assert [answers(endpoint.port) for endpoint in before] == [None, None]
        installation.up(here, parts=(), say=lambda line: None)
        for endpoint in before:
            target.wait_ready(endpoint, 10)
        assert [service.endpoint for service in target.instances()] == before
        assert [processes.serving(letter) for letter in "ab"] == before


def test_without_supervisord_the_command_to_run_is_named(tmp_path: Path) -> None:
    here = own_settings(tmp_path)
    for act in (
        lambda: ProcessTarget(here).start(Processes(here).instance("a")),
        lambda: ProcessTarget(here).stop(f"svc-test-{A}", 1.0),
        lambda: ProcessTarget(here).instances(),
    ):
        with pytest.raises(InstallationError, match="is not running") as refused:
            act()
        assert str(here.root) in refused.value.found and refused.value.next_command == "make up"
