"""From the project's `load_data` to a snapshot that is fit to train on."""

from __future__ import annotations

import json
from datetime import date, datetime
from zoneinfo import ZoneInfo

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact

from perennial import reports, snapshot, training, validation
from perennial.config import Project
from perennial.values import Dataset, ModelEnvironment, Source, slug
from tasks import edge


@task
def snapshot_data(
    code: Source, project: Project, environment: ModelEnvironment, as_of: date | None
) -> Dataset:
    """Call `load_data` in the project's environment; keep what it returns, named by its content."""
    config = project.config
    today = as_of or datetime.now(ZoneInfo(config.schedule.timezone)).date()
    day = config.as_of(today)
    folder = edge.project_folder(code)
    parquet = training.load_data(
        project,
        folder,
        edge.environment_python(environment),
        day,
        edge.work_folder(),
        get_run_logger().info,
    )
    dataset = snapshot.keep(edge.store(), project.name, parquet, day, config.time_column)
    parquet.unlink()
    get_run_logger().info("%s rows, known on %s, fingerprint %s", dataset.rows, day, dataset.fingerprint[:16])
    return dataset


@task
def validate_data(code: Source, project: Project, dataset: Dataset) -> validation.DataReport:
    """Great Expectations over the snapshot: the contract's checks and the project's, or inferred ones."""
    suite = validation.contract_suite(project.config, dataset.as_of)
    own = validation.project_suite(edge.project_folder(code))
    origin = "the contract and the project's expectations.json"
    if own is None:
        released = edge.journal().releases(project.name, "accepted", limit=1)
        origin = "the contract" + (f" and the data of {released[0].release_id}" if released else "")
        own = (
            validation.inferred_suite(snapshot.read(edge.snapshot_file(released[0].dataset)))
            if released
            else []
        )
    report = validation.validate(snapshot.frame(edge.snapshot_file(dataset)), [*suite, *own], origin)
    summary = f"{dataset.rows:,} rows, {len(dataset.columns)} columns, known on {dataset.as_of}; {origin}"
    create_markdown_artifact(
        key=f"data-{slug(project.name)}",
        markdown=reports.data_page(report, summary),
        description="What Great Expectations found in the data",
    )
    edge.store().put_bytes(
        f"reports/{project.name}/data/{dataset.as_of}-{dataset.fingerprint[:16]}.json",
        json.dumps(report.model_dump(mode="json"), indent=1).encode(),
    )
    if report.failures:
        raise report.error()
    return report
