"""What a user of the model may rely on, shown with five weeks of real flights and the week after."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss, roc_auc_score

from flights import Model
from flights.model import NUMBERS


def test_the_next_days_are_predicted_better_than_by_the_base_rate(
    model: Model, past_days: pd.DataFrame, next_days: pd.DataFrame, next_features: pd.DataFrame
) -> None:
    predicted = model.predict(next_features)
    base_rate = np.full(len(next_days), past_days["late"].mean())
    assert log_loss(next_days["late"], predicted) < log_loss(next_days["late"], base_rate)
    assert roc_auc_score(next_days["late"], predicted) > 0.60


def test_predictions_are_probabilities_one_per_row(model: Model, next_features: pd.DataFrame) -> None:
    predicted = model.predict(next_features)
    assert predicted.shape == (len(next_features),)
    assert predicted.dtype == np.float64
    assert ((predicted > 0) & (predicted < 1)).all()


def test_late_evening_flights_are_predicted_later_than_early_morning_ones(
    model: Model, next_features: pd.DataFrame
) -> None:
    predicted = pd.Series(model.predict(next_features), index=next_features.index)
    evening = predicted[next_features["hour"] >= 19].mean()
    morning = predicted[next_features["hour"] <= 7].mean()
    assert evening > morning * 1.3


def test_an_unseen_carrier_or_destination_is_predicted_all_the_same(
    model: Model, next_features: pd.DataFrame
) -> None:
    strangers = next_features.head(50).assign(carrier="ZZ", dest="XXX", manufacturer="NOBODY")
    assert np.isfinite(model.predict(strangers)).all()


def test_null_weather_and_an_unknown_plane_are_predicted_all_the_same(
    model: Model, next_features: pd.DataFrame
) -> None:
    unknown = ["plane_age", "seats", *NUMBERS[NUMBERS.index("temp") :]]
    blind = next_features.head(50).assign(**dict.fromkeys(unknown, np.nan), manufacturer=None)
    assert np.isfinite(model.predict(blind)).all()


def test_a_row_alone_is_predicted_as_within_a_batch(model: Model, next_features: pd.DataFrame) -> None:
    batch = next_features.head(20)
    alone = [model.predict(batch.iloc[[row]])[0] for row in range(len(batch))]
    np.testing.assert_array_equal(model.predict(batch), alone)


def test_training_twice_gives_the_same_model(past_days: pd.DataFrame, next_features: pd.DataFrame) -> None:
    few = past_days.head(4000)
    first, second = Model(), Model()
    first.produce_model(few)
    second.produce_model(few)
    np.testing.assert_array_equal(first.predict(next_features), second.predict(next_features))
