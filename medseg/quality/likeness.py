"""What training cases are like, and what sets another case apart from them, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from medseg.config import DataConfig, Section
from medseg.grid import Grid, axis_maps
from medseg.preprocess import PERCENTILES, Prepared
from medseg.quality.evidence import Evidence, Features, Floats, of_reference

# a case is unlike training from this excess on, whatever the leave-one-out says: rounding is no news
LEAST_EXCESS = 0.25
# so many training cases at most are compared with all others
COMPARED = 200
# differences along an axis are measured on about so many voxels
MEASURED = 2_000_000
# features of an image and of a label come in families; a range is taken to be at least this wide, in the family's
# units: logarithms (spacing, extent, noise, detail, volume), shares of the range of intensities, of the image, or SDs
FLOORS = {
    "spacing": 0.5,
    "extent": 0.4,
    "intensity": 0.1,
    "noise": 0.3,
    "detail": 0.1,
    "volume": 0.5,
    "position": 0.1,
    "brightness": 0.3,
}
IMAGE_FAMILIES = ("spacing", "extent", "intensity", "noise", "detail")
LABEL_FAMILIES = ("volume", "position", "brightness")
# a label in this share of the training cases is expected in every case
ALWAYS = 0.98
# a label cut by the edge in no more than this share of the training cases is not expected there
RARELY = 0.02
# raw intensities below it are air in Hounsfield units: MR and ultrasound have none
CT_AIR = -200.0


class Range(Section):
    """Where all but the outer 2 % of training lie, and the width that an excess is measured in."""

    low: float
    high: float
    width: float

    def excess(self, value: float) -> float:
        """How far beyond the range, in widths; 0 inside."""
        return max(self.low - value, value - self.high, 0.0) / self.width


class KnownLabel(Section):
    """In which share of the training cases a label is there, and in which share of these the edge cuts it."""

    present: float
    touching: float


class Profile(Section):
    """What the training cases are like. `ranges` are named FAMILY.PART, of a label LABEL/FAMILY.PART.

    `raw`: by channel the ranges of the lowest and highest intensity in the files. `beyond`: the excess that only
    1 in 40 training cases has, each compared with the others; a case is unlike training above it.
    """

    cases: int
    ranges: dict[str, Range]
    raw: tuple[tuple[Range, Range], ...]
    labels: dict[str, KnownLabel]
    orientations: tuple[str, ...]
    beyond: float


@dataclass(frozen=True)
class Novelty:
    """How unlike training a case is: by family the excess over `Profile.beyond`, from 1 on unlike; and in words."""

    image: Features
    labels: dict[str, Features]
    warnings: tuple[str, ...]


def profile_of(cases: Iterable[Prepared], data: DataConfig) -> Profile:
    """What these training cases are like; one is held at a time. Raises `ValueError` for none or one without label."""
    rows: list[Features] = []
    raw: list[Floats] = []
    orientations: set[str] = set()
    present, touching = np.zeros(len(data.foreground)), np.zeros(len(data.foreground))
    for prepared in cases:
        evidence = of_reference(prepared, data)
        row = image_features(prepared)
        for name, numbers in evidence.measured(prepared.grid).items():
            row |= {f"{name}/{key}": number for key, number in numbers.items()}
        rows.append(row)
        raw.append(prepared.raw.double().numpy())
        orientations.add(orientation(prepared.source))
        present += evidence.voxels > 0
        touching += [name in evidence.touching() for name in data.foreground]
    if not rows:
        raise ValueError("no case to make a profile of")
    names = sorted({name for row in rows for name in row})
    table = np.array([[row.get(name, np.nan) for name in names] for row in rows])
    floors = np.array([FLOORS[_family(name)] for name in names])
    extremes = np.stack(raw)[:, :, [0, -1]]
    return Profile(
        cases=len(rows),
        ranges=dict(zip(names, _ranges(table, floors))),
        raw=tuple((low, high) for low, high in (_ranges(e, np.ones(2)) for e in extremes.swapaxes(0, 1))),
        labels={
            name: KnownLabel(present=p / len(rows), touching=t / max(p, 1))
            for name, p, t in zip(data.foreground, present, touching)
        },
        orientations=tuple(sorted(orientations)),
        beyond=max(LEAST_EXCESS, _usual_excess(table, floors)),
    )


def novelty(profile: Profile, prepared: Prepared, evidence: Evidence) -> Novelty:
    """What sets a case apart from training. Numbers in the words are those found and those known."""
    found = {name: v for name, v in image_features(prepared).items() if name in profile.ranges}
    excess = {name: profile.ranges[name].excess(v) / profile.beyond for name, v in found.items()}
    image = {family: _most(excess, family) for family in IMAGE_FAMILIES}
    warnings = _image_words(profile, prepared, evidence.data, found, excess, image)
    labels = {}
    measured = evidence.measured(prepared.grid)
    touching = evidence.touching()
    for name, known in profile.labels.items():
        numbers = {k: v for k, v in measured.get(name, {}).items() if f"{name}/{k}" in profile.ranges}
        excess = {k: profile.ranges[f"{name}/{k}"].excess(v) / profile.beyond for k, v in numbers.items()}
        labels[name] = {family: _most(excess, family) for family in LABEL_FAMILIES}
        warnings += _label_words(name, known, profile, numbers, labels[name], name in touching)
    return Novelty(image, labels, tuple(warnings))


def image_features(prepared: Prepared) -> Features:
    """Numbers of an image alone, by FAMILY.PART; big volumes are measured on evenly spread lines."""
    found: Features = {}
    for axis, m in enumerate(axis_maps(prepared.source, prepared.grid)):
        spacing = prepared.source.spacing_mm[m.source]
        found[f"spacing.{axis}"] = math.log(spacing)
        found[f"extent.{axis}"] = math.log(spacing * prepared.source.shape[m.source])
    for c, (channel, raw) in enumerate(zip(prepared.image, prepared.raw.double().numpy())):
        flat = channel.flatten()
        values = flat[:: max(1, len(flat) // MEASURED)].numpy()
        for percent, value in zip(PERCENTILES[1:-1], np.percentile(values, PERCENTILES[1:-1])):
            found[f"intensity.{c}.{percent:g}"] = float(np.arcsinh(value))
        # where zero lies in the range: CT has air far below it, whatever the scale
        found[f"intensity.{c}.zero"] = float(np.clip(raw[1] / max(raw[-2] - raw[1], 1e-6), -2, 2))
        found |= _texture(channel, c, float(values.std()))
    return found


def orientation(grid: Grid) -> str:
    """Where the axes of a volume run to, as in RAS; empty for pictures."""
    if grid.spatial_dims < 3:
        return ""
    names = ("LR", "PA", "IS")
    directions = (grid.affine[:3, a] for a in range(3))
    return "".join(names[w][int(d[w] > 0)] for d in directions for w in [int(np.abs(d).argmax())])


def _ranges(table: Floats, floors: Floats) -> list[Range]:
    low, high = np.nanquantile(table, [0.01, 0.99], axis=0)
    return [Range(low=float(a), high=float(b), width=float(max(b - a, w))) for a, b, w in zip(low, high, floors)]


def _usual_excess(table: Floats, floors: Floats) -> float:
    """The largest excess of any feature that 97.5 % of the cases stay below, each against the others."""
    if len(table) < 2:
        return 1.0
    worst = []
    for n in np.unique(np.linspace(0, len(table) - 1, COMPARED).astype(int)):
        others = np.delete(table, n, axis=0)
        known = ~np.isnan(others).all(axis=0)
        low, high = np.nanquantile(others[:, known], [0.01, 0.99], axis=0)
        value = table[n, known]
        excess = np.maximum(low - value, value - high) / np.maximum(high - low, floors[known])
        worst.append(np.nanmax(excess, initial=0.0))
    return float(np.quantile(worst, 0.975, method="higher"))


def _texture(channel: torch.Tensor, c: int, sd: float) -> Features:
    """Noise: the typical second difference in SDs. Detail: differences of neighbours against those further apart."""
    found: Features = {}
    second = []
    for axis, size in enumerate(channel.shape):
        if size < 9:
            continue
        thin = [slice(None)] * channel.ndim
        if channel.ndim > 1:
            step = math.ceil((channel.numel() / MEASURED) ** (1 / (channel.ndim - 1)))
            thin = [slice(None, None, 1 if a == axis else step) for a in range(channel.ndim)]
        lines = channel[tuple(thin)].movedim(axis, 0)
        near, far, farther = (float((lines[k:] - lines[:-k]).square().mean()) + 1e-9 for k in (1, 2, 4))
        found[f"detail.{c}.{axis}"] = math.log(near / far) / 2
        found[f"detail.{c}.{axis}.coarse"] = math.log(far / farther) / 2
        bend = (lines[2:] - 2 * lines[1:-1] + lines[:-2]).abs()
        # padding around an image is flat, and says nothing about noise
        bend = bend[bend > 0]
        second.append(float(bend.median()) if len(bend) else 0.0)
    if second:
        # noise is in all directions, an edge or an artefact in some
        found[f"noise.{c}"] = math.log(min(second) / max(sd, 1e-6) + 1e-4)
    return found


def _image_words(
    profile: Profile, prepared: Prepared, data: DataConfig, found: Features, excess: Features, image: Features
) -> list[str]:
    words = []
    known = profile.ranges
    constant = set()
    for c, (name, raw, (lows, highs)) in enumerate(zip(data.channels, prepared.raw.double().numpy(), profile.raw)):
        ours = f"minimum {_say(raw[0])}, maximum {_say(raw[-1])}"
        theirs = f"minimum {_span(lows.low, lows.high)}, maximum {_span(highs.low, highs.high)}"
        if raw[0] == raw[-1]:
            constant.add(str(c))
            words.append(f"{name if len(data.channels) > 1 else 'the image'} is constant ({_say(raw[0])})")
        elif raw[1] < CT_AIR and lows.low > CT_AIR:
            words.append(f"intensities look like CT ({ours}); the model was trained on {name} ({theirs})")
        elif far := {k: v for k, v in excess.items() if k.startswith(f"intensity.{c}.") and v > 1}:
            which = max(far, key=far.__getitem__)
            decided = _spread_words(which.removeprefix(f"intensity.{c}."), found[which], known[which])
            words.append(f"intensities of {name} are spread unlike training: {decided} ({ours}; training had {theirs})")
    for family, title, unit in (("spacing", "spacing", "mm"), ("extent", "field of view", "mm")):
        if image[family] > 1:
            axes = [name for name in found if _family(name) == family]
            ours = " × ".join(_say(math.exp(found[name])) for name in axes)
            theirs = " × ".join(_span(math.exp(known[name].low), math.exp(known[name].high)) for name in axes)
            unit = unit if data.spatial_dims == 3 else "pixels"
            words.append(f"{title} {ours} {unit}; training had {theirs} {unit}")
    # nothing can be said of the noise and detail of a constant channel
    textured = {
        k: e for k, e in excess.items() if _family(k) in ("noise", "detail") and k.split(".")[1] not in constant
    }
    words += _texture_words(profile, prepared.grid, found, textured)
    axes_to = orientation(prepared.source)
    if axes_to not in profile.orientations:
        words.append(f"axes run to {axes_to} in the file; training had {', '.join(profile.orientations)}")
    return words


def _spread_words(which: str, value: float, known: Range) -> str:
    """`which`: the percentile, or `zero`, whose `value` is furthest from what is known."""
    if which == "zero":
        what = "the 0.5th percentile, as a share of the range from there to the 99.5th,"
        return f"{what} is {_say(value)}, in training {_span(known.low, known.high)}"
    ours, low, high = (math.sinh(v) for v in (value, known.low, known.high))
    return f"the {which}th percentile is {_say(ours)} once normalised, in training {_span(low, high)}"


def _texture_words(profile: Profile, grid: Grid, found: Features, excess: Features) -> list[str]:
    """`excess`: of noise and detail."""
    far = {name: found[name] for name, e in excess.items() if e > 1}
    low = [name for name, value in far.items() if value < profile.ranges[name].low]
    for name, value in far.items():
        if _family(name) == "noise" and name not in low:
            times = math.exp(value - profile.ranges[name].high)
            return [f"noisier than any training image ({_say(times)} times)"]
    if low:
        times = max(math.exp(profile.ranges[name].low - far[name]) for name in low)
        lost: dict[int, float] = {}
        for name in low:
            if _family(name) == "detail":
                axis = int(name.split(".")[2])
                lost[axis] = max(lost.get(axis, 0.0), profile.ranges[name].low - far[name])
        # blur along one axis takes a little from the others too
        axes = [axis for axis in sorted(lost) if lost[axis] >= max(lost.values()) / 2]
        # a picture has no directions, and all of them need no names
        named = grid.spatial_dims == 3 and len(axes) in (1, 2)
        along = f" along {' and '.join(_direction(grid, a) for a in axes)}" if named else ""
        return [f"blurred: the finest detail{along} is {_say(times)} times weaker than in any training image"]
    return ["finer in detail than any training image; are the voxels of the size they claim?"] if far else []


def _label_words(
    name: str, known: KnownLabel, profile: Profile, found: Features, strange: Features, touches: bool
) -> list[str]:
    words = []
    if not found and known.present >= ALWAYS:
        return [f"{name} was not found; {known.present:.0%} of the training cases had it"]
    if touches and known.touching <= RARELY:
        often = "never" if known.touching == 0 else f"in {known.touching:.0%} of the cases"
        words.append(f"{name} touches the edge of the image (in training: {often})")
    if strange["volume"] > 1:
        there = profile.ranges[f"{name}/volume"]
        unit = "ml" if "position.2" in found else "% of the image"
        ours, low, high = (math.exp(v) for v in (found["volume"], there.low, there.high))
        words.append(f"{name}: {_say(ours)} {unit}, training had {_span(low, high)} {unit}")
    if strange["position"] > 1:
        words.append(f"{name} lies where no training case had it")
    if strange["brightness"] > 1:
        words.append(f"{name} covers brighter or darker tissue than in training")
    return words


def _direction(grid: Grid, axis: int) -> str:
    return ("R-L", "A-P", "S-I")[int(np.abs(grid.affine[:3, axis]).argmax())]


def _say(number: float) -> str:
    text = f"{number:,.0f}" if abs(number) >= 10 else f"{number:.2g}"
    return text.replace("-", "−")


def _span(low: float, high: float) -> str:
    a, b = _say(low), _say(high)
    return a if a == b else f"{a} to {b}" if low < 0 else f"{a}–{b}"


def _family(name: str) -> str:
    return name.split("/")[-1].split(".")[0]


def _most(excess: Features, family: str) -> float:
    return max((v for name, v in excess.items() if _family(name) == family), default=0.0)
