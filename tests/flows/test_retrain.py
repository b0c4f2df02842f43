"""Retraining: the last released commit on a new day's data, in front of users only if it passes its gates."""

from __future__ import annotations

import json
from datetime import date
from typing import NamedTuple

import pytest

from perennial.values import Release
from tests.factories import ProjectRepository
from tests.flows.conftest import MakeProject
from tests.flows.house import House

SECOND_DAY = date(2026, 3, 2)
THIRD_DAY = date(2026, 3, 3)
LOST_DAY = date(2026, 5, 1)


class Daily(NamedTuple):
    """A project whose first release serves, and whose visitors buy at random from April on."""

    project: ProjectRepository
    release: Release


@pytest.fixture(scope="module")
def daily(house: House, enabled: MakeProject) -> Daily:
    project = enabled("daily")
    data = project.read("src/daily/data.py")
    bought = "    bought = random.random(VISITS_PER_DAY) < 1 / (1 + np.exp(-odds))\n"
    assert bought in data
    lost = f"{bought}    if day >= date(2026, 4, 1):\n        bought = random.random(VISITS_PER_DAY) < 0.5\n"
    project.commit("lose the thread in April", {"src/daily/data.py": data.replace(bought, lost)})
    built = house.build("daily")
    assert built.kind == "COMPLETED", built.message
    deployed = house.deploy("daily")
    assert deployed.kind == "COMPLETED", deployed.message
    project.change(without_model=True)  # on the branch, never released
    return Daily(project, built.result)


def test_retraining_builds_the_released_commit_on_the_new_day_and_deploys_what_passes(
    house: House, daily: Daily
) -> None:
    run = house.retrain("daily", SECOND_DAY)
    assert (run.kind, run.name) == ("COMPLETED", "Completed"), run.message
    release = house.journal.release(run.result.active)
    assert release is not None
    assert release.dataset.as_of == SECOND_DAY
    assert release.source.git_sha == daily.release.source.git_sha != daily.project.sha
    assert release.evaluation.champion is not None, "it was compared with the one that served"
    assert house.ask("daily")["release_id"] == release.release_id
    assert house.aliases("daily") == {"champion": release.release_id}

    known = {found.release_id for found in house.journal.releases("daily")}
    again = house.retrain("daily", SECOND_DAY)
    assert (again.kind, again.name) == ("COMPLETED", "AlreadyRetrained")
    assert again.explains("daily was already retrained for 2026-03-02", release.release_id)
    assert set(again.steps) == {"claim_day"}
    assert {found.release_id for found in house.journal.releases("daily")} == known


def test_what_fails_its_gates_is_rejected_and_what_serves_stays(house: House, daily: Daily) -> None:
    before = house.ask("daily")["release_id"]
    run = house.retrain("daily", LOST_DAY)
    assert (run.kind, run.name) == ("FAILED", "Rejected")
    assert run.explains("roc_auc at least 0.55: fail", "threshold 0.55")
    (rejected,) = house.journal.releases("daily", "rejected")
    assert rejected.dataset.as_of == LOST_DAY
    assert house.ask("daily")["release_id"] == before
    assert list(house.instances("daily")) == [before]


def test_a_project_without_an_accepted_release_can_not_be_retrained(
    house: House, enabled: MakeProject
) -> None:
    enabled("newborn")
    run = house.retrain("newborn")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains(
        "newborn has no accepted release to retrain", "prefect deployment run 'build/newborn'"
    )
    assert set(run.steps) == {"claim_day"}
    assert house.published_nothing("newborn")


def test_retraining_and_a_rollback_run_from_the_command_line(
    house: House, daily: Daily, registered: None
) -> None:
    """As a person types it, and on the real worker."""

    def typed(deployment: str, **parameters: str) -> None:
        given = [word for name, value in parameters.items() for word in ("-p", f"{name}={json.dumps(value)}")]
        done = house.command("-m", "prefect", "deployment", "run", deployment, *given, "--watch")
        assert done.returncode == 0, done.stdout + done.stderr

    typed("retrain/flights", project="daily", as_of=THIRD_DAY.isoformat())
    retrained = house.journal.release(house.ask("daily")["release_id"])
    assert retrained is not None and retrained.dataset.as_of == THIRD_DAY
    typed("deploy/flights", project="daily", environment="test", release_id=daily.release.release_id)
    assert house.ask("daily")["release_id"] == daily.release.release_id


def test_a_parameter_of_the_wrong_type_is_refused_before_a_run_is_made(
    house: House, registered: None
) -> None:
    done = house.command("-m", "prefect", "deployment", "run", "build/flights", "-p", 'project="Not A Name"')
    assert done.returncode != 0
    assert "project" in done.stdout + done.stderr
