"""Data that is not fit to train on stops the build, which names the column and how many rows."""

from __future__ import annotations

from typing import Any

import pytest

from tests.flows.conftest import MakeProject
from tests.flows.house import House


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        pytest.param("empty", {"zero_rows": True}, ["table: ", "found 0"], id="zero rows"),
        pytest.param("gone", {"missing_column": "amount"}, ["amount: not found"], id="a missing column"),
        pytest.param(
            "typed",
            {"wrong_type": "amount"},
            ["amount: 3,060 of 3,060 rows", "the column holds string", "float64"],
            id="a column of the wrong type",
        ),
        pytest.param(
            "one-class", {"one_class": True}, ["bought: found 1", "min_value 2"], id="one class only"
        ),
        pytest.param("null-age", {"null_in": "age"}, ["age: 306 of 3,060 rows"], id="nulls in a column"),
        pytest.param(
            "null-id", {"null_in": "visit_id"}, ["visit_id: 306 of 3,060 rows"], id="nulls in the key"
        ),
        pytest.param("twice", {"duplicate_keys": 7}, ["visit_id: 14 of 3,067 rows"], id="duplicate keys"),
        pytest.param(
            "future",
            {"future_rows": True},
            ["seen_at: 34 of 3,094 rows", "2026-03-03"],
            id="rows from the future",
        ),
    ],
)
def test_data_that_is_unfit_fails_validation_and_trains_nothing(
    house: House, enabled: MakeProject, name: str, options: dict[str, Any], words: list[str]
) -> None:
    enabled(name, **options)
    run = house.build(name)
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains("the data failed its validation", *words, "Expected: what the contract")
    assert run.stopped_in("validate_data")
    assert house.published_nothing(name)
    page = house.artifact(f"data-{name}")
    assert all(word in page for word in words[1:])


def test_a_load_data_that_raises_is_told_with_its_own_words(house: House, enabled: MakeProject) -> None:
    project = enabled("raises")
    data = project.read("src/raises/data.py")
    broken = data.replace(
        '    """One row per visit', '    raise ConnectionError("the lake is dry")\n    """One row per visit'
    )
    project.commit("break", {"src/raises/data.py": broken})
    run = house.build("raises")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.passes_on("load_data(2026-03-01) ended with an error", "the lake is dry", "src/raises/data.py")
    assert run.stopped_in("snapshot_data")
    assert house.published_nothing("raises")
