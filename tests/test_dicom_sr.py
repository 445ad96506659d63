"""Measurements of labels as structured reports: read back by highdicom, numbers worked out by hand."""

from __future__ import annotations

import datetime
import math
import shutil
import subprocess
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from dicom_series import OBLIQUE, SHAPE, classic, enhanced, images_of, ras
from pydicom import Dataset
from pydicom.sr.coding import Code

from medseg.grid import Grid
from medseg.readers.segments import Segmentation, SegmentInfo
from medseg.writers.dicom_seg import write_dicom_seg
from medseg.writers.dicom_source import labelled_series
from medseg.writers.dicom_sr import write_dicom_sr
from medseg.writers.provenance import Algorithm

ALGORITHM = Algorithm("net", "1.2", "a" * 64, "b" * 64)
SEGMENTS = (
    SegmentInfo(1, "liver", "#CC79A7"),
    SegmentInfo(3, "kidney_left"),
    SegmentInfo(7, "Tumör 肝"),
    SegmentInfo(9, "liver_tumor"),
)
QUALITY = {
    "liver": {"expected": 0.91, "low": 0.85, "high": 0.95},
    "kidney_left": {"expected": 0.0, "low": 0.0, "high": 0.0},
    "liver_tumor": {"expected": None, "low": None, "high": float("nan")},
}
VOLUME = Code("118565006", "SCT", "Volume")
# OBLIQUE has voxels of 0.8 × 1.1 × 2.5 mm: 2.2 µl
VOXEL_ML = 0.0022


def labelled() -> Segmentation:
    array = np.zeros(SHAPE, np.uint8)
    array[3:7, 2:7, 1:4] = 1  # 4 × 5 × 3 voxels
    array[0, 8, 5] = 9
    return Segmentation(array, Grid(SHAPE, ras(OBLIQUE)), SEGMENTS)


def write(path: Path, source: list[Dataset] | None = None, *, seg: bool = True, **options: object) -> hd.sr.SRDocument:
    series = labelled_series(images_of(source or classic()), labelled(), **{"algorithm": ALGORITHM, **options})
    write_dicom_sr(path, series, quality=QUALITY, with_segmentation=seg)
    if seg:
        write_dicom_seg(path.with_suffix(".seg"), series)
    return hd.sr.srread(path)


def numbers(group: hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations) -> dict[str, tuple[float, str]]:
    return {m.name.value: (m.value, m.unit.value) for m in group.get_measurements()}


def test_volume_and_expected_dice_of_every_label(tmp_path: Path) -> None:
    groups = write(tmp_path / "sr.dcm").content.get_volumetric_roi_measurement_groups()
    assert [g.tracking_identifier for g in groups] == ["liver", "kidney_left", "Tumör 肝", "liver_tumor"]
    liver, kidney, unknown, tumour = map(numbers, groups)
    assert liver["118565006"] == (pytest.approx(60 * VOXEL_ML, rel=1e-6), "mL")
    assert {k: v for k, v in liver.items() if k != "118565006"} == {
        "EXPDICE": (0.91, "1"),
        "EXPDICE-LOW": (0.85, "1"),
        "EXPDICE-HIGH": (0.95, "1"),
    }
    # not found: no volume, and a Dice of 0 that is known
    assert (kidney["118565006"], kidney["EXPDICE"]) == ((0.0, "mL"), (0.0, "1"))
    assert unknown == {"118565006": (0.0, "mL")}
    assert tumour == {"118565006": (pytest.approx(VOXEL_ML, rel=1e-6), "mL")}


def test_the_ends_of_an_interval_are_not_called_what_few_cases_cannot_give(tmp_path: Path) -> None:
    liver = write(tmp_path / "sr.dcm").content.get_volumetric_roi_measurement_groups()[0]
    meanings = {m.name.value: m.name.meaning for m in liver.get_measurements() if m.name.value.startswith("EXPDICE-")}
    assert meanings == {
        "EXPDICE-LOW": "Expected Dice coefficient, lower end of its interval",
        "EXPDICE-HIGH": "Expected Dice coefficient, upper end of its interval",
    }


def test_groups_refer_to_the_segments_of_the_dicom_seg(tmp_path: Path) -> None:
    document = write(tmp_path / "sr.dcm")
    seg = pydicom.dcmread(tmp_path / "sr.seg")
    for group in document.content.get_volumetric_roi_measurement_groups():
        segment = group.referenced_segment
        number = segment.referenced_segment_numbers if hasattr(segment, "referenced_segment_numbers") else None
        item = segment[0].ReferencedSOPSequence[0]
        assert (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) == (seg.SOPClassUID, seg.SOPInstanceUID)
        (number,) = np.atleast_1d(item.ReferencedSegmentNumber).tolist()
        assert seg.SegmentSequence[number - 1].SegmentLabel == group.tracking_identifier
    evidence = {
        (series.SeriesInstanceUID, len(series.ReferencedSOPSequence))
        for series in document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    }
    assert evidence == {(classic()[0].SeriesInstanceUID, SHAPE[2]), (seg.SeriesInstanceUID, 1)}


