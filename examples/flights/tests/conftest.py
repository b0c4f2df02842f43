"""One reading of the data serves every test: January and the first half of February."""

from __future__ import annotations

from datetime import date

import pandas as pd
import pytest

from flights import Model, load_data

AS_OF = date(2013, 2, 15)
SPLIT = pd.Timestamp(2013, 2, 8)
NOT_FEATURES = ["flight_id", "scheduled", "late"]


@pytest.fixture(scope="session")
def flights_known() -> pd.DataFrame:
    return load_data(AS_OF)


@pytest.fixture(scope="session")
def next_days(flights_known: pd.DataFrame) -> pd.DataFrame:
    """The days after those the model was trained on."""
    return flights_known[flights_known["scheduled"] >= SPLIT]


@pytest.fixture(scope="session")
def next_features(next_days: pd.DataFrame) -> pd.DataFrame:
    """What a request holds: no key, no time, no label."""
    return next_days.drop(columns=NOT_FEATURES)


@pytest.fixture(scope="session")
def past_days(flights_known: pd.DataFrame) -> pd.DataFrame:
    return flights_known[flights_known["scheduled"] < SPLIT]


@pytest.fixture(scope="session")
def model(past_days: pd.DataFrame) -> Model:
    model = Model()
    model.produce_model(past_days)
    return model
