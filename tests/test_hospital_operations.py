"""What machines ask of a node: lives it, is it ready, its figures; and that none of it tells of a patient."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra `hospital`")

import sqlalchemy as sa
from hospital_rows import add_delivery, add_done, add_job, add_part, add_refusal, add_series, fill, new_node
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from medseg_pipelines.hospital import database as tables
from medseg_pipelines.hospital.command import run_command
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.operations import Metrics, readiness
from medseg_pipelines.hospital.web import make_app
from medseg_pipelines.hospital.web_views import STUDY_STATES, find_study, list_studies, queues

STATES = ("all", *STUDY_STATES)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = new_node(tmp_path / "node")
    yield node
    node.close()


@pytest.fixture
def client(node: Node) -> TestClient:
    return TestClient(make_app(node), base_url="https://node")


def figures(text: bytes | str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = text if isinstance(text, str) else text.decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def broken(node: Node) -> None:
    with node.database.writing() as connection:
        for name in ("deliveries", "jobs", "parts"):
            connection.execute(sa.text(f"DROP TABLE {name}"))


def test_a_node_without_database_lives_but_is_not_ready(client: TestClient, node: Node) -> None:
    broken(node)
    assert client.get("/livez").json() == {"alive": True}
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "lacking": ["the database does not answer"]}


def test_a_node_with_gateway_and_worker_is_ready(client: TestClient, node: Node) -> None:
    add_part(node.database, "n-gateway-0", "gateway", seen_ago_s=50)
    add_part(node.database, "n-worker-0", "worker", seen_ago_s=5000)
    add_part(node.database, "n-worker-1", "worker", seen_ago_s=2)
    assert client.get("/readyz").json() == {"ready": True, "lacking": []}
    assert client.head("/livez").status_code == 200


@pytest.mark.parametrize("missing", ["gateway", "worker"])
def test_a_silent_part_is_lacking(client: TestClient, node: Node, missing: str) -> None:
    add_part(node.database, "a", "gateway", seen_ago_s=61 if missing == "gateway" else 1)
    add_part(node.database, "b", "worker", seen_ago_s=61 if missing == "worker" else 1)
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["lacking"]) == (503, [f"no {missing} has given a sign of life for 60 s"])


def test_a_worker_that_cannot_work_is_lacking_where_no_other_can(client: TestClient, node: Node) -> None:
    add_part(node.database, "a", "gateway")
    add_part(node.database, "b", "worker", trouble="no process that infers can be started")
    answer = client.get("/readyz")
    told = ["no worker can work: no process that infers can be started"]
    assert (answer.status_code, answer.json()["lacking"]) == (503, told)
    add_part(node.database, "c", "worker")
    assert client.get("/readyz").json() == {"ready": True, "lacking": []}


def test_a_full_disk_is_lacking(tmp_path: Path) -> None:
    node = new_node(tmp_path / "node", storage={"least_free_gb": 1e9})
    add_part(node.database, "a", "gateway")
    add_part(node.database, "b", "worker")
    (lacking,) = readiness(node).lacking
    assert lacking.startswith("the disk has ")
    node.close()


def test_the_figures_count_what_is_there(client: TestClient, node: Node) -> None:
    add_done(node.database)
    series_id = add_series(node.database)
    now = time.time()
    waiting = add_job(node.database, series_id, rule="a", created_at=now - 500)
    add_job(node.database, series_id, rule="b", state="dead", step="checked", created_at=now - 900)
    add_delivery(node.database, waiting, "archive", state="dead")
    add_series(node.database, state="receiving")
    add_refusal(node.database)
    add_part(node.database, "n-worker-0", "worker", seen_ago_s=33)
    with node.database.writing() as connection:
        tables.count(connection, "received")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = figures(answer.text)

    def one(name: str, **labels: str) -> float:
        return found[name, tuple(sorted(labels.items()))]

    assert one("medseg_database_up") == 1
    assert one("medseg_jobs", state="done", step="encoded") == 1
    assert one("medseg_jobs", state="dead", step="checked") == 1
    assert one("medseg_jobs", state="running", step="selected") == 0
    assert one("medseg_oldest_queued_job_age_seconds") == pytest.approx(500, abs=60)
    assert one("medseg_deliveries", destination="archive", state="dead") == 1
    assert one("medseg_deliveries", destination="pacs", state="done") == 1
    assert one("medseg_deliveries", destination="pacs", state="dead") == 0
    assert one("medseg_events_total", event="received") == 1
    assert one("medseg_events_total", event="refused_no_room") == 0
    assert one("medseg_series", state="receiving") == 1
    assert one("medseg_refusals") == 1
    assert one("medseg_part_last_beat_age_seconds", part="n-worker-0", kind="worker") == pytest.approx(33, abs=60)
    assert one("medseg_stage_seconds_sum", stage="network", rule="organs") == 12.25
    assert one("medseg_stage_seconds_count", stage="network", rule="organs") == 1
    assert one("medseg_disk_free_bytes") > 0


def test_a_job_is_counted_once_however_often_it_is_looked_at(node: Node) -> None:
    metrics = Metrics(node)

    def total() -> tuple[float, float]:
        found = figures(metrics.text())
        labels = (("rule", "organs"), ("stage", "network"))
        return found["medseg_stage_seconds_count", labels], found["medseg_stage_seconds_sum", labels]

    add_done(node.database)
    assert [total(), total()] == [(1, 12.25)] * 2
    # one that ended before the last look, in a transaction that was seen only after it
    _, late = add_done(node.database)
    with node.database.writing() as connection:
        connection.execute(tables.jobs.update().where(tables.jobs.c.id == late).values(finished_at=time.time() - 300))
    assert [total(), total()] == [(2, 24.5)] * 2


def test_what_is_old_is_counted_at_the_first_look_and_not_again(node: Node) -> None:
    _, old = add_done(node.database)
    with node.database.writing() as connection:
        connection.execute(tables.jobs.update().where(tables.jobs.c.id == old).values(finished_at=1000.0))
    metrics = Metrics(node)
    key = ("medseg_stage_seconds_count", (("rule", "organs"), ("stage", "read")))
    assert [figures(metrics.text())[key] for _ in range(3)] == [1, 1, 1]


def test_figures_without_a_database_say_so(client: TestClient, node: Node) -> None:
    broken(node)
    found = figures(client.get("/metrics").text)
    assert found["medseg_database_up", ()] == 0
    assert found["medseg_disk_free_bytes", ()] > 0
    assert len(found) == 2


def test_nothing_of_a_patient_or_a_peer_is_in_what_machines_see(client: TestClient, node: Node) -> None:
    secrets = {
        "patient_name": "CANARY^NAME",
        "patient_id": "CANARY-ID",
        "accession_number": "CANARY-ACC",
        "series_uid": "1.2.276.0.7230010.3.1.4.777",
        "study_uid": "1.2.276.0.7230010.3.1.4.888",
        "series_description": "CANARY-SERIES",
        "study_description": "CANARY-STUDY",
        "sent_by": "CANARY-AE",
    }
    add_done(node.database, **secrets)
    add_refusal(node.database, sent_by="CANARY-AE", reason="CANARY-REASON")
    for path in ("/livez", "/readyz", "/metrics"):
        answer = client.get(path)
        told = answer.text + str(answer.headers)
        assert "CANARY" not in told
        assert "1.2.276" not in told


def test_figures_and_pages_are_the_same_on_postgresql(tmp_path: Path, postgres: str) -> None:
    held = []
    for name, database in (("sqlite", None), ("postgresql", postgres)):
        node = new_node(tmp_path / name, database=database)
        random.seed(1)
        fill(node.database, studies=40)
        add_part(node.database, "n-worker-0", "worker", seen_ago_s=100)
        numbers = {k: v for k, v in figures(Metrics(node).text()).items() if "age" not in k[0] and "disk" not in k[0]}
        with node.database.reading() as connection:
            now = node.database.now(connection)
            pages = [list_studies(connection, state=s, words=w, page=1) for s in STATES for w in ((), ("müller", "ct"))]
            shown = [[(row.patient_id, row.state, row.doing, row.dice, row.look) for row in p.rows] for p in pages]
            study = find_study(connection, pages[0].rows[2].id, now)
            waiting = queues(connection)
        told = [(s.description, s.receiving, [(j.state, j.done_steps) for j in s.jobs]) for s in study.series]
        held.append((numbers, shown, [p.counts for p in pages], study.state, told, waiting, readiness(node)))
        node.close()
    assert held[0] == held[1]
    assert held[0][2][0]["all"] == 40


def test_the_command_begins_again_what_was_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "hospital.yaml"
    config.write_text("folder: node\nstorage: {least_free_gb: 0}\n")
    node = new_node(tmp_path / "node")
    series_id = add_series(node.database)
    dead = add_job(node.database, series_id, rule="a", state="dead")
    unsent = add_job(node.database, series_id, rule="b", state="done")
    add_delivery(node.database, unsent, state="dead")
    fine = add_job(node.database, series_id, rule="c", state="done")
    add_delivery(node.database, fine)
    with node.database.writing() as connection:
        # a result without a file is whole: nothing has to be made again
        connection.execute(tables.jobs.update().where(tables.jobs.c.id == unsent).values(result={"files": {}}))
    command = ["replay", "-c", str(config)]
    assert run_command(command) == 2
    assert run_command([*command, fine]) == 1
    assert f"{fine}: no dead job" in capsys.readouterr().err
    assert run_command([*command, dead]) == 0
    assert run_command([*command, "--all"]) == 0
    assert "1 begun again." in capsys.readouterr().out
    with node.database.reading() as connection:
        states = dict(connection.execute(sa.select(tables.jobs.c.rule, tables.jobs.c.state)).tuples().all())
        sends = set(connection.execute(sa.select(tables.deliveries.c.job_id, tables.deliveries.c.state)).tuples())
    assert states == {"a": "queued", "b": "done", "c": "done"}
    assert sends == {(unsent, "waiting"), (fine, "done")}
    logs = [path.read_text() for path in (tmp_path / "node" / "audit").glob("*-command-*.jsonl")]
    assert sum(text.count('"event": "replay"') for text in logs) == 2
    node.close()
