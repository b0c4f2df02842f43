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
CONTAINER_DEPLOYS = 20
DEPLOYS = 200


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--deploys", type=int, default=DEPLOYS)
    arguments.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    chosen = arguments.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    accidents: list[Accident] = []
    rounds: list[Deploys] = []
    values: dict[str, float] = {}
    for name in chosen.only:
        began = time.monotonic()
        print(f"\n{name}: {PARTS[name]}")
        match name:
            case "processes":
                accidents += _of_processes()
            case "deploys":
                rounds.append(_of_deploys(chosen.deploys))
            case "containers":
                _of_containers(accidents, rounds)
            case "prefect":
                accidents += _of_prefect()
            case "images":
                values = _of_images()
        print(f"({time.monotonic() - began:.0f} s)")
    _report(_about_accidents(accidents) | _about_deploys(rounds) | values)


PARTS = {
    "processes": "kills in the middle of rollouts, services as processes",
    "deploys": "deploys and rollbacks one after the other",
    "containers": "both of these, services as containers",
    "prefect": "kills of flow run, worker and server",
    "images": "the image of the flights model (benchmarks.image)",
}


def _of_processes() -> list[Accident]:
    with _installation(["envoy"]) as here:
        return matrix.run(World(here))


def _of_prefect() -> list[Accident]:
    with _installation(whole.PARTS) as here:
        return whole.run(here)


def _of_containers(accidents: list[Accident], rounds: list[Deploys]) -> None:
    try:
        with open_engine() as engine, _installation(["envoy"], target="docker") as here:
            world = World(here, engine=engine, image=service_image(engine, here.root / "work"))
            try:
                accidents += matrix.run(world, {"blue-green": 0}, CONTAINER_RATE)
                rounds.append(deploys.run(world, CONTAINER_DEPLOYS))
            finally:
                world.stop()
                world.remove_images()
    except InstallationError as error:
        print(f"left out: {error}")


def _of_deploys(count: int) -> Deploys:
    with _installation(["envoy"]) as here:
        return deploys.run(World(here), count)


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


def _about_accidents(accidents: Sequence[Accident]) -> dict[str, float]:
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


def _about_deploys(rounds: Sequence[Deploys]) -> dict[str, float]:
    if not rounds:
        return {}
    switches = [seconds for found in rounds for seconds in found.switch_seconds]
    failures = [failure for found in rounds for failure in found.failures]
    leaked = [thing for found in rounds for thing in found.leaked]
    for said in (*failures[:5], *leaked):
        print(f"not as it should be: {said}")
    whole_ = median([seconds for found in rounds for seconds in found.seconds])
    requests = sum(found.requests for found in rounds)
    print(f"{requests} requests during the deploys, the median of which took {whole_:.2f} s")
    print(f"a switch took {min(switches):.2f} to {max(switches):.2f} s")
    return {
        "deploys": sum(found.done for found in rounds),
        "failed_requests_deploys": len(failures),
        "leaked_resources": len(leaked),
        "blue_green_switch_seconds": median(switches),
    }


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
