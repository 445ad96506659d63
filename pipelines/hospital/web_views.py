"""What the pages show, read from the database: studies, one study, refusals, parts; nothing is written here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from medseg_pipelines.hospital.database import deliveries, jobs, parts, refusals, series
from medseg_pipelines.hospital.jobs import STEPS
from medseg_pipelines.hospital.operations import SILENT_S, stage_seconds

ALL_STEPS = ("received", "complete", *STEPS)
STUDY_STATES = ("in-work", "done", "dead", "not-taken")
STUDIES_PER_PAGE, REFUSALS_PER_PAGE = 25, 50


@dataclass(frozen=True)
class LabelQuality:
    """The Dice that is expected of a label, and its interval; None where nothing of it was found."""

    label: str
    expected: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class StudyRow:
    """A study in the list. `at`: of its last change; `dice`: of the label of which least is expected.

    `doing`: what its jobs are about, as in `JobView.state`; empty where nothing is open.
    """

    id: str
    patient_name: str
    patient_id: str
    date: str
    description: str
    modalities: str
    series: int
    state: str
    receiving: bool
    jobs: int
    jobs_done: int
    doing: str
    at: float
    dice: LabelQuality | None
    look: bool


@dataclass(frozen=True)
class StudyList:
    """A page of the list. `counts`: studies by state, `all` among them."""

    rows: tuple[StudyRow, ...]
    counts: Mapping[str, int]
    page: int
    pages: int
    first: int
    total: int


@dataclass(frozen=True)
class DeliveryView:
    """A result on its way to a destination."""

    destination: str
    format: str
    state: str
    attempts: int
    reason: str
    wait_s: float
    sent_at: float | None
    confirmed_at: float | None


@dataclass(frozen=True)
class JobView:
    """A job, for people. `state`: queued, running, sending, done, dead, superseded; `done_steps`: of `ALL_STEPS`.

    `outdated`: of an earlier revision than the series has now; `picture`: what its file was called when it was made.
    """

    id: str
    rule: str
    model: str
    model_sha256: str
    revision: int
    outdated: bool
    state: str
    done_steps: int
    attempts: int
    losses: int
    wait_s: float
    reason: str
    worker: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    seconds: Mapping[str, float]
    quality: tuple[LabelQuality, ...]
    warnings: tuple[str, ...]
    look: bool
    picture: str | None
    deliveries: tuple[DeliveryView, ...]

    @property
    def may_retry(self) -> bool:
        """Whether it, or one of its deliveries, has been given up."""
        return self.state == "dead"

    @property
    def failed_to_send(self) -> bool:
        """Whether it is made, but not all of it could be sent."""
        return any(delivery.state == "dead" for delivery in self.deliveries)


@dataclass(frozen=True)
class SeriesView:
    """A series of a study; `selection`: what each rule said."""

    id: str
    description: str
    modality: str
    body_part: str
    thickness_mm: float | None
    images: int
    expected: int | None
    receiving: bool
    assumed: bool
    revision: int
    sent_by: str
    first_at: float
    last_at: float
    selection: tuple[str, ...]
    jobs: tuple[JobView, ...]


@dataclass(frozen=True)
class StudyView:
    """A study with its series, those with jobs first."""

    id: str
    patient_name: str
    patient_id: str
    accession_number: str
    date: str
    description: str
    state: str
    series: tuple[SeriesView, ...]

    @property
    def busy(self) -> bool:
        """Whether it is still changing by itself."""
        return any(s.receiving or any(j.state in ("queued", "running", "sending") for j in s.jobs) for s in self.series)


@dataclass(frozen=True)
class RefusalView:
    """A file, or an association, that was refused."""

    at: float
    sent_by: str
    reason: str
    file: str


@dataclass(frozen=True)
class PartView:
    """A process of the node."""

    name: str
    kind: str
    started_at: float
    seen_at: float
    silent: bool


@dataclass(frozen=True)
class Queues:
    """How much waits: jobs and deliveries by state, series being received."""

    jobs: Mapping[str, int]
    deliveries: Mapping[str, int]
    receiving: int


def list_studies(connection: sa.Connection, *, state: str, words: Sequence[str], page: int) -> StudyList:
    """The page-th of the studies in a state (`all`: any) that have every word, the one that changed last first."""
    found = _studies(words)
    # read once: what the states are is the dear part, of which the counts need all
    every = connection.execute(sa.select(found.c.study_id, found.c.state, found.c.at)).all()
    counts = Counter(row.state for row in every)
    counts["all"] = len(every)
    chosen = sorted((row for row in every if state in ("all", row.state)), key=lambda row: (-row.at, row.study_id))
    pages = max(-(-len(chosen) // STUDIES_PER_PAGE), 1)
    page = min(max(page, 1), pages)
    first = (page - 1) * STUDIES_PER_PAGE
    shown = [row.study_id for row in chosen[first : first + STUDIES_PER_PAGE]]
    return StudyList(_study_rows(connection, shown), counts, page, pages, first, len(chosen))


def find_study(connection: sa.Connection, study_id: str, now: float) -> StudyView | None:
    """All about a study; None where there is none with this id."""
    rows = connection.execute(
        sa.select(series)
        .where(series.c.study_id == study_id, series.c.images > 0)
        .order_by(series.c.first_at, series.c.id)
    ).all()
    if not rows:
        return None
    made = _jobs_of(connection, [row.id for row in rows], {row.id: row.revision for row in rows}, now)
    held = sorted((_series_view(row, made[row.id]) for row in rows), key=lambda s: not s.jobs)
    found = _studies((), ids=(study_id,))
    first = rows[0]
    return StudyView(
        id=study_id,
        patient_name=first.patient_name,
        patient_id=first.patient_id,
        accession_number=first.accession_number,
        date=first.study_date,
        description=first.study_description,
        state=str(connection.scalar(sa.select(found.c.state))),
        series=tuple(held),
    )


def picture_name(connection: sa.Connection, job_id: str) -> str | None:
    """What the picture of a job is called in the folder of its results; None where it has none."""
    return _picture(connection.scalar(sa.select(jobs.c.result).where(jobs.c.id == job_id)) or {})


def list_refusals(connection: sa.Connection, page: int) -> tuple[tuple[RefusalView, ...], int, int, int]:
    """The page-th of the refusals, the latest first; which page that is, of how many, and how many refusals."""
    total = connection.scalar(sa.select(sa.func.count()).select_from(refusals)) or 0
    pages = max(-(-total // REFUSALS_PER_PAGE), 1)
    page = min(max(page, 1), pages)
    asked = sa.select(refusals.c.at, refusals.c.sent_by, refusals.c.reason, refusals.c.file)
    asked = asked.order_by(refusals.c.at.desc(), refusals.c.id).limit(REFUSALS_PER_PAGE)
    rows = connection.execute(asked.offset((page - 1) * REFUSALS_PER_PAGE)).tuples()
    return tuple(RefusalView(*row) for row in rows), page, pages, total


def list_parts(connection: sa.Connection, now: float) -> tuple[PartView, ...]:
    """Every process that the node has had, those that are silent included."""
    asked = sa.select(parts.c.name, parts.c.kind, parts.c.started_at, parts.c.seen_at)
    rows = connection.execute(asked.order_by(parts.c.kind, parts.c.name)).tuples()
    return tuple(PartView(*row, silent=now - row[3] > SILENT_S) for row in rows)


def queues(connection: sa.Connection) -> Queues:
    """How much waits."""

    def by_state(table: sa.Table) -> dict[str, int]:
        asked = sa.select(table.c.state, sa.func.count()).group_by(table.c.state)
        return dict(connection.execute(asked).tuples().all())

    return Queues(by_state(jobs), by_state(deliveries), by_state(series).get("receiving", 0))


def _studies(words: Sequence[str], ids: Sequence[str] | None = None) -> sa.Subquery:
    """Each study with its state, which follows from its series, their jobs of the present revision, and deliveries.

    `ids`: of these studies alone.
    """
    asked_about = [] if ids is None else [series.c.study_id.in_(ids)]
    known = sa.select(jobs.c.id).join(series, series.c.id == jobs.c.series_id).where(*asked_about)
    sent = (
        sa.select(
            deliveries.c.job_id,
            sa.func.sum(sa.case((deliveries.c.state == "dead", 1), else_=0)).label("dead"),
            sa.func.sum(sa.case((deliveries.c.state.in_(("waiting", "sending", "sent")), 1), else_=0)).label("open"),
        )
        .where(*([] if ids is None else [deliveries.c.job_id.in_(known)]))
        .group_by(deliveries.c.job_id)
        .subquery()
    )

    def number(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.sum(sa.case((condition, 1), else_=0))

    is_dead = sa.or_(jobs.c.state == "dead", sent.c.dead > 0)
    is_open = sa.or_(jobs.c.state.in_(("queued", "running")), sent.c.open > 0)
    is_receiving = series.c.state == "receiving"
    present = sa.and_(jobs.c.series_id == series.c.id, jobs.c.revision == series.c.revision)
    times = (series.c.last_at, jobs.c.created_at, jobs.c.finished_at)
    latest = [sa.func.coalesce(sa.func.max(at), 0.0) for at in times]
    state = sa.case(
        (number(is_dead) > 0, "dead"),
        (number(sa.or_(is_open, is_receiving)) > 0, "in-work"),
        (sa.func.count(jobs.c.id) > 0, "done"),
        else_="not-taken",
    )
    at: sa.ColumnElement[float] = latest[0]
    for other in latest[1:]:
        at = sa.case((other > at, other), else_=at)
    asked = (
        sa.select(
            series.c.study_id,
            state.label("state"),
            at.label("at"),
            sa.func.count(sa.distinct(series.c.id)).label("series"),
            number(is_receiving).label("receiving"),
            sa.func.count(jobs.c.id).label("jobs"),
            number(sa.and_(jobs.c.state == "done", sa.func.coalesce(sent.c.dead + sent.c.open, 0) == 0)).label("done"),
        )
        .select_from(series.outerjoin(jobs, present).outerjoin(sent, sent.c.job_id == jobs.c.id))
        .where(series.c.images > 0, *asked_about)
        .group_by(series.c.study_id)
    )
    if words:
        asked = asked.where(series.c.study_id.in_(sa.select(series.c.study_id).where(*map(_has, words))))
    return asked.subquery()


def _has(word: str) -> sa.ColumnElement[bool]:
    columns = (
        series.c.patient_name,
        series.c.patient_id,
        series.c.accession_number,
        series.c.study_description,
        series.c.series_description,
    )
    # SQLite knows only the capitals of ASCII
    ways = {word, word.lower(), word.upper(), word.title()}
    return sa.or_(*(column.icontains(way, autoescape=True) for column in columns for way in sorted(ways)))


def _study_rows(connection: sa.Connection, ids: Sequence[str]) -> tuple[StudyRow, ...]:
    rows = {row.study_id: row for row in connection.execute(sa.select(_studies((), ids)))}
    asked = sa.select(series).where(series.c.study_id.in_(ids)).order_by(series.c.first_at, series.c.id)
    held: dict[str, list[Any]] = defaultdict(list)
    for one in connection.execute(asked):
        held[one.study_id].append(one)
    present = sa.and_(jobs.c.series_id == series.c.id, jobs.c.revision == series.c.revision)
    results: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    states: dict[str, set[str]] = defaultdict(set)
    asked_jobs = sa.select(series.c.study_id, jobs.c.state, jobs.c.result).join(jobs, present)
    for study_id, state, result in connection.execute(asked_jobs.where(series.c.study_id.in_(ids))).tuples():
        results[study_id].append(result or {})
        states[study_id].add(state)
    made = []
    for row in map(rows.__getitem__, ids):
        first = held[row.study_id][0]
        known = [q for result in results[row.study_id] for q in _quality(result) if q.expected is not None]
        made.append(
            StudyRow(
                id=row.study_id,
                patient_name=first.patient_name,
                patient_id=first.patient_id,
                date=first.study_date,
                description=first.study_description,
                modalities=", ".join(sorted({one.modality for one in held[row.study_id] if one.modality})),
                series=row.series,
                state=row.state,
                receiving=row.receiving > 0,
                jobs=row.jobs,
                jobs_done=row.done,
                doing=_doing(states[row.study_id], row.state),
                at=row.at,
                dice=min(known, key=lambda q: q.expected or 0.0, default=None),
                look=any(_look(result) for result in results[row.study_id]),
            )
        )
    return tuple(made)


def _doing(states: set[str], state: str) -> str:
    if state != "in-work" or not states:
        return ""
    return next((doing for doing in ("running", "queued") if doing in states), "sending")


def _jobs_of(
    connection: sa.Connection, series_ids: Sequence[str], revisions: Mapping[str, int], now: float
) -> dict[str, list[JobView]]:
    asked = sa.select(jobs).where(jobs.c.series_id.in_(series_ids))
    rows = connection.execute(asked.order_by(jobs.c.revision.desc(), jobs.c.rule, jobs.c.id)).all()
    sends: dict[str, list[DeliveryView]] = defaultdict(list)
    waiting = sa.select(deliveries).where(deliveries.c.job_id.in_([row.id for row in rows]))
    for d in connection.execute(waiting.order_by(deliveries.c.destination, deliveries.c.format)):
        wait_s = max(d.not_before - now, 0.0) if d.state == "waiting" else 0.0
        sends[d.job_id].append(
            DeliveryView(d.destination, d.format, d.state, d.attempts, d.reason, wait_s, d.sent_at, d.confirmed_at)
        )
    made: dict[str, list[JobView]] = defaultdict(list)
    for row in rows:
        made[row.series_id].append(_job_view(row, tuple(sends[row.id]), revisions[row.series_id], now))
    return made


def _job_view(row: Any, sends: tuple[DeliveryView, ...], revision: int, now: float) -> JobView:
    result = row.result or {}
    states = {d.state for d in sends}
    state = row.state
    if state == "done" and states - {"done"}:
        state = "dead" if "dead" in states else "superseded" if states <= {"done", "superseded"} else "sending"
    return JobView(
        id=row.id,
        rule=row.rule,
        model=row.model,
        model_sha256=row.model_sha256,
        revision=row.revision,
        outdated=row.revision != revision,
        state=state,
        done_steps=_done_steps(row, states),
        attempts=row.attempts,
        losses=row.losses,
        wait_s=max(row.not_before - now, 0.0) if row.state == "queued" else 0.0,
        reason=row.reason,
        worker=row.worker if row.state == "running" else None,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        seconds=stage_seconds(result),
        quality=_quality(result),
        warnings=tuple(str(warning) for warning in result.get("warnings") or ()),
        look=_look(result),
        picture=_picture(result),
        deliveries=sends,
    )


def _done_steps(row: Any, sent: set[str]) -> int:
    """How many of `ALL_STEPS` are behind a job; the last two follow from the states of its deliveries."""
    done = ALL_STEPS.index(row.step) + 1
    if row.state == "done" and sent and sent <= {"done"}:
        return len(ALL_STEPS)
    if row.state == "done" and sent and sent <= {"sent", "done"}:
        return max(done, ALL_STEPS.index("published") + 1)
    return done


def _series_view(row: Any, made: Sequence[JobView]) -> SeriesView:
    return SeriesView(
        id=row.id,
        description=row.series_description,
        modality=row.modality,
        body_part=row.body_part,
        thickness_mm=row.thickness_mm,
        images=row.images,
        expected=row.expected,
        receiving=row.state == "receiving",
        assumed=row.assumed,
        revision=row.revision,
        sent_by=row.sent_by,
        first_at=row.first_at,
        last_at=row.last_at,
        selection=tuple(filter(None, row.selection.split("; "))),
        jobs=tuple(made),
    )


def _quality(result: Mapping[str, Any]) -> tuple[LabelQuality, ...]:
    found = result.get("quality") or {}
    return tuple(LabelQuality(str(n), q.get("expected"), q.get("low"), q.get("high")) for n, q in found.items())


def _look(result: Mapping[str, Any]) -> bool:
    return bool(result.get("look"))


def _picture(result: Mapping[str, Any]) -> str | None:
    made = (result.get("files") or {}).get("picture") or {}
    name = made.get("file") or made.get("name")
    return str(name) if name else None
