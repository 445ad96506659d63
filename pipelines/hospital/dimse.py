"""What DIMSE needs on both sides: TLS contexts, and an association to a peer that always ends.

pynetdicom is imported here first: its own log, which quotes what peers send, is silent from then on.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pynetdicom import AE, _config, build_context, evt
from pynetdicom import ae as ae_module
from pynetdicom import association as association_module
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationSocket

import medseg
from medseg_pipelines.hospital.settings import PeerSettings, TlsSettings

log = logging.getLogger(__name__)

# identifiers of queries and quoted values are a patient's data; what matters is told by the exceptions here
_config.LOG_HANDLER_LEVEL = "none"
_config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False
for _name in ("pynetdicom", "pydicom"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


# of one PDU that we receive: the greatest that common peers make use of
MAXIMUM_PDU = 131_072
# of one message to us where we asked: an answer has some hundred bytes
MOST_ANSWER = 2**20
# between two looks at whether an association stands still
LOOK_S = 0.2


class _Wire(AssociationSocket):
    """A peer that we call says no more at once than it was told it may."""

    def recv(self, nr_bytes: int) -> bytearray:
        """So many bytes, or fewer where the connection ends. Raises `OSError` beyond the bound."""
        if nr_bytes > MAXIMUM_PDU:
            raise OSError(f"a PDU of {nr_bytes} bytes")
        return super().recv(nr_bytes)


class _Answers(DIMSEServiceProvider):
    """What a peer answers; one without end ends the association."""

    _size = 0

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Adds a part to the message that is being received."""
        self._size = (0 if self.message is None else self._size) + sum(
            len(data) for _, data in primitive.presentation_data_value_list
        )
        if self._size > MOST_ANSWER:
            log.warning("an association is ended: an answer of more than %d bytes", MOST_ANSWER)
            self.dul.event_queue.put("Evt19")
            return
        super().receive_primitive(primitive)


class _Provider(DULServiceProvider):
    """A process that has to end does not wait for what still listens to a peer."""

    def __init__(self, association: Association) -> None:
        super().__init__(association)
        self.daemon = True


association_module.DULServiceProvider = _Provider  # type: ignore[attr-defined,assignment]
association_module.DIMSEServiceProvider = _Answers  # type: ignore[attr-defined]
ae_module.AssociationSocket = _Wire  # type: ignore[attr-defined]


Contexts = Sequence[tuple[str, list[str]]]


class PeerUnreachable(Exception):  # noqa: N818
    """No association with a peer stands, or it broke; the text says what to check, and nothing of a patient."""


