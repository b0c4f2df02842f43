"""All three databases on Postgres, by URL: Prefect's, MLflow's and the journal's."""

from __future__ import annotations

from pathlib import Path

from tests.factories import make_project
from tests.flows.house import installed, within
from tests.installations import own_settings
from tests.services import Postgres


def test_a_release_is_built_deployed_and_retrained_with_every_database_on_postgres(
    tmp_path: Path, postgres_server: Postgres
) -> None:
    for name in ("prefect", "mlflow", "journal"):
        postgres_server.execute(f"CREATE DATABASE {name}")
    here = own_settings(
        tmp_path / "home",
        database_url=postgres_server.url("journal", password="hush-journal"),
        mlflow_database_url=postgres_server.url("mlflow", password="hush-mlflow"),
        prefect_database_url=postgres_server.url("prefect", password="hush-prefect").replace(
            "psycopg", "asyncpg"
        ),
    )
    project = make_project(tmp_path / "relational", name="relational")
    with installed(here) as house, within(house):
        house.enable("relational", project.url)
        built = house.build("relational")
        assert built.kind == "COMPLETED", built.message
        deployed = house.deploy("relational")
        assert deployed.kind == "COMPLETED", deployed.message
        retrained = house.retrain("relational")
        assert retrained.kind == "COMPLETED", retrained.message
        active = house.journal.active("relational", "test")
        assert house.ask("relational")["release_id"] == active
        assert house.journal.champion("relational") == active
        for run in (built, deployed, retrained):
            assert "hush-" not in run.message + run.log
    assert not list(here.root.glob("**/*.db")), "a database on this machine's disk"
    # Processes are listed for everybody on the machine; what supervisord reads is its owner's alone.
    for log in (here.root / "logs").iterdir():
        assert "hush-" not in log.read_text(errors="replace"), log
