"""Planning: what is measured, and which configuration follows; above all, when left and right must not be mixed up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from geometry import save
from PIL import Image as Picture

import medseg
from medseg.cases import Case, Dataset, Labels
from medseg.config import Config, dump_yaml, read_config
from medseg.datasets import read_dataset
from medseg.errors import ConfigError, DataError
from medseg.fingerprint import Fingerprint, measure
from medseg.model import new_network
from medseg.networks import build_bare, list_networks
from medseg.networks.receptive import count
from medseg.plan import BYTES_A_VOXEL, VOXELS, Plan, make_plan, voxels_that_fit
from medseg.preprocess import prepare

MakeDataset = Callable[..., Path]

PRINT = Fingerprint(
    spatial_dims=3,
    pictures=False,
    cases=3,
    shapes=((60, 70, 50), (62, 72, 52), (64, 74, 54)),
    spacings_mm=((1.0, 1.0, 1.5),) * 3,
    label_values=(0, 1, 2),
    foreground=({"mean": 40.0, "sd": 20.0, "p005": -60.0, "p995": 180.0},),
    nonzero_share=0.9,
)
# such as crops of an organ: a patch holds them whole
SMALL = replace(PRINT, shapes=((34, 50, 35), (38, 54, 40), (36, 52, 38)), spacings_mm=((1.0, 1.0, 1.0),) * 3)
PICTURES = replace(PRINT, spatial_dims=2, pictures=True, shapes=((420, 580),) * 3, spacings_mm=((1.0, 1.0),) * 3)
# slices of 6 mm, and one case with slices of 3 mm
THICK = replace(PRINT, shapes=((256, 256, 20),) * 10, spacings_mm=((0.8, 0.8, 6.0),) * 9 + ((0.8, 0.8, 3.0),))


def plan(fingerprint: Fingerprint = PRINT, *, labels: Labels | None = None, channel: str = "MRI", **more: Any) -> Plan:
    dataset = Dataset(Path("set"), "nnunet", (), (channel,), labels or {"background": 0, "a": 1, "b": 2})
    return make_plan(dataset, fingerprint, **more)


# ---- measuring


def test_what_is_measured(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    image = np.zeros((4, 5, 6), np.float32)
    label = np.zeros((4, 5, 6), np.uint8)
    label[1, 2, :4] = 1, 1, 5, 5
    image[label > 0] = (10, 20, 30, 40)
    # stored with axes along posterior, left, superior
    affine = np.array([[0, -2.0, 0, 0], [-1.0, 0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 1]])
    save(tmp_path / "images" / "c.nii.gz", image, affine)
    save(tmp_path / "labels" / "c.nii.gz", label, affine)
    found = measure(read_dataset(tmp_path))
    assert (found.spatial_dims, found.pictures, found.cases) == (3, False, 1)
    assert found.shapes == ((5, 4, 6),)
    assert found.spacings_mm == ((2.0, 1.0, 3.0),)
    assert found.label_values == (0, 1, 5)
    assert found.foreground[0]["mean"] == 25
    assert found.foreground[0]["sd"] == pytest.approx(125**0.5)
    assert found.nonzero_share == pytest.approx(4 / 120)


def write_two(folder: Path, maps: tuple[np.ndarray, np.ndarray], **more: Any) -> Dataset:
    """Two cases in which label 1 is 10 in the first and 20 in the second, label 9 is 90, and the rest 0."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for n, label in enumerate(maps):
        image = (10 * (n + 1) * (label == 1) + 90 * (label == 9)).astype(np.float32)
        save(folder / "images" / f"c{n}.nii.gz", image, np.eye(4))
        save(folder / "labels" / f"c{n}.nii.gz", label.astype(np.uint8), np.eye(4))
    return replace(read_dataset(folder), **more)


def test_a_large_organ_does_not_speak_for_all_cases(tmp_path: Path) -> None:
    small, large = np.zeros((8, 9, 10)), np.ones((30, 31, 32))
    small[0, 0, :5] = 1
    found = measure(write_two(tmp_path, (small, large)))
    assert found.foreground[0]["mean"] == 15
    assert found.label_voxels == ({1: 5}, {1: 30 * 31 * 32})


