"""Encoders, ASPP and the small parts of networks: dilation in place of strides, agreement with MONAI and torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import monai.networks.nets as monai_nets
import pytest
import torch
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks import build_network
from medseg.networks._blocks import (
    InstanceNorm,
    Style,
    enlarge,
    make_norm,
    norm_groups,
    shuffle_pixels,
)
from medseg.networks._dilated import DilatedConv3d
from medseg.networks.aspp import ASPP, cap_rates, local_mean, spatial_mean
from medseg.networks.encoders import build_encoder

TINY: dict[str, Any] = {
    "channels": (4, 8, 8),
    "aspp_channels": 8,
    "skip_channels": 4,
    "decoder_channels": 8,
    "aspp_rates": (1, 2),
}


def tiny(**changes: Any) -> NetworkConfig:
    return NetworkConfig(**{**TINY, **changes})


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_encoder(spatial_dims: int = 2, **changes: Any) -> Any:
    torch.manual_seed(0)
    return build_encoder(tiny(**changes), spatial_dims=spatial_dims, in_channels=1).eval()


def make_network(config: NetworkConfig, shape: Sequence[int], in_channels: int = 2) -> Any:
    torch.manual_seed(0)
    return build_network(config, spatial_dims=len(shape), in_channels=in_channels, out_channels=3)


def stir(network: nn.Module) -> None:
    """Give batch norms statistics and weights that are not the trivial ones."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for name, low, high in (
                ("weight", 0.5, 1.0),
                ("bias", -0.2, 0.2),
                ("running_mean", -0.2, 0.2),
                ("running_var", 0.5, 1.5),
            ):
                nn.init.uniform_(getattr(layer, name), low, high)


