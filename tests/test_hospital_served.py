"""The pages of a hospital node on a port of this machine, by themselves and in a browser."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `hospital`")

import httpx
import sqlalchemy as sa
from browser import DESKTOP, PHONE, Browsing, accessible, sideways, texts
from hospital_pages import (
    PAGES,
    PASSWORD,
    PASSWORD_HASH,
    Served,
    dead_job,
    events,
    eventually,
    free_port,
    log_in,
    pages_node,
    with_picture,
)
from hospital_peers import wait_for
from hospital_rows import (
    NAMES,
    add_part,
    add_refusal,
    fill,
    new_node,
)

import medseg
from medseg_pipelines.hospital import database as tables
from medseg_pipelines.hospital import web as web_module
from medseg_pipelines.hospital import web_guard
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.web import run_web

# -- served


@pytest.mark.parametrize(
    ("trusted", "told", "known"),
    [
        ([], "10.9.9.9", "127.0.0.1"),
        (["127.0.0.0/8"], "10.9.9.9", "10.9.9.9"),
        # what the browser itself had claimed stands before what the proxy has seen
        (["127.0.0.1"], "10.1.1.1, 10.9.9.9", "10.9.9.9"),
        (["127.0.0.1"], "Tweety", "unknown"),
    ],
)
def test_a_browser_has_the_address_that_a_trusted_proxy_tells(
    tmp_path: Path, trusted: list[str], told: str, known: str
) -> None:
    port = free_port()
    node = pages_node(tmp_path, port=port, trusted_proxies=trusted, secure=False)
    served, address = Served(node), f"http://127.0.0.1:{port}"
    eventually(lambda: urllib.request.urlopen(f"{address}/livez", timeout=5)).close()
    with httpx.Client(base_url=address, headers={"X-Forwarded-For": told}) as browser:
        assert log_in(browser, password="wrong").status_code == 401
    served.end()
    assert [event["address"] for event in events(node) if event["event"] == "login_failed"] == [known]
    node.close()


def test_a_proxy_of_ipv4_is_trusted_by_pages_that_listen_on_ipv6(tmp_path: Path) -> None:
    port = free_port()
    try:
        socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
    except (OSError, ValueError) as error:
        pytest.skip(f"no socket here for IPv6 and IPv4: {error}")
    node = pages_node(tmp_path, host="::", port=port, trusted_proxies=["127.0.0.0/8"], secure=False)
    served, address = Served(node), f"http://127.0.0.1:{port}"
    eventually(lambda: urllib.request.urlopen(f"{address}/livez", timeout=5)).close()
    for told in ("10.9.9.9", "::ffff:10.9.9.9"):
        with httpx.Client(base_url=address, headers={"X-Forwarded-For": told}) as browser:
            assert log_in(browser, password="wrong").status_code == 401
    served.end()
    assert [e["address"] for e in events(node) if e["event"] == "login_failed"] == ["10.9.9.9"] * 2
    node.close()


def test_the_pages_are_served_until_they_are_told_to_stop(tmp_path: Path) -> None:
    port = free_port()
    node = new_node(tmp_path, web={"port": port})
    served = Served(node)
    address = f"http://127.0.0.1:{port}"
    with eventually(lambda: urllib.request.urlopen(f"{address}/livez", timeout=5)) as answer:
        assert answer.headers.get("server") is None

    # the pages give signs of life as all parts do
    def kinds() -> list[str]:
        with node.database.reading() as connection:
            return list(connection.execute(sa.select(tables.parts.c.kind)).scalars())

    wait_for(lambda: kinds() == ["web"])
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


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: node\r\n",
        b"POST /login HTTP/1.1\r\nHost: node\r\nContent-Length: 9\r\n"
        b"Content-Type: application/x-www-form-urlencoded\r\n\r\nname=",
    ],
)
def test_a_request_that_never_ends_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(web_guard, "REQUEST_S", 0.4)
    port = free_port()
    node = new_node(tmp_path, web={"port": port})
    served = Served(node)
    with eventually(lambda: socket.create_connection(("127.0.0.1", port), timeout=20)) as peer:
        peer.sendall(begun)
        # else this waits until the time is out, which is an error
        assert peer.recv(100) == b""
    served.end()
    node.close()


def test_silent_peers_keep_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_module, "MOST_CONNECTIONS", 10)
    port = free_port()
    node = new_node(tmp_path, web={"port": port})
    served = Served(node)
    eventually(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=5)).close()
    silent = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(30)]
    for peer in silent[::2]:
        peer.sendall(b"GET / HTTP/1.1\r\n")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=5) as answer:
        assert answer.status == 200
    for peer in silent:
        peer.close()
    served.end()
    node.close()


def test_a_peer_that_reads_no_answers_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_guard, "REQUEST_S", 0.8)
    port = free_port()
    node = new_node(tmp_path, web={"port": port})
    served = Served(node)
    with eventually(lambda: socket.create_connection(("127.0.0.1", port), timeout=20)) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asked = b"GET /style.css HTTP/1.1\r\nHost: node\r\n\r\n" * 1000

        def ask_on() -> None:
            while True:
                peer.sendall(asked)

        # until it is hung up on; what is asked is not taken any more, either
        with pytest.raises(ConnectionError):
            ask_on()
    served.end()
    node.close()


def test_the_process_lives_while_all_threads_wait_for_a_database_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(web_module, "readiness", lambda node: hangs.wait(60))
    port = free_port()
    node = new_node(tmp_path, web={"port": port})
    served = Served(node)
    eventually(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=5)).close()
    asking = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(60)]
    for peer in asking:
        peer.sendall(b"GET /readyz HTTP/1.1\r\nHost: node\r\n\r\n")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=5) as answer:
        assert answer.status == 200
    hangs.set()
    for peer in asking:
        peer.close()
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
    users = [{"name": "radiology", "password_hash": PASSWORD_HASH}]
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
