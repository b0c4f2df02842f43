"""The same commit, data and lock make the same release, wherever they are built."""

from __future__ import annotations

from pathlib import Path

from perennial import artifacts
from perennial.values import Release
from tests.flows.conftest import MakeProject
from tests.flows.house import AS_OF, House, within


def test_two_builds_in_two_homes_give_the_same_release_bytes_and_wheel(
    house: House, enabled: MakeProject, tmp_path: Path
) -> None:
    project = enabled("twin")
    first = house.build("twin")
    assert first.kind == "COMPLETED", first.message
    # The same servers, and nothing else in common: own store, journal, environments and checkouts.
    other = House(house.settings.model_copy(update={"home": tmp_path / "home"}))
    with within(other):
        other.enable("twin", project.url)
        second = other.build("twin")
    assert second.kind == "COMPLETED", second.message
    ours, theirs = first.result, second.result
    assert ours.release_id == theirs.release_id
    assert _files(house, ours) == _files(other, theirs)
    wheel = f"packages/twin/{ours.package.filename}"
    assert house.store.get(wheel) == other.store.get(wheel)
    assert ours.package.sha256 == theirs.package.sha256


def test_building_again_gives_the_release_that_is_there_and_publishes_nothing_more(
    house: House, enabled: MakeProject
) -> None:
    enabled("again")
    first, second = house.build("again").result, house.build("again").result
    assert second == first
    assert len(house.journal.releases("again")) == len(house.model_versions("again")) == 1
    assert len([key for key in house.store.list("packages/again") if key.endswith(".whl")]) == 1


def test_another_day_is_another_release(house: House, enabled: MakeProject) -> None:
    enabled("daily-bread")
    first = house.build("daily-bread").result
    second = house.build("daily-bread", as_of=AS_OF.replace(day=2)).result
    assert first.release_id != second.release_id
    assert first.package == second.package, "the wheel is the commit's"


def _files(house: House, release: Release) -> dict[str, bytes]:
    folder = artifacts.open_local(house.store, release.model.artifact, house.settings.root / "read")
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
