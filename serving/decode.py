"""From the bytes of a request to rows: a fast way for what fits the schema, an explaining one for the rest.

The fast way is one msgspec decoder generated from the schema: it checks names, types and nulls while it
parses. Whatever it does not take goes through rows.py, which finds out what is wrong, or that nothing is (an
integer written as 3.0). A row leaves here as a tuple of Python values in the order of `Decoder.columns`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Annotated, Any

import msgspec
from msgspec.structs import astuple

from serving.contract import Column, InputSchema, Plan
from serving.errors import BadRequest
from serving.rows import EARLIEST, INT64, LATEST, RowChecker, Values

Row = tuple[Any, ...]
Feeds = Mapping[str, Any]  # of rows: the arrays that a compiled model takes, see contract.Plan

LONG_BODY = 4096

_ENVELOPE = re.compile(rb'\s*\{\s*"rows"\s*:')
_ARRAY = re.compile(rb"\s*\[")


class Decoder:
    """The decoder of one release; `plan` says which columns come first."""

    def __init__(self, schema: InputSchema, plan: Plan | None = None) -> None:
        self.checker = RowChecker(schema)
        self.columns = _ordered(schema, plan)
        self._names = [column.name for column in self.columns]
        features = {column.name for column in schema.features}
        quoted = [i for i, c in enumerate(self.columns) if c.type in ("string", "timestamp")]
        self._moments = [i for i, c in enumerate(self.columns) if c.type == "timestamp"]
        keys = [i for i, c in enumerate(self.columns) if c.name not in features]
        picked = [*quoted, *keys]  # a key that is a string stands in it twice, as in a body
        self._most_names = len(picked)
        self._pick = itemgetter(*picked) if len(picked) > 1 else lambda row: tuple(row[i] for i in picked)
        self._names_per_row = len(features)
        row = msgspec.defstruct(
            "Row",
            [_field(i, column, column.name in features) for i, column in enumerate(self.columns)],
            rename={f"c{i}": name for i, name in enumerate(self._names)},
            forbid_unknown_fields=True,
            gc=False,
            kw_only=True,
        )
        envelope = msgspec.defstruct("Rows", [("rows", list[row])], forbid_unknown_fields=True)  # type: ignore[valid-type]
        self._row = msgspec.json.Decoder(row)
        self._rows = msgspec.json.Decoder(list[row])  # type: ignore[valid-type]
        self._envelope = None if "rows" in self._names else msgspec.json.Decoder(envelope)

    def rows(self, body: bytes | bytearray, max_rows: int) -> list[Row]:
        """The rows of `{"rows": [...]}`, of an array of rows, or of one row alone.

        Raises `BadRequest`: 400 for what is not JSON, 422 for rows that do not fit, none, or too many.
        """
        try:
            if self._envelope is not None and (body.startswith(b'{"rows":') or _ENVELOPE.match(body)):
                structs, names = self._envelope.decode(body).rows, 1  # type: ignore[attr-defined]
            elif _ARRAY.match(body):
                structs, names = self._rows.decode(body), 0
            else:
                structs, names = [self._row.decode(body)], 0
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._explained(body, max_rows)
        need_rows(len(structs), max_rows)
        rows = [astuple(struct) for struct in structs]
        if not self._plain(body, rows, names):
            return self._explained(body, max_rows)
        return rows

    def tensors(self, given: dict[str, Values], count: int) -> list[Row]:
        """The rows of columns that are each `count` long. Raises `BadRequest` (422)."""
        return self._tuples(self.checker.tensors(given, count))

    def _plain(self, body: bytes | bytearray, rows: Sequence[Row], names: int) -> bool:
        """Whether no column is given twice, and every timestamp is one that pandas can hold.

        The parser takes the last of two values without a word. But it leaves one value per name, so a body
        with more quotes than those of the names and strings that were taken says something twice.
        """
        if b"\\" in body:
            return False
        names += self._names_per_row * len(rows)
        for row in rows:
            names += self._most_names - self._pick(row).count(None)
        for i in self._moments:
            for row in rows:
                if row[i] is not None and not EARLIEST <= row[i].replace(tzinfo=None) < LATEST:
                    return False
        return _quotes(body) == 2 * names

    def _explained(self, body: bytes | bytearray, max_rows: int) -> list[Row]:
        rows = self._listed(decode_json(body))
        need_rows(len(rows), max_rows)
        return self._tuples(self.checker.columns(rows))

    def _listed(self, body: Any) -> list[Any]:
        if isinstance(body, list):
            return body
        if not isinstance(body, dict):
            raise BadRequest(
                422, 'the body is a plain value, expected {"rows": [...]}, an array of rows or a row'
            )
        if "rows" not in body or "rows" in self.checker.names:
            return [body]
        if extra := sorted(body.keys() - {"rows"}):
            raise BadRequest(422, f"the body has {extra[0][:80]!r} beside rows", expected="rows alone")
        if not isinstance(body["rows"], list):
            raise BadRequest(422, "rows is not an array", expected="an array of rows")
        return body["rows"]

    def _tuples(self, columns: dict[str, Values]) -> list[Row]:
        return list(zip(*(columns[name] for name in self._names), strict=True))


def _quotes(body: bytes | bytearray) -> int:
    if len(body) < LONG_BODY:
        return body.count(b'"')
    import numpy as np  # four times as fast, where there is enough to count

    return int(np.count_nonzero(np.frombuffer(body, np.uint8) == ord('"')))


def decode_json(body: bytes | bytearray | memoryview) -> Any:
    """A JSON document that names nothing twice. Raises `BadRequest`: 400, or 422 for a name given twice."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(400, f"the body is not JSON: {error}"[:200], expected="a JSON document") from None
    try:
        # Numbers as text: their values are not looked at, and Python would refuse very long ones.
        json.loads(bytes(body), object_pairs_hook=_once, parse_int=str, parse_float=str)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"the body is not JSON: {error}"[:200], expected="a JSON document") from None
    return document


def need_rows(count: int, limit: int) -> None:
    """Raises `BadRequest` (422) for none or too many."""
    if not 1 <= count <= limit:
        raise BadRequest(
            422, f"{count} rows, expected 1 to {limit}", found=str(count), expected=f"1 to {limit} rows"
        )


def _ordered(schema: InputSchema, plan: Plan | None) -> tuple[Column, ...]:
    """What the compiled model uses first, in its order; then the other features; then the keys."""
    by_name = {column.name: column for column in (*schema.keys, *schema.features)}
    first = [*plan.numbers, *(lookup.column for lookup in plan.lookups)] if plan else []
    return tuple(
        by_name[name] for name in dict.fromkeys([*first, *(f.name for f in schema.features), *by_name])
    )


def _field(index: int, column: Column, required: bool) -> Any:
    kind: Any
    match column.type:
        case "integer":
            kind = Annotated[int, msgspec.Meta(ge=INT64.start, le=INT64.stop - 1)]
        case "number":
            kind = float
        case "string":
            kind = str
        case "boolean":
            kind = bool
        case "timestamp":
            kind = Annotated[datetime, msgspec.Meta(tz=column.utc)]
    if column.nullable:
        kind = kind | None
    return (f"c{index}", kind) if required else (f"c{index}", kind, None)


def _once(pairs: list[tuple[str, Any]]) -> None:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            twice = name[:80]
            raise BadRequest(
                422, f"{twice!r} is given twice in one object", column=twice, expected="each name once"
            )
        names.add(name)
