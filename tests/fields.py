"""Which voxels reach an output voxel, measured by torch's own gradients: the other witness to what is computed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from medseg.networks._blocks import InstanceNorm

# every true weight is larger: a convolution's is 1 / (channels × taps) > 1e-6, that of an interpolation by 32 on three
# axes (1 / 64)³ > 1e-6; what rounding leaves in doubles is about 1e-16
SMALLEST = 1e-10

IDENTITIES = {
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "gelu", "silu", "mish", "softplus"),
    *("tanh", "tanh_", "sigmoid", "sigmoid_", "prelu", "hardtanh", "hardswish", "softmax", "log_softmax", "clamp"),
    *("batch_norm", "instance_norm", "group_norm", "layer_norm", "dropout", "dropout1d", "dropout2d", "dropout3d"),
}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_CONVOLVED = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def measured_field(
    network: nn.Module,
    spatial_dims: int,
    in_channels: int,
    shape: Sequence[int],
    voxel: Sequence[int] | None = None,
) -> npt.NDArray[np.bool_]:
    """The voxels of an image of `shape` with a gradient at an output `voxel` (left out: the central one).

    In a copy, weights are positive, norms and activations the identity, maxima means, products sums, and means over
    the whole image are cut; on its way back the gradient is cut to 0 or 1 at every tensor, so that no far voxel drowns
    in rounding.
    """
    network = copy.deepcopy(network).double().eval().requires_grad_(False)
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, InstanceNorm):
                setattr(module, name, nn.Identity())
    for parameter in network.parameters():
        parameter.fill_(1.0 / max(1, prod(parameter.shape[1:])))
    image = torch.ones(1, in_channels, *shape, dtype=torch.float64, requires_grad=True)
    with _Positive(spatial_dims):
        scores = network(image)
    at = tuple(n // 2 for n in shape) if voxel is None else tuple(voxel)
    scores[(0, slice(None), *at)].sum().backward()
    assert image.grad is not None
    return np.asarray((image.grad[0] > 0).any(dim=0).numpy())


class _Positive(TorchFunctionMode):
    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.dims = spatial_dims
        self.pooled: dict[int, tuple[Tensor, tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {}
        self.alive: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._run(func, getattr(func, "__name__", ""), args, kwargs or {})
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: (gradient > SMALLEST).double())
        return result

    def _run(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in IDENTITIES:
            return args[0]
        if name in ("mul", "__mul__", "mul_") and all(isinstance(a, Tensor) and a.requires_grad for a in args):
            return args[0] + args[1]
        if name.lstrip("_").startswith("max_pool"):
            return self._pool(func, name, args, kwargs)
        if name in ("scatter", "max_unpool1d", "max_unpool2d", "max_unpool3d"):
            index, values = (args[2], args[3]) if name == "scatter" else (args[1], args[0])
            return self._unpool(index, values, flat=name == "scatter")
        if name in ("maximum", "minimum"):
            return args[0] + args[1]
        if name in ("amax", "amin"):
            return args[0].sum(*args[1:], **kwargs)
        result = func(*args, **kwargs)
        pools = name == "mean" or name.startswith("adaptive")
        if pools and args[0].ndim == self.dims + 2 and prod(result.shape[2:] if result.ndim > 2 else ()) == 1:
            return result.detach()
        return result

    def _pool(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The sum over each window, by a convolution with ones: it may be dilated."""
        found = func(*(a.detach() if isinstance(a, Tensor) else a for a in args), **kwargs)
        images, dims = args[0], args[0].ndim - 2
        names = ("kernel_size", "stride", "padding", "dilation")
        given = {"padding": 0, "dilation": 1, "stride": None} | dict(zip(names, args[1:])) | kwargs
        kernel, padding, dilation = (_axes(given[n], dims) for n in ("kernel_size", "padding", "dilation"))
        stride = _axes(given["stride"] or given["kernel_size"], dims)
        values = found[0] if isinstance(found, tuple) else found
        sizes = zip(values.shape[2:], images.shape[2:], kernel, stride, padding, dilation)
        ends = [(p, max(0, (m - 1) * s + d * (k - 1) + 1 - n - p)) for m, n, k, s, p, d in sizes]
        padded = functional.pad(images, [p for pair in reversed(ends) for p in pair])
        ones = torch.ones(images.shape[1], 1, *kernel, dtype=images.dtype)
        total = _CONVOLVED[dims](padded, ones, stride=stride, dilation=dilation, groups=images.shape[1])
        total = total[(..., *(slice(m) for m in values.shape[2:]))]
        if not isinstance(found, tuple):
            return total
        self.alive.append(found[1])
        self.pooled[found[1].data_ptr()] = (
            total,
            tuple(images.shape[2:]),
            {"stride": stride, "padding": padding},
            kernel,
        )
        return total, found[1]

    def _unpool(self, index: Tensor, values: Tensor, *, flat: bool) -> Tensor:
        """Each voxel is the sum over the windows it lies in, of what was pooled there and what is unpooled."""
        total, shape, options, kernel = self.pooled[index.data_ptr()]
        maps = values.reshape(total.shape) + total
        ones = torch.ones(maps.shape[1], 1, *kernel, dtype=maps.dtype)
        spread = _TRANSPOSED[len(shape)](maps, ones, groups=maps.shape[1], **options)
        missing = [n - m for n, m in zip(shape, spread.shape[2:])]
        spread = functional.pad(spread, [p for m in reversed(missing) for p in (0, m)])
        return spread.flatten(2) if flat else spread


def _axes(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
