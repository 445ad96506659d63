"""A day of a hospital in a few minutes: studies arrive as in a day, are segmented, and come back as DICOM SEG.

    python tests/benchmarks/hospital.py --studies 500 --day-s 600 -o RESULT.json

A whole node (`medseg-hospital run`: gateway, workers, pages, SQLite) runs beside a sender and a PACS that are part of
this script. Arrivals are a Poisson process whose rate follows the hours of a day: few at night, most from nine to four.
Each study is one series of --slices slices. Kept are: how many were acknowledged, how many came back, none twice; the
time from the last acknowledged slice to the result; the length of the queue; seconds by stage; what database and disk
took; memory of the node. It ends with an error where a study is lost or comes back twice.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from machine import machine
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt

MR = "1.2.840.10008.5.1.4.1.1.4"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
# studies begun in each hour of a day, relative to each other: a department that works from seven to six
HOURS = (1, 1, 1, 1, 1, 2, 4, 10, 18, 22, 22, 20, 16, 18, 20, 20, 16, 10, 6, 4, 3, 2, 2, 1)
QUIET_S = 2.0


def main() -> None:
    """Run the day, judge it, write it down."""
    arguments = read_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        day = Day(arguments, Path(temporary))
        result = day.run()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if result["lost"] or result["twice"]:
        raise SystemExit(f"{result['lost']} studies lost, {result['twice']} came back twice")


def read_arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--day-s", type=float, default=600.0, help="so long the day takes")
    parser.add_argument("--slices", type=int, default=35)
    parser.add_argument("--model", default="hippocampus", help="a run folder or a name of `medseg models`")
    parser.add_argument("--tta", default="none")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--patience-s", type=float, default=900.0, help="wait so long after the day for the rest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


class Day:
    """One simulated day and what was seen of it."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work
        self.node_port, self.pacs_port, self.web_port = (free_port() for _ in range(3))
        rng = np.random.default_rng(arguments.seed)
        hours = rng.choice(24, size=arguments.studies, p=np.array(HOURS) / sum(HOURS))
        self.arrivals = np.sort((hours + rng.random(arguments.studies)) / 24 * arguments.day_s)
        self.voxels = rng.integers(0, 1000, size=(arguments.slices, 51, 35), dtype=np.uint16)
        self.sent: dict[str, float] = {}
        self.back: dict[str, list[float]] = {}
        self.unsent: list[str] = []
        self.lock = threading.Lock()

    def run(self) -> dict[str, Any]:
        """The day from the start of the node to the last result."""
        pacs = self._pacs()
        settings = self._settings()
        node = subprocess.Popen([sys.executable, "-m", "medseg_pipelines.hospital", "run", "-c", str(settings)])
        seen: list[dict[str, float]] = []
        try:
            wait_for_port(self.node_port)
            began = time.monotonic()
            done = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(node.pid, began, seen, done))
            watcher.start()
            with ThreadPoolExecutor(16) as senders:
                for number, at in enumerate(self.arrivals):
                    time.sleep(max(0.0, began + at - time.monotonic()))
                    senders.submit(self._send, number)
            deadline = time.monotonic() + self.arguments.patience_s
            while len(self.back) < len(self.sent) and time.monotonic() < deadline:
                time.sleep(0.2)
            took = time.monotonic() - began
            done.set()
            watcher.join()
            return self._judge(took, seen)
        finally:
            node.send_signal(signal.SIGTERM)
            node.wait(60)
            pacs.shutdown()

    def _settings(self) -> Path:
        settings = {
            "folder": str(self.work / "node"),
            "gateway": {"port": self.node_port},
            "storage": {"least_free_gb": 1},
            "completeness": {"quiet_s": QUIET_S},
            "peers": {"pacs": {"ae_title": "PACS", "host": "127.0.0.1", "port": self.pacs_port}},
            "rules": [{"name": "all", "model": self.arguments.model, "tta": self.arguments.tta}],
            "worker": {"workers": self.arguments.workers},
            "publish": {"destinations": [{"name": "pacs", "peer": "pacs"}]},
            "web": {"port": self.web_port},
        }
        path = self.work / "hospital.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    def _pacs(self) -> Any:
        """A peer that takes segmentations and writes down when each study came back."""

        def stored(event: Any) -> int:
            with self.lock:
                self.back.setdefault(str(event.dataset.StudyInstanceUID), []).append(time.monotonic())
            return 0x0000

        entity = AE(ae_title="PACS")
        entity.add_supported_context(SEG)
        return entity.start_server(("127.0.0.1", self.pacs_port), block=False, evt_handlers=[(evt.EVT_C_STORE, stored)])

    def _send(self, number: int) -> None:
        entity = AE(ae_title="SCANNER")
        entity.add_requested_context(MR, ExplicitVRLittleEndian)
        study, series, frame = (
            generate_uid(entropy_srcs=[f"{number} {what}"]) for what in ("study", "series", "frame")
        )
        association = entity.associate("127.0.0.1", self.node_port, ae_title="MEDSEG")
        if not association.is_established:
            self.unsent.append(study)
            return
        for k in range(self.arguments.slices):
            answer = association.send_c_store(self._slice(number, k, study, series, frame))
            if getattr(answer, "Status", None) != 0x0000:
                self.unsent.append(study)
                association.abort()
                return
        with self.lock:
            self.sent[study] = time.monotonic()
        association.release()

    def _slice(self, number: int, k: int, study: str, series: str, frame: str) -> Dataset:
        made = Dataset()
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        made.SOPClassUID, made.SOPInstanceUID = MR, generate_uid(entropy_srcs=[f"{number} {k}"])
        made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = study, series, frame
        made.PatientID, made.PatientName, made.PatientBirthDate, made.PatientSex = (
            f"P{number}",
            f"Test^{number}",
            "",
            "",
        )
        made.StudyDate, made.StudyTime, made.SeriesDate, made.SeriesTime = "20260101", "120000", "20260101", "120000"
        made.StudyID, made.AccessionNumber, made.ReferringPhysicianName = str(number), str(number), ""
        made.Modality, made.SeriesNumber, made.InstanceNumber, made.Manufacturer = "MR", 1, k + 1, "simulated"
        made.ImageType = ["ORIGINAL", "PRIMARY"]
        made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, k], [1, 0, 0, 0, 1, 0]
        made.PixelSpacing, made.SliceThickness = [1, 1], 1
        made.Rows, made.Columns = self.voxels.shape[1:]
        made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
        made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
        made.PixelData = (self.voxels[k] + np.uint16(number % 7)).tobytes()
        return made

    def _watch(self, node: int, began: float, seen: list[dict[str, float]], done: threading.Event) -> None:
        database = self.work / "node" / "node.sqlite"
        while not done.wait(1.0):
            with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
                (queued,) = connection.execute(
                    "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')"
                ).fetchone()
            parts = [p for p in psutil.Process(node).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
            memory = sum(part.memory_info().rss for part in parts if part.is_running())
            seen.append({"at": time.monotonic() - began, "queued": queued, "memory_mb": memory / 1e6})

    def _judge(self, took: float, seen: list[dict[str, float]]) -> dict[str, Any]:
        waits = sorted(self.back[study][0] - at for study, at in self.sent.items() if study in self.back)
        folder = self.work / "node"
        with closing(sqlite3.connect(folder / "node.sqlite")) as connection:
            results = [
                json.loads(text) for (text,) in connection.execute("SELECT result FROM jobs WHERE state = 'done'")
            ]
        stages: dict[str, list[float]] = {}
        for made in results:
            for stage, seconds in made.get("seconds", {}).items():
                stages.setdefault(stage, []).append(seconds)
        database = sum(path.stat().st_size for path in folder.glob("node.sqlite*"))
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return {
            "studies": self.arguments.studies,
            "slices_a_study": self.arguments.slices,
            "model": self.arguments.model,
            "workers": self.arguments.workers,
            "day_s": self.arguments.day_s,
            "whole_s": round(took, 1),
            "acknowledged": len(self.sent),
            "not_acknowledged": len(self.unsent),
            "came_back": len(self.back),
            "lost": len(self.sent) - len(self.sent.keys() & self.back.keys()),
            "twice": sum(len(times) > 1 for times in self.back.values()),
            "quiet_s": QUIET_S,
            "wait_s": {name: round(float(np.quantile(waits, q)), 2) for name, q in QUANTILES.items()} if waits else {},
            "longest_queue": int(max((s["queued"] for s in seen), default=0)),
            "most_memory_mb": round(max((s["memory_mb"] for s in seen), default=0.0)),
            "stage_s": {name: round(float(np.mean(values)), 4) for name, values in sorted(stages.items())},
            "busy_s_a_study": round(float(np.mean([sum(m.get("seconds", {}).values()) for m in results])), 3),
            "database_kb_a_study": round(database / 1e3 / self.arguments.studies, 2),
            "disk_kb_a_study": round(disk / 1e3 / self.arguments.studies, 1),
            "machine": machine(),
            "date": date.today().isoformat(),
        }


QUANTILES = {"median": 0.5, "p95": 0.95, "most": 1.0}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, patience_s: float = 120.0) -> None:
    """Until somebody listens there. Raises `TimeoutError`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nobody listens on port {port} after {patience_s:.0f} s")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    main()
