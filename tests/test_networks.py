"""One contract for every network in 1D, 2D and 3D, and what is particular to each; encoders have their own tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fields import measured_field
from safetensors.torch import load, save
from torch import Tensor, nn

import medseg.networks as networks
from medseg.config import NetworkConfig, read_yaml
from medseg.errors import ConfigError, DataError, MedsegError
from medseg.networks import at_output_stride, build_network, default_config, fit_to_patch, halvings, list_networks
from medseg.networks._blocks import enlarge
from medseg.networks.dilated_frontend import ContextModule
from medseg.networks.fcn import UpConvolution
from medseg.networks.receptive import analyse, field_at

DIMS = (1, 2, 3)
ODD_SHAPES = {1: (67,), 2: (43, 37), 3: (19, 23, 17)}
# small forms: a smaller stride than published where that lets a small volume through
TINY: dict[str, Any] = {
    "channels": (4, 8, 8),
    "encoder": "light",
    "output_stride": 4,
    "hidden_channels": 8,
    "aspp_channels": 8,
    "skip_channels": 4,
    "decoder_channels": 8,
    "aspp_rates": (1, 2),
    "norm": "instance",
    "leak": 0.01,
    "width": 1.0,
}
OWN: dict[str, dict[str, Any]] = {
    "dilated_stack": {"channels": (8,), "dilations": (1, 2, 4)},
    "dilated_frontend": {"encoder": "vgg16_frontend", "width": 1 / 64},
    "dilated_context": {"encoder": "vgg16_frontend", "width": 1 / 64, "dilations": (1, 1, 2, 3, 2, 1, 1)},
    "deeplabv1": {"encoder": "vgg16", "width": 1 / 64},
    "deeplabv2": {"encoder": "vgg16", "width": 1 / 64},
    "deconvnet": {"width": 1 / 64, "hidden_channels": 8},
    # three strides to fuse
    "fcn8s": {"output_stride": 8},
    # one of the three with its published encoder
    "fcn16s": {"encoder": "vgg16", "width": 1 / 64},
}
DECONVNET_SHAPES = {1: (67,), 2: (43, 37), 3: (34, 35, 33)}


def tiny(name: str, **changes: Any) -> NetworkConfig:
    published = default_config(name).model_dump()
    return NetworkConfig.model_validate(published | TINY | OWN.get(name, {}) | changes)


def odd_shape(name: str, dims: int) -> tuple[int, ...]:
    return (DECONVNET_SHAPES if name == "deconvnet" else ODD_SHAPES)[dims]


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(config: NetworkConfig, dims: int, *, in_channels: int = 2, out_channels: int = 3) -> Any:
    torch.manual_seed(0)
    return build_network(config, spatial_dims=dims, in_channels=in_channels, out_channels=out_channels)


each_network = pytest.mark.parametrize("name", list_networks())
each_dimension = pytest.mark.parametrize("dims", DIMS)
each_norm = pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])


@each_network
@each_dimension
class TestContract:
    def test_odd_shapes_come_back(self, name: str, dims: int) -> None:
        shape = odd_shape(name, dims)
        assert make(tiny(name), dims)(image(2, 2, *shape)).shape == (2, 3, *shape)

    def test_gradient_reaches_every_parameter(self, name: str, dims: int) -> None:
        network = make(tiny(name), dims)
        logits = network(image(1, 2, *odd_shape(name, dims)))
        (logits * image(*logits.shape, seed=1)).sum().backward()
        # a parameter that does not matter would have none, or rounding noise far below the others
        weak = [n for n, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
        assert weak == []

    def test_a_batch_of_one_trains_at_the_smallest_shape(self, name: str, dims: int) -> None:
        network = make(tiny(name), dims).train()
        shape = network.min_shape
        logits = network(image(1, 2, *shape))
        logits.square().sum().backward()
        assert logits.shape == (1, 3, *shape)
        assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters())

    def test_safetensors_keep_every_bit(self, name: str, dims: int) -> None:
        one, other = make(tiny(name), dims).eval(), make(tiny(name), dims).eval()
        for parameter in other.parameters():
            nn.init.ones_(parameter)
        other.load_state_dict(load(save({k: v.contiguous() for k, v in one.state_dict().items()})))
        x = image(1, 2, *odd_shape(name, dims))
        with torch.no_grad():
            assert torch.equal(one(x), other(x))

    def test_a_trace_holds_for_other_sizes(self, name: str, dims: int) -> None:
        network = make(tiny(name), dims).eval()
        shape = odd_shape(name, dims)
        traced = torch.jit.trace(network, image(1, 2, *shape), check_trace=False)  # type: ignore[no-untyped-call]
        x = image(2, 2, *(n + 6 for n in shape))
        with torch.no_grad():
            # single precision, kernels in another order
            torch.testing.assert_close(traced(x), network(x), atol=1e-4, rtol=1e-4)

    def test_the_computed_field_is_that_of_the_gradient(self, name: str, dims: int) -> None:
        network, shape = make(tiny(name), dims), odd_shape(name, dims)
        for voxel in (tuple(n // 2 for n in shape), tuple(n // 3 for n in shape)):
            computed = field_at(network, in_channels=2, shape=shape, voxel=voxel)
            assert np.array_equal(computed, measured_field(network, dims, 2, shape, voxel))


@each_network
def test_the_reported_field_is_the_widest_measured(name: str) -> None:
    network = make(tiny(name), 1)
    report = analyse(network, spatial_dims=1, in_channels=2, shape=(128,))
    side = 3 * report.receptive_field[0] + 64
    middle = side // 2
    widest = 0
    for voxel in range(middle, middle + int(report.output_stride)):
        seen = np.flatnonzero(measured_field(network, 1, 2, (side,), (voxel,)))
        widest = max(widest, int(seen[-1] - seen[0] + 1))
    assert (report.field_is_exact, report.receptive_field) == (True, (widest,))


@each_network
@each_norm
def test_every_norm_trains(name: str, norm: str) -> None:
    network = make(tiny(name, norm=norm), 2).train()
    logits = network(image(2, 2, 43, 37))
    logits.square().mean().backward()
    assert any("Norm" in type(m).__name__ for m in network.modules()) == (norm != "none")
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())


# in deconvnet a rounded maximum lies elsewhere, and unpooling puts it there: closeness means nothing
@pytest.mark.parametrize("name", sorted({*list_networks()} - {"deconvnet"}))
def test_bf16_autocast_in_channels_last_stays_close(name: str) -> None:
    network = make(tiny(name), 3).eval()
    x = image(2, 2, *odd_shape(name, 3))
    with torch.no_grad():
        exact = network(x)
        network = network.to(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x.to(memory_format=torch.channels_last_3d)).float()
    # bf16 keeps 8 bits: 0.4 % a step, over some 20 to 50 layers
    assert (rounded - exact).abs().mean() < 0.08 * exact.std()


@each_network
def test_exports_with_free_batch_and_sizes(name: str) -> None:
    network = make(tiny(name), 2).eval()
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(network, (image(2, 2, 48, 64),), dynamic_shapes=(free,))
    x = image(3, 2, 64, 80)
    torch.testing.assert_close(program.module()(x), network(x), atol=1e-4, rtol=1e-4)


@each_network
def test_too_small_an_input_names_the_smallest(name: str) -> None:
    network = make(tiny(name), 2)
    least = network.min_shape
    with pytest.raises(DataError, match=rf"\({least[0]}, 1\).*at least \({least[0]}, {least[1]}\)"):
        network(image(1, 2, least[0], 1))


@each_network
def test_wrong_channels_and_axes_are_named(name: str) -> None:
    network = make(tiny(name), 2)
    with pytest.raises(DataError, match="has 1 channels, the network was built for 2"):
        network(image(1, 1, 64, 64))
    with pytest.raises(DataError, match="5 axes, expected 4"):
        network(image(1, 2, 64, 64, 64))


@each_network
def test_width_scales_the_parameters(name: str) -> None:
    config = tiny(name, channels=(16,) if name == "dilated_stack" else (16, 32, 32), aspp_channels=16, width=1.0)
    with torch.device("meta"):
        whole, half = (
            build_network(c, spatial_dims=1, in_channels=1, out_channels=2)
            for c in (config, config.model_copy(update={"width": 0.5}))
        )
    sizes = [sum(p.numel() for p in n.parameters()) for n in (whole, half)]
    # kernels between layers go with the square of the width, those at the image and at the classes with the width
    assert sizes[1] < 0.5 * sizes[0]


class TestRegister:
    def test_the_literature_is_there(self) -> None:
        assert set(list_networks()) == {
            *("fcn32s", "fcn16s", "fcn8s", "deconvnet", "unet", "dilated_frontend", "dilated_context", "deeplabv1"),
            *("deeplabv2", "deeplabv3", "deeplabv3_cascade", "deeplabv3plus", "hdc", "dilated_stack", "residual_unet"),
        }

    @each_network
    def test_each_has_a_configuration_that_says_what_is_published(self, name: str) -> None:
        file = Path(__file__).parents[1] / "configs" / "networks" / f"{name}.yaml"
        values = read_yaml(file)
        assert set(values) == {"network"}
        assert NetworkConfig.model_validate(values["network"]) == default_config(name)

    def test_a_file_joins_by_being_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = ["from torch import nn", 'DEFAULTS = {"house.one": {}, "house.two": {"width": 2}}']
        lines += ["def build(config, **sizes):", "    return nn.Identity()"]
        (tmp_path / "house_of_networks.py").write_text("\n".join(lines))
        monkeypatch.setattr(networks, "__path__", [*networks.__path__, str(tmp_path)])
        caches = (networks._modules, networks._networks, networks._wrappers)
        for cache in caches:
            cache.cache_clear()
        try:
            assert {"house.one", "house.two", "deeplabv3"} <= set(list_networks())
            assert isinstance(build_network("house.two", spatial_dims=2, in_channels=1, out_channels=1), nn.Identity)
            assert default_config("house.two").width == 2
        finally:
            for cache in caches:
                cache.cache_clear()

    def test_the_usual_network_keeps_its_size(self) -> None:
        network = build_network("deeplabv3plus", spatial_dims=3, in_channels=1, out_channels=3)
        assert sum(p.numel() for p in network.parameters()) == 2_887_672

    def test_a_wrong_name_lists_the_closest_first(self) -> None:
        with pytest.raises(ConfigError, match=r"no `deeplabv3pluss`; choose from deeplabv3plus, deeplabv3"):
            build_network("deeplabv3pluss", spatial_dims=2, in_channels=1, out_channels=2)

    @pytest.mark.parametrize(("dims", "channels"), [(4, 1), (0, 1), (2, 0)])
    def test_impossible_numbers_are_refused(self, dims: int, channels: int) -> None:
        with pytest.raises(ConfigError, match=f"spatial_dims={dims}, in_channels={channels}"):
            build_network("deeplabv3", spatial_dims=dims, in_channels=channels, out_channels=2)

    def test_arguments_are_for_monai_alone(self) -> None:
        config = NetworkConfig(name="unet", arguments={"filters": 3})
        with pytest.raises(ConfigError, match=r"network.arguments: filters found, but `unet` takes none"):
            build_network(config, spatial_dims=2, in_channels=1, out_channels=2)


class TestOutputStride:
    """Trained at one stride, used at another, with the weights unchanged."""

    @pytest.mark.parametrize(
        "name", ["deeplabv1", "deeplabv2", "deeplabv3_cascade", "dilated_frontend", "dilated_context"]
    )
    def test_a_denser_grid_passes_through_the_same_scores(self, name: str) -> None:
        # no statistics over space; `interpolate` leaves map voxel i on voxel i·stride
        config = tiny(name, output_stride=16, norm="none", upsampling="interpolate", image_pooling=False, width=1 / 32)
        if config.encoder == "light":
            config = config.model_copy(update={"encoder": "resnet18"})
        if name == "dilated_frontend" or name == "dilated_context":
            # its late poolings go when they lose their stride: only an encoder that keeps them is the same denser
            config = config.model_copy(update={"encoder": "vgg16"})
        coarse = make(config, 2).eval()
        dense = make(at_output_stride(config, 8, spatial_dims=2), 2).eval()
        dense.load_state_dict(coarse.state_dict())
        x = image(1, 2, 81, 97)
        with torch.no_grad():
            a, b = coarse(x)[..., ::16, ::16], dense(x)[..., ::16, ::16]
        assert a.std() > 0
        torch.testing.assert_close(a, b, atol=1e-4 * float(a.std()), rtol=1e-4)
        assert not torch.allclose(coarse(x), dense(x), atol=1e-3 * float(a.std()))

    def test_rates_are_counted_in_the_new_voxels(self) -> None:
        config = NetworkConfig(name="deeplabv3", encoder="resnet18", output_stride=16, aspp_rates=(6, (3, 12)))
        assert at_output_stride(config, 8, spatial_dims=2).aspp_rates == (12, (6, 24))
        with pytest.raises(
            ConfigError, match=r"\(3, 12\) of network.aspp_rates at stride \(16, 16\) is no whole number"
        ):
            at_output_stride(config, 32, spatial_dims=2)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (NetworkConfig(name="unet"), "`unet` has no output stride"),
            (NetworkConfig(name="deconvnet"), "`deconvnet` has no output stride"),
            (NetworkConfig(name="monai.SegResNet"), "`monai.SegResNet` has no output stride"),
            (NetworkConfig(name="deeplabv1", encoder="vgg16_frontend", output_stride=16), "loses its late poolings"),
            (
                NetworkConfig(name="deeplabv3plus", encoder="resnet18", output_stride=16),
                "would take its skip at stride",
            ),
            (NetworkConfig(name="fcn8s", encoder="vgg16", output_stride=32), "learned their strides"),
            (default_config("deeplabv3"), "train with network.upsampling=interpolate"),
        ],
    )
    def test_what_would_be_something_else_is_refused(self, config: NetworkConfig, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            at_output_stride(config, 4 if config.name == "deeplabv3plus" else 8, spatial_dims=2)

    def test_a_hybrid_backbone_refuses(self) -> None:
        config = NetworkConfig(name="hdc", encoder="resnet18", output_stride=16)
        with pytest.raises(ConfigError, match="train it at the one you want"):
            at_output_stride(config, 8, spatial_dims=2)


class TestParticulars:
    @pytest.mark.parametrize("factors", [(4,), (2, 3), (1, 2, 4)])
    def test_up_convolutions_begin_as_interpolation(self, factors: tuple[int, ...]) -> None:
        maps = image(2, 3, *(5,) * len(factors))
        shape = tuple(5 * f - (1 if f > 1 else 0) for f in factors)
        # sums of at most 8 products of single precision
        torch.testing.assert_close(
            UpConvolution(3, factors)(maps, shape), enlarge(maps, factors, shape), atol=1e-5, rtol=0
        )

    def test_finer_fcns_begin_as_the_coarser(self) -> None:
        x = image(1, 2, 43, 37)
        coarse, fine = (make(tiny(n, output_stride=8), 2).eval() for n in ("fcn32s", "fcn8s"))
        state = fine.state_dict()
        fine.load_state_dict({k: coarse.state_dict().get(k, v) if "ups" not in k else v for k, v in state.items()})
        # interpolation by 8 in one step and in three differ nowhere but at the far border
        torch.testing.assert_close(coarse(x)[..., :33, :33], fine(x)[..., :33, :33], atol=1e-4, rtol=0)

    def test_fcn8s_needs_three_strides(self) -> None:
        with pytest.raises(ConfigError, match=r"fcn8s fuses 3 strides, network.output_stride 4 leaves 2"):
            make(tiny("fcn8s", output_stride=4), 2)

    @pytest.mark.parametrize("encoder", ["light", "resnet50", "resnet101"])
    def test_without_a_norm_a_residual_encoder_begins_calm(self, encoder: str) -> None:
        network = make(tiny("deeplabv3", encoder=encoder, norm="none", width=1 / 8, channels=(32, 64, 64)), 2).eval()
        convs = [m for m in network.encoder.modules() if isinstance(m, nn.Conv2d)]
        assert all(c.bias is not None for c in convs)
        # of the order of one, where 33 branches that each doubled the variance would give 2 ** 16
        assert 0.01 < float(network(image(2, 2, 64, 64)).std()) < 100

    def test_group_norm_of_monais_unet_divides_every_width(self) -> None:
        network = make(tiny("unet", norm="group", channels=(48, 80)), 2, out_channels=48)
        groups = {m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)}
        # 48 / 16 = 3 groups, 80 / 16 = 5: the greatest number that divides both
        assert groups == {1}

    @pytest.mark.parametrize("name", ["unet", "residual_unet", "deconvnet", "deeplabv3"])
    def test_strides_of_too_few_axes_are_named(self, name: str) -> None:
        strides = ((2, 2),) * halvings(tiny(name))
        with pytest.raises(ConfigError, match=r"network.strides\[0\] is \(2, 2\), expected 3 numbers"):
            make(tiny(name, strides=strides), 3)

    def test_many_classes_cost_an_fcn_little(self) -> None:
        with torch.device("meta"):
            network = build_network("fcn32s", spatial_dims=3, in_channels=1, out_channels=61)
        assert sum(p.numel() for n, p in network.named_parameters() if n.startswith("ups")) == 61 * 64**3

    @pytest.mark.parametrize("kind", ["basic", "large"])
    def test_the_context_module_begins_by_passing_its_classes_on(self, kind: str) -> None:
        torch.manual_seed(0)
        module = ContextModule(2, 3, (1, 1, 2, 4, 8, 16, 1), kind=kind)
        module.pass_through()
        x = image(1, 3, 9, 11).abs()
        y = module(x)
        each = y.shape[1] // 3
        means = y.reshape(1, 3, each, 9, 11).mean(2)
        # the noise of `large`: seven layers of 1 % of the weight on nine taps
        torch.testing.assert_close(means, x, atol=1e-6 if kind == "basic" else 0.3, rtol=0)

    def test_the_basic_context_sees_67_voxels(self) -> None:
        module = ContextModule(2, 2, (1, 1, 2, 4, 8, 16, 1), kind="basic")
        report = analyse(module, spatial_dims=2, in_channels=2, shape=(128, 128))
        assert report.receptive_field == (67, 67)

    def test_the_context_module_has_seven_layers(self) -> None:
        with pytest.raises(ConfigError, match=r"network.dilations has 2 entries, the context module has 7 layers"):
            make(tiny("dilated_context", dilations=(1, 2)), 2)

    def test_hybrid_dilations_go_from_convolution_to_convolution(self) -> None:
        network = make(tiny("hdc", channels=(4, 8, 8, 8), output_stride=4, dilations=(1, 2, 5)), 2)
        found = [c.dilation[0] for s in network.encoder.stages[2:] for b in s for c in (b.conv1, b.conv2)]
        assert found == [1, 2, 5, 1, 2, 5, 1, 2]

    def test_hybrid_dilations_need_a_dilated_stage(self) -> None:
        with pytest.raises(ConfigError, match="leaves `hdc` with no dilated stage"):
            make(tiny("hdc", channels=(4, 8), output_stride=4), 2)
        with pytest.raises(ConfigError, match="vgg16 has no residual blocks"):
            make(tiny("hdc", encoder="vgg16"), 2)

    def test_the_cascade_doubles_the_dilation_three_times(self) -> None:
        network = make(tiny("deeplabv3_cascade", encoder="resnet18", output_stride=16, multi_grid=(1, 2)), 1)
        layers = [getattr(network.encoder, f"layer{n}") for n in (4, 5, 6, 7)]
        assert [[b.conv2.dilation[0] for b in layer] for layer in layers] == [[2, 4], [4, 8], [8, 16], [16, 32]]
        strided = default_config("deeplabv3_cascade").model_copy(update={"encoder": "resnet18", "output_stride": 256})
        with torch.device("meta"):
            assert build_network(strided, spatial_dims=2, in_channels=1, out_channels=2).min_shape == (257, 257)

    def test_a_separable_aspp_is_smaller_and_sees_the_same(self) -> None:
        plain, separable = (
            analyse(
                make(tiny("deeplabv3plus", separable=s, aspp_channels=32, decoder_channels=32), 2),
                spatial_dims=2,
                in_channels=2,
                shape=(64, 64),
            )
            for s in (False, True)
        )
        assert separable.receptive_field == plain.receptive_field
        assert separable.parameters < 0.8 * plain.parameters

    def test_a_plain_stack_is_the_textbooks(self) -> None:
        config = NetworkConfig(name="dilated_stack", gated=False, channels=(256,), dilations=(1, 2, 4), norm="none")
        with torch.device("meta"):
            network = build_network(config, spatial_dims=2, in_channels=256, out_channels=2)
        report = analyse(network, spatial_dims=2, in_channels=256, shape=(64, 64))
        weights = sum(
            p.numel() for n, p in network.named_parameters() if n.startswith("layers") and n.endswith("weight")
        )
        assert (report.receptive_field, weights) == ((15, 15), 1_769_472)

    def test_dilations_beyond_the_patch_are_left_out(self) -> None:
        fitted = fit_to_patch(default_config("dilated_stack"), (64, 40))
        assert fitted.dilations == (1, 2, 4, 8, 16, 32)

    def test_rates_are_capped_by_the_patch(self) -> None:
        # maps of 32 × 16 voxels: (n − 1) // 2 is 15 and 7
        assert fit_to_patch(default_config("deeplabv2"), (256, 128)).aspp_rates == (6, (12, 7), (15, 7))

    def test_rates_are_capped_by_the_stride_of_each_axis(self) -> None:
        # maps of 16 × 16 × 12 voxels: (n − 1) // 2 is 7, 7 and 5; at a stride of 4 all over it would be 1 on the last
        strides = ((2, 2, 1), (2, 2, 1), (2, 2, 2))
        config = default_config("deeplabv3plus").model_copy(update={"strides": strides, "output_stride": 4})
        fitted = fit_to_patch(config.model_copy(update={"aspp_rates": (2, 4, 6)}), (64, 64, 12))
        assert fitted.aspp_rates == (2, 4, (6, 6, 5))

    @pytest.mark.parametrize(
        ("name", "steps"),
        [("unet", 2), ("residual_unet", 2), ("deeplabv3_cascade", 6), ("deconvnet", 5), ("dilated_stack", 0)],
    )
    def test_strides_by_axis(self, name: str, steps: int) -> None:
        config = tiny(name, **({} if name == "dilated_stack" else {"channels": (4, 8, 8)}))
        assert halvings(config) == steps
        strides = ((1, 2, 2), *((2, 2, 2),) * (steps - 1)) if steps else None
        network = make(config.model_copy(update={"strides": strides}), 3)
        shape = tuple(max(n, 19) for n in network.min_shape)
        assert network(image(1, 2, *shape)).shape == (1, 3, *shape)
        if steps:
            with pytest.raises(ConfigError, match=r"network.strides has 1 entries"):
                make(config.model_copy(update={"strides": ((2, 2, 2),)}), 3)


class TestScales:
    @pytest.mark.parametrize("fusion", ["mean", "max", "attention"])
    @each_dimension
    def test_a_pyramid_around_any_network(self, fusion: str, dims: int) -> None:
        config = tiny("deeplabv3", scales=(0.5, 0.75, 1.0), scale_fusion=fusion)
        network, shape = make(config, dims), odd_shape("deeplabv3", dims)
        logits = network(image(1, 2, *shape))
        (logits * image(*logits.shape, seed=1)).sum().backward()
        assert logits.shape == (1, 3, *shape)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
        assert network.min_shape == (10,) * dims

    def test_weights_are_shared_and_fused_by_name(self) -> None:
        plain = make(tiny("deeplabv3", norm="none", dropout=0.0), 2).eval()
        found = {}
        x = image(1, 2, 40, 40)
        for fusion in ("mean", "max"):
            network = make(
                tiny("deeplabv3", norm="none", dropout=0.0, scales=(0.5, 1.0), scale_fusion=fusion), 2
            ).eval()
            network.network.load_state_dict(plain.state_dict())
            found[fusion] = network(x)
        half = nn.functional.interpolate(
            plain(nn.functional.interpolate(x, size=(20, 20), mode="bilinear")), size=(40, 40), mode="bilinear"
        )
        torch.testing.assert_close(found["mean"], (plain(x) + half) / 2, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["max"], torch.maximum(plain(x), half), atol=1e-5, rtol=1e-5)

    def test_attention_weighs_each_voxel(self) -> None:
        network = make(tiny("deeplabv3", scales=(0.5, 1.0), scale_fusion="attention"), 2).eval()
        last = network.attention[-1]
        nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor([-100.0, 100.0])
        x = image(1, 2, 40, 40)
        # all attention on the second scale, the image itself
        torch.testing.assert_close(network(x), network.network(x), atol=1e-5, rtol=1e-5)

    def test_equal_scales_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"network.scales \[1.0, 1.0\]"):
            make(tiny("deeplabv3", scales=(1.0, 1.0)), 2)


class TestMonai:
    @pytest.mark.parametrize(
        ("name", "dims", "arguments"),
        [
            ("monai.SegResNet", 3, {"init_filters": 8}),
            ("monai.SegResNet", 2, {"init_filters": 8}),
            ("monai.SwinUNETR", 2, {"feature_size": 12}),
            (
                "monai.DynUNet",
                3,
                {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]},
            ),
            ("monai.BasicUNetPlusPlus", 2, {"features": [4, 4, 8, 8, 8, 4]}),
            ("monai.BasicUNet", 3, {"features": [4, 4, 8, 8, 8, 4]}),
        ],
    )
    def test_any_size_goes_through(self, name: str, dims: int, arguments: dict[str, Any]) -> None:
        network = make(NetworkConfig(name=name, arguments=arguments), dims)
        shape = (13, 37, 18)[:dims]
        assert network(image(1, 2, *shape)).shape == (1, 3, *shape)
        assert list(copy.deepcopy(network).state_dict()) == [f"network.{k}" for k in network.network.state_dict()]

    @pytest.mark.parametrize(
        ("name", "arguments", "message"),
        [
            (
                "monai.SegRessNet",
                {},
                "`monai.SegRessNet` is none of MONAI.s segmentation networks; choose from monai.SegResNet",
            ),
            ("monai.SegResNet", {"init_filter": 8}, "has no `init_filter`; closest are init_filters"),
            ("monai.SegResNet", {"out_channels": 8}, "`out_channels` comes from the data; leave it out"),
            ("monai.DynUNet", {"strides": [1, 2]}, "also needs kernel_size, upsample_kernel_size"),
            ("monai.SegResNet", {"act": "nonsense"}, "monai.SegResNet refused {'act': 'nonsense'}"),
            ("monai.FlexibleUNet", {"backbone": "efficientnet-b0", "pretrained": True}, "would download weights"),
            ("monai.Pooler", {}, "none of MONAI.s segmentation networks"),
            # what could download or read files of another choice
            ("monai.TorchVisionFCModel", {"weights": "DEFAULT"}, "none of MONAI.s segmentation networks"),
            ("monai.Transchex", {"path_or_repo_id": "/tmp", "filename": "x"}, "none of MONAI.s segmentation networks"),
        ],
    )
    def test_wrong_use_is_told(self, name: str, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            make(NetworkConfig(name=name, arguments=arguments), 3)

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            torch.OutOfMemoryError("CUDA out of memory"),
        ],
    )
    def test_memory_that_runs_out_is_no_fault_of_the_arguments(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Large(nn.Module):
            def __init__(self, in_channels: int, out_channels: int) -> None:
                raise error

        monkeypatch.setattr("medseg.networks.monai_networks.find_class", lambda _: Large)
        with pytest.raises(MedsegError, match=r"memory ran out while monai.UNet was built with its defaults") as caught:
            make(NetworkConfig(name="monai.UNet"), 3)
        assert not isinstance(caught.value, ConfigError)
