"""Claims about the parts that turn files into features."""

from __future__ import annotations

from datetime import date

import numpy as np
import pandas as pd
import pytest

from flights.data import LATE_MINUTES, _duration_minutes, _late_share, _replayed


@pytest.mark.parametrize(
    ("as_of", "day"),
    [
        (date(2013, 7, 4), pd.Timestamp(2013, 7, 4)),
        (date(2026, 11, 20), pd.Timestamp(2013, 11, 20)),
        (date(2028, 2, 29), pd.Timestamp(2013, 2, 28)),
    ],
)
def test_any_year_replays_2013(as_of: date, day: pd.Timestamp) -> None:
    assert _replayed(as_of) == day


def _flight(dest: str, leaves: int, arrives: int, departs_utc: str) -> dict[str, object]:
    return {"dest": dest, "sched_dep_time": leaves, "sched_arr_time": arrives, "time_hour": departs_utc}


@pytest.mark.parametrize(
    ("flight", "minutes"),
    [
        (_flight("BOS", 800, 910, "2013-01-05T13:00:00Z"), 70),
        (_flight("LAX", 800, 1110, "2013-01-05T13:00:00Z"), 370),
        (_flight("LAX", 2230, 150, "2013-01-06T03:00:00Z"), 380),
        (_flight("HNL", 1000, 1630, "2013-01-05T15:00:00Z"), 690),
        (_flight("PHX", 1000, 1315, "2013-01-05T15:00:00Z"), 315),
        (_flight("PHX", 1000, 1215, "2013-07-05T14:00:00Z"), 315),
        (_flight("SJU", 2359, 458, "2013-01-06T04:00:00Z"), 239),
        (_flight("SJU", 2359, 358, "2013-07-06T03:00:00Z"), 239),
    ],
)
def test_the_scheduled_duration_sees_through_time_zones(flight: dict[str, object], minutes: int) -> None:
    assert _duration_minutes(pd.DataFrame([flight])).tolist() == [minutes]


def test_a_late_share_looks_only_at_the_days_before() -> None:
    day = pd.Series(pd.to_datetime(["2013-01-01"] * 2 + ["2013-01-02"] * 2 + ["2013-01-03"]))
    key = pd.Series(["JFK"] * 5)
    late = pd.Series([1, 0, 1, 1, 0])

    shares = _late_share(late, day, key, days=1)
    np.testing.assert_array_equal(shares, [np.nan, np.nan, 0.5, 0.5, 1.0])

    over_two_days = _late_share(late, day, key, days=2)
    np.testing.assert_array_equal(over_two_days, [np.nan, np.nan, 0.5, 0.5, 0.75])


def test_a_late_share_keeps_its_keys_apart() -> None:
    day = pd.Series(pd.to_datetime(["2013-01-01", "2013-01-01", "2013-01-02", "2013-01-02"]))
    key = pd.Series(["JFK", "EWR", "JFK", "LGA"])

    shares = _late_share(pd.Series([1, 0, 0, 0]), day, key, days=7)
    np.testing.assert_array_equal(shares, [np.nan, np.nan, 1.0, np.nan])


def test_every_label_is_settled_by_six_in_the_morning(flights_known: pd.DataFrame) -> None:
    """The retraining starts at 06:00 New York: by then each flight of the day before is due, or late."""
    minutes = flights_known["duration_minutes"] + LATE_MINUTES
    due = flights_known["scheduled"] + pd.to_timedelta(minutes, unit="min")
    next_morning = flights_known["scheduled"].dt.normalize() + pd.Timedelta(days=1, hours=6)
    assert (due <= next_morning).all()
