"""From a release to the service that users call."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact

from perennial import registry, releases, rollout
from perennial.errors import RolloutError
from perennial.settings import settings
from perennial.targets import ProcessTarget
from perennial.values import (
    Endpoint,
    Environment,
    ParityReport,
    ProjectName,
    Release,
    ReleaseId,
    Rollout,
    slug,
)
from tasks import edge


@task(**edge.REPEATABLE)
def collect_release(project: ProjectName, environment: Environment, release_id: ReleaseId | None) -> Release:
    """Find the release, see that it may enter, bring its files and its environment onto this machine."""
    release = releases.find(edge.journal(), project, release_id)
    rollout.admit(edge.journal(), release, environment)
    edge.release_folder(release)
    edge.environment_python(release.environment)
    return release


@task
def start_candidate(release: Release, environment: Environment) -> Endpoint:
    """Start the release beside the active one and wait until it is ready."""
    endpoint = _start(release, environment)
    get_run_logger().info("%s is ready on port %s", release.release_id, endpoint.port)
    return endpoint


@task
def check_candidate(release: Release, environment: Environment, candidate: Endpoint) -> ParityReport:
    """Golden rows, as they were predicted in training, and a smoke test."""
    assert candidate.release_id == release.release_id
    endpoint = _start(release, environment)  # it runs, unless this is a retry: then it was withdrawn
    report = rollout.prove(
        edge.journal(),
        ProcessTarget(settings()),
        release,
        environment,
        endpoint,
        edge.release_folder(release),
    )
    exactness = f"within {report.tolerance:g}" if report.tolerance else "bit for bit"
    get_run_logger().info(
        "%s golden rows answered as trained, %s, in %s s", report.rows, exactness, report.seconds
    )
    return report


def _start(release: Release, environment: Environment) -> Endpoint:
    here = settings()
    return rollout.start(
        here,
        edge.journal(),
        ProcessTarget(here),
        release,
        environment,
        edge.release_folder(release),
        edge.environment_python(release.environment),
        edge.store_environment(),
    )


@task(**edge.REPEATABLE)
def switch_traffic(release: Release, environment: Environment, parity: ParityReport) -> Rollout:
    """Write the promotion, then move all traffic to the release."""
    assert parity.release_id == release.release_id
    here = settings()
    done = rollout.switch(here, edge.journal(), ProcessTarget(here), release, environment)
    create_link_artifact(
        key=f"service-{slug(release.project)}-{environment}",
        link=f"{done.url}/metadata",
        link_text=done.url,
        description=f"{release.release_id} serves in {environment}",
    )
    return done


@task(**edge.REPEATABLE)
def retire_previous(done: Rollout) -> Rollout:
    """Let the release that served before finish what it has, stop it, and name the new champion."""
    here = settings()
    stopped = rollout.retire(here, edge.journal(), ProcessTarget(here), done.project, done.environment)
    get_run_logger().info("stopped %s", ", ".join(stopped) or "nothing: no other release ran")
    active = edge.journal().active(done.project, done.environment)
    if active != done.active:
        raise RolloutError(f"{active} was promoted after {done.active}", "the end of the newest deploy")
    if edge.journal().champion(done.project) == done.active:
        registry.promote(settings().mlflow_url, done.project, done.active)
    return done
