"""The wheel: small, reproducible, and enough to start a server."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from uv import find_uv_bin

import serving
from tests.serving.toys import REPOSITORY

LIMIT_MB = 80


def uv(*arguments: str) -> None:
    subprocess.run([find_uv_bin(), *arguments], check=True, capture_output=True, text=True, timeout=120)


def build(folder: Path) -> Path:
    uv("build", "--wheel", str(REPOSITORY / "serving"), "--out-dir", str(folder))
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_is_reproducible_installs_small_and_starts_without_the_models_libraries(
    tmp_path: Path,
) -> None:
    wheel = build(tmp_path / "one")
    copy = tmp_path / "copy"
    shutil.copytree(REPOSITORY / "serving", copy / "serving", ignore=shutil.ignore_patterns("__pycache__"))
    uv("build", "--wheel", str(copy / "serving"), "--out-dir", str(tmp_path / "two"))
    assert wheel.read_bytes() == (tmp_path / "two" / wheel.name).read_bytes()
    assert wheel.name == f"perennial_serving-{serving.__version__}-py3-none-any.whl"

    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {f"serving/{path.name}" for path in (REPOSITORY / "serving").glob("*.py")}
    assert files == modules | {"serving/py.typed"}

    target = tmp_path / "site"
    uv("pip", "install", "--quiet", "--python", sys.executable, "--target", str(target), str(wheel))
    megabytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) / 1e6
    assert megabytes < LIMIT_MB
    for absent in ("pandas", "numpy", "pyarrow", "sklearn", "prefect"):
        assert not (target / absent).exists()
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(target)!r});"
            "import serving.server, serving.trainer; print(serving.server.__file__)",
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=tmp_path,
    )
    assert str(target) in done.stdout


def test_the_version_is_the_same_in_both_places() -> None:
    project = tomllib.loads((REPOSITORY / "serving" / "pyproject.toml").read_text())["project"]
    assert project["version"] == serving.__version__


def test_neither_entry_imports_the_models_libraries_by_itself() -> None:
    code = (
        "import sys, serving.server, serving.trainer;"
        "heavy = {'pandas', 'numpy', 'pyarrow', 'sklearn', 'skops', 'perennial', 'prefect'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stdout.strip() == "[]"
