"""Every day: the commit that serves on today's data; in front of users only if the gates say so."""

from __future__ import annotations

from datetime import date
from typing import Any

from prefect import flow
from prefect.states import Completed, State

from flows.build import build
from flows.deploy import deploy
from perennial.values import Environment, ProjectName, Rollout
from tasks import edge
from tasks.retrain import claim_day, finish_day


@flow(flow_run_name=edge.named("retrain {project}", "for {as_of}"), **edge.DURABLE)
@edge.explained
def retrain(
    project: ProjectName, as_of: date | None = None, environment: Environment = "test"
) -> Rollout | State[Any]:
    """Build on the data known on `as_of` (today without one) and deploy what passes.

    One run per project and day: a late one, or a second one, ends at once and says so.
    """
    day = claim_day(project, environment, as_of)
    if day.done:
        return Completed(name="AlreadyRetrained", message=day.reason)
    built = build(project, ref=day.git_sha, as_of=day.as_of, return_state=True)
    if not built.is_completed():
        return edge.same_end(built)
    release = built.result()
    rollout = deploy(project, environment, release.release_id)
    finish_day(day, release)
    return rollout
