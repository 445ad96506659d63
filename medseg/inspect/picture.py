"""The picture of a network: its taps, the voxels that can reach an output voxel, and how strongly they do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from medseg.config import COLOURS
from medseg.errors import ConfigError, DataError
from medseg.networks.receptive import LayerReport, NetworkReport, field_at
from medseg.writers import atomic_path

Grid = npt.NDArray[np.float32]

NOISE_IMAGES = 4
# Luo et al. 2016, arXiv:1701.04128: what is above 4.55 % of the strongest gradient counts as effective
EFFECTIVE = 0.0455
# the network itself runs on a patch of the picture, with gradients
_MAX_VOXELS = 2**24
_DPI = 130
_WIDTH = 12.0
_INK, _FAINT, _PAPER = "#22272e", "#9aa4af", "#ffffff"
_TAPS, _REACH, _BOX = COLOURS[5], COLOURS[6], COLOURS[0]
_AXIS_NAMES = "ijk"


def check_picture(path: Path, shape: Sequence[int] = ()) -> None:
    """Raises `ConfigError` where `path` cannot be written as a PNG, or a patch of `shape` is too large to draw."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, expected a file for the picture, such as {path / 'network.png'}")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path}: ends in `{path.suffix}`, expected .png, such as {path.with_suffix('.png')}")
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{path}: nothing can be written into {folder}; choose another folder for the picture")
    if prod(shape) > _MAX_VOXELS:
        raise ConfigError(
            f"a picture of a patch of {_by(shape)}: expected at most {_MAX_VOXELS:,} voxels; choose a smaller patch"
        )


