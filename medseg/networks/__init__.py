"""The register of networks: a file in this folder with `build` and `DEFAULTS` is one; none is described here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch
from torch import nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks import encoders
from medseg.networks._blocks import Axes
from medseg.networks._encoder import Encoder, stride_by_axis
from medseg.networks.aspp import cap_rates
from medseg.networks.resnet import quieten
from medseg.networks.scales import MultiScale

__all__ = [
    "at_output_stride",
    "build_bare",
    "build_network",
    "can_be_thinned",
    "check_patch",
    "check_settings",
    "default_config",
    "fit_to_patch",
    "halvings",
    "list_networks",
    "stride_by_axis",
]


def build_network(config: NetworkConfig | str, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """An untrained network: (B, in_channels, *spatial) → logits (B, out_channels, *spatial).

    A name stands for that network as published (`default_config`); `monai.CLASS` for any network of MONAI's, with its
    own arguments in `config.arguments`. Its `min_shape` is the smallest input it takes. Raises `ConfigError` for an
    unknown name and for settings that contradict each other.
    """
    if spatial_dims not in (1, 2, 3) or in_channels < 1 or out_channels < 1:
        raise ConfigError(
            f"found spatial_dims={spatial_dims}, in_channels={in_channels}, out_channels={out_channels}; "
            "expected 1, 2 or 3 dimensions and at least one channel in and out"
        )
    settings = default_config(config) if isinstance(config, str) else config
    module = _module(settings.name)
    if settings.arguments and not hasattr(module, "PREFIX"):
        raise ConfigError(
            f"network.arguments: {', '.join(settings.arguments)} found, but `{settings.name}` takes none; they are for "
            "monai.CLASS, other networks have settings of their own"
        )
    build: Callable[..., nn.Module] = module.build
    network = build(settings, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
    quieten(network)
    if settings.scales == (1.0,):
        return network
    return MultiScale(network, settings, spatial_dims=spatial_dims, out_channels=out_channels)


def build_bare(config: NetworkConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """`build_network` on the meta device: a network to look at, without numbers and without memory for them."""
    with torch.device("meta"):
        return build_network(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)


def default_config(name: str) -> NetworkConfig:
    """The settings of the network `name` as published. Raises `ConfigError` for an unknown name."""
    return NetworkConfig.model_validate({"name": name, **_module(name).DEFAULTS.get(name, {})})


def can_be_thinned(config: NetworkConfig) -> bool:
    """Whether the network reads `width`; those of a library do not."""
    return not hasattr(_module(config.name), "PREFIX")


def halvings(config: NetworkConfig) -> int:
    """How many halving steps the network has, for each of which `network.strides` has an entry."""
    own: Callable[[NetworkConfig], int] = getattr(_module(config.name), "halvings", encoders.halvings)
    return own(config)


def check_settings(config: NetworkConfig) -> None:
    """What can be said of a network's name and arguments before any data are known. Raises `ConfigError`."""
    check: Callable[[NetworkConfig], None] = getattr(_module(config.name), "check", lambda _: None)
    check(config)


def check_patch(network: nn.Module, config: NetworkConfig, patch_size: Axes) -> None:
    """Raises `ConfigError` where a patch is smaller than the network takes."""
    smallest: Axes = getattr(network, "min_shape", ())
    if any(p < s for p, s in zip(patch_size, smallest)):
        has_stride = hasattr(network, "encoder")
        at = f" at network.output_stride {config.output_stride}" if has_stride else ""
        less = "lower the stride" if has_stride else "choose a network that halves it less often"
        raise ConfigError(
            f"windows.patch_size {list(patch_size)} is smaller than the {list(smallest)} that network.name "
            f"{config.name} takes{at}; enlarge the patch or {less}"
        )


def fit_to_patch(config: NetworkConfig, patch_size: Axes) -> NetworkConfig:
    """`config` with the rates and dilations that have work to do on maps of a patch (voxels by axis)."""
    fit: Callable[[NetworkConfig, Axes], NetworkConfig] = getattr(_module(config.name), "fit_to_patch", _cap)
    return fit(config, patch_size)


def at_output_stride(config: NetworkConfig, output_stride: int, *, spatial_dims: int) -> NetworkConfig:
    """`config` at another output stride, with what is counted in voxels of the coarsest map counted in the new ones.

    A network trained at 16 then sees at 8 what it saw at 16, on a denser grid, with the same weights (Chen et al. 2017,
    arXiv:1706.05587, section 4). Raises `ConfigError` where the network cannot.
    """
    module = _module(config.name)
    changed = config.model_copy(update={"output_stride": output_stride})
    before, after = (_encoder(c, spatial_dims) for c in (config, changed))
    if not after.is_same_denser:
        raise ConfigError(
            f"network.output_stride: the encoder `{config.encoder}` loses its late poolings with their strides, and "
            "computes something else at another output stride; train it at the one you want"
        )
    if config.upsampling == "resize":
        raise ConfigError(
            "network.output_stride: `resize` lays the maps half a stride aside, which a network learns to undo for the "
            "stride it is trained at; train with network.upsampling=interpolate to change it later"
        )
    rescale: Callable[..., NetworkConfig] = getattr(module, "rescale", lambda same, *_: same)
    return rescale(changed, before, after)


def _encoder(config: NetworkConfig, spatial_dims: int) -> Encoder:
    """The encoder of a network, without memory. Raises `ConfigError` where the network has none."""
    network: nn.Module | None = None
    if can_be_thinned(config):
        network = build_bare(config.model_copy(update={"scales": (1.0,)}), spatial_dims, 1, 2)
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise ConfigError(f"network.output_stride: `{config.name}` has no output stride to choose")
    return encoder


def list_networks() -> tuple[str, ...]:
    """The names that `build_network` takes, sorted; besides them it takes `monai.CLASS`."""
    return tuple(sorted(_networks()))


def _cap(config: NetworkConfig, patch_size: Axes) -> NetworkConfig:
    if "aspp_rates" not in default_config(config.name).model_fields_set:
        return config
    feature = tuple(max(1, p // s) for p, s in zip(patch_size, stride_by_axis(config, len(patch_size))))
    return config.model_copy(update={"aspp_rates": cap_rates(config.aspp_rates, feature)})


def _module(name: str) -> ModuleType:
    networks = _networks()
    for prefix, module in _wrappers().items():
        if name.startswith(prefix):
            return module
    if name not in networks:
        close = get_close_matches(name, networks, n=len(networks), cutoff=0.3)
        names = dict.fromkeys((*close, *sorted(networks)))
        raise ConfigError(
            f"network.name: there is no `{name}`; choose from {', '.join(names)}, or a network of MONAI's such as "
            "monai.SegResNet"
        )
    return networks[name]


@cache
def _modules() -> tuple[ModuleType, ...]:
    public = (info.name for info in iter_modules(__path__) if not info.name.startswith("_"))
    modules = (import_module(f"{__name__}.{name}") for name in public)
    return tuple(module for module in modules if hasattr(module, "build"))


@cache
def _networks() -> Mapping[str, ModuleType]:
    return {name: module for module in _modules() for name in module.DEFAULTS}


@cache
def _wrappers() -> Mapping[str, ModuleType]:
    # a file that wraps a library's networks says which prefix calls for them
    found: dict[str, Any] = {module.PREFIX: module for module in _modules() if hasattr(module, "PREFIX")}
    return found
