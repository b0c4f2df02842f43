"""Interleavings, sleepers and half-done rollouts, on the real router and target."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perennial import analysis, leases, probation, reconcile, rollout, router, verdicts
from perennial.errors import PerennialError, ReleaseError, RolloutError
from perennial.journal import open_journal
from perennial.values import Release, Rollout
from tests.infra import chaos
from tests.infra.chaos import AT_ONCE, BLUE_GREEN, World
from tests.installations import call, own_settings, running, until

CANARY = {"strategy": "canary", "probation_seconds": 300.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(own_settings(tmp_path_factory.mktemp("review") / "home"), ["envoy"]) as here:
        world = World(here)
        yield world
        world.stop()


@pytest.fixture
def old(world: World) -> Iterator[Release]:
    """The release that serves when a test begins."""
    release = world.release(**AT_ONCE)
    assert world.deploy(release) == "promoted"
    yield release
    leases.let_go()
    world.reconcile()


def decide(world: World, kind: Any, release: Release, **payload: Any) -> None:
    world.journal.decide(
        project=world.project,
        environment="test",
        kind=kind,
        release_id=release.release_id,
        payload=payload,
    )


def start(world: World, release: Release) -> None:
    folder = world.here.root / "releases" / release.release_id
    rollout.start(world.here, world.journal, world.target, release, "test", folder, {})


def begin(world: World, release: Release, percent: int) -> None:
    """A rollout that was killed in the middle of its step."""
    folder = chaos.driver.releases.materialise(world.store, release, world.here.root / "releases")
    rollout.start(world.here, world.journal, world.target, release, "test", folder, {})
    decide(world, "step", release, percent=percent)
    with router.alone(world.here):
        reconcile.route(
            world.here, world.journal, world.target, healthy=[("test", world.project, release.release_id)]
        )
    leases.let_go()


def back(world: World, to: Release | None = None) -> Rollout:
    return rollout.roll_back(
        world.here,
        world.journal,
        world.target,
        world.store,
        world.project,
        "test",
        to.release_id if to else None,
        variables={},
    )


@pytest.mark.parametrize("sleeps", [False, True], ids=["slow", "asleep"])
def test_who_stops_what_has_no_role_does_not_stop_what_got_one_meanwhile(
    world: World, old: Release, monkeypatch: pytest.MonkeyPatch, sleeps: bool
) -> None:
    """One instance drains for longer than a lease lasts; the one that is to be stopped next is deployed."""
    drains, next_one = world.release(**AT_ONCE), world.release(**AT_ONCE)
    for release in (drains, next_one):
        begin(world, release, 1)
    decide(world, "withdrawn", next_one)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(leases, "_RENEW_SECONDS", 0.1)
    if sleeps:
        monkeypatch.setattr(leases, "_renew", lambda held: None)
    port = world.instances()[drains.release_id].endpoint.port
    slow = threading.Thread(target=call, args=(f"http://127.0.0.1:{port}/predict", {"seconds": 2}))
    slow.start()
    sweeper = threading.Thread(target=world.reconcile)
    sweeper.start()
    until(lambda: world.instances()[drains.release_id].state == "STOPPING", 10, "the drain")
    assert world.deploy(next_one) == "promoted"
    for thread in (slow, sweeper):
        thread.join()
    assert world.settled() == []
    assert world.ask() == next_one.release_id


def test_what_was_rolled_back_from_gets_no_request_and_no_trust(world: World, old: Release) -> None:
    good, bad = world.release(**BLUE_GREEN), world.release(**BLUE_GREEN | CANARY)
    world.deploy(good)
    rollout_of_bad = rollout.policy_of(world.journal, bad, "test")
    begin(world, bad, 0)
    rollout.switch(world.here, world.journal, world.target, bad, "test")
    leases.let_go()
    assert back(world).active == good.release_id
    assert set(world.routed()) == {good.release_id}, "not even while the good one is down"
    assert rollout.policy_of(world.journal, bad, "test") == rollout_of_bad
    assert rollout.policy_of(world.journal, good, "test").strategy == "blue-green"
    assert world.disagreements() == []
    assert back(world, bad).active == bad.release_id, "by name, it may lead forward"


def test_a_deploy_of_what_serves_ends_a_rollout_that_died(world: World, old: Release) -> None:
    begin(world, world.release(**AT_ONCE), 50)
    assert world.deploy(old) == "promoted"
    assert world.disagreements() == []


def test_a_release_that_is_gone_is_not_promoted(
    world: World, old: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = world.release(**AT_ONCE)
    begin(world, new, 0)
    stand_by = rollout._stand_by

    def and_gone(*arguments: Any) -> None:  # somebody removes it at the worst moment
        world.target.stop(world.instances()[new.release_id].endpoint.name, 0.0)
        stand_by(*arguments)

    monkeypatch.setattr(rollout, "_stand_by", and_gone)
    begin_again = chaos.driver.releases.materialise(world.store, new, world.here.root / "releases")
    rollout.start(world.here, world.journal, world.target, new, "test", begin_again, {})
    with pytest.raises(RolloutError, match="does not run"):
        rollout.switch(world.here, world.journal, world.target, new, "test")
    assert world.disagreements() == []


def test_a_verdict_that_waited_for_another_rollout_is_given_on_what_is_there_then(
    world: World, old: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = world.release(**AT_ONCE)
    begin(world, asked, 50)
    decide(world, "asked", asked, reason="no traffic", expires_at="2999-01-01T00:00:00+00:00")
    acquire = world.journal.acquire

    def late(*arguments: Any) -> Any:  # another rollout, which began before, and dies
        decide(world, "candidate", world.release(**AT_ONCE))
        return acquire(*arguments)

    monkeypatch.setattr(world.journal, "acquire", late)
    with pytest.raises(ReleaseError, match="nobody is asked"):
        verdicts.decide(world.here, world.journal, world.target, asked, "test", "promote", "Ada")
    assert world.active() == old.release_id
    monkeypatch.undo()
    world.reconcile()
    assert world.disagreements() == []


class Probation:
    """A release on probation that breaks at every look, and the one before it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.good, self.bad = world.release(**AT_ONCE), world.release(**AT_ONCE)
        world.deploy(self.good)
        world.deploy(self.bad)
        decide(world, "promoted", self.good)
        decide(world, "promoted", self.bad, probation_seconds=300)

    def check(self) -> list[str]:
        here = self.world
        return probation.check(here.here, here.journal, here.target, here.store, {})


