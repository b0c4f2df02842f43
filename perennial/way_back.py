"""Where a rollback leads, from what the journal says. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from perennial.journal import Decision
from perennial.values import ReleaseId


def earlier(promotions: Iterable[Decision]) -> list[ReleaseId]:
    """What served before the active release, the nearest first, without what was rolled back from."""
    path: list[ReleaseId] = []
    for promoted in promotions:
        release_id = promoted.release_id
        assert release_id is not None
        if "rollback_of" in promoted.payload and release_id in path:
            del path[path.index(release_id) :]  # what came after it is what somebody wanted to be rid of
        path = [other for other in path if other != release_id] + [release_id]
    return path[-2::-1]
