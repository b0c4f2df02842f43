from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest

from perennial import artifacts, assessment
from perennial.config import Project, ProjectConfig
from perennial.errors import ProjectError
from perennial.evaluation import Holdout
from perennial.store import Store
from perennial.values import ServiceLimits
from serving import contract
from tests.releases import a_form, a_release, a_stored_release

CONFIG = ProjectConfig(task="binary", target="y", time_column="at", metrics=("log_loss",))
DAYS = 28
PER_DAY = 20
FIRST = date(2024, 5, 1)


def holdout() -> Holdout:
    generator = np.random.default_rng(0)
    rows = DAYS * PER_DAY
    score = generator.normal(size=rows)
    truth = (generator.random(rows) < 1 / (1 + np.exp(-score))).astype(float)
    first = np.datetime64(FIRST, "D").astype(int)
    cluster = np.repeat(np.arange(first, first + DAYS), PER_DAY)
    return Holdout(truth, 1 / (1 + np.exp(-score)), cluster, {})


def champion(trained_until: date):
    moment = datetime.combine(trained_until, datetime.min.time())
    release = a_release(created_at=datetime.now(UTC))
    return release.model_copy(update={"model": release.model.model_copy(update={"holdout_start": moment})})


def test_without_a_champion_there_is_nothing_to_compare_with() -> None:
    assert assessment.evaluate(CONFIG, holdout(), None, None).champion is None


@pytest.mark.parametrize("seen_days", [0, 10])
def test_the_champion_is_judged_on_rows_that_it_was_not_trained_on(seen_days: int) -> None:
    data = holdout()
    rival = champion(FIRST + timedelta(days=seen_days))
    evaluation = assessment.evaluate(CONFIG, data, rival, data.prediction)
    (difference,) = evaluation.champion_differences
    assert difference.clusters == DAYS - seen_days
    assert difference.rows == (DAYS - seen_days) * PER_DAY
    assert evaluation.metrics[0].rows == DAYS * PER_DAY


def test_a_champion_that_has_seen_every_row_cannot_be_compared_with() -> None:
    data = holdout()
    evaluation = assessment.evaluate(CONFIG, data, champion(FIRST + timedelta(days=99)), data.prediction)
    assert evaluation.champion_differences[0].low is None


def test_metrics_default_to_those_of_the_task() -> None:
    evaluation = assessment.evaluate(
        CONFIG.model_copy(update={"metrics": ()}), replace(holdout()), None, None
    )
    assert [m.name for m in evaluation.metrics] == ["roc_auc", "log_loss", "brier"]


def test_what_training_wrote_comes_back_from_the_store_whatever_is_in_the_way(
    directory_store: Store, tmp_path: Path
) -> None:
    model = a_stored_release(directory_store, tmp_path / "built").model
    (tmp_path / "holdout.parquet").write_bytes(b"the holdout")
    kept = artifacts.put_file(directory_store, "models/toy/holdout.parquet", tmp_path / "holdout.parquet")
    model = model.model_copy(update={"holdout_predictions": kept})
    for _ in range(2):
        folder = assessment.restore_model(directory_store, model, tmp_path / "trained")
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert names == {
            *("model/model.skops", "model/parts/more", "schema.json", "golden.json", "holdout.parquet")
        }
        (folder / "model" / "model.skops").write_bytes(b"half of i")


PLAN = contract.Plan(
    path="compiled",
    reason="every step has an exact form",
    batching=True,
    batching_reason="each row is predicted for itself",
    parity=contract.Parity(rows=28, edge_rows=1234, max_abs_difference=2e-16, tolerance=1e-9),
)


@pytest.mark.parametrize("path", ["compiled", "original"])
def test_a_form_names_the_plan_s_figures_and_the_bytes_in_the_store(
    directory_store: Store, tmp_path: Path, path: str
) -> None:
    output = tmp_path / "serving"
    output.mkdir()
    (output / "plan.json").write_text("{}")
    project = Project(name="toy", package="toy", version="1", requires=(), config=CONFIG)
    plan = msgspec.structs.replace(PLAN, path=path)
    form = assessment.keep_form(directory_store, project, output, plan)
    tolerance = 1e-9 if path == "compiled" else None
    assert form == a_form(path=path, tolerance=tolerance, artifact=form.artifact)
    assert artifacts.directory_sha256(output) == form.artifact.sha256
    assert directory_store.exists(f"{directory_store.key(form.artifact.uri)}/plan.json")
    assert assessment.keep_form(directory_store, project, output, plan) == form


def test_a_model_that_must_be_compiled_and_cannot_be_stops_the_build_with_the_reason() -> None:
    required = CONFIG.model_copy(update={"service": ServiceLimits(compiled="required")})
    original = a_form(path="original", reason="Model.predict clips its estimator's answer")
    with pytest.raises(ProjectError, match=r"cannot be served compiled: Model\.predict clips") as refused:
        assessment.check_form(required, original)
    assert 'compiled = "required"' in refused.value.expected
    assert 'compiled = "auto"' in refused.value.next_command
    assessment.check_form(required, a_form())
    assessment.check_form(CONFIG, original)
