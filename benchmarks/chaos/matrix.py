"""The kill matrix: rollouts stopped before and after each write to the journal, everybody killed there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tests.infra import chaos
from tests.infra.chaos import AT_ONCE, VICTIMS, Accident, Drivers, Load, World

RATE = 400  # requests per second

# Plan → how many of its points come first in another plan as well, written by the same lines.
ALL: Mapping[str, int] = {
    "blue-green": 0,
    "all-at-once": 0,
    "canary": 4,
    "harmful canary": 6,
    "hasty canary": 6,
}


def run(world: World, plans: Mapping[str, int] = ALL, rate: float = RATE) -> list[Accident]:
    """Every accident there is in these rollouts, and those of a reconciler."""
    assert world.deploy(world.release(**AT_ONCE)) == "promoted"
    drivers = Drivers(world.here.root / "logs" / "drivers.log")
    accidents = []
    try:
        with chaos.load(world, rate) as load:
            for accident in _all(world, drivers, load, plans):
                print(accident)
                accidents.append(accident)
    finally:
        drivers.close()
    return accidents


def _all(world: World, drivers: Drivers, load: Load, plans: Mapping[str, int]) -> Iterator[Accident]:
    for plan, told in plans.items():
        for point in chaos.points(world, drivers, plan)[told:]:
            for victim in VICTIMS:
                accident = chaos.happen(world, drivers, load, point, victim)
                if accident is not None:
                    yield accident
    for when in ("before", "after"):
        yield chaos.reconciler_dies(world, drivers, load, when)
