"""What cases say of each other: intensities, orientations, slices among volumes, unnamed values, palettes, labels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from geometry import save
from PIL import Image as Picture

from medseg.cases import Case, Dataset
from medseg.check import Findings, check_dataset
from medseg.consistency import inconsistencies
from medseg.findings import CaseFacts, Finding, Intensities, measure_intensities

MakeDataset = Callable[..., Path]
CT = Dataset(Path("set"), "nnunet", (), ("CT",), {"background": 0, "liver": 1})
PLAIN = Dataset(Path("set"), "plain", (), ("image",))
USUAL = Intensities(-1024, -1000, 400, 1500)


def facts(*intensities: Intensities, **more: Any) -> list[CaseFacts]:
    """A case for each of `intensities`, alike in all else."""
    alike: dict[str, Any] = {
        "shape": (9, 9, 9),
        "spacing_mm": (1.0, 1.0, 1.0),
        "axcodes": "RAS",
        "dtype": "int16",
        "channels": 1,
        "label_voxels": {0: 9, 1: 3},
    }
    return [CaseFacts(f"c{n}", **(alike | {"intensities": (i,)} | more)) for n, i in enumerate(intensities)]


def of(found: list[Finding] | Findings, severity: str) -> list[str]:
    findings = found.findings if isinstance(found, Findings) else found
    return [str(f) for f in findings if f.severity == severity]


# ---- intensities


def test_intensities_are_measured_with_their_extremes() -> None:
    channel = np.zeros((40, 50, 60), np.float32)
    channel[1, 2, 3], channel[20:] = -7, 5
    assert measure_intensities(channel) == Intensities(-7, 0, 5, 5)


@pytest.mark.parametrize("data", [CT, PLAIN], ids=["named", "by its air"])
def test_ct_that_is_stored_with_an_offset_is_a_warning(data: Dataset) -> None:
    shifted = Intensities(0, 24, 1424, 2524)
    (told,) = of(inconsistencies(data, facts(USUAL, USUAL, shifted), {}), "warning")
    assert told.startswith("c2: intensities begin at 0, expected about -1000 HU as in 2 of 3 cases; subtract")


def test_ct_without_any_air_is_nothing_odd() -> None:
    assert inconsistencies(CT, facts(*[Intensities(-150, -100, 300, 900)] * 6), {}) == []


def test_ct_of_another_scale_is_a_warning() -> None:
    scaled = Intensities(-1, -1, 0.4, 1.5)
    told = of(inconsistencies(CT, facts(*[USUAL] * 5, scaled), {}), "warning")
    assert any("c5: 98 % of the intensities lie within 1.4, expected about 1400" in text for text in told)
    assert all(text.startswith("c5") for text in told)


def test_mri_may_be_of_any_scale() -> None:
    mri = Dataset(Path("set"), "nnunet", (), ("MRI",), {"liver": 1})
    scales = [Intensities(0, 0, high, 2 * high) for high in (0.5, 1, 300, 4e3, 9e5, 1e6)]
    assert inconsistencies(mri, facts(*scales), {}) == []


def test_one_voxel_far_beyond_all_others_is_a_warning() -> None:
    mri = Dataset(Path("set"), "nnunet", (), ("MRI",), {"liver": 1})
    (told,) = of(inconsistencies(mri, facts(USUAL, Intensities(0, 1, 900, 3e38)), {}), "warning")
    assert told.startswith("c1: intensities from 0 to 3e+38, expected none so far from the others, of which 98 % lie")


# ---- orientations and slices


def test_orientations_of_single_slices_must_not_be_mixed(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    label = np.zeros((24, 20, 1), np.uint8)
    for n, affine in enumerate([np.diag([1.0, 1, 5, 1]), np.diag([-1.0, -1, 5, 1])]):
        label[3 : 6 + n, 3:6] = 1
        save(tmp_path / "images" / f"c{n}.nii.gz", np.random.default_rng(n).normal(size=label.shape), affine)
        save(tmp_path / "labels" / f"c{n}.nii.gz", label, affine)
    (told,) = of(check_dataset(tmp_path), "warning")
    assert "orientations are mixed" in told
    assert "store them in one orientation" in told


def test_single_slices_among_volumes_are_a_warning() -> None:
    mixed = [*facts(USUAL, USUAL, shape=(9, 9, 1)), *facts(USUAL)]
    (told,) = of(inconsistencies(PLAIN, mixed, {}), "warning")
    assert told.startswith("2 of 3 cases are single slices, first c0; the others are volumes")


# ---- labels


def test_many_unnamed_values_are_a_warning() -> None:
    (told,) = of(inconsistencies(PLAIN, facts(USUAL, label_voxels=dict.fromkeys(range(22), 9)), {}), "warning")
    assert told.startswith("21 values in the labels, from 1 to 21, that nothing names")
    assert inconsistencies(PLAIN, facts(USUAL, label_voxels=dict.fromkeys(range(21), 9)), {}) == []


def test_white_in_one_mask_and_one_in_the_others_is_a_warning() -> None:
    white = [replace(f, case="white") for f in facts(USUAL, label_voxels={0: 9, 255: 9})]
    (told,) = of(inconsistencies(PLAIN, [*facts(USUAL, USUAL), *white], {}), "warning")
    assert told.startswith("1 of 3 labels hold 0 and 255, first white; others hold 0 and 1")
    assert inconsistencies(PLAIN, white, {}) == []
    # nor is it odd where values are named, or stand beside others
    assert inconsistencies(PLAIN, [*facts(USUAL), *facts(USUAL, label_voxels={0: 9, 1: 9, 255: 9})], {}) == []


def test_a_label_that_one_patient_alone_has_is_a_warning() -> None:
    usual = facts(*[USUAL] * 4, label_voxels={0: 9, 1: 9, 2: 9})
    odd = [replace(f, case="odd") for f in facts(USUAL, label_voxels={0: 9, 1: 9, 2: 9, 7: 2})]
    (told,) = of(inconsistencies(PLAIN, [*usual, *odd], {}), "warning")
    assert "labels of one patient alone: value 7 in odd, expected each label in several ones" in told
    assert "each value becomes a label" in told
    named = replace(PLAIN, labels={"background": 0, "liver": (1, 2), "stone": 7})
    (told,) = of(inconsistencies(named, [*usual, *odd], {}), "warning")
    assert "stone in odd" in told
    assert "nothing of them is learnt where it is held back" in told
    # what is ignored is not learnt, two cases are enough, and few cases say nothing
    assert not of(inconsistencies(replace(named, labels={"liver": (1, 2), "ignore": 7}), [*usual, *odd], {}), "warning")
    second = replace(odd[0], case="second")
    assert not of(inconsistencies(PLAIN, [*usual, *odd, second], {}), "warning")
    cases = tuple(Case(name, (), None, "p") for name in ("odd", "second"))
    (told,) = of(inconsistencies(replace(PLAIN, cases=cases), [*usual, *odd, second], {}), "warning")
    assert "value 7 in odd" in told
    assert not of(inconsistencies(PLAIN, [*usual[1:], *odd], {}), "warning")


def _palette_pictures(folder: Path, *palettes: tuple[list[int], list[int]]) -> Path:
    """Pictures whose labels show a red and a green box: (index of each of black, red, green; colours by index)."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for n, (indices, colours) in enumerate(palettes):
        plain = np.zeros((20, 24), np.uint8)
        plain[2:8, 2 : 9 + n], plain[12:18, 3:9] = 1, 2
        picture = Picture.fromarray(np.array(indices, np.uint8)[plain], mode="P")
        picture.putpalette(colours)
        picture.save(folder / "labels" / f"c{n}.png")
        noise = np.random.default_rng(n).integers(0, 255, plain.shape, dtype=np.uint8)
        Picture.fromarray(noise).save(folder / "images" / f"c{n}.png")
    return folder


