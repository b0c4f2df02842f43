"""`python -m serving.trainer REQUEST.json`: the project's own code at work, in the project's environment.

Prints a line per step. Writes `Result` to `result_path`; exits 0, or 3 with `Result.error` set, or 1 with the
developer's own traceback on standard error.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import random
import re
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from serving import snapshot
from serving.artifact import load_model, model_class_of, save_model
from serving.contract import (
    EXPLAINED_FAILURE,
    GOLDEN_FILE,
    MODEL_DIRECTORY,
    SCHEMA_FILE,
    Column,
    CompileRequest,
    Explained,
    Golden,
    InputSchema,
    PredictRequest,
    Request,
    Result,
    SnapshotRequest,
    TrainRequest,
)
from serving.errors import BadRequest, ContractError
from serving.frames import columns_of, from_columns, from_table, json_rows
from serving.release import read_schema
from serving.rows import RowChecker
from serving.scorer import Scorer, predictions_of

if TYPE_CHECKING:
    import pyarrow as pa

HOLDOUT_FILE = "holdout.parquet"
ROWS_WITH_NULLS = 8  # at most so many golden rows are chosen for a null
PARAMETERS, PARAMETER_LENGTH = 60, 200


def main(arguments: Sequence[str]) -> int:
    """Do what a request file says; the exit code of the process."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m serving.trainer REQUEST.json\n")
        return 2
    request: Request = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=Request)
    try:
        match request:
            case SnapshotRequest():
                result = take_snapshot(request)
            case TrainRequest():
                result = train(request)
            case PredictRequest():
                result = predict(request)
            case CompileRequest():
                result = compile_trained(request)
    except ContractError as error:
        sys.stderr.write(f"{error}\n")
        result = Result(error=Explained(found=error.found, expected=error.expected, where=error.where))
    path = Path(request.result_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, msgspec.json.encode(result))
    return EXPLAINED_FAILURE if result.error else 0


def take_snapshot(request: SnapshotRequest) -> Result:
    """Call the package's `load_data` and write what it returns."""
    try:
        as_of = date.fromisoformat(request.as_of)
    except ValueError:
        raise ContractError(f"as_of {request.as_of!r}", "a date such as 2013-06-01") from None
    sys.path.insert(0, request.source)
    load_data = getattr(_package(request.package), "load_data", None)
    if not callable(load_data):
        raise ContractError(
            f"{request.package} exports no function load_data",
            "load_data(as_of: date) -> DataFrame",
            request.package,
        )
    _say(f"loading the data known on {as_of}")
    frame = load_data(as_of)
    rows = snapshot.write(frame, Path(request.parquet_path))
    _say(f"loaded {rows:,} rows")
    return Result(rows=rows)


def train(request: TrainRequest) -> Result:
    """Train, save, reload, and predict the holdout with the reloaded model."""
    sys.path.insert(0, request.source)
    path, output = Path(request.parquet_path), Path(request.output)
    model_class = model_class_of(request.package)
    named = [request.target, *request.keys, *request.features, *request.carry]
    snapshot.need(snapshot.column_names(path), named, "[tool.perennial]")

    training = _training_rows(request, path)
    _say(f"loaded {training.num_rows:,} rows")
    schema = InputSchema(columns_of(training, request.features), columns_of(training, request.keys))
    frame = from_table(training, schema.features)
    training_rows = training.num_rows
    del training

    _seed(request.seed)
    model = model_class()
    _say(f"training on {training_rows:,} rows, {len(request.features)} features")
    started = time.perf_counter()
    model.produce_model(frame)
    train_seconds = time.perf_counter() - started
    del frame
    _say(f"trained in {train_seconds:.1f} s")

    saved_as = save_model(model, output / MODEL_DIRECTORY)
    _write(output / SCHEMA_FILE, msgspec.json.format(msgspec.json.encode(schema), indent=2))
    reloaded = load_model(output / MODEL_DIRECTORY, request.package)
    _say(f"saved ({saved_as}) and reloaded the model")

    holdout = _holdout(request, path)
    golden = golden_of(model, reloaded, holdout, schema, request.golden_rows)
    _write(output / GOLDEN_FILE, msgspec.json.encode(golden))
    _say(f"{len(golden.rows)} golden rows: the reloaded model says what the trained one says")
    _write_holdout(request, reloaded, holdout, schema.features, output / HOLDOUT_FILE)
    _say(f"predicted the {holdout.num_rows:,} rows of the holdout")
    return Result(
        rows=training_rows + holdout.num_rows,
        training_rows=training_rows,
        holdout_rows=holdout.num_rows,
        train_seconds=train_seconds,
        format=saved_as,
        parameters=parameters_of(model),
    )


