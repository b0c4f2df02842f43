"""A registration that is cut off anywhere is completed by the next try: one run, one version, one alias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from perennial import registry
from tests.flows.house import House
from tests.releases import a_release


class Cut(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("step", ["create_model_version", "set_registered_model_alias"])
def test_a_registration_that_was_cut_off_is_completed_not_repeated(
    house: House, tmp_path: Path, step: str
) -> None:
    url, project = house.settings.mlflow_url, f"cut-{step.partition('_')[0]}"
    (tmp_path / "model").write_text("a model")
    release = a_release(project=project, release_id=f"{project}-0123456789ab")

    def cut(*_arguments: Any, **_options: Any) -> None:
        raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, step, cut)
        with pytest.raises(Cut):
            registry.register(url, release, tmp_path, None)
    registered = registry.register(url, release, tmp_path, None)

    client = MlflowClient(tracking_uri=url, registry_uri=url)
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (registered.run_id, "FINISHED")
    assert run.data.metrics == {"roc_auc": 0.7}
    (version,) = client.search_model_versions(f"name='{project}'")
    assert str(version.version) == registered.version
    assert house.aliases(project) == {"challenger": release.release_id}

    registry.promote(url, project, release.release_id)
    assert registry.register(url, release, tmp_path, None) == registered
    assert house.aliases(project) == {"champion": release.release_id}, "a champion is no challenger"
