"""Golden rows: as exact as the release can be, and the worst named when one is not."""

from __future__ import annotations

import math

import pytest

from perennial import parity
from perennial.errors import RolloutError
from perennial.values import Release, ServiceLimits, ServingForm
from tests.releases import a_form, a_release

ORIGINAL = a_form(path="original", tolerance=None, max_abs_difference=None)
ALONE = ORIGINAL.model_copy(update={"batching": False})
TRAINED = [0.25, 0.5, 8000.0]
LAST_BIT = [math.nextafter(value, math.inf) for value in TRAINED]


def released(form: ServingForm | None, tolerance: float = 1e-9) -> Release:
    return a_release(serving=form, service=ServiceLimits(compiled_tolerance=tolerance))


@pytest.mark.parametrize("form", [None, ALONE])
def test_the_model_as_it_was_trained_must_answer_bit_for_bit(form: ServingForm | None) -> None:
    assert parity.tolerance_of(released(form)) == 0
    parity.check(released(form), list(TRAINED), TRAINED)
    with pytest.raises(RolloutError, match=r"(?s)3 of 3 golden rows: .*bit for bit"):
        parity.check(released(form), LAST_BIT, TRAINED)


@pytest.mark.parametrize(
    ("release", "tolerance"),
    [
        (released(a_form(tolerance=1e-9)), 1e-9),
        (released(a_form(tolerance=1e-6), tolerance=1e-9), 1e-6),
        (released(ORIGINAL, tolerance=1e-7), 1e-7),
    ],
    ids=["compiled", "compiled under another configuration", "original, batched"],
)
def test_a_compiled_or_batched_one_may_differ_by_its_tolerance(release: Release, tolerance: float) -> None:
    assert parity.tolerance_of(release) == tolerance
    parity.check(release, LAST_BIT, TRAINED)
    parity.check(release, [value + 0.9 * tolerance * max(1, value) for value in TRAINED], TRAINED)
    with pytest.raises(RolloutError, match="1 of 3 golden rows: row 2: "):
        parity.check(release, [*TRAINED[:2], 8000 + 1.1 * tolerance * 8000], TRAINED)


def test_a_tolerance_of_zero_is_bit_for_bit() -> None:
    with pytest.raises(RolloutError, match="bit for bit"):
        parity.check(released(a_form(tolerance=0.0)), LAST_BIT, TRAINED)


def test_the_worst_rows_are_named_with_both_numbers_and_the_tolerance() -> None:
    with pytest.raises(RolloutError) as refused:
        parity.check(released(a_form()), [0.26, 0.9, 8000.0], TRAINED)
    assert refused.value.found.endswith(
        "2 of 3 golden rows: row 1: served 0.9, trained 0.5; row 0: served 0.26, trained 0.25"
    )
    assert "within 1e-09" in refused.value.expected


@pytest.mark.parametrize("served", [None, "0.25", [], TRAINED[:2], [*TRAINED, 1.0]])
def test_an_answer_of_another_length_is_refused(served: object) -> None:
    with pytest.raises(RolloutError, match="golden rows with"):
        parity.check(released(a_form()), served, TRAINED)


def test_what_is_no_number_is_worst() -> None:
    with pytest.raises(RolloutError, match="golden rows: row 2: served None"):
        parity.check(released(a_form()), [0.3, 0.5, None], TRAINED)
