"""What came out of training, kept in the store and turned into an evaluation."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from perennial import artifacts, evaluation, reports, snapshot, training
from perennial.config import METRICS, Project, ProjectConfig
from perennial.errors import ProjectError, ReleaseError
from perennial.evaluation import Booleans, Floats, Holdout, Integers
from perennial.store import Store
from perennial.values import (
    Artifact,
    Dataset,
    Evaluation,
    ModelEnvironment,
    Release,
    ServingForm,
    TrainedModel,
)
from serving import contract

if TYPE_CHECKING:
    import pyarrow as pa

_MAX_LEVELS = 30  # of a slice column: the most frequent ones, so that a table stays readable
_MIN_SLICE_ROWS = 50
_HOLDOUT_FILE = "holdout.parquet"


def keep_model(
    store: Store,
    project: Project,
    environment: ModelEnvironment,
    holdout_start: datetime | None,
    output: Path,
    result: contract.Result,
) -> TrainedModel:
    """Put what the trainer wrote into the store."""
    prefix = f"models/{project.name}"
    return TrainedModel(
        artifact=artifacts.put_directory(store, f"{prefix}/model", output / contract.MODEL_DIRECTORY),
        input_schema=artifacts.put_file(
            store, f"{prefix}/{contract.SCHEMA_FILE}", output / contract.SCHEMA_FILE
        ),
        golden=artifacts.put_file(store, f"{prefix}/{contract.GOLDEN_FILE}", output / contract.GOLDEN_FILE),
        holdout_predictions=artifacts.put_file(store, f"{prefix}/{_HOLDOUT_FILE}", output / _HOLDOUT_FILE),
        environment=environment.fingerprint,
        seed=project.config.seed,
        training_rows=result.training_rows,
        holdout_rows=result.holdout_rows,
        holdout_start=holdout_start,
        train_seconds=round(result.train_seconds, 3),
        parameters=result.parameters,
    )


def restore_model(store: Store, model: TrainedModel, folder: Path) -> Path:
    """What the trainer wrote, from the store into `folder`, whatever became of the run's own files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, artifact in (
        (contract.MODEL_DIRECTORY, model.artifact),
        (contract.SCHEMA_FILE, model.input_schema),
        (contract.GOLDEN_FILE, model.golden),
        (_HOLDOUT_FILE, model.holdout_predictions),
    ):
        artifacts.fetch(store, artifact, folder / name)
    return folder


def keep_form(store: Store, project: Project, output: Path, plan: contract.Plan) -> ServingForm:
    """Put what the compiler wrote into the store."""
    parity = plan.parity
    return ServingForm(
        path=plan.path,
        reason=plan.reason,
        batching=plan.batching,
        batching_reason=plan.batching_reason,
        max_abs_difference=parity.max_abs_difference if parity else None,
        rows=parity.rows if parity else 0,
        edge_rows=parity.edge_rows if parity else 0,
        tolerance=parity.tolerance if parity and plan.path == "compiled" else None,
        artifact=artifacts.put_directory(
            store, f"models/{project.name}/{contract.SERVING_DIRECTORY}", output
        ),
    )


def check_form(config: ProjectConfig, form: ServingForm) -> None:
    """Raises ProjectError for a model that must be served compiled and cannot be."""
    if config.service.compiled == "required" and form.path != "compiled":
        raise ProjectError(
            f"the model cannot be served compiled: {form.reason}",
            'a model that compiles, as compiled = "required" under [tool.perennial.service] asks',
            'change what the reason names, or set compiled = "auto" to serve the model as it is',
        )


def read_holdout(store: Store, config: ProjectConfig, model: TrainedModel, cache: Path) -> Holdout:
    """The holdout's truth, predictions, days and slices, as the trainer wrote them."""
    table = snapshot.read(artifacts.open_local(store, model.holdout_predictions, cache))
    slices: dict[str, Booleans] = {}
    for column in config.slices:
        values = table[column].to_numpy()
        levels, counts = np.unique(values.astype(str), return_counts=True)
        for index in np.argsort(-counts, kind="stable")[:_MAX_LEVELS]:
            if counts[index] >= _MIN_SLICE_ROWS:
                slices[f"{column}={levels[index]}"] = values.astype(str) == levels[index]
    return Holdout(
        truth=table[config.target].to_numpy().astype(np.float64),
        prediction=table["prediction"].to_numpy().astype(np.float64),
        cluster=_clusters(table, config),
        slices=slices,
    )


