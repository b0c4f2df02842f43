"""prefect.yaml declares deployments that can run, and a schedule that does not pile up."""

from __future__ import annotations

import importlib
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml

from perennial.config import read_project
from tests.factories import ROOT
from tests.flows.house import House

DECLARED: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("declared", DECLARED, ids=lambda d: str(d["entrypoint"]))
def test_the_parameters_of_a_deployment_are_those_of_its_flow(house: House, declared: dict[str, Any]) -> None:
    module, _, name = declared["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    parameters = declared["parameters"]
    assert flow.validate_parameters(parameters).items() >= parameters.items()
    for name in {"project", "no_such_parameter"} & {*parameters, "no_such_parameter"}:
        with pytest.raises(Exception, match=name):
            flow.validate_parameters(parameters | {name: "Not A Name"})


def test_each_deployment_runs_once_at_a_time_but_for_deploys_which_a_lease_orders() -> None:
    limits = {d["entrypoint"].rpartition(".")[2]: d["concurrency_limit"]["limit"] for d in DECLARED}
    assert limits == {"build": 1, "deploy": 4, "retrain": 1, "rollback": 1, "tend": 1}


def test_retraining_is_scheduled_every_day_in_a_timezone_and_late_runs_are_cancelled(house: House) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    (retrain,) = [d for d in DECLARED if d["entrypoint"] == "flows.retrain.retrain"]
    (schedule,) = retrain["schedules"]
    assert ZoneInfo(schedule["timezone"]).key == "America/New_York"
    declared = read_project(ROOT / "examples" / "flights").config.schedule
    assert (schedule["cron"], schedule["timezone"]) == (declared.retrain, declared.timezone)
    assert CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    assert schedule["cron"].split()[2:] == ["*", "*", "*"]
    assert retrain["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def test_registering_twice_changes_nothing(house: House, registered: None) -> None:
    def known() -> dict[str, Any]:
        with house.client() as client:
            names = [f"{d['entrypoint'].rpartition('.')[2]}/{d['name']}" for d in DECLARED]
            found = {name: client.read_deployment_by_name(name) for name in names}
        return {
            name: (d.id, d.parameters, [(s.schedule, s.active) for s in d.schedules])
            for name, d in found.items()
        }

    before = known()
    done = house.command("-m", "deployments.register")
    assert done.returncode == 0, done.stderr
    assert known() == before
