"""How much of a Dice goes to images that have a near twin in training: Dice by likeness to the nearest training image.

    python tests/benchmarks/likeness.py DATASET REPORT/metrics.csv -o tests/benchmarks/results/NAME.json

For pictures whose data set names no patients: frames of one person may then lie on both sides of a fold. Likeness is
the correlation of two pictures shrunk to `SIDE` × `SIDE` pixels; the nearest is sought among the cases of all other
folds, which are those that the case's model was trained on. Of each case the Dice is the mean over its labels.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
from skimage.io import imread
from skimage.transform import resize

import medseg
from medseg.datasets import read_dataset

SIDE = 48
EDGES = (-1.0, 0.6, 0.7, 0.8, 0.9, 1.01)


def main() -> None:
    """Compare every judged case with the cases it was not held back with; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("metrics", type=Path, help="metrics.csv of the report of a fold or of a cross-validation")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    data = read_dataset(arguments.dataset)
    cases = data.labelled
    folds = range(len(data.folds or []) or 5)
    held_back = {case.id: k for k in folds for case in medseg.fold_split(data, k)[1]}
    thumbnails = np.stack([thumbnail(case.images[0]) for case in cases])
    alike = thumbnails @ thumbnails.T / thumbnails.shape[1]
    fold = np.array([held_back[case.id] for case in cases])
    alike[fold[:, None] == fold[None]] = -1
    nearest = dict(zip((case.id for case in cases), alike.max(axis=1)))
    dice = dice_by_case(arguments.metrics)
    near, value = (np.array(x) for x in zip(*((nearest[case], dice[case]) for case in sorted(dice))))
    result = {
        "data_set": arguments.dataset.name,
        "cases": len(dice),
        "pearson": round(float(np.corrcoef(near, value)[0, 1]), 3),
        "table": [row(near, value, low, high) for low, high in pairwise(EDGES)],
        "date": date.today().isoformat(),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def thumbnail(path: Path) -> np.ndarray:
    """(SIDE²,) grey values of mean 0 and standard deviation 1."""
    picture = np.asarray(imread(path, as_gray=True), dtype=np.float64)
    small: np.ndarray = resize(picture, (SIDE, SIDE), anti_aliasing=True).ravel()
    return (small - small.mean()) / small.std()


def dice_by_case(path: Path) -> dict[str, float]:
    """Mean over the labels that a case has."""
    found = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["dice"]:
                found[line["case"]].append(float(line["dice"]))
    return {case: float(np.mean(values)) for case, values in found.items()}


def row(near: np.ndarray, dice: np.ndarray, low: float, high: float) -> dict[str, float | int | None]:
    """Mean Dice of the cases whose nearest training image is `low` to `high` alike."""
    inside = (near >= low) & (near < high)
    mean = round(float(dice[inside].mean()), 3) if inside.any() else None
    return {"from": low, "to": high, "cases": int(inside.sum()), "dice": mean}


if __name__ == "__main__":
    main()
