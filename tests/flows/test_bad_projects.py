"""A project that does not keep the contract is refused by the first steps, and its developer is told why."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.factories import LOCK
from tests.flows.conftest import MakeProject
from tests.flows.house import House

METHODS = "produce_model(self, data) and predict(self, rows)"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        pytest.param(
            "no-model",
            {"without_model": True},
            ["src/no_model/__init__.py exports no class Model", "Expected: a class Model with"],
            id="without Model",
        ),
        pytest.param(
            "no-produce",
            {"without_method": "produce_model"},
            ["src/no_produce/__init__.py: Model has no method produce_model", METHODS],
            id="without produce_model",
        ),
        pytest.param(
            "no-predict",
            {"without_method": "predict"},
            ["src/no_predict/__init__.py: Model has no method predict", METHODS],
            id="without predict",
        ),
        pytest.param(
            "no-data",
            {"without_load_data": True},
            ["src/no_data/__init__.py exports no function load_data", "load_data(as_of: datetime.date)"],
            id="without load_data",
        ),
        pytest.param(
            "odd-key",
            {"unknown_key": "holdout_dayz"},
            [
                "pyproject.toml: [tool.perennial] has an unknown key 'holdout_dayz'",
                "did you mean 'holdout_days'",
            ],
            id="with an unknown key",
        ),
        pytest.param(
            "no-lock",
            {"without_lock": True},
            ["requirements.lock does not exist", "a lock with hashes", "Next: python -m perennial lock"],
            id="without a lock",
        ),
        pytest.param(
            "short-lock",
            {"lock_lacks": "polars>=1"},
            ["requirements.lock does not hold polars", "Expected: a pin for polars>=1"],
            id="whose lock lacks a requirement",
        ),
        pytest.param(
            "old-lock",
            {"lock_outside_range": True},
            ["requirements.lock pins pandas==2.3.3", "Expected: pandas<2.3"],
            id="whose lock pins another version",
        ),
    ],
)
def test_a_project_that_breaks_the_contract_is_refused_before_its_code_runs(
    house: House, enabled: MakeProject, name: str, options: dict[str, Any], words: list[str]
) -> None:
    enabled(name, **options)
    run = house.build(name)
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains(*words)
    assert run.stopped_in("validate_contract")
    assert house.published_nothing(name)


def test_a_lock_whose_hash_is_not_the_package_s_is_refused_by_its_name(
    house: House, enabled: MakeProject
) -> None:
    project = enabled("forged-lock")
    lock = project.read(LOCK)
    (pin,) = re.findall(r"^threadpoolctl==(?:.*\\\n)+.*\n", lock, flags=re.MULTILINE)
    forged = re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, pin)
    project.commit("forge", {LOCK: lock.replace(pin, forged)})
    run = house.build("forged-lock")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains(
        "requirements.lock cannot be installed", "threadpoolctl", "Expected: pins whose hashes match"
    )
    assert run.stopped_in("make_environment")
    assert house.published_nothing("forged-lock")


def test_a_ref_that_does_not_exist_is_refused_with_the_branches_there_are(
    house: House, enabled: MakeProject
) -> None:
    project = enabled("no-ref")
    run = house.build("no-ref", ref="mian")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains(
        f"repository {project.url} has no ref 'mian'", "its branches: main", "Next: git ls-remote"
    )
    assert run.stopped_in("check_out")
    assert house.published_nothing("no-ref")


def test_a_commit_that_does_not_exist_is_refused(house: House, enabled: MakeProject) -> None:
    project = enabled("no-commit")
    run = house.build("no-commit", ref="0123456789" * 4)
    assert run.explains(
        f"repository {project.url} has no commit 0123456789", "Expected: a commit that a branch"
    )
    assert run.stopped_in("check_out")
    assert house.published_nothing("no-commit")


@pytest.mark.parametrize(
    ("name", "repository"),
    [("no-folder", "/nowhere/at-all"), ("no-host", "http://127.0.0.1:1/model.git")],
)
def test_a_repository_that_cannot_be_reached_is_named(house: House, name: str, repository: str) -> None:
    house.enable(name, repository)
    run = house.build(name)
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains(
        f"repository {repository} cannot be read", "Expected: a path or URL that `git ls-remote`"
    )
    assert run.stopped_in("check_out")
    assert house.published_nothing(name)


def test_a_project_that_is_not_enabled_is_refused_with_the_nearest_one(
    house: House, enabled: MakeProject
) -> None:
    enabled("enabled-one")
    run = house.build("enabled-won")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains("no project 'enabled-won' is enabled; did you mean 'enabled-one'?")
    assert run.stopped_in("check_out")


def test_when_a_developer_s_test_fails_the_build_stops_there_and_links_the_report(
    house: House, enabled: MakeProject
) -> None:
    enabled("failing-test", failing_test=True)
    run = house.build("failing-test")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains(
        "1 of the project's tests failed", "test_a_visit_is_one_row", "the report is at http://"
    )
    assert run.stopped_in("run_project_tests")
    assert house.published_nothing("failing-test")
    link = re.search(r"http://\S+", run.message)
    assert link is not None
    report = house.fetch(link[0])
    assert 'failures="1"' in report and "3061" in report
    page = house.artifact("tests-failing-test")
    assert "test_a_visit_is_one_row" in page
    assert link[0] in house.artifact("tests-report-failing-test")
