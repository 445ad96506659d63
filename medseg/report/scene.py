"""The worst cases as volumes small enough for a page: cropped, coarser where need be, in text; no HTML."""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.errors import DataError
from medseg.metrics import Labels, Value, present_values
from medseg.metrics.codes import members
from medseg.report.layers import Layers
from medseg.views import window
from medseg.writers.in_memory import nifti_bytes

# of base64 text, without the viewer itself (1.06 MB): with pictures the page stays one that can be mailed
MAX_BYTES = 5_000_000
MAX_CASE_BYTES = 1_200_000
MAX_CASES = 5
# a volume of this size fills 32 MB of a graphics card per layer; phones hold four
MAX_VOXELS = 2**23
# room around what is outlined, so that errors are seen in their surroundings
MARGIN_MM = 10.0
ONLY_REFERENCE, ONLY_PREDICTION, OTHER_LABEL = 1, 2, 3
ERRORS = {
    ONLY_REFERENCE: ("Only in the reference", "#56B4E9"),
    ONLY_PREDICTION: ("Only in the prediction", "#D55E00"),
    OTHER_LABEL: ("Another label", "#F0E442"),
}

Steps = tuple[int, int, int]


@dataclass(frozen=True)
class SceneLabel:
    """What a value of a scene's maps means: the names of its labels (several where regions overlap) and the colour."""

    value: int
    names: tuple[str, ...]
    colour: str


@dataclass(frozen=True)
class Scene:
    """One case for the viewer. `image`, `reference`, `prediction`, `errors`: NIfTI of one grid, gzip, base64.

    `image` is uint8, black where there is none. `errors` holds the keys of `ERRORS`, from the maps as they are shown.
    `steps`: how many voxels of the file make one here, along x, y, z; `shape`, `spacing_mm`: of the volumes here.
    `start`: the voxel to look at first, where the planes with most errors meet.
    """

    case: str
    dice: float
    image: str
    reference: str
    prediction: str
    errors: str
    with_image: bool
    labels: tuple[SceneLabel, ...]
    steps: Steps
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    start: tuple[int, ...]

    @property
    def size(self) -> int:
        """Characters of all volumes."""
        return sum(map(len, (self.image, self.reference, self.prediction, self.errors)))


