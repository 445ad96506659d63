"""Weights of other projects give their answers here; what cannot fit is said, what is unsafe or broken is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyRun
from monai.networks.nets.resnet import ResNet, ResNetBlock, ResNetBottleneck
from safetensors.torch import save_file
from torch import Tensor, nn

import medseg
from medseg.asked import plan_run
from medseg.cli import run
from medseg.config import NetworkConfig
from medseg.datasets import read_dataset
from medseg.errors import ConfigError, ModelError
from medseg.model import new_network, read_model
from medseg.networks import build_network
from medseg.pretrained import Pretrained, Row, load_pretrained, read_weights

# float32 has 24 bits, 6e-8 of a value; where the order of sums or the place of a factor differs, dozens of layers lose
# a few of them
ROUNDING = 1e-5
BLOCKS = {"resnet18": (ResNetBlock, [2, 2, 2, 2]), "resnet50": (ResNetBottleneck, [3, 4, 6, 3])}


def deeplab(spatial_dims: int = 3, in_channels: int = 1, out_channels: int = 2, **settings: Any) -> nn.Module:
    """DeepLabv3 of an eighth of the usual width, by default with a ResNet-18 at output stride 32."""
    base = {"name": "deeplabv3", "encoder": "resnet18", "output_stride": 32, "width": 0.125, "norm": "batch"}
    config = NetworkConfig.model_validate(base | {"aspp_channels": 64, "aspp_rates": (1, 2), "leak": 0.0} | settings)
    torch.manual_seed(1)
    return build_network(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels).eval()


def monai_resnet(spatial_dims: int = 3, name: str = "resnet18", in_channels: int = 1, **arguments: Any) -> ResNet:
    """MONAI's ResNet of an eighth of the usual width, with the stem of the paper."""
    block, depths = BLOCKS[name]
    arguments = {"shortcut_type": "B", "bias_downsample": False} | arguments
    torch.manual_seed(2)
    network = ResNet(
        block, depths, [8, 16, 32, 64], spatial_dims, in_channels, conv1_t_stride=2, num_classes=3, **arguments
    )
    return stir(network)


