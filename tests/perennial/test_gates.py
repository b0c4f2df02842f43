from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from perennial import gates
from perennial.config import Threshold
from perennial.values import Evaluation, Gate, Metric, Verdict


def metric(name: str = "roc_auc", value: float | None = 0.7, reach: float | None = 0.02) -> Metric:
    known = value is not None and reach is not None
    return Metric(
        name=name,
        value=value,
        low=value - reach if known else None,
        high=value + reach if known else None,
        rows=1000,
        clusters=28,
    )


def decide(*metrics: Metric, **thresholds: Threshold) -> tuple[Gate, ...]:
    return gates.decide(Evaluation(metrics=metrics), thresholds, {}).gates


def test_a_bound_inside_the_threshold_passes() -> None:
    (gate,) = decide(metric(value=0.7, reach=0.02), roc_auc=Threshold(min=0.65))
    assert (gate.verdict, gate.measured, gate.threshold) == (Verdict.PASS, 0.7, 0.65)


def test_it_is_the_pessimistic_bound_that_counts_not_the_point() -> None:
    (gate,) = decide(metric(value=0.7, reach=0.06), roc_auc=Threshold(min=0.65))
    assert gate.verdict is Verdict.FAIL
    (gate,) = decide(metric("log_loss", value=0.5, reach=0.06), log_loss=Threshold(max=0.55))
    assert gate.verdict is Verdict.FAIL
    assert "0.5600" in gate.reason and "0.55" in gate.reason


@pytest.mark.parametrize(
    "unmeasured",
    [(), (metric(value=None),), (metric(value=0.9, reach=None),)],
    ids=["absent", "no value", "no interval"],
)
def test_what_was_not_measured_never_passes(unmeasured: tuple[Metric, ...]) -> None:
    report = gates.decide(Evaluation(metrics=unmeasured), {"roc_auc": Threshold(min=0.1)}, {})
    assert report.gates[0].verdict is Verdict.INSUFFICIENT
    assert not report.passed


def test_a_project_without_gates_must_still_be_measured() -> None:
    assert gates.decide(Evaluation(metrics=(metric(),)), {}, {}).passed
    assert not gates.decide(Evaluation(metrics=(metric(value=None),)), {}, {}).passed
    assert not gates.decide(Evaluation(metrics=()), {}, {}).passed


@pytest.mark.parametrize(
    ("difference", "reach", "verdict"),
    [
        (0.002, 0.004, Verdict.PASS),
        (-0.001, 0.003, Verdict.PASS),
        (-0.02, 0.01, Verdict.FAIL),
        (-0.001, 0.02, Verdict.INSUFFICIENT),
    ],
    ids=["better", "as good within the margin", "surely worse", "cannot tell"],
)
def test_a_challenger_must_not_be_worse_than_the_champion(
    difference: float, reach: float, verdict: Verdict
) -> None:
    evaluation = Evaluation(
        metrics=(metric(),),
        champion="toy-0123456789ab",
        champion_differences=(metric(value=difference, reach=reach),),
    )
    report = gates.decide(evaluation, {}, {"roc_auc": 0.005})
    (gate,) = report.gates
    assert gate.verdict is verdict
    assert "toy-0123456789ab" in gate.name
    assert report.passed is (verdict is Verdict.PASS)


def test_the_summary_names_gate_measured_and_threshold() -> None:
    report = gates.decide(Evaluation(metrics=(metric(value=0.5),)), {"roc_auc": Threshold(min=0.65)}, {})
    assert "roc_auc at least 0.65" in report.summary
    assert "0.5000" in report.summary and "0.65" in report.summary


def test_a_stricter_threshold_never_turns_a_failure_into_a_pass() -> None:
    generator = np.random.default_rng(0)
    for value, reach in zip(generator.uniform(0.4, 0.9, 200), generator.uniform(0, 0.2, 200), strict=True):
        passed = [
            gates.decide(
                Evaluation(metrics=(metric(value=value, reach=reach),)), {"roc_auc": Threshold(min=t)}, {}
            ).passed
            for t in np.linspace(0.3, 0.95, 14)
        ]
        assert all(earlier or not later for earlier, later in pairwise(passed))


@pytest.mark.parametrize("name", ["rmse", "mae"])
@pytest.mark.parametrize(("low", "passed"), [(-0.019, True), (-0.021, False)])
def test_a_metric_in_the_target_s_unit_may_be_one_percent_worse(name: str, low: float, passed: bool) -> None:
    difference = metric(name, value=0.0, reach=-low)
    evaluation = Evaluation(
        metrics=(metric(name, value=2.0),), champion="toy-0123456789ab", champion_differences=(difference,)
    )
    report = gates.decide(evaluation, {}, {})
    assert [gate.threshold for gate in report.gates] == [pytest.approx(-0.02)]
    assert report.passed is passed
    assert not gates.decide(evaluation, {}, {name: 0.001}).passed


def test_every_metric_is_compared_with_the_champion_or_the_evidence_is_insufficient() -> None:
    evaluation = Evaluation(
        metrics=(metric("roc_auc"), metric("brier"), metric("novel")),
        champion="toy-0123456789ab",
        champion_differences=(metric("roc_auc", value=0.01, reach=0.001), metric("novel")),
    )
    report = gates.decide(evaluation, {}, {})
    verdicts = {gate.name.split()[0]: gate.verdict for gate in report.gates}
    assert verdicts == {
        "roc_auc": Verdict.PASS,
        "brier": Verdict.INSUFFICIENT,
        "novel": Verdict.INSUFFICIENT,
    }
    assert "champion_margin has no novel" in report.summary
    assert not report.passed
