"""The pages of a hospital node: who may see them, what they show, what they let one do, and what they never tell."""

from __future__ import annotations

import concurrent.futures
import html
import logging
import re
import socket
import ssl
import stat
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `hospital`")

import sqlalchemy as sa
from browser import DESKTOP, PHONE, Browsing, accessible, sideways, texts
from hospital_rows import (
    NAMES,
    POOR,
    RESULT,
    add_delivery,
    add_done,
    add_job,
    add_part,
    add_refusal,
    add_series,
    fill,
    new_node,
    study_of,
)
from PIL import Image as Picture
from starlette.testclient import TestClient

import medseg
from medseg_pipelines.hospital import database as tables
from medseg_pipelines.hospital import web as web_module
from medseg_pipelines.hospital import web_login
from medseg_pipelines.hospital.audit import check_audit
from medseg_pipelines.hospital.command import run_command
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.settings import WebSettings
from medseg_pipelines.hospital.web import make_app, run_web
from medseg_pipelines.hospital.web_login import Denied, Doorkeeper, PasswordHash, hash_password, read_secret
from medseg_pipelines.hospital.web_views import ALL_STEPS
from medseg_pipelines.hospital.web_words import day, list_address, person, span

PASSWORD = "correct horse battery"
HOST = "https://node"
PAGES = ("/", "/search", "/refused", "/parts")


@pytest.fixture(autouse=True)
def _quick_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    # what a password costs is tested once, by its numbers
    monkeypatch.setattr(web_login, "COST", 2**12)
    monkeypatch.setattr(web_login, "PASSES", 1)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    users = [{"name": name, "password_hash": hash_password(PASSWORD)} for name in ("radiology", "physics")]
    node = new_node(tmp_path / "node", web={"users": users})
    yield node
    node.close()


@pytest.fixture
def stranger(node: Node) -> TestClient:
    return TestClient(make_app(node), base_url=HOST, follow_redirects=False)


@pytest.fixture
def client(stranger: TestClient) -> TestClient:
    """Logged in."""
    assert log_in(stranger).status_code == 303
    return stranger


def form_token(text: str) -> str:
    return re.search(r'name="token" value="([0-9a-f]{64})"', text)[1]


def log_in(client: TestClient, name: str = "radiology", password: str = PASSWORD, **more: str) -> Any:
    token = form_token(client.get("/login").text)
    return client.post("/login", data={"name": name, "password": password, "token": token} | more)


def events(node: Node) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in node.audit.path.read_text().splitlines()][1:]


def dead_job(node: Node, **changes: Any) -> tuple[str, str]:
    series_id = add_series(node.database, **changes)
    job_id = add_job(node.database, series_id, state="dead", reason="a slice is missing", attempts=3)
    return study_of(node.database, series_id), job_id


def with_picture(node: Node, name: str = "picture.png", **changes: Any) -> tuple[str, str]:
    files = {**RESULT["files"], "picture": {"file": name}}
    study_id, job_id = add_done(node.database, result={**RESULT, "files": files}, **changes)
    folder = node.store.results / job_id
    folder.mkdir(parents=True)
    Picture.new("RGB", (40, 30), (200, 30, 30)).save(folder / "picture.png")
    return study_id, job_id


# -- coming in


def test_no_page_is_shown_to_strangers(stranger: TestClient, node: Node) -> None:
    study_id, job_id = with_picture(node, patient_name="CANARY^NAME")
    public = {"/login", "/livez", "/readyz", "/metrics", "/style.css", "/icon.svg"}
    # of the application itself: a page that is added later is asked for here too
    asked = [(method, route.path) for route in all_routes(stranger.app) for method in route.methods]
    assert len(asked) > 12
    for method, path in asked:
        if path in public:
            continue
        address = path.replace("{study_id}", study_id).replace("{job_id}", job_id)
        answer = stranger.request(method, address)
        assert answer.status_code == 303, path
        assert answer.headers["location"].startswith("/login")
        assert answer.content == b""


def all_routes(app: Any) -> list[Any]:
    from fastapi.routing import APIRoute, iter_route_contexts

    return [context.route if hasattr(context, "route") else context for context in iter_route_contexts(app.routes)] or [
        route for route in app.routes if isinstance(route, APIRoute)
    ]


