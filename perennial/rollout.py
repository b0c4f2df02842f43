"""Put a release in front of users: start, prove, switch, retire. The journal decides; the world follows.

Each act is written to the journal before it is done and may be done again. After a crash at any point,
running the same deploy again, or `reconcile`, brings router and processes to what the journal says.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

from perennial import router
from perennial.errors import ReleaseError, RolloutError
from perennial.journal import Journal
from perennial.settings import Settings
from perennial.targets import Instance, Target
from perennial.values import ENVIRONMENTS, Endpoint, Environment, ParityReport, Release, Rollout
from serving import contract

CHECK_REQUEST_ID = "perennial-check"  # tells our own requests from users' in the prediction log
_PREDICT_TIMEOUT_SECONDS = 30.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a local service, whatever the proxy


def admit(journal: Journal, release: Release, environment: Environment) -> None:
    """Raises ReleaseError unless this release may enter this environment.

    Production opens for an approval of exactly these digests, and for nothing else. The approval stays in the
    journal, so a rollback to a release that was approved before waits for nobody.
    """
    if environment != "production" or journal.approval(release, environment) is not None:
        return
    raise ReleaseError(
        f"nobody has approved {release.release_id} for production",
        "an approval in the journal that is bound to this release's digests",
        f"python -m perennial approve {release.release_id} --reviewer YOUR-NAME",
    )


def start(
    settings: Settings,
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    folder: Path,
    python: Path,
    variables: dict[str, str],
) -> Endpoint:
    """Start a candidate, return when it is ready. One that fails is withdrawn; the active one serves.

    `variables`: what its process needs in its environment to reach the store.
    """
    if journal.active(release.project, environment) != release.release_id:
        journal.decide(
            project=release.project, environment=environment, kind="candidate", release_id=release.release_id
        )
    instance = Instance(
        environment=environment,
        project=release.project,
        release_id=release.release_id,
        python=python,
        release=folder,
        prediction_log=settings.store,
        spool=settings.root / "spool" / environment / release.project,
        drain_seconds=release.service.drain_seconds,
        variables=variables,
    )
    try:
        endpoint = target.start(instance)
        target.wait_ready(endpoint, release.service.ready_timeout_seconds)
    except RolloutError as error:
        withdraw(journal, target, release, environment, error.found)
        raise
    return endpoint


def prove(
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    endpoint: Endpoint,
    folder: Path,
) -> ParityReport:
    """Golden rows and smoke: what is served must be, bit for bit, what the model said when it was trained.

    Raises RolloutError, the candidate withdrawn, when an answer differs.
    """
    golden = msgspec.json.decode((folder / contract.GOLDEN_FILE).read_bytes(), type=contract.Golden)
    url = f"http://{endpoint.host}:{endpoint.port}"
    try:
        report = _parity(url, golden, release)
        _smoke(url, release)
    except RolloutError as error:
        withdraw(journal, target, release, environment, error.found)
        raise
    return report


def switch(
    settings: Settings, journal: Journal, target: Target, release: Release, environment: Environment
) -> Rollout:
    """Make the release the active one and move all traffic to it, without losing a request."""
    project = release.project
    with router.alone(settings):
        if journal.active(project, environment) != release.release_id:
            candidate = _endpoint(target, release.release_id, environment)
            routes = current_routes(journal, target)
            beside = [*routes.get(environment, {}).get(project, ()), candidate]
            if len(beside) > 1:  # Envoy's own checks must have seen the new one before the old one goes
                router.apply(settings, _with(routes, environment, project, beside), healthy=[candidate])
            journal.decide(
                project=project, environment=environment, kind="promoted", release_id=release.release_id
            )
        routes = current_routes(journal, target)
        # Of this service only: another one that is down must not stand in the way.
        router.apply(settings, routes, healthy=routes.get(environment, {}).get(project, ()))
    decisions = journal.decisions(project, environment)
    return Rollout(
        project=project,
        environment=environment,
        active=release.release_id,
        previous=journal.previous(project, environment),
        url=f"{settings.router_url(environment)}/{project}",
        traffic_percent=100,
        position=decisions[-1].position,
    )


def retire(journal: Journal, target: Target, project: str, environment: Environment) -> list[str]:
    """Drain and stop every instance of the service but the active one; returns their names."""
    active = journal.active(project, environment)
    others = [
        running
        for running in target.instances()
        if (running.project, running.environment) == (project, environment)
        and running.endpoint.release_id != active
    ]
    for running in others:
        target.stop(running.endpoint.name, running.drain_seconds)
    return [running.endpoint.name for running in others]


def withdraw(
    journal: Journal, target: Target, release: Release, environment: Environment, reason: str
) -> None:
    """Remove a candidate. The active release is not touched, even if it is the same one."""
    if journal.active(release.project, environment) == release.release_id:
        return
    journal.decide(
        project=release.project,
        environment=environment,
        kind="withdrawn",
        release_id=release.release_id,
        payload={"reason": reason[:1000]},
    )
    for running in target.instances():
        if (running.environment, running.endpoint.release_id) == (environment, release.release_id):
            target.stop(running.endpoint.name, running.drain_seconds)


def current_routes(journal: Journal, target: Target) -> router.Routes:
    """What the router should do: the active release of each service in each environment, where it runs."""
    routes: dict[str, dict[str, list[Endpoint]]] = {}
    for running in target.instances():
        if journal.active(running.project, running.environment) == running.endpoint.release_id:
            services = routes.setdefault(running.environment, {})
            services.setdefault(running.project, []).append(running.endpoint)
    return routes


def reconcile(settings: Settings, journal: Journal, target: Target) -> None:
    """Bring router and processes to what the journal says: the routes are written anew, leftovers stopped."""
    with router.alone(settings):
        router.apply(settings, current_routes(journal, target), healthy=())
    for project in journal.projects():
        for environment in ENVIRONMENTS:
            if journal.active(project.name, environment) is not None:
                retire(journal, target, project.name, environment)


def _endpoint(target: Target, release_id: str, environment: Environment) -> Endpoint:
    for running in target.instances():
        if (running.environment, running.endpoint.release_id) == (environment, release_id):
            return running.endpoint
    raise RolloutError(
        f"{release_id} does not run in {environment}",
        "the candidate that was started and proven",
        "run the deploy again",
    )


def _with(
    routes: router.Routes, environment: str, project: str, endpoints: list[Endpoint]
) -> dict[str, dict[str, list[Endpoint]]]:
    changed = {env: {name: list(e) for name, e in services.items()} for env, services in routes.items()}
    changed.setdefault(environment, {})[project] = endpoints
    return changed


def _parity(url: str, golden: contract.Golden, release: Release) -> ParityReport:
    began = time.monotonic()
    status, answer = _post(f"{url}/predict", {"rows": golden.rows})
    if status != 200:
        raise RolloutError(
            f"{release.release_id} answers its golden rows with {status}: {str(answer)[:500]}",
            f"{len(golden.rows)} predictions",
        )
    served = answer.get("predictions")
    if answer.get("release_id") != release.release_id:
        raise RolloutError(f"{url} answers for {answer.get('release_id')}", release.release_id)
    if served != golden.predictions:
        different = [
            f"row {index}: served {ours!r}, trained {theirs!r}"
            for index, (ours, theirs) in enumerate(zip(served or [], golden.predictions, strict=False))
            if ours != theirs
        ]
        raise RolloutError(
            f"{release.release_id} fails parity on {len(different)} of {len(golden.rows)} golden rows: "
            + "; ".join(different[:3]),
            "the predictions that the model made in the process that trained it, bit for bit",
            "look for state that predict() keeps, or that save/load loses",
        )
    return ParityReport(
        release_id=release.release_id, rows=len(golden.rows), seconds=round(time.monotonic() - began, 4)
    )


def _smoke(url: str, release: Release) -> None:
    """What must answer answers, and what must be refused is refused."""
    status, answer = _post(f"{url}/predict", {"rows": [{"no_such_column": 1}]})
    if not 400 <= status < 500:
        raise RolloutError(f"{release.release_id} answers a wrong row with {status}", "a 4xx with a reason")
    status, answer = _get(f"{url}/metadata")
    if status != 200 or release.release_id not in json.dumps(answer):
        raise RolloutError(f"{release.release_id}: /metadata answers {status}", "200, naming the release")


def _get(url: str) -> tuple[int, Any]:
    return _send(urllib.request.Request(url))  # noqa: S310, the address is the candidate's own


def _post(url: str, body: object) -> tuple[int, Any]:
    data = json.dumps(body).encode()
    headers = {"content-type": "application/json", "x-request-id": CHECK_REQUEST_ID}
    return _send(urllib.request.Request(url, data=data, headers=headers))  # noqa: S310


def _send(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with _DIRECT.open(request, timeout=_PREDICT_TIMEOUT_SECONDS) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")
    except (OSError, ValueError) as error:
        raise RolloutError(f"{request.full_url} does not answer: {error}", "a JSON answer") from error
