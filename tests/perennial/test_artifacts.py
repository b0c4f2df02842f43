"""Nothing that comes out of the store is used before its digest was checked."""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perennial import artifacts
from perennial.errors import ReleaseError
from perennial.store import Store, open_store
from perennial.values import Artifact

FILES = {"model.skops": b"model", "parts/a b": b"a", "parts/deep/ü": b"", "zero": b"0"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(b"original")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "folder")


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_kept_under_its_digest_and_its_name(store: Store, file: Path, tmp_path: Path) -> None:
    kept = artifacts.put_file(store, "reports/toy/file.bin", file)
    assert kept.sha256 == hashlib.sha256(b"original").hexdigest() and kept.bytes == 8
    assert store.key(kept.uri) == f"reports/toy/{kept.sha256[:16]}/file.bin"
    back = artifacts.fetch(store, kept, tmp_path / "new" / "back")
    assert back == tmp_path / "new" / "back" and back.read_bytes() == b"original"
    assert [path.name for path in back.parent.iterdir()] == ["back"]


def test_a_folder_travels_there_and_back(store: Store, folder: Path, tmp_path: Path) -> None:
    kept = artifacts.put_directory(store, "models/toy/model", folder)
    assert kept.uri.endswith(f"/models/toy/{kept.sha256[:16]}/model/") and kept.bytes == 7
    assert kept.sha256 == artifacts.directory_sha256(folder)
    back = artifacts.fetch(store, kept, tmp_path / "new" / "back")
    assert read(back) == FILES
    assert [path.name for path in back.parent.iterdir()] == ["back"]


def test_writing_the_same_twice_gives_the_same_artifact(store: Store, file: Path, folder: Path) -> None:
    assert artifacts.put_file(store, "x/f", file) == artifacts.put_file(store, "x/f", file)
    assert artifacts.put_directory(store, "x/d", folder) == artifacts.put_directory(store, "x/d", folder)
    assert len(store.list()) == 1 + len(FILES)


def test_other_bytes_under_the_same_key_leave_the_first_alone(
    store: Store, file: Path, folder: Path, tmp_path: Path
) -> None:
    first, whole = artifacts.put_file(store, "x/f", file), artifacts.put_directory(store, "x/d", folder)
    file.write_bytes(b"ORIGINAL")
    (folder / "zero").write_bytes(b"1")
    assert artifacts.put_file(store, "x/f", file).uri != first.uri
    assert artifacts.put_directory(store, "x/d", folder).uri != whole.uri
    assert artifacts.fetch(store, first, tmp_path / "f").read_bytes() == b"original"
    assert read(artifacts.fetch(store, whole, tmp_path / "d")) == FILES


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "zero").write_bytes(b"1"),
        lambda folder: (folder / "zero").unlink(),
        lambda folder: (folder / "one").touch(),
        lambda folder: (folder / "zero").rename(folder / "nought"),
        lambda folder: (folder / "zero").rename(folder / "parts" / "zero"),
    ],
    ids=["a byte", "a file less", "an empty file more", "a name", "a place"],
)
def test_the_digest_of_a_folder_covers(folder: Path, change: object) -> None:
    before = artifacts.directory_sha256(folder)
    change(folder)  # type: ignore[operator]
    assert artifacts.directory_sha256(folder) != before


