"""Headers of small synthetic DICOM series for tests: classic slices or one enhanced object, at any place in space."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from geometry import oblique
from pydicom import Dataset, FileDataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from medseg.readers.series import SourceImages, source_images

Array = npt.NDArray[np.float64]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
UID_ROOT = "1.2.826.0.1.3680043.8.498.1"
MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"

# (column, row, plane) → LPS mm; unequal spacing in all three
OBLIQUE = oblique((0.8, 1.1, 2.5))
# columns run to the left, rows to the feet, planes to the front: x, −z, −y
CORONAL = np.array([[0.9, 0, 0, -20.0], [0, 0, 3.0, 10.0], [0, -1.3, 0, 40.0], [0, 0, 0, 1]])
SHAPE = (11, 9, 6)


def ras(affine_lps: Array) -> Array:
    """The same affine to RAS mm, as label maps have it."""
    return LPS_TO_RAS @ affine_lps


def classic(affine: Array = OBLIQUE, shape: tuple[int, int, int] = SHAPE, *, series: int = 1) -> list[Dataset]:
    """One header per plane of a volume of (columns, rows, planes)."""
    headers = []
    for k in range(shape[2]):
        header = _common(shape, series)
        header.SOPClassUID = MR
        header.SOPInstanceUID = f"{UID_ROOT}.{series}.{k + 1}"
        header.InstanceNumber = k + 1
        _placed(header, header, header, affine, k)
        headers.append(header)
    return headers


def enhanced(affine: Array = OBLIQUE, shape: tuple[int, int, int] = SHAPE) -> Dataset:
    """One header with a frame per plane, orientation and spacing shared."""
    header = _common(shape, 7)
    header.SOPClassUID = ENHANCED_MR
    header.SOPInstanceUID = f"{UID_ROOT}.7.1"
    header.InstanceNumber = 1
    header.NumberOfFrames = shape[2]
    shared, frames = Dataset(), []
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([Dataset()]), Sequence([Dataset()])
    for k in range(shape[2]):
        frame = Dataset()
        frame.PlanePositionSequence = Sequence([Dataset()])
        _placed(
            frame.PlanePositionSequence[0],
            shared.PlaneOrientationSequence[0],
            shared.PixelMeasuresSequence[0],
            affine,
            k,
        )
        frames.append(frame)
    header.SharedFunctionalGroupsSequence = Sequence([shared])
    header.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return header


def images_of(headers: list[Dataset]) -> SourceImages:
    """The series that `headers` make, read from files without pixels; their order there is that of the list."""
    with TemporaryDirectory() as folder:
        for number, header in enumerate(headers):
            # what a scanner writes may be no valid file for pydicom
            file = FileDataset("", header, file_meta=header.file_meta, preamble=b"\0" * 128)
            file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            file.save_as(Path(folder) / f"{number:04}", enforce_file_format=False)
        return source_images(Path(folder))


def _common(shape: tuple[int, int, int], series: int) -> Dataset:
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.PatientID, header.PatientName = "P1", "Doe^Jane"
    header.StudyInstanceUID, header.SeriesInstanceUID = f"{UID_ROOT}.0", f"{UID_ROOT}.{series}"
    header.FrameOfReferenceUID = f"{UID_ROOT}.9"
    header.Modality, header.SeriesNumber = "MR", 3
    header.SeriesDate, header.SeriesTime = "20240229", "081500"
    header.Columns, header.Rows = shape[0], shape[1]
    header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 0
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    return header


def _placed(position: Dataset, orientation: Dataset, measures: Dataset, affine: Array, k: int) -> None:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / spacing
    position.ImagePositionPatient = _decimal(affine[:3, 3] + k * affine[:3, 2])
    orientation.ImageOrientationPatient = _decimal([*directions[:, 0], *directions[:, 1]])
    measures.PixelSpacing = _decimal([spacing[1], spacing[0]])
    measures.SliceThickness = _decimal([spacing[2]])[0]


def _decimal(values: npt.ArrayLike) -> list[str]:
    return [f"{value:.10f}" for value in np.asarray(values)]
