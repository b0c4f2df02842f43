"""From an accepted model to one immutable release, or to the record of a rejected one."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact
from prefect.states import Failed, State

from perennial import artifacts, environments, index, registry, releases
from perennial.config import Project
from perennial.settings import settings
from perennial.values import Package, Release, ServingForm, Source, slug
from tasks import edge


@task(**edge.REPEATABLE)
def publish_package(code: Source, project: Project) -> Package:
    """Build the project's wheel, its version naming the commit, and put it on the package index."""
    version = index.local_version(project.version, code.git_sha)
    known = index.find(edge.store(), project.name, version)
    if known is not None:
        return known
    wheel = environments.build_project_wheel(edge.project_folder(code), version, edge.work_folder())
    package = index.publish(edge.store(), wheel)
    get_run_logger().info("%s is on the index at %s/simple/", package.filename, settings().storefront_url)
    return package


@task(**edge.REPEATABLE)
def register_model(draft: Release, serving: ServingForm, package: Package) -> Release:
    """One MLflow run and model version for the release, `challenger` pointing at it."""
    release = draft.model_copy(update={"serving": serving, "package": package})
    store = edge.store()
    model = artifacts.open_local(store, release.model.artifact, edge.work_folder())
    form = artifacts.open_local(store, serving.artifact, edge.work_folder())
    report = release.evaluation.report
    page = artifacts.open_local(store, report, edge.work_folder()) / "evaluation.html" if report else None
    registered = registry.register(settings().mlflow_url, release, model, page, form)
    create_link_artifact(
        key=f"mlflow-{slug(release.project)}",
        link=registered.url,
        link_text=f"MLflow: {release.project} version {registered.version}",
    )
    return release.model_copy(
        update={"mlflow_version": registered.version, "mlflow_run_id": registered.run_id}
    )


@task(**edge.REPEATABLE)
def write_release(release: Release) -> Release:
    """Written once, atomically, last: before this nothing of the build can be deployed."""
    written = releases.write(edge.store(), edge.journal(), release)
    create_link_artifact(
        key=f"release-{slug(written.project)}",
        link=f"{settings().storefront_url}/releases/{written.project}/{written.release_id}",
        link_text=written.release_id,
        description=f"{written.status}: {written.gates.summary}",
    )
    get_run_logger().info("%s: %s, %s", written.release_id, written.status, written.gates.summary)
    edge.clear_work()
    return written


def rejected(release: Release) -> State[Release]:
    """How a run ends whose model is not good enough: no crash, no success, and the gate by name."""
    return Failed(name="Rejected", message=f"{release.release_id}: {release.gates.summary}")
