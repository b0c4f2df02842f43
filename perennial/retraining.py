"""One retraining per project and day, at the last released commit."""

from __future__ import annotations

from datetime import date, datetime
from zoneinfo import ZoneInfo

from perennial.errors import ReleaseError
from perennial.journal import Journal
from perennial.values import ProjectName, Value


class Day(Value):
    """What a retraining run is to do, or why there is nothing to do."""

    project: ProjectName
    as_of: date
    git_sha: str
    done: bool
    reason: str


def claim(journal: Journal, project: str, as_of: date | None) -> Day:
    """The day and the commit of a retraining run; `done` where the journal has that day already.

    Raises ReleaseError when the project has no accepted release: nothing says which commit is good.
    """
    accepted = journal.releases(project, "accepted", limit=1)
    if not accepted:
        raise ReleaseError(
            f"{project} has no accepted release to retrain",
            "a first build that passed its gates",
            f"prefect deployment run 'build/{project}'",
        )
    newest = accepted[0]
    day = as_of or datetime.now(ZoneInfo(newest.timezone)).date()
    finished = _finished(journal, project, day)
    return Day(
        project=project,
        as_of=day,
        git_sha=newest.source.git_sha,
        done=finished is not None,
        reason=f"{project} was already retrained for {day}: {finished}"
        if finished
        else f"retraining {project} for {day} at commit {newest.source.git_sha[:12]}",
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