@pytest.mark.parametrize(("name", "password"), [("radiology", "wrong horse battery"), ("nobody", PASSWORD), ("", "")])
def test_a_wrong_password_or_name_opens_nothing(stranger: TestClient, node: Node, name: str, password: str) -> None:
    answer = log_in(stranger, name, password)
    assert answer.status_code == 401
    assert "Name or password is wrong." in answer.text
    assert stranger.get("/").status_code == 303
    known = "radiology" if name == "radiology" else None
    assert [(e["event"], e["user"]) for e in events(node)] == [("login_failed", known)]
    # a password that was typed as a name must not be kept
    assert name == "radiology" or not name or name not in node.audit.path.read_text()


def test_the_right_password_opens_the_pages_until_one_leaves(stranger: TestClient, node: Node) -> None:
    answer = log_in(stranger)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    page = stranger.get("/")
    assert page.status_code == 200
    kept = dict(stranger.cookies)
    left = stranger.post("/logout", data={"token": form_token(page.text)})
    assert left.headers["location"] == "/login"
    assert "__Host-medseg" not in dict(stranger.cookies)
    # nor does the old cookie open anything, wherever it was copied to
    stranger.cookies.update(kept)
    assert stranger.get("/").status_code == 303
    assert [e["event"] for e in events(node)] == ["login", "listed", "logout"]
    assert events(node)[0]["user"] == "radiology"


def test_the_cookie_is_for_this_host_alone_and_no_script(stranger: TestClient) -> None:
    cookie = log_in(stranger).headers["set-cookie"]
    assert cookie.startswith("__Host-medseg=")
    for word in ("HttpOnly", "Secure", "SameSite=strict", "Path=/", "Max-Age=28800"):
        assert word in cookie
    assert "Domain" not in cookie


def test_without_tls_on_this_machine_the_cookie_may_be_plain(tmp_path: Path) -> None:
    users = [{"name": "a", "password_hash": hash_password(PASSWORD)}]
    node = new_node(tmp_path, web={"users": users, "secure": False})
    client = TestClient(make_app(node), base_url="http://127.0.0.1:8080", follow_redirects=False)
    cookie = log_in(client, "a").headers["set-cookie"]
    assert cookie.startswith("medseg=")
    assert "Secure" not in cookie
    assert client.get("/").status_code == 200
    node.close()


def test_a_session_ends_when_its_time_is_up(node: Node) -> None:
    now = [1000.0]
    door = Doorkeeper(node.settings.web, bytes(32), clock=lambda: now[0])
    cookie = door.cookie(door.enter("radiology", PASSWORD, "10.0.0.1"))
    now[0] += 8 * 3600 - 1
    assert door.session(cookie).user == "radiology"
    now[0] += 1
    assert door.session(cookie) is None


def test_a_session_ends_with_the_password_or_the_user(node: Node) -> None:
    web = node.settings.web
    cookie = (door := Doorkeeper(web, bytes(32))).cookie(door.enter("radiology", PASSWORD, "10.0.0.1"))
    assert Doorkeeper(web, bytes(32)).session(cookie).user == "radiology"
    assert Doorkeeper(web, bytes([1] * 32)).session(cookie) is None
    other = web.users[0].model_copy(update={"password_hash": hash_password("another password")})
    assert Doorkeeper(web.model_copy(update={"users": (other,)}), bytes(32)).session(cookie) is None
    assert Doorkeeper(web.model_copy(update={"users": web.users[1:]}), bytes(32)).session(cookie) is None


@pytest.mark.parametrize("cookie", ["", "x", "eyJ1c2VyIjoicmFkaW9sb2d5In0.AAAA", "é"])
def test_a_cookie_that_is_not_ours_is_nobody_s(node: Node, cookie: str) -> None:
    door = Doorkeeper(node.settings.web, bytes(32))
    assert door.session(cookie) is None
    whole = door.cookie(door.enter("radiology", PASSWORD, "10.0.0.1"))
    assert door.session(whole) is not None
    assert door.session(("A" if whole[0] != "A" else "B") + whole[1:]) is None


