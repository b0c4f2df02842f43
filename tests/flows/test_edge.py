"""What every task shares: progress, the folder of a run, and what is worth another try."""

from __future__ import annotations

from typing import Any

import pytest
from prefect import flow, task

from perennial.errors import InstallationError
from tasks import edge
from tests.flows.house import House


def test_a_step_that_prints_much_updates_its_bar_once_a_second_and_logs_every_line(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[float] = []
    update = edge.update_progress_artifact

    def counted(artifact: Any, *, progress: float) -> Any:
        updates.append(progress)
        return update(artifact, progress=progress)

    monkeypatch.setattr(edge, "update_progress_artifact", counted)

    @flow
    def chatty() -> None:
        progress = edge.Progress("chatty", "prints much", 300)
        for number in range(300):
            progress.line(f"line {number}.")
        progress.done()

    run = house.ended(chatty(return_state=True))
    assert run.kind == "COMPLETED"
    assert updates[-1] == 100.0 and len(updates) < 30
    assert all(f"line {number}." in run.log for number in range(300))


def test_a_folder_of_another_run_that_vanishes_meanwhile_is_no_error(house: House) -> None:
    work = house.settings.root / "work"
    work.mkdir(exist_ok=True)
    (work / "gone").symlink_to(work / "nowhere")  # listed, and not there when it is looked at

    @flow
    def clearing() -> bool:
        (edge.work_folder() / "left").touch()
        edge.clear_work()
        return edge.work_folder().exists() and not (edge.work_folder() / "left").exists()

    try:
        assert house.ended(clearing(return_state=True)).kind == "COMPLETED"
    finally:
        (work / "gone").unlink()


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (InstallationError("the store is away", transient=True), 2),
        (InstallationError("the store refused"), 1),
        (OSError("a socket"), 2),
    ],
)
def test_what_a_network_may_mend_is_tried_again_and_nothing_else(
    house: House, error: Exception, tries: int
) -> None:
    tried = 0

    @task(retries=1, retry_condition_fn=edge.REPEATABLE["retry_condition_fn"])
    def failing() -> None:
        nonlocal tried
        tried += 1
        raise error

    @flow
    def trying() -> None:
        failing()

    assert trying(return_state=True).is_failed()
    assert tried == tries
