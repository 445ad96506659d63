"""Tiny DICOM series made of nothing: oblique, of unequal sides and spacing, files and numbers shuffled."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from pydicom import Dataset, FileDataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian

PLANES, ROWS, COLUMNS = 5, 6, 8
BETWEEN_ROWS, BETWEEN_COLUMNS, STEP = 1.5, 0.75, 2.5
ORIGIN = np.array([-20.0, 35.5, 110.25])
CT, MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
SERIES, STUDY, FRAME = "1.2.3.4.1", "1.2.3.4.2", "1.2.3.4.3"

Edit = Callable[[int, Dataset], None]


def _turned(x_degrees: float, z_degrees: float) -> np.ndarray:
    x, z = np.deg2rad([x_degrees, z_degrees])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return about_z @ about_x


# columns: the direction along rows, along columns, and of the normal, LPS
AXES = _turned(25, -35)
VOXELS = np.random.default_rng(0).integers(-900, 1800, (PLANES, ROWS, COLUMNS)).astype(np.int16)


def ras_affine(step: float = STEP, axes: np.ndarray = AXES, origin: np.ndarray = ORIGIN) -> np.ndarray:
    """(column, row, plane) → RAS mm, by PS3.3 C.7.6.2.1.1 and the signs of x and y."""
    lps = np.eye(4)
    lps[:3, :3] = axes * (BETWEEN_COLUMNS, BETWEEN_ROWS, step)
    lps[:3, 3] = origin
    return np.diag([-1, -1, 1, 1]) @ lps


def plane(k: int, pixels: np.ndarray, modality: str = "CT", along: float | None = None) -> FileDataset:
    """Plane `k` of a series, `along` mm above the first."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(CT if modality == "CT" else MR)
    meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.5.{k + 1}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = SERIES, STUDY, FRAME
    ds.PatientName, ds.PatientID, ds.Modality = "Canary^Tweety", "SECRET-4711", modality
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    # a trap: the numbers run against the positions, the thickness is not the distance
    ds.InstanceNumber, ds.SliceThickness = PLANES - k, 4.0
    ds.ImagePositionPatient = (ORIGIN + (STEP * k if along is None else along) * AXES[:, 2]).tolist()
    ds.ImageOrientationPatient = [*AXES[:, 0].tolist(), *AXES[:, 1].tolist()]
    ds.PixelSpacing = [BETWEEN_ROWS, BETWEEN_COLUMNS]
    if modality == "CT":
        ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    put_pixels(ds, pixels)
    return ds


def put_pixels(ds: Dataset, pixels: np.ndarray, bits: int | None = None) -> None:
    """Pixels and the elements that describe them."""
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = 8 * pixels.dtype.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()


def series(
    folder: Path,
    edit: Edit | None = None,
    *,
    voxels: np.ndarray = VOXELS,
    modality: str = "CT",
    at: list[float] | None = None,
) -> Path:
    """Writes a series into `folder`; `edit` changes a plane before it is written, `at`: mm along the normal."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, pixels in enumerate(voxels):
        ds = plane(k, pixels, modality, None if at is None else at[k])
        if edit is not None:
            edit(k, ds)
        # names in another order than positions, and without an ending
        ds.save_as(folder / f"IM{(k * 7 + 3) % 101:02d}", enforce_file_format=True)
    return folder


def only(k: int, **elements: object) -> Edit:
    """An edit of plane `k` alone; an element set to None is removed."""
    return lambda n, ds: put(ds, **elements) if n == k else None


def every(**elements: object) -> Edit:
    """An edit of all planes."""
    return lambda _, ds: put(ds, **elements)


def put(ds: Dataset, **elements: object) -> None:
    """Set elements; None removes one."""
    for name, value in elements.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)


def enhanced(path: Path, voxels: np.ndarray = VOXELS, slopes: list[float] | None = None, copies: int = 1) -> Path:
    """A multi-frame MR whose frames stand in reverse order of position, `copies` times each; a slope for each plane."""
    ds = plane(0, voxels[0], "MR")
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = UID(ENHANCED_MR)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(ds, name)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [*AXES[:, 0].tolist(), *AXES[:, 1].tolist()]
    measures.PixelSpacing, measures.SliceThickness = [BETWEEN_ROWS, BETWEEN_COLUMNS], 4.0
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    order = [k for k in reversed(range(len(voxels))) for _ in range(copies)]
    groups = []
    for k in order:
        group, position, values = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = (ORIGIN + STEP * k * AXES[:, 2]).tolist()
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = (slopes[k] if slopes else 1), 0, "US"
        group.PlanePositionSequence = Sequence([position])
        group.PixelValueTransformationSequence = Sequence([values])
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    put_pixels(ds, voxels[order])
    ds.NumberOfFrames = len(order)
    ds.save_as(path, enforce_file_format=True)
    return path


def jpeg2000(pixels: np.ndarray) -> bytes:
    """`pixels` uint16 as a JPEG 2000 stream, without loss."""
    stream = BytesIO()
    Picture.fromarray(pixels).save(stream, "JPEG2000", no_jp2=True, irreversible=False, num_resolutions=1)
    return stream.getvalue()


def jpeg_lossless(pixels: np.ndarray) -> bytes:
    """`pixels` uint16 as a lossless JPEG stream of first-order prediction (ISO 10918-1 annex H), every category of
    differences with a code of five bits."""
    rows, columns = pixels.shape
    values = pixels.astype(np.int64)
    predicted = np.empty_like(values)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0] = values[:-1, 0]
    predicted[0, 0] = 2**15
    bits = ""
    for difference in ((values - predicted + 2**15) % 2**16 - 2**15).ravel().tolist():
        size = abs(difference).bit_length()
        bits += f"{size:05b}"
        if 0 < size < 16:
            bits += f"{difference if difference > 0 else difference + 2**size - 1:0{size}b}"
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    table = bytes([0, *(17 if length == 5 else 0 for length in range(1, 17)), *range(17)])
    frame = bytes([16, *rows.to_bytes(2, "big"), *columns.to_bytes(2, "big"), 1, 1, 0x11, 0])
    parts = ((0xC4, table), (0xC3, frame), (0xDA, bytes([1, 1, 0, 1, 0, 0])))
    heads = b"".join(bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body for marker, body in parts)
    return b"\xff\xd8" + heads + scan + b"\xff\xd9"
