"""What machines ask of a node: whether it lives, whether it is ready, and its figures; no patient's data, no UIDs."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from medseg_pipelines.hospital.database import Database, counters, deliveries, jobs, parts, refusals, series
from medseg_pipelines.hospital.jobs import STEPS
from medseg_pipelines.hospital.node import Node

log = logging.getLogger(__name__)

# a part that has given no sign of life for so long is taken for gone
SILENT_S = 60.0
# parts that a node cannot do without
NEEDED = ("gateway", "worker")
JOB_STATES = ("queued", "running", "done", "dead", "superseded")
DELIVERY_STATES = ("waiting", "sending", "sent", "done", "dead", "superseded")
# a transaction that ends a job is seen by others at most so much later than the time that it writes
LATE_S = 600.0


@dataclass(frozen=True)
class Readiness:
    """What keeps a node from its work, in words; empty where nothing does."""

    lacking: tuple[str, ...]

    @property
    def ready(self) -> bool:
        """Whether nothing is lacking."""
        return not self.lacking


def readiness(node: Node) -> Readiness:
    """Asks the database and the disk; a database that does not answer is lacking, not an error."""
    lacking = []
    try:
        with node.database.reading() as connection:
            now = node.database.now(connection)
            asked = sa.select(parts.c.kind, parts.c.trouble).where(parts.c.seen_at >= now - SILENT_S)
            alive = connection.execute(asked.order_by(parts.c.name)).tuples().all()
    except sa.exc.SQLAlchemyError as error:
        log.error("the database does not answer (%s)", type(error).__name__)
        lacking.append("the database does not answer")
    else:
        for kind in NEEDED:
            troubles = [trouble for one, trouble in alive if one == kind]
            if not troubles:
                lacking.append(f"no {kind} has given a sign of life for {SILENT_S:.0f} s")
            elif all(troubles):
                lacking.append(f"no {kind} can work: {troubles[0]}")
    if not node.store.is_here():
        lacking.append("the folder of the node is not there; is its disk mounted?")
    if not node.store.has_room():
        lacking.append(f"the disk has {node.store.free_bytes / 1e9:.1f} GB left: nothing is taken in any more")
    return Readiness(tuple(lacking))


def silent_parts(database: Database, machine: str) -> tuple[str, ...]:
    """The kinds of part of this machine that give no sign of life; `any part` where it has run none."""
    with database.reading() as connection:
        now = database.now(connection)
        rows = connection.execute(sa.select(parts.c.name, parts.c.kind, parts.c.seen_at)).tuples().all()
    seen: dict[str, float] = {}
    for name, kind, at in rows:
        if name.startswith(f"{machine}-{kind}-"):
            seen[kind] = max(at, seen.get(kind, at))
    return tuple(kind for kind, at in sorted(seen.items()) if now - at > SILENT_S) if seen else ("any part",)


class Metrics:
    """The figures of a node in Prometheus' text format; remembers what of the finished jobs it has counted."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stages = _Stages()
        self._registry = CollectorRegistry(auto_describe=False)
        # a collector is anything with this method; it is asked for at each reading, and not when it is registered
        self._registry.register(self)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: else the database were asked at the start."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now; where the database does not answer, only that."""
        store = self._node.store
        yield GaugeMetricFamily("medseg_disk_free_bytes", "What the disk of the folder still holds.", store.free_bytes)
        try:
            found = list(self._of_database())
        except sa.exc.SQLAlchemyError as error:
            log.error("the database does not answer (%s)", type(error).__name__)
            found = []
        yield GaugeMetricFamily("medseg_database_up", "1 where the database answers.", float(bool(found)))
        yield from found

    def _of_database(self) -> Iterator[Metric]:
        with self._node.database.reading() as connection:
            now = self._node.database.now(connection)
            yield from _queue(connection, now)
            yield _deliveries(connection)
            yield from _received(connection)
            yield _beats(connection, now)
            yield self._stages.metric(connection, now)


