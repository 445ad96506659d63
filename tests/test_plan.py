"""Planning: what is measured, and which configuration follows; above all, when left and right must not be mixed up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from geometry import save

from medseg.cases import Case, Dataset, Labels
from medseg.config import Config, dump_yaml, read_config
from medseg.datasets import read_dataset
from medseg.errors import ConfigError, DataError
from medseg.model import new_network
from medseg.networks import list_networks
from medseg.networks.receptive import count
from medseg.plan import VOXELS, Fingerprint, Plan, make_plan, measure

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
    patch = plan(fingerprint, device=device).config.windows.patch_size
    step = 16 if fingerprint.spatial_dims == 2 else 8
    assert np.prod(patch) <= VOXELS[device, fingerprint.spatial_dims]
    assert all(p % step == 0 and p > 0 for p in patch)


def test_small_cases_fit_whole_into_a_patch() -> None:
    small = replace(PRINT, shapes=((20, 30, 17),) * 3, spacings_mm=((1.0, 1.0, 1.0),) * 3)
    assert plan(small).config.windows.patch_size == (24, 32, 24)


# ---- intensities


@pytest.mark.parametrize("channel", ["CT", "ct", "abdominal CT", "CT_venous", "HU", "NCCT"])
def test_ct_is_clipped_to_the_percentiles_and_fixed(channel: str) -> None:
    how = plan(channel=channel).config.preprocess.intensity[0]
    assert (how.clip, how.normalise, how.mean, how.sd) == ((-60, 180), "fixed", 40, 20)


@pytest.mark.parametrize("channel", ["MRI", "T2", "octave", "contrast", "PET"])
def test_other_images_are_normalised_by_themselves(channel: str) -> None:
    assert plan(channel=channel).config.preprocess.intensity[0].normalise == "image"


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


def test_pictures_are_mirrored_from_left_to_right_only() -> None:
    assert plan(PICTURES).config.augment.flip_axes == (1,)


@pytest.mark.parametrize("fingerprint", [PICTURES, replace(PICTURES, pictures=False)], ids=["pictures", "slices"])
def test_sided_labels_in_a_plane_are_never_mirrored(fingerprint: Fingerprint) -> None:
    found = plan(fingerprint, labels={"background": 0, "left lung": 1})
    assert found.config.augment.flip_axes == ()
    assert "left lung" in found.reasons["augment.flip_axes"]


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
