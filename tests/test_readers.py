"""Reading: voxels, grids and channels of every format, and a clear refusal of what cannot be used."""

from __future__ import annotations

import gzip
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from PIL import Image as Picture

from medseg.errors import DataError, GeometryError
from medseg.readers import (
    holds_colour,
    is_image_file,
    read_geometry,
    read_image,
    read_images,
    read_label,
    split_ending,
    stored_in,
)

# 3 × 4 × 5 voxels of 0.5 × 1 × 2 mm, turned by 20° about z and sheared by nothing
TURN = np.deg2rad(20)
OBLIQUE = np.array(
    [
        [0.5 * np.cos(TURN), -np.sin(TURN), 0, 10],
        [0.5 * np.sin(TURN), np.cos(TURN), 0, -20],
        [0, 0, 2, 30],
        [0, 0, 0, 1.0],
    ]
)
VOXELS = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


def save(path: Path, array: np.ndarray, affine: np.ndarray = OBLIQUE, **header: object) -> Path:
    image = nib.Nifti1Image(array, affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def save_raw(path: Path, array: np.ndarray, **header: object) -> Path:
    """As `save`, but with header fields that nibabel would repair."""
    image = nib.Nifti1Image(array, np.eye(4))
    raw = bytearray(image.to_bytes())
    fields = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in header.items():
        fields[name] = value
    raw[:348] = fields.binaryblock
    path.write_bytes(bytes(raw))
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
def test_nifti_gives_voxels_type_and_affine_of_the_file(tmp_path: Path, name: str) -> None:
    image = read_image(save(tmp_path / name, VOXELS))
    assert image.array.dtype == np.int16
    np.testing.assert_array_equal(image.array, VOXELS[None])
    # affines are float32 in the file
    np.testing.assert_allclose(image.grid.affine, OBLIQUE, rtol=1e-6)
    np.testing.assert_allclose(image.grid.spacing_mm, (0.5, 1, 2), rtol=1e-6)


def test_zipped_content_is_known_in_spite_of_the_ending(tmp_path: Path) -> None:
    zipped = save(tmp_path / "a.nii.gz", VOXELS)
    zipped.rename(tmp_path / "b.nii")
    np.testing.assert_array_equal(read_image(tmp_path / "b.nii").array[0], VOXELS)


def test_big_endian_voxels_come_in_native_order(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS.astype(">i2"), OBLIQUE, nib.Nifti1Header(endianness=">"))
    nib.save(image, tmp_path / "a.nii")
    read = read_image(tmp_path / "a.nii").array
    assert read.dtype.isnative
    np.testing.assert_array_equal(read[0], VOXELS)


def test_rescaled_voxels_are_float32(tmp_path: Path) -> None:
    path = save_raw(tmp_path / "a.nii", VOXELS, scl_slope=2, scl_inter=-1024)
    array = read_image(path).array
    assert array.dtype == np.float32
    assert array[0, 0, 0, 1] == 2 * 1 - 1024


def test_time_series_is_refused_with_its_axis(tmp_path: Path) -> None:
    path = save(tmp_path / "bold.nii.gz", np.zeros((3, 4, 5, 7), np.uint8))
    with pytest.raises(DataError, match=r"bold\.nii\.gz: axis 4 has 7 points.*time series"):
        read_image(path)
    with pytest.raises(DataError, match="one volume for each label"):
        read_label(path)


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 4, 5, 1, 2)])
def test_fourth_or_fifth_axis_is_channels_where_asked(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.arange(120, dtype=np.int16).reshape(shape)
    image = read_image(save(tmp_path / "a.nii.gz", array), channels=2)
    assert image.array.shape == (2, 3, 4, 5)
    np.testing.assert_array_equal(image.array[1], array.reshape(3, 4, 5, 2)[..., 1])


def test_wrong_number_of_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.nii: 1 channel found, expected 2"):
        read_image(save(tmp_path / "a.nii", VOXELS), channels=2)


def test_one_slice_is_3d_unless_2d_is_asked(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", VOXELS[..., :1])
    assert read_image(path).array.shape == (1, 3, 4, 1)
    flat = read_image(path, spatial_dims=2)
    np.testing.assert_array_equal(flat.array, VOXELS[None, ..., 0])
    np.testing.assert_allclose(flat.grid.affine, np.diag([0.5, 1, 1]), rtol=1e-6)
    assert flat.header is not None
    assert flat.header.shape == (3, 4, 1)


def test_volume_is_refused_where_2d_is_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 2 axes"):
        read_image(save(tmp_path / "a.nii", VOXELS), spatial_dims=2)


def test_sform_wins_over_a_differing_qform_with_a_warning(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, np.eye(4))
    image.set_qform(np.diag([2.0, 2, 2, 1]), code=1)
    image.set_sform(OBLIQUE, code=1)
    nib.save(image, tmp_path / "a.nii")
    read = read_image(tmp_path / "a.nii")
    np.testing.assert_allclose(read.grid.affine, OBLIQUE, rtol=1e-6)
    assert "sform and qform" in read.geometry.warnings[0]


def test_agreeing_forms_give_no_warning(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, OBLIQUE)
    image.set_qform(OBLIQUE, code=1)
    image.set_sform(OBLIQUE, code=1)
    nib.save(image, tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").geometry.warnings == ()


def test_qform_is_used_where_there_is_no_sform(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, OBLIQUE)
    image.set_qform(OBLIQUE, code=1)
    image.set_sform(None, code=0)
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(read_image(tmp_path / "a.nii").grid.affine, OBLIQUE, atol=1e-5)


def test_no_form_at_all_is_placed_as_nibabel_does(tmp_path: Path) -> None:
    path = save_raw(tmp_path / "a.nii", VOXELS, sform_code=0, qform_code=0, pixdim=[1, 2, 3, 4, 0, 0, 0, 0])
    image = read_image(path)
    np.testing.assert_allclose(image.grid.affine, nib.load(path).affine)
    assert image.geometry.warnings == (
        "neither sform nor qform says how the voxels lie: left and right, top and bottom are a guess",
    )
    # what a channel has is not lost behind another, nor told twice
    assert read_images([save(tmp_path / "b.nii", VOXELS, image.grid.affine), path, path]).geometry.warnings == (
        image.geometry.warnings
    )


def test_one_slice_needs_no_form(tmp_path: Path) -> None:
    path = save_raw(tmp_path / "a.nii", VOXELS[..., :1], sform_code=0, qform_code=0)
    assert read_image(path).geometry.warnings == read_image(path, spatial_dims=2).geometry.warnings == ()


@pytest.mark.parametrize("forms", [{"sform_code": 2, "qform_code": 0}, {"sform_code": 0, "qform_code": 1}])
def test_one_form_is_enough(tmp_path: Path, forms: dict[str, int]) -> None:
    assert read_image(save_raw(tmp_path / "a.nii", VOXELS, **forms)).geometry.warnings == ()


def test_invalid_qform_beside_a_sform_is_a_warning(tmp_path: Path) -> None:
    path = save_raw(tmp_path / "a.nii", VOXELS, qform_code=1, sform_code=1, quatern_b=0.9, quatern_c=0.9)
    assert "qform is invalid" in read_image(path).geometry.warnings[0]


def test_invalid_qform_alone_is_refused(tmp_path: Path) -> None:
    path = save_raw(tmp_path / "a.nii", VOXELS, qform_code=1, sform_code=0, quatern_b=0.9, quatern_c=0.9)
    with pytest.raises(GeometryError, match=r"a\.nii: the qform is invalid"):
        read_image(path)


def test_micrometres_become_mm(tmp_path: Path) -> None:
    path = save_raw(tmp_path / "a.nii", VOXELS, xyzt_units=3)
    image = read_image(path)
    np.testing.assert_allclose(image.grid.spacing_mm, (0.001,) * 3)
    assert "converted to mm" in image.geometry.warnings[0]


@pytest.mark.parametrize("forms", [{"sform_code": 0, "qform_code": 1}, {"sform_code": 0, "qform_code": 0}])
def test_zero_spacing_is_refused(tmp_path: Path, forms: dict[str, int]) -> None:
    path = save_raw(tmp_path / "flat.nii", VOXELS, pixdim=[1, 1, 0, 1, 0, 0, 0, 0], **forms)
    with pytest.raises(GeometryError, match=r"flat\.nii: spacing"):
        read_image(path)


def test_singular_sform_is_refused(tmp_path: Path) -> None:
    path = save_raw(tmp_path / "flat.nii", VOXELS, sform_code=1, srow_z=[0, 0, 0, 0])
    with pytest.raises(GeometryError, match=r"flat\.nii.*singular"):
        read_image(path)


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", ["cut.nii", "cut.nii.gz"])
def test_cut_off_nifti_is_refused(tmp_path: Path, name: str, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 9, 10), dtype=np.uint8)
    path = save(tmp_path / name, noise)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(DataError, match="cut"):
        read_image(path)


def test_checksum_of_gzip_is_looked_at(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", VOXELS)
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="damaged"):
        read_image(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.nii.gz", b"", "empty"),
        ("a.nii.gz", b"\x1f\x8b" + b"0" * 100, "damaged"),
        ("a.nii", b"hello", "not a NIfTI"),
        ("a.nii", b"x" * 1000, "not a NIfTI"),
        ("a.nii", (348).to_bytes(4, "little") + b"\0" * 10, "cut off in the header"),
        ("a.nii.gz", gzip.compress(b"hello", mtime=0), "not a NIfTI"),
        ("a.png", b"hello", "not a picture"),
        ("a.nrrd", b"hello", "cannot be read"),
        ("a.mha", b"hello", "cannot be read"),
        ("a.doc", b"hello", "ending not known"),
    ],
)
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "a.nii")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no DICOM file found, expected a series"):
        read_image(tmp_path)


