"""Releases that do harm, each in its own way, and what users see of them: the old one's good answers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from perennial import probation
from perennial.errors import RolloutError
from perennial.service_state import state_in
from perennial.values import Release
from tests.infra import chaos
from tests.infra.chaos import BLUE_GREEN, CANARY, World
from tests.installations import own_settings, running, until

RATE = 400  # requests per second
SHADOW = CANARY | {"strategy": "shadow", "steps": (99,)}
PATIENT = {"max_wait_seconds": 120.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(own_settings(tmp_path_factory.mktemp("bad") / "home"), ["envoy"]) as here:
        world = World(here)
        assert world.deploy(world.release("--log")) == "promoted"
        yield world


@pytest.fixture
def old(world: World) -> str:
    """The release that serves, alone."""
    assert world.disagreements() == []
    active = world.active()
    assert active is not None and list(world.instances()) == [active]
    return active


def withdrawn(world: World, bad: Release, old: str) -> str:
    """Whether nothing is left of it, and the journal says why: the reason."""
    assert world.active() == old and list(world.instances()) == [old]
    assert world.disagreements() == []
    last = world.journal.decisions(world.project, "test")[-1]
    assert (last.kind, last.release_id) == ("withdrawn", bad.release_id)
    return str(last.payload["reason"])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [("errors", "errors: "), ("slow", "slower than "), ("dies", r"errors: |its process died|does not run")],
)
def test_one_that_turns_bad_under_its_share_of_the_traffic_is_withdrawn(
    world: World, old: str, turns: str, reason: str
) -> None:
    bad = world.release("--turns", turns, "--after", "10", **CANARY | PATIENT)
    with chaos.load(world, RATE) as load:
        with pytest.raises(RolloutError, match=reason):
            world.deploy(bad)
        came = load.since()
    assert came["failures"] == []
    assert came["releases"][old] > came["releases"].get(bad.release_id, 0)
    assert withdrawn(world, bad, old)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--log", "--turns", "constant"), "predictions (in|up to|above) .*|fails parity"),
        (("--turns", "misshapen"), "answers its golden rows with 16 predictions"),
    ],
    ids=["constant", "misshapen"],
)
def test_one_whose_answers_turn_wrong_is_withdrawn_by_its_shadow_and_no_user_saw_them(
    world: World, old: str, options: tuple[str, ...], reason: str
) -> None:
    bad = world.release(*options, "--after", "100", **SHADOW | PATIENT)
    with chaos.load(world, RATE) as load:
        with pytest.raises(RolloutError, match=reason):
            world.deploy(bad)
        came = load.since()
    assert came["failures"] == []
    assert set(came["releases"]) == {old}
    assert withdrawn(world, bad, old)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--turns", "errors"), "answers its golden rows with 500"),
        (("--turns", "constant"), "fails parity on 7 of 8 golden rows"),
        (("--turns", "misshapen"), "answers its golden rows with 16 predictions"),
        (("--turns", "dies"), "does not answer"),
        (("--never-ready",), "was not ready within 1 s"),
        (("--dies", "no such file"), "died before it was ready"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_one_that_is_bad_from_the_first_gets_no_traffic(
    world: World, old: str, options: tuple[str, ...], reason: str
) -> None:
    bad = world.release(*options, ready_seconds=1.0 if "--never-ready" in options else 20.0, **CANARY)
    with chaos.load(world, RATE) as load:
        with pytest.raises(RolloutError, match=reason):
            world.deploy(bad)
        came = load.since()
    assert came["failures"] == []
    assert set(came["releases"]) == {old}
    assert reason in withdrawn(world, bad, old)


def test_one_that_nobody_asks_is_never_promoted(world: World, old: str) -> None:
    waiting = world.release(**CANARY | {"max_wait_seconds": 0.5, "approval_hours": 2 / 3600})
    assert world.deploy(waiting) == "insufficient evidence"
    asked = world.journal.decisions(world.project, "test")[-1]
    assert asked.kind == "asked" and "no user has asked the candidate" in asked.payload["reason"]
    assert world.reconcile() == [], "it waits for a person"
    assert set(world.routed()) == {old} and set(world.instances()) == {old, waiting.release_id}
    expires = datetime.fromisoformat(asked.payload["expires_at"])
    until(lambda: datetime.now(UTC) > expires, 10, "the end of its time")
    world.reconcile()
    assert withdrawn(world, waiting, old) == "nobody decided in time"


def test_a_good_one_is_promoted_and_one_that_breaks_in_its_probation_goes_back(
    world: World, old: str
) -> None:
    good = world.release("--log", **CANARY | PATIENT)
    with chaos.load(world, RATE) as load:
        assert world.deploy(good) == "promoted"
        came = load.since()
        assert came["failures"] == [] and set(came["releases"]) == {old, good.release_id}
        breaks = world.release(
            "--turns", "errors", "--after", "300", **BLUE_GREEN | {"probation_seconds": 300.0}
        )
        assert world.deploy(breaks) == "promoted"
        assert set(world.instances()) == {good.release_id, breaks.release_id}, "the last good one stays warm"
        [said] = until(lambda: look(world), 30, "the end of its probation")
        load.since()
        assert world.ask() == good.release_id
        assert load.since()["failures"] == []
    assert f"{breaks.release_id} was taken back from test in its probation" in said
    state = state_in(world.journal, world.project, "test")
    assert (state.active, state.promotion["rollback_of"]) == (good.release_id, breaks.release_id)
    assert world.disagreements() == []


def look(world: World) -> list[str]:
    return probation.check(world.here, world.journal, world.target, world.store, {})
