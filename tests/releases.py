"""Releases for tests: whole and valid, each field to be replaced at will."""

from __future__ import annotations

import base64
import hashlib
import json
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from perennial import artifacts, index
from perennial.store import Store
from perennial.values import (
    Artifact,
    Column,
    Dataset,
    Evaluation,
    Gate,
    GateReport,
    Metric,
    ModelEnvironment,
    Release,
    ServiceLimits,
    ServingForm,
    Source,
    TestReport,
    TrainedModel,
    Verdict,
)

SHA = "0123456789abcdef" * 4

FORM = {"plan.json": b"the plan", "model.onnx": b"the graph"}
MODEL = {"model.skops": b"the model", "parts/more": b"more of it"}


def an_artifact(name: str = "x") -> Artifact:
    return Artifact(uri=f"file:///store/{name}", sha256=SHA, bytes=1)


def a_form(**changes: Any) -> ServingForm:
    """A compiled model's, batched; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "path": "compiled",
        "reason": "every step has an exact form",
        "batching": True,
        "batching_reason": "each row is predicted for itself",
        "max_abs_difference": 2e-16,
        "rows": 28,
        "edge_rows": 1234,
        "tolerance": 1e-9,
        "artifact": an_artifact("serving/"),
    }
    return ServingForm(**(fields | changes))


def a_release(**changes: Any) -> Release:
    """An accepted release of `toy`; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "release_id": "toy-0123456789ab",
        "project": "toy",
        "import_name": "toy",
        "task": "binary",
        "timezone": "UTC",
        "service": ServiceLimits(),
        "status": "accepted",
        "source": Source(project="toy", repository="/repository", git_sha=SHA[:40]),
        "dataset": Dataset(
            uri="file:///store/data.parquet",
            fingerprint=SHA,
            rows=100,
            columns=(Column(name="x", type="number", nullable=False),),
            as_of=date(2024, 6, 1),
            first_time=datetime(2024, 3, 1),
            last_time=datetime(2024, 5, 31),
        ),
        "environment": ModelEnvironment(
            fingerprint=SHA, lock=an_artifact("lock"), serving=an_artifact("serving"), python="3.11"
        ),
        "tests": TestReport(passed=3, skipped=0, report=an_artifact("tests.xml")),
        "model": TrainedModel(
            artifact=an_artifact("model/"),
            input_schema=an_artifact("schema.json"),
            golden=an_artifact("golden.json"),
            holdout_predictions=an_artifact("holdout.parquet"),
            environment=SHA,
            seed=0,
            training_rows=72,
            holdout_rows=28,
            holdout_start=datetime(2024, 5, 4),
            train_seconds=1.0,
            parameters={},
        ),
        "evaluation": Evaluation(
            metrics=(Metric(name="roc_auc", value=0.7, low=0.65, high=0.75, rows=28, clusters=28),)
        ),
        "gates": GateReport(
            gates=(Gate(name="roc_auc", verdict=Verdict.PASS, measured=0.7, threshold=0.6, reason="good"),)
        ),
        "created_at": datetime(2024, 6, 1, tzinfo=UTC),
    }
    return Release(**(fields | changes))


def a_stored_release(store: Store, folder: Path, **changes: Any) -> Release:
    """An accepted release all of whose files are in the store; `folder` is where they are made."""
    for name, data in MODEL.items():
        (folder / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "model" / name).write_bytes(data)
    (folder / "serving").mkdir(exist_ok=True)
    for name, data in FORM.items():
        (folder / "serving" / name).write_bytes(data)
    (folder / "schema.json").write_text(json.dumps({"features": []}))
    (folder / "golden.json").write_text(json.dumps({"rows": [], "predictions": []}))
    model = a_release().model.model_copy(
        update={
            "artifact": artifacts.put_directory(store, "models/toy/model", folder / "model"),
            "input_schema": artifacts.put_file(store, "models/toy/schema.json", folder / "schema.json"),
            "golden": artifacts.put_file(store, "models/toy/golden.json", folder / "golden.json"),
        }
    )
    form = a_form(artifact=artifacts.put_directory(store, "models/toy/serving", folder / "serving"))
    package = index.publish(store, a_wheel(folder))
    return a_release(**{"model": model, "serving": form, "package": package, **changes})


def a_wheel(
    folder: Path,
    name: str = "toy",
    version: str = "1.0",
    *,
    files: dict[str, bytes] | None = None,
    requires_python: str = "",
) -> Path:
    """A wheel that uv and pip install. Without `files` it holds one module that says its own version."""
    files = files or {f"{name.replace('-', '_')}.py": f"VERSION = {version!r}\n".encode()}
    about = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Python: {requires_python}\n" if requires_python else ""
    wheel = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {f"{about}/METADATA": metadata.encode(), f"{about}/WHEEL": wheel.encode()}
    record = "".join(f"{file},sha256={_record(data)},{len(data)}\n" for file, data in files.items())
    files = files | {f"{about}/RECORD": f"{record}{about}/RECORD,,\n".encode()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{about.removesuffix('.dist-info')}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            archive.writestr(zipfile.ZipInfo(file), data)  # ZipInfo: the same bytes at any time
    return path


def _record(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
