"""DICOM in: whoever is allowed to sends by C-STORE; folders and pulls run beside it, as does what closes series."""

from __future__ import annotations

import ipaddress
import logging
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pynetdicom import _config as pynetdicom_config
from pynetdicom import build_context, evt
from pynetdicom.presentation import AllStoragePresentationContexts

import medseg
from medseg_pipelines.hospital.commitment import PUSH_MODEL, Reports
from medseg_pipelines.hospital.completeness import Completeness
from medseg_pipelines.hospital.database import count
from medseg_pipelines.hospital.deliveries import open_deliveries
from medseg_pipelines.hospital.dimse import new_ae, server_context
from medseg_pipelines.hospital.entrance import Entrance, Request, Verdict
from medseg_pipelines.hospital.intake import NoRoomError, RefusedError
from medseg_pipelines.hospital.models import Models, model_of
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.pull import Puller, count_of
from medseg_pipelines.hospital.scp import Bounds, make_acceptor, messages_of
from medseg_pipelines.hospital.settings import AE_TITLE, GatewaySettings
from medseg_pipelines.hospital.threads import Threads, told
from medseg_pipelines.hospital.watch import Watcher

log = logging.getLogger(__name__)

BEAT_S, LOOK_S = 5.0, 1.0
# what a killed gateway has left is older, what another one on the same folder is writing is not
LEFT_S = 3600.0
VERIFICATION = "1.2.840.10008.1.1"
# what medseg's readers decode; none that is deflated as a whole
TRANSFER_SYNTAXES = (
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
)
# PS3.4 annex B.2.3
SUCCESS, NO_ROOM, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000


def run_gateway(node: Node, stop: threading.Event) -> None:
    """Receives DICOM until `stop`. Raises `MedsegError` where a part of it fails: it is to be started again then."""
    settings = node.settings
    models = Models()
    for rule in settings.rules:
        model_of(models, rule)
    removed = node.store.sweep(LEFT_S, time.time())
    if removed:
        log.info("%d files that were never received whole are removed", removed)
    with _arranged(node):
        _run(node, stop)


@contextmanager
def _arranged(node: Node) -> Iterator[None]:
    """What pynetdicom and Python keep for a whole process is ours until the end."""
    before = threading.excepthook, tempfile.tempdir, pynetdicom_config.STORE_RECV_CHUNKED_DATASET
    threading.excepthook = _tell_of_thread
    # a file goes to the disk as it comes, on the same disk as its place for good
    tempfile.tempdir = str(node.store.incoming)
    pynetdicom_config.STORE_RECV_CHUNKED_DATASET = True
    try:
        with warnings.catch_warnings():
            # pydicom's quote the values that they are about
            warnings.simplefilter("ignore")
            yield
    finally:
        threading.excepthook, tempfile.tempdir, pynetdicom_config.STORE_RECV_CHUNKED_DATASET = before


def _run(node: Node, stop: threading.Event) -> None:
    settings = node.settings
    ask = count_of(settings)
    completeness = Completeness(node.database, node.jobs, settings, node.audit, count_of=ask)
    door = Door(node)
    threads = Threads(stop)
    threads.start("entrance", door.serve)
    # while this gateway was not there, nobody could send: that was no quiet
    threads.every("completeness", LOOK_S, completeness.look, after_s=settings.completeness.quiet_s)
    threads.every("heartbeat", BEAT_S, node.beat)
    threads.every("door", LOOK_S, door.look)
    for watched in settings.watch:
        watcher = Watcher(watched, node.intake, node.store, most_bytes=_most_bytes(settings.gateway))
        threads.every(f"watch {watched.folder.name}", watched.every_s, watcher.look)
    for number, pulled in enumerate(settings.pull, 1):
        puller = Puller(pulled, node, most_bytes=_most_bytes(settings.gateway))
        threads.every(f"pull {number}", pulled.every_s, puller.look)
    try:
        threads.wait()
    finally:
        door.end()
        log.info("the gateway has ended")


