"""The masks of leaves that quickscorer.py reads, made of the one ensemble of trees of a compiled model."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from serving.graph import Graph, NotCompilable, Raw, Source, Table, Trees
from serving.trees import MEMBER, Ensemble

if TYPE_CHECKING:
    import numpy as np

LARGEST_MASKS = 2_000_000  # bytes, in every worker; more would not stay in the processor's cache either
# Set by hand from measurements on models of 5 to 400 trees of 8 and 31 leaves over 2 to 60 columns.
CALL_NS, COLUMN_NS = 18_000, 1_000  # of a call through the masks
BRANCH_NS, GATHERED_NS = 6.0, 1.5  # of a row through onnxruntime
SEARCHED_NS, MASK_BYTE_NS, LEAF_NS = 40.0, 0.05, 1.5  # of a row through the masks
WORDS = (16, 32, 64)  # bits: leaves of a tree


class Branch(NamedTuple):
    """A branch, and the bits of the leaves on its true side: those that are lost where it is false."""

    tree: int
    node: int  # its index in the ensemble
    lost: int


class Column(NamedTuple):
    """A column of a request that trees branch on: numbers come first."""

    coded: bool
    place: int  # in the plan's numbers or lookups


def leaf_masks(graph: Graph) -> tuple[bytes, int]:
    """The file of a graph of one ensemble of small trees, and from how many rows of a call on it pays.

    Raises `NotCompilable`: why it has none.
    """
    import numpy as np

    if len(graph.trees) != 1:
        raise NotCompilable(f"it has {len(graph.trees)} ensembles of trees, and they are for one")
    (trees,) = graph.trees
    leaves, branches = _numbered(graph, trees)
    if not branches:
        raise NotCompilable("its trees have no branches")
    columns = sorted(branches)
    searched = [column for column in columns if not column.coded]
    thresholds = [_thresholds(trees.ensemble, branches[column]) for column in searched]
    counts = [len(values) for values in thresholds]
    known = list(graph.inputs.lookups.values())
    rows = [count + 1 for count in counts]
    rows += [len(known[column.place]) + 2 for column in columns if column.coded]
    bits = next(word for word in WORDS if max(map(len, leaves)) <= word)
    size = sum(rows) * len(leaves) * bits // 8
    if size > LARGEST_MASKS:
        raise NotCompilable(f"they would take {size:,} bytes, and the limit is {LARGEST_MASKS:,}")
    masks = np.full((sum(rows), len(leaves)), 2**bits - 1, f"u{bits // 8}")
    sets = _sets(trees.ensemble)
    for position, part in enumerate(np.split(masks, np.cumsum(rows)[:-1])):
        for branch in branches[columns[position]]:
            if position < len(searched):
                lost = _failed(trees.ensemble, branch, thresholds[position])
            else:
                lost = ~_passed(trees, branch, sets)
            part[lost, branch.tree] &= masks.dtype.type(2**bits - 1 - branch.lost)
    padded = np.zeros((len(leaves), bits))
    for tree, values in enumerate(leaves):
        padded[tree, : len(values)] = values
    file = io.BytesIO()
    np.savez(
        file,
        numbers=np.array([column.place for column in searched], np.int32),
        lookups=np.array([column.place for column in columns if column.coded], np.int32),
        thresholds=np.concatenate([[], *thresholds]),
        counts=np.array(counts, np.int32),
        masks=masks,
        leaves=padded,
        narrow=np.array(trees.narrow),
        rest=np.frombuffer(graph.rest(trees), np.uint8),
    )
    return file.getvalue(), _pays_from(trees, leaves, len(columns), bits // 8)


def _numbered(graph: Graph, trees: Trees) -> tuple[list[list[float]], dict[Column, list[Branch]]]:
    """The leaves of every tree from left, which is the true side, to right; the branches on every column."""
    ensemble = trees.ensemble
    places = {name: place for place, name in enumerate(graph.inputs.numbers)}
    codes = {name: place for place, name in enumerate(graph.inputs.lookups)}
    leaves: list[list[float]] = []
    branches: dict[Column, list[Branch]] = {}
    for tree, root in enumerate(ensemble.roots):
        own: list[float] = []
        left: list[tuple[int, int, int]] = [(root, 0, -1)]
        while left:
            index, is_leaf, first = left.pop()
            if is_leaf:
                own.append(ensemble.leaves[index])
                if len(own) > WORDS[-1]:
                    raise NotCompilable(f"a tree has more than {WORDS[-1]} leaves")
            elif first >= 0:  # the leaves of its true side have their numbers
                column = _column(trees.sources[ensemble.features[index]], places, codes)
                branches.setdefault(column, []).append(Branch(tree, index, (1 << len(own)) - (1 << first)))
            elif ensemble.true[index] == ensemble.false[index]:  # a constant
                left.append((*ensemble.true[index], -1))
            else:
                left += [(*ensemble.false[index], -1), (index, 0, len(own)), (*ensemble.true[index], -1)]
        leaves.append(own)
    return leaves, branches


def _pays_from(trees: Trees, leaves: Sequence[Sequence[float]], columns: int, mask_bytes: int) -> int:
    """Rows of a call: where the time that is saved by each row makes up for the array operations of a call.

    A row's branches and gathered columns are what it saves; its searches, masks and leaves are what it costs.
    """
    branches = sum(math.log2(len(own)) for own in leaves)
    saved = BRANCH_NS * branches + GATHERED_NS * len(trees.sources)
    cost = columns * (SEARCHED_NS + MASK_BYTE_NS * mask_bytes * len(leaves)) + LEAF_NS * len(leaves)
    return max(2, math.ceil((CALL_NS + COLUMN_NS * columns) / max(saved - cost, 1e-9)))


def _column(source: Source, numbers: dict[str, int], lookups: dict[str, int]) -> Column:
    match source:
        case Raw(column):
            return Column(False, numbers[column.name])
        case Table(lookup):
            return Column(True, lookups[lookup])
        case _:
            raise NotCompilable("its trees branch on what an earlier step computed")


def _thresholds(ensemble: Ensemble, branches: Sequence[Branch]) -> np.ndarray:
    """Ascending, each once. The last is infinite: beyond it is only what is missing.

    HistGradientBoosting halves the way between two infinities at NaN, which no value is below.
    """
    import numpy as np

    if any(ensemble.modes[branch.node] == MEMBER for branch in branches):
        raise NotCompilable("its trees have sets of numbers")
    splits = [ensemble.splits[branch.node] for branch in branches]
    return np.unique([*(split for split in splits if not math.isnan(split)), math.inf])


def _failed(ensemble: Ensemble, branch: Branch, thresholds: np.ndarray) -> np.ndarray:
    """For which of a number's values a branch is false: by thresholds that are not below it, then missing."""
    import numpy as np

    failed = np.append(~(thresholds <= ensemble.splits[branch.node]), False)
    failed[-1] = not ensemble.missing_to_true[branch.node]
    return failed


def _passed(trees: Trees, branch: Branch, sets: dict[int, list[float]]) -> np.ndarray:
    """For which codes of a lookup a branch is true."""
    import numpy as np

    ensemble = trees.ensemble
    source = trees.sources[ensemble.features[branch.node]]
    assert isinstance(source, Table)
    values = source.values.astype(np.float64)
    if trees.narrow:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32).astype(np.float64)
    if branch.node in sets:
        passed = np.isin(values, sets[branch.node])
    else:
        passed = values <= ensemble.splits[branch.node]
    return np.where(np.isnan(values), bool(ensemble.missing_to_true[branch.node]), passed)


def _sets(ensemble: Ensemble) -> dict[int, list[float]]:
    """The members of each branch that has a set."""
    members = iter(ensemble.members)
    return {
        index: list(takewhile(lambda member: not math.isnan(member), members))
        for index, mode in enumerate(ensemble.modes)
        if mode == MEMBER
    }
