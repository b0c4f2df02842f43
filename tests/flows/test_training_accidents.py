"""Training that fails, hangs or is killed ends its run clearly; a retried run continues where it stopped."""

from __future__ import annotations

import re
from pathlib import Path

from tests.factories import ProjectRepository
from tests.flows.conftest import MakeProject
from tests.flows.house import AS_OF, BUILD_STEPS, House, kill, processes, until


def _counts_loads(project: ProjectRepository, marker: Path) -> None:
    """From now on each call of `load_data` adds a byte to `marker`."""
    data = f"src/{project.name}/data.py"
    text = project.read(data)
    counted = text.replace(
        "    days = [",
        f"    with open({str(marker)!r}, 'a') as calls:\n        calls.write('x')\n    days = [",
    )
    assert counted != text
    project.commit("count", {data: counted})


def test_training_that_raises_fails_the_build_with_the_developer_s_own_words(
    house: House, enabled: MakeProject
) -> None:
    enabled("raising", training_raises=True)
    run = house.build("raising")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    assert run.passes_on("ended with an error, exit code 1", "the optimiser diverged", "model.py")
    assert run.stopped_in("train_model")
    assert house.published_nothing("raising")


def test_training_that_hangs_is_stopped_at_its_limit(house: House, enabled: MakeProject) -> None:
    enabled("hanging", training_hangs=True)
    run = house.build("hanging")
    assert (run.kind, run.name) == ("FAILED", "Failed")
    stopped = re.search(r"training was stopped after (\d+) s", run.message)
    assert stopped is not None and 5 <= int(stopped[1]) <= 8, run.message
    assert run.explains("an end within 5 s, the limit of this step", "[tool.perennial.limits]")
    assert run.stopped_in("train_model")
    assert house.published_nothing("hanging")
    assert not processes("serving.", str(run.id)), "the hanging process outlived its limit"


def test_a_run_whose_training_was_killed_is_retried_from_that_step(
    house: House, enabled: MakeProject, registered: None, tmp_path: Path
) -> None:
    project = enabled("killed", training_killed_once=tmp_path / "killed")
    calls = tmp_path / "calls"
    _counts_loads(project, calls)
    run_id = house.start("build/flights", project="killed", as_of=AS_OF.isoformat())
    first = house.wait(run_id)
    assert (first.kind, first.name) == ("FAILED", "Failed")
    assert first.explains("training was killed by SIGKILL", "Next: prefect flow-run retry")
    assert first.stopped_in("train_model")
    assert house.published_nothing("killed")
    loaded = calls.read_text()

    house.retry(run_id)
    second = house.wait(run_id, run_count=2)
    assert (second.kind, second.name) == ("COMPLETED", "Completed"), second.message
    assert calls.read_text() == loaded, "load_data was called again"
    assert second.log.count("loading the data known on") == 1
    assert second.log.count("1 passed in") == 1
    assert set(second.steps) == set(BUILD_STEPS)
    (release,) = house.journal.releases("killed")
    assert release.status == "accepted"


def test_a_build_whose_own_process_was_killed_crashes_and_a_retry_ends_in_the_same_release(
    house: House, enabled: MakeProject, registered: None, tmp_path: Path
) -> None:
    calls, may_train = tmp_path / "calls", tmp_path / "may-train"
    project = enabled("crashed", training_waits_for=may_train)
    _counts_loads(project, calls)
    may_train.touch()
    undisturbed = house.build("crashed")
    assert undisturbed.kind == "COMPLETED", undisturbed.message
    may_train.unlink()
    loaded = calls.read_text()

    run_id = house.start("build/flights", project="crashed", as_of=AS_OF.isoformat())
    trainer = until(lambda: processes("serving.", f"work/{run_id}"), 60, "training")
    until(lambda: "training on" in house.read(run_id).log, 20, "the training's first lines")
    (flow,) = processes("-m flows", str(house.settings.root))
    kill(flow)
    crashed = house.wait(run_id, 60)
    assert (crashed.kind, crashed.name) == ("CRASHED", "Crashed")
    assert "exit" in crashed.message.lower()
    until(lambda: not processes("serving.", f"work/{run_id}"), 5, f"the end of the training {trainer}")

    may_train.touch()
    house.retry(run_id)
    retried = house.wait(run_id, run_count=2)
    assert (retried.kind, retried.name) == ("COMPLETED", "Completed"), retried.message
    assert len(calls.read_text()) == 2 * len(loaded), "load_data ran again in the retried run"
    (release,) = house.journal.releases("crashed")
    assert release.release_id == undisturbed.result.release_id
    assert len(house.model_versions("crashed")) == 1
