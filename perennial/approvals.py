"""A person's approval: asked for, bound to a release's digest, open for a time, answered in the journal.

Whatever is clicked, retried or resumed elsewhere comes down to one row here, `approved` or `declined`, and
`Journal.approval` is all that opens an environment.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from perennial.errors import ReleaseError
from perennial.journal import Decision, Journal
from perennial.probe import probe
from perennial.settings import Settings
from perennial.values import ENVIRONMENTS, Environment, JsonObject, Release, ReleaseId, Sha256, Value

Said = Literal["approve", "decline"]

POLICY = "policy: auto"  # the reviewer of a release whose project asks nobody
# For as long after its end Prefect keeps a request, so that a late answer is told why it does not count.
GRACE = timedelta(hours=1)
_PREFECT_TIMEOUT_SECONDS = 20.0
_PREFECT_ATTEMPTS = 5


class Request(Value):
    """What a run asks a person: may exactly this release enter this environment, until then?"""

    project: str
    environment: Environment
    release_id: ReleaseId
    release_digest: Sha256
    expires_at: datetime
    run: str  # the flow run that waits
    attempt: int  # how many times that run was started: started again, it asks again
    key: str  # under which Prefect keeps the answer
    position: int  # in the journal


class Review(Value):
    """What a person said of a release; nothing, where nobody was asked."""

    release_id: ReleaseId
    environment: Environment
    declined: bool = False
    reviewer: str = ""
    note: str = ""


def is_required(release: Release, environment: Environment) -> bool:
    """Whether the release's project wants a person to open this environment."""
    return release.rollout.of(environment).approval == "required"


def by_policy(journal: Journal, release: Release, environment: Environment) -> None:
    """Write the approval of a release whose project asks nobody, before it enters production."""
    if environment != "production" or is_required(release, environment):
        return
    digest = release.digest()
    reviewed = any(
        decision.payload.get("digest") == digest
        for decision in journal.decisions(release.project, environment, ("approved", "declined"))
    )
    if not reviewed:  # a person who has declined it is not overruled
        journal.approve(release, environment, POLICY)


def request(
    journal: Journal, release: Release, environment: Environment, run: str, attempt: int, key: str
) -> Request:
    """Write down what is asked."""
    payload = {
        "digest": release.digest(),
        "expires_at": _in_hours(release.rollout.of(environment).approval_hours).isoformat(),
        "run": run,
        "attempt": attempt,
        "key": key,
    }
    position = journal.decide(
        project=release.project,
        environment=environment,
        kind="requested",
        release_id=release.release_id,
        payload=payload,
    )
    written = journal.decisions(release.project, environment, ("requested",))
    return _request(next(decision for decision in written if decision.position == position))


def last_request(journal: Journal, project: str, environment: Environment, run: str) -> Request | None:
    """What a run has asked last."""
    for decision in reversed(journal.decisions(project, environment, ("requested",))):
        if decision.payload.get("run") == run:
            return _request(decision)
    return None


def answer(
    journal: Journal, release: Release, asked: Request, said: Said, reviewer: str, note: str = ""
) -> Review:
    """Turn what a person said to a request into a row of the journal; returns what holds now.

    A decline always counts. An approval counts only as the first word since it was asked for: a run that is
    started again with its old answer must not overrule what somebody has said meanwhile.

    Raises ReleaseError, and writes nothing, when the request has expired or the release is not the same.
    """
    if release.digest() != asked.release_digest:
        raise ReleaseError(
            f"{asked.release_id} is not what its approval was asked for: "
            f"the digest was {asked.release_digest}, and is {release.digest()}",
            "the release that the reviewer was shown",
            _ask_again(asked),
        )
    since = _reviews_since(journal, asked)
    declined = any(d.kind == "declined" and d.payload.get("run") == asked.run for d in since)
    if not since or (said == "decline" and not declined and since[-1].kind == "approved"):
        if asked.expires_at < datetime.now(UTC):
            raise ReleaseError(*_expired(asked))
        review(journal, release, asked.environment, said, reviewer, note, asked.run)
    last = _reviews_since(journal, asked)[-1]
    return Review(
        release_id=release.release_id,
        environment=asked.environment,
        declined=last.kind == "declined",
        reviewer=last.payload["reviewer"],
        note=last.payload.get("note", ""),
    )


def review(
    journal: Journal,
    release: Release,
    environment: Environment,
    said: Said,
    reviewer: str,
    note: str = "",
    run: str = "",
) -> datetime:
    """Write that `reviewer` approves or declines exactly this release; returns until when an approval holds.

    One that is used in time stays, so that the way back to a release waits for nobody.
    """
    reviewer = reviewer.strip()
    if not reviewer:
        raise ReleaseError("a review needs the name of its reviewer", "who approves or declines")
    until = _in_hours(release.rollout.of(environment).approval_hours)
    payload: JsonObject = {"expires_at": until.isoformat()} if said == "approve" else {}
    payload |= {name: text for name, text in (("note", note.strip()), ("run", run)) if text}
    write = journal.approve if said == "approve" else journal.decline
    write(release, environment, reviewer, payload)
    return until


