"""What nothing needs goes, on a real router and real processes; what is needed, or just asked for, stays."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from perennial import caches, leases, leftovers, reaper, releases, rollout, router, strays
from perennial.__main__ import main
from perennial.journal import Holder, Journal, open_journal, started_at
from perennial.service_state import state_in
from perennial.settings import Settings, settings
from perennial.store import open_store
from perennial.targets import ProcessTarget
from perennial.values import Release
from tests.installations import call, instance, own_settings, running, until
from tests.releases import a_release, a_stored_release

DAY = 86_400.0
A, B, C = ("toy-" + letter * 12 for letter in "abc")


class World:
    """One installation and its journal."""

    def __init__(self, here: Settings) -> None:
        self.here = here
        self.journal: Journal = open_journal(here.database)
        self.journal.enable_project("toy", "/repository")
        self.target = ProcessTarget(here)

    def start(self, letter: str, *options: str) -> Release:
        release = a_release(release_id=f"toy-{letter * 12}")
        self.journal.record_release(release)
        self.target.wait_ready(self.target.start(instance(self.here, letter, *options)), 20.0)
        return release

    def deploy(self, letter: str, **policy: Any) -> str:
        release = self.start(letter)
        wanted = release.rollout.test.model_copy(update={"strategy": "blue-green", **policy})
        rollout.switch(self.here, self.journal, self.target, release, "test", wanted)
        leases.let_go()
        return release.release_id

    def decide(self, kind: Any, release_id: str, **payload: Any) -> None:
        self.journal.decide(
            project="toy", environment="test", kind=kind, release_id=release_id, payload=payload
        )

    def reap(self, *, dry_run: bool = False) -> list[tuple[str, str]]:
        """kind and name"""
        found = reaper.reap(self.here, self.journal, self.target, dry_run=dry_run)
        return [(one.kind, one.name) for one in found]

    def running(self) -> set[str]:
        return {service.endpoint.release_id for service in self.target.instances()}

    def ask(self) -> Any:
        return call(f"{self.here.router_url('test')}/toy/predict", {})[1]["release_id"]


@pytest.fixture(scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with running(own_settings(tmp_path_factory.mktemp("reaper") / "home"), ["envoy"]) as here:
        yield here


@pytest.fixture
def world(_running: Settings, tmp_path: Path) -> Iterator[World]:
    here = _running.model_copy(update={"database_url": f"sqlite:///{tmp_path / 'journal.db'}"})
    world = World(here)
    yield world
    leases.let_go()
    router.apply(here, {})
    for service in world.target.instances():
        world.target.stop(service.endpoint.name, 1.0)


def test_an_instance_without_a_role_is_listed_first_and_removed_when_told(world: World) -> None:
    world.deploy("a")
    world.start("b")
    listed = world.reap(dry_run=True)
    assert listed == [("instance", f"svc-test-{B}")]
    assert world.running() == {A, B}, "a dry run removes nothing"
    assert world.reap() == listed
    assert world.running() == {A} and world.ask() == A
    assert world.reap() == []


def test_what_a_living_rollout_has_started_is_its_own_business(world: World) -> None:
    world.deploy("a")
    world.start("b")
    with subprocess.Popen(["sleep", "60"]) as other:
        here = leases.myself("").host
        holder = Holder(host=here, pid=other.pid, started=started_at(other.pid), what="deploy toy")
        world.journal.acquire("toy", "test", holder, 30.0)
        assert world.reap() == [] and world.running() == {A, B}
        other.kill()
    assert world.reap() == [("instance", f"svc-test-{B}")], "nor does a dead one keep it"


def test_a_warm_release_goes_when_its_time_is_over(world: World) -> None:
    world.deploy("a")
    world.deploy("b", keep_warm_seconds=1.5)
    assert world.reap() == [] and world.running() == {A, B}
    until(lambda: world.reap() == [("instance", f"svc-test-{A}")], 10, "the end of its time")
    assert world.running() == {B} and world.ask() == B


def test_a_candidate_nobody_decided_about_is_withdrawn_and_then_stopped(world: World) -> None:
    world.deploy("a")
    world.start("b")
    world.decide("candidate", B)
    world.decide("asked", B, reason="12 requests", expires_at=_in(3600))
    assert world.reap() == [], "there is still time to decide"
    world.decide("asked", B, reason="12 requests", expires_at=_in(-60))
    both = [("candidate", f"{B} in test"), ("instance", f"svc-test-{B}")]
    assert world.reap(dry_run=True) == both
    assert state_in(world.journal, "toy", "test").candidate == B
    assert world.reap() == both
    last = world.journal.decisions("toy", "test")[-1]
    assert (last.kind, last.release_id) == ("withdrawn", B)
    assert last.payload["reason"] == "nobody decided in time: 12 requests"
    assert world.running() == {A} and world.ask() == A


def test_orphans_are_found_by_parent_or_mark_and_runs_and_strangers_are_left(world: World) -> None:
    here = world.here
    world.start("a", "--leaves-child")
    world.target.stop(f"svc-test-{A}", 5.0)
    with _started(leftovers.MARK, str(here.root)) as old, _started("X", "1") as stranger:
        run = {leftovers.MARK: str(here.root), "PREFECT__FLOW_RUN_ID": "1"}
        with _started(**run) as flow_run, _started(leftovers.MARK, f"{here.root}2") as neighbour:
            found = {stray.pid: stray for stray in strays.strays(here, settled_seconds=0.0)}
            (adopted,) = found.keys() - {old}
            assert found[adopted].command == "sleep 3600"
            assert found[adopted].why == "whoever started it has ended"
            assert found[old].why == "its supervisord has ended"
            assert list(strays.strays(here)) == [], "what is that young may be about to be known"
            assert all(stray.end() for stray in found.values())
            assert not leftovers.is_alive(adopted) and not leftovers.is_alive(old)
            assert all(leftovers.is_alive(pid) for pid in (stranger, flow_run, neighbour))
            assert all(stray.end() for stray in found.values()), "one that is gone is no error"


def test_without_supervisord_no_process_is_an_orphan(tmp_path: Path) -> None:
    here = own_settings(tmp_path)
    with _started(leftovers.MARK, str(here.root)):
        assert list(strays.strays(here, settled_seconds=0.0)) == []


class Caches:
    """Folders of releases as a machine that has run for long has them."""

    def __init__(self, world: World) -> None:
        self.world, self.root = world, world.here.root
        self.releases = [self.release(letter, number) for number, letter in enumerate("abcde")]

    def release(self, letter: str, number: int) -> Release:
        """`letter` names all it is made of."""
        plain = a_release()
        release = a_release(
            release_id=f"toy-{letter * 12}",
            source=plain.source.model_copy(update={"git_sha": letter * 40}),
            dataset=plain.dataset.model_copy(update={"fingerprint": letter * 64}),
            environment=plain.environment.model_copy(update={"fingerprint": letter * 64}),
            created_at=datetime(2024, 6, 1 + number, tzinfo=UTC),
        )
        self.world.journal.record_release(release)
        for name in self.names(letter):
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                path.write_bytes(b"x" * 1000)
            else:
                (path / "deep").mkdir(parents=True)
                (path / "deep" / "file").write_bytes(b"x" * 2**20)
        self.age()
        return release

    def names(self, letter: str) -> list[str]:
        return [
            f"releases/toy-{letter * 12}",
            f"checkouts/toy/{letter * 40}-01234567",
            f"snapshots/{letter * 64}.parquet",
            f"environments/{letter * 16}",
        ]

    def age(self, days: float = 10.0) -> None:
        for path in self.root.glob("[!l]*/**/*"):
            os.utime(path, times=(time.time() - days * DAY,) * 2, follow_symlinks=False)

    def left(self) -> set[str]:
        """The releases of which anything is left."""
        return {letter for letter in "abcde" for name in self.names(letter) if (self.root / name).exists()}


@pytest.fixture
def old(world: World) -> Iterator[Caches]:
    yield Caches(world)
    for name in ("releases", "checkouts", "snapshots", "environments", "work"):
        subprocess.run(["rm", "-rf", str(world.here.root / name)], check=True)


def test_files_of_releases_stay_that_are_new_or_may_serve_again(world: World, old: Caches) -> None:
    world.decide("promoted", A)
    listed = reaper.reap(world.here, world.journal, world.target, dry_run=True)
    assert {one.name for one in listed} == set(old.names("b"))
    assert {one.kind: one.bytes for one in listed} == {
        "release": 2**20,
        "checkout": 2**20,
        "snapshot": 1000,
        "environment": 2**20,
    }
    assert all(one.age_seconds > 9 * DAY for one in listed)
    assert old.left() == set("abcde"), "a dry run removes nothing"
    assert world.reap() == [(one.kind, one.name) for one in listed]
    assert old.left() == set("acde"), "the newest three, and the one that serves"
    assert not list(old.root.glob("*/.reaped-*"))
    assert world.reap() == []


def test_what_was_asked_for_today_stays(world: World, old: Caches) -> None:
    for name in (*old.names("a"), *old.names("b")):
        os.utime(old.root / name)
    assert world.reap() == []
    old.age()
    listed = list(caches.unneeded(old.root, old.releases[1:], ()))
    assert {str(one.path.relative_to(old.root)) for one in listed} == set(old.names("a"))
    os.utime(listed[0].path)  # a deploy begins to use it, between the look and the deed
    assert [unneeded.remove() for unneeded in listed] == [False, True, True, True]


def test_to_ask_for_a_folder_is_to_keep_it(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    release = a_stored_release(store, tmp_path)
    folder = releases.materialise(store, release, tmp_path / "releases")
    os.utime(folder, times=(time.time() - 10 * DAY,) * 2)
    [old] = caches.unneeded(tmp_path, (), ())
    assert releases.materialise(store, release, tmp_path / "releases") == old.path
    assert not old.remove() and list(caches.unneeded(tmp_path, (), ())) == []


def test_what_somebody_is_making_or_rolling_out_stays(world: World, old: Caches) -> None:
    lock = old.root / "environments" / f"{'a' * 16}.lock"
    with lock.open("w") as file, subprocess.Popen(["sleep", "60"]) as other:
        fcntl.flock(file, fcntl.LOCK_EX)
        here = leases.myself("").host
        holder = Holder(host=here, pid=other.pid, started=started_at(other.pid), what="deploy toy")
        world.journal.acquire("toy", "production", holder, 30.0)
        removed = {name for _, name in world.reap()}
        other.kill()
    kept = {f"environments/{'a' * 16}", f"releases/{A}", f"releases/{B}"}
    assert removed == {*old.names("a"), *old.names("b")} - kept
    assert {name for _, name in world.reap()} == kept
    assert lock.exists(), "somebody may be waiting on it"


def test_what_dead_processes_left_half_made_goes_and_nothing_that_is_no_cache(
    world: World, old: Caches
) -> None:
    half = [
        "releases/.materialise-x",
        "checkouts/toy/.new-x",
        "snapshots/.x.part",
        "environments/cache/.fetch-x",
    ]
    ended = ["work/0123", "services/svc-x.1.tmp"]
    stay = ["store/a", "spool/test/toy/rows.arrows", "environments/serving-1/x.whl"]
    for name in (*half, *ended, *stay):
        (old.root / name).parent.mkdir(parents=True, exist_ok=True)
        (old.root / name).write_text("x")
    old.age()
    world.reap()
    assert [name for name in (*half, *ended) if (old.root / name).exists()] == []
    assert [name for name in stay if not (old.root / name).exists()] == []


def test_the_command_lists_and_removes_when_told(
    world: World, old: Caches, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in world.here.as_environment().items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    monkeypatch.setattr("sys.argv", ["perennial"])
    try:
        assert main(["reap"]) == 0
        head, *rows, total, hint = capsys.readouterr().out.splitlines()
        assert head.split() == ["kind", "name", "size", "age", "why"]
        assert len(rows) == 8 and total == "8 things, 6 MiB"
        assert rows[0].split(maxsplit=5)[:4] == ["release", f"releases/{A}", "1.0", "MiB"]
        assert hint == "Next: python -m perennial reap --yes"
        assert main(["reap", "--yes"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "removed 8 things, 6 MiB"
        assert main(["reap"]) == 0
        assert capsys.readouterr().out == "nothing is there that nothing needs\n"
    finally:
        settings.cache_clear()


def _in(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@contextmanager
def _started(variable: str = "", value: str = "", **variables: str) -> Iterator[int]:
    """The id of a process with these variables in its environment, and no other."""
    chosen = variables | ({variable: value} if variable else {})
    with subprocess.Popen(["/usr/bin/sleep", "600"], env=chosen) as process:
        try:
            yield process.pid
        finally:
            process.kill()
