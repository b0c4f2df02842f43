"""A candidate that fails is removed, and the users of the old release notice nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.factories import CONFIG, ProjectRepository
from tests.flows.conftest import MakeProject
from tests.flows.house import House

# A compiled model answers without the project's code, and these are accidents of that code.
IMPATIENT = """
[tool.perennial.service]
ready_timeout_seconds = 8
compiled = "never"
"""


@pytest.fixture(scope="module")
def fragile(house: House, enabled: MakeProject) -> tuple[ProjectRepository, str]:
    """A project whose healthy release serves."""
    project = enabled("fragile")
    built = house.build("fragile")
    assert built.kind == "COMPLETED", built.message
    deployed = house.deploy("fragile")
    assert deployed.kind == "COMPLETED", deployed.message
    return project, built.result.release_id


@pytest.mark.parametrize(
    ("options", "step", "words"),
    [
        pytest.param(
            {"fails_to_serve": "raises"},
            "start_candidate",
            ["died before it was ready", "no licence on this machine", "gets ready to serve"],
            id="dies at its start",
        ),
        pytest.param(
            {"fails_to_serve": "hangs"},
            "start_candidate",
            ["was not ready within 8 s", "ready_timeout_seconds under [tool.perennial.service]"],
            id="never gets ready",
        ),
        pytest.param(
            {"serves_differently": True},
            "check_candidate",
            ["fails parity on", "golden rows: row ", ": served 0.", ", trained 0.", "within 1e-09"],
            id="answers otherwise",
        ),
    ],
)
def test_a_candidate_that_fails_is_removed_and_the_old_release_serves_on(
    house: House,
    fragile: tuple[ProjectRepository, str],
    options: dict[str, Any],
    step: str,
    words: list[str],
) -> None:
    project, healthy = fragile
    project.change(**options)
    project.commit(
        "be impatient",
        {CONFIG: project.read(CONFIG) + IMPATIENT},
    )
    candidate = house.build("fragile")
    assert candidate.kind == "COMPLETED", candidate.message
    release_id = candidate.result.release_id

    with house.load("fragile", rate=50) as load:
        run = house.deploy("fragile", release_id)
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.passes_on(*words)
    assert run.stopped_in(step)
    assert load.all_answered_by(healthy)
    assert house.instances("fragile") == {healthy: "RUNNING"}
    assert house.journal.active("fragile", "test") == healthy
    last = house.journal.decisions("fragile", "test")[-1]
    assert (last.kind, last.release_id) == ("withdrawn", release_id)
    assert words[0] in last.payload["reason"]
    assert house.ask("fragile")["release_id"] == healthy
    assert house.aliases("fragile")["champion"] == healthy


def test_a_model_that_must_be_compiled_and_cannot_be_is_not_published(
    house: House, enabled: MakeProject
) -> None:
    project = enabled("must-compile")
    clipped = project.read("src/must_compile/model.py").replace(
        "return self.pipeline.predict_proba(rows)[:, 1]",
        "return np.clip(self.pipeline.predict_proba(rows)[:, 1], 0.1, 0.9)",
    )
    required = project.read(CONFIG) + '\n[tool.perennial.service]\ncompiled = "required"\n'
    project.commit("clip", {"src/must_compile/model.py": clipped, CONFIG: required})
    run = house.build("must-compile")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains(
        "the model cannot be served compiled:", "Expected: a model that compiles", "Next: change"
    )
    assert run.stopped_in("compile_model")
    assert house.published_nothing("must-compile")
    page = house.artifact("serving-must-compile")
    assert "by the model as it was trained" in page and "Model.predict" in page


def test_a_model_that_reloads_otherwise_never_becomes_a_release(house: House, enabled: MakeProject) -> None:
    enabled("forgetful", reloads_differently=True)
    run = house.build("forgetful")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.explains("reloaded")
    assert run.stopped_in("train_model")
    assert house.published_nothing("forgetful")
