"""The pages of a hospital node for tests: users, logins, rows to look at, a server; no test lives here."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hospital_rows import RESULT, add_done, add_job, add_series, new_node, study_of
from PIL import Image as Picture
from starlette.testclient import TestClient

import medseg
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.web import make_app, run_web
from medseg_pipelines.hospital.web_login import hash_password

PASSWORD = "correct horse battery"
# as cheap as is allowed: what a password costs is tested by its numbers
PASSWORD_HASH = hash_password(PASSWORD, cost=2**12, passes=1)
HOST, BROWSER = "https://node", "10.0.0.9"
PAGES = ("/", "/search", "/refused", "/parts")


def pages_node(folder: Path, **web: Any) -> Node:
    """The part that serves pages, with two users."""
    users = [{"name": name, "password_hash": PASSWORD_HASH} for name in ("radiology", "physics")]
    return new_node(folder, web={"users": users} | web)


def new_client(node: Node) -> TestClient:
    """A browser without a cookie, which follows no redirection."""
    return TestClient(make_app(node), base_url=HOST, follow_redirects=False, client=(BROWSER, 50000))


def another(client: TestClient) -> TestClient:
    """Another browser at the same pages."""
    return TestClient(client.app, base_url=HOST, follow_redirects=False, client=(BROWSER, 50000))


def form_token(text: str) -> str:
    return re.search(r'name="token" value="([0-9a-f]{64})"', text)[1]


def log_in(client: TestClient, name: str = "radiology", password: str = PASSWORD, **more: str) -> Any:
    token = form_token(client.get("/login").text)
    return client.post("/login", data={"name": name, "password": password, "token": token} | more)


def events(node: Node) -> list[dict[str, Any]]:
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


class Served:
    """Pages that a thread serves until `stop`."""

    def __init__(self, node: Node) -> None:
        self.node, self.stop = node, threading.Event()
        self.error: BaseException | None = None
        # a test that fails before the end must not keep the process
        self.thread = threading.Thread(target=self._run, daemon=True)
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
