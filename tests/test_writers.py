"""Writing masks: the grid of the input to the last header field, whole files or none, the same bytes again."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from PIL import Image as Picture

from medseg import writers
from medseg.errors import DataError, GeometryError
from medseg.readers import nifti, read_geometry, read_image, read_label
from medseg.writers import (
    STALE_AFTER_S,
    all_or_none,
    atomic_path,
    held_room,
    ignores_case,
    is_disk_full,
    label_ending,
    remove_stale_temporaries,
    write_label,
    write_text,
)

NAMES = {0: "background", 1: "liver", 2: "Tumör"}
MASK = (np.arange(60).reshape(3, 4, 5) % 3).astype(np.uint8)
# unequal spacing, sheared and turned
OBLIQUE = np.array([[0.5, -0.2, 0.1, 10], [0.3, 1.5, 0, -20], [0, 0.1, 2, 30], [0, 0, 0, 1.0]])


def nifti_input(path: Path, affine: np.ndarray = OBLIQUE, shape: tuple[int, ...] = (3, 4, 5)) -> Path:
    image = nib.Nifti1Image(np.zeros(shape, np.float32), affine)
    image.set_qform(np.diag([0.5, 1.5, 2, 1]), code=1)
    image.set_sform(affine, code=4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"Doe^Jane"
    nib.save(image, path)
    return path


def write_half(path: Path, error: Exception) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def test_mask_has_every_placing_field_of_its_input(tmp_path: Path) -> None:
    source = nifti_input(tmp_path / "in.nii.gz")
    mask = nib.load(write_label(tmp_path / "out.nii.gz", MASK, source, names=NAMES))
    expected = nib.load(source).header
    np.testing.assert_array_equal(np.asarray(mask.dataobj), MASK)
    assert mask.get_data_dtype() == np.uint8
    for field in nifti.PLACING_FIELDS:
        np.testing.assert_array_equal(mask.header[field], expected[field], err_msg=field)
    assert np.isnan(mask.header["scl_slope"])


def test_mask_says_nothing_about_the_patient(tmp_path: Path) -> None:
    source = nifti_input(tmp_path / "in.nii.gz")
    mask = write_label(tmp_path / "out.nii", MASK, read_image(source), names=NAMES)
    assert b"Doe" not in mask.read_bytes()


def test_label_names_are_in_the_header_extension(tmp_path: Path) -> None:
    mask = nib.load(write_label(tmp_path / "a.nii.gz", MASK, nifti_input(tmp_path / "in.nii"), names=NAMES))
    extension = mask.header.extensions[0]
    assert extension.get_code() == 6
    text = extension.get_content()
    text = text if isinstance(text, str) else text.decode().rstrip("\0")
    assert json.loads(text) == {"labels": {"0": "background", "1": "liver", "2": "Tumör"}}


def test_simpleitk_reads_the_mask_too(tmp_path: Path) -> None:
    source = nifti_input(tmp_path / "in.nii", np.diag([0.5, 1.5, 2, 1]))
    mask = SimpleITK.ReadImage(str(write_label(tmp_path / "a.nii.gz", MASK, source, names=NAMES)))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(mask).T, MASK)
    assert mask.GetSpacing() == (0.5, 1.5, 2.0)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.png"])
def test_same_mask_same_bytes(tmp_path: Path, name: str) -> None:
    source = nifti_input(tmp_path / "in.nii", shape=(3, 4, 1))
    first = write_label(tmp_path / "x" / name, MASK[..., 0], source, names=NAMES)
    second = write_label(tmp_path / "y" / name, np.asfortranarray(MASK[..., 0]), source, names=NAMES)
    assert first.read_bytes() == second.read_bytes()


def test_all_48_orientations_come_back(tmp_path: Path) -> None:
    base = nib.Nifti1Image(MASK.astype(np.int16), OBLIQUE)
    for axes, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turned = base.as_reoriented(np.array([[axes[i], flips[i]] for i in range(3)]))
        nib.save(turned, tmp_path / "in.nii")
        image = read_image(tmp_path / "in.nii")
        out = write_label(tmp_path / "out.nii", image.array[0], image, names=NAMES)
        np.testing.assert_array_equal(np.asarray(nib.load(out).dataobj), np.asarray(turned.dataobj))
        np.testing.assert_array_equal(nib.load(out).affine, nib.load(tmp_path / "in.nii").affine)


def test_plane_of_a_one_slice_file_gets_its_third_axis_back(tmp_path: Path) -> None:
    source = nifti_input(tmp_path / "in.nii.gz", shape=(3, 4, 1))
    for like in (source, read_image(source, spatial_dims=2)):
        out = nib.load(write_label(tmp_path / "out.nii.gz", MASK[..., 0], like, names=NAMES))
        assert out.shape == (3, 4, 1)
        np.testing.assert_array_equal(np.asarray(out.dataobj)[..., 0], MASK[..., 0])
        np.testing.assert_array_equal(out.affine, nib.load(source).affine)


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
def test_mask_of_a_nifti_2_image_is_one_and_lies_exactly_there(tmp_path: Path, name: str) -> None:
    # no 32-bit number is a third
    affine = OBLIQUE / np.array([[3], [3], [3], [1]])
    image = nib.Nifti2Image(np.zeros((3, 4, 5), np.float32), affine)
    image.set_sform(affine, code=1)
    nib.save(image, tmp_path / "in.nii")
    out = nib.load(write_label(tmp_path / name, MASK, tmp_path / "in.nii", names=NAMES))
    assert isinstance(out, nib.Nifti2Image)
    np.testing.assert_array_equal(out.affine, affine)
    np.testing.assert_array_equal(np.asarray(out.dataobj), MASK)
    np.testing.assert_array_equal(read_label(tmp_path / name).array, MASK)
    assert nifti.label_names(tmp_path / name) == NAMES


def test_mask_of_a_file_with_channels_is_3d(tmp_path: Path) -> None:
    source = nifti_input(tmp_path / "in.nii.gz", shape=(3, 4, 5, 2))
    out = nib.load(write_label(tmp_path / "out.nii.gz", MASK, source, names=NAMES))
    assert out.shape == (3, 4, 5)
    np.testing.assert_array_equal(out.affine, nib.load(source).affine)


@pytest.mark.parametrize("forms", [(0, 0), (1, 0), (0, 2), (1, 1)])
def test_form_codes_come_back(tmp_path: Path, forms: tuple[int, int]) -> None:
    source = nib.load(nifti_input(tmp_path / "in.nii"))
    source.header["qform_code"], source.header["sform_code"] = forms
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), None, source.header), tmp_path / "codes.nii")
    out = nib.load(write_label(tmp_path / "out.nii", MASK, tmp_path / "codes.nii", names=NAMES))
    assert (int(out.header["qform_code"]), int(out.header["sform_code"])) == forms
    np.testing.assert_array_equal(out.affine, nib.load(tmp_path / "codes.nii").affine)


def test_mask_of_an_itk_plane_lies_where_its_image_does(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(np.zeros((4, 3), np.int16))
    image.SetSpacing((0.5, 1.5))
    image.SetOrigin((10, -20))
    image.SetDirection((0, -1, 1, 0))
    SimpleITK.WriteImage(image, str(tmp_path / "in.mha"))
    out = nib.load(write_label(tmp_path / "out.nii.gz", MASK[..., 0], tmp_path / "in.mha", names=NAMES))
    # in ITK i runs along y to the back, j along -x to the right
    affine = [[0, 1.5, 0, -10], [-0.5, 0, 0, 20], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(out.affine, affine, atol=1e-6)
    assert (int(out.header["qform_code"]), out.shape) == (1, (3, 4))


@pytest.mark.parametrize("name", ["in.nrrd", "in.mha"])
def test_mask_of_an_itk_image_is_nifti_on_its_grid(tmp_path: Path, name: str) -> None:
    image = SimpleITK.GetImageFromArray(np.zeros((5, 4, 3), np.int16))
    image.SetSpacing((0.5, 1.5, 2))
    image.SetOrigin((10, -20, 30))
    image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(tmp_path / name))
    out = write_label(tmp_path / "out.nii.gz", MASK, tmp_path / name, names=NAMES)
    assert read_geometry(out).grid.matches(read_geometry(tmp_path / name).grid)
    assert int(nib.load(out).header["qform_code"]) == int(nib.load(out).header["sform_code"]) == 1
    # x to the left, y to the back in ITK: both turn round
    np.testing.assert_allclose(nib.load(out).affine[:3, 3], (-10, 20, 30))


@pytest.mark.parametrize(
    ("names", "top", "dtype"), [({}, 255, np.uint8), ({}, 256, np.uint16), ({300: "x"}, 1, np.uint16)]
)
def test_type_is_the_smaller_that_holds_values_and_names(
    tmp_path: Path, names: dict[int, str], top: int, dtype: type
) -> None:
    source = nifti_input(tmp_path / "in.nii")
    array = np.full((3, 4, 5), top, np.int64)
    out = nib.load(write_label(tmp_path / "out.nii", array, source, names=names))
    assert out.get_data_dtype() == dtype
    assert np.asarray(out.dataobj).max() == top


@pytest.mark.parametrize("top", [1, 300])
def test_picture_mask_is_an_index_png(tmp_path: Path, top: int) -> None:
    Picture.fromarray(np.zeros((3, 4), np.uint8)).save(tmp_path / "in.jpg")
    array = np.zeros((3, 4), np.int64)
    array[2, 0] = top
    out = write_label(tmp_path / "out.png", array, tmp_path / "in.jpg", names={top: "nerve"})
    np.testing.assert_array_equal(np.array(Picture.open(out)), array)
    np.testing.assert_array_equal(read_label(out).array, array)
    assert json.loads(Picture.open(out).text["labels"]) == {str(top): "nerve"}


@pytest.mark.parametrize("value", [-1, 65536])
def test_values_that_no_mask_holds_are_refused(tmp_path: Path, value: int) -> None:
    with pytest.raises(DataError, match=f"{value}"):
        write_label(tmp_path / "a.nii", np.full((3, 4, 5), value), nifti_input(tmp_path / "in.nii"), names={})


def test_scores_are_refused_as_mask(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="float64"):
        write_label(tmp_path / "a.nii", np.zeros((3, 4, 5)), nifti_input(tmp_path / "in.nii"), names={})


def test_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match=r"\(4, 3, 5\)"):
        write_label(tmp_path / "a.nii", np.zeros((4, 3, 5), np.uint8), nifti_input(tmp_path / "in.nii"), names={})


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ValueError):
        write_half(tmp_path / "a.txt", ValueError())
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "a.nii.gz") as temporary:
        temporary.write_text("whole")
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(".nii.gz")
        assert not (tmp_path / "new" / "a.nii.gz").exists()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.nii.gz"]


def write_together(folder: Path, *names: str, error: Exception | None = None) -> None:
    with all_or_none():
        for name in names:
            before = {p.name: p.read_text() for p in folder.iterdir()}
            write_text(folder / name, "new")
            # under a hidden name only
            assert {p.name: p.read_text() for p in folder.iterdir() if p.name in before} == before
            assert name in before or not (folder / name).exists()
        if error is not None:
            raise error


def test_files_of_a_block_get_their_names_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(ValueError, match="late"):
        write_together(tmp_path, "a", error=ValueError("late"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}
    write_together(tmp_path, "a", "b")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new", "b": "new"}
    # outside the block a file has its name at once
    write_text(tmp_path / "a", "newest")
    assert (tmp_path / "a").read_text() == "newest"


def denied(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def no_file_becomes_b(monkeypatch: pytest.MonkeyPatch) -> None:
    move = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (denied if target.name == "b" else move)(self, target))


def old_files(folder: Path) -> dict[str, str]:
    old = {"a": "old a", "b": "old b"}
    for name, text in old.items():
        (folder / name).write_text(text)
    return old


def test_a_file_of_a_block_that_cannot_get_its_name_is_told_and_no_new_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_file_becomes_b(monkeypatch)
    with pytest.raises(DataError, match=r"cannot write b \(Permission denied\)"):
        write_together(tmp_path, "a", "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", ["a", "new", "b"])
def test_what_interrupts_the_names_of_a_block_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    move, old = Path.replace, old_files(tmp_path)
    told: list[str] = []

    def interrupt(self: Path, target: Path) -> Path:
        moved = move(self, target)
        if target.name == at and not told:
            told.append(at)
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_together(tmp_path, "a", "new", "b")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == old


def test_a_single_file_of_a_block_needs_no_second_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    # another's file that nobody else may read
    monkeypatch.setattr("medseg.writers._second_name", denied)
    write_together(tmp_path, "a")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new"}
    monkeypatch.setattr(Path, "replace", denied)
    with pytest.raises(DataError, match="cannot write a"):
        write_together(tmp_path, "a")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new"}


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_of_a_block_that_cannot_get_its_name_brings_the_old_ones_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    old = old_files(tmp_path)
    no_file_becomes_b(monkeypatch)
    if not linked:
        # a disk without hard links and rights
        monkeypatch.setattr(Path, "hardlink_to", denied)
        monkeypatch.setattr(os, "chmod", denied)
        monkeypatch.setattr(os, "utime", denied)
    with pytest.raises(DataError, match=r"cannot write b \(Permission denied\)"):
        write_together(tmp_path, "a", "new", "b")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == old


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: cannot write a\.nii"), atomic_path(tmp_path / "file" / "a.nii"):
        pytest.fail("the block is not entered")


def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No space left"):
        write_half(tmp_path / "a.nii", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    name = "a" * 240 + ".nii.gz"
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_disk_that_can_only_be_read_is_named_though_nothing_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DataError, match=r"cannot write a\.nii \(Read-only file system\)"):
        write_half(tmp_path / "a.nii", OSError(errno.EROFS, os.strerror(errno.EROFS)))


@pytest.mark.parametrize("ignores", [True, False])
def test_a_disk_that_ignores_case_is_told_by_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores: bool
) -> None:
    there: set[str] = set()

    def exists(path: Path) -> bool:
        names = os.listdir(path.parent)
        there.update(names)
        return path.name.lower() in map(str.lower, names) if ignores else path.name in names

    monkeypatch.setattr(os.path, "exists", exists)
    assert ignores_case(tmp_path) is ignores
    assert len(there) == 1
    assert not os.listdir(tmp_path)
    assert not ignores_case(tmp_path / "none")


def test_room_is_held_until_the_block_ends(tmp_path: Path) -> None:
    with held_room(tmp_path, 1000):
        assert [p.stat().st_size for p in tmp_path.iterdir()] == [1000]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_known_behind_the_error_that_tells_it(tmp_path: Path, number: int) -> None:
    with pytest.raises(DataError) as raised:
        write_half(tmp_path / "a.nii", OSError(number, os.strerror(number)))
    assert is_disk_full(raised.value)


def test_a_folder_without_permission_is_no_full_disk() -> None:
    error = DataError("cannot write")
    error.__cause__ = PermissionError(errno.EACCES, "denied")
    assert not is_disk_full(error)


# ---- what killed processes leave


def left_by(folder: Path, *, machine: str | None = None, process: int | None = None, writer: str | None = None) -> Path:
    """A temporary file of `a.nii.gz` as its writer leaves it when it is killed; left out: of this very process."""
    with atomic_path(folder / "a.nii.gz") as temporary:
        temporary.write_text("half")
        before, (_, told_machine, told_process, told_writer), ending = parted(temporary.name)
        process = int(told_process) if process is None else process
        name = f"medseg-{machine or told_machine}-{process}-{writer or told_writer}"
        left = temporary.with_name(f"{before}.{name}.{ending}")
        left.write_text("half")
    (folder / "a.nii.gz").unlink()
    return left


def parted(name: str) -> tuple[str, list[str], str]:
    _, stem, writer, ending = name.split(".", 3)
    return f".{stem}", writer.split("-"), ending


def gone() -> int:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def grow_old(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_what_a_process_that_is_gone_has_left_is_removed(tmp_path: Path) -> None:
    left = left_by(tmp_path, process=gone())
    assert remove_stale_temporaries(tmp_path) == [left.name]
    assert list(tmp_path.iterdir()) == []


def test_what_another_living_process_is_writing_stays(tmp_path: Path) -> None:
    left_by(tmp_path, process=os.getppid())
    assert remove_stale_temporaries(tmp_path) == []


def test_what_this_process_is_writing_stays(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.nii.gz") as temporary:
        temporary.write_text("half")
        assert remove_stale_temporaries(tmp_path) == []
        assert temporary.exists()


def test_what_an_earlier_process_of_our_number_has_left_is_removed(tmp_path: Path) -> None:
    left = left_by(tmp_path, writer="0" * 16)
    assert remove_stale_temporaries(tmp_path) == [left.name]


@pytest.mark.parametrize(("age_s", "stays"), [(STALE_AFTER_S - 60, True), (STALE_AFTER_S + 60, False)])
def test_what_another_machine_has_left_goes_when_it_is_old(tmp_path: Path, age_s: float, stays: bool) -> None:
    left = left_by(tmp_path, machine="0" * 8, process=gone())
    grow_old(left, age_s)
    remove_stale_temporaries(tmp_path)
    assert left.exists() == stays


@pytest.mark.parametrize("name", ["a.nii.gz", ".a.nii.gz", ".medseg-notes", "a.medseg-00000000-1-0000000000000000.gz"])
def test_files_of_others_stay_however_old(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "mine")
    grow_old(tmp_path / name, 10 * STALE_AFTER_S)
    assert remove_stale_temporaries(tmp_path) == []
    assert (tmp_path / name).exists()


def test_machines_are_told_apart_by_more_than_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = writers._machine()
    # containers of one name count their processes apart
    monkeypatch.setattr(Path, "readlink", lambda _: Path("pid:[1]"))
    assert writers._machine.__wrapped__() != mine


@pytest.mark.parametrize(
    ("name", "ending"), [("a.JPG", ".png"), ("a.tif", ".png"), ("a.nrrd", ".nii.gz"), ("s", ".nii.gz")]
)
def test_ending_of_a_mask_follows_its_image(name: str, ending: str) -> None:
    assert label_ending(Path(name)) == ending
