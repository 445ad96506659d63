"""Results to a peer by C-STORE: each file in its own transfer syntax, several of them over one association."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from pynetdicom import _config
from pynetdicom.association import Association
from pynetdicom.dsutils import decode, split_dataset

from medseg_pipelines.hospital.dimse import PeerUnreachable, associated
from medseg_pipelines.hospital.parcels import DestinationDownError, Parcel, Said, Tell, said_of_status
from medseg_pipelines.hospital.settings import PeerSettings

# files go out block by block as they are, never as a whole in memory
_config.STORE_SEND_CHUNKED_DATASET = True

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
# offered with all others: a peer that takes none of our objects says so by the presentation contexts, and does not
# break the association off
VERIFICATION = "1.2.840.10008.1.1"
# PS3.8 table 9-18
NO_SUCH_CLASS = 3


@dataclass(frozen=True)
class PeerSender:
    """To a DICOM node. `timeout_s`: for each message and for the association to come about."""

    peer: PeerSettings
    ae_title: str
    timeout_s: float

    def send(self, parcels: Sequence[Parcel], tell: Tell) -> None:
        """Sends them over one association. Raises `DestinationDownError`."""
        sendable = []
        for parcel in parcels:
            if parcel.sop_class_uid and parcel.sop_instance_uid and parcel.transfer_syntax_uid:
                sendable.append(parcel)
            else:
                tell(parcel, Said.NEVER, "it is no DICOM file, and the destination is a DICOM peer; change `formats`")
        if not sendable:
            return
        try:
            with associated(
                self.peer, ae_title=self.ae_title, contexts=_contexts(sendable), timeout_s=self.timeout_s
            ) as association:
                for number, parcel in enumerate(sendable):
                    tell(parcel, *self._sent(association, parcel, number + 1))
        except PeerUnreachable as error:
            raise DestinationDownError(str(error)) from error

    def _sent(self, association: Association, parcel: Parcel, message: int) -> tuple[Said, str]:
        accepted = {
            context.transfer_syntax[0]
            for context in association.accepted_contexts
            if context.abstract_syntax == parcel.sop_class_uid
        }
        if not accepted.intersection(_syntaxes(parcel)):
            return _not_accepted(association, parcel)
        dataset: Any = parcel.path
        if parcel.transfer_syntax_uid not in accepted:
            # the standard's default, which some know alone: pynetdicom writes it so
            meta, offset = split_dataset(parcel.path)
            dataset = decode(BytesIO(parcel.path.read_bytes()[offset:]), is_implicit_vr=False, is_little_endian=True)
            dataset.file_meta = meta
        try:
            answer = association.send_c_store(dataset, msg_id=message)
        except RuntimeError as error:
            raise DestinationDownError(self._broke(), during=parcel) from error
        if "Status" not in answer:
            # aborted, or no answer in time
            raise DestinationDownError(self._broke(), during=parcel)
        said, reason = said_of_status(int(answer.Status))
        if said is None:
            raise DestinationDownError(f"{self.peer.ae_title}: {reason}", during=parcel)
        return said, reason

    def _broke(self) -> str:
        return (
            f"{self.peer.ae_title} at {self.peer.host}:{self.peer.port}: the association broke in the middle of an "
            "object, or there was no answer in time; check that it runs, and its log"
        )


def _syntaxes(parcel: Parcel) -> list[str]:
    own = parcel.transfer_syntax_uid
    return [own, IMPLICIT] if own == EXPLICIT else [own]


def _contexts(parcels: Sequence[Parcel]) -> list[tuple[str, list[str]]]:
    """A presentation context for each class and transfer syntax: so that the peer cannot choose the wrong one."""
    pairs = [(parcel.sop_class_uid, syntax) for parcel in parcels for syntax in _syntaxes(parcel)]
    return [(VERIFICATION, [IMPLICIT]), *((abstract, [syntax]) for abstract, syntax in dict.fromkeys(pairs))]


def _not_accepted(association: Association, parcel: Parcel) -> tuple[Said, str]:
    results = {c.result for c in association.rejected_contexts if c.abstract_syntax == parcel.sop_class_uid}
    if results == {NO_SUCH_CLASS}:
        return Said.NEVER, "it does not take objects of this class; let it, or send another format"
    return Said.LATER, "it does not take the class in the transfer syntax of the file; check what it is set to accept"
