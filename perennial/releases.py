"""Releases: written once, found by id, and put on disk as a server reads them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zipfile
import zlib
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import msgspec

from perennial import artifacts, index
from perennial.config import Project
from perennial.errors import ReleaseError
from perennial.journal import Journal
from perennial.store import Store
from perennial.values import (
    Dataset,
    Evaluation,
    GateReport,
    ModelEnvironment,
    Package,
    Release,
    ReleaseId,
    Source,
    TestReport,
    TrainedModel,
    Verdict,
)
from serving import contract

SHOWN_RELEASES = 5


def content_id(
    *, code: Source, environment: ModelEnvironment, dataset: Dataset, model: TrainedModel
) -> ReleaseId:
    """The id of a release, from its content: same commit, data, lock and seed give the same id.

    The wheel is not among the content: the commit determines it. Nor is the form that is served: model, lock
    (with the serving wheel, which compiles) and commit determine it.
    """
    content = {
        "git_sha": code.git_sha,
        "subdirectory": code.subdirectory,
        "data": dataset.fingerprint,
        "as_of": dataset.as_of.isoformat(),
        "environment": environment.fingerprint,
        "seed": model.seed,
        "model": model.artifact.sha256,
        "schema": model.input_schema.sha256,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{code.project}-{digest[:12]}"


def draft_release(
    *,
    code: Source,
    contract: Project,
    environment: ModelEnvironment,
    dataset: Dataset,
    tests: TestReport,
    model: TrainedModel,
    evaluation: Evaluation,
    gates: GateReport,
) -> Release:
    """The release as the gates left it: rejected for good, or accepted and yet to be published."""
    return Release(
        release_id=content_id(code=code, environment=environment, dataset=dataset, model=model),
        project=code.project,
        import_name=contract.package,
        task=contract.config.task,
        timezone=contract.config.schedule.timezone,
        service=contract.config.service,
        rollout=contract.config.rollout,
        status="accepted" if gates.passed else "rejected",
        source=code,
        dataset=dataset,
        environment=environment,
        tests=tests,
        model=model,
        evaluation=evaluation,
        gates=gates,
        created_at=datetime.now(UTC),
    )


def write(store: Store, journal: Journal, release: Release) -> Release:
    """Make the release exist: its document in the store, then its row in the journal, which is what counts.

    Once: whoever writes the same id again, or after a crash between the two, gets the first document back.

    Raises ReleaseError when it was first written with the other status.
    """
    key = f"releases/{release.project}/{release.release_id}/release.json"
    document = release.model_dump_json(indent=1).encode()
    if not store.create(key, document):
        first = Release.model_validate_json(store.get(key))
        if first.status != release.status:
            raise ReleaseError(
                f"{release.release_id} was written as {first.status}, and is {release.status} now",
                expected="the same verdict: a release is never judged twice",
                next_command="commit a change, or build on another day's data",
            )
        release = first
    return journal.record_release(release)


def find(journal: Journal, project: str, release_id: str | None = None) -> Release:
    """An accepted release of the project: the one named, or the newest.

    Raises ReleaseError for an unknown id, with the nearest there are, and for a rejected one, with its gates.
    """
    if release_id is None:
        return _newest(journal, project)
    release = journal.release(release_id)
    if release is None or release.project != project:
        raise _unknown(journal, project, release_id)
    if release.status == "rejected":
        raise ReleaseError(
            f"{release_id} was rejected by {_failed_gates(release)}",
            expected="an accepted release",
            next_command=f"prefect deployment run 'build/{project}'",
        )
    return release


def materialise(store: Store, release: Release, root: Path) -> Path:
    """The release as a folder to start a server on, `root/<release_id>`, every digest checked first.

    A folder that is there already is used again if it is whole, else replaced.

    Raises ReleaseError when something is missing, altered, or not a wheel that may be unpacked.
    """
    if release.package is None:
        raise ReleaseError(
            f"{release.release_id} was {release.status} and has no package",
            expected="an accepted release",
            next_command=f"prefect deployment run 'build/{release.project}'",
        )
    root.mkdir(parents=True, exist_ok=True)
    directory = root / release.release_id
    with TemporaryDirectory(prefix=".materialise-", dir=root) as temporary:
        new = Path(temporary) / "new"
        _fill(store, release, release.package, new)
        (new / contract.MANIFEST_FILE).write_bytes(_manifest(release))
        with artifacts.alone_in(root):
            if not _same(new, directory):
                _replace(directory, new, Path(temporary) / "old")
            os.utime(directory)  # asked for now (see caches.py)
    return directory


def _newest(journal: Journal, project: str) -> Release:
    accepted = journal.releases(project, "accepted", limit=1)
    if accepted:
        return accepted[0]
    rejected = journal.releases(project, "rejected", limit=1)
    raise ReleaseError(
        f"{project} has no accepted release"
        + (f"; the newest, {rejected[0].release_id}, was rejected" if rejected else ""),
        expected="a build that passed its gates",
        next_command=f"prefect deployment run 'build/{project}'",
    )


def _failed_gates(release: Release) -> str:
    failed = [gate for gate in release.gates.gates if gate.verdict is not Verdict.PASS]
    return "; ".join(
        f"gate {g.name}: {g.verdict.value}, measured {g.measured}, threshold {g.threshold}, {g.reason}"
        for g in failed
    )


def _unknown(journal: Journal, project: str, release_id: str) -> ReleaseError:
    known = [release.release_id for release in journal.releases(project)]
    near = get_close_matches(release_id, known, n=SHOWN_RELEASES, cutoff=0.0)
    return ReleaseError(
        f"{project} has no release {release_id!r}",
        expected=f"one of: {', '.join(near)}" if near else "a release, and there is none yet",
        next_command="" if near else f"prefect deployment run 'build/{project}'",
    )


def _fill(store: Store, release: Release, package: Package, directory: Path) -> None:
    artifacts.fetch(store, release.model.artifact, directory / contract.MODEL_DIRECTORY)
    artifacts.fetch(store, release.model.input_schema, directory / contract.SCHEMA_FILE)
    artifacts.fetch(store, release.model.golden, directory / contract.GOLDEN_FILE)
    if release.serving is not None:
        artifacts.fetch(store, release.serving.artifact, directory / contract.SERVING_DIRECTORY)
    wheel = directory / package.filename
    artifacts.fetch(store, index.artifact(store, package), wheel)
    _unpack(wheel, directory / contract.SITE_DIRECTORY)
    wheel.unlink()


def _manifest(release: Release) -> bytes:
    manifest = contract.Manifest(
        release_id=release.release_id,
        project=release.project,
        package=release.import_name,
        task=release.task,
        git_sha=release.source.git_sha,
        data_fingerprint=release.dataset.fingerprint,
        as_of=release.dataset.as_of.isoformat(),
        model_sha256=release.model.artifact.sha256,
        limits=contract.Limits(
            max_rows=release.service.max_rows,
            max_body_bytes=release.service.max_body_bytes,
            max_concurrent_requests=release.service.max_concurrent_requests,
            drain_seconds=release.service.drain_seconds,
            workers=release.service.workers,
        ),
    )
    document = msgspec.to_builtins(manifest)
    if release.serving is None:  # its own serving wheel is older than `workers`, and refuses what is unknown
        del document["limits"]["workers"]
    return msgspec.json.format(msgspec.json.encode(document))


def _unpack(wheel: Path, site: Path) -> None:
    """Write the wheel's files below `site`; nothing is written when one of them would be elsewhere."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                _check_member(wheel.name, member)
            archive.extractall(site)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ReleaseError(
            f"the wheel {wheel.name} cannot be unpacked: {error}",
            expected="a wheel that a build made",
            next_command="raise [project] version in pyproject.toml, commit and build again",
        ) from None


def _check_member(wheel: str, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    linked = stat.S_ISLNK(member.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename or linked:
        raise ReleaseError(
            f"the wheel {wheel} would write outside its folder: {member.filename!r}",
            expected="relative paths, no links",
            next_command="build the release again from a source you trust",
        )


def _same(new: Path, old: Path) -> bool:
    """Whether `old` holds every file of `new`, byte for byte. What running code adds (.pyc) may stay, but no
    other way to serve the release.
    """
    files = _files(new)
    ways = {file for file in _files(old) if file.parts[0] == contract.SERVING_DIRECTORY}
    return ways <= files and all((old / file).is_file() and _equal(old / file, new / file) for file in files)


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def _equal(one: Path, other: Path) -> bool:
    return artifacts.file_sha256(one) == artifacts.file_sha256(other)


def _replace(directory: Path, new: Path, old: Path) -> None:
    """Put `new` in place. A server that runs from the replaced folder has its model in memory already."""
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
