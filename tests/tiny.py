"""Small networks with fixed weights and blurred noise to feed them, for tests; nothing here is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from geometry import oblique, save
from scipy.ndimage import gaussian_filter

from medseg.config import Config, make_config, overlay
from medseg.infer import InferOptions
from medseg.model import new_network, save_model


def tiny_config(**changes: dict[str, Any]) -> Config:
    """Two labels, values 3 and 7, and a network of a few thousand weights; `changes` are laid over by section."""
    base: dict[str, Any] = {
        "data": {"labels": {"shell": 3, "core": 7}},
        "network": {
            "channels": [4, 8],
            "output_stride": 2,
            "aspp_rates": [1],
            "aspp_channels": 4,
            "skip_channels": 4,
            "decoder_channels": 4,
        },
        "windows": {"patch_size": [8, 8, 8]},
    }
    return make_config(overlay(base, changes))


def tiny_model(folder: Path, config: Config | None = None, *, seed: int = 0) -> Path:
    """A model folder with random weights."""
    config = config or tiny_config()
    torch.manual_seed(seed)
    network = new_network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            # livelier than a fresh network, so that every label is the strongest somewhere
            parameter.add_(0.3 * torch.randn(parameter.shape))
    save_model(network, config, folder, training={"cases": 0}, licence="CC0-1.0")
    return folder


def blobs(shape: Sequence[int], *, seed: int = 0) -> npt.NDArray[np.float32]:
    """Smooth noise."""
    noise = np.random.default_rng(seed).normal(size=tuple(shape))
    return np.asarray(1000 * gaussian_filter(noise, 1.0), dtype=np.float32)


SHAPE = (7, 10, 13)
AFFINE = oblique((1.0, 1.5, 2.5))
EXACT = InferOptions(device="cpu", precision="32")


def some_images(folder: Path, count: int = 3) -> list[Path]:
    """NIfTI files of `SHAPE` voxels in `folder`, case0 and on."""
    folder.mkdir(exist_ok=True)
    return [save(folder / f"case{n}.nii.gz", blobs(SHAPE, seed=n), AFFINE) for n in range(count)]


def write_two_channels(folder: Path) -> Path:
    """A plain data set of four cases with one label, whose images hold both channels in one file."""
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for n in range(4):
        label = np.zeros((20, 24, 18), np.uint8)
        label[4:9, 5 : 12 + n, 3:9] = 1
        image = rng.normal(0, 1, (*label.shape, 2)) + label[..., None]
        save(folder / "images" / f"case{n}.nii.gz", image.astype(np.float32), np.eye(4))
        save(folder / "labels" / f"case{n}.nii.gz", label, np.eye(4))
    return folder
