"""A whole installation for tests, and what can be read from it: runs, steps, logs, what was published."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import pytest

from perennial import installation
from perennial.journal import Journal, open_journal
from perennial.settings import Settings, settings
from perennial.store import Store, open_store
from perennial.targets import ProcessTarget
from tests.factories import ROOT
from tests.installations import own_settings

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import State

AS_OF = date(2026, 3, 1)

BUILD_STEPS = (
    "check_out",
    "validate_contract",
    "make_environment",
    "snapshot_data",
    "validate_data",
    "run_project_tests",
    "train_model",
    "evaluate_model",
    "check_gates",
    "compile_model",
    "publish_package",
    "register_model",
    "write_release",
)
DEPLOY_STEPS = (
    "collect_release",
    "prepare_image",
    "start_candidate",
    "check_candidate",
    "shift_traffic",
    "promote_release",
    "retire_previous",
    "watch_release",
)

ROW = {"amount": 41.5, "age": 33, "colour": "red", "member": True}

T = TypeVar("T")

new_settings = own_settings


@dataclass(frozen=True)
class Ended:
    """How a flow run ended, as the server knows it."""

    id: UUID
    kind: str  # COMPLETED, FAILED, CRASHED
    name: str
    message: str
    steps: dict[str, str]  # task → the name of its state, for each that was begun
    log: str
    result: Any = None

    def explains(self, *words: str) -> bool:
        """The message has all the words, and nobody has to read a traceback to see it."""
        missing = [word for word in words if word not in self.message]
        assert not missing, f"{missing} not in: {self.message}"
        assert "Traceback" not in self.message and "Traceback" not in self.log, self.log
        return True

    def passes_on(self, *words: str) -> bool:
        """The message has all words; a traceback is the project's own, for its developer, none of ours."""
        missing = [word for word in words if word not in self.message]
        assert not missing, f"{missing} not in: {self.message}"
        ours = re.findall(r'File "[^"]*/(?:flows|tasks|perennial|prefect)/[^"]*"', self.log)
        assert not ours, self.log
        return True

    def stopped_in(self, last: str) -> bool:
        """`last` was begun and no later step."""
        order = BUILD_STEPS if last in BUILD_STEPS else DEPLOY_STEPS
        expected = set(order[: order.index(last) + 1])
        assert set(self.steps) == expected, f"{self.steps}, expected {expected}"
        assert self.steps[last] != "Completed", self.steps
        return True


