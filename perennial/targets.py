"""Where services run: the contract of a target, and processes under the installation's supervisord.

The other target is in containers.py.
"""

from __future__ import annotations

import configparser
import fcntl
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from pydantic import Field

from perennial import environments, ports, supervision
from perennial.errors import RolloutError
from perennial.probe import probe
from perennial.settings import Settings
from perennial.store import Store
from perennial.supervision import Supervisor
from perennial.values import (
    DEFAULT_CPUS,
    DEFAULT_MEMORY_MB,
    Endpoint,
    Environment,
    JsonObject,
    ProjectName,
    Release,
    ReleaseId,
    Value,
)
from serving.contract import RELEASE_HEADER

_POLL_SECONDS = 0.05
_START_SECONDS = 10.0  # supervisord answers, forks and reports in far less
KILL_MARGIN_SECONDS = 5.0

# One row of a prediction is too small to share; without this OpenMP spins on the other requests' cores.
SERVICE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",
}


class Instance(Value):
    """One release to be served in one environment, and with what."""

    environment: Environment
    project: ProjectName
    release_id: ReleaseId
    python: Path  # of the release's own environment
    release: Path  # the release directory on disk
    image: str = (
        ""  # by digest, as `prepare` returned it; of a process empty, as a container needs no `python`
    )
    prediction_log: str  # URL
    spool: Path
    drain_seconds: float = Field(default=30.0, ge=0)
    variables: dict[str, str] = Field(default_factory=dict)  # further environment variables of the process
    argv: tuple[str, ...] = ()  # instead of the serving wheel's server; `--host` and `--port` are appended
    memory_mb: int = Field(default=DEFAULT_MEMORY_MB, ge=0)  # of a container; 0: no limit
    cpus: float = Field(default=DEFAULT_CPUS, ge=0)

    @property
    def name(self) -> str:
        return f"svc-{self.environment}-{self.release_id}"


class Running(Value):
    """An instance that its target knows of; `state` is supervisor's word, of a container too."""

    environment: Environment
    project: ProjectName
    endpoint: Endpoint
    state: str
    pid: int
    uptime_seconds: float
    drain_seconds: float
    image: str = ""


class Target(Protocol):
    """Starts and stops instances. Every method may be repeated, and converges after a crash in its middle."""

    def prepare(self, release: Release, folder: Path, store: Store) -> str:
        """Have what an instance of the release is started from: its image by digest, or "" for a process.

        `folder` is the release directory. What is there already is not made again, for a rollback neither.
        """

    def start(self, instance: Instance) -> Endpoint:
        """Have the instance running, or still starting, at the endpoint returned; one that runs is reused."""

    def wait_ready(self, endpoint: Endpoint, timeout_seconds: float) -> None:
        """Return when the endpoint answers that it is ready to serve its release.

        Raises RolloutError, with the end of the service's log, when it dies or is not ready in time.
        """

    def revive(self, name: str) -> None:
        """Start an instance again that has given up; one that runs, or that is unknown, is left alone."""

    def stop(self, name: str, drain_seconds: float) -> None:
        """End an instance after it has answered what it had accepted; one that is absent is no error."""

    def instances(self) -> tuple[Running, ...]:
        """All instances, also those that died."""


def open_target(settings: Settings) -> Target:
    """Where the services of this installation run."""
    match settings.target:
        case "process":
            return ProcessTarget(settings)
        case "docker":
            from perennial.containers import DockerTarget

            return DockerTarget(settings)


