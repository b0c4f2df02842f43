"""A column's Python values as the buffers of an Arrow array, in bulk.

An encoder takes the values and returns which of them are missing (a mask, or None for none) and the array's
buffers after the validity. It raises TypeError, ValueError or OverflowError for a value of another type.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import nanoarrow as na
import numpy as np

from serving.contract import Column

Values = Sequence[Any]
Missing = Any  # a numpy array of bool, or None
Buffers = tuple[np.ndarray[Any, Any] | bytes, ...]
Encoder = Callable[[Values], tuple[Missing, Buffers]]


def arrow_type(column: Column) -> Any:
    if column.type == "timestamp":
        return na.timestamp("us", "UTC" if column.utc else "")
    return {"integer": na.int64, "number": na.float64, "string": na.string, "boolean": na.bool_}[
        column.type
    ]()


def _filled(values: Values, kind: type, filler: object) -> tuple[Missing, Values]:
    """Which values are None, and the values with `filler` instead. TypeError when one is not a `kind`."""
    kinds = set(map(type, values))
    if kinds <= {kind}:
        return None, values
    if not kinds <= {kind, type(None)}:
        raise TypeError(f"found {kinds}, expected {kind}")
    missing = np.array([value is None for value in values], bool)
    return missing, [filler if value is None else value for value in values]


def float64(values: Values) -> tuple[Missing, Buffers]:
    array = np.array(values, np.float64)  # None becomes NaN
    missing = np.isnan(array)
    return (missing if missing.any() else None), (array,)


def _int64(values: Values) -> tuple[Missing, Buffers]:
    missing, filled = _filled(values, int, 0)
    return missing, (np.array(filled, np.int64),)


def int32(values: Values) -> tuple[Missing, Buffers]:
    return None, (np.array(values, np.int32),)


def _bool(values: Values) -> tuple[Missing, Buffers]:
    missing, filled = _filled(values, bool, False)
    return missing, (np.packbits(np.array(filled, bool), bitorder="little"),)


def utf8(values: Values) -> tuple[Missing, Buffers]:
    missing, filled = _filled(values, str, "")
    text = "".join(filled)
    if text.isascii():
        data, parts = text.encode(), filled
    else:  # "replace": a lone surrogate, which JSON can hold, has no UTF-8
        parts = [value.encode("utf-8", "replace") for value in filled]
        data = b"".join(parts)
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, parts), np.int32, len(parts)), out=offsets[1:])
    return missing, (offsets, data)


def _timestamp(values: Values) -> tuple[Missing, Buffers]:
    missing, filled = _filled(values, datetime, None)
    bare = [
        value if value is None or value.tzinfo is None else value.astimezone(UTC).replace(tzinfo=None)
        for value in filled
    ]
    return missing, (np.array(bare, "M8[us]").view(np.int64),)


def seconds(values: Values) -> tuple[Missing, Buffers]:
    return None, ((np.array(values, np.float64) * 1e6).astype(np.int64),)


def _must_be(kind: type) -> Callable[[Any], Any]:
    def fit(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return fit


ENCODERS: dict[str, Encoder] = {
    "integer": _int64,
    "number": float64,
    "string": utf8,
    "boolean": _bool,
    "timestamp": _timestamp,
}
# What makes one value fit its column, or raises as an encoder does.
FITS: dict[str, Callable[[Any], Any]] = {
    "integer": operator.index,
    "number": float,
    "string": _must_be(str),
    "boolean": _must_be(bool),
    "timestamp": _must_be(datetime),
}