def predict(request: PredictRequest) -> Result:
    """Predict rows of a snapshot with a release on disk."""
    scorer = Scorer(Path(request.release))
    features = scorer.schema.features
    table = snapshot.read(
        Path(request.parquet_path),
        [feature.name for feature in features],
        time_column=request.time_column,
        since=request.from_time,
        last_rows=request.last_rows,
    )
    _say(f"loaded {table.num_rows:,} rows")
    if not table.num_rows:
        raise ContractError("no rows to predict", f"rows since {request.from_time}", request.parquet_path)
    import pyarrow as pa

    predictions = scorer.predict_frame(from_table(table, features))
    snapshot.write_table(pa.table({"prediction": predictions}), Path(request.predictions_path))
    _say(f"predicted {table.num_rows:,} rows")
    return Result(rows=table.num_rows)


def compile_trained(request: CompileRequest) -> Result:
    """Write the plan of how a trained model is served, and the compiled model where there is one."""
    sys.path.insert(0, request.source)
    from serving.compiler import compile_model

    trained = Path(request.trained)
    model = load_model(trained / MODEL_DIRECTORY, request.package)
    compile_model(model, read_schema(trained), request, _say)
    return Result()


def golden_of(model: Any, reloaded: Any, holdout: pa.Table, schema: InputSchema, count: int) -> Golden:
    """Rows spread evenly over the holdout and some with nulls, as JSON, and what the trained model says.

    The rows go through JSON before they are predicted, so that a server which is sent all of them in one
    request must answer with equal numbers. Raises `ContractError` if the reloaded model says anything else.
    """
    import pyarrow as pa

    features = holdout.select([feature.name for feature in schema.features])
    indices = pa.array(_golden_indices(features, count), pa.int64())
    checker = RowChecker(schema)
    rows: list[dict[str, object]] = []
    for as_stored in json_rows(features.take(indices)):
        row = msgspec.json.decode(msgspec.json.encode(as_stored))
        try:
            checker.columns([row])
        except BadRequest:
            continue  # such as a null where training saw none: no server would take it
        rows.append(row)
    if len(indices) and not rows:
        raise ContractError(
            f"none of {len(indices)} rows of the holdout could be asked for: nulls where training saw none",
            "newest days that look like the days before",
            "the data",
        )
    if not rows:
        return Golden(rows=[], predictions=[])
    frame = from_columns(checker.columns(rows), schema.features)
    said, says = predictions_of(model, frame.copy()), predictions_of(reloaded, frame)
    for index, (before, after) in enumerate(zip(said, says, strict=True)):
        if before != after:
            raise ContractError(
                f"golden row {index}: the reloaded model predicts {after!r}, the trained one {before!r}",
                "equal predictions; what predict needs must be saved with the model",
                "Model.save and Model.load",
            )
    return Golden(rows=rows, predictions=list(said))