BLACK, RED, GREEN = [0, 0, 0], [255, 0, 0], [0, 255, 0]


def test_colours_with_another_index_in_each_file_are_an_error(tmp_path: Path) -> None:
    usual, turned = ([0, 1, 2], BLACK + RED + GREEN), ([0, 2, 1], BLACK + GREEN + RED)
    (told,) = of(check_dataset(_palette_pictures(tmp_path, usual, usual, turned)), "error")
    assert told.startswith("c2: ")
    assert "the colour (0, 255, 0) has index 1, but 2 in c0.png" in told


def test_one_palette_for_all_is_right(tmp_path: Path) -> None:
    usual = [0, 1, 2], BLACK + RED + GREEN
    # unused entries may hold anything, and a palette of one colour tells nothing
    other = [0, 1, 2], BLACK + RED + GREEN + RED
    blind = [0, 2, 1], BLACK * 3
    assert check_dataset(_palette_pictures(tmp_path, usual, other, blind)).findings == ()


@pytest.mark.parametrize(
    ("labels", "more", "words"),
    [
        ({"a": [0, 1], "b": 2}, {}, "label `a` has the value 0"),
        ({"": 1, "core": 2}, {}, "expected a name"),
        ({"background": 0, "ignore": 1}, {}, "expected at least one to be learnt"),
        ({"whole": [1, 2], "core": [2]}, {"regions_class_order": [1]}, "2 regions need as many .*regions_class_order"),
        (
            {"whole": [1, 2], "core": [2]},
            {"regions_class_order": [2, 1]},
            r"would be read as `core` too.*\[1, 2\] fits",
        ),
        ({"one": [1, 2], "two": [2, 1]}, {}, "2 regions need as many .*regions_class_order in dataset.json.*found 0"),
        ({f"l{n}": n for n in range(1, 256)}, {}, "255 labels found, expected at most 254"),
    ],
)
def test_labels_that_no_training_can_learn_are_errors(
    tiny_dataset: MakeDataset, labels: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    folder = tiny_dataset(form="nnunet", cases=2)
    description = json.loads((folder / "dataset.json").read_text()) | {"labels": labels} | more
    (folder / "dataset.json").write_text(json.dumps(description))
    findings = [f for f in check_dataset(folder).findings if f.severity == "error" and f.case == ""]
    assert [Path(f.file).name for f in findings] == ["dataset.json"]
    assert re.search(words, str(findings[0]))


def test_labels_are_in_no_case_only_where_label_maps_could_be_read() -> None:
    assert inconsistencies(CT, [], {}) == []
    assert inconsistencies(CT, facts(USUAL, label_voxels={}), {}) == []
    (told,) = of(inconsistencies(CT, facts(USUAL, label_voxels={0: 9}), {}), "warning")
    assert told.startswith("set: 1 labels are in no case: liver")


def test_more_unnamed_values_than_a_network_has_outputs_are_an_error() -> None:
    (told,) = of(inconsistencies(PLAIN, facts(USUAL, label_voxels=dict.fromkeys(range(256), 9)), {}), "error")
    assert "255 labels found, expected at most 254" in told


def test_regions_without_an_order_are_nothing_odd(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(form="nnunet", cases=2)
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"] = {"background": 0, "core": [2], "whole": [1, 2]}
    (folder / "dataset.json").write_text(json.dumps(description))
    assert check_dataset(folder).findings == ()
