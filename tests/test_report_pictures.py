"""Contour pictures: which slice, what is tinted, how large things are."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.errors import DataError
from medseg.evaluate import EvaluateOptions, Pair
from medseg.report import evaluate
from medseg.report.figures import PICTURE_PIXELS, contour_pictures
from medseg.report.layers import read_layers
from medseg.views import edges, window

SOLID = np.zeros((8, 9, 10), np.uint8)
SOLID[1:5, 1:5, 1:5] = 1
NOTHING = np.zeros_like(SOLID)
# 0.4 of the backdrop (21, 24, 28) and 0.6 of the first colour (230, 159, 0); 0.78 and 0.22
WRONG, AGREED = (146, 105, 11), (67, 54, 22)
# a quality of 88 moves an even area by less than this
JPEG = 6


@pytest.fixture
def pictures(tmp_path):
    """Writes a case and gives its pictures as arrays (row, column, RGB), and their captions."""

    def make(prediction, reference, image=None, spacing=(1.0, 1.0, 1.0), labels=None):
        for name, array in (("pred", prediction), ("ref", reference), ("images", image)):
            (tmp_path / name).mkdir()
            if array is not None:
                nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), tmp_path / name / "a.nii.gz")
        found = evaluate(
            tmp_path / "pred", tmp_path / "ref", EvaluateOptions(labels=labels), images=tmp_path / "images"
        ).evaluation
        return [
            (pixels(p), p.caption)
            for p in contour_pictures(read_layers(found.pairs["a"], found), found.pairs["a"], found)
        ]

    return make


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.data_uri.split(",")[1]))), dtype=int)


def like(array, colour):
    return (np.abs(array - np.array(colour)) <= JPEG).all(axis=-1)


def test_the_sides_of_one_pixel():
    found = edges(np.array([[True]]))
    assert sorted(found.tolist()) == [[[0, 0], [0, 1]], [[0, 0], [1, 0]], [[0, 1], [1, 1]], [[1, 0], [1, 1]]]


def test_two_neighbours_have_six_sides_and_none_between_them():
    found = edges(np.array([[True, True]])).tolist()
    assert len(found) == 6
    assert [[0, 1], [1, 1]] not in found


def test_the_pictured_slice_is_the_one_with_the_most_wrong_voxels(pictures):
    # wrong are all 16 voxels of k = 3; in i and j the four slices 1..4 are equally wrong, and the first is taken
    prediction = SOLID.copy()
    prediction[:, :, 3] = 0
    captions = [caption for _, caption in pictures(prediction, SOLID)]
    assert captions == ["axial, slice 4 of 10", "coronal, slice 2 of 9", "sagittal, slice 2 of 8"]


def test_what_is_missed_is_tinted(pictures):
    axial = pictures(NOTHING, SOLID)[0][0]
    middle = PICTURE_PIXELS // 2
    assert like(axial[middle - 30 : middle + 30, middle - 30 : middle + 30], WRONG).all()


def test_without_an_image_what_agrees_is_tinted_faintly(pictures):
    axial = pictures(SOLID, SOLID)[0][0]
    middle = PICTURE_PIXELS // 2
    assert like(axial[middle - 30 : middle + 30, middle - 30 : middle + 30], AGREED).all()


def test_on_an_image_what_agrees_is_left_clear(pictures):
    image = np.full(SOLID.shape, 100, np.uint8)
    image[0, 0, 0], image[-1, -1, -1] = 0, 200
    axial = pictures(SOLID, SOLID, image)[0][0]
    middle = axial[PICTURE_PIXELS // 2, PICTURE_PIXELS // 2]
    assert np.ptp(middle) <= JPEG


def test_millimetres_are_equally_long_in_all_directions(pictures):
    # 8 × 8 × 2 voxels of 1 × 1 × 4 mm are a cube
    reference = np.zeros((12, 12, 6), np.uint8)
    reference[2:10, 2:10, 2:4] = 1
    coronal = pictures(np.zeros_like(reference), reference, spacing=(1.0, 1.0, 4.0))[1][0]
    tinted = like(coronal, WRONG)
    rows, columns = tinted.any(axis=1).sum(), tinted.any(axis=0).sum()
    # an edge is blurred over blocks of 8 pixels
    assert abs(int(rows) - int(columns)) <= 8


def test_few_labels_need_no_numbers(pictures):
    few = pictures(SOLID, SOLID, labels={"a": 1})[0][0]
    assert like(few[260:300, 260:300], AGREED).all()


def test_a_number_stands_in_the_outline_where_colours_repeat(pictures):
    many = pictures(SOLID, SOLID, labels={f"l{n}": n for n in range(1, 9)})[0][0]
    middle = PICTURE_PIXELS // 2
    around = many[middle - 80 : middle + 80, middle - 80 : middle + 80]
    assert (around.min(axis=-1) > 200).any()


def test_a_pair_without_prediction_has_nothing_to_show(tmp_path):
    for name in "ab":
        nib.save(nib.Nifti1Image(SOLID, np.eye(4)), tmp_path / f"{name}.nii.gz")
    found = evaluate(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz").evaluation
    with pytest.raises(DataError, match="no prediction"):
        read_layers(Pair("x", None, tmp_path / "a.nii.gz"), found)


def test_an_image_under_the_outlines_changes_the_picture(tmp_path):
    for name, array in (
        ("a", SOLID),
        ("b", SOLID),
        ("image", np.arange(SOLID.size, dtype=np.uint16).reshape(SOLID.shape)),
    ):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    found = evaluate(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", images=tmp_path / "image.nii.gz").evaluation
    (pair,) = found.pairs.values()
    with_image, without = (
        contour_pictures(read_layers(shown, found), shown, found) for shown in (pair, replace(pair, image=None))
    )
    assert all(a.data_uri != b.data_uri for a, b in zip(with_image, without))


# ---- black and white


def test_most_of_what_is_outlined_decides_what_is_grey():
    # half of the voxels between 0 and 50, lung at -800, bone at 1000: four widths of 50 on both sides
    image = np.concatenate([np.linspace(0, 50, 101), np.full(40, -800.0), np.full(40, 1000.0)])
    # 181 voxels, of which the shortest half holds 91 apart from the first: 45 of 50
    assert window(image, np.ones(image.shape, bool)) == pytest.approx((-180, 225))


def test_what_is_not_outlined_says_nothing_but_the_ends():
    image = np.concatenate([np.linspace(0, 50, 101), np.full(400, 70.0)])
    low, high = window(image, np.arange(image.size) < 101)
    # half of 101 voxels is 25 wide: up to 25 + 100 and down to -100, were it not for the ends of the image
    assert (low, high) == (0, 70)


def test_an_image_of_one_value_and_one_without_numbers_have_a_window():
    everywhere = np.ones(8, bool)
    assert window(np.full(8, 3.0), everywhere)[0] == 3
    assert window(np.full(8, np.nan), everywhere) == (0, 1)


def test_nothing_outlined_takes_the_whole_image():
    image = np.arange(101.0)
    assert window(image, np.zeros(101, bool)) == pytest.approx((1, 99))
