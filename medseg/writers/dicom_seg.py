"""A label map becomes a DICOM Segmentation (BINARY, one segment per label) that refers to its image series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.sr.coding import Code

from medseg.readers.segments import VALUE_NOTE, SegmentInfo
from medseg.writers import atomic_path
from medseg.writers.anatomy import Anatomy, anatomy_of
from medseg.writers.dicom_source import LabelledSeries, Source, coded, long_string, repeatable, written_as
from medseg.writers.provenance import Algorithm

# beside the series of the scanner, whose numbers rarely are so large
SERIES_NUMBER = 1000


def write_dicom_seg(path: Path, labelled: LabelledSeries) -> Path:
    """Writes the labels of a series as a DICOM SEG; gives back `path`.

    Every named label becomes a segment, also one that this case does not have; the number of a segment is its label
    value where the values are 1, 2, 3, …, else its rank (DICOM allows no gaps) with the value in its description.
    Frames without a voxel are left out, but for those of the first and the last plane: they keep the extent of the
    grid. Dates are those of the series, UIDs follow from source, revision and model: the same input gives the same
    bytes.
    """
    with written_as(path, "a DICOM SEG"):
        segments = labelled.segments
        made = _segmentation(labelled.source, _ranked(labelled.voxels, segments), segments)
        with atomic_path(path) as temporary:
            made.save_as(temporary, enforce_file_format=True)
    return path


def _ranked(voxels: npt.NDArray[np.integer[Any]], segments: Sequence[SegmentInfo]) -> npt.NDArray[Any]:
    """Segment numbers in place of values."""
    table = np.zeros(max(s.value for s in segments) + 1, np.uint8 if len(segments) < 256 else np.uint16)
    table[[segment.value for segment in segments]] = np.arange(1, len(segments) + 1)
    return np.asarray(table[voxels])


def _segmentation(series: Source, numbers: npt.NDArray[Any], segments: Sequence[SegmentInfo]) -> Dataset:
    origin, algorithm = series.origin, series.origin.algorithm
    # highdicom leaves out empty frames, all or none: the two that keep the extent are marked, and cleared below
    ends = [k for k in sorted({0, len(numbers) - 1}) if not numbers[k].any()]
    numbers[ends, 0, 0] = 1
    date, time = series.date_and_time
    try:
        volume = hd.Volume(
            numbers,
            # (plane, row, column) → LPS mm
            series.affine[:, [2, 1, 0, 3]],
            coordinate_system="PATIENT",
            frame_of_reference_uid=series.first.FrameOfReferenceUID,
        )
        made = hd.seg.Segmentation(
            source_images=series.headers,
            pixel_array=volume,
            segmentation_type="BINARY",
            segment_descriptions=[_description(n, s, algorithm) for n, s in enumerate(segments, 1)],
            series_instance_uid=origin.uid("SEG", "series"),
            series_number=series.series_number + SERIES_NUMBER,
            sop_instance_uid=origin.uid("SEG", "instance"),
            instance_number=1,
            manufacturer="medseg",
            manufacturer_model_name=long_string(algorithm.name),
            software_versions=long_string(algorithm.version),
            device_serial_number=long_string(algorithm.model_sha256) or "none",
            series_description=long_string(f"Segmentation by {algorithm.name}"),
            content_label="SEGMENTATION",
            content_description="One segment per label",
            specific_character_set="ISO_IR 192",
            content_date=date,
            content_time=time,
            series_date=date,
            series_time=time,
        )
    finally:
        numbers[ends, 0, 0] = 0
    _clear(made, series, ends)
    for item in [*made.DimensionOrganizationSequence, *made.DimensionIndexSequence]:
        # highdicom draws one by chance
        item.DimensionOrganizationUID = origin.uid("SEG", "dimensions")
    return repeatable(made)


def _description(number: int, segment: SegmentInfo, algorithm: Algorithm) -> hd.seg.SegmentDescription:
    anatomy = anatomy_of(segment.name)
    made = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=long_string(segment.name) or f"label {segment.value}",
        segmented_property_category=coded(anatomy.category),
        segmented_property_type=coded(anatomy.meaning),
        algorithm_type=algorithm.kind,
        algorithm_identification=_identification(algorithm),
        display_color=hd.color.CIELabColor.from_rgb(*(int(segment.colour[n : n + 2], 16) for n in (1, 3, 5))),
    )
    _add_side(made, anatomy)
    if segment.value != number:
        made.SegmentDescription = VALUE_NOTE.format(segment.value)
    return made


def _identification(algorithm: Algorithm) -> hd.AlgorithmIdentificationSequence:
    hashes = {"model_sha256": algorithm.model_sha256, "config_sha256": algorithm.config_sha256}
    return hd.AlgorithmIdentificationSequence(
        name=long_string(algorithm.name),
        family=Code("123110", "DCM", "Artificial Intelligence"),
        version=long_string(algorithm.version),
        source="medseg",
        parameters={key: value for key, value in hashes.items() if value} or None,
    )


def _add_side(made: Dataset, anatomy: Anatomy) -> None:
    if anatomy.side:
        kind = made.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [hd.sr.CodedConcept.from_code(coded(anatomy.side))]


def _clear(made: Dataset, series: Source, ends: Sequence[int]) -> None:
    """Takes the mark out of the first frame of the planes `ends`."""
    if not ends:
        return
    pixels = bytearray(made.PixelData)
    size = made.Rows * made.Columns
    normal = np.cross(series.affine[:3, 0], series.affine[:3, 1])
    normal /= np.linalg.norm(normal)
    heights = [
        float(np.dot(item.PlanePositionSequence[0].ImagePositionPatient, normal))
        for item in made.PerFrameFunctionalGroupsSequence
    ]
    for k in ends:
        frame = int(np.argmin(np.abs(np.asarray(heights) - series.planes[k].position @ normal)))
        byte, bit = divmod(frame * size, 8)
        pixels[byte] &= ~(1 << bit) & 0xFF
    made.PixelData = bytes(pixels)
