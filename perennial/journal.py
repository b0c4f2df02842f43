"""The release journal: which projects are enabled, which releases exist, what was decided. The truth.

Releases and decisions are only ever added; the database itself refuses to change or delete them. Several
processes may write at once, on SQLite (one machine) and on Postgres. What a method returned from is on disk.

A rollout holds its service's lease. A decision made under a lease that was lost is refused in the very
transaction that would write it, so a holder that slept too long can do no harm when it wakes.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.pool import NullPool

from perennial.errors import InstallationError, ProjectError, ReleaseError, RolloutError
from perennial.values import Environment, JsonObject, Release, Value

SCHEMA_VERSION = 2
BUSY_SECONDS = 30  # how long a SQLite writer waits for the others
CONNECT_SECONDS = 5
RETRY_SECONDS = 0.5
_REFUSED = re.compile("authentication failed|does not exist|permission denied")  # waiting would not help

W = TypeVar("W")

Kind = Literal[
    "requested",  # a person's approval: payload digest, expires_at
    "approved",
    "declined",
    "candidate",  # a rollout begins
    "step",  # the candidate's share from now on: payload percent, shadow
    "asked",  # not enough evidence: no share, and a person decides
    "promoted",
    "withdrawn",
    "retrain",
]

METADATA = sa.MetaData()

SCHEMA = sa.Table("perennial_schema", METADATA, sa.Column("version", sa.Integer, primary_key=True))

PROJECTS = sa.Table(
    "projects",
    METADATA,
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("repository", sa.Text, nullable=False),
    sa.Column("subdirectory", sa.Text, nullable=False),
    sa.Column("branch", sa.Text, nullable=False),
    sa.Column("enabled_at", sa.String(32), nullable=False),
)

RELEASES = sa.Table(
    "releases",
    METADATA,
    sa.Column("release_id", sa.String(53), primary_key=True),
    sa.Column("project", sa.String(40), nullable=False),
    sa.Column("status", sa.String(8), nullable=False),
    sa.Column("created_at", sa.String(32), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.Index("releases_of_project", "project", "status", "created_at"),
)

DECISIONS = sa.Table(
    "decisions",
    METADATA,
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(32), nullable=False),
    sa.Column("project", sa.String(40), nullable=False),
    sa.Column("environment", sa.String(10), nullable=True),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("release_id", sa.String(53), nullable=True),
    sa.Column("payload", sa.JSON, nullable=False),
    sa.Index("decisions_of_project", "project", "environment", "position"),
    sqlite_autoincrement=True,
)

LEASES = sa.Table(
    "leases",
    METADATA,
    sa.Column("project", sa.String(40), primary_key=True),
    sa.Column("environment", sa.String(10), primary_key=True),
    sa.Column("token", sa.String(32), nullable=False),
    sa.Column("holder", sa.JSON, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),  # seconds since the epoch
)

SQLITE_APPEND_ONLY = """
CREATE TRIGGER %(table)s_no_{verb} BEFORE {verb} ON %(table)s
BEGIN SELECT RAISE(ABORT, '%(table)s is append-only'); END"""

# A REPLACE fires neither of these two. Ignored, not aborted: recording a release again is no error.
SQLITE_NO_REPLACE = """
CREATE TRIGGER %(table)s_no_replace BEFORE INSERT ON %(table)s
WHEN EXISTS (SELECT 1 FROM %(table)s WHERE %(key)s = NEW.%(key)s)
BEGIN SELECT RAISE(IGNORE); END"""

POSTGRES_REFUSE = """
CREATE OR REPLACE FUNCTION perennial_append_only() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION USING MESSAGE = TG_TABLE_NAME || ' is append-only'; END $$"""

POSTGRES_APPEND_ONLY = """
CREATE TRIGGER %(table)s_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %(table)s
FOR EACH STATEMENT EXECUTE FUNCTION perennial_append_only()"""


class EnabledProject(Value):
    """A project that Perennial builds, and where its code is."""

    name: str
    repository: str
    subdirectory: str
    branch: str
    enabled_at: datetime


class Decision(Value):
    """One row of the journal. `position` orders them; `payload` says why, and who."""

    position: int
    at: datetime
    project: str
    environment: Environment | None
    kind: Kind
    release_id: str | None
    payload: JsonObject


class Holder(Value):
    """Who holds a lease: a process, found again by its number and the moment it started."""

    host: str
    pid: int
    started: int  # clock ticks since the machine's start
    what: str  # for the person who has to wait

    def __str__(self) -> str:
        return f"{self.what} (process {self.pid} on {self.host})"


class Lease(Value):
    """The right to change one service in one environment, until it expires or is given back."""

    project: str
    environment: Environment
    token: str


class LeaseHeld(Exception):
    """Somebody else has the lease."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(str(holder))
        self.holder = holder


