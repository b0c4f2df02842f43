"""Does the compiled model say what the original says, and does the original say it row by row?"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from serving.compiled import CompiledModel
from serving.contract import Column, Parity, Plan
from serving.edges import python_values
from serving.graph import NotCompilable
from serving.scorer import predictions_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

SINGLE_ROWS = 24
REFUSED_ROWS = 60  # that the compiled model refuses and the original is asked of, one at a time
SPLITS = 4
SAMPLE = 600
AGAIN = 50  # rows that a call holds twice
MODERATE = 1e30  # numbers below are within 32 bits


class Original:
    """Model.predict, on frames as the server makes them."""

    def __init__(self, model: Any, features: Sequence[Column]) -> None:
        self._model = model
        self._features = features

    def predict(self, frame: pd.DataFrame) -> np.ndarray:
        """Finite float64. Raises what Model.predict raises, and `ContractError` for what is not finite."""
        import numpy as np

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.array(predictions_of(self._model, frame.reset_index(drop=True)), np.float64)

    def first_refused(self, frame: pd.DataFrame) -> tuple[int, Exception] | None:
        """The first row of a frame that is refused, if one is: by halves."""
        error = self._refusal(frame)
        if error is None:
            return None
        first, count = 0, len(frame)
        while count > 1:
            half = count // 2
            if (of_half := self._refusal(frame.iloc[first : first + half])) is not None:
                count, error = half, of_half
            else:
                first, count = first + half, count - half
        return first, self._refusal(frame.iloc[[first]]) or error

    def _refusal(self, frame: pd.DataFrame) -> Exception | None:
        try:
            self.predict(frame)
        except Exception as error:  # the model's own code may raise anything
            return error
        return None

    def refuses(self, frame: pd.DataFrame) -> bool:
        return self._refusal(frame) is not None

    def tuples(self, frame: pd.DataFrame, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """The rows of a frame as a server's decoder has them, columns in the order of `names`."""
        columns = {feature.name: feature for feature in self._features}
        return list(zip(*(python_values(frame[name], columns[name]) for name in names), strict=True))


