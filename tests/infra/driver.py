"""What deploys in the tests of accidents: it can be stopped at each write to the journal, and killed.

    python -m tests.infra.driver

Reads an order, a JSON object per line: `act` (deploy, reconcile), `settings`, `release` (its id) and
`stop` ([number of the write from 1, "before" or "after"], or null). Each order is carried out by a process of
its own, forked with everything imported. Prints, a JSON list per line: ["began", pid], at the stop
["stopped", kind] (it goes on after the next line of input), ["wrote", [kinds]] and ["ended", outcome] or
["failed", reason] from the process, and when it is gone ["gone"].
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from perennial import leases, releases, rollout
from perennial.errors import PerennialError
from perennial.journal import Journal, open_journal
from perennial.reconcile import reconcile
from perennial.settings import Settings
from perennial.store import Store, open_store
from perennial.targets import Target, open_target
from perennial.values import Release


def deploy(settings: Settings, journal: Journal, target: Target, store: Store, release: Release) -> str:
    """What the flow `deploy` does, without Prefect: "promoted", or the verdict that stood in the way."""
    folder = releases.materialise(store, release, settings.root / "releases")
    image = target.prepare(release, folder, store)
    endpoint = rollout.start(settings, journal, target, release, "test", folder, {}, image)
    rollout.prove(settings, journal, target, release, "test", endpoint, folder)
    policy = rollout.policy_of(journal, release, "test")
    evidence = rollout.shift(settings, journal, target, release, "test", folder, store, policy, _say)
    if evidence.verdict == "promote":
        rollout.switch(settings, journal, target, release, "test")
        rollout.retire(settings, journal, target, release.project, "test")
    leases.let_go()
    return "promoted" if evidence.verdict == "promote" else evidence.verdict


def main() -> None:
    with os.fdopen(0, "rb", buffering=0) as orders:  # a forked process reads from it too
        while line := orders.readline():
            pid = os.fork()
            if pid == 0:
                _carry_out(json.loads(line))
            _tell("began", pid)
            os.waitpid(pid, 0)
            _tell("gone")


def _carry_out(order: dict[str, Any]) -> None:
    wrote: list[str] = []
    try:
        _stop_at(order["stop"], wrote)
        outcome = _do(order)
        _tell("wrote", wrote)
        _tell("ended", outcome)
    except PerennialError as error:
        _tell("wrote", wrote)
        _tell("failed", str(error))
    finally:
        os._exit(0)


def _do(order: dict[str, Any]) -> str:
    settings = Settings.model_validate(order["settings"])
    journal, target = open_journal(settings.database), open_target(settings)
    if order["act"] == "reconcile":
        return "; ".join(reconcile(settings, journal, target))
    release = journal.release(order["release"])
    assert release is not None
    return deploy(settings, journal, target, open_store(settings.store), release)


def _stop_at(stop: tuple[int, str] | None, wrote: list[str]) -> None:
    """Wait before, or after, a write to the journal until somebody says go."""
    really = Journal.decide

    def decide(journal: Journal, **decision: Any) -> int:
        wrote.append(decision["kind"])
        if stop and (len(wrote), "before") == tuple(stop):
            _wait(decision["kind"])
        position = really(journal, **decision)
        if stop and (len(wrote), "after") == tuple(stop):
            _wait(decision["kind"])
        return position

    Journal.decide = decide  # type: ignore[method-assign]


def _wait(kind: str) -> None:
    _tell("stopped", kind)
    while os.read(0, 1) not in (b"\n", b""):
        pass


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _tell(*what: Any) -> None:
    os.write(1, (json.dumps(what) + "\n").encode())


if __name__ == "__main__":
    main()