@pytest.mark.parametrize(
    ("back", "leads_to"),
    [
        ("/refused", "/refused"),
        ("/?state=dead&page=2", "/?state=dead&page=2"),
        (f"/studies/{'a' * 32}", f"/studies/{'a' * 32}"),
        ("https://evil.example/", "/"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("/studies/../../evil", "/"),
        ("javascript:alert(1)", "/"),
        ("/logout", "/"),
        ("/?next=//evil.example", "/"),
        ("/refused\n", "/"),
        ("/refused\r\nSet-Cookie: a=b", "/"),
    ],
)
def test_a_login_leads_to_our_own_pages_only(stranger: TestClient, back: str, leads_to: str) -> None:
    assert log_in(stranger, back=back).headers["location"] == leads_to


def test_one_comes_back_to_where_one_wanted_to_go(stranger: TestClient) -> None:
    to_login = stranger.get("/?state=dead&page=2").headers["location"]
    assert to_login == "/login?back=/%3Fstate%3Ddead%26page%3D2"
    page = stranger.get(to_login)
    assert 'name="back" value="/?state=dead&amp;page=2"' in page.text
    assert 'value="/"' in stranger.get("/login?back=https://evil.example/").text


def test_a_login_form_from_elsewhere_is_refused(stranger: TestClient, node: Node) -> None:
    stranger.get("/login")
    values = {"name": "radiology", "password": PASSWORD}
    for token in ("", "0" * 64, "é"):
        assert stranger.post("/login", data=values | {"token": token}).status_code == 403
    token = form_token(stranger.get("/login").text)
    stranger.cookies.clear()
    assert stranger.post("/login", data=values | {"token": token}).status_code == 403
    assert stranger.get("/").status_code == 303
    assert events(node) == []


def test_of_two_open_login_forms_both_work(stranger: TestClient) -> None:
    token = form_token(stranger.get("/login").text)
    stranger.get("/login")
    answer = stranger.post("/login", data={"name": "radiology", "password": PASSWORD, "token": token})
    assert answer.status_code == 303


@pytest.mark.parametrize("action", ["/logout", "/search", "/jobs/{job}/retry"])
def test_a_form_without_our_token_does_nothing(client: TestClient, node: Node, action: str) -> None:
    study_id, job_id = dead_job(node)
    others = TestClient(client.app, base_url=HOST, follow_redirects=False)
    log_in(others, "physics")
    foreign = form_token(others.get("/").text)
    for token in ({}, {"token": ""}, {"token": "0" * 64}, {"token": foreign}, {"token": "é"}):
        answer = client.post(action.replace("{job}", job_id), data={"words": "a"} | token)
        assert answer.status_code == 403
        assert "out of date" in answer.text
    assert client.get("/").status_code == 200
    assert "Failed" in client.get(f"/studies/{study_id}").text


# -- guessing


class Guessing:
    """A door, its clock, and a way to try."""

    def __init__(self, settings: WebSettings) -> None:
        self.now = 1000.0
        self.door = Doorkeeper(settings, bytes(32), clock=lambda: self.now)

    def fail(self, times: int, name: str = "radiology", address: str = "10.0.0.1") -> list[float]:
        return [self.door.enter(name, "wrong", address).wait_s for _ in range(times)]


@pytest.fixture
def guessing(node: Node) -> Guessing:
    return Guessing(node.settings.web)


def test_after_five_failures_a_name_must_wait_longer_each_time(guessing: Guessing) -> None:
    assert guessing.fail(6) == [0, 0, 0, 0, 0, 1]
    # not even the right password is looked at, from wherever
    assert guessing.door.enter("radiology", PASSWORD, "10.0.0.2") == Denied(1)
    waits = []
    for _ in range(8):
        guessing.now += (waits or [1])[-1]
        assert guessing.fail(1) == [0]
        waits += guessing.fail(1)
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    guessing.now += 60
    assert guessing.door.enter("radiology", PASSWORD, "10.0.0.2").user == "radiology"
    # which forgets what went before
    assert guessing.fail(5) == [0] * 5


def test_a_name_that_nobody_has_is_held_off_as_one_that_somebody_has(guessing: Guessing) -> None:
    assert guessing.fail(6, name="nobody") == guessing.fail(6)


def test_one_address_cannot_try_many_names(guessing: Guessing) -> None:
    waits = [wait for n in range(21) for wait in guessing.fail(1, name=f"user{n}")]
    assert waits == [0] * 20 + [1]
    # a good account of one's own does not help
    guessing.now += 1
    assert guessing.door.enter("physics", PASSWORD, "10.0.0.1").user == "physics"
    assert guessing.fail(1, name="again") == [1]
    guessing.now += 1
    assert guessing.fail(2, name="again") == [0, 2]
    assert guessing.door.enter("radiology", PASSWORD, "10.0.0.2").user == "radiology"


def test_failures_are_forgotten_after_an_hour(guessing: Guessing) -> None:
    guessing.fail(5)
    guessing.now += 3601
    assert guessing.fail(6) == [0, 0, 0, 0, 0, 1]


def test_many_tries_at_once_gain_nothing(guessing: Guessing) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        waits = list(pool.map(lambda _: guessing.fail(1)[0], range(40)))
    assert waits.count(0) == 5


def test_what_is_remembered_of_guesses_is_bounded(guessing: Guessing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_login, "MOST_KEYS", 10)
    for n in range(30):
        guessing.fail(1, name=f"user{n}", address=f"10.0.1.{n}")
    assert len(guessing.door._brake._failures) == 10


def test_a_page_tells_how_long_to_wait(stranger: TestClient, node: Node) -> None:
    for _ in range(5):
        assert log_in(stranger, password="wrong").status_code == 401
    answer = log_in(stranger)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert "please wait 2 s" in answer.text
    assert events(node)[-1] | {"at": 0, "previous": ""} == {
        "at": 0,
        "event": "login_failed",
        "user": "radiology",
        "address": "testclient",
        "held_off": True,
        "previous": "",
    }


# -- passwords and the secret


def test_a_password_costs_what_owasp_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert hash_password(PASSWORD).startswith("scrypt$32768$8$3$")


def test_a_hash_is_salted_and_knows_its_password_however_it_is_typed() -> None:
    first, second = hash_password("größer als zwölf"), hash_password("größer als zwölf")
    assert first != second
    parsed = PasswordHash.parse("a", first)
    assert parsed.matches("größer als zwölf")
    assert not parsed.matches("großer als zwölf")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain password",
        "scrypt$4096$8$1$AAAA",
        hash_password.__name__,
        "scrypt$4097$8$1${}${}",
        "scrypt$1024$8$1${}${}",
        "scrypt$99999999$8$1${}${}",
        "scrypt$4096$8$99${}${}",
    ],
)
def test_a_hash_that_is_none_is_refused_without_being_quoted(text: str) -> None:
    text = text.format("A" * 22 + "==", "A" * 86 + "==")
    with pytest.raises(medseg.ConfigError) as caught:
        PasswordHash.parse("radiology", text)
    assert not text or text not in str(caught.value)
    assert "password_hash of radiology" in str(caught.value)


