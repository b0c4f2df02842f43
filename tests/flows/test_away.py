"""When a part of the installation is away, whoever started something reads what to run; no traceback."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from tests.flows.conftest import MakeProject
from tests.flows.house import House, within
from tests.installations import own_settings


def test_registering_without_a_server_says_what_to_run(house: House, tmp_path: Path) -> None:
    away = House(own_settings(tmp_path / "home"))
    done = away.command("-m", "deployments.register")
    assert done.returncode == 1
    assert f"the Prefect server does not answer at {away.settings.prefect_url}" in done.stderr
    assert "Next: make up" in done.stderr and "Traceback" not in done.stderr


def test_the_demo_names_who_holds_a_port_and_what_to_run(house: House, tmp_path: Path) -> None:
    away = House(own_settings(tmp_path / "home"))
    with socket.create_server(("127.0.0.1", away.settings.mlflow_port)):
        done = away.command("-m", "deployments.demo")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert f"port {away.settings.mlflow_port} for mlflow is taken by" in said
    assert "PERENNIAL_MLFLOW_PORT=… make up" in said and "Traceback" not in said


def test_the_demo_refuses_a_home_of_another_version(house: House, tmp_path: Path) -> None:
    away = House(own_settings(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "version").write_text("0\n")
    done = away.command("-m", "deployments.demo")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "was laid out by version 0 of Perennial" in said
    assert "Next: make clean" in said and "Traceback" not in said


def test_a_build_without_mlflow_ends_before_a_release_exists_and_can_be_retried(
    house: House, enabled: MakeProject
) -> None:
    enabled("unregistered")
    nobody = own_settings(house.settings.root).mlflow_port
    away = House(house.settings.model_copy(update={"mlflow_port": nobody}))
    with within(away):
        run = away.build("unregistered")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains(f"MLflow does not answer at {away.settings.mlflow_url}", "Next: make up")
    assert run.stopped_in("register_model")
    assert house.journal.releases("unregistered") == []
    assert house.model_versions("unregistered") == []
    refused = house.deploy("unregistered")
    assert refused.explains("unregistered has no accepted release")
    again = house.build("unregistered")
    assert again.kind == "COMPLETED", again.message

    # Its supervisord is away: another home, with the same journal and store.
    elsewhere = house.settings.model_copy(
        update={
            "home": house.settings.root.parent / "elsewhere",
            "database_url": house.settings.database,
            "store_url": house.settings.store,
        }
    )
    with within(House(elsewhere)):
        _link_environments(house, elsewhere.root)
        stopped = House(elsewhere).deploy("unregistered")
    assert (stopped.kind, stopped.name) == ("FAILED", "Failed")
    assert stopped.explains(f"the installation in {elsewhere.root} is not running", "Next: make up")
    assert stopped.stopped_in("start_candidate")
    assert house.journal.active("unregistered", "test") is None
    assert re.search(r"\bmake up\b", stopped.message)


def _link_environments(house: House, home: Path) -> None:
    """Spare the second home ten seconds of making the same environment."""
    home.mkdir(exist_ok=True)
    (home / "environments").symlink_to(house.settings.root / "environments")