def test_header_that_claims_too_much_is_refused_without_the_memory(tmp_path: Path) -> None:
    path = save_raw(tmp_path / "a.nii", VOXELS, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
    with pytest.raises(DataError, match="cut off"):
        read_image(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_number(tmp_path: Path, value: float) -> None:
    array = VOXELS.astype(np.float32)
    array[0, 0, :2] = value
    path = save(tmp_path / "a.nii", array)
    with pytest.raises(DataError, match="2 of 60 voxels"):
        read_image(path)
    assert np.isfinite(read_image(path, finite=False).array).sum() == 58


def test_huge_but_finite_values_are_accepted(tmp_path: Path) -> None:
    array = np.full((3, 4, 5), np.finfo(np.float64).max)
    assert read_image(save(tmp_path / "a.nii", array)).array.max() == np.finfo(np.float64).max


def test_complex_and_colour_nifti_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="complex"):
        read_image(save(tmp_path / "a.nii", VOXELS.astype(np.complex64)))
    colour = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(DataError, match="colour"):
        read_image(save(tmp_path / "b.nii", colour))


def test_header_alone_gives_the_same_grid(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", VOXELS)
    assert read_geometry(path).grid.matches(read_image(path).grid, tolerance=0)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.mhd", "a.nhdr"])
def test_itk_formats_agree_with_nifti_in_space_and_voxels(tmp_path: Path, name: str) -> None:
    nifti = save(tmp_path / "a.nii", VOXELS)
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(nifti)), str(tmp_path / name))
    image = read_image(tmp_path / name)
    np.testing.assert_array_equal(image.array, VOXELS[None])
    np.testing.assert_allclose(image.grid.affine, OBLIQUE, atol=1e-5)
    assert read_geometry(tmp_path / name).grid.matches(image.grid, tolerance=0)