def _queue(connection: sa.Connection, now: float) -> Iterator[Metric]:
    held = sa.select(jobs.c.state, jobs.c.step, sa.func.count()).group_by(jobs.c.state, jobs.c.step)
    numbers = {(state, step): number for state, step, number in connection.execute(held).tuples()}
    made = GaugeMetricFamily("medseg_jobs", "Jobs by state and the last step done.", labels=("state", "step"))
    for state in JOB_STATES:
        for step in STEPS:
            made.add_metric((state, step), numbers.get((state, step), 0))
    yield made
    oldest = connection.scalar(sa.select(sa.func.min(jobs.c.created_at)).where(jobs.c.state == "queued"))
    yield GaugeMetricFamily(
        "medseg_oldest_queued_job_age_seconds",
        "Since when the job that waits longest is there; 0 where none waits.",
        0.0 if oldest is None else max(now - oldest, 0.0),
    )


def _deliveries(connection: sa.Connection) -> Metric:
    asked = sa.select(deliveries.c.destination, deliveries.c.state, sa.func.count())
    numbers: dict[str, dict[str, int]] = defaultdict(dict)
    for destination, state, number in connection.execute(
        asked.group_by(deliveries.c.destination, deliveries.c.state)
    ).tuples():
        numbers[destination][state] = number
    made = GaugeMetricFamily(
        "medseg_deliveries", "Deliveries by destination and state.", labels=("destination", "state")
    )
    for destination, by_state in sorted(numbers.items()):
        for state in DELIVERY_STATES:
            made.add_metric((destination, state), by_state.get(state, 0))
    return made


def _received(connection: sa.Connection) -> Iterator[Metric]:
    events = CounterMetricFamily("medseg_events", "What was counted since the database was made.", labels=("event",))
    for name, value in connection.execute(sa.select(counters.c.name, counters.c.value)).tuples():
        events.add_metric((name,), value)
    yield events
    states: dict[str, int] = dict(
        connection.execute(sa.select(series.c.state, sa.func.count()).group_by(series.c.state)).tuples().all()
    )
    made = GaugeMetricFamily("medseg_series", "Series by state.", labels=("state",))
    for state in ("receiving", "complete"):
        made.add_metric((state,), states.get(state, 0))
    yield made
    refused = connection.scalar(sa.select(sa.func.count()).select_from(refusals)) or 0
    yield GaugeMetricFamily("medseg_refusals", "Refusals that stand on the page of refused files.", refused)


def _beats(connection: sa.Connection, now: float) -> Metric:
    made = GaugeMetricFamily(
        "medseg_part_last_beat_age_seconds", "Since a part's last sign of life.", labels=("part", "kind")
    )
    for name, kind, seen_at in connection.execute(sa.select(parts.c.name, parts.c.kind, parts.c.seen_at)).tuples():
        made.add_metric((name, kind), max(now - seen_at, 0.0))
    return made


class _Stages:
    """Seconds by stage and rule over all jobs that are done, of which each is read once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._since = float("-inf")
        # those counted that could be met once more
        self._recent: dict[str, float] = {}

    def metric(self, connection: sa.Connection, now: float) -> Metric:
        with self._lock:
            self._count(connection, now)
            made = SummaryMetricFamily(
                "medseg_stage_seconds", "Seconds that jobs spent in a stage.", labels=("stage", "rule")
            )
            for (stage, rule), (number, seconds) in sorted(self._sums.items()):
                made.add_metric((stage, rule), int(number), seconds)
            return made

    def _count(self, connection: sa.Connection, now: float) -> None:
        done = (jobs.c.state == "done", jobs.c.finished_at > self._since)
        asked = sa.select(jobs.c.id, jobs.c.rule, jobs.c.result, jobs.c.finished_at).where(*done)
        for job_id, rule, result, finished_at in connection.execute(asked).tuples():
            if job_id in self._recent:
                continue
            self._recent[job_id] = finished_at
            for stage, seconds in stage_seconds(result).items():
                held = self._sums[stage, rule]
                held[0] += 1
                held[1] += seconds
        self._since = now - LATE_S
        self._recent = {job_id: at for job_id, at in self._recent.items() if at > self._since}


def stage_seconds(result: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by stage, of a job's result."""
    return {str(stage): float(seconds) for stage, seconds in (result.get("seconds") or {}).items()}
