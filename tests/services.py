"""Real servers for tests, on free ports: SeaweedFS behind the S3 API, and Postgres."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import sqlalchemy as sa
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from perennial.store import Store, StoreCredentials, open_store

READY_SECONDS = 60
POSTGRES_INSTALL = "apt-get install -y --no-install-recommends postgresql"


OWNER = StoreCredentials("owner", "owner-secret-Zq8", region="us-east-1")
READER = StoreCredentials("reader", "reader-secret-Zq8", region="us-east-1")


@dataclass(frozen=True)
class S3Server:
    """An S3 API, and who may do what there."""

    url: str
    owner: StoreCredentials = OWNER
    reader: StoreCredentials = READER

    def open(self, prefix: str = "", bucket: str = "tests") -> Store:
        """A store of its own, unless a prefix is given."""
        url = f"s3://{bucket}/{prefix or uuid4().hex}"
        return open_store(url, endpoint_url=self.url, credentials=self.owner)

    def client(self) -> Any:
        """boto3's client, for what the store does not do."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.owner.access_key_id,
            aws_secret_access_key=self.owner.secret_access_key,
            region_name=self.owner.region,
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5),
        )

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find this server and to be its owner."""
        where = {"AWS_ENDPOINT_URL": self.url, "AWS_ALLOW_HTTP": "true"}
        return self.owner.as_environment() | where


@contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    """A SeaweedFS that keeps its data in `folder` and accepts writes; killed at the end."""
    weed = Path(sys.executable).with_name("weed")
    ports = free_ports(8)
    names = ("master", "volume", "filer", "s3")
    flags = [f"-{name}.port={port}" for name, port in zip(names, ports[:4], strict=True)]
    flags += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
    server = S3Server(f"http://127.0.0.1:{ports[3]}")

    data, logs = folder / "data", folder / "logs"
    for directory in (data, logs):
        directory.mkdir(parents=True)
    (folder / "s3.json").write_text(json.dumps(_identities(server)))
    command = [
        *(str(weed), f"-logdir={logs}", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-filer", "-s3", f"-s3.config={folder / 's3.json'}", *flags),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
        *("-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=200"),
    ]

    def accepts_writes() -> bool:
        try:
            client = server.client()
            client.create_bucket(Bucket="tests")
            client.put_object(Bucket="tests", Key="probe", Body=b"x")
        except (BotoCoreError, ClientError):
            return False
        return True

    with running(command, folder / "output") as process:
        try:
            wait_until(accepts_writes, process, folder / "output")
            yield server
        finally:
            process.kill()  # a SIGTERM takes it 17 s
            process.wait()
            for port in ports:
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)


class Postgres:
    """A Postgres server that can be killed and started again on the same data."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.port = free_ports(1)[0]
        self._binaries = binaries
        self._data = folder / "data"
        self._output = folder / "output"
        self._process: subprocess.Popen[bytes] | None = None
        # It refuses to run as root.
        self._as = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if _root() else []
        if _root():
            shutil.chown(folder, "postgres")
        make: list[str | Path] = [
            binaries / "initdb",
            "--pgdata",
            self._data,
            "--username=perennial",
            "--auth=trust",
        ]
        make += ["--encoding=UTF8", "--no-locale", "--no-sync"]
        subprocess.run([*self._as, *make], cwd="/", check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": ""}
        # What is committed must outlive the server's processes here, not the machine.
        settings |= {"fsync": "off", "max_connections": 200, "shared_buffers": "16MB"}
        command: list[str | Path] = [
            *self._as,
            *_die_with_parent(),
            self._binaries / "postgres",
            "-D",
            self._data,
        ]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        self._process = start(command, self._output, cwd=Path("/"))
        wait_until(self._answers, self._process, self._output)

    def kill(self) -> None:
        """End it at once: connections are cut, nothing is flushed, the next start recovers."""
        if self._process:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    def url(self, database: str = "postgres", password: str = "") -> str:
        """The URL of a database. Any password will do."""
        user = f"perennial:{password}" if password else "perennial"
        return f"postgresql+psycopg://{user}@127.0.0.1:{self.port}/{database}"

    def new_schema(self, password: str = "") -> str:
        """The URL of an empty schema: to its user like a database of its own, without the 300 files."""
        name = f"test_{uuid4().hex}"
        self.execute(f"CREATE SCHEMA {name}")
        return f"{self.url(password=password)}?options=-csearch_path%3D{name}"

    def execute(self, statement: str) -> None:
        engine = sa.create_engine(self.url(), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)

    def _answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except sa.exc.OperationalError:
            return False
        return True


def postgres_binaries() -> Path | None:
    """Where `initdb` and `postgres` are: on the path, or where Debian puts them; the newest version."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    folders = Path("/usr/lib/postgresql").glob("*/bin")
    whole = [folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()]
    return max(whole, key=lambda folder: int(folder.parent.name), default=None)


@contextmanager
def postgres(binaries: Path) -> Iterator[Postgres]:
    # Not below pytest's folder, which only its own user may enter.
    with tempfile.TemporaryDirectory(prefix="perennial-postgres-") as folder:
        server = Postgres(binaries, Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.kill()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(command: Sequence[str | Path], output: Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    with output.open("ab") as sink:
        return subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        )


@contextmanager
def running(command: Sequence[str | Path], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, until the block ends."""
    process = start([*_die_with_parent(), *command], output)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], output: Path) -> None:
    """Until it is ready; an early end or a minute of silence fails with what the process said last."""
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            said = "\n".join(output.read_text(errors="replace").splitlines()[-30:])
            raise AssertionError(f"{process.args!r} is not ready (exit code {process.poll()}):\n{said}")
        time.sleep(0.1)


def _identities(server: S3Server) -> dict[str, Any]:
    allowed = {"owner": ["Admin", "Read", "Write", "List"], "reader": ["Read", "List"]}
    return {
        "identities": [
            {
                "name": who.access_key_id,
                "credentials": [{"accessKey": who.access_key_id, "secretKey": who.secret_access_key}],
                "actions": allowed[who.access_key_id],
            }
            for who in (server.owner, server.reader)
        ]
    }


def _die_with_parent() -> list[str]:
    """So that a killed test run leaves no server behind."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def _root() -> bool:
    return os.geteuid() == 0