def test_ignored_voxels_are_not_measured(tmp_path: Path) -> None:
    label = np.zeros((8, 9, 10))
    label[0, 0, :2], label[1] = 1, 9
    found = measure(write_two(tmp_path, (label, 0 * label), labels={"background": 0, "a": 1, "ignore": 9}))
    assert found.label_voxels == ({1: 2}, {})
    # nor does the second case, which has no label, add anything
    assert (found.foreground[0]["mean"], found.foreground[0]["sd"]) == (10, 0)


def test_without_any_label_the_whole_images_are_measured(tmp_path: Path) -> None:
    empty = np.zeros((8, 9, 10))
    found = measure(write_two(tmp_path, (empty, empty), labels={"background": 0, "a": 1}))
    assert found.foreground == ({"mean": 0.0, "sd": 0.0, "p005": 0.0, "p995": 0.0},)
    assert found.lowest == (0.0,)


def test_a_plain_folder_gets_names_for_its_values(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    save(tmp_path / "images" / "c.nii.gz", np.ones((4, 5, 6), np.float32), np.eye(4))
    save(tmp_path / "labels" / "c.nii.gz", np.arange(120).reshape(4, 5, 6).astype(np.uint8) // 50 * 4, np.eye(4))
    dataset = read_dataset(tmp_path)
    found = make_plan(dataset, measure(dataset))
    assert found.config.data.labels == {"background": 0, "label_4": 4, "label_8": 8}
    assert "give them names" in found.reasons["data.labels"]


def test_pictures_are_measured_as_two_dimensional(tiny_dataset: MakeDataset) -> None:
    found = measure(read_dataset(tiny_dataset(spatial_dims=2)))
    assert (found.spatial_dims, found.pictures, found.cases) == (2, True, 4)


def test_a_label_of_another_shape_is_named(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    save(tmp_path / "images" / "c.nii.gz", np.ones((4, 5, 6), np.float32), np.eye(4))
    save(tmp_path / "labels" / "c.nii.gz", np.ones((4, 6, 5), np.uint8), np.eye(4))
    with pytest.raises(DataError, match=r"labels/c\.nii\.gz: shape \(4, 6, 5\)"):
        measure(read_dataset(tmp_path))


def test_a_data_set_without_labels_is_refused() -> None:
    image = Case("c", (Path("c.nii"),), None, "c")
    with pytest.raises(DataError, match="no case with a label"):
        measure(Dataset(Path("set"), "plain", (image,), ("image",)))


def test_labels_of_background_only_are_refused() -> None:
    dataset = Dataset(Path("set"), "plain", (), ("image",))
    with pytest.raises(DataError, match="background 0 only"):
        make_plan(dataset, replace(PRINT, label_values=(0,)))


# ---- spacing and patch


def test_spacing_is_the_median() -> None:
    spacings = ((1.0, 1.0, 1.5), (1.2, 1.0, 2.0), (1.1, 1.0, 9.0))
    assert plan(replace(PRINT, spacings_mm=spacings)).config.preprocess.spacing_mm == (1.1, 1.0, 2.0)


def test_thick_slices_come_at_their_tenth_percentile() -> None:
    # sorted 3, 6, 6, …: the 10th percentile of ten lies at 0.9 of the way from the first to the second
    found = plan(THICK)
    assert found.config.preprocess.spacing_mm == pytest.approx((0.8, 0.8, 5.7))
    assert "axis 2" in found.reasons["preprocess.spacing_mm"]


def test_a_coarse_axis_is_halved_later_and_turned_about() -> None:
    config = plan(THICK).config
    # 0.8 → 1.6 → 3.2 mm in plane catch up with 5.7 mm after two steps and a half
    assert config.network.strides == ((2, 2, 1), (2, 2, 1), (2, 2, 2))
    assert config.augment.rotation_deg == (5.0, 5.0, 30.0)


def test_even_spacing_needs_no_strides() -> None:
    assert plan().config.network.strides is None


def test_mostly_empty_images_are_cropped() -> None:
    assert plan(replace(PRINT, nonzero_share=0.3)).config.preprocess.crop == "nonzero"
    assert plan().config.preprocess.crop == "none"


@pytest.mark.parametrize("fingerprint", [PRINT, PICTURES, THICK], ids=["even", "pictures", "thick"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_patch_stays_within_the_budget_of_voxels(fingerprint: Fingerprint, device: str) -> None:
    config = plan(fingerprint, device=device).config
    patch = config.windows.patch_size
    assert np.prod(patch) <= VOXELS[device, fingerprint.spatial_dims]
    # slices of 5.7 mm are halved a quarter as often as pixels of 0.8 mm
    steps = (16, 16) if fingerprint.spatial_dims == 2 else (8, 8, 2 if fingerprint is THICK else 8)
    assert all(p % step == 0 and p > 0 for p, step in zip(patch, steps))
    assert config.train.batch_size >= 2


def test_a_patch_reaches_equally_far_in_mm() -> None:
    patch = plan(THICK).config.windows.patch_size
    reach = np.array(patch) * (0.8, 0.8, 5.7)
    # to one step of 8 pixels or 2 slices
    assert reach.max() - reach.min() <= max(8 * 0.8, 2 * 5.7)
    # few slices do not coarsen the network: its stride on their axis is 1
    assert plan(THICK).config.network.output_stride == 4


def test_a_patch_holds_no_more_slices_than_there_are() -> None:
    thin = replace(THICK, shapes=((256, 256, 5),) * 10, spacings_mm=((0.8, 0.8, 5.0),) * 10)
    assert plan(thin).config.windows.patch_size[2] == 6


def test_a_case_smaller_than_a_step_gets_one_step() -> None:
    found = plan(replace(PRINT, shapes=((5, 30, 9),) * 3, spacings_mm=((1.0, 1.0, 1.0),) * 3)).config
    assert found.windows.patch_size == (8, 32, 16)


@pytest.mark.parametrize("change", [-6e-8, 0, 6e-8])
def test_a_header_that_is_rounded_makes_no_other_patch(change: float) -> None:
    even = replace(PRINT, shapes=((24, 32, 16),) * 3, spacings_mm=((1.0, 1.0, 1.0), (1.0,) * 3, (1 + change,) * 3))
    assert plan(even).config.windows.patch_size == (24, 32, 16)


@pytest.mark.parametrize("memory_gb", [1, 4, 16, 80])
@pytest.mark.parametrize("labels", [2, 117])
def test_a_step_fits_into_the_memory_of_a_gpu(memory_gb: float, labels: int) -> None:
    large = replace(PRINT, shapes=((500, 500, 400),) * 3)
    names: Labels = {f"l{n}": n for n in range(1, labels + 1)}
    config = plan(large, labels=names, device="cuda", memory_bytes=memory_gb * 1e9).config
    voxels = config.train.batch_size * np.prod(config.windows.patch_size)
    assert voxels <= voxels_that_fit(memory_gb * 1e9, spatial_dims=3, scores=labels + 1)
    assert config.train.batch_size >= 2
    if memory_gb == 80:
        assert config.windows.patch_size == plan(large, labels=names, device="cuda").config.windows.patch_size


def test_small_patches_come_in_larger_batches_on_a_gpu() -> None:
    assert plan(device="cuda").config.train.batch_size == 4
    large = plan(replace(PRINT, shapes=((500, 500, 400),) * 3), device="cuda").config
    assert large.train.batch_size == 2
    # most of the 128³ voxels that a patch may have
    assert 0.8 * 128**3 < np.prod(large.windows.patch_size) <= 128**3


def test_each_of_several_gpus_does_the_batch_of_one() -> None:
    one, eight = (plan(replace(PRINT, shapes=((500, 500, 400),) * 3), device="cuda", processes=n) for n in (1, 8))
    assert (one.config.train.batch_size, eight.config.train.batch_size) == (2, 16)
    assert "processes" not in one.reasons["train.batch_size"]
    assert "2 patches keep the gradient steady" in eight.reasons["train.batch_size"]
    assert "so many for each of 8 processes" in eight.reasons["train.batch_size"]
    # patch and network do not change
    assert eight.config.model_copy(update={"train": one.config.train}) == one.config
    # nor does the learning rate; patches centred on labels are counted in the whole batch
    share = {"batch_size": 2, "foreground_fraction": 0.5}
    assert eight.config.train.model_copy(update=share) == one.config.train


def test_processes_on_a_cpu_share_the_batch_and_each_has_something_of_it() -> None:
    one, two, eight = (plan(replace(PRINT, shapes=((64, 74, 54),) * 3), processes=n) for n in (1, 2, 8))
    assert one.config == two.config
    assert eight.config.train.batch_size == 8
    assert "one for each of 8 processes" in eight.reasons["train.batch_size"]


@pytest.mark.parametrize("fingerprint", [PRINT, PICTURES], ids=["volumes", "pictures"])
def test_the_bytes_of_a_voxel_are_those_that_the_network_keeps(fingerprint: Fingerprint) -> None:
    config = plan(fingerprint).config
    dims = fingerprint.spatial_dims
    network = build_bare(config.network, dims, 1, 3).train()
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    image = torch.zeros(1, 1, *config.windows.patch_size, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(image)
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    found = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights) / image.numel()
    # an upper bound, and no loose one
    assert BYTES_A_VOXEL[dims] / 2 < found <= BYTES_A_VOXEL[dims]


def test_small_cases_fit_whole_into_a_patch() -> None:
    small = replace(PRINT, shapes=((20, 30, 17),) * 3, spacings_mm=((1.0, 1.0, 1.0),) * 3)
    assert plan(small).config.windows.patch_size == (24, 32, 24)


# ---- intensities


@pytest.mark.parametrize("channel", ["CT", "ct", "abdominal CT", "CT_venous", "HU", "NCCT"])
def test_ct_is_clipped_to_the_percentiles_and_fixed(channel: str) -> None:
    how = plan(channel=channel).config.preprocess.intensity[0]
    assert (how.clip, how.normalise, how.mean, how.sd) == ((-60, 180), "fixed", 40, 20)


AIR = {"mean": -1023.0, "sd": 1.0, "p005": -1024.0, "p995": -1022.0}
WHOLE = {"mean": -500.0, "sd": 300.0, "p005": -1024.0, "p995": 976.0}


def test_ct_is_not_clipped_to_labels_that_are_all_alike() -> None:
    found = plan(replace(PRINT, foreground=(AIR,), anywhere=(WHOLE,)), channel="CT")
    how = found.config.preprocess.intensity[0]
    assert (how.clip, how.mean, how.sd) == ((-1024, 976), -500, 300)
    assert "of the whole images (in the labels they are -1024 and -1022)" in found.reasons["preprocess.intensity"]
    # a tissue of few Hounsfield units is a tissue all the same
    fluid = {"mean": 5.0, "sd": 2.0, "p005": 0.0, "p995": 10.0}
    kept = plan(replace(PRINT, foreground=(fluid,), anywhere=(WHOLE,)), channel="CT").config.preprocess.intensity[0]
    assert (kept.clip, kept.mean, kept.sd) == ((0, 10), 5, 2)


def test_a_label_of_the_air_around_a_patient_leaves_the_image_its_contrast(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    image = np.full((10, 11, 12), -1024, np.int16)
    image[2:8, 2:8, 2:8] = np.arange(216).reshape(6, 6, 6)
    save(tmp_path / "images" / "c.nii.gz", image, np.eye(4))
    save(tmp_path / "labels" / "c.nii.gz", (image == -1024).astype(np.uint8), np.eye(4))
    dataset = read_dataset(tmp_path)
    config = make_plan(dataset, measure(dataset)).config
    assert config.data.channels == ("CT",)
    prepared = prepare(dataset.cases[0], config.preprocess, config.data, with_label=True)
    # nearly all of 0 to 215 is within the 99.5th percentile
    assert len(np.unique(np.asarray(prepared.image))) > 200


@pytest.mark.parametrize("channel", ["MRI", "T2", "octave", "contrast", "PET"])
def test_other_images_are_normalised_by_themselves(channel: str) -> None:
    assert plan(channel=channel).config.preprocess.intensity[0].normalise == "image"


def test_a_volume_without_a_name_is_ct_where_it_begins_with_air() -> None:
    for lowest, name, normalise in ((-1024.0, "CT", "fixed"), (-200.0, "image", "image"), (0.0, "image", "image")):
        found = plan(replace(PRINT, lowest=(lowest,)), channel="image").config
        assert found.data.channels == (name,)
        assert found.preprocess.intensity[0].normalise == normalise
    assert plan(replace(PRINT, lowest=(-1024.0,)), channel="MRI").config.data.channels == ("MRI",)


def test_every_channel_has_its_reason() -> None:
    dataset = Dataset(Path("set"), "nnunet", (), ("CT", "PET"), {"background": 0, "a": 1})
    found = make_plan(dataset, replace(PRINT, foreground=PRINT.foreground * 2))
    assert [c.normalise for c in found.config.preprocess.intensity] == ["fixed", "image"]
    assert "CT: Hounsfield" in found.reasons["preprocess.intensity"]
    assert "PET: arbitrary" in found.reasons["preprocess.intensity"]


# ---- small structures, empty cases


def with_voxels(*counts: dict[int, int], **more: Any) -> Fingerprint:
    even = {"shapes": ((100, 100, 100),) * len(counts), "spacings_mm": ((1.0, 1.0, 1.0),) * len(counts)}
    return replace(PRINT, label_voxels=counts, **(even | more))


def test_a_label_smaller_than_two_voxels_is_told(caplog: pytest.LogCaptureFixture) -> None:
    # a ball of 4 voxels is 1.97 across, one of 5 is 2.12
    found = plan(with_voxels({1: 4, 2: 30000}, {1: 4, 2: 5}))
    assert "`a` 2.0" in found.reasons["preprocess.spacing_mm"]
    assert "`b`" not in found.reasons["preprocess.spacing_mm"]
    assert "1 labels are smaller than 2 voxels" in caplog.text
    assert "smaller than" not in plan(with_voxels({1: 5, 2: 30000})).reasons["preprocess.spacing_mm"]


def test_sizes_are_those_on_the_networks_grid() -> None:
    # 40 voxels of 0.5 × 0.5 × 0.5 mm are 5 of 1 mm³; 32 are 4
    spacings = ((1.0, 1.0, 1.0),) * 2 + ((0.5, 0.5, 0.5),)
    shapes = ((100, 100, 100),) * 3
    for voxels, small in ((40, False), (32, True)):
        found = plan(with_voxels({}, {}, {1: voxels}, spacings_mm=spacings, shapes=shapes))
        assert ("smaller than 2" in found.reasons["preprocess.spacing_mm"]) is small


def test_where_all_labels_are_small_the_stride_is_too() -> None:
    tiny, mixed = with_voxels({1: 20, 2: 20}), with_voxels({1: 20, 2: 20000})
    assert plan(tiny).config.network.output_stride == 2
    assert "3.4 voxels across" in plan(tiny).reasons["network.output_stride"]
    assert plan(mixed).config.network.output_stride == 4
    assert np.prod(plan(tiny).config.windows.patch_size) <= VOXELS["cpu", 3] / 8


def test_rare_labels_are_looked_for() -> None:
    rare, common = with_voxels({1: 500}), with_voxels({1: 50000})
    assert plan(common).config.train.foreground_fraction == 0.33
    # (1 − 0.53)⁴ is 0.05
    assert plan(rare).config.train.foreground_fraction == 0.53
    assert "0.05 % of a case" in plan(rare).reasons["train.foreground_fraction"]


def test_rare_labels_of_cases_as_small_as_a_patch_need_no_search() -> None:
    small = with_voxels({1: 40}, shapes=((40, 40, 40),))
    assert plan(small).config.train.foreground_fraction == 0.33


def test_empty_cases_are_counted() -> None:
    reason = plan(with_voxels({}, {1: 5000}, {})).reasons["train.foreground_fraction"]
    assert "2 of 3 measured cases have no label" in reason


def test_a_region_is_as_large_as_its_values_together() -> None:
    dataset = Dataset(Path("set"), "nnunet", (), ("MRI",), {"whole": (1, 2), "core": (2,)}, (1, 2))
    found = make_plan(dataset, with_voxels({1: 3, 2: 3}))
    assert "`core` 1.8" in found.reasons["preprocess.spacing_mm"]
    assert "`whole`" not in found.reasons["preprocess.spacing_mm"]


# ---- sides


@pytest.mark.parametrize(
    "name",
    [
        "left kidney",
        "kidney_left",
        "Right-Hippocampus",
        "LeftLung",
        "lungRight",
        "leftkidney",
        "kidney_L",
        "kidneyL",
        "femur.r",
        "LH",
        "Niere links",
        "linke_Niere",
        "rechter longkwab",
        "rein droit",
        "poumon gauche",
    ],
)
def test_labels_that_tell_sides_apart_are_never_mirrored(name: str) -> None:
    found = plan(labels={"background": 0, "other": 1, name: 2})
    assert found.config.augment.flip_axes == ()
    assert name in found.reasons["augment.flip_axes"]


@pytest.mark.parametrize("name", ["liver", "anterior", "colon", "tumour", "lr_mean", "Hirn", "label_1"])
def test_labels_without_a_side_are_mirrored_from_left_to_right(name: str) -> None:
    found = plan(labels={"background": 0, name: 1})
    assert found.config.augment.flip_axes == (0,)
    # axis 0 runs from left to right only in this order
    assert found.config.preprocess.orient


def test_pictures_are_changed_more_than_slices() -> None:
    pictures, slices = plan(PICTURES), plan(replace(PICTURES, pictures=False))
    assert pictures.config.augment.brightness == 2 * slices.config.augment.brightness
    assert pictures.config.augment.p_bias_field > 0 == slices.config.augment.p_bias_field
    assert "device" in pictures.reasons["augment.p_intensity"]
    assert "augment.p_intensity" not in slices.reasons


def test_pictures_are_mirrored_from_left_to_right_only() -> None:
    assert plan(PICTURES).config.augment.flip_axes == (1,)


@pytest.mark.parametrize("fingerprint", [PICTURES, replace(PICTURES, pictures=False)], ids=["pictures", "slices"])
def test_sided_labels_in_a_plane_are_never_mirrored(fingerprint: Fingerprint) -> None:
    found = plan(fingerprint, labels={"background": 0, "left lung": 1})
    assert found.config.augment.flip_axes == ()
    assert "left lung" in found.reasons["augment.flip_axes"]


@pytest.mark.parametrize(
    "names",
    [
        ["kidney", "LKidney"],
        ["RParotid"],
        ["lkidney", "rkidney"],
        ["RUL", "LLL"],
        ["RML"],
        ["rene_sinistro"],
        ["pulmao direito"],
        ["femur.izq"],
        ["a", "hip l", "hip r"],
        ["Llung", "Rlung"],
    ],
)
def test_sides_are_told_in_many_ways(names: list[str]) -> None:
    found = plan(PICTURES, labels={"background": 0} | {name: n for n, name in enumerate(names, 1)})
    assert found.config.augment.flip_axes == ()


@pytest.mark.parametrize("names", [["liver", "tumour"], ["anterior", "posterior"], ["wall", "ruler"], ["Liver", "Rib"]])
def test_what_tells_no_side_is_mirrored(names: list[str]) -> None:
    found = plan(PICTURES, labels={"background": 0} | {name: n for n, name in enumerate(names, 1)})
    assert found.config.augment.flip_axes == (1,)


# ---- pictures, and the whole


def test_pictures_come_to_a_shape_with_a_long_side_of_256_on_a_cpu() -> None:
    found = plan(PICTURES).config
    # 420 × 580 times 256/580 is 185.4 × 256, in multiples of 16
    assert found.preprocess.shape == (192, 256)
    assert found.preprocess.spacing_mm is None
    assert not found.preprocess.orient
    assert found.windows.patch_size == (192, 256)


@pytest.mark.parametrize("fingerprint", [PRINT, PICTURES, THICK], ids=["even", "pictures", "thick"])
def test_every_reason_names_a_setting_and_stands_in_the_yaml(fingerprint: Fingerprint, tmp_path: Path) -> None:
    found = plan(fingerprint)
    for name in found.reasons:
        section, key = name.split(".")
        assert key in getattr(Config(), section).__class__.model_fields, name
    text = dump_yaml(found.config, found.reasons)
    assert all(f"  # {reason}\n" in text for reason in found.reasons.values())
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    assert read_config(tmp_path / "plan.yaml") == found.config


@pytest.mark.parametrize("fingerprint", [PRINT, PICTURES, THICK], ids=["even", "pictures", "thick"])
def test_the_planned_network_can_be_built(fingerprint: Fingerprint) -> None:
    assert sum(p.numel() for p in new_network(plan(fingerprint).config).parameters()) > 1000


# ---- another network than the usual one


@pytest.mark.parametrize("name", list_networks())
def test_every_network_is_planned_at_the_cost_of_the_usual_one(name: str) -> None:
    # slices of 6 mm: strides by axis, as many as the network has steps
    usual, other = plan(THICK).config, plan(THICK, network={"name": name}).config
    assert other.network.name == name
    costs = []
    for config in (usual, other):
        dims, shape = config.data.spatial_dims, config.windows.patch_size
        costs.append(count(new_network(config), spatial_dims=dims, in_channels=1, shape=shape)[1])
    # a stack at full resolution is thinned in steps of 8 channels, each of which is a quarter of it or more
    assert (0.2 if name == "dilated_stack" else 0.3) * costs[0] < costs[1] <= 1.05 * costs[0]
    with torch.device("meta"):
        smallest: Any = new_network(other).min_shape
    assert all(p >= s for p, s in zip(other.windows.patch_size, smallest))


def test_small_volumes_get_maps_at_full_resolution() -> None:
    found = plan(SMALL)
    network, patch = found.config.network, found.config.windows.patch_size
    assert (network.name, network.channels, network.strides, patch) == (
        "residual_unet",
        (16, 32, 64, 128),
        None,
        (40, 56, 40),
    )
    usual = plan(SMALL, network={"name": "deeplabv3plus"}).config.network
    assert (network.norm, network.leak, network.dropout) == (usual.norm, usual.leak, usual.dropout)
    (reason,) = (text for key, text in found.reasons.items() if key.startswith("network."))
    assert "volumes of 38 × 54 × 40 voxels are few enough for maps at full resolution" in reason
    # no dearer than what it replaces
    cost = [
        count(new_network(c), spatial_dims=3, in_channels=1, shape=patch)[1]
        for c in (found.config, found.config.model_copy(update={"network": usual}))
    ]
    assert 0.5 * cost[1] < cost[0] < cost[1]
    assert plan(SMALL, device="cuda").config.network == network


@pytest.mark.parametrize(
    ("fingerprint", "given"),
    [
        (PRINT, {}),
        (THICK, {}),
        (PICTURES, {}),
        # larger than a patch; of thick slices; with an axis of one map voxel; with tiny labels
        (replace(SMALL, shapes=((48, 56, 48),) * 3), {}),
        (replace(SMALL, spacings_mm=((1.0, 1.0, 3.0),) * 3), {}),
        (replace(SMALL, shapes=((34, 50, 8),) * 3), {}),
        (replace(SMALL, label_voxels=({1: 20},) * 3), {}),
        # whoever sets what it does not read means the usual network
        (SMALL, {"output_stride": 4}),
        (SMALL, {"name": "deeplabv3plus"}),
    ],
)
def test_others_keep_the_usual_network(fingerprint: Fingerprint, given: dict[str, Any]) -> None:
    network = plan(fingerprint, network=given).config.network
    assert (network.name, network.upsampling) == ("deeplabv3plus", "subpixel")


def test_what_the_small_network_reads_does_not_change_it() -> None:
    assert plan(SMALL, network={"norm": "group", "width": 0.5}).config.network.name == "residual_unet"


def test_what_is_given_of_a_network_stays_and_the_rest_is_planned() -> None:
    found = plan(network={"name": "deeplabv3", "encoder": "resnet18", "output_stride": 16, "aspp_rates": [3]}).config
    network = found.network
    assert (network.encoder, network.output_stride, network.aspp_rates) == ("resnet18", 16, (3,))
    # brought to the cost of the usual network
    assert network.width != 1
    assert plan(network={"name": "deeplabv3", "width": 0.5}).config.network.width == 0.5


def test_a_network_that_does_not_take_the_patch_is_told() -> None:
    with pytest.raises(ConfigError, match=r"windows.patch_size \[48, 56, 32\] is smaller than the \[33, 33, 33\] that"):
        plan(network={"name": "deconvnet"})


def test_another_encoder_is_planned_too() -> None:
    found = plan(THICK, network={"encoder": "resnet18"}).config.network
    assert (found.name, found.encoder, len(found.strides or ())) == ("deeplabv3plus", "resnet18", 5)
    assert found.width < 1
    assert len(plan(THICK, network={"channels": [16, 32]}).config.network.strides or ()) == 2


def test_weights_from_elsewhere_need_the_published_width_and_norm() -> None:
    network = plan(network={"name": "deeplabv3", "encoder": "resnet18"}, published=True).config.network
    assert (network.width, network.norm, network.upsampling) == (1, "batch", "resize")


def test_a_stride_may_be_written_with_a_dot() -> None:
    assert plan(network={"name": "deeplabv3", "output_stride": 2.0}).config.network.output_stride == 2


def test_a_gpu_gets_the_published_width_and_encoder() -> None:
    network = plan(device="cuda", network={"name": "deeplabv3"}).config.network
    assert (network.encoder, network.width) == ("resnet50", 1)


def test_a_network_of_monai_keeps_its_arguments() -> None:
    network = plan(network={"name": "monai.SegResNet", "arguments": {"init_filters": 8}}).config.network
    assert (network.arguments, network.width) == ({"init_filters": 8}, 1)


def test_regions_are_taken_from_the_data_set() -> None:
    dataset = Dataset(Path("set"), "nnunet", (), ("MRI",), {"whole": (1, 2), "core": (2,)}, (1, 2))
    assert make_plan(dataset, PRINT).config.data.region_values == (1, 2)


def test_regions_without_an_order_are_written_the_larger_first() -> None:
    dataset = Dataset(Path("set"), "nnunet", (), ("MRI",), {"background": 0, "core": (2,), "whole": (1, 2)})
    made = make_plan(dataset, PRINT)
    assert made.config.data.labels == {"background": 0, "whole": (1, 2), "core": (2,)}
    assert list(made.config.data.labels) == ["background", "whole", "core"]
    assert made.config.data.region_values == (1, 2)
    assert made.reasons["data.region_values"].startswith("no regions_class_order found: the larger regions first")


def test_regions_that_are_typed_are_planned_in_their_order(tiny_dataset: MakeDataset) -> None:
    labels = {"core": [2], "whole": [1, 2]}
    made = medseg.plan(tiny_dataset(cases=2), settings={"data": {"labels": labels}}, device="cpu")
    assert (made.config.data.foreground, made.config.data.region_values) == (("whole", "core"), (1, 2))


# ---- what every file says


def test_one_label_needs_no_background(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(cases=2, spatial_dims=2)
    settings = {"data": {"labels": {"all": 1, "ignore": 2}}}
    assert medseg.plan(folder, settings=settings, device="cpu").config.data.foreground == ("all",)
    only = Dataset(Path("set"), "nnunet", (), ("MRI",), {"x": 1})
    assert make_plan(only, PRINT).config.data.foreground == ("x",)


def test_background_and_ignored_voxels_alone_are_nothing_to_learn() -> None:
    dataset = Dataset(Path("set"), "nnunet", (), ("MRI",), {"background": 0, "ignore": 1})
    with pytest.raises(DataError, match=r"labels \['background', 'ignore'\] found, expected at least one"):
        make_plan(dataset, PRINT)


def test_a_value_in_a_case_that_is_not_measured_is_planned(
    tiny_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_dataset(cases=4, spatial_dims=2)
    path = folder / "labels" / "case1.png"
    label = np.array(Picture.open(path))
    label[0, 0] = 7
    Picture.fromarray(label).save(path)
    monkeypatch.setattr("medseg.fingerprint.MAX_MEASURED", 2)
    labels = medseg.plan(folder, device="cpu").config.data.labels
    assert labels == {"background": 0, "label_1": 1, "label_2": 2, "label_7": 7}


def test_volumes_after_any_number_of_slices_make_a_set_of_volumes(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for n in range(5):
        label = np.zeros((20, 20, 6 if n > 3 else 1), np.uint8)
        label[3:9, 3 : 9 + n] = 1
        save(tmp_path / "images" / f"c{n}.nii.gz", np.random.default_rng(n).normal(size=label.shape), np.eye(4))
        save(tmp_path / "labels" / f"c{n}.nii.gz", label, np.eye(4))
    assert medseg.plan(tmp_path, device="cpu").config.data.spatial_dims == 3


def test_colour_that_is_read_as_grey_stands_in_the_plan(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(cases=2, spatial_dims=2)
    for path in (folder / "images").iterdir():
        grey = np.array(Picture.open(path))
        Picture.fromarray(np.stack([grey, grey // 2, 255 - grey], -1)).save(path)
    made = medseg.plan(folder, device="cpu")
    assert made.reasons["data.channels"].startswith("2 pictures are in colour and read as grey; --set 'data.channels=")
    kept = medseg.plan(folder, settings={"data": {"channels": ["R", "G", "B"]}}, device="cpu")
    assert kept.config.data.channels == ("R", "G", "B")
    assert "data.channels" not in kept.reasons


def test_channels_in_one_file_of_a_plain_folder_are_taken_where_they_are_named(tiny_dataset: MakeDataset) -> None:
    folder = tiny_dataset(cases=2)
    for path in (folder / "images").iterdir():
        voxels = np.asarray(nib.load(path).dataobj)
        save(path, np.stack([voxels, -voxels], -1), np.diag([1, 1, 1.5, 1]))
    with pytest.raises(DataError, match=r"name the channels: .*--set data.channels"):
        medseg.plan(folder, device="cpu")
    made = medseg.plan(folder, settings={"data": {"channels": ["a", "b"]}}, device="cpu")
    assert made.config.data.channels == ("a", "b")