class Journal:
    """The journal in one database. Cheap to open; threads may share it, a forked child may not.

    `patience_seconds`: for how long a database that is away is waited for, at each call.
    """

    def __init__(self, engine: sa.Engine, patience_seconds: float = 0.0) -> None:
        self._engine = engine
        self._patience = patience_seconds
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
        self._write(lambda connection: _create_or_check(connection, _shown(engine.url)))

    def close(self) -> None:
        self._engine.dispose()

    def enable_project(
        self, name: str, repository: str, subdirectory: str = "", branch: str = "main"
    ) -> EnabledProject:
        """Add the project, or point it at another repository or branch.

        Raises ProjectError for a name that no project can have, or a URL with a password in it: it would be
        shown in logs, releases and on pages.
        """
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,39}", name):
            raise ProjectError(f"{name!r} is no project name", "small letters, digits and dashes, 40 at most")
        if urlsplit(repository).password is not None:
            raise ProjectError(
                "the repository's URL holds a password",
                "a URL without one, and git's credential helper or an SSH key",
                "git config --global credential.helper store",
            )
        row = {"name": name, "repository": repository, "subdirectory": subdirectory, "branch": branch}
        places = {column: value for column, value in row.items() if column != "name"}
        statement = self._insert(PROJECTS).values(**row, enabled_at=_now())
        upsert = statement.on_conflict_do_update(index_elements=["name"], set_=places)
        self._write(lambda connection: connection.execute(upsert))
        return self.project(name)

    def project(self, name: str) -> EnabledProject:
        """The enabled project.

        Raises ProjectError naming the nearest one there is.
        """
        projects = {project.name: project for project in self.projects()}
        if name in projects:
            return projects[name]
        near = get_close_matches(name, projects, n=1)
        raise ProjectError(
            f"no project {name!r} is enabled" + (f"; did you mean {near[0]!r}?" if near else ""),
            expected=f"one of: {', '.join(projects) or 'none is enabled yet'}",
            next_command="make demo" if not projects else "",
        )

    def projects(self) -> list[EnabledProject]:
        rows = self._read(sa.select(PROJECTS).order_by(PROJECTS.c.name))
        return [EnabledProject(**row) for row in rows]

    def record_release(self, release: Release) -> Release:
        """Record a release once; a second time gives the one that was recorded.

        Raises ReleaseError when it was recorded with the other status: a verdict is final.
        """
        statement = self._insert(RELEASES).values(
            release_id=release.release_id,
            project=release.project,
            status=release.status,
            created_at=_text(release.created_at),
            document=release.model_dump_json(),
        )
        self._write(lambda connection: connection.execute(statement.on_conflict_do_nothing()))
        stored = self.release(release.release_id)
        assert stored is not None
        if stored.status != release.status:
            raise ReleaseError(
                f"{release.release_id} was recorded as {stored.status} on {_text(stored.created_at)}, "
                f"and is {release.status} now",
                expected="the same verdict: a release is never judged twice",
                next_command="commit a change, or build on another day's data",
            )
        return stored

    def release(self, release_id: str) -> Release | None:
        rows = self._read(sa.select(RELEASES.c.document).where(RELEASES.c.release_id == release_id))
        return Release.model_validate_json(rows[0]["document"]) if rows else None

    def releases(
        self, project: str | None = None, status: str | None = None, limit: int = 100
    ) -> list[Release]:
        """The newest `limit` releases, newest first."""
        query = sa.select(RELEASES.c.document)
        query = _where(query, {RELEASES.c.project: project, RELEASES.c.status: status})
        query = query.order_by(RELEASES.c.created_at.desc(), RELEASES.c.release_id).limit(limit)
        return [Release.model_validate_json(row["document"]) for row in self._read(query)]

    def decide(
        self,
        *,
        project: str,
        kind: Kind,
        environment: Environment | None = None,
        release_id: str | None = None,
        payload: JsonObject | None = None,
        lease: Lease | None = None,
    ) -> int:
        """Add a decision, before it is acted on. Returns its position.

        Raises RolloutError when the decision was to be made under a lease that somebody else has taken.
        """
        row = {
            "at": _now(),
            "project": project,
            "environment": environment,
            "kind": kind,
            "release_id": release_id,
            "payload": payload or {},
        }

        def write(connection: sa.Connection) -> int:
            if connection.dialect.name == "postgresql":
                # Sequences run ahead of commits: without the lock position 8 can be read before 7 exists.
                connection.exec_driver_sql("LOCK TABLE decisions IN SHARE ROW EXCLUSIVE MODE")
            if lease is not None:
                _check_lease(connection, lease)
            position = connection.execute(sa.insert(DECISIONS).values(row)).inserted_primary_key
            assert position is not None
            return int(position[0])

        return self._write(write)

    def acquire(self, project: str, environment: Environment, holder: Holder, seconds: float) -> Lease:
        """Take a service's lease for `seconds`; one that expired, or whose process is dead, is free.

        Raises LeaseHeld.
        """
        lease = Lease(project=project, environment=environment, token=uuid4().hex)

        def write(connection: sa.Connection) -> None:
            found = connection.execute(_leased(lease).with_for_update()).mappings().first()
            if found is not None:
                other = Holder.model_validate(found["holder"])
                if found["expires_at"] > time.time() and not _is_dead(other, holder.host):
                    raise LeaseHeld(other)
            row = {
                **lease.model_dump(),
                "holder": holder.model_dump(),
                "expires_at": time.time() + seconds,
            }
            upsert = self._insert(LEASES).values(row)
            changed = {name: row[name] for name in ("token", "holder", "expires_at")}
            if found is None:  # two at once: the second inserts nothing, and is told so below
                connection.execute(upsert.on_conflict_do_nothing())
            else:
                keys = ["project", "environment"]
                connection.execute(upsert.on_conflict_do_update(index_elements=keys, set_=changed))
            now = connection.execute(_leased(lease)).mappings().first()
            if now is None or now["token"] != lease.token:  # none: it was given back this very moment
                raise LeaseHeld(Holder.model_validate(now["holder"]) if now else holder)

        self._write(write)
        return lease

    def renew(self, lease: Lease, seconds: float) -> None:
        """Keep a lease for `seconds` more. Raises RolloutError when somebody else has taken it."""

        def write(connection: sa.Connection) -> None:
            _check_lease(connection, lease)
            connection.execute(
                sa.update(LEASES)
                .where(LEASES.c.token == lease.token)
                .values(expires_at=time.time() + seconds)
            )

        self._write(write)

    def give_back(self, lease: Lease) -> None:
        """End a lease; one that was lost is no error."""
        statement = sa.delete(LEASES).where(LEASES.c.token == lease.token)
        self._write(lambda connection: connection.execute(statement))

    def holder(self, project: str, environment: Environment, host: str) -> Holder | None:
        """Who changes the service right now, as far as `host` can tell."""
        lease = Lease(project=project, environment=environment, token="")
        for row in self._read(_leased(lease)):
            found = Holder.model_validate(row["holder"])
            if row["expires_at"] > time.time() and not _is_dead(found, host):
                return found
        return None

    def decisions(
        self,
        project: str | None = None,
        environment: Environment | None = None,
        kinds: tuple[Kind, ...] = (),
        last: int | None = None,
    ) -> list[Decision]:
        """Decisions in the order they were made; with `last`, so many of the newest."""
        query = sa.select(DECISIONS).order_by(DECISIONS.c.position.desc()).limit(last)
        query = _where(query, {DECISIONS.c.project: project, DECISIONS.c.environment: environment})
        if kinds:
            query = query.where(DECISIONS.c.kind.in_(kinds))
        return [Decision(**row) for row in reversed(self._read(query))]

    def active(self, project: str, environment: Environment) -> str | None:
        """The release that serves: the last promoted one. Withdrawing a candidate changes nothing here."""
        promoted = self._promoted(project, environment)
        return promoted[-1] if promoted else None

    def previous(self, project: str, environment: Environment) -> str | None:
        """The release that served before the active one: where a rollback goes."""
        promoted = self._promoted(project, environment)
        return next((r for r in reversed(promoted) if r != promoted[-1]), None)

    def champion(self, project: str) -> str | None:
        """The release a challenger is compared with: production's, before it has one test's, else None."""
        return self.active(project, "production") or self.active(project, "test")

    def approve(
        self, release: Release, environment: Environment, reviewer: str, payload: JsonObject | None = None
    ) -> int:
        """Open the way of exactly this release into this environment, in a person's name."""
        return self._review("approved", release, environment, reviewer, payload)

    def decline(
        self, release: Release, environment: Environment, reviewer: str, payload: JsonObject | None = None
    ) -> int:
        """Close it, also after an approval."""
        return self._review("declined", release, environment, reviewer, payload)

    def approval(self, release: Release, environment: Environment) -> Decision | None:
        """The approval of this release, digest for digest, unless it expired or was declined since.

        An approval that was used once stays: a way back must not wait for anybody.
        """
        digest = release.digest()
        kinds: tuple[Kind, ...] = ("approved", "declined", "promoted")
        ours = [
            d
            for d in self.decisions(release.project, environment, kinds)
            if d.release_id == release.release_id
        ]
        reviews = [d for d in ours if d.payload.get("digest") == digest]
        if not reviews or reviews[-1].kind != "approved":
            return None
        last = reviews[-1]
        expires_at = last.payload.get("expires_at")
        used = any(d.kind == "promoted" and d.position > last.position for d in ours)
        if used or expires_at is None or datetime.fromisoformat(expires_at) > datetime.now(UTC):
            return last
        return None

    def _review(
        self,
        kind: Kind,
        release: Release,
        environment: Environment,
        reviewer: str,
        payload: JsonObject | None,
    ) -> int:
        return self.decide(
            project=release.project,
            environment=environment,
            kind=kind,
            release_id=release.release_id,
            payload={**(payload or {}), "digest": release.digest(), "reviewer": reviewer},
        )

    def _promoted(self, project: str, environment: Environment) -> list[str]:
        """What served, in order."""
        decisions = self.decisions(project, environment, ("promoted",))
        return [decision.release_id for decision in decisions if decision.release_id]

    def _read(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        def read() -> list[dict[str, Any]]:
            with _explained(self._engine.url), self._engine.connect() as connection:
                return [dict(row) for row in connection.execute(query).mappings()]

        return self._patiently(read)

    def _write(self, act: Callable[[sa.Connection], W]) -> W:
        """One transaction. Done again when the database was away: `act` is only this transaction's work."""
        engine = self._engine.execution_options(writing=True)

        def write() -> W:
            with _explained(self._engine.url), engine.begin() as connection:
                return act(connection)

        return self._patiently(write)

    def _patiently(self, act: Callable[[], W]) -> W:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return act()
            except InstallationError as error:
                if not error.transient or time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)


