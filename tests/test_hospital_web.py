"""What the pages of a hospital node show, what they let one do, and what they never tell."""

from __future__ import annotations

import html
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `hospital`")

import sqlalchemy as sa
from hospital_pages import (
    PAGES,
    another,
    dead_job,
    events,
    form_token,
    log_in,
    new_client,
    pages_node,
    with_picture,
)
from hospital_rows import (
    NAMES,
    POOR,
    add_delivery,
    add_done,
    add_job,
    add_part,
    add_refusal,
    add_series,
    fill,
    study_of,
)
from starlette.testclient import TestClient

from medseg_pipelines.hospital import database as tables
from medseg_pipelines.hospital import web as web_module
from medseg_pipelines.hospital.audit import check_audit
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.web import make_app
from medseg_pipelines.hospital.web_views import ALL_STEPS
from medseg_pipelines.hospital.web_words import day, list_address, person, span


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = pages_node(tmp_path / "node")
    yield node
    node.close()


@pytest.fixture
def stranger(node: Node) -> TestClient:
    return new_client(node)


@pytest.fixture
def client(stranger: TestClient) -> TestClient:
    """Logged in."""
    assert log_in(stranger).status_code == 303
    return stranger


# -- headers, sizes, errors


def test_every_answer_has_strict_headers(client: TestClient, node: Node) -> None:
    study_id, job_id = with_picture(node)
    answers = [client.get(p) for p in (*PAGES, f"/studies/{study_id}", f"/jobs/{job_id}/picture", "/nowhere", "/livez")]
    answers.append(client.post("/logout"))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "strict-transport-security" not in answer.headers


def test_style_is_kept_by_browsers_and_named_by_its_content(client: TestClient) -> None:
    address = re.search(r'href="(/style\.css\?[0-9a-f]{12})"', client.get("/").text)[1]
    assert "max-age" in client.get(address).headers["cache-control"]


def test_no_page_holds_scripts_or_styles_or_addresses_elsewhere(client: TestClient, node: Node) -> None:
    fill(node.database, studies=12)
    study_id, _ = with_picture(node)
    for path in (*PAGES, f"/studies/{study_id}"):
        text = client.get(path).text
        assert not re.search(r"<script|<style| style=| on\w+=\"|https?://", text), path


def test_a_large_request_is_refused(stranger: TestClient) -> None:
    assert stranger.post("/login", data={"name": "a" * 70_000}).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield b"name="
        for _ in range(20):
            yield b"a" * 10_000

    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert stranger.post("/login", content=pieces(), headers=kind).status_code in (400, 413)


