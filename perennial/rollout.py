"""Put a release in front of users: start, prove, shift, switch, retire. The world follows the journal.

Each act is written to the journal, under the service's lease, before it is done, and may be done again. After
a crash at any point, running the same deploy again, or `reconcile`, brings router and processes to what the
journal says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from perennial import analysis, approvals, environments, leases, proof, reconcile, releases, router, way_back
from perennial.analysis import Evidence
from perennial.errors import PerennialError, ReleaseError, RolloutError
from perennial.journal import Journal, Lease
from perennial.probe import probe
from perennial.service_state import Role, ServiceState, state_in
from perennial.settings import Settings
from perennial.store import Store
from perennial.supervision import UP_STATES
from perennial.targets import Instance, Target
from perennial.values import (
    ENVIRONMENTS,
    Endpoint,
    Environment,
    JsonObject,
    ParityReport,
    Release,
    ReleaseId,
    Rollout,
    RolloutPolicy,
)

AT_ONCE = ("all-at-once", "blue-green")
_BACK_SECONDS = 10.0  # what a process that died has to be back


def admit(journal: Journal, release: Release, environment: Environment) -> None:
    """Raises ReleaseError unless this release may enter this environment.

    Where the project's policy requires it, an environment opens for an approval of exactly these digests, and
    for nothing else. A rollback to a release that was approved before waits for nobody.
    """
    approvals.by_policy(journal, release, environment)
    needed = environment == "production" or approvals.is_required(release, environment)
    if not needed or journal.approval(release, environment) is not None:
        return
    raise ReleaseError(
        f"nobody has approved {release.release_id} for {environment}",
        "an approval in the journal that is bound to this release's digests, and not expired",
        f"python -m perennial approve {release.release_id} --reviewer YOUR-NAME",
    )


def policy_of(journal: Journal, release: Release, environment: Environment) -> RolloutPolicy:
    """How this release comes to users: as its project says, but back at once to where they have been.

    What was rolled back from is no such place: deployed again, it has to prove itself again.
    """
    policy = release.rollout.of(environment)
    promotions = journal.decisions(release.project, environment, ("promoted",))
    active = promotions[-1].release_id if promotions else None
    if release.release_id in (active, *way_back.earlier(promotions)):
        return policy.model_copy(update={"strategy": "blue-green", "probation_seconds": 0.0})
    return policy


def start(
    settings: Settings,
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    folder: Path,
    variables: dict[str, str],
    image: str = "",
) -> Endpoint:
    """Start a candidate, return when it is ready. One that fails is withdrawn; the active one serves.

    `variables`: what its process needs in its environment to reach the store. `image`: what `Target.prepare`
    returned.
    """
    lease = leases.hold(journal, release.project, environment)
    state = state_in(journal, release.project, environment)
    instance = reconcile.running(target, environment).get(release.release_id)
    up = instance is not None and instance.state in UP_STATES
    if state.active == release.release_id and state.candidate is not None and not state.asked:
        _abandon(settings, journal, target, release, environment, lease, state.candidate)
    if state.active == release.release_id and instance is not None and up:
        # Users are on it: whatever has changed around it, it is not restarted. It may be coming back itself.
        _wait_back(instance.endpoint, release.service.ready_timeout_seconds)
        return instance.endpoint
    warm = up and state.roles(datetime.now(UTC)).get(release.release_id) is Role.WARM
    if state.active != release.release_id and not _begun(state, release, lease):
        admit(journal, release, environment)  # here too: a retried run has the steps before from its cache
        _begin(journal, release, environment, lease, policy_of(journal, release, environment), image)
        if state.candidate is not None:  # one that was left behind, perhaps with a share of the traffic
            with router.alone(settings):
                reconcile.route(settings, journal, target)
    wanted = Instance(
        environment=environment,
        project=release.project,
        release_id=release.release_id,
        python=environments.python_of(release.environment, settings.root / "environments"),
        release=folder,
        prediction_log=settings.store,
        spool=analysis.spool_of(settings, release.project, environment),
        drain_seconds=release.service.drain_seconds,
        variables=variables,
        image=image,
        memory_mb=release.service.memory_mb,
        cpus=release.service.cpus,
    )
    with _withdrawing(settings, journal, target, release, environment):
        endpoint = instance.endpoint if instance is not None and warm else target.start(wanted)
        target.wait_ready(endpoint, release.service.ready_timeout_seconds)
    return endpoint


def prove(
    settings: Settings,
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
    with _withdrawing(settings, journal, target, release, environment):
        report = proof.check_parity(endpoint, proof.golden_rows(folder), release)
        proof.check_manners(endpoint, release)
    return report


def shift(
    settings: Settings,
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    folder: Path,
    store: Store,
    policy: RolloutPolicy,
    say: analysis.Say,
) -> Evidence:
    """Give the candidate its share of the traffic, step by step, and judge it against the active release.

    Nothing serves yet, one switch, the way back: there is nothing to compare, and the evidence says so.
    Raises RolloutError, the candidate withdrawn, when it does harm. Without enough evidence it has no share
    any more when this returns, and waits for a person.
    """
    project = release.project
    lease = leases.hold(journal, project, environment)
    state = state_in(journal, project, environment)
    if state.active == release.release_id:
        return Evidence.nothing("it serves already")
    if state.first:
        return Evidence.nothing("nothing served before it")
    with _withdrawing(settings, journal, target, release, environment):
        _stand_by(settings, journal, target, release, environment, lease)
        if policy.strategy in AT_ONCE:
            return Evidence.nothing(f"{policy.strategy}: one switch")
        watch = analysis.Watch(settings, journal, target, store, release, environment, folder, policy, say)
        for percent in policy.steps:
            share = "shadow_percent" if policy.strategy == "shadow" else "percent"
            _step(settings, journal, target, release, environment, lease, {share: percent})
            evidence = watch.bake(percent, last=percent == policy.steps[-1])
            if evidence.verdict != "promote":
                break
    if evidence.verdict == "insufficient evidence":
        _ask(settings, journal, target, release, environment, lease, evidence, policy)
    return evidence


def switch(
    settings: Settings,
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    policy: RolloutPolicy | None = None,
    reason: JsonObject | None = None,
) -> Rollout:
    """Make the release the active one and move all traffic to it, without losing a request.

    Raises RolloutError, the candidate withdrawn and the routes as before, when Envoy does not take it in.
    """
    project = release.project
    lease = leases.hold(journal, project, environment)
    policy = policy or policy_of(journal, release, environment)
    state = state_in(journal, project, environment)
    if state.active != release.release_id:
        if reconcile.running(target, environment).get(release.release_id) is None:
            raise RolloutError(
                f"{release.release_id} does not run in {environment}",
                "the candidate that was started and proven",
                "run the deploy again",
            )
        if state.candidate != release.release_id:  # tests and repairs switch to what runs already
            _begin(journal, release, environment, lease, policy)
        with _withdrawing(settings, journal, target, release, environment):
            if not state.first:
                _stand_by(settings, journal, target, release, environment, lease)
            payload = {
                **(reason or {}),
                "keep_warm_seconds": 0 if policy.strategy == "all-at-once" else policy.keep_warm_seconds,
                "probation_seconds": 0 if state.first else policy.probation_seconds,
                "baseline": analysis.counted(settings, target, project, environment, state.active),
                "counted": analysis.counted(settings, target, project, environment, release.release_id),
            }
            journal.decide(
                project=project,
                environment=environment,
                kind="promoted",
                release_id=release.release_id,
                payload=payload,
                lease=lease,
            )
    with router.alone(settings):
        # Healthy, of this service only: another one that is down must not stand in the way.
        reconcile.route(settings, journal, target, healthy=[(environment, project, release.release_id)])
    after = state_in(journal, project, environment)
    return Rollout(
        project=project,
        environment=environment,
        active=release.release_id,
        previous=after.previous,
        url=f"{settings.router_url(environment)}/{project}",
        traffic_percent=100,
        position=journal.decisions(project, environment, last=1)[0].position,
    )


def retire(
    settings: Settings, journal: Journal, target: Target, project: str, environment: Environment
) -> list[str]:
    """Drain and stop every instance of the service that has no role; returns their names."""
    leases.hold(journal, project, environment)
    return reconcile.stop_roleless(settings, journal, target, project, environment)


def withdraw(
    settings: Settings,
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    reason: str,
) -> None:
    """Remove a candidate. The active release is not touched, even if it is the same one."""
    state = state_in(journal, release.project, environment)
    if state.active == release.release_id:
        return
    journal.decide(
        project=release.project,
        environment=environment,
        kind="withdrawn",
        release_id=release.release_id,
        payload={"reason": reason[:1000]},
        lease=leases.hold(journal, release.project, environment),
    )
    with router.alone(settings):
        reconcile.route(settings, journal, target, patient=False)
    reconcile.stop_roleless(settings, journal, target, release.project, environment)


def roll_back(
    settings: Settings,
    journal: Journal,
    target: Target,
    store: Store,
    project: str,
    environment: Environment,
    to: ReleaseId | None = None,
    reason: str = "",
    variables: dict[str, str] | None = None,
) -> Rollout:
    """Bring back a release that served here before (without `to` the last one that did), without a rebuild.

    Raises ReleaseError for one that never served here, or whose files are gone; nothing has changed then.
    """
    state = state_in(journal, project, environment)
    release = _served_before(journal, project, environment, to or state.previous)
    admit(journal, release, environment)
    folder = releases.materialise(store, release, settings.root / "releases")
    image = target.prepare(release, folder, store)
    endpoint = start(settings, journal, target, release, environment, folder, variables or {}, image)
    prove(settings, journal, target, release, environment, endpoint, folder)
    why: JsonObject = {"rollback_of": state.active, "reason": reason or "rolled back"}
    done = switch(settings, journal, target, release, environment, reason=why)
    retire(settings, journal, target, project, environment)
    leases.let_go(project, environment)
    return done


def restore(
    settings: Settings, journal: Journal, target: Target, store: Store, variables: dict[str, str]
) -> list[str]:
    """Start what should serve and cannot be revived: its instance, or what it is started from, is gone.

    Returns what it did, and what it could not do, in words. A service that is being rolled out is left alone.
    """
    done = []
    for project in journal.projects():
        for environment in ENVIRONMENTS:
            active = state_in(journal, project.name, environment).active
            host = leases.myself("").host
            if active is None or _is_up(target, environment, active):
                continue
            if journal.holder(project.name, environment, host) is not None:
                continue
            try:
                _restore(settings, journal, target, store, variables, project.name, environment, active)
                done.append(f"started {active} in {environment} anew: it was gone")
            except PerennialError as error:
                done.append(f"{active} should serve in {environment}, and cannot be started: {error.found}")
            finally:
                leases.let_go(project.name, environment)
    return done


def _restore(
    settings: Settings,
    journal: Journal,
    target: Target,
    store: Store,
    variables: dict[str, str],
    project: str,
    environment: Environment,
    active: ReleaseId,
) -> None:
    leases.hold(journal, project, environment, f"start {active} in {environment} anew")
    release = releases.find(journal, project, active)
    folder = releases.materialise(store, release, settings.root / "releases")
    image = target.prepare(release, folder, store)
    if state_in(journal, project, environment).active == active:  # still, with the lease held
        endpoint = start(settings, journal, target, release, environment, folder, variables, image)
        prove(settings, journal, target, release, environment, endpoint, folder)
        switch(settings, journal, target, release, environment)


def _is_up(target: Target, environment: Environment, release_id: ReleaseId) -> bool:
    instance = reconcile.running(target, environment).get(release_id)
    return instance is not None and instance.state in UP_STATES


def _served_before(
    journal: Journal, project: str, environment: Environment, release_id: ReleaseId | None
) -> Release:
    served = [d.release_id for d in journal.decisions(project, environment, ("promoted",)) if d.release_id]
    if release_id is None:
        raise ReleaseError(
            f"{project} has no earlier release in {environment}",
            "a release that served there before the active one",
            "python -m perennial status",
        )
    release = releases.find(journal, project, release_id)
    if release_id not in served:
        raise ReleaseError(
            f"{release_id} has never served in {environment}, so there is no way back to it",
            f"one of: {', '.join(dict.fromkeys(reversed(served))) or 'nothing served there yet'}",
            f"prefect deployment run 'deploy/{project}' -p release_id={release_id} "
            f"-p environment={environment}",
        )
    return release


def _wait_back(endpoint: Endpoint, timeout_seconds: float) -> None:
    """Until it is ready. One that does not come back is for the proof to explain."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        answer = probe(f"http://{endpoint.host}:{endpoint.port}/health/ready")
        if answer is not None and answer.status == 200:
            return
        time.sleep(0.05)