def test_the_digest_of_a_folder_does_not_depend_on_where_and_when_it_was_written(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    other = write(tmp_path / "other", dict(reversed(FILES.items())))
    os.utime(other / "zero", (0, 0))
    (other / "an empty folder").mkdir()
    assert artifacts.directory_sha256(one) == artifacts.directory_sha256(other)


@pytest.mark.parametrize("altered", [b"ORIGINAL", b"short", b""], ids=["same size", "shorter", "empty"])
def test_altered_bytes_are_refused_with_both_digests_and_leave_nothing(
    store: Store, file: Path, tmp_path: Path, altered: bytes
) -> None:
    kept = artifacts.put_file(store, "x/f", file)
    store.put_bytes(store.key(kept.uri), altered)
    with pytest.raises(ReleaseError) as refused:
        artifacts.fetch(store, kept, tmp_path / "new" / "back")
    assert kept.uri in refused.value.found and hashlib.sha256(altered).hexdigest() in refused.value.found
    assert refused.value.expected == f"sha256 {kept.sha256}" and refused.value.next_command
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("accident", ["altered", "one lost", "one added", "all lost"])
def test_an_altered_folder_is_refused_and_leaves_nothing(
    store: Store, folder: Path, tmp_path: Path, accident: str
) -> None:
    kept = artifacts.put_directory(store, "x/d", folder)
    key = store.key(kept.uri)
    match accident:
        case "altered":
            store.put_bytes(f"{key}/zero", b"1")
        case "one lost":
            store.delete(f"{key}/zero")
        case "one added":
            store.put_bytes(f"{key}/parts/evil.py", b"")
        case "all lost":
            for name in FILES:
                store.delete(f"{key}/{name}")
    with pytest.raises(ReleaseError) as refused:
        artifacts.fetch(store, kept, tmp_path / "new" / "back")
    assert kept.uri in str(refused.value) and kept.sha256 in str(refused.value)
    assert list((tmp_path / "new").iterdir()) == []


def test_an_artifact_that_is_gone_is_named(store: Store, file: Path, tmp_path: Path) -> None:
    kept = artifacts.put_file(store, "x/f", file)
    store.delete(store.key(kept.uri))
    for use in (artifacts.fetch, artifacts.open_local):
        with pytest.raises(ReleaseError, match="is not in the store") as refused:
            use(store, kept, tmp_path / "new")
        assert kept.uri in refused.value.found and kept.sha256 in refused.value.expected
    assert not (tmp_path / "new" / "back").exists()


def test_writing_again_repairs_what_was_altered(
    store: Store, file: Path, folder: Path, tmp_path: Path
) -> None:
    kept, whole = artifacts.put_file(store, "x/f", file), artifacts.put_directory(store, "x/d", folder)
    store.put_bytes(store.key(kept.uri), b"ORIGINAL")
    store.put_bytes(f"{store.key(whole.uri)}/zero", b"1")
    assert artifacts.put_file(store, "x/f", file) == kept
    assert artifacts.put_directory(store, "x/d", folder) == whole
    assert artifacts.fetch(store, kept, tmp_path / "f").read_bytes() == b"original"
    assert read(artifacts.fetch(store, whole, tmp_path / "d")) == FILES


def test_what_is_there_already_is_not_fetched_again(
    store: Store, file: Path, folder: Path, tmp_path: Path
) -> None:
    kept, whole = artifacts.put_file(store, "x/f", file), artifacts.put_directory(store, "x/d", folder)
    artifacts.fetch(store, kept, tmp_path / "f")
    artifacts.fetch(store, whole, tmp_path / "d")
    for key in store.list():
        store.delete(key)
    assert artifacts.fetch(store, kept, tmp_path / "f").read_bytes() == b"original"
    assert read(artifacts.fetch(store, whole, tmp_path / "d")) == FILES


def test_a_file_replaces_another_and_a_failed_fetch_does_not(
    store: Store, file: Path, tmp_path: Path
) -> None:
    kept = artifacts.put_file(store, "x/f", file)
    (tmp_path / "back").write_bytes(b"before")
    assert artifacts.fetch(store, kept, tmp_path / "back").read_bytes() == b"original"
    (tmp_path / "back").write_bytes(b"before")
    store.put_bytes(store.key(kept.uri), b"ORIGINAL")
    with pytest.raises(ReleaseError):
        artifacts.fetch(store, kept, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"before"


def test_a_folder_replaces_nothing(directory_store: Store, folder: Path, tmp_path: Path) -> None:
    kept = artifacts.put_directory(directory_store, "x/d", folder)
    other = write(tmp_path / "other", {"mine": b"x"})
    (tmp_path / "a file").write_bytes(b"mine")
    for destination in (other, tmp_path / "a file"):
        with pytest.raises(ReleaseError, match="already holds something else") as refused:
            artifacts.fetch(directory_store, kept, destination)
        assert str(destination) in refused.value.next_command
    assert read(other) == {"mine": b"x"} and (tmp_path / "a file").read_bytes() == b"mine"


def test_many_may_fetch_the_same_at_once(store: Store, folder: Path, file: Path, tmp_path: Path) -> None:
    whole, kept = artifacts.put_directory(store, "x/d", folder), artifacts.put_file(store, "x/f", file)
    with ThreadPoolExecutor(8) as pool:
        folders = pool.map(lambda _: artifacts.fetch(store, whole, tmp_path / "new" / "d"), range(8))
        files = pool.map(lambda _: artifacts.fetch(store, kept, tmp_path / "new" / "f"), range(8))
        assert all(read(path) == FILES for path in folders)
        assert all(path.read_bytes() == b"original" for path in files)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["d", "f"]


def test_a_directory_store_is_read_in_place_and_another_once_into_the_cache(
    store: Store, folder: Path, file: Path, tmp_path: Path
) -> None:
    whole, kept = artifacts.put_directory(store, "x/d", folder), artifacts.put_file(store, "x/f.bin", file)
    cache = tmp_path / "cache"
    first, one = artifacts.open_local(store, whole, cache), artifacts.open_local(store, kept, cache)
    assert read(first) == FILES and first.name == "d"
    assert one.read_bytes() == b"original" and one.name == "f.bin"
    assert cache.exists() is (store.local_path("x") is None)
    assert artifacts.open_local(store, whole, cache) == first


def test_a_damaged_cache_is_repaired(s3_store: Store, folder: Path, file: Path, tmp_path: Path) -> None:
    whole, kept = artifacts.put_directory(s3_store, "x/d", folder), artifacts.put_file(s3_store, "x/f", file)
    copy, one = (artifacts.open_local(s3_store, a, tmp_path / "cache") for a in (whole, kept))
    (copy / "zero").write_bytes(b"1")
    one.write_bytes(b"")
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: artifacts.open_local(s3_store, whole, tmp_path / "cache"), range(4)))
    assert copies == [copy] * 4 and read(copy) == FILES
    assert artifacts.open_local(s3_store, kept, tmp_path / "cache").read_bytes() == b"original"
    assert [path.name for path in copy.parent.iterdir()] == ["d"]


