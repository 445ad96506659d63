"""The preflight: clean data sets pass, every kind of damage is found and named, and nothing ends the scan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from PIL import Image as Picture

from medseg.check import Findings, check_dataset
from medseg.readers import read_image

MakeDataset = Callable[..., Path]


def change(path: Path, edit: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    """Rewrite a NIfTI file with `edit` done to its voxels."""
    image = nib.load(path)
    array = edit(np.array(image.dataobj))
    place = image.affine if affine is None else affine
    path.unlink()
    nib.save(nib.Nifti1Image(array, place), path)


def found(findings: Findings, severity: str, case: str, text: str) -> bool:
    return any(f.severity == severity and f.case == case and text in str(f) for f in findings.findings)


def test_clean_data_sets_have_no_findings(tiny_dataset: MakeDataset) -> None:
    for dims in (2, 3):
        for form in ("plain", "nnunet"):
            folder = tiny_dataset(spatial_dims=dims, form=form, name=f"{form}{dims}")
            assert check_dataset(folder).findings == (), folder.name


def test_facts_of_a_case(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(cases=2)
    facts = check_dataset(folder).facts[1]
    image = nib.load(folder / "images" / "case1.nii.gz")
    assert (facts.case, facts.shape, facts.spacing_mm) == ("case1", image.shape, (1, 1, 1.5))
    assert (facts.axcodes, facts.dtype, facts.channels) == ("RAS", "float32", 1)
    label = np.asarray(nib.load(folder / "labels" / "case1.nii.gz").dataobj)
    assert facts.label_voxels == {v: int((label == v).sum()) for v in (0, 1, 2)}


def test_every_broken_file_is_named_in_one_scan(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(cases=8)
    image = {n: folder / "images" / f"case{n}.nii.gz" for n in range(8)}
    label = {n: folder / "labels" / f"case{n}.nii.gz" for n in range(8)}
    label[0].unlink()
    image[1].write_bytes(image[1].read_bytes()[:400])
    change(image[2], lambda a: np.where(a == a[3, 3, 3], np.nan, a))
    change(label[3], lambda a: a[:-1])
    change(label[4], lambda a: np.where(a == 1, 0.5, a).astype(np.float32))
    moved = np.diag([1, 1, 1.5, 1.0])
    moved[0, 3] = 7
    change(label[5], lambda a: a, moved)
    image[6].unlink()
    findings = check_dataset(folder)
    assert found(findings, "error", "case0", "without label")
    assert found(findings, "error", "case1", "cut off")
    assert found(findings, "error", "case2", "1 of")
    assert found(findings, "error", "case3", "shape")
    assert found(findings, "error", "case4", "value 0.5")
    assert found(findings, "error", "case5", "7 mm")
    assert found(findings, "error", "case6", "without image")
    assert not any(f.case == "case7" for f in findings.findings)
    assert len(findings.errors) == 7


def test_every_finding_says_found_expected_and_what_to_do(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(cases=3)
    (folder / "images" / "case0.nii.gz").write_bytes(b"")
    (folder / "labels" / "case1.nii.gz").write_bytes(b"hello")
    change(folder / "labels" / "case2.nii.gz", lambda a: a[1:])
    errors = check_dataset(folder).errors
    assert len(errors) == 3
    for finding in errors:
        assert finding.found
        assert finding.expected
        assert finding.fix
        assert Path(finding.file).exists()


def test_values_that_nothing_names_are_errors(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(form="nnunet")
    change(folder / "labelsTr" / "case1.nii.gz", lambda a: np.where(a == 2, 9, a))
    assert found(check_dataset(folder), "error", "case1", "label values 9")


def test_region_and_ignore_values_are_known(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(form="nnunet")
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"] = {"background": 0, "whole": [1, 2], "ignore": 3}
    description["regions_class_order"] = [1]
    (folder / "dataset.json").write_text(json.dumps(description))
    change(folder / "labelsTr" / "case1.nii.gz", lambda a: np.where(a == 2, 3, a))
    assert check_dataset(folder).findings == ()


def test_label_that_no_case_has_is_a_warning(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(form="nnunet")
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"]["ghost"] = 3
    (folder / "dataset.json").write_text(json.dumps(description))
    assert found(check_dataset(folder), "warning", "", "ghost")


def test_empty_label_is_a_warning_and_constant_image_an_error(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    change(folder / "labels" / "case0.nii.gz", np.zeros_like)
    change(folder / "images" / "case1.nii.gz", np.ones_like)
    findings = check_dataset(folder)
    assert found(findings, "warning", "case0", "empty label")
    assert found(findings, "error", "case1", "all voxels are 1")


def test_float_labels_of_whole_numbers_are_a_note(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    change(folder / "labels" / "case0.nii.gz", lambda a: a.astype(np.float32))
    findings = check_dataset(folder)
    assert found(findings, "note", "case0", "float32")
    assert findings.errors == ()


def test_same_image_under_two_names_is_a_warning(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    for kind in ("images", "labels"):
        shutil.copy(folder / kind / "case0.nii.gz", folder / kind / "copy.nii.gz")
    assert found(check_dataset(folder), "warning", "copy", "case0, with the same labels")


def test_label_copied_from_another_case_is_a_warning(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    shutil.copy(folder / "images" / "case0.nii.gz", folder / "images" / "copy.nii.gz")
    change(folder / "images" / "copy.nii.gz", lambda a: a + 1)
    shutil.copy(folder / "labels" / "case0.nii.gz", folder / "labels" / "copy.nii.gz")
    assert found(check_dataset(folder), "warning", "copy", "with another image")


def test_time_series_is_an_error(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    change(folder / "images" / "case0.nii.gz", lambda a: np.stack([a, a], axis=-1))
    assert found(check_dataset(folder), "error", "case0", "axis 4 has 2 points")


def test_pictures_among_volumes_are_an_error(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    for kind in ("images", "labels"):
        pixels = np.arange(20, dtype=np.uint8).reshape(4, 5)
        Picture.fromarray(pixels).save(folder / kind / "flat.png")
    assert found(check_dataset(folder), "error", "flat", "2 axes")


def test_a_label_of_a_picture_that_is_no_picture_is_an_error(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(spatial_dims=2)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Picture.fromarray(pixels).save(folder / "images" / "square.png")
    # 8 × 8 at 1 mm: but for its kind of file all of it fits, and it is the transpose
    nib.save(nib.Nifti1Image((pixels > 40).astype(np.uint8), np.diag([-1, -1, 1, 1])), folder / "labels/square.nii.gz")
    findings = check_dataset(folder)
    assert found(findings, "error", "square", "square.png is a picture, square.nii.gz is not")


def planes(folder: Path, spacing: float = 0.703125) -> Path:
    """A data set of one plane, 50 mm up; its label lies as it does."""
    place = np.diag([spacing, spacing, 1.0, 1.0])
    place[2, 3] = 50
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    pixels = np.arange(72, dtype=np.uint8).reshape(8, 9)
    nib.save(nib.Nifti1Image(pixels, place), folder / "images" / "a.nii.gz")
    nib.save(nib.Nifti1Image((pixels > 40).astype(np.uint8), place), folder / "labels" / "a.nii.gz")
    return folder


@pytest.mark.parametrize("rounded", [0.703125, 0.7031])
@pytest.mark.parametrize(("mirrored", "height"), [(True, 50.0), (False, 110.0)])
def test_a_label_of_another_plane_is_an_error(tmp_path: Path, rounded: float, mirrored: bool, height: float) -> None:
    folder = planes(tmp_path)
    assert check_dataset(folder).errors == ()
    place = np.diag([-rounded if mirrored else rounded, rounded, 1.0, 1.0])
    place[2, 3] = height
    change(folder / "labels" / "a.nii.gz", lambda a: a, place)
    findings = check_dataset(folder)
    assert found(findings, "error", "a", "a plane at another place in space, or mirrored")


def test_a_label_of_a_plane_that_itk_wrote_without_its_height_fits(tmp_path: Path) -> None:
    folder = planes(tmp_path)
    image = SimpleITK.ReadImage(str(folder / "images" / "a.nii.gz"))
    SimpleITK.WriteImage(image > 40, str(folder / "labels" / "a.nii.gz"))
    # ITK knows planes by x and y alone
    assert nib.load(folder / "labels" / "a.nii.gz").affine[2, 3] == 0
    assert check_dataset(folder).errors == ()
    moved = SimpleITK.ReadImage(str(folder / "labels" / "a.nii.gz"))
    moved.SetOrigin((30.0, 0.0))
    SimpleITK.WriteImage(moved, str(folder / "labels" / "a.nii.gz"))
    assert found(check_dataset(folder), "error", "a", "a plane at another place in space, or mirrored")


def test_a_warning_of_many_files_is_logged_of_a_few(
    tiny_dataset: MakeDataset, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_dataset(cases=6)
    for path in sorted((folder / "images").iterdir()):
        image = nib.load(path)
        image.set_sform(None, 0)
        image.set_qform(None, 0)
        array = np.array(image.dataobj)
        path.unlink()
        nib.save(nib.Nifti1Image(array, None, image.header), path)
    findings = check_dataset(folder)
    assert sum("are a guess" in str(f) for f in findings.findings) == 6
    findings.log_warnings()
    guesses = [message for message in caplog.messages if "are a guess" in message]
    assert [m.startswith("3 more: neither sform nor qform") for m in guesses] == [False] * 3 + [True]


def test_colour_that_is_read_as_grey_is_a_note(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(spatial_dims=2)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Picture.fromarray(pixels).save(folder / "images" / "colour.png")
    Picture.fromarray(np.ones((4, 5), np.uint8)).save(folder / "labels" / "colour.png")
    findings = check_dataset(folder)
    assert found(findings, "note", "", "1 of 5 pictures are in colour")
    assert findings.errors == ()


def test_mixed_orientations_are_a_note(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    for kind in ("images", "labels"):
        path = folder / kind / "case0.nii.gz"
        nib.save(nib.load(path).as_reoriented(np.array([[1, -1], [0, 1], [2, 1]])), path)
    findings = check_dataset(folder)
    assert found(findings, "note", "", "RAS 3")
    assert findings.errors == ()


def test_outlier_of_spacing_is_a_warning(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(cases=6)
    for kind in ("images", "labels"):
        change(folder / kind / "case0.nii.gz", lambda a: a, np.diag([1, 1, 10, 1.0]))
    assert found(check_dataset(folder), "warning", "case0", "spacing")


def test_forms_in_conflict_are_a_warning(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    for kind in ("images", "labels"):
        path = folder / kind / "case0.nii.gz"
        image = nib.load(path)
        image = nib.Nifti1Image(np.array(image.dataobj), image.affine, image.header)
        image.set_qform(np.diag([2, 2, 2, 1]), code=1)
        path.unlink()
        nib.save(image, path)
    findings = check_dataset(folder)
    assert found(findings, "warning", "case0", "sform and qform")
    assert findings.errors == ()


def test_affines_apart_by_rounding_are_a_note(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    moved = np.diag([1, 1, 1.5, 1.0])
    moved[0, 3] = 0.01
    change(folder / "labels" / "case0.nii.gz", lambda a: a, moved)
    findings = check_dataset(folder)
    assert found(findings, "note", "case0", "rounding")
    assert findings.errors == ()


@pytest.mark.parametrize("turn", [[[0, -1], [1, -1], [2, 1]], [[2, 1], [0, 1], [1, 1]]], ids=["flipped", "permuted"])
def test_a_label_whose_axes_are_turned_is_told_never_to_copy_a_header(tiny_dataset: MakeDataset, turn: Any) -> None:
    folder = tiny_dataset()
    path = folder / "labels" / "case0.nii.gz"
    nib.save(nib.load(path).as_reoriented(np.array(turn)), path)
    (error,) = check_dataset(folder).errors
    assert error.found.startswith("axes stored as ")
    assert error.expected == "RAS as its image"
    assert error.fix.startswith("resample it to the image")
    assert "copying the image's header would mirror" in error.fix


def test_a_label_of_other_directions_elsewhere_is_to_be_resampled(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    mirrored = np.diag([-1, 1, 1.5, 1.0])
    mirrored[0, 3] = 100
    change(folder / "labels" / "case0.nii.gz", lambda a: a, mirrored)
    change(folder / "labels" / "case1.nii.gz", lambda a: a, np.diag([1, 1, 2.5, 1.0]))
    assert [f.fix for f in check_dataset(folder).errors] == [
        "resample it to the image",
        "copy the image's header if it was lost, or resample it to the image",
    ]


def test_labels_as_jpeg_are_an_error(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(spatial_dims=2)
    path = folder / "labels" / "case1.png"
    Picture.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    assert found(check_dataset(folder), "error", "case1", "a JPEG, whose compression changes the values of labels")


def test_a_case_that_memory_does_not_hold_is_an_error_of_its_own(
    tiny_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **how: Any) -> Any:
        if path.name.startswith("case1"):
            raise MemoryError("Unable to allocate 64.0 GiB")
        return read_image(path, **how)

    monkeypatch.setattr("medseg.check.read_image", read)
    (error,) = check_dataset(tiny_dataset()).errors
    assert error.case == "case1"
    assert "memory of this machine holds (Unable to allocate 64.0 GiB)" in error.found


def test_warnings_are_logged_a_few_of_them(tiny_dataset: MakeDataset, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_dataset(cases=8)
    for n in range(7):
        change(folder / "labels" / f"case{n}.nii.gz", np.zeros_like)
    shutil.copy(folder / "images" / "case6.nii.gz", folder / "images" / "case7.nii.gz")
    check_dataset(folder).log_warnings()
    assert len(caplog.messages) == 6
    # what would make results flatter comes first
    assert "the voxels of case case6" in caplog.messages[0]
    assert caplog.messages[-1] == f"3 more warnings; `medseg check {folder}` shows all"


def test_progress_and_jobs_change_nothing(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    (folder / "images" / "case2.nii.gz").write_bytes(b"x")
    seen: list[tuple[str, float, float]] = []
    many = check_dataset(
        folder, jobs=3, progress=lambda stage, done, total, detail="": seen.append((stage, done, total))
    )
    assert many.findings == check_dataset(folder).findings
    assert seen == [("check", n, 4) for n in (1, 2, 3, 4)]


def test_rows_come_with_errors_first(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset()
    change(folder / "labels" / "case0.nii.gz", np.zeros_like)
    (folder / "images" / "case3.nii.gz").write_bytes(b"x")
    assert [row[0] for row in check_dataset(folder).rows()] == ["error", "warning"]


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["hippocampus", "us_nerve_2d", "ct_totalseg"])
def test_real_data_sets_have_no_errors(shared_data: Path, name: str) -> None:
    assert check_dataset(shared_data / name, jobs=2).errors == ()
