"""Logged rows by the arrays that the compiled model was given of them, where a request has many rows.

The arrays say what the rows said: a number column is a column of `numbers`, and a string is the value of its
code. What they do not say, such as keys and values that training never saw, is kept as Python objects, and
the rows themselves are not: this takes a quarter of the memory, and columns come out of it in a few calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from serving.arrow_columns import Array, Piece, Values, encoded, joined
from serving.contract import Column, Plan
from serving.decode import Feeds

Encoded = Callable[[int, Values], Piece]

EXACT = 2.0**53  # integers of a smaller size are floats of the same value, and no others are
# Of one value in memory: its place in a list, and itself, without the text of a string.
SLOT_BYTES = 8
VALUE_BYTES = {"integer": 36, "number": 24, "boolean": 0, "timestamp": 56, "string": 60}
TEXT_BYTES = 4  # at most, of a letter
PICKED = 4  # columns are turned in the time that it takes to pick one
NUMBERS = ("integer", "number", "boolean")  # of which an array of floats can tell all


class Kept:
    """The rows of one request."""

    __slots__ = ("codes", "count", "memory", "numbers", "values")

    def __init__(
        self, count: int, numbers: Array, codes: Array, values: dict[int, Values], values_bytes: int
    ) -> None:
        self.count = count
        self.numbers = numbers  # [rows, numbers], NaN for null
        self.codes = codes  # [rows, lookups]
        self.values = values  # by column
        self.memory = numbers.nbytes + codes.nbytes + values_bytes  # about

    def __len__(self) -> int:
        return self.count


class FeedsEncoder:
    """Of one compiled release: `columns` begin with those of `plan.numbers`, then of `plan.lookups`."""

    def __init__(self, columns: Sequence[Column], plan: Plan) -> None:
        width = len(plan.numbers)
        kinds = [(at, column.type) for at, column in enumerate(columns[:width])]
        self._numbers = [(at, kind) for at, kind in kinds if kind in NUMBERS]
        self._integers = [at for at, kind in kinds if kind == "integer"]
        self._coded = [
            _Texts(position, lookup.values)
            if columns[position].type == "string"
            else None  # 1, 1.0 and True, or 0.0 and -0.0, have one code
            for position, lookup in enumerate(plan.lookups, width)
        ]
        told = {*(at for at, _ in self._numbers), *(texts.position for texts in self._coded if texts)}
        self._tells = bool(told)
        self._untold = [position for position in range(len(columns)) if position not in told]
        self._types = [column.type for column in columns]
        self._unknown = np.array([len(lookup.values) for lookup in plan.lookups], np.int64)
        self._no_numbers, self._no_codes = np.empty((0, 0)), np.empty((0, 0), np.int64)

    def keep(self, rows: Sequence[tuple[Any, ...]], feeds: Feeds) -> Kept | None:
        """The rows in this form, or None where the arrays say nothing, or something else than the rows."""
        if not self._tells:
            return None
        numbers, codes = feeds.get("numbers", self._no_numbers), feeds.get("codes", self._no_codes)
        if self._integers and not (_exact(numbers) or _exact(numbers[:, self._integers])):
            return None
        positions = self._untold
        if codes.size and (strange := np.equal(codes, self._unknown)).any():
            named: list[bool] = np.any(strange, axis=0).tolist()
            positions = positions + [
                t.position for t, odd in zip(self._coded, named, strict=True) if odd and t
            ]
        if not positions:
            return Kept(len(rows), numbers, codes, {}, 0)
        if len(positions) * PICKED > len(self._types):
            columns: list[Values] = list(zip(*rows, strict=True))
            values = {at: columns[at] for at in positions}
        else:
            values = {at: [row[at] for row in rows] for at in positions}
        return Kept(len(rows), numbers, codes, values, sum(map(self._memory, positions, values.values())))

    def _memory(self, position: int, values: Values) -> int:
        kind = self._types[position]
        some = len(values) - values.count(None)
        size = SLOT_BYTES * len(values) + VALUE_BYTES[kind] * some
        if some and kind == "string":
            text = "".join(values if some == len(values) else filter(None, values))
            size += len(text) * (1 if text.isascii() else TEXT_BYTES)
        return size

    def pieces(self, kept: Sequence[Kept], encode: Encoded, breathe: Callable[[], None]) -> list[Piece]:
        """Of all columns. `encode` makes one of a column's values; `breathe` is called now and then."""
        found: dict[int, Piece] = {}
        if self._numbers:
            table = _by_column([rows.numbers for rows in kept])
            missing = np.isnan(table)
            holes: list[bool] = np.any(missing, axis=1).tolist()
            for at, kind in self._numbers:
                found[at] = _of_numbers(table[at], missing[at] if holes[at] else None, kind)
        if self._coded:
            codes = _by_column([rows.codes for rows in kept])
            for number, texts in enumerate(self._coded):
                if texts is not None:
                    breathe()
                    found[texts.position] = self._strings(texts, number, codes[number], kept, encode)
        for at in self._untold:
            found[at] = encode(at, list(chain.from_iterable([rows.values[at] for rows in kept])))
        return [found[at] for at in range(len(found))]

    def _strings(
        self, texts: _Texts, number: int, codes: Array, kept: Sequence[Kept], encode: Encoded
    ) -> Piece:
        at = texts.position
        if not any(at in rows.values for rows in kept):
            return texts.piece(codes)
        return joined(
            [
                encode(at, rows.values[at]) if at in rows.values else texts.piece(rows.codes[:, number])
                for rows in kept
            ]
        )


class _Texts:
    """The strings of a lookup by their codes; that of the unknown ones is never asked for."""

    def __init__(self, position: int, values: Sequence[Any]) -> None:
        self.position = position
        self._null = len(values) + 1
        texts = [*(encoded(str(value)) for value in values), b"", b""]
        self._texts = np.array(texts, np.object_)
        self._lengths = np.array([len(text) for text in texts], np.int32)

    def piece(self, codes: Array) -> Piece:
        missing = np.equal(codes, self._null)
        text = b"".join(self._texts[codes].tolist())
        return Piece(missing if missing.any() else None, self._lengths[codes], text)


def _exact(numbers: Array) -> bool:
    """Whether no number is as large as an integer that is no float. NaN is not."""
    return not (np.fmax.reduce(numbers, axis=None) >= EXACT or np.fmin.reduce(numbers, axis=None) <= -EXACT)


def _by_column(arrays: Sequence[Array]) -> Array:
    """Of arrays [rows, columns] one of [columns, all rows]."""
    total = sum([len(array) for array in arrays])
    out = np.empty((arrays[0].shape[1], total), arrays[0].dtype)
    np.concatenate([array.T for array in arrays], axis=1, out=out)
    return out


def _of_numbers(values: Array, missing: Array | None, kind: str) -> Piece:
    if kind == "number":
        return Piece(missing, values)
    if kind == "boolean":
        return Piece(missing, values == 1.0)
    return Piece(missing, (values if missing is None else np.where(missing, 0.0, values)).astype(np.int64))