def test_who_repairs_waits_for_who_is_repairing(s3_store: Store, folder: Path, tmp_path: Path) -> None:
    whole = artifacts.put_directory(s3_store, "x/d", folder)
    copy = artifacts.open_local(s3_store, whole, tmp_path / "cache")
    (copy / "zero").write_bytes(b"1")
    with ThreadPoolExecutor(1) as pool:
        with artifacts.alone_in(copy.parent):
            waiting = pool.submit(artifacts.open_local, s3_store, whole, tmp_path / "cache")
            time.sleep(0.2)
            assert not waiting.done() and (copy / "zero").read_bytes() == b"1"
            (copy / "zero").write_bytes(FILES["zero"])
            repaired = copy.stat().st_ino
        assert waiting.result(10) == copy and copy.stat().st_ino == repaired


def test_a_store_that_was_altered_in_place_is_refused(
    directory_store: Store, folder: Path, tmp_path: Path
) -> None:
    kept = artifacts.put_directory(directory_store, "x/d", folder)
    (artifacts.open_local(directory_store, kept, tmp_path) / "zero").write_bytes(b"1")
    with pytest.raises(ReleaseError, match="was altered after it was written"):
        artifacts.open_local(directory_store, kept, tmp_path)


def test_a_folder_that_cannot_be_copied_is_refused_and_nothing_is_written(
    directory_store: Store, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    (write(tmp_path / "linked") / "link").symlink_to(tmp_path / "folder", target_is_directory=True)
    write(tmp_path / "staged", {"weights#1": b"x"})
    for name, words in (("empty", "holds no file"), ("linked", "link is a link"), ("staged", "weights#1")):
        with pytest.raises(ReleaseError, match=words):
            artifacts.put_directory(directory_store, "x/d", tmp_path / name)
    assert directory_store.list() == []


def test_an_artifact_of_another_store_is_refused(directory_store: Store, file: Path, tmp_path: Path) -> None:
    kept = artifacts.put_file(open_store((tmp_path / "other store").as_uri()), "x/f", file)
    with pytest.raises(ReleaseError, match="is not in this installation's store"):
        artifacts.fetch(directory_store, kept, tmp_path / "back")
    outside = Artifact(uri=f"{directory_store.base}/../file.bin", sha256=kept.sha256, bytes=8)
    with pytest.raises(ValueError, match="not a key"):
        artifacts.fetch(directory_store, outside, tmp_path / "back")