def test_itk_vectors_are_channels(tmp_path: Path) -> None:
    vectors = np.stack([VOXELS.T, VOXELS.T + 100], axis=-1)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(vectors, isVector=True), str(tmp_path / "a.nrrd"))
    image = read_image(tmp_path / "a.nrrd", channels=2)
    np.testing.assert_array_equal(image.array, np.stack([VOXELS, VOXELS + 100]))


@pytest.mark.parametrize("compress", [True, False])
def test_cut_off_nrrd_is_refused(tmp_path: Path, compress: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (10, 20, 30), dtype=np.uint8)
    path = tmp_path / "a.nrrd"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise), str(path), useCompression=compress)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"a\.nrrd"):
        read_image(path)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_grey_picture_keeps_rows_and_columns(tmp_path: Path, name: str) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Picture.fromarray(pixels).save(tmp_path / name)
    image = read_image(tmp_path / name, spatial_dims=2)
    np.testing.assert_array_equal(image.array, pixels[None])
    np.testing.assert_array_equal(image.grid.affine, np.eye(3))
    assert read_geometry(tmp_path / name).grid.shape == (3, 4)


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    pixels = np.array([[0, 300], [65535, 7]], np.uint16)
    Picture.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").array[0].tolist() == pixels.tolist()


def test_sixteen_bit_colour_is_kept(tmp_path: Path) -> None:
    pixels = np.array([[[1000, 2000, 3000], [65535, 0, 1]]], np.uint16)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels, isVector=True), str(tmp_path / "a.png"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").array, np.moveaxis(pixels, -1, 0))


def test_colour_is_three_channels_and_alpha_is_dropped(tmp_path: Path) -> None:
    pixels = np.array([[[10, 20, 30, 40], [0, 0, 0, 255]]], np.uint8)
    Picture.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").array[:, 0, 0].tolist() == [10, 20, 30]


def test_colour_becomes_luma_where_one_channel_is_asked(tmp_path: Path) -> None:
    Picture.fromarray(np.array([[[100, 200, 50]]], np.uint8)).save(tmp_path / "a.png")
    # 0.299 · 100 + 0.587 · 200 + 0.114 · 50 = 153.0
    assert read_image(tmp_path / "a.png", channels=1).array.tolist() == [[[153]]]


def test_grey_in_three_equal_channels_is_one(tmp_path: Path) -> None:
    Picture.fromarray(np.full((2, 2, 3), 9, np.uint8)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").array.shape == (1, 2, 2)
    assert read_image(tmp_path / "a.png", channels=3).array.shape == (3, 2, 2)


def test_palette_picture_is_colour_as_image_and_index_as_label(tmp_path: Path) -> None:
    picture = Picture.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "a.png")
    assert read_label(tmp_path / "a.png").array.tolist() == [[0, 1], [2, 1]]
    assert read_image(tmp_path / "a.png").array[:, 0, 1].tolist() == [255, 0, 0]


def test_coloured_label_is_refused_and_grey_colour_is_not(tmp_path: Path) -> None:
    Picture.fromarray(np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"\[255, 0, 0\]"):
        read_label(tmp_path / "a.png")
    Picture.fromarray(np.array([[[2, 2, 2], [0, 0, 0]]], np.uint8)).save(tmp_path / "b.png")
    assert read_label(tmp_path / "b.png").array.tolist() == [[2, 0]]


def test_tiff_of_several_pages_is_refused(tmp_path: Path) -> None:
    page = Picture.fromarray(np.zeros((3, 4), np.uint8))
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page, page])
    with pytest.raises(DataError, match="3 pages"):
        read_image(tmp_path / "a.tif")


