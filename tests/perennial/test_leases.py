"""One rollout of a service at a time: held, renewed, lost, and refused in the write that comes too late."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from perennial import leases
from perennial.errors import InstallationError, RolloutError
from perennial.journal import Holder, Journal, Lease, LeaseHeld, open_journal
from tests.installations import ROOT
from tests.services import Postgres

ELSEWHERE = Holder(host="another-machine", pid=1, started=1, what="a deploy elsewhere")


@pytest.fixture
def journal(database_url: str) -> Iterator[Journal]:
    yield open_journal(database_url)
    leases.let_go()


def decide(journal: Journal, lease: Lease) -> int:
    return journal.decide(
        project="toy", environment="test", kind="candidate", release_id="toy-0123456789ab", lease=lease
    )


def test_a_second_holder_is_told_who_holds_it(journal: Journal) -> None:
    journal.acquire("toy", "test", ELSEWHERE, 60)
    with pytest.raises(LeaseHeld, match=r"a deploy elsewhere .process 1 on another-machine"):
        journal.acquire("toy", "test", leases.myself("mine"), 60)
    journal.acquire("toy", "production", leases.myself("mine"), 60)
    journal.acquire("other", "test", leases.myself("mine"), 60)


def test_an_expired_lease_is_anybodys_and_its_holder_can_decide_nothing_any_more(journal: Journal) -> None:
    lost = journal.acquire("toy", "test", ELSEWHERE, 0.0)
    mine = journal.acquire("toy", "test", leases.myself("mine"), 60)
    decisions = journal.decisions("toy")
    with pytest.raises(RolloutError, match=r"has lost its lease to mine"):
        decide(journal, lost)
    with pytest.raises(RolloutError, match=r"has lost its lease to mine"):
        journal.renew(lost, 60)
    assert journal.decisions("toy") == decisions
    assert decide(journal, mine)
    journal.give_back(lost)  # which must not take it from its holder
    assert decide(journal, mine)


def test_a_lease_given_back_is_free_and_of_no_use(journal: Journal) -> None:
    mine = leases.hold(journal, "toy", "test")
    assert journal.holder("toy", "test", "this") is not None
    leases.let_go("toy", "test")
    assert journal.holder("toy", "test", "this") is None
    with pytest.raises(RolloutError, match="nobody any more"):
        decide(journal, mine)


def test_a_held_lease_is_renewed_while_its_process_lives(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.8)
    monkeypatch.setattr(leases, "_RENEW_SECONDS", 0.1)
    leases.hold(journal, "toy", "test")
    time.sleep(1.5)
    with pytest.raises(LeaseHeld):
        journal.acquire("toy", "test", ELSEWHERE, 60)


def test_a_killed_process_of_this_machine_holds_nothing(journal: Journal, database_url: str) -> None:
    code = (
        "import time\nfrom perennial import leases\nfrom perennial.journal import open_journal\n"
        f"leases.hold(open_journal({database_url!r}), 'toy', 'test')\n"
        "print('held', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RolloutError, match=f"process {other.pid} on"):
            leases.hold(journal, "toy", "test", wait_seconds=0.3)
        other.kill()
    assert leases.hold(journal, "toy", "test", wait_seconds=0.3)


def test_of_many_that_want_a_free_lease_one_gets_it(journal: Journal) -> None:
    together, got = threading.Barrier(8), list[Lease]()

    def want() -> None:
        together.wait()
        with suppress(LeaseHeld):
            got.append(journal.acquire("toy", "test", leases.myself("mine"), 60))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_a_database_that_is_away_for_a_while_is_waited_for_and_the_lease_is_kept(
    postgres_server: Postgres,
) -> None:
    journal = open_journal(postgres_server.new_schema(), patience_seconds=30.0)
    lease = leases.hold(journal, "toy", "test")
    postgres_server.kill()
    with ThreadPoolExecutor(1) as pool:
        decided = pool.submit(decide, journal, lease)
        time.sleep(2.0)
        assert not decided.done(), "it waits"
        postgres_server.start()
        assert decided.result(30) == journal.decisions("toy")[-1].position
    leases.let_go()


def test_a_database_that_stays_away_is_an_error_that_says_so(postgres_server: Postgres) -> None:
    journal = open_journal(postgres_server.new_schema(), patience_seconds=1.0)
    postgres_server.kill()
    try:
        with pytest.raises(InstallationError, match="cannot be used") as away:
            journal.decisions("toy")
        assert away.value.transient and "pg_isready" in away.value.next_command
    finally:
        postgres_server.start()
