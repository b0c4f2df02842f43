"""Kills of a whole installation: deploys that Prefect's worker runs, stopped after each kind of decision."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from perennial import installation
from perennial.leftovers import is_alive
from perennial.settings import Settings
from perennial.supervision import Supervisor
from perennial.values import Release
from tests.infra import chaos
from tests.infra.chaos import BLUE_GREEN, Accident, Load, Point, World
from tests.installations import ROOT

PARTS = ("envoy", "prefect-server", "prefect-worker")
KINDS = ("candidate", "step", "promoted")
VICTIMS = ("flow run", "prefect-worker", "prefect-server")
INJECT = Path(__file__).with_name("inject")
RATE = 100  # requests per second
_PATIENCE_SECONDS = 180.0
_POLL_SECONDS = 0.2


class Whole:
    """An installation with Prefect's server and worker, and a service in it."""

    def __init__(self, here: Settings) -> None:
        self.here = here
        self.world = World(here)
        # Production has a champion: MLflow, which knows none of these releases, is not asked to name one.
        champion = self.world.release()
        self.world.journal.decide(
            project="toy", environment="production", kind="promoted", release_id=champion.release_id
        )

    def register(self) -> None:
        environment = os.environ | self.here.as_environment()
        subprocess.run(
            [sys.executable, "-m", "deployments.register"],
            cwd=ROOT,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def happen(self, load: Load, kind: str, victim: str) -> Accident:
        """Stop a deploy after this decision, kill, let what is left go on, reconcile, and deploy again."""
        world = self.world
        found = Accident(Point("blue-green, run by Prefect", KINDS.index(kind) + 1, "after", kind), victim)
        new = world.release(**BLUE_GREEN)
        stop = self.here.root / "work" / f"stop-{new.release_id}"
        stop.mkdir(parents=True)
        load.since()
        run = self.deploy(new, stop, kind)
        _until((stop / "stopped").exists, f"{kind} of {run}")
        pid = int((stop / "stopped").read_text())
        process = Supervisor(self.here).process(victim)
        os.kill(process.pid if process else pid, signal.SIGKILL)
        (stop / "go").touch()
        _until(lambda: not is_alive(pid), f"the end of {run}'s process")
        found.outcome = "killed" if victim == "flow run" else "ended"
        installation.up(self.here, parts=PARTS, say=lambda line: None)  # it comes back by itself: wait for it
        world.reconcile()
        found.disagreements = world.settled()
        found.active = "new" if world.active() == new.release_id else "old"
        found.again = self.wait(self.deploy(new))
        found.disagreements += [f"after the second deploy: {said}" for said in world.settled()]
        if world.active() != new.release_id:
            found.disagreements.append(f"the second deploy left {world.active()} active")
        came = load.since()
        found.requests, found.failures = came["requests"], came["failures"]
        return found

    def deploy(self, release: Release, stop: Path | None = None, kind: str = "") -> UUID:
        """Have the worker deploy it; with `stop` its process waits there after a decision of this kind."""
        variables: dict[str, Any] = {}
        if stop is not None:
            path = f"{INJECT}{os.pathsep}{ROOT}"
            injected = {"PERENNIAL_BENCH_STOP": str(stop), "PERENNIAL_BENCH_KIND": kind, "PYTHONPATH": path}
            variables = {"env": injected}
        parameters = {"project": "toy", "environment": "test", "release_id": release.release_id}
        with self._client() as client:
            deployment = client.read_deployment_by_name("deploy/flights")
            return client.create_flow_run_from_deployment(
                deployment.id, parameters=parameters, job_variables=variables
            ).id

    def wait(self, run: UUID) -> str:
        """How a run ended: "promoted", or its state."""
        with self._client() as client:

            def ended() -> Any:
                state = client.read_flow_run(run).state
                return state if state is not None and state.is_final() else None

            state = _until(ended, f"the end of {run}")
        return "promoted" if state.is_completed() else f"{state.name}: {state.message}"

    @contextmanager
    def _client(self) -> Iterator[Any]:
        from prefect.client.orchestration import SyncPrefectClient

        with SyncPrefectClient(f"{self.here.prefect_url}/api") as client:
            yield client


def run(here: Settings, kinds: tuple[str, ...] = KINDS) -> list[Accident]:
    """An accident of each victim after each kind of decision. The installation has only its `PARTS`."""
    whole = Whole(here)
    whole.register()
    assert whole.world.deploy(whole.world.release(**BLUE_GREEN)) == "promoted"
    accidents = []
    with chaos.load(whole.world, RATE) as load:
        for kind in kinds:
            for victim in VICTIMS:
                accidents.append(whole.happen(load, kind, victim))
                print(accidents[-1])
    return accidents


def _until(true: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with suppress(OSError):
            if value := true():
                return value
        if time.monotonic() > deadline:
            raise chaos.Hung(f"{what} did not come within {_PATIENCE_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)