def test_cut_off_png_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (50, 50), dtype=np.uint8)
    Picture.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:1000])
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        read_image(tmp_path / "a.png")


def test_picture_is_refused_where_a_volume_is_asked(tmp_path: Path) -> None:
    Picture.fromarray(np.zeros((3, 4), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="2 axes"):
        read_image(tmp_path / "a.png", spatial_dims=3)


def test_one_file_per_channel_is_stacked_in_order(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"a_{n}.nii", VOXELS + n) for n in range(2)]
    np.testing.assert_array_equal(read_images(paths, channels=2).array, np.stack([VOXELS, VOXELS + 1]))


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    moved = OBLIQUE.copy()
    moved[0, 3] += 1
    paths = [save(tmp_path / "a.nii", VOXELS), save(tmp_path / "b.nii", VOXELS, moved)]
    with pytest.raises(GeometryError, match=r"b\.nii.*differs"):
        read_images(paths)


@pytest.mark.parametrize("suffix", [".nii", ".mha"])
@pytest.mark.parametrize(
    "moved", [np.diag([-1.0, 1, 1, 1]), np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 60], [0, 0, 0, 1]])]
)
def test_planes_elsewhere_in_space_are_not_one_case(tmp_path: Path, suffix: str, moved: np.ndarray) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path, affine in zip(paths, (OBLIQUE, moved @ OBLIQUE)):
        nifti = save(tmp_path / "t.nii", VOXELS[..., :1], affine)
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(nifti)), str(path))
    assert read_images(paths[:1] * 2, spatial_dims=2).array.shape == (2, 3, 4)
    with pytest.raises(GeometryError, match=rf"b\{suffix}.*differs .* in shape, spacing, place or direction"):
        read_images(paths, spatial_dims=2)


