"""The durable queue: which series is to be segmented by which model, who does it, what became of it.

A job is leased to a worker and lost where the lease is not renewed. Everything that is decided is decided in one
transaction of the database, so that a process may be killed at any moment. Steps: selected → checked → inferred →
encoded → published → confirmed; the last two follow from the deliveries, which publish.py sends. What is not done of a
revision when a later one is there is `superseded`: nobody is to get the older result after the newer one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from medseg_pipelines.hospital.database import Database, deliveries, instances, jobs, series

STEPS = ("selected", "checked", "inferred", "encoded", "published", "confirmed")
# a job whose worker was gone so often is taken for what ended it
MOST_LOSSES = 5
# in the record of an order: the names of the other rules
ALSO = "also_for"


@dataclass(frozen=True)
class Order:
    """What is to be made of a revision of a series; `settings`: what of the rule the result depends on.

    `also`: other rules that ask for the very same.
    """

    series_id: str
    revision: int
    rule: str
    model: str
    model_sha256: str
    settings: Mapping[str, Any]
    priority: int = 0
    also: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The same for the same series, revision, model and settings, whoever asks and how often."""
        settings = "\n".join(f"{key}={self.settings[key]}" for key in sorted(self.settings))
        return digest(self.series_id, str(self.revision), self.model_sha256, settings)


@dataclass(frozen=True)
class Job:
    """A job that this worker holds. `files`: of the revision, below the node's folder, in no order."""

    id: str
    series_id: str
    series_uid: str
    revision: int
    rule: str
    model: str
    model_sha256: str
    order: Mapping[str, Any]
    step: str
    attempts: int
    files: tuple[str, ...]

    @property
    def rules(self) -> tuple[str, ...]:
        """All rules that the job is done for."""
        return (self.rule, *map(str, self.order.get(ALSO, ())))


@dataclass(frozen=True)
class Listed:
    """A job for people to look at."""

    id: str
    state: str
    step: str
    rule: str
    attempts: int
    reason: str


@dataclass(frozen=True)
class Released:
    """A job that its worker has lost: `queued` again, or `dead` where that was once too often."""

    job_id: str
    state: str
    reason: str


@dataclass(frozen=True)
class Worker:
    """Who holds leases. `name` outlives a restart, `token` does not."""

    name: str
    token: str


