"""A finished cross-validation, each case by label, beside trainings of the same folds: what the one brings over them.

    python tests/benchmarks/folds.py CV_FOLDER RECORD.json -o RESULT.json

CV_FOLDER is what `medseg-crossval` wrote for one network, RECORD.json what `time_to_dice.py` did for the same folds.
Both have copies and windows as their own held-back cases chose them. Records of before hold no Dice by case, so that
folds are what can be compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from time_to_dice import read_cases

import medseg

Dice = dict[str, dict[str, float]]


def main() -> None:
    """Write the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cv", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    before = {run["fold"]: run["mean_dice"] for run in json.loads(arguments.record.read_text())["runs"]}
    folds = [judged(folder) for folder in sorted(arguments.cv.glob("*/fold_[0-9]*")) if folder.is_dir()]
    if [fold["fold"] for fold in folds] != sorted(before):
        raise SystemExit(f"{arguments.cv}: {len(folds)} folds found, expected the {len(before)} of {arguments.record}")
    rows = [
        {"fold": f["fold"], "steps": f["steps"], **row(f["cases"]), "before": round(before[f["fold"]], 4)}
        for f in folds
    ]
    everyone = {case: dice for fold in folds for case, dice in fold["cases"].items()}
    rows.append({"fold": "all", **row(everyone), "before": round(float(np.mean(list(before.values()))), 4)})
    result = {"against": arguments.record.name, "machine": machine(), "table": rows, "folds": folds}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for line in rows:
        print(line)


def judged(folder: Path) -> dict[str, Any]:
    """What a fold's model.json says of its training, and the Dice of each case by label."""
    model = json.loads((folder / "model.json").read_text())
    said, cases = model["training"], read_cases(folder / "validation" / "report" / "metrics.csv")
    about = {key: said[key] for key in ("fold", "steps", "seconds", "seed", "device", "precision", "command")}
    return {**about, "network": model["config"]["network"], "inference": model.get("inference"), "cases": cases}


def row(cases: Dice) -> dict[str, Any]:
    """Mean Dice by label and of both, with their intervals over cases."""
    labels = sorted({label for dice in cases.values() for label in dice})
    found = {label: medseg.summarise([dice[label] for dice in cases.values() if label in dice]) for label in labels}
    whole = medseg.summarise([float(np.mean(list(dice.values()))) for dice in cases.values()])
    return {
        "number": len(cases),
        "by_label": {label: {"mean": round(one.mean, 4), "ci95": one.ci95} for label, one in found.items()},
        "mean": round(whole.mean, 4),
        "ci95": whole.ci95,
    }


if __name__ == "__main__":
    main()
