"""What was given up is begun again because a person says so, which is written down; no decision is made here."""

from __future__ import annotations

import sqlalchemy as sa

from medseg_pipelines.hospital.database import Database, deliveries, jobs, series
from medseg_pipelines.hospital.deliveries import open_deliveries
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.store import sha256_of


def replay_job(node: Node, job_id: str, *, user: str | None) -> bool:
    """Queues a dead job, and the dead deliveries of one that is done; False where there are none. `user` None: by hand.

    What a job made that is lost or damaged is made again.

    An id that no job has is none either.
    """
    computed = node.jobs.replay(job_id)
    if not computed and _has_dead_deliveries(node, job_id) and not _is_whole(node, job_id):
        # before its deliveries wait: whoever sends them must not find what is lost
        computed = node.jobs.remake(job_id)
    sends = open_deliveries(node).replay(job_id)
    if computed or sends:
        with node.database.reading() as connection:
            study = study_of_job(connection, job_id)
        node.audit.record("replay", user=user, job=job_id, study=study, computed=computed, deliveries=sends)
    return computed or sends > 0


def _has_dead_deliveries(node: Node, job_id: str) -> bool:
    dead = (deliveries.c.job_id == job_id, deliveries.c.state == "dead")
    with node.database.reading() as connection:
        return bool(connection.scalar(sa.select(sa.func.count()).select_from(deliveries).where(*dead)))


def _is_whole(node: Node, job_id: str) -> bool:
    """Whether all that a job has made is there as it was made."""
    with node.database.reading() as connection:
        result = connection.scalar(sa.select(jobs.c.result).where(jobs.c.id == job_id)) or {}
    folder = node.store.results / job_id
    try:
        return all(sha256_of(folder / made["file"]) == made["sha256"] for made in result.get("files", {}).values())
    except OSError:
        return False


def dead_jobs(database: Database) -> list[str]:
    """Ids of the jobs that are dead, or have deliveries that are, the oldest first."""
    dead = sa.select(deliveries.c.job_id).where(deliveries.c.state == "dead")
    asked = sa.select(jobs.c.id).where(sa.or_(jobs.c.state == "dead", jobs.c.id.in_(dead)))
    with database.reading() as connection:
        return list(connection.scalars(asked.order_by(jobs.c.created_at, jobs.c.id)))


def study_of_job(connection: sa.Connection, job_id: str) -> str | None:
    """The study that a job belongs to; None where there is no such job."""
    asked = sa.select(series.c.study_id).join(jobs, jobs.c.series_id == series.c.id).where(jobs.c.id == job_id)
    return connection.scalar(asked)
