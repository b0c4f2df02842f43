"""Installations of a test's own: ports that nobody has, a folder of its own, the parts it needs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perennial import installation, ports
from perennial.settings import Settings
from perennial.targets import Instance

ROOT = Path(__file__).resolve().parent.parent
SERVICE = ROOT / "tests" / "infra" / "service.py"

_PORTS = (
    "prefect_port",
    "mlflow_port",
    "storefront_port",
    "production_port",
    "test_port",
    "router_admin_port",
    "first_service_port",
)
# Below the range from which outgoing connections take their ports: one of those may be faster. Each process
# that runs tests begins elsewhere, and each of pytest's workers far from the others.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2
_candidates = itertools.count(20_000 + 6_000 * _WORKER + os.getpid() % 100 * 25)


def own_settings(home: Path, **more: Any) -> Settings:
    """Settings on free ports."""
    free = {}
    for name in _PORTS:
        free[name] = next(port for port in _candidates if ports.is_free("127.0.0.1", port))
    return Settings(home=home, **{**free, **more})


@contextmanager
def running(here: Settings, parts: Sequence[str]) -> Iterator[Settings]:
    installation.up(here, parts=parts, say=lambda line: None)
    try:
        yield here
    finally:
        installation.down(here, say=lambda line: None)


def instance(here: Settings, letter: str, *options: str, project: str = "toy", **more: Any) -> Instance:
    """An instance of the test service, whose release id ends in `letter`, twelve times."""
    release_id = f"{project}-{letter * 12}"
    folder = here.root / "releases" / release_id
    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "environment": "test",
        "project": project,
        "release_id": release_id,
        "python": Path(sys.executable),
        "release": folder,
        "prediction_log": here.store,
        "spool": here.root / "spool",
        "drain_seconds": 10.0,
        "argv": (sys.executable, str(SERVICE), "--release-id", release_id, *options),
    }
    return Instance.model_validate(fields | more)


def call(url: str, body: object = None, *, timeout_seconds: float = 20.0) -> tuple[int, Any, dict[str, str]]:
    """(status, JSON, headers) of a GET, or of a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
            return response.status, json.loads(response.read()), _lower(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null"), _lower(error.headers)


def until(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `true()`."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.05)
    return value


@contextmanager
def load(url: str, requests_per_second: int, body: Path) -> Iterator[dict[str, Any]]:
    """Hold a load on `url` while the block runs; the dictionary is filled with what came of it."""
    body.write_text(json.dumps({"rows": [{}]}))
    argv = [sys.executable, "-m", "tests.flows.load", url, str(body), str(requests_per_second)]
    outcome: dict[str, Any] = {}
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == "started\n"
            yield outcome
        finally:
            said, _ = client.communicate(timeout=60)
    outcome |= json.loads(said)


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
