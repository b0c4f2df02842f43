"""What an installation needs every few minutes. Nothing is kept of the results: such runs are many."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact

from perennial import approvals, probation, reaper, reconcile, rollout
from perennial.reaper import Found
from perennial.settings import settings
from perennial.targets import open_target
from tasks import edge

_FORGOTTEN = {"persist_result": False}


@task(**_FORGOTTEN)
def reconcile_services() -> list[str]:
    """Bring router and services to what the journal says."""
    here = settings()
    journal, target = edge.journal(), open_target(here)
    done = reconcile.reconcile(here, journal, target)
    return _said(done + rollout.restore(here, journal, target, edge.store(), edge.store_environment()))


@task(**_FORGOTTEN)
def check_probation() -> list[str]:
    """Take back a release that harms users in its probation, where its own deploy cannot any more."""
    here = settings()
    return _said(
        probation.check(here, edge.journal(), open_target(here), edge.store(), edge.store_environment())
    )


@task(**_FORGOTTEN)
def end_expired() -> list[str]:
    """End the runs that wait for a person whose answer would come too late."""
    return _said(approvals.end_expired(settings(), edge.journal()))


@task(**_FORGOTTEN)
def remove_leftovers() -> list[Found]:
    """Remove what no release that is kept, and no run, needs any more."""
    here = settings()
    removed = list(reaper.reap(here, edge.journal(), open_target(here), dry_run=False))
    _said([f"removed {one.kind} {one.name}: {one.why}" for one in removed])
    return removed


@task(**_FORGOTTEN)
def report_changes(
    reconciled: list[str], taken_back: list[str], expired: list[str], removed: list[Found]
) -> None:
    """One table of all that was changed; nothing when nothing was."""
    rows = [{"kind": "reconciled", "name": line} for line in reconciled]
    rows += [{"kind": "probation", "name": line} for line in taken_back]
    rows += [{"kind": "expired", "name": line} for line in expired]
    rows += reaper.table(removed)
    if not rows:
        get_run_logger().info("all is as the journal says, and nothing is left over")
        return
    columns = {"kind": "", "name": "", "size": "", "age": "", "why": ""}
    create_table_artifact(
        key="tend", table=[columns | row for row in rows], description=f"{len(rows)} changes"
    )


def _said(lines: list[str]) -> list[str]:
    for line in lines:
        get_run_logger().info("%s", line)
    return lines
