"""Sentences where a number of a report could mislead; the numbers themselves are made elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from medseg.evaluate.pairs import counted, named
from medseg.evaluate.summary import SMALL, Judged


def cautions(judged: Judged) -> list[str]:
    """What a reader of the summary has to know: few cases, infinite or rough distances, labels that are nowhere."""
    return [
        *_resampled(judged),
        *_skewed(judged),
        *_few(judged),
        *_all_equal(judged),
        *_nowhere(judged),
        *_infinite(judged),
        *_small_subgroups(judged),
    ]


def _resampled(judged: Judged) -> list[str]:
    if not judged.resampled:
        return []
    n = counted(len(judged.resampled), "prediction")
    return [f"{n} on another grid, brought to that of the reference (nearest neighbour): {named(judged.resampled)}"]


def _skewed(judged: Judged) -> list[str]:
    if not judged.skewed:
        return []
    n = counted(len(judged.skewed), "case")
    said = f"voxel axes are not at right angles in {n} ({named(judged.skewed)})"
    return [f"{said}: distances are measured as if they were, and are rough; volumes are right"]


def _few(judged: Judged) -> list[str]:
    cases = list(judged.found["case"].unique())
    n_patients = judged.n_patients(cases)
    if n_patients is not None and n_patients < SMALL <= len(cases):
        return [f"{len(cases)} cases are of {n_patients} patients only: intervals are wide and rough"]
    n = len(cases) if n_patients is None else n_patients
    noun = "cases" if n_patients is None else "patients"
    return [f"fewer than {SMALL} {noun} ({n}): intervals are rough, and one odd case moves every mean"] * (n < SMALL)


def _all_equal(judged: Judged) -> list[str]:
    found = judged.found
    if found["tp"].sum() == 0 or found["fp"].sum() or found["fn"].sum():
        return []
    return ["every prediction equals its reference voxel by voxel: make sure that no reference was given as prediction"]


def _nowhere(judged: Judged) -> list[str]:
    empty = judged.found["status"] == "both_empty"
    names = [name for name, all_empty in empty.groupby(judged.found["name"], sort=False).all().items() if all_empty]
    return [f"in no reference and no prediction of these cases: {named(list(map(str, names)))}"] if names else []


def _infinite(judged: Judged) -> list[str]:
    infinite = judged.found[np.isinf(judged.found["hd95_mm"].to_numpy(dtype=float))]
    if infinite.empty:
        return []
    counts = infinite["name"].value_counts(sort=False)
    words = named([f"{name} in {counted(n, 'case')}" for name, n in _in_order(counts, list(judged.labels))])
    return [
        f"distances are infinite where a label was missed or spurious ({words}): means of distances are those of "
        "the other cases only"
    ]


def _small_subgroups(judged: Judged) -> list[str]:
    sizes = [
        (f"{column} {value}", judged.n_units(list(rows["case"].unique())))
        for column, value, _, rows in judged.subgroups()
    ]
    small = [f"{name} ({n})" for name, n in sizes if n < SMALL]
    noun = "cases" if judged.groups is None else "patients"
    return [f"subgroups of fewer than {SMALL} {noun} say little: {named(small)}"] if small else []


def _in_order(counts: pd.Series[int], names: Sequence[str]) -> list[tuple[str, int]]:
    return [(name, int(counts[name])) for name in names if name in counts.index]
