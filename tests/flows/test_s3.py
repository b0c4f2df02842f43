"""The store behind an S3 API: a build, a deploy and the prediction log, the keys held by a Prefect block."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from perennial import installation, predictions
from perennial.store import open_store
from tests.factories import make_project
from tests.flows.house import ROW, installed
from tests.installations import own_settings
from tests.services import S3Server

STORE = "s3://models/perennial"

SAVE_BLOCK = """
import sys
from prefect_aws import AwsCredentials
key, secret, region = sys.argv[1:]
AwsCredentials(aws_access_key_id=key, aws_secret_access_key=secret, region_name=region).save("keys")
"""
BUILD_AND_DEPLOY = """
import sys
from datetime import date
from flows.build import build
from flows.deploy import deploy
release = build(sys.argv[1], as_of=date(2026, 3, 1))
print("deployed", deploy(sys.argv[1]).active)
"""


def test_a_release_is_built_served_and_logged_with_everything_in_a_bucket(
    tmp_path: Path, s3_server: S3Server, no_aws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path / "bucketed", name="bucketed")
    keys = s3_server.owner
    for name, value in keys.as_environment().items():
        monkeypatch.setenv(name, value)  # for the parts that know no blocks: MLflow and the storefront
    here = own_settings(
        tmp_path / "home", store_url=STORE, s3_endpoint_url=s3_server.url, s3_credentials_block="keys"
    )
    store = open_store(STORE, endpoint_url=s3_server.url, credentials=keys)
    parts = tuple(part for part in installation.PARTS if part != "prefect-worker")
    with installed(here, parts) as house:
        for name in keys.as_environment():
            monkeypatch.delenv(name)  # flows have the block, and nothing but the block
        house.enable("bucketed", project.url)
        saved = house.command("-c", SAVE_BLOCK, keys.access_key_id, keys.secret_access_key, keys.region)
        assert saved.returncode == 0, saved.stderr
        run = house.command("-c", BUILD_AND_DEPLOY, "bucketed")
        assert run.returncode == 0, run.stdout + run.stderr
        assert keys.secret_access_key not in run.stdout + run.stderr
        (release,) = house.journal.releases("bucketed")
        assert f"deployed {release.release_id}" in run.stdout

        assert release.model.artifact.uri.startswith(f"{STORE}/models/bucketed/")
        assert release.package is not None
        assert release.package.sha256 in house.fetch(f"{here.storefront_url}/simple/bucketed/")
        report = release.evaluation.report
        assert report is not None
        assert "<html" in house.fetch(f"{here.storefront_url}/{store.key(report.uri)}/evaluation.html")
        (service,) = (here.root / "services").glob("svc-*.conf")
        assert service.stat().st_mode & 0o077 == 0, "it holds the keys"
        answers = [house.ask("bucketed") for _ in range(5)]
        assert {answer["release_id"] for answer in answers} == {release.release_id}

    today, day = datetime.now(UTC).date(), timedelta(days=1)
    logged = predictions.read(store, "test", "bucketed", today - day, today + day).to_pylist()
    asked = [row for row in logged if ROW.items() <= row.items()]
    said = sorted(prediction for answer in answers for prediction in answer["predictions"])
    assert sorted(row["prediction"] for row in asked) == said
    assert {row["release_id"] for row in asked} == {release.release_id}
    assert any("/serving/" in key for key in store.list("models/bucketed"))
    assert any(key.endswith("/evaluation.html") for key in store.list("mlflow"))
    assert any("/model/" in key for key in store.list("mlflow"))
    local = [path for path in (here.root / "store").rglob("*") if path.is_file()]
    assert local == [], "nothing of the store is on this machine's disk"
