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
from scipy import stats

from perennial.compared import Compared, Measure
from perennial.evidence import Bet, OddsEvidence, RateEvidence, mean
from perennial.values import Value

Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

# The withdrawing measures' shares of what may be lost on good candidates; failures come first.
_ERRORS_SHARE = 0.85

_ERRORS = ((1.5, 0.05), (2.0, 0.05), (3.0, 0.15), (5.0, 0.3), (10.0, 0.35), (30.0, 0.1))
_SLOW = ((1.5, 0.2), (2.0, 0.2), (3.0, 0.2), (10.0, 0.2), (30.0, 0.2))
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
    def first_errors(self) -> tuple[int, int, int, int]:
        """(failed, of) in the candidate, (failed, of) in the active release, of first tries as far as known.

        A request that fails wherever it is asked would else count more often against the arm that is asked
        second, the candidate mostly. Where it is not known whose a retry was, it speaks for the candidate.
        """
        candidate, active = self.candidate, self.active
        failed_again = max(self.retries - self.rescued, 0)
        return (
            max(candidate.errors - failed_again, 0),
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
    verdict: Literal["promote", "withdraw", "insufficient evidence"]
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
        self._groups = [[self._errors], *_others(baseline, self._policy)]
        others = len(self._groups) - 1
        self._shares = [_ERRORS_SHARE if others else 1.0, *[(1 - _ERRORS_SHARE) / max(others, 1)] * others]
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
        for compared, (failed, asked), (active_failed, active_asked) in zip(
            chain.from_iterable(self._groups[1:]),
            _outcomes(candidate, self._baseline),
            _outcomes(active, self._baseline),
            strict=True,
        ):
            compared.look(failed, asked, active_failed, active_asked)
        self._no_worse.look(candidate, active)

    def _verdict(self) -> CanaryVerdict:
        capitals = [mean([compared.capital for compared in group]) for group in self._groups]
        strongest = [max(group, key=lambda compared: compared.capital) for group in self._groups]
        against = sum(share * capital for share, capital in zip(self._shares, capitals, strict=True))
        at, needed = self._policy.withdraw_at, self._policy.promote_at
        rows = [
            compared.row(capital, at / share)
            for compared, capital, share in zip(strongest, capitals, self._shares, strict=True)
        ]
        rows.append(self._errors.row(against, at).model_copy(update={"name": "all of these together"}))
        rows.append(self._no_worse.row(needed))

        def verdict(
            said: Literal["promote", "withdraw", "insufficient evidence"], reason: str
        ) -> CanaryVerdict:
            return CanaryVerdict(verdict=said, reason=reason, evidence=tuple(rows))

        if against >= at:
            worst = max(range(len(rows) - 2), key=lambda i: self._shares[i] * capitals[i])
            reason = f"{strongest[worst].told}; the evidence is {against:.3g}, {at:g} suffices"
            return verdict("withdraw", reason)
        if not self._no_worse.asked:
            return verdict("insufficient evidence", "no user has asked the candidate for a prediction yet")
        if missing := [group[0].name for group in self._groups[1:] if not _is_measured(group)]:
            reason = f"not measured in both releases, so not judged: {', '.join(missing)}"
            return verdict("insufficient evidence", reason)
        for_it = self._no_worse.capital
        if for_it < needed:
            reason = f"{self._errors.told}; the evidence for it is {for_it:.3g}, {needed:g} is needed: wait"
            return verdict("insufficient evidence", reason)
        if against >= at**0.5:
            worst = max(range(len(rows) - 2), key=lambda i: self._shares[i] * capitals[i])
            reason = f"{strongest[worst].told}; that is suspicious (evidence {against:.3g} of {at:g}): wait"
            return verdict("insufficient evidence", reason)
        return verdict(
            "promote", f"{self._errors.told}; the evidence for it is {for_it:.3g}, {needed:g} suffices"
        )


def _others(baseline: Baseline, policy: Policy) -> list[list[Compared]]:
    """What is compared besides errors, in the order of `_outcomes`."""
    groups = []
    if baseline.latency_seconds:
        tolerance = policy.latency_tolerance
        groups.append([Compared("refused requests", _bets(_SLOW, tolerance), _MOST_PER_LOOK)])
        groups.append(
            [
                Compared(f"slower than {at:g} s", _bets(_SLOW, tolerance), _MOST_PER_LOOK)
                for at in baseline.latency_seconds
            ]
        )
    if baseline.prediction_edges:
        tolerance = policy.prediction_tolerance
        more = [Bet(tolerance, tolerance * odds, weight / 2) for odds, weight in _SHIFTED]
        fewer = [Bet(1 / bet.null, 1 / bet.odds, bet.weight) for bet in more]
        groups.append(
            [
                Compared(name, (*more, *fewer), _MOST_PER_LOOK)
                for name in _bin_names(baseline.prediction_edges)
            ]
        )
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


def _is_measured(group: Sequence[Compared]) -> bool:
    return all(all(compared.asked) for compared in group)


def _bets(bets: Sequence[tuple[float, float]], null: float = 1.0) -> list[Bet]:
    return [Bet(null, null * odds, weight) for odds, weight in bets]


def _bin_names(edges: Sequence[float]) -> list[str]:
    between = [f"predictions in ({low:.4g}, {high:.4g}]" for low, high in pairwise(edges)]
    ends = f"predictions up to {edges[0]:.4g}", f"predictions above {edges[-1]:.4g}"
    return [ends[0], *between, ends[1], "predictions that are no number"]


class _NoWorse:
    """The evidence against "it fails clearly more": than the active release now, *and* than it used to.

    Without any failure the first of the two says nothing, while everything fails the second says nothing.
    """

    def __init__(self, baseline: Baseline, policy: Policy) -> None:
        low, high = _interval(baseline.errors, baseline.requests)
        # Each bound on the side that makes promotion harder.
        odds = max(policy.odds, 1 + policy.margin / high)
        self._beside = OddsEvidence([Bet(odds, *bet) for bet in _NO_WORSE], restarts=False)
        self._past = RateEvidence(low + policy.margin)
        self._failed = self._active_failed = self._active_asked = self.asked = 0

    def look(self, candidate: Arm, active: Arm) -> None:
        asked, active_asked = (arm.answered + arm.errors for arm in (candidate, active))
        self._beside.look(candidate.errors, asked, active.errors, active_asked)
        self._past.look(candidate.errors, asked)
        self._failed += candidate.errors
        self.asked += asked
        self._active_failed += active.errors
        self._active_asked += active_asked

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
    low = float(stats.beta.ppf(1 - _CONFIDENCE, failed, asked - failed + 1)) if failed else 0.0
    high = float(stats.beta.ppf(_CONFIDENCE, failed + 1, asked - failed)) if failed < asked else 1.0
    return low, high
