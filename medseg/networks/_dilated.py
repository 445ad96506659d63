"""Dilated convolutions as fast as dense ones, by whichever way is quickest; the numbers are those of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Operation = Literal["forward", "maps", "weight"]
"""What is computed: the convolution, the gradient of its input, the gradient of its weights."""
Route = Literal["native", "interleaved", "taps", "stacked"]
"""How: as torch does it; as a dense convolution of interleaved sub-volumes; as one matrix product for each tap; as one
for each plane of taps. The last two are ways to the gradient of the weights alone."""

ROUTES: Mapping[Operation, tuple[Route, ...]] = {
    "forward": ("native", "interleaved"),
    "maps": ("native", "interleaved"),
    "weight": ("native", "interleaved", "taps", "stacked"),
}
MOST_STACKED_BYTES = 2**26
STACKED_SPEED = 2.0
"""A product of stacked taps takes this many times as many voxels in the same time (bf16 on a CPU, measured)."""
MOST_FILLING = 2.0
"""Sub-volumes that a filling with zeros makes more than this much larger gain nothing."""
ROUNDS = 3

_chosen: dict[tuple[object, ...], Route] = {}


class DilatedConv3d(nn.Conv3d):
    """`nn.Conv3d` of stride 1, padded to keep the size, without bias.

    On a CPU the forward pass and the gradient of the input run at dense speed at any dilation, but the gradient of the
    weights takes three to five times as long as a dense one (measured; in 2D it does not): see `weight_gradient`. On a
    GPU each of the three can be many times slower than dense, depending on shape, number format and version: see
    `choose_route`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = input.device.type
        trained = torch.is_grad_enabled() and weight.requires_grad
        if bias is not None or not (device == "cuda" or (device == "cpu" and trained)) or is_recorded():
            return super()._conv_forward(input, weight, bias)  # type: ignore[no-any-return]
        if torch.is_autocast_enabled(device):
            number = torch.get_autocast_dtype(device)
            input, weight = input.to(number), weight.to(number)
        return _DilatedConv.apply(input, weight, self.dilation, trained)  # type: ignore[no-any-return,no-untyped-call]


class _DilatedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, dilation: tuple[int, ...], trained: bool) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.dilation = dilation

        def run(route: Route) -> Tensor:
            return convolve(maps, weight, dilation, route)

        return run(choose_route("forward", maps, weight, dilation, run, timed=trained))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        maps, weight = ctx.saved_tensors
        of_maps = of_weight = None

        def run_maps(route: Route) -> Tensor:
            return maps_gradient(gradient, maps, weight, ctx.dilation, route)

        def run_weight(route: Route) -> Tensor:
            return weight_gradient(gradient, maps, weight.shape[2:], ctx.dilation, route)

        if ctx.needs_input_grad[0]:
            of_maps = run_maps(choose_route("maps", maps, weight, ctx.dilation, run_maps))
        if ctx.needs_input_grad[1]:
            of_weight = run_weight(choose_route("weight", maps, weight, ctx.dilation, run_weight))
        return of_maps, of_weight, None, None


def choose_route(
    operation: Operation,
    maps: Tensor,
    weight: Tensor,
    dilation: Sequence[int],
    run: Callable[[Route], Tensor],
    *,
    timed: bool = True,
) -> Route:
    """The way to compute `operation`: by a fixed rule, in training on a GPU the fastest that `run` was `timed` with.

    Timed once for each shape, number format and dilation of a process. Routes differ in rounding, so there is no timing
    on a CPU, nor of inference (whose masks must not depend on a clock, and whose shapes are many), nor where torch has
    to be deterministic, nor while a CUDA graph is recorded.
    """
    if maps.device.type != "cuda":
        return _cpu_route(operation, maps, weight, dilation)
    if not timed or torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        return "interleaved" if _filling(maps.shape[2:], dilation) <= MOST_FILLING else "native"
    key = (operation, maps.device, maps.dtype, maps.shape, weight.shape, tuple(dilation))
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return "native"
        _chosen[key] = fastest(ROUTES[operation], lambda route: _cuda_milliseconds(lambda: run(route), maps.device))
    return _chosen[key]


def fastest(routes: Sequence[Route], measure: Callable[[Route], float]) -> Route:
    """The route of the least time in `ROUNDS` measurements of each in turn, after one that warms up."""
    for route in routes:
        measure(route)
    rounds = [[measure(route) for route in routes] for _ in range(ROUNDS)]
    times = {route: min(column) if max(column) < math.inf else math.inf for route, column in zip(routes, zip(*rounds))}
    return min(times, key=lambda route: times[route])