@pytest.fixture
def on_probation(world: World, monkeypatch: pytest.MonkeyPatch) -> Probation:
    monkeypatch.setattr(probation, "broken", lambda *counts: "it fails")
    return Probation(world)


def test_two_who_take_back_the_same_release_do_not_bring_it_back(
    on_probation: Probation, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = on_probation.world
    look = probation._look

    def slow(*arguments: Any) -> Any:  # the other one is done while this one still looks
        found = look(*arguments)
        if world.active() == on_probation.bad.release_id:
            back(world)
        return found

    monkeypatch.setattr(probation, "_look", slow)
    assert on_probation.check() == []
    assert world.active() == on_probation.good.release_id
    assert world.settled() == []


def test_without_a_way_back_the_harm_is_named_and_the_others_are_looked_at(
    on_probation: Probation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: Any, **more: Any) -> Any:
        raise ReleaseError("its artifact is gone")

    with monkeypatch.context() as patch:
        patch.setattr(rollout.releases, "materialise", gone)
        [said] = on_probation.check()
    assert "it fails" in said and "its artifact is gone" in said
    assert on_probation.world.active() == on_probation.bad.release_id


def test_a_process_that_is_coming_back_is_not_taken_back(
    world: World, old: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_probation = Probation(world)
    looks = iter(["EXITED", "RUNNING", "RUNNING", "RUNNING"])
    really = world.target.instances

    def instances() -> Any:
        state = next(looks, "RUNNING")
        return tuple(i.model_copy(update={"state": state}) for i in really())

    monkeypatch.setattr(probation, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(world.target, "instances", instances)
    assert on_probation.check() == []
    assert world.active() == on_probation.bad.release_id


def test_a_deploy_that_lost_its_lease_says_so(world: World, old: Release) -> None:
    new = world.release(**AT_ONCE)
    begin(world, new, 0)
    lease = leases.hold(world.journal, world.project, "test")
    world.journal.give_back(lease)
    with pytest.raises(PerennialError, match="lost its lease"):
        rollout.prove(
            world.here,
            world.journal,
            world.target,
            new,
            "test",
            world.instances()[old.release_id].endpoint,
            world.here.root / "releases" / new.release_id,
        )


def test_what_should_serve_and_is_gone_is_started_from_the_store(world: World, old: Release) -> None:
    world.target.stop(world.instances()[old.release_id].endpoint.name, 0.0)
    assert world.reconcile() == [] and world.instances() == {}, "nothing is left that could be revived"
    args = (world.here, world.journal, world.target, world.store, {})
    assert rollout.restore(*args) == [f"started {old.release_id} in test anew: it was gone"]
    assert world.ask() == old.release_id and world.disagreements() == []
    assert rollout.restore(*args) == []


def test_a_shadow_whose_predictions_nobody_logs_is_asked_its_golden_rows_at_the_end(
    world: World, old: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "_PROOF_SECONDS", 60.0)  # it turns between two proofs
    bad = world.release(
        "--turns", "constant", "--after", "20", strategy="shadow", steps=(99,), bake_seconds=0.4
    )
    with chaos.load(world, 600), pytest.raises(RolloutError, match="fails parity"):
        world.deploy(bad)
    assert world.active() == old.release_id


def test_with_another_journal_nothing_is_stopped(world: World, old: Release, tmp_path: Path) -> None:
    """PERENNIAL_DATABASE_URL is easily forgotten."""
    other = open_journal(f"sqlite:///{tmp_path / 'other.db'}")
    reconcile.reconcile(world.here, other, world.target)
    assert set(world.instances()) == {old.release_id}
    world.reconcile()
    assert world.disagreements() == []


def test_a_candidate_that_has_turned_while_it_waited_for_a_person_is_not_promoted(
    world: World, old: Release
) -> None:
    turned = world.release("--turns", "constant", **AT_ONCE)
    begin(world, turned, 50)
    decide(world, "asked", turned, reason="no traffic", expires_at="2999-01-01T00:00:00+00:00")
    with pytest.raises(RolloutError, match="fails parity"):
        verdicts.decide(world.here, world.journal, world.target, turned, "test", "promote", "Ada")
    assert world.active() == old.release_id
    assert world.disagreements() == []
