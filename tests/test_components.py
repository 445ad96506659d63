"""Label maps after the network: what is removed, what is filled, what is left alone, and when it is chosen."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from medseg import postprocess
from medseg.config import PostprocessConfig, dump_yaml, make_config, read_config
from medseg.errors import ConfigError
from medseg.postprocess import Choice, choose, clean

Labels = npt.NDArray[np.integer[Any]]

VALUES = {"a": 3, "b": 7}
SPACING = {1: (0.7,), 2: (0.7, 1.9), 3: (0.7, 1.9, 3.1)}


def picture(*rows: str, dtype: type = np.uint8) -> Labels:
    """A map (I, J) of one digit a voxel; a dot is 0."""
    return np.array([[int(c) for c in row.replace(".", "0")] for row in rows], dtype)


def cleaned(labels: Labels, **settings: Any) -> Labels:
    return clean(PostprocessConfig(**settings), labels, VALUES, voxel_mm3=math.prod(SPACING[labels.ndim]))


# ---- the largest part


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_only_the_largest_part_stays_and_other_labels_are_left_alone(dtype: type) -> None:
    labels = picture("33..7", "33...", "....3", "7...3", dtype=dtype)
    found = cleaned(labels, largest_component=("a",))
    assert found.dtype == dtype
    assert np.array_equal(found, picture("33..7", "33...", ".....", "7....", dtype=dtype))


def test_values_above_255_are_labels_too() -> None:
    labels = picture("11.1", dtype=np.uint16) * np.uint16(40000)
    found = clean(PostprocessConfig(largest_component=("x",)), labels, {"x": 40000}, voxel_mm3=1)
    assert found.tolist() == [[40000, 40000, 0, 0]]


def test_of_equal_parts_the_first_in_scan_order_stays() -> None:
    found = cleaned(picture(".7..3", "77.33", "....."), largest_component=("a", "b"))
    assert np.array_equal(found, picture(".7..3", "77.33", "....."))
    # the right one starts one row above the left one
    found = cleaned(picture("...3", "3..3", "3..."), largest_component=("a",))
    assert np.array_equal(found, picture("...3", "...3", "...."))


def test_voxels_that_share_only_a_corner_are_one_part() -> None:
    labels = picture("3...", ".3..", "...3")
    assert np.array_equal(cleaned(labels, largest_component=("a",)), picture("3...", ".3..", "...."))
    volume = np.zeros((3, 3, 3), np.uint8)
    volume[0, 2, 0] = volume[1, 1, 1] = volume[2, 0, 2] = 3
    assert cleaned(volume, largest_component=("a",)) is volume


def test_rows_do_not_touch_around_the_border() -> None:
    # in memory the end of a row is beside the start of the next
    found = cleaned(picture("...33", "3....", "....."), largest_component=("a",))
    assert np.array_equal(found, picture("...33", ".....", "....."))
    volume = np.zeros((2, 3, 2), np.uint8)
    volume[0, 2] = 3
    volume[1, 0, 0] = 3
    assert np.argwhere(cleaned(volume, largest_component=("a",))).tolist() == [[0, 2, 0], [0, 2, 1]]


@pytest.mark.parametrize("shape", [(60,), (13, 17), (6, 7, 9), (1, 9, 8), (9, 1, 8), (9, 8, 1)])
@pytest.mark.parametrize("chunk", [20, 2**20])
def test_parts_are_those_that_scipy_finds(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "CHUNK_VOXELS", chunk)
    labels = np.random.default_rng(len(shape)).choice(np.array([0, 0, 0, 3, 7], np.uint8), shape)
    expected = labels.copy()
    for value in VALUES.values():
        parts, _ = ndimage.label(labels == value, np.ones((3,) * labels.ndim))
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        expected[(labels == value) & (parts != sizes.argmax())] = 0
    assert not np.array_equal(expected, labels)
    assert np.array_equal(cleaned(labels, largest_component=("a", "b")), expected)


def test_memory_order_changes_nothing() -> None:
    labels = np.random.default_rng(0).choice(np.array([0, 0, 3, 7], np.uint8), (6, 7, 9))
    settings = {"largest_component": ("a",), "min_size_mm3": {"b": 20.0}, "fill_holes": ("a", "b")}
    expected = cleaned(labels, **settings)
    assert np.array_equal(cleaned(np.asfortranarray(labels), **settings), expected)
    assert np.array_equal(cleaned(np.repeat(labels, 2, axis=0)[::2], **settings), expected)


# ---- the minimum size


@pytest.mark.parametrize(("least", "stays"), [(2.66, True), (2.65, True), (2.67, False)])
def test_a_picture_is_measured_by_area(least: float, stays: bool) -> None:
    # two pixels of 0.7 mm × 1.9 mm: 2.66 mm²
    labels = picture("33..", "...7")
    found = cleaned(labels, min_size_mm3={"a": least})
    assert np.array_equal(found, labels if stays else picture("....", "...7"))


@pytest.mark.parametrize(("least", "stays"), [(8.246, True), (8.25, False)])
def test_a_volume_is_measured_in_cubic_millimetres(least: float, stays: bool) -> None:
    # two voxels of 0.7 × 1.9 × 3.1 mm: 8.246 mm³; every part below goes, also the largest
    volume = np.zeros((4, 3, 2), np.uint8)
    volume[:2, 0, 0] = 7
    assert cleaned(volume, min_size_mm3={"b": least}).any() == stays


def test_the_rounding_of_millimetres_never_decides() -> None:
    # 3 × 0.1 is 0.30000000000000004, 0.3 is less, and 3 · (0.1 · 0.1 · 0.1) is not 0.003
    volume = np.full((3, 1, 1), 3, np.uint8)
    for least in (0.003, 3 * (0.1 * 0.1 * 0.1), 0.1 * 0.1 * 0.3, 0.1 * 0.3 * 0.1):
        config = PostprocessConfig(min_size_mm3={"a": least})
        assert clean(config, volume, VALUES, voxel_mm3=0.1 * 0.1 * 0.1) is volume


def test_the_largest_part_also_needs_the_minimum_size() -> None:
    labels = picture("33.3", "....")
    assert not cleaned(labels, largest_component=("a",), min_size_mm3={"a": 3}).any()


# ---- holes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_enclosed_background_is_filled(dtype: type) -> None:
    labels = picture(".333", ".3.3", ".333", dtype=dtype)
    found = cleaned(labels, fill_holes=("a",))
    assert found.dtype == dtype
    assert np.array_equal(found, picture(".333", ".333", ".333", dtype=dtype))


def test_a_hole_that_touches_the_border_is_none() -> None:
    labels = picture("3.33", "3.33", "3333")
    assert cleaned(labels, fill_holes=("a",)) is labels


def test_background_leaks_through_faces_only() -> None:
    closed = picture(".3.", "3.3", ".3.")
    assert np.array_equal(cleaned(closed, fill_holes=("a",)), picture(".3.", "333", ".3."))
    opened = picture(".3.", "3.3", "...")
    assert cleaned(opened, fill_holes=("a",)) is opened


def test_another_label_in_a_hole_stays() -> None:
    found = cleaned(picture("33333", "3.7.3", "3...3", "33333"), fill_holes=("a",))
    assert np.array_equal(found, picture("33333", "33733", "33333", "33333"))


def test_the_innermost_label_takes_the_hole() -> None:
    labels = picture("3333333", "3.....3", "3.777.3", "3.7.7.3", "3.777.3", "3.....3", "3333333")
    expected = picture("3333333", "3333333", "3377733", "3377733", "3377733", "3333333", "3333333")
    assert np.array_equal(cleaned(labels, fill_holes=("a", "b")), expected)
    assert np.array_equal(cleaned(labels, fill_holes=("b", "a")), expected)


@pytest.mark.parametrize("shape", [(13, 17), (8, 7, 9), (5, 12, 4)])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_holes_are_those_that_scipy_fills(shape: tuple[int, ...], share: float) -> None:
    generator = np.random.default_rng(0)
    labels = np.where(generator.random(shape) < share, 3, 7 * (generator.random(shape) < 0.2)).astype(np.uint8)
    labels[0] = 0
    expected = labels.copy()
    expected[ndimage.binary_fill_holes(labels == 3) & (labels == 0)] = 3
    assert np.array_equal(cleaned(labels, fill_holes=("a",)), expected)


def test_two_labels_together_enclose_nothing() -> None:
    labels = picture("337", "3.7", "337")
    assert cleaned(labels, fill_holes=("a", "b")) is labels


def test_a_cavity_of_a_volume_is_filled_and_a_tunnel_is_not() -> None:
    volume = np.full((3, 4, 5), 3, np.uint8)
    volume[1, 1, 1:3] = 0
    volume[:, 2, 3] = 0
    found = cleaned(volume, fill_holes=("a",))
    assert np.argwhere(found == 0).tolist() == [[0, 2, 3], [1, 2, 3], [2, 2, 3]]


def test_a_line_has_no_holes() -> None:
    line = np.array([3, 0, 3, 0, 0, 3, 3], np.uint8)
    assert cleaned(line, fill_holes=("a",)) is line
    assert cleaned(line, largest_component=("a",)).tolist() == [0, 0, 0, 0, 0, 3, 3]


def test_holes_are_filled_last() -> None:
    # the island of b goes first and leaves a hole in a
    labels = picture("333.7", "373.7", "333..")
    found = cleaned(labels, fill_holes=("a",), largest_component=("b",))
    assert np.array_equal(found, picture("333.7", "333.7", "333.."))


# ---- what always holds


def test_what_asks_for_nothing_or_changes_nothing_gives_the_same_map() -> None:
    labels = picture("33..", "...7")
    assert cleaned(labels) is labels
    assert cleaned(labels, largest_component=("a", "b"), min_size_mm3={"a": 0, "b": 1}, fill_holes=("a",)) is labels


def test_the_map_that_was_given_stays_as_it_was() -> None:
    labels = picture("333.3", "3.3..", "333.7")
    before = labels.copy()
    found = cleaned(labels, largest_component=("a",), min_size_mm3={"b": 9}, fill_holes=("a",))
    assert np.array_equal(labels, before)
    assert np.array_equal(found, picture("333..", "333..", "333.."))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (1, 1), (2, 0, 3), (1, 1, 1)])
def test_maps_without_labels_or_voxels(shape: tuple[int, ...]) -> None:
    labels = np.zeros(shape, np.uint8)
    assert cleaned(labels, largest_component=("a",), min_size_mm3={"b": 9}, fill_holes=("a",)) is labels


# ---- the settings


LABELS = {"background": 0, "a": 3, "b": 7, "ignore": 9}


@pytest.mark.parametrize("key", ["largest_component", "fill_holes", "min_size_mm3"])
@pytest.mark.parametrize("name", ["c", "background", "ignore"])
def test_a_name_that_is_no_predicted_label_is_refused_with_those_that_are(key: str, name: str) -> None:
    value: Any = {name: 5} if key == "min_size_mm3" else [name]
    with pytest.raises(ConfigError, match=rf"postprocess\.{key}: no label `{name}`, .*: a, b$"):
        make_config({"data": {"labels": LABELS}, "postprocess": {key: value}})


@pytest.mark.parametrize("key", ["largest_component", "fill_holes", "min_size_mm3"])
def test_regions_are_refused(key: str) -> None:
    data = {"labels": {"whole": [1, 2], "core": [2]}, "region_values": [1, 2]}
    with pytest.raises(ConfigError, match=rf"postprocess\.{key} found, but data\.labels are regions"):
        make_config({"data": data, "postprocess": {key: {"core": 5} if key == "min_size_mm3" else ["core"]}})


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"postprocess\.min_size_mm3\.a: found -1"):
        make_config({"data": {"labels": LABELS}, "postprocess": {"min_size_mm3": {"a": -1}}})


def test_the_settings_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    settings = {"largest_component": ["b", "a"], "fill_holes": ["a"], "min_size_mm3": {"b": 1e-5, "a": 1e9}}
    config = make_config({"data": {"labels": LABELS}, "postprocess": settings})
    (tmp_path / "c.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert read_config(tmp_path / "c.yaml") == config


# ---- the choice

Case = tuple[Labels, Labels, float]

REFERENCE = picture("........", ".3333...", ".3333...", ".3333...", "........")


def changed(*changes: tuple[int, int, int]) -> Labels:
    """The reference with the values of some voxels changed: (i, j, value)."""
    labels = REFERENCE.copy()
    for i, j, value in changes:
        labels[i, j] = value
    return labels


def six(prediction: Labels, reference: Labels = REFERENCE) -> list[Case]:
    return [(prediction, reference, 1.0)] * 6


def row(choice: Choice, what: str, label: str = "a") -> dict[str, Any]:
    """The row of one setting; of several minimum sizes the largest."""
    return dict([r for r in choice.table if (r["what"], r["label"]) == (what, label)][-1])


def test_islands_choose_the_largest_part() -> None:
    # 12 voxels right and 5 too many: Dice 24/29; both islands are larger than an eighth of the 12 mm² of the reference
    islands = changed((0, 7, 3), (1, 7, 3), (2, 7, 3), (4, 6, 3), (4, 7, 3))
    choice = choose(six(islands), VALUES)
    assert choice.settings["largest_component"] == ("a",)
    found = row(choice, "largest_component")
    assert found == {
        "label": "a",
        "what": "largest_component",
        "mm3": None,
        "cases": 6,
        "before": pytest.approx(24 / 29),
        "after": 1.0,
        "difference": pytest.approx(5 / 29),
        "low": pytest.approx(5 / 29),
        "high": pytest.approx(5 / 29),
        "kept": True,
    }
    # what is chosen does what the table says
    config = PostprocessConfig(**choice.settings)
    assert np.array_equal(clean(config, islands, VALUES, voxel_mm3=1.0), REFERENCE)


def test_two_true_parts_choose_a_minimum_size_and_not_the_largest_part() -> None:
    reference = changed((1, 7, 3), (2, 7, 3), (3, 7, 3))
    reference = np.pad(reference, ((0, 4), (0, 0)))
    specks = reference.copy()
    specks[7, 2] = specks[7, 5] = 3
    choice = choose(six(specks, reference), VALUES)
    # the smallest true part has 3 pixels of 1 mm²: of 0.375, 0.75, 1.5 and 3 mm² the last two remove one pixel
    assert [r["mm3"] for r in choice.table if r["what"] == "min_size_mm3"] == [0.375, 0.75, 1.5, 3.0]
    assert [r["difference"] > 0 for r in choice.table if r["what"] == "min_size_mm3"] == [False, False, True, True]
    # the gentler of two that are equally good
    assert choice.settings == {"min_size_mm3": {"a": 1.5}}
    assert row(choice, "largest_component")["difference"] < 0


def test_holes_are_chosen_where_the_reference_has_none() -> None:
    choice = choose(six(changed((2, 2, 0))), VALUES)
    assert choice.settings == {"fill_holes": ("a",)}
    found = row(choice, "fill_holes")
    # 11 of 12 voxels before
    assert (found["before"], found["after"]) == (pytest.approx(22 / 23), 1.0)


def test_holes_that_the_reference_has_are_not_filled() -> None:
    ring = changed((2, 2, 0))
    assert choose(six(ring, ring), VALUES).settings == {}


def test_gaps_of_a_line_are_no_holes_to_choose() -> None:
    whole = np.full(9, 3, np.uint8)
    gap = whole.copy()
    gap[4] = 0
    found = row(choose([(gap, whole, 1.0)] * 6, VALUES), "fill_holes")
    assert found["difference"] == 0


def test_what_helps_one_case_in_six_is_noise() -> None:
    cases = [*six(REFERENCE)[:5], *six(changed((0, 7, 3)))[:1]]
    choice = choose(cases, VALUES)
    found = row(choice, "largest_component")
    assert found["difference"] > postprocess.LEAST_DIFFERENCE
    assert found["low"] <= 0
    assert choice.settings == {}


def test_a_difference_below_what_matters_is_left() -> None:
    # one voxel in 10 000: Dice rises by 1/20 001 in every case, surely but for nothing
    reference = np.zeros((104, 104), np.uint8)
    reference[:100, :100] = 3
    prediction = reference.copy()
    prediction[103, 103] = 3
    choice = choose(six(prediction, reference), VALUES)
    found = row(choice, "largest_component")
    assert found["low"] == pytest.approx(1 / 20001)
    assert choice.settings == {}


def test_an_island_that_should_not_be_there_counts_from_zero_to_one() -> None:
    # b is in the reference of the first case only, 4 mm²; the other five have one spurious voxel of it
    true = changed((4, 0, 7), (4, 1, 7), (4, 2, 7), (4, 3, 7))
    cases = [*six(true, true)[:1], *six(changed((0, 7, 7)))[:5]]
    choice = choose(cases, VALUES)
    assert [(r["mm3"], r["after"]) for r in choice.table if (r["label"], r["what"]) == ("b", "min_size_mm3")] == [
        (0.5, pytest.approx(1 / 6)),
        (1.0, pytest.approx(1 / 6)),
        (2.0, 1.0),
        (4.0, 1.0),
    ]
    assert choice.settings == {"min_size_mm3": {"b": 2.0}}


def test_cases_where_neither_map_has_the_label_are_left_out() -> None:
    choice = choose(six(REFERENCE), VALUES)
    assert row(choice, "largest_component")["cases"] == 6
    found = row(choice, "largest_component", "b")
    assert (found["cases"], found["before"], found["difference"], found["kept"]) == (0, None, None, False)


def test_four_cases_with_the_label_are_too_few_for_it() -> None:
    empty = np.zeros_like(REFERENCE)
    cases = [*six(changed((0, 7, 3)))[:4], *six(empty, empty)]
    choice = choose(cases, VALUES)
    found = row(choice, "largest_component")
    assert (found["cases"], found["kept"]) == (4, False)
    assert found["low"] > postprocess.LEAST_DIFFERENCE


def test_ignored_voxels_are_not_counted() -> None:
    reference = changed((0, 7, 9), (2, 2, 9))
    prediction = changed((0, 7, 3), (2, 2, 0))
    choice = choose(six(prediction, reference), VALUES, ignore_value=9)
    for what in ("largest_component", "fill_holes"):
        found = row(choice, what)
        assert (found["before"], found["after"]) == (1.0, 1.0)
    # without, the island and the missing voxel count
    assert row(choose(six(prediction, reference), VALUES), "largest_component")["before"] < 1


def test_too_few_cases_choose_nothing_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    choice = choose(six(changed((0, 7, 3)))[:4], VALUES)
    assert (choice.settings, choice.table) == ({}, ())
    assert "4 validation cases are too few" in choice.warnings[0]
    assert choice.warnings[0] in caplog.text


def test_a_choice_is_strict_json_and_a_configuration() -> None:
    choice = choose(six(changed((0, 7, 3), (2, 2, 0))), VALUES)
    assert len(json.loads(json.dumps(choice.table, allow_nan=False))) == len(choice.table)
    config = make_config({"data": {"labels": LABELS}, "postprocess": json.loads(json.dumps(choice.settings))})
    assert config.postprocess.fill_holes == ("a",)


def test_maps_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prediction of \(5, 8\) voxels found, expected \(4, 8\)"):
        choose([(REFERENCE, REFERENCE[1:], 1.0)], VALUES)


@pytest.mark.parametrize(
    ("number", "cut"), [(123.456, 123), (1234567, 1230000), (0.0019999, 0.00199), (2, 2), (0.3, 0.3)]
)
def test_sizes_are_cut_to_three_digits(number: float, cut: float) -> None:
    found = postprocess._three_digits(number)
    assert found == pytest.approx(cut, rel=1e-12)
    assert found <= number or math.isclose(found, number)
