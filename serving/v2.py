"""The Open Inference Protocol, version 2: tensors of one column each, as JSON or as bytes, and back.

Binary tensors are the protocol's extension that tritonclient uses: a JSON head, whose length the header
Inference-Header-Content-Length gives, then each tensor's bytes, little-endian; a BYTES element is its length
in four bytes and then its UTF-8.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from serving import __version__
from serving.contract import Column, ColumnType, InputSchema, Manifest
from serving.decode import decode_json, need_rows
from serving.errors import BadRequest

HEAD_LENGTH = b"inference-header-content-length"
OCTETS = b"application/octet-stream"

# First the datatype that metadata names, then what is taken as well.
DATATYPES: dict[ColumnType, tuple[str, ...]] = {
    "integer": ("INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8"),
    "number": ("FP64", "FP32", "INT64", "INT32"),
    "string": ("BYTES",),
    "timestamp": ("BYTES",),
    "boolean": ("BOOL",),
}
_BINARY = {
    "INT64": "<i8",
    "INT32": "<i4",
    "INT16": "<i2",
    "INT8": "<i1",
    "UINT64": "<u8",
    "UINT32": "<u4",
    "UINT16": "<u2",
    "UINT8": "<u1",
    "FP64": "<f8",
    "FP32": "<f4",
}
_EXPECTED_TENSOR = "an object with name, shape, datatype and data"


@dataclass(frozen=True)
class Inference:
    """A request, column by column; not checked against the columns' types yet."""

    columns: dict[str, list[Any]]
    rows: int
    request_id: str | None
    binary: bool  # how the answer is wanted


def server_metadata() -> dict[str, Any]:
    """The answer to GET /v2."""
    return {"name": "perennial-serving", "version": __version__, "extensions": ["binary_tensor_data"]}


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


def parse(
    body: bytes | bytearray, head_length: bytes | None, columns: dict[str, Column], max_rows: int
) -> Inference:
    """The tensors of an inference request. Raises `BadRequest` for tensors that make no rows."""
    head, binary = _split(body, head_length)
    document = decode_json(head)
    inputs = document.get("inputs") if isinstance(document, dict) else None
    if not isinstance(inputs, list) or not inputs:
        raise BadRequest(422, "the request has no inputs, expected an array with a tensor per column")
    wants_binary = _wants_binary(document)
    given: dict[str, list[Any]] = {}
    for position, tensor in enumerate(inputs):
        name, data, binary = _tensor(tensor, position, columns, binary, max_rows)
        if name in given:
            raise BadRequest(422, f"input {name[:80]!r} is given twice", column=name[:80])
        given[name] = data
    if len(binary):
        raise BadRequest(
            400, f"{len(binary)} bytes follow the tensors", found=str(len(binary)), expected="no more bytes"
        )
    first, values = next(iter(given.items()))
    for name, other in given.items():
        if len(other) != len(values):
            raise BadRequest(
                422,
                f"input {name[:80]!r} has {len(other)} values, expected {len(values)} like {first[:80]!r}",
                column=name[:80],
                found=str(len(other)),
                expected=str(len(values)),
            )
    need_rows(len(values), max_rows)
    own = document.get("id")
    return Inference(given, len(values), own if isinstance(own, str) else None, wants_binary)


def answer(
    manifest: Manifest, request_id: str, predictions: Sequence[float], binary: bool
) -> tuple[bytes, bytes, bytes]:
    """Body, content type and further header lines of the answer to an inference request."""
    output: dict[str, Any] = {"name": "prediction", "datatype": "FP64", "shape": [len(predictions)]}
    document = {
        "model_name": manifest.project,
        "model_version": manifest.release_id,
        "id": request_id,
        "outputs": [output],
    }
    if not binary:
        output["data"] = predictions
        return msgspec.json.encode(document), b"application/json", b""
    data = struct.pack(f"<{len(predictions)}d", *predictions)
    output["parameters"] = {"binary_data_size": len(data)}
    head = msgspec.json.encode(document)
    return head + data, OCTETS, b"%b: %d\r\n" % (HEAD_LENGTH, len(head))


