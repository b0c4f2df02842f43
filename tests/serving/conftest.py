"""Releases that the trainer made, and one server that many tests ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.serving.toys import (
    COMPILABLE,
    MANIFEST,
    MOODY,
    Service,
    Toy,
    compiled_release,
    result_of,
    run_trainer,
    serve,
    snapshot_request,
    train_request,
    write_package,
)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    source = write_package(folder / "site")
    snapshot = snapshot_request(source, folder)
    done = run_trainer(snapshot, folder)
    assert done.returncode == 0, done.stderr
    train = train_request(source, Path(snapshot.parquet_path), folder, output=str(folder))
    done = run_trainer(train, folder)
    assert done.returncode == 0, done.stderr
    (folder / "manifest.json").write_bytes(msgspec.json.encode(MANIFEST))
    return Toy(source, Path(snapshot.parquet_path), folder, folder, result_of(train.result_path), done.stdout)


@pytest.fixture(scope="session")
def compiled(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A release of the same data whose model is served compiled."""
    return compiled_release(toy, tmp_path_factory.mktemp("compiled"), COMPILABLE)


@pytest.fixture(scope="session")
def moody(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A release that takes `distance` milliseconds for fewer than ten rows, and fails at 666 and 777."""
    folder = tmp_path_factory.mktemp("moody")
    source = write_package(folder / "site", MOODY)
    features = ("distance",)
    train = train_request(source, toy.snapshot, folder, output=str(folder), features=features, golden_rows=0)
    done = run_trainer(train, folder)
    assert done.returncode == 0, done.stderr
    (folder / "manifest.json").write_bytes(msgspec.json.encode(MANIFEST))
    return Toy(source, toy.snapshot, folder, folder, result_of(train.result_path), done.stdout)


@pytest.fixture(scope="session")
def service(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One server that many tests ask; none of them stops it."""
    with serve(
        toy.with_limits(tmp_path_factory.mktemp("release"), max_rows=50, max_body_bytes=20_000),
        tmp_path_factory.mktemp("service"),
    ) as service:
        yield service


@pytest.fixture(scope="session")
def compiled_service(compiled: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The same, of a compiled model."""
    with serve(
        compiled.with_limits(tmp_path_factory.mktemp("release"), max_rows=50, max_body_bytes=20_000),
        tmp_path_factory.mktemp("service"),
    ) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client as client:
        yield client