def open_journal(database_url: str, patience_seconds: float = 0.0) -> Journal:
    """The journal at a SQLAlchemy URL, its tables made if they are missing.

    Raises InstallationError when the database is away for longer than `patience_seconds`, or of another
    version of Perennial.
    """
    try:
        url = sa.make_url(database_url)
    except (ArgumentError, ValueError):  # the latter for a port that is no number
        raise _unreadable(database_url) from None
    match url.drivername:
        case "sqlite" | "sqlite+pysqlite" if url.database and url.database != ":memory:":
            return Journal(_sqlite(url), patience_seconds)
        # An @ in the host is the rest of a password that was not escaped.
        case "postgresql" | "postgres" | "postgresql+psycopg" if "@" not in (url.host or ""):
            return Journal(_postgres(url.set(drivername="postgresql+psycopg")), patience_seconds)
    raise _unreadable(database_url)


def _unreadable(database_url: str) -> InstallationError:
    # No more of it than this: what follows may be secret.
    scheme = re.match(r"[a-z0-9+]{1,20}://", database_url)
    return InstallationError(
        f"cannot read the journal's address {scheme[0] if scheme else ''}…",
        expected="sqlite:////absolute/file.db or postgresql+psycopg://user:password@host/database",
        next_command="set PERENNIAL_DATABASE_URL, or unset it for the file in PERENNIAL_HOME",
    )


