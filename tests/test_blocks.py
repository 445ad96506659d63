"""What the shared parts of networks compute in another way where a CPU trains equals what they compute elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medseg.networks._blocks import Chain, Dropout, InstanceNorm, Style, conv_norm_act, enlarge, gather_pixels, norm_act


def image(*shape: int) -> Tensor:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return maps.to(memory_format=torch.channels_last_3d) if len(shape) == 5 else maps


@pytest.mark.parametrize(
    ("shape", "strides", "large"),
    [
        ((2, 3, 4, 3, 5), (2, 4, 1), (7, 12, 5)),
        ((1, 2, 3, 1), (4, 2), (9, 2)),
        ((2, 2, 5), (3,), (14,)),
    ],
)
def test_enlarging_gives_torchs_values_and_gradient(
    shape: tuple[int, ...], strides: tuple[int, ...], large: tuple[int, ...]
) -> None:
    maps = image(*shape)
    expected = enlarge(maps, strides, large)
    found = enlarge(maps.clone().requires_grad_(), strides, large)
    torch.testing.assert_close(found.detach(), expected)
    # a linear map's gradient is its transpose: <A x, y> = <x, Aᵀ y>
    leaf = maps.clone().requires_grad_()
    towards = image(*shape[:2], *large)
    (gradient,) = torch.autograd.grad(enlarge(leaf, strides, large), leaf, towards)
    torch.testing.assert_close((gradient * maps).sum(), (towards * expected).sum())


@pytest.mark.parametrize("act", [nn.LeakyReLU(0.01, inplace=True), nn.ReLU(inplace=True)])
def test_norm_and_rectifier_together_are_the_two_in_turn(act: nn.Module) -> None:
    norm = InstanceNorm(16).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    found, expected = image(2, 16, 3, 4, 5).requires_grad_(), image(2, 16, 3, 4, 5).requires_grad_()
    towards = image(2, 16, 3, 4, 5).flip(2).to(memory_format=torch.channels_last_3d)
    one, two = norm_act(norm, act, found), act(norm(expected))
    torch.testing.assert_close(one, two)
    for a, b in zip(
        torch.autograd.grad(one, (found, *norm.parameters()), towards),
        torch.autograd.grad(two, (expected, *norm.parameters()), towards),
    ):
        torch.testing.assert_close(a, b)


def test_layers_run_in_turn_and_keep_their_names() -> None:
    layers = conv_norm_act(Style(3), 16, 16, 3, separable=True).double().to(memory_format=torch.channels_last_3d)
    assert isinstance(layers, Chain)
    assert sorted({name.split(".")[0] for name, _ in layers.named_parameters()}) == ["0", "1", "3", "4"]
    maps = image(1, 16, 4, 3, 5)
    expected = nn.Sequential(*layers)(maps)
    torch.testing.assert_close(layers(maps.clone().requires_grad_()), expected)


def test_gathered_pixels_are_channels_last() -> None:
    # the channels of a block are its voxels, rows first; the missing third row is 0
    gathered = gather_pixels(torch.tensor([[[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]]), (2, 2))
    assert gathered.squeeze().tolist() == [[1, 5], [2, 6], [3, 0], [4, 0]]
    assert gathered.is_contiguous(memory_format=torch.channels_last)


def test_dropout_draws_alike_in_any_memory_layout() -> None:
    layer = Dropout(0.25)
    maps = torch.rand(2, 4, 3, 5, 6) + 0.5
    drawn = []
    for form in (torch.contiguous_format, torch.channels_last_3d):
        torch.manual_seed(3)
        drawn.append(layer(maps.to(memory_format=form)))
    assert torch.equal(drawn[0], drawn[1])
    kept = drawn[0] != 0
    torch.testing.assert_close(drawn[0][kept], maps[kept] / 0.75)
    # 720 numbers: five standard deviations
    assert abs(float(kept.float().mean()) - 0.75) < 5 * (0.75 * 0.25 / maps.numel()) ** 0.5
    assert layer.eval()(maps) is maps
