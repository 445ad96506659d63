"""The register of encoders; each lives in its own file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from medseg.config import NetworkConfig
from medseg.networks._blocks import Rate
from medseg.networks._encoder import Encoder
from medseg.networks.resnet import BasicBlock, Bottleneck, DilatedResNet, LightResNet, light_steps
from medseg.networks.vgg import STEPS, VGG16


class Kind(NamedTuple):
    """How an encoder is made, and the names of the halving steps that `network.strides` has one entry for."""

    make: Callable[..., Encoder]
    steps: Callable[[NetworkConfig], tuple[str, ...]]


def build_encoder(
    config: NetworkConfig, *, spatial_dims: int, in_channels: int, more: int = 0, rates: Sequence[Rate] = ()
) -> Encoder:
    """The encoder that `config` describes, with `more` copies of its last stage, each a halving step of its own.

    `rates` replace the dilations of the stages that lost their stride, one convolution after the other. Raises
    `ConfigError` for strides or an output stride it cannot have.
    """
    make = ENCODERS[config.encoder].make
    return make(config, spatial_dims=spatial_dims, in_channels=in_channels, more=more, rates=rates)


def halvings(config: NetworkConfig) -> int:
    """How many halving steps the encoder of `config` has."""
    return len(ENCODERS[config.encoder].steps(config))


def _resnet(block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, int, int, int]) -> Kind:
    return Kind(partial(DilatedResNet, block=block, depths=depths), lambda _: DilatedResNet.STEPS)


ENCODERS: dict[str, Kind] = {
    "light": Kind(LightResNet, light_steps),
    "vgg16": Kind(partial(VGG16, late_pools=True), lambda _: STEPS),
    "vgg16_frontend": Kind(partial(VGG16, late_pools=False), lambda _: STEPS),
    "resnet18": _resnet(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _resnet(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _resnet(Bottleneck, (3, 4, 6, 3)),
    "resnet101": _resnet(Bottleneck, (3, 4, 23, 3)),
}