def _begun(state: ServiceState, release: Release, lease: Lease) -> bool:
    """Whether this very rollout has begun already: an earlier one's shares are not taken over."""
    return state.candidate == release.release_id and state.begun.get("lease") == lease.token


def _abandon(
    settings: Settings,
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    lease: Lease,
    candidate: ReleaseId,
) -> None:
    """End a rollout that died, where no candidate of ours takes its place."""
    journal.decide(
        project=release.project,
        environment=environment,
        kind="withdrawn",
        release_id=candidate,
        payload={"reason": f"its rollout died, and {release.release_id} was deployed again"},
        lease=lease,
    )
    with router.alone(settings):
        reconcile.route(settings, journal, target)


def _begin(
    journal: Journal,
    release: Release,
    environment: Environment,
    lease: Lease,
    policy: RolloutPolicy,
    image: str = "",
) -> None:
    journal.decide(
        project=release.project,
        environment=environment,
        kind="candidate",
        release_id=release.release_id,
        payload={"strategy": policy.strategy, "image": image, "lease": lease.token},
        lease=lease,
    )


def _stand_by(
    settings: Settings,
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    lease: Lease,
) -> None:
    """Have Envoy know the candidate and find it healthy, before it gets its first request."""
    state = state_in(journal, release.project, environment)
    if state.stepped and state.candidate == release.release_id:
        return
    _step(settings, journal, target, release, environment, lease, {"percent": 0})