def test_an_error_tells_strangers_nothing_and_the_log_no_values(
    client: TestClient, node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        # the log shows lines of the program, but no values
        raise ValueError("^".join(["CANARY", "NAME"]))

    monkeypatch.setattr(web_module, "list_studies", fails)
    answer = client.get("/")
    assert answer.status_code == 500
    assert "CANARY" not in answer.text
    assert "the log of the node says what" in answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert "ValueError" in caplog.text
    assert "list_studies" in caplog.text
    assert "CANARY^NAME" not in caplog.text


def test_a_dead_database_is_an_answer_too(client: TestClient, node: Node) -> None:
    with node.database.writing() as connection:
        connection.execute(sa.text("DROP TABLE deliveries"))
    assert client.get("/").status_code == 500


def test_nothing_is_handed_to_telemetry_whatever_the_environment(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    app = make_app(node)
    assert not any(app._telemetry[way] for way in ("tracing", "metrics", "logs", "operation_spans", "auto_configure"))


@pytest.mark.parametrize("path", ["/nowhere", "/studies/x", f"/studies/{'0' * 32}", "/docs", "/openapi.json", "/redoc"])
def test_what_is_not_there_is_said_plainly(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "There is no such" in answer.text


# -- the list


def listed(client: TestClient, path: str = "/") -> list[str]:
    return [html.unescape(name) for name in re.findall(r'class="cover"[^>]*><bdi>([^<]*)</bdi>', client.get(path).text)]


def states(node: Node) -> None:
    """One study of each kind, newest first: receiving, queued, unsent, failed, done, not taken."""
    now = time.time()
    old = {"created_at": now - 9000, "started_at": None, "finished_at": now - 9000}

    def one(name: str, age: float, **changes: Any) -> str:
        return add_series(node.database, patient_name=name, last_at=now - age, **changes)

    one("Receiving", 100, state="receiving")
    add_job(node.database, one("Queued", 200), **old | {"finished_at": None})
    for name, age, state in (("Sending", 300, "sent"), ("Unsent", 400, "dead"), ("Done", 500, "done")):
        job_id = add_job(node.database, one(name, age), state="done", **old)
        add_delivery(node.database, job_id)
        add_delivery(node.database, job_id, "archive", state=state)
    add_job(node.database, one("Failed", 450), state="dead", **old)
    one("Other", 600)


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ("all", ["Receiving", "Queued", "Sending", "Unsent", "Failed", "Done", "Other"]),
        ("in-work", ["Receiving", "Queued", "Sending"]),
        ("dead", ["Unsent", "Failed"]),
        ("done", ["Done"]),
        ("not-taken", ["Other"]),
        ("<script>", ["Receiving", "Queued", "Sending", "Unsent", "Failed", "Done", "Other"]),
    ],
)
def test_studies_are_listed_by_state_newest_first(client: TestClient, node: Node, state: str, names: list[str]) -> None:
    states(node)
    assert listed(client, f"/?state={state}") == names


def test_every_state_is_counted(client: TestClient, node: Node) -> None:
    states(node)
    text = re.sub(r"<[^>]*>", " ", client.get("/").text)
    for word, number in (("All", 7), ("In work", 3), ("Failed", 2), ("Done", 1), ("Not taken", 1)):
        assert re.search(rf"{word}\s+{number}\b", text), word


def test_a_failure_of_an_older_revision_does_not_call_for_anybody(client: TestClient, node: Node) -> None:
    series_id = add_series(node.database, revision=2)
    add_job(node.database, series_id, revision=1, state="dead", result=dict(POOR))
    add_delivery(node.database, add_job(node.database, series_id, state="done"))
    assert listed(client, "/?state=done") == ["Muster, Anna"]
    page = client.get("/").text
    assert "Look at it" not in page
    study = client.get(f"/studies/{study_of(node.database, series_id)}").text
    assert "Of revision 1, not the latest" in study


def test_a_row_tells_the_least_expected_dice_and_where_to_look(client: TestClient, node: Node) -> None:
    add_done(node.database, patient_name="Good")
    add_done(node.database, patient_name="Poor", result=POOR)
    rows = {name: row for row in client.get("/").text.split("<tr ")[2:] for name in ("Good", "Poor") if name in row}
    text = {name: re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row)) for name, row in rows.items()}
    assert "posterior 0.88 0.79–0.93" in text["Good"]
    assert "Look at it" not in text["Good"]
    assert "anterior 0.42 0.11–0.68 Look at it" in text["Poor"]


def test_a_study_of_several_series_and_jobs_is_one_row(client: TestClient, node: Node) -> None:
    common = {"study_uid": "2.25.1"}
    first = add_series(node.database, **common, modality="CT")
    add_series(node.database, **common, modality="PT", series_description="PET")
    add_delivery(node.database, add_job(node.database, first, rule="a", state="done"))
    add_delivery(node.database, add_job(node.database, first, rule="b", state="done"), state="waiting")
    assert listed(client) == ["Muster, Anna"]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", client.get("/").text))
    assert "CT, PT · 2 series" in text
    assert "being sent, 1 of 2 done" in text


