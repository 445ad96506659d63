"""Converting: the file that is written, and none where the input is refused; by the library and by the command."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import phantom
import pydicom
import pytest
import SimpleITK
from phantom import VOXELS, every, series
from PIL import Image as Picture

import medseg
from medseg.cli import run
from medseg.readers import read_image
from medseg.readers.nifti import label_names
from medseg.writers import write_label

GAP = [0, 2.5, 7.5, 10, 12.5]


def test_a_series_becomes_nifti(tmp_path: Path) -> None:
    done = medseg.convert(series(tmp_path / "ct"), tmp_path / "new/ct.nii.gz")
    image = nib.load(tmp_path / "new/ct.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), VOXELS.T)
    assert image.get_data_dtype() == np.int16
    np.testing.assert_allclose(image.affine, phantom.ras_affine(), atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), phantom.ras_affine(), atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (done.shape, done.warnings) == ((8, 6, 5), ())
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["ct.nii.gz"]


def test_no_patient_is_in_the_file_and_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    for name in ("a.nii", "b.nii"):
        medseg.convert(folder, tmp_path / name)
    content = (tmp_path / "a.nii").read_bytes()
    assert content == (tmp_path / "b.nii").read_bytes()
    assert not any(word in content for word in (b"Canary", b"SECRET", b"1.2.3.4"))


def test_what_was_resampled_stands_in_the_file(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", at=GAP)
    done = medseg.convert(
        folder, tmp_path / "ct.nii", medseg.ConvertOptions(series=medseg.SeriesOptions(resample_gaps=True))
    )
    note = "resampled: 5 planes 2.50 to 5.00 mm apart interpolated to 6 planes 2.50 mm apart"
    assert done.warnings == (note,)
    comment = nib.load(tmp_path / "ct.nii").header.extensions[0].get_content()
    assert json.loads(comment if isinstance(comment, str) else comment.decode().rstrip("\0")) == {"notes": [note]}


def test_other_images_become_nifti(tmp_path: Path) -> None:
    volume = SimpleITK.GetImageFromArray(VOXELS.astype(np.float32))
    volume.SetSpacing((0.5, 1, 2))
    SimpleITK.WriteImage(volume, str(tmp_path / "a.mha"))
    medseg.convert(tmp_path / "a.mha", tmp_path / "a.nii.gz")
    image = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), VOXELS.T)
    np.testing.assert_allclose(image.affine, np.diag([-0.5, -1, 2, 1]), atol=1e-6)


def test_channels_become_a_fourth_axis(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (4, 5, 3)).astype(np.uint8)
    Picture.fromarray(colours).save(tmp_path / "a.png")
    medseg.convert(tmp_path / "a.png", tmp_path / "a.nii")
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "a.nii").dataobj)[:, :, 0], colours)


# ---- the command


def test_the_command_converts_and_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["convert", str(series(tmp_path / "ct")), "-o", str(tmp_path / "ct.nii.gz")])
    assert code == 0
    assert "8 × 6 × 5 voxels of 0.75 × 1.5 × 2.5 mm" in capsys.readouterr().out


def test_the_command_refuses_with_the_reason_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = series(tmp_path / "ct", at=GAP), tmp_path / "out"
    out.mkdir()
    assert run(["convert", str(folder), "-o", str(out / "ct.nii.gz")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "refused:" in told
    assert "a gap of 5.00 mm found" in told
    assert "expected 2.50 mm" in told
    assert "--resample-gaps" in told
    assert list(out.iterdir()) == []
    assert run(["convert", str(folder), "-o", str(out / "ct.nii.gz"), "--resample-gaps"]) == 0
    assert "note: resampled" in capsys.readouterr().err


def test_the_command_chooses_a_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series(tmp_path / "in/a")
    series(tmp_path / "in/b", lambda k, ds: phantom.put(ds, SeriesInstanceUID="1.2.9", SOPInstanceUID=f"1.2.9.{k + 1}"))
    line = ["convert", str(tmp_path / "in"), "-o", str(tmp_path / "a.nii")]
    assert run(line) == 1
    assert "2 series found" in capsys.readouterr().err
    assert run([*line, "--series", "1.2.9"]) == 0


@pytest.mark.parametrize(
    ("source", "output", "told"),
    [
        ("gone", "a.nii", "no such file or folder"),
        ("ct", "a.txt", "ending .txt found, expected .nii.gz or .nii or .dcm"),
        ("ct", "a.dcm", "DICOM found, expected a label map"),
        ("a.nii", "a.dcm", "give their series with --source FOLDER"),
        ("ct", "a", "ending missing found"),
        ("ct", "", "a folder; choose another -o"),
        ("a.nii", "a.nii", "the input itself; choose another -o"),
    ],
)
def test_wrong_usage_is_told_and_nothing_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, output: str, told: str
) -> None:
    series(tmp_path / "ct")
    nib.save(nib.Nifti1Image(VOXELS, np.eye(4)), tmp_path / "a.nii")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(["convert", str(tmp_path / source), "-o", str(tmp_path / output)]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_words_for_series_are_refused_for_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nib.save(nib.Nifti1Image(VOXELS, np.eye(4)), tmp_path / "a.nii")
    assert run(["convert", str(tmp_path / "a.nii"), "-o", str(tmp_path / "b.nii"), "--resample-tilt"]) == 2
    assert "are for DICOM series alone" in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.writers import nifti

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nifti, "_write", full)
    with pytest.raises(medseg.DataError, match="No space left"):
        medseg.convert(series(tmp_path / "ct"), tmp_path / "out/ct.nii.gz")
    assert list((tmp_path / "out").iterdir()) == []


# ---- label maps to DICOM and back


def mask_of(folder: Path, path: Path, names: dict[int, str] | None = None) -> np.ndarray:
    """A mask on the grid of a series, as inference writes it: one ball with another beside it."""
    image = read_image(folder)
    i, j, k = np.indices(image.grid.shape)
    array = ((i - 2) ** 2 + (j - 2) ** 2 + (k - 2) ** 2 < 4).astype(np.uint8)
    array[5:7, 1:4, 1:3] = 2
    write_label(path, array, image, names={1: "liver", 2: "left kidney"} if names is None else names)
    return array


def test_a_mask_becomes_a_dicom_seg_and_comes_back(tmp_path: Path) -> None:
    folder, mask = series(tmp_path / "ct"), tmp_path / "mask.nii.gz"
    array = mask_of(folder, mask)
    assert run(["convert", str(mask), "--source", str(folder), "-o", str(tmp_path / "seg.dcm")]) == 0
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg.Modality == "SEG"
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["liver", "left kidney"]
    assert {s.SegmentAlgorithmType for s in seg.SegmentSequence} == {"AUTOMATIC"}
    assert str(seg.PatientName) == "Canary^Tweety"
    assert run(["convert", str(tmp_path / "seg.dcm"), "-o", str(tmp_path / "back.nii.gz")]) == 0
    back, before = (nib.as_closest_canonical(nib.load(p)) for p in (tmp_path / "back.nii.gz", mask))
    np.testing.assert_allclose(back.affine, before.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(before.dataobj))
    assert label_names(tmp_path / "back.nii.gz") == {1: "liver", 2: "left kidney"}
    # on the series' own grid, axis by axis
    line = ["convert", str(tmp_path / "seg.dcm"), "--source", str(folder), "-o", str(tmp_path / "own.nii.gz")]
    assert run(line) == 0
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "own.nii.gz").dataobj), array)


def test_a_mask_becomes_an_rtstruct(tmp_path: Path) -> None:
    folder, mask, names = series(tmp_path / "ct"), tmp_path / "mask.nii.gz", tmp_path / "names.yaml"
    mask_of(folder, mask)
    names.write_text("background: 0\nspleen: 1\nstomach: 2\n")
    line = ["convert", str(mask), "--source", str(folder), "--labels", str(names), "--to", "rtstruct"]
    assert run([*line, "-o", str(tmp_path / "rt.dcm")]) == 0
    made = pydicom.dcmread(tmp_path / "rt.dcm")
    assert made.Modality == "RTSTRUCT"
    assert [r.ROIName for r in made.StructureSetROISequence] == ["spleen", "stomach"]
    known = {f"1.2.3.5.{k + 1}" for k in range(phantom.PLANES)}
    referred = {
        image.ReferencedSOPInstanceUID
        for roi in made.ROIContourSequence
        for contour in roi.ContourSequence
        for image in contour.ContourImageSequence
    }
    assert referred
    assert referred <= known


def test_a_mask_of_another_program_is_not_said_to_be_ours(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    array = mask_of(folder, tmp_path / "mask.nii.gz")
    nib.save(nib.Nifti1Image(array, nib.load(tmp_path / "mask.nii.gz").affine), tmp_path / "other.nii.gz")
    medseg.convert(tmp_path / "other.nii.gz", tmp_path / "s.dcm", medseg.ConvertOptions(source=folder))
    segments = pydicom.dcmread(tmp_path / "s.dcm").SegmentSequence
    assert [(s.SegmentLabel, s.SegmentAlgorithmType) for s in segments] == [
        ("label 1", "SEMIAUTOMATIC"),
        ("label 2", "SEMIAUTOMATIC"),
    ]


@pytest.mark.parametrize("to", ["dicom-seg", "rtstruct"])
@pytest.mark.parametrize(
    ("edit", "at", "more", "told"),
    [
        (lambda k, ds: phantom.put(ds, SOPInstanceUID=""), None, [], "UID"),
        (None, [5, 7.5, 10, 12.5, 15], [], "grid"),
        (None, GAP, ["--resample-gaps"], "resampled planes are in no file"),
    ],
    ids=["blank UIDs", "another grid", "resampled"],
)
def test_a_source_that_cannot_be_referred_to_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, edit: Any, at: Any, more: list[str], told: str
) -> None:
    mask_of(series(tmp_path / "ct"), tmp_path / "mask.nii.gz")
    other = series(tmp_path / "other", *([edit] if edit else []), **({"at": at} if at else {}))
    line = ["convert", str(tmp_path / "mask.nii.gz"), "--source", str(other), "--to", to, *more]
    assert run([*line, "-o", str(tmp_path / "out" / "s.dcm")]) == 1
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_what_a_dicom_seg_says_it_was_made_by_is_not_made_ours(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    mask_of(folder, tmp_path / "mask.nii.gz")
    options = medseg.ConvertOptions(source=folder)
    medseg.convert(tmp_path / "mask.nii.gz", tmp_path / "a.dcm", options)
    medseg.convert(tmp_path / "a.dcm", tmp_path / "back.nii.gz")
    medseg.convert(tmp_path / "back.nii.gz", tmp_path / "b.dcm", options)
    segments = pydicom.dcmread(tmp_path / "b.dcm").SegmentSequence
    assert {(s.SegmentLabel, s.SegmentAlgorithmType) for s in segments} == {
        ("liver", "SEMIAUTOMATIC"),
        ("left kidney", "SEMIAUTOMATIC"),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_mask_whose_ending_lies_about_compression_is_read_as_it_is(tmp_path: Path, zipped: bool) -> None:
    folder = series(tmp_path / "ct")
    mask_of(folder, tmp_path / "mask.nii.gz")
    plain = gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())
    other = tmp_path / ("m.nii" if zipped else "m.nii.gz")
    other.write_bytes(gzip.compress(plain) if zipped else plain)
    assert label_names(other) == {1: "liver", 2: "left kidney"}
    medseg.convert(other, tmp_path / "s.dcm", medseg.ConvertOptions(source=folder))
    assert len(pydicom.dcmread(tmp_path / "s.dcm").SegmentSequence) == 2


@pytest.mark.parametrize("given", ["a slice", "the folder"])
def test_no_image_of_the_source_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    folder = series(tmp_path / "ct")
    mask_of(folder, tmp_path / "mask.nii.gz")
    some = sorted(folder.iterdir())[2]
    victim = some.rename(some.with_name("image.dcm"))
    before = victim.read_bytes()
    source = victim if given == "a slice" else folder
    assert run(["convert", str(tmp_path / "mask.nii.gz"), "--source", str(source), "-o", str(victim)]) == 2
    assert "one of the images of --source" in " ".join(capsys.readouterr().err.split())
    assert victim.read_bytes() == before


@pytest.mark.parametrize("to", ["dicom-seg", "rtstruct"])
def test_values_that_cannot_be_read_cost_nothing_and_are_shown_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], to: str
) -> None:
    folder = series(tmp_path / "ct")
    mask_of(folder, tmp_path / "mask.nii.gz")
    for path in folder.iterdir():
        content = path.read_bytes()
        # PatientWeight (0010,1030) DS and PatientAge (0010,1010) AS, behind the patient's number
        at = content.index(b"\x10\0\x20\0LO")
        size = int.from_bytes(content[at + 6 : at + 8], "little")
        end = at + 8 + size
        junk = b"\x10\0\x10\x10AS\x06\0CANARY" + b"\x10\0\x30\x10DS\x06\0CANARY"
        path.write_bytes(content[:end] + junk + content[end:])
    line = ["convert", str(tmp_path / "mask.nii.gz"), "--source", str(folder), "--to", to]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run([*line, "-o", str(tmp_path / "s.dcm"), "-v"]) == 0
    shown = capfd.readouterr()
    assert "CANARY" not in (shown.out + shown.err).upper().replace("CANARY^", "")
    made = pydicom.dcmread(tmp_path / "s.dcm")
    assert "PatientWeight" not in made
    assert str(made.PatientName) == "Canary^Tweety"


def test_words_for_label_maps_are_refused_for_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = series(tmp_path / "ct")
    assert run(["convert", str(folder), "-o", str(tmp_path / "a.nii"), "--source", str(folder)]) == 2
    assert "for label maps that become DICOM" in " ".join(capsys.readouterr().err.split())
    mask_of(folder, tmp_path / "mask.nii.gz")
    line = ["convert", str(tmp_path / "mask.nii.gz"), "-o", str(tmp_path / "s.dcm"), "--source", str(tmp_path / "gone")]
    assert run(line) == 2
    assert "no such file or folder" in " ".join(capsys.readouterr().err.split())


# ---- check


def test_check_lists_series_and_fails_where_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series(tmp_path / "in/good")
    series(tmp_path / "in/bad", every(SeriesInstanceUID="1.2.9"), at=GAP)
    (tmp_path / "in/other").mkdir()
    (tmp_path / "in/other/readme").write_text("-")
    assert run(["check", str(tmp_path / "in")]) == 1
    shown = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in shown.out.splitlines() if line.strip()}
    assert rows["good"] == ["good", "CT", "5", "8×6×5", "0.75×1.5×2.5", "volume", phantom.SERIES]
    assert rows["bad"] == ["bad", "CT", "5", "-", "-", "refused", "1.2.9"]
    assert "bad: " in shown.err
    assert "a gap of 5.00 mm" in " ".join(shown.err.split())
    assert run(["check", str(tmp_path / "in/good")]) == 0
    assert "1 series found, 0 refused" in capsys.readouterr().out


def test_check_tells_of_files_that_cannot_be_read(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    (folder / "cut.dcm").write_bytes(b"\0" * 100)
    (facts,) = medseg.check_series(folder)
    assert (facts.case, facts.key, facts.files) == ("ct", "", 0)
    assert "without its mark" in facts.reason


def test_check_leaves_data_sets_to_the_other_look(tmp_path: Path) -> None:
    series(tmp_path / "images/a")
    (tmp_path / "labels").mkdir()
    assert medseg.check_series(tmp_path) == ()
    assert medseg.check_series(tmp_path / "gone") == ()
