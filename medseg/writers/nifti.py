"""Label maps, probabilities and images as NIfTI, placed as another file is; names and renaming are the package's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from isal import igzip

from medseg.readers import Geometry

COMMENT_CODE = "comment"
# a 61-label torso of 512 × 512 × 300: 2.2 MB in 0.03 s; zlib's level 6 makes 1.3 MB of it in 0.36 s
IGZIP_LEVEL = 1
# voxels that are turned into the order of the file at a time, all along the first axis: what the caches hold
TILE = (8, 16)
MAX_NIFTI1_AXIS = 32767


def write(
    path: Path, array: npt.NDArray[Any], geometry: Geometry, names: Mapping[int, str], *, inferred: bool = True
) -> None:
    """Writes `array`, uint8 or uint16, to `path`, zipped where the ending says so. Same input, same bytes."""
    labels: dict[str, Any] = {"labels": {str(value): names[value] for value in sorted(names)}}
    if not inferred:
        labels["inferred"] = False
    header = _header(array.dtype, geometry, json.dumps(labels, ensure_ascii=False))
    # planes at a time: no second copy of a large mask; the last axis is the slowest of the file
    volume: npt.NDArray[Any] = array.reshape(array.shape + (1,) * (3 - array.ndim))
    _write(path, header, (volume[:, :, k : k + TILE[1]] for k in range(0, volume.shape[2], TILE[1])))


def write_channels(
    path: Path,
    planes: Iterable[npt.NDArray[Any]],
    geometry: Geometry,
    comment: str,
    channels: int,
    *,
    slope: float | None = None,
) -> None:
    """Writes `planes` (*S), all of a channel and then of the next, as a file (I, J, K, channels), with `comment` in its
    header: uint16 scaled by `slope`, without one uint8. Zipped where the ending says so; same input, same bytes."""
    header = _header(np.dtype(np.uint8 if slope is None else np.uint16), geometry, comment, channels=channels)
    if slope is not None:
        header["scl_slope"], header["scl_inter"] = slope, 0
    _write(path, header, (p.reshape(p.shape + (1,) * (3 - p.ndim), order="F") for p in planes))


def write_image(path: Path, array: npt.NDArray[Any], geometry: Geometry) -> None:
    """Writes `array` (C, *S) in its own type; several channels are a fourth axis. Same input, same bytes.

    The warnings of `geometry` go into the header as JSON.
    """
    notes = json.dumps({"notes": list(geometry.warnings)}, ensure_ascii=False) if geometry.warnings else None
    channels = None if len(array) == 1 else len(array)
    header = _header(array.dtype, geometry, notes, channels=channels)
    volumes = (channel.reshape(channel.shape + (1,) * (3 - channel.ndim)) for channel in array)
    _write(path, header, (v[:, :, k : k + TILE[1]] for v in volumes for k in range(0, v.shape[2], TILE[1])))


def _write(path: Path, header: Any, planes: Iterable[npt.NDArray[Any]]) -> None:
    with path.open("wb") as raw:
        if path.name.endswith(".gz"):
            with igzip.IGzipFile(filename="", mode="wb", compresslevel=IGZIP_LEVEL, fileobj=raw, mtime=0) as file:
                _write_to(file, header, planes)
        else:
            _write_to(raw, header, planes)


def _write_to(file: BinaryIO, header: Any, planes: Iterable[npt.NDArray[Any]]) -> None:
    header.write_to(file)
    file.write(b"\0" * (int(header["vox_offset"]) - file.tell()))
    for some in planes:
        file.write(_in_file_order(some))


def _in_file_order(planes: npt.NDArray[Any]) -> memoryview:
    """The voxels (I, J, K) as bytes with the first axis the fastest; no copy of those that lie so."""
    if planes.flags.f_contiguous:
        return planes.T.data
    # numpy alone walks plane by plane, and every byte it wants lies in another line of the cache: four times slower
    turned = np.empty(planes.shape[::-1], planes.dtype)
    for j in range(0, planes.shape[1], TILE[0]):
        turned[:, j : j + TILE[0]] = planes[:, j : j + TILE[0]].transpose(2, 1, 0)
    return turned.data


def _header(dtype: np.dtype[Any], geometry: Geometry, comment: str | None, *, channels: int | None = None) -> Any:
    import nibabel as nib

    kept = geometry.header
    space = kept.shape if kept is not None else geometry.grid.shape
    shape = space if channels is None else (*space, *(1,) * (3 - len(space)), channels)
    # in the 32-bit numbers of a NIfTI-1 the place of a NIfTI-2 image would be off by a rounding
    second = max(shape) > MAX_NIFTI1_AXIS or (kept is not None and kept.version == 2)
    kind = nib.Nifti2Header if second else nib.Nifti1Header
    header = kind(endianness="<")
    header.set_data_dtype(dtype.newbyteorder("<"))
    header.set_data_shape(shape)
    if kept is not None:
        for name, value in kept.fields.items():
            header[name] = value
        # a channel or time axis of the input is not in the mask
        header["pixdim"][len(space) + 1 :] = 1
    else:
        _place(header, geometry)
    header["scl_slope"], header["scl_inter"] = np.nan, np.nan
    header["cal_max"] = 0
    header["descrip"] = b"medseg"
    if comment is not None:
        header.extensions.append(nib.nifti1.Nifti1Extension(COMMENT_CODE, comment.encode()))
    header["vox_offset"] = header.single_vox_offset + header.extensions.get_sizeondisk()
    return header


def _place(header: Any, geometry: Geometry) -> None:
    grid, affine = geometry.grid, geometry.affine_4x4
    header["pixdim"][1 : grid.spatial_dims + 1] = grid.spacing_mm
    header.set_xyzt_units("mm")
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner")
    # a quaternion holds no shear: then only the sform speaks
    if not np.allclose(header.get_qform(), affine, atol=1e-4 * min(grid.spacing_mm)):
        header["qform_code"] = 0
