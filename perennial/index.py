"""A package index of plain files in the store, for uv and pip (PEP 503, and PEP 691's JSON beside it).

    packages/<name>/<filename>.whl    written once, never again
    simple/<name>/index.{html,json}   what packages/<name>/ holds
    simple/index.html                 the names

Serve the store's root over HTTP and give `…/simple/` to `--index-url`; all links are relative.

Two publishers at once: each writes its wheel, then the pages from a listing, then lists again and starts over
if a wheel has come since. Whoever writes a page last has listed after every wheel that any finished publisher
wrote, so the pages end up complete. For some milliseconds in between, a page may lack the other's wheel; a
publisher killed before its page was written is made good by the next publish of that name.
"""

from __future__ import annotations

import hashlib
import html
import json
import zipfile
from email.parser import BytesParser
from io import BytesIO
from pathlib import Path
from typing import NotRequired, TypedDict
from urllib.parse import quote

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from perennial.errors import ProjectError, ReleaseError
from perennial.store import Store
from perennial.values import Artifact, Package

SHA_CHARACTERS = 12

File = TypedDict(
    "File",
    {
        "filename": str,
        "url": str,
        "hashes": dict[str, str],
        "requires-python": NotRequired[str],
        "size": int,
    },
)


def local_version(version: str, git_sha: str) -> str:
    """`version` with the commit as its local segment, so that no two commits share a version.

    Raises ProjectError for a version that PEP 440 does not know.
    """
    try:
        parsed = Version(version)
    except InvalidVersion:
        raise ProjectError(
            f"the project's version is {version!r}",
            expected="a version like 1.2.0 (PEP 440)",
            next_command="set [project] version in pyproject.toml",
        ) from None
    commit = f"g{git_sha[:SHA_CHARACTERS]}"
    return f"{parsed.public}+{parsed.local}.{commit}" if parsed.local else f"{parsed.public}+{commit}"


def publish(store: Store, wheel_path: Path) -> Package:
    """Put a wheel on the index. The same bytes again are welcome; other bytes of that name are refused.

    Raises ReleaseError for a file that is no wheel, or a version that is taken.
    """
    data = wheel_path.read_bytes()
    name, version = _identity(wheel_path.name)
    file = _describe(wheel_path.name, data)
    sha256 = file["hashes"]["sha256"]
    key = f"packages/{name}/{wheel_path.name}"
    if not store.create(key, data):
        taken = hashlib.sha256(store.get(key)).hexdigest()
        if taken != sha256:
            raise ReleaseError(
                f"{wheel_path.name} is already published with sha256 {taken}, and this one has {sha256}",
                expected="a new version: a published one never changes",
                next_command="raise [project] version in pyproject.toml and commit",
            )
    _write_pages(store, name, file)
    return Package(
        name=name,
        version=version,
        sha256=sha256,
        filename=wheel_path.name,
        index=_index_uri(store),
    )


def find(store: Store, name: str, version: str) -> Package | None:
    """The published wheel of exactly this version, if there is one.

    By the page, which is written last: what a killed publisher left is not published until it tries again.
    """
    name = canonicalize_name(name)
    for filename, file in _known(store, name).items():
        if _identity(filename) == (name, version):
            sha256 = file["hashes"]["sha256"]
            return Package(
                name=name, version=version, sha256=sha256, filename=filename, index=_index_uri(store)
            )
    return None


def artifact(store: Store, package: Package) -> Artifact:
    """The published wheel as an artifact, to fetch it by its digest.

    Raises ReleaseError when it is not in the store.
    """
    key = f"packages/{package.name}/{package.filename}"
    try:
        return Artifact(uri=store.uri(key), sha256=package.sha256, bytes=store.size(key))
    except FileNotFoundError:
        raise ReleaseError(
            f"{package.filename} is not on the package index {package.index}",
            expected="the wheel that the release was built from",
            next_command="build the release again, or restore the store from its backup",
        ) from None


def _index_uri(store: Store) -> str:
    return store.uri("simple/index.html").removesuffix("index.html")


