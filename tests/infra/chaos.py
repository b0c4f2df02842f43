"""Accidents in the middle of rollouts: a world to have them in, and whether all of it agrees afterwards.

Releases are stored, fetched, started, proven and routed as any other; their environment's Python is the test
service, which is up in a tenth of a second. In a world of containers their image is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from perennial import artifacts, environments, image_context, images, leases
from perennial.errors import PerennialError
from perennial.journal import Journal, open_journal
from perennial.probe import probe
from perennial.reconcile import reconcile
from perennial.router import cluster_name
from perennial.service_state import Role, state_in
from perennial.settings import Settings
from perennial.store import Store, open_store
from perennial.supervision import UP_STATES, Supervisor
from perennial.targets import Running, Target, open_target
from perennial.values import Release, Rollouts, TestPolicy
from tests.infra import driver
from tests.infra.service import predict
from tests.installations import ROOT, SERVICE, call
from tests.releases import a_stored_release

VICTIMS = ("driver", "active", "candidate", "envoy")
GOLDEN_ROWS = 8
PATIENCE_SECONDS = 60.0
SETTLING_SECONDS = 10.0

# Two short steps, the second nearly everything: so the evidence comes in two seconds of a load.
CANARY = {"strategy": "canary", "steps": (50, 90), "bake_seconds": 0.4, "max_wait_seconds": 30.0}
BLUE_GREEN = {"strategy": "blue-green", "keep_warm_seconds": 3600.0}
AT_ONCE = {"strategy": "all-at-once"}


class Hung(AssertionError):
    """Something that must end did not."""


class Missed(AssertionError):
    """A rollout that ended before it came to the point where it was to be stopped."""


class World:
    """One service of an installation that runs: its releases, its deploys, and what can be seen of it."""

    def __init__(self, here: Settings, project: str = "toy", engine: Any = None, image: str = "") -> None:
        self.here, self.project, self._engine, self._image = here, project, engine, image
        self.journal: Journal = open_journal(here.database)
        self.store: Store = open_store(here.store)
        self.target: Target = open_target(here)
        self.journal.enable_project(project, "/repository")
        self._numbers = itertools.count(1)
        self._images: list[str] = []
        with TemporaryDirectory() as folder:
            self._first = a_stored_release(self.store, Path(folder), project=project)
            rows = [{"x": number / GOLDEN_ROWS} for number in range(GOLDEN_ROWS)]
            golden = {"rows": rows, "predictions": [predict(row["x"]) for row in rows]}
            (Path(folder) / "golden.json").write_text(json.dumps(golden))
            self._golden = artifacts.put_file(self.store, "models/golden.json", Path(folder) / "golden.json")

    @property
    def url(self) -> str:
        return f"{self.here.router_url('test')}/{self.project}/predict"

    def release(self, *options: str, ready_seconds: float = 20.0, **policy: Any) -> Release:
        """A release that was built: the test service with these options."""
        release_id = f"{self.project}-{next(self._numbers):012x}"
        fingerprint = hashlib.sha256(release_id.encode()).hexdigest()
        release = self._first.model_copy(
            update={
                "release_id": release_id,
                "environment": self._first.environment.model_copy(update={"fingerprint": fingerprint}),
                "model": self._first.model.model_copy(update={"golden": self._golden}),
                "service": self._first.service.model_copy(
                    update={"drain_seconds": 5.0, "ready_timeout_seconds": ready_seconds, "memory_mb": 128}
                ),
                "rollout": Rollouts(test=TestPolicy(**policy)),
            }
        )
        command = ("--release-id", release_id, *options)
        if self._engine is None:
            self._make_environment(release, command)
        else:
            self._make_image(release, command)
        return self.journal.record_release(release)

    def deploy(self, release: Release) -> str:
        """Deploy to the end, in this process."""
        try:
            return driver.deploy(self.here, self.journal, self.target, self.store, release)
        finally:
            leases.let_go()

    def reconcile(self) -> list[str]:
        return reconcile(self.here, self.journal, self.target)

    def active(self) -> str | None:
        return self.journal.active(self.project, "test")

    def candidate(self) -> str | None:
        return state_in(self.journal, self.project, "test").candidate

    def instances(self) -> dict[str, Running]:
        """release id → its instance"""
        return {i.endpoint.release_id: i for i in self.target.instances() if i.project == self.project}

    def kinds(self) -> list[str]:
        """Of all decisions."""
        return [decision.kind for decision in self.journal.decisions(self.project, "test")]

    def ports(self) -> dict[int, str]:
        """port → release id, of what runs"""
        return {i.endpoint.port: release_id for release_id, i in self.instances().items()}

    def routed(self, ports: dict[int, str] | None = None) -> dict[str, tuple[int, int]]:
        """Who is in the router, as Envoy says: release id → (priority, weight). Ports that nobody has too."""
        answer = probe(f"{self.here.router_admin_url}/clusters?format=json")
        if answer is None or answer.status != 200:
            return {}
        owner = self.ports() if ports is None else ports
        found = {}
        for cluster in answer.json().get("cluster_statuses", []):
            if cluster["name"] != cluster_name("test", self.project):
                continue
            for host in cluster.get("host_statuses", []):
                port = host["address"]["socket_address"]["port_value"]
                found[owner.get(port, f"port {port}")] = (host.get("priority", 0), host.get("weight", 1))
        return found

    def ask(self) -> Any:
        """The release that answers one request, or the status."""
        status, answer, _ = call(self.url, {"rows": [{"x": 1.0}]})
        return answer["release_id"] if status == 200 else status

    def disagreements(self) -> list[str]:
        """Where journal, router, instances and answers do not say the same; empty when all is well."""
        state = state_in(self.journal, self.project, "test")
        roles = state.roles(datetime.now(UTC))
        found = []
        if state.candidate is not None and not state.asked:
            found.append(f"the journal has a candidate still: {state.candidate}")
        instances = self.instances()
        if instances.keys() != roles.keys():
            found.append(f"the instances are {sorted(instances)}, the journal's {sorted(roles)}")
        down = {name: i.state for name, i in instances.items() if i.state not in UP_STATES}
        if down:
            found.append(f"down: {down}")
        routed = self.routed()
        places = {release_id: priority for release_id, (priority, _) in routed.items()}
        wanted = {
            release_id: int(role is Role.WARM)
            for release_id, role in roles.items()
            if role is not Role.CANDIDATE
        }
        if places != wanted:
            found.append(f"the router has {routed}, the journal {wanted}")
        answers = {self.ask() for _ in range(8)}
        if answers != {state.active}:
            found.append(f"{answers} answer, the journal has {state.active}")
        return found

    def settled(self) -> list[str]:
        """The disagreements that stay: who was killed is started again within seconds."""
        deadline = time.monotonic() + SETTLING_SECONDS
        while (found := self.disagreements()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def kill(self, release_id: str) -> None:
        """`kill -9` of the process of a release, also of one in a container."""
        with suppress(ProcessLookupError):
            os.kill(self.instances()[release_id].pid, signal.SIGKILL)

    def stop(self) -> None:
        """Take the service down for good."""
        for instance in self.instances().values():
            self.target.stop(instance.endpoint.name, 0.0)

    def remove_images(self) -> None:
        """Those that were made here; of processes there are none."""
        for name in self._images:
            self._engine.images.remove(name, force=True)

    def _make_environment(self, release: Release, command: tuple[str, ...]) -> None:
        python = environments.python_of(release.environment, self.here.root / "environments")
        python.parent.mkdir(parents=True)
        words = " ".join([sys.executable, str(SERVICE), *command])
        python.write_text(f'#!/bin/sh\nshift 2  # -m serving.server\nexec {words} "$@"\n')
        python.chmod(0o755)
        (python.parents[1] / "complete").touch()

    def _make_image(self, release: Release, command: tuple[str, ...]) -> None:
        from perennial import engine

        dockerfile = f"FROM {self._image}\nENTRYPOINT {json.dumps(['python3', '/service.py', *command])}\n"
        with image_context.create() as (context, file):
            context.add_text("Dockerfile", dockerfile)
            name = images.name(self.project, release.release_id)
            engine.build(self._engine, context, file, name, {}, {"perennial.release": release.digest()})
        self._images.append(name)


class Drivers:
    """Has orders carried out by processes that can be stopped and killed, one at a time."""

    def __init__(self, log: Path) -> None:
        with log.open("a") as sink:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.infra.driver"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                bufsize=1,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self.pid = 0
        self.wrote: list[str] = []

    def begin(self, world: World, release: Release | None, stop: tuple[int, str] | None = None) -> None:
        """Deploy a release; without one, reconcile."""
        order = {
            "act": "deploy" if release else "reconcile",
            "settings": world.here.model_dump(mode="json"),
            "release": release.release_id if release else "",
            "stop": stop,
        }
        self._send(json.dumps(order))
        _, self.pid = self._expect("began")

    def stopped(self) -> str:
        """Wait for the stop; the kind of the decision. Raises Missed when it ended without."""
        what, said = self._expect("stopped", "wrote")
        if what == "wrote":
            outcome = self._expect("ended", "failed")[1]
            self._expect("gone")
            raise Missed(f"after {said}: {outcome}")
        return str(said)

    def go_on(self) -> None:
        self._send("")

    def end(self) -> str:
        """Wait for the end; the outcome."""
        self.wrote = self._expect("wrote")[1]
        outcome = str(self._expect("ended", "failed")[1])
        self._expect("gone")
        return outcome

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._expect("gone")

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()

    def _send(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()

    def _expect(self, *words: str) -> list[Any]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        said: list[Any] = json.loads(line or '["nothing"]')
        assert said[0] in words, f"the driver says {said}, {words} was expected"
        return said


class Load:
    """A load on the service, and what came of it since it was asked last."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def since(self) -> dict[str, Any]:
        """What came since the last time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


@contextmanager
def load(world: World, rate: float, spread: bool = True) -> Iterator[Load]:
    """Hold a load on the service: rows whose right predictions are known, and are compared."""
    body = world.here.root / "work" / "load.jsonl"
    body.parent.mkdir(exist_ok=True)
    numbers = [number / 50 for number in range(50)] if spread else [0.0]
    lines = [f"{json.dumps({'rows': [{'x': x}]})}\t{json.dumps([predict(x)])}\n" for x in numbers]
    body.write_text("".join(lines))
    argv = [sys.executable, "-m", "tests.flows.load", world.url, str(body), str(rate)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "started\n"
            yield Load(process)
        finally:
            process.communicate(timeout=PATIENCE_SECONDS)


@dataclass(frozen=True)
class Point:
    """A moment of a rollout: before or after its n-th write to the journal."""

    strategy: str
    number: int
    when: str
    kind: str

    def __str__(self) -> str:
        return f"{self.strategy}, {self.when} {self.kind} ({self.number})"


@dataclass
class Accident:
    """One point, one victim, and what came of it."""

    point: Point
    victim: str
    expected: str = "promoted"  # how the deploy ends when nobody is killed
    outcome: str = ""  # how the rollout ended
    active: str = ""  # old or new
    disagreements: list[str] = field(default_factory=list)
    again: str = ""  # how the same deploy ended when it was repeated
    requests: int = 0
    failures: list[str] = field(default_factory=list)
    recovery_seconds: float | None = None  # of the router: until requests succeed and the weights are right

    @property
    def consistent(self) -> bool:
        return not self.disagreements and self.again == self.expected

    def __str__(self) -> str:
        back = f", {self.recovery_seconds:.2f} s" if self.recovery_seconds is not None else ""
        wrong = f" INCONSISTENT {self.disagreements} {self.again}" if not self.consistent else ""
        said = (
            f"{self.victim:<14} {self.point}: {self.active}, {len(self.failures)} of {self.requests} failed"
        )
        return said + back + wrong


# What is deployed, by what it is for: the policy, the service's options, and how it ends.
_LONG_STEP = CANARY | {"steps": (50,), "bake_seconds": 20.0}
_SHORT_STEP = CANARY | {"steps": (50,), "bake_seconds": 0.2, "max_wait_seconds": 0.1}
PLANS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "canary": (CANARY, (), "promoted"),
    "blue-green": (BLUE_GREEN, (), "promoted"),
    "all-at-once": (AT_ONCE, (), "promoted"),
    "harmful canary": (_LONG_STEP, ("--turns", "errors", "--after", "5"), "withdrawn"),
    "hasty canary": (_SHORT_STEP, (), "insufficient evidence"),
}


def points(world: World, drivers: Drivers, strategy: str) -> list[Point]:
    """The points of a plan's rollout, found by carrying one out."""
    policy, options, _ = PLANS[strategy]
    drivers.begin(world, world.release(*options, **policy))
    drivers.end()
    return [
        Point(strategy, number, when, kind)
        for number, kind in enumerate(drivers.wrote, 1)
        for when in ("before", "after")
    ]


