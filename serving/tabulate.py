"""Encoders as tables: the fitted encoder says what it makes of every known value, unseen ones and null.

What an encoder makes of a value it has never seen, or of null, is thereby the original's by construction. One
column is varied at a time; rows of random values then show that columns do not act on each other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from serving.contract import Column
from serving.graph import Graph, NotCompilable, Raw, Source, Table, describe

if TYPE_CHECKING:
    import numpy as np

MOST_VALUES = 20_000  # of one column
MOST_NUMBERS = 16_000_000  # of all values of one column, transformed: 128 MB
ROWS_TOGETHER = 300  # random rows that show that columns do not act on each other
UNSEEN_TEXT = (
    "",
    " ",
    "nan",
    "None",
    "null",
    "perennial unseen",
    "\u00e9\u4e2d",
    "0",
    "~~~~~~~~~~~~~~~~~~~~~~~~",
)
EXACT = 2**53  # floats hold integers up to here


Run = Callable[[list[list[Any]]], Any]  # rows of values to rows of numbers


class Values(Protocol):
    """What is known of the data and of how the server makes frames of it."""

    def known(self, column: Column) -> list[Any]:
        """The distinct values of a column in the training data and the holdout, without null."""

    def frame(self, columns: Sequence[Column], values: dict[str, list[Any]]) -> Any:
        """A frame as the server would make it."""


def tabulate(graph: Graph, transformer: Any, sources: Sequence[Source], values: Values) -> list[Source]:
    """The columns that a fitted transformer of categories makes, as tables.

    Raises `NotCompilable` if they depend on more than one column each, or if unseen values differ.
    """
    import numpy as np

    columns = [
        _Domain(graph, source, transformer, position, values) for position, source in enumerate(sources)
    ]
    names = [source.column.name for source in sources if isinstance(source, Raw)]
    if len(set(names)) < len(names):
        raise NotCompilable(f"{_name(transformer)} is given a column twice: {describe(sources)}")
    run = _runner(transformer, sources, values)
    base, usual = _usual(run, columns, _name(transformer))
    outputs = len(usual)
    owner = np.full(outputs, -1)
    found: list[np.ndarray] = []
    for position, column in enumerate(columns):
        rows = [[*base[:position], option, *base[position + 1 :]] for option in column.options]
        made, raised = _outcomes(run, rows, outputs)
        table = column.settled(made, raised, graph, _name(transformer))
        moves = np.flatnonzero(~_same(table[~column.refused(raised)], usual).all(axis=0))
        if (owner[moves] >= 0).any():
            raise NotCompilable(f"{_name(transformer)} mixes the columns {describe(sources)}")
        owner[moves] = position
        found.append(table)
    owner[owner < 0] = 0  # an output that never changes is any column's
    tables: list[Source] = [
        Table(columns[owner[output]].lookup, np.ascontiguousarray(found[owner[output]][:, output]))
        for output in range(outputs)
    ]
    _check_together(run, columns, tables, _name(transformer))
    return tables


class _Domain:
    """All the values that a source may take: by the codes of its lookup, the unseen ones several times."""

    def __init__(self, graph: Graph, source: Source, transformer: Any, position: int, values: Values) -> None:
        import numpy as np

        match source:
            case Raw(column=column):
                wanted = _known(column, transformer, position, values)
                self.lookup = column.name
                known = graph.lookup(column.name, wanted)
                unseen = [] if column.type == "boolean" else _unseen(column, known)
                self.options: list[Any] = [*known, *unseen]
                codes = [*range(len(known)), *[len(known)] * len(unseen)]
                if column.nullable:
                    self.options.append(None)
                    codes.append(len(known) + 1)
                self.size = len(known) + 2
                self.known = len(known) or len(self.options)
            case Table(lookup=lookup, values=numbers):
                self.lookup, self.size = lookup, len(numbers)
                self.options, codes = list(numbers), list(range(len(numbers)))
                self.known = self.size
            case _:
                raise NotCompilable(f"{_name(transformer)} is given what an earlier step computed")
        self.codes = np.array(codes)
        if not self.options:
            raise NotCompilable(f"column {self.lookup!r} has no values")

    def refused(self, raised: np.ndarray) -> np.ndarray:
        """By code: whether the original raises, or can never be asked."""
        import numpy as np

        refused = np.ones(self.size, bool)
        refused[self.codes[~raised]] = False
        return refused

    def settled(self, made: np.ndarray, raised: np.ndarray, graph: Graph, who: str) -> np.ndarray:
        """One row of outputs per code. All unseen values must have led to the same."""
        import numpy as np

        table = np.zeros((self.size, made.shape[1]))
        for code in np.unique(self.codes):
            rows = np.flatnonzero(self.codes == code)
            alike = _same(made[rows], made[rows[0]]).all() and len(set(raised[rows].tolist())) == 1
            if not alike:
                pair = [self.options[row] for row in (rows[0], rows[-1])]
                raise NotCompilable(
                    f"{who} tells values of {self.lookup!r} apart that training never saw, such as {pair!r}"
                )
            table[code] = made[rows[0]]
        codes = np.zeros(self.size, bool)
        codes[self.codes[raised]] = True
        if codes.any():
            graph.refuse(self.lookup, codes)
        return table


def _usual(run: Run, columns: Sequence[_Domain], who: str) -> tuple[list[Any], np.ndarray]:
    """A row of known values that the transformer takes (some of the holdout it may refuse), transformed."""
    import numpy as np

    random = np.random.default_rng(0)
    refusal = ""
    for _ in range(ROWS_TOGETHER):
        row = [column.options[random.integers(0, column.known)] for column in columns]
        try:
            return row, run([row])[0]
        except ValueError as error:
            refusal = str(error).splitlines()[0]
    raise NotCompilable(f"{who} takes none of {ROWS_TOGETHER} rows of known values: {refusal}")


def _known(column: Column, transformer: Any, position: int, values: Values) -> list[Any]:
    """Values of the data, categories that an encoder was given by hand, and what an imputer replaces."""
    if column.type == "timestamp":
        raise NotCompilable(f"{_name(transformer)} is given the timestamp {column.name!r}")
    if column.type == "boolean":
        return [False, True]
    known = set(values.known(column))
    for _, step in getattr(transformer, "steps", [("", transformer)]):
        categories = getattr(step, "categories_", None)
        given = [getattr(step, "missing_values", None)]  # of an imputer
        if isinstance(categories, list) and position < len(categories):
            given += categories[position].tolist()
        kind = str if column.type == "string" else (int, float)
        known |= {c for c in given if isinstance(c, kind) and (isinstance(c, str) or math.isfinite(c))}
    if column.type != "string":
        known = {float(value) for value in known}
        if any(abs(value) >= EXACT for value in known):
            raise NotCompilable(f"{_name(transformer)} is given categories beyond 2**53 in {column.name!r}")
    if len(known) > MOST_VALUES:
        raise NotCompilable(f"column {column.name!r} has {len(known):,} categories; at most {MOST_VALUES:,}")
    return sorted(known)


def _unseen(column: Column, known: Sequence[Any]) -> list[Any]:
    if column.type == "string":
        spread = known[:: max(1, len(known) // 20)]
        variants = [v for k in spread for v in (k.upper(), k.lower(), k.title(), f" {k}", f"{k} ", f"{k}{k}")]
        return [v for v in dict.fromkeys([*UNSEEN_TEXT, *variants]) if v not in set(known)]
    integer = column.type == "integer"
    spread = known[:: max(1, len(known) // 20)]
    near = [v + d for v in [*spread, *known[-1:]] for d in ((1.0, -1.0) if integer else (0.5, -0.25, 1e-9))]
    far = [0.0, -1.0, 1e6, -1e6, 2.0**40, -(2.0**62)] + ([] if integer else [1e-300, 1e300, -1e300])
    return [v for v in dict.fromkeys([*far, *near]) if v not in set(known)]


def _runner(transformer: Any, sources: Sequence[Source], values: Values) -> Run:
    """Rows of options through the transformer, in the form it is given them by the pipeline."""
    import numpy as np

    columns = [source.column for source in sources if isinstance(source, Raw)]
    frames = len(columns) == len(sources)

    def run(rows: list[list[Any]]) -> np.ndarray:
        if frames:
            by_name = {c.name: [row[i] for row in rows] for i, c in enumerate(columns)}
            given = values.frame(columns, by_name)
        else:
            kind = np.object_ if columns else np.float64
            given = np.array(rows, dtype=kind).reshape(len(rows), len(sources))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made = transformer.transform(given)
            except TypeError:  # fitted on an array of mixed types: numpy has objects for those
                made = transformer.transform(np.asarray(given).astype(np.object_))
        if made.shape[0] * made.shape[1] > MOST_NUMBERS:  # before it becomes dense
            raise NotCompilable(
                f"{_name(transformer)} makes {made.shape[1]:,} columns of {len(rows):,} values"
            )
        made = made.toarray() if hasattr(made, "toarray") else np.asarray(made)
        return np.asarray(made, dtype=np.float64).reshape(len(rows), -1)

    return run


def _outcomes(run: Run, rows: list[list[Any]], outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """What each row becomes (zeros where the transformer raises), and whether it raises."""
    import numpy as np

    raised = np.zeros(len(rows), bool)
    try:
        return run(rows), raised
    except ValueError:
        made = np.zeros((len(rows), outputs))
    for index, row in enumerate(rows):
        try:
            made[index] = run([row])[0]
        except ValueError:
            raised[index] = True
    return made, raised


def _check_together(run: Run, columns: list[_Domain], tables: list[Source], who: str) -> None:
    import numpy as np

    random = np.random.default_rng(0)
    picks = [random.integers(0, len(column.options), ROWS_TOGETHER) for column in columns]
    rows = [[c.options[p[i]] for c, p in zip(columns, picks, strict=True)] for i in range(ROWS_TOGETHER)]
    made, raised = _outcomes(run, rows, len(tables))
    by_lookup = {c.lookup: c.codes[p] for c, p in zip(columns, picks, strict=True)}
    if len(by_lookup) < len(columns):
        return  # two columns of one lookup never meet as random values do
    said = np.column_stack([t.values[by_lookup[t.lookup]] for t in tables if isinstance(t, Table)])
    wrong = np.flatnonzero(~_same(said, made).all(axis=1) & ~raised)
    if len(wrong):
        raise NotCompilable(f"{who} mixes its columns: {rows[wrong[0]]!r} becomes {made[wrong[0]]!r}")


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.asarray((a == b) | (np.isnan(a) & np.isnan(b)))


def _name(transformer: Any) -> str:
    steps = getattr(transformer, "steps", None)
    return " + ".join(type(s[1]).__name__ for s in steps) if steps else type(transformer).__name__
