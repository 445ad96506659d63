"""Dice after a given training time, with defaults, on real data: the figures that README.md quotes.

    python tests/benchmarks/time_to_dice.py DATASET --minutes 10 -o tests/benchmarks/results/NAME.json
    python tests/benchmarks/time_to_dice.py DATASET --finished RUN -o tests/benchmarks/results/NAME.json

The first form trains fold 0 through the command line, as a user would; the second collects from a run that the same
command line made on this machine. Kept are Dice of the held-back cases at full resolution with its interval, steps,
seconds, machine and versions. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from machine import machine


def main() -> None:
    """Train, read the report, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--finished", type=Path, metavar="RUN", help="collect from this run folder, train nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = arguments.finished or train(arguments, Path(temporary) / "run")
        summary = json.loads((run / "validation" / "report" / "summary.json").read_text())
        model = json.loads((run / "model.json").read_text())
    budget = model["config"]["train"]["time_budget_s"]
    result = {
        "data_set": arguments.dataset.name,
        "command": f"medseg train DATASET -o RUN --fold 0 --time-budget {budget:.0f}s --device {arguments.device}",
        "dice": {name: label["dice"] for name, label in summary["labels"].items()},
        "foreground": summary["foreground"]["dice"],
        "training": {k: v for k, v in model["training"].items() if k != "validation_cases"},
        "machine": machine(),
        "versions": model["versions"],
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def train(arguments: argparse.Namespace, run: Path) -> Path:
    """Train fold 0 with defaults through the command line; the run folder."""
    command = [sys.executable, "-m", "medseg", "train", str(arguments.dataset), "-o", str(run), "--fold", "0"]
    command += ["--time-budget", f"{arguments.minutes}m", "--device", arguments.device]
    subprocess.run(command, check=True)
    return run


if __name__ == "__main__":
    main()
