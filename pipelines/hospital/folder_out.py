"""Results to a folder: each file whole or not at all, under a name that tells the job and the format alone."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg_pipelines.hospital.parcels import DestinationDownError, Parcel, Said, Tell
from medseg_pipelines.hospital.store import BLOCK, sha256_of, sync_folder

ENDINGS = {
    "nifti": ".nii.gz",
    "dicom-seg": ".seg.dcm",
    "rtstruct": ".rtstruct.dcm",
    "dicom-sr": ".sr.dcm",
    "dicom-sc": ".sc.dcm",
}


@dataclass(frozen=True)
class FolderSender:
    """To a folder, which must be there: a share that is not mounted must not fill the disk below."""

    folder: Path

    def send(self, parcels: Sequence[Parcel], tell: Tell) -> None:
        """Copies them. Raises `DestinationDownError`."""
        if not self.folder.is_dir():
            raise DestinationDownError(f"{self.folder}: no such folder; make it, or mount the share")
        for parcel in parcels:
            try:
                self._copied(parcel)
            except OSError as error:
                raise DestinationDownError(
                    f"{self.folder}: cannot be written to ({error.strerror}); check its rights and its disk"
                ) from error
            tell(parcel, Said.STORED, "")

    def _copied(self, parcel: Parcel) -> None:
        name = parcel.delivery.job_id + ENDINGS[parcel.delivery.format]
        place = self.folder / name
        if not (place.is_file() and sha256_of(place) == parcel.sha256):
            part = self.folder / f".{name}.{uuid.uuid4().hex[:8]}.part"
            try:
                with parcel.path.open("rb") as source, part.open("xb") as file:
                    while block := source.read(BLOCK):
                        file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(place)
            except OSError:
                part.unlink(missing_ok=True)
                raise
        sync_folder(self.folder)
        for left in self.folder.glob(f".{name}.*.part"):
            # of one that was killed
            left.unlink(missing_ok=True)
