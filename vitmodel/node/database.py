"""The node's database: SQLite in the node's folder, or a PostgreSQL server for several machines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from vitmodel.errors import DiskFullError, UsageError, VitmodelError
from vitmodel.node.models import Base
from vitmodel.utils import is_full_disk

BUSY_SECONDS = 30
"""How long a transaction waits for another one on SQLite."""
MIGRATION_LOCK = 7_486_117
"""Number of the PostgreSQL advisory lock that one process holds while it creates or migrates the tables."""


def add_worklist_columns(connection: Connection) -> None:
    """Add what the worklist filters and shows to the jobs of version 1."""
    for column in (
        "scored_at DOUBLE PRECISION",
        "status VARCHAR(16) DEFAULT '' NOT NULL",
        "machines TEXT DEFAULT '' NOT NULL",
    ):
        connection.execute(text(f"ALTER TABLE jobs ADD COLUMN {column}"))
    connection.execute(text("CREATE INDEX ix_jobs_study_version ON jobs (study_uid, version)"))
    connection.execute(text("CREATE INDEX ix_jobs_machines ON jobs (machines)"))
    connection.execute(text("CREATE INDEX ix_studies_arrival ON studies (last_arrival, study_uid)"))
    rows = connection.execute(text("SELECT id, scores FROM jobs WHERE scores != ''")).all()
    values = [{"id": number, "status": worst_status(json.loads(scores))} for number, scores in rows]
    if values:
        connection.execute(text("UPDATE jobs SET status = :status, scored_at = updated_at WHERE id = :id"), values)


def worst_status(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return refused, warned or ok: the worst status of the images and breasts of a job."""
    found = {row["status"] for rows in scores.values() for row in rows}
    return next((status for status in ("refused", "warned") if status in found), "ok")


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (add_worklist_columns,)
"""The function at position N - 1 changes the tables of version N into those of version N + 1."""


class Database:
    """The engine and its transactions.

    Args:
        url: `sqlite:///PATH` or `postgresql+pg8000://USER@HOST/NAME`; `postgresql://` means the latter.

    Raises:
        UsageError: The URL is wrong or its driver is not installed.
        VitmodelError: The database cannot be reached, or a newer version made it.
    """

    def __init__(self, url: str) -> None:
        if url.startswith("postgresql://"):
            url = url.replace("postgresql://", "postgresql+pg8000://", 1)
        try:
            self.engine = create_engine(url, pool_pre_ping=True)
        except ImportError as error:
            raise UsageError(f"database: the driver {error.name} is not installed: pip install {error.name}") from error
        except SQLAlchemyError as error:
            raise UsageError("database: is no URL; write sqlite:///PATH or postgresql://USER@HOST/NAME") from error
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        if not self.is_sqlite and self.engine.dialect.name != "postgresql":
            raise UsageError(f"database: {self.engine.dialect.name} is not supported; use sqlite or postgresql")
        if self.is_sqlite:
            _configure_sqlite(self.engine)
        self._reading = self.engine.execution_options(reading=True)
        try:
            self.migrate()
        except SQLAlchemyError as error:
            # The driver's text may contain the password of the URL.
            shown = self.engine.url.render_as_string(hide_password=True)
            raise VitmodelError(
                f"database: cannot open {shown} ({type(error).__name__}); check that it exists and can be written"
            ) from error

    @classmethod
    def in_folder(cls, folder: Path) -> Database:
        """Return the SQLite database of a node's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(f"sqlite:///{folder / 'node.sqlite'}")

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """Provide a transaction that writes; it is committed at the end of the block, or rolled back.

        Raises:
            DiskFullError: There is no space for the database.
        """
        try:
            with Session(self.engine, expire_on_commit=False) as session, session.begin():
                yield session
        except OperationalError as error:
            if is_full_disk(error):
                raise DiskFullError("disk: the database cannot be written; free some space") from error
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Provide a transaction that only reads, which never waits for one that writes."""
        with Session(self._reading, expire_on_commit=False) as session:
            yield session

    def migrate(self) -> None:
        """Create the tables, or bring those of an older version up to date, in one transaction.

        Raises:
            VitmodelError: A newer version of vitmodel made the tables.
        """
        with self.engine.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            version = 0
            if inspect(connection).has_table("schema_version"):
                version = connection.execute(text("SELECT version FROM schema_version")).scalar_one()
            if version > _schema_version():
                raise VitmodelError(
                    f"database: its tables have version {version}, newer than {_schema_version()} of this vitmodel; "
                    "install the newer vitmodel again, or restore the back-up of before the upgrade"
                )
            if version == 0:
                Base.metadata.create_all(connection)
                connection.execute(text("INSERT INTO schema_version VALUES (:version)"), {"version": _schema_version()})
                return
            for migration in MIGRATIONS[version - 1 :]:
                migration(connection)
            Base.metadata.create_all(connection)  # tables that an older version did not have
            connection.execute(text("UPDATE schema_version SET version = :version"), {"version": _schema_version()})

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _schema_version() -> int:
    """Return the version of the tables that this vitmodel uses."""
    return len(MIGRATIONS) + 1


def _configure_sqlite(engine: Engine) -> None:
    """Use a write-ahead log, so that readers and one writer do not wait for each other, and survive a power cut."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver must not open transactions by itself: `begin` below does
        connection.execute(f"PRAGMA busy_timeout = {1000 * BUSY_SECONDS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # an acknowledged object must survive a power cut
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and then writes would otherwise fail when another one wrote in between.
        reading = connection.get_execution_options().get("reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
