"""Dice after given training times, with defaults, on real data: the figures that README.md quotes.

    python tests/benchmarks/time_to_dice.py DATASET --minutes 5 10 20 --runs FOLDER -o RESULT.json
    python tests/benchmarks/time_to_dice.py DATASET --epochs 12 --folds 0 4 --runs FOLDER -o RESULT.json

Each time (or number of epochs: the weights then do not depend on the speed of the machine, though what calibration has
time to try does) is a training of its own through the command line, as a user would type it, judged on the held-back
cases of the fold at full resolution. Kept are Dice with its interval, by case, and its course, steps, seconds by stage,
what was chosen for inference, machine and versions. Runs stay in FOLDER: one that is finished is read, one that broke
off goes on. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from machine import machine


def main() -> None:
    """Train what is missing, read the reports, write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 20])
    ends.add_argument("--epochs", type=int, nargs="+")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--as-they-are", action="store_true", help="train nothing; of unfinished runs the course alone")
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for fold in arguments.folds:
        for end in arguments.epochs or arguments.minutes:
            run = arguments.runs / f"fold_{fold}_{end:g}{'epochs' if arguments.epochs else 'min'}"
            if not arguments.as_they_are:
                train(arguments, run, fold, end)
            told = {"epochs": end} if arguments.epochs else {"minutes": end}
            rows.append(read(run) | {"fold": fold, **told, "command": told_command(arguments, fold, end)})
            write(arguments, rows)


def options_of(arguments: argparse.Namespace, fold: int, end: float) -> list[str]:
    """What the command line of one training has beside data set and run."""
    until = ["--epochs", f"{end:g}"] if arguments.epochs else ["--time-budget", f"{end:g}m"]
    settings = [word for setting in arguments.set for word in ("--set", setting)]
    return ["--fold", str(fold), *until, "--device", arguments.device, *settings]


def told_command(arguments: argparse.Namespace, fold: int, end: float) -> str:
    """The command line, with names in place of paths."""
    return " ".join(["medseg train DATASET -o RUN", *options_of(arguments, fold, end)])


def train(arguments: argparse.Namespace, run: Path, fold: int, end: float) -> None:
    """Train with defaults unless the run is finished."""
    if not (run / "validation" / "report" / "summary.json").is_file():
        command = [sys.executable, "-m", "medseg", "train", str(arguments.dataset), "-o", str(run)]
        subprocess.run([*command, *options_of(arguments, fold, end), "--resume"], check=True)


def read(run: Path) -> dict[str, Any]:
    """What a run says of itself; one that was ended has no more than its course."""
    if not (run / "validation" / "report" / "summary.json").is_file():
        return {"course": read_course(run / "metrics.csv")}
    summary = json.loads((run / "validation" / "report" / "summary.json").read_text())
    model = json.loads((run / "model.json").read_text())
    return {
        "mean_dice": summary["foreground"]["dice"]["mean"],
        "dice": {name: label["dice"] for name, label in summary["labels"].items()},
        "cases": read_cases(run / "validation" / "report" / "metrics.csv"),
        "training": {k: v for k, v in model["training"].items() if k not in ("validation_cases", "command")},
        "course": read_course(run / "metrics.csv"),
        "copies": model["inference"].get("tta"),
        "windows": model["inference"].get("windows"),
        "versions": model["versions"],
    }


def read_cases(file: Path) -> dict[str, dict[str, float]]:
    """Dice of each held-back case by the name of the label, where it has one."""
    found: dict[str, dict[str, float]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["dice"]:
                found.setdefault(row["case"], {})[row["name"]] = round(float(row["dice"]), 5)
    return found


def read_course(file: Path) -> list[dict[str, float]]:
    """Step, second and Dice on the network's grid of every look at held-back cases while training."""
    with file.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["dice"]]
    return [{key: float(row[key]) for key in ("step", "seconds", "dice")} for row in rows]


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The result so far."""
    result = {
        "data_set": arguments.dataset.name,
        "runs": rows,
        "machine": machine(),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
