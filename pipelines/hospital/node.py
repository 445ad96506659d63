"""What every part of a node works with, opened once for each process."""

from __future__ import annotations

import logging
import platform
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

import medseg
from medseg_pipelines.hospital.audit import Audit
from medseg_pipelines.hospital.database import Database, identity, open_database, parts
from medseg_pipelines.hospital.intake import Intake
from medseg_pipelines.hospital.jobs import Jobs, Worker
from medseg_pipelines.hospital.settings import NodeSettings
from medseg_pipelines.hospital.store import MARK, Store, read_mark, write_mark

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """One process of the node: a gateway, a worker, the pages. `me`: its name among the parts, and this start of it."""

    settings: NodeSettings
    database: Database
    store: Store
    audit: Audit
    intake: Intake
    jobs: Jobs
    me: Worker
    kind: str

    def beat(self, trouble: str | None = None) -> None:
        """Tells the others that this part lives, and what keeps it from its work."""
        with self.database.writing() as connection:
            now = self.database.now(connection)
            mine, told = parts.c.name == self.me.name, {"seen_at": now, "trouble": trouble}
            if not connection.execute(parts.update().where(mine).values(told)).rowcount:
                connection.execute(parts.insert().values(name=self.me.name, kind=self.kind, started_at=now, **told))

    def close(self) -> None:
        """The end of this process's part."""
        self.audit.close()
        self.database.close()


def machine_of(settings: NodeSettings) -> str:
    """The name of this machine, of which those of its parts are made."""
    return settings.name or re.sub(r"[^A-Za-z0-9_.-]", "-", platform.node())[:64] or "node"


def open_node(settings: NodeSettings, kind: str, number: int = 0) -> Node:
    """A part of the node: `kind` gateway, worker or web, the `number`-th on this machine. Raises `ConfigError`."""
    machine = machine_of(settings)
    _check_mark(settings)
    database = database_of(settings)
    try:
        # what is below it is patients': for the node's user alone
        settings.folder.chmod(0o700)
        _check_folder(database, settings.folder)
    except OSError as error:
        raise medseg.ConfigError(f"folder {settings.folder}: cannot be used ({error.strerror}); change it") from error
    store = Store(settings.folder, least_free_gb=settings.storage.least_free_gb)
    me = Worker(f"{machine}-{kind}-{number}", uuid.uuid4().hex)
    audit = Audit(settings.folder / "audit", me.name)
    intake = Intake(database, store, audit)
    return Node(settings, database, store, audit, intake, queue_of(settings, database), me, kind)


def _check_mark(settings: NodeSettings) -> None:
    """Raises `ConfigError` where the folder is not that of the node in the settings, before anything is made there."""
    found = read_mark(settings.folder)
    if settings.node_id is not None and found != settings.node_id:
        raise medseg.ConfigError(
            f"folder {settings.folder}: {found or 'nothing'} found in `{MARK}`, expected {settings.node_id} as "
            "`node_id` says. Mount its disk; leave `node_id` out to begin a new node there"
        )


def _check_folder(database: Database, folder: Path) -> None:
    """Raises `ConfigError` where a folder is not the one that the database speaks of: a share that is not mounted.

    A worker would take the whole queue there, and find no image; a gateway would fill the disk below.
    """
    with database.writing() as connection:
        database.lock_all(connection)
        known, found = connection.scalar(sa.select(identity.c.node_id)), read_mark(folder)
        if known is None:
            if found is None:
                found = uuid.uuid4().hex
                # before the database knows it: a process may be killed in between
                write_mark(folder, found)
                if database.is_sqlite:
                    log.warning(
                        "a new node is made in %s; put `node_id: %s` into the settings, so that none is made again "
                        "where the disk of that folder is not mounted",
                        folder,
                        found,
                    )
            connection.execute(identity.insert().values(node_id=found))
        elif found != known:
            raise medseg.ConfigError(
                f"folder {folder}: {found or 'nothing'} found in `{MARK}`, expected {known}: it is not the folder of "
                f"this database. Mount the shared disk there; where the folder was lost for good, write {known} into "
                "that file"
            )


def database_of(settings: NodeSettings) -> Database:
    """The database of a node, with its tables. Raises as `open_database`."""
    return open_database(settings.database, settings.folder, settings.database_password_file)


def queue_of(settings: NodeSettings, database: Database) -> Jobs:
    """The jobs in a database, as the settings say."""
    work = settings.worker
    return Jobs(database, attempts=work.attempts, retry_s=work.retry_s, lease_s=work.lease_s)
