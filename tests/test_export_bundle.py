"""What a bundle does that is not asked of it every day: chosen windows, air, odd images and odd folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles import monai_masks, our_masks, refused_by_monai, with_ignite
from geometry import save
from tiny import SHAPE, blobs, tiny_config, tiny_model

import medseg
from medseg.errors import DataError
from medseg.model import read_model, record_choices


def exported(model: Path, folder: Path) -> tuple[str, Any]:
    """README and configuration of a bundle of `model`, written to `folder`."""
    medseg.export_model(model, folder, to="bundle")
    config = json.loads((folder / "configs" / "inference.json").read_text())
    return (folder / "docs" / "README.md").read_text(), config


def facts_of(folder: Path) -> Any:
    return json.loads((folder / "configs" / "metadata.json").read_text())["medseg"]


def images_in(folder: Path, **voxels: Any) -> Path:
    folder.mkdir()
    for name, array in voxels.items():
        save(folder / f"{name}.nii.gz", np.asarray(array, np.float32), np.eye(4))
    return folder


def differences(theirs: Path, ours: Path) -> int:
    mask, reference = (np.asarray(nib.load(path).dataobj) for path in (theirs, ours))
    assert mask.shape == reference.shape
    return int((mask != reference).sum())


# ---- windows


@pytest.mark.parametrize(
    ("chosen", "roi", "overlap", "told"),
    [
        ({"overlap": 0.25}, 8, 0.25, "Both take windows of 8 × 8 × 8 voxels that share 0.25 of their size"),
        ({"tile_size": [16, 16, 16]}, 16, 0.5, "Both take windows of 16 × 16 × 16 voxels that share 0.5"),
        ({"mode": "whole", "whole_voxels": 900}, 8, 0.5, "medseg takes the whole image at once up to 900 voxels"),
        ({"mode": "halo", "tile_size": [16, 16, 16]}, 8, 0.5, "medseg takes tiles of up to 32 × 32 × 32 voxels"),
    ],
    ids=["overlap", "tiles", "whole", "halo"],
)
def test_windows_that_were_chosen_when_training_ended_are_used_or_told(
    tmp_path: Path, chosen: dict[str, Any], roi: int, overlap: float, told: str
) -> None:
    model = tiny_model(tmp_path / "run")
    record_choices(model, {"windows": {"settings": {"windows": chosen}}})
    readme, config = exported(model, tmp_path / "bundle")
    assert (config["inferer"]["roi_size"], config["inferer"]["overlap"]) == ([roi] * 3, overlap)
    assert told in readme
    facts = facts_of(tmp_path / "bundle")
    assert facts["overlap"] == overlap
    assert {key: facts["windows"][key] for key in chosen if key != "overlap"} == {
        key: value for key, value in chosen.items() if key != "overlap"
    }


def test_a_chosen_window_of_image_pooling_is_told_and_sizes_stay_free(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "run")
    chosen = {"network": {"pooling_window": [8, 8, 8]}, "windows": {"mode": "whole"}}
    plain, _ = exported(model, tmp_path / "plain")
    record_choices(model, {"windows": {"settings": chosen}})
    readme, _ = exported(model, tmp_path / "bundle")
    line = '- medseg sets {"pooling_window": [8, 8, 8]} of the network when it infers; here it is as it was trained.'
    assert [line in text.splitlines() for text in (plain, readme)] == [False, True]
    facts = facts_of(tmp_path / "bundle")
    assert (facts["free"], facts["network_at_inference"]) == ("batch and sizes", chosen["network"])


def test_a_network_of_one_size_keeps_its_patch_where_medseg_has_larger_windows(tmp_path: Path) -> None:
    config = tiny_config(network={"pooling_window": [8, 8, 8]}, windows={"tile_size": [16, 16, 16]})
    readme, found = exported(tiny_model(tmp_path / "run", config), tmp_path / "bundle")
    assert found["inferer"]["roi_size"] == [8, 8, 8]
    assert "medseg takes windows of 16 × 16 × 16 voxels; here windows of 8 × 8 × 8 voxels" in readme


CT: dict[str, Any] = {"normalise": "fixed", "clip": [-1000, 800], "mean": 0.0, "sd": 300.0}


@pytest.mark.parametrize(
    ("channel", "intensity", "skip_air", "skips"),
    [
        ("CT", CT, "auto", True),
        ("CT", CT, "off", False),
        ("CT", CT | {"clip": [-200, 300]}, "auto", False),
        ("CT", {"normalise": "image"}, "auto", False),
        ("MR", CT, "auto", False),
        ("MR", CT, "on", True),
    ],
)
def test_that_medseg_skips_air_is_told_where_it_does(
    tmp_path: Path, channel: str, intensity: dict[str, Any], skip_air: str, skips: bool
) -> None:
    config = tiny_config(
        data={"channels": [channel]}, preprocess={"intensity": [intensity]}, windows={"skip_air": skip_air}
    )
    readme, _ = exported(tiny_model(tmp_path / "run", config), tmp_path / "bundle")
    assert ("windows of air around the body for background" in readme) == skips
    assert facts_of(tmp_path / "bundle")["skip_air"] == skips


@pytest.mark.parametrize(
    ("intensity", "mean", "sd"),
    [
        ({"normalise": "image"}, None, None),
        ({"normalise": "none", "mean": 5.0, "sd": 2.0}, 0.0, 1.0),
        ({"normalise": "fixed", "mean": 5.0, "sd": 2.0}, 5.0, 2.0),
    ],
    ids=["image", "none", "fixed"],
)
def test_facts_tell_what_is_subtracted_and_what_divides(
    tmp_path: Path, intensity: dict[str, Any], mean: float | None, sd: float | None
) -> None:
    _, config = exported(
        tiny_model(tmp_path / "run", tiny_config(preprocess={"intensity": [intensity]})), tmp_path / "bundle"
    )
    (told,) = facts_of(tmp_path / "bundle")["preprocess"]["intensity"]
    assert (told["mean"], told["sd"]) == (mean, sd)
    step = config["preprocessing"]["transforms"][-1]
    assert (step["subtrahend"], step["divisor"]) == ([mean], [sd])


# ---- images


@with_ignite
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_a_voxel_that_is_no_number_ends_the_run_by_the_name_of_its_file(tmp_path: Path, value: float) -> None:
    readme, _ = exported(tiny_model(tmp_path / "run"), tmp_path / "bundle")
    voxels = blobs(SHAPE)
    voxels[3, 3, 3] = value
    images = images_in(tmp_path / "images", odd=voxels)
    told = refused_by_monai(tmp_path / "bundle", images, tmp_path / "out")
    assert f"{images / 'odd.nii.gz'}: voxels that are NaN or infinite found" in told
    assert not (tmp_path / "out" / "odd.nii.gz").exists()
    assert "or holds a voxel that is NaN or infinite, ends the run" in readme


@with_ignite
def test_an_image_of_zeros_is_not_cropped_to_nothing(tmp_path: Path) -> None:
    config = tiny_config(preprocess={"crop": "nonzero"}, windows={"patch_size": [16, 16, 16]})
    model = tiny_model(tmp_path / "run", config)
    exported(model, tmp_path / "bundle")
    images = images_in(tmp_path / "images", zeros=np.zeros((12, 12, 12)))
    (theirs,) = monai_masks(tmp_path / "bundle", images, tmp_path / "monai").values()
    (ours,) = our_masks(model, images, tmp_path / "ours").values()
    assert len(np.unique(np.asarray(nib.load(ours).dataobj))) > 1
    # rounding may decide a close call
    assert differences(theirs, ours) <= 1


@with_ignite
def test_a_region_of_one_half_is_not_there(tmp_path: Path) -> None:
    labels = {"labels": {"whole": [3, 7], "core": [7]}, "region_values": [3, 7]}
    config = tiny_config(data=labels, windows={"patch_size": [16, 16, 16]})
    model = tiny_model(tmp_path / "run", config)
    network = read_model(model).network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    medseg.model.save_model(network, config, model, training={"cases": 0}, licence="CC0-1.0")
    exported(model, tmp_path / "bundle")
    images = images_in(tmp_path / "images", case=blobs(SHAPE))
    (theirs,) = monai_masks(tmp_path / "bundle", images, tmp_path / "monai").values()
    (ours,) = our_masks(model, images, tmp_path / "ours").values()
    assert not np.asarray(nib.load(ours).dataobj).any()
    assert differences(theirs, ours) == 0


def planes_model(folder: Path) -> Path:
    config = tiny_config(
        data={"spatial_dims": 2},
        preprocess={"spacing_mm": [1.0, 2.0]},
        windows={"patch_size": [32, 32]},
        augment={"flip_axes": [], "rotation_deg": [20.0]},
    )
    return tiny_model(folder, config)


def plane(folder: Path, affine: Any) -> Path:
    """A folder with one plane, not square, whose two axes are the first two columns of `affine`."""
    folder.mkdir()
    nib.save(nib.Nifti1Image(blobs((21, 30)), np.asarray(affine, float)), folder / "plane.nii.gz")
    return folder


@with_ignite
@pytest.mark.parametrize(
    "affine",
    [
        [[1, 0, 0, 5], [0, 2, 0, 7], [0, 0, 1, 9], [0, 0, 0, 1]],
        [[-1, 0, 0, 5], [0, 2, 0, 7], [0, 0, 1, 9], [0, 0, 0, 1]],
        [[0, 2, 0, 5], [1, 0, 0, 7], [0, 0, 1, 9], [0, 0, 0, 1]],
    ],
    ids=["straight", "mirrored", "turned"],
)
def test_masks_of_axial_planes_are_those_of_infer(tmp_path: Path, affine: list[list[float]]) -> None:
    model = planes_model(tmp_path / "run")
    exported(model, tmp_path / "bundle")
    images = plane(tmp_path / "images", affine)
    (theirs,) = monai_masks(tmp_path / "bundle", images, tmp_path / "monai").values()
    (ours,) = our_masks(model, images, tmp_path / "ours").values()
    np.testing.assert_allclose(nib.load(theirs).affine[:2], nib.load(ours).affine[:2], atol=1e-5)
    assert len(np.unique(np.asarray(nib.load(ours).dataobj))) == 3
    assert differences(theirs, ours) <= 1


@with_ignite
@pytest.mark.parametrize(
    "affine",
    [
        [[1, 0, 0, 5], [0, 0, 1, 7], [0, 2, 0, 9], [0, 0, 0, 1]],
        [[0, 0, 1, 5], [1, 0, 0, 7], [0, 2, 0, 9], [0, 0, 0, 1]],
        # 2 mm along an axis that rises by 0.6 of its length: MONAI would read 1.6 mm
        [[1, 0, 0, 5], [0, 1.6, -0.6, 7], [0, 1.2, 0.8, 9], [0, 0, 0, 1]],
    ],
    ids=["coronal", "sagittal", "tilted"],
)
def test_planes_that_monai_takes_for_others_end_the_run_with_a_reason(tmp_path: Path, affine: Any) -> None:
    readme, _ = exported(planes_model(tmp_path / "run"), tmp_path / "bundle")
    images = plane(tmp_path / "images", affine)
    told = refused_by_monai(tmp_path / "bundle", images, tmp_path / "out")
    assert "plane.nii.gz: a coronal, sagittal or tilted plane found, expected an axial one" in told
    assert "a coronal, a sagittal or a tilted one ends the run with an error" in readme


# ---- folders


@with_ignite
def test_masks_never_replace_the_images(tmp_path: Path) -> None:
    exported(tiny_model(tmp_path / "run"), tmp_path / "bundle")
    images = images_in(tmp_path / "images", case=blobs(SHAPE))
    before = (images / "case.nii.gz").read_bytes()
    (tmp_path / "other name").symlink_to(images)
    for out in (images, tmp_path / "other name"):
        told = refused_by_monai(tmp_path / "bundle", images, out)
        assert "masks would replace the images: output_dir is dataset_dir, give another folder" in told
    assert (images / "case.nii.gz").read_bytes() == before


@with_ignite
def test_a_folder_of_images_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    exported(tiny_model(tmp_path / "run"), tmp_path / "bundle")
    images = images_in(tmp_path / "images [1]", case=blobs(SHAPE))
    assert list(monai_masks(tmp_path / "bundle", images, tmp_path / "out")) == ["case.nii.gz"]


def test_the_command_in_the_readme_holds_for_a_name_with_a_space(tmp_path: Path) -> None:
    readme, _ = exported(tiny_model(tmp_path / "run"), tmp_path / "hip bundle")
    assert "\ncd 'hip bundle'\n" in readme


def test_a_folder_above_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    exported(tiny_model(tmp_path / "run"), tmp_path / "b\udcff" / "bundle")
    assert (tmp_path / "b\udcff" / "bundle" / "models" / "model.ts").is_file()


def test_an_empty_folder_is_filled_and_not_replaced(tmp_path: Path) -> None:
    # it may be where a disk is mounted, or somebody stands in it
    (tmp_path / "bundle").mkdir()
    before = (tmp_path / "bundle").stat().st_ino
    exported(tiny_model(tmp_path / "run"), tmp_path / "bundle")
    assert (tmp_path / "bundle").stat().st_ino == before


def test_another_bundle_takes_the_place_of_the_first_and_masks_beside_it_stay(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    exported(tiny_model(tmp_path / "run"), bundle)
    (bundle / "eval").mkdir()
    (bundle / "eval" / "case.nii.gz").write_bytes(b"a mask")
    other = tiny_model(tmp_path / "other", seed=1)
    medseg.export_model(other, bundle, to="bundle", overwrite=True)
    assert facts_of(bundle)["model_sha256"] == read_model(other).sha256
    assert (bundle / "eval" / "case.nii.gz").read_bytes() == b"a mask"
    assert sorted(path.name for path in bundle.iterdir()) == ["LICENSE", "configs", "docs", "eval", "models"]


def test_a_bundle_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.suffix == ".pt":
            raise OSError(28, "No space left on device")
        return write(path, content)

    model = tiny_model(tmp_path / "run")
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(Path, "write_bytes", full)
    for folder in ("there", "new/bundle"):
        with pytest.raises(DataError, match="No space left"):
            medseg.export_model(model, tmp_path / folder, to="bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]
    assert list((tmp_path / "there").iterdir()) == []
