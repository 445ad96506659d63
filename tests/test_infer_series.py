"""Inference on DICOM series: masks on the series' own grid, each series for itself, and what was done is on record."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import phantom
import pytest
from phantom import every, series
from tiny import EXACT

from medseg.errors import ConfigError, DataError, GeometryError
from medseg.folder import infer
from medseg.infer import load_model
from medseg.readers import SeriesOptions
from medseg.readers.series import choose_series

VOXELS = np.random.default_rng(1).integers(0, 300, (12, 10, 14)).astype(np.int16)
GAP = [0.0, 2.5, 7.5, *(10 + 2.5 * k for k in range(9))]


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    return {c["case"]: c for c in json.loads((folder / "run.json").read_text())["cases"]}


def test_masks_lie_on_the_grid_of_the_series(tmp_path: Path, model: Path) -> None:
    folder = series(tmp_path / "scan", voxels=VOXELS)
    (result,) = infer([folder], [model], tmp_path / "out", EXACT)
    assert (result.case, result.status, result.output) == ("scan", "done", "scan.nii.gz")
    mask = nib.load(tmp_path / "out/scan.nii.gz")
    assert mask.shape == VOXELS.T.shape
    np.testing.assert_allclose(mask.affine, phantom.ras_affine(), atol=1e-5)
    assert result.inputs == {str(folder): choose_series(folder).sha256()}
    labels = load_model(model, options=EXACT).segment(folder)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), labels.numpy())


def test_a_finished_series_is_skipped_until_a_byte_changes(tmp_path: Path, model: Path) -> None:
    folder = series(tmp_path / "scan", voxels=VOXELS)
    for wanted in ("done", "skipped"):
        assert infer([folder], [model], tmp_path / "out", EXACT)[0].status == wanted
    series(folder, every(SoftwareVersions="2"), voxels=VOXELS)
    assert infer([folder], [model], tmp_path / "out", EXACT)[0].status == "done"


def test_a_refused_series_costs_no_other_and_says_why(tmp_path: Path, model: Path) -> None:
    root = tmp_path / "study"
    series(root / "good", voxels=VOXELS)
    series(root / "gap", voxels=VOXELS, at=GAP)
    (series(root / "cut", voxels=VOXELS) / "IM03").write_bytes(b"\0" * 128 + b"DICM" + bytes(50))
    (root / "broken.zip").write_bytes(b"PK\3\4 and no more")
    shutil.make_archive(str(root / "zipped"), "zip", root / "good")
    results = {r.case: r for r in infer([root], [model], tmp_path / "out", EXACT)}
    assert {name: r.status for name, r in results.items()} == {
        "good": "done",
        "zipped": "done",
        "gap": "failed",
        "cut": "failed",
        "broken": "failed",
    }
    assert "a gap of 5.00 mm" in str(results["gap"].reason)
    assert "no transfer syntax" in str(results["cut"].reason)
    good, again = (nib.load(tmp_path / f"out/{name}.nii.gz") for name in ("good", "zipped"))
    np.testing.assert_array_equal(np.asarray(good.dataobj), np.asarray(again.dataobj))
    assert not any(word in (tmp_path / "out/run.json").read_text() for word in ("Canary", "SECRET"))


def test_resampling_is_on_request_and_on_record(tmp_path: Path, model: Path) -> None:
    folder = series(tmp_path / "gap", voxels=VOXELS, at=GAP)
    options = replace(EXACT, series=SeriesOptions(resample_gaps=True))
    (result,) = infer([folder], [model], tmp_path / "out", options)
    assert result.warnings[0].startswith("resampled: 12 planes 2.50 to 5.00 mm apart interpolated to 13 planes")
    assert nib.load(tmp_path / "out/gap.nii.gz").shape == (14, 10, 13)
    assert cases(tmp_path / "out")["gap"]["warnings"] == list(result.warnings)
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["settings"]["resample_gaps"] is True
    # a mask that was made so is not taken for one that was not
    assert infer([folder], [model], tmp_path / "out", EXACT)[0].status == "failed"


def test_what_may_be_done_to_a_series_holds_for_one_alone_too(tmp_path: Path, model: Path) -> None:
    series(tmp_path / "both" / "gap", voxels=VOXELS, at=GAP)
    series(tmp_path / "both" / "good", every(SeriesInstanceUID="1.2.3.99"), voxels=VOXELS)
    segmenter = load_model(model, options=EXACT)
    with pytest.raises(DataError, match="2 series found"):
        segmenter.segment(tmp_path / "both")
    chosen = segmenter.with_options(replace(EXACT, series=SeriesOptions(uid="1.2.3.99")))
    assert chosen.segment(tmp_path / "both").shape == (14, 10, 12)
    with pytest.raises(GeometryError, match=r"a gap of 5\.00 mm"):
        segmenter.segment(tmp_path / "both" / "gap")
    resampling = segmenter.with_options(replace(EXACT, series=SeriesOptions(resample_gaps=True)))
    assert resampling.segment(tmp_path / "both" / "gap").shape == (14, 10, 13)


def test_records_of_before_stay_good(tmp_path: Path, model: Path) -> None:
    folder = series(tmp_path / "scan", voxels=VOXELS)
    infer([folder], [model], tmp_path / "out", EXACT)
    settings = json.loads((tmp_path / "out/run.json").read_text())["settings"]
    assert not {"series", "resample_tilt", "resample_gaps"} & set(settings)


def test_masks_are_not_written_among_the_slices(tmp_path: Path, model: Path) -> None:
    folder = series(tmp_path / "scan", voxels=VOXELS)
    with pytest.raises(ConfigError, match="choose another -o"):
        infer([folder], [model], folder, EXACT)
    assert len(list(folder.iterdir())) == len(VOXELS)
