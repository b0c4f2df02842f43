"""The same commit, data and lock make the same release, wherever they are built."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from perennial import artifacts
from perennial.values import Release
from tests.factories import ProjectRepository
from tests.flows.conftest import MakeProject
from tests.flows.house import AS_OF, House, within


class Twin(NamedTuple):
    """A project and its first release."""

    project: ProjectRepository
    release: Release


@pytest.fixture(scope="module")
def twin(house: House, enabled: MakeProject) -> Twin:
    project = enabled("twin")
    built = house.build("twin")
    assert built.kind == "COMPLETED", built.message
    return Twin(project, built.result)


def test_two_builds_in_two_homes_give_the_same_release_bytes_and_wheel(
    house: House, twin: Twin, tmp_path: Path
) -> None:
    # The same servers, and nothing else in common: own store, journal, environments and checkouts.
    other = House(house.settings.model_copy(update={"home": tmp_path / "home"}))
    with within(other):
        other.enable("twin", twin.project.url)
        second = other.build("twin")
    assert second.kind == "COMPLETED", second.message
    ours, theirs = twin.release, second.result
    assert ours.release_id == theirs.release_id
    assert _files(house, ours) == _files(other, theirs)
    assert ours.serving is not None and theirs.serving is not None
    assert ours.serving.artifact.sha256 == theirs.serving.artifact.sha256
    assert ours.package is not None
    wheel = f"packages/twin/{ours.package.filename}"
    assert house.store.get(wheel) == other.store.get(wheel)
    assert ours.package.sha256 == theirs.package.sha256


def test_building_again_gives_the_release_that_is_there_and_publishes_nothing_more(
    house: House, twin: Twin
) -> None:
    releases, versions = house.journal.releases("twin"), len(house.model_versions("twin"))
    assert house.build("twin").result == twin.release
    assert house.journal.releases("twin") == releases
    assert len(house.model_versions("twin")) == versions
    assert len([key for key in house.store.list("packages/twin") if key.endswith(".whl")]) == 1


def test_another_day_is_another_release_of_the_same_wheel(house: House, twin: Twin) -> None:
    tomorrow = house.build("twin", as_of=AS_OF.replace(day=2)).result
    assert tomorrow.release_id != twin.release.release_id
    assert tomorrow.package == twin.release.package


def _files(house: House, release: Release) -> dict[str, bytes]:
    folder = artifacts.open_local(house.store, release.model.artifact, house.settings.root / "read")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