def _identity(filename: str) -> tuple[str, str]:
    """The normalised name and the version that a wheel's filename gives."""
    try:
        name, version, _, _ = parse_wheel_filename(filename)
    except InvalidWheelFilename as error:
        raise ReleaseError(
            str(error), expected="a file that a build made: name-version-python-abi-platform.whl"
        ) from None
    return str(name), str(version)


def _describe(filename: str, data: bytes) -> File:
    name, version = _identity(filename)
    try:
        with zipfile.ZipFile(BytesIO(data)) as wheel:
            names = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1]
            metadata = BytesParser().parsebytes(wheel.read(names[0]), headersonly=True)
    except (zipfile.BadZipFile, IndexError):
        raise ReleaseError(f"{filename} holds no METADATA", expected="a wheel that a build made") from None
    if canonicalize_name(str(metadata["Name"])) != name:
        raise ReleaseError(f"{filename} holds the package {metadata['Name']}", expected=f"the package {name}")
    if not _same_version(str(metadata["Version"]), version):
        raise ReleaseError(f"{filename} holds {name} {metadata['Version']}", expected=f"{name} {version}")
    file: File = {
        "filename": filename,
        "url": f"../../packages/{name}/{quote(filename)}",
        "hashes": {"sha256": hashlib.sha256(data).hexdigest()},
        "size": len(data),
    }
    if metadata["Requires-Python"]:
        file["requires-python"] = str(metadata["Requires-Python"])
    return file


def _same_version(one: str, other: str) -> bool:
    try:
        return Version(one) == Version(other)
    except InvalidVersion:
        return False


def _write_pages(store: Store, name: str, published: File) -> None:
    """Write the pages until the listing they were made from is still the listing; the project's JSON last."""
    while True:
        names = store.list_folders("packages")
        store.put_bytes("simple/index.html", _root_page(names))
        if store.list_folders("packages") == names:
            break
    known = {published["filename"]: published} | _known(store, name)
    while True:
        filenames = _wheels(store, name)
        for filename in set(filenames) - set(known):
            known[filename] = _describe(filename, store.get(f"packages/{name}/{filename}"))
        files = [known[filename] for filename in filenames]
        store.put_bytes(f"simple/{name}/index.html", _project_page(name, files))
        store.put_bytes(f"simple/{name}/index.json", _json_page(name, files))
        if _wheels(store, name) == filenames:
            break


def _wheels(store: Store, name: str) -> list[str]:
    folder = f"packages/{name}"
    return [key.removeprefix(f"{folder}/") for key in store.list(folder) if key.endswith(".whl")]


def _known(store: Store, name: str) -> dict[str, File]:
    """What the last page said of its wheels. They never change, so this only saves reading them again."""
    try:
        page = json.loads(store.get(f"simple/{name}/index.json"))
    except FileNotFoundError:
        return {}
    return {file["filename"]: file for file in page["files"]}


def _json_page(name: str, files: list[File]) -> bytes:
    versions = sorted({_identity(f["filename"])[1] for f in files}, key=Version)
    page = {"meta": {"api-version": "1.1"}, "name": name, "versions": versions, "files": files}
    return json.dumps(page, indent=1).encode()


def _project_page(name: str, files: list[File]) -> bytes:
    links = []
    for file in files:
        python = file.get("requires-python", "")
        attribute = f' data-requires-python="{html.escape(python)}"' if python else ""
        href = f"{file['url']}#sha256={file['hashes']['sha256']}"
        links.append(f'<a href="{href}"{attribute}>{html.escape(file["filename"])}</a><br>')
    return _page(f"Links for {name}", links)


def _root_page(names: list[str]) -> bytes:
    return _page("Packages", [f'<a href="{name}/">{name}</a><br>' for name in names])


def _page(title: str, lines: list[str]) -> bytes:
    head = '<!DOCTYPE html>\n<html><head><meta charset="utf-8">'
    head += f'<meta name="pypi:repository-version" content="1.0"><title>{title}</title></head><body>'
    return "\n".join([head, f"<h1>{title}</h1>", *lines, "</body></html>", ""]).encode()
