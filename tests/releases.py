"""Releases for tests: whole and valid, each field to be replaced at will."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

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
    Source,
    TestReport,
    TrainedModel,
    Verdict,
)

SHA = "0123456789abcdef" * 4


def an_artifact(name: str = "x") -> Artifact:
    return Artifact(uri=f"file:///store/{name}", sha256=SHA, bytes=1)


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