@dataclass
class Load:
    """What came of a load that was held on a service."""

    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Requests per second that were answered or failed."""
        return float(self.outcome["requests"] / self.outcome["seconds"])

    def all_answered_by(self, *releases: str) -> bool:
        """No request failed, and every one of these releases answered, and no other."""
        assert self.outcome["failures"] == [], self.outcome
        assert set(self.outcome["releases"]) == set(releases), self.outcome
        return True


class House:
    """One installation, all its parts running."""

    def __init__(self, here: Settings) -> None:
        self.settings = here

    @cached_property
    def journal(self) -> Journal:
        return open_journal(self.settings.database)

    @cached_property
    def store(self) -> Store:
        return open_store(self.settings.store)

    def enable(self, project: str, repository: str, subdirectory: str = "") -> None:
        self.journal.enable_project(project, repository, subdirectory)

    def build(self, project: str, as_of: date = AS_OF, ref: str | None = None) -> Ended:
        from flows.build import build

        return self.ended(build(project, ref, as_of, return_state=True))

    def deploy(self, project: str, release_id: str | None = None, environment: Any = "test") -> Ended:
        from flows.deploy import deploy

        return self.ended(deploy(project, environment, release_id, return_state=True))

    def retrain(self, project: str, as_of: date | None = AS_OF) -> Ended:
        from flows.retrain import retrain

        return self.ended(retrain(project, as_of, return_state=True))

    def ended(self, state: State[Any]) -> Ended:
        run_id = state.state_details.flow_run_id
        assert run_id is not None
        result = state.result(raise_on_failure=False) if state.is_completed() else None
        with self.client() as client:
            return _ended(client, run_id, state, result)

    def read(self, run_id: UUID) -> Ended:
        """A run that the worker ran."""
        with self.client() as client:
            state = client.read_flow_run(run_id).state
            assert state is not None
            return _ended(client, run_id, state, None)

    def start(self, deployment: str, **parameters: Any) -> UUID:
        """Have the worker run a registered deployment."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def wait(self, run_id: UUID, seconds: float = 90.0, run_count: int = 1) -> Ended:
        """The end of a run that the worker runs."""

        def over() -> bool:
            run = self.flow_run(run_id)
            return run.state is not None and run.state.is_final() and run.run_count >= run_count

        until(over, seconds, f"the end of {run_id}")
        return self.read(run_id)

    def flow_run(self, run_id: UUID) -> FlowRun:
        with self.client() as client:
            return client.read_flow_run(run_id)

    def retry(self, run_id: UUID) -> None:
        """`prefect flow-run retry`, as a person would type it."""
        done = self.command("-m", "prefect", "flow-run", "retry", str(run_id))
        assert done.returncode == 0, done.stdout + done.stderr

    def command(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command of this Python, in the repository, for this installation."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | self.environment() | variables,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def environment(self) -> dict[str, str]:
        return self.settings.as_environment() | installation.prefect_environment(self.settings)

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        from prefect.client.orchestration import SyncPrefectClient

        with SyncPrefectClient(f"{self.settings.prefect_url}/api") as client:
            yield client

    def url(self, project: str, environment: str = "test") -> str:
        """Where users of the service call it."""
        return f"{self.settings.router_url(environment)}/{project}"

    def ask(self, project: str, environment: str = "test") -> dict[str, Any]:
        """One prediction, through the router."""
        request = urllib.request.Request(
            f"{self.url(project, environment)}/predict",
            data=json.dumps({"rows": [ROW]}).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    @contextmanager
    def load(self, project: str, rate: float) -> Iterator[Load]:
        """Hold a load on the service, in a process of its own; the outcome is there when the block ends."""
        load = Load()
        body = self.settings.root / "work" / "load.json"
        body.parent.mkdir(exist_ok=True)
        body.write_text(json.dumps({"rows": [ROW]}))
        with subprocess.Popen(
            [sys.executable, "-m", "tests.flows.load", f"{self.url(project)}/predict", str(body), str(rate)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == "started\n"
            yield load
            process.stdin.close()
            load.outcome = json.loads(process.stdout.read())

    def artifact(self, key: str) -> str:
        """The newest artifact of a key, as text."""
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

        with self.client() as client:
            found = client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), limit=200
            )
        assert found, f"no artifact {key}"
        return str(max(found, key=lambda artifact: str(artifact.created)).data)

    def fetch(self, url: str) -> str:
        """What a browser would get."""
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as answer:
            return str(answer.read().decode())

    def status(self, project: str) -> dict[str, tuple[int, int]]:
        """release id → process id and port, of each process of the service"""
        return {
            running.endpoint.release_id: (running.pid, running.endpoint.port)
            for running in ProcessTarget(self.settings).instances()
            if running.project == project
        }

    def instances(self, project: str) -> dict[str, str]:
        """release id → state, of each process of the service that supervisord knows of"""
        return {
            running.endpoint.release_id: running.state
            for running in ProcessTarget(self.settings).instances()
            if running.project == project
        }

    def model_versions(self, project: str) -> list[Any]:
        found: list[Any] = self.mlflow().search_model_versions(f"name='{project}'")
        return found

    def aliases(self, project: str) -> dict[str, str]:
        """alias → release id"""
        client = self.mlflow()
        return {
            alias: client.get_model_version(project, version).tags["perennial.release_id"]
            for alias, version in client.get_registered_model(project).aliases.items()
        }

    def mlflow(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.settings.mlflow_url, self.settings.mlflow_url)

    def published_nothing(self, project: str) -> bool:
        """No release, no package and no model version of the project: what a broken build must leave."""
        assert self.journal.releases(project) == []
        assert self.store.list(f"releases/{project}") == []
        assert self.published_no_package(project)
        return True

    def published_no_package(self, project: str) -> bool:
        """Neither on the package index nor in MLflow."""
        assert self.store.list(f"packages/{project}") == []
        assert self.store.list(f"simple/{project}") == []
        assert self.model_versions(project) == []
        return True


@contextmanager
def installed(here: Settings, parts: tuple[str, ...] = installation.PARTS) -> Iterator[House]:
    """An installation, up; down at the end."""
    house = House(here)
    try:
        installation.up(here, parts=parts, say=lambda line: None)
        yield house
    finally:
        installation.down(here, say=lambda line: None)


@contextmanager
def within(house: House) -> Iterator[None]:
    """This process as a part of the installation: flows called here run on its server, with its store."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.startswith(("PERENNIAL_", "PREFECT_"))]:
            patch.delenv(name)
        for name, value in house.environment().items():
            patch.setenv(name, value)
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        stack.callback(_forget)
        _forget()
        yield


def until(true: Callable[[], T], seconds: float, what: str) -> T:
    """The first true value of `true()`."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.1)
    return value


def processes(*words: str) -> list[int]:
    """The ids of the processes with all these words in command line, environment and working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                continue
            said = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            said += os.fsencode((process / "cwd").readlink())
            said = said.replace(b"\0", b" ")
        except OSError:
            continue
        if all(word.encode() in said for word in words):
            found.append(int(process.name))
    return found


def kill(pid: int) -> None:
    """The `kill -9` of the table."""
    os.kill(pid, signal.SIGKILL)


def _forget() -> None:
    """Make Prefect and our own caches read the environment again."""
    import prefect.context

    from tasks import edge

    for cached in (settings, edge.store, edge.journal):
        cached.cache_clear()
    prefect.context.refresh_global_settings_context()


def _ended(client: SyncPrefectClient, run_id: UUID, state: State[Any], result: Any) -> Ended:
    return Ended(
        id=run_id,
        kind=state.type.value,
        name=state.name or "",
        message=state.message or "",
        steps=_steps(client, run_id),
        log=_log(client, run_id),
        result=result,
    )


def _steps(client: SyncPrefectClient, run_id: UUID) -> dict[str, str]:
    """Task → state name. The server learns of tasks by events, so it is asked until two answers agree."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    def read() -> dict[str, str]:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
        return {run.name.rsplit("-", 1)[0]: run.state_name or "" for run in found}

    deadline = time.monotonic() + 10
    before = read()
    while True:
        time.sleep(0.4)
        now = read()
        settled = now == before and not {"Pending", "Running", "Retrying"} & set(now.values())
        if settled or time.monotonic() > deadline:
            return now
        before = now


def _log(client: SyncPrefectClient, run_id: UUID) -> str:
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()
    found: list[Any] = []
    while True:
        page = client.read_logs(
            LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])), limit=200, offset=len(found)
        )
        found += page
        if len(page) < 200:
            return "\n".join(line.message for line in found)
