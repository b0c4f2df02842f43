"""A person's verdict on a candidate for which the evidence does not suffice."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from perennial import leases, reconcile, rollout
from perennial.analysis import Evidence
from perennial.errors import ReleaseError, RolloutError
from perennial.journal import Decision, Journal
from perennial.service_state import state_in
from perennial.settings import Settings
from perennial.targets import Target
from perennial.values import Environment, Release

Said = Literal["promote", "withdraw"]


def question(journal: Journal, release: Release, environment: Environment) -> Decision | None:
    """The open question about this candidate; None when there is none, or none any more."""
    state = state_in(journal, release.project, environment)
    if state.candidate != release.release_id or not state.asked:
        return None
    if state.asked_until is not None and state.asked_until < datetime.now(UTC):
        return None
    return journal.decisions(release.project, environment, ("asked",))[-1]


def decide(
    settings: Settings,
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    said: Said,
    reviewer: str,
    note: str = "",
) -> str:
    """Promote or withdraw the candidate in a person's name; returns what serves now.

    Raises ReleaseError when there is no open question about it, RolloutError when it does not run any more.
    """
    if not reviewer.strip():
        raise ReleaseError("a verdict needs the name of who gives it", "--reviewer YOUR-NAME")
    why = f"{reviewer.strip()}: {note.strip() or said}"
    _open_question(journal, release, environment)  # else there is nothing to wait for
    leases.hold(journal, release.project, environment, f"{said} {release.release_id} in {environment}")
    try:
        asked = _open_question(journal, release, environment)  # still: nobody else can close it any more
        if said == "withdraw":
            rollout.withdraw(settings, journal, target, release, environment, why)
        else:
            _prove(settings, journal, target, release, environment)
            verdict = {**asked.payload, "verdict": "promote", "reason": why}
            rollout.switch(
                settings, journal, target, release, environment, reason={"verdict": verdict, "reason": why}
            )
            rollout.retire(settings, journal, target, release.project, environment)
    finally:
        leases.let_go(release.project, environment)
    return f"{journal.active(release.project, environment)} serves {environment}"


def _prove(
    settings: Settings, journal: Journal, target: Target, release: Release, environment: Environment
) -> None:
    """It has waited for days, perhaps, and was started again meanwhile. One that fails is withdrawn."""
    instance = reconcile.running(target, environment).get(release.release_id)
    folder = settings.root / "releases" / release.release_id
    if instance is not None and folder.exists():  # one that does not run is refused by `switch`
        rollout.prove(settings, journal, target, release, environment, instance.endpoint, folder)


def _open_question(journal: Journal, release: Release, environment: Environment) -> Decision:
    asked = question(journal, release, environment)
    if asked is None:
        raise ReleaseError(
            f"nobody is asked about {release.release_id} in {environment}",
            "a candidate for which the evidence does not suffice",
            "python -m perennial status",
        )
    return asked


def outcome(journal: Journal, release: Release, environment: Environment, evidence: Evidence) -> Evidence:
    """What a question came to that is closed. Raises RolloutError when the candidate was withdrawn."""
    if journal.active(release.project, environment) == release.release_id:
        return evidence.model_copy(update={"verdict": "promote", "reason": "a person promoted it"})
    withdrawn = [
        decision.payload.get("reason", "")
        for decision in journal.decisions(release.project, environment, ("withdrawn",))
        if decision.release_id == release.release_id
    ]
    raise RolloutError(
        f"{release.release_id} was withdrawn from {environment}"
        + (f": {withdrawn[-1]}" if withdrawn else ": its question is no longer open"),
        "a candidate that a person promotes in time",
        f"prefect deployment run 'deploy/{release.project}' -p release_id={release.release_id} "
        f"-p environment={environment}",
    )
