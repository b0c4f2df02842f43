"""Does Model.predict only hand its rows to one fitted estimator and return what that says?

Proven by substitution: the estimator is replaced by a probe that keeps what it is given and returns random
numbers; the rows must arrive unchanged, and the numbers must come back as they are.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.graph import NotCompilable

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

METHODS = ("predict_proba", "predict", "decision_function")
ARRAYS = ("float64", "int64", "bool")  # a narrower one rounds what the graph does not


@dataclass(frozen=True)
class Output:
    """What Model.predict passes through: a method of one of the model's attributes, and a column of it."""

    attribute: str
    method: str
    index: int | None
    columns: tuple[str, ...]  # of the frame, in the order that the estimator is given them


class Probe:
    """Stands in for an estimator: keeps the frames it is given, answers with random numbers."""

    def __init__(self, estimator: Any, random: np.random.Generator) -> None:
        self._estimator = estimator
        self._random = random
        self.calls: list[tuple[str, Any, np.ndarray]] = []

    def __getattr__(self, name: str) -> Any:
        if name in METHODS and callable(getattr(self._estimator, name, None)):
            return lambda rows: self._answer(name, rows)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._estimator, name)

    def _answer(self, method: str, rows: Any) -> np.ndarray:
        import numpy as np

        count = len(rows)
        if method == "predict_proba":
            first = self._random.random(count)
            for extreme in (0.0, 1.0, 1e-12, 1 - 1e-12):
                first[self._random.random(count) < 0.05] = extreme
            answer = np.column_stack([1 - first, first])
        else:
            sign = self._random.choice([-1.0, 1.0], count)
            answer = sign * 10.0 ** self._random.uniform(-6, 9, count)
        given = rows.copy() if hasattr(rows, "copy") else rows
        self.calls.append((method, given, answer.copy()))
        return answer


def find_output(model: Any, frames: list[pd.DataFrame]) -> tuple[Any, Output]:
    """The estimator that `model.predict` passes its rows to, and which of its outputs it returns.

    Raises `NotCompilable`: the reasons of the nearest candidate.
    """
    import numpy as np

    reasons: list[str] = []
    for attribute, estimator in _candidates(model):
        random = np.random.default_rng(0)
        try:
            output = _substituted(model, attribute, estimator, random, frames[0], None)
            for frame in frames[1:]:
                if _substituted(model, attribute, estimator, random, frame, output.columns) != output:
                    raise NotCompilable("Model.predict does different things to different rows")
            return estimator, output
        except NotCompilable as reason:
            reasons.append(str(reason))
    if not reasons:
        raise NotCompilable("no attribute of Model is a fitted scikit-learn estimator")
    raise NotCompilable(next((r for r in reasons if "never asks" not in r), reasons[0]))


def _candidates(model: Any) -> Iterator[tuple[str, Any]]:
    if "sklearn" not in sys.modules:
        return
    from sklearn.base import BaseEstimator

    for name, value in getattr(model, "__dict__", {}).items():
        if isinstance(value, BaseEstimator) and any(hasattr(value, method) for method in METHODS):
            yield name, value


def _substituted(
    model: Any,
    attribute: str,
    estimator: Any,
    random: np.random.Generator,
    frame: pd.DataFrame,
    expected: tuple[str, ...] | None,
) -> Output:
    import numpy as np

    double, probe = copy.copy(model), Probe(estimator, random)
    double.__dict__[attribute] = probe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            said = np.asarray(double.predict(frame.copy()))
        except NotCompilable:
            raise
        except Exception as error:  # the model's own code may do anything
            found = f"{type(error).__name__}: {error}"[:200]
            raise NotCompilable(
                f"Model.predict does more with {attribute!r} than to ask it: {found}"
            ) from error
    if not probe.calls:
        raise NotCompilable(f"Model.predict never asks its {attribute!r} to predict")
    if len(probe.calls) > 1:
        raise NotCompilable(f"Model.predict asks its {attribute!r} {len(probe.calls)} times, not once")
    method, given, answer = probe.calls[0]
    if method == "predict" and getattr(estimator, "classes_", None) is not None:
        raise NotCompilable(f"Model.predict returns classes of {attribute!r}, not probabilities")
    if isinstance(given, np.ndarray) and given.ndim == 2 and given.dtype.name in ARRAYS:
        columns = _unchanged_numbers(given, frame, attribute, expected)
    else:
        columns = _unchanged(given, frame, attribute)
    if said.ndim == 2 and said.shape[1] == 1:
        said = said[:, 0]
    if answer.ndim == 1 and said.dtype == np.float64 and np.array_equal(said, answer):
        return Output(attribute, method, None, columns)
    for index in range(answer.shape[1] if answer.ndim == 2 else 0):
        if said.dtype == np.float64 and np.array_equal(said, answer[:, index]):
            return Output(attribute, method, index, columns)
    raise NotCompilable(f"Model.predict changes what {method} of its {attribute!r} says")


def _unchanged(given: Any, frame: pd.DataFrame, attribute: str) -> tuple[str, ...]:
    """The columns that the estimator was given: with the values and dtypes of the frame."""
    import pandas as pd

    if not isinstance(given, pd.DataFrame):
        raise NotCompilable(
            f"Model.predict gives its {attribute!r} a {type(given).__name__}, not columns of its rows"
        )
    if len(given) != len(frame):
        raise NotCompilable(f"Model.predict gives its {attribute!r} {len(given)} of {len(frame)} rows")
    for name in given.columns:
        if name not in frame.columns:
            raise NotCompilable(
                f"Model.predict gives its {attribute!r} a column {name!r} that no request has"
            )
        left, right = given[name].reset_index(drop=True), frame[name].reset_index(drop=True)
        if isinstance(left, pd.DataFrame) or left.dtype != right.dtype or not left.equals(right):
            raise NotCompilable(f"Model.predict changes what its {attribute!r} is given in column {name!r}")
    return tuple(map(str, given.columns))


def _unchanged_numbers(
    given: np.ndarray, frame: pd.DataFrame, attribute: str, expected: tuple[str, ...] | None
) -> tuple[str, ...]:
    """The columns of the frame that an array of numbers holds: the expected ones, or found by value."""
    import numpy as np
    import pandas as pd

    if len(given) != len(frame):
        raise NotCompilable(f"Model.predict gives its {attribute!r} {len(given)} of {len(frame)} rows")
    if expected is not None and len(expected) != given.shape[1]:
        raise NotCompilable("Model.predict does different things to different rows")
    numbers = {
        name: pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64)
        for name in frame.columns
        if frame[name].dtype.kind in "fiub"
    }
    columns = []
    for index in range(given.shape[1]):
        names = numbers if expected is None else {expected[index]}
        same = [name for name in names if np.array_equal(numbers[name], given[:, index], equal_nan=True)]
        if len(same) != 1:
            which = f"column {index} of the array" if expected is None else f"column {expected[index]!r}"
            raise NotCompilable(f"Model.predict changes what its {attribute!r} is given in {which}")
        columns.append(str(same[0]))
    return tuple(columns)