def test_the_list_has_pages_and_loads_the_same_one_again(client: TestClient, node: Node) -> None:
    for n in range(30):
        add_series(node.database, patient_name=f"P{n:02d}", last_at=1000.0 - n)
    assert listed(client) == [f"P{n:02d}" for n in range(25)]
    page = client.get("/?state=not-taken&page=2").text
    assert listed(client, "/?state=not-taken&page=2") == [f"P{n:02d}" for n in range(25, 30)]
    assert '<meta http-equiv="refresh" content="15; url=/?state=not-taken&amp;page=2">' in page
    assert "26–30 of 30" in page
    assert 'rel="prev" href="/?state=not-taken"' in page
    assert 'rel="next"' not in page
    assert "refresh" not in client.get("/?page=2&still=1").text.split("<title>")[0]
    for odd in ("0", "-1", "x", "99999999999999999999", "²"):
        assert client.get(f"/?page={odd}").status_code == 200
    assert listed(client, "/?page=99") == [f"P{n:02d}" for n in range(25, 30)]


def search(client: TestClient, words: str) -> str:
    token = form_token(client.get("/search").text)
    answer = client.post("/search", data={"words": words, "token": token})
    assert answer.status_code == 303
    return answer.headers["location"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("müller", ["MÜLLER, ANNA", "Müller, Bob"]),
        ("anna MÜLLER", ["MÜLLER, ANNA"]),
        ("0815", ["Müller, Bob"]),
        ("abdomen", ["MÜLLER, ANNA", "Müller, Bob", "100%, Sure"]),
        ("%", ["100%, Sure"]),
        ("_", []),
        ("nobody", []),
        ("' OR 1=1 --", []),
    ],
)
def test_a_search_finds_studies_that_have_every_word(
    client: TestClient, node: Node, words: str, names: list[str]
) -> None:
    add_series(node.database, patient_name="MÜLLER^ANNA", last_at=3.0)
    add_series(node.database, patient_name="Müller^Bob", patient_id="0815", last_at=2.0)
    add_series(node.database, patient_name="100%^Sure", last_at=1.0)
    assert listed(client, search(client, words)) == names


def test_a_search_stands_in_no_address_and_is_its_owner_s(client: TestClient, node: Node) -> None:
    add_series(node.database, patient_name="CANARY^NAME")
    add_series(node.database, patient_name="Other")
    address = search(client, "canary")
    assert re.fullmatch(r"/\?search=[A-Za-z0-9_-]{16}", address)
    page = client.get(f"{address}&state=not-taken").text
    assert listed(client, address) == ["CANARY, NAME"]
    assert f"url=/?state=not-taken&amp;{address[2:]}" in page
    assert all("canary" not in found.lower() for found in re.findall(r'(?:href|action|url)="?([^">]*)', page))
    others = another(client)
    log_in(others, "physics")
    assert others.get(address).headers["location"] == "/?note=forgotten"
    assert search(client, "  ") == "/"


def test_the_list_says_when_the_node_is_not_at_work(client: TestClient, node: Node) -> None:
    assert "no worker has given a sign of life" in client.get("/").text
    add_part(node.database, "a", "worker")
    add_part(node.database, "b", "gateway")
    assert "sign of life" not in client.get("/").text


