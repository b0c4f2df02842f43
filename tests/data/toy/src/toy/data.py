"""Visits of the last 90 days. A day's visits are the same whenever they are asked for."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta

import numpy as np
import pandas as pd

DAYS = 90
VISITS_PER_DAY = 34


def load_data(as_of: date) -> pd.DataFrame:
    """One row per visit of the 90 days before `as_of`."""
    days = [visits(as_of - timedelta(days=ago)) for ago in range(DAYS, 0, -1)]
    return pd.concat(days, ignore_index=True)


def visits(day: date) -> pd.DataFrame:
    """The visits of one day, drawn with the day as seed."""
    random = np.random.default_rng(day.toordinal())
    amount = random.gamma(4.0, 10.0, VISITS_PER_DAY).round(2)
    age = random.integers(18, 80, VISITS_PER_DAY)
    colour = random.choice(["blue", "green", "red"], VISITS_PER_DAY, p=[0.5, 0.3, 0.2])
    member = random.random(VISITS_PER_DAY) < 0.4
    odds = (
        0.07 * (amount - 40) + 0.02 * (age - 49) + np.where(colour == "red", 0.8, -0.2) + 1.2 * member - 0.6
    )
    bought = random.random(VISITS_PER_DAY) < 1 / (1 + np.exp(-odds))
    return pd.DataFrame(
        {
            "visit_id": [f"{day}-{number:03}" for number in range(VISITS_PER_DAY)],
            "seen_at": datetime.combine(day, time(8))
            + pd.to_timedelta(np.arange(VISITS_PER_DAY) * 20, unit="min"),
            "bought": bought.astype("int64"),
            "amount": np.where(random.random(VISITS_PER_DAY) < 0.05, np.nan, amount),
            "age": age,
            "colour": colour.astype(object),
            "member": member,
        }
    )
