"""`make demo`: from a fresh clone to predictions of a real model, on real flights. Run it again at will."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import urllib.request
from datetime import date, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from deployments.register import register
from perennial import installation, process
from perennial.config import read_project
from perennial.errors import PerennialError
from perennial.installation import REPOSITORY
from perennial.journal import Journal, open_journal
from perennial.settings import Settings, settings
from perennial.values import Release
from serving.contract import GOLDEN_FILE

PROJECT = "flights"
_EXAMPLE = REPOSITORY / "examples" / PROJECT
_MIN_MONTH = 3  # in January and February 2013 is too short to hold four weeks out and train on as many


def main() -> None:
    """Every step, with its time; last, where to look and what to try."""
    began = time.monotonic()
    here = settings()
    try:
        _run(here)
    except PerennialError as error:
        sys.exit(f"\n✗ {error}")
    print(f"\ndone in {time.monotonic() - began:.0f} s\n")
    _say_where(here)


def _run(here: Settings) -> None:
    print("starting the parts")
    installation.up(here, say=_say)
    os.environ.update(installation.prefect_environment(here))  # before Prefect is imported, which reads it

    with _step("a git repository with the example project"):
        repository = here.root / "repositories" / PROJECT
        sha = commit_example(repository)
        journal = open_journal(here.database)
        journal.enable_project(PROJECT, str(repository))
    with _step("deployments registered"):
        register()

    today = demo_day(datetime.now(ZoneInfo("America/New_York")).date())
    release = _known(journal, sha, today)
    from deployments.runs import run

    if release is None:
        print("building")
        run(f"build/{PROJECT}", _say, as_of=today.isoformat())
        release = _known(journal, sha, today)
        assert release is not None
    else:
        _say(f"✓ {release.release_id} of this commit and day is there already")
    if journal.active(PROJECT, "test") != release.release_id:
        print("deploying")
        run(f"deploy/{PROJECT}", _say, release_id=release.release_id, environment="test")
    else:
        _say(f"✓ {release.release_id} serves already")
    print("asking it about real flights")
    _predict(here, release)


def commit_example(repository: Path) -> str:
    """A real git repository holding the example as it is now; returns the commit. Commits only a change."""
    repository.mkdir(parents=True, exist_ok=True)
    if not (repository / ".git").exists():
        _git(repository, "init", "--quiet", "--initial-branch=main")
    for left in repository.iterdir():
        if left.name != ".git":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    ignored = shutil.ignore_patterns("__pycache__", ".*", "dist")
    shutil.copytree(_EXAMPLE, repository, dirs_exist_ok=True, ignore=ignored)
    _git(repository, "add", "--all")
    if _git(repository, "status", "--porcelain"):
        identity = ("-c", "user.name=Perennial demo", "-c", "user.email=demo@perennial.invalid")
        _git(repository, *identity, "commit", "--quiet", "--message", f"{PROJECT}, as in examples/")
    return _git(repository, "rev-parse", "HEAD").strip()


def demo_day(today: date) -> date:
    """The day to build on: today, or a summer day while the replayed year is too young to learn from."""
    return today if today.month >= _MIN_MONTH else today.replace(month=6, day=15)


def _known(journal: Journal, sha: str, today: date) -> Release | None:
    day = read_project(_EXAMPLE).config.as_of(today)
    for release in journal.releases(PROJECT, "accepted"):
        if (release.source.git_sha, release.dataset.as_of) == (sha, day):
            return release
    return None


def _predict(here: Settings, release: Release) -> None:
    golden = json.loads((here.root / "releases" / release.release_id / GOLDEN_FILE).read_text())
    rows = golden["rows"][:4]
    url = f"{here.router_url('test')}/{PROJECT}/predict"
    request = urllib.request.Request(  # noqa: S310, our own router
        url, data=json.dumps({"rows": rows}).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
        answer = json.loads(response.read())
    for row, prediction in zip(rows, answer["predictions"], strict=True):
        flight = f"{row['carrier']} {row['origin']} → {row['dest']}"
        _say(f"{flight:<16} late with probability {prediction:.2f}")
    _say(f"answered by {answer['release_id']} at {url}")


def _say_where(here: Settings) -> None:
    service = f"{here.router_url('test')}/{PROJECT}"
    rows = {
        "Prefect UI (runs, gates, evaluation)": here.prefect_url,
        "MLflow (versions, champion)": f"{here.mlflow_url}/#/models/{PROJECT}",
        "Reports and package index": here.storefront_url,
        "The service": f"{service}/metadata",
    }
    for what, url in rows.items():
        print(f"  {what:<38} {url}")
    env = f"PREFECT_API_URL={here.prefect_url}/api"
    print("\ntry next:")
    print(f"  {env} .venv/bin/prefect deployment run 'retrain/{PROJECT}' --watch")
    print(f"  curl {service}/openapi.json")
    print("  make status        (and make down, to stop all of it)")


class _step:
    """Says what was done and how long it took."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            _say(f"✓ {self._what:<28} {time.monotonic() - self._began:6.1f} s")


def _git(repository: Path, *arguments: str) -> str:
    environment = process.scrubbed_environment(GIT_CONFIG_NOSYSTEM="1")
    return process.capture(["git", *arguments], cwd=repository, environment=environment, timeout_seconds=60)


def _say(text: str) -> None:
    print(f"  {text}" if not text.startswith(" ") else text, flush=True)


if __name__ == "__main__":
    main()