def server_context(tls: TlsSettings) -> ssl.SSLContext:
    """What a server speaks TLS ≥ 1.2 with; who connects must show a certificate where `authority` is given.

    Raises `ConfigError`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if tls.authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, tls)


def client_context(tls: TlsSettings | None) -> ssl.SSLContext | None:
    """What a client speaks TLS ≥ 1.2 with, showing its certificate; None for plain TCP.

    The name of the server is checked, and its certificate by `authority`, or by those the system knows. Raises
    `ConfigError`.
    """
    if tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.authority is None:
        context.load_default_certs()
    return _loaded(context, tls)


def new_ae(ae_title: str, *, timeout_s: float) -> AE:
    """An application entity that waits nowhere longer than `timeout_s` seconds."""
    ae = AE(ae_title=ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = timeout_s
    ae.maximum_pdu_size = MAXIMUM_PDU
    return ae


@contextmanager
def associated(
    peer: PeerSettings,
    *,
    ae_title: str,
    contexts: Contexts,
    timeout_s: float,
    handlers: Sequence[evt.EventHandlerType] = (),
) -> Iterator[Association]:
    """An association with `peer`, released when the block ends, aborted where it raises.

    `contexts`: abstract syntax and transfer syntaxes of each presentation context, in this order, 128 at most; to learn
    which transfer syntax a peer takes, give each one a context of its own. `handlers`: as pynetdicom's `evt_handlers`.
    Raises `PeerUnreachable` where none comes about; a peer that takes none of the contexts counts as that.
    """
    ae = new_ae(ae_title, timeout_s=timeout_s)
    context = client_context(peer.tls)
    asked = [build_context(abstract, list(syntaxes)) for abstract, syntaxes in contexts]
    # pynetdicom takes the timeout off a socket that is connected; without one a peer that falls silent in the middle
    # of a PDU would be waited for without end
    opened = threading.Event()
    heard: list[str] = []
    own: list[Any] = [
        (evt.EVT_CONN_OPEN, _limit_waiting, [timeout_s, opened]),
        (evt.EVT_PDU_RECV, _note_rejection, [heard]),
    ]
    try:
        association = ae.associate(
            peer.host,
            peer.port,
            asked,
            ae_title=peer.ae_title,
            max_pdu=MAXIMUM_PDU,
            evt_handlers=[*own, *handlers],
            tls_args=None if context is None else (context, peer.host),
        )
    except OSError as error:
        raise PeerUnreachable(f"{_told(peer)}: no such host ({error.strerror}); check `host`") from error
    if not association.is_established:
        raise PeerUnreachable(f"{_told(peer)}: {_why(heard, peer, opened.is_set())}")
    over = threading.Event()
    if handlers:
        threading.Thread(target=_keep_going, args=(association, over), daemon=True).start()
    try:
        yield association
        if association.is_established:
            association.release()
    except BaseException:
        association.abort()
        raise
    finally:
        over.set()


def _keep_going(association: Association, over: threading.Event) -> None:
    """Take care that neither a request nor the release is waited for without end where the peer reports meanwhile.

    Both ask pynetdicom's reactor to stand still and wait until it says so. A report of the peer is answered in a thread
    of its own (pynetdicom 3.0), which says at its end that the reactor runs, though it may stand still by then.
    """
    asked_before = False
    while not over.wait(LOOK_S):
        asked = not association._reactor_checkpoint.is_set()
        if asked and asked_before:
            association._is_paused = True
        asked_before = asked


def _limit_waiting(event: evt.Event, timeout_s: float, opened: threading.Event) -> None:
    opened.set()
    wrapped = event.assoc.dul.socket
    if wrapped is not None and wrapped.socket is not None:
        wrapped.socket.settimeout(timeout_s)


def _note_rejection(event: evt.Event, heard: list[str]) -> None:
    # pynetdicom may look at the connection only once the rejection has closed it, and then says aborted
    if isinstance(event.pdu, A_ASSOCIATE_RJ):
        heard.append(str(event.pdu.reason_str))


def _loaded(context: ssl.SSLContext, tls: TlsSettings) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # a password would be asked for at the terminal, where nobody sits
        context.load_cert_chain(tls.certificate, tls.key, password="")
        if tls.authority is not None:
            context.load_verify_locations(tls.authority)
    except OSError as error:
        raise medseg.ConfigError(
            f"tls: {tls.certificate}, {tls.key} or {tls.authority} cannot be used "
            f"({error.strerror or type(error).__name__}), expected PEM files, a key without a password that fits the "
            "certificate, and the certificates of the authority"
        ) from error
    return context


def _told(peer: PeerSettings) -> str:
    return f"{peer.ae_title} at {peer.host}:{peer.port}"


def _why(rejections: list[str], peer: PeerSettings, opened: bool) -> str:
    if rejections:
        return f"refuses us ({rejections[-1]}); check the AE titles here and there, and that it knows this address"
    check = "that it speaks TLS, and the certificates" if peer.tls else "and that it speaks DICOM without TLS"
    if opened:
        # pynetdicom calls a connection that never stood aborted, too
        how = "breaks the connection off, is silent, or takes none of what is offered"
        return f"{how}; check its AE title, what it supports, {check}"
    how = "no TLS connection comes about" if peer.tls else "nothing answers"
    return f"{how}; check that it runs, `host` and `port`, {check}"