def check_parity(
    original: Original,
    compiled: CompiledModel,
    plan: Plan,
    holdout: pd.DataFrame,
    edges: pd.DataFrame,
    tolerance: float,
) -> Parity:
    """The largest difference on all rows. Raises `NotCompilable` if one is beyond the tolerance.

    The difference of predictions beyond 1 is relative to them: the tolerance is of their order.

    A row that the original refuses (raises, or says a number that is not finite) must be NaN or infinite.
    """
    names = [*plan.numbers, *(lookup.column for lookup in plan.lookups)]
    worst = 0.0
    for frame, what in ((holdout, "holdout"), (edges, "edge")):
        rows = original.tuples(frame, names)
        worst = max(worst, _compare(original, compiled, frame, rows, what, tolerance))
        step = max(1, len(frame) // SINGLE_ROWS)
        for index in range(0, len(frame), step):
            single = frame.iloc[[index]]
            worst = max(
                worst, _compare(original, compiled, single, rows[index : index + 1], "single", tolerance)
            )
    return Parity(len(holdout), len(edges), worst, tolerance)


def _compare(
    original: Original,
    compiled: CompiledModel,
    frame: pd.DataFrame,
    rows: list[tuple[Any, ...]],
    what: str,
    tolerance: float,
) -> float:
    import numpy as np

    ours = compiled.predict(rows)
    answered = np.flatnonzero(np.isfinite(ours))
    refused = np.flatnonzero(~np.isfinite(ours))
    for index in refused[:: max(1, len(refused) // REFUSED_ROWS)]:
        if not original.refuses(frame.iloc[[index]]):
            theirs = original.predict(frame.iloc[[index]])[0]
            raise NotCompilable(
                f"{what} row {_shown(frame, index)}: compiled {ours[index]}, original {theirs!r}"
            )
    if not len(answered):
        return 0.0
    taken = frame.iloc[answered]
    try:
        theirs = original.predict(taken)
    except Exception:  # the model's own code may raise anything
        found = original.first_refused(taken)
        if found is None:
            raise NotCompilable(
                "Model.predict refuses the same rows at one time and not at another"
            ) from None
        at, error = int(answered[found[0]]), f"{type(found[1]).__name__}: {found[1]}".splitlines()[0][:150]
        raise NotCompilable(
            f"{what} row {_shown(frame, at)}: compiled {ours[at]!r}, original raises {error}"
        ) from None
    difference = np.abs(ours[answered] - theirs) / np.maximum(1.0, np.abs(theirs))
    at = int(np.argmax(difference))
    if difference[at] > tolerance:
        raise NotCompilable(
            f"{what} row {_shown(frame, int(answered[at]))}: compiled {float(ours[answered[at]])!r}, "
            f"original {float(theirs[at])!r}, tolerance {tolerance:g}"
        )
    return float(difference.max())


def check_row_wise(
    original: Original,
    holdout: pd.DataFrame,
    edges: pd.DataFrame,
    tolerance: float,
    seed: int,
    sizes: Sequence[int] = (),
) -> tuple[bool, str]:
    """Whether a row's prediction is independent of the rows beside it, and a sentence that says so.

    `sizes`: of calls to try, beside single rows and parts of a thousand.
    """
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(seed)
    usual = holdout.iloc[random.permutation(len(holdout))[:SAMPLE]]
    odd = edges.iloc[random.permutation(len(edges))[:SAMPLE]]
    taken = _taken(original, odd)
    if taken is None:  # most models of 32-bit numbers refuse too many of the extreme ones
        taken = _taken(original, odd[~(odd.select_dtypes("number").abs() >= MODERATE).any(axis=1)])
    sample = usual if taken is None else pd.concat([usual, taken], ignore_index=True)
    sample = pd.concat([sample, sample.iloc[random.permutation(len(sample))[:AGAIN]]], ignore_index=True)
    together = original.predict(sample)
    count = len(sample)
    orders = [np.arange(count), *(random.permutation(count) for _ in range(SPLITS))]
    for order in orders:
        cuts = np.sort(random.integers(0, count, 3))
        parts = [part for part in np.split(order, cuts) if len(part)]
        singles = [part for part in np.array_split(order[:SINGLE_ROWS], SINGLE_ROWS) if len(part)]
        sized = [order[np.arange(size) % count] for size in sizes]
        for part in [*parts, *([*singles, *sized] if order is orders[-1] else [])]:
            try:
                alone = original.predict(sample.iloc[part])
            except Exception as error:  # the model's own code may raise anything
                return False, f"Model.predict takes rows together that it refuses apart: {error}"[:200]
            apart = np.abs(alone - together[part])
            if (apart > tolerance * np.maximum(1.0, np.abs(alone))).any():
                return False, (
                    f"the rows of one call change each other's predictions by up to {apart.max():g}: "
                    f"the same rows in calls of {count} and of {len(part)} rows"
                )
    return True, f"{count} rows were predicted alike together, apart and one by one"


def _taken(original: Original, rows: pd.DataFrame) -> pd.DataFrame | None:
    """The rows that the original takes, None if it refuses many."""
    for _ in range(REFUSED_ROWS // 3):
        found = original.first_refused(rows)
        if found is None:
            return rows
        rows = rows.drop(index=rows.index[found[0]])
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for all of scikit-learn's work: equal models get equal plans, on a busy machine as well.

    Several add up a forest's trees in the order they end in, and OpenMP's spin while one waits for a CPU.
    """
    with ExitStack() as stack:
        if "joblib" in sys.modules:
            stack.enter_context(sys.modules["joblib"].parallel_config(backend="sequential"))
        if "threadpoolctl" in sys.modules:
            stack.enter_context(sys.modules["threadpoolctl"].threadpool_limits(1))
        yield


def _shown(frame: pd.DataFrame, index: int) -> str:
    row = frame.iloc[int(index)].dropna().to_dict()
    return repr({name: v.item() if hasattr(v, "item") else v for name, v in row.items()})[:400]
