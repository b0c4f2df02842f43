"""What a directory and an S3 API both promise, and how each says that it cannot."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perennial.errors import InstallationError, ReleaseError
from perennial.store import Store, StoreCredentials, checked, open_store
from tests.services import S3Server, free_ports

ODD_KEYS = (
    "a b",
    "a%20b",
    "ü/é",
    "1.0+gabc.whl",
    "q?x=1&y#z",
    "name#1a",
    "c:d*[e]~|^`<>{}",
    "k'l\"m",
    "...",
    "-x",
)
BAD_KEYS = (
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "./a",
    "a\\b",
    "a\nb",
    "a\x00",
    "a\x7f",
    "a#1",
    "a#12/b",
)
SECRET = "hunter2-hunter2"


# What both kinds promise


def test_what_was_put_is_read_back(store: Store) -> None:
    store.put_bytes("folder/object", b"first")
    assert store.get("folder/object") == b"first"
    store.put_bytes("folder/object", b"second")
    assert store.get("folder/object") == b"second"
    assert store.size("folder/object") == 6
    assert store.exists("folder/object") and not store.exists("folder/other")


def test_an_empty_object_is_an_object(store: Store, tmp_path: Path) -> None:
    store.put_bytes("empty", b"")
    assert store.get("empty") == b"" and store.size("empty") == 0 and store.list() == ["empty"]
    store.fetch("empty", tmp_path / "empty")
    store.put_file("again", tmp_path / "empty")
    assert store.get("again") == b""


@pytest.mark.parametrize("size", [1, 4 * 2**20, 11 * 2**20 + 7])
def test_a_file_travels_there_and_back(store: Store, tmp_path: Path, size: int) -> None:
    (tmp_path / "there").write_bytes(bytes(range(251)) * (size // 251) + b"x" * (size % 251))
    store.put_file("big/file", tmp_path / "there")
    assert store.size("big/file") == size
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "back").write_bytes(b"old")
    for destination in (tmp_path / "new folder" / "back", tmp_path / "deep" / "er" / "back"):
        store.fetch("big/file", destination)
        assert destination.read_bytes() == (tmp_path / "there").read_bytes()
        assert [path.name for path in destination.parent.iterdir()] == ["back"]


def test_a_file_that_is_not_there_is_no_fault_of_the_store(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        store.put_file("key", tmp_path / "nowhere")
    assert store.list() == []


@pytest.mark.parametrize("key", ["missing", "folder/missing", "folder", "folder/object/below"])
def test_a_missing_key_is_a_file_not_found(store: Store, tmp_path: Path, key: str) -> None:
    store.put_bytes("folder/object", b"x")
    for read in (store.get, store.size, lambda missing: store.fetch(missing, tmp_path / "out")):
        with pytest.raises(FileNotFoundError, match=f"{key} is not in the store"):
            read(key)
    assert not store.exists(key)
    store.delete(key)
    assert store.list() == ["folder/object"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "a store"] == []


def test_a_deleted_object_is_gone_and_may_be_deleted_again(store: Store) -> None:
    store.put_bytes("a/b", b"x")
    store.delete("a/b")
    assert not store.exists("a/b") and store.list() == [] and store.list_folders() == []
    store.delete("a/b")


def test_create_writes_once(store: Store) -> None:
    assert store.create("once", b"first")
    assert not store.create("once", b"second")
    assert store.get("once") == b"first"
    store.delete("once")
    assert store.create("once", b"third")


def test_of_sixteen_racing_writers_exactly_one_creates(store: Store) -> None:
    rounds = 1 if store.base.startswith("s3:") else 20  # SeaweedFS's losers wait for whole seconds
    with ThreadPoolExecutor(16) as pool:
        for key in (f"race/{number}" for number in range(rounds)):
            barrier = threading.Barrier(16)

            def create(writer: int, key: str = key, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return store.create(key, f"{writer}".encode() * 1000)

            won = list(pool.map(create, range(16)))
            assert won.count(True) == 1
            assert store.get(key) == f"{won.index(True)}".encode() * 1000
    assert store.list("race") == sorted(f"race/{number}" for number in range(rounds))


def test_a_reader_never_sees_half_an_object(store: Store) -> None:
    whole = {b"a" * 300_000, b"b" * 300_000}
    store.put_bytes("key", b"a" * 300_000)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            for data in whole:
                store.put_bytes("key", data)

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write) for _ in range(2)]
        try:
            for _ in range(50):
                assert store.get("key") in whole
        finally:
            over.set()
        assert [writer.result() for writer in writers] == [None, None]


def test_a_folder_lists_what_is_below_it_and_nothing_beside_it(store: Store) -> None:
    for key in ("a/1", "a/b/2", "a/b/c/3", "ab/4", "5"):
        store.put_bytes(key, b"x")
    assert store.list() == ["5", "a/1", "a/b/2", "a/b/c/3", "ab/4"]
    assert store.list("a") == store.list("a/") == ["a/1", "a/b/2", "a/b/c/3"]
    assert store.list("a/b") == ["a/b/2", "a/b/c/3"]
    assert store.list("nothing") == store.list("a/1") == []
    assert store.list_folders() == ["a", "ab"]
    assert store.list_folders("a") == store.list_folders("a/") == ["b"]
    assert store.list_folders("nothing") == []


@pytest.mark.parametrize("key", ODD_KEYS)
def test_a_key_may_hold_any_printable_character(store: Store, key: str) -> None:
    store.put_bytes(f"x/{key}", b"x")
    assert store.get(f"x/{key}") == b"x"
    assert store.list("x") == [f"x/{key}"]
    assert store.key(store.uri(f"x/{key}")) == f"x/{key}"
    store.delete(f"x/{key}")
    assert store.list() == []


@pytest.mark.parametrize("key", BAD_KEYS)
def test_what_is_no_key_is_refused_before_the_store_is_asked(
    directory_store: Store, tmp_path: Path, key: str
) -> None:
    with pytest.raises(ValueError, match="not a key"):
        checked(key)
    for use in (
        directory_store.get,
        directory_store.size,
        directory_store.exists,
        directory_store.delete,
        directory_store.uri,
        directory_store.local_path,
        lambda bad: directory_store.put_bytes(bad, b""),
        lambda bad: directory_store.create(bad, b""),
        lambda bad: directory_store.put_file(bad, Path(__file__)),
        lambda bad: directory_store.fetch(bad, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="not a key"):
            use(key)
    assert directory_store.list() == [] and [path.name for path in tmp_path.iterdir()] == ["a store"]


def test_a_uri_names_the_store_and_only_its_own_are_read(store: Store) -> None:
    uri = store.uri("a/b")
    assert uri == f"{store.base}/a/b"
    assert store.key(uri) == store.key(f"{uri}/") == "a/b"
    for foreign in ("s3://other/a/b", "file:///elsewhere/a/b", f"{store.base}-2/a", "a/b"):
        with pytest.raises(ReleaseError, match="is not in this installation's store") as refused:
            store.key(foreign)
        assert store.base in str(refused.value) and "PERENNIAL_STORE_URL" in refused.value.next_command
    for outside in (f"{store.base}/../secret", f"{store.base}/a/../../secret"):
        with pytest.raises(ValueError, match="not a key"):
            store.key(outside)


def test_an_escaped_way_out_of_the_directory_is_no_key_either(directory_store: Store) -> None:
    with pytest.raises(ValueError, match="not a key"):
        directory_store.key(f"{directory_store.base}/%2e%2e/secret")


def test_a_store_that_is_opened_again_has_everything(
    tmp_path: Path, s3_server: S3Server, no_aws: None
) -> None:
    def open_directory() -> Store:
        return open_store((tmp_path / "again").as_uri())

    for opener in (open_directory, lambda: s3_server.open("again/and again")):
        opener().put_bytes("kept", b"x")
        assert opener().get("kept") == b"x"


# The directory


def test_a_directory_store_can_be_read_in_place(directory_store: Store, tmp_path: Path) -> None:
    directory_store.put_bytes("folder/a b", b"x")
    path = directory_store.local_path("folder/a b")
    assert path == tmp_path / "a store" / "folder" / "a b" and path.read_bytes() == b"x"
    assert directory_store.local_path("folder") == path.parent


def test_an_s3_store_has_no_path(s3_store: Store) -> None:
    s3_store.put_bytes("key", b"x")
    assert s3_store.local_path("key") is None


def test_a_folder_that_cannot_be_made_is_an_installation_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InstallationError, match="cannot be made: Not a directory") as refused:
        open_store((tmp_path / "file" / "store").as_uri())
    assert "PERENNIAL_STORE_URL" in refused.value.next_command


def test_a_folder_that_cannot_be_written_to_is_an_installation_error(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    (tmp_path / "store").rmdir()
    (tmp_path / "store").touch()
    for write in (store.put_bytes, store.create):
        with pytest.raises(InstallationError, match="could not write") as refused:
            write("key", b"x")
        assert refused.value.expected == "a folder this user can write to"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/absolute",
        "file:///",
        "file://relative/folder",
        "s3:///prefix",
        "gs://bucket",
        "s3://b/../c",
        "s3://b/x//y",
    ],
)
def test_an_address_that_names_no_store_is_refused_with_two_that_do(url: str) -> None:
    with pytest.raises(InstallationError, match="cannot read the store's address") as refused:
        open_store(url)
    assert refused.value.expected == "file:///absolute/folder or s3://bucket/prefix"
    assert "PERENNIAL_STORE_URL" in refused.value.next_command


@pytest.mark.parametrize(
    "url", [f"s3://KEY:{SECRET}@bucket/prefix", f"https://user:{SECRET}@host/x", f"s3://{SECRET}@bucket"]
)
def test_a_secret_in_the_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InstallationError, match="cannot read the store's address") as refused:
        open_store(url, endpoint_url="http://127.0.0.1:9")
    assert SECRET not in str(refused.value)


# The S3 API


def test_a_dead_endpoint_is_told_in_time(no_aws: None) -> None:
    (port,) = free_ports(1)
    began = time.monotonic()
    with pytest.raises(InstallationError) as refused:
        open_store("s3://tests/x", endpoint_url=f"http://127.0.0.1:{port}", credentials=_keys("key"))
    assert time.monotonic() - began < 15
    assert f"127.0.0.1:{port}" in refused.value.found and "could not list" in refused.value.found
    assert refused.value.expected == "a reachable S3 API"
    assert refused.value.next_command == f"curl -i http://127.0.0.1:{port}"
    assert SECRET not in str(refused.value)


def test_an_endpoint_that_accepts_and_says_nothing_is_told_in_time(no_aws: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(InstallationError, match="could not list"):
            open_store("s3://tests/x", endpoint_url=url, credentials=_keys("key"))
        assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:8333", "not a url", "ftp://127.0.0.1", f"http://u:{SECRET}@127.0.0.1:1"]
)
def test_an_endpoint_that_is_no_http_address_is_refused(no_aws: None, endpoint: str) -> None:
    with pytest.raises(InstallationError, match="cannot read the address of the S3 API") as refused:
        open_store("s3://tests/x", endpoint_url=endpoint, credentials=_keys("key"))
    assert "PERENNIAL_S3_ENDPOINT_URL" in refused.value.next_command
    assert SECRET not in str(refused.value)


def test_a_wrong_secret_is_refused_and_not_repeated(s3_server: S3Server, no_aws: None) -> None:
    wrong = _keys(s3_server.owner.access_key_id)
    with pytest.raises(InstallationError, match="refused to list: SignatureDoesNotMatch") as refused:
        open_store("s3://tests/x", endpoint_url=s3_server.url, credentials=wrong)
    assert "AwsCredentials" in refused.value.next_command
    assert SECRET not in str(refused.value) and SECRET not in repr(refused.value)
    assert refused.value.__cause__ is None and refused.value.__suppress_context__


def test_an_unknown_key_is_refused(s3_server: S3Server, no_aws: None) -> None:
    with pytest.raises(InstallationError, match="refused to list: InvalidAccessKeyId"):
        open_store("s3://tests/x", endpoint_url=s3_server.url, credentials=_keys("nobody"))


def test_without_credentials_it_says_so_in_time(s3_server: S3Server, no_aws: None) -> None:
    began = time.monotonic()
    with pytest.raises(InstallationError, match="no usable credentials") as refused:
        open_store("s3://tests/x", endpoint_url=s3_server.url)
    assert time.monotonic() - began < 15
    assert "AwsCredentials" in refused.value.next_command


def test_the_usual_environment_serves_where_no_credentials_are_given(
    s3_server: S3Server, no_aws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.owner.as_environment().items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://tests/from-environment", endpoint_url=s3_server.url)
    store.put_bytes("key", b"x")
    assert s3_server.open("from-environment").get("key") == b"x"


def test_an_identity_that_may_only_read_is_told_when_it_writes(s3_server: S3Server, no_aws: None) -> None:
    s3_server.open("shared").put_bytes("key", b"x")
    store = open_store("s3://tests/shared", endpoint_url=s3_server.url, credentials=s3_server.reader)
    assert store.get("key") == b"x"
    for write in (store.put_bytes, store.create):
        with pytest.raises(InstallationError, match="refused to write: AccessDenied") as refused:
            write("key", b"y")
        assert s3_server.reader.secret_access_key not in str(refused.value)
    with pytest.raises(InstallationError, match="refused to delete: AccessDenied"):
        store.delete("key")
    assert store.get("key") == b"x"


def test_a_missing_bucket_of_an_own_server_is_made_once(s3_server: S3Server, no_aws: None) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: s3_server.open("x", bucket="made-by-need"), range(4)))
    stores[0].put_bytes("key", b"x")
    assert [store.get("key") for store in stores] == [b"x"] * 4


def test_a_missing_bucket_that_may_not_be_made_is_an_installation_error(
    s3_server: S3Server, no_aws: None
) -> None:
    with pytest.raises(InstallationError, match=r"cannot be made.*AccessDenied") as refused:
        open_store("s3://not-there", endpoint_url=s3_server.url, credentials=s3_server.reader)
    assert "not-there" in refused.value.found
    assert s3_server.reader.secret_access_key not in str(refused.value)


def test_a_bucket_that_vanishes_is_no_missing_key(s3_server: S3Server, no_aws: None) -> None:
    store = s3_server.open("x", bucket="to-vanish")
    s3_server.client().delete_bucket(Bucket="to-vanish")
    # Neither `size`, whose request is not told what it is that is missing, nor a write, for which SeaweedFS
    # makes the bucket anew.
    for use in (store.get, lambda key: store.list()):
        with pytest.raises(InstallationError) as refused:
            use("key")
        assert "to-vanish" in refused.value.found


def test_the_secret_shows_nowhere(s3_server: S3Server, no_aws: None) -> None:
    assert SECRET not in repr(_keys("key")) and SECRET not in repr(StoreCredentials("a", "b", SECRET))
    store = s3_server.open()
    assert s3_server.owner.secret_access_key not in f"{store!r}{store.base}{store.uri('key')}"


def test_other_tools_find_an_object_where_its_uri_says(s3_server: S3Server, no_aws: None) -> None:
    store = s3_server.open("some/prefix")
    store.put_bytes("folder/a b+c.txt", b"x")
    bucket, _, key = store.uri("folder/a b+c.txt").removeprefix("s3://").partition("/")
    assert s3_server.client().get_object(Bucket=bucket, Key=key)["Body"].read() == b"x"


def test_more_keys_than_a_page_holds_are_all_listed(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.put_bytes(f"many/{n:04}", b""), range(1010)))
    assert store.list("many") == [f"many/{n:04}" for n in range(1010)]


def _keys(name: str) -> StoreCredentials:
    return StoreCredentials(name, SECRET, region="us-east-1")