def test_looking_again_is_written_down_once(client: TestClient, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    study_id, _ = add_done(node.database)
    for _ in range(3):
        client.get(f"/studies/{study_id}")
    viewed = [e for e in events(node) if e["event"] == "viewed"]
    assert [(e["user"], e["study"]) for e in viewed] == [("radiology", study_id)]
    monkeypatch.setattr(web_module, "SAME_LOOK_S", 0.0)
    client.get(f"/studies/{study_id}")
    assert len([e for e in events(node) if e["event"] == "viewed"]) == 2


# -- one study


def text_of(client: TestClient, path: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", client.get(path).text)))


def test_a_study_shows_what_became_of_its_series(client: TestClient, node: Node) -> None:
    series_id = add_series(node.database, images=118, expected=120, assumed=True, revision=2)
    job_id = add_job(node.database, series_id, state="done", result=dict(POOR), losses=1)
    add_delivery(node.database, job_id, state="sent", attempts=4, reason="not confirmed yet")
    text = text_of(client, f"/studies/{study_of(node.database, series_id)}")
    for words in (
        "Muster, Anna",
        "4711",
        "2026-01-31",
        "A-100",
        "CT abdomen",
        "Portal venous 1.0 B30f",
        "118 images",
        "revision 2",
        "Only 118 of 120 images",
        "organs: takes it",
        "lungs: body_part does not match",
        "anterior 0.42 0.11–0.68",
        "posterior not known",
        "posterior: nothing found",
        "pacs DICOM SEG Sent, not yet confirmed 4 tries",
        "not confirmed yet",
        "read 1.5 s , network 12 s , write 0.8 s",
        "organs-2026 abababab",
        "its worker was gone once",
    ):
        assert words in text, words
    assert "Try again" not in text


def steps(client: TestClient, study_id: str) -> dict[str, str]:
    return {
        step: mark
        for mark, step in re.findall(r'<li class="(\w+)"[^>]*>(\w+)', client.get(f"/studies/{study_id}").text)
    }


@pytest.mark.parametrize(
    ("job", "sends", "marks"),
    [
        ({"state": "queued"}, (), "done done done open open open open open"),
        ({"state": "running", "step": "checked"}, (), "done done done done now open open open"),
        ({"state": "dead", "step": "checked"}, (), "done done done done failed open open open"),
        ({"state": "done"}, ("waiting", "done"), "done done done done done done now open"),
        ({"state": "done"}, ("sent", "done"), "done done done done done done done now"),
        ({"state": "done"}, ("dead", "done"), "done done done done done done failed open"),
        ({"state": "done"}, ("done", "done"), "done done done done done done done done"),
        ({"state": "done", "step": "confirmed"}, (), "done done done done done done done done"),
    ],
)
def test_the_bar_shows_how_far_a_job_is(client: TestClient, node: Node, job: dict[str, Any], sends, marks: str) -> None:
    series_id = add_series(node.database)
    job_id = add_job(node.database, series_id, **job)
    for number, state in enumerate(sends):
        add_delivery(node.database, job_id, f"d{number}", state=state)
    found = steps(client, study_of(node.database, series_id))
    assert list(found) == list(ALL_STEPS)
    assert list(found.values()) == marks.split()


def test_a_study_loads_itself_again_only_while_something_happens(client: TestClient, node: Node) -> None:
    done, _ = add_done(node.database)
    busy = study_of(node.database, add_series(node.database, state="receiving"))
    assert "http-equiv" not in client.get(f"/studies/{done}").text
    assert f'content="15; url=/studies/{busy}"' in client.get(f"/studies/{busy}").text
    assert "http-equiv" not in client.get(f"/studies/{busy}?still=1").text


@pytest.mark.parametrize("name", NAMES[:2])
def test_names_are_shown_as_text(client: TestClient, node: Node, name: str) -> None:
    values = {"patient_name": name, "series_description": name, "study_description": name, "patient_id": name}
    job_id = add_job(node.database, add_series(node.database, **values), state="dead", reason=name)
    with node.database.reading() as connection:
        study_id = connection.scalar(sa.select(tables.series.c.study_id))
    for path in ("/", f"/studies/{study_id}"):
        page = client.get(path).text
        assert "<script" not in page
        assert "<img src=x" not in page
        assert f"<bdi>{html.escape(person(name))}</bdi>" in page.replace("&#39;", "&#x27;")
    assert job_id in page


def test_a_dead_job_is_tried_again(client: TestClient, node: Node) -> None:
    study_id, job_id = dead_job(node)
    page = client.get(f"/studies/{study_id}").text
    assert "a slice is missing" in page
    assert "Try again" in page
    answer = client.post(f"/jobs/{job_id}/retry", data={"token": form_token(page)})
    assert answer.headers["location"] == f"/studies/{study_id}?note=retried#job-{job_id}"
    after = text_of(client, f"/studies/{study_id}?note=retried")
    assert "It is queued again." in after
    assert "organs Waiting" in after
    assert "Try again" not in after
    replay = next(e for e in events(node) if e["event"] == "replay")
    assert (replay["user"], replay["job"], replay["study"], replay["computed"]) == ("radiology", job_id, study_id, True)
    with node.database.reading() as connection:
        row = connection.execute(sa.select(tables.jobs)).one()
    assert (row.state, row.attempts, row.reason) == ("queued", 0, "")
    # a second click finds nothing to do, and writes nothing down
    again = client.post(f"/jobs/{job_id}/retry", data={"token": form_token(page)})
    assert again.headers["location"].startswith(f"/studies/{study_id}?note=not-dead")
    assert len([e for e in events(node) if e["event"] == "replay"]) == 1


def test_what_a_later_revision_took_the_place_of_is_no_failure_and_not_tried_again(
    client: TestClient, node: Node
) -> None:
    series_id = add_series(node.database, revision=3)
    add_job(node.database, series_id, state="superseded", revision=1, reason="images came later")
    unsent = add_job(node.database, series_id, state="done", revision=2)
    add_delivery(node.database, unsent, state="superseded", sent_at=None)
    add_delivery(node.database, add_job(node.database, series_id, state="done"))
    study = text_of(client, f"/studies/{study_of(node.database, series_id)}")
    assert study.count("organs Superseded Of revision") == 2
    assert "Try again" not in study
    assert "Send again" not in study
    assert "Failed" not in study


def test_a_dead_delivery_is_sent_again_and_the_others_are_not(client: TestClient, node: Node) -> None:
    series_id = add_series(node.database)
    job_id = add_job(node.database, series_id, state="done", result={})
    add_delivery(node.database, job_id, "pacs")
    add_delivery(node.database, job_id, "archive", state="dead", attempts=41, reason="refused")
    page = client.get(f"/studies/{study_of(node.database, series_id)}").text
    assert "Send again" in page
    client.post(f"/jobs/{job_id}/retry", data={"token": form_token(page)})
    with node.database.reading() as connection:
        asked = sa.select(tables.deliveries.c.destination, tables.deliveries.c.state, tables.deliveries.c.attempts)
        assert set(connection.execute(asked).tuples()) == {("pacs", "done", 1), ("archive", "waiting", 0)}
        assert connection.scalar(sa.select(tables.jobs.c.state)) == "done"


@pytest.mark.parametrize("job_id", ["x", "0" * 32, "..%2f..%2fweb.secret"])
def test_a_retry_of_nothing_is_not_found(client: TestClient, node: Node, job_id: str) -> None:
    token = form_token(client.get("/").text)
    assert client.post(f"/jobs/{job_id}/retry", data={"token": token}).status_code == 404


# -- pictures


def test_a_picture_is_shown_to_those_who_are_logged_in(client: TestClient, node: Node) -> None:
    study_id, job_id = with_picture(node)
    assert f'src="/jobs/{job_id}/picture"' in client.get(f"/studies/{study_id}").text
    answer = client.get(f"/jobs/{job_id}/picture")
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == (node.store.results / job_id / "picture.png").read_bytes()
    client.cookies.clear()
    assert client.get(f"/jobs/{job_id}/picture").status_code == 303


def test_a_picture_that_was_removed_is_not_promised(client: TestClient, node: Node) -> None:
    study_id, job_id = with_picture(node)
    (node.store.results / job_id / "picture.png").unlink()
    assert "/picture" not in client.get(f"/studies/{study_id}").text
    assert client.get(f"/jobs/{job_id}/picture").status_code == 404


@pytest.mark.parametrize(
    "name",
    [
        "../../web.secret",
        "../../web.png",
        "/etc/hostname",
        "../../../outside.png",
        "link.png",
        "sub/../../../web.png",
        ".",
    ],
)
def test_a_name_that_leads_elsewhere_shows_nothing(client: TestClient, node: Node, name: str) -> None:
    study_id, job_id = with_picture(node, name)
    for place in (node.settings.folder / "web.png", node.settings.folder.parent / "outside.png"):
        place.write_bytes(b"secret")
    (node.store.results / job_id / "link.png").symlink_to(node.settings.folder / "web.png")
    answer = client.get(f"/jobs/{job_id}/picture")
    assert answer.status_code == 404
    assert b"secret" not in answer.content
    assert client.get(f"/studies/{study_id}").status_code == 200


@pytest.mark.parametrize("job_id", ["..", "%2e%2e", "..%2f..%2fnode.sqlite", "x" * 32, "A" * 32, "%00"])
def test_an_address_is_no_path(client: TestClient, job_id: str) -> None:
    assert client.get(f"/jobs/{job_id}/picture").status_code == 404


# -- what was refused, and parts


def test_refusals_are_shown_with_reason_and_place(client: TestClient, node: Node) -> None:
    add_refusal(node.database, reason="no <b>pixels</b>", sent_by="OTHER", file="refused/abc.bin")
    for _ in range(60):
        add_refusal(node.database, at=1000.0, file="")
    page = client.get("/refused").text
    assert "no &lt;b&gt;pixels&lt;/b&gt;" in page
    text = text_of(client, "/refused")
    assert "refused/abc.bin" in text
    assert "61 refusals, page 1 of 2" in text
    assert text_of(client, "/refused?page=2").count("SCANNER1") == 11


def test_parts_are_shown_with_their_last_sign_of_life(client: TestClient, node: Node) -> None:
    add_part(node.database, "n1-gateway-0", "gateway", seen_ago_s=70)
    add_part(node.database, "n1-worker-0", "worker", seen_ago_s=1)
    dead_job(node)
    text = text_of(client, "/parts")
    assert "n1-gateway-0 gateway Silent 70 s ago" in text
    assert "n1-worker-0 worker Alive" in text
    assert "no gateway has given a sign of life" in text
    assert "Failed 1" in text
    assert re.search(r"Free [\d,.]+ GB", text)


# -- what is never told


def test_a_patient_is_on_the_pages_and_nowhere_else(
    client: TestClient, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = {"patient_name": "CANARY^NAME", "patient_id": "CANARY-ID", "accession_number": "CANARY-ACC"}
    study_id, job_id = with_picture(node, **secrets)
    dead, dead_id = dead_job(node, **secrets)
    answers = [client.get(path) for path in ("/", "/?state=dead", f"/studies/{study_id}", f"/studies/{dead}")]
    assert all("CANARY" in answer.text for answer in answers)
    address = search(client, "CANARY")
    answers += [client.get(path) for path in (address, f"/jobs/{job_id}/picture", "/refused", "/parts", "/metrics")]
    answers.append(client.post(f"/jobs/{dead_id}/retry", data={"token": form_token(answers[0].text)}))
    for answer in answers:
        assert "CANARY" not in str(answer.headers) + str(answer.url)
        linked = re.findall(r'(?:href|src|action|url)="?([^">]*)', answer.text) if "html" in str(answer.headers) else []
        assert not [address for address in linked if "CANARY" in address]
    assert "CANARY" not in caplog.text
    assert "CANARY" not in node.audit.path.read_text()
    client.cookies.clear()
    for path in (*PAGES, "/login", "/livez", "/readyz", "/metrics", f"/studies/{study_id}", "/nowhere", address):
        assert "CANARY" not in client.get(path).text


def test_what_people_do_is_in_an_unbroken_audit_log(client: TestClient, node: Node) -> None:
    study_id, _ = add_done(node.database)
    client.get(f"/studies/{study_id}")
    node.audit.record("done")
    assert check_audit(node.settings.folder / "audit").faults == ()


# -- words


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Müller^Hans^Maria^Dr.", "Müller, Hans Maria, Dr."),
        ("Yamada^Tarou=山田^太郎=", "Yamada, Tarou · 山田, 太郎"),
        ("Smith", "Smith"),
        ("^^^", "No name"),
        ("", "No name"),
        ("a^b^c^d^e^f^g^h", "a, b c, d, e, f"),
    ],
)
def test_a_name_is_written_as_people_do(name: str, written: str) -> None:
    assert person(name) == written


def test_dates_spans_and_addresses() -> None:
    assert [day("20260131"), day("2026.01.31"), day("")] == ["2026-01-31", "2026.01.31", "–"]
    seconds = (-1, 4.21, 35, 99, 720, 8000, 4 * 3600, 5 * 86400)
    assert [span(s) for s in seconds] == ["0.0 s", "4.2 s", "35 s", "99 s", "12 min", "2 h", "4 h", "5 days"]
    assert list_address() == "/"
    assert list_address(state="dead", search="a&b", page=3, still=True) == "/?state=dead&search=a%26b&page=3&still=1"
