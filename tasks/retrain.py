"""One retraining per project and day."""

from __future__ import annotations

from datetime import date

from prefect import get_run_logger, task

from perennial import retraining
from perennial.retraining import Day
from perennial.values import Environment, ProjectName, Release
from tasks import edge


@task
def claim_day(project: ProjectName, environment: Environment, as_of: date | None) -> Day:
    """Which day, at which commit, and whether it has been retrained already."""
    day = retraining.claim(edge.journal(), project, environment, as_of)
    get_run_logger().info("%s", day.reason)
    return day


@task(**edge.REPEATABLE)
def finish_day(day: Day, release: Release) -> None:
    """Write to the journal that the day is done, so that no later run does it again."""
    retraining.finish(edge.journal(), day, release.release_id)
