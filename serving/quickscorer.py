"""Trees for many rows at once, by AND of bits instead of branches: no row's path is guessed by the processor.

QuickScorer (Lucchese et al., "QuickScorer: a fast algorithm to rank documents with additive ensembles of
regression trees", SIGIR 2015), as arrays. The leaves of a tree are bits, from left to right. For every value
of a column there is a row of masks, one per tree: the leaves that are left when each branch on this column
that the value fails has lost its true side. The lowest bit that all columns leave is the leaf of a row.

`leafmasks.py` writes the arrays. Leaf values are added in the order of the trees, as TreeEnsemble and
scikit-learn add them: equal sums, to the last bit.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.contract import Plan
from serving.errors import ContractError

if TYPE_CHECKING:
    import numpy as np

# The top bits of its product with a power of two tell the power: no two words of its bits are alike.
DE_BRUIJN = {16: 0x09AF, 32: 0x077CB531, 64: 0x03F79D71B4CB0A89}
MOST_ROWS = 256  # of a pass: with more, its arrays leave the cache
MEANT = "what `serving.compiler` wrote; build the release again"
ARRAYS = {  # kind and dimensions
    "numbers": "i1",
    "lookups": "i1",
    "thresholds": "f1",
    "counts": "i1",
    "masks": "u2",
    "leaves": "f2",
    "narrow": "b0",
    "rest": "u1",
}

Load = Callable[[bytes, Path], Any]


class QuickScorer:
    """The trees of a compiled model, from `trees.npz`, and the graph of what comes after them.

    Its arrays, of c columns with k masks each, t trees of at most b leaves:
    `numbers`, `lookups`: the places of the columns in the plan's; those of numbers come first,
    `thresholds` float64 and `counts` [numbers]: of each column, ascending, the last infinite,
    `masks` unsigned, [sum of k, t]; of a number k = thresholds + 1, the last where it is missing,
    `leaves` float64 [t, b], `narrow`: compare 32-bit numbers,
    `rest`: the graph of what comes after the trees; its input `trees` [rows, 1] is their sums.

    Raises `ContractError` for a file that is not of the plan. It takes no more memory than a few times its
    size, and nothing of it is unpickled.
    """

    def __init__(self, path: Path, plan: Plan, load: Load) -> None:
        import numpy as np

        try:
            content = path.read_bytes()
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                if sum(member.file_size for member in arrays.zip.infolist()) > len(content):
                    raise ValueError("they are compressed")
                self._prepare(dict(arrays), plan)
        except Exception as error:  # numpy and zipfile have no common base of their own
            raise ContractError(f"unreadable trees ({error})", MEANT, str(path)) from error
        session: Any = load(self._rest, path)
        self._feeds = {node.name for node in session.get_inputs()}
        if not self._feeds <= {"trees", "numbers", "codes"}:
            raise ContractError(f"a graph of inputs {sorted(self._feeds)}", MEANT, str(path))
        self._run = getattr(session, "_sess", session).run
        try:  # also, the first call takes longer than the others
            said = self.predict(np.zeros((len(plan.numbers), 2)), np.zeros((len(plan.lookups), 2), np.int64))
        except Exception as error:  # onnxruntime has an exception per status, with no common base of its own
            raise ContractError(f"trees that predict nothing ({error})", MEANT, str(path)) from error
        if said.shape != (2,) or said.dtype != np.float64:
            raise ContractError(f"predictions {said.dtype} {said.shape} of two rows", MEANT, str(path))

    def predict(self, numbers: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """float64 [rows], of the plan's columns: float64 [numbers, rows] and int64 [lookups, rows]. Rows > 1.

        Every pass has more than one row: numpy adds up a single one in another order.
        """
        import numpy as np

        rows = numbers.shape[1]
        passes = -(-rows // MOST_ROWS)
        cuts = [rows * at // passes for at in range(passes + 1)]
        sums = [
            self._sums(numbers[:, begin:end], codes[:, begin:end], end - begin)
            for begin, end in pairwise(cuts)
        ]
        feeds = {"trees": (sums[0] if passes == 1 else np.concatenate(sums)).reshape(-1, 1)}
        if "numbers" in self._feeds:
            feeds["numbers"] = np.ascontiguousarray(numbers.T)
        if "codes" in self._feeds:
            feeds["codes"] = np.ascontiguousarray(codes.T)
        prediction: np.ndarray = self._run(["prediction"], feeds, None)[0]
        return prediction

    def _sums(self, numbers: np.ndarray, codes: np.ndarray, rows: int) -> np.ndarray:
        """The sum of the trees' leaves, float64 [rows]."""
        import numpy as np

        if self._narrow:
            with np.errstate(over="ignore"):  # what is beyond 32 bits is refused by the rest
                numbers = numbers.astype(np.float32).astype(np.float64)
        left, both = np.full((rows, len(self._first)), self._all), np.bitwise_and
        masks = np.empty_like(left)
        for position, thresholds, table in self._searched:
            table.take(thresholds.searchsorted(numbers[position]), 0, masks, "clip")
            both(left, masks, left)
        for position, table in self._looked_up:
            table.take(codes[position], 0, masks, "clip")
            both(left, masks, left)
        np.negative(left, masks)
        both(left, masks, left)  # its lowest bit alone
        left *= self._multiplier
        left >>= self._shift
        places = left.T.astype(np.intp)
        places += self._first
        sums: np.ndarray = np.add.reduce(self._leaves.take(places), axis=0)
        return sums

    def _prepare(self, arrays: dict[str, np.ndarray], plan: Plan) -> None:
        import numpy as np

        found = {name: f"{array.dtype.kind}{array.ndim}" for name, array in arrays.items()}
        if found != ARRAYS:
            raise ValueError(f"arrays {found}")
        masks, leaves = arrays["masks"], arrays["leaves"]
        trees, bits = leaves.shape
        kind = masks.dtype.type
        if masks.dtype.itemsize * 8 != bits or masks.shape[1] != trees:
            raise ValueError(f"masks of {masks.dtype} {masks.shape} for leaves {leaves.shape}")
        self._narrow = bool(arrays["narrow"])
        self._rest = arrays["rest"].tobytes()
        self._all = kind(2**bits - 1)
        self._multiplier, self._shift = kind(DE_BRUIJN[bits]), kind(bits - (bits.bit_length() - 1))
        words = (self._multiplier << np.arange(bits, dtype=masks.dtype)) >> self._shift
        placed = np.empty(leaves.shape)
        placed[:, words] = leaves
        self._leaves = placed.ravel()
        self._first = np.arange(trees, dtype=np.intp)[:, None] * bits

        def rows_of(count: int) -> np.ndarray:
            nonlocal masks
            if count > len(masks):
                raise ValueError("fewer masks than values")
            taken, masks = masks[:count], masks[count:]
            return taken

        *thresholds, beyond = np.split(arrays["thresholds"], np.cumsum(arrays["counts"]))
        numbers, lookups = arrays["numbers"].tolist(), arrays["lookups"].tolist()
        self._searched = [
            (position, own, rows_of(len(own) + 1)) for position, own in zip(numbers, thresholds, strict=True)
        ]
        self._looked_up = [(at, rows_of(len(plan.lookups[at].values) + 2)) for at in lookups]
        odd = [*set(numbers).difference(range(len(plan.numbers)))]
        odd += set(lookups).difference(range(len(plan.lookups)))
        if len(masks) or len(beyond) or odd:
            raise ValueError("columns of another plan")
