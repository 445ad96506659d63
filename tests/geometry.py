"""Oblique affines and the 48 ways to store one volume, for tests; what they are compared with is made in the tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[np.generic]


def oblique(spacing_mm: Sequence[float], origin: Sequence[float] = (5.0, -7.0, 11.0), *, degrees: float = 20) -> Array:
    """Affine (4, 4) of axes turned about z, then about x, by `degrees` and minus three quarters of it."""
    a, b = np.deg2rad(degrees), np.deg2rad(-0.75 * degrees)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag(spacing_mm)
    affine[:3, 3] = origin
    return affine


def orientations() -> Iterator[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """All 48 pairs of an order of the axes and a direction for each."""
    return itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3))


def reorient(array: AnyArray, affine: Array, order: Sequence[int], flipped: Sequence[bool]) -> tuple[AnyArray, Array]:
    """The same voxels at the same places, stored with axes in another order and direction."""
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flipped)):
        change[old, new] = -1 if flip else 1
        change[old, 3] = array.shape[old] - 1 if flip else 0
    turned = array.transpose(tuple(order))
    return np.flip(turned, [a for a in range(3) if flipped[a]]).copy(), affine @ change


def save(path: Path, array: AnyArray, affine: Array) -> Path:
    """Write a NIfTI file."""
    nib.save(nib.Nifti1Image(array, affine), path)
    return path