def test_a_plane_without_a_place_is_anywhere(tmp_path: Path) -> None:
    placed = save(tmp_path / "a.nii", VOXELS[..., :1], np.diag([-1.0, 1, 1, 1]))
    nowhere = save_raw(tmp_path / "b.nii", VOXELS[..., :1], sform_code=0, qform_code=0)
    assert read_images([placed, nowhere], spatial_dims=2).array.shape == (2, 3, 4)


def test_a_plane_that_knows_x_and_y_alone_lies_where_its_nifti_does(tmp_path: Path) -> None:
    plane = SimpleITK.GetImageFromArray(VOXELS[..., 0].T)
    plane.SetOrigin((5, -7))
    plane.SetDirection((0, 1, -1, 0))
    paths = [tmp_path / "a.mha", tmp_path / "a.nii"]
    for path in paths:
        SimpleITK.WriteImage(plane, str(path))
    assert read_images(paths).array.shape == (2, 3, 4)
    plane.SetOrigin((5, -6))
    SimpleITK.WriteImage(plane, str(paths[1]))
    with pytest.raises(GeometryError, match="differs"):
        read_images(paths)


def test_a_picture_is_no_channel_beside_another_format(tmp_path: Path) -> None:
    square = np.arange(9, dtype=np.uint8).reshape(3, 3)
    Picture.fromarray(square).save(tmp_path / "a.png")
    paths = [tmp_path / "a.png", save(tmp_path / "b.nii", square.T, np.eye(4))]
    with pytest.raises(GeometryError, match=r"a\.png is a picture, b\.nii is not: rows and columns against x and y"):
        read_images(paths, spatial_dims=2, channels=2)


def test_missing_channel_file_is_refused(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"a_{n}.nii", VOXELS) for n in range(2)]
    with pytest.raises(DataError, match="2 files found, expected 3"):
        read_images(paths, channels=3)


@pytest.mark.parametrize(("top", "dtype"), [(255, np.uint8), (256, np.uint16), (65536, np.int32)])
def test_label_takes_the_smallest_type(tmp_path: Path, top: int, dtype: type) -> None:
    label = read_label(save(tmp_path / "a.nii", np.array([[[0, top]]], np.int32)))
    assert label.array.dtype == dtype
    assert label.array.max() == top


def test_float_label_of_whole_numbers_is_read(tmp_path: Path) -> None:
    label = read_label(save(tmp_path / "a.nii", np.array([[[0, 2.0000002]]], np.float32)))
    assert label.array.tolist() == [[[0, 2]]]
    assert label.file_dtype == np.float32


