"""The node's tables and how they are reached: SQLite on one machine, PostgreSQL for several, by the same statements.

What the rows mean to jobs, series and deliveries is told where those live; no other place writes them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import medseg

SCHEMA_VERSION = 2
# by the version before it, what makes each one
UPGRADES = {1: ("ALTER TABLE parts ADD COLUMN trouble TEXT",)}
# so long a statement waits for another process to finish writing
BUSY_S = 60.0
# who holds rows and says nothing for so long has been stopped, or its machine has: PostgreSQL lets go of them
SILENT_S = 45.0
# beside those that are kept: each association has one while its file is written down
MOST_CONNECTIONS = 60
ID = sa.String(32)

metadata = sa.MetaData()

about = sa.Table("about", metadata, sa.Column("schema_version", sa.Integer, nullable=False))

# what the folder of the node is known by
identity = sa.Table("identity", metadata, sa.Column("node_id", ID, nullable=False))

series = sa.Table(
    "series",
    metadata,
    sa.Column("id", ID, primary_key=True),
    sa.Column("study_id", ID, nullable=False, index=True),
    sa.Column("series_uid", sa.String(64), nullable=False),
    sa.Column("study_uid", sa.String(64), nullable=False),
    # of a patient: shown to those who are logged in, and nowhere else
    sa.Column("patient_name", sa.Text, nullable=False),
    sa.Column("patient_id", sa.Text, nullable=False),
    sa.Column("accession_number", sa.Text, nullable=False),
    sa.Column("study_date", sa.Text, nullable=False),
    sa.Column("study_description", sa.Text, nullable=False),
    sa.Column("series_description", sa.Text, nullable=False),
    sa.Column("protocol_name", sa.Text, nullable=False),
    sa.Column("modality", sa.Text, nullable=False),
    sa.Column("body_part", sa.Text, nullable=False),
    sa.Column("thickness_mm", sa.Float),
    sa.Column("is_image", sa.Boolean, nullable=False),
    sa.Column("sent_by", sa.Text, nullable=False),
    # receiving, complete
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("images", sa.Integer, nullable=False),
    sa.Column("expected", sa.Integer),
    sa.Column("asked_at", sa.Float),
    # whether completeness is taken for granted: no count was told, or fewer came
    sa.Column("assumed", sa.Boolean, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    # which rules took it, or why none did
    sa.Column("selection", sa.Text, nullable=False),
    sa.Column("first_at", sa.Float, nullable=False),
    sa.Column("last_at", sa.Float, nullable=False, index=True),
)

instances = sa.Table(
    "instances",
    metadata,
    # of the content: two files with one SOP Instance UID are two rows, of which the later one is a copy
    sa.Column("id", ID, primary_key=True),
    sa.Column("sop_id", ID, nullable=False, index=True),
    sa.Column("series_id", ID, sa.ForeignKey("series.id"), nullable=False, index=True),
    sa.Column("sop_instance_uid", sa.String(64), nullable=False),
    sa.Column("sop_class_uid", sa.String(64), nullable=False),
    sa.Column("transfer_syntax_uid", sa.String(64), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    # below the node's folder
    sa.Column("file", sa.Text, nullable=False),
    sa.Column("is_copy", sa.Boolean, nullable=False),
    # the first revision of the series that has it
    sa.Column("revision", sa.Integer),
    sa.Column("received_at", sa.Float, nullable=False),
    # when housekeeping removed the file; None: it is there
    sa.Column("gone_at", sa.Float),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", ID, primary_key=True),
    sa.Column("series_id", ID, sa.ForeignKey("series.id"), nullable=False, index=True),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("rule", sa.String(64), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("model_sha256", sa.String(64), nullable=False),
    # what of the rule a result depends on
    sa.Column("order", sa.JSON, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    # queued, running, done, dead, superseded (by a later revision of the series)
    sa.Column("state", sa.String(16), nullable=False),
    # selected, checked, inferred, encoded, published, confirmed
    sa.Column("step", sa.String(16), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    # how often its worker was gone
    sa.Column("losses", sa.Integer, nullable=False),
    sa.Column("not_before", sa.Float, nullable=False),
    sa.Column("worker", sa.Text),
    sa.Column("token", ID),
    sa.Column("lease_until", sa.Float),
    sa.Column("reason", sa.Text, nullable=False),
    # seconds by stage, quality by label, warnings, files by format
    sa.Column("result", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Index("jobs_to_claim", "state", "not_before"),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("job_id", ID, sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("destination", sa.String(64), primary_key=True),
    sa.Column("format", sa.String(16), primary_key=True),
    # waiting, sending, sent (commitment is waited for), done, dead, superseded
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("first_tried_at", sa.Float),
    sa.Column("not_before", sa.Float, nullable=False),
    sa.Column("worker", sa.Text),
    sa.Column("token", ID),
    sa.Column("lease_until", sa.Float),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("sent_at", sa.Float),
    sa.Column("confirmed_at", sa.Float),
    sa.Index("deliveries_to_claim", "state", "not_before"),
)

# how the peers are that results go to; whoever writes deliveries of one locks its row here first
destinations = sa.Table(
    "destinations",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    # in a row; 0: it works
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("failed_at", sa.Float),
    # until then nothing is sent there
    sa.Column("not_before", sa.Float, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

# storage commitment that was asked for and not yet confirmed, by request
commitments = sa.Table(
    "commitments",
    metadata,
    sa.Column("transaction_uid", sa.String(64), primary_key=True),
    sa.Column("sop_instance_uid", sa.String(64), primary_key=True),
    sa.Column("job_id", ID, sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("destination", sa.String(64), nullable=False),
    sa.Column("format", sa.String(16), nullable=False),
    sa.Column("asked_at", sa.Float, nullable=False),
    sa.Index("commitments_of", "job_id", "destination", "format"),
)

refusals = sa.Table(
    "refusals",
    metadata,
    sa.Column("id", ID, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("sent_by", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    # below the node's folder; empty where nothing was kept
    sa.Column("file", sa.Text, nullable=False),
)

parts = sa.Table(
    "parts",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    # gateway, worker, web
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
    # what keeps it from its work, in words
    sa.Column("trouble", sa.Text),
)

counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)


# what is counted for good, beside what the rows tell
COUNTED = ("received", "received_again", "received_copies", "refused", "refused_no_room", "associations_refused")


def count(connection: sa.Connection, name: str, *, by: int = 1) -> None:
    """Adds to a counter of `COUNTED`."""
    connection.execute(counters.update().where(counters.c.name == name).values(value=counters.c.value + by))


class DatabaseDownError(medseg.ConfigError):
    """The database does not answer, which passes by itself where it only starts later than the node."""


class Database:
    """Connections to the node's tables, for threads of one process."""

    def __init__(self, url: str, password: str | None = None) -> None:
        self.url = sa.make_url(url)
        if password is not None:
            self.url = self.url.set(password=password)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.url.drivername == "postgresql":
            self.url = self.url.set(drivername="postgresql+pg8000")
        # parameters are a patient's data: they stand in no text of an error
        common: dict[str, Any] = {
            "hide_parameters": True,
            "max_overflow": MOST_CONNECTIONS,
            "pool_timeout": BUSY_S,
            "connect_args": {"timeout": BUSY_S},
        }
        if self.is_sqlite:
            self._engine = sa.create_engine(self.url, **common)
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        else:
            self._engine = sa.create_engine(self.url, pool_pre_ping=True, pool_recycle=600, **common)

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is there after a power cut once the block has ended, or not at all.

        In SQLite writers wait for each other; in PostgreSQL rows are locked by who needs them, and by a process that
        stands still in the middle for `SILENT_S` seconds at most: then it has lost its transaction.
        """
        with self._engine.begin() as connection:
            if not self.is_sqlite:
                silent = sa.text(f"SET LOCAL idle_in_transaction_session_timeout = {round(1000 * SILENT_S)}")
                connection.execute(silent)
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that nothing is written with; it waits for no writer."""
        with self._engine.connect().execution_options(reading=True) as connection:
            yield connection

    def now(self, connection: sa.Connection) -> float:
        """Seconds since 1970 by the clock that all processes share: that of the database, or of this one machine."""
        if self.is_sqlite:
            return time.time()
        return float(connection.scalar(sa.select(sa.func.extract("epoch", sa.func.clock_timestamp()))) or 0.0)

    def lock_all(self, connection: sa.Connection) -> None:
        """Until the transaction ends, no other part of the node starts: several may at once."""
        if not self.is_sqlite:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7235710)"))

    def close(self) -> None:
        """All connections are closed."""
        self._engine.dispose()

    def prepare(self) -> None:
        """Makes what tables are missing. Raises `ConfigError` where another version of the node made them."""
        try:
            with self.writing() as connection:
                self.lock_all(connection)
                metadata.create_all(connection)
                found = connection.scalar(sa.select(about.c.schema_version))
                if found is None:
                    connection.execute(about.insert().values(schema_version=SCHEMA_VERSION))
                while found in UPGRADES:
                    for statement in UPGRADES[found]:
                        connection.exec_driver_sql(statement)
                    found += 1
                    connection.execute(about.update().values(schema_version=found))
                there = set(connection.scalars(sa.select(counters.c.name)))
                for name in COUNTED:
                    if name not in there:
                        connection.execute(counters.insert().values(name=name, value=0))
        except sa.exc.SQLAlchemyError as error:
            # also where the address or the password is wrong: a database that starts says no better
            is_down = isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError))
            raise (DatabaseDownError if is_down else medseg.ConfigError)(
                f"database {self.url.render_as_string()}: cannot be used ({_first_line(error)}); "
                "check that it runs and that its user may make tables"
            ) from error
        if found not in (None, SCHEMA_VERSION):
            raise medseg.ConfigError(
                f"database {self.url.render_as_string()}: tables of version {found} found, expected {SCHEMA_VERSION}; "
                "run the version of medseg that made them, or give a new database"
            )


def open_database(url: str | None, folder: Path, password_file: Path | None = None) -> Database:
    """The database at `url`, or SQLite in `folder`; its tables are there. Raises `ConfigError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        password = None if password_file is None else password_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise medseg.ConfigError(
            f"{error.filename}: {error.strerror}; change `folder` or `database_password_file`"
        ) from error
    try:
        database = Database(url or f"sqlite:///{folder / 'node.sqlite'}", password)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError) as error:
        raise medseg.ConfigError(
            "database: no such kind of address, expected postgresql://user@host/name, or none for SQLite"
        ) from error
    database.prepare()
    return database


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0][:200]


def _prepare_sqlite(connection: sa.engine.interfaces.DBAPIConnection, _: object) -> None:
    # transactions are begun below, not by the driver
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # a commit is on the disk before it is told
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
