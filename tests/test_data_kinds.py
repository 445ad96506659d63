"""Every kind of data goes from files through planning, a few steps of training and inference to masks of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from geometry import save
from PIL import Image as Picture

import medseg
from medseg.infer import load_model
from medseg.readers import read_label

SHAPE = (20, 24, 18)
# a network and a loop so small that a step takes a moment
SMALL = (
    "network.channels=[4,8]",
    "network.aspp_channels=4",
    "network.skip_channels=4",
    "network.decoder_channels=4",
    "train.batch_size=2",
    "train.steps_per_epoch=3",
    "train.precision='32'",
)

Array = npt.NDArray[Any]


def write_set(
    folder: Path,
    labels: Mapping[str, Any],
    cases: Sequence[Array],
    *,
    channels: Sequence[str] = ("MRI",),
    spacing: Sequence[float] = (1.0, 1.0, 1.5),
    offset: float = 0,
    **more: Any,
) -> Path:
    """A data set in nnU-Net's form: label maps as given, and images in which every value has its own brightness."""
    flat = cases[0].ndim == 2
    ending = ".png" if flat else ".nii.gz"
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n, label in enumerate(cases):
        for c in range(len(channels)):
            image = offset + 20.0 * (c + 1) * label + rng.normal(0, 5, label.shape)
            path = folder / "imagesTr" / f"case{n}_{c:04d}{ending}"
            if flat:
                Picture.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
            else:
                save(path, image.astype(np.float32), np.diag([*spacing, 1.0]))
        path = folder / "labelsTr" / f"case{n}{ending}"
        if flat:
            Picture.fromarray(label.astype(np.uint8)).save(path)
        else:
            save(path, label.astype(np.uint8), np.diag([*spacing, 1.0]))
    description = {
        "channel_names": {str(n): name for n, name in enumerate(channels)},
        "labels": {"background": 0, **labels},
        "numTraining": len(cases),
        "file_ending": ending,
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def boxes(shape: Sequence[int], values: Sequence[int], side: int = 6) -> Array:
    """A label map with a box of every value, side by side along the axes."""
    label = np.zeros(shape, np.uint8)
    corners = list(np.ndindex(*(s // side for s in shape)))
    for value, corner in zip(values, corners, strict=False):
        label[tuple(slice(c * side, (c + 1) * side) for c in corner)] = value
    return label


def train_and_infer(
    dataset: Path, tmp_path: Path, *settings: str, patch: Sequence[int] = (16, 16, 16), fold: Any = "all"
) -> tuple[medseg.Run, Array]:
    """The finished run, and the mask of the first case that the model writes, which lies on the case's own grid."""
    chosen = medseg.settings_from((*SMALL, f"windows.patch_size={list(patch)}", *settings))
    options = medseg.TrainOptions(settings=chosen, fold=fold, folds=2, device="cpu")
    run = medseg.train(dataset, tmp_path / "run", epochs=1, options=options)
    assert run.steps == 3
    rows = (run.folder / "metrics.csv").read_text().splitlines()
    assert np.isfinite(float(rows[1].split(",")[4]))
    ending = json.loads((dataset / "dataset.json").read_text())["file_ending"]
    images = sorted((dataset / "imagesTr").glob(f"case0_*{ending}"))
    model = load_model(run.folder)
    mask = np.asarray(model.segment(*images))
    label = read_label(dataset / "labelsTr" / f"case0{ending}").array
    assert mask.shape == label.shape
    assert set(np.unique(mask).tolist()) <= {0, *run.config.data.out_values}
    return run, mask


def test_ct_with_twenty_labels(tmp_path: Path) -> None:
    cases = [boxes(SHAPE, range(1, 21), side=5) for _ in range(2)]
    labels = {f"organ {n}": n for n in range(1, 21)}
    run, _ = train_and_infer(write_set(tmp_path / "set", labels, cases, channels=("CT",), offset=-100), tmp_path)
    how = run.config.preprocess.intensity[0]
    assert run.config.data.out_channels == 21
    assert how.normalise == "fixed"
    # labels 1 to 20 lie at −80 to 300, 20 apart, and noise of 5 around them
    assert how.mean == pytest.approx(110, abs=2)
    assert how.clip == pytest.approx((-90, 310), abs=8)


def test_slices_of_five_mm(tmp_path: Path) -> None:
    cases = [boxes((40, 48, 7), (1, 2), side=7) for _ in range(2)]
    dataset = write_set(tmp_path / "set", {"a": 1, "b": 2}, cases, spacing=(0.8, 0.8, 5.0))
    run, _ = train_and_infer(dataset, tmp_path, patch=(32, 32, 8))
    assert run.config.preprocess.spacing_mm == pytest.approx((0.8, 0.8, 5))
    assert run.config.network.strides == ((2, 2, 1), (2, 2, 1))


def test_two_channels(tmp_path: Path) -> None:
    cases = [boxes(SHAPE, (1, 2)) for _ in range(2)]
    dataset = write_set(tmp_path / "set", {"a": 1, "b": 2}, cases, channels=("CT", "PET"))
    run, _ = train_and_infer(dataset, tmp_path)
    assert [c.normalise for c in run.config.preprocess.intensity] == ["fixed", "image"]


def test_regions(tmp_path: Path) -> None:
    cases = [boxes(SHAPE, (1, 2)) for _ in range(2)]
    labels = {"whole": [1, 2], "core": [2]}
    dataset = write_set(tmp_path / "set", labels, cases, regions_class_order=[1, 2])
    run, _ = train_and_infer(dataset, tmp_path)
    assert run.config.data.is_regions


def test_ignored_voxels(tmp_path: Path) -> None:
    cases = [boxes(SHAPE, (1, 2, 3)) for _ in range(2)]
    run, mask = train_and_infer(write_set(tmp_path / "set", {"a": 1, "b": 2, "ignore": 3}, cases), tmp_path)
    assert run.config.data.ignore_value == 3
    assert run.config.data.out_channels == 3
    assert 3 not in mask


def test_cases_without_any_label(tmp_path: Path) -> None:
    cases = [boxes(SHAPE, values) for values in ((), (1,), (), ())]
    run, _ = train_and_infer(write_set(tmp_path / "set", {"lesion": 1}, cases), tmp_path, fold=0)
    assert run.report is not None
    assert "3 of 4 measured cases have no label" in (run.folder / "config.yaml").read_text()


def test_pictures(tmp_path: Path) -> None:
    cases = [boxes((40, 52), (1, 2), side=12) for _ in range(2)]
    run, _ = train_and_infer(
        write_set(tmp_path / "set", {"a": 1, "b": 2}, cases), tmp_path, "network.output_stride=4", patch=(32, 48)
    )
    assert run.config.data.spatial_dims == 2


def test_structures_of_three_voxels(tmp_path: Path) -> None:
    label = np.zeros((40, 44, 36), np.uint8)
    label[20, 20, 10:13] = 1
    run, _ = train_and_infer(write_set(tmp_path / "set", {"seed": 1}, [label, label[::-1].copy()]), tmp_path)
    text = (run.folder / "config.yaml").read_text()
    # as a ball of three voxels
    assert "smaller than 2 voxels across on this grid, so hardly to be learnt: `seed` 1.8" in text
    assert run.config.network.output_stride == 2
    assert run.config.train.foreground_fraction > 0.5


def test_one_case_smaller_than_a_patch(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"a": 1}, [boxes((9, 11, 7), (1,))])
    run, _ = train_and_infer(dataset, tmp_path, patch=(24, 24, 16))
    assert run.report is None
