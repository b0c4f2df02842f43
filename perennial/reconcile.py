"""Bring router and instances to what the journal says. May be run at any time, by anybody, again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime

from perennial import leases, router
from perennial.errors import RolloutError
from perennial.journal import Journal
from perennial.service_state import ServiceState, endpoints_of, state_in
from perennial.settings import Settings
from perennial.supervision import UP_STATES
from perennial.targets import Running, Target
from perennial.values import ENVIRONMENTS, Endpoint, Environment, ReleaseId

Named = tuple[str, str, str]  # environment, project, release


def reconcile(settings: Settings, journal: Journal, target: Target) -> list[str]:
    """Finish what was decided and undo what was left half done; returns what it changed, in words.

    A candidate whose rollout lives, or that waits for a person, is left alone; one whose rollout died is
    withdrawn. What is to run and does not is started again. What has no role is stopped.
    """
    done: list[str] = []
    for project, environment in _services(journal, target):
        done += _settle(settings, journal, target, project, environment)
    with router.alone(settings):
        route(settings, journal, target, patient=False)
    for project, environment in {(i.project, i.environment) for i in target.instances()}:
        with leases.briefly(journal, project, environment, "reconcile") as lease:
            if lease is not None:  # else it is being rolled out this moment
                stopped = stop_roleless(settings, journal, target, project, environment)
                done += [f"stopped {name}: it has no role" for name in stopped]
    return done


def _settle(
    settings: Settings, journal: Journal, target: Target, project: str, environment: Environment
) -> list[str]:
    """One service: a rollout that died is ended, what should run is started."""
    with leases.briefly(journal, project, environment, "reconcile") as lease:
        if lease is None:
            return []
        done: list[str] = []
        state = state_in(journal, project, environment)
        now = datetime.now(UTC)
        waits = state.asked and (state.asked_until is None or now < state.asked_until)
        if state.candidate is not None and not waits:
            reason = "nobody decided in time" if state.asked else "its rollout ended without a decision"
            journal.decide(
                project=project,
                environment=environment,
                kind="withdrawn",
                release_id=state.candidate,
                payload={"reason": reason},
                lease=lease,
            )
            done.append(f"withdrew {state.candidate} from {environment}: {reason}")
            state = state_in(journal, project, environment)
        return done + _revive(target, state, environment, now)


def _revive(target: Target, state: ServiceState, environment: Environment, now: datetime) -> list[str]:
    """Start again what has a role, is known to its target and has given up."""
    present = running(target, environment)
    done = []
    for release_id in state.roles(now):
        instance = present.get(release_id)
        if instance is not None and instance.state not in UP_STATES:
            with suppress(RolloutError):
                target.revive(instance.endpoint.name)
                done.append(f"started {instance.endpoint.name} again: it was {instance.state.lower()}")
    return done


def route(
    settings: Settings,
    journal: Journal,
    target: Target,
    *,
    healthy: Iterable[Named] = (),
    patient: bool = True,
) -> None:
    """Write the router's files anew from the journal and what runs. Call it under `router.alone`.

    `healthy`: whom Envoy must find healthy before this returns. Raises RolloutError when one of them does not
    run, or Envoy does not take the files in; without `patient` it is left to take them in when it can.
    """
    routes = current_routes(journal, target)
    needed = []
    for environment, project, release_id in healthy:
        endpoints = routes.get(environment, {}).get(project, ())
        found = [endpoint for endpoint in endpoints if endpoint.release_id == release_id]
        if not found:
            raise RolloutError(
                f"{release_id} does not run in {environment} any more",
                "the candidate that was started and proven",
                "run the deploy again",
            )
        needed += found
    try:
        router.apply(settings, routes, healthy=needed)
    except RolloutError:
        if patient:
            raise


def current_routes(journal: Journal, target: Target) -> router.Routes:
    """What the router should do, of what runs: a pure function of the journal and the instances."""
    now = datetime.now(UTC)
    routes: dict[str, dict[str, list[Endpoint]]] = {}
    by_service: dict[tuple[Environment, str], dict[ReleaseId, Endpoint]] = {}
    for instance in target.instances():
        service = by_service.setdefault((instance.environment, instance.project), {})
        service[instance.endpoint.release_id] = instance.endpoint
    for (environment, project), endpoints in by_service.items():
        known = endpoints_of(state_in(journal, project, environment), endpoints, now)
        if known:
            routes.setdefault(environment, {})[project] = known
    return routes


def running(target: Target, environment: Environment) -> Mapping[ReleaseId, Running]:
    """The instances of an environment, by release."""
    return {
        instance.endpoint.release_id: instance
        for instance in target.instances()
        if instance.environment == environment
    }


def stop_roleless(
    settings: Settings, journal: Journal, target: Target, project: str, environment: Environment
) -> list[str]:
    """Drain and stop every instance of a service that has no role in it.

    A service of which this journal says nothing is left alone: the settings may name another one's address.
    """
    if not journal.decisions(project, environment):
        return []
    roles = state_in(journal, project, environment).roles(datetime.now(UTC))
    others = [
        instance
        for instance in target.instances()
        if (instance.project, instance.environment) == (project, environment)
        and instance.endpoint.release_id not in roles
    ]
    if others:
        with router.alone(settings):  # first out of the router: a warm one that stood by, for one
            route(settings, journal, target, patient=False)
    stopped = []
    for instance in others:
        # Anew for each: whoever slept past its lease must not stop what was given a role meanwhile.
        roles = state_in(journal, project, environment).roles(datetime.now(UTC))
        if instance.endpoint.release_id not in roles:
            target.stop(instance.endpoint.name, instance.drain_seconds)
            stopped.append(instance.endpoint.name)
    return stopped


def _services(journal: Journal, target: Target) -> list[tuple[str, Environment]]:
    found = {(instance.project, instance.environment) for instance in target.instances()}
    for project in journal.projects():
        found |= {(project.name, environment) for environment in ENVIRONMENTS}
    return sorted(found)
