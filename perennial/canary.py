"""Is the candidate as good as the release beside it? Look after look at both arms, to a verdict.

Withdrawn for failures, refusals, latency or predictions that differ from those of the *concurrent* active
release, at evidence that at most 1 % of good candidates ever reach, however long they are looked at.
Promoted when "it fails clearly more" is refuted, which at most 5 % of the candidates at the margin achieve.
Neither of them: insufficient evidence, as when nobody asks or a measure is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from scipy.special import betaincinv

from perennial.compared import Compared, Group, Measure
from perennial.evidence import Bet, OddsEvidence, RateEvidence, mean
from perennial.values import Value

Count = Annotated[int, Field(ge=0)]
Outcome = Literal["promote", "withdraw", "insufficient evidence"]
Finite = Annotated[float, Field(allow_inf_nan=False)]

# The withdrawing measures' shares of what may be lost on good candidates; failures come first.
_ERRORS_SHARE = 0.85

# (odds, weight) of the bets; the odds are relative to those of the hypothesis.
_ERRORS = ((1.5, 0.05), (2.0, 0.05), (3.0, 0.15), (5.0, 0.3), (10.0, 0.35), (30.0, 0.1))
_MORE_OFTEN = ((1.5, 0.2), (2.0, 0.2), (3.0, 0.2), (10.0, 0.2), (30.0, 0.2))
_SHIFTED = ((1.5, 0.34), (5.0, 0.33), (15.0, 0.33))
_NO_WORSE = ((0.25, 0.1), (0.5, 0.2), (0.7, 0.2), (1.0, 0.5))

# What comes in bursts, a pause of the process or one client's many requests, must not decide in one look.
_MOST_PER_LOOK = 10.0

_CONFIDENCE = 0.95  # of what is taken from the past


class Policy(Value):
    """How sure, and of what. One in `withdraw_at` good candidates is withdrawn, at most."""

    withdraw_at: float = Field(default=100.0, gt=1)
    promote_at: float = Field(default=20.0, gt=1)
    # Promotion refutes a share of failures above the past's by `margin`, and odds of failure of `odds` times
    # the active release's, or more where that is still within the margin.
    margin: float = Field(default=0.005, gt=0, lt=1)
    odds: float = Field(default=2.0, gt=1)
    # Up to these odds against the active release, a difference is none: a new process has colder caches, a
    # new model another distribution of its predictions.
    latency_tolerance: float = Field(default=1.25, ge=1)
    prediction_tolerance: float = Field(default=2.0, ge=1)


class Arm(Value):
    """One release from one look to the next: differences of counters."""

    requests: Count  # that users made
    errors: Count  # of them failed: 5xx, resets, timeouts
    timed: Count | None = None  # prediction requests that the service itself counted; None: it does not
    refused: Count = 0  # of those timed, answered with a 4xx
    slow: tuple[Count, ...] = ()  # of those timed, slower than each of the baseline's thresholds
    predictions: tuple[Count, ...] = ()  # one per request, in each of the baseline's bins

    @model_validator(mode="after")
    def _parts_are_no_more_than_the_whole(self) -> Self:
        if self.errors > self.requests or max((self.refused, *self.slow)) > (self.timed or 0):
            raise ValueError(f"more failed, refused or slow requests than requests: {self!r}")
        return self

    @property
    def answered(self) -> int:
        """Requests that were answered well: of predictions only, where the service tells them apart."""
        good = self.requests - self.errors
        return good if self.timed is None else min(good, self.timed - self.refused)


class Look(Value):
    """Both arms during the same seconds, and what the router did about failures meanwhile.

    An arm's counts are of tries: a request that fails in one release is asked again of the other.
    """

    candidate: Arm
    active: Arm
    retries: Count = 0  # tries that were not a request's first
    rescued: Count = 0  # requests that were answered well by a retry

    @property
    def failed_again(self) -> int:
        """Retries that failed as well, of either release."""
        return max(self.retries - self.rescued, 0)

    @property
    def first_errors(self) -> tuple[int, int, int, int]:
        """(failed, of) in the candidate, (failed, of) in the active release, of first tries as far as known.

        A request that fails wherever it is asked would else count more often against the arm that is asked
        second, the candidate mostly. Where it is not known whose a retry was, it speaks for the candidate.
        """
        candidate, active = self.candidate, self.active
        return (
            max(candidate.errors - self.failed_again, 0),
            candidate.requests,
            active.errors,
            max(active.requests - self.rescued, active.errors),
        )


class Baseline(Value):
    """The active release before the rollout: what is compared, and how often it failed then.

    A prediction p lies in bin i when edges[i − 1] < p ≤ edges[i]; a last bin holds those that are none (NaN).
    """

    requests: Count = 0
    errors: Count = 0
    latency_seconds: tuple[Finite, ...] = ()  # thresholds
    slow_shares: tuple[Finite, ...] = ()  # of its requests, slower than each
    prediction_edges: tuple[Finite, ...] = ()

    @property
    def bins(self) -> int:
        return len(self.prediction_edges) + 2 if self.prediction_edges else 0


class CanaryVerdict(Value):
    verdict: Outcome
    reason: str
    evidence: tuple[Measure, ...]


class Canary:
    """Looks at a candidate and the active release beside it, until the evidence suffices.

    Once withdrawn, it stays so. `promote` is of the moment: later looks may speak against it.
    """

    def __init__(self, baseline: Baseline, policy: Policy | None = None) -> None:
        self._baseline = baseline
        self._policy = policy or Policy()
        self._errors = Compared("errors", _bets(_ERRORS), most_per_look=math.inf)
        others = _others(baseline, self._policy)
        errors_share = _ERRORS_SHARE if others else 1.0
        self._others = [
            Group(name, parts, (1.0 - errors_share) / len(others)) for name, parts in others.items()
        ]
        self._groups = [Group("errors", [self._errors], errors_share), *self._others]
        self._no_worse = _NoWorse(baseline, self._policy)
        self._withdrawn: CanaryVerdict | None = None

    def look(self, look: Look) -> CanaryVerdict:
        """The verdict after what happened since the last look."""
        if self._withdrawn is None:
            self._take(look)
            verdict = self._verdict()
            if verdict.verdict == "withdraw":
                self._withdrawn = verdict
            return verdict
        return self._withdrawn

    def _take(self, look: Look) -> None:
        candidate, active = look.candidate, look.active
        for arm in (candidate, active):
            for counts, wanted in (
                (arm.slow, len(self._baseline.latency_seconds)),
                (arm.predictions, self._baseline.bins),
            ):
                if counts and len(counts) != wanted:
                    raise ValueError(f"{len(counts)} counts where the baseline has {wanted}: {arm!r}")
        self._errors.look(*look.first_errors)
        for part, theirs, ours in zip(
            chain.from_iterable(group.parts for group in self._others),
            _outcomes(candidate, self._baseline),
            _outcomes(active, self._baseline),
            strict=True,
        ):
            part.look(*theirs, *ours)
        self._no_worse.look(look)

    def _verdict(self) -> CanaryVerdict:
        verdict, reason = self._decided()
        enough = self._policy.withdraw_at
        together = self._errors.row(self._against, enough).model_copy(
            update={"name": "all of these together"}
        )
        rows = [*(group.row(enough) for group in self._groups), together]
        rows.append(self._no_worse.row(self._policy.promote_at))
        return CanaryVerdict(verdict=verdict, reason=reason, evidence=tuple(rows))

    @property
    def _against(self) -> float:
        return math.fsum(group.capital for group in self._groups)

    def _decided(self) -> tuple[Outcome, str]:
        against, enough = self._against, self._policy.withdraw_at
        for_it, needed = self._no_worse.capital, self._policy.promote_at
        worst = max(self._groups, key=lambda group: group.capital).strongest.told
        if against >= enough:
            return "withdraw", f"{worst}; the evidence is {against:.3g}, {enough:g} suffices"
        if not self._no_worse.asked:
            return "insufficient evidence", "no user has asked the candidate for a prediction yet"
        if missing := [group.name for group in self._others if not group.is_measured]:
            reason = f"not measured in both releases, so not judged: {', '.join(missing)}"
            return "insufficient evidence", reason
        if for_it < needed:
            reason = f"{self._errors.told}; the evidence for it is {for_it:.3g}, {needed:g} is needed"
            return "insufficient evidence", reason
        if against >= math.sqrt(enough):
            reason = f"{worst}; that is suspicious, with evidence of {against:.3g} where {enough:g} suffices"
            return "insufficient evidence", reason
        return "promote", f"{self._errors.told}; the evidence for it is {for_it:.3g}, {needed:g} suffices"


def _others(baseline: Baseline, policy: Policy) -> dict[str, list[Compared]]:
    """What is compared besides errors, in the order of `_outcomes`."""
    groups = {}
    if baseline.latency_seconds:
        bets = _bets(_MORE_OFTEN, policy.latency_tolerance)
        groups["refused requests"] = [Compared("refused requests", bets, _MOST_PER_LOOK)]
        groups["latency"] = [
            Compared(f"slower than {at:g} s", bets, _MOST_PER_LOOK) for at in baseline.latency_seconds
        ]
    if baseline.prediction_edges:
        more = [
            Bet(bet.null, bet.odds, bet.weight / 2) for bet in _bets(_SHIFTED, policy.prediction_tolerance)
        ]
        fewer = [Bet(1 / bet.null, 1 / bet.odds, bet.weight) for bet in more]
        groups["predictions"] = [
            Compared(name, (*more, *fewer), _MOST_PER_LOOK) for name in _bin_names(baseline.prediction_edges)
        ]
    return groups


def _outcomes(arm: Arm, baseline: Baseline) -> list[tuple[int, int]]:
    """(how many, of how many) of each of `_others`, in its order; of none where the arm was not measured."""
    outcomes = []
    if baseline.latency_seconds:
        timed = (arm.timed or 0) if arm.slow else 0
        outcomes += [(arm.refused, arm.timed or 0)]
        outcomes += [(n, timed) for n in arm.slow or (0,) * len(baseline.latency_seconds)]
    if baseline.prediction_edges:
        total = sum(arm.predictions)
        outcomes += [(n, total) for n in arm.predictions or (0,) * baseline.bins]
    return outcomes


def _bets(bets: Sequence[tuple[float, float]], null: float = 1.0) -> list[Bet]:
    return [Bet(null, null * odds, weight) for odds, weight in bets]


def _bin_names(edges: Sequence[float]) -> list[str]:
    between = [f"predictions in ({low:.4g}, {high:.4g}]" for low, high in pairwise(edges)]
    ends = f"predictions up to {edges[0]:.4g}", f"predictions above {edges[-1]:.4g}"
    return [ends[0], *between, ends[1], "predictions that are no number"]


class _NoWorse:
    """The evidence against "it fails clearly more": than the active release now, *and* than it used to.

    Without any failure the first of the two says nothing, and in an outage neither does: what the candidate
    does wrong in usual times is not seen beside what goes wrong anyway.
    """

    def __init__(self, baseline: Baseline, policy: Policy) -> None:
        low, high = _interval(baseline.errors, baseline.requests)
        # Each bound on the side that makes promotion harder.
        odds = max(policy.odds, 1 + policy.margin / high)
        self._beside = OddsEvidence([Bet(odds, *bet) for bet in _NO_WORSE], restarts=False)
        self._past = RateEvidence(low + policy.margin)
        self._usual = min(high + policy.margin, 1.0)
        self._failed = self._active_failed = self._active_asked = self.asked = 0

    def look(self, look: Look) -> None:
        candidate, active = look.candidate, look.active
        asked, active_asked = (arm.answered + arm.errors for arm in (candidate, active))
        if not self._is_outage(look):
            self._beside.look(candidate.errors, asked, active.errors, active_asked)
        self._past.look(candidate.errors, asked)
        self._failed += candidate.errors
        self.asked += asked
        self._active_failed += active.errors
        self._active_asked += active_asked

    def _is_outage(self, look: Look) -> bool:
        """Whether far more fails than usual. By the total alone, given which the comparison is fair."""
        failed = look.candidate.errors + look.active.errors - look.failed_again
        usual = self._usual * (look.candidate.requests + look.active.requests - look.retries)
        return failed > usual + 4 * math.sqrt(max(usual, 0.0)) + 4

    @property
    def capital(self) -> float:
        return mean([self._beside.capital, self._past.capital])

    def row(self, threshold: float) -> Measure:
        return Measure(
            name="no more errors",
            candidate=self._failed / self.asked if self.asked else None,
            active=self._active_failed / self._active_asked if self._active_asked else None,
            evidence=self.capital,
            threshold=threshold,
            requests=self.asked,
        )


def _interval(failed: int, asked: int) -> tuple[float, float]:
    """Clopper and Pearson's, one-sided on either side; all is possible after no request."""
    low = float(betaincinv(failed, asked - failed + 1, 1 - _CONFIDENCE)) if failed else 0.0
    high = float(betaincinv(failed + 1, asked - failed, _CONFIDENCE)) if failed < asked else 1.0
    return low, high
