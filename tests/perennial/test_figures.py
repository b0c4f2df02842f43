"""The numbers of a canary, from the real Envoy and real services under requests."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perennial import figures, predictions, proof, router
from perennial.canary import Arm, Baseline
from perennial.figures import Counters
from perennial.predictions import Recent
from perennial.probe import probe
from perennial.settings import Settings
from perennial.store import open_store
from perennial.targets import ProcessTarget
from perennial.values import Endpoint
from serving import metrics
from tests.installations import ROOT, call, instance, own_settings, running, until
from tests.served import write_release

NOTHING = Baseline()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with running(own_settings(tmp_path_factory.mktemp("figures") / "home"), ["envoy"]) as settings:
        yield settings


@pytest.fixture
def target(here: Settings) -> Iterator[ProcessTarget]:
    target = ProcessTarget(here)
    yield target
    router.apply(here, {})
    for service in target.instances():
        target.stop(service.endpoint.name, 1.0)


def serve(target: ProcessTarget, here: Settings, letter: str, weight: int = 1, **more: Any) -> Endpoint:
    endpoint = target.start(instance(here, letter, **more))
    target.wait_ready(endpoint, 20.0)
    return endpoint.model_copy(update={"weight": weight})


def route(here: Settings, *endpoints: Endpoint) -> None:
    router.apply(here, {"test": {"toy": endpoints}})


def read(here: Settings, *endpoints: Endpoint) -> list[Counters]:
    found = [figures.read(here, "test", "toy", endpoint) for endpoint in endpoints]
    assert None not in found
    return found  # type: ignore[return-value]


def predict(url: str, request_id: str, **row: Any) -> int:
    headers = {"content-type": "application/json", "x-request-id": request_id}
    answer = probe(f"{url}/predict", data=json.dumps({"rows": [row, row]}).encode(), headers=headers)
    assert answer is not None
    return answer.status


@pytest.mark.slow
def test_what_users_asked_is_counted_once_by_the_router_the_service_and_the_log(
    here: Settings, target: ProcessTarget, tmp_path: Path
) -> None:
    endpoints = []
    for letter, weight, percent in (("a", 2.0, 25), ("b", 3.0, 75)):
        folder = write_release(tmp_path / letter, f"toy-{letter * 12}", weight)
        real = {"argv": (), "python": sys.executable, "variables": {"PYTHONPATH": str(ROOT)}}
        endpoints.append(serve(target, here, letter, percent, release=folder, **real))
    route(here, *endpoints)
    url = f"{here.router_url('test')}/toy"
    usual = [predict(url, f"past-{x}", x=x / 100, y=0.5) for x in range(100)]
    assert set(usual) == {200}

    began = datetime.now(UTC)
    time.sleep(0.05)
    before = read(here, *endpoints)
    assert predict(f"http://127.0.0.1:{endpoints[0].port}", proof.CHECK_REQUEST_ID, x=1, y=1) == 200
    statuses = [predict(url, f"user-{x}", x=x / 100, y=0.5) for x in range(200)]
    statuses += [predict(url, f"wrong-{n}", y="no number") for n in range(10)]
    assert [probe(f"{url}/metadata").status for _ in range(7)] == [200] * 7  # type: ignore[union-attr]
    after = read(here, *endpoints)

    store = open_store(here.store)

    def logged() -> list[Recent]:
        return [
            predictions.recent(here.root / "spool", store, "test", "toy", endpoint.release_id, began)
            for endpoint in endpoints
        ]

    both = until(
        lambda: (found := logged()) and sum(len(each.rows) for each in found) >= 400 and found, 5, "rows"
    )
    past = predictions.recent(
        here.root / "spool", store, "test", "toy", endpoints[1].release_id, began - timedelta(hours=1), began
    )
    baseline = figures.baseline(before[1], past)
    look = figures.look(before, after, baseline, both)
    arms = look.candidate, look.active
    assert sum(arm.requests for arm in arms) == 217
    assert [statuses.count(code) for code in (200, 422)] == [200, 10] or statuses.count(400) == 10
    assert sum(arm.errors for arm in arms) == look.retries == 0
    assert sum(arm.timed or 0 for arm in arms) == 211  # and our own check
    assert sum(arm.refused for arm in arms) == 10
    assert sorted(np.concatenate([each.request_ids for each in both])) == sorted(
        2 * [f"user-{x}" for x in range(200)]
    )
    assert [sum(arm.predictions) for arm in arms] == [len(each.rows) // 2 for each in both]
    assert all(sum(arm.predictions) > 20 for arm in arms)
    assert baseline.latency_seconds and len(look.active.slow) == len(baseline.latency_seconds)
    assert len(look.active.predictions) == baseline.bins == 13


@pytest.mark.slow
def test_each_failure_is_an_error_of_the_release_that_failed(here: Settings, target: ProcessTarget) -> None:
    good, bad = serve(target, here, "a"), serve(target, here, "b")
    url = f"{here.router_url('test')}/toy/predict"
    route(here, bad)
    before = read(here, bad, good)
    said = [call(url, {"status": status})[0] for status in (200, 500, 500, 404)]
    assert said == [200, 500, 500, 404]
    look = figures.look(before, read(here, bad, good), NOTHING)
    assert (look.candidate.requests, look.candidate.errors, look.active.requests) == (4, 2, 0)

    route(here, bad, good)
    before = read(here, bad, good)
    with ThreadPoolExecutor(20) as users:
        asked = [users.submit(call, url, {"seconds": 1.0}) for _ in range(20)]
        time.sleep(0.5)
        (process,) = (r for r in target.instances() if r.endpoint.name == bad.name)
        os.kill(process.pid, signal.SIGKILL)  # with requests under way
        assert {answer.result()[0] for answer in asked} == {200}
    look = figures.look(before, read(here, bad, good), NOTHING)
    assert 1 <= look.candidate.errors == look.retries == look.rescued
    assert look.active.requests == 20 and not look.active.errors

    target.wait_ready(bad, 20.0)
    route(here, bad, good)
    before = read(here, bad, good)
    target.stop(bad.name, 1.0)  # its connections are refused
    assert {call(url, {})[0] for _ in range(20)} == {200}
    look = figures.look(before, read(here, bad, good), NOTHING)
    assert 1 <= look.candidate.errors == look.rescued
    assert look.active.requests == 20 and not look.active.errors


def test_of_an_endpoint_that_nobody_was_sent_to_there_are_zeros(here: Settings) -> None:
    nobody = Endpoint(host="127.0.0.1", port=1, release_id="toy-aaaaaaaaaaaa")
    assert figures.read(here, "test", "toy", nobody) == Counters()


def test_without_the_router_nothing_is_known(tmp_path: Path) -> None:
    nobody = Endpoint(host="127.0.0.1", port=1, release_id="toy-aaaaaaaaaaaa")
    assert figures.read(own_settings(tmp_path), "test", "toy", nobody) is None
    counted = Counters(requests=100, errors=100)
    look = figures.look([None, counted], [counted, None], NOTHING)
    assert look.candidate == look.active == Arm(requests=0, errors=0)


def test_the_routes_are_those_that_serving_counts() -> None:
    assert set(figures.PREDICTION_ROUTES) == {metrics.ROUTES[i] for i in (metrics.PREDICT, metrics.INFER)}


def test_what_began_anew_is_counted_from_its_beginning() -> None:
    service = {"told": True, "bounds_seconds": (0.1,), "refused": 2}
    before = Counters(requests=100, errors=7, retries=3, buckets=(90, 10), **service)
    after = Counters(requests=110, errors=2, retries=5, buckets=(95, 11), **service)
    grown = figures.difference(before, after)
    assert (grown.requests, grown.errors, grown.retries) == (110, 2, 2)
    assert (grown.buckets, grown.refused) == ((5, 1), 0)
    restarted = after.model_copy(update={"buckets": (4, 0), "refused": 1})
    assert figures.difference(before, restarted).buckets == (4, 0)
    unknown = figures.difference(Counters(requests=1), after)
    assert (unknown.requests, unknown.told, unknown.buckets) == (109, False, ())
    assert figures.difference(Counters(told=True), after).buckets == (95, 11)
    unasked = figures.arm(Counters(told=True), Counters(told=True, requests=9), NOTHING)
    assert (unasked.timed, unasked.answered) == (0, 0)


def test_thresholds_are_bounds_above_the_median_the_ninth_decile_and_the_last_percent() -> None:
    bounds = (0.001, 0.01, 0.1, 1.0)
    past = Counters(requests=1000, errors=3, told=True, bounds_seconds=bounds, buckets=(600, 350, 45, 5, 0))
    baseline = figures.baseline(past)
    assert (baseline.requests, baseline.errors) == (1000, 3)
    assert baseline.latency_seconds == (0.001, 0.01, 0.1)
    assert baseline.slow_shares == (0.4, 0.05, 0.005)
    even = figures.baseline(past.model_copy(update={"buckets": (0, 1000, 0, 0, 0)}))
    assert (even.latency_seconds, even.slow_shares) == ((0.01,), (0.0,))
    assert figures.baseline(past.model_copy(update={"buckets": (3, 0, 0, 0, 0)})).latency_seconds == ()
    assert figures.baseline(None) == Baseline()

    now = past.model_copy(update={"requests": 1010, "buckets": (601, 352, 46, 6, 5)})
    arm = figures.arm(past, now, baseline)
    assert (arm.timed, arm.slow) == (10, (9, 7, 6))


def recent(*values: float, rows: list[int] | None = None) -> Recent:
    n = len(values)
    ids = np.array([str(i) for i in range(n)], dtype=object)
    times = np.zeros(n, dtype="datetime64[us]")
    return Recent(ids, np.array(rows or [0] * n, dtype=np.int32), times, np.array(values))


def test_predictions_are_counted_once_a_request_beside_the_past_s_deciles() -> None:
    baseline = figures.baseline(None, recent(*np.linspace(0, 1, 101)))
    assert len(baseline.prediction_edges) == 11
    counts = figures.bin_counts(recent(0.0, 0.05, 0.95, 1.0, 7.0, -1.0, math.nan, math.inf), baseline)
    assert counts == (1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 1)
    assert sum(figures.bin_counts(recent(0.1, 0.1, 0.1, rows=[0, 1, 2]), baseline)) == 1


def test_a_constant_and_two_classes_have_bins_too() -> None:
    constant = figures.baseline(None, recent(*[0.5] * 50))
    assert figures.bin_counts(recent(0.4, 0.5, 0.5, 0.6), constant) == (1, 2, 1, 0)
    classes = figures.baseline(None, recent(*[0.0, 1.0] * 50))
    counts = figures.bin_counts(recent(0.0, 0.0, 1.0, 2.0, math.nan), classes)
    assert [count for count in counts if count] == [2, 1, 1, 1]


def test_without_a_past_predictions_are_not_compared() -> None:
    for few in (None, recent(), recent(0.1, 0.2), recent(*[math.nan] * 100)):
        baseline = figures.baseline(None, few)
        assert baseline.bins == 0
        assert figures.bin_counts(recent(0.5), baseline) == ()
