"""What the journal says of a service, decision by decision."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from perennial.journal import Decision
from perennial.service_state import Role, endpoints_of, state_of
from perennial.values import Endpoint

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
A, B, C = (f"toy-{letter * 12}" for letter in "abc")
RUNNING = {
    release: Endpoint(name=release, host="127.0.0.1", port=port, release_id=release)
    for port, release in enumerate((A, B, C), 1000)
}


def decisions(*made: tuple[str, str, dict[str, Any]]) -> list[Decision]:
    """One a minute, from noon."""
    return [
        Decision(
            position=number,
            at=NOON + timedelta(minutes=number),
            project="toy",
            environment="production",
            kind=kind,  # type: ignore[arg-type]
            release_id=release,
            payload=payload,
        )
        for number, (kind, release, payload) in enumerate(made)
    ]


def routed(*made: tuple[str, str, dict[str, Any]], minutes: float = 10) -> dict[str, str]:
    """Release → its place in the router, so many minutes after noon."""
    state = state_of(decisions(*made))
    found = endpoints_of(state, RUNNING, NOON + timedelta(minutes=minutes))
    return {
        e.release_id: f"mirrors {e.shadow_percent}"
        if e.shadow_percent
        else "stands by"
        if e.standby
        else f"weighs {e.weight}"
        for e in found
    }


FIRST = [("candidate", A, {}), ("promoted", A, {})]


def test_the_first_release_gets_nothing_before_it_is_promoted() -> None:
    assert routed(("candidate", A, {})) == {}
    assert routed(*FIRST) == {A: "weighs 100"}


def test_a_candidate_is_out_of_the_router_then_stands_by_then_has_its_share_then_all() -> None:
    canary = [*FIRST, ("candidate", B, {})]
    assert routed(*canary) == {A: "weighs 100"}
    canary.append(("step", B, {"percent": 0}))
    assert routed(*canary) == {A: "weighs 100", B: "stands by"}
    canary.append(("step", B, {"percent": 10}))
    assert routed(*canary) == {A: "weighs 90", B: "weighs 10"}
    assert routed(*canary, ("promoted", B, {})) == {B: "weighs 100"}
    assert routed(*canary, ("withdrawn", B, {})) == {A: "weighs 100"}
    assert routed(*canary, ("asked", B, {"reason": "no traffic"})) == {A: "weighs 100"}


def test_a_shadow_answers_nobody() -> None:
    assert routed(*FIRST, ("candidate", B, {}), ("step", B, {"shadow_percent": 50})) == {
        A: "weighs 100",
        B: "mirrors 50",
    }


def test_an_abort_is_absorbing_and_a_new_candidate_begins_at_nothing() -> None:
    made = [*FIRST, ("candidate", B, {}), ("step", B, {"percent": 50}), ("withdrawn", B, {})]
    assert routed(*made, ("step", B, {"percent": 90})) == {A: "weighs 100"}
    assert routed(*made, ("candidate", B, {})) == {A: "weighs 100"}
    assert routed(*made, ("candidate", C, {}), ("step", B, {"percent": 90})) == {A: "weighs 100"}


def test_the_last_good_release_stands_by_as_long_as_it_is_kept_warm() -> None:
    made = [*FIRST, ("promoted", B, {"keep_warm_seconds": 600})]  # at 12:02
    assert routed(*made, minutes=11.9) == {B: "weighs 100", A: "stands by"}
    assert routed(*made, minutes=12.1) == {B: "weighs 100"}
    # beside a candidate it is out of the router, and runs on
    made += [("candidate", C, {}), ("step", C, {"percent": 10})]
    assert routed(*made) == {B: "weighs 90", C: "weighs 10"}
    assert state_of(decisions(*made)).roles(NOON) == {A: Role.WARM, B: Role.ACTIVE, C: Role.CANDIDATE}


def test_back_to_the_release_before_makes_the_other_one_the_previous() -> None:
    state = state_of(decisions(*FIRST, ("promoted", B, {}), ("promoted", A, {"rollback_of": B})))
    assert (state.active, state.previous) == (A, B)
    again = state_of(decisions(*FIRST, ("promoted", B, {}), ("promoted", B, {})))
    assert (again.active, again.previous) == (B, A)


def test_a_release_that_does_not_run_is_not_in_the_router() -> None:
    state = state_of(decisions(*FIRST, ("candidate", B, {}), ("step", B, {"percent": 10})))
    only = endpoints_of(state, {B: RUNNING[B]}, NOON)
    assert [(e.release_id, e.standby) for e in only] == [(B, False)]
    assert endpoints_of(state, {}, NOON) == []