def stir(network: Any) -> Any:
    """Batch norms that have seen something, so that each of their numbers matters."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return network.eval().requires_grad_(False)


def monai_maps(network: ResNet, images: Tensor) -> Tensor:
    maps = network.maxpool(network.act(network.bn1(network.conv1(images))))
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        maps = layer(maps)
    return maps


def last_map(network: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network.encoder(images)[-1]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() < ROUNDING * theirs.abs().max()


def load(network: nn.Module, state: dict[str, Any], folder: Path, *, spatial_dims: int = 3) -> Pretrained:
    path = folder / "weights.pth"
    torch.save(state, path)
    return load_pretrained(network, path, spatial_dims=spatial_dims)


def row(found: Pretrained, *, there: str = "", here: str = "") -> Row:
    """The row of a key there, or here."""
    (one,) = (r for r in found.rows if (r.key_there == there if there else r.key_here == here))
    return one


# ---- ResNets of MONAI and MedicalNet


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {}),
        ("resnet18", {"bias_downsample": True}),
        ("resnet18", {"shortcut_type": "A"}),
        ("resnet50", {}),
    ],
)
def test_resnets_of_monai_give_the_same_maps(
    tmp_path: Path, spatial_dims: int, name: str, arguments: dict[str, Any]
) -> None:
    theirs, ours = monai_resnet(spatial_dims, name, **arguments), deeplab(spatial_dims, encoder=name)
    for key, value in theirs.state_dict().items():
        if key.endswith("downsample.0.bias"):
            value.normal_()
    load(ours, theirs.state_dict(), tmp_path, spatial_dims=spatial_dims)
    images = torch.randn(2, 1, *(65, 50, 33)[:spatial_dims])
    assert_close(last_map(ours, images), monai_maps(theirs, images))


def test_each_key_of_a_resnet_is_accounted_for(tmp_path: Path) -> None:
    theirs, ours = monai_resnet(), deeplab()
    found = load(ours, theirs.state_dict(), tmp_path)
    encoder = [key for key in ours.state_dict() if key.startswith("encoder.")]
    assert [r.key_here for r in found.rows if r.outcome == "loaded"] == encoder
    assert [(r.key_there, r.why) for r in found.rows if r.outcome == "skipped"] == [
        ("fc.weight", "head of the other network"),
        ("fc.bias", "head of the other network"),
    ]
    assert [r.key_here for r in found.rows if r.outcome == "fresh"] == list(ours.state_dict())[len(encoder) :]
    assert row(found, there="conv1.weight") == Row(
        "conv1.weight", "encoder.conv1.weight", (8, 1, 7, 7, 7), (8, 1, 7, 7, 7), "loaded", ""
    )


def test_a_bias_before_a_batch_norm_goes_into_its_mean(tmp_path: Path) -> None:
    found = load(deeplab(), monai_resnet(bias_downsample=True).state_dict(), tmp_path)
    assert row(found, there="layer2.0.downsample.0.bias").outcome == "adapted"
    assert row(found, there="layer2.0.downsample.1.running_mean").why == "less layer2.0.downsample.0.bias"


def test_shortcuts_without_weights_become_the_identity(tmp_path: Path) -> None:
    ours = deeplab()
    found = load(ours, monai_resnet(shortcut_type="A").state_dict(), tmp_path)
    assert row(found, here="encoder.layer2.0.downsample.0.weight").outcome == "adapted"
    kernel = ours.state_dict()["encoder.layer2.0.downsample.0.weight"].flatten(1)
    assert torch.equal(kernel, torch.eye(16, 8))


def test_a_file_of_medicalnet_gives_the_same_maps(tmp_path: Path) -> None:
    theirs, ours = monai_resnet(), deeplab()
    state = {f"module.{key}": value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    state |= {"module.conv_seg.0.weight": torch.ones(64, 4, 2, 2, 2), "module.conv_seg.0.bias": torch.ones(4)}
    path = tmp_path / "resnet_18_23dataset.pth.tar"
    content = {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1, "state": {0: torch.ones(3)}}}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    found = load_pretrained(ours, path, spatial_dims=3)
    images = torch.randn(1, 1, 40, 33, 50)
    assert_close(last_map(ours, images), monai_maps(theirs, images))
    assert row(found, there="module.conv_seg.0.weight").why == "head of the other network"


def test_strides_and_dilations_do_not_matter(tmp_path: Path) -> None:
    ours = deeplab(output_stride=8, strides=((2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)))
    found = load(ours, monai_resnet().state_dict(), tmp_path)
    assert not any(r.outcome == "fresh" and r.key_here.startswith("encoder.") for r in found.rows)


# ---- torchvision's DeepLabv3 and VGG-16; test_torchvision_parity.py compares with torchvision itself


def numbers(shape: tuple[int, ...], name: str) -> Tensor:
    """Numbers that depend on the name."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode())))


def norm_keys(name: str, channels: int) -> dict[str, Tensor]:
    state = {f"{name}.{kind}": numbers((channels,), name + kind) for kind in ("weight", "bias", "running_mean")}
    return state | {f"{name}.running_var": torch.ones(channels), f"{name}.num_batches_tracked": torch.tensor(7)}