@pytest.mark.parametrize(
    ("value", "message"), [(0.5, r"value 0\.5 found in 1"), (-1, "value -1 found"), (np.nan, "1 label voxels are NaN")]
)
def test_label_that_is_no_label_is_refused(tmp_path: Path, value: float, message: str) -> None:
    path = save(tmp_path / "a.nii", np.array([[[0, value]]], np.float32))
    with pytest.raises(DataError, match=message):
        read_label(path)


def test_all_48_orientations_are_read_as_nibabel_does(tmp_path: Path) -> None:
    base = nib.Nifti1Image(VOXELS, OBLIQUE)
    turns = itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
    for axes, flips in turns:
        turned = base.as_reoriented(np.array([[axes[i], flips[i]] for i in range(3)]))
        nib.save(turned, tmp_path / "a.nii")
        image = read_image(tmp_path / "a.nii")
        np.testing.assert_array_equal(image.array[0], np.asarray(turned.dataobj))
        np.testing.assert_allclose(image.grid.affine, turned.affine, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.b.nii.gz", ("a.b", ".nii.gz")),
        ("A.NII", ("A", ".NII")),
        ("a.gz", ("a.gz", "")),
        (".nii", (".nii", "")),
        ("x_0000.png", ("x_0000", ".png")),
    ],
)
def test_names_are_split_at_the_known_ending(name: str, parts: tuple[str, str]) -> None:
    assert split_ending(name) == parts


def test_hidden_files_are_no_images() -> None:
    assert not is_image_file(Path("._a.nii.gz"))
    assert is_image_file(Path("a.nii.gz"))


def test_monai_loads_through_our_reader(tmp_path: Path) -> None:
    from monai.transforms.io.array import LoadImage

    from medseg.readers.volume import VolumeReader

    path = save(tmp_path / "a.nii.gz", VOXELS)
    loaded = LoadImage(reader=VolumeReader(spatial_dims=3, channels=1), ensure_channel_first=True)(path)
    np.testing.assert_array_equal(loaded.numpy(), VOXELS[None])
    np.testing.assert_allclose(loaded.affine.numpy(), OBLIQUE, rtol=1e-6)


def test_monai_does_not_fall_back_to_a_reader_that_accepts_what_ours_refuses(tmp_path: Path) -> None:
    from monai.transforms.io.array import LoadImage

    from medseg.readers.volume import VolumeReader

    path = save(tmp_path / "a.nii.gz", np.zeros((3, 4, 5, 2), np.uint8))
    with pytest.raises(DataError, match="time series"):
        LoadImage(reader=VolumeReader(spatial_dims=3, channels=1))(path)


def test_monai_gets_a_4x4_affine_for_pictures(tmp_path: Path) -> None:
    from monai.transforms.io.array import LoadImage

    from medseg.readers.volume import VolumeReader

    Picture.fromarray(np.zeros((3, 4), np.uint8)).save(tmp_path / "a.png")
    loaded = LoadImage(reader=VolumeReader(labels=True), ensure_channel_first=True)(tmp_path / "a.png")
    assert loaded.shape == (1, 3, 4)
    np.testing.assert_array_equal(loaded.affine.numpy(), np.eye(4))


