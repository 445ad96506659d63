"""How far medseg's networks are from torchvision's with the same weights: the largest difference of what they give.

    python tests/benchmarks/torchvision_parity.py -o tests/benchmarks/results/torchvision_parity.json

Needs torchvision beside medseg, of the release that goes with torch. Its compiled operators are not needed: a build for
GPUs next to a torch for CPUs will do. Weights are random and batch-norm statistics stirred, so that every one of them
matters. tests/test_torchvision_parity.py runs the same comparisons where torchvision is installed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.networks import build_network
from medseg.pretrained import load_pretrained

# the second one is odd on both axes and no multiple of any output stride
SHAPES = ((64, 64), (65, 75))
CLASSES = 5


@dataclass(frozen=True)
class Comparison:
    """Largest difference between two outputs over all `SHAPES`, beside the largest value of torchvision's."""

    name: str
    difference: float
    largest: float


def main() -> None:
    """Compare and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    result = {
        "comparisons": [asdict(c) for part in (deeplabv3, resnets, vgg16) for c in part()],
        "shapes": SHAPES,
        "versions": {name: version(name) for name in ("torch", "torchvision", "medseg")},
        "torchvision_operators": operators_load(),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def torchvision_models() -> Any:
    """The module `torchvision.models`, also where torchvision's compiled operators do not go with this torch."""
    if not operators_load():
        # torchvision says how these behave without values and fails where nothing declares them
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(
                    f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
    import torchvision.models.segmentation

    return torchvision.models


def operators_load() -> bool:
    """Whether torchvision's compiled operators go with this torch."""
    from importlib.util import find_spec

    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return False
    try:
        torch.ops.load_library(Path(found.origin).parent / "_C.so")
    except OSError:
        return False
    return True


def deeplabv3() -> Iterator[Comparison]:
    """Logits of DeepLabv3 with a ResNet-50."""
    models = torchvision_models()
    theirs = stirred(
        lambda: models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)
    )
    settings = NetworkConfig(
        name="deeplabv3",
        encoder="resnet50",
        output_stride=8,
        norm="batch",
        leak=0.0,
        aspp_rates=(12, 24, 36),
        aspp_channels=256,
        image_pooling=True,
        upsampling="resize",
    )
    ours = loaded(settings, theirs)
    yield compare("deeplabv3_resnet50: logits", [(theirs(images)["out"], ours(images)) for images in inputs()])


def resnets() -> Iterator[Comparison]:
    """Maps of all four layers of ResNets, at all output strides that torchvision has."""
    models = torchvision_models()
    strides = {8: (False, True, True), 16: (False, False, True), 32: (False, False, False)}
    for name in ("resnet18", "resnet50", "resnet101"):
        # torchvision has no dilated basic blocks
        for stride in (32,) if name == "resnet18" else (8, 16, 32):
            theirs = stirred(lambda: getattr(models, name)(replace_stride_with_dilation=strides[stride]))  # noqa: B023
            settings = NetworkConfig(
                name="deeplabv3", encoder=name, output_stride=stride, norm="batch", aspp_channels=8
            )
            ours = loaded(settings, theirs).encoder
            pairs = [list(zip(layers_of(theirs, images), ours(images)[1:], strict=True)) for images in inputs()]
            for number, layer in enumerate(zip(*pairs), start=1):
                yield compare(f"{name} at output stride {stride}: layer{number}", layer)


def vgg16() -> Iterator[Comparison]:
    """Features of VGG-16, with and without batch norm, once torchvision's poolings are 3 wide as those here."""
    models = torchvision_models()
    for name, norm in (("vgg16", "none"), ("vgg16_bn", "batch")):
        theirs = stirred(getattr(models, name))
        for number, layer in enumerate(theirs.features):
            if isinstance(layer, nn.MaxPool2d):
                theirs.features[number] = nn.MaxPool2d(3, stride=2, padding=1)
        settings = NetworkConfig(
            name="deeplabv3", encoder="vgg16", output_stride=32, norm=norm, leak=0.0, aspp_channels=8
        )
        ours = loaded(settings, theirs).encoder
        yield compare(f"{name}: features", [(theirs.features(images), ours(images)[-1]) for images in inputs()])


def layers_of(theirs: Any, images: Tensor) -> list[Tensor]:
    """The maps of torchvision's four layers."""
    maps = [theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))]
    for number in (1, 2, 3, 4):
        maps.append(getattr(theirs, f"layer{number}")(maps[-1]))
    return maps[1:]


def stirred(make: Any) -> Any:
    """A network of torchvision in evaluation whose batch norms have seen something."""
    torch.manual_seed(0)
    network = make().eval().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            # below 1, or the maps of a deep network grow without end
            layer.weight.uniform_(0.2, 0.8)
            layer.bias.normal_(0, 0.2)
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return network


def loaded(settings: NetworkConfig, theirs: nn.Module) -> Any:
    """A network of medseg in evaluation with the weights of `theirs`, by way of a file."""
    ours = build_network(settings, spatial_dims=2, in_channels=3, out_channels=CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(theirs.state_dict(), path)
        load_pretrained(ours, path, spatial_dims=2)
    return ours.eval().requires_grad_(False)


def inputs() -> Iterator[Tensor]:
    """Two images of each shape."""
    generator = torch.Generator().manual_seed(1)
    for shape in SHAPES:
        yield torch.randn(2, 3, *shape, generator=generator)


def compare(name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Comparison:
    """Torchvision's outputs beside those of medseg. Raises `ValueError` where their shapes differ."""
    for theirs, ours in pairs:
        if theirs.shape != ours.shape:
            raise ValueError(f"{name}: shape {tuple(ours.shape)}, torchvision's is {tuple(theirs.shape)}")
    difference = max(float((theirs - ours).abs().max()) for theirs, ours in pairs)
    return Comparison(name, difference, max(float(theirs.abs().max()) for theirs, _ in pairs))


if __name__ == "__main__":
    main()
