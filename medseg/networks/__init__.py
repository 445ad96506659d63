"""The register of networks: a file in this folder with a function `build` is a network; none is described here."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from torch import nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError

__all__ = ["build_network", "list_networks"]


def build_network(config: NetworkConfig | str, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """An untrained network: (B, in_channels, *spatial) → logits (B, out_channels, *spatial).

    A name stands for that network with the settings' defaults. Its `min_shape` is the smallest input it takes. Raises
    `ConfigError` for an unknown name and for settings that contradict each other.
    """
    if spatial_dims not in (1, 2, 3) or in_channels < 1 or out_channels < 1:
        raise ConfigError(
            f"found spatial_dims={spatial_dims}, in_channels={in_channels}, out_channels={out_channels}; "
            "expected 1, 2 or 3 dimensions and at least one channel in and out"
        )
    settings = NetworkConfig(name=config) if isinstance(config, str) else config
    networks = _networks()
    if settings.name not in networks:
        close = get_close_matches(settings.name, networks, n=len(networks), cutoff=0.3)
        names = dict.fromkeys((*close, *sorted(networks)))
        raise ConfigError(f"network.name: there is no `{settings.name}`; choose from {', '.join(names)}")
    build = networks[settings.name].build
    network: nn.Module = build(settings, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
    return network


def list_networks() -> tuple[str, ...]:
    """The names that `build_network` takes, sorted."""
    return tuple(sorted(_networks()))


@cache
def _networks() -> Mapping[str, ModuleType]:
    # a file that wraps several networks names them in NAMES; `build` finds the chosen one in config.name
    public = (info.name for info in iter_modules(__path__) if not info.name.startswith("_"))
    modules = {name: import_module(f"{__name__}.{name}") for name in public}
    return {
        name: module
        for file, module in modules.items()
        if hasattr(module, "build")
        for name in getattr(module, "NAMES", (file,))
    }
