"""A release comes in front of users without a lost request, goes back the same way, or does not come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

import pytest

from perennial import leases, rollout
from perennial.targets import open_target
from perennial.values import Artifact, Release
from tests.flows.conftest import MakeProject
from tests.flows.house import House

# Answers in microseconds: router and server are to hold the load, on cores that have more to do besides.
QUICK_MODEL = '''"""A straight line through what is known of a visit."""

import numpy as np


class Model:
    """P(the visitor buys), about."""

    def produce_model(self, data):
        self.weights = np.linalg.lstsq(self._numbers(data), data["bought"].to_numpy(float), rcond=None)[0]

    def predict(self, rows):
        return np.clip(self._numbers(rows) @ self.weights, 0.01, 0.99)

    def _numbers(self, rows):
        known = [np.nan_to_num(rows[name].to_numpy(float), nan=40.0) for name in ("amount", "age", "member")]
        return np.column_stack([np.ones(len(rows)), *known])
'''


class Shop(NamedTuple):
    """One project with two accepted releases."""

    name: str
    old: Release
    new: Release


@pytest.fixture(scope="module")
def shop(house: House, enabled: MakeProject) -> Shop:
    project = enabled("shop")
    project.commit("be quick", {"src/shop/model.py": QUICK_MODEL})
    old = house.build("shop")
    assert old.kind == "COMPLETED", old.message
    project.commit("say more", {"README.md": "Will this visitor buy?\n"})
    new = house.build("shop")
    assert new.kind == "COMPLETED", new.message
    return Shop("shop", old.result, new.result)


@pytest.fixture
def old_serves(house: House, shop: Shop) -> None:
    run = house.deploy(shop.name, shop.old.release_id)
    assert run.kind == "COMPLETED", run.message
    assert house.instances(shop.name) == {shop.old.release_id: "RUNNING"}


def test_a_second_release_replaces_the_first_under_load_and_no_request_fails(
    house: House, shop: Shop, old_serves: None
) -> None:
    with house.load(shop.name, rate=240) as load:
        run = house.deploy(shop.name, shop.new.release_id)
    assert (run.kind, run.name) == ("COMPLETED", "Completed"), run.message
    assert load.all_answered_by(shop.old.release_id, shop.new.release_id)
    assert load.rate >= 200, load.outcome
    assert run.result.active == shop.new.release_id
    assert run.result.previous == shop.old.release_id
    form = shop.new.serving
    assert form is not None and form.path == "original", "it is no scikit-learn estimator"
    assert house.instances(shop.name) == {shop.new.release_id: "RUNNING"}
    assert house.ask(shop.name)["release_id"] == shop.new.release_id
    assert set(run.steps.values()) == {"Completed"}


def test_a_rollback_is_a_deploy_of_the_older_release(house: House, shop: Shop, old_serves: None) -> None:
    assert house.deploy(shop.name).result.active == shop.new.release_id, "without an id it is the newest one"
    with house.load(shop.name, rate=100) as load:
        run = house.deploy(shop.name, shop.old.release_id)
    assert run.kind == "COMPLETED", run.message
    assert load.all_answered_by(shop.old.release_id, shop.new.release_id)
    assert house.ask(shop.name)["release_id"] == shop.old.release_id
    assert house.instances(shop.name) == {shop.old.release_id: "RUNNING"}


def test_deploying_the_active_release_again_changes_nothing(
    house: House, shop: Shop, old_serves: None
) -> None:
    before, decisions = house.status(shop.name), house.journal.decisions(shop.name)
    with house.load(shop.name, rate=100) as load:
        run = house.deploy(shop.name, shop.old.release_id)
    assert (run.kind, run.name) == ("COMPLETED", "Completed"), run.message
    assert load.all_answered_by(shop.old.release_id)
    assert house.status(shop.name) == before, "the process that serves was not restarted"
    assert house.journal.decisions(shop.name) == decisions


def test_a_candidate_that_a_killed_deploy_left_running_is_gone_after_the_next_one(
    house: House, shop: Shop, old_serves: None
) -> None:
    from tasks import edge

    rollout.start(
        house.settings,
        house.journal,
        open_target(house.settings),
        shop.new,
        "test",
        edge.release_folder(shop.new),
        edge.store_environment(),
    )
    assert set(house.instances(shop.name)) == {shop.old.release_id, shop.new.release_id}
    assert house.ask(shop.name)["release_id"] == shop.old.release_id, "no traffic before it is proven"
    leases.let_go()  # as the death of its process does
    left = house.status(shop.name)[shop.new.release_id]
    run = house.deploy(shop.name, shop.new.release_id)
    assert run.kind == "COMPLETED", run.message
    assert house.status(shop.name) == {shop.new.release_id: left}, "the one that runs is proven and used"


def test_a_release_that_does_not_exist_is_refused_with_those_that_do(
    house: House, shop: Shop, old_serves: None
) -> None:
    run = house.deploy(shop.name, "shop-0123456789ab")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains("shop has no release 'shop-0123456789ab'", shop.old.release_id, shop.new.release_id)
    assert run.stopped_in("collect_release")
    assert house.ask(shop.name)["release_id"] == shop.old.release_id


def test_production_opens_for_an_approval_only_and_for_this_release_only(house: House, shop: Shop) -> None:
    refused = house.deploy(shop.name, shop.old.release_id, "production")
    assert (refused.kind, refused.name) == ("FAILED", "Failed")
    command = f"python -m perennial approve {shop.old.release_id} --reviewer"
    assert refused.explains(f"nobody has approved {shop.old.release_id} for production", command)
    assert refused.stopped_in("prepare_image")
    with pytest.raises(HTTPError):
        house.ask(shop.name, "production")

    approved = house.command("-m", "perennial", "approve", shop.old.release_id, "--reviewer", "Ada")
    assert approved.returncode == 0, approved.stderr
    assert "says Ada" in approved.stdout
    run = house.deploy(shop.name, shop.old.release_id, "production")
    assert (run.kind, run.name) == ("COMPLETED", "Completed"), run.message
    assert run.result.previous is None
    assert house.ask(shop.name, "production")["release_id"] == shop.old.release_id

    other = house.deploy(shop.name, shop.new.release_id, "production")
    assert other.explains(f"nobody has approved {shop.new.release_id}")
    assert house.ask(shop.name, "production")["release_id"] == shop.old.release_id


@pytest.mark.parametrize("what", ["the model", "the wheel"])
def test_a_release_that_was_altered_in_the_store_is_refused_with_both_digests(
    house: House, shop: Shop, old_serves: None, what: str
) -> None:
    file, digest = _stored(house, shop.new, what)
    with _changed(file, b"altered"), house.load(shop.name, rate=50) as load:
        run = house.deploy(shop.name, shop.new.release_id)
    assert (run.kind, run.name) == ("FAILED", "Failed")
    found = [word.strip(".,;:") for word in run.message.split() if len(word.strip(".,;:")) == 64]
    assert run.explains(digest, "Expected:", "Next:")
    assert len(set(found)) == 2, f"the digest that was found and the one expected in: {run.message}"
    assert run.stopped_in("collect_release")
    assert load.all_answered_by(shop.old.release_id)
    assert house.instances(shop.name) == {shop.old.release_id: "RUNNING"}


@pytest.mark.parametrize("what", ["the model", "the wheel"])
def test_a_release_that_was_deleted_from_the_store_is_refused(
    house: House, shop: Shop, old_serves: None, what: str
) -> None:
    file, digest = _stored(house, shop.new, what)
    with _changed(file, None):
        run = house.deploy(shop.name, shop.new.release_id)
    assert (run.kind, run.name) == ("FAILED", "Failed")
    gone = f"{file.name} is not on the package index" if what == "the wheel" else f"Expected: sha256 {digest}"
    assert run.explains(gone, "Next: build the release again, or restore the store")
    assert run.stopped_in("collect_release")
    assert house.ask(shop.name)["release_id"] == shop.old.release_id


def _stored(house: House, release: Release, what: str) -> tuple[Path, str]:
    """A file of the release in the store, and its digest."""
    assert release.package is not None
    if what == "the wheel":
        path = house.store.local_path(f"packages/{release.package.name}/{release.package.filename}")
        assert path is not None
        return path, release.package.sha256
    artifact: Artifact = release.model.artifact
    folder = house.store.local_path(house.store.key(artifact.uri))
    assert folder is not None
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    ), (artifact.sha256)


@contextmanager
def _changed(file: Path, content: bytes | None) -> Iterator[None]:
    kept = file.read_bytes()
    try:
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        yield
    finally:
        file.write_bytes(kept)
