"""Constants of a model's own code: where it compares with them, it may do something else to a row.

No holdout shows what `np.where(rows.carrier == "ZZ", ...)` does; a row with "ZZ" does.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

MOST_OBJECTS = 5_000  # looked at
MOST_CONSTANTS = 120  # of texts, and of numbers
MOST_OF_ONE = 200  # elements of one list, set or dictionary
LARGEST = 1e300
LONGEST = 100  # characters of a text: beyond, it is a docstring or a message

Constant = str | int | float


def constants_of(model: Any) -> tuple[Constant, ...]:
    """Texts and finite numbers that `predict`, the functions it calls, and the model's attributes hold.

    The code's come first where there are too many: an attribute may be a long table.
    """
    kind = type(model)
    seen: set[int] = set()
    kept: list[Any] = []  # alive, so that no other object gets its id
    found: dict[Constant, None] = {}
    for starts in ([inspect.getattr_static(kind, "predict", None)], getattr(model, "__dict__", {}).values()):
        waiting: deque[Any] = deque(starts)
        while waiting and len(kept) < MOST_OBJECTS:
            value = waiting.popleft()
            if isinstance(value, (str, int, float)):
                if not isinstance(value, bool):
                    found[value] = None
            elif id(value) not in seen:
                seen.add(id(value))
                kept.append(value)
                waiting += _within(value, kind)
    texts = [v for v in found if isinstance(v, str) and len(v) <= LONGEST]
    numbers = [v for v in found if not isinstance(v, str) and abs(v) < LARGEST]
    return (*texts[:MOST_CONSTANTS], *numbers[:MOST_CONSTANTS])


def _within(value: Any, kind: type) -> Iterator[Any]:
    match value:
        case dict():
            for key, element in islice(value.items(), MOST_OF_ONE):
                yield key
                yield element
        case set() | frozenset():
            plain = (element for element in value if isinstance(element, (str, int, float)))
            yield from sorted(plain, key=repr)[:MOST_OF_ONE]
        case list() | tuple():
            yield from value[:MOST_OF_ONE]
        case types.FunctionType() if _is_own(value.__module__, kind):
            yield from value.__defaults__ or ()
            yield from (value.__kwdefaults__ or {}).values()
            for cell in value.__closure__ or ():
                if cell != types.CellType():
                    yield cell.cell_contents
            yield from _of_code(value.__code__, value.__globals__, kind)
        case types.MethodType() | staticmethod() | classmethod():
            yield value.__func__
        case property():
            yield value.fget
        case functools.partial():
            yield from (value.func, value.args, value.keywords)
        case type() if _is_own(value.__module__, kind):
            yield from vars(value).values()


def _of_code(code: types.CodeType, names: dict[str, Any], kind: type) -> Iterator[Any]:
    """The constants of a function and of those in it, and what its names stand for."""
    modules = []
    for name in code.co_names:  # globals, attributes, and methods alike
        value = names.get(name)
        if isinstance(value, types.ModuleType):
            modules += [value] if _is_own(value.__name__, kind) else []
        else:
            yield value
        yield inspect.getattr_static(kind, name, None)
    for module in modules:
        yield from (vars(module).get(name) for name in code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant, names, kind)
        else:
            yield constant


def _is_own(module: str | None, kind: type) -> bool:
    """Whether a module is of the package of the model."""
    return (module or "").partition(".")[0] == kind.__module__.partition(".")[0]