def test_a_name_that_stands_there_twice_is_refused() -> None:
    user = {"name": "a", "password_hash": hash_password(PASSWORD)}
    with pytest.raises(medseg.ConfigError, match="twice"):
        Doorkeeper(WebSettings.model_validate({"users": [user, user]}), bytes(32))


def test_the_command_reads_a_password_from_standard_input(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(PASSWORD + "\n"))
    assert run_command(["password"]) == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert PasswordHash.parse("a", told.strip()).matches(PASSWORD)
    assert PASSWORD not in told
    monkeypatch.setattr("sys.stdin", io.StringIO("short\n"))
    assert run_command(["password"]) == 2
    assert "5 characters found" in capsys.readouterr().err
    # never from the command line, where others see it
    assert run_command(["password", PASSWORD]) == 2


def test_the_command_asks_twice_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    answers = iter([PASSWORD, PASSWORD, PASSWORD, "another password"])
    monkeypatch.setattr("getpass.getpass", lambda _: next(answers))
    assert run_command(["password"]) == 0
    assert run_command(["password"]) == 2
    assert "not the same" in capsys.readouterr().err


def test_many_who_need_the_secret_at_once_get_the_same(tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: read_secret(tmp_path), range(32)))) == 1
    (left,) = tmp_path.iterdir()
    assert stat.S_IMODE(left.stat().st_mode) == 0o600
    assert len(read_secret(tmp_path)) == 32


def test_a_secret_that_others_read_or_that_is_damaged_is_refused(tmp_path: Path) -> None:
    read_secret(tmp_path)
    path = tmp_path / "web.secret"
    path.chmod(0o640)
    with pytest.raises(medseg.ConfigError, match="mode 640"):
        read_secret(tmp_path)
    path.chmod(0o600)
    path.write_text("ab\n")
    with pytest.raises(medseg.ConfigError, match="damaged"):
        read_secret(tmp_path)


