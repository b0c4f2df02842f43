"""One installation for all tests of flows: the real server, worker, MLflow, Envoy, storefront and supervisor.

A test makes a project of its own name, so that nothing in journal, index or registry leaks between tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.factories import ProjectRepository, make_project
from tests.flows.house import House, installed, within
from tests.installations import own_settings

MakeProject = Callable[..., ProjectRepository]


@pytest.fixture(scope="session")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with installed(own_settings(tmp_path_factory.mktemp("house") / "home")) as house:
        yield house


@pytest.fixture(scope="module")
def house(_running: House) -> Iterator[House]:
    with within(_running):
        yield _running


@pytest.fixture(scope="module")
def enabled(house: House, tmp_path_factory: pytest.TempPathFactory) -> MakeProject:
    """`enabled("name", **options)`: a toy project of that name, in a repository, enabled."""

    def make(name: str, **options: Any) -> ProjectRepository:
        folder: Path = tmp_path_factory.mktemp("repositories") / name
        repository = make_project(folder, name=name, **options)
        house.enable(name, repository.url, options.get("subdirectory", ""))
        return repository

    return make


@pytest.fixture(scope="session")
def registered(_running: House) -> None:
    """The deployments of prefect.yaml. They name a project of their own: a test passes another one."""
    done = _running.command("-m", "deployments.register")
    assert done.returncode == 0, done.stderr
    with _running.client() as client:  # it would mend what a test has broken on purpose
        tend = client.read_deployment_by_name("tend/installation")
        client.update_deployment_schedule(tend.id, tend.schedules[0].id, active=False)
