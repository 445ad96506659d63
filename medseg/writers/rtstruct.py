"""A label map becomes a DICOM RT Structure Set: closed planar contours on the planes of its image series."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import UID, ImplicitVRLittleEndian

from medseg.readers.segments import SegmentInfo
from medseg.writers import atomic_path
from medseg.writers.dicom_source import LabelledSeries, Plane, Source, long_string, reference_to, written_as
from medseg.writers.outlines import outlines
from medseg.writers.provenance import IMPLEMENTATION_UID

SERIES_NUMBER = 2000
RT_STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
DETACHED_STUDY_MANAGEMENT = "1.2.840.10008.3.1.2.3.1"
_CONTOUR_DATA = Tag("ContourData")
_SHORT_STRING = 16
# of the patient and study modules, what says who and which; all are copied where the series has them
_IDENTITY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "IssuerOfPatientID",
    "OtherPatientIDs",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "StudyInstanceUID",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
)


def write_rtstruct(path: Path, labelled: LabelledSeries) -> Path:
    """Writes the labels of a series as an RT Structure Set; gives back `path`.

    One ROI per named label, numbered by its value, without contours where this case does not have it. Contours are the
    edges of the voxels in each plane, exactly; holes are joined to the contour around them (see `outlines`). Dates are
    those of the series, UIDs follow from source, revision and model: the same input gives the same bytes.
    """
    with written_as(path, "an RTSTRUCT"):
        made = _structure_set(labelled.source, labelled.segments)
        made.ROIContourSequence = _roi_contours(labelled.source, labelled.voxels, labelled.segments)
        with atomic_path(path) as temporary:
            made.save_as(temporary, enforce_file_format=True)
    return path


def _structure_set(series: Source, segments: Sequence[SegmentInfo]) -> Dataset:
    origin, algorithm, first = series.origin, series.origin.algorithm, series.first
    date, time = series.date_and_time
    made = Dataset()
    # implicit: a length in explicit form has 16 bits, and long contours have more
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    made.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    made.file_meta.ImplementationVersionName = "medseg"
    made.SpecificCharacterSet = "ISO_IR 192"
    made.SOPClassUID, made.SOPInstanceUID = RT_STRUCTURE_SET, origin.uid("RTSTRUCT", "instance")
    for keyword in _IDENTITY:
        if keyword in first:
            made[keyword] = first[keyword]
    made.Modality, made.SeriesInstanceUID = "RTSTRUCT", origin.uid("RTSTRUCT", "series")
    made.SeriesNumber, made.InstanceNumber = series.series_number + SERIES_NUMBER, 1
    made.SeriesDescription = long_string(f"Contours by {algorithm.name}")
    made.SeriesDate, made.SeriesTime, made.OperatorsName = date, time, ""
    made.Manufacturer, made.ManufacturerModelName = "medseg", long_string(algorithm.name)
    made.SoftwareVersions = long_string(algorithm.version)
    made.FrameOfReferenceUID, made.PositionReferenceIndicator = first.FrameOfReferenceUID, ""
    made.StructureSetLabel = long_string(algorithm.name)[:_SHORT_STRING].strip() or "medseg"
    made.StructureSetDate, made.StructureSetTime = date, time
    hashes = {"model SHA-256": algorithm.model_sha256, "configuration SHA-256": algorithm.config_sha256}
    told = [f"{what} {value}" for what, value in hashes.items() if value]
    if told:
        made.StructureSetDescription = ", ".join(told)
    made.ApprovalStatus = "UNAPPROVED"
    made.ReferencedFrameOfReferenceSequence = [_frame_of_reference(series)]
    made.StructureSetROISequence = [_roi(series, segment) for segment in segments]
    made.RTROIObservationsSequence = [_observation(n, segment) for n, segment in enumerate(segments, 1)]
    return made


def _frame_of_reference(series: Source) -> Dataset:
    first = series.first
    images = Dataset()
    images.SeriesInstanceUID = first.SeriesInstanceUID
    # of a multi-frame object each frame that is drawn on is told with its contour
    images.ContourImageSequence = [reference_to(header) for header in series.headers]
    study = Dataset()
    study.ReferencedSOPClassUID = DETACHED_STUDY_MANAGEMENT
    study.ReferencedSOPInstanceUID = first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [images]
    made = Dataset()
    made.FrameOfReferenceUID = first.FrameOfReferenceUID
    made.RTReferencedStudySequence = [study]
    return made


def _roi(series: Source, segment: SegmentInfo) -> Dataset:
    made = Dataset()
    made.ROINumber = segment.value
    made.ReferencedFrameOfReferenceUID = series.first.FrameOfReferenceUID
    made.ROIName = long_string(segment.name) or f"label {segment.value}"
    made.ROIGenerationAlgorithm = series.origin.algorithm.kind
    return made


def _observation(number: int, segment: SegmentInfo) -> Dataset:
    made = Dataset()
    made.ObservationNumber = number
    made.ReferencedROINumber = segment.value
    # what it is for a plan is for people to say
    made.RTROIInterpretedType, made.ROIInterpreter = "", ""
    return made


def _roi_contours(
    series: Source, voxels: npt.NDArray[np.integer[Any]], segments: Sequence[SegmentInfo]
) -> list[Dataset]:
    contours: dict[int, list[Dataset]] = {segment.value: [] for segment in segments}
    affine = series.affine
    for plane, values in zip(series.planes, voxels):
        for value in np.flatnonzero(np.bincount(values.ravel())[1:]) + 1:
            for polygon in outlines(values == value):
                points = plane.position + polygon @ affine[:3, :2].T
                contours[int(value)].append(_contour(plane, points, len(contours[int(value)]) + 1))
    return [_roi_contour(segment, contours[segment.value]) for segment in segments]


def _roi_contour(segment: SegmentInfo, contours: list[Dataset]) -> Dataset:
    made = Dataset()
    made.ROIDisplayColor = [int(segment.colour[n : n + 2], 16) for n in (1, 3, 5)]
    made.ReferencedROINumber = segment.value
    if contours:
        made.ContourSequence = contours
    return made


def _contour(plane: Plane, points: npt.NDArray[np.float64], number: int) -> Dataset:
    made = Dataset()
    image = reference_to(plane.header)
    if "PerFrameFunctionalGroupsSequence" in plane.header:
        image.ReferencedFrameNumber = plane.frame
    made.ContourImageSequence = [image]
    made.ContourGeometricType = "CLOSED_PLANAR"
    made.NumberOfContourPoints = len(points)
    made.ContourNumber = number
    # bytes as they will stand in the file: a million numbers are too many to be made objects first
    text = "\\".join(_decimals(points)).encode()
    text += b" " * (len(text) % 2)
    made[_CONTOUR_DATA] = RawDataElement(_CONTOUR_DATA, "DS", len(text), text, 0, True, True)
    return made


def _decimals(points: npt.NDArray[np.float64]) -> Iterator[str]:
    """Numbers in tenths of a micrometre, in at most the 16 characters of a DS."""
    # adding 0 makes −0 a 0
    return (f"{value:.4f}" for value in (np.round(points.ravel(), 4) + 0.0).tolist())
