"""From a release that passed its gates to a person's word: the run waits in the Prefect UI."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NoReturn
from uuid import uuid4

from prefect import get_run_logger, suspend_flow_run
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.input import RunInput, keyset_from_base_key
from prefect.states import Failed, State
from pydantic import Field, StringConstraints, ValidationError

from perennial import approval_page, approvals
from perennial.approvals import Request, Review
from perennial.errors import ReleaseError
from perennial.values import Environment, Release, slug
from tasks import edge


class Approval(RunInput):
    """The form. What matters has no default: Prefect would fill it in for a run that nobody answered."""

    decision: Literal["approve", "decline"] = Field(title="Decision")
    reviewer: Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"\S")] = Field(
        title="Reviewer", description="Your name: it goes into the journal", max_length=200
    )
    note: str = Field(default="", title="Note", description="Why, for those who look it up", max_length=2000)


def ask_approval(release: Release, environment: Environment) -> Review:
    """Suspend this run until a person has approved or declined the release, where its project wants that.

    No task: only a flow can be suspended, and when it is resumed it comes here again, in a new process.
    What was said becomes a row of the journal. A run that cannot wait (called in a process, or by another
    flow) asks nobody; the journal decides, as for every run, when the release is to be started.

    Raises ReleaseError when the answer came too late, or was given to another release.
    """
    journal = edge.journal()
    review = Review(release_id=release.release_id, environment=environment)
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None or run.parent_task_run_id is not None:
        return review
    if not approvals.is_required(release, environment):
        return review
    attempt = run.run_count
    asked = approvals.last_request(journal, release.project, environment, str(run.id))
    said = _answer_to(asked) if asked is not None and asked.attempt == attempt else None
    if asked is not None and said is not None:
        known = journal.release(release.release_id) or release
        review = approvals.answer(journal, known, asked, said.decision, said.reviewer, said.note)
        if review.declined:
            return review
    if journal.approval(release, environment) is None:
        # A key that was used lets a run pass with no answer, or with an old one: each request has its own.
        key = f"approve-{attempt}-{uuid4().hex[:8]}"
        _wait(approvals.request(journal, release, environment, str(run.id), attempt, key), release)
    return review


def declined(review: Review) -> State[Any]:
    """How a run ends whose release a person declined."""
    why = f": {review.note}" if review.note else ""
    error = ReleaseError(f"{review.reviewer} declined {review.release_id} for {review.environment}{why}")
    return Failed(name="Declined", message=str(error), data=error)


def _answer_to(asked: Request) -> Approval | None:
    """What a person has said; nothing when the run was started again by other means than an answer."""
    try:
        return Approval.load(keyset_from_base_key(f"suspended-{asked.key}"))
    except ValidationError:
        return None


def _wait(asked: Request, release: Release) -> NoReturn:
    """End this process, and wait in the Prefect UI."""
    material = approval_page.gather(edge.journal(), edge.store(), release, asked)
    page = approval_page.page(asked, release, material)
    until = approvals.moment(asked.expires_at)
    create_markdown_artifact(
        page,
        key=f"approval-{slug(asked.project)}",
        description=f"{asked.release_id} for {asked.environment}, open until {until}",
    )
    get_run_logger().info(
        "%s waits for an approval until %s. Next: Resume in this run's menu, or "
        "python -m perennial approve %s --reviewer YOUR-NAME",
        asked.release_id,
        until,
        asked.release_id,
    )
    left = asked.expires_at + approvals.GRACE - datetime.now(UTC)
    form = Approval.with_initial_data(description=page)
    suspend_flow_run(form, timeout=max(1, int(left.total_seconds())), key=asked.key)
    raise RuntimeError(f"{asked.key} was not asked, and nobody has answered it")
