"""The worker with a process of its own kind for inference: queue, leases, troubles, and what becomes of results."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hospital_peers import wait_for
from hospital_series import insert_instance, insert_series, new_node, put, row_of, sends, settings_of, states

import medseg
from medseg_pipelines.hospital import worker as worker_module
from medseg_pipelines.hospital.command import stopping
from medseg_pipelines.hospital.database import instances, jobs, parts
from medseg_pipelines.hospital.jobs import Jobs, Order, Worker
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.publish import Publisher
from medseg_pipelines.hospital.settings import NodeSettings
from medseg_pipelines.hospital.store import Store
from medseg_pipelines.hospital.worker import request_of, run_worker, sends_of

FAKE = str(Path(__file__).with_name("hospital_fake_child.py"))
FORMATS = ["nifti", "dicom-seg"]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """With one rule, three goes for each job, and a folder for results."""
    made = node_of(tmp_path)
    yield made
    made.close()


def node_of(folder: Path, **worker: Any) -> Node:
    """The same with other settings of the worker."""
    (folder / "out").mkdir(exist_ok=True)
    rules = [{"name": "all", "model": "done", "formats": FORMATS}]
    return new_node(settings_of(folder, "done", rules=rules, worker=worker))


def add_job(node: Node, number: int = 1, how: str = "done", **changes: Any) -> str:
    """A job for a process that behaves so; its id."""
    series_id = f"{number:032x}"
    with node.database.writing() as connection:
        insert_series(connection, series_id)
        insert_instance(connection, series_id, series_id, f"store/{number}.dcm")
    settings = {"formats": FORMATS, "tta": "none"}
    return put(node, replace(Order(series_id, 1, "all", how, "f" * 64, settings), **changes))


@contextmanager
def working(node: Node, folder: Path) -> Iterator[threading.Event]:
    """A worker at work, with its `stop`; what breaks it is raised when the block ends."""
    stop, broken = threading.Event(), []

    def work() -> None:
        try:
            run_worker(node, stop, command=(sys.executable, FAKE, str(folder)))
        except BaseException as error:  # noqa: BLE001
            broken.append(error)

    thread = threading.Thread(target=work, name="working")
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    if broken:
        raise broken[0]


def is_in(node: Node, job_id: str, *wanted: str) -> Callable[[], bool]:
    """Whether a job is in one of these states."""
    return lambda: row_of(node, job_id).state in wanted


def begun(folder: Path) -> list[str]:
    """The jobs that a process has begun, in order, each as often as it was."""
    path = folder / "begun"
    return path.read_text().split() if path.exists() else []


def test_a_job_is_done_and_sent_in_the_formats_of_each_destination(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    destinations = [
        {"name": "folder", "folder": str(tmp_path / "out")},
        {"name": "seg", "folder": str(tmp_path / "out"), "formats": ["dicom-seg", "rtstruct"]},
        {"name": "pacs", "peer": "pacs"},
        {"name": "unasked", "folder": str(tmp_path / "out")},
    ]
    rule = {"name": "all", "model": "done", "formats": FORMATS, "send_to": ["folder", "seg", "pacs"]}
    peers = {"pacs": {"ae_title": "PACS", "host": "127.0.0.1", "port": 9}}
    publish = {"destinations": destinations}
    node = new_node(settings_of(tmp_path, "done", rules=[rule], peers=peers, publish=publish))
    job_id = add_job(node)
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "done"))
    row = row_of(node, job_id)
    assert sends(node) == [
        (job_id, "folder", "dicom-seg"),
        (job_id, "folder", "nifti"),
        (job_id, "pacs", "dicom-seg"),
        (job_id, "seg", "dicom-seg"),
    ]
    assert set(row.result["files"]) == {"dicom-seg", "nifti", "picture"}
    for made in row.result["files"].values():
        assert (node.store.results / job_id / made["file"]).stat().st_size == made["size"]
    # nothing is left where it was made
    assert sorted(path.name for path in node.store.work.iterdir()) == ["test-worker-0.lock"]
    node.close()


def test_rules_that_ask_for_the_same_have_it_sent_to_the_destinations_of_each(tmp_path: Path) -> None:
    rules = [
        {"name": name, "model": "done", "formats": FORMATS, "send_to": [name]} for name in ("all", "study", "gone")
    ]
    destinations = [{"name": rule["name"], "folder": str(tmp_path / "out")} for rule in rules]
    (tmp_path / "out").mkdir()
    settings = settings_of(tmp_path, "done", rules=rules[:2], publish={"destinations": destinations})
    node = new_node(settings)
    job_id = add_job(node, also=("study", "gone"))
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "done"))
    assert {destination for _, destination, _ in sends(node)} == {"all", "study"}
    node.close()


def test_pictures_are_never_sent_and_a_rule_may_send_nothing(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "done")
    (rule,) = settings.rules
    assert sends_of(settings, [rule], ["picture"]) == []
    nowhere = NodeSettings.model_validate(settings.model_dump() | {"publish": {}})
    assert sends_of(nowhere, [rule], ["dicom-seg"]) == []


def test_a_refused_series_is_dead_at_once_with_the_reason(node: Node, tmp_path: Path) -> None:
    job_id = add_job(node, how="refuse")
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "dead"))
    row = row_of(node, job_id)
    assert (row.reason, row.attempts, begun(tmp_path)) == ("no single volume", 1, [job_id])


def test_poison_is_dead_after_its_goes_while_its_neighbours_are_done(node: Node, tmp_path: Path) -> None:
    poison = add_job(node, 1, "segv", priority=9)
    others = [add_job(node, number) for number in range(2, 6)]
    with working(node, tmp_path):
        wait_for(lambda: states(node) == {"dead": 1, "done": 4})
        row = row_of(node, poison)
        assert (row.state, row.attempts) == ("dead", 3)
        assert row.reason == "the process that infers broke down: it ended by SIGSEGV"
        assert begun(tmp_path).count(poison) == 3
        # nothing of it holds the disk
        assert list((node.store.work / node.me.name).iterdir()) == []
        assert all(begun(tmp_path).count(other) == 1 for other in others)
        # it is cured, and replayed
        (tmp_path / "cured").write_text(poison)
        assert node.jobs.replay(poison)
        wait_for(is_in(node, poison, "done"))
    assert (row_of(node, poison).reason, row_of(node, poison).attempts) == ("", 1)


def test_a_job_that_failed_waits_while_others_are_done(tmp_path: Path) -> None:
    node = node_of(tmp_path, retry_s=600.0)
    failing, other = add_job(node, 1, "fail", priority=9), add_job(node, 2)
    with working(node, tmp_path):
        wait_for(is_in(node, other, "done"))
        row = row_of(node, failing)
        assert (row.state, row.reason) == ("queued", "the device is in a bad mood")
    node.close()


def test_a_job_that_hangs_is_ended_and_dead_after_its_goes(tmp_path: Path) -> None:
    node = node_of(tmp_path, most_s=0.2, attempts=2)
    job_id = add_job(node, how="hang")
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "dead"))
    assert "it took more than 0.2 s" in row_of(node, job_id).reason
    node.close()


def test_the_last_go_is_without_a_picture(node: Node, tmp_path: Path) -> None:
    job = node.jobs.claim(node.me) if add_job(node) else None
    assert job is not None
    asked = [request_of(node, replace(job, attempts=attempt), "work").picture for attempt in (1, 2, 3)]
    assert asked == [True, True, False]


def test_orders_of_an_older_version_are_done(node: Node, tmp_path: Path) -> None:
    job_id = add_job(node, settings={})
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "done"))
    assert set(row_of(node, job_id).result["files"]) == {"dicom-seg", "picture"}
    newer = replace(Order("1" * 32, 1, "all", "done", "", {"formats": ["nifti"], "of_a_newer_version": 1}))
    with node.database.writing() as connection:
        assert node.jobs.put(connection, replace(newer, series_id=f"{1:032x}"))
    job = node.jobs.claim(node.me)
    assert job is not None
    request = request_of(node, job, "work")
    assert (request.formats, request.tta, request.resample_gaps) == (("nifti",), "auto", False)
    assert request.files == (str(node.store.folder / "store" / "1.dcm"),)


def test_a_job_of_a_rule_that_is_gone_is_dead_and_says_so(node: Node, tmp_path: Path) -> None:
    job_id = add_job(node, rule="gone")
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "dead"))
    assert row_of(node, job_id).reason == "rule gone is no more in the settings; put it back and replay the job"
    assert begun(tmp_path) == []


def test_a_job_without_images_is_dead_and_says_so(node: Node, tmp_path: Path) -> None:
    series_id = "9" * 32
    with node.database.writing() as connection:
        insert_series(connection, series_id)
    job_id = put(node, Order(series_id, 1, "all", "done", "", {}))
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "dead"))
    assert "no image of the series is in the store" in row_of(node, job_id).reason


@pytest.mark.parametrize("damage", ["none", "file", "manifest"])
def test_what_is_made_already_is_not_made_again_where_it_is_whole(node: Node, tmp_path: Path, damage: str) -> None:
    job_id = add_job(node)
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "done"))
    folder = node.store.results / job_id
    if damage == "file":
        (folder / "nifti.nii.gz").write_text("another")
    if damage == "manifest":
        (folder / "manifest.json").write_text('{"files": ')
    # as if the worker had been killed before it was written down
    with node.database.writing() as connection:
        connection.execute(sa.text("UPDATE jobs SET state = 'queued', result = '{}'"))
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "done"))
    assert len(begun(tmp_path)) == (1 if damage == "none" else 2)
    assert (folder / "nifti.nii.gz").read_text() == f"{job_id} nifti"
    assert len(sends(node)) == 2
    assert row_of(node, job_id).result["files"]


def test_a_worker_that_ends_hands_its_job_back_at_once(node: Node, tmp_path: Path) -> None:
    job_id = add_job(node, how="slow")
    began = 0.0
    with working(node, tmp_path) as stop:
        wait_for(lambda: row_of(node, job_id).step == "checked")
        began = time.monotonic()
        stop.set()
    # the job itself would have taken ten minutes
    assert time.monotonic() - began < 20
    row = row_of(node, job_id)
    assert (row.state, row.step, row.attempts, row.losses) == ("queued", "selected", 0, 0)


def test_a_lost_lease_ends_the_work_and_the_result_is_another_s(tmp_path: Path) -> None:
    node = node_of(tmp_path, lease_s=0.4)
    job_id = add_job(node, how="slow")
    other = Worker("other", "0" * 32)
    with working(node, tmp_path):
        wait_for(lambda: row_of(node, job_id).step == "checked")
        with node.database.writing() as connection:
            # the clock has run on while the worker stood still
            connection.execute(sa.text("UPDATE jobs SET token = :token, lease_until = 9e9"), {"token": other.token})
        # a job of its own: it goes on
        wait_for(is_in(node, add_job(node, 2), "done"))
    row = row_of(node, job_id)
    assert (row.state, row.token, row.attempts) == ("running", other.token, 1)
    assert not (node.store.results / job_id).exists()
    node.close()


def test_a_lease_is_renewed_for_as_long_as_the_work_takes(tmp_path: Path) -> None:
    node = node_of(tmp_path, lease_s=0.4)
    job_id = add_job(node, how="slow")
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "running"))
        first = row_of(node, job_id).lease_until
        wait_for(lambda: (row_of(node, job_id).lease_until or first) > first + 1.0)
        assert row_of(node, job_id).losses == 0
    node.close()


def test_a_result_of_other_images_is_made_anew(node: Node, tmp_path: Path) -> None:
    """As where a database was lost and begun anew: its first revision may hold what an earlier one did not."""
    job_id = add_job(node)
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "done"))
    first = row_of(node, job_id).result
    with node.database.writing() as connection:
        connection.execute(instances.update().values(file="store/another.dcm"))
        connection.execute(jobs.update().values(state="queued", step="selected"))
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "done"))
    assert row_of(node, job_id).result["inputs"] != first["inputs"]
    assert begun(tmp_path) == [job_id] * 2
    # and the same ones are not
    with node.database.writing() as connection:
        connection.execute(jobs.update().values(state="queued", step="selected"))
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "done"))
    assert begun(tmp_path) == [job_id] * 2


def test_a_worker_that_is_stuck_loses_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = node_of(tmp_path, lease_s=0.4)
    job_id, answers, asked = add_job(node), threading.Event(), threading.Event()

    def disk(*_: object) -> None:
        asked.set()
        answers.wait(60)

    monkeypatch.setattr(worker_module, "read_result", disk)
    monkeypatch.setattr(worker_module, "START_S", -1e6)
    with working(node, tmp_path):
        assert asked.wait(60)
        wait_for(lambda: row_of(node, job_id).losses == 1)
        monkeypatch.undo()
        answers.set()
        wait_for(is_in(node, job_id, "done"))
    node.close()


def test_the_parts_of_the_node_see_the_worker_at_once(node: Node, tmp_path: Path) -> None:
    def kind() -> str | None:
        with node.database.reading() as connection:
            return connection.scalar(sa.select(parts.c.kind).where(parts.c.name == "test-worker-0"))

    with working(node, tmp_path):
        wait_for(lambda: kind() == "worker", seconds=worker_module.BEAT_S - 1)


def test_what_a_crash_has_printed_is_there_after_a_restart(node: Node, tmp_path: Path) -> None:
    job_id = add_job(node, how="segv")
    for _ in range(2):
        with working(node, tmp_path):
            wait_for(is_in(node, job_id, "dead"))
    assert "a library complains" in (node.store.work / "test-worker-0.printed.broken").read_text()
    assert not (node.store.work / "test-worker-0.printed").exists()


def test_jobs_of_workers_that_are_gone_are_taken_over(tmp_path: Path) -> None:
    node = node_of(tmp_path, lease_s=0.4)
    ids = [add_job(node, number) for number in (1, 2)]
    assert node.jobs.claim(Worker("gone for ever", "0" * 32))
    assert node.jobs.claim(Worker(node.me.name, "1" * 32))
    with working(node, tmp_path):
        wait_for(lambda: states(node) == {"done": 2})
    assert [row_of(node, job_id).losses for job_id in ids] == [1, 1]
    node.close()


def test_a_full_disk_lets_no_job_begin_until_there_is_room(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[int] = []

    def full(store: Store, size: int = 0) -> bool:
        looks.append(1)
        return len(looks) > 3

    monkeypatch.setattr(worker_module, "NO_ROOM_S", 0.0)
    monkeypatch.setattr(Store, "has_room", full)
    job_id = add_job(node)
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "done"))
    # once when it began and once when it was over, not at each look
    told = [m for m in caplog.messages if "no job is begun" in m]
    assert len(told) == 2
    assert told[1].startswith("over: ")


def test_a_database_that_is_away_for_a_while_costs_nothing(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = {"claim": 2, "finish": 2, "renew": 1, "advance": 1, "give_back": 1, "release_expired": 1}

    def flaky(name: str) -> Callable[..., Any]:
        real = getattr(Jobs, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if away[name]:
                away[name] -= 1
                raise sa.exc.OperationalError("statement", {"patient": "Canary"}, Exception("gone"))
            return real(*arguments, **named)

        return call

    for name in away:
        monkeypatch.setattr(Jobs, name, flaky(name))
    monkeypatch.setattr(worker_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(worker_module, "BEAT_S", 0.05)
    job_id = add_job(node)
    with working(node, tmp_path):
        wait_for(is_in(node, job_id, "done"))
        wait_for(lambda: away["release_expired"] == 0)
    assert begun(tmp_path) == [job_id]
    assert [left for name, left in away.items() if name != "renew"] == [0] * 5
    assert "Canary" not in caplog.text


def test_no_job_is_taken_while_no_process_can_be_started(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(worker_module, "BEAT_S", 0.01)
    (tmp_path / "broken").touch()
    job_id = add_job(node)

    def trouble() -> str | None:
        with node.database.reading() as connection:
            return connection.scalar(sa.select(parts.c.trouble))

    with working(node, tmp_path):
        wait_for(lambda: "no process that infers can be started" in caplog.text)
        # for /readyz
        wait_for(lambda: "no process that infers can be started" in (trouble() or ""))
        assert row_of(node, job_id).attempts == 0
        (tmp_path / "broken").unlink()
        wait_for(is_in(node, job_id, "done"))
        wait_for(lambda: trouble() is None)
    assert row_of(node, job_id).attempts == 1


def test_a_broken_thread_ends_the_worker_and_is_raised(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError("publisher")

    monkeypatch.setattr(Publisher, "run", breaks)
    with pytest.raises(ZeroDivisionError), working(node, tmp_path):
        wait_for(lambda: not any(thread.name == "working" for thread in threading.enumerate()))


def test_two_workers_of_one_name_do_not_take_each_other_s_jobs(node: Node, tmp_path: Path) -> None:
    job_id = add_job(node, how="slow")
    twin = node_of(tmp_path)
    with working(node, tmp_path):
        wait_for(lambda: row_of(node, job_id).step == "checked")
        at_once = threading.Event()
        at_once.set()
        with pytest.raises(medseg.ConfigError, match="test-worker-0 runs already"):
            run_worker(twin, at_once)
        assert row_of(node, job_id).state == "running"
    twin.close()


def test_what_happens_to_jobs_is_in_the_audit_log_without_a_patient(node: Node, tmp_path: Path) -> None:
    done, dead = add_job(node, 1), add_job(node, 2, "refuse")
    with working(node, tmp_path):
        wait_for(lambda: states(node) == {"done": 1, "dead": 1})
    text = node.audit.path.read_text()
    (failed,) = [line for line in text.splitlines() if '"event": "failed"' in line]
    assert dead in failed
    assert '"state": "dead"' in failed
    assert "no single volume" in failed
    (kept,) = [line for line in text.splitlines() if '"event": "done"' in line]
    assert done in kept
    assert row_of(node, done).result["files"]["dicom-seg"]["sha256"] in kept


def test_signals_are_heard_while_the_event_is_being_waited_for() -> None:
    with stopping() as stop:
        # the lock that `wait` and `set` both take: a handler that waited for it would never end
        with stop._cond:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)


def test_workers_of_one_machine_share_its_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    threads = [
        worker_module._threads(settings_of(tmp_path, "done", worker=worker).worker)
        for worker in (
            {"threads": 3},
            {"threads": None},
            {"threads": None, "workers": 4},
            {"threads": None, "workers": 20},
        )
    ]
    assert threads == [3, None, 2, 1]


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_what_was_published_long_ago_is_removed_again_and_again(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Node] = []

    def clear(of: Node) -> int:
        calls.append(of)
        if len(calls) == 1:
            raise OSError("a disk that does not answer")
        return 0

    monkeypatch.setattr(worker_module, "HOUSE_S", 0.01)
    monkeypatch.setattr(worker_module, "clear_published", clear)
    with working(node, tmp_path):
        wait_for(lambda: len(calls) >= 3)
    assert set(map(id, calls)) == {id(node)}
