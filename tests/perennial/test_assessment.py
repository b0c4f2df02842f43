from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest

from perennial import assessment
from perennial.config import ProjectConfig
from perennial.evaluation import Holdout
from tests.releases import a_release

CONFIG = ProjectConfig(task="binary", target="y", time_column="at", metrics=("log_loss",))
DAYS = 28
PER_DAY = 20
FIRST = date(2024, 5, 1)


def holdout() -> Holdout:
    generator = np.random.default_rng(0)
    rows = DAYS * PER_DAY
    score = generator.normal(size=rows)
    truth = (generator.random(rows) < 1 / (1 + np.exp(-score))).astype(float)
    first = np.datetime64(FIRST, "D").astype(int)
    cluster = np.repeat(np.arange(first, first + DAYS), PER_DAY)
    return Holdout(truth, 1 / (1 + np.exp(-score)), cluster, {})


def champion(trained_until: date):
    moment = datetime.combine(trained_until, datetime.min.time())
    release = a_release(created_at=datetime.now(UTC))
    return release.model_copy(update={"model": release.model.model_copy(update={"holdout_start": moment})})


def test_without_a_champion_there_is_nothing_to_compare_with() -> None:
    assert assessment.evaluate(CONFIG, holdout(), None, None).champion is None


@pytest.mark.parametrize("seen_days", [0, 10])
def test_the_champion_is_judged_on_rows_that_it_was_not_trained_on(seen_days: int) -> None:
    data = holdout()
    rival = champion(FIRST + timedelta(days=seen_days))
    evaluation = assessment.evaluate(CONFIG, data, rival, data.prediction)
    (difference,) = evaluation.champion_differences
    assert difference.clusters == DAYS - seen_days
    assert difference.rows == (DAYS - seen_days) * PER_DAY
    assert evaluation.metrics[0].rows == DAYS * PER_DAY


def test_a_champion_that_has_seen_every_row_cannot_be_compared_with() -> None:
    data = holdout()
    evaluation = assessment.evaluate(CONFIG, data, champion(FIRST + timedelta(days=99)), data.prediction)
    assert evaluation.champion_differences[0].low is None


def test_metrics_default_to_those_of_the_task() -> None:
    evaluation = assessment.evaluate(
        CONFIG.model_copy(update={"metrics": ()}), replace(holdout()), None, None
    )
    assert [m.name for m in evaluation.metrics] == ["roc_auc", "log_loss", "brier"]
