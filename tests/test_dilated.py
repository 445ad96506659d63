"""The ways to compute a dilated convolution agree with torch's own, and the choice among them is a rule or a timing."""

from __future__ import annotations

import math
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medseg.networks import _dilated
from medseg.networks._dilated import (
    ROUTES,
    DilatedConv3d,
    Route,
    choose_route,
    convolve,
    fastest,
    interleave,
    maps_gradient,
    undo_interleave,
    weight_gradient,
)

CASES = [
    ((5, 7, 6), (3, 3, 3), (2, 2, 2)),
    ((6, 8, 4), (3, 3, 3), (2, 4, 1)),
    ((5, 6, 7), (3, 1, 3), (4, 6, 4)),
    # taps beyond the whole axis on every side
    ((3, 4, 2), (3, 3, 3), (5, 6, 7)),
    ((9, 5, 6), (5, 3, 3), (2, 3, 1)),
]


def tensors(shape: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (2, 3, *shape), (4, 3, *kernel), (2, 4, *shape)
    maps, weight, gradient = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return maps, weight, gradient


def expected(
    maps: Tensor, weight: Tensor, gradient: Tensor, dilation: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    maps, weight = maps.clone().requires_grad_(), weight.clone().requires_grad_()
    padding = tuple(d * (k // 2) for d, k in zip(dilation, weight.shape[2:]))
    out = functional.conv3d(maps, weight, padding=padding, dilation=dilation)
    of_maps, of_weight = torch.autograd.grad(out, (maps, weight), gradient)
    return out.detach(), of_maps, of_weight


@pytest.mark.parametrize(("shape", "kernel", "dilation"), CASES)
@pytest.mark.parametrize("route", ROUTES["forward"])
def test_every_route_gives_torchs_output_and_gradient_of_the_input(
    shape: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...], route: Route
) -> None:
    maps, weight, gradient = tensors(shape, kernel)
    out, of_maps, _ = expected(maps, weight, gradient, dilation)
    torch.testing.assert_close(convolve(maps, weight, dilation, route), out)
    torch.testing.assert_close(maps_gradient(gradient, maps, weight, dilation, route), of_maps)


@pytest.mark.parametrize(("shape", "kernel", "dilation"), CASES)
@pytest.mark.parametrize("route", ROUTES["weight"])
def test_every_route_gives_torchs_gradient_of_the_weights(
    shape: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...], route: Route
) -> None:
    maps, weight, gradient = tensors(shape, kernel)
    of_weight = expected(maps, weight, gradient, dilation)[2]
    torch.testing.assert_close(weight_gradient(gradient, maps, kernel, dilation, route), of_weight)


def test_sub_volumes_hold_every_dilation_th_voxel() -> None:
    line = torch.arange(5.0).reshape(1, 1, 5, 1, 1)
    split = interleave(line, (2, 1, 1))
    assert split.flatten(1).tolist() == [[0, 2, 4], [1, 3, 0]]
    assert undo_interleave(split, (2, 1, 1), (5, 1, 1)).flatten().tolist() == [0, 1, 2, 3, 4]


def test_gradients_in_bf16_are_as_close_as_bf16_is() -> None:
    dilation = (2, 2, 2)
    maps, weight, gradient = tensors((6, 8, 6), (3, 3, 3))
    of_weight = expected(maps, weight, gradient, dilation)[2]
    short = [t.to(torch.bfloat16) for t in (gradient, maps)]
    for route in ROUTES["weight"]:
        error = weight_gradient(*short, (3, 3, 3), dilation, route).double() - of_weight
        # bf16 keeps 8 bits: both inputs and the result are each rounded by 2^-9 at most, and so are partial sums where
        # the processor has no instructions for it
        assert error.norm() / of_weight.norm() < 4 * 2**-9


@pytest.mark.parametrize(
    ("shape", "dilation", "dtype", "route"),
    [
        ((10, 14, 10), (2, 2, 2), torch.bfloat16, "stacked"),
        ((10, 14, 10), (4, 6, 4), torch.bfloat16, "taps"),
        ((10, 14, 10), (2, 2, 2), torch.float32, "taps"),
    ],
)
def test_the_rule_of_a_cpu_knows_padding_and_number_format(
    shape: tuple[int, ...], dilation: tuple[int, ...], dtype: torch.dtype, route: Route
) -> None:
    maps, weight = torch.zeros((1, 2, *shape), dtype=dtype), torch.zeros((2, 2, 3, 3, 3), dtype=dtype)
    assert choose_route("weight", maps, weight, dilation, never) == route
    assert choose_route("forward", maps, weight, dilation, never) == "native"


def test_large_maps_are_not_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, weight = torch.zeros(1, 2, 16, 16, 16, dtype=torch.bfloat16), torch.zeros(2, 2, 3, 3, 3)
    assert choose_route("weight", maps, weight, (2, 2, 2), never) == "stacked"
    monkeypatch.setattr(_dilated, "MOST_STACKED_BYTES", maps.nbytes * 9 - 1)
    assert choose_route("weight", maps, weight, (2, 2, 2), never) == "taps"


@pytest.mark.parametrize(("size", "route"), [(8, "interleaved"), (3, "native")])
def test_inference_on_a_gpu_asks_no_clock(size: int, route: Route) -> None:
    maps: Any = SimpleNamespace(device=torch.device("cuda"), shape=(1, 2, size, size, size))
    assert choose_route("forward", maps, torch.zeros(2, 2, 3, 3, 3), (2, 2, 2), never, timed=False) == route


def test_a_way_that_memory_does_not_hold_is_not_the_fastest() -> None:
    # once is enough
    told = {"native": repeat(7.0), "stacked": chain([2.0, 2.0, math.inf], repeat(2.0))}
    assert fastest(("native", "stacked"), lambda route: next(told[route])) == "native"


def test_the_fastest_of_several_rounds_wins() -> None:
    # the first of each warms up; then the second is once the fastest of all
    told = {"native": chain([0.0], repeat(2.0)), "interleaved": chain([9.0, 5.0, 1.0], repeat(5.0))}
    assert fastest(("native", "interleaved"), lambda route: next(told[route])) == "interleaved"


@pytest.mark.parametrize("dilation", [(2, 2, 2), (1, 4, 2)])
def test_the_layer_gives_torchs_gradients_whatever_route_is_chosen(
    dilation: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = DilatedConv3d(3, 4, 3, padding=dilation, dilation=dilation, bias=False).double()
    maps, _, gradient = tensors((5, 7, 6), (3, 3, 3))
    out, of_maps, of_weight = expected(maps, conv.weight.detach(), gradient, dilation)
    monkeypatch.setattr(_dilated, "choose_route", lambda *_, **__: "interleaved")
    maps.requires_grad_()
    found = conv(maps)
    found.backward(gradient)
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(maps.grad, of_maps)
    torch.testing.assert_close(conv.weight.grad, of_weight)


def never(route: Route) -> Tensor:
    raise AssertionError(f"{route} was run to be timed")
