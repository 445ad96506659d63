"""The pages for people, and the addresses that machines ask: served over HTTP by this process; no figures made here."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import secrets
import socket
import ssl
import threading
import time
from collections import OrderedDict
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import medseg
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.operations import Metrics, readiness
from medseg_pipelines.hospital.replaying import replay_job, study_of_job
from medseg_pipelines.hospital.web_guard import Guard, Impatient
from medseg_pipelines.hospital.web_login import Denied, Doorkeeper, Session, read_secret
from medseg_pipelines.hospital.web_views import (
    STUDY_STATES,
    find_study,
    list_parts,
    list_refusals,
    list_studies,
    picture_name,
    queues,
)
from medseg_pipelines.hospital.web_words import environment, list_address

log = logging.getLogger(__name__)

BEAT_S = 15.0
# one look at a study within so long is one line of the audit log, however often the page loads itself again
SAME_LOOK_S = 600.0
MOST_LOOKS, MOST_SEARCHES = 10_000, 1_000
MOST_SEARCH_LETTERS = 200
MOST_CONNECTIONS = 200
ID = re.compile(r"[0-9a-f]{32}")
# where a login may lead: to our own pages, and to nothing else
AFTER_LOGIN = re.compile(r"/(?:studies/[0-9a-f]{32}|refused|parts|search)?(?:\?[A-Za-z0-9=&_-]*)?")
_SHIPPED = files("medseg_pipelines").joinpath("templates/hospital")
STYLE, ICON = _SHIPPED.joinpath("style.css").read_bytes(), _SHIPPED.joinpath("icon.svg").read_bytes()
STYLE_ADDRESS = f"/style.css?{hashlib.sha256(STYLE).hexdigest()[:12]}"
# FastAPI hands what is typed into forms, and texts of errors, to OpenTelemetry where a process has that; ours must not
NO_TELEMETRY: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
KEPT = {"Cache-Control": "public, max-age=86400"}
NOTES = {
    "retried": "It is queued again.",
    "not-dead": "Nothing to try again: it is not given up any more.",
    "forgotten": "That search has been forgotten; these are all studies.",
}
NO_USERS = (
    "Nobody may log in yet. Run `medseg-hospital password`, put the name and what it prints under `web: users:` "
    "in the settings, and start the pages again."
)


class LoginNeededError(Exception):
    """A page that is for those who are logged in."""


def run_web(node: Node, stop: threading.Event) -> None:
    """Serves the pages until `stop`. Raises `ConfigError` where the address, a certificate or a user is no good."""
    web = node.settings.web
    app = make_app(node)
    config = uvicorn.Config(
        app,
        http=Impatient,
        ws="none",
        lifespan="off",
        log_config=None,
        # addresses are nobody's business
        access_log=False,
        proxy_headers=bool(web.trusted_proxies),
        forwarded_allow_ips=[text for network in web.trusted_proxies for text in _spellings(network)],
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=5,
        ssl_certfile=web.tls.certificate if web.tls else None,
        ssl_keyfile=web.tls.key if web.tls else None,
        ssl_ca_certs=str(web.tls.authority) if web.tls and web.tls.authority else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if web.tls and web.tls.authority else ssl.CERT_NONE,
    )
    try:
        config.load()
    except OSError as error:
        raise medseg.ConfigError(
            f"web.tls: {error.strerror or error}; expected a certificate and its key, in PEM"
        ) from error
    warn(node)
    listener = _listen(web.host, web.port)
    server = uvicorn.Server(config)
    # in a thread of its own it leaves the signals alone, which the command listens to
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="web")
    thread.start()
    scheme = "https" if web.tls else "http"
    log.info("the pages are at %s://%s:%d", scheme, web.host, listener.getsockname()[1])
    try:
        _beat(node)
        while not stop.wait(BEAT_S):
            if not thread.is_alive():
                raise RuntimeError("the web server has ended by itself")
            _beat(node)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _beat(node: Node) -> None:
    try:
        node.beat()
    except sa.exc.SQLAlchemyError as error:
        # /readyz says so, which it could not if this process ended
        log.error("the database does not answer (%s)", type(error).__name__)


def warn(node: Node) -> None:
    """Says what of the settings is unwise."""
    web = node.settings.web
    here = web.host in ("127.0.0.1", "::1", "localhost")
    if not here and web.tls is None:
        log.warning(
            "web: patients' names and passwords go over the network unencrypted at %s; give `web.tls`, or put a proxy "
            "that speaks TLS before 127.0.0.1",
            web.host,
        )
    if not here and not web.secure:
        log.warning("web: `secure: false` lets cookies go unencrypted; it is for a browser on this machine")
    if not web.users:
        log.warning("web: %s", NO_USERS)


def make_app(node: Node) -> FastAPI:
    """The application, without a server. Raises `ConfigError` where a user or the secret is no good."""
    door = Doorkeeper(node.settings.web, read_secret(node.settings.folder))
    pages = _Pages(node, door)
    metrics = Metrics(node)
    app = FastAPI(
        title="medseg", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, telemetry=NO_TELEMETRY
    )

    async def livez() -> Response:
        # needs no thread: those may all wait for a database that hangs
        return JSONResponse({"alive": True})

    def readyz() -> Response:
        found = readiness(node)
        return JSONResponse({"ready": found.ready, "lacking": list(found.lacking)}, 200 if found.ready else 503)

    def figures() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def style() -> Response:
        return Response(STYLE, media_type="text/css", headers=KEPT)

    def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml", headers=KEPT)

    for path, answer in (
        ("/livez", livez),
        ("/readyz", readyz),
        ("/metrics", figures),
        ("/style.css", style),
        ("/icon.svg", icon),
    ):
        app.add_api_route(path, answer, methods=["GET", "HEAD"], response_model=None)
    app.add_api_route("/login", pages.login, methods=["GET"], response_model=None)
    app.add_api_route("/login", pages.enter, methods=["POST"], response_model=None)
    inside = APIRouter(dependencies=[Depends(pages.require)])
    for path, page in (
        ("/", pages.studies),
        ("/search", pages.search),
        ("/studies/{study_id}", pages.study),
        ("/jobs/{job_id}/picture", pages.picture),
        ("/refused", pages.refused),
        ("/parts", pages.parts),
    ):
        inside.add_api_route(path, page, methods=["GET"], response_model=None)
    form = [Depends(pages.check_form)]
    for path, action in (
        ("/search", pages.begin_search),
        ("/jobs/{job_id}/retry", pages.retry),
        ("/logout", pages.leave),
    ):
        inside.add_api_route(path, action, methods=["POST"], response_model=None, dependencies=form)
    app.include_router(inside)
    app.add_exception_handler(LoginNeededError, pages.to_login)
    app.add_exception_handler(HTTPException, pages.problem)
    app.add_exception_handler(RequestValidationError, pages.problem)
    app.add_middleware(Guard, over_tls=node.settings.web.tls is not None, sorry=pages.sorry())
    return app


class _Pages:
    """What each address answers. Its state: searches and looks of late, in memory and of bounded size."""

    def __init__(self, node: Node, door: Doorkeeper) -> None:
        self._node, self._door = node, door
        self._templates = environment()
        self._secure = node.settings.web.secure
        # a name that browsers take from this host alone, and over TLS
        self._cookie = "__Host-medseg" if self._secure else "medseg"
        self._lock = threading.Lock()
        self._looks: OrderedDict[tuple[str, ...], float] = OrderedDict()
        self._searches: OrderedDict[str, tuple[str, str]] = OrderedDict()

    # -- coming in

    def require(self, request: Request) -> None:
        """Every page but the login passes here first."""
        if not self._door.has_users:
            raise HTTPException(503, NO_USERS)
        session = self._door.session(request.cookies.get(self._cookie))
        if session is None:
            raise LoginNeededError
        request.state.session = session

    def check_form(self, request: Request, token: Annotated[str, Form()] = "") -> None:
        """A form must come from a page of ours."""
        if not self._door.is_token(_session(request).id, token):
            raise HTTPException(
                403, "That form is out of date, or none of ours; go back, load the page again, and retry."
            )

    def to_login(self, request: Request, _: Exception) -> Response:
        """Sends to the login, and from there back to where one wanted to go."""
        wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        back = wanted if request.method == "GET" and wanted != "/" and AFTER_LOGIN.fullmatch(wanted) else ""
        return RedirectResponse(f"/login?back={_quoted(back)}" if back else "/login", 303)

    def login(self, request: Request, back: str = "/") -> Response:
        """The form that asks who one is."""
        if not self._door.has_users:
            raise HTTPException(503, NO_USERS)
        return self._login_form(request, back)

    def enter(
        self,
        request: Request,
        name: Annotated[str, Form()] = "",
        password: Annotated[str, Form()] = "",
        back: Annotated[str, Form()] = "/",
        token: Annotated[str, Form()] = "",
    ) -> Response:
        """Looks at a name and a password."""
        if not self._door.has_users:
            raise HTTPException(503, NO_USERS)
        visit = request.cookies.get(f"{self._cookie}-visit", "")
        if not visit or not self._door.is_token(f"visit {visit}", token):
            return self._login_form(request, back, "That form was out of date; please try once more.", 403)
        address = _address(request)
        found = self._door.enter(name, password, address)
        if isinstance(found, Denied):
            # what is no user's name may be a password, typed into the wrong field
            known = name if self._door.knows(name) else None
            # anybody may be held off a thousand times a second
            if found.wait_s <= 0 or self._is_news("held_off", address):
                self._node.audit.record("login_failed", user=known, address=address, held_off=found.wait_s > 0)
            if found.wait_s > 0:
                wait_s = int(found.wait_s) + 1
                said = f"Too many failed logins; please wait {wait_s} s."
                answer = self._login_form(request, back, said, 429)
                answer.headers["Retry-After"] = str(wait_s)
                return answer
            return self._login_form(request, back, "Name or password is wrong.", 401)
        self._node.audit.record("login", user=found.user, address=address)
        answer = RedirectResponse(_own_page(back), 303)
        self._set_cookie(answer, self._cookie, self._door.cookie(found), int(self._node.settings.web.session_h * 3600))
        return answer

    def leave(self, request: Request) -> Response:
        """The end of a session."""
        session = _session(request)
        self._door.leave(session)
        self._node.audit.record("logout", user=session.user)
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(self._cookie, path="/", secure=self._secure, httponly=True, samesite="strict")
        return answer

    # -- pages

    def studies(
        self, request: Request, state: str = "all", search: str = "", page: str = "1", still: str = "", note: str = ""
    ) -> Response:
        """The list of studies."""
        session = _session(request)
        state = state if state in STUDY_STATES else "all"
        words = self._searched(search, session.user)
        if words is None:
            return RedirectResponse("/?note=forgotten", 303)
        with self._node.database.reading() as connection:
            now = self._node.database.now(connection)
            found = list_studies(connection, state=state, words=words.split(), page=_number(page))
        self._audit_look(session, "listed", state=state, searched=bool(words))
        return self._page(
            request,
            "studies",
            found=found,
            state=state,
            search=search,
            words=words,
            now=now,
            lacking=readiness(self._node).lacking,
            note=NOTES.get(note),
            refresh=None if still else list_address(state=state, search=search, page=found.page),
        )

    def search(self, request: Request) -> Response:
        """The form for a search; a page of its own, since the list loads itself again and would eat what one types."""
        return self._page(request, "search")

    def begin_search(self, request: Request, words: Annotated[str, Form()] = "") -> Response:
        """Keeps what is looked for, often a patient's name, so that it stands in no address."""
        words = " ".join(words[:MOST_SEARCH_LETTERS].split())
        if not words:
            return RedirectResponse("/", 303)
        name = secrets.token_urlsafe(12)
        with self._lock:
            self._searches[name] = (_session(request).user, words)
            while len(self._searches) > MOST_SEARCHES:
                self._searches.popitem(last=False)
        return RedirectResponse(list_address(search=name), 303)

    def study(self, request: Request, study_id: str, note: str = "", still: str = "") -> Response:
        """One study."""
        with self._node.database.reading() as connection:
            now = self._node.database.now(connection)
            found = find_study(connection, study_id, now) if ID.fullmatch(study_id) else None
        if found is None:
            raise HTTPException(404, "There is no such study.")
        self._audit_look(_session(request), "viewed", study=study_id)
        refresh = f"/studies/{study_id}" if found.busy and not still else None
        made = [job for series in found.series for job in series.jobs]
        # those of old studies have been removed
        pictured = {job.id for job in made if self._picture_file(job.id, job.picture)}
        return self._page(
            request, "study", study=found, pictured=pictured, now=now, note=NOTES.get(note), refresh=refresh
        )

    def picture(self, job_id: str) -> Response:
        """The picture of a mask; of the address only the id of the job counts, and that must be one."""
        if not ID.fullmatch(job_id):
            raise HTTPException(404, "There is no such picture.")
        with self._node.database.reading() as connection:
            path = self._picture_file(job_id, picture_name(connection, job_id))
        if path is None:
            raise HTTPException(404, "There is no such picture.")
        return FileResponse(path, media_type="image/png")

    def retry(self, request: Request, job_id: str) -> Response:
        """A job that was given up, or deliveries of it, are begun again."""
        with self._node.database.reading() as connection:
            study_id = study_of_job(connection, job_id) if ID.fullmatch(job_id) else None
        if study_id is None:
            raise HTTPException(404, "There is no such job.")
        note = "retried" if replay_job(self._node, job_id, user=_session(request).user) else "not-dead"
        return RedirectResponse(f"/studies/{study_id}?note={note}#job-{job_id}", 303)

    def refused(self, request: Request, page: str = "1") -> Response:
        """What was refused, and why."""
        with self._node.database.reading() as connection:
            now = self._node.database.now(connection)
            rows, number, pages, total = list_refusals(connection, _number(page))
        folder = self._node.settings.folder
        return self._page(
            request, "refused", rows=rows, page=number, pages=pages, total=total, now=now, folder=folder, refresh=None
        )

    def parts(self, request: Request) -> Response:
        """The processes of the node, and what waits for them."""
        with self._node.database.reading() as connection:
            now = self._node.database.now(connection)
            found, waiting = list_parts(connection, now), queues(connection)
        return self._page(
            request,
            "parts",
            parts=found,
            queues=waiting,
            now=now,
            free=self._node.store.free_bytes,
            least_free=self._node.settings.storage.least_free_gb * 1e9,
            lacking=readiness(self._node).lacking,
            refresh="/parts",
        )

    # -- what goes wrong

    def problem(self, request: Request, error: Exception) -> Response:
        """A page that says what is wrong; it quotes nothing of what was asked."""
        status = error.status_code if isinstance(error, HTTPException) else 400
        ours = isinstance(error, HTTPException) and error.detail and status in (403, 404, 503)
        said = str(error.detail) if ours and isinstance(error, HTTPException) else "That cannot be answered."
        if status == 404 and said == "Not Found":
            said = "There is no such page."
        session = self._door.session(request.cookies.get(self._cookie))
        return self._page(request, "problem", status=status, session=session, said=said)

    def sorry(self) -> bytes:
        """The page for what nobody foresaw, made beforehand."""
        said = "Something went wrong here; the log of the node says what. Please try again."
        return self._rendered("problem", session=None, said=said, status=500).encode()

    # -- helpers

    def _page(self, request: Request, name: str, *, status: int = 200, **values: Any) -> Response:
        values.setdefault("session", getattr(request.state, "session", None))
        return HTMLResponse(self._rendered(name, status=status, **values), status)

    def _rendered(self, name: str, **values: Any) -> str:
        session: Session | None = values["session"]
        common = {
            "style": STYLE_ADDRESS,
            "token": self._door.token(session.id) if session else "",
            "node": self._node.settings.name or "",
            "refresh": None,
            "note": None,
        }
        return self._templates.get_template(f"{name}.html.jinja").render(common | values)

    def _login_form(self, request: Request, back: str, said: str = "", status: int = 200) -> Response:
        # kept where there is one: else of two open tabs only the later one could log in
        visit = request.cookies.get(f"{self._cookie}-visit", "")
        visit = visit if ID.fullmatch(visit) else secrets.token_hex(16)
        token = self._door.token(f"visit {visit}")
        answer = self._page(
            request, "login", status=status, session=None, visit_token=token, back=_own_page(back), said=said
        )
        self._set_cookie(answer, f"{self._cookie}-visit", visit, 3600)
        return answer

    def _set_cookie(self, answer: Response, name: str, value: str, seconds: int) -> None:
        answer.set_cookie(name, value, max_age=seconds, path="/", secure=self._secure, httponly=True, samesite="strict")

    def _picture_file(self, job_id: str, name: str | None) -> Path | None:
        """The picture of a job where it is there; what a worker wrote down may lead nowhere else, by links or dots."""
        folder = (self._node.store.results / job_id).resolve()
        path = (folder / name).resolve() if name else folder
        return path if path.parent == folder and path.suffix == ".png" and path.is_file() else None

    def _searched(self, name: str, user: str) -> str | None:
        """The words of a search; empty where there is none, None where it is not known any more."""
        if not name:
            return ""
        with self._lock:
            owner, words = self._searches.get(name, ("", ""))
            return words if owner == user else None

    def _audit_look(self, session: Session, event: str, **facts: str | bool) -> None:
        if self._is_news(session.id, event, *map(str, facts.values())):
            self._node.audit.record(event, user=session.user, **facts)

    def _is_news(self, *key: str) -> bool:
        """Whether it has not been so for `SAME_LOOK_S`."""
        now = time.monotonic()
        with self._lock:
            before = self._looks.pop(key, None)
            is_news = before is None or now - before >= SAME_LOOK_S
            self._looks[key] = now if before is None or is_news else before
            while len(self._looks) > MOST_LOOKS:
                self._looks.popitem(last=False)
        return is_news


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise medseg.ConfigError(
            f"web: cannot listen at {host}:{port} ({error.strerror}); change `web.host` or `web.port`"
        ) from error
    return listener


def _spellings(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> tuple[str, ...]:
    """`network` as a socket may tell it: one that listens on IPv6 has a caller of IPv4 as `::ffff:10.1.0.7`."""
    if network.version == 6:
        return (str(network),)
    return str(network), f"::ffff:{network.network_address}/{96 + network.prefixlen}"


def _address(request: Request) -> str:
    """Of the browser, as far as that is known."""
    host = request.client.host if request.client else ""
    try:
        # what a proxy passes on may be anything
        found = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    return str(getattr(found, "ipv4_mapped", None) or found)


def _session(request: Request) -> Session:
    session: Session = request.state.session
    return session


def _own_page(back: str) -> str:
    return back if AFTER_LOGIN.fullmatch(back) else "/"


def _quoted(address: str) -> str:
    return address.replace("?", "%3F").replace("&", "%26").replace("=", "%3D")


def _number(text: str) -> int:
    """A page's number; the first for anything that is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 8 else 1
