"""When a series is all there, which makes a revision of it, and which jobs follow; one thread looks, again and again.

A slice that comes later makes a new revision, never an addition to the one before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import medseg
from medseg_pipelines.hospital.audit import Audit
from medseg_pipelines.hospital.database import Database, instances, series
from medseg_pipelines.hospital.jobs import Jobs, Order
from medseg_pipelines.hospital.rules import SeriesKnown, select
from medseg_pipelines.hospital.settings import NodeSettings, RuleSettings

log = logging.getLogger(__name__)

# study UID, series UID → how many instances a peer has of it; None where it does not say
CountOf = Callable[[str, str], int | None]


class Completeness:
    """Watches what is being received."""

    def __init__(
        self, database: Database, jobs: Jobs, settings: NodeSettings, audit: Audit, *, count_of: CountOf | None
    ) -> None:
        self._database, self._jobs, self._settings, self._audit = database, jobs, settings, audit
        self._count_of = count_of
        self._models = Models()

    def look(self) -> int:
        """Closes every series that is all there; how many that were."""
        with self._database.reading() as connection:
            quiet_since = self._database.now(connection) - self._settings.completeness.quiet_s
            waiting = (series.c.state == "receiving", series.c.images > 0)
            columns = (series.c.id, series.c.study_uid, series.c.series_uid, series.c.last_at, series.c.images)
            found = connection.execute(sa.select(*columns).where(*waiting, series.c.last_at <= quiet_since)).all()
        closed = 0
        for row in found:
            expected = self._count_of(row.study_uid, row.series_uid) if self._count_of else None
            closed += self._close(row.id, row.images, expected)
        return closed

    def _close(self, series_id: str, images: int, expected: int | None) -> bool:
        models = {rule.model: self._models.of(rule) for rule in self._settings.rules}
        with self._database.writing() as connection:
            now = self._database.now(connection)
            row = connection.execute(sa.select(series).where(series.c.id == series_id).with_for_update()).one()
            if row.state != "receiving" or row.images != images:
                # another slice came while a peer was asked
                return False
            short = expected is not None and images < expected
            if short and now - row.last_at < self._settings.completeness.wait_s:
                connection.execute(series.update().where(series.c.id == series_id).values(expected=expected))
                return False
            revision = row.revision + 1
            new = (instances.c.series_id == series_id, instances.c.revision.is_(None), ~instances.c.is_copy)
            connection.execute(instances.update().where(*new).values(revision=revision))
            selection = select(self._settings.rules, _known(row, images))
            orders = [_order(series_id, revision, rule, models[rule.model]) for rule in selection.taken]
            added = [order for order in orders if self._jobs.put(connection, order)]
            connection.execute(
                series.update()
                .where(series.c.id == series_id)
                .values(
                    state="complete",
                    expected=expected,
                    assumed=expected is None or short,
                    revision=revision,
                    selection=str(selection),
                )
            )
        log.info("series %s is complete as revision %d (%d images): %s", series_id, revision, images, selection)
        self._audit.record(
            "complete", series=series_id, revision=revision, images=images, assumed=expected is None or short
        )
        for order in added:
            self._audit.record(
                "selected", series=series_id, job=order.id, rule=order.rule, model_sha256=order.model_sha256
            )
        return True


@dataclass(frozen=True)
class ModelFiles:
    """SHA-256 of the weights of a model, and of what describes it."""

    weights_sha256: str
    description_sha256: str


class Models:
    """The digests of models, computed once for each state of their files."""

    def __init__(self) -> None:
        self._digests: dict[tuple[Path, int, int], str] = {}

    def of(self, rule: RuleSettings) -> ModelFiles:
        """Of the model of a rule. Raises `ConfigError` where it is not there."""
        weights = medseg.weights_file(Path(rule.model))
        try:
            return ModelFiles(self._digest(weights), self._digest(weights.with_suffix(".json")))
        except OSError as error:
            raise medseg.ConfigError(
                f"rule {rule.name}: model {rule.model}: {weights} cannot be read ({error.strerror}), expected a run "
                "folder or a name of `medseg models`; change `model`"
            ) from error

    def _digest(self, path: Path) -> str:
        state = path.stat()
        key = (path, state.st_mtime_ns, state.st_size)
        if key not in self._digests:
            self._digests[key] = medseg.file_sha256(path)
        return self._digests[key]


def _order(series_id: str, revision: int, rule: RuleSettings, model: ModelFiles) -> Order:
    settings: dict[str, Any] = {
        "description_sha256": model.description_sha256,
        "formats": list(rule.formats),
        "tta": rule.tta,
        "resample_tilt": rule.resample_tilt,
        "resample_gaps": rule.resample_gaps,
    }
    return Order(series_id, revision, rule.name, rule.model, model.weights_sha256, settings, rule.priority)


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
