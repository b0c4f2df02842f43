"""The work of a build as a plain script, in one process: what `build` is compared with.

Loads, validates, splits, trains, evaluates and saves the flights model with the project's own code; no tests,
no gates, no package, no registry. Run by the Python of the project's environment, its src/ on PYTHONPATH:

    python plain_flights.py AS_OF MODEL_FILE EXPECTATIONS_FILE
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

import pandas as pd
import skops.io
from flights import Model, load_data
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

TARGET, TIME, KEY = "late", "scheduled", "flight_id"
HOLDOUT_DAYS = 28
SLICES = ("origin", "carrier")
MIN_SLICE_ROWS = 50


def main() -> None:
    as_of, (model_file, expectations_file) = date.fromisoformat(sys.argv[1]), map(Path, sys.argv[2:])
    rows = load_data(as_of)
    problems = list(problems_of(rows, as_of)) + [
        f"{line['type']}: {line['kwargs']}"
        for line in json.loads(expectations_file.read_text())
        if not holds(rows, line["type"], line["kwargs"])
    ]
    if problems:
        sys.exit("\n".join(problems))

    start = rows[TIME].max().normalize() - pd.Timedelta(days=HOLDOUT_DAYS - 1)
    holdout = rows[rows[TIME] >= start]
    model = Model()
    model.produce_model(rows[rows[TIME] < start])
    predicted = pd.Series(model.predict(holdout.drop(columns=[TARGET, TIME, KEY])), index=holdout.index)

    print(json.dumps(metrics(holdout[TARGET], predicted)))
    for column in SLICES:
        for level, part in holdout.groupby(column):
            if len(part) >= MIN_SLICE_ROWS:
                print(column, level, len(part), json.dumps(metrics(part[TARGET], predicted[part.index])))
    skops.io.dump(model, model_file)


def problems_of(rows: pd.DataFrame, as_of: date):
    """What the contract asks of any data, and is not so."""
    if rows.empty:
        yield "no rows"
    for column in (TARGET, TIME, KEY):
        if nulls := rows[column].isna().sum():
            yield f"{column}: {nulls} nulls"
    if twice := rows[KEY].duplicated().sum():
        yield f"{KEY}: {twice} rows come twice"
    if not rows[TARGET].isin([0, 1]).all() or rows[TARGET].nunique() < 2:
        yield f"{TARGET}: {rows[TARGET].unique()}"
    if not pd.api.types.is_datetime64_any_dtype(rows[TIME]):
        yield f"{TIME}: {rows[TIME].dtype}"
    elif (rows[TIME] >= pd.Timestamp(as_of) + pd.Timedelta(days=1)).any():
        yield f"{TIME}: rows from the future"


def holds(rows: pd.DataFrame, kind: str, kwargs: dict) -> bool:
    """An expectation of the project's expectations.json, by a line of pandas each."""
    low, high = kwargs.get("min_value"), kwargs.get("max_value")
    if kind == "expect_table_row_count_to_be_between":
        return low <= len(rows) <= high
    values = rows[kwargs["column"]]
    if kind == "expect_column_mean_to_be_between":
        return low <= values.mean() <= high
    share = kwargs.get("mostly", 1.0)
    if kind == "expect_column_values_to_not_be_null":
        return values.notna().mean() >= share
    known = values.dropna()
    if kind == "expect_column_values_to_match_regex":
        good = known.str.match(kwargs["regex"])
    elif kind == "expect_column_values_to_be_in_set":
        good = known.isin(kwargs["value_set"])
    elif kind == "expect_column_values_to_be_between":
        bounds = [pd.Timestamp(x) if isinstance(x, str) else x for x in (low, high)]
        good = (bounds[0] is None or known >= bounds[0]) & (bounds[1] is None or known <= bounds[1])
    else:
        raise ValueError(f"this script knows no {kind}")
    return good.mean() >= share


def metrics(truth: pd.Series, predicted: pd.Series) -> dict[str, float | None]:
    both = truth.nunique() == 2
    return {
        "roc_auc": roc_auc_score(truth, predicted) if both else None,
        "log_loss": log_loss(truth, predicted, labels=[0, 1]),
        "brier": brier_score_loss(truth, predicted),
    }


if __name__ == "__main__":
    main()