def deeplabv3_keys(channels: int = 256, width: int = 8, classes: int = 21) -> dict[str, Tensor]:
    """The head of torchvision's DeepLabv3 with two rates, and a stem of its backbone."""
    shapes = {
        "backbone.conv1": (8, 3, 7, 7),
        "classifier.0.convs.0.0": (width, channels, 1, 1),
        "classifier.0.convs.1.0": (width, channels, 3, 3),
        "classifier.0.convs.2.0": (width, channels, 3, 3),
        "classifier.0.convs.3.1": (width, channels, 1, 1),
        "classifier.0.project.0": (width, 4 * width, 1, 1),
        "classifier.1": (width, width, 3, 3),
        "classifier.4": (classes, width, 1, 1),
        "aux_classifier.0": (64, 128, 3, 3),
    }
    state = {f"{name}.weight": numbers(shape, name) for name, shape in shapes.items()}
    norms = ("0.convs.0.1", "0.convs.1.1", "0.convs.2.1", "0.convs.3.2", "0.project.1", "2")
    for norm in norms:
        state |= norm_keys(f"classifier.{norm}", width)
    return state | {"classifier.4.bias": numbers((classes,), "bias")} | norm_keys("backbone.bn1", 8)


PLACES = {
    "backbone.conv1.weight": "encoder.conv1.weight",
    "backbone.bn1.running_mean": "encoder.bn1.running_mean",
    "classifier.0.convs.0.0.weight": "aspp.branches.0.0.weight",
    "classifier.0.convs.2.0.weight": "aspp.branches.2.0.weight",
    "classifier.0.convs.2.1.bias": "aspp.branches.2.1.bias",
    "classifier.0.convs.3.1.weight": "aspp.pooling.conv.weight",
    "classifier.0.convs.3.2.running_var": "aspp.pooling.norm.running_var",
    "classifier.0.project.0.weight": "aspp.project.weight",
    "classifier.0.project.1.weight": "aspp.norm.weight",
    "classifier.1.weight": "head.0.weight",
    "classifier.2.num_batches_tracked": "head.1.num_batches_tracked",
    "classifier.4.weight": "classifier.conv.weight",
    "classifier.4.bias": "classifier.conv.bias",
}


def test_every_part_of_torchvisions_deeplabv3_finds_its_place(tmp_path: Path) -> None:
    ours = deeplab(2, 3, 21, encoder="resnet50", upsampling="resize")
    state = deeplabv3_keys()
    found = load(ours, state, tmp_path, spatial_dims=2)
    here = ours.state_dict()
    for there, place in PLACES.items():
        assert row(found, there=there).outcome == "loaded"
        assert torch.equal(here[place], state[there]), place
    assert [r.key_there for r in found.rows if r.outcome == "skipped"] == ["aux_classifier.0.weight"]


def test_a_head_of_other_classes_is_left_as_initialised(tmp_path: Path) -> None:
    ours = deeplab(2, 3, 5, encoder="resnet50", upsampling="resize")
    before = ours.state_dict()["classifier.conv.weight"].clone()
    found = load(ours, deeplabv3_keys(), tmp_path, spatial_dims=2)
    skipped = row(found, there="classifier.4.weight")
    assert (skipped.outcome, skipped.why) == ("skipped", "21 outputs there, 5 here: left as initialised")
    assert torch.equal(ours.state_dict()["classifier.conv.weight"], before)


def test_the_pooled_part_of_the_projection_goes_where_it_is_added(tmp_path: Path) -> None:
    ours, state = deeplab(2, 3, 21, encoder="resnet50", norm="instance"), deeplabv3_keys()
    load(ours, state, tmp_path, spatial_dims=2)
    project, here = state["classifier.0.project.0.weight"], ours.state_dict()
    assert torch.equal(here["aspp.project.weight"], project[:, :24])
    assert torch.equal(here["aspp.pooling.project.weight"], project[:, 24:])
    assert torch.equal(here["aspp.pooling.conv.weight"], state["classifier.0.convs.3.1.weight"])


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_another_norm_takes_the_affine_weights_of_a_batch_norm(tmp_path: Path, norm: str) -> None:
    theirs, ours = monai_resnet(), deeplab(norm=norm)
    found = load(ours, theirs.state_dict(), tmp_path)
    assert torch.equal(ours.state_dict()["encoder.bn1.weight"], theirs.bn1.weight)
    assert row(found, there="bn1.weight").why == "of a batch norm, into another norm"
    skipped = row(found, there="bn1.running_mean")
    assert skipped.outcome == "skipped"
    assert skipped.why == "running statistics of a batch norm, which the norm here does not keep"


