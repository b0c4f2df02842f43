"""Back to the release before: by a command that asks no Prefect, from the UI, in the middle of a rollout."""

from __future__ import annotations

import subprocess
from datetime import timedelta
from typing import Any

import pytest

from perennial import artifacts, leases, reconcile, registry, releases, rollout, router
from perennial.errors import RolloutError
from perennial.journal import Decision
from perennial.service_state import state_in
from perennial.targets import ProcessTarget
from perennial.values import Release
from tests.flows.conftest import MakeProject
from tests.flows.house import House, until

# Whoever asked Prefect or MLflow would find nobody.
AWAY = {"PERENNIAL_PREFECT_PORT": "1", "PERENNIAL_MLFLOW_PORT": "1", "PREFECT_API_URL": "http://127.0.0.1:1"}


class Till:
    """One project whose newest release serves, and its older one did."""

    name = "till"

    def __init__(self, house: House, old: Release, new: Release) -> None:
        self.house, self.old, self.new = house, old, new

    def deploy(self, release: Release) -> None:
        run = self.house.deploy(self.name, release.release_id)
        assert run.kind == "COMPLETED", run.message

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.house.command("-m", "perennial", "rollback", self.name, *arguments, **AWAY)

    def serving(self) -> Any:
        return self.house.ask(self.name)["release_id"]

    def decisions(self) -> list[Decision]:
        return self.house.journal.decisions(self.name, "test")


@pytest.fixture(scope="module")
def till(house: House, enabled: MakeProject, tmp_path_factory: pytest.TempPathFactory) -> Till:
    enabled(Till.name)
    built = house.build(Till.name)
    assert built.kind == "COMPLETED", built.message
    old: Release = built.result
    # The same files under another id: all that a second build of the same model would add.
    changes = {"release_id": f"{Till.name}-{'e' * 12}", "created_at": old.created_at + timedelta(minutes=1)}
    new = releases.write(house.store, house.journal, old.model_copy(update=changes))
    folder = tmp_path_factory.mktemp("model")
    model = artifacts.open_local(house.store, new.model.artifact, folder)
    registry.register(house.settings.mlflow_url, new, model, None)
    till = Till(house, old, new)
    till.deploy(till.old)
    return till


def test_in_the_middle_of_a_rollout_it_ends_the_rollout(house: House, till: Till) -> None:
    here, journal, target = house.settings, house.journal, ProcessTarget(house.settings)
    from tasks import edge

    candidate = rollout.start(
        here, journal, target, till.new, "test", edge.release_folder(till.new), edge.store_environment()
    )
    lease = leases.hold(journal, till.name, "test")
    step = {"project": till.name, "environment": "test", "kind": "step", "release_id": till.new.release_id}
    journal.decide(**step, payload={"percent": 50}, lease=lease)
    with router.alone(here):
        reconcile.route(here, journal, target, healthy=[("test", till.name, candidate.release_id)])
    both = {till.old.release_id, till.new.release_id}
    until(lambda: {till.serving() for _ in range(10)} == both, 10, "the candidate's share")

    done = till.command("--reason", "angry users")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{till.old.release_id} serves till in test still")
    assert {till.serving() for _ in range(20)} == {till.old.release_id}
    assert house.instances(till.name) == {till.old.release_id: "RUNNING"}
    last = till.decisions()[-1]
    assert (last.kind, last.release_id) == ("withdrawn", till.new.release_id)
    assert last.payload["reason"] == "rolled back: angry users"
    with pytest.raises(RolloutError, match="has lost its lease"):  # the rollout that was ended learns of it
        journal.decide(**step, payload={"percent": 90}, lease=lease)
    assert state_in(journal, till.name, "test").candidate is None
    leases.let_go()


@pytest.fixture
def new_serves(till: Till) -> None:
    till.deploy(till.new)


def test_one_command_goes_back_under_load_while_prefect_and_mlflow_are_away(
    house: House, till: Till, new_serves: None
) -> None:
    with house.load(till.name, rate=100) as load:
        done = till.command("--reason", "it says too much")
    assert done.returncode == 0, done.stderr
    url = house.url(till.name)
    said = f"{till.old.release_id} serves till in test instead of {till.new.release_id}: {url}\n"
    assert done.stdout == said
    assert load.all_answered_by(till.new.release_id, till.old.release_id)
    assert till.serving() == till.old.release_id
    promoted = [decision for decision in till.decisions() if decision.kind == "promoted"][-1]
    assert promoted.payload["rollback_of"] == till.new.release_id
    assert promoted.payload["reason"] == "it says too much"

    before, status = till.decisions(), house.status(till.name)
    again = till.command()
    assert (
        again.returncode == 1 and "no earlier release in test that was not rolled back from" in again.stderr
    )
    assert f"--to {till.new.release_id}" in again.stderr, "the way forward is named"
    assert (till.decisions(), house.status(till.name)) == (before, status), "and nothing has changed"


def test_from_the_ui_it_is_the_same_and_mlflow_hears_of_it(
    house: House, till: Till, new_serves: None
) -> None:
    from flows.rollback import rollback

    assert house.aliases(till.name)["champion"] == till.new.release_id
    run = house.ended(rollback(till.name, reason="from the UI", return_state=True))
    assert (run.kind, run.name) == ("COMPLETED", "Completed"), run.message
    assert run.steps == {"roll_back": "Completed", "name_champion": "Completed"}
    assert run.result.active == till.serving() == till.old.release_id
    assert house.aliases(till.name)["champion"] == till.old.release_id
    forward = house.ended(rollback(till.name, "test", till.new.release_id, return_state=True))
    assert forward.result.active == till.serving() == till.new.release_id, "by name, it may lead forward"
    unknown = house.ended(rollback(till.name, release_id="till-0123456789ab", return_state=True))
    assert unknown.kind == "FAILED" and unknown.explains("till has no release", till.old.release_id)


def test_what_was_altered_in_the_store_is_no_way_back(house: House, till: Till, new_serves: None) -> None:
    before, status = till.decisions(), house.status(till.name)
    folder = house.store.local_path(house.store.key(till.old.model.artifact.uri))
    assert folder is not None
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    kept = file.read_bytes()
    try:
        for content, said in ((b"altered", "it was altered after it was written"), (None, "sha256")):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            done = till.command("--to", till.old.release_id)
            assert done.returncode == 1 and said in done.stderr, done.stderr
            assert till.old.model.artifact.sha256 in done.stderr and "Traceback" not in done.stderr
    finally:
        file.write_bytes(kept)
    assert (till.decisions(), house.status(till.name)) == (before, status)
    assert till.serving() == till.new.release_id