def _sqlite(url: sa.URL) -> sa.Engine:
    folder = Path(url.database or "").parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InstallationError(
            f"the journal's folder {folder} cannot be made: {error.strerror}",
            expected="a folder this user can write to",
            next_command="set PERENNIAL_HOME or PERENNIAL_DATABASE_URL",
        ) from None
    engine = sa.create_engine(url, poolclass=NullPool, connect_args={"timeout": BUSY_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver would begin transactions late, and not at all for DDL
        _use_wal(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # A reader that turns writer fails at once instead of waiting: writers say so from the start.
        writing = connection.get_execution_options().get("writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _use_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait for others here, as it does elsewhere: not for one who makes or ends the log."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _postgres(url: sa.URL) -> sa.Engine:
    timeout = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_SECONDS}
    return sa.create_engine(url, pool_pre_ping=True, pool_size=2, max_overflow=8, connect_args=timeout)


def _create_or_check(connection: sa.Connection, shown: str) -> None:
    if connection.dialect.name == "postgresql":
        # Two processes may find an empty database at once; on SQLite the second waits to begin.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('perennial_schema'))")
    tables = set(sa.inspect(connection).get_table_names())
    version = connection.execute(sa.select(SCHEMA.c.version)).scalar() if SCHEMA.name in tables else None
    if not tables & set(METADATA.tables):
        METADATA.create_all(connection)
        for table in (RELEASES, DECISIONS):
            _make_append_only(connection, table)
        connection.execute(sa.insert(SCHEMA).values(version=SCHEMA_VERSION))
    elif version == 1:  # it had no leases; nothing else has changed
        LEASES.create(connection)
        connection.execute(sa.update(SCHEMA).values(version=SCHEMA_VERSION))
    elif version != SCHEMA_VERSION:
        newer = version is not None and version > SCHEMA_VERSION
        raise InstallationError(
            f"the journal at {shown} has schema {'of no version' if version is None else version}",
            expected=f"schema {SCHEMA_VERSION}, as this version of Perennial writes it",
            next_command="git pull && make up, for the version of Perennial that wrote it"
            if newer
            else "mv .perennial .perennial.old && make demo (or another PERENNIAL_DATABASE_URL)",
        )


def _leased(lease: Lease) -> sa.Select[Any]:
    query = sa.select(LEASES).where(LEASES.c.project == lease.project)
    return query.where(LEASES.c.environment == lease.environment)


def _check_lease(connection: sa.Connection, lease: Lease) -> None:
    found = connection.execute(_leased(lease)).mappings().first()
    if found is None or found["token"] != lease.token:
        who = str(Holder.model_validate(found["holder"])) if found else "nobody any more"
        raise RolloutError(
            f"this rollout of {lease.project} to {lease.environment} has lost its lease to {who}",
            "one rollout of a service at a time",
            "see what serves: make status",
        )


def _is_dead(holder: Holder, host: str) -> bool:
    """Whether the process has ended, as far as this host can tell: of others only time does."""
    return holder.host == host and started_at(holder.pid) != holder.started


def started_at(pid: int) -> int:
    """When a process of this machine started, in clock ticks; 0 when there is none, or it is a zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state == "Z" else int(rest[18])


def _make_append_only(connection: sa.Connection, table: sa.Table) -> None:
    if connection.dialect.name == "sqlite":
        statements = [SQLITE_APPEND_ONLY.format(verb=verb) for verb in ("UPDATE", "DELETE")]
        statements.append(SQLITE_NO_REPLACE)
    else:
        statements = [POSTGRES_REFUSE, POSTGRES_APPEND_ONLY]
    (key,) = table.primary_key.columns
    for statement in statements:
        named = statement.replace("%(table)s", table.name).replace("%(key)s", key.name)
        connection.exec_driver_sql(named)


@contextmanager
def _explained(url: sa.URL) -> Iterator[None]:
    try:
        yield
    except (IntegrityError, DataError):
        raise
    except DBAPIError as error:
        reason = str(error.orig).strip().partition("\n")[0]
        if url.password:
            reason = reason.replace(str(url.password), "***")
        away = url.drivername.startswith("postgresql")
        raise InstallationError(
            f"the journal at {_shown(url)} cannot be used: {reason}",
            expected="a database that this user may read and write",
            next_command=f"pg_isready -h {url.host or 'localhost'} -p {url.port or 5432}"
            if away
            else f"ls -l {url.database}",
            transient=away and isinstance(error, OperationalError) and not _REFUSED.search(reason),
        ) from None


def _where(query: sa.Select[Any], wanted: dict[sa.Column[Any], Any]) -> sa.Select[Any]:
    return query.where(*(column == value for column, value in wanted.items() if value is not None))


def _shown(url: sa.URL) -> str:
    """The address without what is secret in it, in either place that libpq reads a password from."""
    secret = [name for name in url.query if "password" in name]
    return url.update_query_dict(dict.fromkeys(secret, "***")).render_as_string(hide_password=True)


def _now() -> str:
    return _text(datetime.now(UTC))


def _text(moment: datetime) -> str:
    """UTC, of one width, so that text sorts as time does."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return aware.astimezone(UTC).isoformat(timespec="microseconds")
