"""Dilated convolutions whose gradient is as fast on a CPU as their forward pass; the numbers are those of torch."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class DilatedConv3d(nn.Conv3d):
    """`nn.Conv3d` of stride 1, padded to keep the size, without bias.

    On a CPU the forward pass and the gradient of the input run at dense speed at any dilation, but the gradient of the
    weights takes three to five times as long as a dense one (measured; in 2D it does not). For each tap it is one
    matrix product of the output's gradient and the input shifted by the tap, and taps far out meet little but padding,
    which is left away: together that takes half the time.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        fast = input.device.type == "cpu" and torch.is_grad_enabled() and weight.requires_grad and bias is None
        if not fast or torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined,no-untyped-call]
            return super()._conv_forward(input, weight, bias)  # type: ignore[no-any-return]
        if torch.is_autocast_enabled("cpu"):
            number = torch.get_autocast_dtype("cpu")
            input, weight = input.to(number), weight.to(number)
        return _DilatedConv.apply(input, weight, self.dilation)  # type: ignore[no-any-return,no-untyped-call]


class _DilatedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.dilation = dilation
        return functional.conv3d(maps, weight, padding=_padding(weight, dilation), dilation=dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        maps, weight = ctx.saved_tensors
        of_maps = of_weight = None
        if ctx.needs_input_grad[0]:
            dims = len(ctx.dilation)
            ones, zeros, padding = [1] * dims, [0] * dims, list(_padding(weight, ctx.dilation))
            dilation, mask = list(ctx.dilation), [True, False, False]
            of_maps = torch.ops.aten.convolution_backward(
                gradient, maps, weight, None, ones, padding, dilation, False, zeros, 1, mask
            )[0]
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(gradient, maps, weight.shape[2:], ctx.dilation)
        return of_maps, of_weight, None


def weight_gradient(gradient: Tensor, maps: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """(out, in, *kernel): for each tap, `gradient` (B, out, *S) times `maps` (B, in, *S) shifted by it."""
    rows, columns = gradient.movedim(1, -1), maps.movedim(1, -1)
    taps = []
    for position in product(*(range(k) for k in kernel)):
        here, there = [slice(None)], [slice(None)]
        for at, size, width, rate in zip(position, maps.shape[2:], kernel, dilation):
            shift = (at - width // 2) * rate
            here.append(slice(max(0, -shift), max(0, size - max(0, shift))))
            there.append(slice(max(0, shift), max(0, size + min(0, shift))))
        left = rows[tuple(here)].reshape(-1, gradient.shape[1])
        right = columns[tuple(there)].reshape(-1, maps.shape[1])
        taps.append(left.t() @ right)
    return torch.stack(taps, dim=-1).reshape(gradient.shape[1], maps.shape[1], *kernel)


def _padding(weight: Tensor, dilation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d * (k // 2) for d, k in zip(dilation, weight.shape[2:]))
