"""Several files of one case: all or none, on record, made again where one is missing, and each says the same thing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import highdicom as hd
import nibabel as nib
import numpy as np
import phantom
import pydicom
import pytest
from phantom import every, series
from PIL import Image as Picture
from tiny import EXACT, blobs, some_images, tiny_config, tiny_model

import medseg
from medseg import folder as folder_module
from medseg.cases import Case
from medseg.errors import ConfigError, DataError
from medseg.folder import CaseResult, infer
from medseg.infer import InferOptions, load_model
from medseg.readers import SeriesOptions, read_image
from medseg.writers import write_text
from medseg.writers.formats import FORMATS, file_name

VOXELS = np.random.default_rng(1).integers(0, 300, (12, 10, 14)).astype(np.int16)
GAP = [0.0, 2.5, 7.5, *(10 + 2.5 * k for k in range(9))]
# of labels; what only regions have is asked for apart
ALL = tuple(name for name in FORMATS if name != "regions")
NAMES = {
    "nifti": "scan.nii.gz",
    "dicom-seg": "scan.seg.dcm",
    "rtstruct": "scan.rtstruct.dcm",
    "dicom-sr": "scan.sr.dcm",
    "dicom-sc": "scan.summary.dcm",
    "picture": "scan.picture.png",
}


def asking(*names: str, **more: Any) -> InferOptions:
    return replace(EXACT, formats=names, **more)


def one(source: Path, model: Path, out: Path, options: InferOptions) -> CaseResult:
    (result,) = infer([source], [model], out, options)
    return result


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("run")}


def flat_model(folder: Path) -> Path:
    """A model for planes."""
    config = tiny_config(
        data={"spatial_dims": 2},
        preprocess={"orient": False},
        augment={"flip_axes": [1], "rotation_deg": [10]},
        windows={"patch_size": [8, 8]},
    )
    return tiny_model(folder, config)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A series of oblique planes with unequal spacing. Shared: read only."""
    return series(tmp_path_factory.mktemp("dicom") / "scan", voxels=VOXELS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, scan: Path, model: Path) -> Path:
    """All formats of `scan`. Shared: read only."""
    out = tmp_path_factory.mktemp("made")
    assert one(scan, model, out, asking(*ALL)).status == "done"
    return out


def test_all_files_are_there_and_on_record(made: Path) -> None:
    assert set(files(made)) == set(NAMES.values())
    (case,) = json.loads((made / "run.json").read_text())["cases"]
    digests = {name: hashlib.sha256((made / name).read_bytes()).hexdigest() for name in NAMES.values()}
    assert (case["output"], case["output_sha256"]) == ("scan.nii.gz", digests["scan.nii.gz"])
    known = {f: {"name": n, "sha256": digests[n]} for f, n in NAMES.items() if f != "nifti"}
    known["dicom-sr"]["refers_to"] = ["dicom-seg"]
    assert case["files"] == known


def test_the_dicom_seg_is_the_mask(made: Path) -> None:
    mask = nib.load(made / "scan.nii.gz")
    volume = hd.seg.segread(made / "scan.seg.dcm").get_volume(combine_segments=True)
    # (plane, row, column) in LPS against (column, row, plane) in RAS; labels 3 and 7 are the segments 1 and 2
    ranks = np.array([0, 0, 0, 1, 0, 0, 0, 2])[np.asarray(mask.dataobj).astype(int)]
    affine = np.diag([-1, -1, 1, 1]) @ volume.affine[:, [2, 1, 0, 3]]
    if affine[:3, 2] @ mask.affine[:3, 2] < 0:
        ranks = ranks[..., ::-1]
    np.testing.assert_array_equal(volume.array.T, ranks)


