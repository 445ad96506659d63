"""What models that held back the same cases are worth alone and together, with mirrored and with moved copies.

    python tests/benchmarks/ensembles.py DATASET NAME=RUN NAME=RUN... -o RESULT.json

Every model alone, and all of them averaged, infer the cases that they held back; the masks are judged at full
resolution. Copies are none, those mirrored as in training, and these moved within the first model's stride as well.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from machine import machine

import medseg
from medseg.calibrate import shifts_within
from medseg.datasets import read_dataset
from medseg.networks import stride_by_axis
from medseg.sides import sided_label


def main() -> None:
    """Infer and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=RUN")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    models = {name: Path(folder) for name, folder in (model.split("=", 1) for model in arguments.models)}
    trainings = {name: json.loads((folder / "model.json").read_text())["training"] for name, folder in models.items()}
    held_back = [set(training["validation_cases"]) for training in trainings.values()]
    if any(cases != held_back[0] for cases in held_back):
        parser.error("the models held back different cases")
    cases = [case for case in read_dataset(arguments.dataset).cases if case.id in held_back[0]]
    first = medseg.load_model(next(iter(models.values())), options=medseg.InferOptions(device="cpu")).config
    mirrored = {"flip_axes": [] if sided_label(first.data) else list(first.augment.flip_axes)}
    moved = {"shifts": shifts_within(stride_by_axis(first.network, first.data.spatial_dims))}
    result: dict[str, Any] = {
        "data_set": arguments.dataset.resolve().name,
        "models": {name: {"fold": t["fold"], "steps": t["steps"], "seed": t["seed"]} for name, t in trainings.items()},
        "machine": machine(),
        "date": date.today().isoformat(),
        "rows": [],
    }
    judged: dict[tuple[str, str], dict[str, float]] = {}
    together = {" + ".join(models): list(models.values())}
    for name, folders in ({name: [folder] for name, folder in models.items()} | together).items():
        for copies, windows in {"none": {}, "mirrored": mirrored, "mirrored and moved": mirrored | moved}.items():
            labels, judged[name, copies] = dice_of(folders, cases, {"windows": windows})
            gained = medseg.summarise([judged[name, copies][c] - d for c, d in next(iter(judged.values())).items()])
            row = {
                "model": name,
                "copies": copies,
                "dice": labels,
                "mean": round(sum(labels.values()) / len(labels), 4),
                "against_first_row": {"mean": gained.mean, "ci95": gained.ci95},
            }
            result["rows"].append(row)
            print(row, flush=True)
    result["cases"] = {f"{name}, {copies}": dices for (name, copies), dices in judged.items()}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def dice_of(
    folders: Sequence[Path], cases: Sequence[Any], settings: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean Dice of each label over the cases, and of each case over its labels."""
    options = medseg.InferOptions(device="cpu", tta="none", settings=settings)
    segmenter = medseg.load_model(*folders, options=options)
    with tempfile.TemporaryDirectory() as masks:
        results = medseg.segment_cases(segmenter, cases, Path(masks))
        outputs = {r.case: Path(masks) / r.output for r in results if r.output}
        pairs = [(c.id, outputs.get(c.id), c.label, c.images[0]) for c in cases if c.label is not None]
        table = medseg.report_pairs(pairs, medseg.EvaluateOptions(segmenter.config.data.labels)).table
    return means(table, "name", 4), means(table, "case", 5)


def means(table: Any, by: str, digits: int) -> dict[str, float]:
    """Mean Dice by a column; rows without one left out."""
    return {str(key): round(float(value), digits) for key, value in table.groupby(by)["dice"].mean().dropna().items()}


if __name__ == "__main__":
    main()
