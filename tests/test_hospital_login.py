"""Who may see the pages of a hospital node: passwords, sessions, forms that are ours, guessing."""

from __future__ import annotations

import concurrent.futures
import html
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra `hospital`")

from fastapi.routing import iter_route_contexts
from hospital_pages import (
    BROWSER,
    PAGES,
    PASSWORD,
    PASSWORD_HASH,
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
    add_done,
    new_node,
)
from starlette.testclient import TestClient

import medseg
from medseg_pipelines.hospital import web_login
from medseg_pipelines.hospital.command import run_command
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.settings import WebSettings
from medseg_pipelines.hospital.web import make_app
from medseg_pipelines.hospital.web_login import Denied, Doorkeeper, PasswordHash, hash_password, read_secret


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


# -- coming in


def test_no_page_is_shown_to_strangers(stranger: TestClient, node: Node) -> None:
    study_id, job_id = with_picture(node, patient_name="CANARY^NAME")
    public = {"/login", "/livez", "/readyz", "/metrics", "/style.css", "/icon.svg"}
    # asked of the application itself, so that a page that is added later is tried too
    asked = [(method, route.path) for route in iter_route_contexts(stranger.app.routes) for method in route.methods]
    assert {"/", "/studies/{study_id}", "/jobs/{job_id}/picture", "/jobs/{job_id}/retry"} <= {path for _, path in asked}
    for method, path in asked:
        if path in public:
            continue
        address = path.replace("{study_id}", study_id).replace("{job_id}", job_id)
        answer = stranger.request(method, address)
        assert answer.status_code == 303, path
        assert answer.headers["location"].startswith("/login")
        assert answer.content == b""


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
    users = [{"name": "a", "password_hash": PASSWORD_HASH}]
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
    others = another(client)
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
    assert answer.status_code == 429
    wait_s = answer.headers["retry-after"]
    # of one second some is gone, and the rest is rounded up
    assert wait_s in ("1", "2")
    assert f"please wait {wait_s} s" in answer.text
    assert events(node)[-1] | {"at": 0, "previous": ""} == {
        "at": 0,
        "event": "login_failed",
        "user": "radiology",
        "address": BROWSER,
        "held_off": True,
        "previous": "",
    }
    # else strangers could fill the disk
    written = len(events(node))
    for _ in range(3):
        assert log_in(stranger).status_code == 429
    assert len(events(node)) == written


# -- passwords and the secret


def test_a_password_costs_what_owasp_asks() -> None:
    assert hash_password(PASSWORD).startswith("scrypt$32768$8$3$")


def test_a_hash_is_salted_and_knows_its_password_however_it_is_typed() -> None:
    first, second = (hash_password("größer als zwölf", cost=2**12, passes=1) for _ in range(2))
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
    user = {"name": "a", "password_hash": PASSWORD_HASH}
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
    client = new_client(node)
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
