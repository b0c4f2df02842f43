"""scikit-learn's tree ensembles as the ONNX operator TreeEnsemble (ai.onnx.ml 5), every number in float64.

A branch goes to its true side where `value <= threshold` (mode 0) or where the value is in a set (mode 6).
Sets stand in `membership_values`, in the order of their nodes, each ended by a NaN. Leaf values are summed in
the order of the trees, as scikit-learn sums them: equal sums, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.graph import NotCompilable

if TYPE_CHECKING:
    import numpy as np

Indicator = Callable[[int, frozenset[int]], int]

LESS_OR_EQUAL, MEMBER = 0, 6
SUM = 1
MOST_BRANCHES = 1_000_000  # onnxruntime takes 280 bytes for each, in every worker


@dataclass
class Ensemble:
    """Trees so far, as TreeEnsemble has them."""

    features: list[int] = field(default_factory=list)
    splits: list[float] = field(default_factory=list)
    modes: list[int] = field(default_factory=list)
    missing_to_true: list[int] = field(default_factory=list)
    true: list[tuple[int, int]] = field(default_factory=list)  # index, and 1 where it is a leaf's
    false: list[tuple[int, int]] = field(default_factory=list)
    members: list[float] = field(default_factory=list)
    leaves: list[float] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)

    def constant(self, value: float) -> None:
        """A tree of one leaf. A tree must have a branch: both its sides are the leaf."""
        self.roots.append(len(self.features))
        self._branch(0, 0.0, LESS_OR_EQUAL, missing_to_true=False)
        self.true[-1] = self.false[-1] = self._leaf(value)

    def plain(self, tree: Any, values: np.ndarray) -> None:
        """A `sklearn.tree._tree.Tree` with a value per node. Its missing values go where it says."""
        if tree.node_count == 1:
            return self.constant(float(values[0]))
        left, right = tree.children_left.tolist(), tree.children_right.tolist()  # each is made anew when read
        missing, features, thresholds = (
            tree.missing_go_to_left,
            tree.feature.tolist(),
            tree.threshold.tolist(),
        )
        self.roots.append(len(self.features))
        indices = {}
        for node, child in enumerate(left):
            if child >= 0:
                indices[node] = len(self.features)
                self._branch(features[node], thresholds[node], LESS_OR_EQUAL, bool(missing[node]))
        for node, index in indices.items():
            for sides, child in ((self.true, left[node]), (self.false, right[node])):
                sides[index] = (indices[child], 0) if child in indices else self._leaf(float(values[child]))
        return None

    def histogram(
        self, predictor: Any, known: dict[int, frozenset[int]], indicator: Indicator | None
    ) -> None:
        """A tree of HistGradientBoosting. `known`: the codes of each categorical feature.

        A code that is not known goes where missing values go. With an `indicator`, sets become thresholds on
        columns of 0 and 1: onnxruntime is a third faster where all branches are of one mode.
        """
        nodes = predictor.nodes
        if len(nodes) == 1:
            return self.constant(float(nodes[0]["value"]))
        self.roots.append(len(self.features))
        indices, swapped = {}, set()
        for number, node in enumerate(nodes):
            if node["is_leaf"]:
                continue
            indices[number] = len(self.features)
            feature, to_left = int(node["feature_idx"]), bool(node["missing_go_to_left"])
            if not node["is_categorical"]:
                self._branch(feature, float(node["num_threshold"]), LESS_OR_EQUAL, to_left)
                continue
            left = members(predictor.raw_left_cat_bitsets[node["bitset_idx"]]) & known[feature]
            if to_left:  # what is not in a set goes to the false side, so the false side must be the left one
                swapped.add(number)
            if to_true := known[feature] - left if to_left else left:
                if indicator is not None:
                    self._branch(indicator(feature, to_true), 0.5, LESS_OR_EQUAL, missing_to_true=False)
                    continue
                self._branch(feature, 0.0, MEMBER, missing_to_true=False)
                self.members += [*map(float, sorted(to_true)), float("nan")]
            else:  # onnxruntime takes no empty set; no code is below zero
                self._branch(feature, -1.0, LESS_OR_EQUAL, missing_to_true=False)
        for number, index in indices.items():
            sides_of = ("right", "left") if number in swapped else ("left", "right")
            yes, no = (int(nodes[number][side]) for side in sides_of)
            for sides, child in ((self.true, yes), (self.false, no)):
                sides[index] = (
                    (indices[child], 0) if child in indices else self._leaf(float(nodes[child]["value"]))
                )
        return None

    def attributes(self) -> dict[str, Any]:
        """The attributes of a TreeEnsemble of one target."""
        import numpy as np
        from onnx import numpy_helper

        def doubles(values: list[float], name: str) -> Any:
            return numpy_helper.from_array(np.array(values, np.float64), name)

        sets = {"membership_values": doubles(self.members, "members")} if self.members else {}
        return {
            "n_targets": 1,
            "aggregate_function": SUM,
            "post_transform": 0,
            "nodes_splits": doubles(self.splits, "splits"),
            "nodes_featureids": self.features,
            "nodes_modes": numpy_helper.from_array(np.array(self.modes, np.uint8), "modes"),
            "nodes_truenodeids": [index for index, _ in self.true],
            "nodes_trueleafs": [leaf for _, leaf in self.true],
            "nodes_falsenodeids": [index for index, _ in self.false],
            "nodes_falseleafs": [leaf for _, leaf in self.false],
            "nodes_missing_value_tracks_true": self.missing_to_true,
            "tree_roots": self.roots,
            "leaf_targetids": [0] * len(self.leaves),
            "leaf_weights": doubles(self.leaves, "leaves"),
            **sets,
        }

    def _branch(self, feature: int, split: float, mode: int, missing_to_true: bool) -> None:
        if len(self.features) == MOST_BRANCHES:
            raise NotCompilable(f"its trees have more than {MOST_BRANCHES:,} branches")
        self.features.append(feature)
        self.splits.append(split)
        self.modes.append(mode)
        self.missing_to_true.append(int(missing_to_true))
        self.true.append((0, 0))
        self.false.append((0, 0))

    def _leaf(self, value: float) -> tuple[int, int]:
        self.leaves.append(value)
        return len(self.leaves) - 1, 1


def members(bitset: np.ndarray) -> frozenset[int]:
    """The numbers 0 to 255 whose bits are set in eight words of 32 bits."""
    return frozenset(n for n in range(256) if int(bitset[n // 32]) >> (n % 32) & 1)
