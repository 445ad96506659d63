"""From files to what the network sees: MONAI dictionary transforms, and their cache on disk; nothing random."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from monai.transforms.spatial.dictionary import Orientationd
from monai.transforms.transform import MapTransform, Transform
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors

from medseg.cases import Case
from medseg.config import DataConfig, IntensityConfig, PreprocessConfig
from medseg.device import beyond_memory
from medseg.errors import DataError, GeometryError
from medseg.grid import ROUNDING_TOLERANCE, Grid, resample, resample_labels
from medseg.metrics.codes import members
from medseg.readers import file_sha256, read_images, read_label, same_kind_or_raise, split_ending
from medseg.writers import atomic_path

log = logging.getLogger(__name__)

IGNORE_INDEX = 255
# raised whenever a transform below gives other numbers than before: old cache files are then left alone
VERSION = 7

# of the intensities in a file, measured on up to a hundred thousand voxels spread evenly
PERCENTILES = (0.0, 0.5, 5.0, 25.0, 50.0, 75.0, 95.0, 99.5, 100.0)
MEASURED_VOXELS = 100_000

# bytes of a case's name in that of its cache file; with key and ending a disk takes 255
LONGEST_NAME = 200

# 8.6 GB of float32 in a channel: no scan is so large at a spacing that a network sees, but one whose header errs is
MOST_VOXELS = 2**31
# of the memory of its result, what resampling was seen to hold at its peak (2.0 to 2.2, of volumes of 200 to 360 MB):
# what comes of all axes but one, the result, and a slab
HELD_BY_RESAMPLING = 2.2

RAS = ("L", "R"), ("P", "A"), ("I", "S")


@dataclass(frozen=True)
class Prepared:
    """One case on the network's grid.

    `image` (C, *S) float32; `label` (*S) uint8: index of the output channel, 255 where ignored; for regions int32,
    the value in the file. `grid` is the network's grid, `source` the file's. `raw` (C, 9): the `PERCENTILES` of the
    intensities as they are in the file. `notes`: what is odd about the files of the image, and what was done to a DICOM
    series to make it a volume.
    """

    id: str
    image: torch.Tensor
    label: torch.Tensor | None
    grid: Grid
    source: Grid
    raw: torch.Tensor
    notes: tuple[str, ...] = ()


class Load(Transform):
    """{"image": files, "label": file} → tensors with an affine, channel first; every channel on one grid."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Raises `DataError` or `GeometryError` naming the file."""
        dims, channels = self.data.spatial_dims, len(self.data.channels)
        series = item.get("series")
        image = read_images(item["image"], spatial_dims=dims, channels=channels, series=series)
        grid = image.grid
        # small integers stay what they are until they are resampled: a quarter of the memory
        small = image.array.dtype in (np.int8, np.uint8, np.int16)
        with np.errstate(over="ignore"):
            voxels = torch.as_tensor(image.array if small else image.array.astype(np.float32, copy=False))
        # the reader has looked at the numbers as they are in the file; only wider ones can overflow here
        if image.array.dtype.itemsize > 4 and not torch.isfinite(voxels).all():
            raise DataError(
                f"{item['image'][0]}: voxels beyond 3e38 found, expected what float32 can hold; rescale them"
            )
        result = {
            **item,
            "image": _meta_tensor(voxels, grid),
            "image_file": item["image"][0],
            "source": grid,
            "raw": percentiles(image.array),
            "notes": image.geometry.warnings,
        }
        if "label" in item:
            same_kind_or_raise(item["label"], item["image"][0])
            label = read_label(item["label"], spatial_dims=dims)
            if not label.geometry.matches(image.geometry, tolerance=ROUNDING_TOLERANCE):
                raise GeometryError(
                    f"{item['label']}: label grid {label.grid} differs from image grid {grid} in shape, spacing, place "
                    "or direction; resample one, or run `medseg check`"
                )
            result["label"] = _meta_tensor(torch.as_tensor(label.array.astype(np.int32))[None], grid)
        return result


