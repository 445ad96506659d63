"""What more training cases would be worth: the same recipe on parts of one fold's training cases.

    cd tests/benchmarks
    python recipe.py FOLDER variants/none.yaml -o RESULT.json --folds 0 1 2 --steps 1200
    python fewer_cases.py FOLDER RESULT.json

FOLDER: a copy of an nnU-Net folder whose `splits_final.json` has folds that hold back the same cases and train on more
or fewer others; `splits` of a committed result is such a list. Put into the result, for `recipe.py` takes its folds for
different cases: those folds, the Dice of each, and its difference by case to that with most cases.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from recipe import USUAL, mean, result_of

import medseg


def main() -> None:
    """Replace the table of the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    splits = json.loads((arguments.folder / "splits_final.json").read_text())
    if any(sorted(split["val"]) != sorted(splits[0]["val"]) for split in splits):
        raise SystemExit(f"{arguments.folder}: folds that hold back different cases found, expected the same in all")
    with result_of(arguments.result) as result:
        runs = [run for run in result["runs"].values() if run and run["variant"] == USUAL]
        result["splits"] = splits
        result["table"] = table(runs, splits)
        print(json.dumps(result["table"], indent=1))


def table(runs: list[dict[str, Any]], splits: list[dict[str, list[str]]]) -> list[dict[str, Any]]:
    """A row for each run, those with few training cases first."""
    sizes = [len(splits[run["fold"]]["train"]) for run in runs]
    most = runs[int(np.argmax(sizes))]
    rows = []
    for size, run in sorted(zip(sizes, runs), key=lambda pair: pair[0]):
        row: dict[str, Any] = {"training_cases": size, "fold": run["fold"]}
        for key in ("cases", "mirrored_cases"):
            row[f"dice_{key}"] = round(float(np.mean([mean(v) for v in run[key].values()])), 4)
        if run is not most:
            found = medseg.summarise([mean(run["cases"][c]) - mean(most["cases"][c]) for c in most["cases"]])
            row["against_most"] = {"mean": found.mean, "ci95": found.ci95, "cases": len(most["cases"])}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
