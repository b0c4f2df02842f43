"""Start a run of a deployment and watch it from a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import TaskRunSort

from perennial.errors import PerennialError
from perennial.settings import settings

_POLL_SECONDS = 0.5


def run(deployment: str, say: Callable[[str], None], **parameters: Any) -> FlowRun:
    """Run `FLOW/PROJECT` to its end, saying each step with its time. Raises unless it completes."""
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        started = client.create_flow_run_from_deployment(found.id, parameters=parameters)
        url = f"{settings().prefect_url}/runs/flow-run/{started.id}"
        say(f"{deployment}: {url}")
        said: set[str] = set()
        while True:
            current = client.read_flow_run(started.id)
            final = current.state is not None and current.state.is_final()
            _say_steps(client, started, said, say)
            if final:
                break
            time.sleep(_POLL_SECONDS)
    assert current.state is not None
    if not current.state.is_completed():
        raise PerennialError(
            f"{deployment} ended as {current.state.name}: {current.state.message}", "Completed", f"open {url}"
        )
    return current


def _say_steps(client: SyncPrefectClient, of: FlowRun, said: set[str], say: Callable[[str], None]) -> None:
    steps = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[of.id])), sort=TaskRunSort.END_TIME_DESC
    )
    for step in reversed(steps):
        if step.state and step.state.is_final() and step.name not in said:
            said.add(step.name)
            seconds = step.total_run_time.total_seconds()
            mark = "✓" if step.state.is_completed() else "✗"
            say(f"    {mark} {step.name.rsplit('-', 1)[0].replace('_', ' '):<28} {seconds:6.1f} s")