VGG_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG_BN_CONVS = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)


def vgg_keys(places: tuple[int, ...], *, norm: bool, in_channels: int = 3) -> dict[str, Tensor]:
    """Torchvision's VGG-16, an eighth as wide; hidden layers of 512 instead of 4096."""
    state: dict[str, Tensor] = {}
    widths = (8, 8, 16, 16, 32, 32, 32, *(64,) * 6)
    for place, width, before in zip(places, widths, (in_channels, *widths)):
        name = f"features.{place}"
        state[f"{name}.weight"] = numbers((width, before, 3, 3), name) / (3 * before**0.5)
        state[f"{name}.bias"] = numbers((width,), f"{name}b")
        if norm:
            state |= norm_keys(f"features.{place + 1}", width)
    shapes = {"classifier.0": (512, 64 * 49), "classifier.3": (512, 512), "classifier.6": (1000, 512)}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": numbers(shape, name) / 30, f"{name}.bias": numbers(shape[:1], name)}
    return state


def test_vgg16_fills_a_fully_convolutional_network(tmp_path: Path) -> None:
    settings = NetworkConfig(
        name="fcn32s", encoder="vgg16", output_stride=32, norm="none", width=0.125, hidden_channels=4096
    )
    ours = build_network(settings, spatial_dims=2, in_channels=3, out_channels=4)
    state = vgg_keys(VGG_CONVS, norm=False)
    found = load(ours, state, tmp_path, spatial_dims=2)
    here = ours.state_dict()
    assert torch.equal(here["encoder.blocks.2.1.0.weight"], state["features.12.weight"])
    assert torch.equal(here["encoder.blocks.4.2.0.bias"], state["features.28.bias"])
    # on maps of 7 × 7 the kernel gives what the fully connected layer gives
    maps = torch.randn(2, 64, 7, 7)
    connected = maps.flatten(1) @ state["classifier.0.weight"].T
    as_kernel = nn.functional.conv2d(maps, here["fully.0.0.weight"]).flatten(1)
    assert_close(as_kernel, connected)
    assert torch.equal(here["fully.2.0.weight"][:, :, 0, 0], state["classifier.3.weight"])
    assert row(found, there="classifier.6.weight").why == "head of the other network"


def test_batch_norms_are_folded_into_kernels_where_there_is_no_norm(tmp_path: Path) -> None:
    normed, bare = (deeplab(2, 3, encoder="vgg16", norm=norm) for norm in ("batch", "none"))
    state = vgg_keys(VGG_BN_CONVS, norm=True)
    load(normed, state, tmp_path, spatial_dims=2)
    found = load(bare, state, tmp_path, spatial_dims=2)
    images = torch.randn(1, 3, 64, 50)
    assert_close(last_map(bare, images), last_map(normed, images))
    assert row(found, there="features.1.running_var").why == "into features.0, which has no norm after it here"


def test_batch_norms_without_weights_of_their_own_are_folded_as_ones_and_zeros(tmp_path: Path) -> None:
    state = vgg_keys(VGG_BN_CONVS, norm=True)
    norms = [key.removesuffix(".running_mean") for key in state if key.endswith(".running_mean")]
    for norm in norms:
        width = state[f"{norm}.running_mean"].shape
        state[f"{norm}.weight"], state[f"{norm}.bias"] = torch.ones(width), torch.zeros(width)
    expected, bare = (deeplab(2, 3, encoder="vgg16", norm="none") for _ in range(2))
    load(expected, state, tmp_path, spatial_dims=2)
    own = {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}
    load(bare, {key: value for key, value in state.items() if key not in own}, tmp_path, spatial_dims=2)
    images = torch.randn(1, 3, 64, 50)
    assert torch.equal(last_map(bare, images), last_map(expected, images))


