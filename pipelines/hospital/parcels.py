"""One file on its way out, and what a destination may say to it; each way of sending is a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from pynetdicom.dsutils import split_dataset

from medseg_pipelines.hospital.deliveries import Delivery
from medseg_pipelines.hospital.store import Store, sha256_of

# the bytes in front of every DICOM file, and what they end with (PS3.10)
PREAMBLE, MAGIC = 132, b"DICM"


class UnsendableError(Exception):
    """A file that sending again does not mend; the text says why, and nothing of a patient."""


class DestinationDownError(Exception):
    """A destination takes nothing at the moment; the text says what to check, and nothing of a patient."""

    def __init__(self, reason: str, *, during: Parcel | None = None) -> None:
        super().__init__(reason)
        self.during = during


@dataclass(frozen=True)
class Parcel:
    """A file that is what the job's record says. The UIDs are empty where it is no DICOM file."""

    delivery: Delivery
    path: Path
    sha256: str
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    transfer_syntax_uid: str = ""


class Said(Enum):
    """What a destination says to a file: it has it; not now; never."""

    STORED = "stored"
    LATER = "later"
    NEVER = "never"


# told of each parcel: what was said, and why where it is not there
Tell = Callable[[Parcel, Said, str], None]


class Sender(Protocol):
    """A way to one destination."""

    def send(self, parcels: Sequence[Parcel], tell: Tell) -> None:
        """Sends them one after the other, telling of each at once. Raises `DestinationDownError`."""


def open_parcel(store: Store, delivery: Delivery) -> Parcel:
    """The file of a delivery, checked against the job's record. Raises `UnsendableError`, `OSError` for a bad disk."""
    name, sha256 = delivery.record.get("file"), delivery.record.get("sha256")
    if not isinstance(name, str) or not isinstance(sha256, str) or Path(name).name != name:
        raise UnsendableError(f"the job's record names no file of format {delivery.format}; replay the job")
    path = store.results / delivery.job_id / name
    try:
        found = sha256_of(path)
    except FileNotFoundError:
        if not path.parent.is_dir():
            # without its folder it is not lost: the disk of the results may be away
            raise
        raise UnsendableError(f"{name} is missing in the results of the job; restore it, or replay the job") from None
    if found != sha256:
        raise UnsendableError(
            f"{name} was changed since it was made: SHA-256 {found[:12]}… found, {sha256[:12]}… expected; restore it"
        )
    with path.open("rb") as file:
        is_dicom = file.read(PREAMBLE)[-len(MAGIC) :] == MAGIC
    if not is_dicom:
        return Parcel(delivery, path, sha256)
    # of the file's own header: the rest may be large
    meta, _ = split_dataset(path)
    uids = [
        str(meta.get(keyword, ""))
        for keyword in ("MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "TransferSyntaxUID")
    ]
    return Parcel(delivery, path, sha256, *uids)


def said_of_status(status: int) -> tuple[Said | None, str]:
    """What a status of C-STORE, or a failure reason of STOW-RS, means (PS3.4 B.2.3, PS3.18 I.2.2).

    None: the destination as a whole takes nothing. The text names the status; what a peer adds could be of a patient.
    """
    if status == 0x0000 or status >> 12 == 0xB or status in (0x0001, 0x0107, 0x0116):
        return Said.STORED, ""
    if status == 0x0111:
        # duplicate SOP instance: it is there, as we have sent it before
        return Said.STORED, ""
    if status == 0x0122:
        return Said.NEVER, "it does not take objects of this class (status 0x0122); let it, or send another format"
    if status >> 8 == 0xA7 or status == 0x0213:
        return None, f"it is out of resources (status 0x{status:04X}); check its disk"
    meaning = {0x0124: "not authorised", 0xA9: "it does not match its class", 0xC: "it cannot be understood"}
    what = meaning.get(status) or meaning.get(status >> 8) or meaning.get(status >> 12) or "it failed there"
    return Said.LATER, f"refused with status 0x{status:04X}: {what}; the log of the peer says more"
