"""NIfTI files (one file, plain or gzip): header and voxels; writing lives in writers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib

from medseg.errors import DataError, GeometryError
from medseg.readers._axes import channels_first, place, plane, spatial_shape
from medseg.readers._image import Geometry, NiftiHeader

ENDINGS = (".nii.gz", ".nii")
# of the header
NIFTI2_BYTES = 540
# of header extensions: text for people
COMMENT_CODE = 6
# a header of labels with long names; more is damage
MOST_COMMENT_BYTES = 1 << 20

PLACING_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)
# quaternions in float32 are this far from the matrix they were made of, at the far corner of a large volume
FORM_TOLERANCE = 0.05
# the most that a byte of a gzip file can stand for: deflate's longest copy, 258 bytes, takes at least two bits
_GZIP_EXPANSION = 1032
_BLOCK_BYTES = 1 << 20
# the stubs of isal take the class for one of its exceptions
_GZIP_ERROR = cast("type[Exception]", isal_zlib.error)
# the low three bits of xyzt_units: metre, millimetre, micrometre
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}


def read(
    path: Path, *, spatial_dims: int | None, channels: int | None, labels: bool
) -> tuple[npt.NDArray[Any], Geometry]:
    """Voxels (C, …) and geometry. Raises `DataError`, `GeometryError`. Of `labels` only the advice differs."""
    with _open(path) as file:
        header = _read_header(path, file)
        geometry = _geometry(path, header, spatial_dims)
        stored = _read_voxels(path, file, header)
    slope, inter = header.get_slope_inter()
    if slope is not None and (slope, inter) != (1, 0):
        # in place where the file holds native float32: the array is nobody else's
        stored = stored.astype(np.float32, copy=False)
        stored *= np.float32(slope)
        stored += np.float32(inter)
    return channels_first(path, stored, geometry.grid.shape, channels, labels=labels), geometry


def read_geometry(path: Path, *, spatial_dims: int | None) -> Geometry:
    """Geometry from the header alone. Raises `DataError`, `GeometryError`."""
    with _open(path) as file:
        return _geometry(path, _read_header(path, file), spatial_dims)


def label_names(path: Path) -> dict[int, str]:
    """Name of every value of a mask that medseg wrote, from its header; empty for any other file."""
    for comment in _comments(path):
        try:
            named = json.loads(comment)["labels"]
            return {int(value): str(name) for value, name in named.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            # the comment of another program
            continue
    return {}


def is_inferred(path: Path) -> bool:
    """Whether the file is a mask that a model of medseg made, as its header says; one that was converted is none."""
    for comment in _comments(path):
        try:
            told = json.loads(comment)
            return "labels" in told and bool(told.get("inferred", True))
        except (ValueError, TypeError, AttributeError):
            # the comment of another program
            continue
    return False


def _comments(path: Path) -> list[str]:
    """The texts among the extensions of a NIfTI file (code 6, comment)."""
    if not path.name.lower().endswith(ENDINGS):
        return []
    with _open(path) as file:
        offset = int(_read_header(path, file).get_data_offset())
        return [body.decode("utf-8", "replace") for body in comments(file, offset)]


def comments(file: BufferedIOBase, offset: int) -> Iterator[bytes]:
    """The comments among the extensions between the header, behind which `file` stands, and the voxels at `offset`."""
    flag, start = file.read(4), file.tell()
    while len(flag) == 4 and flag[0] and start + 8 <= offset:
        head = file.read(8)
        size, code = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
        if not 8 <= size <= MOST_COMMENT_BYTES or start + size > offset:
            break
        body = file.read(size - 8)
        if code == COMMENT_CODE:
            yield body.rstrip(b"\0")
        start += size


@contextmanager
def _open(path: Path) -> Iterator[BufferedIOBase]:
    """The uncompressed bytes, by content and not by ending; damage becomes `DataError`."""
    try:
        with igzip.open(path, "rb") if _is_zipped(path) else path.open("rb") as file:
            yield file
    except (EOFError, _GZIP_ERROR, igzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip stream is damaged or cut off ({error}); copy the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _is_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _read_header(path: Path, file: BufferedIOBase) -> Any:
    # nibabel's own loading repairs a spacing of 0 to 1 without a word: so the header is parsed unchecked
    import nibabel as nib

    start = file.read(4)
    sizes = {int.from_bytes(start, "little"), int.from_bytes(start, "big")}
    for size, kind in ((348, nib.Nifti1Header), (NIFTI2_BYTES, nib.Nifti2Header)):
        if size in sizes:
            block = start + file.read(size - 4)
            if len(block) < size:
                raise DataError(f"{path}: cut off in the header ({len(block)} bytes found); copy the file again")
            header = kind(block, check=False)
            if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
                break
            if not 1 <= int(header["dim"][0]) <= 7 or any(int(s) < 1 for s in header.get_data_shape()):
                raise DataError(f"{path}: dimensions {header['dim'].tolist()} found, expected sizes of at least 1")
            return header
    raise DataError(f"{path}: not a NIfTI file; check where it comes from, or its ending")


def _read_voxels(path: Path, file: BufferedIOBase, header: Any) -> npt.NDArray[Any]:
    from nibabel.spatialimages import HeaderDataError

    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except HeaderDataError as error:
        raise DataError(f"{path}: voxel type of code {int(header['datatype'])} is not known") from error
    if dtype.itemsize == 0:
        raise DataError(f"{path}: voxel type of code {int(header['datatype'])} is not known")
    if dtype.fields is not None:
        raise DataError(f"{path}: colour voxels ({dtype.names}) found, expected one number per voxel")
    shape = tuple(int(s) for s in header.get_data_shape())
    size = math.prod(shape) * dtype.itemsize
    _skip(file, int(header.get_data_offset()) - file.tell())
    return _read_exactly(path, file, size).view(dtype).reshape(shape, order="F")


def _skip(file: BufferedIOBase, size: int) -> None:
    # in blocks: a damaged header may claim any offset
    while size > 0 and (part := file.read(min(size, _BLOCK_BYTES))):
        size -= len(part)


def _read_exactly(path: Path, file: BufferedIOBase, size: int) -> npt.NDArray[np.uint8]:
    # one array, filled in place; none where a damaged header claims more than a file of this length can hold
    most = path.stat().st_size * (_GZIP_EXPANSION if _is_zipped(path) else 1)
    stored = np.empty(size if size <= most else 0, np.uint8)
    room = stored.data
    found = 0
    # in blocks: gzip files fill a longer one by way of a copy of its own length
    while count := file.readinto(room[found : found + _BLOCK_BYTES]):
        found += count
    # the rest is read too: only at the end does gzip compare its checksum
    rest = 0
    while part := file.read(_BLOCK_BYTES):
        rest += len(part)
    if found < size:
        raise DataError(f"{path}: {found + rest} of {size} bytes of voxels found: cut off; copy the file again")
    return stored


def _geometry(path: Path, header: Any, spatial_dims: int | None) -> Geometry:
    shape = tuple(int(s) for s in header.get_data_shape())
    affine, warnings = _affine(path, header)
    space = spatial_shape(path, shape, spatial_dims)
    version = 2 if int(header["sizeof_hdr"]) == NIFTI2_BYTES else 1
    kept = NiftiHeader(shape[:3], {name: header[name].copy() for name in PLACING_FIELDS}, version)
    # without a form only the spacing is known
    formed = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    if not formed and space[2:] > (1,):
        warnings += ("neither sform nor qform says how the voxels lie: left and right, top and bottom are a guess",)
    # ITK writes planes without a third axis, and 0 for where they lie along it
    known = 2 if int(header["dim"][0]) == 2 and not affine[2, [0, 1, 3]].any() else 3
    where = plane(space, affine, known=known) if formed else None
    return Geometry(place(path, space, affine), kept, warnings, where)


def _affine(path: Path, header: Any) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
    """Voxel → RAS mm: the sform where there is one, else the qform, else spacing alone, as nibabel does."""
    warnings = []
    s_code, q_code = int(header["sform_code"]), int(header["qform_code"])
    qform, trouble = _qform(header)
    if s_code > 0:
        affine = np.asarray(header.get_sform(), dtype=np.float64)
        if q_code > 0 and qform is None:
            warnings.append(f"the qform is invalid ({trouble}); the sform is used")
        elif q_code > 0 and qform is not None and not _close(affine, qform, header.get_data_shape()):
            warnings.append("sform and qform place the voxels differently; the sform is used")
    else:
        spacing = np.asarray(header["pixdim"][1 : 1 + min(3, int(header["dim"][0]))], dtype=np.float64)
        if not np.isfinite(spacing).all() or (spacing <= 0).any():
            raise GeometryError(f"{path}: spacing {spacing.tolist()} mm found, expected above 0; correct the header")
        if q_code > 0 and qform is None:
            raise GeometryError(f"{path}: the qform is invalid ({trouble}) and there is no sform; correct the header")
        affine = qform if q_code > 0 and qform is not None else np.asarray(header.get_base_affine(), dtype=np.float64)
    scale = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    if scale != 1:
        warnings.append(f"the unit of length is {scale:g} mm; converted to mm")
        affine = np.diag([scale, scale, scale, 1.0]) @ affine
    return affine, tuple(warnings)


def _qform(header: Any) -> tuple[npt.NDArray[np.float64] | None, str]:
    from nibabel.spatialimages import HeaderDataError

    repaired = header.copy()
    # the standard: a handedness other than −1 or 1 means 1
    if float(repaired["pixdim"][0]) not in (-1.0, 1.0):
        repaired["pixdim"][0] = 1
    try:
        qform = np.asarray(repaired.get_qform(), dtype=np.float64)
    except (ValueError, HeaderDataError) as error:
        return None, str(error)
    return (qform, "") if np.isfinite(qform).all() else (None, "NaN")


def _close(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    ends = [max(1, s - 1) for s in (*shape[:3], 1, 1)[:3]]
    corners = np.stack(np.meshgrid(*[(0, end) for end in ends], [1], indexing="ij"), -1).reshape(-1, 4)
    voxel = np.sqrt((one[:3, :3] ** 2).sum(axis=0)).min()
    return bool(np.abs(corners @ (one - other).T).max() <= FORM_TOLERANCE * max(voxel, 1e-9))