# ---- other dimensions


def test_inflated_weights_give_the_same_answer_where_nothing_changes_along_the_new_axis(tmp_path: Path) -> None:
    theirs, ours = monai_resnet(2), deeplab(3)
    found = load(ours, theirs.state_dict(), tmp_path)
    image = torch.randn(1, 1, 33, 40)
    # 16 maps deep; the middle one is 8 · 32 voxels from the padding, and the field reaches 217 to each side
    volume = image.unsqueeze(-1).expand(-1, -1, -1, -1, 512)
    assert_close(last_map(ours, volume)[..., 8], monai_maps(theirs, image))
    assert row(found, there="layer1.0.conv1.weight").why == "inflated from 2D to 3D"


def test_the_kernel_is_repeated_along_the_last_axis_and_divided_by_its_length(tmp_path: Path) -> None:
    ours = nn.Sequential(nn.Conv3d(1, 1, (3, 3, 5), bias=False))
    kernel = torch.arange(9.0).reshape(1, 1, 3, 3)
    load(ours, {"0.weight": kernel}, tmp_path)
    for tap in range(5):
        assert torch.allclose(ours[0].weight[..., tap], kernel / 5, rtol=1e-6)


def test_fewer_axes_give_the_same_answer_where_nothing_changes_along_the_lost_one(tmp_path: Path) -> None:
    theirs, ours = monai_resnet(2), deeplab(1)
    load(ours, theirs.state_dict(), tmp_path, spatial_dims=1)
    signal = torch.randn(1, 1, 70)
    image = signal.unsqueeze(-1).expand(-1, -1, -1, 512)
    assert_close(last_map(ours, signal), monai_maps(theirs, image)[..., 8])


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (4, 2), (3, 2), (3, 3), (5, 2)])
def test_transposed_kernels_share_the_weight_among_the_taps_that_a_voxel_meets(
    tmp_path: Path, kernel: int, stride: int
) -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.ConvTranspose2d(2, 3, kernel, stride=stride))
    deep = nn.Sequential(nn.ConvTranspose3d(2, 3, kernel, stride=stride))
    load(deep, flat.state_dict(), tmp_path)
    image = torch.randn(1, 2, 4, 5)
    with torch.no_grad():
        inflated, expected = deep(image.unsqueeze(-1).expand(-1, -1, -1, -1, 6)), flat(image)
    for depth in range(2 * stride, 4 * stride):
        assert_close(inflated[..., depth], expected)


# ---- other numbers of channels


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ([5.0], [2.5, 2.5]),
        ([1.0, 2.0, 3.0], [6.0]),
        ([1.0, 2.0, 3.0], [4.0, 2.0]),
        ([1.0, 2.0, 3.0], [0.5, 2.0, 3.0, 0.5]),
    ],
)
def test_input_channels_are_dealt_out(tmp_path: Path, there: list[float], here: list[float]) -> None:
    ours = nn.Sequential(nn.Conv1d(len(here), 1, 1, bias=False))
    found = load(ours, {"0.weight": torch.tensor(there).reshape(1, -1, 1)}, tmp_path, spatial_dims=1)
    assert ours[0].weight.flatten().tolist() == here
    assert row(found, there="0.weight").why == f"{len(there)} input channels dealt out to {len(here)}"


def test_equal_channels_get_the_same_response(tmp_path: Path) -> None:
    theirs, ours = monai_resnet(2, in_channels=3), deeplab(2, in_channels=4)
    load(ours, theirs.state_dict(), tmp_path, spatial_dims=2)
    image = torch.randn(1, 1, 64, 40)
    assert_close(last_map(ours, image.expand(-1, 4, -1, -1)), monai_maps(theirs, image.expand(-1, 3, -1, -1)))


