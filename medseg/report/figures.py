"""Contour pictures of a case, as PNG in a data URI, and the geometry of strip plots; no HTML."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke

from medseg.errors import DataError
from medseg.evaluate import Evaluation
from medseg.evaluate.pairs import GRID_TOLERANCE_VOXELS, Pair, read_pair
from medseg.grid import Grid
from medseg.metrics import Labels, Value, judged
from medseg.readers import is_picture, read_image

logger = logging.getLogger(__name__)

Plane = npt.NDArray[Any]

PICTURE_PIXELS = 480
_DPI = 100
# room around what is outlined, so that errors are seen in their surroundings
_ROOM = 1.35
_WINDOW_PERCENTILES = (1, 99)
_WINDOW_ROOM = 0.5
_LINE_WIDTH = 1.9
_BACKDROP = "#15181c"
_CASING: list[AbstractPathEffect] = [withStroke(linewidth=3.6, foreground="#000000b0")]
MAX_DOTS = 300


@dataclass(frozen=True)
class Picture:
    """One square picture, ready for an `<img>`; `caption` says which slice of a volume, and is empty in 2D."""

    data_uri: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Dot:
    """One case in a strip plot; x and y in 0–1."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class _View:
    """A way to cut a volume that stands in RAS order: along `axis`, with the letters at the left and top edges."""

    name: str
    axis: int
    left: str
    top: str


_VIEWS = (_View("axial", 2, "R", "A"), _View("coronal", 1, "R", "S"), _View("sagittal", 0, "A", "S"))


@dataclass(frozen=True)
class _Scene:
    """What one picture shows: planes [row, column] and the size of a pixel (height, width) in mm."""

    prediction: Plane
    reference: Plane
    image: Plane | None
    pixel_mm: tuple[float, float]


def contour_pictures(pair: Pair, evaluation: Evaluation) -> tuple[Picture, ...]:
    """Outlines of reference and prediction where they differ most: three planes of a volume, one picture in 2D.

    Raises as reading does; empty where there is no prediction.
    """
    if pair.prediction is None:
        return ()
    options = evaluation.options
    prediction, reference, grid = read_pair(
        pair.prediction, pair.reference, resample_prediction=options.resample_prediction
    )
    maps = judged(prediction, reference, list(evaluation.labels.values()), ignore_value=options.ignore_value)
    layers = [*maps, *_image_layer(pair, grid)]
    scenes = (
        _scenes_2d(layers, grid, is_picture(pair.reference)) if grid.spatial_dims == 2 else _scenes_3d(layers, grid)
    )
    window = _window(layers[2], (layers[0] != 0) | (layers[1] != 0)) if len(layers) > 2 else (0.0, 1.0)
    return tuple(
        Picture(
            _draw(scene, evaluation.labels, evaluation.colours, window, letters),
            caption,
            ", ".join(part for part in (f"Reference and prediction of case {pair.case}", caption) if part),
        )
        for scene, caption, letters in scenes
    )


def strip(values: Sequence[float], titles: Sequence[str], *, low: float, high: float = 1.0) -> list[Dot]:
    """Dots of a strip plot; of more than `MAX_DOTS`, evenly many are taken by rank, with both ends."""
    order = np.argsort(np.asarray(values, dtype=np.float64), kind="stable")
    if len(order) > MAX_DOTS:
        order = order[np.linspace(0, len(order) - 1, MAX_DOTS).round().astype(int)]
    # multiples of the golden ratio spread neighbours apart, the same way every time
    return [
        Dot(place(values[n], low=low, high=high), (rank * 0.6180339887) % 1, titles[n]) for rank, n in enumerate(order)
    ]


def place(value: float, *, low: float, high: float = 1.0) -> float:
    """Where `value` lies between `low` and `high`, as 0–1."""
    return float(np.clip((value - low) / (high - low), 0, 1))


def upright(layers: Sequence[Plane], grid: Grid) -> tuple[list[Plane], tuple[float, ...]]:
    """Layers with their axes turned and flipped to the nearest of x, y(, z) in RAS, and the spacing in that order."""
    n = grid.spatial_dims
    share = np.abs(grid.affine[:n, :n]) / np.asarray(grid.spacing_mm)
    order: list[int] = []
    for axis in range(n):
        left = [voxel_axis for voxel_axis in range(n) if voxel_axis not in order]
        order.append(max(left, key=lambda voxel_axis: float(share[axis, voxel_axis])))
    flips = tuple(slice(None, None, -1 if grid.affine[axis, order[axis]] < 0 else 1) for axis in range(n))
    return [layer.transpose(order)[flips] for layer in layers], tuple(grid.spacing_mm[a] for a in order)


def _members(value: Value) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _image_layer(pair: Pair, grid: Grid) -> list[npt.NDArray[Any]]:
    if pair.image is None:
        return []
    try:
        image = read_image(pair.image, channels=1 if is_picture(pair.image) else None, finite=False)
    except DataError as error:
        logger.warning("left out of the pictures: %s", error)
        return []
    if not image.grid.matches(grid, tolerance=GRID_TOLERANCE_VOXELS):
        logger.warning("%s: lies on another grid than the reference and is left out of the pictures", pair.image)
        return []
    return [np.nan_to_num(image.array[0].astype(np.float32))]


