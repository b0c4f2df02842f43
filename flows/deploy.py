"""From a release to the service that users call. Rollback is this flow with an older release id."""

from __future__ import annotations

from prefect import flow

from perennial.values import Environment, ProjectName, ReleaseId, Rollout
from tasks import edge
from tasks.rollout import (
    check_candidate,
    collect_release,
    retire_previous,
    start_candidate,
    switch_traffic,
)


@flow(flow_run_name=edge.named("deploy {project} to {environment}", "{release_id}"), **edge.DURABLE)
@edge.explained
def deploy(
    project: ProjectName, environment: Environment = "test", release_id: ReleaseId | None = None
) -> Rollout:
    """Put a release (the newest accepted one without an id) in front of an environment's users.

    Until traffic is switched the active release serves untouched; a candidate that fails is removed.
    """
    release = collect_release(project, environment, release_id)
    candidate = start_candidate(release, environment)
    parity = check_candidate(release, environment, candidate)
    rollout = switch_traffic(release, environment, parity)
    return retire_previous(rollout)
