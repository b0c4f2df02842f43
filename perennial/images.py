"""Images of releases: the one module that talks to a Docker engine.

Three images, each on the one before, by rate of change: a base (Python and what it links to), a runtime (what
a lock pins, and the serving wheel), a release (its files). A new model costs the last only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

import msgspec

from perennial import environments, image_context, image_site, process
from perennial.artifacts import file_sha256
from perennial.errors import ChildFailed, InstallationError, ReleaseError
from perennial.image_context import Context
from perennial.values import Value
from serving import contract

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.errors import APIError

DOCKER_FILES = Path(__file__).resolve().parents[1] / "infra" / "docker"
LOCAL_BASE_PYTHON = "3.11"  # of the Debian that base.sh unpacks
_BASE_SECONDS = 900.0
_ENGINE_SECONDS = 600


class Image(Value):
    """An image in an engine: `image_id` is the digest of its configuration, `reference` is a tag to read."""

    reference: str
    image_id: str
    size_bytes: int
    runtime: str  # the image it stands on
    path: str  # "compiled" or "original", as the release's plan says


@contextmanager
def open_engine(url: str = "") -> Iterator[DockerClient]:
    """The engine at `url`, else the one that DOCKER_HOST names, else the local socket.

    Raises InstallationError when none answers.
    """
    import docker
    from docker.errors import DockerException

    try:
        engine = (
            docker.DockerClient(base_url=url, timeout=_ENGINE_SECONDS)
            if url
            else docker.from_env(timeout=_ENGINE_SECONDS)
        )
        engine.ping()
    except DockerException as error:
        raise InstallationError(
            f"no Docker engine answers at {url or 'DOCKER_HOST or its default'}: {error}",
            "an engine of API 1.41 or newer",
            "apt-get install -y --no-install-recommends docker.io, start dockerd, set DOCKER_HOST",
            transient=True,
        ) from error
    try:
        yield engine
    finally:
        engine.close()


def build_image(
    engine: DockerClient,
    release: Path,
    lock: Path,
    serving_wheel: Path,
    work: Path,
    *,
    python: str = environments.PYTHON,
    base: str = "",
) -> Image:
    """The image of a release directory.

    `lock`, `serving_wheel` and `python` (major.minor) are those of the release's environment. `base` is any
    image with Python in it, by digest (`python@sha256:…`); without, the local base is made, once. Nothing is
    pulled, and the build has no network. The same release again costs a look-up.

    Raises ReleaseError for a directory that is no release, ProjectError for a lock that cannot be installed,
    InstallationError for an engine or a base that cannot do it.
    """
    manifest, path = _read(release)
    stands_on = base or local_base(engine, work)
    found = _find(engine, stands_on)
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
    reference = f"perennial/{manifest.project}:{manifest.release_id}"
    with image_context.create() as (context, file):
        context.add_text("Dockerfile", (DOCKER_FILES / "release.Dockerfile").read_text())
        context.add_tree("release", release)
        labels = {
            "org.opencontainers.image.revision": manifest.git_sha,
            "org.opencontainers.image.version": manifest.release_id,
        }
        built = _build(engine, context, file, reference, {"RUNTIME": runtime}, labels)
    return Image(
        reference=reference, image_id=built.id, size_bytes=built.attrs["Size"], runtime=runtime, path=path
    )


def local_base(engine: DockerClient, work: Path) -> str:
    """The base image that needs no registry, made by infra/docker/base.sh once per state of that script."""
    from docker.errors import APIError

    script = DOCKER_FILES / "base.sh"
    key = file_sha256(script)[:12]
    reference = f"perennial/base:{key}"
    if _find(engine, reference) is None:
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
                    what="infra/docker/base.sh",
                )
            except ChildFailed as error:
                raise InstallationError(
                    f"the local base image cannot be made: {error.found}",
                    "root, debootstrap and a Debian mirror; or an image with Python as the base",
                    "infra/docker/base.sh base.tar, until it succeeds",
                ) from error
            try:
                engine.api.import_image(
                    str(root),
                    repository="perennial/base",
                    tag=key,
                    changes=[f"ENV PYTHON_VERSION={LOCAL_BASE_PYTHON}", 'CMD ["python3"]'],
                )
            except APIError as error:
                raise _refused(f"to import {reference}", error) from error
    return reference


def _runtime(
    engine: DockerClient,
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
    if _find(engine, reference) is not None:
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
        _build(engine, context, file, reference, {"BASE": base}, {})
    return reference


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


def _find(engine: DockerClient, reference: str) -> Any:
    from docker.errors import ImageNotFound

    try:
        return engine.images.get(reference)
    except ImageNotFound:
        return None


def _build(
    engine: DockerClient,
    context: Context,
    file: IO[bytes],
    reference: str,
    arguments: Mapping[str, str],
    labels: Mapping[str, str],
) -> Any:
    from docker.errors import APIError, BuildError

    context.close()
    file.seek(0)
    try:
        image, _ = engine.images.build(
            fileobj=file,
            custom_context=True,
            tag=reference,
            buildargs=dict(arguments),
            labels=dict(labels),
            network_mode="none",
            pull=False,
            rm=True,
            forcerm=True,
        )
    except BuildError as error:
        said = "".join(part.get("stream", "") for part in error.build_log).splitlines()[-process.TAIL_LINES :]
        raise InstallationError(
            f"the engine could not build {reference}: {error.msg}. Its last lines:\n" + "\n".join(said),
            "a base whose `python3` runs, and sources that it compiles",
            "docker run BASE python3 --version",
        ) from error
    except APIError as error:
        raise _refused(f"to build {reference}", error) from error
    return image


def _refused(what: str, error: APIError) -> InstallationError:
    return InstallationError(
        f"the engine refused {what}: {error.explanation}",
        "an engine with room on its disk",
        "docker system df",
        transient=error.is_server_error(),
    )
