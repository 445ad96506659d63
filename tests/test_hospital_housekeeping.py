"""What the disk gets back, and what it never gets back."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hospital_node import slices
from hospital_publishing import audit_events, finish_job, new_node, state_of

from medseg_pipelines.hospital import housekeeping
from medseg_pipelines.hospital.database import deliveries, destinations, instances, jobs, parts, refusals, series
from medseg_pipelines.hospital.deliveries import open_deliveries
from medseg_pipelines.hospital.housekeeping import DAY_S, clear_leavings, clear_published, mend_times
from medseg_pipelines.hospital.intake import NoRoomError
from medseg_pipelines.hospital.jobs import Order
from medseg_pipelines.hospital.node import Node

OLD_S = 31 * DAY_S


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return new_node(tmp_path / "node", storage={"least_free_gb": 0.0, "keep_days": 30.0})


def receive(node: Node, files: list[Path]) -> str:
    """Takes files in and closes their series; its ID."""
    for file in files:
        with node.store.new_file() as path:
            shutil.copyfile(file, path)
            taken = node.intake.take(path, sent_by="SCANNER")
    with node.database.writing() as connection:
        connection.execute(series.update().where(series.c.id == taken.series_id).values(state="complete", revision=1))
    return taken.series_id


def published(node: Node, tmp_path: Path) -> tuple[str, str]:
    """A series of three files whose job is done and confirmed; both IDs."""
    series_id = receive(node, slices(tmp_path / "sent", 3))
    with node.database.reading() as connection:
        uid = connection.scalar(sa.select(series.c.series_uid).where(series.c.id == series_id))
    job = finish_job(node, {"dicom-seg": tmp_path / "sent" / "1-000.dcm"}, uid=str(uid))
    rows = open_deliveries(node)
    batch = rows.claim("out", "w", most=1)
    assert batch is not None
    assert rows.sent(batch, batch.deliveries[0], confirmed=True)
    return series_id, job


def grow_old(node: Node, by_s: float = OLD_S) -> None:
    """All that is written down happened so much earlier."""
    with node.database.writing() as connection:
        for column in (series.c.last_at, instances.c.received_at, jobs.c.finished_at, deliveries.c.confirmed_at):
            connection.execute(column.table.update().values({column.name: column - by_s}))


def stored(node: Node) -> list[Path]:
    return sorted((node.store.folder / "store").rglob("*.dcm"))


def gone(node: Node) -> list[bool]:
    with node.database.reading() as connection:
        return [row.gone_at is not None for row in connection.execute(sa.select(instances)).all()]


def test_what_was_published_long_ago_goes_and_its_rows_stay(node: Node, tmp_path: Path) -> None:
    _, job = published(node, tmp_path)
    assert len(stored(node)) == 3
    assert clear_published(node) == 0
    grow_old(node)
    assert clear_published(node) == 1
    assert stored(node) == []
    assert not (node.store.results / job).exists()
    assert gone(node) == [True] * 3
    assert state_of(node, job).state == "done"
    (line,) = audit_events(node, "cleared")
    assert (line["files"], line["jobs"]) == (3, 1)
    # once
    assert clear_published(node) == 0


def test_a_study_that_no_rule_takes_goes_too(node: Node, tmp_path: Path) -> None:
    receive(node, slices(tmp_path / "sent", 2))
    grow_old(node)
    assert clear_published(node) == 1
    assert stored(node) == []


def test_without_a_limit_nothing_goes(tmp_path: Path) -> None:
    node = new_node(tmp_path / "node", storage={"least_free_gb": 0.0, "keep_days": None})
    published(node, tmp_path)
    grow_old(node, 10_000 * DAY_S)
    assert clear_published(node) == 0
    assert len(stored(node)) == 3


def test_what_a_later_revision_took_the_place_of_holds_nothing(node: Node, tmp_path: Path) -> None:
    series_id, _ = published(node, tmp_path)
    bury_another(node, series_id, "", tmp_path)
    with node.database.writing() as connection:
        assert len(node.jobs.supersede(connection, series_id, 2)) == 1
    grow_old(node)
    assert clear_published(node) == 1
    assert stored(node) == []


def test_what_nobody_asks_for_any_more_goes(node: Node, tmp_path: Path) -> None:
    def refuse(content: bytes) -> Path:
        with node.store.new_file() as path:
            path.write_bytes(content)
            node.intake.refuse(path, sent_by="SCANNER", reason="no DICOM file")
        return node.store.refused / f"{hashlib.sha256(content).hexdigest()[:32]}.bin"

    node.beat()
    old, again, unknown = refuse(b"old"), refuse(b"again"), node.store.refused / f"{'0' * 32}.bin"
    killed = node.store.work / "another-machine-worker-0" / "job"
    killed.mkdir(parents=True)
    # of a process that was killed before the row was there
    unknown.write_bytes(b"unknown")
    with node.database.writing() as connection:
        connection.execute(refusals.update().values(at=refusals.c.at - OLD_S))
        connection.execute(parts.update().values(seen_at=parts.c.seen_at - OLD_S))
    assert clear_leavings(node) == 0
    node.beat()
    refuse(b"again")
    for path in (old, again, unknown, killed.parent):
        os.utime(path, (1e9, 1e9))
    with node.database.writing() as connection:
        connection.execute(refusals.insert().values(id="1", at=1.0, sent_by="", reason="", file=""))
    assert clear_leavings(node) == 3
    assert [path for path in (old, again, unknown, killed) if path.exists()] == [again]
    with node.database.reading() as connection:
        assert list(connection.scalars(sa.select(refusals.c.file))) == [f"refused/{again.name}"]
        assert list(connection.scalars(sa.select(parts.c.name))) == [node.me.name]


def test_a_study_that_cannot_be_removed_keeps_no_other(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def clear(of: Node, study_id: str, before: float) -> bool:
        tried.append(study_id)
        if len(tried) == 1:
            raise PermissionError(13, "Permission denied")
        return True

    published(node, tmp_path)
    with node.database.writing() as connection:
        rows = connection.execute(sa.select(series)).mappings().one()
        connection.execute(series.insert().values({**rows, "id": "2" * 32, "study_id": "2" * 32}))
        file = connection.execute(sa.select(instances).limit(1)).mappings().one()
        connection.execute(instances.insert().values({**file, "id": "2" * 32, "series_id": "2" * 32}))
    grow_old(node)
    monkeypatch.setattr(housekeeping, "_clear", clear)
    assert clear_published(node) == 1
    assert len(tried) == 2


def test_a_clock_that_was_set_back_lets_nothing_wait(node: Node, tmp_path: Path) -> None:
    series_id, _ = published(node, tmp_path)
    run_another(node, series_id, "", tmp_path)
    node.beat()
    with node.database.writing() as connection:
        soon = node.database.now(connection) + DAY_S / 2
        connection.execute(destinations.update().values(not_before=soon))
        connection.execute(series.update().values(last_at=soon + OLD_S))
        connection.execute(jobs.update().where(jobs.c.state == "running").values(lease_until=soon + OLD_S))
    assert node.jobs.release_expired() == ()
    assert mend_times(node) == 2
    assert mend_times(node) == 0
    assert len(node.jobs.release_expired()) == 1
    with node.database.reading() as connection:
        assert connection.scalar(sa.select(destinations.c.not_before)) == soon
        assert connection.scalar(sa.select(series.c.last_at)) < soon


def queue_another(node: Node, series_id: str, job: str, tmp_path: Path) -> None:
    with node.database.writing() as connection:
        node.jobs.put(connection, Order(series_id, 1, "other", "model", "f" * 64, {}))


def run_another(node: Node, series_id: str, job: str, tmp_path: Path) -> None:
    queue_another(node, series_id, job, tmp_path)
    assert node.jobs.claim(node.me) is not None


def bury_another(node: Node, series_id: str, job: str, tmp_path: Path) -> None:
    queue_another(node, series_id, job, tmp_path)
    found = node.jobs.claim(node.me)
    assert found is not None
    assert node.jobs.fail(found.id, node.me, "no", for_good=True) == "dead"


def deliver(state: str) -> Callable[..., None]:
    def change(node: Node, series_id: str, job: str, tmp_path: Path) -> None:
        with node.database.writing() as connection:
            connection.execute(deliveries.update().values(state=state))
            connection.execute(jobs.update().values(step="published" if state == "sent" else "encoded"))

    change.__name__ = state
    return change


def receive_more(node: Node, series_id: str, job: str, tmp_path: Path) -> None:
    with node.database.writing() as connection:
        connection.execute(series.update().values(state="receiving"))


def receive_another_series(node: Node, series_id: str, job: str, tmp_path: Path) -> None:
    """Of the same study, today."""
    receive(node, slices(tmp_path / "more", 2, number=2))


def confirm_late(node: Node, series_id: str, job: str, tmp_path: Path) -> None:
    with node.database.writing() as connection:
        connection.execute(deliveries.update().values(confirmed_at=node.database.now(connection)))


@pytest.mark.parametrize(
    "change",
    [
        queue_another,
        run_another,
        bury_another,
        *(deliver(state) for state in ("waiting", "sending", "sent", "dead")),
        receive_more,
        receive_another_series,
        confirm_late,
    ],
    ids=lambda change: change.__name__,
)
def test_what_is_not_through_stays(node: Node, tmp_path: Path, change: Callable[..., None]) -> None:
    series_id, job = published(node, tmp_path)
    grow_old(node)
    change(node, series_id, job, tmp_path)
    assert clear_published(node) == 0
    assert (node.store.results / job / "dicom-seg.dcm").exists()
    assert len(stored(node)) >= 3
    assert not any(gone(node))


def test_a_study_stays_as_long_as_one_of_its_series(node: Node, tmp_path: Path) -> None:
    """Two series of one study, of which one has a dead job."""
    series_id, _ = published(node, tmp_path)
    other = receive(node, slices(tmp_path / "more", 2, number=2))
    with node.database.writing() as connection:
        node.jobs.put(connection, Order(other, 1, "rule", "model", "e" * 64, {}))
        connection.execute(jobs.update().where(jobs.c.series_id == other).values(state="dead", finished_at=0.0))
        studies = connection.scalars(sa.select(series.c.study_id).where(series.c.id.in_((series_id, other)))).all()
    assert len(set(studies)) == 1
    grow_old(node)
    assert clear_published(node) == 0
    assert len(stored(node)) == 5


def test_a_file_that_comes_again_is_there_again(node: Node, tmp_path: Path) -> None:
    published(node, tmp_path)
    grow_old(node)
    assert clear_published(node) == 1
    receive(node, slices(tmp_path / "again", 1))
    assert sorted(gone(node)) == [False, True, True]
    assert len(stored(node)) == 1
    # for as long as any other
    assert clear_published(node) == 0


def test_a_file_removed_while_it_comes_again_is_not_acknowledged(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Housekeeping looks after the file was moved to its place, and before its row is read."""
    published(node, tmp_path)
    grow_old(node)
    keep = node.store.keep

    def keep_and_lose(*arguments: Any) -> Path:
        place = keep(*arguments)
        assert clear_published(node) == 1
        return place

    monkeypatch.setattr(node.store, "keep", keep_and_lose)
    with pytest.raises(NoRoomError, match="send it again"):
        receive(node, slices(tmp_path / "again", 1))


def test_killed_in_the_middle_it_goes_on(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, job = published(node, tmp_path)
    grow_old(node)

    def fail(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medseg_pipelines.hospital.housekeeping.shutil.rmtree", fail)
    with pytest.raises(KeyboardInterrupt):
        clear_published(node)
    assert not any(gone(node))
    monkeypatch.undo()
    assert clear_published(node) == 1
    assert not (node.store.results / job).exists()
    assert all(gone(node))
