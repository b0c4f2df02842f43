"""Deploys and rollbacks in a row, under load: what failed, what was left, how long a switch took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.leaks import Inventory
from perennial import leases, rollout
from perennial.values import Release
from tests.infra import chaos
from tests.infra.chaos import AT_ONCE, BLUE_GREEN, World

RATE = 200  # requests per second


@dataclass
class Deploys:
    """What came of them."""

    done: int = 0
    requests: int = 0
    failures: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    switch_seconds: list[float] = field(default_factory=list)  # from proven to all traffic
    seconds: list[float] = field(default_factory=list)  # of each whole deploy or rollback


def run(world: World, count: int) -> Deploys:
    """Of ten, eight are rollbacks to the release before, mostly warm; two start a process anew."""
    blue_green = [world.release(**BLUE_GREEN) for _ in range(3)]
    at_once = world.release(**AT_ONCE)
    found = Deploys()
    for release in (at_once, *blue_green):
        world.deploy(release)
    _rest(world, blue_green)
    with chaos.load(world, RATE) as load:
        before = Inventory.of(world)
        with _timed(found):
            for number in range(count):
                began = time.monotonic()
                _one(world, number, blue_green, at_once)
                found.seconds.append(time.monotonic() - began)
                found.done += 1
                wrong = world.disagreements()
                if wrong:
                    raise AssertionError(f"after deploy {number}: {wrong}")
                if number % 20 == 19:
                    print(f"{number + 1:5} deploys, the last 20 in {sum(found.seconds[-20:]):.1f} s")
        came = load.since()
        found.requests, found.failures = came["requests"], came["failures"]
        _rest(world, blue_green)
        found.leaked = Inventory.of(world).beyond(before)
    return found


def _one(world: World, number: int, blue_green: list[Release], at_once: Release) -> None:
    match number % 10:
        case 4:
            world.deploy(next(r for r in blue_green if r.release_id not in world.instances()))
        case 9:
            world.deploy(at_once)
        case _:
            rollout.roll_back(
                world.here, world.journal, world.target, world.store, world.project, "test", variables={}
            )


def _rest(world: World, blue_green: list[Release]) -> None:
    """The same releases in the same roles, so that two inventories can be compared."""
    for release in blue_green[:2]:
        world.deploy(release)


@contextmanager
def _timed(found: Deploys) -> Iterator[None]:
    """Take the time from a proof to the end of the switch after it."""
    prove, switch, proven = rollout.prove, rollout.switch, [0.0]

    def proving(*arguments: Any) -> Any:
        report = prove(*arguments)
        proven[0] = time.monotonic()
        return report

    def switching(*arguments: Any, **more: Any) -> Any:
        done = switch(*arguments, **more)
        found.switch_seconds.append(time.monotonic() - proven[0])
        return done

    rollout.prove, rollout.switch = proving, switching
    try:
        yield
    finally:
        rollout.prove, rollout.switch = prove, switch
        leases.let_go()
