"""What two releases are compared on: one kind of outcome each, its counts and the evidence they make."""

from __future__ import annotations

from collections.abc import Sequence

from perennial.evidence import Bet, OddsEvidence, mean
from perennial.values import Value


class Measure(Value):
    """A row of the evidence: the shares of both arms, and the evidence beside what it takes."""

    name: str
    candidate: float | None
    active: float | None
    evidence: float
    threshold: float
    requests: int  # of the candidate


class Compared:
    """One kind of outcome in both arms, and the evidence that the candidate has it too often."""

    def __init__(self, name: str, bets: Sequence[Bet], most_per_look: float) -> None:
        self.name = name
        self._evidence = OddsEvidence(bets, most_per_look=most_per_look)
        self._counts = (0, 0, 0, 0)

    def look(self, failed: int, asked: int, active_failed: int, active_asked: int) -> None:
        now = (failed, asked, active_failed, active_asked)
        self._evidence.look(*now)
        self._counts = tuple(a + b for a, b in zip(self._counts, now, strict=True))  # type: ignore[assignment]

    @property
    def capital(self) -> float:
        return self._evidence.capital

    @property
    def asked(self) -> tuple[int, int]:
        return self._counts[1], self._counts[3]

    @property
    def told(self) -> str:
        failed, asked, active_failed, active_asked = self._counts
        return (
            f"{self.name}: {failed} of {asked} requests{_share_of(failed, asked)}, in the active release "
            f"{active_failed} of {active_asked}{_share_of(active_failed, active_asked)}"
        )

    def row(self, evidence: float, threshold: float) -> Measure:
        failed, asked, active_failed, active_asked = self._counts
        return Measure(
            name=self.name,
            candidate=failed / asked if asked else None,
            active=active_failed / active_asked if active_asked else None,
            evidence=evidence,
            threshold=threshold,
            requests=asked,
        )


class Group:
    """What is compared in several parts, such as latency at several thresholds: the evidence is their mean.

    `share`: the part of what may be lost on good candidates that this group may lose.
    """

    def __init__(self, name: str, parts: Sequence[Compared], share: float) -> None:
        self.name = name
        self.parts = tuple(parts)
        self._share = share

    @property
    def capital(self) -> float:
        """The group's part of the capital of all."""
        return self._share * mean([part.capital for part in self.parts])

    @property
    def strongest(self) -> Compared:
        return max(self.parts, key=lambda part: part.capital)

    @property
    def is_measured(self) -> bool:
        """Whether both releases have been asked, in every part."""
        return all(all(part.asked) for part in self.parts)

    def row(self, enough: float) -> Measure:
        """`enough`: the capital of all at which a candidate is withdrawn."""
        return self.strongest.row(self.capital / self._share, enough / self._share)


def _share_of(part: int, whole: int) -> str:
    return f" ({part / whole:.2%})" if whole else ""
