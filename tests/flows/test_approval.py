"""Production waits for a click, whatever dies meanwhile; nothing but the journal's row of it opens it."""

from __future__ import annotations

import json
import os
import signal
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.error import HTTPError
from uuid import UUID

import pytest

from perennial import approvals
from perennial.journal import Decision
from perennial.orphans import crash_orphans
from perennial.probe import Answer, probe
from perennial.supervision import Supervisor
from perennial.values import Release
from tests.flows.conftest import MakeProject
from tests.flows.house import House, until
from tests.flows.test_deploy import QUICK_MODEL

DEPLOYMENT = "deploy/flights"
AT_ONCE = """
[tool.perennial.rollout.production]
strategy = "all-at-once"
probation_seconds = 0
"""
RELEASE_TAG = "perennial.release_id"
PAUSED = {"type": "PAUSED", "name": "Suspended"}


@pytest.fixture(scope="module")
def release(house: House, enabled: MakeProject, registered: None) -> Release:
    project = enabled("gated")
    config = project.read("pyproject.toml") + AT_ONCE
    project.commit("be quick", {"src/gated/model.py": QUICK_MODEL, "pyproject.toml": config})
    built = house.build("gated")
    assert built.kind == "COMPLETED", built.message
    found: Release = built.result
    return found


def another(house: House, release: Release, letter: str, hours: float = 72.0) -> Release:
    """The same model under another id, and with an approval that stays open for so long."""
    production = release.rollout.production.model_copy(update={"approval_hours": hours})
    changes = {
        "release_id": f"gated-{letter * 12}",
        "rollout": release.rollout.model_copy(update={"production": production}),
    }
    found = house.journal.record_release(release.model_copy(update=changes))
    (version,) = [v for v in house.model_versions("gated") if v.tags[RELEASE_TAG] == release.release_id]
    tags = version.tags | {RELEASE_TAG: found.release_id}
    house.mlflow().create_model_version("gated", version.source, version.run_id, tags=tags)
    return found


def ask(house: House, release: Release) -> UUID:
    """A deploy to production, by the worker, once it waits."""
    run = house.start(DEPLOYMENT, project="gated", environment="production", release_id=release.release_id)
    waits(house, run)
    return run


def waits(house: House, run: UUID, requests: int = 1) -> None:
    """Until the run waits for the answer to its newest request."""

    def suspended() -> bool:
        state = house.flow_run(run).state
        assert state is not None and not state.is_final(), house.read(run)
        asked = of(house, run)
        if state.name != "Suspended" or len(asked) != requests:
            return False
        # The form comes a moment after the state.
        form = f"flow_runs/{run}/input/suspended-{asked[-1].payload['key']}-schema"
        return get(house, form) is not None

    until(suspended, 90, f"the suspension of {run}")


def of(house: House, run: UUID) -> list[Decision]:
    """What a run has asked."""
    asked = house.journal.decisions("gated", "production", ("requested",))
    return [decision for decision in asked if decision.payload["run"] == str(run)]


def kinds(house: House, release: Release) -> list[str]:
    """What was decided of a release in production."""
    decided = house.journal.decisions("gated", "production")
    # How a rollout goes its way is the business of others.
    return [d.kind for d in decided if d.release_id == release.release_id and d.kind != "step"]


def get(house: House, path: str, body: object = None) -> Any:
    """What Prefect's API answers to a GET, or to a POST of `body`; None when it refuses."""
    url = f"{house.settings.prefect_url}/api/{path}"
    data = None if body is None else json.dumps(body).encode()

    def answer() -> Answer | None:
        found = probe(url, data=data, headers={"content-type": "application/json"}, timeout_seconds=30)
        return found if found is not None and found.status < 500 else None  # its database may be busy

    answered = until(answer, 60, url)
    assert answered is not None
    return answered.json() if answered.status < 300 else None


def resume(house: House, run: UUID, **form: str) -> str:
    """What the Resume form of the Prefect UI sends; returns whether the server took it."""
    status: str = get(house, f"flow_runs/{run}/resume", {"run_input": form})["status"]
    return status


