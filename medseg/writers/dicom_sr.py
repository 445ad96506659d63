"""Volumes and expected Dice of labels become a DICOM structured report (TID 1500) that refers to the segmentation.

Codes of ours, in the coding scheme `99MEDSEG`, each a number without a unit:

| code | meaning |
|---|---|
| EXPDICE | Expected Dice coefficient: of the label with what a person would draw, estimated without a reference |
| EXPDICE-LOW | Expected Dice coefficient, lower end of its interval |
| EXPDICE-HIGH | Expected Dice coefficient, upper end of its interval |

The interval is the central 90 %, less where fewer than 19 cases taught the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom import Dataset
from pydicom.sr.coding import Code

from medseg.readers.segments import SegmentInfo
from medseg.writers import atomic_path
from medseg.writers.anatomy import ABNORMAL, CODES, STRUCTURE, anatomy_of
from medseg.writers.dicom_source import LabelledSeries, Source, coded, long_string, repeatable, written_as
from medseg.writers.provenance import Algorithm

SERIES_NUMBER = 3000
SCHEME = "99MEDSEG"
SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
# CID 100, by the modality of the series
_PROCEDURES = {
    "CT": Code("25045-6", "LN", "CT unspecified body region"),
    "MR": Code("25056-3", "LN", "MRI unspecified body region"),
}
_ANY_PROCEDURE = Code("363679005", "SCT", "Imaging procedure")
_VOLUME, _MILLILITRE = Code("118565006", "SCT", "Volume"), Code("mL", "UCUM", "milliliter")
_NO_UNIT = Code("1", "UCUM", "no units")
_QUALITY = {
    "expected": Code("EXPDICE", SCHEME, "Expected Dice coefficient"),
    "low": Code("EXPDICE-LOW", SCHEME, "Expected Dice coefficient, lower end of its interval"),
    "high": Code("EXPDICE-HIGH", SCHEME, "Expected Dice coefficient, upper end of its interval"),
}


def write_dicom_sr(
    path: Path,
    labelled: LabelledSeries,
    *,
    quality: Mapping[str, Mapping[str, float | None]],
    with_segmentation: bool,
) -> Path:
    """Writes what was measured of the labels of a series as a Comprehensive 3D SR; gives back `path`.

    One measurement group for each named label: its volume, 0 where it was not found, and of `quality` by name
    `expected`, `low` and `high`, as far as they are known. `with_segmentation`: the groups refer to the segments of the
    DICOM SEG that `write_dicom_seg` makes of the same `labelled` (TID 1411); else to no region but the images
    (TID 1501). Dates are those of the series, UIDs follow from source, revision and model: the same input gives the
    same bytes.
    """
    with written_as(path, "a DICOM SR"):
        source, volumes_ml = labelled.source, labelled.volumes_ml
        groups = [
            _group(source, number, segment, volumes_ml, quality, with_segmentation)
            for number, segment in enumerate(labelled.segments, 1)
        ]
        made = _document(source, groups, with_segmentation)
        with atomic_path(path) as temporary:
            made.save_as(temporary, enforce_file_format=True)
    return path


def _document(source: Source, groups: Sequence[Any], with_segmentation: bool) -> Dataset:
    origin, algorithm, first = source.origin, source.origin.algorithm, source.first
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=_device(algorithm)),
        procedure_reported=_PROCEDURES.get(str(first.get("Modality")), _ANY_PROCEDURE),
        imaging_measurements=groups,
        title=Code("126000", "DCM", "Imaging Measurement Report"),
        language_of_content_item_and_descendants=sr.LanguageOfContentItemAndDescendants(
            sr.CodedConcept("en", "RFC5646", "English")
        ),
    )
    date, time = source.date_and_time
    what = ("SR", "on SEG") if with_segmentation else ("SR",)
    made = sr.Comprehensive3DSR(
        # the first one names patient and study
        evidence=[*source.headers, *([_segmentation(source)] if with_segmentation else [])],
        content=report[0],
        series_instance_uid=origin.uid(*what, "series"),
        series_number=source.series_number + SERIES_NUMBER,
        sop_instance_uid=origin.uid(*what, "instance"),
        instance_number=1,
        manufacturer="medseg",
        manufacturer_model_name=long_string(algorithm.name),
        software_versions=long_string(algorithm.version),
        device_serial_number=long_string(algorithm.model_sha256) or "none",
        series_description=long_string(f"Measurements by {algorithm.name}"),
        is_complete=True,
        is_verified=False,
        is_final=False,
        coding_schemes=[
            CodingSchemeIdentificationItem(SCHEME, name="medseg", responsible_organization="The medseg developers")
        ],
        specific_character_set="ISO_IR 192",
        content_date=date,
        content_time=time,
        series_date=date,
        series_time=time,
    )
    return repeatable(made)


def _device(algorithm: Algorithm) -> sr.ObserverContext:
    identity = sr.DeviceObserverIdentifyingAttributes(
        uid=algorithm.device_uid,
        name=long_string(algorithm.name),
        manufacturer_name="medseg",
        model_name=long_string(algorithm.name),
        serial_number=algorithm.model_sha256 or None,
    )
    return sr.ObserverContext(sr.CodedConcept("121007", "DCM", "Device"), identity)


def _segmentation(source: Source) -> Dataset:
    """What can be known of the DICOM SEG before it is written."""
    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID = SEGMENTATION_STORAGE, source.origin.uid("SEG", "instance")
    made.StudyInstanceUID, made.SeriesInstanceUID = source.first.StudyInstanceUID, source.origin.uid("SEG", "series")
    return made


def _group(
    source: Source,
    number: int,
    segment: SegmentInfo,
    volumes_ml: Mapping[int, float],
    quality: Mapping[str, Mapping[str, float | None]],
    with_segmentation: bool,
) -> Any:
    anatomy = anatomy_of(segment.name)
    code = CODES[anatomy.meaning]
    measured = [sr.Measurement(_VOLUME, float(volumes_ml.get(segment.value, 0.0)), _MILLILITRE)]
    known = quality.get(segment.name, {})
    for key, name in _QUALITY.items():
        value = known.get(key)
        if value is not None and math.isfinite(value):
            measured.append(sr.Measurement(name, float(value), _NO_UNIT))
    # what is abnormal is nowhere that its name tells
    placed = code != STRUCTURE and CODES[anatomy.category] != ABNORMAL
    side = coded(anatomy.side) if anatomy.side else None
    what: dict[str, Any] = {
        "tracking_identifier": sr.TrackingIdentifier(
            uid=source.origin.uid("SR", "tracking", str(segment.value)),
            identifier=long_string(segment.name) or f"label {segment.value}",
        ),
        "finding_category": coded(anatomy.category),
        "finding_type": coded(anatomy.meaning),
        "finding_sites": [sr.FindingSite(coded(anatomy.meaning), laterality=side)] if placed else None,
        "algorithm_id": _identification(source.origin.algorithm),
        "measurements": measured,
    }
    if not with_segmentation:
        return sr.MeasurementsAndQualitativeEvaluations(**what)
    referenced = sr.ReferencedSegment(
        sop_class_uid=SEGMENTATION_STORAGE,
        sop_instance_uid=source.origin.uid("SEG", "instance"),
        segment_number=number,
        source_series=sr.SourceSeriesForSegmentation(source.first.SeriesInstanceUID),
    )
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=referenced, **what)


def _identification(algorithm: Algorithm) -> sr.AlgorithmIdentification:
    hashes = {"model_sha256": algorithm.model_sha256, "config_sha256": algorithm.config_sha256}
    return sr.AlgorithmIdentification(
        name=long_string(algorithm.name),
        version=long_string(algorithm.version),
        parameters=[f"{key}={value}" for key, value in hashes.items() if value] or None,
        family=ARTIFICIAL_INTELLIGENCE,
        manufacturer="medseg",
    )