def test_inner_kernels_of_other_channels_are_not_dealt_out(tmp_path: Path) -> None:
    theirs = nn.Sequential(nn.Conv1d(1, 8, 3), nn.Conv1d(8, 4, 3))
    ours = nn.Sequential(nn.Conv1d(1, 8, 3), nn.Conv1d(8, 4, 3), nn.Conv1d(4, 4, 3))
    state = theirs.state_dict() | {"1.weight": torch.zeros(4, 6, 3)}
    found = load(ours, state, tmp_path, spatial_dims=1)
    assert row(found, there="1.weight").why == "shape 4×6×3 does not fit 4×8×3: left as initialised"


# ---- files


SAVED: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "w.pth": torch.save,
    "w.pt": partial(torch.save, _use_new_zipfile_serialization=False),
    "w.safetensors": save_file,
    "w.ckpt": lambda state, path: torch.save({"model": {"state_dict": state}, "step": 3}, path),
    "w.pth.tar": lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "w.bin": lambda state, path: torch.save({f"_orig_mod.module.{k}": v for k, v in state.items()}, path),
}


@pytest.mark.parametrize("name", SAVED)
def test_every_form_of_file_is_read(tmp_path: Path, name: str) -> None:
    state = deeplab(2).state_dict()
    SAVED[name](state, tmp_path / name)
    ours = deeplab(2)
    nn.init.zeros_(ours.get_parameter("encoder.conv1.weight"))
    found = load_pretrained(ours, tmp_path / name, spatial_dims=2)
    assert found.count("loaded") == len(state)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_a_run_folder_is_read(tiny_run: TinyRun) -> None:
    network = new_network(read_model(tiny_run.folder).config)
    found = load_pretrained(network, tiny_run.folder, spatial_dims=3)
    assert found.path == tiny_run.folder / "model.safetensors"
    assert {r.outcome for r in found.rows} == {"loaded"}
    assert found.share == 1


def test_a_network_for_several_scales_takes_the_weights_of_one_for_one(tmp_path: Path) -> None:
    one = deeplab(2, upsampling="resize")
    several = deeplab(2, upsampling="resize", scales=(1.0, 0.5))
    found = load(several, one.state_dict(), tmp_path, spatial_dims=2)
    assert found.count("loaded") == len(one.state_dict())


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("modern", [True, False])
def test_a_file_that_needs_code_is_refused_and_none_is_run(tmp_path: Path, modern: bool) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "trap.pth"
    torch.save({"w": torch.ones(3), "trap": _Trap(sprung)}, path, _use_new_zipfile_serialization=modern)
    with pytest.raises(ModelError, match=r"trap.pth: needs `exec`.*save the tensors alone"):
        read_weights(path)
    assert not sprung.exists()


