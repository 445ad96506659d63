"""What of the missing Dice lies at the outline of all labels together, and what between them, of a run's own masks.

    python tests/benchmarks/borders.py DATASET RUN -o RESULT.json

Of each held-back case of RUN the written mask is judged three ways: the labels as they are; all labels as one, which
only the outline can spoil; and the same outline perfectly divided, each of its voxels with the label of the nearest
labelled voxel of the reference.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.datasets import read_dataset
from medseg.readers import read_label
from medseg.told import read_labels

Labels = npt.NDArray[np.integer]


def main() -> None:
    """Judge the masks of a run, and write the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    values = [value for name, value in read_labels(arguments.run).items() if value and name != "ignore"]
    references = {case.id: case.label for case in read_dataset(arguments.dataset).cases if case.label is not None}
    description = json.loads((arguments.run / "model.json").read_text())
    rows = []
    for case in description["training"]["validation_cases"]:
        mask = next((arguments.run / "validation").glob(f"{case}.*"))
        prediction, reference = (read_label(path).array for path in (mask, references[case]))
        divided = np.where(prediction > 0, nearest_label(reference), 0)
        as_one = dice(prediction > 0, reference > 0)
        rows.append((mean_dice(prediction, reference, values), as_one, mean_dice(divided, reference, values)))
    means = np.mean(rows, axis=0)
    result = {
        "data_set": arguments.dataset.resolve().name,
        "fold": description["training"]["fold"],
        "steps": description["training"]["steps"],
        "cases": len(rows),
        "dice": dict(zip(("labels", "all_as_one", "labels_perfectly_divided"), np.round(means, 4).tolist())),
        "date": date.today().isoformat(),
    }
    print(json.dumps(result, indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def nearest_label(reference: Labels) -> Labels:
    """For each voxel the value of the nearest voxel that has a label; voxels as wide as they are high."""
    where = ndimage.distance_transform_edt(reference == 0, return_distances=False, return_indices=True)
    return reference[tuple(where)]


def mean_dice(prediction: Labels, reference: Labels, values: list[int]) -> float:
    """Over the labels that either has."""
    there = [v for v in values if (prediction == v).any() or (reference == v).any()]
    return float(np.mean([dice(prediction == v, reference == v) for v in there]))


def dice(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    """Of two masks that are not both empty."""
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


if __name__ == "__main__":
    main()
