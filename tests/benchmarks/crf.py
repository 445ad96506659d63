"""Seconds and memory of the conditional random field at its defaults, and what it does to probabilities with noise.

    python tests/benchmarks/crf.py us_nerve_2d hippocampus -o tests/benchmarks/results/crf.json

Images are real, probabilities are made from the reference: halved twice (3D: once) and enlarged again, as a network
with that output stride would see it, with noise of one standard deviation on the logits. Dice before and after says
what the field does to such noise, not what it adds to a trained network. Seconds are the median of all calls;
memory is what the first call in a fresh process adds at its peak, scores and image not counted. Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from machine import machine
from torch.nn import functional

from medseg.config import DataConfig, PostprocessConfig, PreprocessConfig
from medseg.datasets import read_dataset
from medseg.patches import cut
from medseg.postprocess import refine
from medseg.preprocess import prepare
from medseg.process import peak_memory_mb
from medseg.versions import versions

SHAPES = {2: (256, 256), 3: (96, 96, 96)}
OUTPUT_STRIDE = {2: 4, 3: 2}
DEFAULTS = PostprocessConfig(crf=True)


def main() -> None:
    """Measure every data set in a process of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--cases", type=int, default=10, help="cases for Dice, evenly from the data set")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    jobs = [(path, arguments.cases) for path in arguments.datasets]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        measured = pool.starmap(measure, jobs, chunksize=1)
    result = {
        "settings": DEFAULTS.model_dump(),
        "data_sets": measured,
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("medseg", "torch", "numpy"),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(path: Path, count: int) -> dict[str, object]:
    """Seconds, memory and Dice on one data set."""
    dataset = read_dataset(path)
    chosen = dataset.cases[:: max(1, len(dataset.cases) // count)][:count]
    dims = 2 if chosen[0].images[0].suffix == ".png" else 3
    data = DataConfig(spatial_dims=dims, channels=dataset.channels, labels=dataset.labels or {})
    preprocess = PreprocessConfig(orient=dims == 3, shape=SHAPES[2] if dims == 2 else None)
    seconds: list[float] = []
    dice: dict[str, list[float]] = {"before": [], "after": []}
    memory = None
    for number, case in enumerate(chosen):
        prepared = prepare(case, preprocess, data, with_label=True)
        start = [-((p - s) // 2) for s, p in zip(prepared.grid.shape, SHAPES[dims])]
        image, label = cut(prepared.image, start, SHAPES[dims]), cut(prepared.label[None], start, SHAPES[dims])[0]
        scores = noisy(label.long(), data.out_channels, seed=number)
        before = held_mb()
        for _ in range(3 if number == 0 else 1):
            started = time.perf_counter()
            after = refine(DEFAULTS, scores, image, spacing_mm=prepared.grid.spacing_mm)
            seconds.append(time.perf_counter() - started)
            memory = memory or round((peak_memory_mb() or 0) - before, 1)
        for name, p in (("before", scores), ("after", after)):
            dice[name].append(mean_dice(p.argmax(dim=0), label, data.out_channels))
    return {
        "data_set": path.name,
        "labels": data.out_channels,
        "shape": SHAPES[dims],
        "spacing_mm_of_last": prepared.grid.spacing_mm,
        "seconds": round(statistics.median(seconds), 3),
        "added_peak_mb": memory,
        "scores_mb": round(scores.numel() * 4 / 2**20, 1),
        "cases": len(chosen),
        "dice_of_noisy_reference": {name: round(statistics.mean(values), 4) for name, values in dice.items()},
    }


def noisy(label: torch.Tensor, labels: int, *, seed: int) -> torch.Tensor:
    """Probabilities (K, *S) of a reference (*S) seen coarsely, with noise on voxels and on coarse voxels."""
    generator = torch.Generator().manual_seed(seed)
    one = functional.one_hot(label, labels).movedim(-1, 0).float()[None]
    stride, dims = OUTPUT_STRIDE[label.ndim], label.ndim
    pool = functional.avg_pool2d if dims == 2 else functional.avg_pool3d
    coarse = pool(one, stride)
    coarse = coarse.clamp(min=0.02).log() + torch.randn(coarse.shape, generator=generator) * 0.8
    mode = "bilinear" if dims == 2 else "trilinear"
    logits = functional.interpolate(coarse, size=label.shape, mode=mode, align_corners=False)[0]
    return (logits + torch.randn(logits.shape, generator=generator) * 0.6).softmax(dim=0)


def mean_dice(prediction: torch.Tensor, reference: torch.Tensor, labels: int) -> float:
    """Mean Dice of the labels that the reference has."""
    found = []
    for value in range(1, labels):
        p, r = prediction == value, reference == value
        if r.any():
            found.append(2 * float((p & r).sum()) / float(p.sum() + r.sum()))
    return statistics.mean(found)


def held_mb() -> float:
    """What this process holds now, after forgetting how much it held at most."""
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmRSS"))) / 1024


if __name__ == "__main__":
    main()
