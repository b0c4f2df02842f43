"""From a release to the service that users call."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_table_artifact

from perennial import leases, probation, registry, releases, rollout
from perennial.analysis import Evidence
from perennial.errors import RolloutError
from perennial.settings import settings
from perennial.targets import open_target
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
    """Find the release and bring its files onto this machine, every digest checked."""
    release = releases.find(edge.journal(), project, release_id)
    edge.release_folder(release)
    return release


@task(**edge.REPEATABLE)
def prepare_image(release: Release, environment: Environment) -> str:
    """What the release is started from: its environment on this machine, or its image, by digest."""
    rollout.admit(edge.journal(), release, environment)
    return open_target(settings()).prepare(release, edge.release_folder(release), edge.store())


@task
def start_candidate(release: Release, environment: Environment, image: str) -> Endpoint:
    """Start the release beside the active one and wait until it is ready."""
    endpoint = _start(release, environment, image)
    get_run_logger().info("%s is ready on port %s", release.release_id, endpoint.port)
    return endpoint


@task
def check_candidate(
    release: Release, environment: Environment, image: str, candidate: Endpoint
) -> ParityReport:
    """Golden rows, as they were predicted in training, and a smoke test."""
    assert candidate.release_id == release.release_id
    endpoint = _start(release, environment, image)  # it runs, unless this is a retry: then it was withdrawn
    here = settings()
    report = rollout.prove(
        here,
        edge.journal(),
        open_target(here),
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


@task
def shift_traffic(release: Release, environment: Environment, image: str, parity: ParityReport) -> Evidence:
    """Give the candidate its share, step by step, and compare it with the release that serves."""
    assert parity.release_id == release.release_id
    endpoint = _start(release, environment, image)  # as above: what was checked may have ended
    here, folder = settings(), edge.release_folder(release)
    rollout.prove(here, edge.journal(), open_target(here), release, environment, endpoint, folder)
    evidence = rollout.shift(
        here,
        edge.journal(),
        open_target(here),
        release,
        environment,
        folder,
        edge.store(),
        rollout.policy_of(edge.journal(), release, environment),
        get_run_logger().info,
    )
    get_run_logger().info("%s: %s", evidence.verdict, evidence.reason)
    if evidence.measures:
        create_table_artifact(
            key=f"canary-{slug(release.project)}-{environment}",
            table=list(evidence.measures),
            description=f"{release.release_id} beside what serves: {evidence.verdict}, {evidence.reason}",
        )
    return evidence


@task(**edge.REPEATABLE)
def promote_release(release: Release, environment: Environment, evidence: Evidence) -> Rollout:
    """Write the promotion, then move all traffic to the release."""
    if evidence.verdict != "promote":
        raise RolloutError(f"{release.release_id} is not to be promoted: {evidence.reason}", "a verdict")
    here = settings()
    done = rollout.switch(
        here,
        edge.journal(),
        open_target(here),
        release,
        environment,
        reason={"verdict": evidence.model_dump(mode="json")},
    )
    create_link_artifact(
        key=f"service-{slug(release.project)}-{environment}",
        link=f"{done.url}/metadata",
        link_text=done.url,
        description=f"{release.release_id} serves in {environment}",
    )
    return done


@task(**edge.REPEATABLE)
def retire_previous(done: Rollout) -> Rollout:
    """Let the release before finish what it has, and stop it, unless it is kept warm for a way back."""
    here = settings()
    stopped = rollout.retire(here, edge.journal(), open_target(here), done.project, done.environment)
    get_run_logger().info("stopped %s", ", ".join(stopped) or "nothing")
    active = edge.journal().active(done.project, done.environment)
    if active != done.active:
        raise RolloutError(f"{active} was promoted after {done.active}", "the end of the newest deploy")
    if edge.journal().champion(done.project) == done.active:
        registry.promote(settings().mlflow_url, done.project, done.active)
    return done


@task
def watch_release(done: Rollout) -> Rollout:
    """Watch a promoted release through its probation; it goes back by itself when it does harm."""
    leases.let_go()  # a deploy or a rollback by hand need not wait for this
    here = settings()
    say = get_run_logger().info
    target, variables = open_target(here), edge.store_environment()
    return probation.watch(here, edge.journal(), target, edge.store(), variables, done, say)


def _start(release: Release, environment: Environment, image: str) -> Endpoint:
    here = settings()
    return rollout.start(
        here,
        edge.journal(),
        open_target(here),
        release,
        environment,
        edge.release_folder(release),
        edge.store_environment(),
        image,
    )
