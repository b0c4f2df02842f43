from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from perennial.config import ProjectConfig
from perennial.errors import DataError, ProjectError
from perennial.validation import (
    DataReport,
    column_type,
    contract_suite,
    inferred_suite,
    project_suite,
    validate,
)

CONFIG = ProjectConfig(
    task="binary", target="label", time_column="at", entity_id=("id",), slices=("color",), holdout_days=7
)
AS_OF = date(2024, 3, 1)
ROWS = 600


def frame() -> pd.DataFrame:
    hours = pd.to_timedelta(np.arange(ROWS), unit="h")
    return pd.DataFrame(
        {
            "id": [f"i{n}" for n in range(ROWS)],
            "at": (pd.Timestamp("2024-02-01") + hours).astype("datetime64[us]"),
            "label": np.arange(ROWS) % 2,
            "color": np.where(np.arange(ROWS) % 3 == 0, "red", "blue"),
            "size": np.linspace(1, 2, ROWS),
        }
    )


def contract(data: pd.DataFrame) -> DataReport:
    return validate(data, contract_suite(CONFIG, AS_OF), "the contract")


def test_good_data_passes() -> None:
    report = contract(frame())
    assert report.checks and not report.failures


@pytest.mark.parametrize(
    ("change", "column", "count"),
    [
        (lambda f: f.iloc[:0], "table", "found 0"),
        (lambda f: f.drop(columns="label"), "label", "not found"),
        (lambda f: f.drop(columns="color"), "color", "not found"),
        (lambda f: f.assign(label=1), "label", "found 1"),
        (lambda f: f.assign(label=f.label + 3), "label", "600 of 600"),
        (lambda f: f.assign(label=f.label.astype(float).where(f.index > 3)), "label", "4 of 600"),
        (lambda f: f.assign(id=f.id.where(f.index > 0, "i1")), "id", "2 of 600"),
        (lambda f: f.assign(at=f["at"] + pd.Timedelta(days=10)), "at", "unexpected"),
        (lambda f: f.assign(at=f["at"].astype(str)), "at", "type list"),
    ],
    ids=[
        "zero rows",
        "no target",
        "no slice",
        "one class",
        "not binary",
        "nulls",
        "duplicates",
        "future",
        "type",
    ],
)
def test_bad_data_is_named_by_column_and_count(change: object, column: str, count: str) -> None:
    report = contract(change(frame()))  # type: ignore[operator]
    assert report.failures
    message = str(report.error())
    assert isinstance(report.error(), DataError)
    assert f"{column}:" in message and count in message


def test_the_last_release_s_data_says_what_rows_look_like() -> None:
    suite = inferred_suite(pa.Table.from_pandas(frame()))
    assert not validate(frame(), suite, "last").failures
    for column, broken in {
        "size": frame().assign(size=100.0),
        "color": frame().assign(color="green"),
        "id": frame().drop(columns="id"),
    }.items():
        failures = validate(broken, suite, "last").failures
        assert column in {check.column for check in failures}
    assert "" in {check.column for check in validate(frame().head(200), suite, "last").failures}


def test_tomorrow_s_ordinary_data_passes_the_inferred_suite() -> None:
    data = frame().assign(size=np.random.default_rng(0).uniform(0.9, 2.1, ROWS))
    data["at"] = data["at"] + pd.Timedelta(days=1)
    assert not validate(data, inferred_suite(pa.Table.from_pandas(frame())), "last").failures


@pytest.mark.parametrize("text", ["{", '[{"type": "x"}]', '[{"type": "x", "kwargs": {}, "more": 1}]', "3"])
def test_a_suite_that_cannot_be_read_is_explained(tmp_path: Path, text: str) -> None:
    (tmp_path / "expectations.json").write_text(text)
    with pytest.raises(ProjectError, match=r"expectations\.json cannot be read"):
        project_suite(tmp_path)


def test_an_expectation_that_does_not_exist_is_explained(tmp_path: Path) -> None:
    (tmp_path / "expectations.json").write_text('[{"type": "expect_miracles", "kwargs": {}}]')
    suite = project_suite(tmp_path)
    assert suite is not None
    with pytest.raises(ProjectError, match="expect_miracles"):
        validate(frame(), suite, "the project")


def test_a_column_type_that_no_request_can_carry_is_refused() -> None:
    with pytest.raises(DataError, match="list"):
        column_type(pa.list_(pa.int64()))