def champion_predictions(
    project: Project,
    release: Path,
    python: Path,
    dataset: Dataset,
    model: TrainedModel,
    parquet: Path,
    work: Path,
) -> Floats:
    """What the champion, run in its own environment, says of the same rows.

    Raises ReleaseError when the data no longer holds a column that the champion needs.
    """
    schema = msgspec.json.decode((release / contract.SCHEMA_FILE).read_bytes(), type=contract.InputSchema)
    missing = {column.name for column in schema.features} - {column.name for column in dataset.columns}
    if missing:
        raise ReleaseError(
            f"load_data gives no {', '.join(sorted(missing))}, which the champion {release.name} needs",
            "the champion's columns for one more release, so that both can be judged on the same rows",
            "keep the columns, or set compare_with_champion = false in [tool.perennial] for this release",
        )
    last_rows = None if model.holdout_start else model.holdout_rows
    predictions = training.predict(release, project, python, parquet, model.holdout_start, last_rows, work)
    theirs: Floats = snapshot.read(predictions)["prediction"].to_numpy().astype(np.float64)
    return theirs


def evaluate(
    config: ProjectConfig, holdout: Holdout, champion: Release | None, theirs: Floats | None
) -> Evaluation:
    """Every metric of the task, or those that the project names; the champion's on rows new to it too."""
    metrics = config.metrics or METRICS[config.task]
    overall = evaluation.evaluate(holdout, metrics)
    if champion is None or theirs is None:
        return Evaluation(metrics=overall)
    unseen = _unseen(holdout, champion, config)
    differences = evaluation.compare(evaluation.restrict(holdout, unseen), theirs[unseen], metrics)
    return Evaluation(metrics=overall, champion=champion.release_id, champion_differences=differences)


def _unseen(holdout: Holdout, champion: Release, config: ProjectConfig) -> Booleans:
    """The rows that the champion was not trained on: in a build for an earlier day, not all of them."""
    start = champion.model.holdout_start
    if config.time_column is None or start is None:
        return np.ones(len(holdout.truth), dtype=bool)
    return holdout.cluster >= np.datetime64(start.date(), "D").astype(np.int64)


def keep_report(
    store: Store, project: Project, model: TrainedModel, holdout: Holdout, found: Evaluation
) -> Evaluation:
    """Draw the evaluation's page and put it into the store; the evaluation then names it."""
    plots = reports.plots(holdout, found, project.config.task)
    title = f"{project.name}: {model.holdout_rows:,} rows that the model never saw"
    with TemporaryDirectory() as folder:
        page = Path(folder)
        (page / "evaluation.html").write_text(
            reports.evaluation_html(title, found.metrics, plots), encoding="utf-8"
        )
        (page / "evaluation.json").write_text(json.dumps(found.model_dump(mode="json"), indent=1))
        for name, png in plots.items():
            (page / f"{name}.png").write_bytes(png)
        report: Artifact = artifacts.put_directory(store, f"reports/{project.name}/evaluation", page)
    return found.model_copy(update={"report": report})


def plot_names(store: Store, found: Evaluation) -> list[str]:
    """The plots that the evaluation's report holds, the whole before the slices."""
    assert found.report is not None
    names = [PurePosixPath(key) for key in store.list(store.key(found.report.uri))]
    return sorted((n.stem for n in names if n.suffix == ".png"), key=reports.PLOTS.index)


def _clusters(table: pa.Table, config: ProjectConfig) -> Integers:
    """The day of each row; without a time column the first key; without keys every row on its own."""
    if config.time_column:
        days: Integers = table[config.time_column].to_numpy().astype("datetime64[D]").astype(np.int64)
        return days
    if config.entity_id:
        return np.unique(table[config.entity_id[0]].to_numpy(), return_inverse=True)[1].astype(np.int64)
    return np.arange(table.num_rows, dtype=np.int64)
