"""One received DICOM file, from whatever door: looked at, kept for good or refused, and written down."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sqlalchemy as sa

import medseg
from medseg_pipelines.hospital.audit import Audit
from medseg_pipelines.hospital.database import Database, count, instances, jobs, refusals, series
from medseg_pipelines.hospital.jobs import digest
from medseg_pipelines.hospital.store import Store, sha256_of

log = logging.getLogger(__name__)

# the manufacturer that the writers put into what they make
OURS = "medseg"


class RefusedError(Exception):
    """A file that cannot be taken in, and why; it lies in `refused`. The text holds no patient's data."""


class NoRoomError(Exception):
    """The disk is at its watermark: nothing is taken in until there is room."""


@dataclass(frozen=True)
class Taken:
    """What became of a file: `new`, `known` (the same content was here), `copy` (another content of a known UID)."""

    what: Literal["new", "known", "copy"]
    series_id: str
    instance_id: str


class Intake:
    """The way in for all doors of the node; many threads may use it at once."""

    def __init__(self, database: Database, store: Store, audit: Audit) -> None:
        self._database, self._store, self._audit = database, store, audit

    def check_room(self, size: int = 0) -> None:
        """Raises `NoRoomError` where `size` bytes more are too many."""
        if not self._store.has_room(size):
            with self._database.writing() as connection:
                count(connection, "refused_no_room")
            raise NoRoomError(
                f"the disk has {self._store.free_bytes / 1e9:.1f} GB left; free some, or lower least_free_gb"
            )

    def take(self, path: Path, *, sent_by: str) -> Taken:
        """Takes in the file at `path` (from `Store.new_file`, or elsewhere on its disk), which is moved away.

        It is on the disk and in the database when this ends; the same file again changes nothing. Raises
        `RefusedError`.
        """
        sha256 = sha256_of(path)
        try:
            facts = medseg.dicom_facts(path)
        except medseg.DataError as error:
            raise self._refused(path, sha256, sent_by, str(error)) from error
        series_id, study_id = digest(facts.series_uid), digest(facts.study_uid)
        sop_id, instance_id = digest(facts.sop_instance_uid), sha256[:32]
        place = self._store.keep(path, series_id, sha256)
        with self._database.writing() as connection:
            now = self._database.now(connection)
            known = self._series(connection, series_id, study_id, facts, sent_by, now)
            if known != study_id:
                # one series in two studies: the first one keeps its rows
                log.warning("series %s comes with another study UID", series_id)
            # one that is sent again is not quiet, whatever of it was here
            coming = (series.c.id == series_id, series.c.state == "receiving")
            connection.execute(series.update().where(*coming).values(last_at=now))
            # a UID that another series has, too, is no reason to keep this one incomplete
            same = (instances.c.sop_id == sop_id, instances.c.series_id == series_id)
            held = connection.execute(sa.select(instances.c.id, instances.c.gone_at).where(*same)).all()
            # one that was removed has nothing that another content could be a copy of
            is_copy = any(row.gone_at is None for row in held if row.id != instance_id)
            if instance_id in {row.id for row in held}:
                count(connection, "received_again")
                if not (self._store.folder / place).is_file():
                    # housekeeping removed it between our two looks
                    raise NoRoomError("the file was removed as published long ago at this very moment; send it again")
                back = {"gone_at": None, "received_at": now}
                gone = (instances.c.id == instance_id, instances.c.gone_at.is_not(None))
                if connection.execute(instances.update().where(*gone).values(back)).rowcount:
                    if not is_copy:
                        # whichever content held before: it is the one that is there now
                        connection.execute(
                            instances.update().where(*same).values(is_copy=instances.c.id != instance_id)
                        )
                    _reopen(connection, series_id, now)
                return Taken("known", series_id, instance_id)
            if held and not is_copy:
                connection.execute(instances.update().where(*same).values(is_copy=True))
            connection.execute(
                instances.insert().values(
                    id=instance_id,
                    sop_id=sop_id,
                    series_id=series_id,
                    sop_instance_uid=facts.sop_instance_uid,
                    sop_class_uid=facts.sop_class_uid,
                    transfer_syntax_uid=facts.transfer_syntax_uid,
                    sha256=sha256,
                    size=(self._store.folder / place).stat().st_size,
                    file=place.as_posix(),
                    is_copy=is_copy,
                    received_at=now,
                )
            )
            if is_copy:
                count(connection, "received_copies")
            else:
                count(connection, "received")
                # with one more, a peer's count is worth asking for again
                more = 0 if held else 1
                added = {"images": series.c.images + more, "last_at": now, "asked_at": None, "state": "receiving"}
                connection.execute(series.update().where(series.c.id == series_id).values(added))
        if is_copy:
            log.warning("instance %s of series %s came with another content; the first one holds", sop_id, series_id)
        what: Literal["new", "copy"] = "copy" if is_copy else "new"
        self._audit.record(
            "received", series=series_id, instance=instance_id, sha256=sha256, sent_by=sent_by, what=what
        )
        return Taken(what, series_id, instance_id)

    def refuse(self, path: Path | None, *, sent_by: str, reason: str) -> RefusedError:
        """Writes down what was refused before its content could be looked at, and gives back the error to raise."""
        return self._refused(path, sha256_of(path) if path else "", sent_by, reason)

    def _refused(self, path: Path | None, sha256: str, sent_by: str, reason: str) -> RefusedError:
        # names of files say nothing here, and could be a patient's
        reason = reason.replace(f"{path}: ", "") if path else reason
        place = self._store.quarantine(path, sha256).as_posix() if path else ""
        with self._database.writing() as connection:
            now = self._database.now(connection)
            connection.execute(
                refusals.insert().values(id=uuid.uuid4().hex, at=now, sent_by=sent_by, reason=reason, file=place)
            )
            count(connection, "refused")
        self._audit.record("refused", sent_by=sent_by, reason=reason, file=place)
        log.warning("refused from %s: %s", sent_by, reason)
        return RefusedError(reason)

    def _series(
        self,
        connection: sa.Connection,
        series_id: str,
        study_id: str,
        facts: medseg.DicomFacts,
        sent_by: str,
        now: float,
    ) -> str:
        """Makes the row of a series where it is missing, and locks it; the study that it belongs to."""
        locked = sa.select(series.c.study_id).where(series.c.id == series_id).with_for_update()
        found = connection.scalar(locked)
        if found is not None:
            return str(found)
        values = {
            "id": series_id,
            "study_id": study_id,
            "series_uid": facts.series_uid,
            "study_uid": facts.study_uid,
            "patient_name": facts.patient_name,
            "patient_id": facts.patient_id,
            "accession_number": facts.accession_number,
            "study_date": facts.study_date,
            "study_description": facts.study_description,
            "series_description": facts.series_description,
            "protocol_name": facts.protocol_name,
            "modality": facts.modality,
            "body_part": facts.body_part,
            "thickness_mm": facts.slice_thickness_mm,
            # pictures of our results come back from a PACS: of those there is nothing to segment
            "is_image": facts.is_image and facts.manufacturer != OURS,
            "sent_by": sent_by,
            "state": "receiving",
            "images": 0,
            "assumed": False,
            "revision": 0,
            "selection": "",
            "first_at": now,
            "last_at": now,
        }
        if self._database.is_sqlite:
            connection.execute(series.insert().values(values))
        else:
            from sqlalchemy.dialects.postgresql import insert

            # two associations may bring the first two slices at once
            connection.execute(insert(series).values(values).on_conflict_do_nothing())
        return str(connection.scalar(locked))

    def _count(self, name: str) -> None:
        with self._database.writing() as connection:
            count(connection, name)


def _reopen(connection: sa.Connection, series_id: str, now: float) -> None:
    """A series whose last revision no job was made of is looked at once more: what was missing of it comes again."""
    done = sa.select(jobs.c.id).where(jobs.c.series_id == series_id, jobs.c.revision == series.c.revision)
    again = (series.c.id == series_id, ~done.exists())
    connection.execute(series.update().where(*again).values(state="receiving", last_at=now))
