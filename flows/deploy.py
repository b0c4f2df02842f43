"""From a release to the service that users call. Rollback is this flow with an older release id."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.states import State

from perennial.values import Environment, ProjectName, ReleaseId, Rollout
from tasks import edge
from tasks.approval import ask_approval, declined
from tasks.rollout import (
    check_candidate,
    collect_release,
    prepare_image,
    promote_release,
    retire_previous,
    shift_traffic,
    start_candidate,
    watch_release,
)
from tasks.verdict import ask_verdict


@flow(flow_run_name=edge.named("deploy {project} to {environment}", "{release_id}"), **edge.DURABLE)
@edge.explained
def deploy(
    project: ProjectName, environment: Environment = "test", release_id: ReleaseId | None = None
) -> Rollout | State[Any]:
    """Put a release (the newest accepted one without an id) in front of an environment's users.

    Until it is promoted the active release serves; a candidate that does harm, or fails, is removed.
    """
    release = collect_release(project, environment, release_id)
    review = ask_approval(release, environment)  # the run waits in the Prefect UI
    if review.declined:
        return declined(review)
    image = prepare_image(release, environment)
    candidate = start_candidate(release, environment, image)
    parity = check_candidate(release, environment, image, candidate)
    evidence = shift_traffic(release, environment, image, parity)
    evidence = ask_verdict(release, environment, evidence)  # waits there only if the evidence is too little
    promoted = promote_release(release, environment, evidence)
    rollout = retire_previous(promoted)
    return watch_release(rollout)