@pytest.mark.shared_data
def test_real_nrrd_pairs_agree(shared_data: Path) -> None:
    for folder in sorted((shared_data / "pairs3d").glob("nrrd_*")):
        image, label = read_image(folder / "image.nrrd"), read_label(folder / "label.nrrd")
        assert image.grid.matches(label.grid), folder.name


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    # it would be waited for without end
    os.mkfifo(tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"a\.nii: neither a file nor a folder"):
        read_image(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("mode", "expected"), [("RGB", True), ("RGBA", True), ("P", True), ("L", False), ("LA", False), ("I;16", False)]
)
def test_a_picture_holds_colour_where_it_shows_some(tmp_path: Path, mode: str, expected: bool) -> None:
    green = (0, 200, 0) if mode == "P" else {"RGB": (0, 200, 0), "RGBA": (0, 200, 0, 255), "LA": (9, 255)}.get(mode, 9)
    picture = Picture.new("RGB", (3, 2), green).convert("P") if mode == "P" else Picture.new(mode, (3, 2), green)
    picture.save(tmp_path / "a.png")
    assert holds_colour(tmp_path / "a.png") is expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_grey_that_is_stored_as_colour_is_none(tmp_path: Path, mode: str) -> None:
    Picture.linear_gradient("L").resize((4, 4)).convert(mode).save(tmp_path / "a.png")
    assert not holds_colour(tmp_path / "a.png")


def test_what_is_no_picture_holds_no_colour(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert not holds_colour(tmp_path / "a.png")
    assert not holds_colour(tmp_path / "gone.png")
    assert not holds_colour(tmp_path / "a.nii")


# ---- the files of a header


HEADERS = {
    "one.mhd": ("ObjectType = Image\nNDims = 3\nElementDataFile = a.raw\n", ["a.raw"]),
    "spaces.mhd": ("NDims = 3\r\nElementDataFile =  the voxels.raw \r\n", ["the voxels.raw"]),
    "below.mhd": ("NDims = 3\nElementDataFile = sub/b.raw\n", ["sub/b.raw"]),
    "local.mha": ("NDims = 3\nElementDataFile = LOCAL\nElementDataFile = a.raw\n", []),
    "list.mhd": ("NDims = 3\nElementDataFile = LIST 2D\ns2.raw\ns10.raw\n", ["s2.raw", "s10.raw"]),
    "many.mhd": ("NDims = 3\nElementDataFile = s%d.raw 2 10 8\n", ["s10.raw", "s2.raw"]),
    "padded.mhd": ("NDims = 3\nElementDataFile = sub/p%03d.raw 1 2 1\n", ["sub/p001.raw", "sub/p002.raw"]),
    "one.nhdr": ("NRRD0005\ntype: short\ndata file: ./a.raw\n\n", ["a.raw"]),
    "old.nhdr": ("NRRD0001\ntype: short\ndatafile: a.raw\n", ["a.raw"]),
    "list.nhdr": ("NRRD0005\n# data file: a.raw\ndata file: LIST 2\ns2.raw\ns10.raw\n", ["s2.raw", "s10.raw"]),
    "many.nhdr": ("NRRD0005\ndata file: s%d.raw 2 10 8 2\n\n", ["s10.raw", "s2.raw"]),
    "inside.nrrd": ("NRRD0005\ntype: short\n\ndata file: a.raw\n", []),
    "lost.mhd": ("NDims = 3\nElementDataFile = not there.raw\n", []),
    "cut.mhd": ("NDims = 3\n", []),
}


@pytest.mark.parametrize("name", HEADERS)
def test_the_files_of_the_voxels_are_those_that_the_header_names(tmp_path: Path, name: str) -> None:
    for file in ("a.raw", "the voxels.raw", "sub/b.raw", "s2.raw", "s10.raw", "s.raw", "sub/p001.raw", "sub/p002.raw"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"\0")
    header, named = HEADERS[name]
    (tmp_path / name).write_bytes(header.encode())
    assert stored_in(tmp_path / name) == (tmp_path / name, *(tmp_path / file for file in named))


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.mhd", "a.nhdr", "a.nii.gz"])
@pytest.mark.parametrize("compress", [True, False])
def test_no_file_that_is_written_is_missed(tmp_path: Path, name: str, compress: bool) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOXELS), str(tmp_path / name), useCompression=compress)
    assert sorted(stored_in(tmp_path / name)) == sorted(tmp_path.iterdir())


def test_a_header_that_is_not_there_is_stored_in_itself(tmp_path: Path) -> None:
    assert stored_in(tmp_path / "a.mhd") == (tmp_path / "a.mhd",)
