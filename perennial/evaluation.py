"""How good is a model, and how sure can we be: metrics with intervals whose unit is the day, not the row.

Rows of one day share weather, prices and outages, so row-wise intervals are far too narrow (shared decision,
DECISIONS law 1). Every metric here is a mean of per-row influence values; its variance comes from their sums
per cluster, G/(G−1)·Σ(S_g − S̄)², with a t quantile on G − 1 degrees of freedom.
AUC: DeLong 1988 (influence values), Sun & Xu 2014 (fast form by ranks), Obuchowski 1997 (clusters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from perennial.values import Metric

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]
_CLIP = 1e-6  # a probability of exactly 0 or 1 that is wrong must cost much, not infinitely much

CONFIDENCE = 0.95
# Of a difference, each bound counts by itself: those of the 90 % interval are the one-sided 95 % ones.
DIFFERENCE_CONFIDENCE = 0.90


@dataclass(frozen=True)
class Holdout:
    """The newest rows: truth (n,), prediction (n,), cluster number (n,) and, per slice name, a mask (n,)."""

    truth: Floats
    prediction: Floats
    cluster: Integers
    slices: Mapping[str, Booleans]


def evaluate(holdout: Holdout, metrics: Sequence[str]) -> tuple[Metric, ...]:
    """Every metric on the whole holdout, then on each slice."""
    everything = np.ones(len(holdout.truth), dtype=bool)
    masks = {"": everything, **holdout.slices}
    return tuple(
        _metric(name, label, holdout.truth[mask], holdout.prediction[mask], holdout.cluster[mask])
        for label, mask in masks.items()
        for name in metrics
    )


def compare(holdout: Holdout, champion: Floats, metrics: Sequence[str]) -> tuple[Metric, ...]:
    """Paired difference challenger − champion on the same rows, signed so that more is better for us.

    Its interval is the two-sided 90 % one, Δ ± t(.95, G − 1)·SE: each bound is a one-sided 95 % bound
    (DECISIONS, section 2), since a gate asks about one side only.
    """
    differences = []
    for name in metrics:
        ours, our_influence = _influence(name, holdout.truth, holdout.prediction)
        theirs, their_influence = _influence(name, holdout.truth, champion)
        sign = 1.0 if higher_is_better(name) else -1.0
        influence = sign * (our_influence - their_influence)
        differences.append(
            _estimate(
                name, "", sign * (ours - theirs), influence, holdout.cluster, confidence=DIFFERENCE_CONFIDENCE
            )
        )
    return tuple(differences)


def restrict(holdout: Holdout, rows: Booleans) -> Holdout:
    """The holdout with these rows only."""
    return Holdout(
        truth=holdout.truth[rows],
        prediction=holdout.prediction[rows],
        cluster=holdout.cluster[rows],
        slices={name: mask[rows] for name, mask in holdout.slices.items()},
    )


def higher_is_better(metric: str) -> bool:
    return metric in {"roc_auc", "r2"}


def _metric(name: str, label: str, truth: Floats, prediction: Floats, cluster: Integers) -> Metric:
    value, influence = _influence(name, truth, prediction)
    if name != "rmse":
        return _estimate(name, label, value, influence, cluster)
    # The interval of a mean square maps through the root; symmetric around the square, not the root.
    squared = _estimate(name, label, value**2, influence * 2 * value, cluster)
    roots = [None if x is None else float(np.sqrt(max(x, 0.0))) for x in (squared.low, squared.high)]
    return squared.model_copy(update={"value": _finite(value), "low": roots[0], "high": roots[1]})


def _estimate(
    name: str,
    label: str,
    value: float,
    influence: Floats,
    cluster: Integers,
    *,
    confidence: float = CONFIDENCE,
) -> Metric:
    """A value with its clustered two-sided interval; none where fewer than two clusters speak."""
    rows = len(cluster)
    _, index = np.unique(cluster, return_inverse=True)
    groups = int(index.max()) + 1 if rows else 0
    low = high = None
    point = _finite(value)
    if point is not None and groups >= 2:
        sums = np.bincount(index, weights=influence, minlength=groups) / rows
        error = float(np.sqrt(groups / (groups - 1) * np.square(sums - sums.mean()).sum()))
        reach = float(stdtrit(groups - 1, (1 + confidence) / 2)) * error
        low, high = _finite(point - reach), _finite(point + reach)
    return Metric(name=name, slice=label, value=point, low=low, high=high, rows=rows, clusters=groups)


def _influence(name: str, truth: Floats, prediction: Floats) -> tuple[float, Floats]:
    """(estimate, per-row influence values with mean 0), or NaN where the metric is not defined."""
    undefined = float("nan"), np.zeros_like(truth)
    if not len(truth) or not np.isfinite(prediction).all():
        return undefined
    match name:
        case "roc_auc":
            return _auc_influence(truth, prediction)
        case "log_loss":
            p = np.clip(prediction, _CLIP, 1 - _CLIP)
            loss = -np.where(truth == 1, np.log(p), np.log1p(-p))
        case "brier" | "rmse":
            loss = np.square(truth - prediction)
        case "mae":
            loss = np.abs(truth - prediction)
        case "r2":
            spread = np.square(truth - truth.mean())
            if not spread.any():
                return undefined
            ratio = float(np.square(truth - prediction).mean() / spread.mean())
            return 1 - ratio, -(np.square(truth - prediction) - ratio * spread) / spread.mean()
        case _:
            raise ValueError(f"no metric is called {name!r}")
    mean = float(loss.mean())
    if name == "rmse":
        root = float(np.sqrt(mean))
        return root, (loss - mean) / (2 * root) if root else np.zeros_like(loss)
    return mean, loss - mean


def _auc_influence(truth: Floats, prediction: Floats) -> tuple[float, Floats]:
    positive = truth == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        return float("nan"), np.zeros_like(truth)
    ranks = _ranks(prediction)
    placement = np.empty_like(ranks)
    placement[positive] = (ranks[positive] - _ranks(prediction[positive])) / n
    placement[~positive] = 1 - (ranks[~positive] - _ranks(prediction[~positive])) / m
    auc = float(placement[positive].mean())
    rows = m + n
    influence = np.where(positive, (placement - auc) * rows / m, (placement - auc) * rows / n)
    return auc, influence


def _ranks(values: Floats) -> Floats:
    """1 … n in order of size, ties sharing their mean. (scipy.stats has it too, and takes long to import.)"""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts).astype(np.float64)
    ranks: Floats = (last - (counts - 1) / 2)[index]
    return ranks


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
