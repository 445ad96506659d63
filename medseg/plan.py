"""What a data set is like, and the configuration that follows from it, each choice with its reason; no training."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg.body import is_ct
from medseg.cases import Case, Dataset
from medseg.config import (
    AugmentConfig,
    Config,
    DataConfig,
    IntensityConfig,
    NetworkConfig,
    PreprocessConfig,
    TrainConfig,
    WindowsConfig,
    make_data_config,
)
from medseg.errors import DataError
from medseg.networks import build_bare, can_be_thinned, check_patch, default_config, fit_to_patch, halvings
from medseg.networks.receptive import count, fit_width
from medseg.progress import Progress, silent
from medseg.readers import is_picture, read_geometry, read_images, read_label

log = logging.getLogger(__name__)

# above this many cases an even selection is measured: medians have settled long before
MAX_MEASURED = 100
ANISOTROPIC = 3.0
PICTURE_SIDE = {"cpu": 256, "cuda": 512}
# voxels of a patch that give a training step of about 0.3 s (two cores) or fill a large GPU well
VOXELS = {("cpu", 3): 40 * 56 * 40, ("cuda", 3): 96**3, ("cpu", 2): 256**2, ("cuda", 2): 512**2}
# a false alarm costs a little augmentation, a miss mixes up left and right: long words count anywhere in a name
SIDED = re.compile(r"left|right|links|rechts|gauche|droit|(^|[^a-z])(l|r|lt|rt|lh|rh)([^a-z]|$)", re.IGNORECASE)
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
# what is given of a network and decides how the rest of it is planned
SHAPING = {"encoder", "channels"}


@dataclass(frozen=True)
class Fingerprint:
    """What was measured. Shapes and spacings of 3D images are in right-anterior-superior order of the axes."""

    spatial_dims: int
    pictures: bool
    cases: int
    shapes: tuple[tuple[int, ...], ...]
    spacings_mm: tuple[tuple[float, ...], ...]
    label_values: tuple[int, ...]
    foreground: tuple[dict[str, float], ...]
    """For each channel: mean, sd and the 0.5 and 99.5 percentiles (p005, p995) inside the labels."""
    nonzero_share: float
    """Median share of voxels that are not 0 in the first channel."""


@dataclass(frozen=True)
class Plan:
    """A full configuration and, for `section.key`, the reason in words."""

    config: Config
    reasons: dict[str, str]


def measure(dataset: Dataset, *, progress: Progress = silent) -> Fingerprint:
    """Read the data set (up to 100 cases, spread evenly) and describe it. Raises `DataError` naming a bad file."""
    labelled = [c for c in dataset.cases if c.label is not None]
    if not labelled:
        raise DataError(f"{dataset.path}: no case with a label found; run `medseg check`")
    chosen = [labelled[i] for i in np.unique(np.linspace(0, len(labelled) - 1, MAX_MEASURED).round().astype(int))]
    dims = _spatial_dims(chosen)
    channels = max(1, len(dataset.channels))
    shapes, spacings, nonzero = [], [], []
    values: set[int] = set()
    samples: list[list[np.ndarray]] = [[] for _ in range(channels)]
    for n, case in enumerate(chosen):
        progress("measure", n, len(chosen), case.id)
        image = read_images(case.images, spatial_dims=dims, channels=channels)
        array = image.array
        label = read_label(_labelled(case), spatial_dims=dims)
        order = _axis_order(image.grid.affine, dims)
        shapes.append(tuple(array.shape[1:][a] for a in order))
        spacings.append(tuple(image.grid.spacing_mm[a] for a in order))
        values.update(int(v) for v in np.unique(label.array))
        nonzero.append(float((array[0] != 0).mean()))
        if label.array.shape != array.shape[1:]:
            raise DataError(
                f"{case.label}: shape {label.array.shape} found, image has {array.shape[1:]}; run `medseg check`"
            )
        inside = label.array > 0
        for channel, found in zip(array, samples):
            voxels = channel[inside].astype(np.float64)
            found.append(voxels[:: max(1, len(voxels) // 5000)])
    return Fingerprint(
        spatial_dims=dims,
        pictures=is_picture(chosen[0].images[0]),
        cases=len(labelled),
        shapes=tuple(shapes),
        spacings_mm=tuple(spacings),
        label_values=tuple(sorted(values)),
        foreground=tuple(_statistics(np.concatenate(s)) for s in samples),
        nonzero_share=float(np.median(nonzero)),
    )


def make_plan(
    dataset: Dataset,
    fingerprint: Fingerprint,
    *,
    device: str = "cpu",
    network: dict[str, Any] | None = None,
    published: bool = False,
) -> Plan:
    """The configuration that `train` uses for a data set. `device`, `cpu` or `cuda`, bounds the size of a patch.

    `network` is what is given of that section: where it names another network than the usual one or another encoder,
    that is planned. `published`: with the norm, width and encoder of the paper, as weights from elsewhere need them.
    """
    reasons: dict[str, str] = {}
    data = _data(dataset, fingerprint, reasons)
    preprocess, shape = _preprocess(fingerprint, data, device, reasons)
    spacing = preprocess.spacing_mm or (1.0,) * fingerprint.spatial_dims
    windows, batch = _windows(fingerprint, shape, spacing, device, reasons)
    chosen = _network(fingerprint, preprocess, windows, reasons)
    if network and (network.get("name", chosen.name) != chosen.name or SHAPING & set(network)):
        chosen = _other_network(network, chosen, data, preprocess, windows, device, reasons, published=published)
    config = Config(
        data=data,
        preprocess=preprocess,
        network=chosen,
        augment=_augment(dataset, fingerprint, data, reasons),
        train=_train(fingerprint, batch, reasons),
        windows=windows,
    )
    return Plan(config, reasons)


def sided_label(data: DataConfig) -> str | None:
    """The first label whose name tells left from right, if any does."""
    return next((n for n in data.foreground if SIDED.search(CAMEL.sub(" ", n))), None)


def _data(dataset: Dataset, fingerprint: Fingerprint, reasons: dict[str, str]) -> DataConfig:
    reasons["data.spatial_dims"] = (
        f"{fingerprint.cases} cases with labels, all of {fingerprint.spatial_dims} dimensions"
    )
    labels = dataset.labels
    if labels is None:
        labels = {"background": 0}
        labels.update({f"label_{v}": v for v in fingerprint.label_values if v})
        reasons["data.labels"] = "the values found in the label files; give them names here"
    else:
        reasons["data.labels"] = "as the data set says"
    if len(labels) < 2:
        raise DataError(f"{dataset.path}: label files hold the background 0 only, expected at least one label")
    return make_data_config(
        spatial_dims=fingerprint.spatial_dims,
        channels=dataset.channels or ("image",),
        labels=labels,
        region_values=dataset.region_values,
        source=str(dataset.path),
    )


def _preprocess(
    fingerprint: Fingerprint, data: DataConfig, device: str, reasons: dict[str, str]
) -> tuple[PreprocessConfig, tuple[int, ...]]:
    shapes, spacings = np.array(fingerprint.shapes), np.array(fingerprint.spacings_mm)
    intensity = tuple(_intensity(c, s, reasons) for c, s in zip(data.channels, fingerprint.foreground))
    if fingerprint.pictures:
        median = np.median(shapes, axis=0)
        side = PICTURE_SIDE[device]
        factor = min(1.0, side / median.max())
        shape = tuple(max(16, round(float(m) * factor / 16) * 16) for m in median)
        reasons["preprocess.shape"] = (
            f"pictures have no size in mm; median {_text(median)} pixels, long side at most {side} on this device, "
            "multiples of 16; results are written at full size"
        )
        return PreprocessConfig(orient=False, shape=shape, intensity=intensity), shape
    spacing = np.median(spacings, axis=0)
    reason = "median of the data set"
    if spacing.max() > ANISOTROPIC * spacing.min():
        coarse = int(spacing.argmax())
        spacing[coarse] = max(np.percentile(spacings[:, coarse], 10), np.delete(spacing, coarse).max())
        reason += (
            f"; axis {coarse} is over {ANISOTROPIC:g} times coarser: its 10th percentile keeps thin slices' detail"
        )
    reasons["preprocess.spacing_mm"] = (
        reason + f" (smallest {_text(spacings.min(0))}, largest {_text(spacings.max(0))})"
    )
    crop = "nonzero" if fingerprint.nonzero_share < 0.6 else "none"
    reasons["preprocess.crop"] = (
        f"{100 * fingerprint.nonzero_share:.0f} % of the voxels are not 0 (median); below 60 % the empty planes are cut"
    )
    rounded = tuple(float(f"{s:.6g}") for s in spacing)
    # 90th percentile of the shapes at the new spacing: the patch then holds most cases whole
    shape = tuple(int(np.ceil(s)) for s in np.percentile(shapes * spacings / spacing, 90, axis=0))
    return PreprocessConfig(
        crop="nonzero" if crop == "nonzero" else "none", spacing_mm=rounded, intensity=intensity
    ), shape


def _intensity(channel: str, found: dict[str, float], reasons: dict[str, str]) -> IntensityConfig:
    if is_ct(channel):
        reasons["preprocess.intensity"] = (
            "CT: Hounsfield units mean the same in every scan; clipped to the 0.5 and 99.5 percentiles in the labels, "
            "then their mean and standard deviation"
        )
        return IntensityConfig(
            clip=(round(found["p005"], 3), round(found["p995"], 3)),
            normalise="fixed",
            mean=round(found["mean"], 3),
            sd=max(round(found["sd"], 3), 1e-3),
        )
    reasons.setdefault(
        "preprocess.intensity", f"{channel}: arbitrary units, so each image by its own mean and standard deviation"
    )
    return IntensityConfig()


def _windows(
    fingerprint: Fingerprint, shape: tuple[int, ...], spacing: Sequence[float], device: str, reasons: dict[str, str]
) -> tuple[WindowsConfig, int]:
    budget = VOXELS.get((device, fingerprint.spatial_dims), VOXELS[("cpu", 2)])
    step = 16 if fingerprint.spatial_dims == 2 else 8
    patch = [max(step, -(-s // step) * step) for s in shape]
    while np.prod(patch) > budget and max(patch) > 2 * step:
        # the longest side in mm gives way: a patch should see equally far in all directions
        longest = max((a for a in range(len(patch)) if patch[a] > 2 * step), key=lambda a: patch[a] * spacing[a])
        patch[longest] -= step
    reasons["windows.patch_size"] = (
        f"90 % of the cases fit into {_text(shape)} voxels; rounded up to multiples of {step}, at most "
        f"{budget:,} voxels for this device ({device})"
    )
    batch = 6 if fingerprint.spatial_dims == 2 else 4
    reasons["train.batch_size"] = f"{batch} patches keep the gradient steady and a step short"
    return WindowsConfig(patch_size=tuple(patch)), batch


def _network(
    fingerprint: Fingerprint, preprocess: PreprocessConfig, windows: WindowsConfig, reasons: dict[str, str]
) -> NetworkConfig:
    if fingerprint.spatial_dims == 2:
        base = NetworkConfig(
            channels=(32, 64, 96, 128, 160, 160), output_stride=16, aspp_rates=(3, 6, 9), aspp_channels=128
        )
    else:
        base = NetworkConfig()
    stride: int = base.output_stride
    while stride > 2 and min(windows.patch_size) < 4 * stride:
        stride //= 2
    base = NetworkConfig.model_validate(base.model_dump() | {"output_stride": stride})
    strides = _strides(len(base.channels), preprocess.spacing_mm)
    if strides is not None:
        reasons["network.strides"] = "a coarse axis is halved only once the others have caught up with it"
    feature = tuple(max(1, p // base.output_stride) for p in windows.patch_size)
    reasons["network.aspp_rates"] = (
        f"rates 2 4 6 or 3 6 9, capped by the feature map of {_text(feature)} that a patch gives"
    )
    reasons["network.output_stride"] = "small structures survive a stride of 4; pictures have room for 16"
    return fit_to_patch(base.model_copy(update={"strides": strides}), windows.patch_size)


def _other_network(
    given: dict[str, Any],
    usual: NetworkConfig,
    data: DataConfig,
    preprocess: PreprocessConfig,
    windows: WindowsConfig,
    device: str,
    reasons: dict[str, str],
    *,
    published: bool,
) -> NetworkConfig:
    """The published settings of another network and what is `given` of it, brought to the data and to the device."""
    for key in [k for k in reasons if k.startswith("network.")]:
        del reasons[key]
    same = given.get("name", usual.name) == usual.name
    base = usual if same else default_config(given["name"])
    changes: dict[str, object] = {"strides": None}
    if published:
        reasons["network.name"] = "as asked for; its published settings, which weights from elsewhere were made with"
    elif not same:
        reasons["network.name"] = (
            "as asked for; its published settings, but norm, rectifier, dropout of the usual network"
        )
        changes |= {key: getattr(usual, key) for key in ("norm", "leak", "dropout")}
        if base.upsampling == "resize":
            changes["upsampling"] = "interpolate"
            reasons["network.upsampling"] = "leaves map voxels in their places, so that the stride can be changed later"
    if not published and device == "cpu" and base.encoder.startswith("resnet") and "encoder" not in given:
        reasons["network.encoder"] = f"the light one, with its output stride and rates, for `{base.encoder}`: no GPU"
        changes |= {
            key: getattr(usual, key) for key in ("encoder", "channels", "output_stride", "aspp_rates", "aspp_channels")
        }
    made = NetworkConfig.model_validate(base.model_dump() | changes | given)
    stride: int = made.output_stride
    while "output_stride" not in given and stride > 2 and min(windows.patch_size) <= stride:
        stride //= 2
        reasons["network.output_stride"] = f"as large as a patch of {_text(windows.patch_size)} leaves room for"
    made = NetworkConfig.model_validate(made.model_dump() | {"output_stride": stride})
    if "strides" not in given:
        made = made.model_copy(update={"strides": _strides(halvings(made), preprocess.spacing_mm)})
    made = NetworkConfig.model_validate(fit_to_patch(made, windows.patch_size).model_dump() | given)
    if published or device != "cpu" or {"width", "channels"} & set(given) or not can_be_thinned(made):
        return made
    dims, channels, out_channels = data.spatial_dims, len(data.channels), data.out_channels
    check_patch(build_bare(made, dims, channels, out_channels), made, windows.patch_size)
    network = build_bare(usual, dims, channels, out_channels)
    _, target = count(network, spatial_dims=dims, in_channels=channels, shape=windows.patch_size)
    reasons["network.width"] = (
        f"about as many multiply-adds as the usual network, {usual.name}, has for a patch ({target:.3g}): no GPU"
    )
    return fit_width(
        made,
        spatial_dims=dims,
        in_channels=channels,
        out_channels=out_channels,
        shape=windows.patch_size,
        multiply_adds=target,
    )


def _strides(steps_wanted: int, spacing_mm: Sequence[float] | None) -> tuple[tuple[int, ...], ...] | None:
    if not steps_wanted or spacing_mm is None or max(spacing_mm) < 2 * min(spacing_mm):
        return None
    now, steps = list(spacing_mm), []
    for _ in range(steps_wanted):
        finest = min(now)
        step = tuple(2 if s < 2 * finest else 1 for s in now)
        now = [s * f for s, f in zip(now, step)]
        steps.append(step)
    return tuple(steps)


def _augment(dataset: Dataset, fingerprint: Fingerprint, data: DataConfig, reasons: dict[str, str]) -> AugmentConfig:
    sided = sided_label(data)
    axes: tuple[int, ...] = (0,)
    reasons["augment.flip_axes"] = "from left to right only: bodies are nearly symmetric that way and no other"
    if fingerprint.pictures:
        axes = (1,)
        reasons["augment.flip_axes"] = "pictures: left and right only, up and down carry meaning (depth)"
    elif fingerprint.spatial_dims == 2:
        axes = (0, 1)
        reasons["augment.flip_axes"] = "slices in no known direction: mirrored both ways"
    if dataset.labels is None and len(data.foreground) > 1:
        axes = ()
        reasons["augment.flip_axes"] = "the labels have no names: two of them may be the two sides of one organ"
    if sided:
        axes = ()
        reasons["augment.flip_axes"] = f"label `{sided}` tells sides apart: never mirrored"
    if fingerprint.spatial_dims == 2:
        return AugmentConfig(rotation_deg=(25.0,), scale=(0.75, 1.3), flip_axes=axes)
    spacing = np.median(np.array(fingerprint.spacings_mm), axis=0)
    if spacing.max() > ANISOTROPIC * spacing.min():
        coarse = int(spacing.argmax())
        rotation = tuple(30.0 if a == coarse else 5.0 for a in range(3))
        reasons["augment.rotation_deg"] = (
            f"axis {coarse} is coarse: turned mostly about it, so that slices stay in their plane"
        )
        return AugmentConfig(rotation_deg=rotation, flip_axes=axes)
    return AugmentConfig(flip_axes=axes)


def _train(fingerprint: Fingerprint, batch: int, reasons: dict[str, str]) -> TrainConfig:
    reasons["train.time_budget_s"] = "twenty minutes; `--time-budget` or `--epochs` change it"
    return TrainConfig(batch_size=batch, learning_rate=1e-3 if fingerprint.spatial_dims == 2 else 2e-3)


def _spatial_dims(cases: Sequence[Case]) -> int:
    if is_picture(cases[0].images[0]):
        return 2
    grids = [read_geometry(c.images[0]).grid for c in cases[:3]]
    return 2 if all(g.spatial_dims == 2 or g.shape[-1] == 1 for g in grids) else 3


def _axis_order(affine: np.ndarray, dims: int) -> tuple[int, ...]:
    if dims != 3:
        return tuple(range(dims))
    directions = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    order: list[int] = []
    for world in range(3):
        order.append(int(np.argmax([directions[world, a] if a not in order else -1 for a in range(3)])))
    return tuple(order)


def _statistics(voxels: np.ndarray) -> dict[str, float]:
    if not len(voxels):
        return {"mean": 0.0, "sd": 1.0, "p005": 0.0, "p995": 0.0}
    low, high = np.percentile(voxels, [0.5, 99.5])
    return {"mean": float(voxels.mean()), "sd": float(voxels.std()), "p005": float(low), "p995": float(high)}


def _labelled(case: Case) -> Path:
    if case.label is None:
        raise DataError(f"{case.id}: no label file")
    return case.label


def _text(values: Sequence[float] | np.ndarray) -> str:
    return " × ".join(f"{v:g}" for v in np.asarray(values, dtype=float).round(3))
