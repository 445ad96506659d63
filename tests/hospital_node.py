"""A hospital node for tests: DICOM files made of nothing, settings, a gateway in this process or in its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import sqlalchemy as sa
from hospital_peers import HOST, free_port, wait_for
from pydicom import Dataset, FileDataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.pdu import A_ASSOCIATE_RJ

from medseg_pipelines.hospital import gateway as gateway_module
from medseg_pipelines.hospital.completeness import Completeness
from medseg_pipelines.hospital.database import instances, jobs, series
from medseg_pipelines.hospital.jobs import digest
from medseg_pipelines.hospital.node import Node, open_node
from medseg_pipelines.hospital.settings import NodeSettings

CT, EXPLICIT, DEFLATED = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
# of the patient of all files here: it may stand in no log, name or audit line
CANARY = "Tweety"
SENDER = "SCANNER"
ROOT = "1.2.826.0.1.3680043.8.498.7"
# by the start of a gateway: whether it may close series
_GATES: dict[str, threading.Event] = {}


def series_uid(number: int) -> str:
    """Of the series that `slices` makes."""
    return f"{ROOT}.{number}"


def header(number: int = 1, k: int = 0, *, rows: int = 8) -> FileDataset:
    """Plane `k` of CT series `number`; the patient is `CANARY`."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = UID(CT), ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = UID(f"{ROOT}.{number}.{k + 1}")
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    made.StudyInstanceUID, made.SeriesInstanceUID = f"{ROOT}.0", series_uid(number)
    made.PatientName, made.PatientID, made.Modality = f"{CANARY}^Bird", f"{CANARY}-4711", "CT"
    made.StudyDate, made.SeriesDescription, made.BodyPartExamined = "20240229", f"Of {CANARY}", "HEAD"
    made.InstanceNumber, made.SliceThickness, made.SeriesNumber = k + 1, 2.0, number
    made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, 2.0 * k], [1, 0, 0, 0, 1, 0]
    made.PixelSpacing, made.RescaleSlope, made.RescaleIntercept = [1, 1], 1, 0
    made.Rows = made.Columns = rows
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit, made.PixelRepresentation = 15, 1
    made.PixelData = np.random.default_rng(1000 * number + k).integers(-900, 900, (rows, rows), np.int16).tobytes()
    return made


def slices(folder: Path, count: int = 5, *, number: int = 1, first: int = 0, rows: int = 8) -> list[Path]:
    """Files of planes `first` … of a series."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(first, first + count):
        paths.append(folder / f"{number}-{k:03d}.dcm")
        header(number, k, rows=rows).save_as(paths[-1], enforce_file_format=True)
    return paths


def model_folder(folder: Path) -> Path:
    """What passes for a model as long as nobody computes with it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "model.json").write_text("{}")
    return folder


