"""Contour pictures of a case, as JPEG in a data URI; no HTML."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect, withStroke
from scipy import ndimage

from medseg.evaluate import Evaluation
from medseg.evaluate.pairs import Pair
from medseg.metrics import Labels, Value
from medseg.metrics.codes import members
from medseg.readers import is_picture
from medseg.report.layers import Layers
from medseg.report.page import label_marks
from medseg.views import edges, interpolated, window

Plane = npt.NDArray[Any]

PICTURE_PIXELS = 560
_DPI = 100
_QUALITY = 88
# room around what is outlined, so that errors are seen in their surroundings
_ROOM = 1.35
_BACKDROP = "#15181c"
# opaque: the ends of lines lie over each other, and would show as dots
_CASING = "#0d0f12"
_TEXT_CASING: list[AbstractPathEffect] = [withStroke(linewidth=2.6, foreground="#000000c8")]
# how much of the label's colour lies over what is wrong, and, where there is no image, over what agrees
_WRONG, _AGREED = 0.6, 0.22
# a number needs this much room around it inside its outline
_NUMBER_PIXELS = 10
_SCALE_SHARE = 0.3


@dataclass(frozen=True)
class Picture:
    """One square picture, ready for an `<img>`; `caption` says which slice of a volume, and is empty in 2D."""

    data_uri: str
    caption: str
    alt: str


@dataclass(frozen=True)
class _View:
    """A way to cut a volume in RAS order: along `axis`, with the letters at the left, right, top and bottom edges."""

    name: str
    axis: int
    letters: str


_VIEWS = (_View("axial", 2, "RLAP"), _View("coronal", 1, "RLSI"), _View("sagittal", 0, "APSI"))


@dataclass(frozen=True)
class _Scene:
    """What one picture shows: planes [row, column], the size of a pixel (height, width) in `unit`, and what is said."""

    prediction: Plane
    reference: Plane
    image: Plane | None
    pixel: tuple[float, float]
    unit: str
    caption: str
    letters: str


@dataclass(frozen=True)
class _Style:
    """How labels are drawn: their values and colours, what stands in them where colours repeat, and the grey window."""

    labels: Mapping[str, Value]
    colours: Mapping[str, str]
    marks: Mapping[str, str]
    window: tuple[float, float]


def contour_pictures(layers: Layers, pair: Pair, evaluation: Evaluation) -> tuple[Picture, ...]:
    """Outlines of reference and prediction where they differ most: three planes of a volume, one picture in 2D."""
    labels = evaluation.labels
    grey = (0.0, 1.0) if layers.image is None else window(layers.image, layers.outlined)
    style = _Style(labels, evaluation.colours, label_marks(evaluation), grey)
    scenes = _planes(layers, is_picture(pair.reference)) if layers.grid.spatial_dims == 2 else _cuts(layers)
    return tuple(
        Picture(
            _draw(scene, style),
            scene.caption,
            ", ".join(
                part for part in (f"Outlines of reference and prediction, case {pair.case}", scene.caption) if part
            ),
        )
        for scene in scenes
    )


def _planes(layers: Layers, picture: bool) -> list[_Scene]:
    across, up = layers.grid.spacing_mm

    def turned(layer: Plane) -> Plane:
        # a picture lies as its file; else x to the right and y up, as maps are drawn
        return layer if picture else layer[:, ::-1].T

    pixel, unit = ((across, up), "px") if picture else ((up, across), "mm")
    image = None if layers.image is None else turned(layers.image)
    return [_Scene(turned(layers.prediction), turned(layers.reference), image, pixel, unit, "", "")]


def _cuts(layers: Layers) -> list[_Scene]:
    scenes = []
    spacing = layers.grid.spacing_mm
    for view in _VIEWS:
        across, up = (a for a in range(3) if a != view.axis)
        if min(layers.grid.shape[across], layers.grid.shape[up]) < 2:
            continue
        index = _worst_slice(layers.prediction, layers.reference, view.axis)
        planes = [
            None if layer is None else np.moveaxis(layer, view.axis, 0)[index][::-1, ::-1].T
            for layer in (layers.prediction, layers.reference, layers.image)
        ]
        if planes[0] is not None and planes[1] is not None:
            caption = f"{view.name}, slice {index + 1} of {layers.grid.shape[view.axis]}"
            scenes.append(
                _Scene(planes[0], planes[1], planes[2], (spacing[up], spacing[across]), "mm", caption, view.letters)
            )
    return scenes


def _worst_slice(prediction: Labels, reference: Labels, axis: int) -> int:
    others = tuple(a for a in range(prediction.ndim) if a != axis)
    wrong = (prediction != reference).sum(axis=others)
    return int(np.argmax(wrong if wrong.any() else (reference != 0).sum(axis=others)))


def _draw(scene: _Scene, style: _Style) -> str:
    side = PICTURE_PIXELS / _DPI
    figure = Figure(figsize=(side, side), dpi=_DPI, frameon=False)
    window = _window(scene)
    present = set(np.unique(scene.reference)) | set(np.unique(scene.prediction))
    regions = {
        name: [np.isin(plane, members(value)) for plane in (scene.reference, scene.prediction)]
        for name, value in style.labels.items()
        if present.intersection(members(value))
    }
    # large ones below: a region must not hide what it is made of
    order = sorted(regions, key=lambda name: -sum(int(plane.sum()) for plane in regions[name]))
    # dark rims first, then the references, then the predictions: thinner, so that white shows beside the colour where
    # both run together
    for which, colour, width in ((0, _CASING, 4.8), (1, _CASING, 3.3), (0, "#ffffff", 3.2), (1, "", 1.7)):
        for name in order:
            _outline(figure, regions[name][which], scene, window, colour or style.colours[name], width)
    for name in order:
        if style.marks[name]:
            _number(figure, regions[name], scene, window, style.marks[name])
    for letter, at in zip(scene.letters, ((0.03, 0.5), (0.97, 0.5), (0.5, 0.965), (0.5, 0.035))):
        _write(figure, letter, at, size=14)
    _scale(figure, window.side, scene.unit)
    return _jpeg(figure, _ground(scene, style, window))


@dataclass(frozen=True)
class _Window:
    """The square of a plane that is shown: its upper left corner (down, across) and its side, in the plane's unit."""

    start: tuple[float, float]
    side: float

    def place(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(…, 2) points (down, across) as (across, up) of the picture, 0–1 inside."""
        shares = (points - self.start) / self.side
        return np.stack([shares[..., 1], 1 - shares[..., 0]], axis=-1)

    def voxels(self, axis: int, size: float) -> npt.NDArray[np.float64]:
        """Where the middle of each of the picture's pixels lies along `axis`, counted in voxels from the edge."""
        middles = (np.arange(PICTURE_PIXELS) + 0.5) / PICTURE_PIXELS
        return np.asarray((self.start[axis] + middles * self.side) / size)


def _window(scene: _Scene) -> _Window:
    """The square around everything outlined, with room, or around the whole plane where nothing is."""
    found = np.argwhere((scene.reference != 0) | (scene.prediction != 0))
    shape, size = np.asarray(scene.reference.shape), np.asarray(scene.pixel)
    low, high = (found.min(axis=0), found.max(axis=0) + 1) if len(found) else (np.zeros(2), shape)
    side = float(((high - low) * size).max()) * _ROOM + 4 * float(size.max())
    side = min(side, float((shape * size).max()))
    down, across = (low + high) / 2 * size - side / 2
    return _Window((float(down), float(across)), side)


def _ground(scene: _Scene, style: _Style, window: _Window) -> npt.NDArray[np.uint8]:
    """RGB of what lies under the outlines: the image, and a tint wherever the maps differ.

    The tint is that of the label predicted, or of the reference's where nothing is; without an image what agrees is
    tinted too, faintly.
    """
    at = [window.voxels(axis, scene.pixel[axis]) for axis in (0, 1)]
    known = np.logical_and.outer(*((v >= 0) & (v < n) for v, n in zip(at, scene.reference.shape)))
    nearest = np.ix_(*(np.clip(v.astype(int), 0, n - 1) for v, n in zip(at, scene.reference.shape)))
    ground = np.empty((*known.shape, 3), np.uint8)
    ground[:] = [round(255 * part) for part in to_rgb(_BACKDROP)]
    if scene.image is not None:
        low, high = style.window
        shade = np.clip((interpolated(scene.image, at) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
        np.copyto(ground, shade[..., None], where=known[..., None])
    shown = np.where(scene.prediction != 0, scene.prediction, scene.reference)[nearest]
    wrong = (scene.prediction != scene.reference)[nearest]
    agreed = (shown != 0) & ~wrong if scene.image is None else np.zeros_like(wrong)
    for where, share in ((wrong & known, _WRONG), (agreed & known, _AGREED)):
        values, number = np.unique(shown[where], return_inverse=True)
        ground[where] = (1 - share) * ground[where] + share * _palette(style, values)[number]
    return ground


def _palette(style: _Style, values: Labels) -> npt.NDArray[np.float32]:
    """RGB, 0–255, of each of `values`: (n, 3). Atlases have values of hundreds of millions."""
    colours = np.zeros((len(values), 3), np.float32)
    # of several regions that hold a value the smallest one gives the colour
    for name in sorted(style.labels, key=lambda name: -len(members(style.labels[name]))):
        colours[np.isin(values, members(style.labels[name]))] = 255 * np.asarray(to_rgb(style.colours[name]))
    return colours


def _outline(
    figure: Figure, inside: npt.NDArray[np.bool_], scene: _Scene, window: _Window, colour: str, width: float
) -> None:
    if not inside.any():
        return
    lines = list(window.place(edges(inside) * scene.pixel))
    figure.add_artist(
        LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting", transform=figure.transFigure)
    )


def _number(figure: Figure, planes: Sequence[npt.NDArray[np.bool_]], scene: _Scene, window: _Window, text: str) -> None:
    """The label's value where the prediction (or else the reference) is widest."""
    plane = planes[1] if planes[1].any() else planes[0]
    depth = ndimage.distance_transform_edt(np.pad(plane, 1), sampling=scene.pixel)[1:-1, 1:-1]
    row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
    if depth[row, column] / window.side * PICTURE_PIXELS < _NUMBER_PIXELS:
        return
    across, up = window.place(np.array([row + 0.5, column + 0.5]) * scene.pixel)
    _write(figure, text, (float(across), float(up)), size=10.5)


def _scale(figure: Figure, whole: float, unit: str) -> None:
    """A bar of a round length at the lower right."""
    power = 10.0 ** math.floor(math.log10(whole * _SCALE_SHARE))
    length = next(f * power for f in (5, 2, 1) if f * power <= whole * _SCALE_SHARE)
    share = length / whole
    for stroke, thick in ((_CASING, 4.0), ("white", 2.2)):
        # other ends would make the bar longer than what is written on it
        figure.add_artist(
            Line2D([0.955 - share, 0.955], [0.035, 0.035], color=stroke, linewidth=thick, solid_capstyle="butt")
        )
    _write(figure, f"{length:g} {unit}", (0.955 - share / 2, 0.07), size=12)


def _write(figure: Figure, text: str, at: tuple[float, float], *, size: float) -> None:
    figure.text(*at, text, color="white", fontsize=size, ha="center", va="center", path_effects=_TEXT_CASING)


def _jpeg(figure: Figure, ground: npt.NDArray[np.uint8]) -> str:
    # drawn straight onto the ground: as an image of the figure it would be resampled, which takes longer than all else
    canvas = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()
    pixels = np.asarray(canvas.buffer_rgba())
    pixels[..., :3], pixels[..., 3] = ground, 255
    figure.draw(renderer)
    buffer = io.BytesIO()
    # colour at full resolution: thin coloured lines would fade; a third of the size of a PNG, and quicker
    imsave(buffer, pixels[..., :3], format="jpg", pil_kwargs={"quality": _QUALITY, "subsampling": 0})
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
