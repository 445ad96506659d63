"""What each choice of the recipe is worth: trainings of equal steps that differ in one setting, paired by case.

    python tests/benchmarks/recipe.py DATASET VARIANTS.yaml -o RESULT.json --folds 0 1 --steps 600

VARIANTS.yaml maps a name to settings (`section.key=value`); `usual` has none and is what the others are compared with.
All of them lie over the plan of the data set, or over what `--base` makes of it.
Each variant is trained by `medseg.train` on every fold and judged on the fold's held-back cases at full resolution,
without copies and with those mirrored along the axes that training mirrors; the weights of its last step, in place of
the average of all, are judged without copies too (`last_cases`; `usual, last weights` in the table). Steps, not
seconds, end a training, so that other work on the machine changes nothing but its duration; the processor time of each,
validation included, stands beside. What the output holds already is not trained again, and several of these may fill
one output side by side; `--again` takes up what a killed one had begun.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from machine import machine

import medseg
from medseg.cases import Case
from medseg.datasets import read_dataset
from medseg.model import new_network, save_model
from medseg.state import read_state

USUAL = "usual"
LAST = f"{USUAL}, last weights"


def main() -> None:
    """Train what is missing, one training after the other, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("variants", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--base", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="settings of all variants")
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="train what was begun and not finished, too")
    arguments = parser.parse_args()
    if arguments.again:
        with result_of(arguments.output) as result:
            result["runs"] = {key: run for key, run in result["runs"].items() if run}
    torch.set_num_threads(arguments.threads)
    variants: dict[str, list[str]] = {USUAL: [], **yaml.safe_load(arguments.variants.read_text())}
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary) / "cache"
        cache.mkdir()
        while (job := claim(arguments, variants)) is not None:
            name, fold = job
            run = run_one(arguments, [*arguments.base, *variants[name]], fold, cache)
            with result_of(arguments.output) as result:
                result["runs"][f"{name}, fold {fold}"] = {"variant": name, "fold": fold, **run}
                result["table"] = table(result["runs"], variants)
            print(name, fold, {k: v for k, v in run.items() if not k.endswith("cases")}, flush=True)


def claim(arguments: argparse.Namespace, variants: dict[str, list[str]]) -> tuple[str, int] | None:
    """The next training that nobody has begun; None where all are."""
    with result_of(arguments.output) as result:
        result.update(
            data_set=arguments.dataset.name,
            steps=arguments.steps,
            threads=arguments.threads,
            base=arguments.base,
            variants=variants,
            machine=machine(),
        )
        for fold in arguments.folds:
            for name in variants:
                if f"{name}, fold {fold}" not in result["runs"]:
                    result["runs"][f"{name}, fold {fold}"] = {}
                    return name, fold
    return None