def test_without_a_dicom_seg_the_images_alone_are_referred_to(tmp_path: Path) -> None:
    document = write(tmp_path / "sr.dcm", seg=False)
    assert document.content.get_volumetric_roi_measurement_groups() == []
    groups = document.content.get_image_measurement_groups()
    assert [numbers(g)["118565006"][0] for g in groups] == pytest.approx([60 * VOXEL_ML, 0, 0, VOXEL_ML])
    (series,) = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert series.SeriesInstanceUID == classic()[0].SeriesInstanceUID


def test_findings_have_their_codes_and_sides(tmp_path: Path) -> None:
    liver, kidney, unknown, tumour = write(tmp_path / "sr.dcm").content.get_volumetric_roi_measurement_groups()
    assert liver.finding_type.value == "10200004"
    assert liver.finding_category.value == "91723000"
    (site,) = kidney.finding_sites
    assert (site.value.value, site.laterality.value) == ("64033007", "7771000")
    # neither an unknown name nor a tumour says where it is
    assert (unknown.finding_type.value, unknown.finding_sites) == ("91723000", [])
    assert (tumour.finding_type.value, tumour.finding_sites) == ("108369006", [])


def test_the_document_says_who_measured_and_that_nobody_has_reviewed_it(tmp_path: Path) -> None:
    document = write(tmp_path / "sr.dcm")
    assert (document.VerificationFlag, document.PreliminaryFlag, document.CompletionFlag) == (
        "UNVERIFIED",
        "PRELIMINARY",
        "COMPLETE",
    )
    (context,) = document.content.get_observer_contexts()
    assert context.observer_identifying_attributes.uid == ALGORITHM.device_uid
    (group, *_) = document.content.get_volumetric_roi_measurement_groups()
    told = {i.ConceptNameCodeSequence[0].CodeMeaning: i.get("TextValue") for i in group[0].ContentSequence}
    assert (told["Algorithm Name"], told["Algorithm Version"]) == ("net", "1.2")
    assert (document.PatientID, document.StudyInstanceUID) == ("P1", classic()[0].StudyInstanceUID)
    assert document.content[0].ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert document.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99MEDSEG"


@pytest.mark.parametrize(("modality", "code"), [("CT", "25045-6"), ("MR", "25056-3"), ("PT", "363679005")])
def test_the_procedure_is_that_of_the_modality(tmp_path: Path, modality: str, code: str) -> None:
    source = classic()
    for header in source:
        header.Modality = modality
        header.RescaleSlope, header.RescaleIntercept = 1, 0
    root = write(tmp_path / "sr.dcm", source).content[0].ContentSequence
    (procedure,) = [i for i in root if i.ConceptNameCodeSequence[0].CodeValue == "121058"]
    assert procedure.ConceptCodeSequence[0].CodeValue == code


def test_same_input_same_bytes_whatever_the_moment(tmp_path: Path) -> None:
    write(tmp_path / "a.dcm")
    write(tmp_path / "b.dcm", classic()[::-1])
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
    assert datetime.date.today().strftime("%Y%m%d").encode() not in (tmp_path / "a.dcm").read_bytes()


def test_identifiers_follow_from_revision_and_from_what_is_referred_to(tmp_path: Path) -> None:
    made = [write(tmp_path / "sr.dcm"), write(tmp_path / "sr.dcm", revision=2), write(tmp_path / "sr.dcm", seg=False)]
    uids = [str(uid) for m in made for uid in (m.SOPInstanceUID, m.SeriesInstanceUID)]
    assert len(set(uids)) == 6
    assert all(pydicom.uid.UID(uid).is_valid for uid in uids)


def test_volumes_are_voxels_times_the_volume_of_one() -> None:
    found = labelled().volumes_ml
    assert found == {
        0: pytest.approx((math.prod(SHAPE) - 61) * VOXEL_ML),
        1: pytest.approx(60 * VOXEL_ML),
        9: pytest.approx(VOXEL_ML),
    }


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy on the path; install dicom3tools")
@pytest.mark.parametrize("seg", [True, False])
@pytest.mark.parametrize("source", [classic(), [enhanced()]], ids=["classic", "enhanced"])
def test_the_validator_finds_no_error(tmp_path: Path, source: list[Dataset], seg: bool) -> None:
    write(tmp_path / "sr.dcm", source, seg=seg)
    done = subprocess.run(["dciodvfy", tmp_path / "sr.dcm"], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []
    assert "Comprehensive3DSR" in done.stderr
