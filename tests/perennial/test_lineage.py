from __future__ import annotations

from pathlib import Path

import pytest

from perennial import lineage
from perennial.errors import ReleaseError
from perennial.journal import Journal, open_journal
from perennial.values import Package
from tests.releases import SHA, a_form, a_release

PACKAGE = Package(name="toy", version="1", sha256=SHA, filename="toy-1-py3-none-any.whl", index="packages")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return open_journal(f"sqlite:///{tmp_path / 'journal.db'}")


def test_a_release_says_how_it_is_served_and_how_exactly(journal: Journal) -> None:
    journal.record_release(a_release(serving=a_form(), package=PACKAGE))
    text = lineage.of(journal, "toy-0123456789ab")
    assert "served               compiled: every step has an exact form" in text
    assert "parity               largest difference from the original 2e-16 on 28 rows" in text
    assert "batching             yes: each row is predicted for itself" in text


def test_an_older_release_and_a_rejected_one_have_a_line_too(journal: Journal) -> None:
    journal.record_release(a_release(package=PACKAGE))
    journal.record_release(a_release(release_id="toy-ffffffffffff", status="rejected"))
    assert "served               by the original, one request at a time" in lineage.of(
        journal, "toy-0123456789ab"
    )
    assert "served               never" in lineage.of(journal, "toy-ffffffffffff")


def test_an_unknown_release_is_an_explained_error(journal: Journal) -> None:
    with pytest.raises(ReleaseError, match="no release 'toy-1'"):
        lineage.of(journal, "toy-1")
