"""What the canary's verdicts promise, by simulation: looks of ten seconds, ten requests to the candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import nchypergeom_fisher

from perennial.canary import Arm, Baseline, Canary, CanaryVerdict, Look, Policy
from perennial.evidence import Bet, OddsEvidence, RateEvidence

FOUR_HOURS = 1440  # looks
SHARES = (0.5, 0.1, 0.01)  # of good requests, slower than each threshold
BINS = 13
WHOLE = Baseline(
    requests=10_000,
    errors=10,
    latency_seconds=(0.01, 0.025, 0.1),
    slow_shares=SHARES,
    prediction_edges=tuple(np.linspace(0, 1, BINS - 2)),
)
ALIKE = (0.0, *[0.1] * 10, 0.0, 0.0)


def past(share: float) -> Baseline:
    return Baseline(requests=10_000, errors=round(10_000 * share))


def arm(generator: np.random.Generator, mean: float, failing: float) -> Arm:
    requests = int(generator.poisson(mean))
    return Arm(requests=requests, errors=int(generator.binomial(requests, failing)))


def whole(
    generator: np.random.Generator,
    mean: float,
    slow: Sequence[float] = SHARES,
    bins: Sequence[float] = ALIKE,
    refused: float = 0.02,
) -> Arm:
    """An arm without errors, of which everything is measured."""
    n = int(generator.poisson(mean))
    at = generator.random(n)
    return Arm(
        requests=n,
        errors=0,
        timed=n,
        refused=int(generator.binomial(n, refused)),
        slow=tuple(int((at < share).sum()) for share in slow),
        predictions=tuple(int(k) for k in generator.multinomial(n, np.array(bins) / sum(bins))),
    )


def asked_until(verdict: str, seed: int, candidate: float, active: float) -> float:
    """Requests that the candidate had got when the verdict came; infinite if it did not in four hours."""
    generator = np.random.default_rng(seed)
    canary = Canary(past(active))
    asked = 0
    for _ in range(FOUR_HOURS):
        look = Look(candidate=arm(generator, 10, candidate), active=arm(generator, 90, active))
        asked += look.candidate.requests
        if canary.look(look).verdict == verdict:
            return asked
    return math.inf


@pytest.mark.parametrize("odds", [0.25, 1.5, 30.0])
def test_the_evidence_is_a_ratio_of_fisher_s_noncentral_hypergeometric_probabilities(odds: float) -> None:
    evidence = OddsEvidence([Bet(1.25, odds, 1.0)], restarts=False)
    expected = 1.0
    for failed, asked, active_failed, active_asked in [(3, 10, 7, 90), (1, 12, 0, 80), (50, 300, 200, 900)]:
        evidence.look(failed, asked, active_failed, active_asked)
        numbers = failed, asked + active_asked, failed + active_failed, asked
        expected *= nchypergeom_fisher.pmf(*numbers, odds) / nchypergeom_fisher.pmf(*numbers, 1.25)
    assert evidence.capital == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("odds", [0.5, 1.0])
def test_a_bet_is_fair_or_worse_wherever_the_hypothesis_holds(odds: float) -> None:
    """The mean of the capital over all that can happen, for odds within "at most 1"."""
    mean = 0.0
    for failed in range(13):
        evidence = OddsEvidence([Bet(1.0, 3.0, 0.5), Bet(1.0, 10.0, 0.5)], most_per_look=10.0)
        evidence.look(failed, 40, 12 - failed, 90)
        mean += nchypergeom_fisher.pmf(failed, 130, 12, 40, odds) * evidence.capital
    assert mean <= 1.0 + 1e-9


@pytest.mark.parametrize("rate", [0.005, 0.3, 1.0])
def test_a_rate_s_evidence_does_not_grow_at_that_rate(rate: float) -> None:
    mean = 0.0
    for failed in range(21):
        evidence = RateEvidence(rate)
        evidence.look(failed, 20)
        chance = math.comb(20, failed) * rate**failed * (1 - rate) ** (20 - failed)
        mean += chance * evidence.capital if chance else 0.0
    assert mean <= 1.0 + 1e-9


def test_evidence_beyond_all_numbers_stays_a_number() -> None:
    canary = Canary(past(0.0))
    for _ in range(50):
        verdict = canary.look(
            Look(candidate=Arm(requests=10_000, errors=10_000), active=Arm(requests=90_000, errors=0))
        )
    assert verdict.verdict == "withdraw"
    assert CanaryVerdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_ten_failures_of_ten_are_enough_and_the_reason_says_so() -> None:
    verdict = Canary(WHOLE).look(
        Look(candidate=Arm(requests=10, errors=10), active=Arm(requests=90, errors=0))
    )
    assert verdict.verdict == "withdraw"
    assert "errors: 10 of 10 requests" in verdict.reason and "0 of 90" in verdict.reason
    (errors,) = (row for row in verdict.evidence if row.name == "errors")
    assert (errors.candidate, errors.active, errors.requests) == (1.0, 0.0, 10)
    assert errors.evidence > errors.threshold


def test_a_withdrawal_is_final() -> None:
    canary = Canary(past(0.01))
    first = canary.look(Look(candidate=Arm(requests=10, errors=10), active=Arm(requests=90, errors=0)))
    good = Look(candidate=Arm(requests=10_000, errors=0), active=Arm(requests=90_000, errors=900))
    assert [canary.look(good) for _ in range(100)] == [first] * 100


@pytest.mark.slow
def test_good_candidates_are_hardly_ever_withdrawn_in_four_hours_with_outages_of_both() -> None:
    failing = 0.002
    generator = np.random.default_rng(3)
    withdrawn = 0
    for _ in range(20):
        canary = Canary(past(failing))
        share = np.full(FOUR_HOURS, failing)
        for begin in generator.integers(0, FOUR_HOURS, 3):
            share[begin : begin + generator.integers(3, 60)] = generator.choice([0.1, 0.5, 0.95])
        looks = (Look(candidate=arm(generator, 10, p), active=arm(generator, 90, p)) for p in share)
        withdrawn += any(canary.look(look).verdict == "withdraw" for look in looks)
    assert withdrawn <= 2  # at 1 %, more than 2 in one of 1000 seeds


@pytest.mark.parametrize(
    ("active", "candidate", "most"),
    [(0.01, 0.05, 200), (0.001, 0.01, 600), (0.01, 0.1, 75), (0.0, 1.0, 15)],
)
def test_more_failures_are_found_within_so_many_requests(
    active: float, candidate: float, most: float
) -> None:
    asked = [asked_until("withdraw", seed, candidate, active) for seed in range(150)]
    assert np.mean(asked) <= most


def test_a_candidate_that_breaks_after_a_good_hour_is_found_too() -> None:
    asked = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        canary = Canary(past(0.01))
        for look in count():
            candidate = arm(generator, 10, 0.01 if look < 360 else 0.1)
            if canary.look(Look(candidate=candidate, active=arm(generator, 90, 0.01))).verdict == "withdraw":
                break
        asked.append((look - 360) * 10)
    assert np.mean(asked) <= 200


@pytest.mark.parametrize("failing", [0.0, 0.01, 0.05])
def test_a_good_candidate_is_promoted(failing: float) -> None:
    asked = [asked_until("promote", seed, failing, failing) for seed in range(40)]
    assert np.median(asked) <= 1400
    assert np.mean(np.isfinite(asked)) >= 0.9


@pytest.mark.parametrize(("active", "candidate"), [(0.0, 0.005), (0.01, 0.02), (0.05, 0.0952)])
def test_candidates_at_the_margin_are_hardly_ever_promoted(active: float, candidate: float) -> None:
    promoted = 0
    for seed in range(50):
        generator = np.random.default_rng(seed)
        canary = Canary(past(active))
        for _ in range(FOUR_HOURS):
            look = Look(candidate=arm(generator, 10, candidate), active=arm(generator, 90, active))
            if (verdict := canary.look(look).verdict) != "insufficient evidence":
                break
        promoted += verdict == "promote"
    assert promoted <= 6  # at 5 %, more than 6 in one of 80 seeds


@pytest.mark.parametrize("candidate", [Arm(requests=0, errors=0), Arm(requests=50, errors=0, timed=0)])
def test_without_requests_for_predictions_nothing_is_promoted(candidate: Arm) -> None:
    canary = Canary(past(0.0))
    look = Look(candidate=candidate, active=Arm(requests=90, errors=0, timed=90))
    verdicts = [canary.look(look) for _ in range(1000)]
    assert {verdict.verdict for verdict in verdicts} == {"insufficient evidence"}
    assert "no user" in verdicts[-1].reason


@pytest.mark.parametrize(
    "lacks",
    [{"slow": (), "timed": None, "refused": 0}, {"predictions": ()}, {"slow": ()}],
    ids=["latency and refusals", "predictions", "latency"],
)
@pytest.mark.parametrize("arm_", ["candidate", "active"])
def test_what_is_not_measured_is_not_promoted(lacks: dict[str, object], arm_: str) -> None:
    generator = np.random.default_rng(0)
    canary = Canary(WHOLE)
    for _ in range(200):
        look = Look(candidate=whole(generator, 10), active=whole(generator, 90))
        lacking = getattr(look, arm_).model_copy(update=lacks)
        verdict = canary.look(look.model_copy(update={arm_: lacking}))
    assert verdict.verdict == "insufficient evidence"
    assert "not measured" in verdict.reason
    full = Canary(WHOLE)
    looks = (Look(candidate=whole(generator, 10), active=whole(generator, 90)) for _ in range(200))
    assert [full.look(look).verdict for look in looks][-1] == "promote"


@pytest.mark.parametrize("failing", [0.6, 1.0])
def test_an_outage_of_both_is_no_evidence_against_and_none_for(failing: float) -> None:
    generator = np.random.default_rng(0)
    canary = Canary(past(0.0))
    for _ in range(100):
        look = Look(candidate=arm(generator, 10, failing), active=arm(generator, 90, failing))
        assert canary.look(look).verdict == "insufficient evidence"


def test_a_request_that_fails_wherever_it_is_asked_is_not_the_candidate_s_fault() -> None:
    """Asked 26 times, of the release where it was not asked before: of the candidate too, of all the most."""
    canary = Canary(past(0.01))
    one_of_a_hundred = Look(
        candidate=Arm(requests=13, errors=3), active=Arm(requests=112, errors=23), retries=25, rescued=0
    )
    assert "withdraw" not in {canary.look(one_of_a_hundred).verdict for _ in range(500)}


def test_failures_that_the_router_hid_from_users_count() -> None:
    look = Look(candidate=Arm(requests=10, errors=6), active=Arm(requests=96, errors=1), retries=7, rescued=7)
    assert Canary(past(0.01)).look(look).verdict == "withdraw"


BAD = {
    "twice as slow": {"slow": (0.75, 0.3, 0.1)},
    "constant predictions": {"bins": (0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)},
    "predictions that nobody saw before": {"bins": (*ALIKE[:11], 0.5, 0)},
    "no number in one of three": {"bins": (*ALIKE[:12], 0.5)},
    "every third request refused": {"refused": 0.33},
}


@pytest.mark.parametrize("bad", BAD)
def test_what_differs_from_the_active_release_is_withdrawn(bad: str) -> None:
    generator = np.random.default_rng(0)
    canary = Canary(WHOLE)
    for _ in range(30):
        verdict = canary.look(Look(candidate=whole(generator, 10, **BAD[bad]), active=whole(generator, 90)))
        if verdict.verdict != "insufficient evidence":
            break
    assert verdict.verdict == "withdraw"
    assert verdict.reason.startswith(
        {
            "t": "slower than",
            "c": "predictions in (0.2, 0.3]",
            "p": "predictions above",
            "n": "predictions that",
            "e": "refused",
        }[bad[0]]
    )


def test_a_little_slower_and_a_little_different_is_good_enough() -> None:
    """Within the tolerances: a new model predicts a bit otherwise, a new process is a bit slower."""
    generator = np.random.default_rng(0)
    canary = Canary(WHOLE)
    other = (0.0, *np.linspace(0.07, 0.13, 10), 0.0, 0.0)
    verdicts = [
        canary.look(
            Look(candidate=whole(generator, 10, (0.55, 0.12, 0.012), other), active=whole(generator, 90))
        ).verdict
        for _ in range(360)
    ]
    assert "withdraw" not in verdicts
    assert "promote" in verdicts


def test_one_pause_does_not_decide() -> None:
    generator = np.random.default_rng(0)
    canary = Canary(WHOLE)
    for look in range(200):
        candidate = whole(generator, 50, (1.0, 1.0, 1.0) if look == 30 else SHARES)
        assert canary.look(Look(candidate=candidate, active=whole(generator, 450))).verdict != "withdraw"


def test_while_something_is_suspicious_nothing_is_promoted() -> None:
    canary = Canary(past(0.0), Policy(promote_at=2.0))
    first = canary.look(Look(candidate=Arm(requests=2000, errors=0), active=Arm(requests=18_000, errors=0)))
    verdict = canary.look(Look(candidate=Arm(requests=20, errors=2), active=Arm(requests=180, errors=0)))
    assert first.verdict == "promote"
    assert (verdict.verdict, "suspicious" in verdict.reason) == ("insufficient evidence", True)


@pytest.mark.parametrize(
    "bad",
    [
        {"requests": math.nan, "errors": 0},
        {"requests": 1, "errors": 2},
        {"requests": -1, "errors": 0},
        {"requests": 5, "errors": 0, "timed": 2, "slow": (3,)},
    ],
)
def test_impossible_numbers_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Arm.model_validate(bad)


def test_counts_of_other_thresholds_are_refused() -> None:
    arm_ = Arm(requests=5, errors=0, timed=5, slow=(1,))
    with pytest.raises(ValueError, match="1 counts where the baseline has 3"):
        Canary(WHOLE).look(Look(candidate=arm_, active=arm_))
