from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, t

from perennial.evaluation import Holdout, compare, evaluate, higher_is_better


def holdout(
    rows: int = 2000, days: int = 28, seed: int = 0, day_effect: float = 0.0, signal: float = 1.0
) -> Holdout:
    """Binary truth whose log-odds are signal + a shock shared by the rows of a day."""
    generator = np.random.default_rng(seed)
    cluster = np.sort(generator.integers(0, days, rows))
    shock = generator.normal(0, day_effect, days)[cluster]
    score = generator.normal(0, 1, rows)
    truth = (generator.random(rows) < 1 / (1 + np.exp(-(signal * score + shock)))).astype(float)
    return Holdout(truth, 1 / (1 + np.exp(-signal * score)), cluster, {})


def test_auc_is_the_mann_whitney_statistic_ties_and_all() -> None:
    data = holdout()
    rounded = Holdout(data.truth, np.round(data.prediction, 1), data.cluster, {})
    (auc,) = evaluate(rounded, ["roc_auc"])
    positive = data.truth == 1
    u = mannwhitneyu(rounded.prediction[positive], rounded.prediction[~positive]).statistic
    assert auc.value == pytest.approx(u / (positive.sum() * (~positive).sum()), abs=1e-12)


def test_log_loss_brier_and_rmse_are_what_their_names_say() -> None:
    data = holdout(rows=400)
    by_name = {m.name: m.value for m in evaluate(data, ["log_loss", "brier", "rmse", "mae", "r2"])}
    p, y = data.prediction, data.truth
    assert by_name["log_loss"] == pytest.approx(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))
    assert by_name["brier"] == pytest.approx(np.mean((y - p) ** 2))
    assert by_name["rmse"] == pytest.approx(np.sqrt(np.mean((y - p) ** 2)))
    assert by_name["mae"] == pytest.approx(np.mean(np.abs(y - p)))
    assert by_name["r2"] == pytest.approx(1 - np.sum((y - p) ** 2) / np.sum((y - y.mean()) ** 2))


def test_with_one_row_per_cluster_the_interval_of_a_mean_is_the_t_interval() -> None:
    data = holdout(rows=60)
    (brier,) = evaluate(Holdout(data.truth, data.prediction, np.arange(60), {}), ["brier"])
    losses = (data.truth - data.prediction) ** 2
    error = losses.std(ddof=1) / np.sqrt(60)
    assert brier.value - brier.low == pytest.approx(2.0010 * error, rel=1e-3)


@pytest.mark.parametrize("name", ["log_loss", "roc_auc"])
def test_day_clustered_intervals_cover_while_rowwise_ones_do_not(name: str) -> None:
    """Days with shocks of their own: the interval must speak of new days, not of these rows."""
    truth = np.mean(
        [evaluate(holdout(seed=s, day_effect=0.8, days=400, rows=20_000), [name])[0].value for s in range(3)]
    )
    covered = rowwise = 0
    runs = 200
    for seed in range(runs):
        data = holdout(seed=1000 + seed, day_effect=0.8)
        (ours,) = evaluate(data, [name])
        (naive,) = evaluate(Holdout(data.truth, data.prediction, np.arange(len(data.truth)), {}), [name])
        covered += ours.low <= truth <= ours.high
        rowwise += naive.low <= truth <= naive.high
    assert covered / runs >= 0.89
    assert rowwise < covered


def test_the_paired_difference_is_far_sharper_than_two_intervals() -> None:
    data = holdout(day_effect=0.8)
    champion = np.clip(
        data.prediction + np.random.default_rng(1).normal(0, 0.01, len(data.truth)), 0.001, 0.999
    )
    (difference,) = compare(data, champion, ["log_loss"])
    (alone,) = evaluate(data, ["log_loss"])
    assert difference.high - difference.low < (alone.high - alone.low) / 5


def test_differences_are_signed_so_that_more_is_better() -> None:
    data = holdout()
    noise = np.random.default_rng(2).random(len(data.truth))
    for difference in compare(data, noise, ["roc_auc", "log_loss", "brier"]):
        assert difference.low > 0, difference.name
    assert higher_is_better("roc_auc") and not higher_is_better("log_loss")


def test_a_champion_that_says_the_same_differs_by_exactly_nothing() -> None:
    data = holdout()
    for difference in compare(data, data.prediction, ["roc_auc", "log_loss"]):
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)


@pytest.mark.parametrize(
    "broken",
    [
        Holdout(np.array([]), np.array([]), np.array([], dtype=int), {}),
        Holdout(np.array([0.0, 1.0]), np.array([np.nan, 0.5]), np.array([0, 1]), {}),
        Holdout(np.array([1.0, 1.0]), np.array([0.4, 0.5]), np.array([0, 1]), {}),
    ],
    ids=["no rows", "a NaN prediction", "one class"],
)
def test_what_cannot_be_measured_has_no_value(broken: Holdout) -> None:
    (auc,) = evaluate(broken, ["roc_auc"])
    assert auc.value is None and auc.low is None


def test_one_day_gives_a_value_but_no_interval() -> None:
    data = holdout(rows=100, days=1)
    (brier,) = evaluate(data, ["brier"])
    assert brier.value is not None and brier.low is None and brier.clusters == 1


def test_slices_are_measured_on_their_own_rows() -> None:
    data = holdout()
    half = np.arange(len(data.truth)) % 2 == 0
    sliced = Holdout(data.truth, data.prediction, data.cluster, {"half=a": half})
    by_slice = {m.slice: m for m in evaluate(sliced, ["brier"])}
    assert by_slice["half=a"].rows == half.sum()
    assert by_slice["half=a"].value == pytest.approx(np.mean((data.truth - data.prediction)[half] ** 2))


def test_the_bounds_of_a_difference_are_the_one_sided_95_percent_ones() -> None:
    data = holdout(rows=60)
    champion = np.clip(data.prediction + 0.05, 0.001, 0.999)
    (brier,) = compare(Holdout(data.truth, data.prediction, np.arange(60), {}), champion, ["brier"])
    differences = (data.truth - champion) ** 2 - (data.truth - data.prediction) ** 2
    error = differences.std(ddof=1) / np.sqrt(60)
    assert brier.value == pytest.approx(differences.mean())
    assert brier.value - brier.low == pytest.approx(t.ppf(0.95, 59) * error)
    assert brier.high - brier.value == pytest.approx(t.ppf(0.95, 59) * error)
