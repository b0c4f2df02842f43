"""Killed in the middle of a rollout: afterwards journal, router, instances and answers agree on one release.

A sample of what `make bench-rollout` does: every strategy, every kind of write, every victim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines import engine_or_skip, service_image
from tests.infra import chaos
from tests.infra.chaos import AT_ONCE, Drivers, Load, Point, World
from tests.installations import own_settings, running

RATE = 400  # requests per second

# strategy, number of the write, before or after it, its kind, victim
SAMPLE = [
    ("blue-green", 1, "after", "candidate", "driver"),
    ("blue-green", 2, "before", "step", "active"),
    ("blue-green", 3, "before", "promoted", "candidate"),
    ("blue-green", 3, "before", "promoted", "driver"),
    ("blue-green", 3, "after", "promoted", "driver"),
    ("blue-green", 3, "after", "promoted", "envoy"),
    ("all-at-once", 2, "after", "step", "envoy"),
    ("canary", 3, "after", "step", "driver"),
    ("canary", 4, "before", "step", "candidate"),
    ("harmful canary", 4, "before", "withdrawn", "driver"),
    ("hasty canary", 4, "after", "asked", "driver"),
]
IN_CONTAINERS = [
    ("blue-green", 2, "after", "step", "active"),
    ("blue-green", 3, "before", "promoted", "driver"),
]


def point(strategy: str, number: int, when: str, kind: str, victim: str) -> Any:
    found = Point(strategy, number, when, kind)
    return pytest.param(found, victim, id=f"{victim} at {found}")


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    drivers = Drivers(tmp_path_factory.mktemp("drivers") / "log")
    yield drivers
    drivers.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(own_settings(tmp_path_factory.mktemp("chaos") / "home"), ["envoy"]) as here:
        world = World(here)
        assert world.deploy(world.release(**AT_ONCE)) == "promoted"
        yield world


@pytest.fixture(scope="module")
def load(world: World) -> Iterator[Load]:
    with chaos.load(world, RATE) as load:
        yield load


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("containers")
    with engine_or_skip() as engine:
        image = service_image(engine, folder)
        with running(own_settings(folder / "home", target="docker"), ["envoy"]) as here:
            world = World(here, engine=engine, image=image)
            assert world.deploy(world.release(**AT_ONCE)) == "promoted"
            yield world
            world.stop()
        world.remove_images()


@pytest.mark.parametrize(("point", "victim"), [point(*each) for each in SAMPLE])
def test_all_agree_after_a_kill_and_the_same_deploy_converges(
    world: World, drivers: Drivers, load: Load, point: Point, victim: str
) -> None:
    holds(chaos.happen(world, drivers, load, point, victim))


@pytest.mark.parametrize(("point", "victim"), [point(*each) for each in IN_CONTAINERS])
def test_containers_agree_as_well(containers: World, drivers: Drivers, point: Point, victim: str) -> None:
    with chaos.load(containers, RATE / 4) as load:
        holds(chaos.happen(containers, drivers, load, point, victim))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_reconciler_that_is_killed_is_finished_by_the_next(
    world: World, drivers: Drivers, load: Load, when: str
) -> None:
    holds(chaos.reconciler_dies(world, drivers, load, when))


def holds(found: chaos.Accident | None) -> None:
    assert found is not None, "there was nobody to kill"
    assert found.disagreements == []
    assert found.again == found.expected
    assert found.failures == [] and found.requests > 0
