from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from perennial import environments
from perennial.errors import InstallationError, ProjectError
from perennial.store import Store, open_store

LOCK = Path(__file__).parents[2] / "examples" / "flights" / "requirements.lock"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def small_lock(tmp_path: Path) -> Path:
    """One package of the flights lock, with its real hashes."""
    text = LOCK.read_text()
    start = text.index("msgspec==")
    lines = text[start:].splitlines(keepends=True)
    end = next(n for n, line in enumerate(lines) if n and not line.startswith("    "))
    path = tmp_path / "requirements.lock"
    path.write_text("".join(lines[:end]))
    return path


def test_an_environment_holds_the_lock_and_serving_and_nothing_of_ours(
    store: Store, small_lock: Path, tmp_path: Path
) -> None:
    environment = environments.describe(store, small_lock, tmp_path / "environments")
    python = environments.make(store, environment, tmp_path / "environments")
    listing = subprocess.run(
        [python, "-c", "import msgspec, serving, sys; print(serving.__file__); import perennial"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert str(tmp_path / "environments") in listing.stdout
    assert "No module named 'perennial'" in listing.stderr


def test_it_is_made_once_and_a_half_made_one_is_made_again(
    store: Store, small_lock: Path, tmp_path: Path
) -> None:
    home = tmp_path / "environments"
    environment = environments.describe(store, small_lock, home)
    python = environments.make(store, environment, home)
    folder = python.parents[1]
    (folder / "witness").touch()
    assert environments.make(store, environment, home) == python
    assert (folder / "witness").exists()
    (folder / "complete").unlink()  # as if killed before its end
    shutil.rmtree(folder / "bin")
    assert environments.make(store, environment, home).exists()
    assert not (folder / "witness").exists()


def test_the_fingerprint_follows_the_lock(store: Store, small_lock: Path, tmp_path: Path) -> None:
    home = tmp_path / "environments"
    one = environments.describe(store, small_lock, home)
    assert environments.describe(store, small_lock, home) == one
    small_lock.write_text(small_lock.read_text() + "\n")
    assert environments.describe(store, small_lock, home).fingerprint != one.fingerprint


def test_a_lock_whose_hash_does_not_match_is_refused(store: Store, small_lock: Path, tmp_path: Path) -> None:
    bad = hashlib.sha256(b"something else").hexdigest()
    small_lock.write_text(f"msgspec==0.22.0 --hash=sha256:{bad}\n")
    environment = environments.describe(store, small_lock, tmp_path / "environments")
    with pytest.raises(ProjectError, match=r"requirements\.lock cannot be installed(?s:.*)[Hh]ash"):
        environments.make(store, environment, tmp_path / "environments")


def test_another_python_is_refused_by_name(store: Store, small_lock: Path, tmp_path: Path) -> None:
    environment = environments.describe(store, small_lock, tmp_path / "environments")
    other = environment.model_copy(update={"python": "3.99", "fingerprint": "0" * 64})
    with pytest.raises(InstallationError, match=r"3\.99"):
        environments.make(store, other, tmp_path / "environments")


def test_a_project_s_wheel_carries_the_commit_in_its_version_and_is_byte_equal(tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(LOCK.parent, project, ignore=shutil.ignore_patterns("__pycache__"))
    wheels = [
        environments.build_project_wheel(project, "0.1.0+g0123456789ab", tmp_path / work)
        for work in ("a", "b")
    ]
    assert wheels[0].name == "flights-0.1.0+g0123456789ab-py3-none-any.whl"
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
    assert "flights/model.py" in zipfile.ZipFile(wheels[0]).namelist()
    assert 'version = "0.1.0"' in (project / "pyproject.toml").read_text()


def test_a_link_never_brings_a_file_of_this_machine_into_a_wheel(tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(LOCK.parent, project, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "secret.py").write_text("KEY = 1\n")
    (project / "src" / "flights" / "secret.py").symlink_to("../../../secret.py")
    with pytest.raises(ProjectError, match=r"src/flights/secret\.py is a symbolic link"):
        environments.build_project_wheel(project, "0.1.0+g0123456789ab", tmp_path / "work")
    assert not (tmp_path / "work").exists()
