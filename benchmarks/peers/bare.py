"""In the model's own environment: how long a call takes with nothing around it, the limit of any server.

    python bare.py RELEASE FLIGHTS_JSON

Prints seconds by path and number of rows, as JSON; the compiled model's arrays are there before the call.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from serving.artifact import load_model

BARE_ROWS = (1, 100)
BARE_SECONDS = 0.5


def main() -> None:
    release, rows = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())["rows"]
    sys.path.insert(0, str(release / "site"))
    model: Any = load_model(release / "model", "flights")
    frame = pd.DataFrame(rows)  # of all rows, so that a column of one row has the type of the whole
    found = {
        "original": {str(n): seconds_of(model.predict, frame.head(n)) for n in BARE_ROWS},
        "compiled": compiled(release / "serving", frame),
    }
    print(json.dumps(found))


def compiled(folder: Path, frame: pd.DataFrame) -> dict[str, float]:
    """Bare calls of the compiled model on arrays that are there; empty where there is none."""
    if not (folder / "model.onnx").is_file():
        return {}
    import onnxruntime

    plan = json.loads((folder / "plan.json").read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    inputs = {}
    if plan["numbers"]:
        inputs["numbers"] = frame[plan["numbers"]].to_numpy(np.float64)
    if plan["lookups"]:
        codes = [_codes(frame[each["column"]], each["values"]) for each in plan["lookups"]]
        inputs["codes"] = np.column_stack(codes).astype(np.int64)

    def predict(arrays: dict[str, np.ndarray]) -> object:
        return session.run(["prediction"], arrays)

    return {
        str(n): seconds_of(predict, {k: np.ascontiguousarray(v[:n]) for k, v in inputs.items()})
        for n in BARE_ROWS
    }


def _codes(column: pd.Series, values: list[Any]) -> list[int]:
    code = {value: number for number, value in enumerate(values)}
    return [
        len(values) + 1 if pd.isna(value) else code.get(value, len(values)) for value in column.astype(object)
    ]


def seconds_of(call: Callable[[Any], object], argument: object) -> float:
    """The median of many calls."""
    call(argument)
    taken: list[float] = []
    until = time.perf_counter() + BARE_SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        call(argument)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


if __name__ == "__main__":
    main()
