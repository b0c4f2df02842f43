"""The record batch message of an Arrow IPC stream, for one schema of flat columns.

Written here and not by a library, which takes half a millisecond for some twenty columns whatever their
length: a message of one schema is always the same but for the lengths in it.

Format: https://arrow.apache.org/docs/format/Columnar.html#recordbatch-message; the metadata is a flatbuffer
(https://flatbuffers.dev/internals), laid out so that every 64-bit number stands at a multiple of 8.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

Part = Any  # bytes or a contiguous numpy array

METADATA_V5, RECORD_BATCH = 4, 3
CONTINUATION = 0xFFFFFFFF
_PADDING = tuple(bytes(size) for size in range(8))
# Of the metadata, in numbers of 64 bits: where the body's length stands, the count of rows, the first field.
_BODY, _ROWS, _FIELDS = 3, 7, 9


class MessageWriter:
    """Writes the batches of columns that have so many buffers each, the validity included."""

    def __init__(self, buffers: Sequence[int]) -> None:
        fields, total = len(buffers), sum(buffers)
        root = struct.pack("<I", 16)
        # A table begins with the distance to its vtable: sizes of the two, then the place of each field.
        message = struct.pack("<6H", 12, 20, 16, 18, 4, 8) + struct.pack("<iI", 12, 28)
        message += struct.pack("<qhBx", 0, METADATA_V5, RECORD_BATCH)
        batch = struct.pack("<5H2x", 10, 20, 8, 4, 16) + struct.pack("<iIqI", 12, 16, 0, 12 + 16 * fields)
        metadata = root + message + batch + struct.pack("<I", fields) + bytes(16 * fields)
        metadata += struct.pack("<4xI", total) + bytes(16 * total)
        self._head = struct.pack("<Ii", CONTINUATION, len(metadata))
        self._metadata = np.frombuffer(metadata, np.int64)
        self._buffers = _FIELDS + 2 * fields + 1

    def message(self, rows: int, nulls: Sequence[int], parts: Sequence[Part]) -> list[Part]:
        """A batch of `rows`, to be written one after another.

        `nulls` are counted by column, `parts` are all columns' buffers in turn.
        """
        metadata = self._metadata.copy()
        metadata[_ROWS] = metadata[_FIELDS : self._buffers - 1 : 2] = rows
        metadata[_FIELDS + 1 : self._buffers - 1 : 2] = nulls
        sizes = list(map(size_of, parts))
        lengths = np.array(sizes, np.int64)
        ends = np.cumsum((lengths + 7) & ~7)
        metadata[_BODY] = ends[-1] if sizes else 0
        metadata[self._buffers :: 2] = ends - ((lengths + 7) & ~7)
        metadata[self._buffers + 1 :: 2] = lengths
        pieces: list[Part] = [self._head, metadata]
        for part, size in zip(parts, sizes, strict=True):
            if size:
                pieces.append(part)
            if size & 7:
                pieces.append(_PADDING[-size & 7])
        return pieces


def size_of(part: Part) -> int:
    """In bytes."""
    return len(part) if type(part) is bytes else int(part.nbytes)
