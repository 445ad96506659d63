"""Every kind of data is learnt: from files through planning and some steps of training to masks that fit the labels."""

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
from medseg.metrics.codes import members
from medseg.readers import read_label

SHAPE = (20, 24, 18)
# a network so small that a step takes a moment, and a rate so large that it learns a case by heart in some tens of them
SMALL = (
    "network.channels=[8,16]",
    "network.aspp_channels=8",
    "network.skip_channels=8",
    "network.decoder_channels=8",
    "network.dropout=0",
    "train.batch_size=2",
    "train.learning_rate=0.02",
    "train.precision='32'",
    "augment.p_affine=0",
    "augment.p_intensity=0",
    "augment.p_gamma=0",
    "augment.p_noise=0",
    "augment.p_blur=0",
    "augment.p_low_resolution=0",
)
# of 20 labels each brightness is a step of its own
WIDER = (
    "network.channels=[16,32]",
    "network.aspp_channels=16",
    "network.skip_channels=16",
    "network.decoder_channels=16",
)
# a mask of zeros has 0, one that is right inside and wrong by a voxel all around a box of six about 0.6
LEARNT = 0.5

Array = npt.NDArray[Any]


def write_set(
    folder: Path,
    labels: Mapping[str, Any],
    cases: Sequence[Array],
    *,
    channels: Sequence[str] = ("MRI",),
    shown: Sequence[Sequence[float]] = (),
    spacing: Sequence[float] = (1.0, 1.0, 1.5),
    offset: float = 0,
    **more: Any,
) -> Path:
    """A data set in nnU-Net's form: label maps as given, and images in which every value has its own brightness.

    `shown`: for each channel the brightness by value; 20 a value unless given. Noise of 5 lies over all.
    """
    flat = cases[0].ndim == 2
    ending = ".png" if flat else ".nii.gz"
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n, label in enumerate(cases):
        for c in range(len(channels)):
            bright = np.asarray(shown[c])[label] if shown else 20.0 * label
            image = offset + bright + rng.normal(0, 5, label.shape)
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


def learn(
    dataset: Path,
    tmp_path: Path,
    *settings: str,
    patch: Sequence[int] = (16, 16, 16),
    steps: int = 40,
    fold: Any = "all",
    share: float = 1.0,
) -> medseg.Run:
    """The finished run, whose model has learnt the first case: in its mask `share` of the labels have Dice `LEARNT`."""
    chosen = medseg.settings_from(
        (*SMALL, f"windows.patch_size={list(patch)}", f"train.steps_per_epoch={steps}", *settings)
    )
    options = medseg.TrainOptions(settings=chosen, fold=fold, folds=2, device="cpu")
    run = medseg.train(dataset, tmp_path / "run", epochs=1, options=options)
    assert run.steps == steps
    rows = (run.folder / "metrics.csv").read_text().splitlines()
    assert np.isfinite(float(rows[1].split(",")[4]))
    mask, label = mask_and_label(run, dataset, "case0")
    found = dice(run.config.data, mask, label)
    assert sum(value > LEARNT for value in found.values()) >= share * len(found), found
    return run


def mask_and_label(run: medseg.Run, dataset: Path, case: str) -> tuple[Array, Array]:
    """The mask of a case by the model that was written, which lies on the case's own grid, and its label map."""
    ending = json.loads((dataset / "dataset.json").read_text())["file_ending"]
    images = sorted((dataset / "imagesTr").glob(f"{case}_*{ending}"))
    mask = np.asarray(load_model(run.folder).segment(*images))
    label = read_label(dataset / "labelsTr" / f"{case}{ending}").array
    assert mask.shape == label.shape
    assert set(np.unique(mask).tolist()) <= {0, *run.config.data.out_values}
    return mask, label


def dice(data: medseg.DataConfig, mask: Array, label: Array) -> dict[str, float]:
    """Of every label or region, over the voxels that are not ignored."""
    judged = np.ones_like(label, dtype=bool) if data.ignore_value is None else label != data.ignore_value
    found = {}
    for name in data.foreground:
        ours, theirs = (np.isin(array, members(data.labels[name]))[judged] for array in (mask, label))
        found[name] = 2 * float((ours & theirs).sum()) / float(ours.sum() + theirs.sum())
    return found


