"""Back to a release that served before, as `python -m perennial rollback` does it without Prefect."""

from __future__ import annotations

from prefect import flow

from perennial.values import Environment, ProjectName, ReleaseId, Rollout
from tasks import edge
from tasks.rollback import name_champion, roll_back


@flow(flow_run_name=edge.named("roll back {project}", "in {environment}", "to {release_id}"), **edge.DURABLE)
@edge.explained
def rollback(
    project: ProjectName,
    environment: Environment | None = None,
    release_id: ReleaseId | None = None,
    reason: str = "",
) -> Rollout:
    """Bring back a release (without an id the one before the one that serves) where users are.

    Ends a rollout under way. No rebuild, no approval: what served before was approved before.
    """
    done = roll_back(project, environment, release_id, reason)
    return name_champion(done)
