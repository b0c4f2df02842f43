"""The Open Inference Protocol, version 2: tensors of one column each, to rows and back."""

from __future__ import annotations

from itertools import islice
from typing import Any

from serving import __version__
from serving.contract import Column, ColumnType, InputSchema, Manifest
from serving.errors import BadRequest

# First the datatype that metadata names, then what is taken as well.
DATATYPES: dict[ColumnType, tuple[str, ...]] = {
    "integer": ("INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8"),
    "number": ("FP64", "FP32", "INT64", "INT32"),
    "string": ("BYTES",),
    "timestamp": ("BYTES",),
    "boolean": ("BOOL",),
}


def server_metadata() -> dict[str, Any]:
    """The answer to GET /v2."""
    return {"name": "perennial-serving", "version": __version__, "extensions": []}


def model_metadata(manifest: Manifest, schema: InputSchema) -> dict[str, Any]:
    """The answer to GET /v2/models/NAME."""
    return {
        "name": manifest.project,
        "versions": [manifest.release_id],
        "platform": "perennial",
        "inputs": [
            {"name": column.name, "datatype": DATATYPES[column.type][0], "shape": [-1]}
            for column in schema.features
        ],
        "outputs": [{"name": "prediction", "datatype": "FP64", "shape": [-1]}],
    }


def rows_of(body: Any, schema: InputSchema, max_rows: int) -> list[dict[str, Any]]:
    """The rows of an inference request. Raises `BadRequest` for tensors that make no rows."""
    inputs = body.get("inputs") if isinstance(body, dict) else None
    if not isinstance(inputs, list) or not inputs:
        raise BadRequest(422, "the request has no inputs, expected an array with a tensor per column")
    columns = {column.name: column for column in (*schema.keys, *schema.features)}
    values: dict[str, list[Any]] = {}
    for position, tensor in enumerate(inputs):
        name, data = _tensor(tensor, position, columns)
        if name in values:
            raise BadRequest(422, f"input {name[:80]!r} is given twice", column=name[:80])
        values[name] = data
    lengths = {name: len(data) for name, data in values.items()}
    first, length = next(iter(lengths.items()))
    for name, other in lengths.items():
        if other != length:
            raise BadRequest(
                422,
                f"input {name[:80]!r} has {other} values, expected {length} like {first[:80]!r}",
                column=name[:80],
                found=str(other),
                expected=str(length),
            )
    if length > max_rows:  # before each value becomes part of a row, which takes a hundred times the room
        raise BadRequest(
            422,
            f"{length} rows, expected 1 to {max_rows}",
            found=str(length),
            expected=f"1 to {max_rows} rows",
        )
    # Columns that nobody knows can be very many; the first row with them is refused like all of them.
    built = length if values.keys() <= columns.keys() else 1
    rows = islice(zip(*values.values(), strict=True), built)
    return [dict(zip(values, row, strict=True)) for row in rows]


def _tensor(tensor: Any, position: int, columns: dict[str, Column]) -> tuple[str, list[Any]]:
    if not isinstance(tensor, dict):
        raise BadRequest(422, f"input {position} is not an object with name, shape, datatype and data")
    name, shape, datatype, data = (tensor.get(key) for key in ("name", "shape", "datatype", "data"))
    if not isinstance(name, str):
        raise BadRequest(422, f"input {position} has no name", expected="a string")
    column = columns.get(name)
    if column is not None and datatype not in DATATYPES[column.type]:
        expected = " or ".join(DATATYPES[column.type])
        raise BadRequest(
            422,
            f"input {name!r} has datatype {str(datatype)[:20]!r}, expected {expected}",
            column=name,
            found=str(datatype)[:20],
            expected=expected,
        )
    if not isinstance(data, list):
        raise BadRequest(422, f"input {name[:80]!r} has no data, expected an array", column=name[:80])
    if data and all(isinstance(value, list) and len(value) == 1 for value in data):
        data = [value[0] for value in data]
    whole = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not whole or shape not in ([len(data)], [len(data), 1]):
        raise BadRequest(
            422,
            f"input {name[:80]!r} has shape {str(shape)[:40]} and {len(data)} values,"
            f" expected shape [{len(data)}] or [{len(data)}, 1]",
            column=name[:80],
            found=str(shape)[:40],
            expected=f"[{len(data)}]",
        )
    return name, data


def answer(manifest: Manifest, request_id: str, predictions: list[float]) -> dict[str, Any]:
    """The answer to an inference request."""
    return {
        "model_name": manifest.project,
        "model_version": manifest.release_id,
        "id": request_id,
        "outputs": [
            {"name": "prediction", "datatype": "FP64", "shape": [len(predictions)], "data": predictions}
        ],
    }