@dataclass(frozen=True)
class Viewer:
    """All that the page needs for its viewer: NiiVue's script (gzip, base64) and the scenes, worst first."""

    script: str
    scenes: tuple[Scene, ...]

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script reads, as plain values for JSON."""
        return {
            "errors": [{"value": v, "names": [name], "colour": colour} for v, (name, colour) in ERRORS.items()],
            "scenes": [
                {
                    "case": scene.case,
                    "volumes": [scene.image, scene.reference, scene.prediction, scene.errors],
                    "withImage": scene.with_image,
                    "start": list(scene.start),
                    "shape": list(scene.shape),
                    "labels": [
                        {"value": label.value, "names": list(label.names), "colour": label.colour}
                        for label in scene.labels
                    ],
                }
                for scene in self.scenes
            ],
        }


def prepare_viewer(scenes: Sequence[Scene]) -> Viewer | None:
    """The viewer of `scenes`, worst first, or None where there is none."""
    return Viewer(niivue_script(), tuple(scenes)) if scenes else None


def make_scene(
    layers: Layers,
    labels: Mapping[str, Value],
    colours: Mapping[str, str],
    *,
    case: str,
    dice: float,
    max_bytes: int = MAX_CASE_BYTES,
) -> Scene:
    """The scene of one case: what is outlined and `MARGIN_MM` around it, as fine as `max_bytes` of base64 allow.

    The axis with the finest voxels is made coarser first, by whole steps. Labels follow `reduce_labels`, the image is
    the mean of each block, its grey range that of `views.window`. Where regions overlap, a voxel has the colour of the
    smallest one. Raises `DataError` where even one voxel is too large, which no sensible limit reaches.
    """
    near = layers.cropped(_box(layers))
    found = sorted(present_values(near.prediction) | present_values(near.reference))
    prediction, reference = _numbered(near.prediction, found), _numbered(near.reference, found)
    grey = _grey(near)
    steps: Steps = (1, 1, 1)
    room = float(MAX_VOXELS)
    while True:
        while math.prod(_coarse_shape(near.grid.shape, steps)) > room and steps != near.grid.shape:
            steps = _coarser(steps, near.grid.spacing_mm, near.grid.shape)
        shape = _coarse_shape(near.grid.shape, steps)
        affine = coarser_affine(near.grid.affine, steps)
        texts = [_text(np.zeros(shape, np.uint8) if grey is None else _reduce_image(grey, steps), affine)]
        if len(texts[0]) <= max_bytes:
            maps = [reduce_labels(part, steps) for part in (prediction, reference)]
            maps.append(_errors(maps[0], maps[1]))
            # NiiVue draws outlines of those label maps alone that say in their header that they are: the prediction
            texts += [_text(part, affine, labels=part is maps[0]) for part in maps]
            if sum(map(len, texts)) <= max_bytes:
                break
        if steps == near.grid.shape:
            raise DataError(f"{case}: a volume of one voxel is above {max_bytes} bytes; allow more")
        # bytes go roughly with voxels; at least one step is taken
        room = min(math.prod(shape) - 1, math.prod(shape) * max_bytes / sum(map(len, texts)))
    return Scene(
        case=case,
        dice=dice,
        image=texts[0],
        prediction=texts[1],
        reference=texts[2],
        errors=texts[3],
        with_image=grey is not None,
        labels=_meanings(near, found, labels, colours),
        steps=steps,
        shape=shape,
        spacing_mm=tuple(spacing * step for spacing, step in zip(near.grid.spacing_mm, steps)),
        start=_start(maps[2] if maps[2].any() else maps[1]),
    )


def reduce_labels(labels: Labels, steps: Steps) -> Labels:
    """`labels` (I, J, K) with blocks of `steps` voxels made one; nothing that stands apart vanishes.

    A block takes the value that most of its voxels have (background is one; on a tie the rarer one). Blocks that hold a
    label and touch, at a face, edge or corner, are a piece of it: a piece that got no block takes the one that holds
    most of it; of two such pieces in one block the rarer label stays. Blocks at the far end are filled up with
    background.
    """
    if steps == (1, 1, 1):
        return labels
    padded = np.pad(labels, [(0, -size % step) for size, step in zip(labels.shape, steps)])
    counts = np.bincount(padded.ravel())
    result = np.zeros(_coarse_shape(labels.shape, steps), labels.dtype)
    boxes = ndimage.find_objects(padded)
    most = _block_sums(padded == 0, steps)
    held = []
    for value in sorted(np.flatnonzero(counts[1:]) + 1, key=lambda value: -counts[value]):
        inner = tuple(
            slice(part.start // step, -(-part.stop // step)) for part, step in zip(boxes[value - 1], steps, strict=True)
        )
        outer = tuple(slice(part.start * step, part.stop * step) for part, step in zip(inner, steps))
        here = _block_sums(padded[outer] == value, steps)
        wins = (here > 0) & (here >= most[inner])
        most[inner][wins] = here[wins]
        result[inner][wins] = value
        held.append((value, inner, here))
    for value, inner, here in held:
        pieces, count = ndimage.label(here > 0, structure=np.ones((3, 3, 3)))
        lost = np.setdiff1d(np.arange(1, count + 1), pieces[result[inner] == value])
        for place in ndimage.maximum_position(here, pieces, lost) if len(lost) else ():
            result[inner][place] = value
    return result


def coarser_affine(affine: npt.NDArray[np.float64], steps: Steps) -> npt.NDArray[np.float64]:
    """The 4×4 affine of blocks of `steps` voxels: a block lies at the mean place of its voxels."""
    change = np.diag([*map(float, steps), 1.0])
    change[:3, 3] = (np.asarray(steps) - 1) / 2
    return np.asarray(affine @ change)


@cache
def niivue_script() -> str:
    """NiiVue's build, gzip and base64; where it comes from stands in viewer/SOURCE.md."""
    return base64.b64encode(files("medseg.report").joinpath("viewer", "niivue.umd.js.gz").read_bytes()).decode("ascii")


def _box(layers: Layers) -> tuple[slice, ...]:
    outlined = layers.outlined
    box = []
    for axis, (size, spacing) in enumerate(zip(layers.grid.shape, layers.grid.spacing_mm)):
        there = np.flatnonzero(outlined.any(axis=tuple(a for a in range(3) if a != axis)))
        first, last = (there[0], there[-1]) if len(there) else (0, size - 1)
        margin = math.ceil(MARGIN_MM / spacing)
        box.append(slice(max(0, int(first) - margin), min(size, int(last) + 1 + margin)))
    return tuple(box)


