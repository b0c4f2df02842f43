"""Where services run as containers of a Docker engine, one each, behind the same router."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from perennial import container_spec, engine, image_registry, ports
from perennial.container_spec import INSTALLATION_LABEL
from perennial.engine import Engine
from perennial.errors import RolloutError
from perennial.settings import Settings
from perennial.store import Store
from perennial.targets import Instance, Running, await_ready
from perennial.values import Endpoint, JsonObject, Release

_TAIL_LINES = 25
_POLL_SECONDS = 0.05
_REMOVAL_SECONDS = 30.0
_MOST_PORTS_TRIED = 20
_PORT_TAKEN = ("port is already allocated", "address already in use")

# The engine's words in supervisor's, which is what `Running.state` holds.
_STATES = {"running": "RUNNING", "restarting": "BACKOFF", "exited": "EXITED", "dead": "FATAL"}


class DockerTarget:
    """A container per instance, whose labels say all there is to know of it.

    The engine starts again what dies, and all of it when it is started itself. What somebody ended, `docker
    kill` too, otherwise waits for `revive` or the next `start`. Every method raises InstallationError when
    the engine is away.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def prepare(self, release: Release, folder: Path, store: Store) -> str:
        with self._engine() as engine_:
            return image_registry.provide(engine_, self._settings, release, folder, store)

    def start(self, instance: Instance) -> Endpoint:
        """Raises InstallationError for an image or a store that is not to be had, RolloutError when the
        engine cannot start it.
        """
        with self._locked(), self._engine() as engine_:
            image_registry.ensure(engine_, instance.image)
            container_spec.make_folders(instance)
            found = self._inspect(engine_, instance.name)
            if found is not None:
                port = int(_label(found, "port"))
                wanted = self._wanted(instance, port)
                if _runs(found) and container_spec.is_as(found, wanted):
                    return _endpoint(found)
                _end(engine_, found)
                if ports.is_free(self._settings.host, port):
                    return self._create(engine_, instance, port)
            return self._create(engine_, instance, 0)

    def wait_ready(self, endpoint: Endpoint, timeout_seconds: float) -> None:
        name = endpoint.name
        first_start = ""
        with self._engine() as engine_:

            def death() -> str | None:
                nonlocal first_start
                found = self._inspect(engine_, name) if name else None
                started = found["State"]["StartedAt"] if found else ""
                first_start = first_start or started
                # A second start means that the first one died; that the next may live helps nobody.
                if not name or (found and _runs(found) and started == first_start):
                    return None
                return _how(found)

            def tail() -> str:
                return self._tail(engine_, name)

            await_ready(endpoint, timeout_seconds, death, tail, f"docker logs {self._container(name)}")

    def revive(self, name: str) -> None:
        """Raises RolloutError when the engine cannot start it."""
        with self._locked(), self._engine() as engine_:
            found = self._inspect(engine_, name)
            if found is None or (found["State"]["Running"] and not found["State"]["Paused"]):
                return
            if found["State"]["Paused"]:
                engine_.api.unpause(found["Id"])
            elif trouble := engine.start(engine_, found["Id"]):
                raise RolloutError(
                    f"{name} does not start: {trouble}", "a container that stays", "run the deploy again"
                )

    def stop(self, name: str, drain_seconds: float = 30.0) -> None:
        with self._engine() as engine_:
            found = self._inspect(engine_, name)
            if found is not None:
                _end(engine_, found, container_spec.stop_seconds(drain_seconds))

    def instances(self) -> tuple[Running, ...]:
        with self._engine() as engine_:
            found = [_inspect(engine_, each["Id"]) for each in self._all(engine_)]
        return tuple(_running(container) for container in found if container is not None)

    def _engine(self) -> AbstractContextManager[Engine]:
        return engine.open_engine(self._settings.docker_url)

    def _create(self, engine_: Engine, instance: Instance, port: int) -> Endpoint:
        """A container on `port`; on the first free one without, or where another program is faster."""
        taken = {int(each["Labels"]["perennial.port"]) for each in self._all(engine_)}
        for _ in range(_MOST_PORTS_TRIED):
            port = port or ports.first_free(self._settings.host, self._settings.first_service_port, taken)
            with engine.asking(f"a container for {instance.name}"):
                made = engine_.api.create_container_from_config(
                    self._wanted(instance, port), self._container(instance.name)
                )
            trouble = engine.start(engine_, made["Id"])
            if not trouble:
                return Endpoint(
                    name=instance.name, host=self._settings.host, port=port, release_id=instance.release_id
                )
            _remove(engine_, made["Id"])
            if not any(said in trouble for said in _PORT_TAKEN):
                break
            taken.add(port)
            port = 0
        raise RolloutError(
            f"{instance.name} does not start: {trouble}", "a container that stays", "run the deploy again"
        )

    def _wanted(self, instance: Instance, port: int) -> JsonObject:
        return container_spec.container(instance, self._settings.host, port, self._settings.root)

    def _container(self, name: str) -> str:
        return container_spec.container_name(self._settings.root, name)

    def _inspect(self, engine_: Engine, name: str) -> JsonObject | None:
        return _inspect(engine_, self._container(name))

    def _all(self, engine_: Engine) -> list[JsonObject]:
        ours = {"label": f"{INSTALLATION_LABEL}={self._settings.root}"}
        found: list[JsonObject] = engine_.api.containers(all=True, filters=ours)
        return found

    def _tail(self, engine_: Engine, name: str) -> str:
        text = ""
        with engine.tolerating(engine.NOT_FOUND):
            text = engine_.api.logs(self._container(name), tail=_TAIL_LINES).decode(errors="replace")
        return "\n".join(f"    {line}" for line in text.splitlines()) or "    (its log is empty)"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time: two deployments must not pick the same port."""
        folder = self._settings.root / "services"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".containers.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _inspect(engine_: Engine, container: str) -> JsonObject | None:
    with engine.tolerating(engine.NOT_FOUND):
        found: JsonObject = engine_.api.inspect_container(container)
        return found
    return None


def _end(engine_: Engine, found: JsonObject, seconds: int | None = None) -> None:
    """Have it answer what it accepted, end, and be gone; after `seconds`, or its own time, it is killed."""
    with engine.tolerating(engine.NOT_MODIFIED, engine.NOT_FOUND):
        engine_.api.stop(found["Id"], timeout=found["Config"]["StopTimeout"] if seconds is None else seconds)
    _remove(engine_, found["Id"])


def _remove(engine_: Engine, container: str) -> None:
    with engine.tolerating(engine.NOT_FOUND, engine.CONFLICT):  # somebody else is removing it
        engine_.api.remove_container(container, force=True, v=True)
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while _inspect(engine_, container) is not None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _runs(found: JsonObject) -> bool:
    return bool(found["State"]["Status"] == "running")


def _how(found: JsonObject | None) -> str:
    """How a container died, as far as the engine tells."""
    if found is None:
        return "its container is gone"
    state = found["State"]
    if state["OOMKilled"]:
        limit = found["HostConfig"]["Memory"] >> 20
        return f"out of memory: memory_mb under [tool.perennial.service] allows {limit} MB"
    if _runs(found):
        return "the engine has started it again"
    return state["Error"] or f"exit code {state['ExitCode']}"


def _label(found: JsonObject, key: str) -> str:
    return str(found["Config"]["Labels"][f"perennial.{key}"])


def _endpoint(found: JsonObject) -> Endpoint:
    return Endpoint(
        name=_label(found, "name"),
        host=_label(found, "host"),
        port=int(_label(found, "port")),
        release_id=_label(found, "release"),
    )


def _running(found: JsonObject) -> Running:
    state = found["State"]
    since = datetime.fromisoformat(state["StartedAt"]) if state["Pid"] else datetime.now(UTC)
    return Running.model_validate(
        {
            "environment": _label(found, "environment"),
            "project": _label(found, "project"),
            "endpoint": _endpoint(found),
            "state": _STATES.get(state["Status"], "STOPPED"),
            "pid": state["Pid"],
            "uptime_seconds": max(0.0, (datetime.now(UTC) - since).total_seconds()),
            "drain_seconds": float(_label(found, "drain-seconds")),
            "image": _label(found, "image"),
        }
    )