class TestResNet:
    @pytest.mark.parametrize(("variant", "dims"), [("resnet18", 2), ("resnet18", 3), ("resnet34", 1), ("resnet50", 2)])
    def test_equals_monai_with_the_same_weights(self, variant: str, dims: int) -> None:
        theirs = getattr(monai_nets, variant)(
            spatial_dims=dims,
            n_input_channels=1,
            conv1_t_size=7,
            conv1_t_stride=2,
            shortcut_type="B",
            bias_downsample=False,
            feed_forward=False,
        ).eval()
        stir(theirs)
        ours = make_encoder(dims, encoder=variant, output_stride=32, norm="batch")
        ours.load_state_dict(theirs.state_dict())
        x = image(2, 1, *{1: (97,), 2: (65, 70), 3: (33, 40, 37)}[dims])
        with torch.no_grad():
            y = theirs.maxpool(theirs.act(theirs.bn1(theirs.conv1(x))))
            y = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(y))))
            torch.testing.assert_close(ours(x)[-1], y, atol=1e-5, rtol=1e-5)

    def test_resnet101_runs(self) -> None:
        encoder = make_encoder(1, encoder="resnet101", output_stride=16)
        assert [tuple(m.shape) for m in encoder(image(1, 1, 33))] == [
            (1, 64, 17),
            (1, 256, 9),
            (1, 512, 5),
            (1, 1024, 3),
            (1, 2048, 3),
        ]

    @pytest.mark.parametrize(("stride", "last"), [(4, (4, 4)), (8, (8, 8)), (16, (16, 16)), (32, (32, 32))])
    def test_announces_what_it_returns(self, stride: int, last: tuple[int, int]) -> None:
        encoder = make_encoder(encoder="resnet18", output_stride=stride)
        maps = encoder(image(1, 1, 65, 50))
        assert encoder.strides[-1] == last
        assert [m.shape[1] for m in maps] == list(encoder.out_channels) == [64, 64, 128, 256, 512]
        assert [tuple(m.shape[2:]) for m in maps] == [(-(-65 // s), -(-50 // t)) for s, t in encoder.strides]

    @pytest.mark.parametrize(("variant", "stride"), [("resnet18", 8), ("resnet18", 4), ("resnet50", 8)])
    def test_dilation_gives_the_strided_maps_on_a_denser_grid(self, variant: str, stride: int) -> None:
        strided = make_encoder(encoder=variant, output_stride=32, norm="batch")
        stir(strided)
        dilated = make_encoder(encoder=variant, output_stride=stride, norm="batch")
        dilated.load_state_dict(strided.state_dict())
        x = image(1, 1, 70, 64)
        with torch.no_grad():
            coarse, dense = strided(x)[-1], dilated(x)[-1]
        step = 32 // stride
        torch.testing.assert_close(dense[:, :, ::step, ::step], coarse, atol=1e-4, rtol=1e-4)

    def test_dilations_follow_torchvision(self) -> None:
        encoder = make_encoder(encoder="resnet50", output_stride=8)
        dilations = [[block.conv2.dilation[0] for block in layer] for layer in (encoder.layer3, encoder.layer4)]
        assert dilations == [[1, 2, 2, 2, 2, 2], [2, 4, 4]]

    def test_multi_grid_multiplies_the_last_stage(self) -> None:
        encoder = make_encoder(encoder="resnet50", output_stride=16, multi_grid=(1, 2, 4))
        assert [block.conv2.dilation[0] for block in encoder.layer4] == [1, 4, 8]
        assert [block.conv2.dilation[0] for block in encoder.layer3] == [1] * 6

    def test_strides_by_axis(self) -> None:
        strides = ((1, 2), (1, 2), (2, 2), (2, 2), (1, 2))
        encoder = make_encoder(encoder="resnet18", output_stride=8, strides=strides)
        assert encoder.strides == ((1, 2), (1, 4), (2, 8), (2, 8), (2, 8))
        assert [tuple(m.shape[2:]) for m in encoder(image(1, 1, 9, 33))] == [(9, 17), (9, 9), (5, 5), (5, 5), (5, 5)]
        assert encoder.layer4[0].conv1.dilation == (2, 2)
        assert encoder.layer4[1].conv1.dilation == (2, 4)

    def test_cannot_stride_less_than_its_stem(self) -> None:
        with pytest.raises(ConfigError, match=r"output_stride 2 is not possible.*it can have 4, 8, 16, 32"):
            make_encoder(encoder="resnet18", output_stride=2)


class TestLightEncoder:
    def test_2d_prototype(self) -> None:
        encoder = make_encoder(channels=(32, 64, 96, 128, 160, 160), output_stride=16)
        assert encoder.strides == ((2, 2), (4, 4), (8, 8), (16, 16), (16, 16), (16, 16))
        assert [s[0].conv2.dilation[0] for s in encoder.stages] == [1, 1, 1, 1, 2, 4]
        assert [len(s) for s in encoder.stages] == [1, 2, 2, 2, 2, 2]

    def test_output_stride_2_keeps_only_the_stem(self) -> None:
        assert make_encoder(output_stride=2).strides == ((2, 2),) * 3

    def test_dilation_gives_the_strided_maps_on_a_denser_grid(self) -> None:
        strided, dilated = (make_encoder(output_stride=s, norm="batch") for s in (8, 2))
        stir(strided)
        dilated.load_state_dict(strided.state_dict())
        x = image(1, 1, 30, 41)
        torch.testing.assert_close(dilated(x)[-1][:, :, ::4, ::4], strided(x)[-1], atol=1e-4, rtol=1e-4)

    def test_a_flat_axis_may_be_one_voxel(self) -> None:
        config = tiny(strides=((1, 2, 2), (1, 2, 2), (2, 2, 2)), output_stride=4)
        network = make_network(config, (1, 9, 9))
        assert network.min_shape == (1, 5, 5)
        assert network(image(1, 2, 1, 9, 7)).shape == (1, 3, 1, 9, 7)

    def test_output_stride_it_cannot_have(self) -> None:
        with pytest.raises(ConfigError, match=r"output_stride 16 .*`light`.*it can have 2, 4, 8"):
            make_encoder(output_stride=16)

    def test_one_stage_is_not_enough(self) -> None:
        with pytest.raises(ConfigError, match=r"network.channels \[8\]: the light encoder needs at least two stages"):
            make_encoder(channels=(8,))

    def test_strides_of_wrong_length(self) -> None:
        with pytest.raises(
            ConfigError, match=r"strides has 2 entries.*needs 3: one for each of stem, stage 1, stage 2"
        ):
            make_encoder(strides=((2, 2), (2, 2)))
        with pytest.raises(ConfigError, match=r"strides\[1\] is \(2,\), expected 2 numbers"):
            make_encoder(strides=((2, 2), (2,), (2, 2)))


class TestASPP:
    def test_branches_look_as_far_as_their_rates(self) -> None:
        aspp = ASPP(Style(2), 3, 4, [2, (1, 5)], pooling=False)
        seen = []
        for branch in aspp.branches:
            conv: Any = branch.get_submodule("0")
            x = torch.zeros(1, 3, 15, 15)
            x[:, :, 7, 7] = 1
            rows, columns = conv(x)[0].abs().sum(0).nonzero(as_tuple=True)
            seen.append((sorted({int(r) - 7 for r in rows}), sorted({int(c) - 7 for c in columns})))
        assert seen == [([0], [0]), ([-2, 0, 2], [-2, 0, 2]), ([-1, 0, 1], [-5, 0, 5])]

    @pytest.mark.parametrize("pooling", [True, False])
    def test_only_image_pooling_sees_the_far_end(self, pooling: bool) -> None:
        torch.manual_seed(0)
        # batch norm in eval mode mixes nothing over space, so that only the pooling can
        aspp = ASPP(Style(1, "batch"), 3, 32, [1], pooling=pooling).eval()
        x = image(1, 3, 40)
        changed = x.clone()
        changed[:, 0, 39] += 40
        near = (aspp(x) - aspp(changed))[:, :, :10].abs().max()
        assert (near > 1e-3) == pooling

    @pytest.mark.parametrize("norm", ["batch", "instance", "group"])
    def test_no_norm_takes_the_pooled_context_away(self, norm: Any) -> None:
        torch.manual_seed(0)
        aspp: Any = ASPP(Style(1, norm), 3, 32, [1])
        x = image(2, 3, 40)
        before = aspp(x)
        last = aspp.pooling.conv if norm == "batch" else aspp.pooling.project
        nn.init.zeros_(last.weight)
        assert (aspp(x) - before).abs().max() > 0.1

    def test_dropout_only_while_training(self) -> None:
        aspp = ASPP(Style(1), 3, 8, [1], dropout=0.9)
        x = image(1, 3, 40)
        assert (aspp.train()(x) == 0).float().mean() > 0.7
        assert (aspp.eval()(x) == 0).float().mean() < 0.1

    def test_no_rates(self) -> None:
        with pytest.raises(ConfigError, match="aspp_rates is empty"):
            ASPP(Style(2), 3, 4, [])
        with pytest.raises(ConfigError, match="aspp_rates is empty"):
            cap_rates([], (9, 9))

    def test_rate_of_wrong_length(self) -> None:
        with pytest.raises(ConfigError, match=r"\(1, 2, 3\) has 3 numbers, expected 2"):
            ASPP(Style(2), 3, 4, [(1, 2, 3)])


@pytest.mark.parametrize(
    ("rates", "shape", "expected"),
    [
        ((2, 4, 6), (20, 28, 20), (2, 4, 6)),
        ((2, 4, 6), (10, 14, 10), (2, 4, (4, 6, 4))),
        ((6, 12, 18), (5, 7, 5), ((2, 3, 2),)),
        ((6, 12, 18), (33, 33), (6, 12, 16)),
        ((1, (2, 9)), (1, 9), (1, (1, 4))),
        ((3, 6), (2,), (1,)),
        (((1, 1), 1), (9, 9), (1,)),
    ],
)
def test_cap_rates_by_hand(rates: Any, shape: tuple[int, ...], expected: Any) -> None:
    assert cap_rates(rates, shape) == expected


class TestBlocks:
    def test_norm_groups(self) -> None:
        assert [norm_groups(c) for c in (4, 32, 48, 64, 96, 512, 1024, 37)] == [1, 2, 3, 4, 6, 32, 32, 1]

    @pytest.mark.parametrize("channels", [4, 32])
    @pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
    def test_instance_norm_equals_torch(self, channels: int, memory: torch.memory_format) -> None:
        ours, theirs = make_norm(Style(2), channels), nn.InstanceNorm2d(channels, affine=True)
        assert isinstance(ours, InstanceNorm)
        for norm in (ours, theirs):
            nn.init.constant_(norm.weight, 1.5)
            nn.init.constant_(norm.bias, 0.25)
        x = image(3, channels, 5, 7).to(memory_format=memory)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)

    def test_enlarge_keeps_a_ramp_in_place(self) -> None:
        ramp = torch.tensor([0.0, 4.0, 8.0]).reshape(1, 1, 3, 1).expand(1, 1, 3, 2)
        large = enlarge(ramp, (4, 1), (11, 2))
        assert large[0, 0, :, 1].tolist() == pytest.approx([0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8])

    def test_shuffle_equals_torch_and_differs_by_axis(self) -> None:
        x = image(2, 12, 3, 5)
        assert torch.equal(shuffle_pixels(x, (2, 2)), nn.functional.pixel_shuffle(x, 2))
        rows = shuffle_pixels(torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1).expand(1, 3, 1, 2), (3, 1))
        assert rows[0, 0].tolist() == [[1, 1], [2, 2], [3, 3]]

    def test_subpixels_start_equal(self) -> None:
        network = make_network(tiny(output_stride=8), (24, 24))
        classifier = network.head.classifier
        maps = shuffle_pixels(classifier(image(1, classifier.in_channels, 3, 3)), (4, 4))
        blocks = maps.reshape(1, -1, 3, 4, 3, 4)
        # the bias of each sub-pixel is its own, and 0 at the start
        # processors sum the channels of some outputs in another order: a few roundings of float32 near 1
        assert torch.allclose(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks), rtol=0, atol=1e-6)
        assert maps.std() > 0.1

    @pytest.mark.parametrize(
        ("encoder", "output_stride", "expected"),
        [
            ("light", 8, (4, 4)),
            ("light", 4, (2, 2)),
            ("light", 2, (2, 2)),
            ("resnet18", 16, (4, 4)),
            ("resnet18", 4, (2, 2)),
        ],
    )
    def test_decoder_stride(self, encoder: str, output_stride: int, expected: tuple[int, int]) -> None:
        assert make_network(tiny(encoder=encoder, output_stride=output_stride), (0, 0)).strides == expected