def _meanings(
    layers: Layers, found: Sequence[int], labels: Mapping[str, Value], colours: Mapping[str, str]
) -> tuple[SceneLabel, ...]:
    parts = {name: members(value) for name, value in labels.items()}
    voxels = {
        value: int(np.count_nonzero(layers.reference == value) + np.count_nonzero(layers.prediction == value))
        for value in (found if any(len(m) > 1 for m in parts.values()) else ())
    }
    meanings = []
    for number, value in enumerate(found, start=1):
        names = [name for name, values in parts.items() if value in values]
        smallest = min(names, key=lambda name: sum(voxels.get(v, 0) for v in parts[name]))
        meanings.append(SceneLabel(number, tuple(names), colours[smallest]))
    return tuple(meanings)


def _numbered(labels: Labels, found: Sequence[int]) -> Labels:
    """`labels` with the n-th of the values `found` as n: small numbers, whatever the file has."""
    kind = np.uint8 if len(found) < 256 else np.uint16
    if labels.dtype.itemsize <= 2:
        numbers = np.zeros(2 ** (8 * labels.dtype.itemsize), kind)
        numbers[list(found)] = range(1, len(found) + 1)
        return np.ascontiguousarray(numbers[labels])
    places = np.searchsorted(np.asarray(found, dtype=np.int64), labels) + 1
    return np.ascontiguousarray(np.where(labels == 0, 0, places).astype(kind))


def _grey(layers: Layers) -> npt.NDArray[np.float32] | None:
    """The image with its grey range as 0–255, not yet rounded."""
    if layers.image is None:
        return None
    image = np.nan_to_num(layers.image.astype(np.float32))
    low, high = window(image, layers.outlined)
    return np.asarray(np.clip((image - np.float32(low)) * np.float32(255 / (high - low)), 0, 255))


def _coarser(steps: Steps, spacing_mm: Sequence[float], shape: Sequence[int]) -> Steps:
    # an axis that is one block long cannot become coarser
    open_axes = [axis for axis in range(3) if steps[axis] < shape[axis]]
    finest = min(open_axes, key=lambda axis: steps[axis] * spacing_mm[axis])
    longer = [step + (axis == finest) for axis, step in enumerate(steps)]
    return longer[0], longer[1], longer[2]


def _reduce_image(grey: npt.NDArray[np.float32], steps: Steps) -> npt.NDArray[np.uint8]:
    padded = np.pad(grey, [(0, -size % step) for size, step in zip(grey.shape, steps)], mode="edge")
    return np.rint(_block_sums(padded, steps) / math.prod(steps)).astype(np.uint8)


def _start(marked: Labels) -> tuple[int, ...]:
    """Where the planes with most voxels of `marked` meet, one across each axis."""
    others = ((1, 2), (0, 2), (0, 1))
    return tuple(int(np.argmax(np.count_nonzero(marked, axis=pair))) for pair in others)


def _errors(prediction: Labels, reference: Labels) -> npt.NDArray[np.uint8]:
    errors = np.zeros(prediction.shape, np.uint8)
    errors[(prediction != reference) & (prediction != 0)] = OTHER_LABEL
    errors[(reference == 0) & (prediction != 0)] = ONLY_PREDICTION
    errors[(reference != 0) & (prediction == 0)] = ONLY_REFERENCE
    return errors


def _text(array: npt.NDArray[Any], affine: npt.NDArray[np.float64], *, labels: bool = False) -> str:
    data = gzip.compress(nifti_bytes(array, affine, labels=labels), compresslevel=6, mtime=0)
    return base64.b64encode(data).decode("ascii")


def _coarse_shape(shape: Sequence[int], steps: Steps) -> tuple[int, ...]:
    return tuple(-(-size // step) for size, step in zip(shape, steps, strict=True))


def _block_sums(array: npt.NDArray[Any], steps: Steps) -> npt.NDArray[Any]:
    """Sums over blocks, axis by axis: along the last one, where numpy is slow, little is left to add."""
    kind = np.float32 if array.dtype.kind == "f" else np.uint32
    for axis, step in enumerate(steps):
        shape = (*array.shape[:axis], array.shape[axis] // step, step, *array.shape[axis + 1 :])
        array = array.reshape(shape).sum(axis=axis + 1, dtype=kind)
    return array
