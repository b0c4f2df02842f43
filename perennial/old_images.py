"""Images in the engine that no kept release needs. A registry is somebody else's to clean."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from perennial.engine import CONFLICT, NOT_FOUND, Engine, find_image, tolerating
from perennial.values import JsonObject

_KEEP_RUNTIME_SECONDS = 86_400.0  # it may have just been made for an image that is being built
_RELEASE_LABEL = "org.opencontainers.image.version"
_RUNTIME = "perennial/runtime:"


@dataclass(frozen=True)
class OldImage:
    """An image, its names in the engine, and the release it is of; none for a runtime below releases."""

    image_id: str
    names: tuple[str, ...]
    release_id: str
    bytes: int
    age_seconds: float

    def remove(self, engine: Engine) -> bool:
        """Take its names away one by one, the last of which takes its layers. False while it is used."""
        if self.image_id in _used(engine):
            return False
        for name in self.names:
            with tolerating(NOT_FOUND, CONFLICT):
                engine.api.remove_image(name, force=False)
        return find_image(engine, self.image_id) is None


def of_releases(engine: Engine, is_old: Callable[[str], bool]) -> Iterator[OldImage]:
    """The images of the releases that are old, unless a container uses them."""
    used = _used(engine)
    for image in engine.api.images(filters={"label": _RELEASE_LABEL}):
        release_id = (image["Labels"] or {}).get(_RELEASE_LABEL, "")
        if _names(image, "perennial/") and image["Id"] not in used and is_old(release_id):
            yield _old(image, release_id)


def runtimes(engine: Engine, leaving: Collection[str]) -> Iterator[OldImage]:
    """Runtimes that no image of a release stands on, when those that are `leaving` are gone."""
    images = engine.api.images(filters={"label": _RELEASE_LABEL})
    above = [_layers(engine, image["Id"]) for image in images if image["Id"] not in leaving]
    for image in engine.api.images(filters={"reference": f"{_RUNTIME}*"}):
        layers = _layers(engine, image["Id"])
        needed = any(other[: len(layers)] == layers for other in above)
        old = _old(image, "")
        if not needed and old.age_seconds > _KEEP_RUNTIME_SECONDS:
            yield old


def _old(image: JsonObject, release_id: str) -> OldImage:
    age = datetime.now(UTC).timestamp() - image["Created"]
    return OldImage(image["Id"], tuple(_names(image)), release_id, image["Size"], age)


def _names(image: JsonObject, part: str = "") -> list[str]:
    names = [*(image["RepoTags"] or ()), *(image["RepoDigests"] or ())]
    return [name for name in names if part in name and "<none>" not in name]


def _layers(engine: Engine, image_id: str) -> list[str]:
    found = find_image(engine, image_id)
    return list(found.attrs["RootFS"]["Layers"]) if found is not None else []


def _used(engine: Engine) -> set[str]:
    return {container["ImageID"] for container in engine.api.containers(all=True)}