def test_a_whole_network_and_a_script_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(ModelError, match=r"needs `torch.nn.modules.linear.Linear`"):
        read_weights(tmp_path / "whole.pth")
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "script.pt")
    with pytest.raises(ModelError, match="is a TorchScript archive"):
        read_weights(tmp_path / "script.pt")


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_file_cut_short_is_told(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    SAVED[name]({"encoder.conv1.weight": torch.ones(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ModelError, match=rf"{name}: cannot be read .*copy it again"):
        read_weights(path)


def test_a_file_of_something_else_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ModelError, match=r"text.pth: cannot be read as a file of torch.save"):
        read_weights(tmp_path / "text.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(3)], "found but list"),
        ({"epoch": 3, "state_dict": {}}, "found but nothing"),
        ({"epoch": 3, "lr": 0.1}, "found but epoch, lr"),
    ],
)
def test_a_file_without_a_state_dict_is_told(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=f"no state dict {words}"):
        read_weights(tmp_path / "w.pth")


def test_the_state_of_a_training_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    # its weights are not the average, and nothing beside it tells what they have learnt
    shutil.copy(tiny_run.folder / "last.pt", tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"other.pt: is what a training goes on from, .*has not ended.* --resume"):
        read_weights(tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=rf"they have learnt; give its folder, {tiny_run.folder}$"):
        read_weights(tiny_run.folder / "last.pt")


def test_a_training_that_has_not_ended_is_told(tiny_run: TinyRun, tmp_path: Path) -> None:
    shutil.copy(tiny_run.folder / "last.pt", tmp_path)
    with pytest.raises(ConfigError, match=rf"model.safetensors: is not there yet, .*-o {tmp_path} --resume"):
        read_weights(tmp_path)


def test_a_checkpoint_of_another_project_may_have_the_names_of_a_state(tmp_path: Path) -> None:
    state = {"network": {"w": torch.ones(3)}, "optimizer": {}, "generator": torch.ones(2), "version": 3}
    torch.save(state, tmp_path / "w.pt")
    assert list(read_weights(tmp_path / "w.pt")) == ["w"]


@pytest.mark.parametrize(("name", "words"), [("none.pth", "no such file"), ("notes.txt", "not from `.txt`")])
def test_a_path_that_cannot_be_it_is_told(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=words):
        read_weights(tmp_path / name)
    with pytest.raises(ConfigError, match=r"model.safetensors: no such file"):
        read_weights(tmp_path)


def test_weights_of_another_network_are_told_and_change_nothing(tmp_path: Path) -> None:
    ours = deeplab(2)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    state = {"patch_embed.proj.weight": torch.ones(8, 3, 4, 4), "bn1.weight": torch.ones(8)}
    with pytest.raises(ModelError, match=r"begin with `patch_embed.proj.weight`.*with `encoder.conv1.weight`"):
        load(ours, state, tmp_path, spatial_dims=2)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        # the first stages of ResNet-34 have the shapes of those of ResNet-18, and more blocks
        ("resnet34", "resnet18", r"layer1\.2\.conv1\.weight` has no place in this network"),
        ("resnet18", "resnet34", r"has nothing for `encoder\.layer1\.2\.conv1\.weight`"),
        ("resnet50", "resnet18", r"has no place in this network: these are the weights of another encoder"),
    ],
)
def test_weights_of_another_encoder_are_told(tmp_path: Path, there: str, here: str, words: str) -> None:
    state = deeplab(encoder=there).get_submodule("encoder").state_dict()
    with pytest.raises(ModelError, match=words):
        load(deeplab(encoder=here), state, tmp_path)


def test_quantised_weights_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`conv1.weight` holds numbers of type torch.int8, expected floating ones"):
        load(deeplab(), {"conv1.weight": torch.ones(8, 3, 7, 7, 7, dtype=torch.int8)}, tmp_path)


def test_weights_that_are_not_finite_are_told(tmp_path: Path) -> None:
    state = deeplab(2).state_dict()
    state["encoder.bn1.weight"] = torch.full((8,), float("nan"))
    with pytest.raises(ModelError, match=r"not finite, first for `encoder.bn1.weight`"):
        load(deeplab(2), state, tmp_path, spatial_dims=2)


# ---- what is told


def test_the_table_has_a_line_for_every_key(tmp_path: Path) -> None:
    ours = nn.Sequential(nn.Conv1d(2, 1, 1), nn.Conv1d(1, 3, 1, bias=False))
    state = {"0.weight": torch.ones(1, 1, 1), "0.bias": torch.ones(1), "fc.bias": torch.ones(4)}
    found = load(ours, state, tmp_path, spatial_dims=1)
    assert [line.split() for line in found.text_table().splitlines()] == [
        ["outcome", "in", "the", "file", "shape", "here", "shape", "why"],
        ["adapted", "0.weight", "1×1×1", "0.weight", "1×2×1", "1", "input", "channels", "dealt", "out", "to", "2"],
        ["loaded", "0.bias", "1", "0.bias", "1"],
        ["skipped", "fc.bias", "4", "head", "of", "the", "other", "network"],
        ["fresh", "1.weight", "3×1×1"],
    ]
    assert found.summary() == (
        "weights.pth: 1 tensors loaded, 1 adapted, 1 of the file skipped, 1 of the network left as initialised; "
        "40 % of its kernels are from the file"
    )
    assert {k: v for k, v in found.record().items() if k != "sha256"} == {
        "file": "weights.pth",
        "loaded": 1,
        "adapted": 1,
        "skipped": 1,
        "images_sha256": [],
        "images_voxels": [],
        "fresh": 1,
    }


