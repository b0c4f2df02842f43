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
from itertools import chain
from typing import Any

import nanoarrow as na
import numpy as np
from nanoarrow.ipc import StreamWriter

from serving.arrow_columns import (
    ENCODERS,
    FITS,
    Buffers,
    Encoder,
    Missing,
    Values,
    arrow_type,
    float64,
    int32,
    seconds,
    utf8,
)
from serving.contract import Column

OWN = ("request_id", "row", "time", "prediction", "release_id")  # the last one is the readers'
END_OF_STREAM = struct.pack("<II", 0xFFFFFFFF, 0)

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

    def __init__(self, columns: Sequence[Column], metadata: Mapping[str, str]) -> None:
        names = [column.name for column in columns]
        prefix = prefix_beside(names)
        self.misfits = 0
        self.breathe = Breath()
        self._width = len(columns)
        self._types = [
            na.c_schema(kind)
            for kind in (
                na.string(),
                na.int32(),
                na.timestamp("us", "UTC"),
                *(arrow_type(column) for column in columns),
                na.float64(),
            )
        ]
        self._encoders: list[Encoder] = [
            utf8,
            int32,
            seconds,
            *(ENCODERS[column.type] for column in columns),
            float64,
        ]
        self._fits: list[Callable[[Any], Any]] = [str, int, float, *(FITS[c.type] for c in columns), float]
        own = [prefix + name for name in OWN[:4]]
        fields = dict(zip((*own[:3], *names, own[3]), self._types, strict=True))
        self._schema = na.c_schema(na.struct(fields)).modify(metadata={**metadata, "prefix": prefix})
        first = self._message((), (), (), (), (), with_schema=True)
        self.header = first[: _message_end(first, 0)]

    def batch(
        self,
        request_ids: Sequence[str],
        indices: Sequence[int],
        times: Sequence[float],
        rows: Sequence[tuple[Any, ...]],
        predictions: Sequence[float | None],
    ) -> bytes:
        """One record batch; all arguments have an entry per row, `times` in seconds since 1970."""
        if set(map(len, rows)) != {self._width}:
            nothing = (None,) * self._width
            self.misfits += self._width * sum(len(row) != self._width for row in rows)
            rows = [row if len(row) == self._width else nothing for row in rows]
        return self._message(request_ids, indices, times, rows, predictions)

    def _message(
        self,
        request_ids: Sequence[str],
        indices: Sequence[int],
        times: Sequence[float],
        rows: Sequence[tuple[Any, ...]],
        predictions: Sequence[float | None],
        with_schema: bool = False,
    ) -> bytes:
        count = len(rows)
        by_column: Iterable[Values] = zip(*rows, strict=True) if rows else [()] * self._width
        children = []
        for number, values in enumerate(chain((request_ids, indices, times), by_column, (predictions,))):
            missing, buffers = self._encoded(number, values)
            nulls = 0 if missing is None else int(np.count_nonzero(missing))
            validity = np.packbits(~missing, bitorder="little") if nulls else None
            children.append(
                na.c_array_from_buffers(
                    self._types[number],
                    count,
                    [validity, *buffers],
                    null_count=nulls,
                    validation_level="minimal",
                    move=True,
                )
            )
            self.breathe()
        batch = na.c_array_from_buffers(
            self._schema, count, [None], null_count=0, children=children, move=True
        )
        file = io.BytesIO()
        writer = StreamWriter.from_writable(file)
        writer.write_stream(batch, write_schema=with_schema)
        writer.release()
        return file.getvalue()

    def _encoded(self, number: int, values: Values) -> tuple[Missing, Buffers]:
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
