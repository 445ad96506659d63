"""How weights are moved and averaged: optimiser, groups, learning rate over a schedule; no loop, no loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from medseg.config import TrainConfig
from medseg.muon import MATRIX, VECTOR, Muon, matrix_names

POWER = 0.9
AVERAGE_POWER = 4
"""The average then lies a sixth of all steps behind: what came in the first half weighs 3 % of it."""


def make_optimizer(
    config: TrainConfig, network: torch.nn.Module, *, loaded: frozenset[str] = frozenset()
) -> torch.optim.Optimizer:
    """`config.optimizer` over the weights of `network`; a group's learning rate is `learning_rate` times its `factor`.

    `loaded`: names of parameters that came from pretrained weights. They are a group of their own, behind that of the
    new ones, and held still for the first `config.freeze_share` of the schedule where there are new ones to wait for.
    """
    if config.optimizer == "muon":
        matrices = matrix_names(network)
        kinds = {MATRIX: matrices, VECTOR: frozenset(n for n, _ in network.named_parameters()) - matrices}
        groups = [g | {"kind": kind} for kind, names in kinds.items() for g in _groups(config, network, names, loaded)]
        return Muon(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    every = frozenset(name for name, _ in network.named_parameters())
    groups = _groups(config, network, every, loaded)
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, progress: float) -> None:
    """Set the learning rate of every group for a step at `progress` 0–1 of the schedule; 0 where it is held still.

    Gradients of what is held still are computed all the same: the optimiser then knows their size when the group is let
    go, and processes that train together agree on what there is to exchange.
    """
    rate = learning_rate(config, progress)
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if progress < group["still_until"] else rate * group["factor"]


def learning_rate(config: TrainConfig, progress: float) -> float:
    """At `progress` 0–1 of the schedule: linear rise over the warm-up, then (1 − progress)^0.9, as in DeepLab."""
    if progress < config.warm_up:
        # the first step must move too, so the rise begins at a hundredth
        return config.learning_rate * max(0.01, progress / config.warm_up)
    return float(config.learning_rate * (1 - (progress - config.warm_up) / (1 - config.warm_up + 1e-9)) ** POWER)


def average_weights(network: torch.nn.Module) -> AveragedModel:
    """The average of the weights of `network` and of its running statistics over all steps, the later the heavier.

    Step t counts as t^`AVERAGE_POWER`: a power function average (Karras et al. 2024, arXiv:2312.02696), which knows
    nothing of how long training will be; `update_parameters` after every step.
    """
    return AveragedModel(network, multi_avg_fn=_average, use_buffers=True)


def _average(averages: Sequence[Tensor], current: Sequence[Tensor], steps: Tensor | int) -> None:
    """Move `averages` of `steps` steps towards one more."""
    if not averages[0].is_floating_point():
        # a number of batches
        for average, value in zip(averages, current):
            average.copy_(value)
        return
    torch._foreach_lerp_(list(averages), list(current), 1 - (1 - 1 / (float(steps) + 1)) ** (AVERAGE_POWER + 1))


def _groups(
    config: TrainConfig, network: torch.nn.Module, names: frozenset[str], loaded: frozenset[str]
) -> list[dict[str, Any]]:
    """Of the weights called `names` the new ones, then the loaded ones; one group where all are alike new."""
    parameters: Mapping[str, torch.nn.Parameter] = {n: p for n, p in network.named_parameters() if n in names}
    new = [p for name, p in parameters.items() if name not in loaded]
    old = [p for name, p in parameters.items() if name in loaded]
    # `loaded` names running statistics too, which are no parameters
    still_until = config.freeze_share if any(n not in loaded for n, _ in network.named_parameters()) else 0.0
    groups = [
        {"params": new, "factor": 1.0, "still_until": 0.0},
        {"params": old, "factor": config.pretrained_factor, "still_until": still_until},
    ]
    return [group for group in groups if group["params"]]
