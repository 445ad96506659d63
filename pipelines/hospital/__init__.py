"""The hospital node: DICOM in, DICOM out, on one machine or several; each part is a module with one subject."""