def happen(world: World, drivers: Drivers, load: Load, point: Point, victim: str) -> Accident | None:
    """Stop a deploy at the point, kill the victim, go on or reconcile, and deploy again.

    None where there is nobody to kill: no candidate runs yet.
    """
    expected = PLANS[point.strategy][2]
    found = Accident(point, victim, expected)
    old = world.active()
    load.since()
    new = _stopped(world, drivers, point)
    if victim == "candidate" and new.release_id not in world.instances():
        drivers.go_on()
        drivers.end()
        return None
    if victim == "driver":
        drivers.kill()
        found.outcome = "killed"
    else:
        if victim == "envoy":
            found.recovery_seconds = _kill_envoy(world, load, found)
        else:
            world.kill(new.release_id if victim == "candidate" else str(old))
        drivers.go_on()
        found.outcome = drivers.end()
    world.reconcile()
    found.disagreements = world.settled()
    found.active = {old: "old", new.release_id: "new"}.get(world.active(), str(world.active()))
    if victim == "driver":
        right = "new" if (point.kind, point.when) == ("promoted", "after") else "old"
        if found.active != right:
            found.disagreements.append(f"the {found.active} release is active, not the {right} one")
    found.again = _again(world, new)
    found.disagreements += [f"after the second deploy: {said}" for said in world.settled()]
    if world.active() != (new.release_id if expected == "promoted" else old):
        found.disagreements.append(f"the second deploy left {world.active()} active")
    came = load.since()
    found.requests += came["requests"]
    found.failures += came["failures"]
    return found


