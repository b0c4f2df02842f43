"""What the journal says of one service in one environment. Pure: decisions in, state out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import Field

from perennial.journal import Decision, Journal
from perennial.values import Endpoint, Environment, JsonObject, ReleaseId, Value

_ENOUGH = 200  # decisions of a service, which after years has thousands


class Role(StrEnum):
    """Why a release runs."""

    ACTIVE = "active"
    CANDIDATE = "candidate"
    WARM = "last good"


class ServiceState(Value):
    """Who serves, who is on the way, and where back would lead."""

    active: ReleaseId | None = None
    promoted_at: datetime | None = None
    promotion: JsonObject = Field(default_factory=dict)  # payload of the active release's promotion
    previous: ReleaseId | None = None  # served before the active one
    candidate: ReleaseId | None = None
    begun: JsonObject = Field(default_factory=dict)  # payload of the candidate's decision
    stepped: bool = False  # the candidate is in the router's view
    percent: int = 0  # of the traffic, for the candidate
    shadow_percent: int = 0  # of the requests, mirrored to the candidate
    asked: str = ""  # why a person must decide about the candidate
    asked_until: datetime | None = None

    @property
    def first(self) -> bool:
        """Nothing serves yet."""
        return self.active is None

    def warm_until(self) -> datetime | None:
        """Until when the previous release is kept running. One that was rolled back from is no last good one:
        standing by, it would answer users whenever the active one is down.
        """
        seconds = self.promotion.get("keep_warm_seconds", 0)
        if self.promoted_at is None or self.previous is None or not seconds:
            return None
        if self.promotion.get("rollback_of") == self.previous:
            return None
        return self.promoted_at + timedelta(seconds=seconds)

    def probation_until(self) -> datetime | None:
        """Until when the active release is watched."""
        seconds = self.promotion.get("probation_seconds", 0)
        if self.promoted_at is None or not seconds:
            return None
        return self.promoted_at + timedelta(seconds=seconds)

    def roles(self, now: datetime) -> dict[ReleaseId, Role]:
        """The releases that are to run now; all others are not."""
        wanted: dict[ReleaseId, Role] = {}
        warm_until = self.warm_until()
        if self.previous is not None and warm_until is not None and now < warm_until:
            wanted[self.previous] = Role.WARM
        if self.candidate is not None:
            wanted[self.candidate] = Role.CANDIDATE
        if self.active is not None:
            wanted[self.active] = Role.ACTIVE
        return wanted


def state_in(journal: Journal, project: str, environment: Environment) -> ServiceState:
    """The state of a service as its journal has it now."""
    newest = journal.decisions(project, environment, last=_ENOUGH)
    promoted = {decision.release_id for decision in newest if decision.kind == "promoted"}
    # The newest ones say it all, if they name who serves and who did before. A rollout takes a dozen at most.
    if len(newest) == _ENOUGH and len(promoted) < 2:
        newest = journal.decisions(project, environment)
    return state_of(newest)


def state_of(decisions: Iterable[Decision]) -> ServiceState:
    """The state after these decisions of one service in one environment, in their order."""
    state = ServiceState()
    for decision in decisions:
        state = state.model_copy(update=_after(state, decision))
    return state


def _after(state: ServiceState, decision: Decision) -> dict[str, object]:
    release, payload = decision.release_id, decision.payload
    nobody: dict[str, object] = {
        "candidate": None,
        "begun": {},
        "stepped": False,
        "percent": 0,
        "shadow_percent": 0,
        "asked": "",
        "asked_until": None,
    }
    match decision.kind:
        case "candidate":
            return nobody | {"candidate": release, "begun": payload}
        case "step" if release == state.candidate:
            return {
                "stepped": True,
                "percent": payload.get("percent", 0),
                "shadow_percent": payload.get("shadow_percent", 0),
                "asked": "",
                "asked_until": None,
            }
        case "asked" if release == state.candidate:
            until = payload.get("expires_at")
            return {
                "stepped": False,
                "percent": 0,
                "shadow_percent": 0,
                "asked": payload.get("reason", "not enough evidence"),
                "asked_until": datetime.fromisoformat(until) if until else None,
            }
        case "promoted":
            moved = {"promoted_at": decision.at, "promotion": payload, "active": release}
            if release != state.active:
                moved["previous"] = state.active
            return moved | (nobody if release == state.candidate else {})
        case "withdrawn" if release == state.candidate:
            return nobody
    return {}


def endpoints_of(state: ServiceState, running: Mapping[ReleaseId, Endpoint], now: datetime) -> list[Endpoint]:
    """What the router is to know of the service, of the releases that run.

    The candidate stands by until it has a share; the last good release stands by while it is alone with the
    active one: beside a candidate it would take traffic when that one is unhealthy.
    """
    found: list[Endpoint] = []
    by_role = {role: running.get(release_id) for release_id, role in state.roles(now).items()}
    active, candidate, previous = (by_role.get(role) for role in (Role.ACTIVE, Role.CANDIDATE, Role.WARM))
    candidate = candidate if state.stepped else None
    if active is not None:
        share = 100 - state.percent if candidate is not None else 100
        found.append(active.model_copy(update={"weight": share}))
    if candidate is not None:
        place: dict[str, object] = {"weight": max(state.percent, 1)}
        if active is not None and state.shadow_percent:
            place = {"shadow_percent": state.shadow_percent}
        elif active is not None and not state.percent:
            place = {"standby": True}
        found.append(candidate.model_copy(update=place))
    elif previous is not None:
        found.append(previous.model_copy(update={"standby": True}))
    return found