class CropNonzerod(MapTransform):
    """Cut away the outer planes in which every channel of the image is 0 (brain images with the skull removed)."""

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Crops all keys alike; an image that is 0 everywhere stays whole."""
        result = dict(item)
        inside = (result["image"].as_tensor() != 0).any(dim=0).numpy()
        if not inside.any():
            return result
        box = []
        for axis in range(inside.ndim):
            hit = np.flatnonzero(inside.any(axis=tuple(a for a in range(inside.ndim) if a != axis)))
            box.append(slice(int(hit[0]), int(hit[-1]) + 1))
        start = np.array([*(b.start for b in box), 1])
        for key in self.key_iterator(result):
            grid = grid_of(result[key])
            affine = grid.affine.copy()
            affine[:, -1] = grid.affine @ start
            part = result[key].as_tensor()[(slice(None), *box)]
            result[key] = _meta_tensor(part, Grid(tuple(part.shape[1:]), affine))
        return result


class ResampleToGridd(MapTransform):
    """Bring image (cubic) and label (each label linear, the strongest wins) to the configured spacing or shape."""

    def __init__(self, keys: tuple[str, ...], config: PreprocessConfig) -> None:
        super().__init__(keys)
        self.config = config

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """A case that is on the grid already stays there; the image becomes float32.

        Raises before memory is taken, naming the file: `DataError` where it would grow beyond `MOST_VOXELS`,
        `MemoryError` where it would beyond what this machine can hold.
        """
        result = dict(item)
        here = grid_of(result["image"])
        there = target_grid(here, self.config)
        if here.matches(there):
            # a copy of what may be the reader's own memory, since it is normalised in place
            result["image"] = _meta_tensor(result["image"].as_tensor().to(torch.float32, copy=True), here)
            return result
        voxels, channels = math.prod(there.shape), len(result["image"])
        told = (
            f"{item['image_file']}: spacing {_times(here.spacing_mm)} mm found; at the {_times(there.spacing_mm)} mm "
            f"that the network sees this is {_times(there.shape)} voxels"
        )
        if voxels > max(MOST_VOXELS, math.prod(here.shape)):
            raise DataError(
                f"{told}, expected at most {MOST_VOXELS:,}; correct the header, or the spacing that was set"
            )
        if taken := beyond_memory(HELD_BY_RESAMPLING * channels * voxels):
            # no fault of the file: another machine may hold it
            raise MemoryError(
                f"{told}, whose resampling takes {taken}; use one with more, or correct the header or the spacing that "
                "was set"
            )
        for key in self.key_iterator(result):
            values = result[key].as_tensor()
            if key == "label":
                moved = resample_labels(values[0], here, there)[None]
            else:
                moved = resample(values, here, there, kernel="cubic")
                for before, after in zip(values, moved):
                    low, high = before.aminmax()
                    if low == high:
                        # rounding of the weights would be normalised to noise
                        after.fill_(float(low))
            result[key] = _meta_tensor(moved, there)
        return result


class Normalised(MapTransform):
    """Clip each channel, subtract a mean and divide by a standard deviation."""

    def __init__(self, keys: tuple[str, ...], intensity: tuple[IntensityConfig, ...]) -> None:
        super().__init__(keys)
        self.intensity = intensity

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """A constant channel becomes 0."""
        result = dict(item)
        for key in self.key_iterator(result):
            for channel, how in zip(result[key].as_tensor(), self.intensity):
                _normalise(channel, how)
        return result


class EncodeLabeld(MapTransform):
    """Label values of the file → indices of the output channels (regions keep the values)."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__(("label",))
        self.data = data

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Raises `DataError` for a value that no label has."""
        result = dict(item)
        values = result["label"].as_tensor()
        present = set(torch.unique(values).tolist())
        known = known_values(self.data)
        if present - known:
            raise DataError(
                f"{item['label_file']}: label value {min(present - known)} found, expected one of "
                f"{sorted(known)}; correct the file or add a name for the value to the labels"
            )
        if not self.data.is_regions:
            encoded = torch.zeros(values.shape, dtype=torch.uint8)
            for index, value in enumerate(self.data.out_values):
                encoded[values == value] = index
            if self.data.ignore_value is not None:
                encoded[values == self.data.ignore_value] = IGNORE_INDEX
            result["label"] = _meta_tensor(encoded, grid_of(result["label"]))
        return result


def known_values(data: DataConfig) -> set[int]:
    """All values that a label file may hold."""
    values = {0}
    for value in data.labels.values():
        values.update(members(value))
    return values


def target_grid(grid: Grid, config: PreprocessConfig) -> Grid:
    """The network's grid for a case whose (oriented, cropped) grid is `grid`."""
    if config.shape is not None:
        return grid.with_shape(config.shape)
    if config.spacing_mm is not None:
        return grid.with_spacing(config.spacing_mm)
    return grid


def make_transforms(config: PreprocessConfig, data: DataConfig, *, with_label: bool) -> Compose:
    """The chain from files to the network's grid, as MONAI dictionary transforms."""
    keys = ("image", "label") if with_label else ("image",)
    chain: list[Any] = [Load(data)]
    if config.orient and data.spatial_dims == 3:
        chain.append(Orientationd(keys, axcodes="RAS", labels=RAS))
    if config.crop == "nonzero":
        chain.append(CropNonzerod(keys))
    chain += [ResampleToGridd(keys, config), Normalised(("image",), config.intensity)]
    if with_label:
        chain.append(EncodeLabeld(data))
    return Compose(chain)


def prepare(case: Case, config: PreprocessConfig, data: DataConfig, *, with_label: bool) -> Prepared:
    """Read one case and bring it to the network's grid.

    Raises `DataError`, or `MemoryError` where this machine cannot hold it, naming the file.
    """
    item: dict[str, Any] = {"image": case.images, "series": case.series}
    if with_label:
        if case.label is None:
            raise DataError(f"{case.id}: no label file found, expected one; run `medseg check`")
        item |= {"label": case.label, "label_file": case.label}
    try:
        done = make_transforms(config, data, with_label=with_label)(item)
    except RuntimeError as error:
        # MONAI wraps what a transform raises, and its message with it
        if isinstance(error.__cause__, (DataError, MemoryError)):
            raise error.__cause__ from None
        raise
    grid = grid_of(done["image"])
    label = done["label"].as_tensor()[0].contiguous() if with_label else None
    image = done["image"].as_tensor().contiguous()
    return Prepared(case.id, image, label, grid, done["source"], done["raw"], done["notes"])


