"""Containers of services: what they may do, what they tell, and what of theirs can be missing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perennial.errors import InstallationError, RolloutError
from perennial.settings import Settings
from perennial.targets import open_target
from tests.engines import engine_or_skip, service_image
from tests.installations import own_settings, until
from tests.targets import Containers, answers

A = f"toy-{'a' * 12}"
SECRET = "a-secret-of-the-store"


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with engine_or_skip() as opened:
        yield opened


@pytest.fixture(scope="module")
def image(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    made = service_image(engine, tmp_path_factory.mktemp("image"))
    yield made
    engine.images.remove(made, force=True)


@pytest.fixture
def kind(image: str, tmp_path: Path) -> Iterator[Containers]:
    found = Containers(own_settings(tmp_path / "home", target="docker"), image)
    yield found
    for service in found.target.instances():
        found.target.stop(service.endpoint.name, 1.0)


def inspected(engine: Any, kind: Containers) -> dict[str, Any]:
    found: dict[str, Any] = engine.api.inspect_container(kind.target._container(kind.only().endpoint.name))
    return found


def test_it_may_do_next_to_nothing(engine: Any, kind: Containers) -> None:
    kind.serving("a", memory_mb=128, cpus=0.5)
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{kind.only().pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert set(status["Uid"].split()) == {"65532" if os.geteuid() == 0 else str(os.geteuid())}
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    container = engine.containers.get(inspected(engine, kind)["Id"])
    for path, writable in (("/x", 1), ("/usr/x", 1), ("/store/x", 1), ("/tmp/x", 0), ("/spool/x", 0)):
        done = container.exec_run(["python3", "-c", f"open({path!r}, 'w')"])
        assert done.exit_code == writable, done.output
    limits = inspected(engine, kind)["HostConfig"]
    assert (limits["Memory"], limits["NanoCpus"]) == (128 << 20, 500_000_000)
    assert 0 < limits["PidsLimit"] <= 1000
    published = inspected(engine, kind)["NetworkSettings"]["Ports"]["8080/tcp"]
    assert published == [{"HostIp": "127.0.0.1", "HostPort": str(kind.only().endpoint.port)}]


def test_what_it_writes_reaches_spool_and_store(engine: Any, kind: Containers) -> None:
    spool = kind.settings.root / "spool"
    (spool / "test").mkdir(parents=True)
    (spool / "test" / "left.arrows").write_text("by a process")  # whom it belonged to
    (spool / "test" / "left.arrows").chmod(0o600)
    (spool / "test" / "link").symlink_to("/etc/hostname")
    owner = Path("/etc/hostname").stat().st_uid
    kind.serving("a")
    container = engine.containers.get(inspected(engine, kind)["Id"])
    code = (
        "import os; os.rename('/spool/test/left.arrows', '/spool/x'); open('/spool/x', 'a').write(' and me')"
    )
    assert container.exec_run(["python3", "-c", code]).exit_code == 0
    assert (spool / "x").read_text() == "by a process and me"
    code = "open('/store/predictions/test/toy/y', 'w')"
    assert container.exec_run(["python3", "-c", code]).exit_code == 0
    assert (kind.settings.root / "store" / "predictions" / "test" / "toy" / "y").exists()
    assert Path("/etc/hostname").stat().st_uid == owner


def test_a_secret_is_in_its_environment_and_nowhere_else(engine: Any, kind: Containers) -> None:
    kind.serving("a", variables={"AWS_SECRET_ACCESS_KEY": SECRET})
    assert f"AWS_SECRET_ACCESS_KEY={SECRET}" in kind.variables()
    found = inspected(engine, kind)
    found["Config"].pop("Env")
    assert SECRET not in json.dumps(found)
    assert SECRET not in json.dumps(engine.images.get(kind.image).attrs)


def test_a_container_that_somebody_killed_is_started_by_the_next_start(engine: Any, kind: Containers) -> None:
    """The engine leaves it down: `docker kill` is a person's wish to it."""
    endpoint = kind.serving("a")
    engine.api.kill(inspected(engine, kind)["Id"])
    until(lambda: kind.only().state == "EXITED", 10, "its end")
    assert kind.serving("a") == endpoint
    engine.api.pause(inspected(engine, kind)["Id"])
    assert kind.only().state == "STOPPED"
    kind.target.revive(endpoint.name)
    assert answers(endpoint.port) == A


def test_out_of_memory_is_said(kind: Containers) -> None:
    eats = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    endpoint = kind.target.start(kind.instance("a", argv=("python3", "-c", eats), memory_mb=32))
    with pytest.raises(RolloutError, match="died before it was ready") as refused:
        kind.target.wait_ready(endpoint, 30)
    assert "memory_mb under [tool.perennial.service] allows 32 MB" in refused.value.found


def test_two_installations_of_one_engine_do_not_meet(kind: Containers, tmp_path: Path) -> None:
    other = Containers(own_settings(tmp_path / "other", target="docker"), kind.image)
    one, two = kind.serving("a"), other.serving("a")
    assert one.name == two.name and one.port != two.port
    other.target.stop(two.name, 5.0)
    assert other.target.instances() == ()
    assert kind.only().endpoint == one and answers(one.port) == A


def test_an_image_that_is_gone_is_named(kind: Containers) -> None:
    for image in (f"sha256:{'0' * 64}", ""):
        with pytest.raises(InstallationError, match="the engine has no image") as refused:
            kind.target.start(kind.instance("a", image=image))
        assert refused.value.next_command == "run the deploy again, which makes it"
    assert kind.target.instances() == ()


def test_a_store_that_no_container_reaches_is_refused_before_anything_starts(kind: Containers) -> None:
    store = {"AWS_ENDPOINT_URL": "http://127.0.0.1:8333"}
    with pytest.raises(InstallationError, match="which inside a container is the container"):
        kind.target.start(kind.instance("a", prediction_log="s3://bucket/log", variables=store))
    assert kind.target.instances() == ()


def test_without_an_engine_the_command_to_run_is_named(tmp_path: Path) -> None:
    nobody = f"unix://{tmp_path}/docker.sock"
    here = Settings(home=tmp_path, target="docker", docker_url=nobody)
    target, kind = open_target(here), Containers(here, "")
    for act in (
        lambda: target.start(kind.instance("a")),
        lambda: target.revive("svc"),
        lambda: target.stop("svc", 1.0),
        target.instances,
    ):
        with pytest.raises(InstallationError, match="no Docker engine answers") as refused:
            act()
        assert nobody in refused.value.found and refused.value.transient
