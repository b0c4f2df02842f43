"""Put a release in front of users: start, prove, switch, retire. The journal decides; the world follows.

Each act is written to the journal before it is done and may be done again. After a crash at any point,
running the same deploy again, or `reconcile`, brings router and processes to what the journal says.
"""

from __future__ import annotations

import fcntl
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from perennial import parity, router
from perennial.errors import PerennialError, ReleaseError, RolloutError
from perennial.journal import Journal
from perennial.settings import Settings
from perennial.supervision import UP_STATES
from perennial.targets import Instance, Running, Target
from perennial.values import Endpoint, Environment, ParityReport, Release, Rollout
from serving import contract

CHECK_REQUEST_ID = "perennial-check"  # tells our own requests from users' in the prediction log
_PREDICT_TIMEOUT_SECONDS = 30.0
_LOCK_WAIT_SECONDS = 300.0
_LOCK_POLL_SECONDS = 0.2
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


@contextmanager
def _alone(settings: Settings, project: str, environment: str, wait_seconds: float) -> Iterator[bool]:
    """Hold the service's rollout lock in this block; False when somebody else has it for too long."""
    path = _lock(settings, project, environment)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(_LOCK_POLL_SECONDS)
            else:
                yield True
                return


def _lock(settings: Settings, project: str, environment: str) -> Path:
    return settings.root / "run" / f"rollout-{environment}-{project}.lock"


_held: dict[Path, ExitStack] = {}


def hold(settings: Settings, project: str, environment: Environment) -> None:
    """From here until `let_go` no other process rolls this service out; the kernel frees a dead one's lock.

    Waits for a rollout under way. Raises RolloutError when that takes too long.
    """
    path = _lock(settings, project, environment)
    if path in _held:
        return
    stack = ExitStack()
    if not stack.enter_context(_alone(settings, project, environment, _LOCK_WAIT_SECONDS)):
        stack.close()
        raise RolloutError(
            f"another deploy of {project} to {environment} has been under way for {_LOCK_WAIT_SECONDS:g} s",
            "one deploy of a service at a time",
            f"wait for it, then prefect deployment run 'deploy/{project}'",
        )
    _held[path] = stack


def let_go() -> None:
    """Give up every rollout lock that this process holds."""
    while _held:
        _held.popitem()[1].close()


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
    hold(settings, release.project, environment)
    active = journal.active(release.project, environment) == release.release_id
    instance = _instance(target, release.release_id, environment)
    if active and instance is not None and instance.state in UP_STATES:
        return instance.endpoint  # users are on it: whatever has changed around it, it is not restarted
    if not active and instance is None:
        journal.decide(
            project=release.project, environment=environment, kind="candidate", release_id=release.release_id
        )
    wanted = Instance(
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
    with _withdrawing(journal, target, release, environment):
        endpoint = target.start(wanted)
        target.wait_ready(endpoint, release.service.ready_timeout_seconds)
    return endpoint


def prove(
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    endpoint: Endpoint,
    folder: Path,
) -> ParityReport:
    """Golden rows and smoke: what is served must be what the model said when it was trained (see `parity`).

    Raises RolloutError, the candidate withdrawn, when an answer differs.
    """
    golden = msgspec.json.decode((folder / contract.GOLDEN_FILE).read_bytes(), type=contract.Golden)
    url = f"http://{endpoint.host}:{endpoint.port}"
    with _withdrawing(journal, target, release, environment):
        report = _parity(url, golden, release)
        _smoke(url, release)
    return report


def switch(
    settings: Settings, journal: Journal, target: Target, release: Release, environment: Environment
) -> Rollout:
    """Make the release the active one and move all traffic to it, without losing a request.

    Raises RolloutError, the candidate withdrawn and the routes as before, when Envoy does not take it in.
    """
    project = release.project
    hold(settings, project, environment)
    with router.alone(settings):
        if journal.active(project, environment) != release.release_id:
            candidate = _endpoint(target, release.release_id, environment)
            routes = current_routes(journal, target)
            beside = [*routes.get(environment, {}).get(project, ()), candidate]
            if len(beside) > 1:  # Envoy's own checks must have seen the new one before the old one goes
                try:
                    router.apply(settings, _with(routes, environment, project, beside), healthy=[candidate])
                except BaseException as error:
                    router.write(router.router_directory(settings), router.render(routes, settings))
                    withdraw(journal, target, release, environment, str(error))
                    raise
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


def retire(
    settings: Settings, journal: Journal, target: Target, project: str, environment: Environment
) -> list[str]:
    """Drain and stop every instance of the service but the active one; returns their names."""
    hold(settings, project, environment)
    return _stop_all_but_active(journal, target, project, environment)


def _stop_all_but_active(
    journal: Journal, target: Target, project: str, environment: Environment
) -> list[str]:
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


@contextmanager
def _withdrawing(
    journal: Journal, target: Target, release: Release, environment: Environment
) -> Iterator[None]:
    """Whatever ends this block early, a cancelled run too, takes the candidate with it."""
    try:
        yield
    except BaseException as error:
        with suppress(PerennialError):  # the first error is the one to show
            withdraw(journal, target, release, environment, str(error))
        raise


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
    """Bring router and processes to what the journal says: the routes are written anew, leftovers stopped.

    A service that is being rolled out this moment is left to its rollout.
    """
    with router.alone(settings):
        router.apply(settings, current_routes(journal, target), healthy=())
    for project, environment in {(i.project, i.environment) for i in target.instances()}:
        if journal.active(project, environment) is None:
            continue  # the candidate of a first deploy: the next deploy finds it
        with _alone(settings, project, environment, wait_seconds=0) as ours:
            if ours:
                _stop_all_but_active(journal, target, project, environment)


def _endpoint(target: Target, release_id: str, environment: Environment) -> Endpoint:
    instance = _instance(target, release_id, environment)
    if instance is not None:
        return instance.endpoint
    raise RolloutError(
        f"{release_id} does not run in {environment}",
        "the candidate that was started and proven",
        "run the deploy again",
    )


def _instance(target: Target, release_id: str, environment: Environment) -> Running | None:
    for running in target.instances():
        if (running.environment, running.endpoint.release_id) == (environment, release_id):
            return running
    return None


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
    if answer.get("release_id") != release.release_id:
        raise RolloutError(f"{url} answers for {answer.get('release_id')}", release.release_id)
    parity.check(release, answer.get("predictions"), golden.predictions)
    return ParityReport(
        release_id=release.release_id,
        rows=len(golden.rows),
        tolerance=parity.tolerance_of(release),
        seconds=round(time.monotonic() - began, 4),
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
