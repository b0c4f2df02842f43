"""A column's values as the parts of an Arrow array, in bulk.

An encoder takes Python values and returns a `Piece`. It raises TypeError, ValueError or OverflowError for a
value of another type. Pieces of one column are joined, and `parts` makes the array's buffers of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import nanoarrow as na
import numpy as np

from serving.arrow_message import Part
from serving.contract import Column

Values = Sequence[Any]
Array = np.ndarray[Any, Any]


class Piece(NamedTuple):
    """Some rows of a column: 64-bit or 32-bit numbers, booleans, or the bytes' lengths of `text`."""

    missing: Array | None  # of bool, or None for none
    values: Array
    text: bytes | None = None  # of a column of strings: all of them, in UTF-8


Encoder = Callable[[Values], Piece]


def arrow_type(column: Column) -> Any:
    if column.type == "timestamp":
        return na.timestamp("us", "UTC" if column.utc else "")
    return {"integer": na.int64, "number": na.float64, "string": na.string, "boolean": na.bool_}[
        column.type
    ]()


def joined(pieces: Sequence[Piece]) -> Piece:
    """One piece of several, in their order."""
    if len(pieces) == 1:
        return pieces[0]
    missing = None
    if any(piece.missing is not None for piece in pieces):
        missing = np.concatenate(
            [np.zeros(len(p.values), bool) if p.missing is None else p.missing for p in pieces]
        )
    text = None if pieces[0].text is None else b"".join([piece.text or b"" for piece in pieces])
    return Piece(missing, np.concatenate([piece.values for piece in pieces]), text)


def parts(piece: Piece) -> tuple[int, list[Part]]:
    """How many nulls, and the buffers of the array."""
    nulls = 0 if piece.missing is None else int(np.count_nonzero(piece.missing))
    validity: Part = (
        np.packbits(~piece.missing, bitorder="little") if piece.missing is not None and nulls else b""
    )
    if piece.text is not None:
        offsets = np.zeros(len(piece.values) + 1, np.int32)
        np.cumsum(piece.values, out=offsets[1:])
        return nulls, [validity, offsets, piece.text]
    if piece.values.dtype == bool:
        return nulls, [validity, np.packbits(piece.values, bitorder="little")]
    return nulls, [validity, piece.values]


def _filled(values: Values, kind: type, filler: object) -> tuple[Array | None, Values]:
    """Which values are None, and the values with `filler` instead. TypeError when one is not a `kind`."""
    kinds = set(map(type, values))
    if kinds <= {kind}:
        return None, values
    if not kinds <= {kind, type(None)}:
        raise TypeError(f"found {kinds}, expected {kind}")
    missing = np.array([value is None for value in values], bool)
    return missing, [filler if value is None else value for value in values]


def float64(values: Values) -> Piece:
    array = np.array(values, np.float64)  # None becomes NaN
    missing = np.isnan(array)
    return Piece(missing if missing.any() else None, array)


def _int64(values: Values) -> Piece:
    missing, filled = _filled(values, int, 0)
    return Piece(missing, np.array(filled, np.int64))


def int32(values: Values) -> Piece:
    return Piece(None, np.array(values, np.int32))


def seconds(values: Values) -> Piece:
    return Piece(None, (np.array(values, np.float64) * 1e6).astype(np.int64))


def _bool(values: Values) -> Piece:
    missing, filled = _filled(values, bool, False)
    return Piece(missing, np.array(filled, bool))


def utf8(values: Values) -> Piece:
    missing, filled = _filled(values, str, "")
    text = "".join(filled)
    if text.isascii():
        data, texts = text.encode(), filled
    else:
        texts = [encoded(value) for value in filled]
        data = b"".join(texts)
    return Piece(missing, np.fromiter(map(len, texts), np.int32, len(texts)), data)


def encoded(text: str) -> bytes:
    """As UTF-8, with "?" for a lone surrogate, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace")


def _timestamp(values: Values) -> Piece:
    missing, filled = _filled(values, datetime, None)
    bare = [
        value if value is None or value.tzinfo is None else value.astimezone(UTC).replace(tzinfo=None)
        for value in filled
    ]
    return Piece(missing, np.array(bare, "M8[us]").view(np.int64))


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
