"""Every setting of medseg: one frozen class per section of the YAML, read and written here; no defaults elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from medseg.errors import ConfigError
from medseg.region_order import larger_first, own_values

BACKGROUND = "background"
IGNORE = "ignore"

# mappings that are no sections: an empty one, laid over another, clears it
CLEARED = ("arguments", "min_size_mm3")

# the 256th value of a byte marks ignored voxels
MAX_CHANNELS = 255


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"{list(pair)} found, expected the smaller number first")
    return pair


# the colours of Okabe and Ito (2008), told apart by colour-blind eyes, those first that show best on a grey image;
# repeated from the eighth label on
COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")

Fraction = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[float, float], AfterValidator(_rising)]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: values are frozen, unknown keys are refused, NaN is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DataConfig(Section):
    """What goes in and what comes out.

    `labels` maps a name to its value in the label files, or, for regions (which may overlap), to all values that make
    the region. `background` is 0 and need not be listed; voxels of the label `ignore` take no part in training.
    """

    spatial_dims: Literal[1, 2, 3] = 3
    channels: tuple[str, ...] = Field(("image",), min_length=1)
    labels: dict[str, int | tuple[int, ...]] = Field(default_factory=dict)
    region_values: tuple[int, ...] = ()
    """For regions only: the value written for each region, in the order in which later ones overwrite earlier ones.
    Left out: the larger regions first, each as the smallest value that only it and those around it have."""

    @model_validator(mode="before")
    @classmethod
    def _ordered(cls, values: Any) -> Any:
        labels = values.get("labels") if isinstance(values, Mapping) else None
        if not isinstance(labels, Mapping) or values.get("region_values"):
            return values
        foreground = {n: v if isinstance(v, (list, tuple)) else (v,) for n, v in labels.items()}
        others = {n: labels[n] for n in (BACKGROUND, IGNORE) if foreground.pop(n, None) is not None}
        whole = all(isinstance(v, int) for made in foreground.values() for v in made)
        if not whole or not any(isinstance(labels[n], (list, tuple)) for n in foreground):
            return values
        regions = larger_first(foreground)
        return {**values, "labels": others | {n: labels[n] for n in regions}, "region_values": own_values(regions)}

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.labels.get(BACKGROUND, 0) != 0:
            raise ValueError(f"label `{BACKGROUND}` must be 0, found {self.labels[BACKGROUND]}")
        if self.labels and not self.foreground:
            raise ValueError(f"labels {list(self.labels)} found, expected at least one to be learnt")
        for name, values in self.labels.items():
            made = values if isinstance(values, tuple) else (values,)
            if not name.strip() or not made:
                raise ValueError(f"label {name!r} with values {list(made)} found, expected a name and at least one")
            for value in made:
                if not 0 <= value <= 65535:
                    raise ValueError(f"label `{name}`: value {value} is outside 0..65535")
            if self.is_regions and name != BACKGROUND and 0 in made:
                raise ValueError(f"label `{name}` has the value 0, which is the background; expected others")
        if isinstance(ignored := self.labels.get(IGNORE), tuple) and len(ignored) != 1:
            raise ValueError(f"label `{IGNORE}` has {len(ignored)} values, expected one; merge them in the label files")
        values = self.out_values + (() if self.ignore_value is None else (self.ignore_value,))
        if not self.is_regions and len(set(values)) != len(values):
            raise ValueError("two labels share one value; map a name to a list of values to make a region")
        if not self.is_regions and self.out_channels > MAX_CHANNELS:
            raise ValueError(f"{len(self.foreground)} labels found, expected at most {MAX_CHANNELS - 1}")
        if len(set(self.region_values)) < len(self.region_values) or not all(
            0 < v <= 65535 for v in self.region_values
        ):
            raise ValueError(f"region_values {list(self.region_values)}: expected different numbers from 1 to 65535")
        if self.is_regions and len(self.region_values) != len(self.foreground):
            raise ValueError(
                f"{len(self.foreground)} regions need as many region_values (regions_class_order in dataset.json), "
                f"found {len(self.region_values)}"
            )
        return self

    @property
    def is_regions(self) -> bool:
        """Whether any label stands for several values: then labels may overlap and each is its own yes or no."""
        return any(isinstance(v, tuple) and n != IGNORE for n, v in self.labels.items())

    @property
    def foreground(self) -> tuple[str, ...]:
        """Names of the labels that are predicted, in the order of the file."""
        return tuple(n for n in self.labels if n not in (BACKGROUND, IGNORE))

    @property
    def ignore_value(self) -> int | None:
        """The value of `ignore` in the label files, if there is one."""
        value = self.labels.get(IGNORE)
        return value[0] if isinstance(value, tuple) else value

    @property
    def out_channels(self) -> int:
        """Channels of the network's scores: background and labels, or one per region."""
        return len(self.foreground) + (0 if self.is_regions else 1)

    @property
    def out_values(self) -> tuple[int, ...]:
        """The value written for each output channel (regions: for each region)."""
        if self.is_regions:
            return self.region_values
        return (0, *(v for n in self.foreground if not isinstance(v := self.labels[n], tuple)))


