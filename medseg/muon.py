"""The optimiser of the usual recipe: steps of one size in every direction for convolutions, AdamW for all else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MATRIX, VECTOR = "matrix", "vector"
STEPS = 5
# of the quintic a·x + b·x³ + c·x⁵ whose repetition brings singular values near 1 (Jordan 2024)
QUINTIC = (3.4445, -4.7750, 2.0315)
# a step then changes a weight about as much as one of AdamW does, whatever the layer's shape (Liu 2025)
RMS = 0.2
TINY = 1e-7


class Muon(Optimizer):
    """Momentum made orthogonal for matrices, AdamW for vectors, with one learning rate and one decay for both.

    A group with `kind` "matrix" holds weights (out, in, *kernel), each taken as a matrix of `out` rows: K. Jordan et
    al. 2024, Muon, with the step of J. Liu et al. 2025, arXiv:2502.16982. A group with `kind` "vector" is moved as in
    I. Loshchilov and F. Hutter 2019, arXiv:1711.05101.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "epsilon": epsilon}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every weight that has a gradient; `closure` is called first, with gradients, and its value returned."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            move = _move_matrices if group["kind"] == MATRIX else _move_vectors
            move(group, moved, [self.state[p] for p in moved])
        return value


def matrix_names(network: nn.Module) -> frozenset[str]:
    """Parameters of `network` that are matrices: weights of dense (transposed) convolutions and linear layers.

    Left out: one kernel for each channel or group, whose rows have nothing to do with one another.
    """
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    dense = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *transposed)
    found = []
    for name, module in network.named_modules():
        if isinstance(module, dense) and getattr(module, "groups", 1) == 1:
            found.append(f"{name}.weight" if name else "weight")
    return frozenset(found)


def orthogonal(matrices: Tensor) -> Tensor:
    """(…, rows, columns) with the same singular vectors and singular values brought near 1 (0.7 to 1.2; 0 stays 0).

    Every step of the iteration is a polynomial of the Gram matrix, so that all of them are done in its size, the
    smaller of the two, and the large matrix is multiplied only at the beginning and at the end.
    """
    scaled = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + TINY)
    tall = scaled.shape[-2] > scaled.shape[-1]
    gram = scaled.mT @ scaled if tall else scaled @ scaled.mT
    a, b, c = QUINTIC
    first = a * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product: Tensor | None = None
    for number in range(1, STEPS + 1):
        factor = (gram @ gram).mul_(c).add_(gram, alpha=b).add_(first)
        product = factor if product is None else factor @ product
        if number < STEPS:
            gram = factor @ gram @ factor
            # rounding must not let it drift from what a Gram matrix is
            gram = (gram + gram.mT).mul_(0.5)
    made: Tensor = scaled @ product if tall else product @ scaled
    return made


def _move_matrices(group: dict[str, Any], weights: list[Tensor], states: list[dict[str, Any]]) -> None:
    # matrices of one size are made orthogonal together: many small products are slower than a few large ones
    alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for weight, state in zip(weights, states):
        gradient = weight.grad
        if gradient is None:
            continue
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        # one step ahead (Nesterov)
        ahead = gradient.lerp(momentum, group["momentum"]).flatten(1).float()
        alike.setdefault(tuple(ahead.shape), []).append((weight, ahead))
    for shape, found in alike.items():
        size = group["lr"] * RMS * max(shape) ** 0.5
        moves = orthogonal(torch.stack([ahead for _, ahead in found]))
        for (weight, _), move in zip(found, moves):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(move.reshape(weight.shape).to(weight.dtype), alpha=-size)


def _move_vectors(group: dict[str, Any], weights: list[Tensor], states: list[dict[str, Any]]) -> None:
    first_beta, second_beta = group["betas"]
    for weight, state in zip(weights, states):
        gradient = weight.grad
        if gradient is None:
            continue
        if "step" not in state:
            state.update(step=0, first=torch.zeros_like(weight), second=torch.zeros_like(weight))
        state["step"] += 1
        first, second = state["first"], state["second"]
        first.lerp_(gradient, 1 - first_beta)
        second.lerp_(gradient * gradient, 1 - second_beta)
        # both began at 0: what is missing of their weights
        grown, grown_square = 1 - first_beta ** state["step"], 1 - second_beta ** state["step"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        spread = (second / grown_square).sqrt_().add_(group["epsilon"])
        weight.addcdiv_(first, spread, value=-group["lr"] / grown)
