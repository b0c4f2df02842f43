"""`python -m benchmarks.image`: the image of the compiled flights model, on the local base.

Needs a Docker engine (DOCKER_HOST or the local socket) and, once, what infra/docker/base-image.sh says.
Size, a build after a model change, and the time from starting a container to its first prediction; medians.
docs/images.md says what is in the image. Figures: benchmarks/out/image.json.
"""

from __future__ import annotations

import http.client
import json
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.measure import median, write_figures
from benchmarks.peers import flights as model
from perennial import environments, images
from perennial.engine import open_engine
from perennial.errors import PerennialError
from perennial.images import Image
from perennial.installation import REPOSITORY
from serving import contract

OUT = REPOSITORY / "benchmarks" / "out"
TARGETS = {
    "image_mb": ("MB", 150),
    "rebuild_seconds": ("s", 1.5),
    "first_answer_seconds": ("s", 1),
}
TIMES = 7
PORT = "8080/tcp"
PATIENCE_SECONDS = 60.0
DOC_STRING = 0x32  # protobuf's tag of an ONNX model's doc_string


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    print("the model: environment, training, compiling")
    flights = model.train(OUT)
    if flights.plan.path != "compiled":
        sys.exit(f"the flights model is served by the original: {flights.plan.reason}")
    wheel = environments.serving_wheel(OUT / "environments")
    try:
        with open_engine() as engine, tempfile.TemporaryDirectory(prefix="perennial-bench-") as folder:
            _measure(engine, flights, wheel, Path(folder))
    except PerennialError as error:
        sys.exit(str(error))


def _measure(engine: Any, flights: model.Flights, wheel: Path, work: Path) -> None:
    def build(release: Path) -> tuple[Image, float]:
        began = time.perf_counter()
        image = images.build_image(engine, release, model.EXAMPLE / "requirements.lock", wheel, work)
        return image, time.perf_counter() - began

    first, seconds = build(flights.compiled)
    print(
        f"{first.reference} on {first.runtime}, {seconds:.1f} s (what the engine had already is used again)"
    )
    rebuilds, starts = [], []
    for number in range(TIMES):
        image, seconds = build(_changed(flights.compiled, work / f"release-{number}", number))
        if image.image_id == first.image_id or image.runtime != first.runtime:
            sys.exit(f"{image.reference} is not a new model on the same runtime")
        rebuilds.append(seconds)
        starts.append(_first_answer(engine, image, flights.rows[number], flights.predictions[number]))
        print(f"model {number}: built in {rebuilds[-1]:.2f} s, first answer after {starts[-1]:.2f} s")
        engine.images.remove(image.reference)
    layers = [each["Size"] for each in engine.images.get(first.runtime).history() if each["Size"] > 1e6]
    print("layers above 1 MB: " + ", ".join(f"{size / 1e6:.1f}" for size in layers))
    _report(first.size_bytes / 1e6, median(rebuilds), median(starts))


def _changed(release: Path, folder: Path, number: int) -> Path:
    """The release with another model: the graph's bytes differ, its predictions do not."""
    shutil.copytree(release, folder, ignore=shutil.ignore_patterns("__pycache__"))
    said = f"model {number}".encode()
    with (folder / contract.SERVING_DIRECTORY / contract.ONNX_FILE).open("ab") as graph:
        graph.write(bytes([DOC_STRING, len(said)]) + said)
    path = folder / contract.MANIFEST_FILE
    manifest = msgspec.json.decode(path.read_bytes(), type=contract.Manifest)
    renamed = msgspec.structs.replace(manifest, release_id=f"flights-{number:012x}")
    path.write_bytes(msgspec.json.encode(renamed))
    return folder


def _first_answer(engine: Any, image: Image, row: dict[str, object], expected: float) -> float:
    """Seconds from asking the engine for a container to the first answer, which is compared."""
    body = json.dumps({"rows": [row]})
    began = time.perf_counter()
    container = engine.containers.run(
        image.reference,
        ["--environment", "test", "--prediction-log", "file:///spool/log"],
        detach=True,
        read_only=True,
        tmpfs={"/spool": ""},
        ports={PORT: ("127.0.0.1", None)},
    )
    try:
        container.reload()
        port = int(container.ports[PORT][0]["HostPort"])
        while (answer := _ask(port, body)) is None:
            if time.perf_counter() - began > PATIENCE_SECONDS:
                sys.exit(f"no answer of {image.reference}:\n{container.logs().decode()}")
            time.sleep(0.005)
        seconds = time.perf_counter() - began
    finally:
        container.remove(force=True)
    if abs(answer - expected) > model.TOLERANCE:
        sys.exit(f"{image.reference} says {answer}, the model {expected}")
    return seconds


def _ask(port: int, body: str) -> float | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/predict", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        if answer.status == 200:
            return float(json.loads(said)["predictions"][0])
    return None


def _report(*values: float) -> None:
    print()
    figures = []
    for (name, (unit, target)), value in zip(TARGETS.items(), values, strict=True):
        print(f"{name:<24} {value:8.2f} {unit:<4} (target < {target:g})")
        figures.append({"figure": name, "value": round(value, 3), "unit": unit, "target": target})
    write_figures(OUT / "image.json", figures)
    print(f"\nwritten to {(OUT / 'image.json').relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
