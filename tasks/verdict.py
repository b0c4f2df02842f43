"""From evidence that does not suffice to a person's verdict: the run waits in the Prefect UI."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from prefect import get_run_logger, suspend_flow_run
from prefect.context import FlowRunContext
from prefect.input import RunInput, keyset_from_base_key
from pydantic import Field, StringConstraints, ValidationError

from perennial import leases, verdicts
from perennial.analysis import Evidence
from perennial.errors import RolloutError
from perennial.journal import Decision
from perennial.settings import settings
from perennial.targets import open_target
from perennial.values import Environment, Release
from tasks import edge


class PersonsVerdict(RunInput):
    """The form. What matters has no default: Prefect would fill it in for a run that nobody answered."""

    verdict: Literal["promote", "withdraw"] = Field(title="Verdict")
    reviewer: Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"\S")] = Field(
        title="Reviewer", description="Your name: it goes into the journal", max_length=200
    )
    note: str = Field(default="", title="Note", description="Why, for those who look it up", max_length=2000)


def ask_verdict(release: Release, environment: Environment, evidence: Evidence) -> Evidence:
    """Where the evidence does not suffice, suspend this run until a person decides. The candidate waits.

    No task: only a flow can be suspended. A run that cannot wait ends with the commands that decide. Raises
    RolloutError, too, when the candidate was withdrawn, by a person or since nobody decided in time.
    """
    if evidence.verdict == "promote":
        return evidence
    journal = edge.journal()
    asked = verdicts.question(journal, release, environment)
    if asked is None:
        return verdicts.outcome(journal, release, environment, evidence)
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None or run.parent_task_run_id is not None:
        raise RolloutError(
            f"{release.release_id} in {environment}: {evidence.reason}. A person must decide",
            f"python -m perennial promote {release.release_id} --environment {environment} "
            "--reviewer YOUR-NAME, or withdraw instead of promote",
        )
    key = f"verdict-{asked.position}-{run.run_count}"  # a key that was used would let the run pass
    try:
        said = PersonsVerdict.load(keyset_from_base_key(f"suspended-{key}"))
    except ValidationError:
        _wait(release, environment, evidence, asked, key)
    else:
        here = settings()
        verdicts.decide(
            here, journal, open_target(here), release, environment, said.verdict, said.reviewer, said.note
        )
    return verdicts.outcome(journal, release, environment, evidence)


def _wait(release: Release, environment: Environment, evidence: Evidence, asked: Decision, key: str) -> None:
    """End this process, and wait in the Prefect UI."""
    leases.let_go()
    until = datetime.fromisoformat(asked.payload["expires_at"])
    page = (
        f"# {release.release_id} in {environment}: promote or withdraw?\n\n"
        f"**The evidence does not suffice**: {evidence.reason}\n\n{_table(evidence)}\n\n"
        f"It has no traffic now, and is withdrawn if nobody decides until {until:%d %B %H:%M} UTC."
    )
    get_run_logger().info("%s waits for a person's verdict: Resume, in this run's menu", release.release_id)
    form = PersonsVerdict.with_initial_data(description=page)
    left = (until - datetime.now(UTC)).total_seconds()
    suspend_flow_run(form, timeout=max(1, int(left)), key=key)


def _table(evidence: Evidence) -> str:
    names = ("name", "candidate", "active", "requests", "evidence", "threshold")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in evidence.measures:
        cells = (row.get(name) for name in names)
        shown = (f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else cell for cell in cells)
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    return "\n".join(lines)
