"""Nothing lost, nothing twice: real workers that are killed, or stand still for ever, in the middle of a queue.

MEDSEG_SERIES: how many series wait where the worker is killed; the promise is for 200.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
import yaml
from hospital_peers import postgres, postgres_server, wait_for  # noqa: F401
from hospital_series import add_job, new_node, row_of, sends, settings_of, states
from pydicom import dcmread

from medseg_pipelines.hospital.database import deliveries, jobs
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.results import read_result
from medseg_pipelines.hospital.settings import NodeSettings

SERIES = int(os.environ.get("MEDSEG_SERIES", "200"))
KILLS, SEED = 5, 20260
# of the machine that tests run on nobody knows how busy it is
LONG_S = 600.0


class Workers:
    """Processes of one node."""

    def __init__(self, folder: Path, settings: NodeSettings) -> None:
        self._file = folder / "hospital.yaml"
        self._file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        self._log = (folder / "log").open("ab")
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, number: int = 0) -> subprocess.Popen[bytes]:
        """As `medseg-hospital run` does."""
        command = [sys.executable, "-m", "medseg_pipelines.hospital", "worker", "-c", str(self._file)]
        process = subprocess.Popen([*command, "--number", str(number)], stderr=self._log, start_new_session=True)
        self.running.append(process)
        return process

    def close(self) -> None:
        """Ends all, whatever they do."""
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.wait()
        self._log.close()


def node_and_workers(folder: Path, model: Path, **changes: Any) -> tuple[Node, Workers]:
    """This process's eye on the node, and the workers of it."""
    (folder / "out").mkdir()
    settings = settings_of(folder, model, **changes)
    return new_node(settings, 9), Workers(folder, settings)


@pytest.fixture
def killed(tmp_path: Path, model: Path) -> Iterator[tuple[Node, Workers]]:
    """On SQLite."""
    node, workers = node_and_workers(tmp_path, model, worker={"pictures": False})
    yield node, workers
    workers.close()
    node.close()


def check_results(node: Node, folder: Path, ids: list[str]) -> None:
    """Every job is done once, with results that are whole, are its own, and went out once."""
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
    out = [dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in (folder / "out").rglob("*.dcm")]
    assert sorted(out) == sorted(uids)
    assert {path.name for path in node.store.results.iterdir()} == set(ids)


def delivered(node: Node) -> list[str]:
    """The states of all deliveries."""
    with node.database.reading() as connection:
        return list(connection.scalars(sa.select(deliveries.c.state)))


def test_a_worker_killed_five_times_loses_nothing_and_does_nothing_twice(
    killed: tuple[Node, Workers], tmp_path: Path
) -> None:
    node, workers = killed
    ids = [add_job(node, number) for number in range(SERIES)]
    chance = random.Random(SEED)
    began = time.monotonic()
    for at in sorted(chance.sample(range(1, SERIES - 1), KILLS)):
        worker = workers.start()
        wait_for_done(node, at)
        # a job takes about so long: it may be anywhere in it
        time.sleep(chance.uniform(0.0, 0.3))
        children = psutil.Process(worker.pid).children(recursive=True)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        for child in children:
            wait_for_end(child)
    worker = workers.start()
    wait_for(lambda: states(node) == {"done": SERIES}, seconds=LONG_S)
    took_s = time.monotonic() - began
    check_results(node, tmp_path, ids)
    with node.database.reading() as connection:
        losses = connection.scalar(sa.select(sa.func.sum(jobs.c.losses)))
        attempts = set(connection.scalars(sa.select(jobs.c.attempts)))
    # a worker that is killed is no failure of a job
    assert losses <= KILLS
    assert attempts == {1}
    worker.terminate()
    assert worker.wait(60) == 0
    assert [path.name for path in node.store.work.iterdir()] == ["test-worker-0.lock"]
    print(f"{SERIES} series, {KILLS} kills: {took_s:.1f} s")


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
    postgres: str,  # noqa: F811
) -> None:
    lease_s, count = 3.0, 24
    changes: dict[str, Any] = {"database": postgres, "worker": {"pictures": False, "lease_s": lease_s}}
    node, workers = node_and_workers(tmp_path, model, **changes)
    try:
        ids = [add_job(node, number) for number in range(count)]
        still, other = workers.start(0), workers.start(1)

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
        check_results(node, tmp_path, ids)
        # back from the dead, it finds that its job is another's
        still.send_signal(signal.SIGCONT)
        later = add_job(node, count)
        wait_for(lambda: states(node) == {"done": count + 1}, seconds=LONG_S)
        check_results(node, tmp_path, [*ids, later])
        for worker in (still, other):
            worker.terminate()
        assert [worker.wait(60) for worker in (still, other)] == [0, 0]
    finally:
        workers.close()
        node.close()


def workers_of(node: Node) -> set[str]:
    """The workers that have done something, or are at it."""
    with node.database.reading() as connection:
        found = connection.scalars(sa.select(jobs.c.worker).where(jobs.c.state.in_(("running", "done"))))
        return {name for name in found if name}