def _golden_indices(features: pa.Table, count: int) -> list[int]:
    """At most `count` rows: some with nulls, the others spread evenly. A server takes them in one request."""
    count = min(count, features.num_rows)
    indices: set[int] = set()
    for column in features.columns:
        if column.null_count and len(indices) < min(ROWS_WITH_NULLS, count // 2):
            import pyarrow.compute as pc

            indices.add(pc.index(column.is_null(), True).as_py())
    with_nulls = sorted(indices)
    rest, others = count - len(with_nulls), features.num_rows - len(with_nulls)
    for i in range(rest):
        index = round(i * (others - 1) / max(rest - 1, 1))  # among the rows that are not chosen yet
        for taken in with_nulls:
            index += index >= taken
        indices.add(index)
    return sorted(indices)


def _training_rows(request: TrainRequest, path: Path) -> pa.Table:
    if request.time_column is not None:
        table = snapshot.read(path, time_column=request.time_column, before=request.holdout_start)
        wanted = f"rows before {request.holdout_start}"
    else:
        training_rows = snapshot.row_count(path) - (request.holdout_rows or 0)
        table = snapshot.read(path, first_rows=max(training_rows, 0))
        wanted = f"more rows than the {request.holdout_rows} of the holdout"
    if not table.num_rows:
        raise ContractError("no rows to train on", wanted, "the snapshot")
    return table


def _holdout(request: TrainRequest, path: Path) -> pa.Table:
    """Everything that is known of the holdout but what the model does not need: read only after saving."""
    time_columns = [request.time_column] if request.time_column else []
    wanted = list(
        dict.fromkeys([*request.features, request.target, *request.keys, *time_columns, *request.carry])
    )
    table = snapshot.read(
        path,
        wanted,
        time_column=request.time_column,
        since=request.holdout_start if request.time_column else None,
        last_rows=request.holdout_rows,
    )
    if not table.num_rows:
        raise ContractError("the holdout has no rows", f"rows since {request.holdout_start}", "the snapshot")
    return table


def _write_holdout(
    request: TrainRequest, model: Any, holdout: pa.Table, features: tuple[Column, ...], path: Path
) -> None:
    import pyarrow as pa

    frame = from_table(holdout.select([feature.name for feature in features]), features)
    predictions = pa.array(predictions_of(model, frame), pa.float64())
    time_columns = [request.time_column] if request.time_column else []
    carried = list(dict.fromkeys([request.target, *request.keys, *time_columns, *request.carry]))
    if "prediction" in carried:
        raise ContractError("a column named 'prediction'", "another name: predictions are stored under it")
    snapshot.write_table(holdout.select(carried).append_column("prediction", predictions), path)


def parameters_of(model: Any) -> dict[str, str]:
    """What a model says of its parameters: its own `parameters`, else those of the estimator it holds."""
    own = getattr(model, "parameters", None)
    if isinstance(own, dict):
        parameters = own
    else:
        held = [value for value in getattr(model, "__dict__", {}).values() if _is_estimator(value)]
        estimator = held[-1] if held else None
        while isinstance(getattr(estimator, "steps", None), list):
            estimator = estimator.steps[-1][1]  # type: ignore[union-attr]
        parameters = estimator.get_params() if _is_estimator(estimator) else {}  # type: ignore[union-attr]
    named = sorted((str(name), str(value)) for name, value in parameters.items())[:PARAMETERS]
    return {name: re.sub(r" at 0x[0-9a-f]+", "", value)[:PARAMETER_LENGTH] for name, value in named}


def _is_estimator(value: object) -> bool:
    return (
        not isinstance(value, type) and callable(getattr(value, "get_params", None)) and hasattr(value, "fit")
    )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise ContractError(f"no package {name}", f"src/{name}/__init__.py", "src") from error
        raise


def _seed(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # Nearly all objects of this short process come with imports and stay: collecting among them costs a
    # fifth of the imports' time, and once more at the exit.
    gc.set_threshold(50_000, 20, 50)
    atexit.register(gc.freeze)
    sys.exit(main(sys.argv[1:]))
