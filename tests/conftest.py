"""Data that tests share: small synthetic data sets, and the real ones where they are at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture

MakeDataset = Callable[..., Path]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets, from MEDSEG_DATA; skips where there is none."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("MEDSEG_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set MEDSEG_DATA")
    return folder


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> MakeDataset:
    """Makes a data set of bright spheres (label 1) with darker cores (label 2) in noise, and gives its folder.

    `spatial_dims` 3: NIfTI of about (20, 24, 18) voxels, 1 × 1 × 1.5 mm; 2: PNG of about (40, 48). `form`: plain or
    nnunet.
    """

    def make(*, cases: int = 4, spatial_dims: int = 3, form: str = "plain", seed: int = 0, name: str = "tiny") -> Path:
        folder = tmp_path / name
        images, labels = ("images", "labels") if form == "plain" else ("imagesTr", "labelsTr")
        ending = ".nii.gz" if spatial_dims == 3 else ".png"
        suffix = "" if form == "plain" else "_0000"
        for sub in (images, labels):
            (folder / sub).mkdir(parents=True)
        rng = np.random.default_rng(seed)
        for n in range(cases):
            image, label = _spheres(rng, spatial_dims)
            _save(folder / images / f"case{n}{suffix}{ending}", image)
            _save(folder / labels / f"case{n}{ending}", label)
        if form == "nnunet":
            description = {
                "channel_names": {"0": "MRI"},
                "labels": {"background": 0, "shell": 1, "core": 2},
                "numTraining": cases,
                "file_ending": ending,
            }
            (folder / "dataset.json").write_text(json.dumps(description))
        return folder

    return make


def _spheres(rng: np.random.Generator, spatial_dims: int) -> tuple[np.ndarray, np.ndarray]:
    base = np.array((20, 24, 18) if spatial_dims == 3 else (40, 48))
    shape = base + rng.integers(-1, 2, spatial_dims)
    centre = shape / 2 + rng.uniform(-2, 2, spatial_dims)
    points = np.stack(np.meshgrid(*[np.arange(s) for s in shape], indexing="ij"), -1)
    distance = np.sqrt(((points - centre) ** 2).sum(-1)) / shape.min()
    label = np.where(distance < 0.16, 2, np.where(distance < 0.33, 1, 0)).astype(np.uint8)
    image = np.array([50.0, 150.0, 100.0])[label] + rng.normal(0, 8, shape)
    return (image.astype(np.float32) if spatial_dims == 3 else image.clip(0, 255).astype(np.uint8)), label


def _save(path: Path, array: np.ndarray) -> None:
    if path.suffix == ".png":
        Picture.fromarray(array).save(path)
    else:
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.5, 1.0])), path)
