"""Rows of JSON against a schema: each row holds every feature, may hold keys, and nothing else."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from serving.contract import Column, InputSchema
from serving.errors import BadRequest

INT64 = range(-(2**63), 2**63)
EARLIEST, LATEST = datetime(1678, 1, 1), datetime(2262, 1, 1)  # what 64 bits of nanoseconds hold

Values = list[Any]


class WrongValue(Exception):
    """One value of a column is not of its type: its row, and what is wrong."""

    def __init__(self, row: int, found: str) -> None:
        self.row = row
        self.found = found


class RowChecker:
    """A schema, compiled once. Explains what is wrong; decode.py has the fast way for what is right."""

    def __init__(self, schema: InputSchema) -> None:
        keys = [key for key in schema.keys if key.name not in {f.name for f in schema.features}]
        self.features = schema.features
        self._required = frozenset(column.name for column in schema.features)
        self._allowed = self._required | {column.name for column in keys}
        self._feature_checks = [(column, _check_for(column)) for column in schema.features]
        self._key_checks = [(column, _check_for(column)) for column in keys]

    @property
    def names(self) -> frozenset[str]:
        """Every column that a row may hold."""
        return self._allowed

    def columns(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Values]:
        """The values, column by column, as frames.from_columns takes them; None for a key that is not given.

        Raises `BadRequest` (422) with row, column, what was found and what was expected.
        """
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise BadRequest(
                    422,
                    f"row {index} is {_describe(row)}, expected an object with a value per column",
                    row=index,
                    found=_describe(row),
                    expected="an object",
                )
            present = row.keys()
            if present != self._required and not (self._required <= present <= self._allowed):
                raise self._wrong_columns(index, row)
        values = {
            column.name: _checked(column, check, [row[column.name] for row in rows])
            for column, check in self._feature_checks
        }
        for column, check in self._key_checks:
            name = column.name
            given = [index for index, row in enumerate(rows) if name in row]
            key: Values = [None] * len(rows)
            checked = _checked(column, check, [rows[index][name] for index in given], given)
            for index, value in zip(given, checked, strict=True):
                key[index] = value
            values[name] = key
        return values

    def tensors(self, given: Mapping[str, Values], rows: int) -> dict[str, Values]:
        """The same of values that come by column, each `rows` long and at least one."""
        present = given.keys()
        if present != self._required and not (self._required <= present <= self._allowed):
            raise self._wrong_columns(0, given)
        return {
            column.name: _checked(column, check, given[column.name])
            if column.name in given
            else [None] * rows
            for column, check in (*self._feature_checks, *self._key_checks)
        }

    def _wrong_columns(self, index: int, row: Mapping[str, Any]) -> BadRequest:
        extra = sorted(row.keys() - self._allowed)
        missing = sorted(self._required - row.keys())
        if extra:
            name = extra[0]
            nearest = difflib.get_close_matches(name[:80], missing or sorted(self._allowed), 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            return BadRequest(
                422,
                f"row {index} has a column {_shorten(name)} that the model does not know{hint}",
                row=index,
                column=name[:80],
                found="an unknown column",
                expected=f"columns {', '.join(sorted(self._required))}",
                nearest=nearest[0] if nearest else None,
            )
        column = next(c for c in self.features if c.name == missing[0])
        return BadRequest(
            422,
            f"row {index} has no column {column.name!r}, expected {expected_of(column)}",
            row=index,
            column=column.name,
            found="nothing",
            expected=expected_of(column),
        )


def _checked(
    column: Column,
    check: Callable[[Values], Values],
    values: Values,
    rows: Sequence[int] | None = None,
) -> Values:
    """`rows` are the rows' numbers, where the values are not those of all rows."""
    try:
        return check(values)
    except WrongValue as wrong:
        expected = expected_of(column)
        row = wrong.row if rows is None else rows[wrong.row]
        raise BadRequest(
            422,
            f"row {row}, column {column.name!r}: found {wrong.found}, expected {expected}",
            row=row,
            column=column.name,
            found=wrong.found,
            expected=expected,
        ) from None


def expected_of(column: Column) -> str:
    """What a column takes, in words."""
    words = {
        "integer": "an integer of 64 bits",
        "number": "a number",
        "string": "a string",
        "boolean": "true or false",
        "timestamp": "an ISO 8601 timestamp "
        + (
            "with an offset, such as 2013-06-01T12:00:00Z"
            if column.utc
            else "without an offset, such as 2013-06-01T12:00:00"
        ),
    }[column.type]
    return f"{words} or null" if column.nullable else words


def _check_for(column: Column) -> Callable[[Values], Values]:
    """A function that returns a column's values as Python values of its type, or raises `WrongValue`."""
    convert = {
        "integer": _integer,
        "number": _number,
        "string": _string,
        "boolean": _boolean,
        "timestamp": _timestamp_utc if column.utc else _timestamp,
    }[column.type]
    ready = {"string": str, "boolean": bool}.get(column.type)
    nullable = column.nullable

    def check(values: Values) -> Values:
        if ready is not None and set(map(type, values)) <= {ready}:
            return values
        converted: Values = []
        for row, value in enumerate(values):
            if value is None and nullable:
                converted.append(None)
                continue
            try:
                converted.append(convert(value))
            except (TypeError, ValueError, OverflowError) as error:
                raise WrongValue(row, str(error) if isinstance(error, _Found) else _describe(value)) from None
        return converted

    return check


class _Found(ValueError):
    """A value of the right JSON type that is wrong in another way, which the message says."""


def _integer(value: object) -> int:
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise TypeError
    if value not in INT64:
        raise _Found(f"{_shorten(str(value))}, beyond 64 bits")
    return value


def _number(value: object) -> float:
    if type(value) is not float and type(value) is not int:
        raise TypeError
    try:
        number = float(value)
    except OverflowError:
        raise _Found("an integer beyond the range of floats") from None
    if not math.isfinite(number):
        raise _Found(str(number))
    return number


def _string(value: object) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def _boolean(value: object) -> bool:
    if type(value) is not bool:
        raise TypeError
    return value


def _moment(value: object) -> datetime:
    if type(value) is not str:
        raise TypeError
    try:
        moment = datetime.fromisoformat(value)
        bare = moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
    except (ValueError, OverflowError):
        raise _Found(f"the string {_shorten(value)}") from None
    if not EARLIEST <= bare < LATEST:
        raise _Found(f"{_shorten(value)}, outside the years 1678 to 2261")
    return moment


def _timestamp(value: object) -> datetime:
    moment = _moment(value)
    if moment.tzinfo is not None:
        raise _Found(f"{_shorten(str(value))}, with an offset")
    return moment


def _timestamp_utc(value: object) -> datetime:
    moment = _moment(value)
    if moment.tzinfo is None:
        raise _Found(f"{_shorten(str(value))}, without an offset")
    return moment


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _describe(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {_shorten(str(value)).strip(chr(39))}"
        case str():
            return f"the string {_shorten(value)}"
        case list():
            return "an array"
        case dict():
            return "an object"
        case _:
            return f"a {type(value).__name__}"
