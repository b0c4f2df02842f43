"""The journal on both databases: nothing is changed, nothing is lost, and what is wrong is explained."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from perennial.errors import InstallationError, ProjectError, ReleaseError
from perennial.journal import SCHEMA_VERSION, Journal, open_journal
from perennial.values import Release, TestReport
from tests.releases import a_release, an_artifact
from tests.services import Postgres, free_ports

PASSWORD = "hunter2-hunter2"


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Eight processes that have opened nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["perennial.journal", "tests.releases", "psycopg"])
    with ProcessPoolExecutor(8, mp_context=context) as pool:
        yield pool


@pytest.fixture
def journal(database_url: str) -> Journal:
    return open_journal(database_url)


def execute(database_url: str, *statements: str) -> None:
    """As somebody with a database client would."""
    with sa.create_engine(database_url, poolclass=sa.NullPool).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def release(number: int = 0, **changes: Any) -> Release:
    moment = datetime(2024, 6, 1, tzinfo=UTC) + timedelta(hours=number)
    return a_release(**{"release_id": f"toy-{number:012x}", "created_at": moment, **changes})


def promote(journal: Journal, number: int, environment: Any = "test", project: str = "toy") -> None:
    journal.decide(
        project=project, kind="promoted", environment=environment, release_id=release(number).release_id
    )


# Projects


def test_a_project_is_enabled_and_may_be_moved(journal: Journal) -> None:
    first = journal.enable_project("toy", "/repository")
    assert (first.repository, first.subdirectory, first.branch) == ("/repository", "", "main")
    moved = journal.enable_project("toy", "/elsewhere", "projects/toy", "develop")
    assert (moved.repository, moved.subdirectory, moved.branch) == ("/elsewhere", "projects/toy", "develop")
    assert moved.enabled_at == first.enabled_at
    journal.enable_project("another", "/repository")
    assert [project.name for project in journal.projects()] == ["another", "toy"]
    assert journal.project("toy") == moved


def test_an_unknown_project_is_refused_with_the_nearest(journal: Journal) -> None:
    with pytest.raises(ProjectError, match="no project 'toy' is enabled") as refused:
        journal.project("toy")
    assert "none is enabled yet" in refused.value.expected and refused.value.next_command == "make demo"
    journal.enable_project("flights", "/repository")
    journal.enable_project("pizzas", "/repository")
    with pytest.raises(ProjectError, match="did you mean 'flights'") as refused:
        journal.project("fligths")
    assert refused.value.expected == "one of: flights, pizzas"


# Releases


def test_a_release_is_read_back_as_it_was_recorded(journal: Journal) -> None:
    assert journal.release(release().release_id) is None
    assert journal.record_release(release()) == release() == journal.release(release().release_id)


def test_a_release_is_recorded_once_and_the_first_stays(journal: Journal) -> None:
    journal.record_release(release())
    later = release(created_at=datetime(2025, 1, 1, tzinfo=UTC), mlflow_version="7")
    assert journal.record_release(later) == release() == journal.release(release().release_id)
    assert journal.releases() == [release()]


@pytest.mark.parametrize(("first", "second"), [("accepted", "rejected"), ("rejected", "accepted")])
def test_a_verdict_is_final(journal: Journal, first: str, second: str) -> None:
    journal.record_release(release(status=first))
    with pytest.raises(ReleaseError, match=f"was recorded as {first} .* and is {second} now"):
        journal.record_release(release(status=second))
    found = journal.release(release().release_id)
    assert found is not None and found.status == first


def test_releases_are_listed_newest_first(journal: Journal) -> None:
    other = release(9, release_id="other-000000000009", project="other")
    for one in (release(2), release(0, status="rejected"), other, release(1)):
        journal.record_release(one)
    assert journal.releases() == [other, release(2), release(1), release(0, status="rejected")]
    assert journal.releases("toy", limit=2) == [release(2), release(1)]
    assert journal.releases("toy", "rejected") == [release(0, status="rejected")]
    assert journal.releases("unknown") == []


def test_newest_is_by_the_moment_and_not_by_its_spelling(journal: Journal) -> None:
    zone = datetime.fromisoformat("2024-06-01T10:00:00+09:00")  # 01:00 UTC
    journal.record_release(release(0, created_at=zone))
    journal.record_release(release(1, created_at=datetime(2024, 6, 1, 2, tzinfo=UTC)))
    journal.record_release(release(2, created_at=datetime(2024, 6, 1, 2, 0, 0, 1, tzinfo=UTC)))
    assert [one.release_id[-1] for one in journal.releases()] == ["2", "1", "0"]


# Decisions


def test_decisions_are_read_in_the_order_they_were_made(journal: Journal) -> None:
    began = datetime.now(UTC)
    payload = {"why": "ä", "numbers": [1, 2.5, None], "deep": {"yes": True}}
    first = journal.decide(
        project="toy", kind="candidate", environment="test", release_id="toy-0", payload=payload
    )
    second = journal.decide(project="other", kind="retrain")
    third = journal.decide(project="toy", kind="promoted", environment="production", release_id="toy-0")
    assert first < second < third
    decisions = journal.decisions()
    assert [decision.position for decision in decisions] == [first, second, third]
    assert decisions[0].payload == payload and decisions[1].payload == {}
    assert (decisions[1].environment, decisions[1].release_id) == (None, None)
    assert began <= decisions[0].at <= decisions[1].at <= decisions[2].at <= datetime.now(UTC)
    assert [d.position for d in journal.decisions("toy")] == [first, third]
    assert [d.position for d in journal.decisions("toy", "production")] == [third]
    assert [d.position for d in journal.decisions(kinds=("candidate", "retrain"))] == [first, second]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE decisions SET kind = 'promoted'",
        "UPDATE decisions SET position = 99",
        "DELETE FROM decisions",
        "UPDATE releases SET status = 'accepted'",
        "DELETE FROM releases",
    ],
)
def test_the_database_itself_refuses_to_change_what_was_decided(
    journal: Journal, database_url: str, statement: str
) -> None:
    journal.record_release(release(status="rejected"))
    journal.decide(project="toy", kind="withdrawn", environment="test", release_id="toy-0")
    before = (journal.decisions(), journal.releases())
    with pytest.raises(sa.exc.DBAPIError, match=r"(decisions|releases) is append-only"):
        execute(database_url, statement)
    assert (journal.decisions(), journal.releases()) == before


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.parametrize("table", ["decisions", "releases"])
def test_emptying_a_table_is_refused_too(journal: Journal, database_url: str, table: str) -> None:
    with pytest.raises(sa.exc.DBAPIError, match=f"{table} is append-only"):
        execute(database_url, f"TRUNCATE {table}")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_row_cannot_be_replaced_either(journal: Journal, database_url: str) -> None:
    # To SQLite a REPLACE is neither an UPDATE nor, for triggers, a DELETE.
    journal.record_release(release(status="rejected"))
    journal.decide(project="toy", kind="withdrawn", environment="test", release_id="toy-0")
    before = (journal.decisions(), journal.releases())
    for statement in (
        "REPLACE INTO decisions SELECT position, at, project, environment, 'promoted', release_id, payload "
        "FROM decisions",
        "REPLACE INTO releases SELECT release_id, project, 'accepted', created_at, document FROM releases",
    ):
        execute(database_url, statement)
    assert (journal.decisions(), journal.releases()) == before


# What serves


def test_what_was_promoted_last_is_active_and_the_one_before_is_previous(journal: Journal) -> None:
    assert journal.active("toy", "test") is None and journal.previous("toy", "test") is None
    promote(journal, 1)
    assert journal.active("toy", "test") == release(1).release_id and journal.previous("toy", "test") is None
    promote(journal, 2)
    assert journal.active("toy", "test") == release(2).release_id
    assert journal.previous("toy", "test") == release(1).release_id
    promote(journal, 1)  # a rollback
    assert journal.active("toy", "test") == release(1).release_id
    assert journal.previous("toy", "test") == release(2).release_id


def test_promoting_the_active_release_again_does_not_make_it_its_own_previous(journal: Journal) -> None:
    for number in (1, 2, 2, 2):
        promote(journal, number)
    assert journal.previous("toy", "test") == release(1).release_id


def test_a_candidate_that_is_withdrawn_changes_nothing(journal: Journal) -> None:
    promote(journal, 1)
    for kind in ("candidate", "withdrawn", "approved", "declined", "retrain"):
        journal.decide(project="toy", kind=kind, environment="test", release_id=release(2).release_id)
    assert journal.active("toy", "test") == release(1).release_id and journal.previous("toy", "test") is None


def test_projects_and_environments_do_not_mix(journal: Journal) -> None:
    promote(journal, 1, "test")
    promote(journal, 2, "production")
    promote(journal, 3, "test", project="other")
    assert journal.active("toy", "test") == release(1).release_id
    assert journal.active("toy", "production") == release(2).release_id
    assert journal.active("other", "production") is None and journal.active("unknown", "test") is None


def test_the_champion_is_what_production_serves_and_before_that_what_test_serves(journal: Journal) -> None:
    assert journal.champion("toy") is None
    promote(journal, 1, "test")
    assert journal.champion("toy") == release(1).release_id
    promote(journal, 2, "production")
    promote(journal, 3, "test")
    assert journal.champion("toy") == release(2).release_id


# Approvals


def test_an_approval_opens_one_environment_in_a_persons_name(journal: Journal) -> None:
    assert journal.approval(release(), "production") is None
    position = journal.approve(release(), "production", "ada", {"comment": "looks right"})
    approval = journal.approval(release(), "production")
    assert approval is not None and (approval.position, approval.kind) == (position, "approved")
    assert approval.payload == {
        "comment": "looks right",
        "reviewer": "ada",
        "digest": release().digest(),
    }
    assert journal.approval(release(), "test") is None
    assert journal.approval(release(1), "production") is None


def test_a_decline_closes_what_an_approval_opened_until_the_next(journal: Journal) -> None:
    journal.decline(release(), "production", "ada")
    assert journal.approval(release(), "production") is None
    journal.approve(release(), "production", "ada")
    assert journal.approval(release(), "production") is not None
    journal.decline(release(), "production", "grace")
    assert journal.approval(release(), "production") is None
    again = journal.approve(release(), "production", "grace")
    approval = journal.approval(release(), "production")
    assert approval is not None and (approval.position, approval.payload["reviewer"]) == (again, "grace")


def test_a_decline_elsewhere_closes_nothing_here(journal: Journal) -> None:
    journal.approve(release(), "production", "ada")
    journal.decline(release(), "test", "ada")
    journal.decline(release(1), "production", "ada")
    assert journal.approval(release(), "production") is not None


def test_an_approval_is_of_these_very_digests(journal: Journal) -> None:
    journal.approve(release(), "production", "ada")
    altered = release(tests=TestReport(passed=0, skipped=3, report=an_artifact("tests.xml")))
    assert altered.release_id == release().release_id
    assert journal.approval(altered, "production") is None
    assert journal.approval(release(), "production") is not None


def test_a_payload_cannot_name_another_digest_or_reviewer(journal: Journal) -> None:
    journal.approve(release(), "production", "ada", {"digest": release(1).digest(), "reviewer": "nobody"})
    assert journal.approval(release(1), "production") is None
    approval = journal.approval(release(), "production")
    assert approval is not None and approval.payload["reviewer"] == "ada"


# Once


# Many processes, and sudden ends


def decide_often(database_url: str, writer: int, count: int) -> list[int]:
    journal = open_journal(database_url)
    return [
        journal.decide(project="toy", kind="candidate", payload={"writer": writer, "number": number})
        for number in range(count)
    ]


def record(database_url: str, writer: int) -> str | None:
    return open_journal(database_url).record_release(release(mlflow_version=str(writer))).mlflow_version


def test_eight_processes_open_an_empty_database_at_once_and_lose_no_decision(
    database_url: str, processes: ProcessPoolExecutor
) -> None:
    written = [processes.submit(decide_often, database_url, writer, 50) for writer in range(8)]
    positions = [position for one in written for position in one.result()]
    assert len(set(positions)) == 400
    decisions = open_journal(database_url).decisions("toy")
    assert [d.position for d in decisions] == sorted(positions)
    for writer in range(8):
        mine = [d.payload["number"] for d in decisions if d.payload["writer"] == writer]
        assert mine == list(range(50))
    assert [d.at for d in decisions if d.payload["writer"] == 0] == sorted(
        d.at for d in decisions if d.payload["writer"] == 0
    )


def test_eight_processes_that_record_one_release_agree_on_the_first(
    database_url: str, processes: ProcessPoolExecutor
) -> None:
    said = [processes.submit(record, database_url, writer) for writer in range(8)]
    versions = {one.result() for one in said}
    assert len(versions) == 1
    assert [one.mlflow_version for one in open_journal(database_url).releases()] == list(versions)


def test_a_reader_never_sees_a_position_before_all_earlier_ones(
    database_url: str, processes: ProcessPoolExecutor
) -> None:
    journal = open_journal(database_url)
    written = [processes.submit(decide_often, database_url, writer, 40) for writer in range(3)]
    seen: list[int] = []
    while not all(one.done() for one in written):
        now = [d.position for d in journal.decisions()]
        assert now[: len(seen)] == seen
        seen = now
    assert [len(one.result()) for one in written] == [40] * 3


WRITER = """
import sys
from perennial.journal import open_journal
journal = open_journal(sys.argv[1])
while True:
    print(journal.decide(project="toy", kind="candidate"), flush=True)
