"""Fits of a tiny network on noise, in a test or as a program of several processes, which prints what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny_config

from medseg.config import Config
from medseg.fit import Fit
from medseg.grid import Grid
from medseg.patches import Batch
from medseg.preprocess import Prepared
from medseg.progress import silent
from medseg.ranks import Ranks

TRAIN = {
    "epochs": 3,
    "time_budget_s": None,
    "steps_per_epoch": 2,
    "batch_size": 2,
    "precision": "32",
    "deterministic": True,
}


def noise_cases(count: int) -> list[Prepared]:
    """Cases of noise; one half is brighter and label 1, a corner of the other is label 2."""
    made = []
    for n in range(count):
        label = torch.zeros(10, 12, 11, dtype=torch.uint8)
        label[5:] = 1
        label[:3, :4, :5] = 2
        image = torch.randn(1, 10, 12, 11, generator=torch.Generator().manual_seed(n)) + label
        grid = Grid((10, 12, 11), np.eye(4))
        made.append(Prepared(f"case{n}", image, label, grid, grid, torch.zeros(1, 9)))
    return made


def noise_config(**changes: dict[str, Any]) -> Config:
    """Three epochs of two steps of a network with batch statistics and dropout; `changes` are laid over."""
    network = {"norm": "batch", "dropout": 0.5} | changes.pop("network", {})
    return tiny_config(network=network, train=TRAIN | changes.pop("train", {}), **changes)


def noise_fit(folder: Path, config: Config, ranks: Ranks | None = None, *, resume: bool = False) -> Fit:
    """A fit on five cases of noise, with one held back."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = ranks or Ranks(torch.device("cpu"))
    return Fit(config, noise_cases(5), noise_cases(1), folder, ranks, resume=resume)


def weights_of(network: torch.nn.Module) -> list[float]:
    """Every number in a network, of weights and of averages."""
    return torch.cat([p.detach().double().flatten() for p in network.state_dict().values()]).tolist()


@dataclass(frozen=True)
class Outcome:
    """What a fit came to; `losses` of the steps."""

    losses: list[float]
    dice: float
    weights: list[float]


def run_noted(fit: Fit) -> Outcome:
    """Run a fit and note the loss of every step."""
    losses: list[float] = []
    step = fit._try_step

    def noted(batch: Batch, averages: Sequence[torch.Tensor]) -> float | None:
        losses.append(step(batch, averages) or 0.0)
        return losses[-1]

    fit._try_step = noted  # type: ignore[method-assign]
    network = fit.run(silent)
    return Outcome(losses, fit.course.dice or 0.0, weights_of(network))


def main(folder: Path, all_changes: list[dict[str, Any]]) -> None:
    """One fit after the other in all processes; the first one prints."""
    ranks = Ranks(torch.device("cpu"))
    found = []
    for n, changes in enumerate(all_changes):
        outcome = run_noted(noise_fit(folder / str(n), noise_config(**changes), ranks))
        same = len({tuple(part) for part in ranks.gathered(outcome.weights)}) == 1
        found.append({"losses": outcome.losses, "weights": outcome.weights, "dice": outcome.dice, "same": same})
    ranks.part()
    if ranks.first:
        print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
