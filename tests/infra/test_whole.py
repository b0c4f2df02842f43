"""Everything at once: Prefect server and worker, MLflow, Envoy, storefront, a service; and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perennial import installation, leftovers, ports, router
from perennial.probe import probe
from perennial.settings import Settings
from perennial.supervision import Supervisor
from perennial.targets import ProcessTarget
from tests.installations import call, instance, own_settings, until

# What a flow run's process is to `up`: a living one with the run's id in its environment.
FLOW_RUN = [sys.executable, "-c", "import time; time.sleep(120)"]


def flow_run(here: Settings, flow: str, name: str, state: dict[str, Any]) -> str:
    """A flow run that the server believes to be in this state; its id."""
    body = {"flow_id": flow, "name": name, "state": state}
    status, answer, _ = call(f"{here.prefect_url}/api/flow_runs/", body)
    assert status == 201, answer
    return str(answer["id"])


def state(here: Settings, run: str) -> dict[str, Any]:
    found: dict[str, Any] = call(f"{here.prefect_url}/api/flow_runs/{run}")[1]["state"]
    return found


@pytest.mark.slow
def test_all_parts_start_serve_and_end_and_a_run_that_was_cut_off_is_crashed(tmp_path: Path) -> None:
    here = own_settings(tmp_path / "home")
    said: list[str] = []
    try:
        installation.up(here, say=said.append)
        assert sorted(line.split()[0] for line in said) == sorted(installation.PARTS)
        assert all("ready after" in line for line in said), said
        installation.require_running(here)
        pool = f"{here.prefect_url}/api/work_pools/{installation.WORK_POOL}"
        assert call(pool)[0] == 200  # so a deployment may name it at once
        every_address_answers(here)
        flow = call(f"{here.prefect_url}/api/flows/", {"name": "build"})[1]["id"]
        cut_off = flow_run(here, flow, "cut-off", {"type": "RUNNING"})
        pending = flow_run(here, flow, "pending", {"type": "PENDING"})
        waiting = flow_run(here, flow, "waiting", {"type": "PAUSED", "name": "Suspended"})
        later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}
        scheduled = flow_run(here, flow, "scheduled", later)
        living = flow_run(here, flow, "living", {"type": "RUNNING"})

        supervisor = Supervisor(here)
        ours = [supervisor.pid(), *leftovers.descendants(supervisor.pid())]
        assert len(ours) >= 7
        # As the worker leaves the world when the machine's memory ends: it tells nobody.
        os.kill(supervisor.processes()["prefect-worker"].pid, signal.SIGKILL)
        installation.down(here, say=said.append)
        nothing_is_left(here, ours)

        with subprocess.Popen(FLOW_RUN, env={"PREFECT__FLOW_RUN_ID": living}) as process:
            try:
                said.clear()
                installation.up(here, parts=("envoy", "prefect-server", "prefect-worker"), say=said.append)
            finally:
                process.kill()
        ended = "was under way when the installation stopped: marked as crashed"
        assert {line.split()[0] for line in said if line.endswith(ended)} == {"'cut-off'", "'pending'"}
        for run in (cut_off, pending):
            assert state(here, run)["type"] == "CRASHED"
            assert f"prefect flow-run retry {run}" in state(here, run)["message"]
        assert state(here, waiting)["type"] == "PAUSED"
        assert state(here, scheduled)["type"] == "SCHEDULED"
        assert state(here, living)["type"] == "RUNNING"

        said.clear()
        installation.up(here, parts=("envoy", "prefect-server", "prefect-worker"), say=said.append)
        assert all("already running" in line for line in said), said
        assert state(here, living)["type"] == "RUNNING"  # its worker runs: nobody's orphan
    finally:
        ours = leftovers.marked(here.root)
        installation.down(here, say=said.append)
    nothing_is_left(here, ours)


def every_address_answers(here: Settings) -> None:
    target = ProcessTarget(here)
    service = target.start(instance(here, "a"))
    target.wait_ready(service, 20.0)
    router.apply(here, {"test": {"toy": [service]}})
    expected = {
        f"{here.prefect_url}/": b"<title>Prefect",
        f"{here.prefect_url}/api/health": b"true",
        f"{here.mlflow_url}/": b"<title>MLflow",
        f"{here.mlflow_url}/health": b"OK",
        f"{here.router_url('test')}/": service.release_id.encode(),
        f"{here.router_url('test')}/toy/": service.release_id.encode(),
        f"{here.router_url('production')}/": b'"services": {}',
        f"{here.router_admin_url}/ready": b"LIVE",
        f"{here.storefront_url}/": service.release_id.encode(),
        f"{here.storefront_url}/reports/": b"No report yet",
    }
    for url, words in expected.items():
        answer = probe(url, timeout_seconds=10.0)
        assert answer is not None, f"nobody answers at {url}"
        assert answer.status == 200 and words in answer.body, (url, answer.status, answer.body[:300])
    pools = f"{here.prefect_url}/api/work_pools/{installation.WORK_POOL}/workers/filter"
    until(lambda: len(call(pools, {})[1] or []) == 1, 20, "the worker's first heartbeat")
    for line in installation.status(here).splitlines()[1:]:
        assert re.search(r" (running|starting) ", line), line


def nothing_is_left(here: Settings, ours: list[int]) -> None:
    assert [pid for pid in ours if leftovers.is_alive(pid)] == []
    assert leftovers.marked(here.root) == []
    assert all(ports.is_free(here.host, port) for name, port in here.model_dump().items() if "port" in name)
    assert installation.statuses(here) == ()