def test_without_users_the_pages_say_what_to_do_and_machines_are_answered(tmp_path: Path) -> None:
    node = new_node(tmp_path)
    add_done(node.database, patient_name="CANARY")
    client = TestClient(make_app(node), base_url=HOST, follow_redirects=False)
    for path in (*PAGES, "/login"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert "medseg-hospital password" in html.unescape(answer.text)
        assert "CANARY" not in answer.text
    assert client.post("/login", data={"name": "a"}).status_code == 503
    assert client.get("/livez").status_code == 200
    assert client.get("/metrics").status_code == 200
    assert client.get("/style.css").status_code == 200
    node.close()


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
        raise ValueError("CANARY^NAME")

    monkeypatch.setattr(web_module, "list_studies", fails)
    answer = client.get("/")
    assert answer.status_code == 500
    assert "CANARY" not in answer.text
    assert "the log of the node says what" in answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert "ValueError" in caplog.text
    assert "list_studies" in caplog.text
    assert "CANARY" not in caplog.text


def test_a_dead_database_is_an_answer_too(client: TestClient, node: Node) -> None:
    with node.database.writing() as connection:
        connection.execute(sa.text("DROP TABLE deliveries"))
    assert client.get("/").status_code == 500


@pytest.mark.parametrize("path", ["/nowhere", "/studies/x", f"/studies/{'0' * 32}", "/docs", "/openapi.json", "/redoc"])
def test_what_is_not_there_is_said_plainly(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "There is no such" in answer.text


# -- the list


def listed(client: TestClient, path: str = "/") -> list[str]:
    return [html.unescape(name) for name in re.findall(r'class="cover"[^>]*>([^<]*)</a>', client.get(path).text)]


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
    others = TestClient(client.app, base_url=HOST, follow_redirects=False)
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
        "read 1.5 s, network 12 s, write 0.8 s",
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
        assert html.escape(person(name)) in page.replace("&#39;", "&#x27;")
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


def test_a_dead_delivery_is_sent_again_and_the_others_are_not(client: TestClient, node: Node) -> None:
    series_id = add_series(node.database)
    job_id = add_job(node.database, series_id, state="done")
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


# -- served


class Served:
    """Pages that a thread serves until `stop`."""

    def __init__(self, node: Node, caplog: Any = None) -> None:
        self.node, self.stop = node, threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            run_web(self.node, self.stop)
        except medseg.ConfigError as error:
            self.error = error

    def end(self) -> None:
        self.stop.set()
        self.thread.join(30)
        assert not self.thread.is_alive()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def eventually(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `what` gives once it raises no `OSError` any more."""
    end = time.monotonic() + seconds
    while True:
        try:
            return what()
        except OSError:
            if time.monotonic() > end:
                raise
            threading.Event().wait(0.05)


def test_the_pages_are_served_until_they_are_told_to_stop(tmp_path: Path) -> None:
    port = free_port()
    node = new_node(tmp_path, web={"port": port})
    served = Served(node)
    address = f"http://127.0.0.1:{port}"
    with eventually(lambda: urllib.request.urlopen(f"{address}/livez", timeout=5)) as answer:
        assert answer.headers.get("server") is None
    # the pages give signs of life as all parts do
    with node.database.reading() as connection:
        assert connection.execute(sa.select(tables.parts.c.kind)).scalars().all() == ["web"]
    other = new_node(tmp_path, web={"port": port})
    with pytest.raises(medseg.ConfigError, match=r"cannot listen at 127\.0\.0\.1"):
        run_web(other, threading.Event())
    other.close()
    served.end()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/livez", timeout=5)
    node.close()


def test_the_pages_speak_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "node.pem", tmp_path / "node.key"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*made, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    port = free_port()
    node = new_node(tmp_path / "node", web={"port": port, "tls": {"certificate": certificate, "key": key}})
    served = Served(node)
    trusting = ssl.create_default_context(cafile=str(certificate))
    asked = urllib.request.Request(f"https://127.0.0.1:{port}/livez")
    with eventually(lambda: urllib.request.urlopen(asked, timeout=5, context=trusting)) as answer:
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
    served.end()
    node.close()


def test_a_certificate_that_is_none_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "node.pem").write_text("nothing")
    paths = {"certificate": tmp_path / "node.pem", "key": tmp_path / "node.pem"}
    node = new_node(tmp_path / "node", web={"port": free_port(), "tls": paths})
    with pytest.raises(medseg.ConfigError, match=r"web\.tls"):
        run_web(node, threading.Event())
    node.close()


@pytest.mark.parametrize(
    ("web", "warned"),
    [({"host": "0.0.0.0"}, True), ({"host": "::"}, True), ({"host": "127.0.0.1"}, False), ({}, False)],
)
def test_patients_names_in_the_clear_are_warned_of(tmp_path: Path, caplog, web: dict[str, Any], warned: bool) -> None:
    node = new_node(tmp_path, web=web)
    web_module.warn(node)
    assert ("unencrypted" in caplog.text) == warned
    assert "Nobody may log in yet" in caplog.text
    node.close()


# -- in a browser


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Node, str]]:
    """Pages with a hospital's studies, and their address."""
    port = free_port()
    users = [{"name": "radiology", "password_hash": hash_password(PASSWORD)}]
    # secure: browsers take 127.0.0.1 for as safe as TLS
    node = new_node(tmp_path, web={"port": port, "users": users})
    served = Served(node)
    address = f"http://127.0.0.1:{port}"
    eventually(lambda: urllib.request.urlopen(f"{address}/livez", timeout=5)).close()
    yield node, address
    served.end()
    node.close()


def test_a_person_logs_in_looks_at_a_picture_and_tries_again(browse: Browsing, served: tuple[Node, str]) -> None:
    node, address = served
    fill(node.database, studies=30)
    study_id, _ = with_picture(node, study_uid="2.25.7", patient_name=NAMES[1])
    _, dead_id = dead_job(node, study_uid="2.25.7", series_description="Arterial", first_at=time.time())
    visit = browse(f"{address}/studies/{study_id}")
    page = visit.page
    page.get_by_label("Name").fill("radiology")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("heading", level=1).get_by_text("<script>").wait_for()
    picture = page.get_by_role("img", name="Slices of the series")
    picture.wait_for()
    page.wait_for_function("document.querySelector('.picture img').naturalWidth === 40")
    job = page.locator(f"#job-{dead_id}")
    assert "Failed" in job.inner_text()
    job.get_by_role("button", name="Try again").click()
    page.get_by_text("It is queued again.").wait_for()
    assert "Waiting" in job.inner_text()
    page.get_by_role("link", name="All studies").click()
    row = page.get_by_role("row").filter(has_text="<script>").filter(has_text="In work").first
    row.wait_for()
    page.get_by_role("link", name="Search a patient").click()
    page.get_by_label("Patient’s name or number").fill("hans müller")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("Search: hans müller").wait_for()
    assert page.get_by_role("rowheader").count() == 3
    page.get_by_role("button", name="Log out").click()
    page.get_by_role("button", name="Log in").wait_for()
    assert visit.complaints == []
    assert [asked for asked in visit.requests if not asked.startswith(address)] == []


@pytest.mark.parametrize(("width", "dark"), [(DESKTOP, False), (PHONE, True)])
def test_every_page_is_legible_at_every_width(
    browse: Browsing, served: tuple[Node, str], width: int, dark: bool
) -> None:
    node, address = served
    ids = fill(node.database, studies=12)
    add_refusal(node.database)
    add_part(node.database, "n1-gateway-0", "gateway", seen_ago_s=400)
    visit = browse(f"{address}/login", width=width, dark=dark)
    page = visit.page
    page.get_by_label("Name").fill("radiology")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("heading", name="Studies").wait_for()
    for path in (*PAGES, *(f"/studies/{ids[n]}" for n in (1, 2, 3, 4))):
        page.goto(address + path, wait_until="load")
        assert sideways(page) == 0, path
        assert [t for t in texts(page) if t.ratio < t.required] == [], path
        read = accessible(page)
        assert [name for role, name in read if role in ("button", "link", "textbox", "searchbox") and not name] == []
        assert len([1 for role, _ in read if role == "main"]) == 1
    page.goto(address, wait_until="load")
    # rows that look like cards on a phone still are a table to those who listen
    assert len([1 for role, _ in accessible(page) if role == "row"]) == 13
    assert visit.complaints == []