def draw(network: nn.Module, report: NetworkReport, path: Path, *, trained: bool) -> None:
    """Write the PNG of `network`, which `report` is about; without `trained` the picture says that weights are random.

    Raises `DataError` where the network does not take the report's patch.
    """
    voxel = tuple(n // 2 for n in report.patch)
    strength = effective_field(network, in_channels=report.in_channels, shape=report.patch, voxel=voxel)
    try:
        reach = field_at(network, in_channels=report.in_channels, shape=report.patch, voxel=voxel)
    except ConfigError:
        # the report says which operation has no rule
        reach = np.ones(report.patch, dtype=bool)
    dims = report.spatial_dims
    figure = Figure(figsize=(_WIDTH, {1: 7.6, 2: 10.6, 3: 12.2}[dims]), facecolor=_PAPER)
    FigureCanvasAgg(figure)
    rows = figure.add_gridspec(
        {1: 2, 2: 2, 3: 3}[dims],
        1,
        height_ratios={1: (1.2, 1), 2: (1, 1.75), 3: (1, 1, 1)}[dims],
        left=0.075,
        right=0.97,
        top={1: 0.855, 2: 0.89, 3: 0.9}[dims],
        bottom=0.06,
        hspace={1: 0.42, 2: 0.26, 3: 0.36}[dims],
    )
    _headline(figure, report)
    _draw_taps(figure.add_subplot(rows[0]), report)
    side = "" if dims == 1 else " a side"
    weights = "trained weights" if trained else "random weights, untrained"
    words = (
        f"effective field ({weights}): {_effective_side(strength):.0f} voxels{side} above {EFFECTIVE:.1%} of the peak"
    )
    if dims == 1:
        _draw_curve(figure.add_subplot(rows[1]), reach, strength, voxel, words)
    elif dims == 2:
        cells = rows[1].subgridspec(1, 2, wspace=0.16)
        left, right = figure.add_subplot(cells[0]), figure.add_subplot(cells[1])
        _draw_reach(left, reach, voxel, (0, 1), _share(reach))
        _draw_strength(right, strength, reach, voxel, (0, 1), words.replace("): ", "):\n"))
    else:
        for row, kind in enumerate(("reach", "strength"), start=1):
            cells = rows[row].subgridspec(1, 3, wspace=0.22)
            for number, axes in enumerate(((0, 1), (0, 2), (1, 2))):
                panel = figure.add_subplot(cells[number])
                if kind == "reach":
                    title = _share(reach) if number == 0 else ""
                    _draw_reach(panel, reach, voxel, axes, title)
                else:
                    _draw_strength(panel, strength, reach, voxel, axes, words if number == 0 else "")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")


def effective_field(
    network: nn.Module, *, in_channels: int, shape: Sequence[int], voxel: Sequence[int], seed: int = 0
) -> Grid:
    """|gradient| of the scores at an output `voxel` by the image, 1 at its peak: the mean over a few noise images.

    After Luo et al. 2016, arXiv:1701.04128. A grid of `shape`, channels summed.
    """
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    total = torch.zeros(*shape)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(NOISE_IMAGES):
        image = torch.randn(1, in_channels, *shape, generator=generator).to(device).requires_grad_()
        scores = network(image)
        if isinstance(scores, list | tuple):
            scores = scores[0]
        here = scores[(0, slice(None), *voxel)]
        # the sum over channels alone may be constant, as behind a softmax
        weights = torch.randn(here.shape, generator=generator).to(device)
        total += torch.autograd.grad((here * weights).sum(), image)[0][0].abs().sum(dim=0).cpu()
    peak = float(total.max())
    if not peak > 0:
        raise DataError(f"no voxel of an image of {tuple(shape)} has a gradient at {tuple(voxel)}")
    return np.asarray((total / peak).numpy(), dtype=np.float32)


def _effective_side(strength: Grid) -> float:
    return float((strength > EFFECTIVE).sum() ** (1 / strength.ndim))


def _share(reach: npt.NDArray[np.bool_]) -> str:
    if reach.all():
        return "field of view: the whole patch"
    box = reach[np.ix_(*(_span(reach, axis) for axis in range(reach.ndim)))] if reach.any() else reach
    return f"field of view: {box.mean():.1%} of its box reach the centre"


def _span(reach: npt.NDArray[np.bool_], axis: int) -> npt.NDArray[np.int_]:
    found = np.flatnonzero(reach.any(axis=tuple(a for a in range(reach.ndim) if a != axis)))
    return np.arange(found[0], found[-1] + 1)


def _headline(figure: Figure, report: NetworkReport) -> None:
    figure.text(0.075, 0.965, report.name, fontsize=19, fontweight="bold", color=_INK, va="center")
    field = _by(report.receptive_field) if report.field_is_exact else "not known"
    also = " and the mean of the whole image" if report.field_is_exact and report.sees_whole_image else ""
    words = (
        f"{report.spatial_dims}D, patch {_by(report.patch)}   ·   {_short(report.parameters)} parameters   ·   "
        f"{_short(report.multiply_adds)} multiply-adds   ·   output stride {report.output_stride:g}   ·   "
        f"field of view {field}{also}"
    )
    height = figure.get_size_inches()[1]
    figure.text(0.075, 0.965 - 0.33 / height, words, fontsize=10, color=_INK, va="center")


def _by(numbers: Sequence[int]) -> str:
    return "×".join(map(str, numbers))


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def _draw_taps(panel: Axes, report: NetworkReport) -> None:
    """One column for each layer wider than a voxel: its taps where they lie in the image, and the field behind it."""
    layers = [x for x in report.layers if max(x.kernel) > 1 and x.cumulative_stride is not None]
    axis = max(range(report.spatial_dims), key=lambda a: max((x.effective_kernel[a] for x in layers), default=1))
    columns = np.arange(len(layers))
    half = np.array([x.receptive_field[axis] / 2 for x in layers])
    panel.bar(columns, 2 * half, bottom=-half, width=0.9, color=_REACH, alpha=0.14, label="field of view of the layer")
    points = [(column, offset) for column, layer in zip(columns, layers) for offset in _offsets(layer, axis)]
    if points:
        x, y = zip(*points)
        size = float(np.clip(900 / max(1, len(layers)), 5, 34))
        panel.scatter(
            x, y, s=size, color=_TAPS, linewidths=0, zorder=3, label="taps of its kernel, in voxels of the image"
        )
    if layers:
        panel.set_ylim(-1.08 * half.max(), 1.08 * half.max())
    panel.set_xlim(-0.7, max(len(layers) - 0.3, 0.7))
    every = max(1, -(-len(layers) // 26))
    panel.set_xticks(columns[::every], [_label(x) for x in layers[::every]], rotation=45, ha="right", fontsize=7)
    panel.set_ylabel(f"voxels from the centre, axis {_AXIS_NAMES[axis]}", fontsize=9)
    panel.set_title("Taps of each layer: kernel, and dilation where it has one", fontsize=11, loc="left", color=_INK)
    if layers:
        panel.legend(loc="lower left", fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")
    _tidy(panel)
    panel.grid(axis="y", color=_FAINT, alpha=0.25, linewidth=0.6)


def _offsets(layer: LayerReport, axis: int) -> npt.NDArray[np.float64]:
    taps = (np.arange(layer.kernel[axis]) - (layer.kernel[axis] - 1) / 2) * layer.dilation[axis]
    step = float((layer.cumulative_stride or (1.0,) * len(layer.kernel))[axis])
    return np.asarray(taps * (step if layer.kind.startswith("transposed") else step / layer.stride[axis]))


def _label(layer: LayerReport) -> str:
    dilation = f" d{_alike(layer.dilation)}" if max(layer.dilation) > 1 else ""
    stride = f" /{_alike(layer.stride)}" if max(layer.stride) > 1 else ""
    kind = {"max pooling": "max ", "average pooling": "mean ", "transposed convolution": "up "}.get(layer.kind, "")
    return f"{kind}{_alike(layer.kernel)}{dilation}{stride}"


def _alike(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else _by(numbers)


def _draw_reach(
    panel: Axes, reach: npt.NDArray[np.bool_], voxel: Sequence[int], axes: tuple[int, int], title: str
) -> None:
    plane = _plane(reach, voxel, axes)
    panel.imshow(plane, cmap=ListedColormap(["#f1f3f5", _REACH]), vmin=0, vmax=1, interpolation="nearest")
    panel.plot(voxel[axes[1]], voxel[axes[0]], marker="+", color=_PAPER, markersize=9, markeredgewidth=1.6)
    _frame(panel, axes, title)


def _draw_strength(
    panel: Axes,
    strength: Grid,
    reach: npt.NDArray[np.bool_],
    voxel: Sequence[int],
    axes: tuple[int, int],
    title: str,
) -> None:
    # the root shows the weak surroundings beside the strong centre
    shown = panel.imshow(
        _plane(strength, voxel, axes), cmap="magma", norm=PowerNorm(0.4, 0, 1), interpolation="nearest"
    )
    rows, columns = (_span(reach, axis) if reach.any() else np.arange(1) for axis in axes)
    corner = (columns[0] - 0.5, rows[0] - 0.5)
    panel.add_patch(
        Rectangle(corner, len(columns), len(rows), fill=False, edgecolor=_BOX, linewidth=1.4, linestyle="--")
    )
    bar = panel.figure.colorbar(shown, ax=panel, fraction=0.04, pad=0.025, ticks=[0, 0.01, 0.1, 0.5, 1])
    bar.ax.tick_params(labelsize=7, colors=_INK)
    bar.outline.set_visible(False)
    _frame(panel, axes, title)


def _plane(grid: npt.NDArray[np.generic], voxel: Sequence[int], axes: tuple[int, int]) -> npt.NDArray[np.generic]:
    return grid[tuple(slice(None) if axis in axes else at for axis, at in enumerate(voxel))]


def _draw_curve(panel: Axes, reach: npt.NDArray[np.bool_], strength: Grid, voxel: Sequence[int], title: str) -> None:
    places = np.arange(len(strength)) - voxel[0]
    panel.fill_between(
        places,
        0,
        1,
        where=reach,
        step="mid",
        color=_REACH,
        alpha=0.14,
        linewidth=0,
        label=_share(reach),
    )
    panel.plot(places, strength, color=_TAPS, linewidth=1.0, label="|gradient|, 1 at its peak")
    panel.set_yscale("symlog", linthresh=1e-3)
    panel.set_ylim(0, 1.15)
    panel.set_xlim(places[0], places[-1])
    panel.set_xlabel("voxels from the output voxel", fontsize=9)
    panel.set_title(title[:1].upper() + title[1:], fontsize=11, loc="left", color=_INK)
    panel.legend(loc="upper right", fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")
    _tidy(panel)


def _frame(panel: Axes, axes: tuple[int, int], title: str) -> None:
    panel.set_ylabel(_AXIS_NAMES[axes[0]], fontsize=9, rotation=0, labelpad=8)
    panel.set_xlabel(_AXIS_NAMES[axes[1]], fontsize=9)
    if title:
        panel.set_title(title[:1].upper() + title[1:], fontsize=11, loc="left", color=_INK)
    _tidy(panel)


def _tidy(panel: Axes) -> None:
    panel.tick_params(labelsize=8, colors=_INK, length=3)
    for side, spine in panel.spines.items():
        spine.set_color(_FAINT)
        spine.set_visible(side in ("left", "bottom"))
