"""What runs every five minutes mends what was left half done and says what it did, or says one line."""

from __future__ import annotations

import os
import time

from flows.tend import tend
from perennial import leases, rollout
from perennial.targets import ProcessTarget
from tests.flows.house import House
from tests.installations import instance
from tests.releases import a_release

STEPS = {"reconcile_services", "check_probation", "end_expired", "remove_leftovers", "report_changes"}


def test_what_was_left_half_done_is_mended_and_stands_in_a_table(house: House) -> None:
    here, journal, target = house.settings, house.journal, ProcessTarget(house.settings)
    journal.enable_project("tended", "/repository")
    active, left = (a_release(release_id=f"tended-{letter * 12}", project="tended") for letter in "ab")
    for release, letter in ((active, "a"), (left, "b")):
        journal.record_release(release)
        target.wait_ready(target.start(instance(here, letter, project="tended")), 20.0)
    rollout.switch(here, journal, target, active, "test")
    journal.decide(project="tended", environment="test", kind="candidate", release_id=left.release_id)
    leases.let_go()  # as if the process that rolled it out had died
    checkout = here.root / "checkouts" / "tended" / f"{'0' * 40}-01234567"
    checkout.mkdir(parents=True)
    os.utime(checkout, times=(time.time() - 2 * 86_400,) * 2)

    run = house.ended(tend(return_state=True))
    assert (run.kind, run.name) == ("COMPLETED", "Completed"), run.message
    assert run.steps == dict.fromkeys(STEPS, "Completed")
    said = f"withdrew {left.release_id} from test: its rollout ended without a decision"
    removed = f"checkouts/tended/{checkout.name}"
    assert said in run.log and f"stopped svc-test-{left.release_id}" in run.log and removed in run.log
    table = house.artifact("tend")
    assert said in table and removed in table
    assert house.instances("tended") == {active.release_id: "RUNNING"} and not checkout.exists()

    results = here.root / "prefect" / "results"
    before = set(results.rglob("*"))
    again = house.ended(tend(return_state=True))
    assert "all is as the journal says, and nothing is left over" in again.log
    assert set(results.rglob("*")) == before, "a run every five minutes leaves nothing behind"
    target.stop(f"svc-test-{active.release_id}", 1.0)
