"""Nothing lost, nothing twice: real gateways and workers that are killed, or stand still for ever, in the middle.

MEDSEG_SERIES: how many series are sent where all is killed; the promise is for 200.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
import yaml
from hospital_node import SENDER, association, check_kept, listens
from hospital_peers import HOST, OrthancPeer, free_port, wait_for
from hospital_series import VOXELS, add_job, new_node, row_of, sends, settings_of, states, uids_of, write_series
from pydicom import dcmread
from pydicom.filebase import DicomBytesIO

from medseg_pipelines.hospital.database import deliveries, jobs
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.results import read_result
from medseg_pipelines.hospital.settings import NodeSettings

SERIES = int(os.environ.get("MEDSEG_SERIES", "200"))
KILLS, GATEWAY_KILLS, SEED = 5, 2, 20260
# of the machine that tests run on nobody knows how busy it is
LONG_S = 600.0
# a series that a killed gateway has half of must not pass for a whole one before its sender has come back
QUIET_S = 20.0


class Parts:
    """Processes of one node."""

    def __init__(self, folder: Path, settings: NodeSettings) -> None:
        self._file = folder / "hospital.yaml"
        self._file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        self._log = (folder / "log").open("ab")
        self.running: list[subprocess.Popen[bytes]] = []

    def worker(self, number: int = 0) -> subprocess.Popen[bytes]:
        """As `medseg-hospital run` starts it."""
        return self._start("worker", "--number", str(number))

    def gateway(self) -> subprocess.Popen[bytes]:
        """As `medseg-hospital run` starts it."""
        return self._start("gateway")

    def close(self) -> None:
        """Ends all, whatever they do."""
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.wait()
        self._log.close()

    def _start(self, part: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "medseg_pipelines.hospital", part, "-c", str(self._file), *options]
        process = subprocess.Popen(command, stderr=self._log, start_new_session=True)
        self.running.append(process)
        return process


def node_and_parts(folder: Path, model: Path, **changes: Any) -> tuple[Node, Parts]:
    """This process's eye on the node, and the parts of it."""
    (folder / "out").mkdir()
    settings = settings_of(folder, model, **changes)
    return new_node(settings, 9), Parts(folder, settings)


def check_results(node: Node, ids: list[str]) -> list[str]:
    """Every job is done once, with results that are whole, are its own, and went out once; their UIDs, sorted."""
    assert states(node) == {"done": len(ids)}
    uids = set()
    for job_id in ids:
        row, result = row_of(node, job_id), read_result(node.store.results / job_id)
        assert result is not None
        assert result["files"] == row.result["files"]
        assert (result["job"], result["series"]) == (job_id, row.series_id)
        segmentation = dcmread(node.store.results / job_id / result["files"]["dicom-seg"]["file"])
        (images,) = segmentation.ReferencedSeriesSequence
        with node.database.reading() as connection:
            series_uid = connection.scalar(
                sa.text("SELECT series_uid FROM series WHERE id = :id"), {"id": row.series_id}
            )
        assert images.SeriesInstanceUID == series_uid
        uids.add(segmentation.SOPInstanceUID)
    assert len(uids) == len(ids)
    assert sends(node) == sorted((job_id, "out", "dicom-seg") for job_id in ids)
    wait_for(lambda: set(delivered(node)) == {"done"}, seconds=LONG_S)
    assert {path.name for path in node.store.results.iterdir()} == set(ids)
    return sorted(uids)


def in_folder(folder: Path) -> list[str]:
    """The UIDs of all that was published there, sorted."""
    return sorted(dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in (folder / "out").rglob("*.dcm"))


def delivered(node: Node) -> list[str]:
    """The states of all deliveries."""
    with node.database.reading() as connection:
        return list(connection.scalars(sa.select(deliveries.c.state)))


