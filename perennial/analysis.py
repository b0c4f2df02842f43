"""Watch a candidate beside the active release, look by look, until there is a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from perennial import figures, parity, predictions, proof, reconcile
from perennial.canary import Canary, CanaryVerdict, Look
from perennial.errors import RolloutError
from perennial.journal import Journal
from perennial.service_state import state_in
from perennial.settings import Settings
from perennial.store import Store
from perennial.supervision import UP_STATES
from perennial.targets import Running, Target
from perennial.values import Environment, JsonObject, Release, RolloutPolicy, Value

Say = Callable[[str], None]

_LOOK_SECONDS = 2.0
_PROOF_SECONDS = 5.0
_WARM_UP_REQUESTS, _WARM_UP_SECONDS = 20, 3.0
_SAY_SECONDS = 15.0
_PAST = timedelta(hours=1)  # of the active release's predictions, to compare with

Outcome = Literal["promote", "withdraw", "insufficient evidence"]


class Evidence(Value):
    """What the comparison of a candidate with the active release came to."""

    verdict: Outcome
    reason: str
    compared: bool = True  # False where there was nothing to compare with
    seconds: float = 0.0
    measures: tuple[JsonObject, ...] = ()  # a row per measure

    @classmethod
    def nothing(cls, reason: str) -> Evidence:
        """Nothing stands in the way, and nothing was compared."""
        return cls(verdict="promote", reason=reason, compared=False)


class Watch:
    """The looks at one candidate, over all its steps. Raises RolloutError as soon as it does harm."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        target: Target,
        store: Store,
        release: Release,
        environment: Environment,
        folder: Path,
        policy: RolloutPolicy,
        say: Say,
    ) -> None:
        state = state_in(journal, release.project, environment)
        assert state.active is not None
        self._settings, self._target, self._store, self._say = settings, target, store, say
        self._release, self._environment, self._policy = release, environment, policy
        self._active_id = state.active
        self._golden = proof.golden_rows(folder)
        self._pid = self._candidate().pid
        self._warm_up()
        self._began = self._proven = self._said = time.monotonic()
        self._from = self._logged_until = _settled()
        self._before = self._counters()
        past = self._logged(self._active_id, self._from - _PAST, self._from)
        self._baseline = figures.baseline(self._before[1], past)
        self._canary = Canary(self._baseline)

    def bake(self, percent: int, last: bool) -> Evidence:
        """One step, until it has lasted as the policy says; the last one until there is a verdict."""
        policy = self._policy
        began = time.monotonic()
        requests = 0
        shadow = policy.strategy == "shadow"
        what = f"a copy of {percent} % of the requests" if shadow else f"{percent} % of the traffic"
        self._say(f"{self._release.release_id} has {what}, {self._active_id} answers the rest")
        while True:
            time.sleep(min(_LOOK_SECONDS, max(policy.bake_seconds / 5, 0.2)))
            look = self._look()
            requests += look.candidate.requests
            verdict = self._canary.look(look)
            self._check(verdict)
            lasted = time.monotonic() - began
            baked = lasted >= policy.bake_seconds and requests >= policy.bake_requests
            if baked and (not last or verdict.verdict == "promote"):
                self._prove(self._candidate())  # it may have turned since the last time
                reason = verdict.reason if last else f"{requests} requests with {what}"
                return self._evidence("promote", reason, verdict)
            if lasted > policy.bake_seconds + policy.max_wait_seconds:
                reason = f"{requests} requests in {lasted:.0f} s with {what}: {verdict.reason}"
                return self._evidence("insufficient evidence", reason, verdict)
            if time.monotonic() - self._said > _SAY_SECONDS:
                self._said = time.monotonic()
                self._say(f"{requests} requests with {what}: {verdict.reason}")

    def _evidence(self, verdict: Outcome, reason: str, of: CanaryVerdict) -> Evidence:
        measures = [row.model_dump(mode="json") for row in of.evidence]
        if self._policy.strategy == "shadow":
            measures.append(self._shadow_row())
        return Evidence(
            verdict=verdict,
            reason=reason,
            seconds=round(time.monotonic() - self._began, 1),
            measures=tuple(measures),
        )

    def _shadow_row(self) -> JsonObject:
        """How far the shadow's answers were from those that users got."""
        until = _settled()
        active, shadow = (
            self._logged(release_id, self._from, until)
            for release_id in (self._active_id, self._release.release_id)
        )
        found = predictions.shadow_differences(active, shadow, parity.tolerance_of(self._release))
        return {"name": "answers beside the active release's", **found._asdict()}

    def _warm_up(self) -> None:
        """A process is slow at its first requests, in each of its workers: users need not make them."""
        until = time.monotonic() + _WARM_UP_SECONDS
        for _ in range(_WARM_UP_REQUESTS):
            proof.check_parity(self._candidate().endpoint, self._golden, self._release)
            if time.monotonic() > until:
                return

    def _check(self, verdict: CanaryVerdict) -> None:
        if verdict.verdict == "withdraw":
            raise self._harmful(verdict.reason)
        candidate = self._candidate()
        if candidate.state not in UP_STATES or candidate.pid != self._pid:
            raise self._harmful(f"its process died ({candidate.state.lower()})")
        if time.monotonic() - self._proven > _PROOF_SECONDS:
            self._prove(candidate)

    def _prove(self, candidate: Running) -> None:
        self._proven = time.monotonic()
        try:
            proof.check_parity(candidate.endpoint, self._golden, self._release)
        except RolloutError as error:
            raise self._harmful(error.found) from error

    def _harmful(self, reason: str) -> RolloutError:
        return RolloutError(
            f"{self._release.release_id} was withdrawn from {self._environment}: {reason}",
            f"no harm beside {self._active_id}, which serves on",
            f"see {self._settings.root / 'logs'}, mend the model, commit",
        )

    def _candidate(self) -> Running:
        found = reconcile.running(self._target, self._environment).get(self._release.release_id)
        if found is None:
            raise self._harmful("it does not run any more")
        return found

    def _counters(self) -> tuple[figures.Counters | None, figures.Counters | None]:
        """Of the candidate and of the active release."""
        present = reconcile.running(self._target, self._environment)
        found = (present.get(release_id) for release_id in (self._release.release_id, self._active_id))
        candidate, active = (
            figures.read(self._settings, self._environment, self._release.project, instance.endpoint)
            if instance
            else None
            for instance in found
        )
        return candidate, active

    def _look(self) -> Look:
        now, until = self._counters(), _settled()
        logged = [
            self._logged(release_id, self._logged_until, until) if self._baseline.bins else None
            for release_id in (self._release.release_id, self._active_id)
        ]
        look = figures.look(self._before, now, self._baseline, logged)
        self._before, self._logged_until = now, until
        return look

    def _logged(self, release_id: str, since: datetime, until: datetime) -> predictions.Recent:
        project = self._release.project
        spool = spool_of(self._settings, project, self._environment)
        return predictions.recent(spool, self._store, self._environment, project, release_id, since, until)


def spool_of(settings: Settings, project: str, environment: Environment) -> Path:
    """Where a service's predictions wait for the store."""
    return settings.root / "spool" / environment / project


def counted(
    settings: Settings, target: Target, project: str, environment: Environment, release_id: str | None
) -> JsonObject:
    """A release's requests and errors so far, for the payload of a promotion."""
    instance = reconcile.running(target, environment).get(release_id) if release_id else None
    found = figures.read(settings, environment, project, instance.endpoint) if instance else None
    return {"requests": found.requests, "errors": found.errors} if found else {}


def _settled() -> datetime:
    """Up to when everything that was answered is in the log by now."""
    return datetime.now(UTC) - timedelta(seconds=1)