def await_ready(
    endpoint: Endpoint,
    timeout_seconds: float,
    death: Callable[[], str | None],
    tail: Callable[[], str],
    look: str,
) -> None:
    """Return when the endpoint answers that it is ready to serve its release. See `Target.wait_ready`.

    `death` says why the instance is no longer what it was at the first call, None while it is; `tail` the end
    of its log, and `look` the command that shows more of it.
    """
    deadline = time.monotonic() + timeout_seconds
    last = "nobody answers"
    while True:
        answer = probe(f"http://{endpoint.host}:{endpoint.port}/health/ready")
        if answer is not None:
            served = answer.headers.get(RELEASE_HEADER)
            if answer.status == 200 and served in (None, endpoint.release_id):
                return
            last = f"/health/ready answers {answer.status} for {served or 'no release'}"
        if (reason := death()) is not None:
            why = f" ({reason})" if reason else ""
            raise RolloutError(
                f"{endpoint.name} died before it was ready{why}. Its last lines:\n{tail()}",
                "an instance that gets ready to serve",
                look,
            )
        if time.monotonic() > deadline:
            raise RolloutError(
                f"{endpoint.release_id} was not ready within {timeout_seconds:g} s: {last}. "
                f"Its last lines:\n{tail()}",
                "200 from /health/ready",
                "make it start faster, or raise ready_timeout_seconds under [tool.perennial.service]",
            )
        time.sleep(_POLL_SECONDS)


