"""The configuration that follows from what a data set is like, each choice with its reason; no training."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg.cases import Dataset
from medseg.config import (
    BACKGROUND,
    IGNORE,
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
from medseg.device import BYTES_A_SCORE, MEMORY_SHARE
from medseg.errors import DataError
from medseg.findings import CaseFacts
from medseg.fingerprint import Fingerprint
from medseg.grid import whole_voxels
from medseg.metrics.codes import members
from medseg.networks import (
    build_bare,
    can_be_thinned,
    check_patch,
    default_config,
    fit_to_patch,
    halvings,
    stride_by_axis,
)
from medseg.networks.receptive import count, fit_width
from medseg.sides import why_unmirrored
from medseg.units import is_ct

log = logging.getLogger(__name__)

ANISOTROPIC = 3.0
PICTURE_SIDE = {"cpu": 256, "cuda": 512}
# voxels of a patch that give a training step of 0.3 to 0.5 s (two cores) or fill a large GPU well
VOXELS = {("cpu", 3): 40 * 56 * 40, ("cuda", 3): 128**3, ("cpu", 2): 256**2, ("cuda", 2): 512**2}
# patches in a batch, fewer where they are large; and voxels of a step on a GPU, where those of a batch are one piece
BATCH, LEAST_BATCH = {3: 4, 2: 6}, 2
STEP_VOXELS = {3: 2 * 128**3, 2: 6 * 512**2}
# bytes that the usual network keeps of a voxel for the way back, in float32; bf16 takes less, the rest is for what
# comes and goes
BYTES_A_VOXEL = {3: 550, 2: 700}
# lowest number of an image in Hounsfield units with air in it, which has −1000; some scanners pad with up to −3024
AIR = -3100.0, -900.0
# where the labels span less of what the images do, nothing would be left of an image that is clipped to them: in CT it
# is a few Hounsfield units, and the narrowest tissue spans tens of them
NARROW = 0.002
# below this share of the image labels are like points: a patch cut anywhere hardly ever has one
RARE = 0.001
# and then no more than this share of the batches shall be without any label
LABELLESS = 0.05
# voxels: what is smaller is gone with a shift of one
SMALLEST = 2.0
# what changes pictures more than the images of a scanner
UNCALIBRATED: dict[str, Any] = {
    "p_intensity": 0.8,
    "brightness": 0.4,
    "contrast": (0.6, 1.5),
    "p_gamma": 0.4,
    "p_blur": 0.2,
    "p_low_resolution": 0.2,
    "p_bias_field": 0.3,
    "stretch": 0.15,
    "shear": 0.1,
}
# stages of the residual U-Net for small volumes, and what it reads beside them: other settings are of the usual network
UNET_CHANNELS = (16, 32, 64, 128)
UNET_READS = {"norm", "leak", "width"}
# what is given of a network and decides how the rest of it is planned
SHAPING = {"encoder", "channels"}


@dataclass(frozen=True)
class Plan:
    """A full configuration and, for `section.key`, the reason in words. `facts`: what was found in the files."""

    config: Config
    reasons: dict[str, str]
    facts: tuple[CaseFacts, ...] = ()

    def reasons_beside(self, *given: Mapping[str, Any]) -> dict[str, str]:
        """The reasons of what none of the `given` settings is laid over: theirs are their own."""
        # the one for the network is that it was asked for
        laid = {
            f"{s}.{key}" for values in given for s, keys in values.items() if isinstance(keys, Mapping) for key in keys
        }
        return {key: reason for key, reason in self.reasons.items() if key not in laid - {"network.name"}}


def make_plan(
    dataset: Dataset,
    fingerprint: Fingerprint,
    *,
    device: str = "cpu",
    memory_bytes: float | None = None,
    network: dict[str, Any] | None = None,
    published: bool = False,
    processes: int = 1,
) -> Plan:
    """The configuration that `train` uses for a data set. `device`, `cpu` or `cuda`, bounds the size of a patch.

    So do `memory_bytes`, those that are free on a GPU; None: enough. The batch is what one device does at a time; on
    GPUs each of `processes` that train together does so many, on CPUs they share it: most often it is one machine's.

    `network` is what is given of that section: where it names another network than the usual one or another encoder,
    that is planned. `published`: with the norm, width and encoder of the paper, as weights from elsewhere need them.
    """
    reasons: dict[str, str] = {}
    data = _data(dataset, fingerprint, reasons)
    preprocess, shape = _preprocess(fingerprint, data, device, reasons)
    sizes = _sizes(fingerprint, data, preprocess)
    _tell_small(sizes, reasons)
    usual = _usual(fingerprint, sizes)
    bounds = _bounds(fingerprint, data, usual, device, memory_bytes)
    windows, batch = _windows(shape, preprocess, bounds, device, reasons)
    if device == "cpu" and batch < processes:
        _add_reason(reasons, "train.batch_size", f"one for each of {processes} processes")
        batch = processes
    elif device != "cpu" and processes > 1:
        # a step of Muon, as one of AdamW, has one size whatever the length of the gradient
        _add_reason(
            reasons,
            "train.batch_size",
            f"so many for each of {processes} processes; the learning rate stays, since steps do not grow with the "
            "gradient (another one for larger batches was not measured)",
        )
        batch *= processes
    chosen = _network(usual, preprocess, windows, sizes, reasons)
    if network and (network.get("name", chosen.name) != chosen.name or SHAPING & set(network)):
        chosen = _other_network(network, chosen, data, preprocess, windows, device, reasons, published=published)
    elif _is_small(shape, windows, chosen) and set(network or {}) <= UNET_READS:
        chosen = _unet(chosen, shape, reasons)
    config = Config(
        data=data,
        preprocess=preprocess,
        network=chosen,
        augment=_augment(fingerprint, data, reasons),
        train=_train(fingerprint, batch, _chance(shape, windows), reasons),
        windows=windows,
    )
    return Plan(config, reasons)


def _data(dataset: Dataset, fingerprint: Fingerprint, reasons: dict[str, str]) -> DataConfig:
    reasons["data.spatial_dims"] = (
        f"{fingerprint.cases} cases with labels, all of {fingerprint.spatial_dims} dimensions"
    )
    labels = dataset.labels
    if labels is None:
        labels = {BACKGROUND: 0}
        labels.update({f"label_{v}": v for v in fingerprint.label_values if v})
        reasons["data.labels"] = "the values found in the label files; give them names here"
    else:
        reasons["data.labels"] = "as the data set says"
    if all(name in (BACKGROUND, IGNORE) for name in labels):
        found = "label files hold the background 0 only" if dataset.labels is None else f"labels {list(labels)} found"
        raise DataError(f"{dataset.path}: {found}, expected at least one label to be learnt")
    channels = dataset.channels or ("image",)
    if channels == ("image",) and _is_hounsfield(fingerprint):
        channels = ("CT",)
        reasons["data.channels"] = (
            f"has no name, but begins at {fingerprint.lowest[0]:g} (median of the cases) as Hounsfield units do"
        )
    if fingerprint.coloured and len(channels) == 1:
        reasons["data.channels"] = (
            f"{fingerprint.coloured} pictures are in colour and read as grey; --set 'data.channels=[R,G,B]' keeps it"
        )
    data = make_data_config(
        spatial_dims=fingerprint.spatial_dims,
        channels=channels,
        labels=labels,
        region_values=dataset.region_values,
        source=str(dataset.path),
    )
    if data.is_regions and not dataset.region_values:
        reasons["data.region_values"] = (
            "no regions_class_order found: the larger regions first, each written as the smallest value that only it "
            "and those around it have"
        )
    return data


def _is_hounsfield(fingerprint: Fingerprint) -> bool:
    volumes = fingerprint.spatial_dims == 3 and not fingerprint.pictures
    return volumes and len(fingerprint.lowest) == 1 and AIR[0] <= fingerprint.lowest[0] <= AIR[1]


def _preprocess(
    fingerprint: Fingerprint, data: DataConfig, device: str, reasons: dict[str, str]
) -> tuple[PreprocessConfig, tuple[int, ...]]:
    shapes, spacings = np.array(fingerprint.shapes), np.array(fingerprint.spacings_mm)
    measured = zip(data.channels, fingerprint.foreground, fingerprint.anywhere or fingerprint.foreground)
    intensity = tuple(_intensity(*of_channel, reasons) for of_channel in measured)
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
    shape = tuple(whole_voxels(float(s)) for s in np.percentile(shapes * spacings / spacing, 90, axis=0))
    return PreprocessConfig(
        orient=fingerprint.turned,
        crop="nonzero" if crop == "nonzero" else "none",
        spacing_mm=rounded,
        intensity=intensity,
    ), shape


def _intensity(
    channel: str, inside: dict[str, float], anywhere: dict[str, float], reasons: dict[str, str]
) -> IntensityConfig:
    if is_ct(channel):
        found, where = inside, "in the labels"
        if inside["p995"] - inside["p005"] <= NARROW * (anywhere["p995"] - anywhere["p005"]):
            found, where = (
                anywhere,
                f"of the whole images (in the labels they are {inside['p005']:g} and {inside['p995']:g})",
            )
        _add_reason(
            reasons,
            "preprocess.intensity",
            f"{channel}: Hounsfield units mean the same in every scan; clipped to the 0.5 and 99.5 percentiles "
            f"{where}, then their mean and standard deviation, every case with the same weight",
        )
        return IntensityConfig(
            clip=(round(found["p005"], 3), round(found["p995"], 3)),
            normalise="fixed",
            mean=round(found["mean"], 3),
            sd=max(round(found["sd"], 3), 1e-3),
        )
    _add_reason(
        reasons,
        "preprocess.intensity",
        f"{channel}: arbitrary units, so each image by its own mean and standard deviation",
    )
    return IntensityConfig()


def _sizes(fingerprint: Fingerprint, data: DataConfig, preprocess: PreprocessConfig) -> dict[str, float]:
    """Voxels across each label or region that is in any case: of a ball (2D: disc) as large, median of its cases."""
    dims = fingerprint.spatial_dims
    found: dict[str, list[float]] = {name: [] for name in data.foreground}
    for shape, spacing, counts in zip(fingerprint.shapes, fingerprint.spacings_mm, fingerprint.label_voxels):
        if preprocess.spacing_mm is not None:
            factor = np.prod(spacing) / np.prod(preprocess.spacing_mm)
        else:
            factor = np.prod(preprocess.shape or shape) / np.prod(shape)
        for name, across in found.items():
            values = data.labels[name]
            voxels = sum(counts.get(v, 0) for v in members(values))
            if voxels:
                across.append(_across(voxels * float(factor), dims))
    return {name: float(np.median(across)) for name, across in found.items() if across}


def _across(voxels: float, dims: int) -> float:
    return {1: voxels, 2: math.sqrt(4 * voxels / math.pi), 3: math.pow(6 * voxels / math.pi, 1 / 3)}[dims]


def _tell_small(sizes: dict[str, float], reasons: dict[str, str]) -> None:
    small = sorted((size, name) for name, size in sizes.items() if size < SMALLEST)
    if not small:
        return
    listed = ", ".join(f"`{name}` {size:.1f}" for size, name in small[:5]) + (", …" if len(small) > 5 else "")
    text = f"smaller than {SMALLEST:g} voxels across on this grid, so hardly to be learnt: {listed}"
    key = "preprocess.spacing_mm" if "preprocess.spacing_mm" in reasons else "preprocess.shape"
    _add_reason(reasons, key, f"{text}; a finer grid helps where the files are finer")
    log.warning("%d labels are %s", len(small), text)


def _add_reason(reasons: dict[str, str], key: str, reason: str) -> None:
    if reason not in (said := reasons.get(key, "")):
        reasons[key] = f"{said}; {reason}" if said else reason


@dataclass(frozen=True)
class _Bounds:
    """Voxels of the largest patch, and of all patches of a step; `batch`: the most of them."""

    patch: float
    step: float
    batch: int


def _bounds(
    fingerprint: Fingerprint, data: DataConfig, network: NetworkConfig, device: str, memory_bytes: float | None
) -> _Bounds:
    dims = fingerprint.spatial_dims
    patch, batch = VOXELS.get((device, dims), VOXELS["cpu", 2]), BATCH.get(dims, BATCH[2])
    step: float = STEP_VOXELS.get(dims, STEP_VOXELS[2]) if device == "cuda" else batch * patch
    # a network of half the stride does 2^n times the work in its last stage, which is most of it
    share = (network.output_stride / _usual(fingerprint, {}).output_stride) ** dims
    if memory_bytes is None:
        return _Bounds(patch * share, step * share, batch)
    fitting = voxels_that_fit(memory_bytes, spatial_dims=dims, scores=data.out_channels)
    step = min(step, fitting)
    return _Bounds(min(patch, step / LEAST_BATCH) * share, step * share, batch)


def voxels_that_fit(memory_bytes: float, *, spatial_dims: int, scores: int) -> float:
    """Voxels that the usual network with `scores` outputs trains on at a time in the free memory of a GPU."""
    each = BYTES_A_VOXEL.get(spatial_dims, BYTES_A_VOXEL[2]) + BYTES_A_SCORE * scores
    return MEMORY_SHARE * memory_bytes / each


def _windows(
    shape: tuple[int, ...], preprocess: PreprocessConfig, bounds: _Bounds, device: str, reasons: dict[str, str]
) -> tuple[WindowsConfig, int]:
    dims = len(shape)
    spacing = preprocess.spacing_mm or (1.0,) * dims
    steps = [16 if dims == 2 else 8] * dims
    for axis in range(dims) if dims == 3 else ():
        # a coarse axis is halved less often, so that its patch may follow the data more closely
        while steps[axis] > 2 and spacing[axis] * steps[axis] > 2 * 8 * min(spacing):
            steps[axis] //= 2
    patch = [max(step, -(-s // step) * step) for s, step in zip(shape, steps)]
    while np.prod(patch) > bounds.patch and any(p > 2 * step for p, step in zip(patch, steps)):
        # the longest side in mm gives way: a patch should see equally far in all directions
        longest = max((a for a in range(dims) if patch[a] > 2 * steps[a]), key=lambda a: patch[a] * spacing[a])
        patch[longest] -= steps[longest]
    reasons["windows.patch_size"] = (
        f"90 % of the cases fit into {_text(shape)} voxels; rounded up to multiples of "
        f"{_text(steps if len(set(steps)) > 1 else steps[:1])}, at most {int(bounds.patch):,} voxels for this device "
        f"({device}), reaching equally far in mm where that is less"
    )
    batch = max(LEAST_BATCH, min(bounds.batch, int(bounds.step // np.prod(patch))))
    reasons["train.batch_size"] = f"{batch} patches keep the gradient steady and a step short"
    return WindowsConfig(patch_size=tuple(patch)), batch


def _usual(fingerprint: Fingerprint, sizes: dict[str, float]) -> NetworkConfig:
    """The usual network at the output stride that `sizes`, voxels across each label, leave room for."""
    if fingerprint.spatial_dims == 2:
        base = NetworkConfig(
            channels=(32, 64, 96, 128, 160, 160), output_stride=16, aspp_rates=(3, 6, 9), aspp_channels=128
        )
    else:
        base = NetworkConfig()
    stride: int = base.output_stride
    while stride > 2 and max(sizes.values(), default=float("inf")) < stride:
        stride //= 2
    return NetworkConfig.model_validate(base.model_dump() | {"output_stride": stride})


def _network(
    usual: NetworkConfig,
    preprocess: PreprocessConfig,
    windows: WindowsConfig,
    sizes: dict[str, float],
    reasons: dict[str, str],
) -> NetworkConfig:
    stride: int = usual.output_stride
    patch = windows.patch_size
    strides = _strides(len(usual.channels), preprocess.spacing_mm)
    base = usual.model_copy(update={"strides": strides})
    while stride > 2 and any(p < 4 * s for p, s in zip(patch, stride_by_axis(base, len(patch)))):
        stride //= 2
        base = NetworkConfig.model_validate(base.model_dump() | {"output_stride": stride})
    if strides is not None:
        reasons["network.strides"] = "a coarse axis is halved only once the others have caught up with it"
    feature = tuple(max(1, p // s) for p, s in zip(patch, stride_by_axis(base, len(patch))))
    reasons["network.aspp_rates"] = (
        f"rates 2 4 6 or 3 6 9, capped by the feature map of {_text(feature)} that a patch gives"
    )
    reasons["network.output_stride"] = "small structures survive a stride of 4; pictures have room for 16"
    if sizes and max(sizes.values()) < 2 * usual.output_stride and usual.output_stride < 4:
        reasons["network.output_stride"] = (
            f"the largest label is {max(sizes.values()):.1f} voxels across (median), less than a stride of 4; "
            "patches are smaller in turn"
        )
    return fit_to_patch(base, patch)


def _is_small(shape: tuple[int, ...], windows: WindowsConfig, network: NetworkConfig) -> bool:
    """Whether a patch that a processor trains on holds volumes of `shape` whole, with voxels as long as they are wide.

    Of others it was not measured what maps at full resolution bring, and they take more memory and time.
    """
    patch, stride = windows.patch_size, 2 ** (len(UNET_CHANNELS) - 1)
    if len(shape) != 3 or network.strides is not None or network.output_stride < NetworkConfig().output_stride:
        return False
    return math.prod(patch) <= VOXELS["cpu", 3] and all(p >= s and p > stride for p, s in zip(patch, shape))


def _unet(usual: NetworkConfig, shape: tuple[int, ...], reasons: dict[str, str]) -> NetworkConfig:
    """The residual U-Net with what the usual network has of its settings."""
    for key in [k for k in reasons if k.startswith("network.")]:
        del reasons[key]
    reasons["network.name"] = (
        f"volumes of {_text(shape)} voxels are few enough for maps at full resolution, which learn more from a step "
        "than those of deeplabv3plus, the usual network (docs/recipe.md)"
    )
    base = default_config("residual_unet").model_dump() | {"channels": UNET_CHANNELS}
    return NetworkConfig.model_validate(base | {key: getattr(usual, key) for key in ("norm", "leak", "dropout")})


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
            if can_be_thinned(base)
            else "as asked for; of this section it reads `arguments` alone"
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


def _augment(fingerprint: Fingerprint, data: DataConfig, reasons: dict[str, str]) -> AugmentConfig:
    axes = fingerprint.left_right
    more: dict[str, Any] = {}
    reasons["augment.flip_axes"] = "from left to right only: bodies are nearly symmetric that way and no other"
    if len(axes) > 1:
        axes = ()
        reasons["augment.flip_axes"] = "axes are not turned, and another one runs from left to right in some files"
    if fingerprint.pictures:
        axes, more = (1,), UNCALIBRATED
        reasons["augment.flip_axes"] = "pictures: left and right only, up and down carry meaning (depth)"
        reasons["augment.p_intensity"] = "pictures: brightness, contrast and shape vary from device to device"
    elif fingerprint.spatial_dims == 2:
        axes = (0, 1)
        reasons["augment.flip_axes"] = "slices in no known direction: mirrored both ways"
    if why := why_unmirrored(data.labels):
        axes = ()
        reasons["augment.flip_axes"] = f"{why}: never mirrored"
    if fingerprint.spatial_dims == 2:
        return AugmentConfig(p_affine=0.25, rotation_deg=(25.0,), scale=(0.75, 1.3), flip_axes=axes, **more)
    spacing = np.median(np.array(fingerprint.spacings_mm), axis=0)
    if spacing.max() > ANISOTROPIC * spacing.min():
        coarse = int(spacing.argmax())
        rotation = tuple(30.0 if a == coarse else 5.0 for a in range(3))
        reasons["augment.rotation_deg"] = (
            f"axis {coarse} is coarse: turned mostly about it, so that slices stay in their plane"
        )
        return AugmentConfig(rotation_deg=rotation, flip_axes=axes)
    return AugmentConfig(flip_axes=axes)


def _chance(shape: tuple[int, ...], windows: WindowsConfig) -> float:
    """How likely a patch cut anywhere holds a given voxel of a case of `shape`."""
    return float(np.prod([min(1.0, p / s) for p, s in zip(windows.patch_size, shape)]))


def _train(fingerprint: Fingerprint, batch: int, chance: float, reasons: dict[str, str]) -> TrainConfig:
    reasons["train.time_budget_s"] = "twenty minutes; `--time-budget` or `--epochs` change it"
    fraction, said = max(TrainConfig().foreground_fraction, round(1 / batch, 2)), []
    if fraction > TrainConfig().foreground_fraction:
        said.append("one patch of a batch is centred on a label on average")
    shares = [
        sum(counts.values()) / np.prod(shape)
        for shape, counts in zip(fingerprint.shapes, fingerprint.label_voxels)
        if counts
    ]
    if shares and np.median(shares) < RARE and chance < 0.5:
        # of B patches none is centred on a label with (1 − fraction)^B
        fraction = max(fraction, round(1 - LABELLESS ** (1 / batch), 2))
        said = [f"labels fill {100 * np.median(shares):.2g} % of a case: so {100 * LABELLESS:g} % of batches miss them"]
    empty = sum(not counts for counts in fingerprint.label_voxels)
    if empty:
        said.append(
            f"{empty} of {len(fingerprint.label_voxels)} measured cases have no label; their patches come from anywhere"
        )
    if said:
        reasons["train.foreground_fraction"] = "; ".join(said)
    return TrainConfig(batch_size=batch, foreground_fraction=fraction)


def _text(values: Sequence[float] | np.ndarray) -> str:
    return " × ".join(f"{v:g}" for v in np.asarray(values, dtype=float).round(3))