def _step(
    settings: Settings,
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    lease: Lease,
    share: JsonObject,
) -> None:
    journal.decide(
        project=release.project,
        environment=environment,
        kind="step",
        release_id=release.release_id,
        payload=share,
        lease=lease,
    )
    with router.alone(settings):
        reconcile.route(
            settings, journal, target, healthy=[(environment, release.project, release.release_id)]
        )


def _ask(
    settings: Settings,
    journal: Journal,
    target: Target,
    release: Release,
    environment: Environment,
    lease: Lease,
    evidence: Evidence,
    policy: RolloutPolicy,
) -> None:
    until = datetime.now(UTC) + timedelta(hours=policy.approval_hours)
    journal.decide(
        project=release.project,
        environment=environment,
        kind="asked",
        release_id=release.release_id,
        payload={**evidence.model_dump(mode="json"), "expires_at": until.isoformat()},
        lease=lease,
    )
    active = reconcile.running(target, environment).get(journal.active(release.project, environment) or "")
    if active is not None:  # as long as it is coming back, users are better off with the candidate
        _wait_back(active.endpoint, _BACK_SECONDS)
    with router.alone(settings):
        reconcile.route(settings, journal, target)


@contextmanager
def _withdrawing(
    settings: Settings, journal: Journal, target: Target, release: Release, environment: Environment
) -> Iterator[None]:
    """Whatever ends this block early, a cancelled run too, takes the candidate with it."""
    try:
        yield
    except BaseException as error:
        try:
            withdraw(settings, journal, target, release, environment, str(error))
        except RolloutError as lost:  # what it saw was somebody else's doing, most likely
            if isinstance(error, RolloutError):
                raise lost from error
        except (PerennialError, OSError):
            pass  # the first error is the one to show
        raise
