"""Whether training can learn one case by heart: Dice on the case itself after a given time, by the tool's own `train`.

    python tests/benchmarks/overfit.py ct_totalseg/ --case ct_full --minutes 10 -o tests/benchmarks/results/NAME.json

A data set of the one case is made, in which nothing is held back (`--fold all`). The recipe is the planned one without
random changes of the image; `--set section.key=value` lays more over it. The written model then segments the case, and
`medseg evaluate` judges the file. What does not reach a Dice near 1 here has a defect, or needs more time: `curve` is
the loss by the clock.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from machine import machine

from medseg.cases import Case
from medseg.config import IGNORE
from medseg.datasets import read_dataset

# the case as it is, at every step
STILL = (
    "augment.p_affine=0",
    "augment.p_flip=0",
    "augment.p_intensity=0",
    "augment.p_gamma=0",
    "augment.p_noise=0",
    "augment.p_blur=0",
    "augment.p_low_resolution=0",
)


def main() -> None:
    """Train on one case, segment it, judge it, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--case", help="its id; the first with a label unless given")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    settings = [*STILL, *arguments.set]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case = one_case(arguments.dataset, arguments.case, folder / "set")
        run = folder / "run"
        medseg("train", folder / "set", "-o", run, "--fold", "all", "--time-budget", f"{arguments.minutes}m",
               "--device", arguments.device, *(word for text in settings for word in ("--set", text)))  # fmt: skip
        image = sorted((folder / "set" / "imagesTr").iterdir())
        medseg("infer", folder / "set" / "imagesTr", "-m", run, "-o", folder / "out", "--device", arguments.device)
        medseg("evaluate", folder / "out", folder / "set" / "labelsTr", "-o", folder / "report", "--labels", run)
        summary = json.loads((folder / "report" / "summary.json").read_text())
        model = json.loads((run / "model.json").read_text())
        curve = loss_curve(run / "metrics.csv")
    dice = {name: label["dice"]["mean"] for name, label in summary["labels"].items()}
    present = {name: value for name, value in dice.items() if value is not None}
    result = {
        "data_set": arguments.dataset.resolve().name,
        "case": case.id,
        "channels": len(image),
        "settings": settings,
        "labels_present": len(present),
        "mean_dice": sum(present.values()) / len(present),
        "labels_above_0.95": sum(value > 0.95 for value in present.values()),
        "dice": {name: round(value, 4) for name, value in present.items()},
        "curve": curve,
        "windows": model["config"]["windows"] | {"batch_size_of_training": model["config"]["train"]["batch_size"]},
        "training": model["training"],
        "machine": machine(),
        "versions": model["versions"],
        "date": date.today().isoformat(),
    }
    print(f"{len(present)} labels, mean Dice {result['mean_dice']:.4f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def one_case(dataset: Path, name: str | None, folder: Path) -> Case:
    """A data set in `folder` of the one case; its files are links."""
    data = read_dataset(dataset)
    case = next(c for c in data.cases if c.label is not None and name in (None, c.id))
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    ending = ".nii.gz"
    for n, path in enumerate(case.images):
        (folder / "imagesTr" / f"{case.id}_{n:04d}{ending}").symlink_to(path.resolve())
    if case.label is not None:
        (folder / "labelsTr" / f"{case.id}{ending}").symlink_to(case.label.resolve())
    labels = data.labels or {"background": 0, "label": 1}
    description = {
        "channel_names": dict(enumerate(data.channels)),
        "labels": {k: v for k, v in labels.items() if k != IGNORE},
        "numTraining": 1,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return case


def medseg(*words: str | Path) -> None:
    """The command line, as a user has it."""
    subprocess.run([sys.executable, "-m", "medseg", *map(str, words)], check=True)


def loss_curve(path: Path) -> list[tuple[int, float, float]]:
    """Step, seconds and mean loss, one row an epoch."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [(int(row["step"]), float(row["seconds"]), float(row["loss"])) for row in rows if row["loss"]]


if __name__ == "__main__":
    main()
