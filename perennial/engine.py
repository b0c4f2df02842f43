"""The Docker engine, and how it refuses, explained. The one module that imports docker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from perennial.errors import InstallationError
from perennial.image_context import Context
from perennial.process import TAIL_LINES

if TYPE_CHECKING:
    from docker.errors import APIError

Engine = Any  # a docker.DockerClient; docker has no types

_TIMEOUT_SECONDS = 600
NOT_MODIFIED, NOT_FOUND, CONFLICT = 304, 404, 409


@contextmanager
def open_engine(url: str = "") -> Iterator[Engine]:
    """The engine at `url`, else the one that DOCKER_HOST names, else the local socket.

    Raises InstallationError, also from the block, when it does not answer or refuses.
    """
    import docker
    from docker.errors import APIError, DockerException
    from requests.exceptions import RequestException

    try:
        engine = (
            docker.DockerClient(base_url=url, timeout=_TIMEOUT_SECONDS)
            if url
            else docker.from_env(timeout=_TIMEOUT_SECONDS)
        )
        engine.ping()
    except (DockerException, RequestException) as error:
        raise _away(url, error) from error
    try:
        yield engine
    except APIError as error:
        raise refused("what was asked of it", error) from error
    except RequestException as error:
        raise _away(url, error) from error
    finally:
        engine.close()


@contextmanager
def tolerating(*statuses: int) -> Iterator[None]:
    """Go on after the block when the engine answers one of these, such as that there is no such thing."""
    from docker.errors import APIError

    try:
        yield
    except APIError as error:
        if error.status_code not in statuses:
            raise


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Raise InstallationError, which says what was asked of the engine, when it refuses in the block."""
    from docker.errors import APIError

    try:
        yield
    except APIError as error:
        raise refused(what, error) from error


def find_image(engine: Engine, reference: str) -> Any:
    """The image of a name, digest or id; None when the engine has none."""
    with tolerating(NOT_FOUND):
        return engine.images.get(reference)
    return None


def build(
    engine: Engine,
    context: Context,
    file: IO[bytes],
    reference: str,
    arguments: Mapping[str, str],
    labels: Mapping[str, str],
) -> Any:
    """The image that a context makes. Nothing is pulled, and the Dockerfile's commands have no network."""
    from docker.errors import BuildError

    context.close()
    file.seek(0)
    try:
        with asking(f"to build {reference}"):
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
        said = "".join(part.get("stream", "") for part in error.build_log).splitlines()[-TAIL_LINES:]
        raise InstallationError(
            f"the engine could not build {reference}: {error.msg}. Its last lines:\n" + "\n".join(said),
            "a base whose `python3` runs, and sources that it compiles",
            "docker run BASE python3 --version",
        ) from error
    return image


def pull(engine: Engine, reference: str) -> Any:
    """An image of a registry, by digest."""
    with asking(f"to pull {reference}"):
        return engine.images.pull(reference)


def push(engine: Engine, repository: str, tag: str) -> str:
    """Bring a tagged image to its registry, which has most of its layers; the digest it has there."""
    with asking(f"to push {repository}"):
        for said in engine.api.push(repository, tag, stream=True, decode=True):
            if "error" in said:
                break
            if "aux" in said:
                return str(said["aux"]["Digest"])
    raise InstallationError(
        f"{repository}:{tag} cannot be pushed: {said.get('error', 'the registry named no digest')}",
        "a registry that answers, and takes this engine's images",
        f"docker push {repository}:{tag}",
        transient=True,
    )


def digest_in_registry(engine: Engine, reference: str) -> str:
    """The digest that a reference has in its registry; empty when there is no such image there."""
    with asking(f"to look for {reference}"), tolerating(NOT_FOUND):
        return str(engine.api.inspect_distribution(reference)["Descriptor"]["digest"])
    return ""


def start(engine: Engine, container: str) -> str:
    """Start a container; what the engine says when it cannot, else nothing."""
    from docker.errors import APIError

    try:
        engine.api.start(container)
    except APIError as error:
        return str(error.explanation)
    return ""


def refused(what: str, error: APIError) -> InstallationError:
    return InstallationError(
        f"the Docker engine refused {what}: {error.explanation}",
        "an engine with room on its disk",
        "docker system df",
        transient=error.is_server_error(),
    )


def _away(url: str, error: Exception) -> InstallationError:
    return InstallationError(
        f"no Docker engine answers at {url or 'DOCKER_HOST or its default'}: {error}",
        "an engine of API 1.41 or newer",
        "apt-get install -y --no-install-recommends docker.io, start dockerd, set DOCKER_HOST",
        transient=True,
    )
