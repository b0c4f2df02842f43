"""Speaks to the supervisord of an installation: XML-RPC over a unix socket, nothing over the network."""

from __future__ import annotations

import hashlib
import os
import shlex
import tempfile
import xmlrpc.client
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from supervisor.xmlrpc import Faults, SupervisorTransport

from perennial.errors import InstallationError
from perennial.settings import Settings

# A unix socket's path has at most 107 bytes, and supervisord binds it with its process id appended first.
_MAX_SOCKET_PATH = 95

UP_STATES = ("RUNNING", "STARTING", "BACKOFF")
_DOWN_STATES = ("STOPPED", "EXITED", "FATAL", "UNKNOWN")


class Process(NamedTuple):
    """A supervised process. `state` is supervisor's word; `pid` is 0 when it does not run."""

    name: str
    state: str
    pid: int
    started: float  # seconds since the epoch
    now: float
    reason: str  # why it could not be spawned, empty otherwise

    @property
    def is_down(self) -> bool:
        return self.state in _DOWN_STATES

    @property
    def uptime_seconds(self) -> float:
        return max(0.0, self.now - self.started) if self.pid else 0.0


class Supervisor:
    """The supervisord of one installation. Raises InstallationError when it does not run."""

    def __init__(self, settings: Settings) -> None:
        self._socket = socket_path(settings)
        self._home = settings.root

    def is_running(self) -> bool:
        try:
            self._call("getState")
        except InstallationError:
            return False
        return True

    def pid(self) -> int:
        return int(self._call("getPID"))

    def processes(self) -> dict[str, Process]:
        return {info["name"]: _process(info) for info in self._call("getAllProcessInfo")}

    def process(self, name: str) -> Process | None:
        """None when supervisord knows no program of this name."""
        try:
            return _process(self._call("getProcessInfo", name))
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == Faults.BAD_NAME:
                return None
            raise

    def reread(self) -> tuple[list[str], list[str], list[str]]:
        """Read the configuration files again: names of programs added, changed and removed, none acted on."""
        try:
            [[added, changed, removed]] = self._call("reloadConfig")
        except xmlrpc.client.Fault as fault:
            raise InstallationError(
                f"supervisord cannot read its configuration: {fault.faultString}",
                f"files that `perennial` wrote, in {self._home / 'services'}",
                "make down && make up",
            ) from fault
        return added, changed, removed

    def add(self, name: str) -> None:
        """Take a program in from the files read last; autostart applies."""
        self._tolerate("addProcessGroup", name, faults=(Faults.ALREADY_ADDED,))

    def remove(self, name: str) -> None:
        """Forget a program that is down. Faults when it still runs."""
        self._tolerate("removeProcessGroup", name, faults=(Faults.BAD_NAME,))

    def start(self, name: str) -> str:
        """Have a program started; returns before it is up, with the reason if it cannot be started at all."""
        try:
            self._tolerate("startProcess", name, False, faults=(Faults.ALREADY_STARTED, Faults.SPAWN_ERROR))
        except xmlrpc.client.Fault as fault:
            if fault.faultCode in (Faults.NO_FILE, Faults.NOT_EXECUTABLE):
                return str(fault.faultString)
            raise
        return ""

    def stop(self, name: str) -> None:
        """Send a program its stop signal; returns before it is down."""
        self._tolerate("stopProcess", name, False, faults=(Faults.NOT_RUNNING, Faults.BAD_NAME))

    def kill(self, name: str) -> None:
        self._tolerate(
            "signalProcess", name, "KILL", faults=(Faults.NOT_RUNNING, Faults.BAD_NAME, Faults.NO_FILE)
        )

    def shutdown(self) -> None:
        self._call("shutdown")

    def _tolerate(self, method: str, *arguments: Any, faults: tuple[int, ...]) -> None:
        try:
            self._call(method, *arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode not in faults:
                raise

    def _call(self, method: str, *arguments: Any) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        proxy = xmlrpc.client.ServerProxy("http://localhost", transport=transport)
        try:
            return getattr(proxy.supervisor, method)(*arguments)
        except (OSError, HTTPException, xmlrpc.client.ProtocolError) as error:
            raise not_running(self._home) from error
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == Faults.SHUTDOWN_STATE:
                raise not_running(self._home) from fault
            raise
        finally:
            transport.close()


def not_running(home: Path) -> InstallationError:
    return InstallationError(
        f"the installation in {home} is not running",
        "its supervisord to answer",
        "make up",
    )


def socket_path(settings: Settings) -> Path:
    """In HOME/run, or, where that is too deep for a unix socket, in a folder among the temporary files."""
    wanted = settings.root / "run" / "supervisor.sock"
    if len(os.fsencode(wanted)) <= _MAX_SOCKET_PATH:
        return wanted
    key = hashlib.sha256(os.fsencode(settings.root)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"perennial-{os.getuid()}-{key}" / "supervisor.sock"


def command(argv: Sequence[str]) -> str:
    """An argv as the value of a program's `command`."""
    return literal(shlex.join(argv))


def environment(variables: Mapping[str, str]) -> str:
    """Variables as the value of a program's `environment`."""
    return ",".join(f"{name}={_quoted(name, value)}" for name, value in sorted(variables.items()))


def literal(value: object) -> str:
    """Text as supervisord's configuration carries it: a percent sign begins a variable there."""
    return str(value).replace("%", "%%")


def log_path(value: Path) -> str:
    """A path as the value of a program's `stdout_logfile`, the one value that supervisord expands twice."""
    return literal(literal(value))


def tail(log: Path, lines: int = 25) -> str:
    """The last lines of a program's log, indented, for an error message; says so when there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    last = text.splitlines()[-lines:]
    return "\n".join(f"    {line}" for line in last) if last else "    (its log is empty)"


def _quoted(name: str, value: str) -> str:
    # supervisor's parser knows no escapes: a value may hold one kind of quotes, not both.
    mark = next((mark for mark in ('"', "'") if mark not in value), None)
    if mark is None or "\n" in value:
        raise InstallationError(
            f"the value of {name} holds both kinds of quotes or a line break",
            "a value that supervisord's configuration can carry",
        )
    return literal(f"{mark}{value}{mark}")


def _process(info: dict[str, Any]) -> Process:
    return Process(
        name=info["name"],
        state=info["statename"],
        pid=info["pid"],
        started=float(info["start"]),
        now=float(info["now"]),
        reason=info["spawnerr"],
    )