def test_every_object_refers_to_its_series_and_says_who_made_it(made: Path, model: Path) -> None:
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    objects = {f: pydicom.dcmread(made / n) for f, n in NAMES.items() if n.endswith(".dcm")}
    assert {f: o.Modality for f, o in objects.items()} == {
        "dicom-seg": "SEG",
        "rtstruct": "RTSTRUCT",
        "dicom-sr": "SR",
        "dicom-sc": "OT",
    }
    for found in objects.values():
        assert (found.StudyInstanceUID, found.PatientID) == (phantom.STUDY, "SECRET-4711")
        assert "1.2.3.5.1" in str(found)
        assert weights in str(found)
    assert len({str(o.SeriesInstanceUID) for o in objects.values()} | {phantom.SERIES}) == 5
    sr = hd.sr.srread(made / "scan.sr.dcm")
    (group, *_) = sr.content.get_volumetric_roi_measurement_groups(
        referenced_sop_instance_uid=objects["dicom-seg"].SOPInstanceUID
    )
    mask = nib.load(made / "scan.nii.gz")
    want = np.count_nonzero(np.asarray(mask.dataobj) == 3) * 1.5 * 0.75 * 2.5 / 1000
    assert group.get_measurements()[0].value == pytest.approx(want, rel=1e-6)


def test_the_capture_is_the_picture_and_names_nobody(made: Path, tmp_path: Path, model: Path) -> None:
    capture, picture = pydicom.dcmread(made / "scan.summary.dcm"), np.array(Picture.open(made / "scan.picture.png"))
    assert (capture.SOPClassUID.name, capture.PhotometricInterpretation) == ("Secondary Capture Image Storage", "RGB")
    np.testing.assert_array_equal(capture.pixel_array, picture)
    assert capture.BurnedInAnnotation == "NO"
    # another name and another folder are the same picture
    other = series(tmp_path / "other", every(PatientName="Somebody^Else", PatientID="4"), voxels=VOXELS)
    one(other, model, tmp_path / "out", asking("picture"))
    assert (tmp_path / "out/other.picture.png").read_bytes() == (made / "scan.picture.png").read_bytes()


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy on the path; install dicom3tools")
@pytest.mark.parametrize("name", [n for n in NAMES.values() if n.endswith(".dcm")])
def test_the_validator_finds_no_error(made: Path, name: str) -> None:
    done = subprocess.run(["dciodvfy", made / name], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []


def test_same_run_same_bytes(made: Path, scan: Path, tmp_path: Path, model: Path) -> None:
    one(scan, model, tmp_path / "out", asking(*ALL))
    assert files(tmp_path / "out") == files(made)


def test_another_revision_has_other_identifiers_and_the_same_mask(made: Path, scan: Path, tmp_path: Path, model: Path):
    one(scan, model, tmp_path / "out", asking(*ALL, revision=2))
    assert (tmp_path / "out/scan.nii.gz").read_bytes() == (made / "scan.nii.gz").read_bytes()
    for name in (n for n in NAMES.values() if n.endswith(".dcm")):
        first, second = pydicom.dcmread(made / name), pydicom.dcmread(tmp_path / "out" / name)
        assert first.SOPInstanceUID != second.SOPInstanceUID
        assert first.SeriesInstanceUID != second.SeriesInstanceUID


# ---- what is done is not done again


def _delete(path: Path) -> None:
    path.unlink()


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [_delete, _damage])
@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.rtstruct.dcm", "scan.picture.png"])
def test_a_case_is_skipped_only_where_all_its_files_are_whole(
    scan: Path, tmp_path: Path, model: Path, name: str, harm: Callable[[Path], None]
) -> None:
    options = asking("nifti", "rtstruct", "picture")
    before = one(scan, model, tmp_path, options)
    again = one(scan, model, tmp_path, options)
    assert (again.status, again.files) == ("skipped", before.files)
    whole = files(tmp_path)
    harm(tmp_path / name)
    assert one(scan, model, tmp_path, options).status == "done"
    assert files(tmp_path) == whole


