"""Where a rollback leads, and what is said where there is no way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perennial import leases, lineage, rollback
from perennial.errors import ProjectError, ReleaseError
from perennial.journal import Journal, open_journal
from perennial.values import Environment
from perennial.way_back import earlier
from tests.installations import own_settings
from tests.releases import a_release


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = open_journal(f"sqlite:///{tmp_path / 'journal.db'}")
    journal.enable_project("toy", "/repository")
    for letter in "abcd":
        journal.record_release(a_release(release_id=toy(letter)))
    return journal


def toy(letter: str) -> str:
    return f"toy-{letter * 12}"


def decide(
    journal: Journal, kind: Any, letter: str, environment: Environment = "test", **payload: Any
) -> None:
    journal.decide(project="toy", environment=environment, kind=kind, release_id=toy(letter), payload=payload)


@pytest.mark.parametrize(
    ("history", "way"),
    [
        ("", ""),
        ("a", ""),
        ("abc", "ba"),
        ("aab", "a"),
        ("aba", "b"),  # `a` was deployed again: what served in between was no mistake
        ("abc<b", "a"),
        ("abc<b<a", ""),
        ("abc<a", ""),  # past `b`, which nobody wanted then either
        ("abc<bd", "ba"),
        ("ab<ab", "a"),
        ("ab<a<b", "a"),  # and forward again, by name
    ],
)
def test_a_rollback_leads_to_what_served_before_and_was_not_rolled_back_from(
    journal: Journal, history: str, way: str
) -> None:
    for letter, sign in zip(history, f" {history}", strict=False):
        if letter != "<":
            decide(journal, "promoted", letter, **({"rollback_of": "any"} if sign == "<" else {}))
    assert earlier(journal.decisions("toy", "test", ("promoted",))) == [toy(letter) for letter in way]


def test_users_are_in_production_once_something_serves_there(journal: Journal) -> None:
    decide(journal, "promoted", "a")
    assert rollback.default_environment(journal, "toy") == "test"
    decide(journal, "promoted", "a", "production")
    assert rollback.default_environment(journal, "toy") == "production"
    with pytest.raises(ProjectError, match="did you mean 'toy'"):
        rollback.default_environment(journal, "toyy")


def test_without_an_earlier_release_the_error_says_what_there_is_instead(journal: Journal) -> None:
    with pytest.raises(ReleaseError, match="toy has no earlier release in test") as nothing:
        rollback.find(journal, "toy", "test", None)
    assert nothing.value.next_command == "prefect deployment run 'deploy/toy' -p environment=test"
    decide(journal, "promoted", "a")
    decide(journal, "promoted", "b")
    assert rollback.find(journal, "toy", "test", None).release_id == toy("a")
    decide(journal, "promoted", "a", rollback_of=toy("b"))
    with pytest.raises(
        ReleaseError, match="no earlier release in test that was not rolled back"
    ) as none_good:
        rollback.find(journal, "toy", "test", None)
    assert none_good.value.next_command == (
        f"python -m perennial rollback toy --environment test --to {toy('b')}"
    )
    assert rollback.find(journal, "toy", "test", toy("b")).release_id == toy("b"), "by name it may be"


def test_a_release_that_never_served_there_is_for_a_deploy_to_bring(journal: Journal) -> None:
    decide(journal, "promoted", "a")
    decide(journal, "promoted", "b", "production")
    with pytest.raises(ReleaseError, match=f"{toy('b')} has never served in test") as refused:
        rollback.find(journal, "toy", "test", toy("b"))
    assert refused.value.expected == f"one of: {toy('a')}"
    assert refused.value.next_command == (
        f"prefect deployment run 'deploy/toy' -p release_id={toy('b')} -p environment=test"
    )
    with pytest.raises(ReleaseError, match="toy has no release 'toy-0'"):
        rollback.find(journal, "toy", "test", "toy-0")
    journal.record_release(a_release(release_id=toy("f"), status="rejected"))
    with pytest.raises(ReleaseError, match=f"{toy('f')} was rejected"):
        rollback.find(journal, "toy", "test", toy("f"))


def test_the_overview_says_who_serves_where_back_leads_and_what_is_under_way(
    journal: Journal, tmp_path: Path
) -> None:
    here = own_settings(tmp_path)
    assert "toy              test         nothing deployed" in lineage.overview(journal, here)
    decide(journal, "promoted", "a")
    decide(journal, "promoted", "b", keep_warm_seconds=3600, probation_seconds=600)
    text = lineage.overview(journal, here)
    assert f"toy              test         {toy('b')}                 {here.router_url('test')}/toy" in text
    assert f"                 way back     {toy('a')}, kept warm until 20" in text
    assert "                 probation    until 20" in text and " UTC" in text
    assert "candidate" not in text and "rollout" not in text
    decide(journal, "candidate", "c")
    assert f"candidate    {toy('c')}, without traffic\n" in lineage.overview(journal, here)
    decide(journal, "step", "c", percent=0)
    assert f"candidate    {toy('c')}, standing by\n" in lineage.overview(journal, here)
    decide(journal, "step", "c", percent=25)
    assert f"candidate    {toy('c')}, with 25 % of the traffic\n" in lineage.overview(journal, here)
    decide(journal, "step", "c", shadow_percent=50)
    assert "with a copy of 50 % of the requests\n" in lineage.overview(journal, here)
    decide(journal, "asked", "c", reason="12 requests", expires_at="2020-01-01T00:00:00+00:00")
    late = "without traffic: 12 requests; a person decides, and is late"
    assert f"candidate    {toy('c')}, {late}\n" in lineage.overview(journal, here)
    with leases.briefly(journal, "toy", "test", "deploy toy to test"):
        assert "rollout      deploy toy to test (process " in lineage.overview(journal, here)
