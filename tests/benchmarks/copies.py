"""By what rule to keep copies at inference: choices made on some held-back cases, judged on the others.

    python tests/benchmarks/copies.py DATASET RUN... -o RESULT.json

Each RUN infers the cases that it held back without copies, with mirrored ones, with ones moved within the network's
stride, with other sizes, and with these together, at full resolution. Then each rule chooses on a random part of the
cases, as a training does when it ends, and what it has chosen is judged on the rest, `--halves` times. A rule goes
through the kinds of copies in the order of a training and keeps each by the Dice gained by case over what it has so
far: its mean, and the 95 % interval of that.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import machine

import medseg
from medseg.calibrate import LEAST_GAIN, MARGIN, MOST_LOSS, shifts_within
from medseg.datasets import read_dataset
from medseg.infer import SCALES
from medseg.networks import stride_by_axis
from medseg.sides import sided_label
from medseg.windows import views

KINDS = ("flip", "shift", "scale")


@dataclass(frozen=True)
class Gain:
    """What copies of a `kind` brought, by case, at `factor` times the time."""

    kind: str
    mean: float
    interval: tuple[float, float] | None
    factor: float

    def is_worth_it(self) -> bool:
        """More than `LEAST_GAIN` for each doubling of the time."""
        return self.mean > LEAST_GAIN * math.log2(self.factor)

    def surely_above(self, least: float) -> bool:
        """Whether the interval is."""
        return self.interval is not None and self.interval[0] > least


Rule = Callable[[Gain], bool]

# each: whether to keep copies
RULES: dict[str, Rule] = {
    "never": lambda gain: False,
    "surely better": lambda gain: gain.is_worth_it() and gain.surely_above(0),
    "better, surely no great loss": lambda gain: gain.is_worth_it() and gain.surely_above(-MOST_LOSS),
    "better": lambda gain: gain.is_worth_it(),
    "flip and shift where better, scale where surely": lambda gain: (
        gain.is_worth_it() and (gain.kind != "scale" or gain.surely_above(0))
    ),
    "flip and shift unless worse, scale where surely": lambda gain: (
        gain.is_worth_it() and gain.surely_above(0)
        if gain.kind == "scale"
        else gain.mean > -MARGIN and gain.interval is not None and gain.interval[1] > 0
    ),
    "flip and shift unless surely worse, scale where surely": lambda gain: (
        gain.is_worth_it() and gain.surely_above(0)
        if gain.kind == "scale"
        else gain.interval is None or gain.interval[1] > 0
    ),
    "flip": lambda gain: gain.kind == "flip",
    "flip and shift": lambda gain: gain.kind != "scale",
    "all": lambda gain: True,
}


def main() -> None:
    """Infer what is missing, then choose and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--halves", type=int, default=200)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20], help="of how many cases a rule chooses")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"runs": []}
    if arguments.output.is_file():
        result = json.loads(arguments.output.read_text())
    known = {run["weights_sha256"] for run in result["runs"]}
    for folder in arguments.runs:
        digest = medseg.file_sha256(folder / "model.safetensors")
        if digest not in known:
            result["runs"].append({"weights_sha256": digest, **measure(arguments.dataset, folder)})
            write(arguments, result)
    write(arguments, result)


def write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """The runs so far, and what each rule would have been worth."""
    result.update(data_set=arguments.dataset.resolve().name, machine=machine(), date=date.today().isoformat())
    result["judged"] = [row for size in arguments.sizes for row in judge(result["runs"], size, arguments.halves)]
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["judged"]:
        print(row, flush=True)


