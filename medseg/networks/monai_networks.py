"""MONAI's segmentation networks by name, `monai.CLASS`, with their own arguments; padded so that any size goes."""

from __future__ import annotations

import copy
import inspect
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.device import is_out_of_memory
from medseg.errors import ConfigError, MedsegError
from medseg.networks._blocks import check_input, crop, pad_to

PREFIX = "monai."
# those that give logits of the image's size; a class that could read files or download is no matter of a configuration
CLASSES = (
    "AttentionUnet",
    "BasicUNet",
    "BasicUNetPlusPlus",
    "DynUNet",
    "FlexibleUNet",
    "HighResNet",
    "MedNeXt",
    "SegResNet",
    "SegResNetDS",
    "SwinUNETR",
    "UNet",
    "VNet",
)
DEFAULTS: dict[str, dict[str, object]] = {}
# what we know, under the names that MONAI's classes give it
SPATIAL_DIMS, IN_CHANNELS, OUT_CHANNELS = (
    ("spatial_dims",),
    ("in_channels", "n_input_channels"),
    ("out_channels", "num_classes"),
)
# what MONAI's classes raise for arguments and sizes that do not fit
FAILURES = (
    ArithmeticError,
    OSError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)


class FromMonai(nn.Module):
    """A network of MONAI's, whose arguments are checked when it is built. Reads arguments alone.

    Many of them take only sizes that are multiples of something: images are padded with 0 at the end and cropped
    again. What the something is is found by trying, on tensors without memory.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        kind = find_class(config.name.removeprefix(PREFIX))
        arguments = complete(kind, config, (spatial_dims, in_channels, out_channels))
        try:
            # not on the meta device: some classes compute numbers with tensors while they are built
            with torch.device("cpu"):
                self.network = kind(**arguments)
        except FAILURES as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise MedsegError(
                    f"network.arguments: memory ran out while {config.name} was built with "
                    f"{config.arguments or 'its defaults'} ({error}); free some, or make the network smaller"
                ) from error
            raise ConfigError(
                f"network.arguments: {config.name} refused {config.arguments or 'its defaults'}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.in_channels = in_channels
        self.min_shape = (1,) * spatial_dims
        self.multiple, self.least = find_sizes(self.network, config, spatial_dims, in_channels, out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` where C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        shape = images.shape[2:]
        if any(n < self.least for n in shape):
            images = pad_to(images, tuple(self.least if n < self.least else 1 for n in shape))
        return crop(first_of(self.network(pad_to(images, (self.multiple,) * len(shape)))), shape)


def first_of(found: Any) -> Any:
    """The logits where a network gives a list with nothing else in it."""
    return found[0] if isinstance(found, list | tuple) and len(found) == 1 else found


def check(config: NetworkConfig) -> None:
    """Raises `ConfigError` for an unknown class, and for arguments it does not take or lacks."""
    complete(find_class(config.name.removeprefix(PREFIX)), config, (3, 1, 2))


def find_class(name: str) -> type[nn.Module]:
    """MONAI's network class of this name. Raises `ConfigError` with the closest names."""
    import monai.networks.nets as nets

    if name not in CLASSES:
        names = dict.fromkeys((*get_close_matches(name, CLASSES, n=5, cutoff=0.4), *CLASSES))
        raise ConfigError(
            f"network.name: `{PREFIX}{name}` is none of MONAI's segmentation networks; choose from "
            f"{', '.join(PREFIX + c for c in names)}"
        )
    kind: type[nn.Module] = getattr(nets, name)
    return kind


def complete(kind: type[nn.Module], config: NetworkConfig, ours: tuple[int, int, int]) -> dict[str, Any]:
    """The arguments of `config` with dimensions and channels. Raises `ConfigError` for unknown and missing ones."""
    parameters = dict(list(inspect.signature(kind.__init__).parameters.items())[1:])
    given = dict(config.arguments)
    for names, value in zip((SPATIAL_DIMS, IN_CHANNELS, OUT_CHANNELS), ours):
        name = next((n for n in names if n in parameters), None)
        if name is None and names != SPATIAL_DIMS:
            raise ConfigError(f"network.name: {config.name} takes none of {', '.join(names)}: it segments no images")
        if name is not None and name in given:
            raise ConfigError(f"network.arguments: `{name}` comes from the data; leave it out")
        if name is not None:
            given[name] = value
    if given.get("pretrained"):
        raise ConfigError("network.arguments: `pretrained` would download weights; use `--pretrained FILE`")
    if "pretrained" in parameters:
        given["pretrained"] = False
    usual = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    unknown = [n for n in given if n not in usual]
    if unknown and len(usual) == len(parameters):
        close = get_close_matches(unknown[0], usual, n=3, cutoff=0.3)
        raise ConfigError(
            f"network.arguments: {config.name} has no `{unknown[0]}`; "
            f"{'closest are ' + ', '.join(close) + '; ' if close else ''}it takes {', '.join(usual)}"
        )
    missing = [n for n, p in usual.items() if p.default is p.empty and n not in given]
    if missing:
        raise ConfigError(f"network.arguments: {config.name} also needs {', '.join(missing)}")
    return given


def find_sizes(
    network: nn.Module, config: NetworkConfig, spatial_dims: int, in_channels: int, out_channels: int
) -> tuple[int, int]:
    """The number that sizes must be a multiple of, and the smallest size that works.

    Raises `ConfigError` where no size comes back as logits of its own shape.
    """
    trial = copy.deepcopy(network).to("meta").train()
    failure = ""

    def works(size: int) -> bool:
        nonlocal failure
        shape = (size,) * spatial_dims
        try:
            found = first_of(trial(torch.empty(1, in_channels, *shape, device="meta")))
        except FAILURES as error:
            failure = f"{type(error).__name__}: {error}"
            return False
        if isinstance(found, Tensor) and found.shape == (1, out_channels, *shape):
            return True
        what = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__} of tensors"
        failure = f"{what} comes back for an input of {shape}; where it has deep supervision, switch it off"
        return False

    for multiple in MULTIPLES:
        # an odd number of multiples, so that no larger one is met by chance
        size = multiple * (2 * (128 // multiple // 2) + 1)
        if works(size):
            least = next(
                s for s in (multiple * k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 256)) if s >= size or works(s)
            )
            return multiple, min(least, size)
    raise ConfigError(f"network.name: {config.name} gives no logits of the image's size: {failure}")


def halvings(config: NetworkConfig) -> int:
    """Halving steps that `network.strides` has an entry for: none, MONAI's networks have arguments of their own."""
    return 0


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The network of MONAI's that `config.name` says."""
    return FromMonai(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