# ---- training that begins with them


def options(settings: tuple[str, ...], path: Path, **more: Any) -> medseg.TrainOptions:
    return medseg.TrainOptions(settings=medseg.settings_from(settings), folds=2, device="cpu", pretrained=path, **more)


def test_training_begins_with_the_weights_and_says_so(
    tiny_run: TinyRun, tiny_settings: tuple[str, ...], tmp_path: Path
) -> None:
    # without a step of any size, what comes out is what went in
    still = (*tiny_settings, "train.learning_rate=1e-30")
    first = medseg.train(tiny_run.dataset, tmp_path, epochs=1, options=options(still, tiny_run.folder))
    assert first.pretrained is not None
    before, after = (read_weights(folder) for folder in (tiny_run.folder, tmp_path))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    record = json.loads((tmp_path / "model.json").read_text())["training"]["pretrained"]
    assert record == first.pretrained.record()
    assert record["sha256"] == read_model(tiny_run.folder).sha256
    log = (tmp_path / "log.txt").read_text()
    assert first.pretrained.summary() in log
    assert first.pretrained.text_table() in log

    resumed = options(still, tmp_path / "gone.pth", resume=True)
    again = medseg.train(tiny_run.dataset, tmp_path, epochs=1, options=resumed)
    assert again.pretrained is None
    assert json.loads((tmp_path / "model.json").read_text())["training"]["pretrained"] == record


def test_without_a_gpu_too_the_network_keeps_the_width_of_the_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    asked = ("network.name=deeplabv3", "network.encoder=resnet50")
    made = plan_run(
        read_dataset(tiny_run.dataset), options(asked, tmp_path / "resnet.pth"), {}, device=torch.device("cpu")
    )
    assert (made.config.network.width, made.config.network.norm) == (1, "batch")


def test_a_wrong_file_is_told_before_anything_is_written(
    tiny_run: TinyRun, tiny_settings: tuple[str, ...], tmp_path: Path
) -> None:
    torch.save({"conv.weight": torch.ones(2, 1, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="no kernel in it fits"):
        medseg.train(
            tiny_run.dataset, tmp_path / "run", epochs=1, options=options(tiny_settings, tmp_path / "other.pth")
        )
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_told_before_the_data_set_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.pth: no such file"):
        medseg.train(tmp_path / "no data", tmp_path / "run", options=options((), tmp_path / "gone.pth"))
    with pytest.raises(ConfigError, match=r"gone.pth: no such file"):
        medseg.plan(tmp_path / "no data", pretrained=tmp_path / "gone.pth")


def test_a_file_that_fills_little_of_the_network_is_warned_of(
    tiny_run: TinyRun, tiny_settings: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"encoder.stem.0.weight": torch.ones(4, 1, 3, 3, 3)}
    torch.save(state, tmp_path / "little.pth")
    medseg.train(tiny_run.dataset, tmp_path / "run", epochs=1, options=options(tiny_settings, tmp_path / "little.pth"))
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert "little.pth: fills only 0 % of the network" in warning


def test_the_command_says_what_was_loaded(
    tiny_run: TinyRun, tiny_settings: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (part for setting in tiny_settings for part in ("--set", setting))
    asked = ("--epochs", "1", "--folds", "2", "--device", "cpu", "--pretrained", str(tiny_run.folder), *settings)
    code = run(["train", str(tiny_run.dataset), "-o", str(tmp_path / "run"), *asked])
    assert code == 0
    assert "model.safetensors: 54 tensors loaded, 0 adapted, 0 of the file skipped" in capsys.readouterr().out
