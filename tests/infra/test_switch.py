"""Switches as the journal decides them, on the real router and target, under load and after accidents."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from perennial import leases, rollout, router
from perennial.errors import RolloutError
from perennial.journal import Journal, open_journal
from perennial.reconcile import reconcile
from perennial.settings import Settings
from perennial.supervision import Supervisor
from perennial.targets import ProcessTarget
from perennial.values import Endpoint, Release
from tests.installations import ROOT, call, instance, load, own_settings, running, until
from tests.releases import a_release

RATE = 250  # requests per second


class World:
    """One installation and its journal."""

    def __init__(self, here: Settings, database: Path) -> None:
        self.here = here
        self.database = f"sqlite:///{database}"
        self.journal: Journal = open_journal(self.database)
        self.target = ProcessTarget(here)

    def start(self, letter: str, *options: str, project: str = "toy") -> Release:
        """A release whose candidate is ready."""
        release = a_release(release_id=f"{project}-{letter * 12}", project=project)
        self.journal.enable_project(project, "/repository")
        self.journal.record_release(release)
        self.target.wait_ready(
            self.target.start(instance(self.here, letter, *options, project=project)), 20.0
        )
        return release

    def switch(self, release: Release) -> None:
        rollout.switch(self.here, self.journal, self.target, release, "test")

    def deploy(self, letter: str, *options: str, project: str = "toy") -> str:
        release = self.start(letter, *options, project=project)
        self.switch(release)
        rollout.retire(self.here, self.journal, self.target, project, "test")
        leases.let_go()
        return release.release_id

    def url(self, project: str = "toy") -> str:
        return f"{self.here.router_url('test')}/{project}/predict"

    def ask(self, project: str = "toy") -> Any:
        status, answer, _ = call(self.url(project), {})
        return answer["release_id"] if status == 200 else (status, list(answer))

    def endpoint(self, release_id: str) -> Endpoint:
        found = {r.endpoint.release_id: r.endpoint for r in self.target.instances()}
        return found[release_id]

    def running(self) -> set[str]:
        return {r.endpoint.release_id for r in self.target.instances()}


@pytest.fixture(scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with running(own_settings(tmp_path_factory.mktemp("switch") / "home"), ["envoy"]) as here:
        yield here


@pytest.fixture
def world(_running: Settings, tmp_path: Path) -> Iterator[World]:
    world = World(_running, tmp_path / "journal.db")
    yield world
    leases.let_go()
    router.apply(_running, {})
    for service in world.target.instances():
        world.target.stop(service.endpoint.name, 1.0)


@pytest.mark.slow
def test_three_deployments_and_a_rollback_under_load_lose_no_request(world: World, tmp_path: Path) -> None:
    releases = [world.deploy("a")]
    with load(world.url(), RATE, tmp_path / "body") as outcome:
        for letter in "bcda":
            time.sleep(1.0)
            releases.append(world.deploy(letter))
        time.sleep(1.0)
    assert outcome["failures"] == [], outcome["failures"][:5]
    assert set(outcome["releases"]) == set(releases)
    assert outcome["requests"] / outcome["seconds"] >= 200, outcome
    assert world.running() == {releases[-1]}
    print({name: outcome[name] for name in ("requests", "seconds", "releases", "slowest_seconds")})


def test_a_release_that_is_down_can_be_replaced(world: World) -> None:
    """When the active release has died for good is when a deployment matters most."""
    old = world.deploy("a")
    Supervisor(world.here).stop(world.endpoint(old).name)
    until(lambda: world.ask() == (503, ["error"]), 10, "the outage")
    began = time.monotonic()
    new = world.deploy("b")
    assert time.monotonic() - began < 10
    assert world.ask() == new
    assert world.running() == {new}


def test_another_service_that_is_down_does_not_stand_in_the_way(world: World) -> None:
    other = world.deploy("c", project="other")
    first = world.deploy("a")
    Supervisor(world.here).stop(world.endpoint(other).name)
    until(lambda: world.ask("other") == (503, ["error"]), 10, "the outage")
    began = time.monotonic()
    second = world.deploy("b")
    assert time.monotonic() - began < 10
    assert (first != second) and world.ask() == second
    reconcile(world.here, world.journal, world.target)
    assert world.ask() == second


def test_a_candidate_that_died_since_it_was_proven_is_not_switched_to(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "apply", partial(router.apply, timeout_seconds=2.0))
    old = world.deploy("a")
    candidate = world.start("b")
    name = world.endpoint(candidate.release_id).name
    Supervisor(world.here).stop(name)
    until(lambda: (found := Supervisor(world.here).process(name)) and found.is_down, 10, "its end")
    with pytest.raises(RolloutError, match="is not healthy"):
        world.switch(candidate)
    assert world.journal.active("toy", "test") == old
    assert {world.ask() for _ in range(10)} == {old}
    reconcile(world.here, world.journal, world.target)
    assert world.running() == {old}


def test_two_services_deployed_at_once_do_not_undo_one_another(world: World) -> None:
    for project in ("toy", "other"):
        world.deploy("a", project=project)
    for letter in "bc":
        releases = [world.start(letter, project=project) for project in ("toy", "other")]
        together = threading.Barrier(2)

        def switch(release: Release, together: threading.Barrier = together) -> None:
            together.wait()
            world.switch(release)
            rollout.retire(world.here, world.journal, world.target, release.project, "test")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(switch, releases))
        for release in releases:
            assert {world.ask(release.project) for _ in range(5)} == {release.release_id}
    assert len(world.running()) == 2


@pytest.mark.parametrize("written", ["before the decision", "after the decision"])
def test_a_switch_that_was_killed_is_finished_or_undone_by_reconciling(world: World, written: str) -> None:
    """Killed with both releases in the router: the journal says which one it is."""
    old = world.deploy("a")
    new = world.start("b").release_id
    both = [world.endpoint(old), world.endpoint(new)]
    router.apply(world.here, {"test": {"toy": both}})
    if written == "after the decision":
        world.journal.decide(project="toy", environment="test", kind="promoted", release_id=new)
    reconcile(world.here, world.journal, world.target)
    wanted = new if written == "after the decision" else old
    assert {world.ask() for _ in range(10)} == {wanted}
    assert world.running() == {wanted}


def test_a_second_process_waits_for_the_rollout_and_is_told_when_it_takes_too_long(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import time\nfrom perennial import leases\nfrom perennial.journal import open_journal\n"
        f"journal = open_journal({world.database!r})\n"
        "leases.hold(journal, 'toy', 'test', 'a deploy of somebody else')\n"
        "print('held', flush=True)\ntime.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    release = world.start("c")
    monkeypatch.setattr(leases, "_WAIT_SECONDS", 1.0)
    said = f"another rollout of toy to test .* a deploy of somebody else .process {other.pid} on"
    with pytest.raises(RolloutError, match=said):
        world.switch(release)
    other.kill()  # a dead process holds nothing, whatever its lease says
    other.wait()
    other.stdout.close()
    world.switch(release)
    assert world.ask() == release.release_id
    leases.let_go()
