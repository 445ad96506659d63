"""Layers that look at a whole batch when each process has some of its rows: batch statistics, and dropout's draws."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


def of_the_whole_batch(module: nn.Module, rows: slice, batch_size: int) -> nn.Module:
    """`module` with such layers in place of its own, `rows` of `batch_size` done here; weights keep their names."""
    if isinstance(module, _DropoutNd):
        return _WholeDropout(module, rows, batch_size) if module.p else module
    if isinstance(module, _BatchNorm):
        return _whole_batch_norm(module)
    for name, child in module.named_children():
        setattr(module, name, of_the_whole_batch(child, rows, batch_size))
    return module


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes; its gradient is the sum of theirs."""
    return _Total.apply(values)  # type: ignore[no-any-return,no-untyped-call]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _summed(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient)


def _summed(values: torch.Tensor) -> torch.Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values)
    return values


def _whole_batch_norm(layer: _BatchNorm) -> _BatchNorm:
    # torch's own is faster, but runs on GPUs only
    kind = nn.SyncBatchNorm if torch.cuda.is_available() and dist.get_backend() != "gloo" else _WholeBatchNorm
    whole = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    whole.load_state_dict(layer.state_dict())
    whole.train(layer.training)
    return whole


class _WholeBatchNorm(_BatchNorm):
    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any number of axes will do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        axes, shape = (0, *range(2, input.ndim)), (1, -1, *[1] * (input.ndim - 2))
        values = input.float()
        count = total(torch.tensor(values.numel() / values.shape[1], device=values.device))
        mean = total(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = total((centred**2).sum(axes)) / count
        self._remember(mean.detach(), (variance * count / (count - 1)).detach())
        result = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)

    def _remember(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _WholeDropout(nn.Module):
    """Dropout whose mask is drawn for the whole batch, alike in all processes, each of which uses its rows of it."""

    def __init__(self, layer: nn.Module, rows: slice, batch_size: int) -> None:
        super().__init__()
        self.layer, self._rows, self._batch_size = layer, rows, batch_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return input
        # the same strides: torch draws in the order of memory
        shape = (self._batch_size, *input.shape[1:])
        ones = torch.empty_strided(shape, input.stride(), dtype=input.dtype, device=input.device).fill_(1)
        mask: torch.Tensor = self.layer(ones)
        return input * mask[self._rows]