class ProcessTarget:
    """Service processes under supervisord, a configuration file each, which also remembers the port."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._supervisor = Supervisor(settings)
        self._folder = settings.root / "services"

    def prepare(self, release: Release, folder: Path, store: Store) -> str:
        """Raises ProjectError when the release's environment cannot be made."""
        environments.make(store, release.environment, self._settings.root / "environments")
        return ""

    def start(self, instance: Instance) -> Endpoint:
        """Raises InstallationError when supervisord does not run, RolloutError when it cannot spawn it."""
        name = instance.name
        with self._locked():
            endpoint = self._configure(instance)
            self._load(name)
        deadline = time.monotonic() + _START_SECONDS
        while (
            process := self._supervisor.process(name)
        ) is None or process.state not in supervision.UP_STATES:
            if process is None:
                raise RolloutError(f"supervisord lost {name}", "a program of that name", "make status")
            trouble = self._supervisor.start(name) if process.is_down else ""
            if trouble or time.monotonic() > deadline:
                reason = trouble or process.reason or process.state.lower()
                raise RolloutError(
                    f"{name} does not start: {reason}. Its last lines:\n{self._tail(name)}",
                    "a process that stays",
                    f"see {self._log(name)}",
                )
            time.sleep(_POLL_SECONDS)
        return endpoint

    def wait_ready(self, endpoint: Endpoint, timeout_seconds: float) -> None:
        name, first_pid = endpoint.name, 0

        def death() -> str | None:
            nonlocal first_pid
            process = self._supervisor.process(name) if name else None
            pid = process.pid if process else 0
            first_pid = first_pid or pid
            # A second process id, or none after the first, means that it died; that the next may live helps
            # nobody. None yet: it died in an earlier life, and supervisord will start it in a moment.
            if not name or (process and not process.is_down and pid == first_pid):
                return None
            return process.reason if process else ""

        await_ready(endpoint, timeout_seconds, death, lambda: self._tail(name), f"see {self._log(name)}")

    def revive(self, name: str) -> None:
        process = self._supervisor.process(name)
        if process is None:
            with self._locked():
                self._load(name)
        elif process.is_down:
            self._supervisor.start(name)

    def stop(self, name: str, drain_seconds: float = 30.0) -> None:
        self._supervisor.stop(name)
        deadline = time.monotonic() + 2 * drain_seconds + KILL_MARGIN_SECONDS
        while (process := self._supervisor.process(name)) is not None and not process.is_down:
            if time.monotonic() > deadline:
                self._supervisor.kill(name)
            time.sleep(_POLL_SECONDS)
        with self._locked():
            self._file(name).unlink(missing_ok=True)
            self._supervisor.reread()
            self._supervisor.remove(name)

    def instances(self) -> tuple[Running, ...]:
        processes = self._supervisor.processes()
        found = []
        for name, described in self._described().items():
            process = processes.get(name)
            found.append(
                Running(
                    environment=described["environment"],
                    project=described["project"],
                    endpoint=Endpoint.model_validate(described["endpoint"]),
                    state=process.state if process else "STOPPED",
                    pid=process.pid if process else 0,
                    uptime_seconds=process.uptime_seconds if process else 0.0,
                    drain_seconds=described["drain_seconds"],
                )
            )
        return tuple(found)

    def _configure(self, instance: Instance) -> Endpoint:
        """Write the instance's file, unless it is there and as wanted."""
        name = instance.name
        described = self._described()
        process = self._supervisor.process(name)
        runs = process is not None and process.pid != 0
        port = described[name]["endpoint"]["port"] if name in described else 0
        if not port or not (runs or ports.is_free(self._settings.host, port)):
            taken = {other["endpoint"]["port"] for other in described.values()}
            port = ports.first_free(self._settings.host, self._settings.first_service_port, taken)
        endpoint = Endpoint(name=name, host=self._settings.host, port=port, release_id=instance.release_id)
        wanted = self._program(instance, endpoint)
        path = self._file(name)
        if not path.exists() or path.read_text() != wanted:
            temporary = path.with_suffix(f".{os.getpid()}.tmp")  # not *.conf: supervisord must not see it
            temporary.touch(mode=0o600)
            temporary.write_text(wanted)
            temporary.replace(path)
        return endpoint

    def _load(self, name: str) -> None:
        added, changed, _ = self._supervisor.reread()
        if name in changed:
            self._end(name)
            self._supervisor.remove(name)
        if name in added or name in changed:
            self._supervisor.add(name)

    def _end(self, name: str) -> None:
        self._supervisor.stop(name)
        while (process := self._supervisor.process(name)) is not None and not process.is_down:
            time.sleep(_POLL_SECONDS)

    def _program(self, instance: Instance, endpoint: Endpoint) -> str:
        argv = instance.argv or (
            str(instance.python),
            "-m",
            "serving.server",
            "--release",
            str(instance.release),
            "--environment",
            instance.environment,
            "--prediction-log",
            instance.prediction_log,
            "--spool",
            str(instance.spool),
        )
        parser = configparser.RawConfigParser()
        parser[f"program:{instance.name}"] = {
            "command": supervision.command([*argv, "--host", endpoint.host, "--port", str(endpoint.port)]),
            "directory": supervision.literal(instance.release),
            "environment": supervision.environment(SERVICE_ENVIRONMENT | instance.variables),
            "autostart": "true",
            "autorestart": "true",
            "startsecs": "1",
            "startretries": "2",
            "stopsignal": "TERM",
            # The server drains its requests, then its prediction log, each for that long at most.
            "stopwaitsecs": str(int(2 * instance.drain_seconds + KILL_MARGIN_SECONDS) + 1),
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": supervision.log_path(self._log(instance.name)),
            "stdout_logfile_maxbytes": "10MB",
            "stdout_logfile_backups": "3",
        }
        described = {
            "environment": instance.environment,
            "project": instance.project,
            "endpoint": endpoint.model_dump(),
            "drain_seconds": instance.drain_seconds,
        }
        parser[f"perennial:{instance.name}"] = {"instance": json.dumps(described)}
        text = io.StringIO()
        parser.write(text)
        return text.getvalue()

    def _described(self) -> dict[str, JsonObject]:
        found = {}
        for path in sorted(self._folder.glob("svc-*.conf")):
            parser = configparser.RawConfigParser()
            parser.read(path)
            if parser.has_section(f"perennial:{path.stem}"):  # else it was removed while we looked
                found[path.stem] = json.loads(parser[f"perennial:{path.stem}"]["instance"])
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time: two deployments must not pick the same port."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.conf"

    def _log(self, name: str) -> Path:
        return self._settings.root / "logs" / f"{name}.log"

    def _tail(self, name: str) -> str:
        return supervision.tail(self._log(name))
