"""What a network sees: the textbook's numbers, gridding worked out by hand, and fields measured by gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from fields import measured_field
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks import build_network
from medseg.networks._blocks import enlarge, gather_pixels, shuffle_pixels
from medseg.networks.receptive import NetworkReport, analyse, build_bare, count, field_at, fit_width


def stack(dilations: Sequence[int], *, channels: int = 1, kernel: int = 3, dims: int = 2) -> nn.Sequential:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return nn.Sequential(
        *(kind(channels, channels, kernel, padding=d * (kernel // 2), dilation=d, bias=False) for d in dilations)
    )


def look(network: nn.Module, *, channels: int = 1, dims: int = 2, side: int = 32) -> NetworkReport:
    return analyse(network, spatial_dims=dims, in_channels=channels, shape=(side,) * dims)


class TestTextbook:
    @pytest.mark.parametrize(("dilation", "effective"), [(1, 3), (2, 5), (4, 9), (8, 17), (16, 33)])
    def test_a_kernel_of_three_reaches_k_plus_k_minus_one_times_d_minus_one(
        self, dilation: int, effective: int
    ) -> None:
        layer = look(stack([dilation])).layers[0]
        assert (layer.effective_kernel, layer.receptive_field) == ((effective,) * 2, (effective,) * 2)

    @pytest.mark.parametrize(
        ("dilations", "kernel", "field", "weights"),
        [((1, 2, 4), 3, 15, 1_769_472), ((1, 1, 1), 5, 13, 4_915_200), ((1, 2, 4, 8), 3, 31, 2_359_296)],
    )
    def test_stacks_of_256_channels(self, dilations: tuple[int, ...], kernel: int, field: int, weights: int) -> None:
        report = look(stack(dilations, channels=256, kernel=kernel), channels=256)
        assert (report.receptive_field, report.parameters) == ((field, field), weights)

    def test_a_dilated_kernel_of_three_has_a_third_of_the_weights_of_one_of_five(self) -> None:
        dense, dilated = (
            look(stack([1], channels=64, kernel=5), channels=64),
            look(stack([2], channels=64), channels=64),
        )
        assert (dense.parameters, dilated.parameters) == (102_400, 36_864)
        assert dense.receptive_field == dilated.receptive_field == (5, 5)

    def test_the_output_size_follows_the_formula(self) -> None:
        # (20 + 2·1 − 2·(3 − 1) − 1) / 3 + 1 = 6.67, rounded down
        layer = look(nn.Conv2d(1, 1, 3, stride=3, padding=1, dilation=2), side=20).layers[0]
        assert layer.output_size == (6, 6)

    def test_multiply_adds_are_weights_times_voxels(self) -> None:
        assert look(nn.Conv2d(2, 3, 3, padding=1), channels=2, side=10).multiply_adds == 2 * 3 * 9 * 100
        # a transposed convolution reads each voxel once for each weight
        assert look(nn.ConvTranspose2d(2, 3, 2, stride=2), channels=2, side=10).multiply_adds == 2 * 3 * 4 * 100

    def test_strides_multiply_and_widen_what_follows(self) -> None:
        network = nn.Sequential(nn.Conv1d(1, 1, 3, stride=2, padding=1), nn.MaxPool1d(2), nn.Conv1d(1, 1, 3, padding=1))
        first, pool, last = look(network, dims=1).layers
        # 3; 3 + 1·2; 5 + 2·4
        assert [x.receptive_field for x in (first, pool, last)] == [(3,), (5,), (13,)]
        assert [x.cumulative_stride for x in (first, pool, last)] == [(2,), (4,), (4,)]
        assert look(network, dims=1).output_stride == 4


class TestStrides:
    def test_the_output_stride_is_never_below_the_image(self) -> None:
        report = look(nn.Sequential(nn.ConvTranspose2d(1, 1, 2, stride=2), nn.Conv2d(1, 1, 3)))
        assert [x.cumulative_stride for x in report.layers] == [(0.5, 0.5), (0.5, 0.5)]
        assert report.output_stride == 1

    def test_a_wide_kernel_without_padding_is_no_stride(self) -> None:
        # 256 − 128 = 128 voxels are left, next to each other
        assert look(nn.Conv1d(1, 1, 129), dims=1, side=256).output_stride == 1

    def test_a_fraction_is_not_cut_off(self) -> None:
        # an image of 1.5 times the size at a stride of 2
        network = nn.Sequential(nn.Upsample(scale_factor=1.5), nn.Conv2d(1, 1, 3, stride=2, padding=1))
        assert look(network, side=36).output_stride == pytest.approx(4 / 3, rel=1e-12)  # thirds in floats

    def test_tokens_and_a_patch_of_odd_sides_leave_the_stride(self) -> None:
        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Conv2d(1, 4, 2, stride=2)
                self.after = nn.Conv2d(8, 2, 3, padding=1)

            def forward(self, images: Tensor) -> Tensor:
                padded = functional.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))
                last = self.embed(padded).permute(0, 2, 3, 1)
                # of two neighbours on one axis both are kept, as channels; on the other every second one
                merged = torch.cat((last[:, 0::2, 0::2], last[:, 1::2, 0::2]), dim=-1)
                return self.after(merged.permute(0, 3, 1, 2))

        assert [x.cumulative_stride for x in look(Tokens(), side=63).layers] == [(2, 2), (4, 4)]


class TestSharedLayers:
    def test_the_largest_call_counts(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv1d(1, 1, 3, padding=4, dilation=4, bias=False)

            def forward(self, images: Tensor) -> Tensor:
                small = functional.avg_pool1d(images, 2)
                return self.conv(images) + functional.interpolate(self.conv(small), scale_factor=2.0)

        shared = next(x for x in look(Twice(), dims=1, side=8).layers if x.name == "conv")
        # on pairs of voxels the kernel of 9 spans 18, and on a map of 4 only its centre meets the map
        assert (shared.calls, shared.cumulative_stride, shared.receptive_field) == (2, (2,), (18,))
        assert (shared.dead_taps, shared.input_size) == (2, (4,))


class TestGridding:
    def test_twos_see_every_second_voxel_of_their_field(self) -> None:
        # offsets −6, −4 … 6: 7 of 13 on an axis
        report = look(stack([2, 2, 2]))
        assert (report.receptive_field, report.coverage) == ((13, 13), 49 / 169)
        assert "71.0%" in report.warnings[-1]

    def test_a_last_layer_without_dilation_closes_pairs_only(self) -> None:
        # ±2 and ±1 together reach every offset from −3 to 3
        assert look(stack([2, 1])).coverage == 1.0

    def test_one_two_five_sees_everything(self) -> None:
        report = look(stack([1, 2, 5]))
        assert (report.receptive_field, report.coverage, report.warnings) == ((17, 17), 1.0, ())

    def test_branches_are_united_not_added(self) -> None:
        # the 3×3 kernels of rates 1 and 2 share their centre: 9 + 9 − 1 of 25
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = stack([1]), stack([2])

            def forward(self, images: Tensor) -> Tensor:
                return torch.cat((self.a(images), self.b(images)), dim=1)

        assert look(Two()).coverage == 17 / 25


class TestWarnings:
    def test_taps_that_see_only_padding_are_counted(self) -> None:
        layer = look(stack([8]), side=8).layers[0]
        # a shift by 8 leaves a map of 8: only the centre is left
        assert (layer.dead_taps, layer.taps) == (8, 9)
        assert layer.padding_share == pytest.approx(8 / 9, abs=1e-12)  # a sum of ninths in floats

    def test_taps_within_the_map_are_not(self) -> None:
        layer = look(stack([4]), side=8).layers[0]
        # each outer tap meets the map from half of the places: (1/2 + 1 + 1/2) / 3 on an axis
        assert (layer.dead_taps, layer.padding_share) == (0, pytest.approx(1 - (2 / 3) ** 2, abs=1e-12))

    def test_a_stride_larger_than_the_patch(self) -> None:
        assert "larger than the patch" in look(nn.Conv2d(1, 1, 3, stride=16, padding=1), side=8).warnings[-1]

    def test_an_operation_without_a_rule_is_named_and_the_field_not_guessed(self) -> None:
        class Odd(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return torch.linalg.inv(images)

        report = look(Odd(), side=8)
        assert (report.field_is_exact, report.receptive_field) == (False, (8, 8))
        assert "linalg_inv" in report.warnings[0]

    def test_writing_into_a_part_of_a_tensor_is_not_missed(self) -> None:
        class Writes(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                out = images.new_zeros(images.shape)
                out[:, :, 1:] = images[:, :, :-1]
                return out + images

        assert not look(Writes(), dims=1).field_is_exact

    @pytest.mark.parametrize("start", [torch.zeros_like, torch.clone])
    def test_nor_where_what_was_written_into_is_the_output(self, start: Callable[[Tensor], Tensor]) -> None:
        class Writes(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                out = start(images)
                out[:, :, ::2] = images.flip(2)[:, :, ::2]
                return out

        report = look(Writes(), dims=1, side=16)
        assert not report.field_is_exact
        assert "writing into a part" in report.warnings[0]

    def test_adaptive_pooling_to_more_than_a_voxel_has_no_field_of_its_own(self) -> None:
        network = nn.Sequential(stack([1]), nn.AdaptiveAvgPool2d(2), nn.Conv2d(1, 1, 1), nn.Upsample(scale_factor=16))
        report = look(network)
        assert (report.field_is_exact, report.receptive_field) == (False, (32, 32))
        assert "adaptive pooling to 2×2" in report.warnings[0]
        # 32 / 2, at this patch
        assert report.output_stride == 16
        assert [x.field_is_exact for x in report.layers] == [True, False]

    def test_a_mean_over_the_image_is_noted_not_counted(self) -> None:
        class Pooled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = stack([1])

            def forward(self, images: Tensor) -> Tensor:
                return self.conv(images) + images.mean(dim=(2, 3), keepdim=True)

        report = look(Pooled())
        assert (report.receptive_field, report.sees_whole_image) == ((3, 3), True)


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 12, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return shuffle_pixels(self.conv(gather_pixels(images, (2, 3))), (2, 3))[:, :, : images.shape[2]]


class Resized(nn.Module):
    def __init__(self, mode: str, align: bool | None) -> None:
        super().__init__()
        self.conv, self.mode, self.align = nn.Conv2d(1, 1, 3, stride=3, padding=1, bias=False), mode, align

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[2:]
        return functional.interpolate(self.conv(images), size=size, mode=self.mode, align_corners=self.align)


class Enlarged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, stride=4, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return enlarge(self.conv(images), (4, 4), images.shape[2:])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = stack([3, 2]), stack([5])

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat((self.a(images) + images, functional.relu(self.b(images))), dim=1)


class Unpooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.MaxPool2d(2, return_indices=True), stack([1])

    def forward(self, images: Tensor) -> Tensor:
        small, places = self.pool(images)
        flat = torch.zeros_like(images).flatten(2)
        return flat.scatter(2, places.flatten(2), self.conv(small).flatten(2)).reshape(images.shape)


HAND_MADE = {
    "stride and pooling": nn.Sequential(
        nn.Conv2d(1, 1, 3, stride=2, padding=1),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(1, 1, 3, padding=2, dilation=2),
        nn.ConvTranspose2d(1, 1, 4, stride=4),
    ),
    "transposed, overlapping": nn.Sequential(nn.AvgPool2d(2), nn.ConvTranspose2d(1, 1, 3, 2, 1, 1), nn.ReLU()),
    "groups": nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2), nn.Conv2d(4, 2, 1)
    ),
    "replicated border": nn.Conv2d(1, 1, 5, padding=2, padding_mode="replicate"),
    "reflected border": nn.Conv2d(1, 1, 5, padding=2, padding_mode="reflect"),
    "torch's pixel shuffle": nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 4, 3, padding=1), nn.PixelShuffle(2)),
    "pixel shuffle": Shuffled(),
    "enlarged": Enlarged(),
    "linear, corners": Resized("bilinear", True),
    "linear, centres": Resized("bilinear", False),
    "nearest": Resized("nearest", None),
    "branches": Branches(),
    "unpooling": Unpooled(),
}


class TestMeasured:
    @pytest.mark.parametrize("name", HAND_MADE)
    @pytest.mark.parametrize("voxel", [(12, 18), (13, 11), (0, 23), (11, 1)])
    def test_the_voxels_that_reach_an_output_are_those_with_a_gradient(self, name: str, voxel: tuple[int, int]) -> None:
        network, shape = HAND_MADE[name], (24, 24)
        measured = measured_field(network, 2, 1, shape, voxel)
        assert measured.any()
        assert np.array_equal(field_at(network, in_channels=1, shape=shape, voxel=voxel), measured)

    @pytest.mark.parametrize("name", ["deeplabv3", "deeplabv3plus"])
    @pytest.mark.parametrize("shape", [(181,), (34, 37), (17, 18, 19)])
    def test_of_networks_too(self, name: str, shape: tuple[int, ...]) -> None:
        small = {"channels": (8, 8, 8), "aspp_rates": (1, 3), "aspp_channels": 8, "decoder_channels": 8}
        config = NetworkConfig.model_validate({"name": name, "skip_channels": 8, **small})
        network = build_network(config, spatial_dims=len(shape), in_channels=2, out_channels=2)
        voxel = tuple(n // 3 for n in shape)
        measured = measured_field(network, len(shape), 2, shape, voxel)
        assert np.array_equal(field_at(network, in_channels=2, shape=shape, voxel=voxel), measured)

    def test_the_field_is_the_largest_over_the_phases_of_the_stride(self) -> None:
        # by 4 and back: the field of a voxel on the grid is narrower than that of one between two of its points
        network = Enlarged()
        widths = [
            int(field_at(network, in_channels=1, shape=(64, 64), voxel=(32 + n, 32)).any(axis=1).sum())
            for n in range(4)
        ]
        assert widths == [3, 6, 6, 6]
        assert look(network).receptive_field == (7, 7)


class TestWidth:
    def test_of_a_network_that_is_thinned_to_a_target(self) -> None:
        config = NetworkConfig(name="deeplabv3plus")
        thin = fit_width(config, spatial_dims=2, in_channels=1, out_channels=2, shape=(64, 64), parameters=200_000)
        parameters, _ = count(build_bare(thin, 2, 1, 2), spatial_dims=2, in_channels=1, shape=(64, 64))
        # channels move in steps of eight, which are a third of the thinnest layers here
        assert 140_000 < parameters <= 204_000

    def test_without_a_target_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="exactly one target"):
            fit_width(NetworkConfig(), spatial_dims=2, in_channels=1, out_channels=2, shape=(64, 64))

    def test_counting_leaves_the_network_as_it_is(self) -> None:
        network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)).train()
        assert count(network, spatial_dims=2, in_channels=1, shape=(8, 8)) == (12, 9 * 36)
        assert network.training
        assert network[0].weight.device.type == "cpu"


def test_the_report_as_json_has_lists_by_axis() -> None:
    found = look(stack([2]), side=16).as_dict()
    wanted = {"name", "spatial_dims", "parameters", "multiply_adds", "output_stride", "receptive_field", "coverage"}
    assert wanted | {"layers", "warnings"} <= set(found)
    layer = found["layers"][0]
    assert (found["receptive_field"], layer["kernel"], layer["dilation"]) == ([5, 5], [3, 3], [2, 2])
    assert {"name", "effective_kernel", "stride", "output_size", "receptive_field", "parameters"} <= set(layer)