def prepare_cached(
    case: Case,
    config: PreprocessConfig,
    data: DataConfig,
    folder: Path,
    *,
    file_digest: Callable[[Path], str] = file_sha256,
) -> Prepared:
    """`prepare` with label, kept in `folder` under a key of the settings and of the SHA-256 of the source files.

    A changed setting or source has another key, so nothing stale is ever read; the same files at another place have the
    same. `file_digest`: for who has read them already; they must not change from then on until they are prepared. A
    damaged cache file is made anew.
    """
    # safetensors opens no name that is not UTF-8, and no disk takes a longer one; the key alone tells cases apart
    name = case.id.encode("utf-8", "replace")[:LONGEST_NAME].decode("utf-8", "ignore")
    path = folder / f"{name}-{cache_key(case, config, data, file_digest)}.safetensors"
    there = path.is_file()
    if there:
        try:
            return _read_cache(path, case.id)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            log.warning("cache file %s is damaged (%s); it is made anew", path.name, error)
    prepared = prepare(case, config, data, with_label=True)
    folder.mkdir(parents=True, exist_ok=True)
    if there or not path.is_file():
        # what another process has made meanwhile it has mapped: a shared disk may take that away from it
        _write_cache(path, prepared)
    # read back, the tensors are mapped from the file: a data set larger than memory can be trained on
    return _read_cache(path, case.id)


def cache_key(case: Case, config: PreprocessConfig, data: DataConfig, file_digest: Callable[[Path], str]) -> str:
    """20 hexadecimal digits that change with every setting and source file that matters for the result.

    The files that a header names count as it does.
    """
    # the ending decides how the bytes are read
    sources = [(split_ending(file.name)[1].lower(), file_digest(file)) for file in case.files]
    what = [VERSION, config.model_dump(mode="json"), data.model_dump(mode="json"), sources]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]


def grid_of(tensor: MetaTensor) -> Grid:
    """The grid of a channel-first tensor with an affine."""
    n = tensor.ndim - 1
    affine = np.asarray(tensor.affine, dtype=np.float64)
    keep = [*range(n), affine.shape[0] - 1]
    return Grid(tuple(tensor.shape[1:]), affine[np.ix_(keep, keep)])


def _meta_tensor(values: torch.Tensor, grid: Grid) -> MetaTensor:
    return MetaTensor(values, affine=torch.as_tensor(grid.affine_4x4))


def _times(numbers: Sequence[float]) -> str:
    return " × ".join(str(n) if isinstance(n, int) else f"{n:.4g}" for n in numbers)


def percentiles(array: np.ndarray[Any, np.dtype[Any]]) -> torch.Tensor:
    """The `PERCENTILES` of every channel of `array` (C, *S): (C, 9) float32."""
    found = []
    for channel in array:
        # in the order of memory, so that nothing is copied whole
        flat = channel.ravel(order="K")
        step = max(1, flat.size // MEASURED_VOXELS)
        # without a common factor with any axis: else only some columns of the volume would be seen
        while any(math.gcd(step, size) > 1 for size in channel.shape):
            step += 1
        found.append(np.percentile(flat[::step].astype(np.float64), PERCENTILES))
    return torch.as_tensor(np.stack(found), dtype=torch.float32)


def _normalise(channel: torch.Tensor, how: IntensityConfig) -> None:
    if how.clip is not None:
        channel.clamp_(*how.clip)
    if how.normalise == "none":
        return
    if how.normalise == "fixed":
        mean, sd = how.mean, how.sd
    else:
        # in float64: intensities of 1e6 lose the small differences otherwise; row by row, without a second volume
        mean = sum(float(row.sum(dtype=torch.float64)) for row in channel) / channel.numel()
        sd = (sum(float(((row.double() - mean) ** 2).sum()) for row in channel) / channel.numel()) ** 0.5
    channel.sub_(mean).div_(sd if sd > 0 else 1.0)


def _write_cache(path: Path, prepared: Prepared) -> None:
    tensors = {
        "image": prepared.image,
        "affine": torch.as_tensor(prepared.grid.affine),
        "source_affine": torch.as_tensor(prepared.source.affine),
        "source_shape": torch.tensor(prepared.source.shape),
        "raw": prepared.raw,
    }
    if prepared.label is not None:
        tensors["label"] = prepared.label
    with atomic_path(path) as temporary:
        temporary.write_bytes(save_safetensors(tensors))


def _read_cache(path: Path, case_id: str) -> Prepared:
    with safe_open(path, framework="pt") as file:
        image, label = file.get_tensor("image"), file.get_tensor("label")
        grid = Grid(tuple(image.shape[1:]), file.get_tensor("affine").numpy())
        shape = tuple(int(s) for s in file.get_tensor("source_shape"))
        source = Grid(shape, file.get_tensor("source_affine").numpy())
        return Prepared(case_id, image, label, grid, source, file.get_tensor("raw"))
