"""`make demo` and the commands of the README, as a newcomer runs them: real data, all parts, own ports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial import installation
from perennial.settings import Settings
from tests.installations import own_settings

ROOT = Path(__file__).parent.parent
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    chosen = own_settings(tmp_path_factory.mktemp("demo") / "home")
    yield chosen
    installation.down(chosen, say=lambda _: None)


def run(settings: Settings, *arguments: str) -> str:
    environment = os.environ | settings.as_environment()
    if "prefect" in arguments:
        environment |= installation.prefect_environment(settings)
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def first(settings: Settings) -> str:
    return run(settings, "deployments.demo")


def active(settings: Settings) -> str:
    found = re.search(r"^flights +test +(flights-[0-9a-f]{12}) ", run(settings, "perennial", "status"), re.M)
    assert found
    return found[1]


def test_the_demo_ends_with_predictions_of_a_real_model(settings: Settings, first: str) -> None:
    assert len(re.findall(r"late with probability 0\.\d\d", first)) == 4
    assert active(settings) in first
    for step in ("check out", "train model", "check gates", "write release", "promote release"):
        assert re.search(rf"✓ {step} +\d+\.\d s", first), step
    for url in (settings.prefect_url, settings.mlflow_url, settings.storefront_url):
        assert url in first


def test_run_again_it_reuses_what_is_there(settings: Settings, first: str) -> None:
    before = active(settings)
    again = run(settings, "deployments.demo")
    assert "is there already" in again and "serves already" in again
    assert "train model" not in again
    assert active(settings) == before


def test_the_service_answers_and_names_its_release(settings: Settings, first: str) -> None:
    service = f"{settings.router_url('test')}/flights"
    with _DIRECT.open(f"{service}/metadata", timeout=10) as response:
        assert response.headers["x-perennial-release"] == active(settings)
    golden = json.loads((settings.root / "releases" / active(settings) / "golden.json").read_text())
    request = urllib.request.Request(
        f"{service}/predict",
        json.dumps({"rows": golden["rows"]}).encode(),
        {"content-type": "application/json"},
    )
    with _DIRECT.open(request, timeout=10) as response:
        assert json.loads(response.read())["predictions"] == pytest.approx(golden["predictions"], abs=1e-12)


def test_every_page_that_the_demo_names_opens(settings: Settings, first: str) -> None:
    pages = re.findall(r" (https?://\S+)", first.split("done in")[1])
    assert len(pages) >= 5
    for url in pages:
        with _DIRECT.open(url.partition("#")[0], timeout=10) as response:
            assert response.status == 200


def test_retraining_on_the_next_day_puts_a_new_release_in_front_of_users(
    settings: Settings, first: str
) -> None:
    before = active(settings)
    as_of = re.search(
        r'"as_of": ?"(\d{4}-\d\d-\d\d)"', (settings.root / "releases" / before / "manifest.json").read_text()
    )
    assert as_of
    later = f"{as_of[1][:8]}{(int(as_of[1][8:]) % 28) + 1:02}"
    out = run(settings, "prefect", "deployment", "run", "retrain/flights", "-p", f"as_of={later}", "--watch")
    assert "Completed" in out
    assert active(settings) != before


def test_the_daily_schedule_is_on_in_its_timezone(settings: Settings, first: str) -> None:
    shown = json.loads(
        run(settings, "prefect", "deployment", "inspect", "retrain/flights", "--output", "json")
    )
    (schedule,) = shown["schedules"]
    assert schedule["active"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == (
        "0 6 * * *",
        "America/New_York",
    )
