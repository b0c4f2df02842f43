"""The toy projects are what they claim to be: healthy, or broken in just what an option names."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from perennial.config import read_project
from perennial.environments import serving_requires
from perennial.errors import ProjectError
from perennial.project import check_project
from tests.factories import CONFIG, DATA, MODEL, ProjectRepository, features, frame, make_project, toy

AS_OF = date(2026, 3, 1)
NEEDED_BY_SERVING = serving_requires()


def _module(project: ProjectRepository, file: str) -> ModuleType:
    """One file of the project as a module of its own, so that many projects fit in this process."""
    spec = importlib.util.spec_from_file_location("of_a_toy", project.project / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rows(project: ProjectRepository) -> pd.DataFrame:
    rows: pd.DataFrame = _module(project, DATA).load_data(AS_OF)
    return rows


def _trained(project: ProjectRepository) -> Any:
    model = _module(project, MODEL).Model()
    model.produce_model(_past(frame(AS_OF)))
    return model


def _past(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["seen_at"] < "2026-02-08"]


def _auc(model: Any) -> float:
    newest = frame(AS_OF).pipe(lambda rows: rows[rows["seen_at"] >= "2026-02-08"])
    return float(
        roc_auc_score(newest["bought"], model.predict(newest[["amount", "age", "colour", "member"]]))
    )


def _run(project: ProjectRepository, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the project's folder, as a build runs it."""
    environment = os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project.project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_same_options_give_the_same_commit_wherever_and_whenever(tmp_path: Path) -> None:
    first, second = make_project(tmp_path / "first"), make_project(tmp_path / "elsewhere" / "second")
    assert first.sha == second.sha
    assert first.change(worse=True) == second.change(worse=True)
    assert first.commit("note", {"NOTES.md": "x\n"}) == second.commit("note", {"NOTES.md": "x\n"})


def test_a_change_replaces_the_project_and_not_its_history(tmp_path: Path) -> None:
    project = make_project(tmp_path / "toy", failing_test=True)
    broken = project.sha
    project.commit("a file more", {"src/toy/extra.py": "X = 1\n"})
    healed = project.change()
    assert len({broken, healed, project.sha}) == 2
    assert not (project.project / "src/toy/extra.py").exists()
    assert project.read(CONFIG) == make_project(tmp_path / "fresh").read(CONFIG)


def test_a_project_may_lie_in_a_folder_of_its_repository(tmp_path: Path) -> None:
    project = make_project(tmp_path / "many", subdirectory="models/toy")
    assert project.project == tmp_path / "many" / "models" / "toy"
    assert read_project(project.project).name == "toy"
    assert len(project.change(version="0.2.0")) == 40
    assert read_project(project.project).version == "0.2.0"


def test_a_project_may_have_another_name_and_keeps_it(tmp_path: Path) -> None:
    project = make_project(tmp_path / "shop", name="corner-shop", fails_to_serve="raises")
    assert check_project(project.project, "corner-shop", NEEDED_BY_SERVING).package == "corner_shop"
    project.change()
    assert check_project(project.project, "corner-shop", NEEDED_BY_SERVING).package == "corner_shop"
    assert _run(project, "-c", "import corner_shop").returncode == 0
    with pytest.raises(ValueError, match="keeps the folder and the name"):
        project.change(name="toy")


def test_the_healthy_project_keeps_the_contract(tmp_path: Path) -> None:
    project = check_project(make_project(tmp_path / "toy").project, "toy", NEEDED_BY_SERVING)
    assert project.package == "toy"


def test_its_own_tests_pass_and_the_broken_one_fails(tmp_path: Path) -> None:
    pytest_of_project = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    project = make_project(tmp_path / "toy")
    healthy = _run(project, *pytest_of_project)
    assert healthy.returncode == 0, healthy.stdout
    project.change(failing_test=True)
    broken = _run(project, *pytest_of_project)
    assert broken.returncode == 1 and "3061" in broken.stdout, broken.stdout


def test_the_healthy_rows_are_one_per_visit_with_gaps_where_they_belong() -> None:
    rows = frame(AS_OF)
    assert len(rows) == 3060 and rows["visit_id"].is_unique
    assert rows["seen_at"].dt.normalize().nunique() == 90
    assert rows["seen_at"].max() < pd.Timestamp(AS_OF)
    nulls = rows.isna().mean()
    assert 0.02 < nulls["amount"] < 0.08 and nulls.drop("amount").sum() == 0
    assert 0.3 < rows["bought"].mean() < 0.6
    assert rows["member"].dtype == bool


