"""What the cases of a data set say of each other: kinds that are mixed, cases far from the others, odd label values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medseg.cases import Dataset, Labels
from medseg.config import BACKGROUND, IGNORE
from medseg.errors import ConfigError
from medseg.findings import CaseFacts, Finding, Intensities, is_flat
from medseg.metrics.codes import members
from medseg.regions import check_labels
from medseg.units import AIR_HU, is_ct

# spacing or extent this many times above or below the median of the data set
OUTLIER_FACTOR = 3.0
# fewer cases than this have no meaningful median
OUTLIER_CASES = 5
# a CT begins with air, at −1000 HU or below
WITH_AIR_HU = -900.0
# width of the intensities of a CT, this many times that of the median case or less
SCALE_FACTOR = 10.0
# a voxel beyond the percentiles by this many times what lies between them is no tissue, metal or contrast
ABSURD_FACTOR = 1e4
# more unnamed values than this are rather grey values or instances than labels
MOST_UNNAMED = 20
WHITE = 255
# colours of a label picture by index
Palette = Mapping[int, tuple[int, ...]]


def inconsistencies(
    dataset: Dataset, facts: Sequence[CaseFacts], palettes: Mapping[str, tuple[Path, Palette]]
) -> list[Finding]:
    """Findings on the data set as a whole. `palettes`: file and colours of the label picture of a case."""
    return [
        *_mixtures(facts),
        *_lost_colour(dataset, facts),
        *_outliers(facts),
        *_odd_intensities(dataset, facts),
        *_unused_labels(dataset, facts),
        *_lonely_labels(dataset, facts),
        *_impossible_labels(dataset, facts),
        *(_odd_values(facts) if dataset.labels is None else ()),
        *_moved_colours(palettes),
    ]


def _mixtures(facts: Sequence[CaseFacts]) -> list[Finding]:
    found = []
    for case, dims, usual in _odd_ones(facts, lambda f: len(f.shape)):
        found.append(Finding("error", case, "", f"{dims} axes", f"{usual} as most cases", "make data sets of one kind"))
    for case, channels, usual in _odd_ones(facts, lambda f: f.channels):
        # grey and colour pictures are brought together on reading
        if {channels, usual} != {1, 3} or not any(len(f.shape) == 2 for f in facts if f.case == case):
            fix = "make data sets of one kind"
            found.append(Finding("error", case, "", f"{channels} channels", f"{usual} as most cases", fix))
    volumes = [f for f in facts if len(f.shape) == 3]
    slices = [f.case for f in volumes if is_flat(f.shape)]
    if slices and len(slices) < len(volumes):
        text = f"{len(slices)} of {len(volumes)} cases are single slices, first {slices[0]}; the others are volumes"
        fix = "make data sets of one kind, or they are learnt as volumes of one slice"
        found.append(Finding("warning", "", "", text, "one kind of images", fix))
    codes = Counter(f.axcodes for f in facts if f.axcodes)
    if len(codes) > 1:
        listed = ", ".join(f"{code} {number}" for code, number in codes.most_common())
        text = f"orientations are mixed: {listed}"
        if len(slices) == len(volumes):
            fix = (
                "store them in one orientation: single slices are learnt as they lie in the file, and mirrored ones mix"
            )
            found.append(Finding("warning", "", "", text, "one orientation", fix))
        else:
            found.append(Finding("note", "", "", text, "", "nothing to do: axes are turned"))
    return found


def _lost_colour(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    coloured = [f.case for f in facts if f.is_coloured]
    if not coloured or len(dataset.channels) != 1:
        return []
    found = f"{len(coloured)} of {len(facts)} pictures are in colour and will be read as grey"
    return [
        Finding(
            "note", "", "", found, "one channel", "to keep three, plan and train with --set 'data.channels=[R,G,B]'"
        )
    ]


def _odd_ones(facts: Sequence[CaseFacts], value: Callable[[CaseFacts], int]) -> list[tuple[str, int, int]]:
    """Cases whose value is not the most frequent one: (case, value, most frequent)."""
    if not facts:
        return []
    usual = Counter(value(f) for f in facts).most_common(1)[0][0]
    return [(f.case, value(f), usual) for f in facts if value(f) != usual]


def _outliers(facts: Sequence[CaseFacts]) -> list[Finding]:
    found = []
    dims = Counter(len(f.shape) for f in facts)
    alike = [f for f in facts if len(f.shape) == dims.most_common(1)[0][0]]
    if len(alike) < OUTLIER_CASES:
        return []
    measures: tuple[tuple[str, Callable[[CaseFacts], npt.NDArray[np.float64]]], ...] = (
        ("spacing", lambda f: np.sort(f.spacing_mm)),
        ("extent", lambda f: np.sort(np.asarray(f.shape) * f.spacing_mm)),
    )
    for name, measure in measures:
        # sorted by size: turned images are compared like with like
        values = np.stack([measure(f) for f in alike])
        ratio = values / np.median(values, axis=0)
        odd = ((ratio > OUTLIER_FACTOR) | (ratio < 1 / OUTLIER_FACTOR)).any(axis=1)
        for n in np.flatnonzero(odd):
            found.append(
                Finding(
                    "warning",
                    alike[n].case,
                    "",
                    f"{name} {_mm(values[n])} mm",
                    f"about {_mm(np.median(values, axis=0))} mm as the median",
                    "check that it belongs to this data set",
                )
            )
    return found


# ---- intensities


def _odd_intensities(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    measured = [f for f in facts if f.intensities]
    found = []
    for f in measured:
        for n, channel in enumerate(f.intensities):
            beyond = max(channel.highest - channel.high, channel.low - channel.lowest)
            if channel.high > channel.low and beyond > ABSURD_FACTOR * (channel.high - channel.low):
                where = f"channel {n}: " if len(f.intensities) > 1 else ""
                text = f"{where}intensities from {channel.lowest:.4g} to {channel.highest:.4g}"
                expected = (
                    f"none so far from the others, of which 98 % lie from {channel.low:.4g} to {channel.high:.4g}"
                )
                found.append(
                    Finding("warning", f.case, "", text, expected, "correct the voxels that are no measurement")
                )
    for n in range(max((len(f.intensities) for f in measured), default=0)):
        channels = {f.case: f.intensities[n] for f in measured if len(f.intensities) > n and len(f.shape) == 3}
        named = n < len(dataset.channels) and is_ct(dataset.channels[n])
        # other units are arbitrary: each image is normalised by itself
        if not channels or not (named or (dataset.channels == ("image",) and _is_mostly_ct(channels))):
            continue
        with_air = [case for case, i in channels.items() if i.lowest <= WITH_AIR_HU]
        for case, i in channels.items():
            if with_air and i.lowest > AIR_HU:
                text = f"intensities begin at {i.lowest:g}"
                expected = f"about -1000 HU as in {len(with_air)} of {len(channels)} cases"
                fix = "subtract what was added, often 1024; nothing to do where the image has no air"
                found.append(Finding("warning", case, "", text, expected, fix))
        found += _other_scales(channels) if len(channels) >= OUTLIER_CASES else []
    return found


def _is_mostly_ct(channels: Mapping[str, Intensities]) -> bool:
    return sum(i.lowest <= WITH_AIR_HU for i in channels.values()) * 2 > len(channels)


def _other_scales(channels: Mapping[str, Intensities]) -> list[Finding]:
    widths = {case: i.high - i.low for case, i in channels.items()}
    usual = float(np.median(list(widths.values())))
    return [
        Finding(
            "warning",
            case,
            "",
            f"98 % of the intensities lie within {width:.4g}",
            f"about {usual:.4g} as the median case",
            "check that they are Hounsfield units: all cases are normalised by the same numbers",
        )
        for case, width in widths.items()
        if usual > 0 and not usual / SCALE_FACTOR <= width <= usual * SCALE_FACTOR
    ]


# ---- labels


def _unused_labels(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    if dataset.labels is None:
        return []
    present = {value for f in facts for value in f.label_voxels}
    # where no label map could be read, that is what is told
    if not present:
        return []
    unused = [name for name, value in dataset.labels.items() if name != "ignore" and not present & set(members(value))]
    unused = [name for name in unused if dataset.labels[name] != 0]
    if not unused:
        return []
    return [
        Finding(
            "warning",
            "",
            _description(dataset),
            f"{len(unused)} labels are in no case: {_listed(unused)}",
            "each label in at least one case",
            "remove them from the labels, or they train on nothing",
        )
    ]


def _lonely_labels(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    """Labels that one patient alone has: mistaken values, or nothing that could be learnt and judged both."""
    if sum(any(f.label_voxels) for f in facts) < OUTLIER_CASES:
        return []
    present = sorted({value for f in facts for value in f.label_voxels if value})
    patients = {case.id: case.group for case in dataset.cases}
    named = dataset.labels is not None
    labels: Labels = {f"value {value}": value for value in present} if dataset.labels is None else dataset.labels
    lonely = []
    for name, value in labels.items():
        cases = [f.case for f in facts if f.label_voxels.keys() & set(members(value))]
        # folds keep the cases of a patient together
        if value and name not in (BACKGROUND, IGNORE) and len({patients.get(case, case) for case in cases}) == 1:
            lonely.append(f"{name} in {cases[0]}")
    # grey values and instances are told as what they are
    if not lonely or (not named and len(present) > MOST_UNNAMED):
        return []
    fix = (
        "add cases that have them, or take them out of the labels: nothing of them is learnt where it is held back"
        if named
        else "correct the files if it is a mistake: each value becomes a label, unless --set data.labels says otherwise"
    )
    text = f"labels of one patient alone: {_listed(lonely)}"
    return [Finding("warning", "", _description(dataset), text, "each label in several ones", fix)]


def _impossible_labels(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    values = sorted({v for f in facts for v in f.label_voxels if v})
    labels: Labels = {f"label_{v}": v for v in values} if dataset.labels is None else dataset.labels
    # files without any label are told one by one
    if dataset.labels is None and not labels:
        return []
    try:
        check_labels(dataset, labels)
    except ConfigError as error:
        text = str(error).removeprefix(f"{dataset.path}: ")
        return [Finding("error", "", _description(dataset), text, "labels that can be learnt", "correct the labels")]
    return []


def _odd_values(facts: Sequence[CaseFacts]) -> list[Finding]:
    """What gives away that unnamed values were never meant as labels."""
    by_case = {f.case: {v for v in f.label_voxels if v} for f in facts}
    values = sorted(set().union(*by_case.values()))
    found = []
    if len(values) > MOST_UNNAMED:
        text = f"{len(values)} values in the labels, from {values[0]} to {values[-1]}, that nothing names"
        fix = "name them with --set data.labels, or correct them where they are grey values or instances"
        found.append(Finding("warning", "", "", text, "a few labels", fix))
    binary = {case: min(own) for case, own in by_case.items() if len(own) == 1}
    if len(binary) == sum(map(bool, by_case.values())) and WHITE in values and len(values) > 1:
        white = [case for case, value in binary.items() if value == WHITE]
        other = next(value for value in values if value != WHITE)
        text = f"{len(white)} of {len(binary)} labels hold 0 and 255, first {white[0]}; others hold 0 and {other}"
        found.append(Finding("warning", "", "", text, "one value for one label", "write one value, if it is one label"))
    return found


def _moved_colours(palettes: Mapping[str, tuple[Path, Palette]]) -> list[Finding]:
    """Palette pictures in which a colour stands for another index than in one before: the index is what is learnt."""
    known: dict[tuple[int, ...], tuple[int, Path]] = {}
    found = []
    for case, (file, palette) in palettes.items():
        # a palette that does not tell its colours apart says nothing
        if len(set(palette.values())) < len(palette):
            continue
        for index, colour in palette.items():
            first, where = known.setdefault(colour, (index, file))
            if first != index:
                text = f"the colour {colour} has index {index}, but {first} in {where.name}"
                fix = "save all labels with one palette, or as numbers: labels are told apart by the index"
                found.append(Finding("error", case, str(file), text, "one index for one colour", fix))
                break
    return found


def _description(dataset: Dataset) -> str:
    file = dataset.path / "dataset.json"
    return str(file) if file.is_file() else str(dataset.path)


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")


def _mm(values: npt.NDArray[np.float64]) -> str:
    return " × ".join(f"{v:.3g}" for v in values)
