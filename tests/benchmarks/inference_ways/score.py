"""Dice of masks against references, and their agreement with another way's masks; medseg's report is not used here.

Job: `pairs` (prediction, reference or null, compare or null), `record`. Facts: `dice` (mean over cases of the mean over
labels that the reference has), `dice_by_label`, `agreement` (share of voxels that are equal, over all and where either
mask has a label) and `same_grid` (whether every mask has its image's shape and affine).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from stages import Stages, read_job

Array = np.ndarray[Any, np.dtype[Any]]


def main() -> None:
    """Score all pairs."""
    job = read_job()
    stages = Stages(Path(job["record"]))
    means: list[float] = []
    labels: dict[int, list[float]] = {}
    equal: list[float] = []
    equal_inside: list[float] = []
    same = True
    for pair in job["pairs"]:
        prediction = nib.load(pair["prediction"])
        if pair["reference"]:
            reference = nib.load(pair["reference"])
            same &= prediction.shape == reference.shape
            same &= bool(np.allclose(prediction.affine, reference.affine, atol=1e-3))
            found = dice_by_label(joint_counts(prediction, reference))
            means.append(float(np.mean(list(found.values()))))
            for value, number in found.items():
                labels.setdefault(value, []).append(number)
        if pair["compare"] and Path(pair["compare"]).is_file():
            counts = joint_counts(prediction, nib.load(pair["compare"]))
            equal.append(float(np.trace(counts) / counts.sum()))
            inside = counts.sum() - counts[0, 0]
            equal_inside.append(float((np.trace(counts) - counts[0, 0]) / inside) if inside else 1.0)
    stages.facts["same_grid"] = same
    if means:
        stages.facts["dice"] = round(float(np.mean(means)), 5)
        stages.facts["dice_by_label"] = {k: round(float(np.mean(v)), 5) for k, v in sorted(labels.items())}
    if equal:
        stages.facts["agreement"] = {
            "all": round(float(np.mean(equal)), 6),
            "inside": round(float(np.mean(equal_inside)), 6),
        }
    stages.write()


def joint_counts(first: Any, second: Any) -> Array:
    """(256, 256): voxels that are row in `first` and column in `second`; read in slabs."""
    counts = np.zeros(256 * 256, dtype=np.int64)
    one, two = np.asanyarray(first.dataobj), np.asanyarray(second.dataobj)
    for k in range(0, one.shape[-1], 32):
        here = one[..., k : k + 32].astype(np.int64).ravel(), two[..., k : k + 32].astype(np.int64).ravel()
        counts += np.bincount(here[0] * 256 + here[1], minlength=256 * 256)
    return counts.reshape(256, 256)


def dice_by_label(counts: Array) -> dict[int, float]:
    """2TP / (2TP + FP + FN) of every label but 0 that the reference (columns) has."""
    predicted, real = counts.sum(axis=1), counts.sum(axis=0)
    present = [int(v) for v in np.flatnonzero(real) if v != 0]
    return {v: float(2 * counts[v, v] / (predicted[v] + real[v])) for v in present}


if __name__ == "__main__":
    main()
