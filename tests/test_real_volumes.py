"""Real volumes of which each has something of its own, planned for, prepared and trained on for a few steps.

A spleen in slices of 5 mm (`pairs3d/ct_spleen_msd2`) and a torso of 117 labels (`ct_totalseg`). What the recipe reaches
on real data is measured elsewhere, see docs/recipe.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import medseg
from medseg.losses import loss
from medseg.patches import PatchSampler
from medseg.preprocess import prepare
from medseg.readers import read_label

pytestmark = pytest.mark.shared_data

# a network so small that a step takes a moment
SMALL = (
    "network.channels=[8,16]",
    "network.aspp_channels=8",
    "network.skip_channels=8",
    "network.decoder_channels=8",
    "train.batch_size=2",
    "train.precision='32'",
)


@pytest.fixture(scope="module")
def spleen(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain data set of the one case."""
    source = shared_data / "pairs3d" / "ct_spleen_msd2"
    folder = tmp_path_factory.mktemp("spleen")
    for part in ("image", "label"):
        (folder / f"{part}s").mkdir()
        (folder / f"{part}s" / "spleen_2.nii.gz").symlink_to(source / f"{part}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def spleen_plan(spleen: Path) -> medseg.Plan:
    return medseg.plan(spleen, device="cpu")


@pytest.fixture(scope="module")
def torso(shared_data: Path) -> Path:
    return shared_data / "ct_totalseg"


@pytest.fixture(scope="module")
def torso_plan(torso: Path) -> medseg.Plan:
    return medseg.plan(torso, device="cpu")


def peak_bytes(work: Callable[[], object], trace: Path) -> int:
    """The most that tensors made by `work` took at a time, by torch's own record of memory."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    changes = [int(e["args"]["Bytes"]) for e in sorted(events, key=lambda e: e["ts"])]
    return int(max(np.cumsum(changes)))


def trained(dataset: Path, out: Path, *settings: str, steps: int) -> medseg.Run:
    """A run on all cases, whose loss is finite."""
    chosen = medseg.settings_from((*SMALL, f"train.steps_per_epoch={steps}", *settings))
    options = medseg.TrainOptions(settings=chosen, fold="all", device="cpu")
    run = medseg.train(dataset, out, epochs=1, options=options)
    assert run.steps == steps
    model = json.loads((run.folder / "model.json").read_text())
    assert model["training"]["skipped_batches"] == 0
    assert np.isfinite(float((run.folder / "metrics.csv").read_text().splitlines()[1].split(",")[4]))
    return run


# ---- slices of 5 mm


def test_thick_slices_stay_as_they_are(spleen_plan: medseg.Plan) -> None:
    config = spleen_plan.config
    assert config.data.channels == ("CT",)
    assert config.preprocess.spacing_mm == pytest.approx((0.794922, 0.794922, 5))
    # 0.79, 1.6, 3.2: only then are the slices no longer more than twice as far apart
    assert config.network.strides == ((2, 2, 1), (2, 2, 1), (2, 2, 2))
    assert config.augment.rotation_deg == (5, 5, 30)
    # 64 × 70 × 60 mm: about equally far in all directions
    assert config.windows.patch_size == (80, 88, 12)
    assert config.train.batch_size == 4


def test_a_prepared_spleen_has_all_its_voxels(spleen: Path, spleen_plan: medseg.Plan) -> None:
    config = spleen_plan.config
    (case,) = medseg.read_dataset(spleen).cases
    found = prepare(case, config.preprocess, config.data, with_label=True)
    label = read_label(spleen / "labels" / "spleen_2.nii.gz").array
    assert found.label is not None
    assert int((found.label == 1).sum()) == int((label == 1).sum())
    assert found.grid.spacing_mm == pytest.approx(config.preprocess.spacing_mm)


def test_a_spleen_is_learnt(spleen: Path, tmp_path: Path) -> None:
    settings = ("windows.patch_size=[64,64,16]", "train.learning_rate=0.02", "augment.p_affine=0")
    run = trained(spleen, tmp_path / "run", *settings, steps=30)
    mask = np.asarray(medseg.load_model(run.folder).segment(spleen / "images" / "spleen_2.nii.gz"))
    label = read_label(spleen / "labels" / "spleen_2.nii.gz").array
    assert mask.shape == label.shape
    found = 2 * ((mask == 1) & (label == 1)).sum() / ((mask == 1).sum() + (label == 1).sum())
    # three seeds had 0.70 to 0.75, and a mask of zeros has none
    assert found > 0.5


# ---- 117 labels


def test_a_torso_of_117_labels_is_planned_for(torso_plan: medseg.Plan) -> None:
    config = torso_plan.config
    assert config.data.out_channels == 118
    assert config.preprocess.spacing_mm == pytest.approx((3, 3, 3), abs=1e-3)
    assert config.network.strides is None
    # labels name their sides
    assert config.augment.flip_axes == ()
    assert config.windows.patch_size == (40, 40, 48)
    assert config.train.batch_size == 4


def test_the_loss_of_117_labels_takes_little_beside_its_gradient(
    torso: Path, torso_plan: medseg.Plan, tmp_path: Path
) -> None:
    config = torso_plan.config
    cases = medseg.read_dataset(torso).cases
    prepared = [prepare(case, config.preprocess, config.data, with_label=True) for case in cases]
    generator = torch.Generator().manual_seed(0)
    sampler = PatchSampler(
        prepared,
        patch_size=config.windows.patch_size,
        batch_size=config.train.batch_size,
        foreground_fraction=1,
        generator=generator,
    )
    label = sampler.draw().label
    assert len(label.unique()) > 30
    shape = (len(label), config.data.out_channels, *label.shape[1:])
    logits = torch.randn(shape, generator=generator).requires_grad_()
    values: list[torch.Tensor] = []

    def step() -> None:
        values.append(loss(config.loss, config.data, logits, label))
        values[0].backward()

    taken = peak_bytes(step, tmp_path / "trace.json")
    assert torch.isfinite(values[0])
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    # the gradient is as large as the logits; beside it there is a number a voxel, of 118, and what a chunk needs. With
    # probabilities and a one-hot label map it would be three times as much and more
    assert 1 <= taken / logits.nbytes < 1.25


def test_a_torso_of_117_labels_trains_and_is_segmented(torso: Path, tmp_path: Path) -> None:
    settings = ("preprocess.spacing_mm=[6,6,6]", "windows.patch_size=[24,24,24]")
    run = trained(torso, tmp_path / "run", *settings, steps=3)
    image = torso / "imagesTr" / "ct_small_0000.nii.gz"
    mask, scan = medseg.load_model(run.folder).segment(image), nib.load(image)
    # at 6 mm inside, at 3 mm outside
    assert mask.shape == scan.shape
    # the header holds single precision
    assert np.allclose(mask.affine, scan.affine, atol=1e-4)