def test_fewer_formats_than_are_there_are_skipped(scan: Path, tmp_path: Path, model: Path) -> None:
    one(scan, model, tmp_path, asking("nifti", "rtstruct"))
    result = one(scan, model, tmp_path, EXACT)
    assert (result.status, set(result.files)) == ("skipped", {"rtstruct"})


def test_a_format_that_is_asked_for_later_joins_the_others(scan: Path, tmp_path: Path, model: Path) -> None:
    one(scan, model, tmp_path, EXACT)
    result = one(scan, model, tmp_path, asking("rtstruct"))
    assert (result.status, result.output, set(result.files), result.warnings) == (
        "done",
        "scan.nii.gz",
        {"rtstruct"},
        (),
    )
    assert one(scan, model, tmp_path, asking("nifti", "rtstruct")).status == "skipped"


def test_measurements_refer_to_a_segmentation_that_is_asked_for_with_them(
    scan: Path, tmp_path: Path, model: Path
) -> None:
    both = asking("dicom-sr", "dicom-seg")
    for options in (asking("dicom-sr"), asking("dicom-seg")):
        assert one(scan, model, tmp_path, options).status == "done"
    uid = str(pydicom.dcmread(tmp_path / "scan.seg.dcm").SOPInstanceUID)
    alone = (tmp_path / "scan.sr.dcm").read_bytes()
    assert uid.encode() not in alone
    assert one(scan, model, tmp_path, both).status == "done"
    assert uid.encode() in (tmp_path / "scan.sr.dcm").read_bytes()
    for options in (both, asking("dicom-sr"), asking("dicom-seg")):
        assert one(scan, model, tmp_path, options).status == "skipped"


def test_measurements_of_a_record_that_tells_no_references_are_looked_at(
    scan: Path, tmp_path: Path, model: Path
) -> None:
    both = asking("dicom-sr", "dicom-seg")
    assert one(scan, model, tmp_path, both).status == "done"
    path = tmp_path / "run.json"
    told = json.loads(path.read_text())
    del told["cases"][0]["files"]["dicom-sr"]["refers_to"]
    path.write_text(json.dumps(told))
    assert one(scan, model, tmp_path, both).status == "skipped"


def test_without_nifti_there_is_none(scan: Path, tmp_path: Path, model: Path) -> None:
    result = one(scan, model, tmp_path, asking("dicom-seg"))
    assert (result.status, result.output, result.output_sha256) == ("done", None, None)
    assert set(files(tmp_path)) == {"scan.seg.dcm"}
    assert one(scan, model, tmp_path, asking("dicom-seg")).status == "skipped"


def test_files_of_another_model_are_called_stale(scan: Path, tmp_path: Path, model: Path, other_model: Path) -> None:
    one(scan, model, tmp_path, asking("nifti", "rtstruct"))
    result = one(scan, other_model, tmp_path, EXACT)
    assert result.warnings == ("scan.rtstruct.dcm is of an earlier mask: do not use it",)


# ---- what cannot be written


def test_a_case_that_is_no_series_fails_and_costs_no_other(scan: Path, tmp_path: Path, model: Path) -> None:
    (image,) = some_images(tmp_path / "in", 1)
    results = {r.case: r for r in infer([scan, image], [model], tmp_path / "out", asking("nifti", "dicom-seg"))}
    assert {n: r.status for n, r in results.items()} == {"scan": "done", "case0": "failed"}
    reason = str(results["case0"].reason)
    assert reason.startswith(f"{image}: no DICOM series found, expected one for dicom-seg")
    assert set(files(tmp_path / "out")) == {"scan.nii.gz", "scan.seg.dcm"}