def test_ct_with_twenty_labels(tmp_path: Path) -> None:
    cases = [boxes(SHAPE, range(1, 21), side=5) for _ in range(2)]
    labels = {f"organ {n}": n for n in range(1, 21)}
    dataset = write_set(tmp_path / "set", labels, cases, channels=("CT",), offset=-100)
    # neighbours among so many are told apart last
    run = learn(dataset, tmp_path, *WIDER, steps=150, share=0.75)
    how = run.config.preprocess.intensity[0]
    assert run.config.data.out_channels == 21
    assert how.normalise == "fixed"
    # labels 1 to 20 lie at −80 to 300, 20 apart, and noise of 5 around them
    assert how.mean == pytest.approx(110, abs=2)
    assert how.clip == pytest.approx((-90, 310), abs=8)


def test_slices_of_five_mm(tmp_path: Path) -> None:
    cases = [boxes((40, 48, 7), (1, 2), side=7) for _ in range(2)]
    dataset = write_set(tmp_path / "set", {"a": 1, "b": 2}, cases, spacing=(0.8, 0.8, 5.0))
    run = learn(dataset, tmp_path, patch=(32, 32, 8))
    assert run.config.preprocess.spacing_mm == pytest.approx((0.8, 0.8, 5))
    assert run.config.network.strides == ((2, 2, 1), (2, 2, 1))


def test_two_channels(tmp_path: Path) -> None:
    cases = [boxes(SHAPE, (1, 2, 3)) for _ in range(2)]
    # one channel alone shows two of the labels alike and the third as background
    shown = ((0, 60, 0, 60), (0, 0, 60, 60))
    labels, channels = {"a": 1, "b": 2, "both": 3}, ("CT", "PET")
    run = learn(write_set(tmp_path / "set", labels, cases, channels=channels, shown=shown), tmp_path)
    assert [c.normalise for c in run.config.preprocess.intensity] == ["fixed", "image"]


def test_regions(tmp_path: Path) -> None:
    cases = [boxes(SHAPE, (1, 2)) for _ in range(2)]
    labels = {"whole": [1, 2], "core": [2]}
    run = learn(write_set(tmp_path / "set", labels, cases, regions_class_order=[1, 2]), tmp_path)
    assert run.config.data.is_regions


def test_ignored_voxels(tmp_path: Path) -> None:
    cases = [boxes(SHAPE, (1, 2, 3)) for _ in range(2)]
    dataset = write_set(tmp_path / "set", {"a": 1, "b": 2, "ignore": 3}, cases)
    run = learn(dataset, tmp_path)
    assert run.config.data.ignore_value == 3
    assert run.config.data.out_channels == 3
    assert 3 not in mask_and_label(run, dataset, "case0")[0]


def test_cases_without_any_label(tmp_path: Path) -> None:
    cases = [boxes(SHAPE, values) for values in ((1,), (), (), ())]
    dataset = write_set(tmp_path / "set", {"lesion": 1}, cases)
    splits = [{"train": ["case0", "case1"], "val": ["case2", "case3"]}]
    (dataset / "splits_final.json").write_text(json.dumps(splits))
    run = learn(dataset, tmp_path, fold=0)
    assert run.report is not None
    assert "3 of 4 measured cases have no label" in (run.folder / "config.yaml").read_text()
    mask, _ = mask_and_label(run, dataset, "case1")
    # of what it finds where there is a lesion, 216 voxels, hardly anything where there is none
    assert mask.sum() < 20


def test_pictures(tmp_path: Path) -> None:
    cases = [boxes((40, 52), (1, 2), side=12) for _ in range(2)]
    dataset = write_set(tmp_path / "set", {"a": 1, "b": 2}, cases)
    run = learn(dataset, tmp_path, "network.output_stride=4", patch=(32, 48))
    assert run.config.data.spatial_dims == 2


def test_structures_of_three_voxels(tmp_path: Path) -> None:
    label = np.zeros((40, 44, 36), np.uint8)
    label[20, 20, 10:13] = 1
    # as bright as small calcifications are: 63,360 voxels of noise have none of 12 standard deviations
    dataset = write_set(tmp_path / "set", {"seed": 1}, [label, label[::-1].copy()], shown=((0, 60),))
    run = learn(dataset, tmp_path, steps=80)
    text = (run.folder / "config.yaml").read_text()
    # as a ball of three voxels
    assert "smaller than 2 voxels across on this grid, so hardly to be learnt: `seed` 1.8" in text
    assert run.config.network.output_stride == 2
    assert run.config.train.foreground_fraction > 0.5


def test_one_case_smaller_than_a_patch(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"a": 1}, [boxes((9, 11, 7), (1,))])
    run = learn(dataset, tmp_path, patch=(24, 24, 16))
    assert run.report is None
