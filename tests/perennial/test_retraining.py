from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from perennial import retraining
from perennial.errors import ReleaseError
from perennial.journal import Journal, open_journal
from tests.releases import a_release

DAY = date(2024, 6, 2)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = open_journal(f"sqlite:///{tmp_path / 'journal.db'}")
    yield opened
    opened.close()


def test_a_day_is_retrained_once_at_the_commit_of_the_newest_release(journal: Journal) -> None:
    journal.record_release(a_release())
    day = retraining.claim(journal, "toy", DAY)
    assert (day.done, day.git_sha, day.as_of) == (False, a_release().source.git_sha, DAY)
    retraining.finish(journal, day, "toy-0123456789ab")
    again = retraining.claim(journal, "toy", DAY)
    assert again.done
    assert "toy-0123456789ab" in again.reason
    assert not retraining.claim(journal, "toy", date(2024, 6, 3)).done


def test_finishing_twice_writes_once(journal: Journal) -> None:
    journal.record_release(a_release())
    day = retraining.claim(journal, "toy", DAY)
    for _ in range(2):
        retraining.finish(journal, day, "toy-0123456789ab")
    assert len(journal.decisions("toy", kinds=("retrain",))) == 1


def test_today_is_today_where_the_project_says_it_is(journal: Journal) -> None:
    journal.record_release(a_release(timezone="Pacific/Kiritimati"))
    before = datetime.now(ZoneInfo("Pacific/Kiritimati")).date()
    day = retraining.claim(journal, "toy", None).as_of
    assert before <= day <= datetime.now(ZoneInfo("Pacific/Kiritimati")).date()


def test_a_project_that_was_never_released_is_explained(journal: Journal) -> None:
    journal.record_release(a_release(status="rejected"))
    with pytest.raises(ReleaseError, match="no accepted release") as error:
        retraining.claim(journal, "toy", DAY)
    assert "build/toy" in error.value.next_command
