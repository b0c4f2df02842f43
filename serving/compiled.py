"""A compiled model: rows of Python values through an ONNX graph to predictions, without a DataFrame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from serving.contract import ONNX_FILE, PLAN_FILE, SERVING_DIRECTORY, TREES_FILE, Plan
from serving.errors import ContractError
from serving.quickscorer import QuickScorer

if TYPE_CHECKING:
    import numpy as np

BUILD_AGAIN = "what `serving.compiler` wrote; build the release again"


def read_plan(directory: Path) -> Plan | None:
    """The plan of a release directory, None where there is none. Raises `ContractError` for a broken one."""
    path = directory / SERVING_DIRECTORY / PLAN_FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Plan)
    except (OSError, msgspec.MsgspecError) as error:
        raise ContractError(f"an unreadable plan ({error})", BUILD_AGAIN, str(path)) from error


def onnxruntime() -> Any:
    """onnxruntime, which reports to its maker from every process that loads it unless it is told not to."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime


def load_graph(content: bytes, path: Path) -> Any:
    """A session of one thread. Raises `ContractError` if onnxruntime cannot load the graph, from `path`."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # its exceptions say all that its log would
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # smaller, and as fast for few rows
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception per status, with no common base of its own
        found = str(error).splitlines()[0] if str(error) else repr(error)
        raise ContractError(f"onnxruntime cannot load it: {found}", BUILD_AGAIN, str(path)) from error


OUTPUTS = ["prediction"]
COLUMNWISE_ROWS = 8  # from here on, codes are looked up by column
MOST_ROWS = 50  # of a call: with more, onnxruntime walks all rows for each tree, and they leave the cache


class CompiledModel:
    """The compiled model of `directory` (a folder with `model.onnx`), on one thread.

    Raises `ContractError` if onnxruntime cannot load it, or if it is not the graph that the plan describes.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        import numpy as np

        path = directory / ONNX_FILE
        session = load_graph(path.read_bytes(), path)
        wanted = [name for name, columns in (("numbers", plan.numbers), ("codes", plan.lookups)) if columns]
        inputs = sorted(node.name for node in session.get_inputs())
        if inputs != sorted(wanted) or [node.name for node in session.get_outputs()] != ["prediction"]:
            raise ContractError(f"a compiled model of inputs {inputs}", f"inputs {wanted}", str(path))
        self._array, self._empty, self._concatenate = np.array, np.empty, np.concatenate
        # The session's own run() checks the names of its feeds anew at every call.
        self._run = getattr(session, "_sess", session).run
        self._numbers = len(plan.numbers)
        # of each lookup: its place in a row, the code of each value, the code of any other
        self._codes: list[tuple[int, dict[Any, int], int]] = []
        for position, lookup in enumerate(plan.lookups, self._numbers):
            unknown = len(lookup.values)
            codes: dict[Any, int] = {value: code for code, value in enumerate(lookup.values)}
            codes[None] = unknown + 1
            self._codes.append((position, codes, unknown))
        self._from_rows = plan.trees_from_rows
        if self._from_rows is not None:
            if self._from_rows < 2:  # numpy adds up the trees of one row in another order
                found = f"a plan of trees from {self._from_rows} rows on"
                raise ContractError(found, "2 or more; build the release again", str(path.parent / PLAN_FILE))
            self._trees = QuickScorer(directory / TREES_FILE, plan, load_graph)

    def predict(self, rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
        """One float64 per row, of tuples that begin with the values of `plan.numbers`, then `plan.lookups`.

        A row that the original would refuse, such as one with a value out of its range, gets NaN.
        """
        return self.run(self.feeds(rows)) if rows else self._empty(0)

    def feeds(self, rows: Sequence[tuple[Any, ...]]) -> dict[str, np.ndarray]:
        """The arrays that `contract.Plan` describes, of at least one row."""
        if self._from_rows is not None and len(rows) >= self._from_rows:
            return self._by_column(rows)
        array, numbers = self._array, self._numbers
        feeds: dict[str, np.ndarray] = {}
        if numbers:  # None becomes NaN
            feeds["numbers"] = array([row[:numbers] for row in rows], "f8")
        if self._codes:
            feeds["codes"] = self._coded(rows)
        return feeds

    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """What `predict` says, by what `feeds` returned."""
        rows = len(next(iter(feeds.values())))
        if self._from_rows is not None and rows >= self._from_rows:
            return self._trees.predict(feeds["numbers"].T, feeds["codes"].T)
        prediction: np.ndarray
        if rows <= MOST_ROWS:
            prediction = self._run(OUTPUTS, feeds, None)[0]
        else:
            starts = range(0, rows, MOST_ROWS)
            pieces = [{name: fed[at : at + MOST_ROWS] for name, fed in feeds.items()} for at in starts]
            prediction = self._concatenate([self._run(OUTPUTS, piece, None)[0] for piece in pieces])
        return prediction

    def _by_column(self, rows: Sequence[tuple[Any, ...]]) -> dict[str, np.ndarray]:
        columns = list(zip(*rows, strict=True))
        numbers = self._array(columns[: self._numbers], "f8").reshape(self._numbers, len(rows))
        return {"numbers": numbers.T, "codes": self._coded_columns(columns).T}

    def _coded(self, rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
        """int64 [rows, lookups]."""
        if len(rows) < COLUMNWISE_ROWS:
            codes = self._codes
            return self._array([[c.get(row[i], u) for i, c, u in codes] for row in rows], "i8")
        return self._coded_columns(list(zip(*rows, strict=True))).T.copy()

    def _coded_columns(self, columns: Sequence[tuple[Any, ...]]) -> np.ndarray:
        """int64 [lookups, rows]."""
        codes = [list(map(c.get, columns[i], repeat(u))) for i, c, u in self._codes]
        return self._array(codes, "i8").reshape(len(codes), len(columns[0]))