def test_a_picture_of_what_is_no_series(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    assert one(tmp_path / "in", model, tmp_path / "out", asking("picture")).status == "done"
    assert set(files(tmp_path / "out")) == {"case0.picture.png"}


def test_a_resampled_series_is_refused_for_dicom_alone(tmp_path: Path, model: Path) -> None:
    folder = series(tmp_path / "gap", voxels=VOXELS, at=GAP)
    resampling = SeriesOptions(resample_gaps=True)
    refused = one(folder, model, tmp_path / "out", asking("nifti", "rtstruct", series=resampling))
    assert refused.status == "failed"
    assert f"{folder}: planes that were resampled found" in str(refused.reason)
    assert "leave out --resample-tilt and --resample-gaps" in str(refused.reason)
    assert files(tmp_path / "out") == {}
    assert one(folder, model, tmp_path / "out", asking("nifti", "picture", series=resampling)).status == "done"


def test_permission_to_resample_what_is_regular_changes_nothing(scan: Path, tmp_path: Path, model: Path) -> None:
    options = asking("dicom-seg", series=SeriesOptions(resample_tilt=True, resample_gaps=True))
    assert one(scan, model, tmp_path, options).status == "done"


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_blank_identifiers_are_refused_for_dicom_alone(tmp_path: Path, model: Path) -> None:
    folder = series(tmp_path / "scan", every(FrameOfReferenceUID=""), voxels=VOXELS)
    refused = one(folder, model, tmp_path / "out", asking("nifti", "dicom-seg"))
    assert refused.status == "failed"
    assert f"{folder}: blank Frame of Reference UID found" in str(refused.reason)
    assert files(tmp_path / "out") == {}
    assert one(folder, model, tmp_path / "out", EXACT).status == "done"


def test_where_one_file_cannot_be_written_none_stays(
    scan: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise DataError("no luck")

    monkeypatch.setitem(FORMATS, "dicom-sr", replace(FORMATS["dicom-sr"], write=fails))
    result = one(scan, model, tmp_path, asking(*ALL))
    assert (result.status, result.reason) == ("failed", "no luck")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_where_one_file_cannot_be_written_those_that_were_there_stay(
    scan: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise DataError("no luck")

    one(scan, model, tmp_path, EXACT)
    before = files(tmp_path)
    monkeypatch.setitem(FORMATS, "rtstruct", replace(FORMATS["rtstruct"], write=fails))
    assert one(scan, model, tmp_path, asking("nifti", "picture", "rtstruct")).status == "failed"
    assert files(tmp_path) == before


def test_where_one_file_cannot_be_written_older_ones_of_other_bytes_stay(
    scan: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(path: Path, _: object) -> None:
        write_text(path, "other bytes")

    one(scan, model, tmp_path, asking("nifti"))
    before = files(tmp_path)
    monkeypatch.setitem(FORMATS, "nifti", replace(FORMATS["nifti"], write=other))
    (tmp_path / "scan.rtstruct.dcm").mkdir()
    result = one(scan, model, tmp_path, asking("nifti", "rtstruct", "picture"))
    assert result.status == "failed"
    assert "cannot write scan.rtstruct.dcm (Is a directory)" in str(result.reason)
    (tmp_path / "scan.rtstruct.dcm").rmdir()
    assert files(tmp_path) == before


def test_a_full_disk_leaves_no_file_half(
    scan: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(temporary: Path, _: object) -> None:
        temporary.write_bytes(b"the beginning")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    import medseg.writers.image2d as image2d

    monkeypatch.setattr(image2d, "write_rgb", full)
    assert one(scan, model, tmp_path, asking("nifti", "picture")).status == "not_done"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


KILLED = """
import os, signal, sys
import medseg
from medseg.writers import image2d

def half(temporary, pixels):
    temporary.write_bytes(b"the beginning")
    os.kill(os.getpid(), signal.SIGKILL)

image2d.write_rgb = half
options = medseg.InferOptions(device="cpu", precision="32", formats=("nifti", "rtstruct", "picture"))
medseg.infer([sys.argv[1]], [sys.argv[2]], sys.argv[3], options)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_run_leaves_no_file_half_and_the_next_one_clears_up(scan: Path, tmp_path: Path, model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, scan, model, tmp_path], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    left = {p.name for p in tmp_path.iterdir()}
    assert {n for n in left if not n.startswith(".")} == {"run.json"}
    assert any(n.startswith(".scan.picture.") for n in left)
    assert one(scan, model, tmp_path, asking("nifti", "rtstruct", "picture")).status == "done"
    assert set(files(tmp_path)) == {"scan.nii.gz", "scan.rtstruct.dcm", "scan.picture.png"}


def region_model(folder: Path, **labels: tuple[int, ...]) -> Path:
    return tiny_model(folder, tiny_config(data={"labels": labels, "region_values": [1, 2]}))


@pytest.mark.parametrize("name", [n for n in ALL if n != "nifti"])
def test_regions_that_overlap_are_not_told_as_if_they_did_not(scan: Path, tmp_path: Path, name: str) -> None:
    model = region_model(tmp_path / "model", whole=(1, 2), core=(2,))
    with pytest.raises(ConfigError, match="regions that overlap"):
        one(scan, model, tmp_path / "out", asking("nifti", name))
    assert not (tmp_path / "out").exists()
    assert one(scan, model, tmp_path / "out", asking("nifti")).status == "done"


def test_regions_that_do_not_overlap_are_labels(scan: Path, tmp_path: Path) -> None:
    model = region_model(tmp_path / "model", left=(1, 3), right=(2,))
    assert one(scan, model, tmp_path / "out", asking("dicom-sr")).status == "done"


@pytest.mark.parametrize(
    ("names", "found"), [(("nifti", "dicom"), "dicom"), ((), "none"), (("nifti", "nifti"), "nifti,nifti"), (("",), "")]
)
def test_wrong_formats_are_refused_with_the_right_ones(names: tuple[str, ...], found: str) -> None:
    with pytest.raises(ConfigError) as raised:
        InferOptions(formats=names)
    assert str(raised.value) == f"--format {found}: expected one or several of {', '.join(FORMATS)}, each once"


def test_a_revision_counts_from_one() -> None:
    with pytest.raises(ConfigError, match="revision 0"):
        InferOptions(revision=0)


def test_two_cases_of_one_file_are_refused(tmp_path: Path) -> None:
    model = flat_model(tmp_path / "model")
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.picture.png"):
        Picture.fromarray(np.zeros((9, 12), np.uint8)).save(tmp_path / "in" / name)
    with pytest.raises(ConfigError, match=r"out/a\.picture\.png: both .*in/a\.picture\.png and .*in/a\.png "):
        infer([tmp_path / "in"], [model], tmp_path / "out", asking("nifti", "picture"))
    assert not (tmp_path / "out").exists()


def test_the_help_names_all_formats() -> None:
    from medseg.cli import inference

    option = get_type_hints(inference.infer, include_extras=True)["format_"].__metadata__[0]
    assert [name for name in ALL if name not in option.help] == []


def test_names_of_files_follow_from_case_and_format(tmp_path: Path) -> None:
    volume, plane = Case("scan", (tmp_path / "scan.nii.gz",), None, "scan"), Case("a", (tmp_path / "a.png",), None, "a")
    assert {f: file_name(volume, f) for f in ALL} == NAMES
    assert file_name(volume, "regions") == "regions/scan.nii.gz"
    assert file_name(plane, "nifti") == "a.png"


# ---- a model that is loaded already


def test_a_loaded_model_does_what_its_folder_does(made: Path, scan: Path, tmp_path: Path, model: Path) -> None:
    loaded = load_model(model, options=asking(*ALL))
    (result,) = medseg.infer([scan], loaded, tmp_path)
    assert result.status == "done"
    assert files(tmp_path) == files(made)


def test_a_loaded_model_takes_another_revision_without_its_weights_read_again(
    scan: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(model, options=asking("dicom-seg"))
    monkeypatch.setattr(folder_module, "load_model", None)
    uids = set()
    for revision in (1, 2):
        again = loaded.with_options(replace(loaded.options, revision=revision))
        assert again.models is loaded.models
        infer([scan], again, tmp_path)
        uids.add(pydicom.dcmread(tmp_path / "scan.seg.dcm").SOPInstanceUID)
    assert len(uids) == 2
    assert loaded.options.revision == 1


def test_a_loaded_model_has_its_own_options(scan: Path, tmp_path: Path, model: Path) -> None:
    loaded = load_model(model, options=EXACT)
    with pytest.raises(ConfigError, match="with_options"):
        infer([scan], loaded, tmp_path / "out", EXACT)
    with pytest.raises(ConfigError, match="devices cpu, cpu for a loaded model"):
        infer([scan], load_model(model, options=replace(EXACT, devices=("cpu", "cpu"))), tmp_path / "out")
    with pytest.raises(ConfigError, match="tta, overlap changed of a loaded model"):
        loaded.with_options(replace(loaded.options, tta="flip", overlap=0.1, revision=2))
    assert not (tmp_path / "out").exists()


def test_an_ensemble_has_one_digest_of_all(scan: Path, tmp_path: Path, model: Path, other_model: Path) -> None:
    digests = [hashlib.sha256((m / "model.safetensors").read_bytes()).hexdigest() for m in (model, other_model)]
    both = load_model(model, other_model, options=EXACT).algorithm
    assert both.model_sha256 == hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert both.name.endswith("ensemble of 2")
    single = load_model(model, options=EXACT).algorithm
    assert single.model_sha256 == digests[0]
    assert both.config_sha256 != single.config_sha256


def test_what_decides_a_mask_decides_the_digest_of_the_configuration(model: Path) -> None:
    plain, flipped, elsewhere = (
        load_model(model, options=options).algorithm.config_sha256
        for options in (EXACT, replace(EXACT, overlap=0.1), replace(EXACT, overwrite=True, revision=3))
    )
    assert plain != flipped
    assert plain == elsewhere


# ---- planes


def test_pictures_have_a_picture_too(tmp_path: Path) -> None:
    model = flat_model(tmp_path / "model")
    (tmp_path / "in").mkdir()
    Picture.fromarray((blobs((20, 30)) % 255).astype(np.uint8)).save(tmp_path / "in/a.png")
    result = one(tmp_path / "in", model, tmp_path / "out", asking("nifti", "picture"))
    assert (result.status, result.output, set(files(tmp_path / "out"))) == ("done", "a.png", {"a.png", "a.picture.png"})


def test_a_plane_of_dicom_is_written_as_dicom(tmp_path: Path) -> None:
    model = flat_model(tmp_path / "model")
    folder = series(tmp_path / "scan", voxels=VOXELS[:1])
    result = one(folder, model, tmp_path / "out", asking(*ALL))
    assert (result.status, result.reason) == ("done", None)
    seg = pydicom.dcmread(tmp_path / "out/scan.seg.dcm")
    mask = np.asarray(nib.load(tmp_path / "out/scan.nii.gz").dataobj).reshape(14, 10)
    volume = read_image(folder).grid.affine
    np.testing.assert_allclose(
        nib.load(tmp_path / "out/scan.nii.gz").affine[:, [0, 1, 3]], volume[:, [0, 1, 3]], atol=1e-4
    )
    found = np.zeros((10, 14), int)
    for frame, group in zip(np.atleast_3d(seg.pixel_array.reshape(-1, 10, 14)), seg.PerFrameFunctionalGroupsSequence):
        found[frame > 0] = {1: 3, 2: 7}[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
    np.testing.assert_array_equal(found, mask.T)
    groups = hd.sr.srread(tmp_path / "out/scan.sr.dcm").content.get_volumetric_roi_measurement_groups()
    # the third side of a single plane is its thickness
    want = [np.count_nonzero(mask == value) * 1.5 * 0.75 * 4.0 / 1000 for value in (3, 7)]
    assert [g.get_measurements()[0].value for g in groups] == pytest.approx(want, rel=1e-6)
