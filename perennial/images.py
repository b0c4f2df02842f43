"""Images of releases, built by a Docker engine.

Three images, each on the one before, by rate of change: a base (Python and what it links to), a runtime (what
a lock pins, and the serving wheel), a release (its files). A new model costs the last only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from perennial import environments, image_context, image_site, process
from perennial.artifacts import file_sha256
from perennial.engine import Engine, asking, build, find_image
from perennial.errors import ChildFailed, InstallationError, ReleaseError
from perennial.values import Value
from serving import contract

DOCKER_FILES = Path(__file__).resolve().parents[1] / "infra" / "docker"
LOCAL_BASE_PYTHON = "3.11"  # of the Debian that base-image.sh unpacks
_BASE_SECONDS = 900.0
_NO_LABELS: Mapping[str, str] = {}


class Image(Value):
    """An image in an engine: `image_id` is the digest of its configuration, `reference` is a tag to read."""

    reference: str
    image_id: str
    size_bytes: int
    runtime: str  # the image it stands on
    path: str  # "compiled" or "original", as the release's plan says


def build_image(
    engine: Engine,
    release: Path,
    lock: Path,
    serving_wheel: Path,
    work: Path,
    *,
    python: str = environments.PYTHON,
    base: str = "",
    labels: Mapping[str, str] = _NO_LABELS,
) -> Image:
    """The image of a release directory. Its lineage is in its labels, with those given.

    `lock`, `serving_wheel` and `python` (major.minor) are those of the release's environment. `base` is any
    image with Python in it, by digest (`python@sha256:…`); without, the local base is made, once. Nothing is
    pulled, and the build has no network. The same release again costs a look-up.

    Raises ReleaseError for a directory that is no release, ProjectError for a lock that cannot be installed,
    InstallationError for an engine or a base that cannot do it.
    """
    manifest, path = _read(release)
    stands_on = base or local_base(engine, work)
    found = find_image(engine, stands_on)
    if found is None:
        raise InstallationError(
            f"the engine has no image {stands_on}",
            "a base that was pulled or built",
            f"docker pull {stands_on}",
        )
    has = _python(stands_on, found)
    if path == "original" and has != python:
        raise InstallationError(
            f"{stands_on} has Python {has}, and {manifest.release_id} is served by the original model",
            f"Python {python}, which it was trained with: another one may load or predict differently",
            f"name a base with Python {python}",
        )
    runtime = _runtime(engine, stands_on, found.id, has, lock, serving_wheel, path, work)
    reference = name(manifest.project, manifest.release_id)
    with image_context.create() as (context, file):
        context.add_text("Dockerfile", (DOCKER_FILES / "release.Dockerfile").read_text())
        context.add_tree("release", release)
        built = build(
            engine, context, file, reference, {"RUNTIME": runtime}, {**_lineage(manifest), **labels}
        )
    return Image(
        reference=reference, image_id=built.id, size_bytes=built.attrs["Size"], runtime=runtime, path=path
    )


def name(project: str, release_id: str) -> str:
    """What the engine calls the image of a release: to find it by, never to start it by."""
    return f"perennial/{project}:{release_id}"


def local_base(engine: Engine, work: Path) -> str:
    """The base image that needs no registry, made once per state of infra/docker/base-image.sh."""
    script = DOCKER_FILES / "base-image.sh"
    key = file_sha256(script)[:12]
    reference = f"perennial/base:{key}"
    if find_image(engine, reference) is None:
        work.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="base-", dir=work) as folder:
            root = Path(folder) / "base.tar"
            try:
                process.run(
                    [str(script), str(root)],
                    cwd=Path(folder),
                    environment=process.scrubbed_environment(network=True),
                    timeout_seconds=_BASE_SECONDS,
                    log=work / "base.log",
                    what="infra/docker/base-image.sh",
                )
            except ChildFailed as error:
                raise InstallationError(
                    f"the local base image cannot be made: {error.found}",
                    "root, debootstrap and a Debian mirror; or an image with Python as the base",
                    "infra/docker/base-image.sh base.tar, until it succeeds",
                ) from error
            with asking(f"to import {reference}"):
                engine.api.import_image(
                    str(root),
                    repository="perennial/base",
                    tag=key,
                    changes=[f"ENV PYTHON_VERSION={LOCAL_BASE_PYTHON}", 'CMD ["python3"]'],
                )
    return reference


def _runtime(
    engine: Engine,
    base: str,
    base_id: str,
    python: str,
    lock: Path,
    serving_wheel: Path,
    path: str,
    work: Path,
) -> str:
    """The image below every release of this lock, serving wheel and base."""
    text = lock.read_text(encoding="utf-8")
    pinned = image_site.pins(text, image_site.COMPILED_DISTRIBUTIONS) if path == "compiled" else text
    dockerfile = (DOCKER_FILES / "runtime.Dockerfile").read_text()
    recipe = file_sha256(Path(image_site.__file__))  # what is left out
    made_of = (base_id, file_sha256(serving_wheel), pinned, dockerfile, recipe)
    reference = f"perennial/runtime:{path}-{hashlib.sha256(' '.join(made_of).encode()).hexdigest()[:12]}"
    if find_image(engine, reference) is not None:
        return reference
    work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="runtime-", dir=work) as folder, image_context.create() as (context, file):
        site, log = Path(folder), work / "runtime.log"
        image_site.unpack(pinned, site / "dependencies", python, log)
        if path == "compiled":
            image_site.leave_out(site / "dependencies")
        image_site.unpack_wheel(serving_wheel, site / "code", log)
        context.add_text("Dockerfile", dockerfile)
        context.add_tree("dependencies", site / "dependencies")
        context.add_tree("code", site / "code")
        context.add_folder("spool/spool", mode=0o1777)
        build(engine, context, file, reference, {"BASE": base}, {})
    return reference


def _lineage(manifest: contract.Manifest) -> dict[str, str]:
    """What a look at an image, or at its containers, tells of where it comes from."""
    return {
        "org.opencontainers.image.revision": manifest.git_sha,
        "org.opencontainers.image.version": manifest.release_id,
        "perennial.project": manifest.project,
        "perennial.dataset": manifest.data_fingerprint,
        "perennial.as-of": manifest.as_of,
        "perennial.model": manifest.model_sha256,
    }


def _read(release: Path) -> tuple[contract.Manifest, str]:
    """What the release says of itself, and the path by which it is served."""
    try:
        manifest = msgspec.json.decode(
            (release / contract.MANIFEST_FILE).read_bytes(), type=contract.Manifest
        )
        plan = release / contract.SERVING_DIRECTORY / contract.PLAN_FILE
        if not plan.exists():
            return manifest, "original"
        return manifest, msgspec.json.decode(plan.read_bytes(), type=contract.Plan).path
    except (OSError, msgspec.MsgspecError) as error:
        raise ReleaseError(
            f"{release} is not a release directory: {error}",
            f"a folder with {contract.MANIFEST_FILE}, as releases.materialise writes it",
            "build the release again",
        ) from error


def _python(reference: str, image: Any) -> str:
    """Major and minor version of the image's Python, by the variable that Python's own images set too."""
    variables: list[str] = image.attrs["Config"].get("Env") or []
    for variable in variables:
        name, _, value = variable.partition("=")
        if name == "PYTHON_VERSION":
            return ".".join(value.split(".")[:2])
    raise InstallationError(
        f"{reference} does not say which Python it has",
        "the variable PYTHON_VERSION in the image, as Python's official images have it",
        "use such an image as the base",
    )
