"""One skops dump, one sequence of bytes.

skops names objects and zip members after memory addresses, stamps members with the time of day and writes
sets in hash order. Two trainings with one seed would give different bytes for the same model; here they
give the same ones. What `skops.io.load` makes of the file does not change.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

SCHEMA_MEMBER = "schema.json"
UNSHARED = frozenset({"JsonNode", "TypeNode"})  # immutable: whether equal ones are one object is chance
EPOCH = (1980, 1, 1, 0, 0, 0)


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every node of a skops schema, a parent before its children, in the order in which skops reads them."""
    if isinstance(value, dict):
        if isinstance(value.get("__loader__"), str):
            yield value
        for _, child in sorted(value.items(), key=_reading_order):
            yield from nodes(child)
    elif isinstance(value, list):
        for child in value:
            yield from nodes(child)


def _reading_order(item: tuple[str, Any]) -> int:
    return {"key_types": 0, "__reduce__": 2}.get(item[0], 1)


def canonical(dump: bytes) -> bytes:
    """The same skops file with ids and members numbered in order of traversal, and no times."""
    with zipfile.ZipFile(io.BytesIO(dump)) as source:
        schema = json.loads(source.read(SCHEMA_MEMBER))
        _sort_sets(schema)
        _number_ids(schema)
        members: dict[str, str] = {}
        for node in nodes(schema):
            if isinstance(node.get("file"), str):
                old = node["file"]
                new = members.setdefault(old, f"{len(members)}.{old.rpartition('.')[2]}")
                node["file"] = new
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            _write(archive, SCHEMA_MEMBER, json.dumps(schema, separators=(",", ":")).encode())
            for old, new in members.items():
                content = source.read(old)
                _write(archive, new, _without_padding(content) if new.endswith(".npy") else content)
    return target.getvalue()


def _write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name, EPOCH)
    info.create_system = 3
    info.external_attr = 0o600 << 16
    archive.writestr(info, content)


def _number_ids(schema: dict[str, Any]) -> None:
    """Number the objects that are referred to more than once; later references become `CachedNode`s."""
    uses = Counter(
        node["__id__"] for node in nodes(schema) if "__id__" in node and node["__loader__"] not in UNSHARED
    )
    numbers: dict[int, int] = {}
    for node in nodes(schema):  # children are visited after this loop has changed their parent
        old = node.pop("__id__", None)
        if old is None or node["__loader__"] in UNSHARED or uses[old] == 1:
            continue
        if old in numbers:
            type_name, module = node["__class__"], node["__module__"]
            node.clear()
            node |= {"__class__": type_name, "__module__": module, "__loader__": "CachedNode"}
        node["__id__"] = numbers.setdefault(old, len(numbers) + 1)


def _sort_sets(schema: dict[str, Any]) -> None:
    for node in nodes(schema):
        if node["__loader__"] == "SetNode":
            node["content"].sort(key=_content_key)
        elif node["__loader__"] == "ConstructorFromReduceNode" and node["__class__"] == "frozenset":
            for argument in node["content"]["content"]:
                argument["content"].sort(key=_content_key)


def _content_key(value: Any) -> str:
    def strip(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: strip(child) for key, child in part.items() if key not in ("__id__", "file")}
        return [strip(child) for child in part] if isinstance(part, list) else part

    return json.dumps(strip(value), sort_keys=True)


def _without_padding(content: bytes) -> bytes:
    """A structured array holds bytes between its fields that nobody has written; they become zero."""
    import numpy as np

    array = np.load(io.BytesIO(content), allow_pickle=False)
    if array.dtype.names is None:
        return content
    clean = np.zeros(array.shape, array.dtype)
    for name in array.dtype.names:
        clean[name] = array[name]
    buffer = io.BytesIO()
    np.save(buffer, clean, allow_pickle=False)
    return buffer.getvalue()
