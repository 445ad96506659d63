"""Jobs whose results are to be sent, and peers of ours that take, refuse or break; no test lives here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import sqlalchemy as sa
from dicom_series import OBLIQUE, SHAPE, classic, images_of, ras
from hospital_peers import HOST, wait_for
from pynetdicom import AE, evt

from medseg.grid import Grid
from medseg.readers.segments import Segmentation, SegmentInfo
from medseg.writers.dicom_seg import write_dicom_seg
from medseg.writers.dicom_source import labelled_series
from medseg.writers.provenance import Algorithm
from medseg_pipelines.hospital.database import deliveries, jobs, series
from medseg_pipelines.hospital.jobs import Order, digest
from medseg_pipelines.hospital.node import Node, open_node
from medseg_pipelines.hospital.publish import Publisher
from medseg_pipelines.hospital.settings import NodeSettings

SEG_CLASS = "1.2.840.10008.5.1.4.1.1.66.4"
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
SENDS = (("out", "dicom-seg"),)


def write_seg(path: Path) -> None:
    """A Segmentation of a box in an oblique series of Jane Doe."""
    array = np.zeros(SHAPE, np.uint8)
    array[3:7, 2:7, 1:4] = 1
    labels = Segmentation(array, Grid(SHAPE, ras(OBLIQUE)), (SegmentInfo(1, "liver"),))
    algorithm = Algorithm("net", "1.2", "a" * 64, "b" * 64)
    write_dicom_seg(path, labelled_series(images_of(classic()), labels, algorithm=algorithm))


def renamed(seg: Path, path: Path, number: int) -> str:
    """A copy of `seg` as another object; its SOP Instance UID."""
    data = pydicom.dcmread(seg)
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{data.SOPInstanceUID}.{number}"[-64:].lstrip(
        ".0"
    )
    data.save_as(path)
    return str(data.SOPInstanceUID)


def new_node(folder: Path, *, kind: str = "worker", **settings: Any) -> Node:
    """A node that is quick to try again; `settings`: more of it, those of `publish` and `worker` over ours."""
    publish = {"retry_s": 0.1, "most_retry_s": 1.0, "timeout_s": 5.0} | settings.pop("publish", {})
    worker = {"lease_s": 4.0} | settings.pop("worker", {})
    values = {"folder": folder, "name": "test", "publish": publish, "worker": worker} | settings
    return open_node(NodeSettings.model_validate(values), kind)


def to_peer(port: int, *, commitment: bool = False, **peer: Any) -> dict[str, Any]:
    """Settings of a node with a destination `out` that is a peer on this machine."""
    values = {"ae_title": "PACS", "host": HOST, "port": port} | peer
    destination = {"name": "out", "peer": "pacs", "commitment": commitment}
    return {"peers": {"pacs": values}, "publish": {"destinations": [destination]}}


def add_series(node: Node, uid: str = "1.2.3", **values: Any) -> str:
    """The row of a series that is complete; its ID."""
    text = ("accession_number", "study_date", "study_description", "series_description", "protocol_name")
    row: dict[str, Any] = dict.fromkeys((*text, "body_part", "selection", "sent_by"), "")
    row |= {"id": digest(uid), "study_id": digest(f"study of {uid}"), "series_uid": uid, "study_uid": f"{uid}.0"}
    row |= {"patient_name": "Doe^Jane", "patient_id": "P1", "modality": "MR", "is_image": True, "state": "complete"}
    row |= {"images": 0, "assumed": False, "revision": 1, "first_at": 0.0, "last_at": 0.0}
    with node.database.writing() as connection:
        if connection.scalar(sa.select(series.c.id).where(series.c.id == row["id"])) is None:
            connection.execute(series.insert().values(row | values))
    return str(row["id"])


def finish_job(
    node: Node,
    files: Mapping[str, Path],
    sends: Sequence[tuple[str, str]] = SENDS,
    *,
    number: int = 0,
    uid: str = "1.2.3",
) -> str:
    """A job of a series that has made `files` by format; its ID. The files are copied to its results."""
    order = Order(add_series(node, uid), 1, "rule", "model", f"{number:064x}", {})
    with node.database.writing() as connection:
        node.jobs.put(connection, order)
    job = node.jobs.claim(node.me)
    assert job is not None
    assert job.id == order.id
    folder = node.store.results / job.id
    folder.mkdir()
    record = {}
    for format, path in files.items():
        name = f"{format}.nii.gz" if format == "nifti" else f"{format}.dcm"
        (folder / name).write_bytes(path.read_bytes())
        record[format] = {"file": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert node.jobs.finish(job.id, node.me, {"files": record}, sends)
    return job.id


@contextmanager
def publishing(node: Node) -> Iterator[Publisher]:
    """A publisher at work."""
    publisher, stop = Publisher(node), threading.Event()
    thread = threading.Thread(target=publisher.run, args=(stop,), daemon=True)
    thread.start()
    try:
        yield publisher
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def state_of(node: Node, job: str, destination: str = "out", format: str = "dicom-seg") -> Any:
    """The row of a delivery."""
    d = deliveries.c
    key = (d.job_id == job, d.destination == destination, d.format == format)
    with node.database.reading() as connection:
        return connection.execute(sa.select(deliveries).where(*key)).one()


def step_of(node: Node, job: str) -> str:
    """How far a job is."""
    with node.database.reading() as connection:
        return str(connection.scalar(sa.select(jobs.c.step).where(jobs.c.id == job)))


def wait_until(node: Node, job: str, state: str, *, seconds: float = 30.0, **key: str) -> Any:
    """The row of a delivery that is in a state."""
    return wait_for(lambda: (row := state_of(node, job, **key)).state == state and row, seconds=seconds)


def audit_events(node: Node, event: str) -> list[dict[str, Any]]:
    """The lines of one kind in the audit file of a node."""
    lines = node.audit.path.read_text(encoding="utf-8").splitlines()
    return [entry for line in lines if (entry := json.loads(line))["event"] == event]


@contextmanager
def store_scp(
    port: int,
    take: Any,
    *,
    classes: Sequence[str] = (SEG_CLASS,),
    syntaxes: Sequence[str] = (EXPLICIT,),
    ae_title: str = "PACS",
    handlers: Sequence[Any] = (),
    contexts: Sequence[tuple[str, Sequence[str]]] = (),
    strict: bool = False,
    tls: Any = None,
) -> Iterator[AE]:
    """A peer that answers each C-STORE by `take`, and C-ECHO. `strict`: it must be called by its name."""
    ae = AE(ae_title=ae_title)
    ae.require_called_aet = strict
    ae.add_supported_context("1.2.840.10008.1.1")
    for uid in classes:
        ae.add_supported_context(uid, list(syntaxes))
    for uid, more in contexts:
        ae.add_supported_context(uid, list(more), scu_role=True, scp_role=True)
    server = ae.start_server(
        (HOST, port), block=False, evt_handlers=[(evt.EVT_C_STORE, take), *handlers], ssl_context=tls
    )
    try:
        yield ae
    finally:
        # also what is still open
        server.shutdown()
        # one that is ended in the middle of a message may lose the thread of its protocol, and waits for it for ever
        wait_for(lambda: not any(a.is_alive() and a.dul.is_alive() for a in server.active_associations), seconds=10)


class Received:
    """What a peer got: SOP Instance UID → data set, and the moments (seconds)."""

    def __init__(self, status: int = 0x0000) -> None:
        self.objects: dict[str, Any] = {}
        self.at: list[float] = []
        self.status = status

    def __call__(self, event: evt.Event) -> int:
        data = event.dataset
        data.file_meta = event.file_meta
        self.objects[str(data.SOPInstanceUID)] = data
        self.at.append(time.monotonic())
        return self.status


def certificates(folder: Path) -> dict[str, Path]:
    """An authority, and a certificate for 127.0.0.1 that it has signed: `authority`, `certificate`, `key`."""
    made = {name: folder / f"{name}.pem" for name in ("authority", "authority_key", "certificate", "key", "request")}
    openssl = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    root = [*openssl, "-x509", "-days", "2", "-subj", "/CN=authority", "-keyout", made["authority_key"]]
    ours = [*openssl, "-subj", "/CN=node", "-keyout", made["key"], "-out", made["request"]]
    extension = folder / "san.cnf"
    extension.write_text("subjectAltName=IP:127.0.0.1\n")
    signed = ["openssl", "x509", "-req", "-days", "2", "-in", made["request"], "-CA", made["authority"]]
    signed += ["-CAkey", made["authority_key"], "-CAcreateserial", "-extfile", extension, "-out", made["certificate"]]
    for command in ([*root, "-out", made["authority"]], ours, signed):
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return made
