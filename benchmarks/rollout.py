"""`python -m benchmarks.rollout`: rollouts that cannot hurt, proven by killing everything.

Kills the flow's process, the worker, the Prefect server, the active and the candidate release's process or
container and Envoy, before and after the journal's writes; deploys and rolls back 200 times in a row; all of
it under load. docs/rollouts.md says what is promised. Containers are left out where no Docker engine answers
(DOCKER_HOST or the local socket), and their figures with them. Figures: benchmarks/out/rollout.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.chaos import deploys, matrix, whole
from benchmarks.chaos.deploys import Deploys
from benchmarks.measure import median, write_figures
from perennial.engine import open_engine
from perennial.errors import InstallationError
from perennial.installation import REPOSITORY
from perennial.settings import Settings
from tests.engines import service_image
from tests.infra.chaos import Accident, World
from tests.installations import own_settings, running

OUT = REPOSITORY / "benchmarks" / "out"
TARGETS: dict[str, tuple[str, float | None]] = {
    "kill_points": ("kills", None),
    "kill_points_inconsistent": ("kills", 0),
    "failed_requests_kill_matrix": ("requests", 0),
    "deploys": ("deploys", 200),
    "failed_requests_deploys": ("requests", 0),
    "leaked_resources": ("resources", 0),
    "blue_green_switch_seconds": ("s", 1),
    "router_recovery_seconds": ("s", 2),
    "image_mb": ("MB", 150),
    "image_model_change_seconds": ("s", 1.5),
    "container_start_seconds": ("s", 1),
}
OF_IMAGES = {  # as benchmarks.image calls them
    "image_mb": "image_mb",
    "image_model_change_seconds": "rebuild_seconds",
    "container_start_seconds": "first_answer_seconds",
}
CONTAINER_RATE = 150  # requests per second
DEPLOYS = 200


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--deploys", type=int, default=DEPLOYS)
    arguments.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    chosen = arguments.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    accidents: list[Accident] = []
    values: dict[str, float] = {}
    for name in chosen.only:
        began = time.monotonic()
        print(f"\n{name}: {PARTS[name]}")
        match name:
            case "processes":
                accidents += _of_processes()
            case "deploys":
                values |= _of_deploys(chosen.deploys)
            case "prefect":
                accidents += _of_prefect()
            case "containers":
                accidents += _of_containers()
            case "images":
                values |= _of_images()
        print(f"({time.monotonic() - began:.0f} s)")
    _report(_of_accidents(accidents) | values)


PARTS = {
    "processes": "kills in the middle of rollouts, services as processes",
    "deploys": "deploys and rollbacks one after the other",
    "containers": "kills in the middle of rollouts, services as containers",
    "prefect": "kills of flow run, worker and server",
    "images": "the image of the flights model (benchmarks.image)",
}


def _of_processes() -> list[Accident]:
    with _installation(["envoy"]) as here:
        return matrix.run(World(here))


def _of_prefect() -> list[Accident]:
    with _installation(whole.PARTS) as here:
        return whole.run(here)


def _of_containers() -> list[Accident]:
    try:
        with open_engine() as engine, _installation(["envoy"], target="docker") as here:
            world = World(here, engine=engine, image=service_image(engine, here.root / "work"))
            try:
                return matrix.run(world, {"blue-green": 0}, CONTAINER_RATE)
            finally:
                world.stop()
                world.remove_images()
    except InstallationError as error:
        print(f"left out: {error}")
        return []


def _of_deploys(count: int) -> dict[str, float]:
    with _installation(["envoy"]) as here:
        found: Deploys = deploys.run(World(here), count)
    for failure in found.failures[:5]:
        print(f"failed: {failure}")
    for thing in found.leaked:
        print(f"left over: {thing}")
    worst, whole_ = max(found.switch_seconds), median(found.seconds)
    print(f"{found.requests} requests; the slowest switch took {worst:.2f} s; a whole deploy {whole_:.2f} s")
    return {
        "deploys": found.done,
        "failed_requests_deploys": len(found.failures),
        "leaked_resources": len(found.leaked),
        "blue_green_switch_seconds": median(found.switch_seconds),
    }


def _of_images() -> dict[str, float]:
    file = OUT / "image.json"
    file.unlink(missing_ok=True)  # what an earlier run measured is not what this one did
    done = subprocess.run([sys.executable, "-m", "benchmarks.image"], cwd=REPOSITORY, check=False)
    if done.returncode != 0 or not file.exists():
        print("left out")
        return {}
    measured = {each["figure"]: each["value"] for each in json.loads(file.read_text())}
    return {name: measured[theirs] for name, theirs in OF_IMAGES.items()}


@contextmanager
def _installation(parts: Sequence[str], **more: Any) -> Iterator[Settings]:
    with tempfile.TemporaryDirectory(prefix="perennial-bench-") as home:
        os.chmod(home, 0o755)  # noqa: PTH101 - a container's user looks for its folders in it
        with running(own_settings(Path(home), **more), parts) as here:
            yield here


def _of_accidents(accidents: Sequence[Accident]) -> dict[str, float]:
    if not accidents:
        return {}
    back = [a.recovery_seconds for a in accidents if a.recovery_seconds is not None]
    values: dict[str, float] = {
        "kill_points": len(accidents),
        "kill_points_inconsistent": sum(not accident.consistent for accident in accidents),
        "failed_requests_kill_matrix": sum(len(accident.failures) for accident in accidents),
    }
    requests = sum(accident.requests for accident in accidents)
    print(f"\n{len(accidents)} kills, {requests} requests besides those to a router that was away")
    if back:
        print(f"the router was back after {min(back):.2f} to {max(back):.2f} s, median {median(back):.2f} s")
        values["router_recovery_seconds"] = max(back)
    return values


def _report(values: dict[str, float]) -> None:
    print()
    figures = []
    for name, (unit, target) in TARGETS.items():
        if name not in values:
            continue
        print(
            f"{name:<28} {values[name]:8.2f} {unit:<9}"
            + (f" (target {target:g})" if target is not None else "")
        )
        figures.append({"figure": name, "value": round(values[name], 3), "unit": unit, "target": target})
    write_figures(OUT / "rollout.json", figures)
    print(f"\nwritten to {(OUT / 'rollout.json').relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
