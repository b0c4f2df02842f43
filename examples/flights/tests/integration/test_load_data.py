"""Claims about the rows that `load_data` makes of the real files."""

from __future__ import annotations

import pandas as pd

from flights.model import CATEGORIES, NUMBERS, TARGET


def test_only_the_days_before_15_february_are_known(flights_known: pd.DataFrame) -> None:
    assert flights_known["scheduled"].max().date().isoformat() == "2013-02-14"
    assert flights_known["scheduled"].dt.date.nunique() == 45


def test_each_flight_is_one_row_in_order_of_time(flights_known: pd.DataFrame) -> None:
    assert flights_known["flight_id"].is_unique
    assert flights_known["scheduled"].is_monotonic_increasing


def test_labels_are_complete_and_have_the_known_base_rate(flights_known: pd.DataFrame) -> None:
    january = flights_known[flights_known["scheduled"] < "2013-02-01"]
    assert len(january) == 26398
    assert round(january[TARGET].mean(), 3) == 0.227


def test_the_rows_hold_what_the_model_asks_for_and_nothing_more(flights_known: pd.DataFrame) -> None:
    assert sorted(flights_known.columns) == sorted(["flight_id", "scheduled", TARGET, *CATEGORIES, *NUMBERS])


def test_the_weather_is_the_one_of_two_hours_before(flights_known: pd.DataFrame) -> None:
    """weather.csv for EWR on 1 January, 07:00: 39.02 °F and wind of 14.96 mph; at 08:00 it was not."""
    first_day = flights_known[flights_known["flight_id"].str.startswith("2013-01-01-")]
    nine = first_day[(first_day["origin"] == "EWR") & (first_day["hour"] == 9)]
    assert nine["temp"].unique().tolist() == [39.02]
    assert nine["wind_speed"].round(2).unique().tolist() == [14.96]