class IntensityConfig(Section):
    """How one channel is normalised: `clip` first, then (x − mean) / sd with the image's own or fixed numbers."""

    clip: Range | None = None
    normalise: Literal["image", "fixed", "none"] = "image"
    mean: float = 0.0
    sd: PositiveFloat = 1.0


class PreprocessConfig(Section):
    """From a file's grid to the network's grid. Give `spacing_mm`, or `shape` for pictures without a physical size."""

    orient: bool = True
    """Turn the axes to the closest right-anterior-superior order (not for pictures); false: all that counts axes counts
    those of the files."""
    crop: Literal["none", "nonzero"] = "none"
    spacing_mm: tuple[PositiveFloat, ...] | None = None
    shape: tuple[PositiveInt, ...] | None = None
    intensity: tuple[IntensityConfig, ...] = Field((IntensityConfig(),), min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> PreprocessConfig:
        if self.spacing_mm is not None and self.shape is not None:
            raise ValueError("give spacing_mm or shape, not both")
        return self


class NetworkConfig(Section):
    """Architecture; `medseg.list_networks()` gives the names. Rates, dilations and strides may differ by axis.

    Each network's file says which of these settings it reads, and its `DEFAULTS` are the published ones.
    """

    name: str = "deeplabv3plus"
    arguments: dict[str, Any] = Field(default_factory=dict)
    """For `monai.CLASS` only: arguments of that class, beside dimensions and channels."""
    encoder: Literal["light", "vgg16", "vgg16_frontend", "resnet18", "resnet34", "resnet50", "resnet101"] = "light"
    channels: tuple[PositiveInt, ...] = Field((32, 64, 128), min_length=1)
    """Channels of the stages of the `light` encoder, of the U-Nets and of the dilated stack."""
    width: PositiveFloat = 1.0
    """Factor on every number of channels between image and logits; other than 1: rounded to multiples of 8."""
    hidden_channels: PositiveInt = 1024
    """Channels of the layers that were fully connected in VGG-16."""
    output_stride: Literal[1, 2, 4, 8, 16, 32, 64, 128, 256] = 4
    strides: tuple[tuple[PositiveInt, ...], ...] | None = None
    """Stride of every halving step by axis, from the image down; null: 2 on all axes."""
    multi_grid: tuple[PositiveInt, ...] = Field((1,), min_length=1)
    """Factors on the dilation of the blocks of the last stage, repeated to its length."""
    dilations: tuple[PositiveInt | tuple[PositiveInt, ...], ...] = Field((1, 2, 5), min_length=1)
    """Dilation of one layer after the other, where a network is a sequence of them."""
    norm: Literal["batch", "instance", "group", "none"] = "instance"
    leak: Fraction = 0.01
    """Slope of the rectifiers below zero, in heads and in the `light` encoder; 0 is ReLU."""
    aspp_rates: tuple[PositiveInt | tuple[PositiveInt, ...], ...] = Field((2, 4, 6), min_length=1)
    aspp_channels: PositiveInt = 64
    image_pooling: bool = True
    pooling_window: tuple[PositiveInt, ...] | None = None
    """Voxels of the image over which image pooling takes its mean; null: all that the network sees at a time."""
    separable: bool = False
    """Dilated convolutions of ASPP and decoder as one per channel followed by a 1×1."""
    dropout: Fraction = 0.1
    skip_channels: PositiveInt = 32
    decoder_channels: PositiveInt = 32
    upsampling: Literal["subpixel", "interpolate", "resize"] = "subpixel"
    """How coarse maps reach the image's size: sub-pixel convolution; linear interpolation that leaves map voxel i on
    voxel i·stride; or `resize`, linear between voxel centres, as torchvision does."""
    context: Literal["basic", "large"] = "basic"
    gated: bool = True
    """Gated units in the dilated stack; false: plain rectified convolutions."""
    scales: tuple[PositiveFloat, ...] = Field((1.0,), min_length=1)
    """Sizes of the image that the network sees with shared weights, 1 the image itself."""
    scale_fusion: Literal["mean", "max", "attention"] = "mean"


class AugmentConfig(Section):
    """Random changes of a training batch; `p_…` are probabilities per sample, pairs are the ranges drawn from."""

    p_affine: Fraction = 0.5
    """The others stay as sharp as the images of inference are: interpolation blurs, if little."""
    rotation_deg: tuple[float, ...] = (20.0, 20.0, 20.0)
    """Largest angle about each axis (2D: one angle)."""
    scale: PositiveRange = (0.8, 1.25)
    stretch: NotNegative = 0.0
    """Largest further change of scale of each axis alone: 0.1 is up to 1.1 times longer or shorter."""
    shear: NotNegative = 0.0
    """Largest shift of each axis along each other one, in mm per mm."""
    shift: Fraction = 0.05
    """Largest shift as a fraction of the patch."""
    flip_axes: tuple[int, ...] = (0, 1, 2)
    """What a file says of it is left out where labels tell left from right, which `--set` alone mirrors."""
    p_flip: Fraction = 0.5
    p_intensity: Fraction = 0.5
    brightness: float = Field(0.2, ge=0)
    """Largest addition, in standard deviations of the normalised image."""
    contrast: Range = (0.75, 1.25)
    gamma: PositiveRange = (0.7, 1.5)
    """Exponents for `p_gamma`, and for `p_gamma_inverted`, which bends the negative of the image."""
    p_gamma: Fraction = 0.2
    p_gamma_inverted: Fraction = 0.0
    noise: float = Field(0.1, ge=0)
    p_noise: Fraction = 0.3
    blur_voxels: PositiveRange = (0.5, 1.0)
    p_blur: Fraction = 0.1
    low_resolution: PositiveRange = (0.5, 1.0)
    p_low_resolution: Fraction = 0.1
    bias_field: NotNegative = 0.2
    """Largest coefficient of each term of the logarithm of a slow change of brightness across the patch."""
    p_bias_field: Fraction = 0.0


class LossConfig(Section):
    """Cross-entropy + soft Dice (regions: binary cross-entropy + soft Dice)."""

    dice_weight: float = Field(1.0, ge=0)
    cross_entropy_weight: float = Field(1.0, ge=0)
    batch_dice: bool = True
    """Sum over the batch before the ratio: steadier where a label is rare."""
    smooth: PositiveFloat = 1e-5
    focal: NotNegative = 0.0
    """Exponent of focal loss (Lin et al. 2017): how much less cross-entropy looks at voxels that are right already."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target of cross-entropy that is spread over all labels (Szegedy et al. 2016)."""
    boundary_weight: NotNegative = 0.0
    """What voxels beside another label count more in cross-entropy, after the weight map of U-Net (2015)."""

    @model_validator(mode="after")
    def _one_shape(self) -> LossConfig:
        if self.focal and self.label_smoothing:
            raise ValueError("focal and label_smoothing both found, expected one of them; set the other to 0")
        return self


class TrainConfig(Section):
    """The training loop. One of `epochs` and `time_budget_s` ends it; the learning rate follows the same clock."""

    epochs: PositiveInt | None = None
    time_budget_s: PositiveFloat | None = 1200.0
    steps_per_epoch: PositiveInt = 100
    batch_size: PositiveInt = 4
    optimizer: Literal["muon", "adamw"] = "muon"
    """`muon`: steps of one size in every direction for convolutions, AdamW for norms and biases; see `muon.py`."""
    learning_rate: PositiveFloat = 4e-3
    weight_decay: float = Field(1e-2, ge=0)
    warm_up: Fraction = 0.02
    """Share of the schedule in which the learning rate rises; then it falls as (1 − progress)^0.9."""
    pretrained_factor: PositiveFloat = 1.0
    """What the learning rate of weights from elsewhere is multiplied by; see docs/recipe.md for what it is worth."""
    freeze_share: Fraction = 0.0
    """Share of the schedule in which weights from elsewhere stand still, if the network has others, so that what those
    ask for at first does not spoil what was learnt before (Kumar et al. 2022, arXiv:2202.10054). Running statistics of
    batch norms follow the new data all the while."""
    clip_gradient: PositiveFloat = 5.0
    foreground_fraction: Fraction = 0.33
    """Share of patches centred on a labelled voxel, the label drawn evenly from those in the case."""
    seed: int = Field(0, ge=0, lt=2**32)
    precision: Literal["auto", "32", "bf16"] = "auto"
    deterministic: bool = False
    save_every_s: PositiveFloat = 120.0
    validation_share: Fraction = 0.05
    """Largest share of a time budget that validation while training may take, but for an eighth of it more at the end;
    where there is no time for one case, none is looked at."""
    calibration_share: Fraction = 0.15
    """Time after training, as a share of it, in which windows, copies and post-processing are chosen, and what Dice to
    expect of a case is learnt, the least of it where that takes longer too; 0: none of it. What there is no time for
    is not chosen."""

    @model_validator(mode="after")
    def _one_end(self) -> TrainConfig:
        if (self.epochs is None) == (self.time_budget_s is None):
            raise ValueError("give exactly one of epochs and time_budget_s (the other null)")
        return self


class WindowsConfig(Section):
    """How a volume is cut for the network; training cuts patches of `patch_size`.

    `blend`: windows that share `overlap` of their size, their scores averaged with weights that fall towards the edge.
    `halo`: tiles side by side that also see `halo` voxels around them. `whole`: the volume in one pass, where it fits.
    """

    patch_size: tuple[PositiveInt, ...] = (64, 64, 64)
    mode: Literal["blend", "halo", "whole"] = "blend"
    tile_size: tuple[PositiveInt, ...] | None = None
    """Voxels of a window or tile at inference; null: those of a patch."""
    halo: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Voxels that a tile sees beyond each of its sides; null: half a patch."""
    whole_voxels: PositiveInt | None = None
    """Volumes of more voxels are not done whole but blended; null: any that memory holds are done whole."""
    overlap: float = Field(0.5, ge=0, lt=1)
    batch_size: PositiveInt | None = None
    """Windows in one go; null: as many as memory takes on a GPU, a few megabytes of scores on a CPU."""
    flip_axes: tuple[int, ...] = ()
    """Axes along which copies are mirrored, in all combinations; scores are averaged."""
    shifts: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] = ()
    """Copies moved by so many voxels along each axis, so that the strides of the network meet other voxels; those that
    are mirrored and those that are moved take turns."""
    scales: tuple[PositiveFloat, ...] = Field((1.0,), min_length=1)
    """Sizes of copies that the network sees, 1 the image itself; scores are averaged."""
    skip_air: Literal["auto", "on", "off"] = "auto"
    """Windows outside the body are background without a look; auto: in CT only. None is skipped where intensities are
    clipped above -500 HU, as plans for soft tissue do: there fat or lung may have the value of air."""


class PostprocessConfig(Section):
    """What is done to the probabilities before they become labels, and to the labels after (see `postprocess.py`).

    The probabilities: a conditional random field. A pair of voxels with different labels costs `crf_compatibility` ×
    (`crf_smoothness_weight` × a Gaussian of their distance + `crf_appearance_weight` × a Gaussian of their distance and
    of their intensities' difference), both divided by the Gaussian's sum around each of the two. mm are pixels of the
    file where pictures have no size in mm.

    The labels, on the file's grid: `largest_component`, then `min_size_mm3`, then `fill_holes`, each for the labels it
    names. Not with regions: the written map says one value where several regions may lie over each other, so what a
    region has under its removed part is unknown.
    """

    crf: bool = False
    crf_iterations: PositiveInt = 5
    crf_smoothness_weight: float = Field(1.0, ge=0)
    crf_smoothness_mm: float = Field(1.0, ge=1e-3)
    crf_appearance_weight: float = Field(2.0, ge=0)
    crf_appearance_mm: float = Field(2.0, ge=1e-3)
    crf_intensity_sd: float = Field(0.25, ge=1e-3)
    """In standard deviations of the normalised image, all channels together."""
    crf_compatibility: PositiveFloat = 1.0
    crf_radius_mm: PositiveFloat = 5.0
    """Voxels further apart do not see each other."""
    crf_radius_voxels: PositiveInt = 5
    """Nor do those that are further apart along an axis; time grows with the number of voxels in the radius."""
    largest_component: tuple[str, ...] = ()
    """Labels of which only the largest connected part is kept; the others become background."""
    min_size_mm3: dict[str, NotNegative] = Field(default_factory=dict)
    """Connected parts of a label below this size become background. 3D: mm³. 2D: mm², which are pixels of the file
    where pictures have no size in mm. 1D: mm."""
    fill_holes: tuple[str, ...] = ()
    """Labels whose enclosed background is filled; other labels inside stay."""


class Config(Section):
    """A whole run."""

    schema_version: Literal[1] = 1
    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    network: NetworkConfig = NetworkConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    windows: WindowsConfig = WindowsConfig()
    postprocess: PostprocessConfig = PostprocessConfig()

    @model_validator(mode="after")
    def _known_labels(self) -> Config:
        for key in ("largest_component", "min_size_mm3", "fill_holes"):
            names = tuple(getattr(self.postprocess, key))
            if names and self.data.is_regions:
                raise ValueError(f"postprocess.{key} found, but data.labels are regions; expected none of it there")
            unknown = [name for name in names if name not in self.data.foreground]
            if unknown:
                known = ", ".join(self.data.foreground) or "none"
                raise ValueError(f"postprocess.{key}: no label `{unknown[0]}`, expected some of data.labels: {known}")
        return self

    @model_validator(mode="after")
    def _known_air(self) -> Config:
        dims, how = self.data.spatial_dims, self.preprocess.intensity[0].normalise
        if self.windows.skip_air == "on" and (dims != 3 or how != "fixed"):
            raise ValueError(
                f"windows.skip_air: on found with {dims} dimensions and preprocess.intensity[0].normalise: {how}, "
                "expected 3 and fixed: elsewhere it is not known what is air; use auto or off"
            )
        return self

    @model_validator(mode="after")
    def _lengths(self) -> Config:
        dims = self.data.spatial_dims
        for where, value in (
            ("preprocess.spacing_mm", self.preprocess.spacing_mm),
            ("preprocess.shape", self.preprocess.shape),
            ("windows.patch_size", self.windows.patch_size),
            ("windows.tile_size", self.windows.tile_size),
            ("windows.halo", self.windows.halo),
            *((f"network.strides[{n}]", s) for n, s in enumerate(self.network.strides or ())),
            *((f"windows.shifts[{n}]", s) for n, s in enumerate(self.windows.shifts)),
        ):
            if value is not None and len(value) != dims:
                raise ValueError(f"{where} has {len(value)} numbers, expected {dims} (data.spatial_dims)")
        if len(self.preprocess.intensity) != len(self.data.channels):
            raise ValueError(
                f"preprocess.intensity has {len(self.preprocess.intensity)} entries, expected one for each of the "
                f"{len(self.data.channels)} data.channels"
            )
        angles = len(self.augment.rotation_deg)
        if (dims == 3 and angles != 3) or (dims == 2 and not angles):
            raise ValueError(
                f"augment.rotation_deg has {angles} numbers, expected one {'per axis' if dims == 3 else 'angle'}"
            )
        for where, axes in (
            ("augment.flip_axes", self.augment.flip_axes),
            ("windows.flip_axes", self.windows.flip_axes),
        ):
            bad = [a for a in axes if not 0 <= a < dims]
            if len(set(axes)) < len(axes):
                raise ValueError(f"{where}: {list(axes)} found, expected every axis once")
            if bad:
                raise ValueError(f"{where}: {bad[0]} is no axis of {dims} dimensions (0..{dims - 1})")
        return self


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML or JSON file holds. Raises `ConfigError` if it cannot be read or holds something else."""
    # YAML reads JSON too, but not with tabs between its words
    read = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        values = read(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        form = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(f"{path}: is not valid {form}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, expected sections such as `train:` with keys below")
    return values


def parse_assignment(text: str) -> tuple[tuple[str, ...], Any]:
    """`section.key=value` as (("section", "key"), value); the value is read as YAML. Raises `ConfigError`."""
    name, equals, value = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys) or len(keys) < 2:
        raise ConfigError(f"--set {text}: expected section.key=value, such as train.batch_size=2")
    try:
        return keys, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML ({' '.join(str(error).split())})") from error


def overlay(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with each of `changes` laid over it, section by section; lists and labels are replaced as a whole.

    Of `CLEARED`, which hold what they like by name, an empty one takes all away that is there.
    """
    result = dict(base)
    for change in changes:
        for key, value in change.items():
            old = result.get(key)
            whole = key in ("labels",) or not (isinstance(old, Mapping) and isinstance(value, Mapping))
            whole = whole or (key in CLEARED and not value)
            result[key] = value if whole else overlay(old or {}, value)
    return result


def nest(keys: Iterable[str], value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for keys ("a", "b")."""
    for key in reversed(tuple(keys)):
        value = {key: value}
    return dict(value)


def make_config(values: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """A checked `Config`. Raises `ConfigError` naming every key that is unknown or wrong, and the keys that exist."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e) for e in error.errors(include_url=False))) from error


def check_part(values: Mapping[str, Any], *, source: str) -> NetworkConfig:
    """Settings that are to be laid over a plan: their network section, with the defaults of what they leave out.

    Raises `ConfigError` for unknown keys and wrong values. What only the whole can tell, lengths and names of labels,
    is left to `make_config`.
    """
    try:
        Config.model_validate(overlay(Config().model_dump(mode="json"), values))
    except ValidationError as error:
        wrong = [_explain(e) for e in error.errors(include_url=False) if e["loc"]]
        if wrong:
            raise ConfigError(f"{source}: " + "; ".join(wrong)) from error
    return NetworkConfig.model_validate(values.get("network", {}))


def make_data_config(
    *,
    spatial_dims: int,
    channels: Iterable[str],
    labels: Mapping[str, int | tuple[int, ...]],
    region_values: Iterable[int],
    source: str,
) -> DataConfig:
    """A checked `DataConfig` of what a data set says. Raises `ConfigError` naming `source`."""
    values = {"spatial_dims": spatial_dims, "channels": tuple(channels), "labels": dict(labels)}
    try:
        return DataConfig.model_validate(values | {"region_values": tuple(region_values)})
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(e) for e in error.errors(include_url=False))) from error


def read_config(path: Path) -> Config:
    """The configuration in a YAML file; keys left out keep their defaults."""
    return make_config(read_yaml(path), source=str(path))


def dump_yaml(config: Config, reasons: Mapping[str, str] | None = None) -> str:
    """The configuration as YAML; `reasons` maps `section.key` to a comment that is set beside the key."""
    reasons = reasons or {}
    lines: list[str] = []
    for section, values in config.model_dump(mode="json").items():
        if not isinstance(values, dict):
            lines.append(f"{section}: {_flow(values)}")
            continue
        lines += ["", f"{section}:"]
        for key, value in values.items():
            reason = reasons.get(f"{section}.{key}")
            lines += [f"  # {reason}"] if reason else []
            lines.append(f"  {key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    # JSON is YAML; a float such as 1e-05 must keep a dot or YAML 1.1 reads a string
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in text and "." not in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}.0e{exponent}"
    return text


def _explain(error: Any) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        parent: Any = Config
        for key in error["loc"][:-1]:
            field = parent.model_fields.get(key) if isinstance(parent, type) and issubclass(parent, Section) else None
            parent = field.annotation if field is not None else None
        known = sorted(parent.model_fields) if isinstance(parent, type) and issubclass(parent, Section) else []
        return f"unknown key `{where}`" + (f"; the keys there are {', '.join(known)}" if known else "")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: found {error['input']!r}: {message[:1].lower()}{message[1:]}"


def settings_from(assignments: Iterable[str], *more: Mapping[str, Any]) -> dict[str, Any]:
    """`section.key=value` texts as one nested mapping, with `more` laid over. Raises `ConfigError`."""
    nested = (nest(*parse_assignment(text)) for text in assignments)
    return overlay({}, *nested, *more)
