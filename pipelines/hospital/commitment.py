"""Storage Commitment (PS3.4 annex J): a peer is asked to say that it keeps what it was sent, and its report is heard.

The report comes on the same association, or on one that the peer opens to the gateway.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import sqlalchemy as sa
from pynetdicom import evt
from pynetdicom.dsutils import decode

from medseg_pipelines.hospital.audit import Audit
from medseg_pipelines.hospital.deliveries import Deliveries, Delivery
from medseg_pipelines.hospital.dimse import PeerUnreachable, associated
from medseg_pipelines.hospital.parcels import DestinationDownError, Parcel
from medseg_pipelines.hospital.settings import PeerSettings, PublishSettings

log = logging.getLogger(__name__)

PUSH_MODEL, PUSH_INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
VERIFICATION = "1.2.840.10008.1.1"
SYNTAXES = ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"]
REQUEST = 1
# N-EVENT-REPORT: success, or failures exist
EVENTS = (1, 2)
OK, NO_SUCH_EVENT, INVALID_ARGUMENT, PROCESSING_FAILURE = 0x0000, 0x0113, 0x0115, 0x0110
# so long a report may come on the association of its request; most peers open one of their own
SAME_S = 2.0
# by the state of a delivery after a report
SETTLED = {
    "done": "",
    "waiting": "not kept by the peer; it is sent again",
    "dead": "not kept by the peer however often it was sent; it is given up",
}
# PS3.3 C.14.1.1
REASONS = {
    0x0110: "processing failure",
    0x0112: "no such object",
    0x0213: "out of resources",
    0x0122: "class not supported",
    0x0119: "class and object do not fit",
    0x0131: "the request was known already",
}


@dataclass(frozen=True)
class Reports:
    """Hears reports, from whatever association, and writes down what they come to."""

    deliveries: Deliveries
    audit: Audit

    def hear(self, event: evt.Event) -> tuple[int, None]:
        """The handler of `evt.EVT_N_EVENT_REPORT`: the status to answer with."""
        if event.event_type not in EVENTS:
            return NO_SUCH_EVENT, None
        try:
            information = event.event_information
            transaction = str(information.TransactionUID)
            stored = {str(item.ReferencedSOPInstanceUID) for item in information.get("ReferencedSOPSequence") or []}
            failed = {
                str(item.ReferencedSOPInstanceUID): _reason(item.get("FailureReason"))
                for item in information.get("FailedSOPSequence") or []
            }
        except Exception as error:  # noqa: BLE001
            # its values are read only here, and pydicom raises whatever it stumbles over
            log.warning("a report on storage commitment cannot be understood (%s)", type(error).__name__)
            return INVALID_ARGUMENT, None
        try:
            told = self.deliveries.reported(transaction, stored, failed)
        except sa.exc.SQLAlchemyError as error:
            # it is asked for again
            log.error("a report on storage commitment could not be written down (%s)", type(error).__name__)
            return PROCESSING_FAILURE, None
        if told is None:
            log.warning("a report on storage commitment came that nobody asked for, or that was answered before")
            return INVALID_ARGUMENT, None
        for job, destination, format, state in told:
            reason = SETTLED[state]
            what = "failed" if reason else "confirmed"
            self.audit.record(what, job=job, destination=destination, format=format, reason=reason)
            log.info("%s of job %s: %s by %s", format, job, reason or "confirmed", destination)
        return OK, None


def _reason(status: Any) -> str:
    meaning = REASONS.get(status) if isinstance(status, int) else None
    return f"the peer does not keep it ({meaning or 'it does not say why'}); it is sent again"


def ask(
    peer: PeerSettings,
    parcels: Mapping[Delivery, Parcel],
    *,
    settings: PublishSettings,
    reports: Reports,
    written: Callable[[str], None],
) -> str:
    """Asks a peer whether it keeps these; empty, or why it does not even answer that.

    `written` is told the transaction's UID before it goes out. Raises `DestinationDownError`.
    """
    heard = threading.Event()

    def hear(event: evt.Event) -> tuple[int, None]:
        answer = reports.hear(event)
        heard.set()
        return answer

    transaction = f"2.25.{uuid.uuid4().int}"
    try:
        with associated(
            peer,
            ae_title=settings.ae_title,
            # a peer without storage commitment says so, instead of breaking the association off
            contexts=[(VERIFICATION, SYNTAXES), (PUSH_MODEL, SYNTAXES)],
            timeout_s=settings.timeout_s,
            handlers=[(evt.EVT_N_EVENT_REPORT, hear)],
        ) as association:
            if PUSH_MODEL not in {context.abstract_syntax for context in association.accepted_contexts}:
                return "it does not offer storage commitment; turn `commitment` off, or set it up there"
            written(transaction)
            try:
                answer, _ = association.send_n_action(
                    _request(transaction, parcels), REQUEST, PUSH_MODEL, PUSH_INSTANCE
                )
            except RuntimeError as error:
                raise PeerUnreachable(f"{peer.ae_title}: the association broke; check its log") from error
            if "Status" not in answer:
                raise PeerUnreachable(f"{peer.ae_title}: no answer on storage commitment in time; check its log")
            status = int(answer.Status)
            if status != OK:
                return (
                    f"storage commitment is refused (status 0x{status:04X}); check the peer, or turn `commitment` off"
                )
            heard.wait(SAME_S)
    except PeerUnreachable as error:
        raise DestinationDownError(f"storage commitment: {error}") from error
    return ""


def _request(transaction: str, parcels: Mapping[Delivery, Parcel]) -> Any:
    request = _empty()
    request.TransactionUID = transaction
    items = []
    for parcel in parcels.values():
        item = _empty()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = parcel.sop_class_uid, parcel.sop_instance_uid
        items.append(item)
    request.ReferencedSOPSequence = items
    return request


def _empty() -> Any:
    return decode(BytesIO(), is_implicit_vr=False, is_little_endian=True)