class Senders:
    """Scanners that send their series again and again until every slice of them was acknowledged."""

    def __init__(self, port: int, series: Sequence[Sequence[Path]], count: int = 2) -> None:
        self._port = port
        self.acknowledged: list[Path] = []
        self.broken = 0
        self._threads = [threading.Thread(target=self._send_all, args=(series[n::count],)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """All is sent."""
        for thread in self._threads:
            thread.join(LONG_S)
            assert not thread.is_alive()

    def _send_all(self, series: Sequence[Sequence[Path]]) -> None:
        for files in series:
            while not self._send(files):
                self.broken += 1
                time.sleep(0.1)

    def _send(self, files: Sequence[Path]) -> bool:
        # pynetdicom: the association has ended meanwhile
        with suppress(RuntimeError), association(self._port) as made:
            for file in files:
                if not made.is_established or made.send_c_store(file).get("Status") != 0:
                    return False
                self.acknowledged.append(file)
            return True
        return False


def kill_gateways(parts: Parts, port: int, senders: Senders, at: Sequence[int]) -> None:
    """Kills the gateway each time that so many slices are acknowledged and the next ones are on their way."""
    for count in at:
        wait_for(lambda count=count: len(senders.acknowledged) >= count, seconds=LONG_S, every_s=0.001)  # type: ignore[misc]
        (gateway,) = [process for process in parts.running if process.poll() is None and "gateway" in process.args]  # type: ignore[operator]
        gateway.kill()
        gateway.wait()
        parts.gateway()
    wait_for(lambda: listens(port), seconds=LONG_S)


def test_gateways_and_workers_killed_lose_nothing_and_do_nothing_twice(
    tmp_path: Path,
    model: Path,
    orthanc: OrthancPeer,
) -> None:
    orthanc.clear()
    files = [write_series(tmp_path / "sent" / str(number), number) for number in range(SERIES)]
    port = free_port()
    node, parts = node_and_parts(
        tmp_path,
        model,
        gateway={"port": port, "allow": [{"ae_title": SENDER}]},
        completeness={"quiet_s": QUIET_S},
        peers={"pacs": {"ae_title": "ORTHANC", "host": HOST, "port": orthanc.dicom_port}},
        publish={"destinations": [{"name": "out", "peer": "pacs"}]},
        worker={"pictures": False},
    )
    chance = random.Random(SEED)
    try:
        parts.gateway()
        wait_for(lambda: listens(port), seconds=LONG_S)
        began = time.monotonic()
        senders = Senders(port, files)
        moments = sorted(chance.sample(range(1, SERIES * len(VOXELS) - 20), GATEWAY_KILLS))
        killer = threading.Thread(target=kill_gateways, args=(parts, port, senders, moments))
        killer.start()
        for at in sorted(chance.sample(range(1, SERIES - 1), KILLS)):
            kill_worker(node, parts.worker(), at, chance.uniform(0.0, 0.3))
        worker = parts.worker()
        senders.join()
        killer.join()
        wait_for(lambda: states(node) == {"done": SERIES}, seconds=LONG_S)
        took_s = time.monotonic() - began
        # every acknowledged slice is on the disk, as it was sent, and no other
        kept = {row.sop_instance_uid: node.store.folder / row.file for row in check_kept(node)}
        sent = {data.SOPInstanceUID: data for data in map(dcmread, {*senders.acknowledged})}
        assert len(sent) == SERIES * len(VOXELS)
        assert {uid: dcmread(path) for uid, path in kept.items()} == sent
        assert senders.broken >= GATEWAY_KILLS
        # and the PACS has one result of each series
        made = check_results(node, job_ids(node))
        assert orthanc.instances() == made
        results = [dcmread(DicomBytesIO(orthanc.file_of(uid)), stop_before_pixels=True) for uid in made]
        assert {data.Modality for data in results} == {"SEG"}
        came_from = sorted(data.ReferencedSeriesSequence[0].SeriesInstanceUID for data in results)
        assert came_from == sorted(uids_of(number)[0] for number in range(SERIES))
        with node.database.reading() as connection:
            losses = connection.scalar(sa.select(sa.func.sum(jobs.c.losses)))
            attempts = set(connection.scalars(sa.select(jobs.c.attempts)))
        # a worker that is killed is no failure of a job
        assert losses <= KILLS
        assert attempts == {1}
        worker.terminate()
        assert worker.wait(60) == 0
        assert [path.name for path in node.store.work.iterdir()] == ["test-worker-0.lock"]
    finally:
        parts.close()
        node.close()
    print(f"{SERIES} series, {KILLS} + {GATEWAY_KILLS} kills: {took_s:.1f} s, {senders.broken} broken associations")


def job_ids(node: Node) -> list[str]:
    """Of all jobs."""
    with node.database.reading() as connection:
        return list(connection.scalars(sa.select(jobs.c.id)))


def kill_worker(node: Node, worker: subprocess.Popen[bytes], at: int, after_s: float) -> None:
    """Kills it in the middle of a job once `at` are done; nothing of it is left."""
    wait_for_done(node, at)
    # a job takes about so long: it may be anywhere in it
    time.sleep(after_s)
    children = psutil.Process(worker.pid).children(recursive=True)
    worker.kill()
    worker.wait()
    for child in children:
        wait_for_end(child)


def wait_for_done(node: Node, count: int) -> None:
    """So many jobs are done, or more."""
    wait_for(lambda: states(node).get("done", 0) >= count, seconds=LONG_S)


def wait_for_end(process: psutil.Process) -> None:
    """A process is gone; whoever is its parent now may not have asked for its exit code yet."""

    def gone() -> bool:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_for(gone, seconds=10)


def test_the_jobs_of_a_worker_that_stands_still_are_done_by_another(
    tmp_path: Path,
    model: Path,
    postgres: str,
) -> None:
    lease_s, count = 6.0, 24
    changes: dict[str, Any] = {"database": postgres, "worker": {"pictures": False, "lease_s": lease_s}}
    node, parts = node_and_parts(tmp_path, model, **changes)
    try:
        ids = [add_job(node, number) for number in range(count)]
        still, other = parts.worker(0), parts.worker(1)

        def held() -> str | None:
            with node.database.reading() as connection:
                mine = (jobs.c.state == "running", jobs.c.worker == "test-worker-0")
                return connection.scalar(sa.select(jobs.c.id).where(*mine))

        wait_for(lambda: len(workers_of(node)) == 2, seconds=LONG_S)
        # it holds a job and will not come back: nobody is told
        while True:
            wait_for(held, seconds=LONG_S)
            still.send_signal(signal.SIGSTOP)
            if (job_id := held()) is not None:
                break
            still.send_signal(signal.SIGCONT)
        stopped_at = time.time()
        wait_for(lambda: states(node) == {"done": count}, seconds=LONG_S)
        row = row_of(node, job_id)
        assert (row.worker, row.losses, row.attempts) == ("test-worker-1", 1, 1)
        # taken over when the lease ended, give or take two looks, and before what waited longer
        assert row.started_at - stopped_at < 2 * lease_s + 2.0
        assert check_results(node, ids) == in_folder(tmp_path)
        # back from the dead, it finds that its job is another's
        still.send_signal(signal.SIGCONT)
        later = add_job(node, count)
        wait_for(lambda: states(node) == {"done": count + 1}, seconds=LONG_S)
        assert check_results(node, [*ids, later]) == in_folder(tmp_path)
        for worker in (still, other):
            worker.terminate()
        assert [worker.wait(60) for worker in (still, other)] == [0, 0]
    finally:
        parts.close()
        node.close()


def workers_of(node: Node) -> set[str]:
    """The workers that have done something, or are at it."""
    with node.database.reading() as connection:
        found = connection.scalars(sa.select(jobs.c.worker).where(jobs.c.state.in_(("running", "done"))))
        return {name for name in found if name}
