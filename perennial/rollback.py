"""The way back to a release that served before: one call, at any step of a rollout, without Prefect."""

from __future__ import annotations

from perennial import leases, releases, rollout
from perennial.errors import ReleaseError, RolloutError
from perennial.journal import Journal, Lease
from perennial.service_state import ServiceState, state_in
from perennial.settings import Settings, object_store_environment
from perennial.store import Store
from perennial.targets import Target
from perennial.values import Environment, ProjectName, Release, ReleaseId, Rollout
from perennial.way_back import earlier


def roll_back(
    settings: Settings,
    journal: Journal,
    target: Target,
    store: Store,
    project: ProjectName,
    environment: Environment,
    to: ReleaseId | None = None,
    reason: str = "",
    variables: dict[str, str] | None = None,
) -> Rollout:
    """Bring back `to`, or the release before the active one that was not itself rolled back from.

    A rollout under way is ended and its candidate withdrawn; without `to` that alone is the way back. Another
    rollback under way is waited for, and without `to` that was the way back.

    Raises ReleaseError, with nothing changed, where there is no way back: nothing served earlier, `to` is
    unknown, rejected or has never served there, or its files are missing or altered in the store.
    """
    before = state_in(journal, project, environment)
    if to is not None or before.candidate is None or before.active is None:
        release = find(journal, project, environment, to)
        releases.materialise(store, release, settings.root / "releases")  # whole, before anything is ended
    try:
        _take_over(journal, project, environment, before)
        now = state_in(journal, project, environment)
        if to is None and now.active != before.active and "rollback_of" in now.promotion:
            return serving(settings, journal, project, environment)  # somebody else was quicker
        left = journal.release(now.candidate) if now.candidate else None
        if left is not None and left.release_id != to:
            why = f"rolled back: {reason}" if reason else "rolled back"
            rollout.withdraw(settings, journal, target, left, environment, why)
            if to is None and now.active is not None:
                return serving(settings, journal, project, environment)
        back = find(journal, project, environment, to).release_id
        return rollout.roll_back(
            settings, journal, target, store, project, environment, back, reason, variables
        )
    finally:
        leases.let_go(project, environment)


def default_environment(journal: Journal, project: ProjectName) -> Environment:
    """Production, if something serves there, else test. Raises ProjectError for an unknown project."""
    journal.project(project)
    return "production" if journal.active(project, "production") else "test"


def find(journal: Journal, project: ProjectName, environment: Environment, to: ReleaseId | None) -> Release:
    """The release that a rollback leads to. Raises ReleaseError that says what could be done instead."""
    served = journal.decisions(project, environment, ("promoted",))
    known = list(dict.fromkeys(d.release_id for d in reversed(served) if d.release_id))
    if to is not None:
        release = releases.find(journal, project, to)
        if to not in known:
            raise ReleaseError(
                f"{to} has never served in {environment}, so there is no way back to it",
                f"one of: {', '.join(known)}" if known else "a release that served there",
                f"prefect deployment run 'deploy/{project}' -p release_id={to} -p environment={environment}",
            )
        return release
    way = earlier(served)
    if way:
        return releases.find(journal, project, way[0])
    others = known[1:]
    raise ReleaseError(
        f"{project} has no earlier release in {environment}"
        + (" that was not rolled back from" if others else ""),
        f"one that served there: {', '.join(others)}" if others else "a release that served there before",
        f"python -m perennial rollback {project} --environment {environment} --to {others[0]}"
        if others
        else f"prefect deployment run 'deploy/{project}' -p environment={environment}",
    )


def serving(settings: Settings, journal: Journal, project: ProjectName, environment: Environment) -> Rollout:
    """What serves, as the journal has it."""
    state = state_in(journal, project, environment)
    if state.active is None:
        raise RolloutError(f"nothing of {project} serves in {environment}", "an active release")
    return Rollout(
        project=project,
        environment=environment,
        active=state.active,
        previous=state.previous,
        url=f"{settings.router_url(environment)}/{project}",
        traffic_percent=100,
        position=journal.decisions(project, environment, last=1)[0].position,
    )


def service_variables(settings: Settings) -> dict[str, str]:
    """What a service needs in its environment to reach the store, where Prefect's blocks are out of reach."""
    if not settings.store.startswith("s3:"):
        return {}
    variables = object_store_environment()
    if settings.s3_endpoint_url:
        plain = str(settings.s3_endpoint_url.startswith("http:")).lower()
        variables |= {"AWS_ENDPOINT_URL": settings.s3_endpoint_url, "AWS_ALLOW_HTTP": plain}
    return variables


def _take_over(journal: Journal, project: ProjectName, environment: Environment, state: ServiceState) -> None:
    """Hold the lease. A rollout that has it loses it: its next decision is refused, and it ends.

    Not so one that is itself a way back.
    """
    token = state.begun.get("lease")
    known = {d.release_id for d in journal.decisions(project, environment, ("promoted",))}
    if token and state.candidate not in known:
        journal.give_back(Lease(project=project, environment=environment, token=token))
    leases.hold(journal, project, environment, f"roll {project} back in {environment}")