def _stopped(world: World, drivers: Drivers, point: Point) -> Release:
    """A new release, whose deploy stands at the point."""
    policy, options, _ = PLANS[point.strategy]
    for tried in range(3):
        new = world.release(*options, **policy)
        drivers.begin(world, new, (point.number, point.when))
        try:
            kind = drivers.stopped()
        except Missed:
            # Envoy avoids for seconds who was down a moment ago; a harmful candidate that stands by meanwhile
            # is found out before it has a share.
            time.sleep(2.0 + 4.0 * tried)
            continue
        assert kind == point.kind, f"{kind} at {point}"
        return new
    raise Missed(f"{point} three times")


def reconciler_dies(world: World, drivers: Drivers, load: Load, when: str) -> Accident:
    """Kill a deploy in its middle, then the reconciler before or after its own write, and reconcile again."""
    policy, _, expected = PLANS["hasty canary"]
    found = Accident(Point("reconcile", 1, when, "withdrawn"), "driver", expected)
    new, old = world.release(**policy), world.active()
    load.since()
    drivers.begin(world, new, (3, "after"))
    drivers.stopped()
    drivers.kill()
    drivers.begin(world, None, (1, when))
    drivers.stopped()
    drivers.kill()
    found.outcome = "killed"
    world.reconcile()
    found.disagreements = world.settled()
    found.active = "old" if world.active() == old else str(world.active())
    found.again = _again(world, new)
    found.disagreements += [f"after the second deploy: {said}" for said in world.settled()]
    came = load.since()
    found.requests, found.failures = came["requests"], came["failures"]
    return found


def _again(world: World, release: Release) -> str:
    """The same deploy, once more."""
    try:
        return world.deploy(release)
    except PerennialError as error:
        last = world.journal.decisions(world.project, "test")[-1]
        withdrawn = (last.kind, last.release_id) == ("withdrawn", release.release_id)
        return "withdrawn" if withdrawn else str(error)


def _kill_envoy(world: World, load: Load, found: Accident) -> float:
    """Kill the router; seconds until requests succeed and it has the weights that it had."""
    process = Supervisor(world.here).process("envoy")
    assert process is not None
    # Not to be asked of supervisord: each question makes it look at its processes sooner.
    ports = world.ports()
    before, killed = world.routed(ports), time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    right, deadline = 0.0, killed + PATIENCE_SECONDS
    while not right:
        if time.monotonic() > deadline:
            raise Hung(f"Envoy has not come back with {before}: {world.routed()}")
        right = time.monotonic() if world.routed(ports) == before else 0.0
        time.sleep(0.02)
    time.sleep(0.5)
    came = load.since()
    found.requests += came["requests"]  # its failures are the outage, and no others
    late = [moment for moment in came["failed_at"] if moment > right]
    return max(right, *late, *came["failed_at"]) - killed if came["failed_at"] else right - killed