def convolve(maps: Tensor, weight: Tensor, dilation: Sequence[int], route: Route) -> Tensor:
    """(B, in, *S) → (B, out, *S), zero-padded; `native` or `interleaved`."""
    if route == "native":
        return functional.conv3d(maps, weight, padding=_padding(weight.shape[2:], dilation), dilation=tuple(dilation))
    dense = functional.conv3d(interleave(maps, dilation), weight, padding=_padding(weight.shape[2:], (1, 1, 1)))
    return undo_interleave(dense, dilation, maps.shape[2:])


def maps_gradient(gradient: Tensor, maps: Tensor, weight: Tensor, dilation: Sequence[int], route: Route) -> Tensor:
    """(B, in, *S) from `gradient` (B, out, *S); `native` or `interleaved`."""
    if route == "native":
        return _backward(gradient, maps, weight, dilation)[0]
    split, places = interleave(gradient, dilation), interleave(maps, dilation)
    return undo_interleave(_backward(split, places, weight, (1, 1, 1))[0], dilation, maps.shape[2:])


def weight_gradient(
    gradient: Tensor, maps: Tensor, kernel: Sequence[int], dilation: Sequence[int], route: Route = "taps"
) -> Tensor:
    """(out, in, *kernel): for each tap, `gradient` (B, out, *S) times `maps` (B, in, *S) shifted by it."""
    if route == "taps":
        return _weight_by_taps(gradient, maps, kernel, dilation)
    if route == "stacked":
        return _weight_by_planes(gradient, maps, kernel, dilation)
    if route == "interleaved":
        gradient, maps, dilation = interleave(gradient, dilation), interleave(maps, dilation), (1, 1, 1)
    shape = (gradient.shape[1], maps.shape[1], *kernel)
    return _backward(gradient, maps, gradient.new_empty(shape), dilation, of_weight=True)[1]


