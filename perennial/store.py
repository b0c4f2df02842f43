"""Bytes by key, in a directory (`file:///…`) or behind an S3 API (`s3://bucket/prefix`).

A key is a relative path with forward slashes. Writes are atomic on both: a reader sees all of an
object or nothing. A missing key is a `FileNotFoundError`; everything that is wrong with the store itself
(unreachable, refused, no such bucket) is an `InstallationError` and never carries a secret. The library keeps
threads of its own: open a store in the process that uses it, not before a fork.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from perennial.errors import InstallationError, ReleaseError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

CHUNK_BYTES = 4 * 2**20

# One try each: this is the first thing a process does, and it should hear soon that nobody answers.
PROBE_CLIENT: ClientConfig = {"connect_timeout": timedelta(seconds=3), "timeout": timedelta(seconds=5)}
PROBE_RETRIES: RetryConfig = {"max_retries": 1, "retry_timeout": timedelta(seconds=4)}
CLIENT: ClientConfig = {"connect_timeout": timedelta(seconds=3), "timeout": timedelta(seconds=120)}
RETRIES: RetryConfig = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=8),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=2),
        "base": 2,
    },
}

# What an S3 API answers when another try may help.
BUSY_CODES = ("InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout")

# The directory store writes `name#1` beside `name` before it renames, so such names are not keys.
STAGED_NAME = re.compile(r"#\d+$")

# Neither has room for a user and a password.
BUCKET_NAME = r"[A-Za-z0-9._-]+"
ENDPOINT_URL = r"https?://([A-Za-z0-9._-]+|\[[0-9a-fA-F:]+\])(:\d+)?(/[^\s@?#]*)?"


@dataclass(frozen=True)
class StoreCredentials:
    """An S3 identity. Without one, AWS's usual environment (variables, instance or task role) is used."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)
    region: str = ""

    def as_environment(self) -> dict[str, str]:
        """The same identity in the variables that the AWS libraries read."""
        variables = {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_SESSION_TOKEN": self.session_token,
            "AWS_REGION": self.region,
        }
        return {name: value for name, value in variables.items() if value}