def _split(body: bytes | bytearray, head_length: bytes | None) -> tuple[memoryview, memoryview]:
    whole = memoryview(body)
    if head_length is None:
        return whole, whole[len(whole) :]
    if not head_length.isdigit() or len(head_length) > 12 or int(head_length) > len(whole):
        found = head_length[:20].decode("latin-1")
        raise BadRequest(
            400,
            f"Inference-Header-Content-Length is {found!r} and the body has {len(whole)} bytes",
            found=found,
            expected=f"a length of at most {len(whole)}",
        )
    return whole[: int(head_length)], whole[int(head_length) :]


def _wants_binary(document: dict[str, Any]) -> bool:
    """Raises `BadRequest` for an output that there is none of."""
    outputs = document.get("outputs")
    parameters = document.get("parameters")
    wanted = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    if outputs is None:
        return wanted
    if not isinstance(outputs, list):
        raise BadRequest(422, "outputs is not an array", expected="an array of outputs")
    for output in outputs:
        name = output.get("name") if isinstance(output, dict) else None
        if name != "prediction":
            found = str(name)[:80]
            raise BadRequest(422, f"there is no output {found!r}", found=found, expected="prediction")
        own = output.get("parameters")
        if isinstance(own, dict) and isinstance(own.get("binary_data"), bool):
            wanted = own["binary_data"]
        if isinstance(own, dict) and own.get("classification"):
            raise BadRequest(422, "the output 'prediction' has no classes", expected="no classification")
    return wanted


def _tensor(
    tensor: Any, position: int, columns: dict[str, Column], binary: memoryview, max_rows: int
) -> tuple[str, list[Any], memoryview]:
    """Name and values of a tensor, and the bytes that are left for the others."""
    if not isinstance(tensor, dict):
        raise BadRequest(422, f"input {position} is not {_EXPECTED_TENSOR}")
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
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None:
        if "data" in tensor:
            raise BadRequest(422, f"input {name[:80]!r} has data and binary_data_size", column=name[:80])
        if type(size) is not int or not 0 <= size <= len(binary):
            raise BadRequest(
                400,
                f"input {name[:80]!r}: binary_data_size is {str(size)[:20]}, {len(binary)} bytes are left",
                column=name[:80],
                found=str(size)[:20],
                expected=f"at most {len(binary)}",
            )
        data = _values(name, str(datatype), binary[:size], max_rows)
        binary = binary[size:]
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
    return name, data, binary


def _values(name: str, datatype: str, content: memoryview, max_rows: int) -> list[Any]:
    """A binary tensor as Python values; NaN is null."""
    import numpy as np

    if datatype == "BYTES":
        return _strings(name, content, max_rows)
    if datatype == "BOOL":
        if any(byte > 1 for byte in content[: max_rows + 1]):
            raise BadRequest(422, f"input {name[:80]!r} has bytes that are not 0 or 1", column=name[:80])
        return [byte == 1 for byte in content]
    if datatype not in _BINARY:
        raise BadRequest(
            422,
            f"input {name[:80]!r} has datatype {datatype[:20]!r}, which has no binary form here",
            column=name[:80],
            found=datatype[:20],
            expected=" or ".join((*_BINARY, "BOOL", "BYTES")),
        )
    dtype = np.dtype(_BINARY[datatype])
    if len(content) % dtype.itemsize:
        raise BadRequest(
            422,
            f"input {name[:80]!r} has {len(content)} bytes, expected a multiple of {dtype.itemsize}",
            column=name[:80],
        )
    values: list[Any] = np.frombuffer(content, dtype).tolist()
    if dtype.kind == "f":
        return [None if math.isnan(value) else value for value in values]
    return values


def _strings(name: str, content: memoryview, max_rows: int) -> list[Any]:
    values: list[Any] = []
    at = 0
    while at < len(content) and len(values) <= max_rows:
        end = at + 4
        if end <= len(content):
            end += int.from_bytes(content[at : at + 4], "little")
        if end > len(content) or at + 4 > len(content):
            raise BadRequest(422, f"input {name[:80]!r} ends within element {len(values)}", column=name[:80])
        try:
            values.append(str(content[at + 4 : end], "utf-8"))
        except UnicodeDecodeError:
            raise BadRequest(
                422, f"input {name[:80]!r}, element {len(values)}: not UTF-8", column=name[:80]
            ) from None
        at = end
    return values
