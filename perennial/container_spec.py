"""What the Docker engine is asked for: the container of an instance, in the words of the engine's own API."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from perennial.errors import InstallationError
from perennial.targets import KILL_MARGIN_SECONDS, SERVICE_ENVIRONMENT, Instance
from perennial.values import JsonObject

PORT = "8080"  # inside; the image's server listens there
INSTALLATION_LABEL = "perennial.installation"
_CONFIGURATION_LABEL = "perennial.configuration"
_NOBODY = 65532
_PIDS = 512  # threads count
_SPOOL, _STORE = "/spool", "/store"
_PREDICTIONS = "predictions"  # as serving/spool.py names them


def container_name(root: Path, name: str) -> str:
    """The engine's names are everybody's: an installation's own end with what its folder is."""
    return f"{name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}"


def container(instance: Instance, host: str, port: int, root: Path) -> JsonObject:
    """The body of `POST /containers/create`.

    Raises InstallationError for a store that a container cannot reach.
    """
    log, log_mounts = _prediction_log(instance)
    variables = {**SERVICE_ENVIRONMENT, "TMPDIR": "/tmp", **instance.variables}  # noqa: S108
    body: JsonObject = {
        "Image": instance.image,
        "Env": [f"{name}={value}" for name, value in sorted(variables.items())],
        "User": ":".join(map(str, user())),
        "ExposedPorts": {f"{PORT}/tcp": {}},
        "StopSignal": "SIGTERM",
        "StopTimeout": stop_seconds(instance.drain_seconds),
        "HostConfig": {
            "PortBindings": {f"{PORT}/tcp": [{"HostIp": host, "HostPort": str(port)}]},
            "Mounts": [_bind(instance.spool, _SPOOL), *log_mounts],
            "Tmpfs": {"/tmp": "rw,noexec,nosuid,nodev,size=64m,mode=1777"},  # noqa: S108
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges:true"],
            "PidsLimit": _PIDS,
            "Memory": instance.memory_mb << 20,
            "MemorySwap": instance.memory_mb << 20,  # as much as memory: no swap
            "NanoCpus": round(instance.cpus * 1e9),
            "Init": True,
            # `unless-stopped` would leave down what ran when the engine was killed.
            "RestartPolicy": {"Name": "always"},
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}},
        },
    }
    if instance.argv:
        body["Entrypoint"] = [*instance.argv, "--host", "0.0.0.0", "--port", PORT]  # noqa: S104, its own network's
    else:
        body["Cmd"] = ["--environment", instance.environment, "--prediction-log", log]
    description = {
        "name": instance.name,
        "environment": instance.environment,
        "project": instance.project,
        "release": instance.release_id,
        "image": instance.image,
        "host": host,
        "port": str(port),
        "drain-seconds": str(instance.drain_seconds),
    }
    body["Labels"] = {
        INSTALLATION_LABEL: str(root),
        **{f"perennial.{key}": value for key, value in description.items()},
        _CONFIGURATION_LABEL: _digest(body),
    }
    return body


def is_as(found: JsonObject, wanted: JsonObject) -> bool:
    """Whether an inspected container was made of this body."""
    same = found["Config"]["Labels"].get(_CONFIGURATION_LABEL) == wanted["Labels"][_CONFIGURATION_LABEL]
    return same and set(wanted["Env"]) <= set(found["Config"]["Env"])


def stop_seconds(drain_seconds: float) -> int:
    """The server drains its requests, then its prediction log, each for that long at most."""
    return int(2 * drain_seconds + KILL_MARGIN_SECONDS) + 1


def user() -> tuple[int, int]:
    """Who a service is: nobody in particular, or whoever we are where we may not give folders away."""
    return (_NOBODY, _NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


def make_folders(instance: Instance) -> None:
    """Have what is mounted, with what processes left there, the service's own."""
    _give(instance.spool, files=True)
    if (folder := _log_folder(instance)) is not None:
        _give(folder, files=False)


def _prediction_log(instance: Instance) -> tuple[str, list[JsonObject]]:
    """The log's URL as the container knows it, and what is mounted for it."""
    folder = _log_folder(instance)
    if folder is not None:
        return f"file://{_STORE}", [_bind(folder, f"{_STORE}/{_of(instance)}")]
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        if _is_loopback(urlsplit(instance.variables.get(name, "")).hostname or ""):
            raise InstallationError(
                f"the store is at {instance.variables[name]}, which inside a container is the container",
                "an address of the store that containers reach",
                "PERENNIAL_S3_ENDPOINT_URL=http://THIS-MACHINE:PORT, with the store listening there",
            )
    return instance.prediction_log, []


def _log_folder(instance: Instance) -> Path | None:
    """The folder of a directory store that takes this service's log."""
    url = urlsplit(instance.prediction_log)
    return Path(url2pathname(url.path)) / _of(instance) if url.scheme == "file" else None


def _of(instance: Instance) -> str:
    return f"{_PREDICTIONS}/{instance.environment}/{instance.project}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(source: Path, target: str) -> JsonObject:
    return {"Type": "bind", "Source": str(source), "Target": target}


def _digest(body: JsonObject) -> str:
    """Of all but the variables' values: a digest in a label must not help to guess a secret."""
    shown = {**body, "Env": [variable.partition("=")[0] for variable in body["Env"]]}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def _give(folder: Path, *, files: bool) -> None:
    """Make a folder, and make it the service's. By open folders: what runs there may put links in our way."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        return
    for _, _, names, descriptor in os.fwalk(folder):
        os.fchown(descriptor, *user())
        for name in names if files else ():
            with suppress(FileNotFoundError):
                os.chown(name, *user(), dir_fd=descriptor, follow_symlinks=False)
