"""Nodes with a tiny model, and received series in them, as the gateway would leave both; no test lives here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import phantom
import sqlalchemy as sa

from medseg_pipelines.hospital.database import deliveries, instances, jobs, series
from medseg_pipelines.hospital.jobs import Order, digest
from medseg_pipelines.hospital.models import Models
from medseg_pipelines.hospital.node import Node, open_node
from medseg_pipelines.hospital.settings import NodeSettings
from medseg_pipelines.hospital.store import sha256_of

VOXELS = np.random.default_rng(1).integers(0, 300, (3, 10, 14)).astype(np.int16)
RULE = "all"


def settings_of(folder: Path, model: Path | str, **changes: Any) -> NodeSettings:
    """A node in `folder`/node with one rule, whose results go as DICOM SEG to a folder."""
    values: dict[str, Any] = {
        "folder": str(folder / "node"),
        "name": "test",
        "storage": {"least_free_gb": 0},
        "rules": [{"name": RULE, "model": str(model), "formats": ["dicom-seg"]}],
        "worker": {"device": "cpu", "precision": "32", "threads": 1, "retry_s": 0.0},
        "publish": {"destinations": [{"name": "out", "folder": str(folder / "out")}]},
    }
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, Mapping) and name in values else value
    return NodeSettings.model_validate(values)


def insert_series(connection: sa.Connection, series_id: str, **changes: Any) -> None:
    """The row of a complete CT series without anything of a patient; `at`: when it came."""
    at = changes.pop("at", 0.0)
    texts = ("patient_name", "patient_id", "accession_number", "study_date", "study_description", "protocol_name")
    values: dict[str, Any] = dict.fromkeys((*texts, "series_description", "body_part", "sent_by", "selection"), "") | {
        "id": series_id,
        "study_id": series_id,
        "series_uid": "1.2.3",
        "study_uid": "1.2.4",
        "modality": "CT",
        "is_image": True,
        "state": "complete",
        "images": 1,
        "assumed": False,
        "revision": 1,
        "first_at": at,
        "last_at": at,
    }
    connection.execute(series.insert().values(values | changes))


def insert_instance(
    connection: sa.Connection, instance_id: str, series_id: str, file: str, *, at: float = 0.0, **changes: Any
) -> None:
    """The row of an instance of revision 1."""
    values: dict[str, Any] = {
        "id": instance_id,
        "sop_id": instance_id,
        "series_id": series_id,
        "sop_instance_uid": "1.2.5",
        "sop_class_uid": "1.2.6",
        "transfer_syntax_uid": "1.2.7",
        "sha256": instance_id * 2,
        "size": 1,
        "file": file,
        "is_copy": False,
        "revision": 1,
        "received_at": at,
    }
    connection.execute(instances.insert().values(values | changes))


def uids_of(number: int) -> tuple[str, str]:
    """The UIDs of a series and of its study."""
    return f"1.2.3.4.{number}", f"1.2.3.9.{number}"


def write_series(place: Path, number: int, voxels: np.ndarray = VOXELS) -> list[Path]:
    """The files of a series of its own study, in no order."""
    uid, study = uids_of(number)

    def named(k: int, ds: Any) -> None:
        phantom.put(ds, SeriesInstanceUID=uid, StudyInstanceUID=study, SOPInstanceUID=f"1.2.3.5.{number}.{k + 1}")
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID

    return sorted(phantom.series(place, named, voxels=voxels).iterdir())


def add_series(node: Node, number: int, voxels: np.ndarray = VOXELS) -> str:
    """A complete series, its files in the store and its rows in the database; its id."""
    uid, study = uids_of(number)
    series_id = digest(uid)
    files = write_series(node.store.folder / "store" / series_id[:2] / series_id, number, voxels)
    with node.database.writing() as connection:
        now = node.database.now(connection)
        insert_series(connection, series_id, series_uid=uid, study_uid=study, images=len(voxels), at=now)
        for path in files:
            sha256 = sha256_of(path)
            file = path.relative_to(node.store.folder).as_posix()
            insert_instance(connection, sha256[:32], series_id, file, sha256=sha256, size=path.stat().st_size, at=now)
    return series_id


def order_of(node: Node, series_id: str, *, priority: int = 0, **changes: Any) -> Order:
    """What the rule makes of a series; `changes` to the settings in it, None takes one out."""
    (rule,) = node.settings.rules
    model = Models().of(rule.model)
    settings = {
        "description_sha256": model.description_sha256,
        "formats": list(rule.formats),
        "tta": "none",
        "resample_tilt": False,
        "resample_gaps": False,
    } | changes
    left = {name: value for name, value in settings.items() if value is not None}
    return Order(series_id, 1, rule.name, rule.model, model.weights_sha256, left, priority)


def put(node: Node, order: Order) -> str:
    """Queues an order; the id of its job."""
    with node.database.writing() as connection:
        assert node.jobs.put(connection, order)
    return order.id


def add_job(node: Node, number: int, **changes: Any) -> str:
    """A series that waits for the model; the id of its job."""
    return put(node, order_of(node, add_series(node, number), **changes))


def row_of(node: Node, job_id: str) -> Any:
    """What the database says of a job."""
    with node.database.reading() as connection:
        return connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()


def states(node: Node) -> dict[str, int]:
    """How many jobs are in each state."""
    with node.database.reading() as connection:
        counted = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        return dict(connection.execute(counted).tuples().all())


def sends(node: Node) -> list[tuple[str, str, str]]:
    """Job, destination and format of all deliveries, sorted."""
    with node.database.reading() as connection:
        asked = sa.select(deliveries.c.job_id, deliveries.c.destination, deliveries.c.format)
        return sorted(connection.execute(asked).tuples().all())


def new_node(settings: NodeSettings, number: int = 0) -> Node:
    """A worker's part of the node."""
    return open_node(settings, "worker", number)
