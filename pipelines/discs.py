"""Pictures of discs of known diameters, and how many of each diameter a mask finds: small structures made countable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.io import imread, imsave

import medseg

DIAMETERS = (4, 6, 8, 12, 16, 24, 32)
SMALL_BELOW = 16
SIDE = 256
PICTURES = 80
FOLDS = 4
"""One fold of four is held back: 60 pictures to train on, 20 to judge."""
EACH = 2
MARGIN = 4
"""Pixels around a disc that count as its own; the next disc's begin beyond."""
FOUND = 0.5
"""Dice within its own pixels from which a disc counts as found."""
NAME = "discs.json"
VERSION = 1


def make_discs(folder: Path, *, seed: int = 0, pictures: int = PICTURES) -> Path:
    """Write images/, labels/ and discs.json into `folder`, unless they are there; returns it.

    Two discs of each diameter a picture, brighter or darker than an uneven background, in noise.
    """
    description = folder / NAME
    wanted = {"version": VERSION, "seed": seed, "pictures": pictures}
    if description.is_file() and json.loads(description.read_text(encoding="utf-8"))["made"] == wanted:
        return folder
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    table = {}
    for number in range(pictures):
        name = f"discs_{number:03d}"
        image, label, discs = _picture(rng)
        imsave(folder / "images" / f"{name}.png", image, check_contrast=False)
        imsave(folder / "labels" / f"{name}.png", label, check_contrast=False)
        table[name] = discs
    # last: a folder without it is begun again
    medseg.write_text(description, json.dumps({"made": wanted, "discs": table}) + "\n")
    return folder


def measure_discs(masks: Path, dataset: Path) -> dict[str, Any]:
    """What the `masks` (CASE.png) found of the discs of `dataset`.

    `scores`: by measure and picture, the share found of `small` and `large` discs, and the first less the second
    (`small_beyond_large`). `diameters`: for each, number, share found, mean Dice and mean recall.
    """
    table = json.loads((dataset / NAME).read_text(encoding="utf-8"))["discs"]
    found: dict[str, list[tuple[int, float, float]]] = {}
    for path in sorted(masks.glob("*.png")):
        mask = np.asarray(imread(path)) > 0
        found[path.stem] = [(d, *_overlap(mask, row, column, d)) for row, column, d in table[path.stem]]
    small = {case: _share(discs, small=True) for case, discs in found.items()}
    large = {case: _share(discs, small=False) for case, discs in found.items()}
    everything = [disc for discs in found.values() for disc in discs]
    return {
        "scores": {
            "small": small,
            "large": large,
            "small_beyond_large": {case: small[case] - large[case] for case in found},
        },
        "diameters": {
            str(d): _class([(dice, recall) for diameter, dice, recall in everything if diameter == d])
            for d in DIAMETERS
            if any(diameter == d for diameter, *_ in everything)
        },
    }


def _class(discs: list[tuple[float, float]]) -> dict[str, float]:
    dice, recall = np.array(discs).T
    return {
        "discs": len(discs),
        "found": float((dice >= FOUND).mean()),
        "dice": float(dice.mean()),
        "recall": float(recall.mean()),
    }


def _share(discs: list[tuple[int, float, float]], *, small: bool) -> float:
    chosen = [dice for diameter, dice, _ in discs if (diameter < SMALL_BELOW) == small]
    return sum(dice >= FOUND for dice in chosen) / len(chosen)


def _overlap(mask: npt.NDArray[np.bool_], row: float, column: float, diameter: int) -> tuple[float, float]:
    """Dice and recall of one disc, within its own pixels."""
    reach = math.ceil(diameter / 2 + MARGIN) + 1
    rows = slice(max(0, int(row) - reach), int(row) + reach + 1)
    columns = slice(max(0, int(column) - reach), int(column) + reach + 1)
    distance = _distance(row, column, mask.shape)[rows, columns]
    disc, own = distance <= diameter / 2, mask[rows, columns] & (distance <= diameter / 2 + MARGIN)
    inside = int((disc & own).sum())
    return 2 * inside / int(disc.sum() + own.sum()), inside / int(disc.sum())


def _distance(row: float, column: float, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.asarray(np.hypot(rows - row, columns - column))


def _picture(
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], list[tuple[float, float, int]]]:
    shape = (SIDE, SIDE)
    uneven = ndimage.gaussian_filter(rng.standard_normal(shape), 24)
    image = 110 + 25 * uneven / uneven.std()
    label = np.zeros(shape, np.uint8)
    discs: list[tuple[float, float, int]] = []
    for diameter in sorted(DIAMETERS * EACH, reverse=True):
        row, column = _place(rng, diameter, discs)
        inside = _distance(row, column, shape) <= diameter / 2
        image[inside] += rng.uniform(25, 70) * rng.choice([-1, 1])
        label[inside] = 1
        discs.append((row, column, diameter))
    image = ndimage.gaussian_filter(image, 0.6) + rng.normal(0, 12, shape)
    return image.clip(0, 255).astype(np.uint8), label, discs


def _place(rng: np.random.Generator, diameter: int, discs: list[tuple[float, float, int]]) -> tuple[float, float]:
    """A centre whose own pixels meet neither the border nor those of another disc."""
    reach = diameter / 2 + MARGIN
    while True:
        row, column = (float(v) for v in np.round(rng.uniform(reach, SIDE - 1 - reach, 2), 2))
        if all(math.hypot(row - r, column - c) > reach + d / 2 + MARGIN + 1 for r, c, d in discs):
            return row, column
