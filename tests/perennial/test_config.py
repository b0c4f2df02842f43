from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from pydantic import ValidationError

from perennial.config import Project, read_project
from perennial.errors import ProjectError
from perennial.values import Rollouts

HEAD = '[project]\nname = "toy"\nversion = "1.0"\n'


def read(folder: Path, section: str, head: str = HEAD) -> Project:
    (folder / "pyproject.toml").write_text(head + section)
    return read_project(folder)


def test_a_minimal_project_gets_sensible_defaults(tmp_path: Path) -> None:
    project = read(tmp_path, '[tool.perennial]\ntask = "binary"\ntarget = "y"\n')
    assert (project.name, project.package) == ("toy", "toy")
    assert project.config.holdout_days == 28
    service = project.config.service
    assert (service.max_rows, service.compiled, service.compiled_tolerance) == (1000, "auto", 1e-9)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (
            'task = "binary"\ntarget = "y"\nholdout_dayz = 3\n',
            ["'holdout_dayz'", "did you mean 'holdout_days'"],
        ),
        (
            'task = "binary"\ntarget = "y"\n[tool.perennial.service]\nmax_row = 3\n',
            ["'service.max_row'", "'max_rows'"],
        ),
        (
            'task = "binary"\ntarget = "y"\n[tool.perennial.service]\ncompiled = "always"\n',
            ["service.compiled = 'always'", "'auto', 'never' or 'required'"],
        ),
        (
            'task = "binary"\ntarget = "y"\n[tool.perennial.service]\ncompiled_tolerance = nan\n',
            ["service.compiled_tolerance = nan"],
        ),
        (
            'task = "binary"\ntarget = "y"\n[tool.perennial.service]\nworker = 2\n',
            ["'service.worker'", "did you mean 'workers'"],
        ),
        ('task = "binary"\n', ["no 'target'"]),
        ('task = "clustering"\ntarget = "y"\n', ["task = 'clustering'", "'binary'"]),
        ('task = "binary"\ntarget = "y"\nmetrics = ["auc"]\n', ["'auc'", "roc_auc"]),
        (
            'task = "binary"\ntarget = "y"\n[tool.perennial.gates]\nrmse = {max = 1}\n',
            ["gates", "'rmse'", "roc_auc"],
        ),
        (
            'task = "binary"\ntarget = "y"\n[tool.perennial.gates]\nroc_auc = {mim = 1}\n',
            ["gates.roc_auc.mim", "'min'"],
        ),
        (
            'task = "binary"\ntarget = "y"\n[tool.perennial.schedule]\ntimezone = "Mars"\n',
            ["Mars", "Europe/Madrid"],
        ),
        ('task = "binary"\ntarget = "y"\nholdout_days = 0\n', ["holdout_days = 0"]),
    ],
)
def test_a_mistake_is_named_with_what_is_expected(tmp_path: Path, section: str, says: list[str]) -> None:
    with pytest.raises(ProjectError) as error:
        read(tmp_path, "[tool.perennial]\n" + section)
    for words in ["pyproject.toml", *says]:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("[project\n", "not TOML"),
        ('[project]\nversion = "1"\n', "no project.name"),
        ('[project]\nname = "toy"\n', "no project.version"),
    ],
)
def test_a_broken_pyproject_is_an_explained_error(tmp_path: Path, head: str, says: str) -> None:
    with pytest.raises(ProjectError, match=says):
        read(tmp_path, '[tool.perennial]\ntask = "binary"\ntarget = "y"\n', head)


def test_no_pyproject_and_no_section_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match=r"no pyproject\.toml"):
        read_project(tmp_path)
    with pytest.raises(ProjectError, match=r"no \[tool.perennial\]"):
        read(tmp_path, "")


def test_a_replayed_year_keeps_month_and_day(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        '[tool.perennial]\ntask = "binary"\ntarget = "y"\n[tool.perennial.data]\nreplay_year = 2013\n',
    ).config
    assert config.as_of(date(2026, 11, 20)) == date(2013, 11, 20)
    assert config.as_of(date(2028, 2, 29)) == date(2013, 2, 28)


BINARY = 'task = "binary"\ntarget = "y"\ntime_column = "at"\nentity_id = ["who"]\n'


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("[tool.perennial.gates]\nroc_auc = {}\n", ["gates.roc_auc", "min or max"]),
        ("[tool.perennial.gates]\nroc_auc = {min = nan}\n", ["gates.roc_auc.min", "finite"]),
        ("[tool.perennial.gates]\nlog_loss = {max = inf}\n", ["gates.log_loss.max", "finite"]),
        ("champion_margin = {roc_auc = inf}\n", ["champion_margin.roc_auc", "finite"]),
        ("champion_margin = {roc_auc = -0.1}\n", ["champion_margin.roc_auc = -0.1", "greater than or equal"]),
    ],
)
def test_a_gate_that_holds_nothing_back_is_refused(tmp_path: Path, section: str, says: list[str]) -> None:
    with pytest.raises(ProjectError) as error:
        read(tmp_path, "[tool.perennial]\n" + BINARY + section)
    for words in says:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("features", "says"),
    [
        ('["a", "y"]', "names the target 'y'"),
        ('["a", "at"]', "names the time_column 'at'"),
        ('["who", "a"]', "names an entity_id column 'who'"),
        ('["a", "b", "a"]', "names 'a' twice"),
        ("[]", "features is empty"),
    ],
)
def test_features_that_leak_or_repeat_are_refused(tmp_path: Path, features: str, says: str) -> None:
    with pytest.raises(ProjectError, match=says):
        read(tmp_path, f"[tool.perennial]\n{BINARY}features = {features}\n")
    assert read(tmp_path, f'[tool.perennial]\n{BINARY}features = ["a"]\n').config.features == ("a",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("project = 3\n", r"project = 3(?s:.*)\[project\]"),
        (f"tool = 1\n{HEAD}", r"tool = 1(?s:.*)\[tool\]"),
        (f"{HEAD}[tool]\nperennial = 1\n", r"\[tool.perennial\]"),
        (HEAD.replace("toy", "3toys") + f"[tool.perennial]\n{BINARY}", r"\[project\] name = '3toys'"),
        (f"{HEAD}dependencies = 3\n[tool.perennial]\n{BINARY}", r"\[project\] dependencies = 3"),
    ],
)
def test_a_mistake_outside_of_our_section_is_named_where_it_is(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ProjectError, match=says):
        read(tmp_path, "", text)


def test_a_policy_of_rollouts_keeps_its_environment_s_other_defaults(tmp_path: Path) -> None:
    rollout = Rollouts.model_validate({"production": {"strategy": "shadow", "steps": [100]}})
    assert (rollout.production.approval, rollout.production.keep_warm_seconds) == ("required", 3600)
    assert (rollout.test.strategy, rollout.test.approval) == ("all-at-once", "auto")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"steps": [50, 10]}, "must rise"),
        ({"steps": []}, "at least 1 item"),
        ({"strategy": "canary", "steps": [50, 100]}, "below 100"),
        ({"stategy": "canary"}, "Extra inputs"),
    ],
)
def test_a_policy_that_cannot_be_followed_is_refused(policy: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Rollouts.model_validate({"production": policy})
