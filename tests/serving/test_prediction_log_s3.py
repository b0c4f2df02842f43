"""The prediction log on a real S3 server, by the AWS_* variables alone."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.serving.toys import RELEASE_ID, Toy, serve

SECRETS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "weed"
    folder.mkdir()
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": "key", "secretKey": "secret"}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    ports = free_ports(8)
    flags = [f"-{name}={port}" for name, port in zip(names, ports[:4], strict=True)]
    flags += [f"-{name}.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
    weed = Path(sys.executable).with_name("weed")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *(
                    str(weed),
                    "server",
                    f"-dir={folder}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    "-filer",
                    "-s3",
                ),
                *flags,
                *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-master.telemetry=false"),
                *(f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://127.0.0.1:{ports[3]}"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)


def bucket_on(endpoint: str) -> Any:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5),
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            client.create_bucket(Bucket="bucket")
            return client
        except (BotoCoreError, ClientError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


@pytest.mark.slow
def test_a_service_brings_its_log_to_an_s3_bucket_under_its_prefix(
    moody: Toy, tmp_path: Path, endpoint: str
) -> None:
    client = bucket_on(endpoint)
    environment = {**SECRETS, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}
    with serve(moody.release, tmp_path, url="s3://bucket/some/prefix", **environment) as service:
        for number in range(3):
            httpx.post(f"{service.url}/predict", json={"distance": number}).raise_for_status()
        assert service.stop() == 0
    (stored,) = client.list_objects_v2(Bucket="bucket")["Contents"]
    assert stored["Key"].startswith("some/prefix/predictions/test/toy/")
    assert f"/{RELEASE_ID}-" in stored["Key"]
    body = client.get_object(Bucket="bucket", Key=stored["Key"])["Body"].read()
    rows = [json.loads(line)["rows"] for line in body.splitlines()]
    assert rows == [[{"distance": number}] for number in range(3)]
    assert not [path for path in service.spool.rglob("*") if path.is_file()]
