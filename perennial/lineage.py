"""What is active where, and what a release is made of, as text for a terminal."""

from __future__ import annotations

from datetime import UTC, datetime

from perennial import leases
from perennial.errors import ReleaseError
from perennial.journal import Journal
from perennial.service_state import ServiceState, state_of
from perennial.settings import Settings
from perennial.values import ENVIRONMENTS, Release, ReleaseId
from perennial.way_back import earlier


def overview(journal: Journal, settings: Settings) -> str:
    """What serves where, of each project in each environment, and below it what is going on."""
    here = leases.myself("status").host
    lines = []
    for project in journal.projects():
        for environment in ENVIRONMENTS:
            decisions = journal.decisions(project.name, environment)
            state = state_of(decisions)
            url = f"{settings.router_url(environment)}/{project.name}" if state.active else ""
            serves = state.active or "nothing deployed"
            lines.append(f"{project.name:<16} {environment:<12} {serves:<32} {url}".rstrip())
            way_back = earlier(d for d in decisions if d.kind == "promoted")
            holder = journal.holder(project.name, environment, here)
            facts = {
                "way back": _way_back(state, way_back),
                "probation": _until(state.probation_until()),
                "candidate": _candidate(state),
                "rollout": str(holder or ""),
            }
            lines += [f"{'':<16} {name:<12} {fact}" for name, fact in facts.items() if fact]
    return "\n".join(["", *lines]) if lines else "\nno project is enabled yet"


def _way_back(state: ServiceState, way: list[ReleaseId]) -> str:
    """Where a rollback leads, and whether what it leads to still runs."""
    if not way:
        return ""
    warm = _until(state.warm_until()) if way[0] == state.previous else ""
    return f"{way[0]}{f', kept warm {warm}' if warm else ''}"


def _candidate(state: ServiceState) -> str:
    if state.candidate is None:
        return ""
    if state.asked:
        by = f" {_until(state.asked_until)}" if _until(state.asked_until) else ", and is late"
        return f"{state.candidate}, without traffic: {state.asked}; a person decides{by}"
    if state.shadow_percent:
        return f"{state.candidate}, with a copy of {state.shadow_percent} % of the requests"
    if state.percent:
        return f"{state.candidate}, with {state.percent} % of the traffic"
    return f"{state.candidate}, {'standing by' if state.stepped else 'without traffic'}"


def _until(moment: datetime | None) -> str:
    """Empty when the moment has passed."""
    return f"until {moment:%Y-%m-%d %H:%M} UTC" if moment and moment > datetime.now(UTC) else ""


def of(journal: Journal, release_id: str) -> str:
    """Code, data, environment, model, verdict and deployments of one release.

    Raises ReleaseError when there is no such release.
    """
    release = journal.release(release_id)
    if release is None:
        raise ReleaseError(f"there is no release {release_id!r}", "an id that `make status` or MLflow shows")
    facts = {
        "release": f"{release.release_id} ({release.status})",
        "code": f"{release.source.repository} at {release.source.git_sha}",
        "data": f"{release.dataset.rows:,} rows known on {release.dataset.as_of}",
        "": f"{release.dataset.uri}, fingerprint {release.dataset.fingerprint}",
        "environment": f"lock {release.environment.lock.sha256[:16]}, Python {release.environment.python}",
        "model": f"{release.model.artifact.uri}, sha256 {release.model.artifact.sha256}",
        "package": release.package.filename if release.package else "not published",
        "MLflow": f"version {release.mlflow_version}" if release.mlflow_version else "not registered",
        "tests": f"{release.tests.passed} passed",
        "gates": release.gates.summary,
        **_served(release),
    }
    for decision in journal.decisions(release.project):
        if decision.release_id == release_id:
            facts[f"{decision.at:%Y-%m-%d %H:%M:%S}"] = (
                f"{decision.kind} {decision.environment or ''}".strip()
            )
    return "\n".join(f"{name:<20} {value}" for name, value in facts.items())


def _served(release: Release) -> dict[str, str]:
    """How the release is served, and why."""
    form = release.serving
    if form is None:
        return {"served": "by the original, one request at a time" if release.package else "never"}
    return {
        "served": f"{'compiled' if form.path == 'compiled' else 'by the original'}: {form.reason}",
        "parity": form.parity,
        "batching": f"{'yes' if form.batching else 'no'}: {form.batching_reason}",
    }
