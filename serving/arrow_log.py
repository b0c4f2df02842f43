"""Logged rows as an Arrow IPC stream: a schema, then record batches, each one whole message after another.

Columns: `request_id` (utf8), `row` (int32, its index in the request), `time` (timestamp[us, UTC]), one per
column of the release's schema by its name, `prediction` (float64). NaN, and a value that does not fit its
column, are null. The schema's metadata holds `release_id`, `project`, `environment` and `prefix`, which is
empty unless the model has a column named like one of `OWN`: then it is as many underscores as keep the names
apart, and stands before all of ours.

Format: https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format
"""

from __future__ import annotations

import io
import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, groupby
from operator import mul
from typing import Any

import nanoarrow as na
import numpy as np
from nanoarrow.c_array_stream import CArrayStream
from nanoarrow.ipc import StreamWriter

from serving.arrow_columns import (
    ENCODERS,
    FITS,
    Encoder,
    Piece,
    Values,
    arrow_type,
    float64,
    int32,
    joined,
    parts,
    seconds,
    utf8,
)
from serving.arrow_feeds import FeedsEncoder, Kept
from serving.arrow_message import MessageWriter, Part
from serving.contract import Column, Plan
from serving.decode import Feeds

OWN = ("request_id", "row", "time", "prediction", "release_id")  # the last one is the readers'
END_OF_STREAM = struct.pack("<II", 0xFFFFFFFF, 0)

KEPT_ROWS = 8  # from here on, a request is logged by its arrays

# The event loop's thread waits for the interpreter: to take it from us takes 5 ms, to be left it takes none.
# Not more often, since a sleep costs some 40 µs of CPU.
BREATH_SECONDS, BREATHE_AFTER_SECONDS = 20e-6, 0.0004