def run_one(arguments: argparse.Namespace, settings: list[str], fold: int, cache: Path) -> dict[str, Any]:
    """Train one variant on one fold: Dice by case and label, without and with mirrored copies, and seconds."""
    ends = [f"train.steps_per_epoch={arguments.steps}", "train.calibration_share=0"]
    options = medseg.TrainOptions(settings=medseg.settings_from([*settings, *ends]), fold=fold, device="cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        folder.mkdir()
        (folder / "cache").symlink_to(cache)
        start = time.process_time()
        run = medseg.train(arguments.dataset, folder, epochs=1, options=options)
        seconds = time.process_time() - start
        training = json.loads((folder / "model.json").read_text())["training"]
        held_back = set(training["validation_cases"])
        cases = [c for c in read_dataset(arguments.dataset).cases if c.id in held_back]
        mirrored = None
        if run.config.augment.flip_axes:
            mirrored = judge(folder, run.config, cases, tta="flip")
        network = new_network(run.config)
        network.load_state_dict(read_state(folder)["network"])
        last = Path(temporary) / "last"
        last.mkdir()
        save_model(network, run.config, last, training=training, licence="a benchmark's")
        last_cases = judge(last, run.config, cases, tta="none")
    return {
        "steps": run.steps,
        "processor_seconds": round(seconds, 1),
        "cases": dice_of(run.report),
        "mirrored_cases": mirrored,
        "last_cases": last_cases,
    }


def judge(folder: Path, config: Any, cases: Sequence[Case], *, tta: str) -> dict[str, dict[str, float | None]]:
    """Dice of the masks that the model in `folder` makes of `cases`."""
    masks = folder / f"masks_{tta}"
    segmenter = medseg.load_model(folder, options=medseg.InferOptions(device="cpu", tta=tta))
    results = medseg.segment_cases(segmenter, cases, masks)
    outputs = {r.case: masks / r.output for r in results if r.output}
    pairs = [(c.id, outputs.get(c.id), c.label, c.images[0]) for c in cases if c.label is not None]
    return dice_of(medseg.report_pairs(pairs, medseg.EvaluateOptions(config.data.labels)))


def dice_of(report: Any) -> dict[str, dict[str, float | None]]:
    """Dice by case and label; None where neither mask has the label."""
    rows = report.table[["case", "name", "dice"]].itertuples(index=False)
    found: dict[str, dict[str, float | None]] = {}
    for case, name, value in rows:
        found.setdefault(case, {})[name] = None if math.isnan(value) else round(float(value), 5)
    return found


def table(runs: dict[str, dict[str, Any]], variants: dict[str, list[str]]) -> dict[str, Any]:
    """For each variant: mean Dice by label over all folds, and the difference to the usual recipe by case."""
    usual = merged(runs, USUAL, "cases")
    made = {}
    for name in variants:
        row: dict[str, Any] = {}
        for key, words in (("cases", "dice"), ("mirrored_cases", "dice_mirrored")):
            cases = merged(runs, name, key)
            if not cases:
                continue
            labels = sorted({label for values in cases.values() for label in values})
            by_label = {n: [v[n] for v in cases.values() if v.get(n) is not None] for n in labels}
            row[words] = {n: round(float(np.mean(v)), 4) for n, v in by_label.items() if v}
            row[f"{words}_mean"] = round(float(np.mean(list(row[words].values()))), 4)
            both = [c for c in cases if c in usual]
            if both and (name != USUAL or key != "cases"):
                found = medseg.summarise([mean(cases[c]) - mean(usual[c]) for c in both])
                row[f"{words}_against_usual"] = {"mean": found.mean, "ci95": found.ci95, "cases": len(both)}
        done = [r for r in runs.values() if r.get("variant") == name]
        if done:
            row["processor_seconds"] = round(float(np.mean([r["processor_seconds"] for r in done])), 1)
            row["folds"] = sorted(r["fold"] for r in done)
        made[name] = row
    last = merged(runs, USUAL, "last_cases")
    if last:
        found = medseg.summarise([mean(last[c]) - mean(usual[c]) for c in last])
        against = {"mean": found.mean, "ci95": found.ci95, "cases": len(last)}
        made[LAST] = {
            "dice_mean": round(float(np.mean([mean(v) for v in last.values()])), 4),
            "dice_against_usual": against,
        }
    return made


def merged(runs: dict[str, dict[str, Any]], variant: str, key: str) -> dict[str, dict[str, float | None]]:
    """Cases of all folds of a variant."""
    return {c: v for r in runs.values() if r.get("variant") == variant for c, v in (r.get(key) or {}).items()}


def mean(values: dict[str, float | None]) -> float:
    """Mean over the labels that a case has."""
    return float(np.mean([v for v in values.values() if v is not None]))


@contextmanager
def result_of(path: Path) -> Iterator[dict[str, Any]]:
    """The content of the output, to be changed by nobody else meanwhile, and written back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        result: dict[str, Any] = json.loads(text) if text else {"runs": {}}
        yield result
        file.seek(0)
        file.truncate()
        file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
