"""What weights of a related task are worth: Dice after a few steps on few cases, fine-tuned against from scratch.

    python tests/benchmarks/finetune.py HIPPOCAMPUS -o tests/benchmarks/results/finetune.json [--base RUN] [--ablate]

Base: fold 0 of the data set, `--base-seconds` of training on one thread, with a network of half the usual width. The
new task has one label, the front of the hippocampus, and ten cases that the base has not seen; it is judged on fifteen
others that the base has not seen either, once, at the end of the schedule. With the name that the base knows the label
by, its rows of the classifier are taken over; under a name of its own they begin anew. `--ablate` also tries other
shares of freezing and learning rates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from machine import machine

import medseg

CASES, JUDGED, SEEDS = 10, 15, (0, 1)
SMALL = {
    "network": {"channels": [16, 32, 64], "aspp_channels": 32, "skip_channels": 16, "decoder_channels": 16},
    "windows": {"patch_size": [32, 40, 32]},
}
BATCH = {"batch_size": 2}
OLD_NAME, NEW_NAME = "anterior", "front"


@dataclass(frozen=True)
class Attempt:
    """One way to train: from the base or not, the label's name, and settings of `train`."""

    start: str
    label: str
    settings: tuple[tuple[str, float], ...] = ()


ATTEMPTS = (Attempt("scratch", NEW_NAME), Attempt("base", NEW_NAME), Attempt("base", OLD_NAME))


def ablations() -> Iterator[Attempt]:
    """Other shares of freezing and other factors, for a label that the base does not know."""
    for freeze, factor in ((0.0, 0.3), (0.1, 1.0), (0.1, 0.3), (0.3, 0.3)):
        yield Attempt("base", NEW_NAME, (("freeze_share", freeze), ("pretrained_factor", factor)))


def main() -> None:
    """Train the base and everything that begins with it; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--base", type=Path, help="a finished run on fold 0 of the data set; left out: trained")
    parser.add_argument("--base-seconds", type=float, default=90.0)
    parser.add_argument("--steps", type=int, default=30, help="of each fine-tuning")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = arguments.base or train_base(arguments.dataset, folder / "base", arguments.base_seconds)
        unseen = json.loads((base / "model.json").read_text())["training"]["validation_cases"][: CASES + JUDGED]
        tasks = {name: make_task(arguments.dataset, folder / name, name, unseen) for name in (OLD_NAME, NEW_NAME)}
        attempts = [*ATTEMPTS, *(ablations() if arguments.ablate else ())]
        described = json.loads((base / "model.json").read_text())
        rows: list[dict[str, Any]] = []
        for seed in SEEDS:
            for attempt in attempts:
                rows.append(measure(attempt, seed, arguments.steps, base, tasks[attempt.label], folder))
                write(arguments.output, described, arguments.steps, rows)


def write(path: Path, described: dict[str, Any], steps: int, rows: list[dict[str, Any]]) -> None:
    """What was measured so far; `described`: model.json of the base."""
    result = {
        "what": "mean Dice of one label on held-back cases at the end of a schedule of so many steps",
        "steps": steps,
        "base": {k: described["training"][k] for k in ("steps", "seconds", "fold", "cases")},
        "cases": {"training": CASES, "judged": JUDGED},
        "rows": rows,
        "machine": machine(),
        "versions": described["versions"],
        "date": date.today().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def train_base(dataset: Path, run: Path, seconds: float) -> Path:
    """A run on fold 0 with both labels."""
    medseg.train(
        dataset, run, time_budget=seconds, options=medseg.TrainOptions(settings=SMALL | {"train": BATCH}, device="cpu")
    )
    return run


def make_task(dataset: Path, folder: Path, label: str, unseen: list[str]) -> Path:
    """The cases `unseen` with label 1 alone, as `label`; fold 0 trains on the first ten of them."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in unseen:
        image = dataset / "imagesTr" / f"{case}_0000.nii.gz"
        (folder / "imagesTr" / image.name).symlink_to(image.resolve())
        found = nib.load(dataset / "labelsTr" / f"{case}.nii.gz")
        one = (np.asarray(found.dataobj) == 1).astype(np.uint8)
        nib.save(nib.Nifti1Image(one, found.affine), folder / "labelsTr" / f"{case}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, label: 1},
        "numTraining": len(unseen),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    (folder / "splits_final.json").write_text(json.dumps([{"train": unseen[:CASES], "val": unseen[CASES:]}]))
    return folder


def measure(attempt: Attempt, seed: int, steps: int, base: Path, task: Path, folder: Path) -> dict[str, Any]:
    """Mean Dice at the end of a schedule."""
    settings = BATCH | {
        "seed": seed,
        "steps_per_epoch": steps,
        "epochs": 1,
        "time_budget_s": None,
        "calibration_share": 0.0,
        **dict(attempt.settings),
    }
    options = medseg.TrainOptions(
        settings=SMALL | {"train": settings}, device="cpu", pretrained=base if attempt.start == "base" else None
    )
    with tempfile.TemporaryDirectory(dir=folder) as run:
        # prepared once for all attempts
        shared = task / "cache"
        shared.mkdir(exist_ok=True)
        (Path(run) / "cache").symlink_to(shared)
        done = medseg.train(task, run, options=options)
    if done.report is None:
        raise SystemExit(f"{attempt}: no case could be judged")
    row = {
        "start": attempt.start,
        "label": attempt.label,
        "freeze_share": done.config.train.freeze_share,
        "pretrained_factor": done.config.train.pretrained_factor,
        "seed": seed,
        "dice": round(float(done.report.table["dice"].mean()), 4),
        "train_seconds": done.seconds["train"],
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
