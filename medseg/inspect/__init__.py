"""Looking at a network before it is trained, or after: from a name, a YAML file or a run to numbers and a picture."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medseg.config import Config, NetworkConfig, make_config, overlay, read_yaml
from medseg.device import choose_device
from medseg.errors import ConfigError, MedsegError
from medseg.inspect.picture import check_picture, draw
from medseg.model import read_model
from medseg.networks import build_network, default_config, list_networks
from medseg.networks.receptive import NetworkReport, analyse, build_bare
from medseg.progress import Progress, silent

__all__ = ["DEFAULT_PATCHES", "Inspection", "inspect_network"]

DEFAULT_PATCHES = {1: (1024,), 2: (256, 256), 3: (96, 96, 96)}
"""The patch by number of dimensions, where nothing else says one."""
# far above any image, and still counted in seconds
_MAX_SIDE, _MAX_VOXELS = 2**20, 2**30


@dataclass(frozen=True)
class Inspection:
    """What was found out about a network; `trained` holds it where it comes from a run, `device` draws the picture."""

    report: NetworkReport
    config: NetworkConfig
    out_channels: int
    trained: nn.Module | None = None
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return self.report.as_dict()

    def network(self) -> nn.Module:
        """The trained network, or one with fresh weights."""
        if self.trained is not None:
            return self.trained
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_network(
                self.config,
                spatial_dims=self.report.spatial_dims,
                in_channels=self.report.in_channels,
                out_channels=self.out_channels,
            ).eval()

    def save_png(self, path: str | Path) -> None:
        """The picture: taps of each layer, the voxels that can reach an output voxel, and how strongly they do.

        Raises `ConfigError` for a path that cannot be a PNG, or a patch too large to run.
        """
        check_picture(Path(path), self.report.patch)
        network = copy.deepcopy(self.network()).to(self.device)
        draw(network, self.report, Path(path), trained=self.trained is not None)


@dataclass(frozen=True)
class _Target:
    """What is to be looked at, before it is built."""

    name: str
    config: NetworkConfig
    spatial_dims: int
    in_channels: int
    out_channels: int
    patch: tuple[int, ...] | None = None
    trained: nn.Module | None = None


def inspect_network(
    target: str | Path,
    *,
    spatial_dims: int | None = None,
    patch: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    png: str | Path | None = None,
    progress: Progress = silent,
) -> Inspection:
    """Layers, costs and fields of a network's name, of a YAML file (whole, or its network section), or of a run folder.

    Left out, dimensions and patch are the file's or the run's own; a bare network gets those of `patch`, else 3, one
    channel and two labels. `settings` is laid over, as `settings_from` gives it. The picture goes to `png`, which is
    looked at before any work, and is drawn on `device`. Raises `ConfigError`, `ModelError`.
    """
    runs_on = choose_device(device)
    if png is not None:
        check_picture(Path(png))
    if patch is not None and (not patch or min(patch) < 1):
        raise ConfigError(f"patch {tuple(patch)}: expected one to three whole numbers of at least 1, such as 96,96,96")
    wanted = spatial_dims if spatial_dims is not None else (None if patch is None else len(patch))
    if wanted not in (None, 1, 2, 3):
        raise ConfigError(f"found {wanted} dimensions, expected 1, 2 or 3")
    found = _resolve(target, wanted, settings or {})
    if wanted is not None and wanted != found.spatial_dims:
        raise ConfigError(f"{target}: made for {found.spatial_dims} dimensions, asked to look at it in {wanted}")
    shape = tuple(patch) if patch is not None else found.patch or DEFAULT_PATCHES[found.spatial_dims]
    if len(shape) != found.spatial_dims:
        raise ConfigError(f"patch {shape} has {len(shape)} numbers, expected {found.spatial_dims}, one for each axis")
    if max(shape) > _MAX_SIDE or prod(shape) > _MAX_VOXELS:
        raise ConfigError(
            f"patch {shape}: {prod(shape):,} voxels, expected at most {_MAX_VOXELS:,} and {_MAX_SIDE:,} on an axis"
        )
    if png is not None:
        check_picture(Path(png), shape)
    sizes = found.spatial_dims, found.in_channels
    network = found.trained or build_bare(found.config, *sizes, found.out_channels)
    try:
        report = analyse(
            network, spatial_dims=sizes[0], in_channels=sizes[1], shape=shape, name=found.name, progress=progress
        )
    except MedsegError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"{found.name}: takes no patch of {shape}: {str(error).splitlines()[0]}") from error
    inspection = Inspection(report, found.config, found.out_channels, found.trained, str(runs_on))
    if png is not None:
        inspection.save_png(png)
    return inspection


def _resolve(target: str | Path, spatial_dims: int | None, settings: Mapping[str, Any]) -> _Target:
    path = Path(target)
    if path.is_dir():
        return _from_run(path, settings)
    if path.is_file():
        return _from_file(path, spatial_dims, settings)
    name = str(target)
    if not name.startswith("monai."):
        _refuse_unknown(name)
    return _bare({"name": name}, name, spatial_dims, settings)


def _refuse_unknown(name: str) -> None:
    if name in list_networks():
        return
    close = get_close_matches(name, list_networks(), n=3, cutoff=0.4)
    names = f"did you mean {' or '.join(close)}?" if close else f"networks are {', '.join(list_networks())}"
    raise ConfigError(
        f"{name}: neither a network, nor a YAML file, nor a run folder; {names} (`medseg inspect --list` lists all)"
    )


def _bare(section: Mapping[str, Any], source: str, spatial_dims: int | None, settings: Mapping[str, Any]) -> _Target:
    config = _over_published(section, settings, source, spatial_dims)
    return _Target(config.network.name, config.network, config.data.spatial_dims, 1, 2)


def _over_published(
    section: Mapping[str, Any], settings: Mapping[str, Any], source: str, spatial_dims: int | None
) -> Config:
    """A configuration around a network section alone, laid over the published settings of that network."""
    given = overlay(section, _network_only(settings))
    strides = given.get("strides")
    if spatial_dims is None and strides:
        spatial_dims = len(strides[0])
    name = given.get("name", NetworkConfig().name)
    published = default_config(name) if isinstance(name, str) else NetworkConfig()
    dims = spatial_dims or 3
    around = {
        "data": {"spatial_dims": dims},
        "augment": {"flip_axes": [0]},
        "windows": {"patch_size": DEFAULT_PATCHES[dims]},
    }
    return make_config({**around, "network": {**published.model_dump(), **given}}, source=source)


def _network_only(settings: Mapping[str, Any]) -> dict[str, Any]:
    others = [key for key in settings if key != "network"]
    if others:
        raise ConfigError(f"--set {others[0]}: only settings of the section network change what is inspected")
    return dict(settings.get("network", {}))


def _from_file(path: Path, spatial_dims: int | None, settings: Mapping[str, Any]) -> _Target:
    content = read_yaml(path)
    if "network" not in content and not set(content) & set(Config.model_fields):
        return _bare(content, str(path), spatial_dims, settings)
    section = content.get("network") or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: network holds {type(section).__name__}, expected keys such as `name: unet`")
    if not isinstance(content.get("data"), dict):
        found = _bare(section, str(path), spatial_dims, settings)
        patch = (content.get("windows") or {}).get("patch_size") if isinstance(content.get("windows"), dict) else None
        fits = isinstance(patch, list) and len(patch) == found.spatial_dims
        return _Target(found.name, found.config, found.spatial_dims, 1, 2, tuple(patch) if fits and patch else None)
    given = overlay(section, _network_only(settings))
    name = given.get("name", NetworkConfig().name)
    published = default_config(name).model_dump() if isinstance(name, str) else {}
    return _whole(make_config({**content, "network": {**published, **given}}, source=str(path)))


def _whole(config: Config, trained: nn.Module | None = None) -> _Target:
    return _Target(
        name=config.network.name,
        config=config.network,
        spatial_dims=config.data.spatial_dims,
        in_channels=len(config.data.channels),
        out_channels=config.data.out_channels,
        patch=config.windows.patch_size,
        trained=trained,
    )


def _from_run(folder: Path, settings: Mapping[str, Any]) -> _Target:
    model = read_model(folder, settings)
    return _whole(model.config, model.network)
