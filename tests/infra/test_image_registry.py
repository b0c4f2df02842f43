"""Where the image of a release is found: in the engine, or in a real registry, and always by digest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from perennial import engine as engines
from perennial import image_context, image_registry, images
from perennial.errors import InstallationError, ReleaseError
from perennial.probe import probe
from perennial.settings import Settings
from perennial.store import Store
from perennial.values import Release
from tests import services
from tests.engines import engine_or_skip
from tests.releases import a_release

INSTALL = "apt-get install -y --no-install-recommends docker-registry"
NAME = "perennial/toy:toy-0123456789ab"

Registry = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with engine_or_skip() as engine:
        yield engine


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    [port] = services.free_ports(1)
    return Settings(home=tmp_path / "home", registry=f"127.0.0.1:{port}/models")


@pytest.fixture
def registry(here: Settings, tmp_path: Path) -> Registry:
    """Call it for a registry that runs in a block; what it was given stays on disk."""
    program = shutil.which("docker-registry")
    if program is None:
        missing = f"there is no docker-registry: {INSTALL}"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    address = here.registry.partition("/")[0]
    configuration = {
        "version": "0.1",
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": address},
    }
    (tmp_path / "registry.yml").write_text(json.dumps(configuration))

    class Running:
        def __enter__(self) -> None:
            output = tmp_path / "registry.log"
            self.process = services.running([program, "serve", str(tmp_path / "registry.yml")], output)
            started = self.process.__enter__()
            services.wait_until(lambda: probe(f"http://{address}/v2/") is not None, started, output)

        def __exit__(self, *_: object) -> None:
            self.process.__exit__(None, None, None)

    return Running


@pytest.fixture
def provide(engine: Any, here: Settings, tmp_path: Path, directory_store: Store) -> Callable[[Release], str]:
    """Of a release whose lock is not in the store: it cannot be built, only found."""
    return lambda release: image_registry.provide(engine, here, release, tmp_path, directory_store)


@pytest.fixture
def image(engine: Any) -> Iterator[str]:
    """The id of the image of `a_release`, as a build leaves it in the engine: here a file."""
    with image_context.create() as (context, file):
        context.add_text("Dockerfile", "FROM scratch\nCOPY model /\n")
        context.add_text("model", os.urandom(8).hex())
        made = engines.build(engine, context, file, NAME, {}, {"perennial.release": a_release().digest()})
    yield made.id
    forget(engine)


def forget(engine: Any) -> None:
    """Every name of the release's image, and with the last one the image."""
    for found in engine.images.list():
        for name in [*found.tags, *found.attrs["RepoDigests"]]:
            if "/toy" in name and "perennial/" in name:
                with engines.tolerating(engines.NOT_FOUND, engines.CONFLICT):
                    engine.images.remove(name, force=True)


def test_without_a_registry_it_is_the_image_of_the_engine(
    engine: Any, image: str, tmp_path: Path, directory_store: Store
) -> None:
    here = Settings(home=tmp_path / "home")
    assert image_registry.provide(engine, here, a_release(), tmp_path, directory_store) == image
    image_registry.ensure(engine, image)


def test_its_digest_survives_push_and_pull(
    engine: Any, here: Settings, image: str, provide: Callable[[Release], str], registry: Registry
) -> None:
    with registry():
        reference = provide(a_release())
        assert reference.startswith(f"{here.registry}/perennial/toy@sha256:")
        assert provide(a_release()) == reference
        forget(engine)
        assert engines.find_image(engine, reference) is None
        image_registry.ensure(engine, reference)  # a start on another machine
        assert engines.find_image(engine, reference).id == image
        forget(engine)
        assert provide(a_release()) == reference  # a deploy there: found, not built
        assert engines.find_image(engine, NAME).id == image


def test_a_registry_that_lost_it_is_given_it_again(
    here: Settings, image: str, provide: Callable[[Release], str], registry: Registry, tmp_path: Path
) -> None:
    with registry():
        reference = provide(a_release())
    shutil.rmtree(tmp_path / "registry")
    with registry():
        assert provide(a_release()) == reference
        repository = here.registry.partition("/")[2] + "/perennial/toy"
        manifest = f"http://{here.registry.partition('/')[0]}/v2/{repository}/tags/list"
        found = probe(manifest)
        assert found is not None and found.json()["tags"] == ["toy-0123456789ab"]


def test_a_registry_that_is_away_stops_no_release_that_was_there(
    engine: Any, image: str, provide: Callable[[Release], str], registry: Registry
) -> None:
    with pytest.raises(InstallationError, match="cannot be pushed") as refused:
        provide(a_release())
    assert refused.value.transient
    with registry():
        reference = provide(a_release())
    assert provide(a_release()) == reference
    forget(engine)
    with pytest.raises(InstallationError, match="refused to pull"):
        image_registry.ensure(engine, reference)


def test_a_name_that_somebody_gave_to_another_image_is_not_believed(
    image: str, provide: Callable[[Release], str], registry: Registry
) -> None:
    altered = a_release(import_name="toy2")
    with registry():
        provide(a_release())
        assert images.name(altered.project, altered.release_id) == NAME
        with pytest.raises(ReleaseError):  # it would be built, and its lock is not there
            provide(altered)


@pytest.mark.parametrize(
    ("field", "value"),
    [("registry", "https://registry.example.org"), ("base_image", "python:3.11"), ("target", "kubernetes")],
)
def test_a_setting_that_names_no_registry_no_digest_or_no_target_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=field):
        Settings.model_validate({field: value})