def interleave(maps: Tensor, dilation: Sequence[int]) -> Tensor:
    """(B, C, *S) → (B·∏dilation, C, *ceil(S / dilation)): sub-volumes of each dilation-th voxel, channels last.

    A dilated convolution is a dense one of these (Chen et al. 2018, arXiv:1606.00915). Zeros are put at the end of an
    axis that the dilation does not divide.
    """
    dims = len(dilation)
    inner = maps.movedim(1, -1)
    missing = [-n % d for n, d in zip(maps.shape[2:], dilation)]
    if any(missing):
        inner = functional.pad(inner, [0, 0, *(p for m in reversed(missing) for p in (0, m))])
    sizes = [n // d for n, d in zip(inner.shape[1:-1], dilation)]
    split = inner.reshape(maps.shape[0], *(n for pair in zip(sizes, dilation) for n in pair), maps.shape[1])
    order = [0, *range(2, 2 * dims + 1, 2), *range(1, 2 * dims, 2), 2 * dims + 1]
    return split.permute(order).reshape(-1, *sizes, maps.shape[1]).movedim(-1, 1)


def undo_interleave(maps: Tensor, dilation: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B·∏dilation, C, *ceil(shape / dilation)) → (B, C, *shape), channels last."""
    dims, sizes, channels = len(dilation), maps.shape[2:], maps.shape[1]
    split = maps.movedim(1, -1).reshape(-1, *dilation, *sizes, channels)
    order = [0, *(n for axis in range(dims) for n in (1 + dims + axis, 1 + axis)), 2 * dims + 1]
    whole = split.permute(order).reshape(-1, *(n * d for n, d in zip(sizes, dilation)), channels)
    for axis, size in enumerate(shape, start=1):
        whole = whole.narrow(axis, 0, size)
    return whole.contiguous().movedim(-1, 1)


def _weight_by_taps(gradient: Tensor, maps: Tensor, kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """One product for each tap; where the tap meets padding is left away, which for taps far out is nearly all."""
    rows, columns = gradient.movedim(1, -1), maps.movedim(1, -1)
    taps = []
    for position in product(*(range(k) for k in kernel)):
        here, there = [slice(None)], [slice(None)]
        for at, size, width, rate in zip(position, maps.shape[2:], kernel, dilation):
            first, last, shift = _overlap(at, size, width, rate)
            here.append(slice(first, last))
            there.append(slice(first + shift, last + shift))
        left = rows[tuple(here)].reshape(-1, gradient.shape[1])
        right = columns[tuple(there)].reshape(-1, maps.shape[1])
        taps.append(left.t() @ right)
    return torch.stack(taps, dim=-1).reshape(gradient.shape[1], maps.shape[1], *kernel)


def _weight_by_planes(gradient: Tensor, maps: Tensor, kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """One product for each plane of taps.

    With zeros after each row and each plane, a shift within a plane is an offset in memory, so that all taps of a plane
    are one matrix of shifted copies, a copy for each row; a shift of planes is a range of its columns.
    """
    (batch, inner), outer, depth = maps.shape[:2], gradient.shape[1], maps.shape[2]
    height, width = maps.shape[3:]
    high, wide = (n + d * (k // 2) for n, d, k in zip((height, width), dilation[1:], kernel[1:]))
    plane, reach = batch * high * wide, (high - height) * wide + (wide - width)
    length = depth * plane
    flat = maps.new_zeros(inner, length + 2 * reach)
    places = flat[:, reach : reach + length].view(inner, depth, batch, high, wide)
    places[..., :height, :width] = maps.permute(1, 2, 0, 3, 4)
    right = gradient.new_zeros(depth, batch, high, wide, outer)
    right[:, :, :height, :width] = gradient.permute(2, 0, 3, 4, 1)
    right = right.view(length, outer)
    starts = [
        reach + (row - kernel[1] // 2) * dilation[1] * wide + (column - kernel[2] // 2) * dilation[2]
        for row, column in product(range(kernel[1]), range(kernel[2]))
    ]
    left = torch.stack([flat[:, s : s + length] for s in starts]).view(-1, length)
    taps = right.new_empty(kernel[0], left.shape[0], outer)
    for at in range(kernel[0]):
        first, last, shift = (n * plane for n in _overlap(at, depth, kernel[0], dilation[0]))
        torch.mm(left[:, first + shift : last + shift], right[first:last], out=taps[at])
    return taps.view(*kernel, inner, outer).movedim((-1, -2), (0, 1))


def _overlap(at: int, size: int, width: int, rate: int) -> tuple[int, int, int]:
    """First voxel and the one after the last of an axis where the tap `at` sees the image, and the tap's shift."""
    shift = (at - width // 2) * rate
    first = min(size, max(0, -shift))
    return first, max(first, size - max(0, shift)), shift if abs(shift) < size else 0


def _cpu_route(operation: Operation, maps: Tensor, weight: Tensor, dilation: Sequence[int]) -> Route:
    """Measured once and written down: the same route in every process."""
    if operation != "weight" or max(dilation) == 1:
        return "native"
    kernel, sizes = weight.shape[2:], maps.shape[2:]
    # float32 gains nothing from larger products
    if maps.dtype != torch.bfloat16 or maps.nbytes * prod(kernel[1:]) > MOST_STACKED_BYTES:
        return "taps"
    kept = [_kept(n, k, d) for n, k, d in zip(sizes, kernel, dilation)]
    padded = kept[0] * prod(1 + d * (k // 2) / n for n, k, d in zip(sizes[1:], kernel[1:], dilation[1:]))
    return "stacked" if padded <= STACKED_SPEED * prod(kept) else "taps"


def _kept(size: int, width: int, rate: int) -> float:
    """The share of an axis that the taps see, on average."""
    ends = (_overlap(at, size, width, rate) for at in range(width))
    return sum(last - first for first, last, _ in ends) / (size * width)


def _filling(shape: Sequence[int], dilation: Sequence[int]) -> float:
    """How many times larger sub-volumes are than the volume that they come from."""
    return prod(-(-n // d) * d / n for n, d in zip(shape, dilation))


def _backward(
    gradient: Tensor, maps: Tensor, weight: Tensor, dilation: Sequence[int], *, of_weight: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    ones, zeros, padding = [1] * len(dilation), [0] * len(dilation), list(_padding(weight.shape[2:], dilation))
    mask = [not of_weight, of_weight, False]
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        gradient, maps, weight, None, ones, padding, list(dilation), False, zeros, 1, mask
    )
    return found


def _cuda_milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """On `device`; infinite for a way that cannot be gone, such as one that its memory does not hold."""
    # an event is of the device that is current
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        try:
            run()
        except RuntimeError:
            # whatever it is, if the way that is taken has it too, it is told there
            return math.inf
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def _padding(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    return tuple(d * (k // 2) for d, k in zip(dilation, kernel))


def is_recorded() -> bool:
    """Whether a trace or a compiled graph is made, which holds what torch calls a convolution, and no size of ours."""
    return bool(torch.jit.is_tracing() or torch.compiler.is_compiling())  # type: ignore[attr-defined,no-untyped-call]
