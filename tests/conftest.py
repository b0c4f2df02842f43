"""Servers that all tests share, started when the first one asks, and what contract suites run against."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial.store import Store, open_store
from tests.services import POSTGRES_INSTALL, Postgres, S3Server, postgres, postgres_binaries, seaweedfs


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "server: needs SeaweedFS or Postgres (set by itself)")


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        kinds = {value for value in parameters if isinstance(value, str)}
        if {"s3", "postgres"} & kinds or {"s3_server", "postgres_server"} & set(item.fixturenames):
            item.add_marker("server")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    binaries = postgres_binaries()
    if binaries is None:
        missing = f"Postgres is not installed: {POSTGRES_INSTALL}"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with postgres(binaries) as server:
        yield server


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's own AWS configuration."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture
def directory_store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "a store").as_uri())


@pytest.fixture
def s3_store(s3_server: S3Server, no_aws: None) -> Store:
    return s3_server.open()


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store, of each kind."""
    opened: Store = request.getfixturevalue(f"{request.param}_store")
    return opened


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'journal.db'}"
    server: Postgres = request.getfixturevalue("postgres_server")
    return server.new_schema()