"""


def test_a_writer_that_is_killed_loses_nothing_that_was_committed(database_url: str) -> None:
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, database_url], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline() for _ in range(20)]
            writer.send_signal(signal.SIGKILL)
            said += [line for line in writer.stdout if line.endswith("\n")]
        journal = open_journal(database_url)
        positions = [d.position for d in journal.decisions()]
        assert {int(line) for line in said} <= set(positions)
        assert journal.decide(project="toy", kind="candidate") > positions[-1]


# When the database is not as it should be


def test_a_database_that_is_opened_again_has_everything(database_url: str) -> None:
    first = open_journal(database_url)
    first.record_release(release())
    promote(first, 0)
    first.close()
    again = open_journal(database_url)
    assert again.releases() == [release()] and again.active("toy", "test") == release().release_id


@pytest.mark.parametrize(
    ("found", "words", "next_words"),
    [
        (0, "has schema 0", "another PERENNIAL_DATABASE_URL"),
        (SCHEMA_VERSION + 1, "has schema 3", "git pull"),
    ],
)
def test_the_schema_of_another_version_is_explained_and_left_alone(
    database_url: str, found: int, words: str, next_words: str
) -> None:
    promote(open_journal(database_url), 0)
    execute(database_url, f"UPDATE perennial_schema SET version = {found}")
    with pytest.raises(InstallationError, match=words) as refused:
        open_journal(database_url)
    assert f"schema {SCHEMA_VERSION}" in refused.value.expected and next_words in refused.value.next_command
    execute(database_url, f"UPDATE perennial_schema SET version = {SCHEMA_VERSION}")
    assert open_journal(database_url).active("toy", "test") == release().release_id


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("DROP TABLE perennial_schema", "has schema of no version"),
        ("DELETE FROM perennial_schema", "has schema of no version"),
    ],
)
def test_tables_of_no_version_are_not_touched(database_url: str, statement: str, words: str) -> None:
    open_journal(database_url)
    execute(database_url, statement)
    with pytest.raises(InstallationError, match=words):
        open_journal(database_url)


def test_a_database_that_others_use_too_is_welcome(database_url: str) -> None:
    execute(database_url, "CREATE TABLE alembic_version (version VARCHAR(32))")
    promote(open_journal(database_url), 0)
    assert open_journal(database_url).active("toy", "test") == release().release_id


def test_postgres_that_is_away_is_told_in_time_with_the_password_masked() -> None:
    (port,) = free_ports(1)
    began = time.monotonic()
    with pytest.raises(InstallationError, match="cannot be used") as refused:
        open_journal(f"postgresql+psycopg://user:{PASSWORD}@127.0.0.1:{port}/journal")
    assert time.monotonic() - began < 10
    assert f"postgresql+psycopg://user:***@127.0.0.1:{port}/journal" in refused.value.found
    assert refused.value.next_command == f"pg_isready -h 127.0.0.1 -p {port}"
    assert PASSWORD not in str(refused.value)
    assert refused.value.__suppress_context__


def test_postgres_that_says_nothing_is_told_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://user@127.0.0.1:{silent.getsockname()[1]}/journal?connect_timeout=2"
        began = time.monotonic()
        with pytest.raises(InstallationError, match="timeout"):
            open_journal(url)
        assert time.monotonic() - began < 10


def test_postgres_may_restart_and_nothing_that_was_committed_is_lost(postgres_server: Postgres) -> None:
    journal = open_journal(postgres_server.new_schema(PASSWORD))
    positions = [journal.decide(project="toy", kind="candidate") for _ in range(20)]
    postgres_server.kill()
    try:
        for use in (journal.decisions, lambda: journal.decide(project="toy", kind="candidate")):
            with pytest.raises(InstallationError, match="cannot be used") as refused:
                use()
            assert PASSWORD not in str(refused.value)
    finally:
        postgres_server.start()
    assert [d.position for d in journal.decisions()] == positions
    assert journal.decide(project="toy", kind="candidate") > positions[-1]


def test_a_restart_that_nobody_noticed_is_no_error(postgres_server: Postgres) -> None:
    journal = open_journal(postgres_server.new_schema())
    position = journal.decide(project="toy", kind="candidate")
    postgres_server.kill()
    postgres_server.start()
    assert journal.decide(project="toy", kind="candidate") > position


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_way_to_write_a_postgres_address_is_understood(postgres_server: Postgres, scheme: str) -> None:
    url = postgres_server.new_schema().replace("postgresql+psycopg", scheme)
    promote(open_journal(url), 0)
    assert open_journal(url).active("toy", "test") == release().release_id


def test_a_database_that_does_not_exist_is_named(postgres_server: Postgres) -> None:
    with pytest.raises(InstallationError, match='"nowhere" does not exist') as refused:
        open_journal(postgres_server.url("nowhere", PASSWORD))
    assert PASSWORD not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://user:hunter2-hunter2@host/database",
        "nonsense://user:hunter2-hunter2@host",
        "user:hunter2-hunter2@host/database",
        "hunter2-hunter2",
        "postgresql://user:p@hunter2-hunter2@host/database",
        "postgresql://host:hunter2-hunter2/database",
    ],
)
def test_an_address_that_names_no_journal_is_refused_and_its_secret_not_repeated(url: str) -> None:
    with pytest.raises(InstallationError, match="cannot read the journal's address") as refused:
        open_journal(url)
    assert "sqlite:////" in refused.value.expected and "postgresql+psycopg://" in refused.value.expected
    assert "PERENNIAL_DATABASE_URL" in refused.value.next_command
    assert "hunter2" not in str(refused.value)


def test_a_password_among_the_options_is_masked_too() -> None:
    (port,) = free_ports(1)
    with pytest.raises(InstallationError, match="cannot be used") as refused:
        open_journal(f"postgresql://user@127.0.0.1:{port}/journal?password={PASSWORD}&sslmode=disable")
    assert PASSWORD not in str(refused.value) and "sslmode=disable" in refused.value.found


def test_a_file_that_is_no_database_is_explained(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database, and longer than a header of sixteen bytes" * 20)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, words in (
        ("journal.db", "not a database"),
        ("file/journal.db", "cannot be made"),
        ("folder", "open"),
    ):
        with pytest.raises(InstallationError, match=words) as refused:
            open_journal(f"sqlite:///{tmp_path / path}")
        assert str(tmp_path) in str(refused.value)


def test_the_folder_of_a_new_sqlite_file_is_made(tmp_path: Path) -> None:
    promote(open_journal(f"sqlite:///{tmp_path / 'new' / 'folder' / 'journal.db'}"), 0)
    with sqlite3.connect(tmp_path / "new" / "folder" / "journal.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_writer_waits_for_another_instead_of_failing(tmp_path: Path) -> None:
    journal = open_journal(f"sqlite:///{tmp_path / 'journal.db'}")
    other = sqlite3.connect(tmp_path / "journal.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(journal.decide, project="toy", kind="candidate")
        time.sleep(0.3)
        assert not waiting.done() and journal.decisions() == []
        other.execute("COMMIT")
        assert waiting.result(10) == 1
    other.close()


def test_a_repository_s_password_is_refused_and_not_repeated(journal: Journal) -> None:
    with pytest.raises(ProjectError) as error:
        journal.enable_project("toy", "https://user:hush@git.example/toy.git")
    assert "hush" not in str(error.value)
    assert journal.enable_project("toy", "git@git.example:toy.git").repository == "git@git.example:toy.git"


@pytest.mark.parametrize("name", ["Toy", "", "../toy", "a" * 41, "7up"])
def test_a_name_that_no_project_can_have_is_refused(journal: Journal, name: str) -> None:
    with pytest.raises(ProjectError, match="is no project name"):
        journal.enable_project(name, "/repository")
