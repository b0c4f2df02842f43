"""The model of a release as the server calls it: the compiled one, or the original behind a DataFrame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from serving.compiled import CompiledModel
from serving.contract import GOLDEN_FILE, SERVING_DIRECTORY, Column, Golden, Plan
from serving.decode import Decoder, Feeds, Row
from serving.engine import Model
from serving.errors import BadRequest


class Compiled:
    """An ONNX graph: no pandas, no scikit-learn."""

    inline = True
    batching = True

    def __init__(self, release: Path, plan: Plan) -> None:
        self._model = CompiledModel(release / SERVING_DIRECTORY, plan)

    def predict(self, rows: Sequence[Row]) -> tuple[list[float], Feeds | None]:
        """One finite number per row, and the arrays. Raises `BadRequest` where the original would fail.

        The graph says NaN there: of a value that is too large, missing where none may be, or unknown to an
        encoder that takes no others.
        """
        feeds = self._model.feeds(rows)
        predictions: list[float] = self._model.run(feeds).tolist()
        total = sum(predictions)
        if total - total != 0.0:  # an infinity or a NaN is in it, or the sum is beyond all bounds
            for row, value in enumerate(predictions):
                if value - value != 0.0:
                    raise BadRequest(
                        422,
                        f"the model cannot take row {row}: a value of it is too large, or missing or unknown",
                        row=row,
                        expected="values such as those that the model was trained on",
                    )
        return predictions, feeds


class Original:
    """`Model.predict` of the project, on a frame with the dtypes of training."""

    inline = False

    def __init__(self, release: Path, columns: Sequence[Column], batching: bool) -> None:
        from serving.scorer import Scorer  # with all that loads a model of the project

        self._scorer = Scorer(release)
        self._names = [column.name for column in columns]
        self.batching = batching

    def predict(self, rows: Sequence[Row]) -> tuple[list[float], None]:
        """One finite number per row."""
        columns = dict(zip(self._names, zip(*rows, strict=True), strict=True))
        try:
            return self._scorer.predict_columns(columns), None
        except ValueError as error:
            if not _raised_by_scikit_learn(error):
                raise
            reason = str(error).partition("\n")[0][:200]
            raise BadRequest(422, f"the model cannot take these rows: {reason}") from error


def load(release: Path, plan: Plan | None, decoder: Decoder) -> Model:
    """The model that the plan chose, warmed up. Raises `ContractError` if it cannot be loaded."""
    model: Model
    if plan is not None and plan.path == "compiled":
        model = Compiled(release, plan)
    else:
        model = Original(release, decoder.columns, plan is not None and plan.batching)
    golden = release / GOLDEN_FILE
    rows = msgspec.json.decode(golden.read_bytes(), type=Golden).rows[:1] if golden.exists() else []
    if rows:  # libraries load much at the first prediction: not in a user's request
        model.predict(decoder.rows(msgspec.json.encode(rows), len(rows)))
    return model


def _raised_by_scikit_learn(error: ValueError) -> bool:
    """Whether scikit-learn's own check of its input refused a value: no fault of the service or the model."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("sklearn.")
