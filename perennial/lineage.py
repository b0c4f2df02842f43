"""What is active where, and what a release is made of, as text for a terminal."""

from __future__ import annotations

from perennial.errors import ReleaseError
from perennial.journal import Journal
from perennial.settings import Settings
from perennial.values import ENVIRONMENTS, Release


def overview(journal: Journal, settings: Settings) -> str:
    """A line per project and environment."""
    lines = []
    for project in journal.projects():
        for environment in ENVIRONMENTS:
            active = journal.active(project.name, environment)
            url = f"{settings.router_url(environment)}/{project.name}" if active else ""
            lines.append(f"{project.name:<16} {environment:<12} {active or 'nothing deployed':<32} {url}")
    return "\n".join(["", *lines]) if lines else "\nno project is enabled yet"


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
