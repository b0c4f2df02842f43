from __future__ import annotations

import struct

import numpy as np
import pytest

from perennial import reports
from perennial.evaluation import Holdout, evaluate
from perennial.validation import DataCheck, DataReport
from perennial.values import Evaluation, Gate, GateReport, Metric, Verdict
from tests.releases import a_form

PNG = b"\x89PNG\r\n\x1a\n"
REFUSED = GateReport(
    gates=(
        Gate(
            name="roc_auc at least 0.6",
            verdict=Verdict.PASS,
            measured=0.7,
            threshold=0.6,
            interval=(0.65, 0.75),
            reason="r",
        ),
        Gate(
            name="brier at most 0.2",
            verdict=Verdict.INSUFFICIENT,
            measured=None,
            threshold=0.2,
            reason="not measured",
        ),
    )
)


def test_the_gate_table_shows_what_was_measured_against_what() -> None:
    first, second = reports.gate_table(REFUSED)
    assert (first["verdict"], first["measured"], first["threshold"]) == ("pass", "0.7000", "0.6000")
    assert first["interval"] == "0.6500 … 0.7500"
    assert (second["verdict"], second["measured"]) == ("insufficient evidence", "not measured")


def test_the_data_page_shows_failures_first_and_escapes_what_it_quotes() -> None:
    checks = (
        DataCheck(expectation="to exist", column="a", passed=True, found="as expected"),
        DataCheck(expectation="in set: ['x|y']", column="b", passed=False, found="3 of 9 rows unexpected"),
    )
    page = reports.data_page(DataReport(checks=checks, origin="the contract"), "9 rows")
    assert "1 of 2 checks failed" in page
    assert page.index("| b |") < page.index("| a |")
    assert "x\\|y" in page


def test_the_tests_page_names_what_failed() -> None:
    page = reports.tests_page(3, ["tests.test_model::test_it"], 1, "E   assert 1 == 2")
    assert "1 failed" in page and "tests.test_model::test_it" in page and "assert 1 == 2" in page


def test_the_serving_page_says_how_why_and_how_exactly() -> None:
    page = reports.serving_page(a_form())
    for words in ("# Served compiled", "every step has an exact form", "may be predicted together: each row"):
        assert words in page
    assert "2e-16 on 28 rows of the holdout and 1,234 edge rows, within a tolerance of 1e-09" in page


def test_the_serving_page_of_an_original_says_what_prevented_the_other() -> None:
    form = a_form(
        path="original",
        reason="Model.predict clips",
        batching=False,
        batching_reason="it looks at the mean of its rows",
        max_abs_difference=None,
        tolerance=None,
    )
    page = reports.serving_page(form)
    for words in ("by the model as it was trained", "Model.predict clips", "may not be predicted together"):
        assert words in page
    assert "nothing compiled was compared" in page


def test_the_evaluation_page_shows_intervals_the_champion_and_every_slice() -> None:
    evaluation = Evaluation(
        metrics=(
            Metric(name="roc_auc", value=0.7, low=0.65, high=0.75, rows=1000, clusters=28),
            Metric(name="roc_auc", slice="origin=JFK", value=None, low=None, high=None, rows=3, clusters=1),
        ),
        champion="toy-0123456789ab",
        champion_differences=(
            Metric(name="roc_auc", value=-0.01, low=-0.02, high=0.0, rows=1000, clusters=28),
        ),
    )
    page = reports.evaluation_page(evaluation, REFUSED, {"roc": "http://x/roc.png"}, {"all": "http://x/"})
    for words in ("0.6500 … 0.7500", "toy-0123456789ab", "-0.0100", "origin=JFK", "![roc](http://x/roc.png)"):
        assert words in page
    assert "brier at most 0.2: insufficient evidence" in page


@pytest.mark.parametrize(
    ("task", "names"), [("binary", ["roc", "calibration", "slices"]), ("regression", ["predicted", "slices"])]
)
def test_plots_are_pictures_of_a_readable_size(task: str, names: list[str]) -> None:
    generator = np.random.default_rng(0)
    prediction = generator.random(500)
    truth = (generator.random(500) < prediction).astype(float)
    half = np.arange(500) % 2 == 0
    holdout = Holdout(truth, prediction, np.arange(500) // 20, {"half=a": half, "half=b": ~half})
    metric = "brier" if task == "binary" else "rmse"
    plots = reports.plots(holdout, Evaluation(metrics=evaluate(holdout, [metric])), task)
    assert list(plots) == names
    for png in plots.values():
        assert png.startswith(PNG)
        width, height = struct.unpack(">II", png[16:24])
        assert width > 300 and height > 100


def test_a_constant_prediction_can_be_drawn() -> None:
    holdout = Holdout(np.array([0.0, 1.0] * 20), np.full(40, 0.5), np.arange(40) // 4, {})
    evaluation = Evaluation(metrics=evaluate(holdout, ["brier"]))
    assert set(reports.plots(holdout, evaluation, "binary")) == {"roc", "calibration"}


def test_the_stand_alone_page_escapes_names() -> None:
    metric = Metric(name="brier", slice="<script>", value=0.1, low=None, high=None, rows=1, clusters=1)
    page = reports.evaluation_html("<b>", [metric], {"roc": PNG})
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page
