"""Evidence that may be looked at as often as one likes: the capital of bets against a hypothesis.

While the hypothesis is true, the capital, which begins at 1, is expected not to grow: it ever reaches 100
in one of 100 cases at most, however many looks there are (Ville's inequality). A mean of capitals is one too.

Ramdas, Grünwald, Vovk & Shafer 2023, https://doi.org/10.1214/23-STS894
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy

Floats = NDArray[np.float64]

_MOST_LOG = 690.0  # exp of more is no float

# Capital kept back and put, a part at each look, on what a bet made at the start would have lost by then:
# without it a candidate that breaks after an hour would first have to make up for its good hour.
_RESERVE, _PART_PER_LOOK = 0.1, 0.001


class Bet(NamedTuple):
    """For odds of failure `odds` times the active release's, against those of the hypothesis, `null`."""

    null: float
    odds: float
    weight: float


class OddsEvidence:
    """Against "the odds of a failure in the candidate are at most `null` times those in the active release".

    At most where a bet's odds are above its null, at least where they are below. Given how many failures both
    had in a look, the candidate's number follows Fisher's noncentral hypergeometric distribution, whatever
    the rate of failures was: what hits both alike is no evidence.
    """

    def __init__(
        self, bets: Sequence[Bet], *, most_per_look: float = math.inf, restarts: bool = True
    ) -> None:
        """The weights sum to 1. `most_per_look`: what one look may at most multiply the capital by."""
        null, odds, weight = np.array(bets, dtype=np.float64).T
        self._logs, places = np.unique(np.log([odds, null]), return_inverse=True)
        self._odds, self._null = places.reshape(2, -1)
        self._gain_per_failure = self._logs[self._odds] - self._logs[self._null]
        self._weight = weight
        self._reserve = _RESERVE if restarts else 0.0
        self._most = math.log(most_per_look)
        self._capital: Floats = np.log(weight * (1.0 - self._reserve))

    def look(self, failed: int, asked: int, active_failed: int, active_asked: int) -> None:
        """What happened since the last look. One without failures, or of one arm only, changes nothing."""
        total = failed + active_failed
        if not (asked and active_asked and 0 < total < asked + active_asked):
            return
        if self._reserve:
            moved = self._reserve * _PART_PER_LOOK
            self._reserve -= moved
            self._capital = np.logaddexp(self._capital, np.log(moved * self._weight))
        scale = _log_scale(asked, active_asked, total, self._logs)
        gain = failed * self._gain_per_failure - (scale[self._odds] - scale[self._null])
        self._capital = self._capital + np.minimum(gain, self._most)

    @property
    def capital(self) -> float:
        return _exp(np.logaddexp.reduce(self._capital)) + self._reserve


class RateEvidence:
    """Against "the candidate's share of failures is at least `rate`", whatever the active release does."""

    def __init__(self, rate: float) -> None:
        self._rate = min(rate, 1.0)
        self._bets = self._rate * np.array([0.0, 0.1, 0.3, 0.6])
        self._capital: Floats = np.log([0.4, 0.2, 0.2, 0.2])

    def look(self, failed: int, asked: int) -> None:
        gain = xlogy(failed, self._bets / self._rate)
        if asked > failed:  # at a rate of 1, one success refutes the hypothesis
            least = np.finfo(np.float64).tiny
            gain = gain + (asked - failed) * (np.log1p(-self._bets) - math.log(max(1.0 - self._rate, least)))
        self._capital = self._capital + gain

    @property
    def capital(self) -> float:
        return _exp(np.logaddexp.reduce(self._capital))


def mean(capitals: Sequence[float]) -> float:
    return math.fsum(capitals) / len(capitals)


def _log_scale(asked: int, active_asked: int, total: int, log_odds: Floats) -> Floats:
    """log Σ_x C(asked, x)·C(active_asked, total − x)·odds^x, what makes the distribution sum to 1.

    In logarithms, since scipy.stats.nchypergeom_fisher's probabilities become 0 where the evidence is best.
    """
    x = np.arange(max(0, total - active_asked), min(asked, total) + 1, dtype=np.float64)
    ways = (
        -gammaln(x + 1)
        - gammaln(asked - x + 1)
        - gammaln(total - x + 1)
        - gammaln(active_asked - total + x + 1)
    )
    terms = log_odds[:, None] * x + ways
    highest = terms.max(axis=1)
    scale: Floats = highest + np.log(np.exp(terms - highest[:, None]).sum(axis=1))
    return scale


def _exp(log: float) -> float:
    return math.exp(min(float(log), _MOST_LOG))