def waiting(journal: Journal, release: Release, environment: Environment) -> list[Request]:
    """The requests for this release that are open, and that nobody has answered."""
    now = datetime.now(UTC)
    return [
        asked
        for asked in _unanswered(journal, release.project, environment)
        if asked.release_id == release.release_id and asked.expires_at > now
    ]


def resume(settings: Settings, asked: Request, said: Said, reviewer: str, note: str = "") -> bool:
    """Let the run that waits go on, with what was said; False when it does not wait, or Prefect is away."""
    body = {"run_input": {"decision": said, "reviewer": reviewer.strip(), "note": note.strip()}}
    return _prefect(settings, f"flow_runs/{asked.run}/resume", body).get("status") == "ACCEPT"


def end_expired(settings: Settings, journal: Journal) -> list[str]:
    """End the runs that wait for an answer that would come too late; returns what was ended, in words."""
    now = datetime.now(UTC)
    late = [
        asked
        for project in journal.projects()
        for environment in ENVIRONMENTS
        for asked in _unanswered(journal, project.name, environment)
        if asked.expires_at < now < asked.expires_at + 2 * GRACE  # older ones Prefect has ended itself
    ]
    return [_expired(asked)[0] for asked in late if _end(settings, asked)]


def moment(at: datetime) -> str:
    """A moment as a person reads it."""
    return f"{at.astimezone(UTC):%d %B %Y %H:%M} UTC"


def _end(settings: Settings, asked: Request) -> bool:
    """End a run as expired if it waits for this answer still."""
    run = _prefect(settings, f"flow_runs/{asked.run}")
    if (run.get("state") or {}).get("type") != "PAUSED":
        return False
    found, expected, following = _expired(asked)
    message = f"{found}\nExpected: {expected}\nNext: {following}"
    state = {"type": "FAILED", "name": "Expired", "message": message}
    # By force, as Prefect does it itself: its rules would take this for a resumption.
    body = {"state": state, "force": True}
    return _prefect(settings, f"flow_runs/{asked.run}/set_state", body).get("status") == "ACCEPT"


def _prefect(settings: Settings, path: str, body: object = None) -> dict[str, Any]:
    """What the Prefect server answers; nothing when it is away or refuses."""
    for attempt in range(_PREFECT_ATTEMPTS):
        answered = probe(
            f"{settings.prefect_url}/api/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
            timeout_seconds=_PREFECT_TIMEOUT_SECONDS,
        )
        if answered is None or answered.status < 500:  # above: its database is busy
            break
        time.sleep(0.5 * 2**attempt)
    found = answered.json() if answered is not None and answered.status < 300 else {}
    return found if isinstance(found, dict) else {}


def _unanswered(journal: Journal, project: str, environment: Environment) -> list[Request]:
    """The requests that no review of their release came after, the last one of each run."""
    open_: dict[str, Request] = {}
    for decision in journal.decisions(project, environment, ("requested", "approved", "declined")):
        if decision.kind == "requested":
            asked = _request(decision)
            open_[asked.run] = asked
        else:
            open_ = {run: asked for run, asked in open_.items() if asked.release_id != decision.release_id}
    return list(open_.values())


def _reviews_since(journal: Journal, asked: Request) -> list[Decision]:
    return [
        decision
        for decision in journal.decisions(asked.project, asked.environment, ("approved", "declined"))
        if decision.position > asked.position
        and decision.release_id == asked.release_id
        and decision.payload.get("digest") == asked.release_digest
    ]


def _request(decision: Decision) -> Request:
    assert decision.environment is not None and decision.release_id is not None
    return Request(
        project=decision.project,
        environment=decision.environment,
        release_id=decision.release_id,
        release_digest=decision.payload["digest"],
        expires_at=decision.payload["expires_at"],
        run=decision.payload["run"],
        attempt=decision.payload["attempt"],
        key=decision.payload["key"],
        position=decision.position,
    )


def _expired(asked: Request) -> tuple[str, str, str]:
    return (
        f"the approval of {asked.release_id} for {asked.environment} was open until "
        f"{moment(asked.expires_at)}, and nobody gave it",
        "an answer before that",
        _ask_again(asked),
    )


def _ask_again(asked: Request) -> str:
    return f"prefect flow-run retry {asked.run}, which asks again"


def _in_hours(hours: float) -> datetime:
    return datetime.now(UTC) + timedelta(hours=hours)