def settings_dict(root: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a node in `root`: quiet after 0.2 s, everything of CT to one model; sections are laid over."""
    base: dict[str, Any] = {
        "folder": str(root / "node"),
        "name": "test",
        "gateway": {"port": free_port(), "allow": [{"ae_title": SENDER}], "handshake_s": 10.0, "idle_s": 10.0},
        "storage": {"least_free_gb": 0.0},
        "completeness": {"quiet_s": 0.2},
        "rules": [{"name": "ct", "model": str(model_folder(root / "model")), "when": {"modality": ["CT"]}}],
    }
    for name, values in changes.items():
        base[name] = base.get(name, {}) | values if isinstance(values, dict) else values
    return base


def node_settings(root: Path, **changes: Any) -> NodeSettings:
    """As `settings_dict`."""
    return NodeSettings.model_validate(settings_dict(root, **changes))


@contextmanager
def gateway(settings: NodeSettings) -> Iterator[Node]:
    """A gateway in threads of this process; what it fails with is raised at the end."""
    node = open_node(settings, "gateway")
    stop, failed = threading.Event(), []

    def run() -> None:
        try:
            gateway_module.run_gateway(node, stop)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    thread = threading.Thread(target=run)
    # no series is closed before the test asks for it: on a slow machine a pause between two slices may be long
    gate, look = _GATES.setdefault(node.me.token, threading.Event()), Completeness.look
    with (
        mock.patch.object(gateway_module, "LOOK_S", 0.05),
        mock.patch.object(Completeness, "look", lambda self: look(self) if gate.is_set() else 0),
    ):
        thread.start()
        try:
            wait_for(lambda: failed or listens(settings.gateway.port), every_s=0.01)
            yield node
        finally:
            stop.set()
            thread.join(30)
            node.close()
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def started(command: str, root: Path, values: dict[str, Any]) -> subprocess.Popen[bytes]:
    """`medseg-hospital COMMAND` in a process of its own; its log is `root/log`."""
    config = root / "node.yaml"
    # JSON is YAML
    config.write_text(json.dumps(values))
    with (root / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "medseg_pipelines.hospital", command, "-v", "-c", str(config)],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


@contextmanager
def gateway_process(root: Path, values: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """`medseg-hospital gateway` as `started` does, killed at the end."""
    process = started("gateway", root, values)
    try:
        wait_for(lambda: process.poll() is not None or listens(values["gateway"]["port"]))
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(30)


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    try:
        socket.create_connection((HOST, port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def association(
    port: int,
    *,
    called: str = "MEDSEG",
    calling: str = SENDER,
    contexts: Sequence[tuple[str, str]] = ((CT, EXPLICIT), ("1.2.840.10008.1.1", EXPLICIT)),
    tls: Any = None,
    handlers: Sequence[Any] = (),
) -> Iterator[Association]:
    """As pynetdicom makes it: it may not be established."""
    ae = AE(calling)
    for abstract, syntax in contexts:
        ae.add_requested_context(abstract, syntax)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = 20
    secure = None if tls is None else (tls, "localhost")
    made = ae.associate(HOST, port, ae_title=called, tls_args=secure, evt_handlers=list(handlers))
    try:
        yield made
    finally:
        if made.is_established:
            made.release()


def rejection_of(port: int, **options: Any) -> str | None:
    """The reason in the rejection that came over the wire; None where none came."""
    # not `is_rejected`: where the rejection has closed the connection before pynetdicom looks at it, that is False
    heard: list[Any] = []
    with association(port, handlers=[(evt.EVT_PDU_RECV, lambda event: heard.append(event.pdu))], **options):
        return next((str(pdu.reason_str) for pdu in heard if isinstance(pdu, A_ASSOCIATE_RJ)), None)


def send(port: int, files: Sequence[Path | Dataset], **options: Any) -> list[int | None]:
    """The status of each C-STORE; None where no answer came."""
    with association(port, **options) as made:
        if not made.is_established:
            return [None] * len(files)
        answers = []
        for file in files:
            if not made.is_established:
                answers.append(None)
                continue
            answers.append(made.send_c_store(file).get("Status"))
        return answers


def rows_of(node: Node, table: sa.Table, *conditions: Any) -> list[Any]:
    """All rows of a table."""
    with node.database.reading() as connection:
        return list(connection.execute(sa.select(table).where(*conditions)).all())


def counter(node: Node, name: str) -> int:
    """The value of a counter."""
    from medseg_pipelines.hospital.database import counters

    return int(rows_of(node, counters, counters.c.name == name)[0].value)


def the_series(node: Node, number: int = 1) -> Any:
    """The row of a series of `slices`; None where there is none."""
    return next(iter(rows_of(node, series, series.c.id == digest(series_uid(number)))), None)


@contextmanager
def closing_series(node: Node) -> Iterator[None]:
    """As long as the block runs, a gateway of this process closes series."""
    gate = _GATES.setdefault(node.me.token, threading.Event())
    gate.set()
    try:
        yield
    finally:
        gate.clear()


def complete(node: Node, number: int = 1, *, revision: int = 1, images: int | None = None) -> Any:
    """The row of a series, once it is complete as that revision; the gateway may close it from now on."""

    def look() -> Any:
        row = the_series(node, number)
        done = row is not None and row.state == "complete" and row.revision == revision
        return row if done and images in (None, row.images) else None

    with closing_series(node):
        return wait_for(look)


def jobs_of(node: Node, number: int = 1) -> list[Any]:
    """The jobs of a series, in the order of its revisions."""
    return sorted(rows_of(node, jobs, jobs.c.series_id == digest(series_uid(number))), key=lambda j: j.revision)


def check_kept(node: Node) -> list[Any]:
    """Every row of an instance has its file with its content; gives the rows."""
    from medseg_pipelines.hospital.store import sha256_of

    held = rows_of(node, instances)
    for row in held:
        assert sha256_of(node.store.folder / row.file) == row.sha256
    return held


def leaks(node_folder: Path, *others: str) -> list[str]:
    """Where the patient's name stands, of names of files, audit lines and the texts in `others`."""
    found = [str(path) for path in node_folder.rglob("*") if CANARY.lower() in path.name.lower()]
    found += [str(p) for p in node_folder.glob("audit/*") if CANARY.lower() in p.read_text().lower()]
    return found + [text for text in others if CANARY.lower() in text.lower()]