class Store:
    """One folder of objects, wherever it is."""

    def __init__(self, base: str, objects: ObjectStore, directory: Path | None) -> None:
        self.base = base.rstrip("/")
        self._objects = objects
        self._directory = directory

    def __repr__(self) -> str:
        return f"Store({self.base!r})"

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write `data`, over whatever is there."""
        with self._explained("write", key):
            obstore.put(self._objects, checked(key), data)

    def put_file(self, key: str, path: Path) -> None:
        """Write a file's bytes, streamed, over whatever is there."""
        if not path.is_file():  # the library's own error would read as a missing key
            raise FileNotFoundError(f"{path} is not a file")
        with self._explained("write", key):
            obstore.put(self._objects, checked(key), path)

    def create(self, key: str, data: bytes) -> bool:
        """Write `data` if nothing is there. Of any number of racing writers exactly one gets True."""
        try:
            with self._explained("write", key):
                obstore.put(self._objects, checked(key), data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def get(self, key: str) -> bytes:
        with self._explained("read", key):
            return obstore.get(self._objects, checked(key)).bytes().to_bytes()

    def size(self, key: str) -> int:
        """Bytes of the object."""
        with self._explained("read", key):
            return obstore.head(self._objects, checked(key))["size"]

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> builtins.list[str]:
        """Every key below the folder `prefix`, sorted; nothing below it is an empty list."""
        folder = checked(prefix.rstrip("/")) if prefix else None
        with self._explained("list", prefix):
            return sorted(meta["path"] for page in obstore.list(self._objects, folder) for meta in page)

    def list_folders(self, prefix: str = "") -> builtins.list[str]:
        """The names of the folders directly below `prefix` that hold an object, sorted.

        Taken from the keys, since both a directory and SeaweedFS go on listing a folder that was emptied.
        """
        start = len(prefix.rstrip("/")) + 1 if prefix else 0
        below = (key[start:].split("/") for key in self.list(prefix))
        return sorted({first for first, *rest in below if rest})

    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is no error."""
        try:
            with self._explained("delete", key):
                obstore.delete(self._objects, checked(key))
        except FileNotFoundError:
            pass

    def fetch(self, key: str, path: Path) -> None:
        """Bring the object to `path`: the whole file or none, over whatever is there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{uuid4().hex}.part")
        try:
            with part.open("wb") as file, self._explained("read", key):
                for chunk in obstore.get(self._objects, checked(key)).stream(min_chunk_size=CHUNK_BYTES):
                    file.write(chunk)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def local_path(self, key: str) -> Path | None:
        """Where a directory store keeps `key` (a file or a folder of keys), to read in place; None on S3."""
        return self._directory / checked(key) if self._directory else None

    def uri(self, key: str) -> str:
        """The object's URI; `key` reads it back."""
        if self._directory:
            return (self._directory / checked(key)).as_uri()
        return f"{self.base}/{checked(key)}"

    def key(self, uri: str) -> str:
        """The key of a URI of this store.

        Raises ReleaseError for a URI of another store.
        """
        start = f"{self.base}/"
        if not uri.startswith(start):
            raise ReleaseError(
                f"{uri} is not in this installation's store, {self.base}",
                expected=f"a URI that starts with {start}",
                next_command="set PERENNIAL_STORE_URL to the store it was written to",
            )
        rest = uri.removeprefix(start).rstrip("/")
        return checked(unquote(rest) if self._directory else rest)

    @contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except AlreadyExistsError:
            raise
        except FileNotFoundError as error:
            # A write to what is not there, or a bucket that is not there, is no missing key.
            if verb in ("read", "delete") and "NoSuchBucket" not in str(error):
                raise FileNotFoundError(f"{self.base}/{key} is not in the store") from None
            raise _unusable(self.base, verb, error) from None
        except BaseError as error:
            # To a directory store a key above or below an object is a folder or a file; it is no object.
            if verb in ("read", "delete") and re.search("NotADirectory|IsADirectory", str(error)):
                raise FileNotFoundError(f"{self.base}/{key} is not in the store") from None
            raise _unusable(self.base, verb, error) from None


def open_store(url: str, *, endpoint_url: str = "", credentials: StoreCredentials | None = None) -> Store:
    """The store at `url`, proven to answer.

    A missing directory is made. A missing bucket is made where `endpoint_url` names an S3 API of your own;
    on AWS it is an error, since there its owner, region and policy are somebody's decision.

    Raises InstallationError in at most some 10 s when the store cannot be used.
    """
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and prefix:
        return _open_directory(Path(unquote(parts.path)))
    if parts.scheme == "s3" and re.fullmatch(BUCKET_NAME, parts.netloc) and _may_be_prefix(prefix):
        return _open_bucket(parts.netloc, prefix, endpoint_url, credentials)
    raise InstallationError(
        f"cannot read the store's address {_without_user(url)!r}",
        expected="file:///absolute/folder or s3://bucket/prefix",
        next_command="set PERENNIAL_STORE_URL, or unset it for the folder in PERENNIAL_HOME",
    )


def checked(key: str) -> str:
    """`key`, if both kinds of store can hold it; ValueError otherwise."""
    segments = key.split("/")
    if any(s in ("", ".", "..") for s in segments):
        raise ValueError(f"not a key: {key!r} (relative, no empty segment, no . or ..)")
    if "\\" in key or any(ord(c) < 32 or ord(c) == 127 for c in key):
        raise ValueError(f"not a key: {key!r} (no backslash, no control character)")
    if any(STAGED_NAME.search(s) for s in segments):
        raise ValueError(f"not a key: {key!r} (no segment may end in # and a number)")
    return key


def _may_be_prefix(prefix: str) -> bool:
    try:
        return not prefix or bool(checked(prefix))
    except ValueError:
        return False


def _without_user(url: str) -> str:
    """`url` as it may be shown: some people put a key and its secret before the @."""
    return re.sub(r"(^|//)[^/]*@", r"\1…@", url)


def _open_directory(directory: Path) -> Store:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InstallationError(
            f"the store's folder {directory} cannot be made: {error.strerror}",
            expected="a folder this user can write to",
            next_command="set PERENNIAL_STORE_URL or PERENNIAL_HOME to such a folder",
        ) from None
    directory = directory.resolve()
    return Store(directory.as_uri(), LocalStore(directory), directory)


def _open_bucket(bucket: str, prefix: str, endpoint_url: str, credentials: StoreCredentials | None) -> Store:
    if endpoint_url and not re.fullmatch(ENDPOINT_URL, endpoint_url):
        raise InstallationError(
            f"cannot read the address of the S3 API {_without_user(endpoint_url)!r}",
            expected="http://host:port or https://host",
            next_command="set PERENNIAL_S3_ENDPOINT_URL, or unset it for AWS",
        )
    options: dict[str, Any] = {"prefix": prefix}
    if endpoint_url:
        options |= {"endpoint": endpoint_url, "virtual_hosted_style_request": False}
    if credentials:
        options |= {
            "access_key_id": credentials.access_key_id,
            "secret_access_key": credentials.secret_access_key,
            "session_token": credentials.session_token,
            "region": credentials.region,
        }
    options = {name: value for name, value in options.items() if value not in ("", None)}
    http = endpoint_url.startswith("http://")

    base = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
    probe = S3Store(
        bucket, client_options={**PROBE_CLIENT, "allow_http": http}, retry_config=PROBE_RETRIES, **options
    )
    try:
        next(iter(obstore.list(probe, "perennial-probe")), None)
    except (BaseError, FileNotFoundError) as error:
        if not (endpoint_url and "NoSuchBucket" in str(error)):
            raise _unusable(base, "list", error, endpoint_url) from None
        _create_bucket(bucket, endpoint_url, credentials)
    objects = S3Store(bucket, client_options={**CLIENT, "allow_http": http}, retry_config=RETRIES, **options)
    return Store(base, objects, None)


def _create_bucket(bucket: str, endpoint_url: str, credentials: StoreCredentials | None) -> None:
    import boto3  # late: 0.3 CPU s, and only needed once per bucket
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=(credentials and credentials.region) or "us-east-1",
        aws_access_key_id=credentials.access_key_id if credentials else None,
        aws_secret_access_key=credentials.secret_access_key if credentials else None,
        aws_session_token=(credentials and credentials.session_token) or None,
    )
    try:
        client.create_bucket(Bucket=bucket)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            raise _no_bucket(bucket, endpoint_url, code) from None
    except BotoCoreError as error:
        raise _no_bucket(bucket, endpoint_url, type(error).__name__) from None


