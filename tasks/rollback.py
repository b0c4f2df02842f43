"""The way back, with Prefect's run around it."""

from __future__ import annotations

from prefect import get_run_logger, task

from perennial import registry, rollback
from perennial.settings import settings
from perennial.targets import open_target
from perennial.values import Environment, ProjectName, ReleaseId, Rollout
from tasks import edge


@task(**edge.REPEATABLE)
def roll_back(
    project: ProjectName, environment: Environment | None, release_id: ReleaseId | None, reason: str
) -> Rollout:
    """Start the earlier release unless it is still warm, prove it, and switch."""
    here, journal = settings(), edge.journal()
    where = environment or rollback.default_environment(journal, project)
    before = journal.active(project, where)
    done = rollback.roll_back(
        here,
        journal,
        open_target(here),
        edge.store(),
        project,
        where,
        release_id,
        reason,
        edge.store_environment(),
    )
    get_run_logger().info("%s serves in %s, before it %s", done.active, where, before)
    return done


@task(**edge.REPEATABLE)
def name_champion(done: Rollout) -> Rollout:
    """Point MLflow's alias at the release that challengers are compared with."""
    champion = edge.journal().champion(done.project)
    if champion is not None:
        registry.promote(settings().mlflow_url, done.project, champion)
    return done