class Breath:
    """Called often by a busy thread, lets the other threads of the process run now and then."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self) -> None:
        if time.perf_counter() > self._next:
            time.sleep(BREATH_SECONDS)
            self._next = time.perf_counter() + BREATHE_AFTER_SECONDS


class BatchEncoder:
    """Batches of one release. `misfits` counts the values that did not fit their column."""

    def __init__(
        self, columns: Sequence[Column], metadata: Mapping[str, str], plan: Plan | None = None
    ) -> None:
        names = [column.name for column in columns]
        prefix = prefix_beside(names)
        self.misfits = 0
        self.breathe = Breath()
        self._feeds = FeedsEncoder(columns, plan) if plan is not None else None
        self._width = len(columns)
        kinds = [na.string(), na.int32(), na.timestamp("us", "UTC"), *map(arrow_type, columns), na.float64()]
        self._encoders: list[Encoder] = [
            utf8,
            int32,
            seconds,
            *(ENCODERS[column.type] for column in columns),
            float64,
        ]
        self._fits: list[Callable[[Any], Any]] = [str, int, float, *(FITS[c.type] for c in columns), float]
        own = [prefix + name for name in OWN[:4]]
        fields = dict(zip((*own[:3], *names, own[3]), kinds, strict=True))
        schema = na.c_schema(na.struct(fields)).modify(metadata={**metadata, "prefix": prefix})
        self.header = _schema_message(schema)
        strings = [True, False, False, *(column.type == "string" for column in columns), False]
        self._writer = MessageWriter([3 if string else 2 for string in strings])

    def keep(self, rows: Sequence[tuple[Any, ...]], feeds: Feeds) -> Kept | None:
        """The rows of a request by the arrays of the compiled model; None where those cannot tell them."""
        return self._feeds.keep(rows, feeds) if self._feeds is not None and len(rows) >= KEPT_ROWS else None

    def batch(
        self,
        request_ids: Sequence[str],
        indices: Sequence[int],
        times: Sequence[float],
        rows: Sequence[tuple[Any, ...]],
        predictions: Sequence[float | None],
    ) -> bytes:
        """One record batch; all arguments have an entry per row, `times` in seconds since 1970."""
        own = [self._encoded(number, values) for number, values in enumerate((request_ids, indices, times))]
        return b"".join(self._message(own, self._of_rows(rows), predictions))

    def requests(
        self,
        request_ids: Sequence[str],
        times: Sequence[float],
        rows: Sequence[Sequence[tuple[Any, ...]] | Kept],
        predictions: Sequence[float | None],
        first: int = 0,
    ) -> list[Part]:
        """The same of whole requests, in parts; `first` is the index of the first row in its own request."""
        lengths = np.array([len(some) for some in rows])
        ids = self._encoded(0, request_ids)
        assert ids.text is not None
        ends = np.cumsum(ids.values).tolist()
        texts = [ids.text[end - size : end] for end, size in zip(ends, ids.values.tolist(), strict=True)]
        starts = np.repeat(np.cumsum(lengths) - lengths - first, lengths)
        own = [
            Piece(None, np.repeat(ids.values, lengths), b"".join(map(mul, texts, lengths.tolist()))),
            Piece(None, (np.arange(len(starts)) - starts).astype(np.int32)),
            Piece(None, np.repeat(self._encoded(2, times).values, lengths)),
        ]
        self.breathe()
        runs = [list(run) for _, run in groupby(rows, type_is_kept)]
        columns = [self._of_run(run) for run in runs]
        return self._message(own, [joined(pieces) for pieces in zip(*columns, strict=True)], predictions)

    def _of_run(self, run: Sequence[Any]) -> list[Piece]:
        if not type_is_kept(run[0]):
            return self._of_rows(list(chain.from_iterable(run)))
        assert self._feeds is not None
        return self._feeds.pieces(run, lambda column, values: self._encoded(column + 3, values), self.breathe)

    def _of_rows(self, rows: Sequence[tuple[Any, ...]]) -> list[Piece]:
        if set(map(len, rows)) - {self._width}:
            nothing = (None,) * self._width
            self.misfits += self._width * sum(len(row) != self._width for row in rows)
            rows = [row if len(row) == self._width else nothing for row in rows]
        by_column: Iterable[Values] = zip(*rows, strict=True) if rows else [()] * self._width
        return [self._encoded(number, values) for number, values in enumerate(by_column, 3)]

    def _message(
        self, own: Sequence[Piece], columns: Sequence[Piece], predictions: Sequence[float | None]
    ) -> list[Part]:
        nulls: list[int] = []
        buffers: list[Part] = []
        for piece in (*own, *columns, self._encoded(self._width + 3, predictions)):
            missing, some = parts(piece)
            nulls.append(missing)
            buffers += some
        self.breathe()
        return self._writer.message(len(predictions), nulls, buffers)

    def _encoded(self, number: int, values: Values) -> Piece:
        self.breathe()
        encode = self._encoders[number]
        try:
            return encode(values)
        except (TypeError, ValueError, OverflowError):
            fit = self._fits[number]
            fitting = []
            for value in values:
                try:
                    one = None if value is None else fit(value)
                    encode((one,))
                except (TypeError, ValueError, OverflowError):
                    one = None
                    self.misfits += 1
                fitting.append(one)
            return encode(fitting)


def type_is_kept(rows: object) -> bool:
    return type(rows) is Kept


def _schema_message(schema: Any) -> bytes:
    file = io.BytesIO()
    writer = StreamWriter.from_writable(file)
    writer.write_stream(CArrayStream.from_c_arrays([], schema))
    writer.release()
    content = file.getvalue()
    return content[: _message_end(content, 0)]


def prefix_beside(names: Iterable[str]) -> str:
    """What stands before our columns' names beside a model's columns of these names; mostly nothing."""
    taken, prefix = set(names), ""
    while any(prefix + name in taken for name in OWN):
        prefix += "_"
    return prefix


def whole_bytes(descriptor: int) -> tuple[int, bool]:
    """How much of a stream's file is whole messages, and whether there is more among them than the schema.

    What follows the first message that is cut or is none is not counted, and neither is an end of stream.
    """
    size = os.fstat(descriptor).st_size
    at = messages = 0
    while True:
        head = os.pread(descriptor, 8, at)
        if len(head) < 8:
            return at, messages > 1
        metadata = os.pread(descriptor, min(max(struct.unpack_from("<i", head, 4)[0], 0), size), at + 8)
        end = _message_end(head + metadata, at)
        if not at < end <= size:
            return at, messages > 1
        at, messages = end, messages + 1


def _message_end(message: bytes, start: int) -> int:
    """Where a message that starts at `start` ends, by its first bytes; `start` when it is none."""
    marker, size = struct.unpack_from("<Ii", message)
    if marker != 0xFFFFFFFF or size <= 0 or len(message) < 8 + size:
        return start
    try:  # a flatbuffer: its root table, the table's vtable, in which the fifth entry is bodyLength's place
        table = 8 + int(struct.unpack_from("<I", message, 8)[0])
        vtable = table - int(struct.unpack_from("<i", message, table)[0])
        entries = int(struct.unpack_from("<H", message, vtable)[0])
        place = int(struct.unpack_from("<H", message, vtable + 10)[0]) if entries > 10 else 0
        body = int(struct.unpack_from("<q", message, table + place)[0]) if place else 0
    except struct.error:
        return start
    return start + 8 + size + body if body >= 0 else start
