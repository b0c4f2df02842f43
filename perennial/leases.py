"""Who may change a service: one rollout at a time holds its lease, and keeps it as long as it lives."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from perennial.errors import InstallationError, RolloutError
from perennial.journal import Holder, Journal, Lease, LeaseHeld, started_at
from perennial.values import Environment

LEASE_SECONDS = 30.0
_RENEW_SECONDS = 5.0
_WAIT_SECONDS = 300.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Held:
    journal: Journal
    lease: Lease
    ended: threading.Event


_held: dict[tuple[str, str], _Held] = {}


def hold(
    journal: Journal,
    project: str,
    environment: Environment,
    what: str = "",
    wait_seconds: float | None = None,
) -> Lease:
    """The lease of a service, held by this process until `let_go`, and renewed meanwhile.

    Waits for a rollout under way. Raises RolloutError naming who holds it when that takes too long. A process
    of this machine that died holds nothing; one of another machine loses it within half a minute.
    """
    held = _held.get((project, environment))
    if held is not None:
        return held.lease
    wait = _WAIT_SECONDS if wait_seconds is None else wait_seconds
    deadline = time.monotonic() + wait
    holder = myself(what or f"deploy {project} to {environment}")
    while True:
        try:
            lease = journal.acquire(project, environment, holder, LEASE_SECONDS)
        except LeaseHeld as other:
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"another rollout of {project} to {environment} has been under way for {wait:g} s: "
                    f"{other.holder}",
                    "one rollout of a service at a time",
                    f"wait for it, then prefect deployment run 'deploy/{project}'",
                ) from None
            time.sleep(_POLL_SECONDS)
        else:
            break
    held = _Held(journal, lease, threading.Event())
    _held[project, environment] = held
    threading.Thread(target=_renew, args=(held,), name=f"lease {project}", daemon=True).start()
    return lease


def let_go(project: str = "", environment: str = "") -> None:
    """Give back the lease of a service, or without one all that this process holds."""
    for key in [(project, environment)] if project else list(_held):
        held = _held.pop(key, None)
        if held is None:
            continue
        _give_back(held)


@contextmanager
def briefly(journal: Journal, project: str, environment: Environment, what: str) -> Iterator[Lease | None]:
    """The lease for the time of this block; None when somebody else has it. One already held stays held."""
    held = _held.get((project, environment))
    if held is not None:
        yield held.lease
        return
    try:
        lease = journal.acquire(project, environment, myself(what), LEASE_SECONDS)
    except LeaseHeld:
        yield None
        return
    taken = _Held(journal, lease, threading.Event())
    threading.Thread(target=_renew, args=(taken,), name=f"lease {project}", daemon=True).start()
    try:
        yield lease
    finally:
        _give_back(taken)


def myself(what: str) -> Holder:
    return Holder(host=socket.gethostname(), pid=os.getpid(), started=started_at(os.getpid()), what=what)


def _give_back(held: _Held) -> None:
    held.ended.set()
    with suppress(InstallationError):  # the database is away: the lease expires by itself
        held.journal.give_back(held.lease)


def _renew(held: _Held) -> None:
    while not held.ended.wait(_RENEW_SECONDS):
        try:
            held.journal.renew(held.lease, LEASE_SECONDS)
        except RolloutError:
            return  # lost, while this process slept: its next decision is refused
        except InstallationError:
            continue