def _no_bucket(bucket: str, endpoint_url: str, reason: str) -> InstallationError:
    return InstallationError(
        f"the bucket {bucket!r} does not exist and cannot be made at {endpoint_url}: {reason}",
        expected="a bucket, or credentials that may create it",
        next_command=f"aws s3 mb s3://{bucket} --endpoint-url {endpoint_url}",
    )


def _unusable(base: str, verb: str, error: Exception, endpoint_url: str = "") -> InstallationError:
    """What the library said, as somebody's next step. Only its error code or first line is passed on."""
    text = str(error)
    first_line = text.partition("\n")[0]
    code = re.search(r"<Code>(\w+)</Code>", text) or re.search(r"\(code: (\w+)\)", text)
    where = f"{base} at {endpoint_url}" if endpoint_url else base
    bucket = urlsplit(base).netloc
    if code and code[1] == "NoSuchBucket":
        return InstallationError(
            f"the bucket of the store {where} does not exist",
            expected="an existing bucket",
            next_command=f"aws s3 mb s3://{bucket}",
        )
    denied = re.search(r"\b40[13] ", first_line) or (code and code[1] == "AccessDenied")
    if denied or "169.254." in first_line or "PermissionDenied" in text:
        return InstallationError(
            f"the store {where} refused to {verb}: {code[1] if code else 'no usable credentials'}",
            expected="credentials that may list, read and write there",
            next_command="prefect block register -m prefect_aws, then save the keys in the AwsCredentials "
            "block that PERENNIAL_S3_CREDENTIALS_BLOCK names",
        )
    return InstallationError(
        f"the store {where} could not {verb}: {code[1] if code else first_line}",
        expected="a reachable S3 API" if base.startswith("s3:") else "a folder this user can write to",
        next_command=f"curl -i {endpoint_url}" if endpoint_url else "look at PERENNIAL_STORE_URL",
        transient=base.startswith("s3:") and (code is None or code[1] in BUSY_CODES),
    )
