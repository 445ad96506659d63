"""The durable part of publishing: which file goes where, who sends it, what became of it; nothing is sent from here.

waiting → sending → sent (storage commitment is waited for) → done, or dead; `superseded` where a later revision of the
series is there before it went out, so that no destination gets the older result last. A destination that fails rests as
a whole: one delivery is tried after a while, and all go out once that one got through. Whoever writes rows of a
destination locks that of the destination first, then those of jobs, then those of deliveries: so that none waits in a
circle.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from medseg_pipelines.hospital.database import Database, commitments, deliveries, destinations, jobs, series
from medseg_pipelines.hospital.jobs import superseded_by
from medseg_pipelines.hospital.node import Node


@dataclass(frozen=True)
class Delivery:
    """One file of a job to one destination. `attempts`: before this one. `record`: of the file, in the job's result."""

    job_id: str
    destination: str
    format: str
    attempts: int
    record: Mapping[str, Any] = field(compare=False, hash=False, default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Deliveries to one destination, leased under `token` since `claimed_at` (seconds, by the database's clock)."""

    token: str
    destination: str
    claimed_at: float
    deliveries: tuple[Delivery, ...]


@dataclass(frozen=True)
class Patience:
    """When what failed is tried again: `retry_s`, twice that each time up to `most_retry_s`, for `give_up_s`."""

    retry_s: float
    most_retry_s: float
    give_up_s: float

    def wait_s(self, failures: int, first_s: float | None = None) -> float:
        """Seconds after so many failures in a row; 0 after none."""
        if failures <= 0:
            return 0.0
        # 2^30 of anything is beyond every maximum
        wait_s: float = (first_s or self.retry_s) * 2.0 ** min(failures - 1, 30)
        return min(wait_s, max(self.most_retry_s, first_s or 0.0))


class Deliveries:
    """The rows in a database; many threads and processes may use it at once."""

    def __init__(self, database: Database, patience: Patience, *, lease_s: float) -> None:
        self._database, self._patience, self._lease_s = database, patience, lease_s

    def prepare(self, destinations_known: Collection[str]) -> None:
        """Makes the rows of destinations that are new."""
        for name in sorted(destinations_known):
            with self._database.writing() as connection:
                self._insert_destination(connection, name)

    def due(self) -> dict[str, set[str]]:
        """By destination, which of the states `waiting` and `sent` has something to do now."""
        d = deliveries.c
        with self._database.reading() as connection:
            now = self._database.now(connection)
            rests = sa.select(destinations.c.name).where(destinations.c.not_before > now)
            rows = connection.execute(
                sa.select(d.destination, d.state)
                .where(d.state.in_(("waiting", "sent")), d.not_before <= now, d.destination.not_in(rests))
                .where(sa.or_(d.lease_until.is_(None), d.lease_until < now))
                .where(sa.or_(d.state == "sent", d.job_id.not_in(_outdated())))
                .distinct()
            ).tuples()
            found: dict[str, set[str]] = {}
            for name, state in rows:
                found.setdefault(name, set()).add(state)
            return found

    def claim(self, destination: str, worker: str, *, most: int) -> Batch | None:
        """What waits for a destination, the greatest priority first; one delivery alone where the last try failed."""
        return self._claimed(destination, worker, most, "waiting")

    def claim_unconfirmed(self, destination: str, worker: str, *, most: int) -> Batch | None:
        """What was sent, and is not confirmed so long that it is to be asked for."""
        return self._claimed(destination, worker, most, "sent")

    def renew(self, tokens: Collection[str]) -> int:
        """The leases of these batches begin anew; how many deliveries still are theirs."""
        if not tokens:
            return 0
        with self._database.writing() as connection:
            until = self._database.now(connection) + self._lease_s
            d = deliveries.c
            key = (d.job_id, d.destination, d.format)
            # those who settle deliveries lock them in another order; what they have now is not waited for
            free = sa.select(*key).where(d.token.in_(sorted(tokens))).with_for_update(skip_locked=True)
            mine = deliveries.update().where(sa.tuple_(*key).in_(free)).values(lease_until=until)
            return int(connection.execute(mine).rowcount)

    def sent(self, batch: Batch, delivery: Delivery, *, confirmed: bool) -> bool:
        """It is there; `confirmed`: nothing more is waited for. False where it is another's by now."""
        with self._database.writing() as connection:
            now = self._locked(connection, batch.destination)
            self._works(connection, batch.destination)
            values: dict[str, Any] = {"state": "sent", "sent_at": now, "not_before": now}
            if confirmed:
                values |= {"state": "done", "confirmed_at": now}
            return self._settled(connection, batch, delivery, **values)

    def later(self, batch: Batch, delivery: Delivery, reason: str, *, reached: bool = True) -> str:
        """The destination works but does not take it now; the state it has: `waiting`, `dead`, or `lost` to another.

        Not `reached`: the destination was not asked, so that nothing is known of it.
        """
        with self._database.writing() as connection:
            now = self._locked(connection, batch.destination)
            if reached:
                self._works(connection, batch.destination)
            return self._postponed(connection, batch, delivery, reason, now)

    def never(self, batch: Batch, delivery: Delivery, reason: str) -> bool:
        """Trying again is of no use. False where it is another's by now."""
        with self._database.writing() as connection:
            self._locked(connection, batch.destination)
            return self._settled(connection, batch, delivery, state="dead", reason=reason)

    def down(
        self, batch: Batch, left: Sequence[Delivery], reason: str, *, during: Delivery | None
    ) -> tuple[tuple[str, str], ...]:
        """The destination fails: it rests, and what is `left` of the batch goes back.

        `during`: the one that was being sent, which may be what breaks the destination, so that it waits by itself as
        well. Gives job and format of those that are dead with this: tried in vain for too long.
        """
        d = deliveries.c
        with self._database.writing() as connection:
            now = self._locked(connection, batch.destination)
            row = connection.execute(sa.select(destinations).where(destinations.c.name == batch.destination)).one()
            if row.failed_at is None or row.failed_at <= batch.claimed_at:
                # else another batch of that time has told it
                failures = row.failures + 1
                rest = {
                    "failures": failures,
                    "failed_at": now,
                    "not_before": now + self._patience.wait_s(failures),
                    "reason": reason,
                }
                connection.execute(destinations.update().where(destinations.c.name == batch.destination).values(rest))
            for delivery in left:
                state = {"state": "waiting"} if self._is_waiting(connection, batch, delivery) else {}
                if delivery is during and state:
                    self._postponed(connection, batch, delivery, reason, now)
                else:
                    values = {"not_before": now, **state, "token": None, "worker": None, "lease_until": None}
                    self._changed(connection, batch, delivery, **values)
            all_waiting = (d.destination == batch.destination, d.state == "waiting")
            first = sa.func.coalesce(d.first_tried_at, now)
            connection.execute(deliveries.update().where(*all_waiting).values(first_tried_at=first, reason=reason))
            open_still = d.state.in_(("waiting", "sent"))
            return self._given_up(connection, now, d.destination == batch.destination, open_still)

    def put_back(self, batch: Batch, left: Sequence[Delivery]) -> None:
        """What was not tried is free again."""
        with self._database.writing() as connection:
            now = self._locked(connection, batch.destination)
            self._free_to_try(connection, batch, now)
            for delivery in left:
                state = {"state": "waiting"} if self._is_waiting(connection, batch, delivery) else {}
                values = {"not_before": now, **state, "token": None, "worker": None, "lease_until": None}
                self._changed(connection, batch, delivery, **values)

    def asked(self, batch: Batch, uids: Mapping[Delivery, str], transaction_uid: str) -> None:
        """Storage commitment is about to be asked for: written down before, as the report may be quicker than we."""
        with self._database.writing() as connection:
            now = self._locked(connection, batch.destination)
            for delivery, sop_instance_uid in uids.items():
                connection.execute(
                    commitments.insert().values(
                        transaction_uid=transaction_uid,
                        sop_instance_uid=sop_instance_uid,
                        job_id=delivery.job_id,
                        destination=delivery.destination,
                        format=delivery.format,
                        asked_at=now,
                    )
                )

    def ask_again(
        self,
        batch: Batch,
        wait_s: float,
        reason: str,
        *,
        reached: bool = True,
        unread: Mapping[Delivery, str] = MappingProxyType({}),
    ) -> tuple[tuple[str, str], ...]:
        """What of the batch still is not confirmed is asked for again later, after `wait_s` or more.

        Not `reached`: the destination was not asked, so that nothing is known of it. `unread`: why the files of some
        cannot be read, in place of `reason`. Gives job and format of those that are dead with this: sent, and not
        confirmed for too long.
        """
        d = deliveries.c
        with self._database.writing() as connection:
            now = self._locked(connection, batch.destination)
            if reached:
                self._works(connection, batch.destination)
            else:
                self._free_to_try(connection, batch, now)
            for delivery in batch.deliveries:
                asked = connection.scalar(
                    sa.select(sa.func.count(sa.distinct(commitments.c.transaction_uid))).where(*_of(delivery))
                )
                again = now + self._patience.wait_s(asked or 1, first_s=wait_s)
                values = {"not_before": again, "token": None, "worker": None, "lease_until": None}
                self._changed(connection, batch, delivery, reason=unread.get(delivery, reason), **values)
            return self._given_up(connection, now, d.destination == batch.destination, d.state == "sent")

    def reported(
        self, transaction_uid: str, stored: Collection[str], failed: Mapping[str, str]
    ) -> list[tuple[str, str, str, str]] | None:
        """What a peer says of a request: SOP Instance UIDs that it keeps, and those it does not with the reasons.

        Gives job, destination, format and what that made of each delivery: `done`, `waiting` (it is sent again) or
        `dead` (that went on for too long); None where the request is not known. A report of an earlier request may
        confirm, but not fail a delivery.
        """
        c, d = commitments.c, deliveries.c
        told: list[tuple[str, str, str, str]] = []
        with self._database.reading() as connection:
            name = connection.scalar(sa.select(c.destination).where(c.transaction_uid == transaction_uid))
        if name is None:
            return None
        with self._database.writing() as connection:
            now = self._locked(connection, name)
            rows = connection.execute(
                sa.select(c.job_id, c.destination, c.format, c.sop_instance_uid, c.asked_at)
                .where(c.transaction_uid == transaction_uid)
                .order_by(c.job_id, c.format)
            ).all()
            for row in rows:
                delivery = Delivery(row.job_id, row.destination, row.format, 0)
                _lock_job(connection, row.job_id)
                key = (*_key(delivery), d.state == "sent")
                if row.sop_instance_uid in stored:
                    values: dict[str, Any] = {"state": "done", "confirmed_at": now, "reason": ""}
                elif row.sop_instance_uid in failed and row.asked_at == connection.scalar(
                    sa.select(sa.func.max(c.asked_at)).where(*_of(delivery))
                ):
                    tried = connection.scalar(sa.select(d.attempts).where(*_key(delivery))) or 1
                    wait_s = self._patience.wait_s(tried)
                    values = {"state": "waiting", "not_before": now + wait_s, "reason": failed[row.sop_instance_uid]}
                else:
                    continue
                values |= {"token": None, "worker": None, "lease_until": None}
                if connection.execute(deliveries.update().where(*key).values(values)).rowcount:
                    connection.execute(commitments.delete().where(*_of(delivery)))
                    # what a peer takes each time, and each time does not keep, would be sent without end
                    is_over = self._given_up(connection, now, *_key(delivery), d.state == "waiting")
                    _follow(connection, row.job_id)
                    told.append((row.job_id, row.destination, row.format, "dead" if is_over else str(values["state"])))
                else:
                    # an earlier report has settled it
                    connection.execute(
                        commitments.delete().where(
                            c.transaction_uid == transaction_uid, c.sop_instance_uid == row.sop_instance_uid
                        )
                    )
        return told

    def confirm_all(self, destination: str) -> None:
        """Nothing sent there is waited for any more: commitment is not asked for since the settings have changed."""
        d = deliveries.c
        with self._database.writing() as connection:
            now = self._locked(connection, destination)
            held = (d.destination == destination, d.state == "sent")
            for job_id in connection.scalars(sa.select(d.job_id).where(*held).order_by(d.job_id)).all():
                _lock_job(connection, job_id)
                connection.execute(
                    deliveries.update().where(*held, d.job_id == job_id).values(state="done", confirmed_at=now)
                )
                _follow(connection, job_id)

    def give_back(self, worker: str) -> int:
        """Frees what an earlier process of this name held; how many deliveries."""
        return self._released(deliveries.c.worker == worker)

    def release_expired(self) -> int:
        """Frees what was held by those who have not renewed their leases; how many deliveries."""
        with self._database.reading() as connection:
            now = self._database.now(connection)
        return self._released(deliveries.c.lease_until < now)

    def give_up_unknown(self, known: Collection[str]) -> tuple[tuple[str, str], ...]:
        """Says of what waits for destinations that are not in the settings that it does.

        Gives job and format of those that are dead with this.
        """
        d = deliveries.c
        reason = "its destination is not in the settings; put it back there"
        waiting = (d.destination.not_in(sorted(known)), d.state.in_(("waiting", "sent")))
        with self._database.writing() as connection:
            now = self._database.now(connection)
            first = sa.func.coalesce(d.first_tried_at, now)
            connection.execute(deliveries.update().where(*waiting).values(first_tried_at=first, reason=reason))
            return self._given_up(connection, now, *waiting)

    def supersede(self) -> tuple[tuple[str, str, str], ...]:
        """What has not gone out of revisions that are not the latest never will; job, destination and format of it."""
        d = deliveries.c
        left = (d.state.in_(("waiting", "dead")), d.job_id.in_(_outdated()))
        with self._database.reading() as connection:
            latest = sa.select(series.c.revision).join(jobs, jobs.c.series_id == series.c.id)
            asked = sa.select(d.job_id, d.destination, d.format, latest.where(jobs.c.id == d.job_id).scalar_subquery())
            found = connection.execute(asked.where(*left).order_by(d.job_id, d.destination, d.format)).tuples().all()
        told = []
        for job_id, destination, format, revision in found:
            delivery = Delivery(job_id, destination, format, 0)
            with self._database.writing() as connection:
                self._locked(connection, destination)
                _lock_job(connection, job_id)
                values = {"state": "superseded", "reason": superseded_by(revision)}
                if connection.execute(deliveries.update().where(*_key(delivery), *left).values(values)).rowcount:
                    _follow(connection, job_id)
                    told.append((job_id, destination, format))
        return tuple(told)

    def replay(self, job_id: str) -> int:
        """The dead deliveries of a job are begun again, as if they had never failed; how many."""
        with self._database.writing() as connection:
            now = self._database.now(connection)
            anew = {"state": "waiting", "attempts": 0, "first_tried_at": None, "not_before": now, "reason": ""}
            dead = (deliveries.c.job_id == job_id, deliveries.c.state == "dead")
            done = connection.execute(deliveries.update().where(*dead).values(anew))
            return int(done.rowcount)

    def _claimed(self, destination: str, worker: str, most: int, state: str) -> Batch | None:
        d = deliveries.c
        with self._database.writing() as connection:
            now = self._locked(connection, destination)
            row = connection.execute(sa.select(destinations).where(destinations.c.name == destination)).one()
            if row.not_before > now:
                return None
            free = [d.state == state, d.not_before <= now, sa.or_(d.lease_until.is_(None), d.lease_until < now)]
            if state == "waiting":
                # and one of a later revision waits until that of an earlier one has arrived
                free += [jobs.c.state == "done", d.job_id.not_in(_outdated()), ~_earlier_is_sent(destination).exists()]
            found = connection.execute(
                sa.select(d.job_id, d.destination, d.format, d.attempts, jobs.c.result)
                .join(jobs, jobs.c.id == d.job_id)
                .where(d.destination == destination, *free)
                .order_by(jobs.c.priority.desc(), d.not_before, d.job_id, d.format)
                .limit(1 if row.failures else most)
                .with_for_update(skip_locked=True, of=deliveries)
            ).all()
            if not found:
                return None
            if row.failures:
                # nobody else tries until this one has told how it went, or is gone
                connection.execute(
                    destinations.update()
                    .where(destinations.c.name == destination)
                    .values(not_before=now + self._lease_s)
                )
            token = uuid.uuid4().hex
            held = {"token": token, "worker": worker, "lease_until": now + self._lease_s}
            if state == "waiting":
                held["state"] = "sending"
            batch = Batch(token, destination, now, tuple(_delivery(row) for row in found))
            for delivery in batch.deliveries:
                connection.execute(deliveries.update().where(*_key(delivery)).values(held))
            return batch

    def _postponed(self, connection: sa.Connection, batch: Batch, delivery: Delivery, reason: str, now: float) -> str:
        first = connection.scalar(sa.select(deliveries.c.first_tried_at).where(*_key(delivery)))
        dead = first is not None and now - first >= self._patience.give_up_s
        values: dict[str, Any] = {"state": "dead"}
        if not dead:
            values = {"state": "waiting", "not_before": now + self._patience.wait_s(delivery.attempts + 1)}
        kept = self._settled(connection, batch, delivery, reason=reason, **values)
        return str(values["state"]) if kept else "lost"

    def _settled(self, connection: sa.Connection, batch: Batch, delivery: Delivery, **values: Any) -> bool:
        """Writes down what an attempt came to, and what follows for the job."""
        now = self._database.now(connection)
        _lock_job(connection, delivery.job_id)
        values = {
            "reason": "",
            "attempts": deliveries.c.attempts + 1,
            "first_tried_at": sa.func.coalesce(deliveries.c.first_tried_at, now),
            "token": None,
            "worker": None,
            "lease_until": None,
        } | values
        if not self._changed(connection, batch, delivery, **values):
            return False
        _follow(connection, delivery.job_id)
        return True

    def _changed(self, connection: sa.Connection, batch: Batch, delivery: Delivery, **values: Any) -> bool:
        held = (*_key(delivery), deliveries.c.token == batch.token)
        return bool(connection.execute(deliveries.update().where(*held).values(values)).rowcount)

    def _is_waiting(self, connection: sa.Connection, batch: Batch, delivery: Delivery) -> bool:
        """Whether it was being sent, and not asked about."""
        held = (*_key(delivery), deliveries.c.token == batch.token)
        return connection.scalar(sa.select(deliveries.c.state).where(*held)) == "sending"

    def _given_up(
        self, connection: sa.Connection, now: float, *those: sa.ColumnElement[bool]
    ) -> tuple[tuple[str, str], ...]:
        d = deliveries.c
        since = sa.case((d.state == "sent", d.sent_at), else_=d.first_tried_at)
        over = (*those, d.lease_until.is_(None), since <= now - self._patience.give_up_s)
        dead = connection.execute(sa.select(d.job_id, d.format).where(*over)).tuples().all()
        if dead:
            connection.execute(deliveries.update().where(*over).values(state="dead"))
        return tuple((str(job_id), str(format)) for job_id, format in dead)

    def _released(self, *whose: sa.ColumnElement[bool]) -> int:
        d = deliveries.c
        held = (d.token.is_not(None), *whose)
        with self._database.reading() as connection:
            found = connection.execute(sa.select(d.job_id, d.destination, d.format, d.attempts).where(*held)).all()
        freed = 0
        for row in found:
            delivery = Delivery(row.job_id, row.destination, row.format, row.attempts)
            with self._database.writing() as connection:
                now = self._locked(connection, delivery.destination)
                # it may be what ended its sender: its second loss in a row waits
                values = {
                    "not_before": now + self._patience.wait_s(delivery.attempts),
                    "attempts": d.attempts + 1,
                    "state": sa.case((d.state == "sending", "waiting"), else_=d.state),
                    "token": None,
                    "worker": None,
                    "lease_until": None,
                }
                done = connection.execute(deliveries.update().where(*_key(delivery), *held).values(values))
                freed += int(done.rowcount)
        return freed

    def _locked(self, connection: sa.Connection, destination: str) -> float:
        """Locks the row of a destination, which is there then; the time after that."""
        locked = sa.select(destinations.c.name).where(destinations.c.name == destination).with_for_update()
        if connection.scalar(locked) is None:
            self._insert_destination(connection, destination)
            connection.scalar(locked)
        return self._database.now(connection)

    def _insert_destination(self, connection: sa.Connection, name: str) -> None:
        from sqlalchemy.dialects import postgresql, sqlite

        insert = sqlite.insert if self._database.is_sqlite else postgresql.insert
        connection.execute(
            insert(destinations).values(name=name, failures=0, not_before=0.0, reason="").on_conflict_do_nothing()
        )

    def _free_to_try(self, connection: sa.Connection, batch: Batch, now: float) -> None:
        """A destination that was kept for this batch alone to try is any other's to try, if nobody has failed since."""
        row = connection.execute(sa.select(destinations).where(destinations.c.name == batch.destination)).one()
        if row.failures and row.failed_at is not None and row.failed_at <= batch.claimed_at:
            connection.execute(
                destinations.update().where(destinations.c.name == batch.destination).values(not_before=now)
            )

    @staticmethod
    def _works(connection: sa.Connection, destination: str) -> None:
        failed = (destinations.c.name == destination, destinations.c.failures > 0)
        connection.execute(destinations.update().where(*failed).values(failures=0, not_before=0.0, reason=""))


def open_deliveries(node: Node) -> Deliveries:
    """The deliveries of a node, as its settings say."""
    settings = node.settings.publish
    patience = Patience(settings.retry_s, settings.most_retry_s, settings.give_up_h * 3600.0)
    return Deliveries(node.database, patience, lease_s=node.settings.worker.lease_s)


def _key(delivery: Delivery) -> tuple[sa.ColumnElement[bool], ...]:
    d = deliveries.c
    return d.job_id == delivery.job_id, d.destination == delivery.destination, d.format == delivery.format


def _of(delivery: Delivery) -> tuple[sa.ColumnElement[bool], ...]:
    c = commitments.c
    return c.job_id == delivery.job_id, c.destination == delivery.destination, c.format == delivery.format


def _delivery(row: Any) -> Delivery:
    record = (row.result or {}).get("files", {}).get(row.format) or {}
    return Delivery(row.job_id, row.destination, row.format, row.attempts, record)


def _outdated() -> sa.Select[tuple[str]]:
    """The jobs of all revisions but the latest ones."""
    return sa.select(jobs.c.id).join(series, series.c.id == jobs.c.series_id).where(jobs.c.revision < series.c.revision)


def _earlier_is_sent(destination: str) -> sa.Select[tuple[str]]:
    """What of earlier revisions of the same series is on its way there; correlates to `jobs`."""
    d, j = deliveries.alias("earlier"), jobs.alias("earlier_jobs")
    asked = sa.select(d.c.job_id).join(j, j.c.id == d.c.job_id).correlate(jobs)
    return asked.where(
        d.c.destination == destination,
        d.c.state == "sending",
        j.c.series_id == jobs.c.series_id,
        j.c.revision < jobs.c.revision,
    )


def _lock_job(connection: sa.Connection, job_id: str) -> None:
    # two threads may settle the last two deliveries of a job: the second one must see what the first one did
    connection.execute(sa.select(jobs.c.id).where(jobs.c.id == job_id).with_for_update())


def _follow(connection: sa.Connection, job_id: str) -> None:
    """The step of a job that is done follows from its deliveries."""
    states = set(connection.scalars(sa.select(deliveries.c.state).where(deliveries.c.job_id == job_id)))
    # nobody waits for what is superseded
    over = {"done", "superseded"}
    step = "confirmed" if states <= over else "published" if states <= {"sent", *over} else "encoded"
    connection.execute(
        jobs.update().where(jobs.c.id == job_id, jobs.c.state == "done", jobs.c.step != step).values(step=step)
    )
