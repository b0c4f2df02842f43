"""`python -m benchmarks.pipeline`: what a build costs beside a plain script that does the same work.

Starts an installation of its own (a temporary home, free ports), builds and deploys a first release as the
champion, then alternates plain script and `build`, each pair on another commit and day so that no step finds
its result there already. docs/benchmarks.md says how CPU is counted. Figures: benchmarks/out/pipeline.json.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import (
    Sampler,
    child_cpu_seconds,
    median,
    processes,
    tree_cpu_seconds,
    write_figures,
)
from perennial import environments, installation, process
from perennial.installation import PARTS, REPOSITORY
from perennial.journal import open_journal
from perennial.settings import Settings, settings
from perennial.supervision import Supervisor
from perennial.values import Release

OUT = REPOSITORY / "benchmarks" / "out" / "pipeline.json"
PLAIN = REPOSITORY / "benchmarks" / "plain_flights.py"
EXAMPLE = REPOSITORY / "examples" / "flights"

TARGETS: dict[str, tuple[str, float | None]] = {
    "cpu_ratio": ("× plain script", 3),
    "cpu_ratio_without_champion": ("× plain script", None),
    "wall_ratio": ("× plain script", None),
    "plain_cpu_seconds": ("s", None),
    "build_cpu_seconds": ("s", None),
    "fixed_overhead_cpu_seconds": ("s", None),
    "tasks": ("tasks", 14),
    "serving_install_mb": ("MB", 80),
}
IDLE_SECONDS = 30.0
SETTLE_SECONDS = 4.0  # the server goes on writing events and logs after a run has ended
POLL_SECONDS = 2.0  # each look costs the server some milliseconds
RUN_SECONDS = 900.0


class Cost(NamedTuple):
    """CPU seconds of every process that took part, and wall seconds from the request to the end."""

    cpu_seconds: float
    wall_seconds: float


class Installation:
    """An installation of the benchmark's own, and what runs in it cost."""

    def __init__(self, here: Settings) -> None:
        self.here = here
        self.flights = here.root / "repositories" / "flights"
        self.supervisor = Supervisor(here)
        self.idle_cpu_share = 0.0

    def cpu_seconds(self) -> float:
        """Of everything under its supervisord, the ended processes included."""
        return tree_cpu_seconds(self.supervisor.pid(), processes())

    def measure_idle(self) -> None:
        """What it spends with nothing to do is not what a build costs."""
        began, before = time.monotonic(), self.cpu_seconds()
        time.sleep(IDLE_SECONDS)
        self.idle_cpu_share = (self.cpu_seconds() - before) / (time.monotonic() - began)

    def build_flights(self, day: date) -> Cost:
        """Build a new commit on another day's data."""
        self.commit(day)
        return self.run("build/flights", as_of=day.isoformat())

    def commit(self, day: date) -> None:
        """A change that changes nothing: the same work, and a wheel of its own."""
        with (self.flights / "README.md").open("a") as readme:
            readme.write(f"\nBuilt for {day}.\n")
        author = ("-c", "user.name=Benchmark", "-c", "user.email=benchmark@perennial.invalid")
        process.capture(
            ["git", *author, "commit", "--quiet", "--all", "--message", f"for {day}"],
            cwd=self.flights,
            environment=process.scrubbed_environment(GIT_CONFIG_NOSYSTEM="1"),
            timeout_seconds=60,
        )

    def run(self, deployment: str, **parameters: Any) -> Cost:
        """Run a deployment to its end."""
        began, before = time.monotonic(), self.cpu_seconds()
        wall = _run(deployment, parameters).wall_seconds
        time.sleep(SETTLE_SECONDS)
        used = self.cpu_seconds() - before
        return Cost(used - self.idle_cpu_share * (time.monotonic() - began), wall)

    def profile(self, deployment: str, **parameters: Any) -> Profile:
        """Run a deployment and say where the CPU seconds went."""
        pids = {name: found.pid for name, found in self.supervisor.processes().items() if name in PARTS}
        sampler = Sampler(lambda: _reading(pids))
        with sampler.running():
            ran = _run(deployment, parameters)
            time.sleep(SETTLE_SECONDS)
        return Profile(ran, sampler)


