"""Membership of a category in a set, as a column of 0 (in it) and 1 (not in it, unknown or missing)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.graph import Raw, Source, Table
from serving.trees import Ensemble

MOST_COLUMNS = 1000  # a row of more is slower to gather than sets are to search
MOST_NUMBERS = 1_000_000  # of all tables; 8 MB in every worker


class Indicators:
    """The columns that an ensemble's branches use, those of its sets among them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)
        self._columns: dict[tuple[int, frozenset[int]], int] = {}

    def __call__(self, feature: int, members: frozenset[int]) -> int:
        """Index of the column that says whether a feature is in a set."""
        import numpy as np

        index = self._columns.setdefault((feature, members), len(self._sources))
        if index == len(self._sources):
            table = self._sources[feature]
            assert isinstance(table, Table)
            outside = ~np.isin(table.values, sorted(members))
            self._sources.append(Table(table.lookup, outside.astype(np.float64)))
        return index

    def used(self, ensemble: Ensemble) -> list[Source]:
        """The columns that branches look at, those of a lookup side by side; the branches then name these."""
        used = sorted(set(ensemble.features), key=lambda feature: _order(self._sources[feature], feature))
        place = {feature: position for position, feature in enumerate(used)}
        ensemble.features = [place[feature] for feature in ensemble.features]
        return [self._sources[feature] for feature in used]


def affordable(predictors: Sequence[Sequence[Any]], sources: Sequence[Source]) -> bool:
    """Whether the trees of a HistGradientBoosting have so few sets that each may be a column."""
    columns = numbers = 0
    for (predictor,) in predictors:
        nodes = predictor.nodes
        for feature in nodes["feature_idx"][(nodes["is_categorical"] > 0) & (nodes["is_leaf"] == 0)]:
            table = sources[int(feature)]
            columns += 1
            numbers += len(table.values) if isinstance(table, Table) else 0
    return columns <= MOST_COLUMNS and numbers <= MOST_NUMBERS


def _order(source: Source, feature: int) -> tuple[str, int]:
    if isinstance(source, Table):
        return (f"0 {source.lookup}", feature)
    return ("1" if isinstance(source, Raw) else f"2 {source.tensor}", feature)
