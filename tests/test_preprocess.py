"""From files to the network's grid: one anatomy gives one tensor however it is stored, and the cache is never stale."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from geometry import oblique, orientations, reorient, save
from PIL import Image as Picture
from tiny import blobs

from medseg import device, preprocess
from medseg.cases import Case
from medseg.config import DataConfig, IntensityConfig, PreprocessConfig
from medseg.errors import DataError, GeometryError
from medseg.preprocess import IGNORE_INDEX, Prepared, percentiles, prepare, prepare_cached

SHAPE = (7, 9, 11)
AFFINE = oblique((1.0, 1.5, 2.5))
DATA = DataConfig(labels={"a": 3, "b": 7})
AS_IT_IS = PreprocessConfig(intensity=(IntensityConfig(normalise="none"),))


def a_label() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[2:5, 3:7, 4:9] = 3
    label[3:, 5:8, 6:8] = 7
    return label


def a_case(folder: Path, image: np.ndarray | None = None, label: np.ndarray | None = None) -> Case:
    folder.mkdir(exist_ok=True)
    image = save(folder / "image.nii.gz", blobs(SHAPE) if image is None else image, AFFINE)
    path = save(folder / "label.nii.gz", a_label() if label is None else label, AFFINE)
    return Case("one", (image,), path, "one")


def world(prepared: Prepared, *index: int) -> np.ndarray:
    return prepared.grid.affine @ np.array([*index, 1])


# ---- geometry


@pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 2.0)])
def test_48_ways_to_store_a_volume_give_the_same_numbers(tmp_path: Path, spacing: tuple[float, ...] | None) -> None:
    image, label = blobs(SHAPE), a_label()
    config = PreprocessConfig(spacing_mm=spacing)
    expected: Prepared | None = None
    for order, flipped in orientations():
        turned, affine = reorient(image, AFFINE, order, flipped)
        paths = (
            save(tmp_path / "i.nii", turned, affine),
            save(tmp_path / "l.nii", reorient(label, AFFINE, order, flipped)[0], affine),
        )
        found = prepare(Case("c", paths[:1], paths[1], "c"), config, DATA, with_label=True)
        expected = expected or found
        assert found.image.shape == expected.image.shape
        # headers hold float32; normalised values are about 1
        np.testing.assert_allclose(found.image, expected.image, atol=1e-4)
        assert torch.equal(found.label, expected.label)
        np.testing.assert_allclose(found.grid.affine, expected.grid.affine, atol=1e-4)
        assert found.source.shape == turned.shape


def test_axes_are_turned_to_right_anterior_superior(tmp_path: Path) -> None:
    image = np.zeros((3, 4, 5), np.float32)
    image[0, 1, 2] = 9
    # i runs to the left, j to the feet, k to the front
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, 2.0, 0], [0, -3.0, 0, 0], [0, 0, 0, 1]])
    path = save(tmp_path / "i.nii", image, affine)
    found = prepare(Case("c", (path,), None, "c"), AS_IT_IS, DATA, with_label=False)
    assert tuple(found.image.shape) == (1, 3, 5, 4)
    assert torch.nonzero(found.image).tolist() == [[0, 2, 2, 2]]
    np.testing.assert_allclose(world(found, 2, 2, 2), affine @ [0, 1, 2, 1])
    assert found.grid.spacing_mm == (1.0, 2.0, 3.0)


def test_without_orient_the_axes_stay(tmp_path: Path) -> None:
    path = save(tmp_path / "i.nii", np.zeros((3, 4, 5), np.float32), np.diag([-1, -2, 3, 1]))
    config = AS_IT_IS.model_copy(update={"orient": False})
    found = prepare(Case("c", (path,), None, "c"), config, DATA, with_label=False)
    np.testing.assert_allclose(found.grid.affine, np.diag([-1, -2, 3, 1]))


def test_spacing_is_what_was_asked(tmp_path: Path) -> None:
    config = PreprocessConfig(spacing_mm=(0.5, 3.0, 2.5))
    found = prepare(a_case(tmp_path), config, DATA, with_label=True)
    assert tuple(found.image.shape) == (1, 14, 5, 11)
    assert tuple(found.label.shape) == (14, 5, 11)
    assert found.grid.spacing_mm == pytest.approx((0.5, 3.0, 2.5), abs=1e-5)


def test_a_grid_that_no_memory_holds_is_refused_with_the_file_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "i.nii", np.zeros((4, 5, 6), np.float32), np.diag([500, 400, 600, 1]))
    config = PreprocessConfig(spacing_mm=(1.0, 1.0, 0.5))
    # 2,000 × 2,000 × 7,200 voxels are 13 times the most
    monkeypatch.setattr(device, "machine_memory_bytes", lambda: None)
    expected = r"i\.nii: spacing 500 × 400 × 600 mm found; at the 1 × 1 × 0\.5 mm .* 2000 × 2000 × 7200 voxels"
    with pytest.raises(DataError, match=expected):
        prepare(Case("c", (path,), None, "c"), config, DATA, with_label=False)


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_a_grid_that_this_machine_cannot_hold_is_refused_with_the_file_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int, fits: bool
) -> None:
    path = save(tmp_path / "i.nii", np.zeros((4, 4, 4), np.float32), np.eye(4))
    config = PreprocessConfig(spacing_mm=(1.0, 1.0, 0.5))
    # 2.2 times 4 × 4 × 8 voxels of four bytes, of which half the memory may hold no more
    monkeypatch.setattr(device, "machine_memory_bytes", lambda: math.ceil(2.2 * 2 * 4 * 4 * 4 * 8) + spare)
    expected = r"i\.nii: .* 4 × 4 × 8 voxels, whose resampling takes 0\.0 GB"
    with nullcontext() if fits else pytest.raises(MemoryError, match=expected):
        prepare(Case("c", (path,), None, "c"), config, DATA, with_label=False)


def test_a_file_beyond_the_most_voxels_may_shrink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MOST_VOXELS", 10)
    path = save(tmp_path / "i.nii", np.zeros((4, 4, 4), np.float32), np.eye(4))
    case = Case("c", (path,), None, "c")
    found = prepare(case, PreprocessConfig(spacing_mm=(1.0, 1.0, 2.0)), DATA, with_label=False)
    assert tuple(found.image.shape) == (1, 4, 4, 2)
    with pytest.raises(DataError, match="4 × 4 × 8 voxels, expected at most 10;"):
        prepare(case, PreprocessConfig(spacing_mm=(1.0, 1.0, 0.5)), DATA, with_label=False)


def test_nonzero_crop_keeps_every_voxel_that_is_not_zero_and_its_place(tmp_path: Path) -> None:
    image = np.zeros(SHAPE, np.float32)
    image[2, 3, 4], image[4, 3, 8] = 5, -6
    config = AS_IT_IS.model_copy(update={"crop": "nonzero"})
    found = prepare(a_case(tmp_path, image), config, DATA, with_label=True)
    assert tuple(found.image.shape) == (1, 3, 1, 5)
    assert (found.image[0, 0, 0, 0], found.image[0, 2, 0, 4]) == (5, -6)
    assert torch.equal(found.label[:, 0], torch.as_tensor(np.array([0, 1, 2])[a_label()[2:5, 3, 4:9] // 3]))
    np.testing.assert_allclose(world(found, 2, 0, 4), AFFINE @ [4, 3, 8, 1], atol=1e-5)
    assert found.source.shape == SHAPE


def test_an_empty_image_is_not_cropped(tmp_path: Path) -> None:
    config = PreprocessConfig(crop="nonzero")
    found = prepare(a_case(tmp_path, np.zeros(SHAPE, np.float32)), config, DATA, with_label=True)
    assert tuple(found.image.shape[1:]) == SHAPE


def test_pictures_come_to_the_shape_that_was_asked(tmp_path: Path) -> None:
    pixels = np.kron(np.arange(15, dtype=np.uint8).reshape(3, 5), np.full((4, 4), 10, np.uint8))
    Picture.fromarray(pixels).save(tmp_path / "p.png")
    data = DataConfig(spatial_dims=2, labels={"a": 1})
    config = PreprocessConfig(orient=False, shape=(6, 20), intensity=(IntensityConfig(normalise="none"),))
    found = prepare(Case("p", (tmp_path / "p.png",), None, "p"), config, data, with_label=False)
    assert tuple(found.image.shape) == (1, 6, 20)
    assert found.source.shape == (12, 20)
    assert found.grid.spacing_mm == (2.0, 1.0)


def test_a_mirrored_plane_is_no_label_of_a_plane(tmp_path: Path) -> None:
    image = save(tmp_path / "i.nii", np.ones((4, 5, 1), np.float32), np.diag([1.0, 1, 5, 1]))
    label = save(tmp_path / "l.nii", np.ones((4, 5, 1), np.uint8), np.diag([1.0, -1, 5, 1]))
    data = DataConfig(spatial_dims=2, labels={"a": 1})
    with pytest.raises(GeometryError, match=r"l\.nii: label grid .* differs .* in shape, spacing, place or direction"):
        prepare(Case("c", (image,), label, "c"), PreprocessConfig(orient=False), data, with_label=True)


@pytest.mark.parametrize("names", [("i.png", "l.nii.gz"), ("i.nii.gz", "l.png"), ("i.png", "l.mha")])
def test_a_label_of_a_picture_has_to_be_a_picture(tmp_path: Path, names: tuple[str, str]) -> None:
    square = np.arange(16, dtype=np.uint8).reshape(4, 4) % 2
    for name in names:
        if name.endswith(".png"):
            Picture.fromarray(square).save(tmp_path / name)
        else:
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(square[None]), str(tmp_path / name))
    case = Case("c", (tmp_path / names[0],), tmp_path / names[1], "c")
    data = DataConfig(spatial_dims=2, labels={"a": 1})
    with pytest.raises(GeometryError, match=r"is a picture, .* is not: rows and columns against x and y"):
        prepare(case, PreprocessConfig(orient=False), data, with_label=True)


# ---- intensities


def values_after(tmp_path: Path, image: np.ndarray, how: IntensityConfig) -> torch.Tensor:
    case = a_case(tmp_path, image)
    return prepare(case, PreprocessConfig(intensity=(how,)), DATA, with_label=False).image[0]


def test_ct_is_clipped_and_normalised_with_fixed_numbers(tmp_path: Path) -> None:
    image = np.full(SHAPE, 150, np.float32)
    image[0, 0, :3] = -2000, 100, 3000
    how = IntensityConfig(clip=(-100, 300), normalise="fixed", mean=100, sd=50)
    found = values_after(tmp_path, image, how)
    assert found[0, 0, :4].tolist() == [-4, 0, 4, 1]


def test_image_is_normalised_with_its_own_numbers(tmp_path: Path) -> None:
    image = np.zeros((2, 2, 2), np.float32)
    image[0] = 4
    path = save(tmp_path / "i.nii", image, np.eye(4))
    found = prepare(Case("c", (path,), None, "c"), PreprocessConfig(), DATA, with_label=False)
    assert found.image[0, :, 0, 0].tolist() == [1, -1]


def test_small_differences_on_a_large_offset_survive(tmp_path: Path) -> None:
    image = np.full(SHAPE, 1e6, np.float32)
    image[::2] += 1
    found = values_after(tmp_path, image, IntensityConfig())
    assert float(found.double().std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_a_constant_channel_becomes_zero(tmp_path: Path) -> None:
    assert not values_after(tmp_path, np.full(SHAPE, 41.7, np.float32), IntensityConfig()).any()


def test_every_channel_is_normalised_by_its_own_rule(tmp_path: Path) -> None:
    files = tuple(save(tmp_path / f"{n}.nii", np.full(SHAPE, v, np.float32), AFFINE) for n, v in enumerate((10, 20)))
    config = PreprocessConfig(
        intensity=(IntensityConfig(normalise="fixed", mean=4, sd=2), IntensityConfig(normalise="none"))
    )
    data = DataConfig(channels=("t1", "t2"), labels={"a": 1})
    found = prepare(Case("c", files, None, "c"), config, data, with_label=False)
    assert found.image[:, 0, 0, 0].tolist() == [3, 20]


# ---- labels


def test_values_with_gaps_become_indices(tmp_path: Path) -> None:
    found = prepare(a_case(tmp_path), AS_IT_IS, DATA, with_label=True)
    expected = np.select([a_label() == 3, a_label() == 7], [1, 2], 0)
    assert found.label.dtype == torch.uint8
    np.testing.assert_array_equal(found.label, expected)


def test_ignored_voxels_become_255(tmp_path: Path) -> None:
    data = DataConfig(labels={"a": 3, "ignore": 7})
    found = prepare(a_case(tmp_path), AS_IT_IS, data, with_label=True)
    np.testing.assert_array_equal(found.label == IGNORE_INDEX, a_label() == 7)


def test_regions_keep_the_values_of_the_file(tmp_path: Path) -> None:
    data = DataConfig(labels={"both": (3, 7), "b": (7,)}, region_values=(1, 2))
    found = prepare(a_case(tmp_path), AS_IT_IS, data, with_label=True)
    np.testing.assert_array_equal(found.label, a_label())


def test_an_unknown_value_is_refused_with_the_file_named(tmp_path: Path) -> None:
    label = a_label()
    label[0, 0, 0] = 5
    case = a_case(tmp_path, label=label)
    with pytest.raises(DataError, match=r"label\.nii\.gz: label value 5 found, expected one of \[0, 3, 7\]"):
        prepare(case, AS_IT_IS, DATA, with_label=True)


def moved_label(tmp_path: Path, voxels: float) -> Case:
    case = a_case(tmp_path)
    affine = AFFINE.copy()
    affine[2, 3] += voxels * 1.0
    return replace(case, label=save(tmp_path / "moved.nii.gz", a_label(), affine))


def test_a_label_on_another_grid_is_refused_with_the_file_named(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match=r"moved\.nii\.gz: label grid .* differs"):
        prepare(moved_label(tmp_path, 0.2), AS_IT_IS, DATA, with_label=True)


def test_a_label_that_differs_by_rounding_is_taken_as_on_the_grid_of_the_image(tmp_path: Path) -> None:
    found = prepare(moved_label(tmp_path, 0.05), AS_IT_IS, DATA, with_label=True)
    np.testing.assert_array_equal(found.label > 0, a_label() > 0)


def test_a_case_without_label_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one: no label file"):
        prepare(replace(a_case(tmp_path), label=None), AS_IT_IS, DATA, with_label=True)


# ---- cache


def equal(a: Prepared, b: Prepared) -> bool:
    return (
        torch.equal(a.image, b.image)
        and torch.equal(a.label, b.label)
        and np.array_equal(a.grid.affine, b.grid.affine)
        and np.array_equal(a.source.affine, b.source.affine)
        and a.source.shape == b.source.shape
        and a.id == b.id
    )


def refuse(*_: object, **__: object) -> Prepared:
    raise RuntimeError("prepared again")


def test_an_unchanged_case_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = a_case(tmp_path)
    config = PreprocessConfig(spacing_mm=(2, 2, 2))
    first = prepare_cached(case, config, DATA, tmp_path / "cache")
    monkeypatch.setattr(preprocess, "prepare", refuse)
    assert equal(prepare_cached(case, config, DATA, tmp_path / "cache"), first)


@pytest.mark.parametrize(
    ("config", "data"),
    [
        (PreprocessConfig(spacing_mm=(2, 2, 2)), DATA),
        (PreprocessConfig(crop="nonzero"), DATA),
        (PreprocessConfig(intensity=(IntensityConfig(clip=(-1, 1)),)), DATA),
        (PreprocessConfig(), DataConfig(labels={"a": 7, "b": 3})),
        (PreprocessConfig(), DataConfig(labels={"a": 3, "ignore": 7})),
    ],
)
def test_a_changed_setting_is_never_answered_from_the_cache(
    tmp_path: Path, config: PreprocessConfig, data: DataConfig
) -> None:
    case = a_case(tmp_path)
    prepare_cached(case, PreprocessConfig(), DATA, tmp_path / "cache")
    found = prepare_cached(case, config, data, tmp_path / "cache")
    assert equal(found, prepare(case, config, data, with_label=True))


@pytest.mark.parametrize("which", ["image", "label"])
def test_other_voxels_are_read_again_even_at_the_same_size_and_time(tmp_path: Path, which: str) -> None:
    image, label = (save(tmp_path / f"{n}.nii", np.ones(SHAPE, np.uint8), AFFINE) for n in ("image", "label"))
    case, data = Case("one", (image,), label, "one"), DataConfig(labels={"a": 1, "b": 2})
    prepare_cached(case, AS_IT_IS, data, tmp_path / "cache")
    path = image if which == "image" else label
    before = path.stat()
    save(path, np.full(SHAPE, 2, np.uint8), AFFINE)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    found = prepare_cached(case, AS_IT_IS, data, tmp_path / "cache")
    assert (found.image == (2 if which == "image" else 1)).all()
    assert (found.label == (2 if which == "label" else 1)).all()


def test_copies_at_another_place_and_time_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = a_case(tmp_path / "a")
    first = prepare_cached(case, AS_IT_IS, DATA, tmp_path / "cache")
    (tmp_path / "a").rename(tmp_path / "b")
    image, label = (tmp_path / "b" / path.name for path in (case.images[0], case.label))
    os.utime(image, ns=(0, 0))
    monkeypatch.setattr(preprocess, "prepare", refuse)
    assert equal(prepare_cached(replace(case, images=(image,), label=label), AS_IT_IS, DATA, tmp_path / "cache"), first)


def test_changed_labels_are_read_again(tmp_path: Path) -> None:
    case = a_case(tmp_path)
    prepare_cached(case, AS_IT_IS, DATA, tmp_path / "cache")
    save(case.label, np.full(SHAPE, 7, np.uint8), AFFINE)
    assert (prepare_cached(case, AS_IT_IS, DATA, tmp_path / "cache").label == 2).all()


def test_two_cases_of_one_name_do_not_share_a_cache_file(tmp_path: Path) -> None:
    one = a_case(tmp_path / "a")
    two = a_case(tmp_path / "b", np.full(SHAPE, 5, np.float32))
    prepare_cached(one, AS_IT_IS, DATA, tmp_path / "cache")
    assert (prepare_cached(two, AS_IT_IS, DATA, tmp_path / "cache").image == 5).all()


@pytest.mark.parametrize("damage", ["short", "empty", "noise"])
def test_a_damaged_cache_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    case = a_case(tmp_path)
    first = prepare_cached(case, PreprocessConfig(), DATA, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    # the tensors of `first` are mapped from the file: it is replaced, not cut under them
    file.unlink()
    file.write_bytes({"short": whole[:-100], "empty": b"", "noise": bytes(range(256)) * 8}[damage])
    assert equal(prepare_cached(case, PreprocessConfig(), DATA, tmp_path / "cache"), first)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("shape", [(64, 64, 400), (128, 32, 391), (50, 50, 50)])
def test_percentiles_see_all_of_a_volume(shape: tuple[int, ...]) -> None:
    # one half of the first axis is bright: a sample of single columns would miss it
    array = np.zeros((1, *shape), np.int16)
    array[:, shape[0] // 2 :] = 100
    found = percentiles(array)[0].tolist()
    assert (found[0], found[3], found[5], found[8]) == (0, 0, 100, 100)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_constant_channel_becomes_zero_also_on_another_grid(tmp_path: Path, dtype: type) -> None:
    path = save(tmp_path / "i.nii", np.full(SHAPE, 7, dtype), AFFINE)
    config = PreprocessConfig(spacing_mm=(0.7, 0.7, 1.3))
    data = DataConfig(labels={"a": 1})
    assert not prepare(Case("c", (path,), None, "c"), config, data, with_label=False).image.any()


def test_a_case_whose_name_is_no_text_is_kept_too(tmp_path: Path) -> None:
    case = replace(a_case(tmp_path), id="caf\udce9")
    assert prepare_cached(case, AS_IT_IS, DATA, tmp_path / "cache").id == case.id
    assert [file.name[:5] for file in (tmp_path / "cache").iterdir()] == ["caf?-"]


@pytest.mark.parametrize("letter", ["a", "é", "骨"])
def test_a_case_whose_name_is_as_long_as_a_disk_takes_is_kept_too(tmp_path: Path, letter: str) -> None:
    case = a_case(tmp_path)
    names = [letter * ((255 - len(".nii.gz")) // len(letter.encode()) - 1) + end for end in ("x", "y")]
    found = [prepare_cached(replace(case, id=name), AS_IT_IS, DATA, tmp_path / "cache") for name in names]
    assert [f.id for f in found] == names
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith(letter * 60)


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
@pytest.mark.parametrize("which", ["image", "label"])
def test_the_voxels_beside_a_header_are_sources_too(tmp_path: Path, ending: str, which: str) -> None:
    image, label = (tmp_path / f"{name}{ending}" for name in ("image", "label"))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.ones((4, 5, 6), np.float32)), str(image))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.full((4, 5, 6), 3, np.uint8)), str(label))
    case = Case("one", (image,), label, "one")
    prepare_cached(case, AS_IT_IS, DATA, tmp_path / "cache")
    raw, (value, dtype) = tmp_path / f"{which}.raw", {"image": (2, np.float32), "label": (7, np.uint8)}[which]
    time = raw.stat().st_mtime_ns
    raw.write_bytes(np.full(120, value, dtype).tobytes())
    os.utime(raw, ns=(time, time + 1))
    found = prepare_cached(case, AS_IT_IS, DATA, tmp_path / "cache")
    assert (found.image == (2 if which == "image" else 1)).all()
    assert (found.label == (2 if which == "label" else 1)).all()
