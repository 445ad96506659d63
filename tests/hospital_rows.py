"""A hospital node's database with rows in it, as its parts would have written them; no test lives here."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from medseg_pipelines.hospital import database as tables
from medseg_pipelines.hospital.database import Database
from medseg_pipelines.hospital.jobs import digest
from medseg_pipelines.hospital.node import Node, open_node
from medseg_pipelines.hospital.settings import NodeSettings

# what a rule's model makes of a series that went well
RESULT: Mapping[str, Any] = {
    "seconds": {"read": 1.5, "network": 12.25, "write": 0.75},
    "quality": {
        "anterior": {"expected": 0.91, "low": 0.84, "high": 0.95},
        "posterior": {"expected": 0.88, "low": 0.79, "high": 0.93},
    },
    "warnings": [],
    "look": False,
    "files": {"dicom-seg": {"file": "dicom-seg.dcm", "sha256": "0" * 64, "size": 1000}},
}
POOR: Mapping[str, Any] = {
    **RESULT,
    "quality": {
        "anterior": {"expected": 0.42, "low": 0.11, "high": 0.68},
        "posterior": {"expected": None, "low": None, "high": None},
    },
    "warnings": ["anterior: expected Dice 0.42", "posterior: nothing found"],
    "look": True,
}


def new_node(folder: Path, kind: str = "web", **sections: Any) -> Node:
    """A part of a node in `folder`; `sections` of its settings."""
    settings = {"storage": {"least_free_gb": 0}} | sections
    return open_node(NodeSettings.model_validate({"folder": folder, **settings}), kind)


def add_series(database: Database, **changes: Any) -> str:
    """A complete CT series of 120 images, or what `changes` make of it; its id."""
    series_uid = changes.setdefault("series_uid", f"2.25.{random.getrandbits(100)}")
    study_uid = changes.setdefault("study_uid", f"2.25.{random.getrandbits(100)}")
    now = time.time()
    values = {
        "id": digest(series_uid),
        "study_id": digest(study_uid),
        "patient_name": "Muster^Anna",
        "patient_id": "4711",
        "accession_number": "A-100",
        "study_date": "20260131",
        "study_description": "CT abdomen",
        "series_description": "Portal venous 1.0 B30f",
        "protocol_name": "Abdomen",
        "modality": "CT",
        "body_part": "ABDOMEN",
        "thickness_mm": 1.0,
        "is_image": True,
        "sent_by": "SCANNER1",
        "state": "complete",
        "images": 120,
        "expected": 120,
        "assumed": False,
        "revision": 1,
        "selection": "organs: takes it; lungs: body_part does not match",
        "first_at": now - 300,
        "last_at": now - 240,
    } | changes
    return str(_insert(database, tables.series, values)["id"])


def add_job(database: Database, series_id: str, **changes: Any) -> str:
    """A queued job of the present revision of a series, or what `changes` make of it; its id."""
    with database.reading() as connection:
        asked = sa.select(tables.series.c.revision).where(tables.series.c.id == series_id)
        revision = changes.setdefault("revision", connection.scalar(asked))
    rule = changes.setdefault("rule", "organs")
    state = changes.get("state", "queued")
    now = time.time()
    values: dict[str, Any] = {
        "id": digest(series_id, rule, str(revision)),
        "series_id": series_id,
        "model": "/srv/models/organs-2026",
        "model_sha256": "ab" * 32,
        "order": {"formats": ["dicom-seg"], "tta": "auto"},
        "priority": 0,
        "state": "queued",
        "step": {"done": "encoded"}.get(state, "selected"),
        "attempts": 0 if state == "queued" else 1,
        "losses": 0,
        "not_before": 0.0,
        "reason": "",
        "result": dict(RESULT) if state == "done" else {},
        "created_at": now - 230,
        "started_at": None if state == "queued" else now - 200,
        "finished_at": now - 180 if state in ("done", "dead") else None,
    } | changes
    return str(_insert(database, tables.jobs, values)["id"])


def add_delivery(database: Database, job_id: str, destination: str = "pacs", **changes: Any) -> None:
    """A delivery that is done, or what `changes` make of it."""
    now = time.time()
    values = {
        "job_id": job_id,
        "destination": destination,
        "format": "dicom-seg",
        "state": "done",
        "attempts": 1,
        "first_tried_at": now - 175,
        "not_before": 0.0,
        "reason": "",
        "sent_at": now - 170,
    } | changes
    _insert(database, tables.deliveries, values)


def add_refusal(database: Database, **changes: Any) -> None:
    """A file without a series that was refused, or what `changes` make of it."""
    values = {
        "id": digest(str(random.getrandbits(100))),
        "at": time.time() - 60,
        "sent_by": "SCANNER1",
        "reason": "SeriesInstanceUID is missing; the sender must give one",
        "file": f"refused/{digest(str(random.getrandbits(100)))}.bin",
    } | changes
    _insert(database, tables.refusals, values)


def add_part(database: Database, name: str, kind: str, *, seen_ago_s: float = 1.0, trouble: str | None = None) -> None:
    """A process of the node that was last heard of so long ago."""
    now = time.time()
    values = {"name": name, "kind": kind, "started_at": now - 86400, "seen_at": now - seen_ago_s, "trouble": trouble}
    _insert(database, tables.parts, values)


def add_done(database: Database, *, result: Mapping[str, Any] | None = None, **changes: Any) -> tuple[str, str]:
    """A series whose job is done and sent; ids of its study and of the job."""
    series_id = add_series(database, **changes)
    job_id = add_job(database, series_id, state="done", result=dict(result or RESULT))
    add_delivery(database, job_id)
    return study_of(database, series_id), job_id


def study_of(database: Database, series_id: str) -> str:
    """The study of a series."""
    with database.reading() as connection:
        asked = sa.select(tables.series.c.study_id).where(tables.series.c.id == series_id)
        return str(connection.scalar(asked))


def fill(database: Database, *, studies: int, seed: int = 0) -> list[str]:
    """A hospital's week: names of many kinds, every state, an attack in a name; the ids of the studies."""
    rng = random.Random(seed)
    now = time.time()
    made = []
    for number in range(studies):
        study_uid = f"2.25.{rng.getrandbits(100)}"
        at = now - 60 - number * 2000 * rng.uniform(0.6, 1.4)
        common = {
            "study_uid": study_uid,
            "patient_name": NAMES[number % len(NAMES)],
            "patient_id": f"{rng.randrange(10**7):07d}",
            "accession_number": f"RX{rng.randrange(10**6):06d}",
            "study_date": time.strftime("%Y%m%d", time.gmtime(at)),
            "study_description": STUDIES[number % len(STUDIES)],
            "first_at": at - 90,
            "last_at": at,
        }
        _fill_study(database, rng, number, at, common)
        made.append(digest(study_uid))
    return made


