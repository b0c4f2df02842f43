"""What the developer of this project promises."""

from __future__ import annotations

from datetime import date

import pytest
from toy import Model, load_data


@pytest.fixture(scope="session")
def visits():
    return load_data(date(2026, 3, 1))


@pytest.fixture(scope="session")
def model(visits):
    model = Model()
    model.produce_model(visits)
    return model


def test_a_visit_is_one_row(visits):
    assert len(visits) == 3060
    assert visits["visit_id"].is_unique


def test_members_buy_more(model, visits):
    features = visits.drop(columns=["visit_id", "seen_at", "bought"])
    members = model.predict(features.assign(member=True)).mean()
    assert members > model.predict(features.assign(member=False)).mean()
