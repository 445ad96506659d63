"""Images of given sizes made from one real CT; the field of view in the plane stays the same.

Job: `kind`, `record`, and for `ct`: `dataset`, `case`, `out` — one case as a data set of its own, its labels numbered
without gaps; for `spacing`: `source`, `out`, `spacing_mm`; for `shape`: `source`, `out`, `shape` (I, J, K₀), `slices`,
where slice n is slice n of the volume of K₀ slices, and beyond that the volume goes on as its mirror image.
`source` and `out` are folders with image.nii.gz and label.nii.gz.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from stages import Stages, read_job

Array = np.ndarray[Any, np.dtype[Any]]


def main() -> None:
    """Do the job."""
    job = read_job()
    stages = Stages(Path(job["record"]))
    with stages.stage(job["kind"]):
        if job["kind"] == "ct":
            one_case(Path(job["dataset"]), job["case"], Path(job["out"]))
        elif job["kind"] == "spacing":
            to_spacing(Path(job["source"]), Path(job["out"]), job["spacing_mm"])
        else:
            to_shape(Path(job["source"]), Path(job["out"]), job["shape"], job["slices"])
    stages.write()


def one_case(dataset: Path, case: str, out: Path) -> None:
    """`out`: an nnU-Net data set of this case alone, with the labels that it has, numbered 1, 2, …"""
    description = json.loads((dataset / "dataset.json").read_text())
    image = SimpleITK.ReadImage(str(dataset / "imagesTr" / f"{case}_0000.nii.gz"))
    label = SimpleITK.ReadImage(str(dataset / "labelsTr" / f"{case}.nii.gz"))
    values = SimpleITK.GetArrayFromImage(label).astype(np.int64)
    present = np.unique(values)
    names = {value: name for name, value in description["labels"].items()}
    numbered = np.searchsorted(present, values).astype(np.uint8)
    description["labels"] = {names[int(value)]: n for n, value in enumerate(present)}
    description["numTraining"] = 1
    for folder in ("imagesTr", "labelsTr"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.Cast(image, SimpleITK.sitkInt16), str(out / "imagesTr" / f"{case}_0000.nii.gz"))
    SimpleITK.WriteImage(_like(numbered, label), str(out / "labelsTr" / f"{case}.nii.gz"))
    (out / "dataset.json").write_text(json.dumps(description, indent=1))
    same = out / "as_is"
    same.mkdir(exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.Cast(image, SimpleITK.sitkInt16), str(same / "image.nii.gz"))
    SimpleITK.WriteImage(_like(numbered, label), str(same / "label.nii.gz"))


def to_spacing(source: Path, out: Path, spacing_mm: float) -> None:
    """Both images of `source` at an isotropic spacing."""
    image = SimpleITK.ReadImage(str(source / "image.nii.gz"))
    extent = np.array(image.GetSize()) * np.array(image.GetSpacing())
    shape = [int(round(e / spacing_mm)) for e in extent]
    to_shape(source, out, shape, shape[2])


def to_shape(source: Path, out: Path, shape: list[int], slices: int) -> None:
    """Both images of `source` on `shape` voxels over the same field of view, then `slices` of them."""
    out.mkdir(parents=True, exist_ok=True)
    # back and forth through the volume: the slices next to each other are neighbours everywhere
    there = np.arange(shape[2])
    order = np.resize(np.concatenate([there, there[::-1]]), slices)
    for name, kernel in (("image", SimpleITK.sitkBSpline), ("label", SimpleITK.sitkNearestNeighbor)):
        moved = _resampled(SimpleITK.ReadImage(str(source / f"{name}.nii.gz")), shape, kernel)
        array = SimpleITK.GetArrayFromImage(moved)[order]
        SimpleITK.WriteImage(_like(array, moved), str(out / f"{name}.nii.gz"))


def _resampled(image: Any, shape: list[int], kernel: int) -> Any:
    old = np.array(image.GetSpacing())
    new = np.array(image.GetSize()) * old / np.array(shape)
    turn = np.array(image.GetDirection()).reshape(3, 3)
    # outer faces of the outer voxels stay where they are
    origin = np.array(image.GetOrigin()) + turn @ ((new - old) / 2)
    smallest = float(SimpleITK.GetArrayViewFromImage(image).min())
    # half a voxel lies outside the centres of the outer ones
    return SimpleITK.Resample(
        image,
        [int(s) for s in shape],
        SimpleITK.Transform(),
        kernel,
        origin.tolist(),
        new.tolist(),
        image.GetDirection(),
        smallest,
        image.GetPixelID(),
    )


def _like(array: Array, image: Any) -> Any:
    made = SimpleITK.GetImageFromArray(array)
    made.SetSpacing(image.GetSpacing())
    made.SetOrigin(image.GetOrigin())
    made.SetDirection(image.GetDirection())
    return made


if __name__ == "__main__":
    main()
