"""Frames → one regular stack of planes, or the reason why they are none; resampling is in dicom_reslice.

Geometry is that of highdicom, from position and orientation alone. What highdicom lets through is measured here in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from medseg.errors import GeometryError
from medseg.grid import PARALLEL_TOLERANCE
from medseg.readers._axes import LPS_TO_RAS
from medseg.readers.dicom_frames import COSINE_TOLERANCE, Frame, orthonormal

Array = npt.NDArray[np.float64]

# scanners write positions in tenths of a millimetre: rounding moves a plane by half of that …
POSITION_TOLERANCE_MM = 0.05
# … and never by more than this share of the distance of planes that lie close
POSITION_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Stack:
    """Planes in their order along the normal of `first`: `order` indexes the frames they were made of.

    `along_mm` (K,): their distances from the first one; `sideways_mm` (K, 2): how far each is moved along its rows'
    direction and its columns' direction. A regular stack has equal steps and no sideways movement.
    """

    frames: tuple[Frame, ...]
    along_mm: Array
    sideways_mm: Array

    @property
    def first(self) -> Frame:
        """The plane that the others are measured from."""
        return self.frames[0]

    @property
    def step_mm(self) -> float:
        """The mean distance of neighbours; of a single plane 0."""
        return float(self.along_mm[-1] / max(1, len(self.frames) - 1))

    @property
    def tolerance_mm(self) -> float:
        """How far a plane may be from its place."""
        steps = np.diff(self.along_mm)
        # a micrometre less than nothing is rounding of ours
        return min(POSITION_TOLERANCE_MM, POSITION_SHARE * float(np.median(steps))) + 1e-6 if len(steps) else 0.0

    @property
    def is_even(self) -> bool:
        """Whether the planes have equal distances, but for rounding: none is off the line through all by more."""
        if len(self.frames) < 3:
            return True
        numbers = np.arange(len(self.frames))
        off = self.along_mm - np.polyval(np.polyfit(numbers, self.along_mm, 1), numbers)
        return bool(np.abs(off).max() <= self.tolerance_mm)

    @property
    def tilt_degrees(self) -> float:
        """The angle between the way from the first plane to the last one and the normal."""
        if len(self.frames) < 2:
            return 0.0
        return float(np.degrees(np.arctan2(np.linalg.norm(self.sideways_mm[-1]), self.along_mm[-1])))

    @property
    def is_upright(self) -> bool:
        """Whether each plane lies straight above the first one, but for rounding: none off by more than an angle that
        a grid counts as parallel, and by less than a tenth of a pixel."""
        off = np.linalg.norm(self.sideways_mm, axis=1)
        pixel = POSITION_SHARE * min(self.first.spacing_mm)
        return bool(
            (off <= np.maximum(POSITION_TOLERANCE_MM, np.minimum(PARALLEL_TOLERANCE * self.along_mm, pixel))).all()
        )


def stack(frames: Sequence[Frame], where: str) -> Stack:
    """The planes in order. Raises `GeometryError` where two share a position: copies, or several volumes.

    Where positions and cosines differ by the rounding of cosines, the planes are turned until the positions are right.
    """
    made = _in_order(frames)
    _refuse_duplicates(made, where)
    return made if made.is_upright else _turned(made)


def check_regular(made: Stack, where: str, *, gaps: bool = False) -> None:
    """Raises `GeometryError`, with what was found in mm, unless the planes are one upright stack with equal steps.

    `gaps`: the steps may differ.
    """
    _refuse_tilt(made, where)
    if gaps:
        return
    _refuse_uneven(made, where)
    if len(made.frames) > 1 and not _highdicom_agrees(made):
        raise GeometryError(
            f"{where}: the planes are no regular volume for highdicom, expected equal steps along the normal; "
            "choose files of one scan"
        )


def affine_of(made: Stack, spacing_mm: float) -> Array:
    """Voxel (column, row, plane) → RAS mm of a regular stack, 4×4, with `spacing_mm` between planes.

    DICOM PS3.3 C.7.6.2.1.1.
    """
    from highdicom.spatial import create_affine_matrix_from_attributes

    lps = create_affine_matrix_from_attributes(
        image_position=made.first.position.tolist(),
        image_orientation=made.first.orientation.ravel().tolist(),
        pixel_spacing=made.first.spacing_mm,
        spacing_between_slices=spacing_mm,
        index_convention=("R", "D"),
    )
    return np.asarray(LPS_TO_RAS @ lps, dtype=np.float64)


def base_step_mm(made: Stack) -> float:
    """The distance that most neighbours have, by their median."""
    return float(np.median(np.diff(made.along_mm)))


def _in_order(frames: Sequence[Frame]) -> Stack:
    first = frames[0]
    normal, (rows, columns) = first.normal, first.orientation
    distances = np.array([f.position @ normal for f in frames])
    order = np.argsort(distances, kind="stable")
    ordered = tuple(frames[n] for n in order)
    moved = np.stack([f.position - ordered[0].position for f in ordered])
    return Stack(ordered, distances[order] - distances[order[0]], np.stack([moved @ rows, moved @ columns], axis=1))


def _turned(made: Stack) -> Stack:
    """The stack with the way from the first plane to the last as normal, where rounding may have turned it so far."""
    way = made.frames[-1].position - made.first.position
    if np.abs(made.sideways_mm[-1]).max() > POSITION_TOLERANCE_MM + COSINE_TOLERANCE * made.along_mm[-1]:
        return made
    normal = way / np.linalg.norm(way)
    orientation = made.first.orientation
    turned = orthonormal(orientation - np.outer(orientation @ normal, normal))
    return _in_order([replace(frame, orientation=turned) for frame in made.frames])


def _highdicom_agrees(made: Stack) -> bool:
    from highdicom.spatial import get_volume_positions

    spacing, places = get_volume_positions(
        [f.position.tolist() for f in made.frames],
        made.first.orientation.ravel().tolist(),
        # of one step, whose two ends may both be off
        atol=2 * made.tolerance_mm,
        index_convention=("R", "D"),
    )
    even = spacing is not None and abs(spacing - made.step_mm) <= made.tolerance_mm
    return even and places == list(range(len(made.frames)))


def _refuse_duplicates(made: Stack, where: str) -> None:
    steps = np.diff(made.along_mm)
    if len(steps) == 0:
        return
    # nearer than rounding could bring two planes: one place
    apart = steps > min(POSITION_TOLERANCE_MM, POSITION_SHARE * float(steps.max()))
    if apart.all():
        return
    places = int(apart.sum()) + 1
    sizes = np.diff(np.concatenate([[0], np.flatnonzero(apart) + 1, [len(made.frames)]]))
    at = int(np.flatnonzero(~apart)[0])
    if np.linalg.norm(made.sideways_mm[at + 1] - made.sideways_mm[at]) > POSITION_TOLERANCE_MM:
        raise GeometryError(
            f"{where}: images side by side in one plane found ({made.along_mm[at]:.2f} mm from the first), expected "
            "one image a plane; choose files of one scan"
        )
    if places > 1 and (sizes == sizes[0]).all():
        raise GeometryError(
            f"{where}: {len(made.frames)} images at {places} positions found, {sizes[0]} each: {sizes[0]} volumes "
            "(time points, echoes, b-values), expected one; sort the files by acquisition, or split the file"
        )
    raise GeometryError(
        f"{where}: {int(sizes.max())} images at one position found ({made.along_mm[at]:.2f} mm from the first), "
        f"expected one at each of {places} positions; remove the copies"
    )


def _refuse_tilt(made: Stack, where: str) -> None:
    if made.is_upright:
        return
    off = np.linalg.norm(made.sideways_mm, axis=1)
    share = made.along_mm / max(made.along_mm[-1], 1e-9)
    uneven = np.linalg.norm(made.sideways_mm - share[:, None] * made.sideways_mm[-1], axis=1).max()
    if uneven > max(POSITION_TOLERANCE_MM, PARALLEL_TOLERANCE * float(made.along_mm[-1])):
        raise GeometryError(
            f"{where}: planes moved sideways by up to {off.max():.2f} mm against each other found, expected each above "
            "the other; choose files of one scan, or say --resample-tilt"
        )
    raise GeometryError(
        f"{where}: a gantry tilt of {made.tilt_degrees:.1f} degrees found (planes shifted by {off.max():.2f} mm over "
        f"{made.along_mm[-1]:.2f} mm), expected planes above each other; say --resample-tilt to shift them onto an "
        "upright grid"
    )


def _refuse_uneven(made: Stack, where: str) -> None:
    if made.is_even:
        return
    steps, base = np.diff(made.along_mm), base_step_mm(made)
    whole = np.rint(steps / base)
    fix = "fetch the series again, or say --resample-gaps to interpolate"
    if (np.abs(steps - whole * base) <= 2 * made.tolerance_mm).all() and whole.max() > 1:
        at = int(whole.argmax())
        missing = int((whole - 1).sum())
        raise GeometryError(
            f"{where}: a gap of {steps[at]:.2f} mm found ({made.along_mm[at]:.2f} to {made.along_mm[at + 1]:.2f} mm "
            f"from the first plane), expected {base:.2f} mm: {_slices(missing)} missing; {fix}"
        )
    raise GeometryError(
        f"{where}: distances of {steps.min():.2f} to {steps.max():.2f} mm between planes found, expected equal ones "
        f"(median {base:.2f} mm); {fix}"
    )


def _slices(number: int) -> str:
    return f"{number} slice{'s are' if number > 1 else ' is'}"