class Door:
    """The C-STORE and C-ECHO provider of a node, where reports on storage commitment come, too."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._settings = settings = node.settings.gateway
        # by the thread of the entrance, and by that which writes it down
        self._refused = self._written = 0
        ae = new_ae(settings.ae_title, timeout_s=settings.idle_s)
        ae.acse_timeout = settings.handshake_s
        # the entrance decides, counts and tells; pynetdicom would reject the eleventh without a word to anybody
        ae.maximum_associations = settings.most_associations + 1
        bounds = Bounds(_most_bytes(settings), settings.idle_s, node.store.has_room)
        # on storage commitment of what was sent: peers report to where they know our AE title
        reports = Reports(open_deliveries(node), node.audit)
        handlers = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_ECHO, _echo),
            (evt.EVT_N_EVENT_REPORT, reports.hear),
        ]
        try:
            self._acceptor = make_acceptor(ae, (settings.host, settings.port), _contexts(), handlers, bounds)
        except OSError as error:
            raise medseg.ConfigError(
                f"gateway: {settings.host}:{settings.port} cannot be listened at ({error.strerror}); is another "
                "gateway running? change `port` or `host`"
            ) from error
        tls = server_context(settings.tls) if settings.tls else None
        self._entrance = Entrance(
            self._acceptor.listener,
            tls=tls,
            handshake_s=settings.handshake_s,
            knows=self._knows,
            judge=self._judge,
            admit=self._acceptor.admit,
            refused=self._note,
        )
        how = "without TLS" if tls is None else "by mutual TLS" if settings.tls and settings.tls.authority else "by TLS"
        log.info("%s listens at %s:%d %s", settings.ae_title, settings.host, settings.port, how)
        if not settings.allow:
            log.warning("gateway: `allow` is empty: everybody who reaches that port may send")

    def serve(self, stop: threading.Event) -> None:
        """Lets in whoever may, until `stop`."""
        self._entrance.serve(stop)

    def look(self) -> None:
        """Removes what broken associations left, and writes down what was refused."""
        for association in self._acceptor.collect():
            if why := messages_of(association).unfit:
                self._node.intake.refuse(None, sent_by=str(association.requestor.ae_title), reason=why)
        if more := self._refused - self._written:
            with self._node.database.writing() as connection:
                count(connection, "associations_refused", by=more)
            self._written += more

    def end(self) -> None:
        """Breaks off what is left, and closes the port."""
        self._acceptor.end()
        self._acceptor.server_close()

    def _knows(self, address: str) -> bool:
        allow = self._settings.allow
        return not allow or any(_inside(one.network, address) for one in allow)

    def _judge(self, request: Request) -> Verdict:
        # by the second one peers call that report on storage commitment
        if request.called not in (self._settings.ae_title, self._node.settings.publish.ae_title):
            return Verdict.CALLED_UNKNOWN
        welcome = not self._settings.allow or any(
            one.ae_title == request.calling and _inside(one.network, str(request.address[0]))
            for one in self._settings.allow
        )
        if not welcome or not AE_TITLE.fullmatch(request.calling):
            return Verdict.CALLING_UNKNOWN
        return Verdict.WELCOME if self._acceptor.count() < self._settings.most_associations else Verdict.FULL

    def _note(self, why: str) -> None:
        # in the thread of the entrance, which must not wait for the database
        self._refused += 1
        log.warning("connection refused: %s", why)

    def _store(self, event: evt.Event) -> int:
        """The answer to a C-STORE request: success only once the file is on the disk and in the database."""
        path, sender = Path(event.dataset_path), str(event.assoc.requestor.ae_title)
        messages = messages_of(event.assoc)
        try:
            self._node.intake.check_room()
            if path in messages.dropped:
                raise NoRoomError("the disk was full for a while before all of a file had come")
            self._node.intake.take(path, sent_by=sender)
        except NoRoomError as error:
            log.error("not taken from %s: %s", sender, error)
            return NO_ROOM
        except RefusedError:
            return NOT_UNDERSTOOD
        except Exception as error:  # noqa: BLE001
            # a database or a disk that fails: the sender keeps the file, and tries again
            log.error("not taken from %s: %s", sender, told(error))
            return NO_ROOM
        finally:
            messages.took(path)
        return SUCCESS


def _echo(_: evt.Event) -> int:
    return SUCCESS


def _contexts() -> Sequence[Any]:
    classes = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
    storage = [build_context(uid, list(TRANSFER_SYNTAXES)) for uid in classes]
    verification, reports = (build_context(uid, list(TRANSFER_SYNTAXES[:3])) for uid in (VERIFICATION, PUSH_MODEL))
    # a peer that reports is the provider on an association of its own
    reports.scu_role = reports.scp_role = True
    return [*storage, verification, reports]


def _most_bytes(settings: GatewaySettings) -> int:
    return int(settings.most_mb * 1e6)


def _inside(network: ipaddress.IPv4Network | ipaddress.IPv6Network | None, address: str) -> bool:
    if network is None:
        return True
    found = ipaddress.ip_address(address.partition("%")[0])
    # of a socket that serves both kinds
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found in network


def _tell_of_thread(failure: threading.ExceptHookArgs) -> None:
    # a thread of an association, which ends alone; those of the gateway are watched
    error = failure.exc_value
    log.error("an association has ended: %s", told(error) if error is not None else failure.exc_type.__name__)
