"""The image of a release, by digest: found in the engine or the registry, else built and published."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perennial import artifacts, images
from perennial.engine import Engine, digest_in_registry, find_image, pull, push
from perennial.errors import InstallationError
from perennial.settings import Settings
from perennial.store import Store
from perennial.values import Release

_DIGEST_LABEL = "perennial.release"  # of the release document: a tag may be anybody's


def provide(engine: Engine, settings: Settings, release: Release, folder: Path, store: Store) -> str:
    """The reference to start the release by: `REGISTRY/…@sha256:…`, or the image's id where there is none.

    `folder` is the release directory. An image that was built before is used, whatever base and builder are
    today. Raises what `images.build_image` raises, and InstallationError when the registry does not take it.
    """
    image = _known(engine, settings, release)
    if image is None:
        with _alone(settings.root / "images"):
            image = _known(engine, settings, release) or _build(engine, settings, release, folder, store)
    if not settings.registry:
        return str(image.id)
    return _publish(engine, image, _repository(settings, release), release.release_id)


def ensure(engine: Engine, reference: str) -> None:
    """Have the image in the engine, from its registry if it must be.

    Raises InstallationError when there is no such image.
    """
    if reference and find_image(engine, reference) is not None:
        return
    if "@" not in reference:
        raise InstallationError(
            f"the engine has no image {reference or '(none was named)'}",
            "the image that `prepare` made, by digest",
            "run the deploy again, which makes it",
        )
    pull(engine, reference)


def _known(engine: Engine, settings: Settings, release: Release) -> Any:
    """The image of exactly this release, of the engine or else of the registry."""
    name = images.name(release.project, release.release_id)
    found = find_image(engine, name)
    if found is not None and _is_of(found, release):
        return found
    if not settings.registry:
        return None
    repository = _repository(settings, release)
    digest = digest_in_registry(engine, f"{repository}:{release.release_id}")
    if not digest:
        return None
    pulled = pull(engine, f"{repository}@{digest}")
    if not _is_of(pulled, release):
        return None
    pulled.tag(name)
    return pulled


def _is_of(image: Any, release: Release) -> bool:
    return bool(image.labels.get(_DIGEST_LABEL) == release.digest())


def _build(engine: Engine, settings: Settings, release: Release, folder: Path, store: Store) -> Any:
    if settings.base_image:
        ensure(engine, settings.base_image)
    cache = settings.root / "environments" / "cache"
    built = images.build_image(
        engine,
        folder,
        artifacts.open_local(store, release.environment.lock, cache),
        artifacts.open_local(store, release.environment.serving, cache),
        settings.root / "images",
        python=release.environment.python,
        base=settings.base_image,
        labels={_DIGEST_LABEL: release.digest()},
    )
    return engine.images.get(built.image_id)


def _publish(engine: Engine, image: Any, repository: str, tag: str) -> str:
    """Have the image in the registry; its reference there."""
    for reference in image.attrs["RepoDigests"]:
        if reference.startswith(f"{repository}@") and _may_be_there(engine, reference):
            return str(reference)
    image.tag(repository, tag)
    return f"{repository}@{push(engine, repository, tag)}"


def _may_be_there(engine: Engine, reference: str) -> bool:
    """Whether the registry has it, or is away: the engine has it, and a rollback must not wait."""
    try:
        return bool(digest_in_registry(engine, reference))
    except InstallationError:
        return True


def _repository(settings: Settings, release: Release) -> str:
    return f"{settings.registry}/perennial/{release.project}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One builder at a time: a base or a runtime that two of them need is made once."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
