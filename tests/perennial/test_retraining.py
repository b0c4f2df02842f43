from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
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
    day = retraining.claim(journal, "toy", "test", DAY)
    assert (day.done, day.git_sha, day.as_of) == (False, a_release().source.git_sha, DAY)
    retraining.finish(journal, day, "toy-0123456789ab")
    again = retraining.claim(journal, "toy", "test", DAY)
    assert again.done
    assert "toy-0123456789ab" in again.reason
    assert not retraining.claim(journal, "toy", "test", date(2024, 6, 3)).done


def test_finishing_twice_writes_once(journal: Journal) -> None:
    journal.record_release(a_release())
    day = retraining.claim(journal, "toy", "test", DAY)
    for _ in range(2):
        retraining.finish(journal, day, "toy-0123456789ab")
    assert len(journal.decisions("toy", kinds=("retrain",))) == 1


def test_today_is_today_where_the_project_says_it_is(journal: Journal) -> None:
    journal.record_release(a_release(timezone="Pacific/Kiritimati"))
    before = datetime.now(ZoneInfo("Pacific/Kiritimati")).date()
    day = retraining.claim(journal, "toy", "test", None).as_of
    assert before <= day <= datetime.now(ZoneInfo("Pacific/Kiritimati")).date()


def test_a_project_that_was_never_released_is_explained(journal: Journal) -> None:
    journal.record_release(a_release(status="rejected"))
    with pytest.raises(ReleaseError, match="no accepted release") as error:
        retraining.claim(journal, "toy", "test", DAY)
    assert "build/toy" in error.value.next_command


def test_after_a_rollback_it_is_the_commit_that_serves(journal: Journal) -> None:
    good, bad = (
        a_release(),
        a_release(
            release_id="toy-bad000000000",
            source=a_release().source.model_copy(update={"git_sha": "b" * 40}),
            created_at=datetime(2024, 7, 1, tzinfo=UTC),
        ),
    )
    for release in (good, bad):
        journal.record_release(release)
    for release in (good, bad, good):
        journal.decide(project="toy", kind="promoted", environment="test", release_id=release.release_id)
    assert retraining.claim(journal, "toy", "test", DAY).git_sha == good.source.git_sha


def test_what_was_accepted_but_never_deployed_does_not_go_live_by_itself(journal: Journal) -> None:
    experiment = a_release(
        release_id="toy-ee0000000000",
        source=a_release().source.model_copy(update={"git_sha": "e" * 40}),
        created_at=datetime(2024, 7, 1, tzinfo=UTC),
    )
    for release in (a_release(), experiment):
        journal.record_release(release)
    journal.decide(project="toy", kind="promoted", environment="test", release_id=a_release().release_id)
    assert retraining.claim(journal, "toy", "test", DAY).git_sha == a_release().source.git_sha