class Ran(NamedTuple):
    """A run that completed: its steps' names with start and end (seconds since the epoch)."""

    wall_seconds: float
    began: float
    ended: float
    steps: tuple[tuple[str, float, float], ...]


class Profile(NamedTuple):
    ran: Ran
    sampler: Sampler


COLUMNS = ("flow", "children", "prefect-server", "prefect-worker", "mlflow", "storefront", "envoy")


def _reading(pids: dict[str, int]) -> dict[str, float]:
    """CPU seconds since its start of each part; the flow's process and its children apart from the worker."""
    table = processes()
    reading = {name: tree_cpu_seconds(pid, table) for name, pid in pids.items() if pid in table}
    worker = pids["prefect-worker"]
    runs = [pid for pid, found in table.items() if found.parent == worker]
    reading["prefect-worker"] = table[worker].own
    if runs:
        reading["flow"] = table[runs[0]].own
        reading["children"] = tree_cpu_seconds(runs[0], table) - table[runs[0]].own
    return reading


def _run(deployment: str, parameters: dict[str, Any]) -> Ran:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        run = client.create_flow_run_from_deployment(found.id, parameters=parameters)
        deadline = time.monotonic() + RUN_SECONDS
        while run.state is None or not run.state.is_final():
            if time.monotonic() > deadline:
                sys.exit(f"{deployment} did not end within {RUN_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
            run = client.read_flow_run(run.id)
        if not run.state.is_completed():
            sys.exit(f"{deployment} ended as {run.state.name}: {run.state.message}")
        steps = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    began, ended = run.created.timestamp(), run.end_time.timestamp()
    spans = [
        (step.name.rsplit("-", 1)[0], step.start_time.timestamp(), step.end_time.timestamp())
        for step in steps
        if step.start_time and step.end_time
    ]
    return Ran(ended - began, began, ended, tuple(sorted(spans, key=lambda span: span[1])))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--pairs", type=int, default=3)
    arguments.add_argument("--as-of", type=date.fromisoformat, default=date(2013, 7, 1))
    chosen = arguments.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    with tempfile.TemporaryDirectory(prefix="perennial-bench-") as home:
        os.environ |= _own_settings(Path(home))
        here = settings()
        os.environ |= installation.prefect_environment(here)
        try:
            installation.up(here)
            _benchmark(Installation(here), chosen.as_of, chosen.pairs)
        finally:
            installation.down(here)


def _own_settings(home: Path) -> dict[str, str]:
    names = (
        "prefect_port",
        "mlflow_port",
        "storefront_port",
        "production_port",
        "test_port",
        "router_admin_port",
        "first_service_port",
    )
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    found = {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
    for each in sockets:
        each.close()
    return {f"PERENNIAL_{name.upper()}": str(port) for name, port in found.items()} | {
        "PERENNIAL_HOME": str(home)
    }


def _benchmark(own: Installation, first_day: date, pairs: int) -> None:
    from deployments.demo import commit_example
    from deployments.register import register
    from tests.factories import make_project

    journal = open_journal(own.here.database)
    commit_example(own.flights)
    journal.enable_project("flights", str(own.flights))
    journal.enable_project("toy", make_project(own.here.root / "repositories" / "toy").url)
    register()
    days = iter(first_day + timedelta(days=number) for number in range(1000))

    print("\nwarming up: environment, one build, one plain script")
    warm_up = next(days)
    own.build_flights(warm_up)
    champion = journal.releases("flights", "accepted", limit=1)[0]
    plain = Plain(own.here, champion)
    plain.run(warm_up)
    own.measure_idle()
    print(f"idle, the installation spends {own.idle_cpu_share:.3f} CPU s a second")

    day = next(days)
    lone = own.build_flights(day).cpu_seconds / plain.run(day).cpu_seconds
    own.run("deploy/flights", release_id=champion.release_id, environment="test")
    own.measure_idle()
    measured = [_pair(own, plain, next(days), number) for number in range(pairs)]

    day = next(days)
    own.commit(day)
    profile = own.profile("build/flights", as_of=day.isoformat())
    _say_steps(profile, own.idle_cpu_share)

    own.run("build/flights", project="toy", as_of=date(2026, 3, 1).isoformat())
    toy = own.run("build/flights", project="toy", as_of=date(2026, 3, 2).isoformat())

    values = {
        "cpu_ratio": median([build.cpu_seconds / script.cpu_seconds for script, build in measured]),
        "cpu_ratio_without_champion": lone,
        "wall_ratio": median([build.wall_seconds / script.wall_seconds for script, build in measured]),
        "plain_cpu_seconds": median([script.cpu_seconds for script, _ in measured]),
        "build_cpu_seconds": median([build.cpu_seconds for _, build in measured]),
        "fixed_overhead_cpu_seconds": toy.cpu_seconds,
        "tasks": len(profile.ran.steps),
        "serving_install_mb": serving_install_mb(own.here.root / "serving"),
    }
    _report(values)


def _pair(own: Installation, plain: Plain, day: date, number: int) -> tuple[Cost, Cost]:
    """Plain script and build on the same day; every other pair the build goes first."""
    if number % 2:
        build = own.build_flights(day)
        script = plain.run(day)
    else:
        script = plain.run(day)
        build = own.build_flights(day)
    print(
        f"{day}: plain {script.cpu_seconds:5.2f} CPU s, {script.wall_seconds:5.1f} s; "
        f"build {build.cpu_seconds:5.2f} CPU s, {build.wall_seconds:5.1f} s"
    )
    return script, build


class Plain:
    """The plain script, in the same environment as the project's own steps."""

    def __init__(self, here: Settings, release: Release) -> None:
        self._python = here.root / "environments" / release.environment.fingerprint[:16] / "bin" / "python"
        self._model = here.root / "plain.skops"

    def run(self, day: date) -> Cost:
        argv = [self._python, PLAIN, day.isoformat(), self._model, EXAMPLE / "expectations.json"]
        environment = process.scrubbed_environment(
            OMP_NUM_THREADS="1",
            OPENBLAS_NUM_THREADS="1",
            OMP_WAIT_POLICY="PASSIVE",
            PYTHONPATH=str(EXAMPLE / "src"),
        )
        return Cost(*child_cpu_seconds([str(part) for part in argv], environment))


def serving_install_mb(folder: Path) -> float:
    """Size on disk of the serving wheel and what it needs to serve, without a model's own libraries."""
    from uv import find_uv_bin

    wheel = environments.serving_wheel(folder)
    process.capture(
        [find_uv_bin(), "pip", "install", "--quiet", "--target", str(folder / "site"), str(wheel)],
        cwd=folder,
        environment=process.scrubbed_environment(network=True),
        timeout_seconds=300,
    )
    sizes = [path.stat().st_size for path in (folder / "site").rglob("*") if path.is_file()]
    return sum(sizes) / 1e6


def _say_steps(profile: Profile, idle_cpu_share: float) -> None:
    ran, sampler = profile
    first, last = ran.steps[0][1], ran.steps[-1][2]
    spans = [
        ("start of the run", ran.began, first),
        *ran.steps,
        ("end of the run", last, ran.ended + SETTLE_SECONDS),
    ]
    print(f"\n{'CPU seconds':<20}" + "".join(f"{name.removeprefix('prefect-'):>11}" for name in COLUMNS))
    for name, start, end in spans:
        cells = [sampler.spent(column, start, end) for column in COLUMNS]
        print(f"{name:<20}" + "".join(f"{cell:11.2f}" if cell >= 0.005 else f"{'·':>11}" for cell in cells))
    seconds = ran.ended + SETTLE_SECONDS - ran.began
    print(f"(of these, {idle_cpu_share * seconds:.2f} would have been spent by an idle installation)")


def _report(values: dict[str, float]) -> None:
    print()
    figures = []
    for name, (unit, target) in TARGETS.items():
        print(f"{name:<28} {values[name]:8.2f} {unit:<16}" + (f" (target ≤ {target})" if target else ""))
        figures.append({"figure": name, "value": round(values[name], 3), "unit": unit, "target": target})
    write_figures(OUT, figures)
    print(f"\nwritten to {OUT.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
