"""How often 95 % intervals hold the true mean, and how often a test finds a difference that is not there.

    python tests/benchmarks/intervals.py -o tests/benchmarks/results/intervals.json

Lists of 3 to 60 values are drawn from distributions whose mean is known: normal, beta(18, 3) as Dice is, lognormal
with a scale of 0.8 as distances are. Tests compare two methods whose differences have heavy tails on both
sides and a mean of 0 (Laplace). The seed is fixed; shares of 3,000 draws are known to ± 0.8 points at 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from machine import machine

from medseg.statistics import compare_pairs, summarise_all
from medseg.versions import versions

SIZES = (3, 4, 5, 8, 20, 60)
TEST_SIZES = (8, 20, 60)
LEVEL = 0.05
Generator = np.random.Generator
DISTRIBUTIONS: dict[str, tuple[float, Callable[[Generator, tuple[int, int]], np.ndarray]]] = {
    "normal": (0.0, lambda rng, shape: rng.normal(size=shape)),
    "beta": (18 / 21, lambda rng, shape: rng.beta(18, 3, size=shape)),
    "lognormal": (math.exp(0.8**2 / 2), lambda rng, shape: rng.lognormal(0, 0.8, size=shape)),
}


def main() -> None:
    """Draw, count and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3000)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    rng = np.random.default_rng(20240501)
    result = {
        "coverage": {
            name: {str(n): coverage(draw(rng, (arguments.draws, n)), mean) for n in SIZES}
            for name, (mean, draw) in DISTRIBUTIONS.items()
        },
        "false_positives": {str(n): false_positives(rng, arguments.draws, n) for n in TEST_SIZES},
        "level": LEVEL,
        "draws": arguments.draws,
        "machine": machine(),
        "versions": versions("medseg", "numpy", "scipy"),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def coverage(lists: np.ndarray, mean: float) -> float:
    """Share of `lists` (draws, n) whose interval holds `mean`."""
    intervals = [summary.ci95 for summary in summarise_all(list(lists))]
    return round(sum(i is not None and i[0] <= mean <= i[1] for i in intervals) / len(lists), 4)


def false_positives(rng: Generator, draws: int, n: int) -> dict[str, float]:
    """Share of tests at `LEVEL` that find a difference between methods that differ by chance alone."""
    chance = rng.exponential(size=(draws, n)) - rng.exponential(size=(draws, n))
    base = rng.beta(18, 3, size=(draws, n))
    found = compare_pairs(((b + c, b, True) for b, c in zip(base, chance)), family=1)
    return {
        name: round(sum(p is not None and p < LEVEL for p in values) / draws, 4)
        for name, values in {
            "permutation": [test.p_permutation for test in found],
            "wilcoxon": [test.p_wilcoxon for test in found],
        }.items()
    }


if __name__ == "__main__":
    main()