def test_a_run_waits_for_a_name_and_a_yes_through_the_death_of_server_and_worker(
    house: House, release: Release
) -> None:
    run = ask(house, release)
    assert kinds(house, release) == ["requested"]
    assert of(house, run)[0].payload["digest"] == release.digest()
    page = house.artifact("approval-gated")
    assert f"{release.release_id} for production?" in page and "Nothing serves there yet" in page
    with house.client() as client:
        limit = client.read_deployment_by_name(DEPLOYMENT).global_concurrency_limit
    assert limit is not None and limit.active_slots == 0, "who waits holds up no other deploy"
    assert crash_orphans(house.settings, datetime.now(UTC) + timedelta(hours=1)) == []

    for form in (
        {},
        {"decision": "approve"},
        {"decision": "approve", "reviewer": ""},
        {"decision": "approve", "reviewer": " \t"},
        {"decision": "perhaps", "reviewer": "Ada"},
        {"reviewer": "Ada"},
    ):
        assert resume(house, run, **form) == "REJECT", form
    with pytest.raises(HTTPError):
        house.ask("gated", "production")

    running = Supervisor(house.settings).processes()
    for part in ("prefect-server", "prefect-worker"):
        os.killpg(os.getpgid(running[part].pid), signal.SIGKILL)
    health = f"{house.settings.prefect_url}/api/health"
    until(lambda: (answer := probe(health)) is not None and answer.status == 200, 90, "the server")
    waits(house, run)

    assert resume(house, run, decision="approve", reviewer=" Ada ", note="looks right") == "ACCEPT"
    ended = house.wait(run)
    assert (ended.kind, ended.name) == ("COMPLETED", "Completed"), ended.message
    assert house.ask("gated", "production")["release_id"] == release.release_id
    assert kinds(house, release) == ["requested", "approved", "candidate", "promoted"]
    approval = house.journal.approval(release, "production")
    assert approval is not None
    said = {"reviewer": "Ada", "note": "looks right", "run": str(run), "digest": release.digest()}
    assert approval.payload.items() >= said.items()


def test_a_declined_release_stays_out_and_a_retry_asks_again(house: House, release: Release) -> None:
    other = another(house, release, "b")
    run = ask(house, other)
    assert f"`{release.release_id}` serves there now" in house.artifact("approval-gated")
    assert resume(house, run, decision="decline", reviewer="Grace", note="not on a Friday") == "ACCEPT"
    ended = house.wait(run)
    assert (ended.kind, ended.name) == ("FAILED", "Declined")
    assert ended.explains("Grace declined gated-bbbbbbbbbbbb for production: not on a Friday")
    assert kinds(house, other) == ["requested", "declined"]

    house.retry(run)
    waits(house, run, requests=2)
    assert house.ask("gated", "production")["release_id"] == release.release_id
    said = house.command("-m", "perennial", "approve", other.release_id, "--reviewer", "Ada")
    assert said.returncode == 0, said.stderr
    assert (
        "says Ada" in said.stdout
        and f"resumed the run that waits: {house.settings.prefect_url}" in said.stdout
    )
    ended = house.wait(run, run_count=2)
    assert (ended.kind, ended.name) == ("COMPLETED", "Completed"), ended.message
    assert house.ask("gated", "production")["release_id"] == other.release_id
    decided = ["requested", "declined", "requested", "approved", "candidate", "promoted"]
    assert kinds(house, other) == decided


def test_neither_a_rescheduled_run_nor_a_late_answer_opens_production(house: House, release: Release) -> None:
    before = house.journal.active("gated", "production")
    late = another(house, release, "c", hours=0.001)
    run = ask(house, late)
    scheduled = {"type": "SCHEDULED", "name": "Scheduled"}
    assert get(house, f"flow_runs/{run}/set_state", {"state": scheduled})["status"] == "ACCEPT"
    waits(house, run, requests=2)

    asked = approvals.last_request(house.journal, "gated", "production", str(run))
    assert asked is not None
    until(lambda: datetime.now(UTC) > asked.expires_at, 30, "the end of the request")
    assert resume(house, run, decision="approve", reviewer="Ada") == "ACCEPT"
    ended = house.wait(run)
    assert (ended.kind, ended.name) == ("FAILED", "Failed")
    assert ended.explains(f"{late.release_id} for production was open until", f"flow-run retry {run}")

    get(house, f"flow_runs/{run}/set_state", {"state": PAUSED, "force": True})  # as if it still waited
    (said,) = approvals.end_expired(house.settings, house.journal)
    assert late.release_id in said
    ended = house.read(run)
    assert (ended.kind, ended.name) == ("FAILED", "Expired")
    assert ended.explains("was open until", "Next:")
    assert approvals.end_expired(house.settings, house.journal) == []
    assert kinds(house, late) == ["requested", "requested"]
    assert house.journal.active("gated", "production") == before