def measure(dataset: Path, folder: Path) -> dict[str, Any]:
    """Dice by kinds of copies and case, mean over the labels of a case, and how many copies each has."""
    config = medseg.load_model(folder, options=medseg.InferOptions(device="cpu", tta="none")).config
    training = json.loads((folder / "model.json").read_text())["training"]
    cases = [c for c in read_dataset(dataset).cases if c.id in set(training["validation_cases"])]
    ways: dict[str, dict[str, Any]] = {
        "flip": {"flip_axes": [] if sided_label(config.data) else list(config.augment.flip_axes)},
        "shift": {"shifts": shifts_within(stride_by_axis(config.network, config.data.spatial_dims))},
        "scale": {"scales": list(SCALES)},
    }
    found = {}
    for number in range(2 ** len(KINDS)):
        kinds = [kind for bit, kind in enumerate(KINDS) if number >> bit & 1]
        settings: dict[str, Any] = {key: value for kind in kinds for key, value in ways[kind].items()}
        found["+".join(kinds)] = dice_with(folder, cases, {"windows": settings})
        print(folder, kinds, round(float(np.mean(list(found["+".join(kinds)].values()))), 4), flush=True)
    return {
        "fold": training["fold"],
        "steps": training["steps"],
        "network": config.network.name,
        "copies": {
            name: len(views_of(config, {k: v for kind in name.split("+") if kind for k, v in ways[kind].items()}))
            for name in found
        },
        "cases": found,
    }


def views_of(config: Any, windows: Mapping[str, Any]) -> Sequence[Any]:
    """What the network sees of a window."""
    return views(config.windows.model_copy(update=dict(windows)))


def dice_with(folder: Path, cases: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, float]:
    """Mean Dice of the labels of each case, by the masks that the model makes; cases without one are left out."""
    options = medseg.InferOptions(device="cpu", tta="none", settings=settings)
    segmenter = medseg.load_model(folder, options=options)
    with tempfile.TemporaryDirectory() as masks:
        results = medseg.segment_cases(segmenter, cases, Path(masks))
        outputs = {r.case: Path(masks) / r.output for r in results if r.output}
        pairs = [(c.id, outputs.get(c.id), c.label, c.images[0]) for c in cases if c.label is not None]
        report = medseg.report_pairs(pairs, medseg.EvaluateOptions(segmenter.config.data.labels))
    return {
        str(case): round(float(value), 5)
        for case, value in report.table.groupby("case")["dice"].mean().dropna().items()
    }


def judge(runs: Sequence[Mapping[str, Any]], size: int, halves: int) -> list[dict[str, Any]]:
    """For each rule: Dice gained over no copies on the cases that it has not chosen by, mean over runs and halves."""
    rows = []
    for name, rule in RULES.items():
        gains: list[float] = []
        promised: list[float] = []
        worst: list[float] = []
        copies: list[int] = []
        for run in runs:
            names = sorted(run["cases"][""])
            table = {kinds: np.array([values[n] for n in names]) for kinds, values in run["cases"].items()}
            if len(names) < size + 5:
                continue
            random = np.random.default_rng(0)
            mine = []
            for _ in range(halves):
                seen = np.zeros(len(names), dtype=bool)
                seen[random.permutation(len(names))[:size]] = True
                chosen = choose(rule, {kinds: values[seen] for kinds, values in table.items()}, run["copies"])
                mine.append(float((table[chosen] - table[""])[~seen].mean()))
                promised.append(float((table[chosen] - table[""])[seen].mean()))
                copies.append(run["copies"][chosen])
            gains += mine
            worst.append(float(np.mean(mine)))
        if gains:
            rows.append(
                {
                    "rule": name,
                    "chosen_by": size,
                    "gain_on_others": round(float(np.mean(gains)), 5),
                    "gain_on_those": round(float(np.mean(promised)), 5),
                    "worst_run": round(min(worst), 5),
                    "copies": round(float(np.mean(copies)), 2),
                    "runs": len(worst),
                }
            )
    return rows


def choose(rule: Rule, table: Mapping[str, npt.NDArray[np.float64]], copies: Mapping[str, int]) -> str:
    """The kinds of copies that `rule` keeps, as a key of `table`."""
    chosen: list[str] = []
    for kind in KINDS:
        before, after = "+".join(chosen), "+".join([*chosen, kind])
        gained = medseg.summarise(table[after] - table[before])
        if rule(Gain(kind, gained.mean or 0.0, gained.ci95, copies[after] / copies[before])):
            chosen.append(kind)
    return "+".join(chosen)


if __name__ == "__main__":
    main()
