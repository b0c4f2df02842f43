"""One retraining per project and day, at the commit that serves."""

from __future__ import annotations

from datetime import date, datetime
from zoneinfo import ZoneInfo

from perennial.errors import ReleaseError
from perennial.journal import Journal
from perennial.values import Environment, ProjectName, Value


class Day(Value):
    """What a retraining run is to do, or why there is nothing to do."""

    project: ProjectName
    as_of: date
    git_sha: str
    done: bool
    reason: str


def claim(journal: Journal, project: str, environment: Environment, as_of: date | None) -> Day:
    """The day and the commit of a retraining run; `done` where the journal has that day already.

    The commit is the one that serves: a rollback is not undone the next morning, and what was built but
    never deployed does not go live by itself. Before a first deploy it is the newest accepted one.

    Raises ReleaseError when the project has no accepted release: nothing says which commit is good.
    """
    active = journal.active(project, environment)
    serving = journal.release(active) if active else None
    accepted = [serving] if serving else journal.releases(project, "accepted", limit=1)
    if not accepted:
        raise ReleaseError(
            f"{project} has no accepted release to retrain",
            "a first build that passed its gates",
            f"prefect deployment run 'build/{project}'",
        )
    (release,) = accepted
    day = as_of or datetime.now(ZoneInfo(release.timezone)).date()
    finished = _finished(journal, project, day)
    return Day(
        project=project,
        as_of=day,
        git_sha=release.source.git_sha,
        done=finished is not None,
        reason=f"{project} was already retrained for {day}: {finished}"
        if finished
        else f"retraining {project} for {day} at commit {release.source.git_sha[:12]}",
    )


def finish(journal: Journal, day: Day, release_id: str) -> None:
    """Write that the day is done; a repeated call adds nothing."""
    if _finished(journal, day.project, day.as_of) is None:
        payload = {"as_of": day.as_of.isoformat()}
        journal.decide(project=day.project, kind="retrain", release_id=release_id, payload=payload)


def _finished(journal: Journal, project: str, day: date) -> str | None:
    for decision in journal.decisions(project, kinds=("retrain",)):
        if decision.payload.get("as_of") == day.isoformat():
            return decision.release_id
    return None