def _fill_study(database: Database, rng: random.Random, number: int, at: float, common: Mapping[str, Any]) -> None:
    kind = rng.choices(("done", "poor", "dead", "unsent", "queued", "running", "none"), (60, 8, 4, 2, 3, 2, 21))[0]
    kind = ("receiving", "running", "dead", "poor", "unsent", "done", "none", "queued")[number] if number < 8 else kind
    add_series(
        database,
        **common,
        series_description="Topogram 0.6 T20f",
        images=1,
        expected=None,
        assumed=True,
        selection="organs: 1 images are not 20 to 2000; lungs: series_description is ruled out",
    )
    if kind == "none":
        return
    if kind == "receiving":
        add_series(database, **common, state="receiving", images=57, expected=None, revision=0, selection="")
        return
    late = number == 3
    series_id = add_series(
        database, **common, revision=2 if late else 1, assumed=number % 5 == 0, images=118 + number % 40
    )
    times = {"created_at": at + 30, "started_at": at + 40, "finished_at": at + 75}
    if kind in ("queued", "running"):
        more = {"queued": {"not_before": time.time() + 40, "attempts": 1, "reason": "the network ran out of memory"}}
        begun = {"created_at": at + 10, "started_at": at + 12, "step": "checked", "worker": "node1-worker-0"}
        add_job(database, series_id, state=kind, **(more.get(kind) or begun))
        return
    if kind == "dead":
        reason = (
            "slices 41 and 43 are 5.0 mm apart, the others 2.5 mm: a slice is missing; send it, or set resample_gaps"
        )
        add_job(database, series_id, state="dead", reason=reason, attempts=3, step="selected", **times)
        return
    result = dict(POOR if kind == "poor" else _result(rng))
    if late:
        add_job(database, series_id, state="dead", revision=1, reason="a slice is missing", **times)
    job_id = add_job(database, series_id, state="done", result=result, **times)
    add_delivery(database, job_id, sent_at=at + 80, state="done", confirmed_at=at + 82)
    if kind == "unsent":
        add_delivery(
            database,
            job_id,
            "archive",
            state="dead",
            attempts=41,
            sent_at=None,
            reason="no association: refused by peer",
        )
    else:
        add_delivery(database, job_id, "archive", format="nifti", sent_at=at + 81)


def _result(rng: random.Random) -> Mapping[str, Any]:
    quality = {}
    for label in ("liver", "spleen", "left kidney", "right kidney"):
        expected = min(max(rng.gauss(0.92, 0.04), 0.5), 0.99)
        quality[label] = {
            "expected": expected,
            "low": expected - rng.uniform(0.03, 0.2),
            "high": min(expected + 0.04, 1),
        }
    return {**RESULT, "quality": quality}


def _insert(database: Database, table: sa.Table, values: Mapping[str, Any]) -> Mapping[str, Any]:
    with database.writing() as connection:
        connection.execute(table.insert().values(values))
    return values


NAMES: Sequence[str] = (
    "Müller^Hans-Jürgen^Maria^Prof. Dr.",
    "<script>alert(1)</script>^<img src=x onerror=alert(2)>",
    "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "Αλεξόπουλος^Κωνσταντίνος",
    "Schmidt-von-Hohenzollern-Sigmaringen-Donaudieburg^Maximilian Alexander Ferdinand Konstantin^^^",
    "عبد الله^محمد",
    "O'Brien^Siobhán",
    "",
    "Nowak^Zofia",
    "Hong^Gildong=洪^吉洞=홍^길동",
    "Ivanov^Sergey",
    "Smith^John",
)
STUDIES: Sequence[str] = (
    "CT Abdomen mit KM portalvenös",
    "Thorax/Abdomen",
    "",
    "CT chest abdomen pelvis with contrast, oncology follow-up, trial 2026-017 arm B, second reading requested",
    "Leber Mehrphasen",
)
