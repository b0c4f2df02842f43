"""Finds and removes what nothing needs any more. History, in the store and the journal, is never touched.

Each thing is looked at again when its turn comes, under the lease of its service or the lock of its folder: a
deploy that begins to use it meanwhile keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from perennial import caches, leases, old_images, reconcile, strays
from perennial.caches import Unneeded
from perennial.engine import Engine, open_engine
from perennial.journal import Journal
from perennial.old_images import OldImage
from perennial.service_state import ServiceState, state_in, state_of
from perennial.settings import Settings
from perennial.targets import Running, Target
from perennial.values import ENVIRONMENTS, Environment, Release, Value
from perennial.way_back import earlier

KEEP_RELEASES = 3  # the newest accepted ones of a project, beside those that have a role


class Found(Value):
    """A thing that nothing needs, and why it may go."""

    kind: str
    name: str
    why: str
    bytes: int = 0
    age_seconds: float = 0.0


@dataclass(frozen=True)
class _Leftover:
    found: Found
    remove: Callable[[], bool]  # False when it turned out to be needed


def reap(settings: Settings, journal: Journal, target: Target, *, dry_run: bool) -> tuple[Found, ...]:
    """What nothing needs: candidates nobody decided about in time, instances without a role, orphaned
    processes, and what this machine keeps of old releases: folders, environments, checkouts, images.

    Without `dry_run` it is removed, and what is returned is gone. Raises InstallationError when a part that
    must be asked is away.
    """
    with ExitStack() as stack:
        engine = (
            stack.enter_context(open_engine(settings.docker_url)) if settings.target == "docker" else None
        )
        kinds: tuple[Callable[[], Iterable[_Leftover]], ...] = (
            lambda: _candidates(journal),
            lambda: _instances(settings, journal, target),
            lambda: _processes(settings, journal, target),
            lambda: _cached(settings, journal, target),
            lambda: _images(settings, journal, target, engine) if engine else (),
        )
        # One kind after the other: what one leaves behind is the next one's to find.
        return tuple(
            leftover.found for find in kinds for leftover in list(find()) if dry_run or leftover.remove()
        )


def kept_releases(journal: Journal, target: Target) -> dict[str, Release]:
    """The releases whose files stay on this machine: those with a role, where a rollback leads, those that
    run, and the newest ones of each project.
    """
    ids = {instance.endpoint.release_id for instance in target.instances()}
    kept: dict[str, Release] = {}
    for project in journal.projects():
        kept |= {r.release_id: r for r in journal.releases(project.name, "accepted", limit=KEEP_RELEASES)}
        ids |= _with_role(journal, project.name)
    found = (journal.release(release_id) for release_id in ids - kept.keys())
    return kept | {release.release_id: release for release in found if release is not None}


def table(found: Iterable[Found]) -> list[dict[str, str]]:
    """Rows to show: kind, name, size, age, why."""
    return [
        {
            "kind": one.kind,
            "name": one.name,
            "size": f"{one.bytes / 2**20:.1f} MiB" if one.bytes else "",
            "age": _span(one.age_seconds),
            "why": one.why,
        }
        for one in found
    ]


def _candidates(journal: Journal) -> Iterator[_Leftover]:
    """Candidates that have waited for a person longer than they may."""
    for project in journal.projects():
        for environment in ENVIRONMENTS:
            state = state_in(journal, project.name, environment)
            if not _expired(state) or _is_held(journal, project.name, environment):
                continue
            assert state.asked_until is not None
            found = Found(
                kind="candidate",
                name=f"{state.candidate} in {environment}",
                why=f"nobody decided in time: {state.asked}",
                age_seconds=(datetime.now(UTC) - state.asked_until).total_seconds(),
            )
            yield _Leftover(found, partial(_withdraw, journal, project.name, environment))


def _withdraw(journal: Journal, project: str, environment: Environment) -> bool:
    with leases.briefly(journal, project, environment, "reap") as lease:
        state = state_in(journal, project, environment)
        if lease is None or not _expired(state):
            return False
        journal.decide(
            project=project,
            environment=environment,
            kind="withdrawn",
            release_id=state.candidate,
            payload={"reason": f"nobody decided in time: {state.asked}"},
            lease=lease,
        )
        return True


def _expired(state: ServiceState) -> bool:
    return state.asked_until is not None and state.asked_until <= datetime.now(UTC)


def _instances(settings: Settings, journal: Journal, target: Target) -> Iterator[_Leftover]:
    """Processes and containers of releases that have no role."""
    for instance in target.instances():
        project, environment, release_id = (
            instance.project,
            instance.environment,
            instance.endpoint.release_id,
        )
        state = state_in(journal, project, environment)
        roles = state.roles(datetime.now(UTC)).keys() - ({state.candidate} if _expired(state) else set())
        if release_id in roles or _is_held(journal, project, environment):
            continue
        found = Found(
            kind="instance",
            name=instance.endpoint.name,
            why=f"{release_id} has no role in {environment}",
            age_seconds=instance.uptime_seconds,
        )
        yield _Leftover(found, partial(_stop, settings, journal, target, instance))


def _stop(settings: Settings, journal: Journal, target: Target, instance: Running) -> bool:
    with leases.briefly(journal, instance.project, instance.environment, "reap") as lease:
        if lease is not None:
            reconcile.stop_roleless(settings, journal, target, instance.project, instance.environment)
    return instance.endpoint.name not in {other.endpoint.name for other in target.instances()}


def _processes(settings: Settings, journal: Journal, target: Target) -> Iterator[_Leftover]:
    """Orphaned processes. The port of a service may be theirs: what could not have it is started again."""

    def end(stray: strays.Stray) -> bool:
        ended = stray.end()
        reconcile.reconcile(settings, journal, target)
        return ended

    for stray in strays.strays(settings):
        found = Found(
            kind="process",
            name=f"{stray.pid}: {stray.command[:80]}",
            why=stray.why,
            age_seconds=stray.age_seconds,
        )
        yield _Leftover(found, partial(end, stray))


def _cached(settings: Settings, journal: Journal, target: Target) -> Iterator[_Leftover]:
    """Files and folders for releases of long ago, and of runs that have ended."""
    kept = kept_releases(journal, target).values()
    names = [instance.endpoint.name for instance in target.instances()]
    for unneeded in caches.unneeded(settings.root, kept, names):
        found = Found(
            kind=unneeded.kind,
            name=str(unneeded.path.relative_to(settings.root)),
            why=unneeded.why,
            bytes=unneeded.bytes(),
            age_seconds=unneeded.age_seconds,
        )
        yield _Leftover(found, partial(_remove_cached, journal, unneeded))


def _remove_cached(journal: Journal, unneeded: Unneeded) -> bool:
    if unneeded.kind != "release" or unneeded.half_made:
        return unneeded.remove()
    with _quiet(journal, unneeded.path.name) as ours:
        return ours and unneeded.remove()


def _images(settings: Settings, journal: Journal, target: Target, engine: Engine) -> Iterator[_Leftover]:
    """Images of releases that nobody has asked for, and runtimes below none of those that stay."""
    kept = kept_releases(journal, target)
    releases = settings.root / "releases"

    def is_old(release_id: str) -> bool:
        if release_id in kept or caches.asked_for(
            releases / release_id
        ):  # a deploy asks for the folder first
            return False
        return journal.release(release_id) is not None  # another installation's may be in the same engine

    images = list(old_images.of_releases(engine, is_old))
    for image in (*images, *old_images.runtimes(engine, {image.image_id for image in images})):
        found = Found(
            kind="image",
            name=image.names[0],
            why="no release that is kept needs it",
            bytes=image.bytes,
            age_seconds=image.age_seconds,
        )
        yield _Leftover(found, partial(_remove_image, journal, engine, image))


def _remove_image(journal: Journal, engine: Engine, image: OldImage) -> bool:
    if not image.release_id:
        return image.remove(engine)
    with _quiet(journal, image.release_id) as ours:
        return ours and image.remove(engine)


@contextmanager
def _quiet(journal: Journal, release_id: str) -> Iterator[bool]:
    """Whether the release has no role, and no rollout of its project gives it one while this block lasts."""
    project = release_id.rpartition("-")[0]
    with ExitStack() as stack:
        held = [
            stack.enter_context(leases.briefly(journal, project, environment, "reap"))
            for environment in ENVIRONMENTS
        ]
        yield None not in held and release_id not in _with_role(journal, project)


def _with_role(journal: Journal, project: str) -> set[str]:
    ids: set[str] = set()
    for environment in ENVIRONMENTS:
        decisions = journal.decisions(project, environment)
        state = state_of(decisions)
        ids |= {release_id for release_id in (state.active, state.previous, state.candidate) if release_id}
        ids |= set(earlier(d for d in decisions if d.kind == "promoted")[:1])
    return ids


def _is_held(journal: Journal, project: str, environment: Environment) -> bool:
    return journal.holder(project, environment, leases.myself("reap").host) is not None


def _span(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
