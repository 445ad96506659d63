"""The folder of a node whose disk is not mounted: nothing is taken in there, no job and no delivery is lost there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa
from hospital_peers import postgres, postgres_server, wait_for  # noqa: F401
from hospital_publishing import SENDS, finish_job, publishing, state_of
from hospital_publishing import new_node as publishing_node
from test_hospital_worker import add_job, begun, is_in, node_of, row_of, working

import medseg
from medseg_pipelines.hospital.database import SCHEMA_VERSION, about, parts
from medseg_pipelines.hospital.node import open_node
from medseg_pipelines.hospital.operations import readiness
from medseg_pipelines.hospital.settings import NodeSettings
from medseg_pipelines.hospital.store import MARK, Store


def test_a_folder_that_is_not_that_of_the_database_is_refused(
    tmp_path: Path,
    postgres: str,  # noqa: F811
) -> None:
    first, other = (
        NodeSettings.model_validate({"folder": tmp_path / name, "database": postgres}) for name in ("shared", "bare")
    )
    open_node(first, "gateway").close()
    open_node(first, "worker").close()
    with pytest.raises(medseg.ConfigError, match=r"nothing found in `node.id`.* Mount the shared disk") as refused:
        open_node(other, "worker")
    # nothing is made on the disk below
    assert [path.name for path in (tmp_path / "bare").iterdir()] == []
    (known,) = re.findall(r"expected ([0-9a-f]{32})", str(refused.value))
    (tmp_path / "bare" / MARK).write_text("0" * 32)
    with pytest.raises(medseg.ConfigError, match=r"0{32} found"):
        open_node(other, "worker")
    (tmp_path / "bare" / MARK).write_text(known)
    open_node(other, "worker").close()


def test_a_folder_without_the_node_of_the_settings_is_refused_before_anything_is_made_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On SQLite the database lies in the folder, and cannot know that its disk is not mounted."""
    folder = tmp_path / "node"
    open_node(NodeSettings.model_validate({"folder": folder}), "gateway").close()
    node_id = (folder / MARK).read_text().strip()
    assert f"put `node_id: {node_id}` into the settings" in caplog.text
    known = NodeSettings.model_validate({"folder": folder, "node_id": node_id})
    open_node(known, "gateway").close()
    folder.rename(tmp_path / "away")
    folder.mkdir()
    with pytest.raises(medseg.ConfigError, match=r"nothing found in `node.id`, expected \w+ as `node_id` says"):
        open_node(known, "gateway")
    assert list(folder.iterdir()) == []
    folder.rmdir()
    with pytest.raises(medseg.ConfigError, match="Mount its disk"):
        open_node(known, "worker")
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_database_of_an_earlier_version_is_brought_up_to_date(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres") if kind == "postgresql" else None
    settings = NodeSettings.model_validate({"folder": tmp_path, "database": url})
    node = open_node(settings, "gateway")
    node.beat()
    with node.database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE parts DROP COLUMN trouble")
        connection.execute(about.update().values(schema_version=1))
    node.close()
    later = open_node(settings, "worker")
    later.beat("no GPU")
    with later.database.reading() as connection:
        assert connection.scalar(sa.select(about.c.schema_version)) == SCHEMA_VERSION
        told = connection.execute(sa.select(parts.c.kind, parts.c.trouble).order_by(parts.c.kind)).tuples().all()
    assert told == [("gateway", None), ("worker", "no GPU")]
    later.close()


def test_a_new_database_takes_the_folder_as_it_is(tmp_path: Path, postgres: str) -> None:  # noqa: F811
    open_node(NodeSettings.model_validate({"folder": tmp_path}), "gateway").close()
    before = (tmp_path / MARK).read_text()
    open_node(NodeSettings.model_validate({"folder": tmp_path, "database": postgres}), "gateway").close()
    assert (tmp_path / MARK).read_text() == before


def test_a_folder_that_may_not_be_used_is_a_user_s_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(medseg.ConfigError, match=r"cannot be used .Operation not permitted."):
        open_node(NodeSettings.model_validate({"folder": tmp_path / "node"}), "gateway")


def test_a_worker_whose_disk_is_gone_takes_no_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = node_of(tmp_path)
    mark = node.store.folder / MARK
    away = mark.rename(tmp_path / "away")
    job_id = add_job(node)
    assert "the folder of the node is not there; is its disk mounted?" in readiness(node).lacking
    with working(node, tmp_path):
        wait_for(lambda: "is its disk mounted? no job is begun" in caplog.text)
        assert row_of(node, job_id).attempts == 0
        away.rename(mark)
        wait_for(is_in(node, job_id, "done"))
    node.close()


def test_a_job_refused_while_the_disk_goes_is_queued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    back: list[bool] = []
    monkeypatch.setattr(Store, "is_here", lambda _: bool(back) or len(begun(tmp_path)) != 1)
    node = node_of(tmp_path)
    job_id = add_job(node, how="refuse")
    with working(node, tmp_path):
        wait_for(lambda: len(begun(tmp_path)) == 1 and row_of(node, job_id).state == "queued")
        assert row_of(node, job_id).attempts == 0
        back.append(True)
        wait_for(is_in(node, job_id, "dead"))
    node.close()


def test_no_delivery_is_dead_because_the_disk_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    node = publishing_node(tmp_path / "node", publish={"destinations": [{"name": "out", "folder": str(out)}]})
    file = tmp_path / "a.dcm"
    file.write_bytes(b"whatever")
    job = finish_job(node, {"dicom-seg": file}, SENDS)
    mark, results = node.store.folder / MARK, node.store.results / job
    away = results.rename(tmp_path / "results")
    with publishing(node) as publisher:
        # once, as if it went between the look at the queue and the look at the file
        mark.rename(tmp_path / "mark")
        batch = publisher._deliveries.claim("out", node.me.name, most=1)
        assert batch is not None
        publisher._send(publisher._destinations["out"], batch)
        assert state_of(node, job).state == "waiting"
        away.rename(results)
        (tmp_path / "mark").rename(mark)
        wait_for(lambda: state_of(node, job).state == "done")
    node.close()
