"""Good enough, or not, and why. Pure functions from an evaluation to verdicts.

Every gate fails closed: a missing metric, a NaN or a single cluster is `insufficient evidence`, never a pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from perennial.config import Threshold
from perennial.values import Evaluation, Gate, GateReport, Metric, Verdict

# How much worse than the champion a refresh may be before it is refused (non-inferiority margin).
DEFAULT_MARGINS = {"roc_auc": 0.005, "log_loss": 0.005, "brier": 0.005, "r2": 0.01}
# The same as a share of the measured value, of metrics that have the target's unit.
DEFAULT_SHARES = {"rmse": 0.01, "mae": 0.01}


def decide(
    evaluation: Evaluation, thresholds: Mapping[str, Threshold], margins: Mapping[str, float]
) -> GateReport:
    """Absolute thresholds first, then, where there is a champion, the paired comparison with it."""
    gates = [
        gate
        for name, threshold in thresholds.items()
        for gate in _absolute(evaluation.metric(name), name, threshold)
    ]
    if evaluation.champion is not None:
        differences = {difference.name: difference for difference in evaluation.champion_differences}
        measured = (metric.name for metric in evaluation.metrics if not metric.slice)
        gates += [
            non_inferior(name, differences.get(name), evaluation.champion, _margin(name, evaluation, margins))
            for name in dict.fromkeys((*differences, *measured))
        ]
    if not gates:
        gates.append(_usable(evaluation))
    return GateReport(gates=tuple(gates))


def _absolute(metric: Metric | None, name: str, threshold: Threshold) -> list[Gate]:
    """The bound on the pessimistic side of the interval must lie within the threshold."""
    gates = []
    if threshold.min is not None:
        gates.append(_bound(metric, f"{name} at least {threshold.min:g}", threshold.min, lower=True))
    if threshold.max is not None:
        gates.append(_bound(metric, f"{name} at most {threshold.max:g}", threshold.max, lower=False))
    return gates


def _bound(metric: Metric | None, name: str, threshold: float, *, lower: bool) -> Gate:
    if metric is None or metric.value is None or metric.low is None or metric.high is None:
        return _unmeasured(name, threshold, metric)
    bound, side = (metric.low, "lower") if lower else (metric.high, "upper")
    met = bound >= threshold if lower else bound <= threshold
    return Gate(
        name=name,
        verdict=Verdict.PASS if met else Verdict.FAIL,
        measured=metric.value,
        threshold=threshold,
        interval=(metric.low, metric.high),
        reason=f"measured {metric.value:.4f}, {side} confidence bound {bound:.4f}, threshold {threshold:g}",
    )


def _margin(name: str, evaluation: Evaluation, margins: Mapping[str, float]) -> float | None:
    """How much worse than the champion is not worse; None where nothing says so."""
    if name in margins:
        return margins[name]
    metric = evaluation.metric(name)
    if name in DEFAULT_SHARES and metric is not None and metric.value is not None:
        return DEFAULT_SHARES[name] * metric.value
    return DEFAULT_MARGINS.get(name)


def non_inferior(metric: str, difference: Metric | None, champion: str, margin: float | None) -> Gate:
    """Challenger − champion, more is better: its one-sided 95 % lower bound must lie above −margin.

    A difference whose upper bound is below 0 is a failure; one that the data cannot tell is not a pass,
    nor is one that is missing or has no margin.
    """
    name = f"{metric} not worse than {champion}"
    if margin is None:
        return Gate(
            name=name,
            verdict=Verdict.INSUFFICIENT,
            measured=difference.value if difference else None,
            threshold=None,
            reason=f"no margin: champion_margin has no {metric}, and it has no default here",
        )
    if difference is None or difference.value is None or difference.low is None or difference.high is None:
        return _unmeasured(name, -margin, difference)
    if difference.low > -margin:
        verdict = Verdict.PASS
    else:
        verdict = Verdict.FAIL if difference.high < 0 else Verdict.INSUFFICIENT
    return Gate(
        name=name,
        verdict=verdict,
        measured=difference.value,
        threshold=-margin,
        interval=(difference.low, difference.high),
        reason=(
            f"measured difference {difference.value:+.4f}, lower confidence bound {difference.low:+.4f}, "
            f"threshold {-margin:g}"
        ),
    )


def _unmeasured(name: str, threshold: float, metric: Metric | None) -> Gate:
    clusters = metric.clusters if metric else 0
    return Gate(
        name=name,
        verdict=Verdict.INSUFFICIENT,
        measured=metric.value if metric else None,
        threshold=threshold,
        reason=f"not measured with an interval ({clusters} days of data), threshold {threshold:g}",
    )


def _usable(evaluation: Evaluation) -> Gate:
    """A project that names no gate still has to produce a number that can be measured."""
    whole = [m for m in evaluation.metrics if not m.slice]
    good = bool(whole) and all(m.low is not None and m.high is not None for m in whole)
    return Gate(
        name="every metric measured",
        verdict=Verdict.PASS if good else Verdict.INSUFFICIENT,
        measured=float(sum(m.low is not None for m in whole)),
        threshold=float(len(whole)),
        reason="the project names no gates" if good else "a metric has no value or no interval",
    )
