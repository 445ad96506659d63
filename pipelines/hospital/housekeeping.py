"""What the disk gets back: files of studies that were published long ago. Their rows stay, and say so."""

from __future__ import annotations

import logging
import shutil

import sqlalchemy as sa

from medseg_pipelines.hospital.database import deliveries, destinations, instances, jobs, parts, refusals, series
from medseg_pipelines.hospital.node import Node

log = logging.getLogger(__name__)

DAY_S = 86400.0
# nothing is put off for so long, or leased: a time further ahead was written by a clock that has been set back since
MOST_AHEAD_S = DAY_S
TIMES = (
    *(series.c.last_at, series.c.asked_at, jobs.c.not_before, jobs.c.lease_until),
    *(deliveries.c.not_before, deliveries.c.lease_until, destinations.c.not_before, parts.c.seen_at),
)


def clear_published(node: Node) -> int:
    """Removes received files and results of studies that are through for `storage.keep_days`; how many studies.

    Through: nothing is being received, every job is done and confirmed or superseded, nothing is on its way out. A file
    that is sent to the node again comes back; the same jobs are not done again.
    """
    keep_days = node.settings.storage.keep_days
    if keep_days is None:
        return 0
    with node.database.reading() as connection:
        before = node.database.now(connection) - keep_days * DAY_S
        kept = sa.select(series.c.study_id).join(instances).where(instances.c.gone_at.is_(None))
        old = kept.where(series.c.last_at < before).distinct()
        studies = list(connection.scalars(old.order_by(series.c.study_id)))
    return sum(_cleared(node, study, before) for study in studies)


def clear_leavings(node: Node) -> int:
    """Removes what nobody asks for any more after `storage.keep_days`; how many files and folders.

    That is what was refused, with its rows; parts that have been silent so long; folders that workers were killed in.
    """
    keep_days = node.settings.storage.keep_days
    if keep_days is None:
        return 0
    with node.database.writing() as connection:
        before = node.database.now(connection) - keep_days * DAY_S
        connection.execute(refusals.delete().where(refusals.c.at < before))
        connection.execute(parts.delete().where(parts.c.seen_at < before))
        # one that came again since is still looked for
        named = set(connection.scalars(sa.select(refusals.c.file)))
    removed = 0
    for path in node.store.refused.iterdir():
        if path.relative_to(node.store.folder).as_posix() not in named and path.stat().st_mtime < before:
            path.unlink(missing_ok=True)
            removed += 1
    for path in node.store.work.iterdir():
        # with hard links to images, which hold the disk
        if path.is_dir() and path.stat().st_mtime < before:
            shutil.rmtree(path, ignore_errors=True)
            removed += 1
    if removed:
        log.info("%d files and folders that nobody asks for any more are removed", removed)
    return removed


def mend_times(node: Node) -> int:
    """What would wait for a time that a wrong clock has written waits no more; how many rows."""
    mended = 0
    for column in TIMES:
        with node.database.writing() as connection:
            now = node.database.now(connection)
            ahead = column.table.update().where(column > now + MOST_AHEAD_S).values({column.name: now})
            mended += int(connection.execute(ahead).rowcount)
    if mended:
        log.warning("%d times were more than a day ahead: the clock has been set back; they are now", mended)
    return mended


def _cleared(node: Node, study_id: str, before: float) -> bool:
    """One that cannot be removed is no reason to keep the others."""
    try:
        return _clear(node, study_id, before)
    except OSError as error:
        log.warning("study %s: what was published long ago cannot be removed (%s)", study_id, error.strerror)
        return False


def _clear(node: Node, study_id: str, before: float) -> bool:
    with node.database.writing() as connection:
        # intake locks these rows too: nothing comes in while this looks and removes
        locked = sa.select(series).where(series.c.study_id == study_id).order_by(series.c.id).with_for_update()
        rows = connection.execute(locked).all()
        ids = [row.id for row in rows]
        if any(row.state != "complete" or row.last_at >= before for row in rows):
            return False
        done = connection.execute(sa.select(jobs).where(jobs.c.series_id.in_(ids))).all()
        through = (("done", "confirmed"), ("superseded", None))
        if any(
            (job.state, job.step if job.state == "done" else None) not in through
            or (job.finished_at or before) >= before
            for job in done
        ):
            return False
        job_ids = [job.id for job in done]
        sent = connection.execute(sa.select(deliveries).where(deliveries.c.job_id.in_(job_ids))).all()
        if any(
            row.state != "superseded" and (row.state != "done" or (row.confirmed_at or before) >= before)
            for row in sent
        ):
            return False
        there = (instances.c.series_id.in_(ids), instances.c.gone_at.is_(None))
        files = connection.execute(sa.select(instances.c.file, instances.c.received_at).where(*there)).all()
        if any(row.received_at >= before for row in files):
            return False
        for row in files:
            (node.store.folder / row.file).unlink(missing_ok=True)
        for job_id in job_ids:
            if (folder := node.store.results / job_id).exists():
                shutil.rmtree(folder)
        connection.execute(instances.update().where(*there).values(gone_at=node.database.now(connection)))
    log.info("study %s: %d files and %d results are removed", study_id, len(files), len(job_ids))
    node.audit.record("cleared", study=study_id, files=len(files), jobs=len(job_ids))
    return True
