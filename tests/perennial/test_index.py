"""The package index: written once, complete whoever writes at once, and one that uv and pip install from."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from uv import find_uv_bin

from perennial import artifacts, index
from perennial.errors import ProjectError, ReleaseError
from perennial.store import Store
from tests.releases import a_wheel

GIT_SHA = "0123456789abcdef0123456789abcdef01234567"
VERSION = "1.0+g0123456789ab"


def page(store: Store, name: str = "toy") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.get(f"simple/{name}/index.json"))
    return found


def test_a_published_wheel_is_on_all_pages(store: Store, tmp_path: Path) -> None:
    wheel = a_wheel(tmp_path, version=VERSION, requires_python=">=3.11")
    package = index.publish(store, wheel)
    assert (package.name, package.version, package.filename) == ("toy", VERSION, wheel.name)
    assert package.sha256 == artifacts.file_sha256(wheel)
    assert package.index == f"{store.base}/simple/"
    assert store.get(f"packages/toy/{wheel.name}") == wheel.read_bytes()
    escaped = wheel.name.replace("+", "%2B")
    assert page(store) == {
        "meta": {"api-version": "1.1"},
        "name": "toy",
        "versions": [VERSION],
        "files": [
            {
                "filename": wheel.name,
                "url": f"../../packages/toy/{escaped}",
                "hashes": {"sha256": package.sha256},
                "size": wheel.stat().st_size,
                "requires-python": ">=3.11",
            }
        ],
    }
    html = store.get("simple/toy/index.html").decode()
    assert f'<a href="../../packages/toy/{escaped}#sha256={package.sha256}"' in html
    assert 'data-requires-python="&gt;=3.11"' in html
    assert '<a href="toy/">toy</a>' in store.get("simple/index.html").decode()


def test_the_same_bytes_again_are_welcome(store: Store, tmp_path: Path) -> None:
    wheel = a_wheel(tmp_path)
    first = index.publish(store, wheel)
    keys, before = store.list(), page(store)
    assert index.publish(store, wheel) == first
    assert (store.list(), page(store)) == (keys, before)


def test_other_bytes_of_a_version_are_refused_and_change_nothing(store: Store, tmp_path: Path) -> None:
    first = index.publish(store, a_wheel(tmp_path / "one"))
    other = a_wheel(tmp_path / "other", files={"toy.py": b"VERSION = 'altered'"})
    with pytest.raises(ReleaseError, match="is already published") as refused:
        index.publish(store, other)
    assert first.sha256 in refused.value.found and artifacts.file_sha256(other) in refused.value.found
    assert "version" in refused.value.expected and "pyproject.toml" in refused.value.next_command
    assert index.find(store, "toy", "1.0") == first
    assert store.get(f"packages/toy/{other.name}") == (tmp_path / "one" / other.name).read_bytes()


def test_two_publishers_at_once_leave_complete_pages(store: Store, tmp_path: Path) -> None:
    rounds = 4 if store.base.startswith("s3:") else 12
    names = ("toy", "toy-two")
    with ThreadPoolExecutor(4) as pool:
        for number in range(rounds):
            wheels = [
                a_wheel(tmp_path, name, f"{number}.{part}", files={"x.py": b"#" * 2000 * part})
                for name in names
                for part in range(2)
            ]
            barrier = threading.Barrier(len(wheels))

            def publish(wheel: Path, barrier: threading.Barrier = barrier) -> str:
                barrier.wait()
                return index.publish(store, wheel).version

            list(pool.map(publish, wheels))
            expected = sorted(f"{n}.{part}" for n in range(number + 1) for part in range(2))
            for name in names:
                assert sorted(page(store, name)["versions"]) == expected
                html = store.get(f"simple/{name}/index.html").decode()
                assert all(file["filename"] in html for file in page(store, name)["files"])
    root = store.get("simple/index.html").decode()
    assert all(f'href="{name}/"' in root for name in names)


@pytest.mark.parametrize("name", ["toy", "toy-two"])
@pytest.mark.parametrize("at", ["simple/index.html", "simple/toy/index.html", "simple/toy/index.json"])
def test_a_publisher_that_listed_before_another_came_writes_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, name: str
) -> None:
    late = copy.copy(store)
    other = a_wheel(tmp_path, name, "2.0")
    overtaken: list[str] = []

    def put_bytes(key: str, data: bytes) -> None:
        if key == at and not overtaken:  # what is to be written was listed; now the other one does it all
            overtaken.append(index.publish(store, other).name)
        store.put_bytes(key, data)

    monkeypatch.setattr(late, "put_bytes", put_bytes)
    index.publish(late, a_wheel(tmp_path, "toy", "1.0"))
    assert overtaken == [name]
    assert page(store)["versions"] == (["1.0", "2.0"] if name == "toy" else ["1.0"])
    for file in page(store)["files"]:
        assert file["filename"] in store.get("simple/toy/index.html").decode()
    assert f'href="{name}/"' in store.get("simple/index.html").decode()
    assert 'href="toy/"' in store.get("simple/index.html").decode()


def test_of_two_that_publish_other_bytes_at_once_one_is_refused(store: Store, tmp_path: Path) -> None:
    wheels = [a_wheel(tmp_path / str(n), files={"toy.py": f"N = {n}".encode()}) for n in range(2)]
    barrier = threading.Barrier(2)

    def publish(wheel: Path) -> str:
        barrier.wait()
        try:
            return index.publish(store, wheel).sha256
        except ReleaseError as error:
            return error.found

    with ThreadPoolExecutor(2) as pool:
        said = sorted(pool.map(publish, wheels), key=len)
    found = index.find(store, "toy", "1.0")
    assert found is not None and said[0] == found.sha256
    assert "is already published" in said[1]


def test_versions_are_in_their_own_order(store: Store, tmp_path: Path) -> None:
    for version in ("1.10", "1.9", "1.0rc1", "1.0"):
        index.publish(store, a_wheel(tmp_path, version=version))
    assert page(store)["versions"] == ["1.0rc1", "1.0", "1.9", "1.10"]


def test_find_gives_exactly_the_version_that_was_asked_for(store: Store, tmp_path: Path) -> None:
    published = {v: index.publish(store, a_wheel(tmp_path, version=v)) for v in ("1.0", VERSION)}
    for version, package in published.items():
        assert index.find(store, "toy", version) == package
    assert index.find(store, "toy", "1.0+g0") is None
    assert index.find(store, "to", "1.0") is None and index.find(store, "unknown", "1.0") is None
    two = index.publish(store, a_wheel(tmp_path, name="toy-two"))
    assert index.find(store, "toy-two", "1.0") == index.find(store, "Toy_Two", "1.0") == two


def test_what_a_killed_publisher_left_is_not_found_and_is_published_by_the_next_try(
    store: Store, tmp_path: Path
) -> None:
    wheel = a_wheel(tmp_path, version="2.0")
    index.publish(store, a_wheel(tmp_path, version="1.0"))
    store.put_bytes(f"packages/toy/{wheel.name}", wheel.read_bytes())
    assert index.find(store, "toy", "2.0") is None
    package = index.publish(store, wheel)
    assert index.find(store, "toy", "2.0") == package
    assert page(store)["versions"] == ["1.0", "2.0"]


def test_a_published_wheel_is_fetched_by_its_digest(store: Store, tmp_path: Path) -> None:
    package = index.publish(store, a_wheel(tmp_path))
    artifact = index.artifact(store, package)
    back = artifacts.fetch(store, artifact, tmp_path / "back" / package.filename)
    assert artifacts.file_sha256(back) == package.sha256 == artifact.sha256
    store.put_bytes(f"packages/toy/{package.filename}", b"altered")
    found = index.find(store, "toy", "1.0")
    assert found == package, "the digest of what was published, not of what is there now"
    with pytest.raises(ReleaseError, match="was altered"):
        artifacts.fetch(store, index.artifact(store, found), tmp_path / "again")
    store.delete(f"packages/toy/{package.filename}")
    with pytest.raises(ReleaseError, match="is not on the package index") as refused:
        index.artifact(store, package)
    assert package.filename in refused.value.found and store.base in refused.value.found


@pytest.mark.parametrize(
    ("filename", "words"),
    [
        ("toy.whl", "Invalid wheel filename.*'toy'"),
        ("toy-1.0.tar.gz", "Invalid wheel filename.*toy-1.0.tar.gz"),
        ("toy-1.0-py3-none-any.whl", "holds no METADATA"),
        ("empty-1.0-py3-none-any.whl", "holds no METADATA"),
        ("other-1.0-py3-none-any.whl", "holds the package toy"),
        ("toy-2.0-py3-none-any.whl", "holds toy 1.0"),
    ],
)
def test_what_is_no_wheel_is_refused_and_nothing_is_published(
    directory_store: Store, tmp_path: Path, filename: str, words: str
) -> None:
    path = tmp_path / filename
    if words == "holds no METADATA":
        path.write_bytes(b"PK" if filename.startswith("toy") else b"PK\x05\x06" + bytes(18))
    else:
        path.write_bytes(a_wheel(tmp_path / "good").read_bytes())
    with pytest.raises(ReleaseError, match=words):
        index.publish(directory_store, path)
    assert directory_store.list() == []


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.0", "1.0+g0123456789ab"),
        ("v1.0.0-RC1", "1.0.0rc1+g0123456789ab"),
        ("1!2.0.post1.dev3", "1!2.0.post1.dev3+g0123456789ab"),
        ("1.0+Ubuntu-1", "1.0+ubuntu.1.g0123456789ab"),
    ],
)
def test_the_local_version_names_the_commit(version: str, expected: str) -> None:
    assert index.local_version(version, GIT_SHA) == expected
    assert index.local_version(version, "f" + GIT_SHA[1:]) != expected


def test_a_version_that_is_none_is_a_project_error() -> None:
    with pytest.raises(ProjectError, match="the project's version is 'one'") as refused:
        index.local_version("one", GIT_SHA)
    assert "PEP 440" in refused.value.expected and "pyproject.toml" in refused.value.next_command


# Real installs


@pytest.fixture
def served(directory_store: Store, tmp_path: Path) -> Iterator[str]:
    """The URL of the directory store's root, as `python -m http.server` serves it."""
    handler = partial(_Quiet, directory=str(tmp_path / "a store"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


Installer = Callable[..., list[str]]


def uv_install(folder: Path) -> list[str]:
    return [find_uv_bin(), "pip", "install", "--no-cache", "--no-config", "--python", sys.executable]


def pip_install(folder: Path) -> list[str]:
    venv.create(folder / "venv", with_pip=True)
    return [str(folder / "venv" / "bin" / "python"), "-m", "pip", "install", "--no-cache-dir", "--isolated"]


@pytest.mark.parametrize("installer", [uv_install, pip_install])
def test_it_installs_by_hash_and_refuses_other_bytes(
    installer: Installer, directory_store: Store, served: str, tmp_path: Path
) -> None:
    # Not 1.0 as well: for uv `==1.0` is also the newest of 1.0's local versions, whose hash is another.
    for version in (VERSION, "1.0+gfedcba987654", "2.0"):
        wheel = a_wheel(tmp_path, "toy-two", version, requires_python=">=3.11")
        index.publish(directory_store, wheel)
    index.publish(directory_store, a_wheel(tmp_path, "toy-two", "3.0", requires_python=">=4"))
    install = [*installer(tmp_path), "--index-url", f"{served}/simple/", "--require-hashes"]

    def try_to_install(version: str, target: str) -> subprocess.CompletedProcess[str]:
        package = index.find(directory_store, "toy-two", version)
        assert package is not None
        (tmp_path / "requirements").write_text(f"toy-two=={version} --hash=sha256:{package.sha256}\n")
        return subprocess.run(
            [*install, "--target", tmp_path / target, "-r", tmp_path / "requirements"],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    for version in (VERSION, "1.0+gfedcba987654"):
        done = try_to_install(version, f"target {version}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / f"target {version}" / "toy_two.py").read_text() == f"VERSION = '{version}'\n"

    wrong_python = try_to_install("3.0", "target 3.0")
    assert wrong_python.returncode != 0 and not (tmp_path / "target 3.0" / "toy_two.py").exists()

    altered = a_wheel(tmp_path / "altered", "toy-two", "2.0", files={"toy_two.py": b"EVIL = True"})
    directory_store.put_bytes(f"packages/toy-two/{altered.name}", altered.read_bytes())
    refused = try_to_install("2.0", "target 2.0")
    assert refused.returncode != 0 and "hash" in (refused.stdout + refused.stderr).lower()
    assert not (tmp_path / "target 2.0" / "toy_two.py").exists()
