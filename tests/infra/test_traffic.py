"""What users notice of a deployment: nothing. The real supervisord and Envoy, services under load."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from perennial import router
from perennial.errors import RolloutError
from perennial.installation import down
from perennial.settings import Settings
from perennial.targets import ProcessTarget, Running
from perennial.values import Endpoint
from tests.installations import call, instance, load, own_settings, running, until

RATE = 250  # requests per second


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with running(own_settings(tmp_path_factory.mktemp("traffic") / "home"), ["envoy"]) as settings:
        yield settings


@pytest.fixture
def target(here: Settings) -> Iterator[ProcessTarget]:
    target = ProcessTarget(here)
    yield target
    router.apply(here, {})
    for running_ in target.instances():
        target.stop(running_.endpoint.name, 1.0)


def serve(here: Settings, target: ProcessTarget, letter: str, *options: str) -> Endpoint:
    """A release that is ready, not yet routed to."""
    endpoint = target.start(instance(here, letter, *options))
    target.wait_ready(endpoint, 15.0)
    return endpoint


def route(here: Settings, *endpoints: Endpoint) -> None:
    router.apply(here, {"test": {"toy": endpoints}})


def switch(here: Settings, target: ProcessTarget, old: Endpoint, new: Endpoint) -> None:
    route(here, old, new)
    route(here, new)
    target.stop(old.name, 10.0)


def one(target: ProcessTarget, endpoint: Endpoint) -> Running:
    return next(r for r in target.instances() if r.endpoint.name == endpoint.name)


def all_answered(outcome: dict[str, Any], *endpoints: Endpoint) -> bool:
    assert outcome["failures"] == [], outcome["failures"][:5]
    assert set(outcome["releases"]) == {endpoint.release_id for endpoint in endpoints}
    assert outcome["requests"] / outcome["seconds"] >= 0.8 * RATE, outcome
    return True


@pytest.mark.slow
def test_three_switches_under_load_lose_no_request(
    here: Settings, target: ProcessTarget, tmp_path: Path
) -> None:
    releases = [serve(here, target, "a")]
    route(here, *releases)
    with load(f"{here.router_url('test')}/toy/predict", RATE, tmp_path / "body") as outcome:
        for letter in "bcd":
            time.sleep(1.0)
            releases.append(serve(here, target, letter))
            switch(here, target, releases[-2], releases[-1])
        time.sleep(1.0)
    assert all_answered(outcome, *releases)


@pytest.mark.slow
def test_a_killed_process_with_a_second_one_beside_it_loses_no_request(
    here: Settings, target: ProcessTarget, tmp_path: Path
) -> None:
    first, second = serve(here, target, "a"), serve(here, target, "b")
    route(here, first, second)
    with load(f"{here.router_url('test')}/toy/predict", RATE, tmp_path / "body") as outcome:
        for victim in (first, second):
            time.sleep(1.0)
            os.kill(one(target, victim).pid, signal.SIGKILL)
            time.sleep(0.5)
            until(lambda victim=victim: one(target, victim).state == "RUNNING", 10, "a new process")
            route(here, first, second)
    assert all_answered(outcome, first, second)


@pytest.mark.slow
def test_a_candidate_that_dies_leaves_the_old_release_serving(
    here: Settings, target: ProcessTarget, tmp_path: Path
) -> None:
    old = serve(here, target, "a")
    route(here, old)
    with load(f"{here.router_url('test')}/toy/predict", RATE, tmp_path / "body") as outcome:
        candidate = target.start(instance(here, "b", "--dies", "no such file: model.skops"))
        with pytest.raises(RolloutError, match=r"(?s)died before it was ready.*no such file: model\.skops"):
            target.wait_ready(candidate, 20.0)
        target.stop(candidate.name, 1.0)
    assert all_answered(outcome, old)
    assert [r.endpoint for r in target.instances()] == [old]


def test_a_request_under_way_survives_the_switch(here: Settings, target: ProcessTarget) -> None:
    old, new = serve(here, target, "a"), serve(here, target, "b")
    route(here, old)
    answers: list[tuple[int, Any, dict[str, str]]] = []
    url = f"{here.router_url('test')}/toy/predict"
    slow = [threading.Thread(target=lambda: answers.append(call(url, {"seconds": 3.0}))) for _ in range(10)]
    for thread in slow:
        thread.start()
    time.sleep(0.5)
    switch(here, target, old, new)
    for thread in slow:
        thread.join()
    assert [(status, headers["x-perennial-release"]) for status, _, headers in answers] == [
        (200, old.release_id)
    ] * 10
    assert call(url, {})[1]["release_id"] == new.release_id


def test_a_large_request_is_asked_again_of_the_other_endpoint(here: Settings, target: ProcessTarget) -> None:
    refuses, serves = instance(here, "a", "--never-ready"), serve(here, target, "b")
    dead = target.start(refuses).model_copy(update={"port": 1})  # nobody listens there
    router.apply(here, {"test": {"toy": [dead, serves]}}, healthy=[serves])
    body = {"rows": ["x" * 4_000_000]}
    for _ in range(4):
        status, answer, _ = call(f"{here.router_url('test')}/toy/predict", body)
        assert (status, answer["release_id"]) == (200, serves.release_id)
        assert answer["bytes"] > 4_000_000


def test_a_503_is_asked_again_and_an_error_of_the_request_is_not(
    here: Settings, target: ProcessTarget
) -> None:
    route(here, serve(here, target, "a"))
    url = f"{here.router_url('test')}/toy/predict"
    for status in (400, 422, 500):
        assert call(url, {"status": status})[0] == status
    # An endpoint that answers 500 to a bad row is not taken away from the others.
    assert [call(url, {"status": 500})[0] for _ in range(10)] == [500] * 10
    assert call(url, {})[0] == 200


def test_the_service_sees_its_own_paths_and_the_user_a_request_id(
    here: Settings, target: ProcessTarget
) -> None:
    route(here, serve(here, target, "a"))
    base = here.router_url("test")
    status, answer, headers = call(f"{base}/toy/predict", {})
    assert (status, answer["path"]) == (200, "/predict")
    assert answer["headers"]["x-forwarded-prefix"] == "/toy"
    assert answer["headers"]["x-request-id"] == headers["x-request-id"]
    assert call(f"{base}/toy")[1]["path"] == "/"
    assert call(f"{base}/toy/v2/health?verbose=1")[1]["path"] == "/v2/health"
    assert call(f"{base}/toyland/predict")[0] == 404


def test_a_callers_request_id_is_kept(here: Settings, target: ProcessTarget) -> None:
    import urllib.request

    route(here, serve(here, target, "a"))
    asked = urllib.request.Request(
        f"{here.router_url('test')}/toy/predict", data=b"{}", headers={"x-request-id": "mine-1"}
    )
    with urllib.request.urlopen(asked) as response:
        assert response.headers["x-request-id"] == "mine-1"


def test_an_environment_lists_its_services_and_says_which_it_does_not_have(
    here: Settings, target: ProcessTarget
) -> None:
    endpoint = serve(here, target, "a")
    route(here, endpoint)
    status, answer, _ = call(f"{here.router_url('test')}/")
    assert status == 200
    assert answer["services"] == {"toy": {"path": "/toy/", "releases": [endpoint.release_id]}}
    status, answer, headers = call(f"{here.router_url('test')}/absent/predict", {})
    assert (status, headers["content-type"]) == (404, "application/json")
    assert "no such service" in answer["error"] and answer["services"] == ["/toy/"]
    assert call(f"{here.router_url('production')}/toy/predict", {})[0] == 404


@pytest.mark.slow
def test_a_second_service_comes_and_goes_without_a_trace_in_the_first(
    here: Settings, target: ProcessTarget, tmp_path: Path
) -> None:
    toy = serve(here, target, "a")
    other = target.start(instance(here, "b", project="other"))
    target.wait_ready(other, 15.0)
    route(here, toy)
    url = f"{here.router_url('test')}/other/predict"
    with load(f"{here.router_url('test')}/toy/predict", RATE, tmp_path / "body") as outcome:
        for _ in range(3):
            router.apply(here, {"test": {"toy": [toy], "other": [other]}})
            assert call(url, {})[0] == 200
            route(here, toy)
            assert call(url, {})[0] == 404
    assert all_answered(outcome, toy)


def test_weights_share_the_traffic(here: Settings, target: ProcessTarget) -> None:
    nine, one_ = serve(here, target, "a"), serve(here, target, "b")
    route(here, nine.model_copy(update={"weight": 9}), one_)
    url = f"{here.router_url('test')}/toy/predict"
    said = [call(url, {})[1]["release_id"] for _ in range(100)]
    assert 80 <= said.count(nine.release_id) <= 97


def test_an_endpoint_that_does_not_answer_is_named(here: Settings, target: ProcessTarget) -> None:
    alive = serve(here, target, "a")
    absent = Endpoint(host="127.0.0.1", port=1, release_id="toy-000000000000")
    with pytest.raises(RolloutError, match=r"127\.0\.0\.1:1 of test-toy is not healthy"):
        router.apply(here, {"test": {"toy": [alive, absent]}}, timeout_seconds=1.5)
    said = {call(f"{here.router_url('test')}/toy/predict", {})[1]["release_id"] for _ in range(10)}
    assert said == {alive.release_id}


def test_down_lets_services_answer_before_the_router_goes(tmp_path: Path) -> None:
    here = own_settings(tmp_path / "home")
    target = ProcessTarget(here)
    with running(here, ["envoy"]), ThreadPoolExecutor() as pool:
        endpoint = serve(here, target, "a")
        route(here, endpoint)
        slow = pool.submit(call, f"{here.router_url('test')}/toy/predict", {"seconds": 2.0})
        time.sleep(0.5)
        down(here, say=lambda line: None)
        status, answer, _ = slow.result()
    assert (status, answer["release_id"]) == (200, endpoint.release_id)
