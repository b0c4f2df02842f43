"""MLflow: one run and one model version per release, and the aliases that say which one is which."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from perennial.errors import InstallationError
from perennial.imports import deferred
from perennial.values import Release, Value

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"
_RELEASE_TAG = "perennial.release_id"


class Registration(Value):
    """Where a release stands in MLflow."""

    run_id: str
    version: str
    url: str


def register(
    mlflow_url: str, release: Release, model: Path, report: Path | None, form: Path | None = None
) -> Registration:
    """Log the run, upload model, report and served form, create the version, point `challenger` at it.

    Safe to run again, wherever it was cut off: run and version are found by the release's tag.
    """
    project, release_id = release.project, release.release_id
    client = _client(mlflow_url)
    known = client.search_model_versions(f"name='{project}' and tag.`{_RELEASE_TAG}`='{release_id}'")
    if known:
        _challenge(client, project, known[0].version)
        return _registration(mlflow_url, project, known[0].version, known[0].run_id or "")

    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
    tags = {_RELEASE_TAG: release_id, **_lineage(release)}
    begun = client.search_runs([experiment_id], f"tags.`{_RELEASE_TAG}` = '{release_id}'", max_results=1)
    run = begun[0] if begun else client.create_run(experiment_id, tags=tags, run_name=release_id)
    run_id = run.info.run_id
    now = run.info.start_time
    client.log_batch(
        run_id,
        metrics=[
            Metric(m.name, m.value, now, 0)
            for m in release.evaluation.metrics
            if m.value is not None and not m.slice
        ],
        params=[Param(name, value[:500]) for name, value in release.model.parameters.items()],
        tags=[
            RunTag("mlflow.source.name", project),
            RunTag("mlflow.source.git.commit", release.source.git_sha),
        ],
    )
    client.log_artifacts(run_id, str(model), "model")
    if form is not None:
        client.log_artifacts(run_id, str(form), "serving")
    if report is not None:
        client.log_artifact(run_id, str(report))
    client.set_terminated(run_id)
    try:
        client.create_registered_model(project)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        project, source=f"{run.info.artifact_uri}/model", run_id=run_id, tags=tags
    ).version
    _challenge(client, project, version)
    return _registration(mlflow_url, project, version, run_id)


def promote(mlflow_url: str, project: str, release_id: str) -> None:
    """Point `champion` at a release; it is no challenger any more."""
    client = _client(mlflow_url)
    versions = client.search_model_versions(f"name='{project}' and tag.`{_RELEASE_TAG}`='{release_id}'")
    if not versions:
        raise InstallationError(
            f"MLflow at {mlflow_url} knows no version of {project} for {release_id}",
            "the version that the build registered",
            "check that PERENNIAL_MLFLOW_DATABASE_URL is the one the build used",
        )
    version = versions[0].version
    client.set_registered_model_alias(project, CHAMPION, version)
    aliases = client.get_registered_model(project).aliases
    if aliases.get(CHALLENGER) == version:
        client.delete_registered_model_alias(project, CHALLENGER)


def _challenge(client: MlflowClient, project: str, version: str | int) -> None:
    """Point `challenger` at a version, unless it is the champion."""
    aliases = client.get_registered_model(project).aliases
    if aliases.get(CHAMPION) != str(version):
        client.set_registered_model_alias(project, CHALLENGER, str(version))


def _lineage(release: Release) -> dict[str, str]:
    """Which code, data, environment and artifact the version is made of."""
    lineage = {
        "git_sha": release.source.git_sha,
        "repository": release.source.repository,
        "data_uri": release.dataset.uri,
        "data_fingerprint": release.dataset.fingerprint,
        "as_of": release.dataset.as_of.isoformat(),
        "environment": release.environment.fingerprint,
        "model_uri": release.model.artifact.uri,
        "model_sha256": release.model.artifact.sha256,
        "wheel": release.package.filename if release.package else "",
        "gates": release.gates.summary,
    }
    if (form := release.serving) is not None:
        lineage |= {
            "serving.path": form.path,
            "serving.reason": form.reason,
            "serving.batching": str(form.batching).lower(),
            "serving.sha256": form.artifact.sha256,
        }
        if form.max_abs_difference is not None:
            lineage["serving.max_abs_difference"] = repr(form.max_abs_difference)
    return {f"perennial.{name}": value[:4000] for name, value in lineage.items()}


def _client(mlflow_url: str) -> MlflowClient:
    # Fail in seconds, not after minutes of retries, when the server is away.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with deferred("mlflow.genai"):  # judges and scorers of language models
        from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=mlflow_url, registry_uri=mlflow_url)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise InstallationError(
            f"MLflow does not answer at {mlflow_url}", "a running tracking server", "make up", transient=True
        ) from error
    return client


def _registration(mlflow_url: str, project: str, version: str | int, run_id: str) -> Registration:
    return Registration(
        run_id=run_id, version=str(version), url=f"{mlflow_url}/#/models/{project}/versions/{version}"
    )
