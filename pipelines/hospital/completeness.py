"""When a series is all there, which makes a revision of it, and which jobs follow; one thread looks, again and again.

A slice that comes later makes a new revision, never an addition to the one before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

import medseg
from medseg_pipelines.hospital.audit import Audit
from medseg_pipelines.hospital.database import Database, instances, series
from medseg_pipelines.hospital.jobs import Jobs, Order
from medseg_pipelines.hospital.models import ModelFiles, Models, model_of
from medseg_pipelines.hospital.rules import Selection, SeriesKnown, select
from medseg_pipelines.hospital.settings import NodeSettings, RuleSettings

log = logging.getLogger(__name__)

# study UID, series UID → how many instances a peer has of it; None where it does not say; raises `NoAnswerError`
CountOf = Callable[[str, str], int | None]
# so often a peer is asked for one series
ASK_S = 5.0


class NoAnswerError(Exception):
    """The peer that would know how many instances a series has cannot be asked now."""


class Completeness:
    """Watches what is being received."""

    def __init__(
        self, database: Database, jobs: Jobs, settings: NodeSettings, audit: Audit, *, count_of: CountOf | None
    ) -> None:
        self._database, self._jobs, self._settings, self._audit = database, jobs, settings, audit
        self._count_of = count_of
        self._models = Models()

    def look(self) -> int:
        """Closes every series that is all there; how many that were. Raises `ConfigError` where a model is missing."""
        with self._database.reading() as connection:
            quiet_since = self._database.now(connection) - self._settings.completeness.quiet_s
            waiting = (series.c.state == "receiving", series.c.images > 0)
            columns = (series.c.id, series.c.study_uid, series.c.series_uid, series.c.last_at, series.c.images)
            found = connection.execute(sa.select(*columns).where(*waiting, series.c.last_at <= quiet_since)).all()
        closed, failed = 0, None
        for row in found:
            try:
                closed += self._look(row.id, row.study_uid, row.series_uid, row.images)
            except medseg.ConfigError as error:
                # a model that is not there holds up the series that it is for, and no other
                failed = error
        if failed is not None:
            raise failed
        return closed

    def _look(self, series_id: str, study_uid: str, series_uid: str, images: int) -> bool:
        if self._count_of is None:
            return self._close(series_id, images, None, may_wait=False)
        with self._database.writing() as connection:
            # several gateways share the work, and a short series is not asked for at every look
            now = self._database.now(connection)
            due = sa.or_(series.c.asked_at.is_(None), series.c.asked_at <= now - ASK_S)
            mine = series.update().where(series.c.id == series_id, due).values(asked_at=now)
            if not connection.execute(mine).rowcount:
                return False
        try:
            expected = self._count_of(study_uid, series_uid)
        except NoAnswerError:
            return self._close(series_id, images, None, may_wait=True)
        # one that is unknown there does not come from there
        expected = expected or None
        return self._close(series_id, images, expected, may_wait=expected is not None and images < expected)

    def _model(self, rule: RuleSettings) -> ModelFiles | medseg.ConfigError:
        """The model of a rule, or why it cannot be had, which matters where the rule takes the series."""
        try:
            return model_of(self._models, rule)
        except medseg.ConfigError as error:
            return error

    def _close(self, series_id: str, images: int, expected: int | None, *, may_wait: bool) -> bool:
        # before rows are locked: weights may be large
        models = {rule.name: self._model(rule) for rule in self._settings.rules}
        with self._database.writing() as connection:
            now = self._database.now(connection)
            row = connection.execute(sa.select(series).where(series.c.id == series_id).with_for_update()).one()
            if row.state != "receiving" or row.images != images:
                # another slice came while a peer was asked
                return False
            if may_wait and now - row.last_at < self._settings.completeness.wait_s:
                connection.execute(series.update().where(series.c.id == series_id).values(expected=expected))
                return False
            assumed = expected != images
            new = (instances.c.series_id == series_id, instances.c.revision.is_(None), ~instances.c.is_copy)
            added_images = connection.execute(instances.update().where(*new).values(revision=row.revision + 1)).rowcount
            # none: what had been removed of the last revision is there again
            revision = row.revision + (1 if added_images else 0)
            held = (instances.c.series_id == series_id, instances.c.gone_at.is_not(None), ~instances.c.is_copy)
            gone = connection.scalar(sa.select(sa.func.count()).where(*held)) or 0
            selection = select(self._settings.rules, _known(row, images))
            if gone:
                # a part of a series could make a volume, and a wrong one
                selection = Selection((), (f"{gone} of {images} images were removed as published long ago: send all",))
            orders = _together(_order(series_id, revision, rule, _there(models[rule.name])) for rule in selection.taken)
            added = [order for order in orders if self._jobs.put(connection, order)]
            superseded = self._jobs.supersede(connection, series_id, revision)
            connection.execute(
                series.update()
                .where(series.c.id == series_id)
                .values(
                    state="complete",
                    expected=expected,
                    assumed=assumed,
                    revision=revision,
                    selection=str(selection),
                )
            )
        log.info("series %s is complete as revision %d (%d images): %s", series_id, revision, images, selection)
        self._audit.record("complete", series=series_id, revision=revision, images=images, assumed=assumed)
        for job_id in superseded:
            log.info("job %s is superseded by revision %d", job_id, revision)
            self._audit.record("superseded", series=series_id, job=job_id, revision=revision)
        for order in added:
            self._audit.record(
                "selected", series=series_id, job=order.id, rule=order.rule, model_sha256=order.model_sha256
            )
        return True


def _there(model: ModelFiles | medseg.ConfigError) -> ModelFiles:
    if isinstance(model, medseg.ConfigError):
        raise model
    return model


def _order(series_id: str, revision: int, rule: RuleSettings, model: ModelFiles) -> Order:
    settings: dict[str, Any] = {
        "description_sha256": model.description_sha256,
        "formats": list(rule.formats),
        "tta": rule.tta,
        "resample_tilt": rule.resample_tilt,
        "resample_gaps": rule.resample_gaps,
    }
    return Order(series_id, revision, rule.name, rule.model, model.weights_sha256, settings, rule.priority)


def _together(orders: Iterable[Order]) -> list[Order]:
    """Rules that ask for the same, and differ in where it goes, make one job of all of them."""
    made: dict[str, Order] = {}
    for order in orders:
        first = made.get(order.id)
        if first is not None:
            order = replace(first, also=(*first.also, order.rule), priority=max(first.priority, order.priority))
        made[order.id] = order
    return list(made.values())


def _known(row: Any, images: int) -> SeriesKnown:
    return SeriesKnown(
        modality=row.modality,
        body_part=row.body_part,
        series_description=row.series_description,
        study_description=row.study_description,
        protocol_name=row.protocol_name,
        thickness_mm=row.thickness_mm,
        images=images,
        is_image=row.is_image,
        sent_by=row.sent_by,
    )
