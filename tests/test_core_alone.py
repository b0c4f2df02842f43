"""The core imports, and its unit tests pass, where Prefect, MLflow and Evidently are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from uv import find_uv_bin

ROOT = Path(__file__).parent.parent
UNIT_TESTS = (
    "artifacts",
    "assessment",
    "config",
    "evaluation",
    "gates",
    "index",
    "journal",
    "process",
    "project",
    "releases",
    "snapshot",
    "source",
    "store",
    "validation",
)


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the core's own dependencies, as locked, and pytest."""
    folder = tmp_path_factory.mktemp("core")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], "pytest", "pytest-timeout"]
    environment = os.environ | {"VIRTUAL_ENV": str(folder / "venv")}
    # The lock's hashes are for whole sets; as constraints its pins are enough.
    pins = [
        line.split(" \\")[0]
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line[:1].isalnum()
    ]
    (folder / "constraints").write_text("\n".join(pins))
    uv = find_uv_bin()
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True)
    install = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--constraint", folder / "constraints"]
    subprocess.run([*install, *requirements], check=True, env=environment)
    return folder / "venv" / "bin" / "python"


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_what_must_be_absent_is_absent(core: Path) -> None:
    for module in ("prefect", "mlflow", "evidently"):
        assert run(core, "-c", f"import {module}").returncode == 1


def test_every_module_of_the_core_imports(core: Path) -> None:
    modules = [
        f"perennial.{path.stem}" for path in (ROOT / "perennial").glob("*.py") if path.stem != "__main__"
    ]
    assert len(modules) > 20
    done = run(
        core, "-c", "import importlib, sys\nfor m in sys.argv[1:]: importlib.import_module(m)", *modules
    )
    assert done.returncode == 0, done.stderr


def test_the_unit_tests_of_the_core_pass(core: Path) -> None:
    files = [f"tests/perennial/test_{name}.py" for name in UNIT_TESTS]
    done = run(core, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not server", *files)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