@pytest.mark.parametrize(("shape", "dilation"), [((7, 6, 9), (2, 1, 3)), ((4, 5, 3), (6, 2, 4))])
def test_a_dilated_convolution_has_the_gradients_of_torch(shape: tuple[int, ...], dilation: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    conv = DilatedConv3d(3, 5, 3, padding=dilation, dilation=dilation, bias=False).double()
    maps = torch.randn(2, 3, *shape, dtype=torch.double, requires_grad=True)
    found = conv(maps)
    expected = torch.nn.functional.conv3d(maps, conv.weight, padding=dilation, dilation=dilation)
    towards = torch.randn_like(found)
    assert torch.equal(found, expected)
    for a, b in zip(*(torch.autograd.grad(y, (maps, conv.weight), towards) for y in (found, expected))):
        # sums of at most 1,512 products in double precision, in another order
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory", [torch.channels_last, torch.channels_last_3d])
def test_the_norm_of_channels_last_maps_is_torchs(memory: torch.memory_format) -> None:
    torch.manual_seed(0)
    shape = (9, 8) if memory == torch.channels_last else (5, 6, 7)
    norm = make_norm(Style(len(shape)), 32).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    maps = torch.randn(3, 32, *shape, dtype=torch.double).to(memory_format=memory).requires_grad_()
    found = norm(maps)
    expected = torch.nn.functional.instance_norm(maps, weight=norm.weight, bias=norm.bias, eps=1e-5)
    towards = torch.randn_like(found)
    assert found.is_contiguous(memory_format=memory)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    inputs = (maps, norm.weight, norm.bias)
    for a, b in zip(*(torch.autograd.grad(y, inputs, towards) for y in (found, expected))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---- means over a window


@pytest.mark.parametrize(
    ("size", "window"), [((9, 7, 8), (4, 3, 5)), ((9,), (4,)), ((6, 11), (6, 2)), ((5, 5), (2, 9))]
)
def test_a_local_mean_is_that_of_the_nearest_box_inside_the_map(size: tuple[int, ...], window: tuple[int, ...]) -> None:
    maps = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = local_mean(maps, window).expand(-1, -1, *size)
    for voxel in itertools.product(*(range(n) for n in size)):
        first = [min(max(v - w // 2, 0), max(0, n - w)) for v, w, n in zip(voxel, window, size)]
        box = maps[(..., *(slice(a, a + w) for a, w in zip(first, window)))]
        assert torch.allclose(found[(..., *voxel)], box.flatten(2).mean(dim=2), atol=1e-6)


def test_a_window_that_covers_the_map_is_the_mean_of_all() -> None:
    maps = torch.randn(1, 2, 4, 5)
    assert torch.equal(local_mean(maps, (4, 9)), spatial_mean(maps))
    assert torch.equal(local_mean(maps, None), spatial_mean(maps))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_pooling_over_a_window_sees_each_voxel_as_a_map_of_its_own(norm: str) -> None:
    style = Style.of(NetworkConfig(norm=norm), 2)  # type: ignore[arg-type]
    torch.manual_seed(0)
    whole = ASPP(style, 3, 4, (1,)).eval()
    local = ASPP(style, 3, 4, (1,), pooling_window=(4, 4)).eval()
    local.load_state_dict(whole.state_dict())
    maps = torch.randn(2, 3, 8, 4)
    assert whole.pooling is not None
    assert local.pooling is not None
    found = local.pooling(maps).expand(-1, -1, 8, 4)
    # the box of the first three rows is the upper half, that of the last three the lower
    for rows, half in ((slice(0, 3), maps[:, :, :4]), (slice(6, 8), maps[:, :, 4:])):
        assert torch.allclose(found[:, :, rows], whole.pooling(half).expand_as(found[:, :, rows]), atol=1e-6)