def test_a_day_of_the_past_never_changes() -> None:
    today, later = frame(date(2026, 3, 1)), frame(date(2026, 3, 15))
    overlap = later[later["visit_id"].isin(today["visit_id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        overlap, today[today["seen_at"] >= overlap["seen_at"].min()].reset_index(drop=True)
    )


def test_the_healthy_model_predicts_the_newest_days_well(tmp_path: Path) -> None:
    assert _auc(_trained(make_project(tmp_path / "toy"))) > 0.75
    model = toy().Model()
    model.produce_model(_past(frame(AS_OF)))
    assert model.predict(features(AS_OF)).shape == (3060,)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"without_model": True}, "no class Model"),
        ({"without_method": "predict"}, "no method predict"),
        ({"without_method": "produce_model"}, "no method produce_model"),
        ({"without_load_data": True}, "no function load_data"),
        ({"unknown_key": "holdout_dayz"}, "holdout_dayz"),
        ({"without_lock": True}, "requirements.lock does not exist"),
        ({"lock_lacks": "polars>=1"}, "does not hold polars"),
        ({"lock_outside_range": True}, "pins pandas==2.3.3"),
    ],
)
def test_a_project_that_breaks_the_contract_is_refused_for_that(
    tmp_path: Path, options: Any, found: str
) -> None:
    with pytest.raises(ProjectError, match=found):
        check_project(make_project(tmp_path / "toy", **options).project, "toy", NEEDED_BY_SERVING)


def test_each_data_option_breaks_the_rows_as_it_says(tmp_path: Path) -> None:
    project = make_project(tmp_path / "toy", zero_rows=True)
    rows = _rows(project)
    assert rows.empty and list(rows.columns) == list(frame(AS_OF).columns)

    project.change(missing_column="amount")
    assert "amount" not in _rows(project).columns

    project.change(wrong_type="amount")
    assert _rows(project)["amount"].map(lambda value: isinstance(value, str)).all()

    project.change(one_class=True)
    assert _rows(project)["bought"].unique().tolist() == [0]

    for column in ("age", "bought", "visit_id"):
        project.change(null_in=column)
        assert _rows(project)[column].isna().sum() == 306

    project.change(duplicate_keys=7)
    assert _rows(project)["visit_id"].duplicated().sum() == 7

    project.change(future_rows=True)
    assert (_rows(project)["seen_at"] > "2026-03-02").sum() == 34


def test_a_random_model_is_random_and_a_worse_one_is_worse(tmp_path: Path) -> None:
    project = make_project(tmp_path / "toy", random_predictions=True)
    assert abs(_auc(_trained(project)) - 0.5) < 0.06
    project.change(worse=True)
    assert 0.6 < _auc(_trained(project)) < 0.72


def test_training_raises_when_asked(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="diverged"):
        _trained(make_project(tmp_path / "toy", training_raises=True))


def test_training_that_hangs_has_a_short_limit(tmp_path: Path) -> None:
    project = make_project(tmp_path / "toy", training_hangs=True)
    assert read_project(project.project).config.limits.train_seconds == 5
    assert "sleep(3600)" in project.read(MODEL)


_TRAIN = "from datetime import date; from toy import *; Model().produce_model(load_data(date(2026, 3, 1)))"


def test_training_is_killed_the_first_time_and_ends_the_second(tmp_path: Path) -> None:
    project = make_project(tmp_path / "toy", training_killed_once=tmp_path / "killed")
    assert _run(project, "-c", _TRAIN).returncode == -9
    assert (tmp_path / "killed").exists()
    second = _run(project, "-c", _TRAIN)
    assert second.returncode == 0, second.stderr


def test_training_waits_for_a_file(tmp_path: Path) -> None:
    project = make_project(tmp_path / "toy", training_waits_for=tmp_path / "go")
    assert f"while not Path('{tmp_path / 'go'}').exists()" in project.read(MODEL)
    (tmp_path / "go").touch()
    assert _auc(_trained(project)) > 0.75


def test_a_project_fails_only_in_a_service_process(tmp_path: Path) -> None:
    project = make_project(tmp_path / "toy", fails_to_serve="raises")
    assert _run(project, "-c", "import toy").returncode == 0
    served = _run(project, "-c", "import toy", "serving.server")
    assert served.returncode == 1 and "no licence" in served.stderr


def test_a_model_answers_otherwise_only_in_a_service_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _trained(make_project(tmp_path / "toy", serves_differently=True))
    here = model.predict(features(AS_OF))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "serving.server"])
    np.testing.assert_allclose(model.predict(features(AS_OF)) - here, 0.01)


def test_a_model_that_reloads_differently_loses_its_shift(tmp_path: Path) -> None:
    model = _trained(make_project(tmp_path / "toy", reloads_differently=True))
    reloaded = type(model)()
    reloaded.__dict__.update(model.__getstate__())
    np.testing.assert_allclose(model.predict(features(AS_OF)) - reloaded.predict(features(AS_OF)), 0.01)


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="colourblind"):
        make_project(tmp_path / "toy", colourblind=True)  # type: ignore[call-arg]
