"""Is what a service answers what the model said in the process that trained it?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from perennial.errors import RolloutError
from perennial.values import Release

_ROWS_SHOWN = 3


def tolerance_of(release: Release) -> float:
    """How far an answer may be from the trained model's, absolute up to 1 and relative above; 0: not at all.

    Bit for bit where the model answers as it was trained, a request at a time; a compiled model, and rows
    that share a call with those of other requests, may differ by the release's tolerance.
    """
    form = release.serving
    if form is None or (form.path == "original" and not form.batching):
        return 0.0
    return release.service.compiled_tolerance if form.tolerance is None else form.tolerance


def check(release: Release, served: object, trained: Sequence[object]) -> None:
    """Compare the golden rows' answers, the worst named first. Raises RolloutError when one differs."""
    if not isinstance(served, list) or len(served) != len(trained):
        found = f"{len(served)} predictions" if isinstance(served, list) else "no list of predictions"
        raise RolloutError(f"{release.release_id} answers its golden rows with {found}", f"{len(trained)}")
    tolerance = tolerance_of(release)
    different = [row for row in range(len(trained)) if not _alike(served[row], trained[row], tolerance)]
    if not different:
        return
    worst = sorted(different, key=lambda row: -_distance(served[row], trained[row]))[:_ROWS_SHOWN]
    shown = "; ".join(f"row {row}: served {served[row]!r}, trained {trained[row]!r}" for row in worst)
    exactness = f"within {tolerance:g}, above 1 of the prediction" if tolerance else "bit for bit"
    raise RolloutError(
        f"{release.release_id} fails parity on {len(different)} of {len(trained)} golden rows: {shown}",
        f"the predictions that the model made in the process that trained it, {exactness}",
        "look for state that predict() keeps, or that save/load loses",
    )


def _alike(served: object, trained: object, tolerance: float) -> bool:
    if tolerance and isinstance(served, int | float) and isinstance(trained, int | float):
        return math.isclose(served, trained, rel_tol=tolerance, abs_tol=tolerance)
    return served == trained


def _distance(served: object, trained: object) -> float:
    if isinstance(served, int | float) and isinstance(trained, int | float):
        return abs(served - trained)
    return math.inf  # not even a number: nothing is worse
