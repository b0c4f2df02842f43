"""Who said what of which release, until when: only that opens an environment, and a page says it all."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from perennial import approval_page, approvals, source
from perennial.approval_page import Material
from perennial.approvals import Request
from perennial.errors import ProjectError, ReleaseError
from perennial.journal import Journal, open_journal
from perennial.store import Store, open_store
from perennial.values import (
    Column,
    Evaluation,
    Gate,
    GateReport,
    Metric,
    ProductionPolicy,
    Release,
    Rollouts,
    ServiceLimits,
    Source,
    Verdict,
)
from tests.factories import make_project
from tests.installations import own_settings
from tests.releases import SHA, a_release, an_artifact

ACTIVE = "toy-aaaaaaaaaaaa"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return open_journal(f"sqlite:///{tmp_path / 'journal.db'}")


def asked_for(journal: Journal, release: Release, run: str = "run", key: str = "approve-1") -> Request:
    return approvals.request(journal, release, "production", run, 1, key)


def within(hours: float) -> Release:
    """A release whose approval stays open for so long."""
    return a_release(rollout=Rollouts(production=ProductionPolicy(approval_hours=hours)))


def kinds(journal: Journal) -> list[str]:
    return [decision.kind for decision in journal.decisions("toy", "production")]


def test_an_answer_opens_production_for_these_digests_and_names_who_gave_it(journal: Journal) -> None:
    release = a_release()
    asked = asked_for(journal, release)
    review = approvals.answer(journal, release, asked, "approve", " Ada ", "looks right")
    assert (review.declined, review.reviewer, review.note) == (False, "Ada", "looks right")
    approval = journal.approval(release, "production")
    assert approval is not None
    assert approval.payload.items() >= {"reviewer": "Ada", "note": "looks right", "run": "run"}.items()
    assert journal.approval(a_release(timezone="Europe/Paris"), "production") is None
    assert journal.approval(release, "test") is None


def test_an_answer_is_written_once_however_often_its_run_is_started_again(journal: Journal) -> None:
    release = a_release()
    asked = asked_for(journal, release)
    for said in ("approve", "decline"):
        for _ in range(3):
            review = approvals.answer(journal, release, asked, said, "Ada")
    assert review.declined
    assert kinds(journal) == ["requested", "approved", "declined"]


@pytest.mark.parametrize("said", ["approve", "decline"])
def test_a_decline_outlasts_the_answer_of_a_run_that_comes_later(journal: Journal, said: Any) -> None:
    release = a_release()
    asked = asked_for(journal, release)
    approvals.review(journal, release, "production", "decline", "Grace", "not on a Friday")
    review = approvals.answer(journal, release, asked, said, "Ada")
    assert (review.declined, review.reviewer) == (True, "Grace")
    assert kinds(journal) == ["requested", "declined"]
    assert journal.approval(release, "production") is None


def test_an_approval_from_a_terminal_is_the_answer_to_a_run_that_waits(journal: Journal) -> None:
    release = a_release()
    asked = asked_for(journal, release)
    assert approvals.waiting(journal, release, "production") == [asked]
    assert approvals.waiting(journal, a_release(release_id="toy-ffffffffffff"), "production") == []
    approvals.review(journal, release, "production", "approve", "Grace")
    assert approvals.waiting(journal, release, "production") == []
    review = approvals.answer(journal, release, asked, "approve", "Ada")
    assert (review.declined, review.reviewer) == (False, "Grace")
    assert kinds(journal) == ["requested", "approved"]


@pytest.mark.parametrize("said", ["approve", "decline"])
def test_an_answer_that_comes_too_late_is_none(journal: Journal, said: Any) -> None:
    release = within(hours=1e-9)
    asked = asked_for(journal, release)
    with pytest.raises(ReleaseError, match="was open until") as error:
        approvals.answer(journal, release, asked, said, "Ada")
    assert "prefect flow-run retry run" in error.value.next_command
    assert kinds(journal) == ["requested"]
    assert approvals.waiting(journal, release, "production") == []


def test_an_answer_that_was_written_in_time_stays_one(journal: Journal) -> None:
    release = within(hours=0.5 / 3600)
    asked = asked_for(journal, release)
    approvals.answer(journal, release, asked, "approve", "Ada")
    while journal.approval(release, "production") is not None:  # nobody uses it
        time.sleep(0.05)
    assert datetime.now(UTC) > asked.expires_at
    review = approvals.answer(journal, release, asked, "approve", "Ada")  # its run is started once more
    assert not review.declined
    assert kinds(journal) == ["requested", "approved"]


@pytest.mark.parametrize("said", ["approve", "decline"])
def test_an_answer_to_a_release_that_has_changed_is_none(journal: Journal, said: Any) -> None:
    release = a_release()
    asked = asked_for(journal, release)
    changed = a_release(service=ServiceLimits(max_rows=7))
    with pytest.raises(ReleaseError, match="is not what its approval was asked for") as error:
        approvals.answer(journal, changed, asked, said, "Ada")
    assert release.digest() in str(error.value) and changed.digest() in str(error.value)
    assert kinds(journal) == ["requested"]


def test_a_review_needs_a_name(journal: Journal) -> None:
    with pytest.raises(ReleaseError, match="needs the name"):
        approvals.review(journal, a_release(), "production", "approve", "  ")
    assert kinds(journal) == []


def test_an_approval_that_nobody_uses_in_time_is_void(journal: Journal) -> None:
    approvals.review(journal, within(hours=1e-9), "production", "approve", "Ada")
    assert journal.approval(within(hours=1e-9), "production") is None


def test_a_project_that_asks_nobody_says_so_in_the_journal_once(journal: Journal) -> None:
    release = a_release(rollout=Rollouts(production=ProductionPolicy(approval="auto")))
    for _ in range(2):
        approvals.by_policy(journal, release, "production")
        approvals.by_policy(journal, release, "test")
        approvals.by_policy(journal, a_release(), "production")  # whose project wants a person
    (decision,) = journal.decisions("toy")
    assert (decision.kind, decision.environment) == ("approved", "production")
    assert decision.payload == {"digest": release.digest(), "reviewer": "policy: auto"}


def test_nobody_is_resumed_or_ended_where_prefect_is_away(journal: Journal, tmp_path: Path) -> None:
    here = own_settings(tmp_path / "home")
    journal.enable_project("toy", "/repository")
    asked = asked_for(journal, within(hours=1e-9))
    assert approvals.resume(here, asked, "approve", "Ada") is False
    assert approvals.end_expired(here, journal) == []


def test_the_page_says_what_was_measured_and_what_would_change(journal: Journal, tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    active, release = _two_releases(store)
    journal.record_release(active)
    for environment, release_id in (("production", ACTIVE), ("test", release.release_id)):
        measures = [{"name": "failures", "candidate": 0.25, "evidence": None}]
        verdict = {"verdict": "promote", "reason": "no more", "compared": True, "measures": measures}
        journal.decide(
            project="toy",
            kind="promoted",
            environment=environment,  # type: ignore[arg-type]
            release_id=release_id,
            payload={"verdict": verdict},
        )
    asked = asked_for(journal, release)
    material = approval_page.gather(journal, store, release, asked)
    assert material.active == active and material.commits is None, "there is no such repository"
    page = approval_page.page(asked, release, material._replace(commits=["abc fix <b>| it"]))
    for words in (
        "toy-0123456789ab for production?",
        approvals.moment(asked.expires_at),
        asked.release_digest[:16],
        "| ✓ | roc_auc | 0.7 | 0.6 | good \\| enough |",
        "canary verdict: **promote**: no more",
        "| name | candidate | evidence |",
        "| failures | 0.25 |  |",
        "bit for bit",
        f"`{ACTIVE}` serves there now",
        f"- **code**: `{SHA[:12]}` → `{SHA[1:13]}`, 1 new commit",
        "abc fix \\<b\\>\\| it",
        "- **data**: 100 rows, fingerprint `0123456789ab` → 120 rows",
        "- **columns**: added `y`; removed `z`; of another type `x`",
        "other pins: `numpy 2.4.5 → 2.4.6`, `scipy none → 1.17.1`",
        "| roc_auc, now | 0.6800 | 0.6600 … 0.7000 |",
        "| roc_auc, new | 0.7000 | 0.6500 … 0.7500 |",
        "| better by | +0.0200 | +0.0100 … +0.0300 |",
        "is against what serves now",
        "the same: known on (2024-06-01)",
    ):
        assert words in page, page


def test_the_commits_between_two_releases_are_named(tmp_path: Path) -> None:
    project = make_project(tmp_path / "repository")
    old = Source(project="toy", repository=project.url, git_sha=project.sha)
    for subject in ("say more", "say even more"):
        project.commit(subject, {"README.md": subject})
    new = old.model_copy(update={"git_sha": project.sha})
    named = [line.partition(" ")[2] for line in source.subjects(old, new)]
    assert named == ["say even more", "say more"]
    assert source.subjects(new, old) == [], "what it goes back to has nothing that it has not"
    with pytest.raises(ProjectError):
        source.subjects(old.model_copy(update={"git_sha": "f" * 40}), new)


def test_the_page_of_a_first_release_has_nothing_to_compare_with(journal: Journal, tmp_path: Path) -> None:
    release = a_release()
    asked = asked_for(journal, release)
    store = open_store((tmp_path / "store").as_uri())
    page = approval_page.page(asked, release, approval_page.gather(journal, store, release, asked))
    assert "Nothing serves there yet" in page and "never deployed to test" in page
    assert "100 rows" in page and "| roc_auc, new | 0.7000 | 0.6500 … 0.7500 |" in page
    assert "now |" not in page and "→" not in page


def test_a_page_is_made_of_a_release_whatever_else_cannot_be_read(journal: Journal) -> None:
    gates = GateReport(
        gates=(Gate(name="auc", verdict=Verdict.INSUFFICIENT, measured=None, threshold=0.6, reason="few"),)
    )
    none = Metric(name="roc_auc", value=None, low=None, high=None, rows=0, clusters=0)
    release = a_release(gates=gates, evaluation=Evaluation(metrics=(none,)))
    other = a_release(release_id=ACTIVE).environment.model_copy(
        update={"fingerprint": "f" * 64, "lock": an_artifact().model_copy(update={"sha256": "e" * 64})}
    )
    active = a_release(release_id=ACTIVE, environment=other)
    asked = asked_for(journal, release)
    page = approval_page.page(asked, release, Material(active, [], None, None))
    assert "? insufficient evidence" in page and "not measured" in page and "another lock" in page


def _two_releases(store: Store) -> tuple[Release, Release]:
    """What serves, and what would replace it: everything that a page speaks of is different."""
    store.put_bytes("locks/old", b"numpy==2.4.5 \\\n    --hash=sha256:aa\npandas==2.3.3\n")
    store.put_bytes("locks/new", b"numpy==2.4.6 \\\n    --hash=sha256:bb\npandas==2.3.3\nscipy==1.17.1\n")
    base = a_release()

    def environment(name: str, letter: str) -> Any:
        lock = an_artifact().model_copy(update={"uri": store.uri(f"locks/{name}"), "sha256": letter * 64})
        return base.environment.model_copy(update={"lock": lock, "fingerprint": letter * 64})

    def columns(*named: tuple[str, Any]) -> tuple[Column, ...]:
        return tuple(Column(name=name, type=kind, nullable=False) for name, kind in named)

    metric = Metric(name="roc_auc", value=0.68, low=0.66, high=0.7, rows=28, clusters=28)
    difference = Metric(name="roc_auc", value=0.02, low=0.01, high=0.03, rows=28, clusters=28)
    active = a_release(
        release_id=ACTIVE,
        environment=environment("old", "a"),
        dataset=base.dataset.model_copy(update={"columns": columns(("x", "integer"), ("z", "number"))}),
        evaluation=Evaluation(metrics=(metric,)),
        created_at=datetime(2024, 5, 1, tzinfo=UTC) + timedelta(),
    )
    (gate,) = base.gates.gates
    release = a_release(
        environment=environment("new", "b"),
        source=base.source.model_copy(update={"git_sha": SHA[1:41]}),
        dataset=base.dataset.model_copy(
            update={"rows": 120, "columns": columns(("x", "number"), ("y", "number"))}
        ),
        evaluation=base.evaluation.model_copy(
            update={"champion": ACTIVE, "champion_differences": (difference,)}
        ),
        gates=GateReport(gates=(gate.model_copy(update={"reason": "good | enough"}),)),
    )
    return active, release
