"""The prediction log on a real S3 server, by the AWS_* variables alone."""

from __future__ import annotations

from pathlib import Path

import httpx
import pyarrow as pa
import pytest

from tests.services import S3Server
from tests.serving.toys import RELEASE_ID, Toy, serve


@pytest.mark.slow
def test_a_service_brings_its_log_to_an_s3_bucket_under_its_prefix(
    moody: Toy, tmp_path: Path, s3_server: S3Server
) -> None:
    client = s3_server.client()
    client.create_bucket(Bucket="predictions")
    url = "s3://predictions/some/prefix"
    with serve(moody.release, tmp_path, url=url, **s3_server.environment) as service:
        for number in range(3):
            httpx.post(f"{service.url}/predict", json={"distance": number}).raise_for_status()
        assert service.stop() == 0
    distances = []
    for stored in client.list_objects_v2(Bucket="predictions")["Contents"]:  # one per worker that was asked
        assert stored["Key"].startswith("some/prefix/predictions/test/toy/")
        assert f"/{RELEASE_ID}-" in stored["Key"]
        body = client.get_object(Bucket="predictions", Key=stored["Key"])["Body"].read()
        distances += pa.ipc.open_stream(body).read_all()["distance"].to_pylist()
    assert sorted(distances) == [0, 1, 2]
    assert not [path for path in service.spool.rglob("*") if path.is_file()]
