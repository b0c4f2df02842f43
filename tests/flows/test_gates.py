"""A model that is not good enough becomes a rejected release: on record, and never in front of users."""

from __future__ import annotations

from perennial.values import Release
from tests.factories import ProjectRepository
from tests.flows.conftest import MakeProject
from tests.flows.house import BUILD_STEPS, House

JUDGED = set(BUILD_STEPS[: BUILD_STEPS.index("check_gates") + 1]) | {"write_release"}


def test_a_model_below_its_gate_is_rejected_by_name_and_can_not_be_deployed(
    house: House, enabled: MakeProject
) -> None:
    enabled("coin-toss", random_predictions=True)
    run = house.build("coin-toss")
    assert (run.kind, run.name) == ("FAILED", "Rejected")
    (release,) = house.journal.releases("coin-toss")
    (gate,) = release.gates.gates
    assert gate.measured is not None and 0.4 < gate.measured < 0.6
    assert run.explains(
        release.release_id, "roc_auc at least 0.55: fail", f"measured {gate.measured:.4f}", "threshold 0.55"
    )
    assert set(run.steps) == JUDGED
    assert release.status == "rejected" and release.package is None
    assert house.published_no_package("coin-toss")
    table = house.artifact("gates-coin-toss")
    assert "roc_auc at least 0.55" in table and "fail" in table

    refused = house.deploy("coin-toss", release.release_id)
    assert (refused.kind, refused.name) == ("FAILED", "Failed")
    assert refused.explains(f"{release.release_id} was rejected by", "roc_auc at least 0.55", "0.55")
    assert refused.stopped_in("collect_release")
    newest = house.deploy("coin-toss")
    assert newest.explains("coin-toss has no accepted release", release.release_id, "build/coin-toss")
    assert house.journal.active("coin-toss", "test") is None
    assert house.instances("coin-toss") == {}

    again = house.build("coin-toss")
    assert (again.name, again.message) == ("Rejected", run.message)
    assert house.journal.releases("coin-toss") == [release]


def test_a_challenger_that_is_worse_than_the_champion_is_rejected_by_the_champion_s_gate(
    house: House, enabled: MakeProject
) -> None:
    project = enabled("contest")
    built = house.build("contest")
    champion = built.result.release_id
    _names_what_it_is_made_of(house, project, built.result)
    _says_how_it_is_served(house, built.result)
    assert house.aliases("contest") == {"challenger": champion}
    assert house.deploy("contest").kind == "COMPLETED"
    assert house.aliases("contest") == {"champion": champion}

    sha = project.change(worse=True)
    run = house.build("contest")
    assert (run.kind, run.name) == ("FAILED", "Rejected")
    assert run.explains(
        f"roc_auc not worse than {champion}: fail", "measured difference -", "threshold -0.01"
    )
    assert set(run.steps) == JUDGED
    (rejected,) = house.journal.releases("contest", "rejected")
    assert rejected.source.git_sha == sha and rejected.evaluation.champion == champion
    absolute = next(gate for gate in rejected.gates.gates if gate.name.startswith("roc_auc at least"))
    assert absolute.verdict == "pass", "it is good enough by itself"
    assert house.aliases("contest") == {"champion": champion}
    assert len(house.model_versions("contest")) == 1

    project.change(version="0.2.0")
    challenger = house.build("contest").result
    assert challenger.evaluation.champion == champion
    assert house.aliases("contest") == {"champion": champion, "challenger": challenger.release_id}
    assert house.deploy("contest", challenger.release_id).kind == "COMPLETED"
    assert house.aliases("contest") == {"champion": challenger.release_id}
    assert house.deploy("contest", champion).kind == "COMPLETED"
    assert house.aliases("contest") == {"champion": champion}, "a rollback moves the alias too"


def _names_what_it_is_made_of(house: House, project: ProjectRepository, release: Release) -> None:
    """The model version in MLflow leads back to code, data, environment and artifacts."""
    (version,) = house.model_versions(release.project)
    assert release.package is not None
    assert release.mlflow_version == version.version and release.mlflow_run_id == version.run_id
    assert (
        version.tags
        | {
            "perennial.release_id": release.release_id,
            "perennial.git_sha": project.sha,
            "perennial.repository": project.url,
            "perennial.data_fingerprint": release.dataset.fingerprint,
            "perennial.as_of": "2026-03-01",
            "perennial.environment": release.environment.fingerprint,
            "perennial.model_sha256": release.model.artifact.sha256,
            "perennial.wheel": release.package.filename,
        }
        == version.tags
    )
    run = house.mlflow().get_run(version.run_id)
    measured = release.evaluation.metric("roc_auc")
    assert measured is not None and run.data.metrics["roc_auc"] == measured.value
    assert run.info.status == "FINISHED"
    artifacts = {file.path for file in house.mlflow().list_artifacts(version.run_id)}
    assert artifacts == {"model", "serving", "evaluation.html"}


def _says_how_it_is_served(house: House, release: Release) -> None:
    """A logistic regression behind imputing, scaling and one-hot columns is served compiled."""
    form = release.serving
    assert form is not None
    assert form.path == "compiled", form.reason
    assert form.batching and form.rows and form.edge_rows
    assert form.max_abs_difference is not None and form.max_abs_difference <= 1e-9 == form.tolerance
    page = house.artifact(f"serving-{release.project}")
    assert "Served compiled" in page and form.reason in page
    (version,) = house.model_versions(release.project)
    assert version.tags["perennial.serving.path"] == "compiled"
    said = house.command("-m", "perennial", "lineage", release.release_id).stdout
    assert f"compiled: {form.reason}" in said and form.parity in said