def _scenes_2d(layers: Sequence[Plane], grid: Grid, picture: bool) -> list[tuple[_Scene, str, tuple[str, str] | None]]:
    if picture:
        return [(_scene(layers, (grid.spacing_mm[0], grid.spacing_mm[1])), "", None)]
    # x to the right and y up, as maps are drawn
    turned, spacing = upright(layers, grid)
    planes = [layer[:, ::-1].T for layer in turned]
    return [(_scene(planes, (spacing[1], spacing[0])), "", None)]


def _scenes_3d(layers: Sequence[Plane], grid: Grid) -> list[tuple[_Scene, str, tuple[str, str] | None]]:
    turned, spacing = upright(layers, grid)
    scenes: list[tuple[_Scene, str, tuple[str, str] | None]] = []
    for view in _VIEWS:
        across, up = (a for a in range(3) if a != view.axis)
        if min(turned[0].shape[across], turned[0].shape[up]) < 2:
            continue
        index = _worst_slice(turned[0], turned[1], view.axis)
        planes = [np.moveaxis(layer, view.axis, 0)[index][::-1, ::-1].T for layer in turned]
        caption = f"{view.name}, slice {index + 1} of {turned[0].shape[view.axis]}"
        scenes.append((_scene(planes, (spacing[up], spacing[across])), caption, (view.left, view.top)))
    return scenes


def _scene(planes: Sequence[Plane], pixel_mm: tuple[float, float]) -> _Scene:
    return _Scene(planes[0], planes[1], planes[2] if len(planes) > 2 else None, pixel_mm)


def _worst_slice(prediction: Labels, reference: Labels, axis: int) -> int:
    others = tuple(a for a in range(prediction.ndim) if a != axis)
    wrong = (prediction != reference).sum(axis=others)
    return int(np.argmax(wrong if wrong.any() else (reference != 0).sum(axis=others)))


def _window(image: Plane, outlined: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Black and white: the range of what is outlined and half as much on both sides, or that of the whole image."""
    inside = image[outlined]
    low, high = np.percentile(inside if inside.size else image, _WINDOW_PERCENTILES)
    room = _WINDOW_ROOM * (high - low) if inside.size else 0.0
    low, high = max(low - room, float(image.min())), min(high + room, float(image.max()))
    return float(low), float(max(high, low + 1e-6))


def _draw(
    scene: _Scene,
    labels: Mapping[str, Value],
    colours: Mapping[str, str],
    window: tuple[float, float],
    letters: tuple[str, str] | None,
) -> str:
    side = PICTURE_PIXELS / _DPI
    figure = Figure(figsize=(side, side), dpi=_DPI, facecolor=_BACKDROP)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    (rows, columns), (height, width) = scene.reference.shape, scene.pixel_mm
    if scene.image is not None:
        extent = (0, columns * width, rows * height, 0)
        axes.imshow(scene.image, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="bilinear")
    references = {name: np.isin(scene.reference, _members(value)) for name, value in labels.items()}
    predictions = {name: np.isin(scene.prediction, _members(value)) for name, value in labels.items()}
    # large ones below: a region must not hide what it is made of
    order = sorted(labels, key=lambda name: -int(references[name].sum() + predictions[name].sum()))
    for name in order:
        _outline(axes, references[name], scene, "#ffffff", fill=colours[name], faint=scene.image is not None)
    for name in order:
        _outline(axes, predictions[name], scene, colours[name])
    _frame(axes, scene)
    for letter, at in zip(letters or (), ((0.03, 0.5), (0.5, 0.96))):
        axes.text(
            *at, letter, transform=axes.transAxes, color="white", fontsize=11, ha="center", va="center"
        ).set_path_effects(_CASING)
    return _png(figure)


def _outline(
    axes: Axes,
    mask: npt.NDArray[np.bool_],
    scene: _Scene,
    colour: str,
    *,
    fill: str = "",
    faint: bool = True,
) -> None:
    if not mask.any():
        return
    padded = np.pad(mask, 1).astype(np.float32)
    y, x = ((np.arange(-1, s + 1) + 0.5) * mm for s, mm in zip(mask.shape, scene.pixel_mm))
    if fill:
        axes.contourf(x, y, padded, levels=[0.5, 1.5], colors=[fill], alpha=0.16 if faint else 0.4)
    lines = axes.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=_LINE_WIDTH)
    lines.set_path_effects(_CASING)


def _frame(axes: Axes, scene: _Scene) -> None:
    """A square around everything outlined, with room, or around the whole plane where nothing is."""
    found = np.argwhere((scene.reference != 0) | (scene.prediction != 0))
    if len(found):
        low, high = found.min(axis=0), found.max(axis=0) + 1
    else:
        low, high = np.zeros(2), np.asarray(scene.reference.shape)
    size = np.asarray(scene.pixel_mm)
    centre = (low + high) / 2 * size
    whole = float((np.asarray(scene.reference.shape) * size).max())
    half = min(float(((high - low) * size).max()) * _ROOM + 4 * float(size.max()), whole) / 2
    axes.set_xlim(centre[1] - half, centre[1] + half)
    axes.set_ylim(centre[0] + half, centre[0] - half)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