def digest(*parts: str) -> str:
    """32 hexadecimal digits: a name made of what must not be one (UIDs from the network, paths)."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def superseded_by(revision: int) -> str:
    """Why something is superseded."""
    return f"images came later: revision {revision} took its place"


class Jobs:
    """The queue in a database."""

    def __init__(self, database: Database, *, attempts: int, retry_s: float, lease_s: float) -> None:
        self._database = database
        self._attempts, self._retry_s, self._lease_s = attempts, retry_s, lease_s

    def put(self, connection: sa.Connection, order: Order) -> bool:
        """Adds a job in the caller's transaction; False where it is there already."""
        if connection.scalar(sa.select(jobs.c.id).where(jobs.c.id == order.id)) is not None:
            return False
        connection.execute(
            jobs.insert().values(
                id=order.id,
                series_id=order.series_id,
                revision=order.revision,
                rule=order.rule,
                model=order.model,
                model_sha256=order.model_sha256,
                order=dict(order.settings) | ({ALSO: list(order.also)} if order.also else {}),
                priority=order.priority,
                state="queued",
                step="selected",
                attempts=0,
                losses=0,
                not_before=0.0,
                reason="",
                result={},
                created_at=self._database.now(connection),
            )
        )
        return True

    def supersede(self, connection: sa.Connection, series_id: str, revision: int) -> tuple[str, ...]:
        """In the caller's transaction: jobs of earlier revisions that are not done never will be; their ids."""
        held = (
            jobs.c.series_id == series_id,
            jobs.c.revision < revision,
            jobs.c.state.in_(("queued", "running", "dead")),
        )
        values = {
            "state": "superseded",
            # why a dead one failed stays
            "reason": sa.case((jobs.c.state == "dead", jobs.c.reason), else_=superseded_by(revision)),
            "finished_at": sa.func.coalesce(jobs.c.finished_at, self._database.now(connection)),
            "token": None,
            "lease_until": None,
        }
        return tuple(connection.scalars(jobs.update().where(*held).values(values).returning(jobs.c.id)))

    def claim(self, worker: Worker) -> Job | None:
        """The job of the greatest priority that waits, the oldest of those; None where none does.

        One of a series that more images come of waits for them: a later revision will take its place.
        """
        with self._database.writing() as connection:
            now = self._database.now(connection)
            whole = sa.select(series.c.id).where(series.c.state == "complete")
            waiting = (
                sa.select(jobs.c.id)
                .where(jobs.c.state == "queued", jobs.c.not_before <= now, jobs.c.series_id.in_(whole))
                .order_by(jobs.c.priority.desc(), jobs.c.created_at, jobs.c.id)
                .limit(1)
                .with_for_update(skip_locked=True, of=jobs)
            )
            chosen = connection.scalar(waiting)
            if chosen is None:
                return None
            connection.execute(
                jobs.update()
                .where(jobs.c.id == chosen)
                .values(
                    state="running",
                    # whatever an earlier go came to
                    step="selected",
                    attempts=jobs.c.attempts + 1,
                    worker=worker.name,
                    token=worker.token,
                    lease_until=now + self._lease_s,
                    started_at=now,
                    reason="",
                )
            )
            return _job(connection, chosen)

    def renew(self, job_id: str, worker: Worker) -> bool:
        """Whether the job still is this worker's; its lease begins anew then."""
        with self._database.writing() as connection:
            until = self._database.now(connection) + self._lease_s
            return self._changed(connection, job_id, worker, lease_until=until)

    def advance(self, job_id: str, worker: Worker, step: str) -> bool:
        """A step is done. False where the job is another's by now."""
        with self._database.writing() as connection:
            return self._changed(connection, job_id, worker, step=step)

    def finish(self, job_id: str, worker: Worker, result: Mapping[str, Any], sends: Sequence[tuple[str, str]]) -> bool:
        """All is made; `sends`: destination and format of each delivery. False where the job is another's by now."""
        with self._database.writing() as connection:
            now = self._database.now(connection)
            step = "encoded" if sends else "confirmed"
            if not self._changed(
                connection, job_id, worker, state="done", step=step, result=dict(result), finished_at=now, reason=""
            ):
                return False
            known = set(
                connection.execute(
                    sa.select(deliveries.c.destination, deliveries.c.format).where(deliveries.c.job_id == job_id)
                ).tuples()
            )
            for destination, format in sends:
                if (destination, format) not in known:
                    connection.execute(
                        deliveries.insert().values(
                            job_id=job_id,
                            destination=destination,
                            format=format,
                            state="waiting",
                            attempts=0,
                            not_before=now,
                            reason="",
                        )
                    )
            return True

    def fail(self, job_id: str, worker: Worker, reason: str, *, for_good: bool) -> str:
        """It did not work: queued again, later each time, or `dead` where it is of no use; the state it has now."""
        with self._database.writing() as connection:
            now = self._database.now(connection)
            attempts = connection.scalar(sa.select(jobs.c.attempts).where(jobs.c.id == job_id)) or 0
            dead = for_good or attempts >= self._attempts
            wait_s = self._retry_s * 2.0 ** max(attempts - 1, 0)
            values: dict[str, Any] = {"state": "dead", "finished_at": now}
            if not dead:
                values = {"state": "queued", "not_before": now + wait_s}
            kept = self._changed(connection, job_id, worker, reason=reason, **values)
            return str(values["state"]) if kept else "lost"

    def hand_back(self, job_id: str, worker: Worker) -> bool:
        """Queues a job that its worker has no time for, as if it had not begun. False where it is another's by now."""
        with self._database.writing() as connection:
            return self._changed(
                connection,
                job_id,
                worker,
                state="queued",
                step="selected",
                attempts=jobs.c.attempts - 1,
                not_before=0.0,
            )

    def give_back(self, worker_name: str, *, but: str) -> tuple[Released, ...]:
        """Queues what an earlier process of this name held (its token is not `but`)."""
        return self._release(jobs.c.worker == worker_name, jobs.c.token != but)

    def release_expired(self) -> tuple[Released, ...]:
        """Queues the jobs whose workers have not renewed their leases."""
        with self._database.reading() as connection:
            now = self._database.now(connection)
        return self._release(jobs.c.lease_until < now)

    def replay(self, job_id: str) -> bool:
        """A dead job is begun again, as if it had never failed; False where it is not dead."""
        with self._database.writing() as connection:
            done = connection.execute(
                jobs.update()
                .where(jobs.c.id == job_id, jobs.c.state == "dead")
                .values(state="queued", attempts=0, losses=0, not_before=0.0, finished_at=None, reason="")
            )
            return bool(done.rowcount)

    def remake(self, job_id: str) -> bool:
        """A job that is done is begun again: what it made is lost or damaged. False where it is not done."""
        with self._database.writing() as connection:
            anew = {"state": "queued", "step": "selected", "attempts": 0, "losses": 0, "not_before": 0.0}
            done = (jobs.c.id == job_id, jobs.c.state == "done")
            return bool(connection.execute(jobs.update().where(*done).values(anew | {"finished_at": None})).rowcount)

    def listed(self, state: str | None = None) -> tuple[Listed, ...]:
        """All jobs, or those in a state, the newest first."""
        columns = [jobs.c[name] for name in ("id", "state", "step", "rule", "attempts", "reason")]
        asked = sa.select(*columns).order_by(jobs.c.created_at.desc(), jobs.c.id)
        if state is not None:
            asked = asked.where(jobs.c.state == state)
        with self._database.reading() as connection:
            return tuple(Listed(*row) for row in connection.execute(asked).tuples())

    def _release(self, *conditions: sa.ColumnElement[bool]) -> tuple[Released, ...]:
        with self._database.writing() as connection:
            now = self._database.now(connection)
            lost = jobs.c.losses + 1
            values = {
                "losses": lost,
                # a lost worker is no failure of the job
                "attempts": sa.case((jobs.c.attempts > 0, jobs.c.attempts - 1), else_=0),
                "state": sa.case((lost >= MOST_LOSSES, "dead"), else_="queued"),
                "reason": sa.case(
                    (lost >= MOST_LOSSES, f"its worker was gone {MOST_LOSSES} times while it was being done"), else_=""
                ),
                "finished_at": sa.case((lost >= MOST_LOSSES, now), else_=None),
                "token": None,
                "lease_until": None,
            }
            held = jobs.update().where(jobs.c.state == "running", *conditions).values(values)
            done = connection.execute(held.returning(jobs.c.id, jobs.c.state, jobs.c.reason))
            return tuple(Released(*row) for row in done.tuples())

    def _changed(self, connection: sa.Connection, job_id: str, worker: Worker, **values: Any) -> bool:
        held = (jobs.c.id == job_id, jobs.c.token == worker.token, jobs.c.state == "running")
        return bool(connection.execute(jobs.update().where(*held).values(values)).rowcount)


def _job(connection: sa.Connection, job_id: str) -> Job:
    columns = [jobs.c[name] for name in ("id", "series_id", "revision", "rule", "model", "model_sha256", "step")]
    found = connection.execute(
        sa.select(*columns, jobs.c.order, jobs.c.attempts, series.c.series_uid)
        .join(series, series.c.id == jobs.c.series_id)
        .where(jobs.c.id == job_id)
    ).one()
    held = sa.select(instances.c.file).where(
        instances.c.series_id == found.series_id, instances.c.revision <= found.revision, ~instances.c.is_copy
    )
    files = tuple(connection.scalars(held.order_by(instances.c.file)))
    return Job(**found._asdict(), files=files)
