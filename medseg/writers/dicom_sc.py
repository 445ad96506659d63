"""A picture of what was found becomes a DICOM secondary capture, beside the images it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from medseg.writers import atomic_path
from medseg.writers.dicom_source import LabelledSeries, Source, long_string, reference_to, repeatable, written_as

SERIES_NUMBER = 4000
_DERIVATION = "Montage with outlines of segments and their measurements"


def write_dicom_sc(path: Path, labelled: LabelledSeries, picture: npt.NDArray[np.uint8]) -> Path:
    """Writes `picture` (rows, columns, 3) RGB as a secondary capture of the study of `labelled`; gives back `path`.

    Not compressed: every viewer shows it. It must not say who the patient is: the header does, and has
    BurnedInAnnotation NO. Dates are those of the series, UIDs follow from source, revision and model: the same input
    gives the same bytes.
    """
    with written_as(path, "a secondary capture"):
        made = _capture(labelled.source, picture)
        with atomic_path(path) as temporary:
            made.save_as(temporary, enforce_file_format=True)
    return path


def _capture(source: Source, picture: npt.NDArray[np.uint8]) -> Dataset:
    origin, algorithm, first = source.origin, source.origin.algorithm, source.first
    date, time = source.date_and_time
    made: Any = hd.sc.SCImage(
        pixel_array=picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        # of several views, none; highdicom insists on one
        patient_orientation=("L", "P"),
        study_instance_uid=first.StudyInstanceUID,
        series_instance_uid=origin.uid("SC", "series"),
        series_number=source.series_number + SERIES_NUMBER,
        sop_instance_uid=origin.uid("SC", "instance"),
        instance_number=1,
        manufacturer="medseg",
        manufacturer_model_name=long_string(algorithm.name),
        software_versions=long_string(algorithm.version),
        device_serial_number=long_string(algorithm.model_sha256) or "none",
        series_description=long_string(f"Summary by {algorithm.name}"),
        specific_character_set="ISO_IR 192",
        content_date=date,
        content_time=time,
        series_date=date,
        series_time=time,
    )
    made.copy_patient_and_study_information(first)
    made.PatientOrientation = None
    # empty: not known whether what is shown is one of a pair
    made.Laterality = ""
    made.DateOfSecondaryCapture, made.TimeOfSecondaryCapture = date, time
    made.SecondaryCaptureDeviceManufacturer = "medseg"
    made.BurnedInAnnotation = "NO"
    made.DerivationDescription = _DERIVATION
    made.SourceImageSequence = [reference_to(header) for header in source.headers]
    return repeatable(made)
