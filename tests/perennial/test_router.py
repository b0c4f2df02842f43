"""Envoy does what the files say, and the files say what the routes are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial import router
from perennial.errors import RolloutError
from perennial.probe import Answer, probe
from perennial.settings import Settings
from perennial.targets import ProcessTarget
from perennial.values import Endpoint
from tests.installations import instance, own_settings, running


@pytest.fixture(scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with running(own_settings(tmp_path_factory.mktemp("router") / "home"), ["envoy"]) as here:
        yield here


@pytest.fixture
def here(_running: Settings) -> Iterator[Settings]:
    yield _running
    router.apply(_running, {})
    target = ProcessTarget(_running)
    for service in target.instances():
        target.stop(service.endpoint.name, 1.0)


def serving(here: Settings, letter: str, project: str = "toy") -> Endpoint:
    """A release that is ready."""
    target = ProcessTarget(here)
    endpoint = target.start(instance(here, letter, project=project))
    target.wait_ready(endpoint, 20.0)
    return endpoint


def ask(url: str) -> Answer:
    answer = probe(url)
    assert answer is not None, f"nobody answers at {url}"
    return answer


def endpoint(letter: str, port: int, project: str = "toy") -> Endpoint:
    return Endpoint(host="127.0.0.1", port=port, release_id=f"{project}-{letter * 12}")


def test_equal_routes_give_equal_bytes(tmp_path: Path) -> None:
    here = own_settings(tmp_path)
    a, b = endpoint("a", 1001), endpoint("b", 1002)
    one = router.render({"test": {"toy": [a], "other": [b]}, "production": {"toy": [a, b]}}, here)
    same = router.render({"production": {"toy": (a, b)}, "test": {"other": (b,), "toy": (a,)}}, here)
    assert one == same
    assert one != router.render({"test": {"toy": [b]}}, here)
    assert list(tmp_path.iterdir()) == []


def test_a_service_without_endpoints_is_no_service(tmp_path: Path) -> None:
    here = own_settings(tmp_path)
    assert router.render({"test": {"toy": []}}, here) == router.render({}, here)


def test_with_no_service_the_router_runs_and_says_so(here: Settings) -> None:
    for environment in ("test", "production"):
        answer = ask(f"{here.router_url(environment)}/")
        assert answer.status == 200
        assert answer.json() == {"environment": environment, "services": {}}


def test_the_first_page_lists_the_services_and_their_releases(here: Settings) -> None:
    first = serving(here, "a")
    second = serving(here, "b")
    other = serving(here, "c", "other")
    router.apply(here, {"test": {"toy": [second, first], "other": [other]}})
    answer = ask(f"{here.router_url('test')}/")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json()["services"] == {
        "other": {"path": "/other/", "releases": ["other-cccccccccccc"]},
        "toy": {"path": "/toy/", "releases": ["toy-aaaaaaaaaaaa", "toy-bbbbbbbbbbbb"]},
    }
    assert ask(f"{here.router_url('production')}/").json()["services"] == {}


@pytest.mark.parametrize("path", ["/flihgts/predict", "/toys", "/toys/", "/x?toy=/toy/"])
def test_an_unknown_service_is_a_404_that_says_which_there_are(here: Settings, path: str) -> None:
    toy = serving(here, "a")
    router.apply(here, {"test": {"toy": [toy]}})
    answer = ask(here.router_url("test") + path)
    assert (answer.status, answer.headers["content-type"]) == (404, "application/json")
    assert answer.json() == {
        "error": "there is no such service in the environment test",
        "services": ["/toy/"],
    }


def test_a_service_that_goes_away_is_a_404_and_the_others_serve_on(here: Settings) -> None:
    toy, other = serving(here, "a"), serving(here, "b", "other")
    router.apply(here, {"test": {"toy": [toy], "other": [other]}})
    router.apply(here, {"test": {"other": [other]}})
    assert ask(f"{here.router_url('test')}/toy/").status == 404
    assert ask(f"{here.router_url('test')}/other/").status == 200
    left = {path.name for path in router.router_directory(here).glob("endpoints-*")}
    assert left == {"endpoints-test-other.json"}


def test_an_endpoint_that_nobody_serves_is_named_and_the_others_serve_on(here: Settings) -> None:
    toy = serving(here, "a")
    nobody = own_settings(here.root).first_service_port
    router.apply(here, {"test": {"toy": [toy]}})
    with pytest.raises(RolloutError, match=f"127.0.0.1:{nobody} of test-toy is not healthy") as refused:
        router.apply(here, {"test": {"toy": [toy, endpoint("b", nobody)]}}, timeout_seconds=1.5)
    assert "envoy.log" in refused.value.next_command
    for _ in range(20):
        assert ask(f"{here.router_url('test')}/toy/").headers["x-perennial-release"] == "toy-aaaaaaaaaaaa"


def test_only_the_endpoints_asked_for_must_be_healthy(here: Settings) -> None:
    toy = serving(here, "a")
    dead = endpoint("b", own_settings(here.root).first_service_port, "other")
    began = time.monotonic()
    router.apply(here, {"test": {"toy": [toy], "other": [dead]}}, healthy=[toy])
    assert time.monotonic() - began < 5
    assert ask(f"{here.router_url('test')}/toy/").status == 200


def test_without_the_router_the_error_says_where_it_was_looked_for(tmp_path: Path) -> None:
    here = own_settings(tmp_path)
    with pytest.raises(RolloutError, match=f"{here.router_admin_url} does not answer"):
        router.apply(here, {}, timeout_seconds=0.1)


def test_lost_files_are_written_again_and_taken(here: Settings) -> None:
    toy = serving(here, "a")
    router.apply(here, {"test": {"toy": [toy]}})
    for path in router.router_directory(here).glob("*.json"):
        path.unlink()
    router.apply(here, {"test": {"toy": [toy]}})
    assert ask(f"{here.router_url('test')}/toy/").status == 200


def test_a_reader_sees_whole_files_only_and_no_file_is_left_over(tmp_path: Path) -> None:
    here = own_settings(tmp_path)
    directory = router.router_directory(here)
    many = [endpoint("a", 1000 + number) for number in range(200)]
    states = [router.render({"test": {"toy": many[:count]}}, here) for count in (200, 1, 100)]
    router.write(directory, states[0])
    torn: list[str] = []
    read = 0
    over = threading.Event()

    def look() -> None:
        nonlocal read
        while not over.is_set():
            for path in directory.glob("*.json"):
                text = path.read_text()
                read += 1
                if all(state[path.name] != text for state in states):
                    torn.append(path.name)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(120):
            router.write(directory, states[number % 3])
    finally:
        over.set()
        reader.join()
    assert torn == []
    assert read > 100
    assert {path.name for path in directory.iterdir()} == states[0].keys()


def test_a_file_that_stays_the_same_is_left_alone(tmp_path: Path) -> None:
    here = own_settings(tmp_path)
    directory = router.router_directory(here)
    before = router.render({"test": {"toy": [endpoint("a", 1001)]}}, here)
    after = router.render({"test": {"toy": [endpoint("b", 1002)]}}, here)
    router.write(directory, before)
    inodes = {path.name: path.stat().st_ino for path in directory.iterdir()}
    router.write(directory, after)
    moved = {path.name for path in directory.iterdir() if path.stat().st_ino != inodes[path.name]}
    assert moved == {name for name in after if after[name] != before[name]}
    assert "endpoints-test-toy.json" in moved and "listeners.json" not in moved


def test_one_change_of_routes_at_a_time(here: Settings) -> None:
    """Two deployments that write what each of them read would undo one another."""
    target = ProcessTarget(here)
    names = ("toy", "other", "third")
    for number, name in enumerate(names):
        serving(here, "abc"[number], name)
    known: dict[str, list[Endpoint]] = {}

    def add(name: str) -> None:
        with router.alone(here):
            found = dict(known)
            time.sleep(0.1)  # reading a journal takes its time
            for running in target.instances():
                if running.project == name:
                    found[name] = [running.endpoint]
            known.update(found)
            router.apply(here, {"test": found})

    threads = [threading.Thread(target=add, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ask(f"{here.router_url('test')}/").json()["services"].keys() == set(names)
