"""The local installation: up, status, down, and what is said when it cannot be had."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial import installation, leftovers, ports
from perennial.errors import InstallationError
from perennial.journal import open_journal
from perennial.probe import probe
from perennial.settings import Settings
from perennial.supervision import Supervisor
from perennial.targets import ProcessTarget
from tests.installations import ROOT, instance, own_settings, until

Lines = list[str]
SERVICE = "svc-test-toy-" + "a" * 12


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Settings]:
    settings = own_settings(tmp_path / "home")
    yield settings
    installation.down(settings, say=lambda line: None)


def up(here: Settings, *parts: str) -> Lines:
    said: Lines = []
    installation.up(here, parts=parts or ("envoy",), say=said.append)
    return said


def down(here: Settings) -> Lines:
    said: Lines = []
    installation.down(here, say=said.append)
    return said


def states(here: Settings) -> dict[str, tuple[str, int]]:
    return {one.name: (one.state, one.pid) for one in installation.statuses(here)}


def serve(here: Settings, *options: str) -> ProcessTarget:
    target = ProcessTarget(here)
    endpoint = target.start(instance(here, "a", *options))
    target.wait_ready(endpoint, 15.0)
    decided = {"project": "toy", "environment": "test", "release_id": endpoint.release_id}
    open_journal(here.database).decide(kind="promoted", **decided)  # else `up` would stop it
    return target


def own_ports(here: Settings) -> list[int]:
    return [here.test_port, here.production_port, here.router_admin_port, here.first_service_port]


def test_up_makes_the_parts_healthy_and_says_where(here: Settings) -> None:
    said = up(here)
    assert re.fullmatch(rf"envoy +ready after +[\d.]+ s +{here.router_url('test')} .*", said[0])
    answer = probe(f"{here.router_url('test')}/")
    assert answer is not None and answer.status == 200
    assert (here.root / "version").read_text() == f"{installation.LAYOUT_VERSION}\n"


def test_up_again_reuses_what_runs(here: Settings) -> None:
    up(here)
    serve(here)
    until(lambda: states(here)["envoy"][0] == "RUNNING", 5, "supervisord's belief in it")
    before = states(here)
    said = up(here)
    assert "already running" in said[0]
    after = states(here)
    assert {name: pid for name, (_, pid) in after.items()} == {name: pid for name, (_, pid) in before.items()}


def test_up_starts_only_what_is_missing(here: Settings) -> None:
    up(here)
    envoy = states(here)["envoy"][1]
    said = up(here, "envoy", "storefront")
    assert states(here)["envoy"][1] == envoy
    assert states(here)["storefront"][0] in ("STARTING", "RUNNING")
    assert any(line.startswith("storefront") and here.storefront_url in line for line in said)


def test_up_brings_a_part_with_another_configuration_to_it(here: Settings) -> None:
    up(here, "storefront")
    before = states(here)["storefront"][1]
    elsewhere = here.model_copy(update={"store_url": (here.root / "elsewhere").as_uri()})
    up(elsewhere, "storefront")
    assert states(here)["storefront"][1] != before
    assert (here.root / "elsewhere").is_dir()


def test_down_leaves_no_process_and_frees_the_ports(here: Settings) -> None:
    up(here)
    serve(here, "--leaves-child")  # which has left its session and forgotten whose it is
    supervisor = Supervisor(here).pid()
    ours = {supervisor, *leftovers.descendants(supervisor)}
    assert len(ours) >= 4
    assert not any(ports.is_free("127.0.0.1", port) for port in own_ports(here))
    said = down(here)
    assert re.fullmatch(r"stopped \d+ programs in [\d.]+ s", said[0])
    assert [pid for pid in ours if leftovers.is_alive(pid)] == []
    assert leftovers.marked(here.root) == []
    assert all(ports.is_free("127.0.0.1", port) for port in own_ports(here))
    assert states(here) == {}


def test_down_touches_nothing_else(here: Settings, tmp_path: Path) -> None:
    other = own_settings(tmp_path / "other")
    sleeper = subprocess.Popen(["sleep", "120"])
    try:
        up(here)
        up(other)
        down(here)
        assert sleeper.poll() is None
        answer = probe(f"{other.router_url('test')}/")
        assert answer is not None and answer.status == 200
    finally:
        down(other)
        sleeper.kill()
        sleeper.wait()


def test_down_keeps_what_is_on_disk_and_may_be_repeated(here: Settings) -> None:
    up(here)
    (here.root / "store" / "kept").write_text("kept")
    down(here)
    assert down(here) == [f"nothing runs in {here.root}"]
    assert (here.root / "store" / "kept").read_text() == "kept"
    up(here)


def test_a_taken_port_is_named_with_who_holds_it_and_what_to_run(here: Settings) -> None:
    code = (
        "import socket, time; s = socket.create_server(('127.0.0.1', %d)); print(flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-c", code % here.test_port]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as squatter:
        assert squatter.stdout is not None
        squatter.stdout.readline()
        with pytest.raises(InstallationError) as refused:
            up(here)
        squatter.kill()
    assert refused.value.found.startswith(f"port {here.test_port} for envoy is taken by {sys.executable}")
    assert f"(pid {squatter.pid})" in refused.value.found
    assert refused.value.next_command.endswith("PERENNIAL_TEST_PORT=… make up")
    assert not Supervisor(here).is_running()
    up(here)


def test_a_port_taken_while_a_part_was_down_is_named_too(here: Settings) -> None:
    up(here, "storefront")
    port = here.router_admin_port
    taken = pytest.raises(InstallationError, match=f"port {port} for envoy is taken")
    with socket.create_server(("127.0.0.1", port)), taken:
        up(here, "envoy", "storefront")
    assert states(here)["storefront"][0] in ("STARTING", "RUNNING")


def test_a_home_of_another_layout_is_refused_and_left_alone(here: Settings) -> None:
    here.root.mkdir()
    (here.root / "version").write_text("0\n")
    (here.root / "mlflow.db").write_text("precious")
    with pytest.raises(InstallationError, match="was laid out by version 0 of Perennial") as refused:
        up(here)
    assert f"layout version {installation.LAYOUT_VERSION}" in refused.value.expected
    assert "make clean" in refused.value.next_command
    assert (here.root / "version").read_text() == "0\n"
    assert (here.root / "mlflow.db").read_text() == "precious"
    (here.root / "version").unlink()
    with pytest.raises(InstallationError, match="an unknown version"):
        up(here)


def test_asking_for_the_status_first_does_not_stand_in_the_way_of_up(here: Settings) -> None:
    variables = os.environ | here.as_environment()
    argv = [sys.executable, "-m", "perennial", "status"]
    done = subprocess.run(argv, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"nothing runs in {here.root}\nNext: make up" in done.stdout
    up(here)


def test_without_the_server_the_command_to_run_is_named(here: Settings) -> None:
    with pytest.raises(InstallationError, match=f"does not answer at {here.prefect_url}") as refused:
        installation.require_running(here)
    assert refused.value.next_command == "make up"


def test_a_server_that_is_no_prefect_is_none(here: Settings) -> None:
    up(here, "storefront")
    with pytest.raises(InstallationError, match="does not answer"):
        installation.require_running(here.model_copy(update={"prefect_port": here.storefront_port}))


def test_the_status_is_a_table_of_parts_and_services(here: Settings) -> None:
    assert installation.status(here) == f"nothing runs in {here.root}\nNext: make up"
    up(here)
    serve(here)
    head, *rows = installation.status(here).splitlines()
    assert head.split() == ["part", "state", "pid", "uptime", "url"]
    cells = {row.split()[0]: row for row in rows}
    assert list(cells) == [*installation.PARTS, SERVICE]
    state, pid = states(here)[SERVICE]
    assert (
        re.fullmatch(
            rf"{SERVICE} +{state.lower()} +{pid} +0:00:\d\d +{here.router_url('test')}/toy/", cells[SERVICE]
        )
        or "starting" in cells[SERVICE]
    )
    assert here.router_url("production") in cells["envoy"]
    assert "stopped" in cells["mlflow"]


def test_a_part_that_dies_at_its_start_shows_its_last_words(here: Settings) -> None:
    broken = here.model_copy(update={"store_url": "ftp://nowhere"})
    with pytest.raises(InstallationError, match="storefront died at its start") as refused:
        up(broken, "envoy", "storefront")
    assert "    perennial.errors.InstallationError: cannot read the store's address" in refused.value.found
    assert "storefront.log" in refused.value.next_command
    assert any("ready after" in line for line in up(here, "storefront"))  # repaired


def test_a_part_that_gets_healthy_too_late_is_named(here: Settings) -> None:
    with pytest.raises(InstallationError, match="storefront was not healthy within 0 s"):
        installation.up(here, parts=("storefront",), timeout_seconds=0.05, say=lambda line: None)


def test_a_killed_supervisord_leaves_processes_that_up_names_and_down_ends(here: Settings) -> None:
    up(here)
    serve(here)
    envoy = states(here)["envoy"][1]
    os.kill(Supervisor(here).pid(), signal.SIGKILL)
    until(lambda: not Supervisor(here).is_running(), 5, "its end")
    with pytest.raises(
        InstallationError, match=rf"held by a process left over in .* \(pid {envoy}\)"
    ) as refused:
        up(here)
    assert refused.value.next_command == "make down"
    assert down(here) == [f"ended 2 processes left over in {here.root}"]
    assert leftovers.marked(here.root) == []
    up(here)
    until(
        lambda: probe(f"http://127.0.0.1:{here.first_service_port}/health/ready"), 10, "the service's return"
    )


def test_two_at_once_start_one_installation(here: Settings) -> None:
    argv = [
        sys.executable,
        "-c",
        "from perennial import installation as i, settings as s; i.up(s.settings(), parts=('envoy',))",
    ]
    variables = os.environ | here.as_environment()
    both = [subprocess.Popen(argv, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [one.wait(60) for one in both] == [0, 0]
    assert len([pid for pid in leftovers.marked(here.root) if "supervisor" in ports.command_line(pid)]) == 1


@pytest.mark.parametrize(
    "name", ["a b", "50%off", "häuschen", "deep/" * 20 + "home"], ids=["space", "percent", "umlaut", "deep"]
)
def test_any_folder_can_be_home(tmp_path: Path, name: str) -> None:
    here = own_settings(tmp_path / name)
    try:
        up(here)
        serve(here)
        assert states(here)[SERVICE][0] in ("STARTING", "RUNNING")
    finally:
        down(here)
    assert leftovers.marked(here.root) == []


def test_secrets_of_the_configuration_are_for_its_owner_only(here: Settings) -> None:
    here = here.model_copy(update={"mlflow_database_url": "postgresql://u:secret@db/mlflow"})
    up(here)
    holding = [path for path in here.root.rglob("*.conf") if "secret" in path.read_text()]
    assert holding
    assert [path for path in holding if path.stat().st_mode & 0o077] == []
