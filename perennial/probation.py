"""A promoted release on probation: it goes back by itself when it fails more than the one before it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

from scipy.special import bdtrc

from perennial import analysis, leases, reconcile, rollout
from perennial.errors import PerennialError, RolloutError
from perennial.journal import Journal
from perennial.service_state import ServiceState, state_in
from perennial.settings import Settings
from perennial.store import Store
from perennial.supervision import UP_STATES
from perennial.targets import Target
from perennial.values import ENVIRONMENTS, Environment, JsonObject, Rollout

_LOOK_SECONDS = 5.0
_DOWN_LOOKS = 3  # a process that is killed once comes back; one that is down as often does not
_ALPHA = 1e-4  # of a look; some hundred looks make a probation
_MARGIN = 0.01

Say = Callable[[str], None]


def broken(requests: int, errors: int, past_requests: int, past_errors: int) -> str:
    """Why a release fails more than the one before it, in words; empty while that is not clear.

    One-sided binomial test of the share of errors against twice the past's and a hundredth more.
    """
    if not requests or not errors:
        return ""
    past = (past_errors + 0.5) / (past_requests + 1) if past_requests else 0.0
    allowed = min(2 * past + _MARGIN, 1.0)
    if bdtrc(errors - 1, requests, allowed) >= _ALPHA:  # scipy.stats costs a second to import
        return ""
    return f"{errors} of {requests} requests failed, {allowed:.1%} would be tolerated"


def watch(
    settings: Settings,
    journal: Journal,
    target: Target,
    store: Store,
    variables: dict[str, str],
    done: Rollout,
    say: Say,
) -> Rollout:
    """Look until the probation is over, or another release serves. Raises RolloutError after a rollback."""
    said = False
    while True:
        state = state_in(journal, done.project, done.environment)
        if state.promotion.get("rollback_of") == done.active:
            raise _taken_back(done.active, done.environment, state.promotion.get("reason", ""), state.active)
        until = state.probation_until()
        if state.active != done.active or until is None or datetime.now(UTC) > until:
            return done
        if not said:
            said = True
            say(f"on probation until {until:%H:%M:%S} UTC")
        if reason := _look_again(settings, target, done.project, done.environment, state):
            _go_back(
                settings, journal, target, store, variables, done.project, done.environment, state, reason
            )
        time.sleep(_LOOK_SECONDS)


def check(
    settings: Settings, journal: Journal, target: Target, store: Store, variables: dict[str, str]
) -> list[str]:
    """One look at every service on probation, for those whose deploy died; returns what it did, and where it
    could not go back.
    """
    now = datetime.now(UTC)
    done = []
    for project in journal.projects():
        for environment in ENVIRONMENTS:
            state = state_in(journal, project.name, environment)
            until = state.probation_until()
            if until is None or now > until:
                continue
            reason = _look_again(settings, target, project.name, environment, state)
            if not reason:
                continue
            try:
                _go_back(
                    settings, journal, target, store, variables, project.name, environment, state, reason
                )
            except RolloutError as error:
                done.append(error.found)
    return done


def _look_again(
    settings: Settings, target: Target, project: str, environment: Environment, state: ServiceState
) -> str:
    """Why the release should go back; a process that is down is looked at again before it counts."""
    reason = ""
    for number in range(_DOWN_LOOKS):
        if number:
            time.sleep(_LOOK_SECONDS)
        reason, is_down = _look(settings, target, project, environment, state)
        if not is_down:
            break
    return reason


def _look(
    settings: Settings, target: Target, project: str, environment: Environment, state: ServiceState
) -> tuple[str, bool]:
    """Why the release should go back, and whether that is because its process is down."""
    assert state.active is not None
    instance = reconcile.running(target, environment).get(state.active)
    if instance is None or instance.state not in UP_STATES:
        return f"its process is {instance.state.lower() if instance else 'gone'}", True
    found = analysis.counted(settings, target, project, environment, state.active)
    before: JsonObject = state.promotion.get("counted", {})
    past: JsonObject = state.promotion.get("baseline", {})
    requests, errors = (
        # A counter that has gone down began anew, with the router.
        found.get(name, 0) - (before.get(name, 0) if found.get(name, 0) >= before.get(name, 0) else 0)
        for name in ("requests", "errors")
    )
    return broken(requests, errors, past.get("requests", 0), past.get("errors", 0)), False


def _go_back(
    settings: Settings,
    journal: Journal,
    target: Target,
    store: Store,
    variables: dict[str, str],
    project: str,
    environment: Environment,
    state: ServiceState,
    reason: str,
) -> None:
    """Raises RolloutError that says how it ended; nothing when somebody else was quicker."""
    assert state.active is not None
    what = f"take {state.active} back from {environment}"
    try:
        leases.hold(journal, project, environment, what)
        if state_in(journal, project, environment).active != state.active:
            return
        back = rollout.roll_back(
            settings,
            journal,
            target,
            store,
            project,
            environment,
            state.previous,
            reason=reason,
            variables=variables,
        )
    except PerennialError as error:
        raise RolloutError(
            f"{state.active} does harm in {environment} ({reason}), and cannot be taken back: {error.found}",
            error.expected,
            error.next_command,
        ) from error
    finally:
        leases.let_go(project, environment)
    raise _taken_back(state.active, environment, reason, back.active)


def _taken_back(release_id: str, environment: Environment, reason: str, back: str | None) -> RolloutError:
    return RolloutError(
        f"{release_id} was taken back from {environment} in its probation: {reason}",
        f"no more failures than {back} had, which serves again",
        "see its log, mend the model, commit",
    )
