"""Runs that nobody runs any more: Prefect never finds out, and they hold the slot of their deployment."""

from __future__ import annotations

import json
import urllib.request
from datetime import UTC, datetime
from typing import Any

from perennial import leftovers
from perennial.errors import InstallationError
from perennial.settings import Settings

_ALIVE = ("RUNNING", "PENDING", "CANCELLING")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def crash_orphans(settings: Settings, before: datetime) -> list[str]:
    """Mark as Crashed what has been under way since before `before`, a moment when no worker ran.

    Returns the runs' names. Suspended and scheduled runs are nobody's orphans and stay as they are, as does
    a run whose process outlived its worker: it will report its end itself.

    Raises InstallationError when the Prefect server does not take it.
    """
    runs = _post(
        settings, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": list(_ALIVE)}}}, "limit": 200}
    )
    orphans = [run for run in runs if _since(run) < before and not _lives(run)]
    for run in orphans:
        state = {
            "type": "CRASHED",
            "message": (
                "the installation was stopped while this ran\n"
                f"Next: prefect flow-run retry {run['id']}, which continues where it stopped"
            ),
        }
        _post(settings, f"flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    return [run["name"] for run in orphans]


def _lives(run: dict[str, Any]) -> bool:
    return bool(leftovers.having("PREFECT__FLOW_RUN_ID", run["id"]))


def _since(run: dict[str, Any]) -> datetime:
    moment = datetime.fromisoformat(run["state"]["timestamp"].replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _post(settings: Settings, path: str, body: object) -> Any:
    request = urllib.request.Request(  # noqa: S310, our own server
        f"{settings.prefect_url}/api/{path}",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    try:
        with _DIRECT.open(request, timeout=30) as response:
            return json.loads(response.read())
    except OSError as error:
        raise InstallationError(
            f"the Prefect server does not take {request.full_url}: {error}", "a JSON answer", "make up"
        ) from error
