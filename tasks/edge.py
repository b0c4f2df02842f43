"""What every task needs: the installation's parts, its folders, and errors without tracebacks."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Any, ParamSpec, TypeVar, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.runtime import flow_run
from prefect.states import Failed, State

from perennial import environments, leases, releases, snapshot, source, warm
from perennial.config import Project
from perennial.errors import PerennialError
from perennial.journal import Journal, open_journal
from perennial.settings import object_store_environment, settings
from perennial.store import Store, StoreCredentials, open_store
from perennial.values import Dataset, ModelEnvironment, Release, Source

_PROGRESS_SECONDS = 1.0  # each update is a request to Prefect's API
_JOURNAL_PATIENCE_SECONDS = 120.0  # as Prefect's client has for its server
_KEEP_WORK_SECONDS = 7 * 86_400  # of a failed run: long enough to look at its logs

P = ParamSpec("P")
R = TypeVar("R")

# With its results kept, a retried run continues where it stopped. Without them it would train again.
DURABLE: dict[str, Any] = {"persist_result": True, "result_serializer": "json"}


def _is_transient(_task: Any, _run: Any, state: State[Any]) -> bool:
    """What we can explain will not be otherwise in ten seconds, unless a part on the network was away."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, PerennialError) or error.transient


# Acts over the network may be repeated; a project's own code is not run twice unasked.
REPEATABLE: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [2, 10],
    "retry_condition_fn": _is_transient,
}


def explained(flow_body: Callable[P, R]) -> Callable[P, R | State[Any]]:
    """End a flow in `Failed` with an explanation, not a traceback, on an error that we can explain."""

    @functools.wraps(flow_body)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R | State[Any]:
        for name in ("prefect.task_runs", "prefect.flow_runs"):
            logging.getLogger(name).addFilter(_WITHOUT_TRACEBACK)
        try:
            return flow_body(*args, **kwargs)
        except PerennialError as error:
            return Failed(message=str(error), data=error)
        finally:
            warm.close()
            leases.let_go()

    # Prefect validates parameters by their annotations, and would look their names up in this module.
    wrapped.__signature__ = inspect.signature(flow_body, eval_str=True)  # type: ignore[attr-defined]
    return wrapped


def same_end(of: State[Any]) -> State[Any]:
    """The end of a flow that another one ended for: returned as it is, Prefect would only count it."""
    return State(type=of.type, name=of.name, message=of.message)


class _WithoutTraceback(logging.Filter):
    """A log line for the person who reads the run: the explanation of an error, not where we raised it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], PerennialError):
            record.msg, record.args = str(record.exc_info[1]), ()
            record.exc_info = None
        return True


_WITHOUT_TRACEBACK = _WithoutTraceback()


def named(*parts: str) -> Callable[[], str]:
    """A run's name from its parameters; a part that speaks of one that was not given is left out."""

    def name() -> str:
        given = {key: _short(value) for key, value in flow_run.parameters.items() if value is not None}
        return " ".join(part.format(**given) for part in parts if _fields(part) <= given.keys())

    return name


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{40}", value) else value


def _fields(text: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(text) if field}


@lru_cache(maxsize=1)
def store() -> Store:
    """The store, with the credentials of the prefect-aws block where the settings name one."""
    here = settings()
    credentials = _credentials(here.s3_credentials_block) if here.s3_credentials_block else None
    return open_store(here.store, endpoint_url=here.s3_endpoint_url, credentials=credentials)


def store_environment() -> dict[str, str]:
    """What a service, which knows nothing of blocks, needs in its environment to write to the store."""
    here = settings()
    if not here.store.startswith("s3:"):
        return {}
    variables = object_store_environment()
    if here.s3_credentials_block:
        variables |= _credentials(here.s3_credentials_block).as_environment()
    if here.s3_endpoint_url:
        plain = str(here.s3_endpoint_url.startswith("http:")).lower()
        variables |= {"AWS_ENDPOINT_URL": here.s3_endpoint_url, "AWS_ALLOW_HTTP": plain}
    return variables


@lru_cache(maxsize=1)
def journal() -> Journal:
    """The release journal."""
    return open_journal(settings().database, patience_seconds=_JOURNAL_PATIENCE_SECONDS)


def work_folder() -> Path:
    """A folder of this flow run's own; the same one when the run is retried."""
    folder = settings().root / "work" / str(flow_run.id)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clear_work() -> None:
    """Remove this run's folder, once what matters is in the store, and what failed runs left long ago."""
    shutil.rmtree(work_folder(), ignore_errors=True)
    for folder in (settings().root / "work").iterdir():
        with suppress(FileNotFoundError):  # the run that it belonged to has just removed it
            if time.time() - folder.stat().st_mtime > _KEEP_WORK_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def project_folder(of: Source) -> Path:
    """The project's checkout."""
    return source.check_out(of, settings().root / "checkouts")


def environment_python(environment: ModelEnvironment) -> Path:
    """The interpreter of a model's environment, made now if it is not there."""
    return environments.make(store(), environment, environments_folder())


def environments_folder() -> Path:
    return settings().root / "environments"


def release_folder(release: Release) -> Path:
    """The release on this machine's disk, every digest checked."""
    return releases.materialise(store(), release, settings().root / "releases")


def champion(project: Project) -> Release | None:
    """The release that a challenger is compared with, if there is one and the project wants it."""
    release_id = journal().champion(project.name)
    if release_id is None or not project.config.compare_with_champion:
        return None
    return journal().release(release_id)


def snapshot_file(dataset: Dataset) -> Path:
    """The snapshot on this machine's disk."""
    return snapshot.local(store(), dataset, settings().root / "snapshots")


def report_url(uri: str) -> str:
    """Where a person can open a report of the store; with a slash at the end for a folder."""
    return f"{settings().storefront_url}/{store().key(uri)}" + ("/" if uri.endswith("/") else "")


class Progress:
    """A progress bar on the run's page, and a log line, for each line that a long step prints."""

    def __init__(self, key: str, description: str, lines_expected: int) -> None:
        self._artifact = cast(UUID, create_progress_artifact(0.0, key=key, description=description))
        self._log = get_run_logger()
        self._expected = lines_expected
        self._seen = 0
        self._updated = float("-inf")

    def line(self, text: str) -> None:
        self._log.info("%s", text)
        self._seen += 1
        if time.monotonic() - self._updated < _PROGRESS_SECONDS:
            return
        self._updated = time.monotonic()
        # The last share belongs to `done`: a step that prints much must not look finished.
        update_progress_artifact(self._artifact, progress=min(95.0, 100.0 * self._seen / self._expected))

    def done(self) -> None:
        update_progress_artifact(self._artifact, progress=100.0)


def _credentials(block: str) -> StoreCredentials:
    from prefect_aws import AwsCredentials

    loaded = AwsCredentials.load(block)
    secret = loaded.aws_secret_access_key
    return StoreCredentials(
        access_key_id=loaded.aws_access_key_id or "",
        secret_access_key=secret.get_secret_value() if secret else "",
        session_token=loaded.aws_session_token or "",
        region=loaded.region_name or "",
    )
