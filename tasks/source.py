"""From a git ref to checked code and the environment it runs in."""

from __future__ import annotations

from prefect import get_run_logger, task

from perennial import environments, source
from perennial.config import Project
from perennial.project import LOCK_FILE, check_project
from perennial.values import ModelEnvironment, ProjectName, Source
from tasks import edge


@task(**edge.REPEATABLE)
def check_out(project: ProjectName, ref: str | None) -> Source:
    """Resolve the ref (the project's branch without one) and check its commit out."""
    enabled = edge.journal().project(project)
    found = source.resolve(project, enabled.repository, ref or enabled.branch, enabled.subdirectory)
    edge.project_folder(found)
    get_run_logger().info("%s is at commit %s", ref or enabled.branch, found.git_sha)
    return found


@task
def validate_contract(code: Source) -> Project:
    """Read, without running it, whether the project keeps the contract."""
    return check_project(edge.project_folder(code), code.project, environments.serving_requires())


@task(**edge.REPEATABLE)
def make_environment(code: Source) -> ModelEnvironment:
    """The isolated environment of the project's lock, made by uv unless it is there already."""
    lock = edge.project_folder(code) / LOCK_FILE
    environment = environments.describe(edge.store(), lock, edge.environments_folder())
    get_run_logger().info("the environment's Python is %s", edge.environment_python(environment))
    return environment
