"""A model's own environment: made by uv from the project's hash lock, cached by what it is made of."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import serving
from perennial import artifacts, process
from perennial.errors import ChildFailed, InstallationError, ProjectError
from perennial.project import check_links
from perennial.store import Store
from perennial.values import ModelEnvironment

SERVING_SOURCE = Path(serving.__file__).parent
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_COMPLETE = "complete"
_TIMEOUT_SECONDS = 1800.0


def serving_requires() -> tuple[str, ...]:
    """What the serving wheel needs in an environment that trains and serves."""
    project = tomllib.loads((SERVING_SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return (*project["dependencies"], *project["optional-dependencies"]["train"])


def describe(store: Store, lock: Path, environments: Path) -> ModelEnvironment:
    """The environment of this lock, today's serving wheel and this interpreter; both files are kept in the
    store, so that a release can be run on another machine and after Perennial itself has moved on.
    """
    kept_lock = artifacts.put_file(store, "environments/requirements.lock", lock)
    wheel = serving_wheel(environments)
    kept_wheel = artifacts.put_file(store, f"environments/{wheel.name}", wheel)
    made_of = (kept_lock.sha256, kept_wheel.sha256, PYTHON, platform.machine(), sys.platform)
    fingerprint = hashlib.sha256(" ".join(made_of).encode()).hexdigest()
    return ModelEnvironment(fingerprint=fingerprint, lock=kept_lock, serving=kept_wheel, python=PYTHON)


def make(
    store: Store,
    environment: ModelEnvironment,
    environments: Path,
    on_line: Callable[[str], None] | None = None,
) -> Path:
    """Make the environment under `environments` unless it is there; return its Python.

    A half-made one (no completion mark) is made again from nothing. Raises ProjectError when the lock
    cannot be installed as it is, InstallationError when another Python is wanted.
    """
    interpreter = python_of(environment, environments)
    folder = interpreter.parents[1]
    if (folder / _COMPLETE).is_file():
        os.utime(folder)  # asked for now (see caches.py)
        return interpreter
    if environment.python != PYTHON:
        raise InstallationError(
            f"this is Python {PYTHON}", f"Python {environment.python}, which the release was built with"
        )
    with _locked(environments / f"{folder.name}.lock"):
        if (folder / _COMPLETE).is_file():
            return interpreter
        shutil.rmtree(folder, ignore_errors=True)
        log = environments / f"{folder.name}.log"
        log.unlink(missing_ok=True)
        lock = artifacts.open_local(store, environment.lock, environments / "cache")
        wheel = artifacts.open_local(store, environment.serving, environments / "cache")
        install = ("--compile-bytecode", "--quiet")
        try:
            _uv("venv", "--quiet", "--python", sys.executable, str(folder), log=log)
            _uv("pip", "sync", "--require-hashes", *install, str(lock), venv=folder, log=log, on_line=on_line)
            _uv("pip", "install", "--no-deps", *install, str(wheel), venv=folder, log=log, on_line=on_line)
        except ChildFailed as error:
            raise ProjectError(
                f"requirements.lock cannot be installed: {error.found}",
                "pins whose hashes match what the package index has, for this Python and platform",
                "python -m perennial lock PROJECT, and commit requirements.lock",
            ) from error
        (folder / _COMPLETE).touch()
    return interpreter


def python_of(environment: ModelEnvironment, environments: Path) -> Path:
    """Where `make` puts the environment's Python."""
    return environments / environment.fingerprint[:16] / "bin" / "python"


def serving_wheel(environments: Path) -> Path:
    """The wheel of the serving code beside us, built once per state of that code."""
    folder = environments / f"serving-{_sha256_of_sources(SERVING_SOURCE)[:16]}"
    with _locked(environments / f"{folder.name}.lock"):
        built = sorted(folder.glob("*.whl"))
        return built[0] if built else build_wheel(SERVING_SOURCE, folder, environments / f"{folder.name}.log")


def build_project_wheel(project: Path, version: str, work: Path) -> Path:
    """The wheel of a project with its version replaced, which must stand in its pyproject.toml."""
    source = work / "package"
    shutil.rmtree(source, ignore_errors=True)
    check_links(project)  # a build would follow them
    shutil.copytree(project, source, symlinks=True)
    manifest = source / "pyproject.toml"
    text, count = re.subn(
        r"(?ms)^(\[project\]\s*$.*?^version\s*=\s*)([\"'])[^\"']*\2",
        rf"\g<1>\g<2>{version}\g<2>",
        manifest.read_text(encoding="utf-8"),
        count=1,
    )
    if count != 1:
        raise ProjectError("pyproject.toml: no version found in [project]", 'version = "…" under [project]')
    manifest.write_text(text, encoding="utf-8")
    return build_wheel(source, work / "wheel", work / "wheel.log")


def build_wheel(source: Path, output: Path, log: Path) -> Path:
    """Build the wheel of a folder into `output`; the same source gives the same bytes."""
    shutil.rmtree(output, ignore_errors=True)
    try:
        _uv("build", "--quiet", "--wheel", "--out-dir", str(output), str(source), log=log)
    except ChildFailed as error:
        raise ProjectError(
            f"the wheel cannot be built: {error.found}", "a project that `uv build --wheel` builds"
        ) from error
    (wheel,) = output.glob("*.whl")
    return wheel


def _uv(
    *arguments: str, log: Path, venv: Path | None = None, on_line: Callable[[str], None] | None = None
) -> None:
    from uv import find_uv_bin

    # The epoch is a wheel's oldest legal time: file times must not make two builds differ.
    extra = {"SOURCE_DATE_EPOCH": "315532800", "PYTHONHASHSEED": "0"}
    if venv is not None:
        extra["VIRTUAL_ENV"] = str(venv)
    process.run(
        [find_uv_bin(), *arguments],
        cwd=log.parent,
        environment=process.scrubbed_environment(network=True, **extra),
        timeout_seconds=_TIMEOUT_SECONDS,
        log=log,
        what=f"uv {arguments[0]}",
        on_line=on_line,
    )


def _sha256_of_sources(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".py", ".toml", ".typed"} and path.is_file():
            digest.update(f"{path.relative_to(folder)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One maker at a time; the kernel frees the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
