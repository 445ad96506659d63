"""Inference: masks lie on their own grids whatever the orientation, failures stay apart, and nothing stale is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from geometry import oblique, orientations, reorient, save
from PIL import Image as Picture
from scipy import ndimage
from tiny import AFFINE, EXACT, SHAPE, blobs, some_images, tiny_config, tiny_model

from medseg.cases import Case
from medseg.errors import ConfigError, DataError, ModelError
from medseg.folder import infer
from medseg.infer import load_model
from medseg.preprocess import prepare

# ---- one case


def test_one_anatomy_gets_one_answer_in_all_48_orientations(tmp_path: Path, model: Path) -> None:
    segmenter = load_model(model, options=EXACT)
    image = blobs(SHAPE)
    expected: np.ndarray | None = None
    for order, flipped in orientations():
        turned, affine = reorient(image, AFFINE, order, flipped)
        found = segmenter.segment(save(tmp_path / "i.nii", turned, affine))
        assert tuple(found.shape) == turned.shape
        np.testing.assert_allclose(found.affine, affine, atol=1e-5)
        # back to the way of the first: order and direction undone
        straight = np.flip(np.asarray(found), [a for a in range(3) if flipped[a]]).transpose(np.argsort(order))
        expected = straight if expected is None else expected
        np.testing.assert_array_equal(straight, expected, err_msg=f"{order} {flipped}")
    assert set(np.unique(expected)) == {0, 3, 7}


@pytest.mark.parametrize("given", [np.zeros((4, 4, 4)), torch.zeros(4, 4, 4), ["a.nii", "b.nii"], None])
def test_what_is_no_path_is_told_with_what_to_do(model: Path, given: Any) -> None:
    name = type(given).__name__
    with pytest.raises(ConfigError, match=rf"{name} given, expected the path of a file, .* segment\(a, b\)"):
        load_model(model, options=EXACT).segment(given)


def test_a_mask_follows_a_move_of_the_patient(tmp_path: Path, model: Path) -> None:
    segmenter = load_model(model, options=EXACT)
    near = segmenter.segment(save(tmp_path / "a.nii", blobs(SHAPE), AFFINE))
    far = segmenter.segment(
        save(tmp_path / "b.nii", blobs(SHAPE), oblique((1.0, 1.5, 2.5), (-80, 300, 4), degrees=-12))
    )
    assert np.array_equal(near, far)


def test_a_crop_leaves_background_outside(tmp_path: Path) -> None:
    config = tiny_config(preprocess={"crop": "nonzero"}, data={"labels": {"a": 300}})
    image = np.zeros(SHAPE, np.float32)
    image[2:6, 3:9, 4:11] = 1 + np.abs(blobs((4, 6, 7)))
    found = load_model(tiny_model(tmp_path / "m", config), options=EXACT).segment(
        save(tmp_path / "i.nii", image, AFFINE)
    )
    assert tuple(found.shape) == SHAPE
    labels = np.asarray(found).astype(int)
    assert set(np.unique(labels[2:6, 3:9, 4:11])) == {0, 300}
    assert not labels[image == 0].any()


def test_a_picture_comes_back_at_its_own_size(tmp_path: Path) -> None:
    config = tiny_config(
        data={"spatial_dims": 2},
        preprocess={"orient": False, "shape": [16, 24]},
        augment={"flip_axes": [1], "rotation_deg": [10]},
        windows={"patch_size": [16, 24]},
    )
    Picture.fromarray((blobs((30, 50)) / 8 + 128).clip(0, 255).astype(np.uint8)).save(tmp_path / "p.png")
    (result,) = infer([tmp_path / "p.png"], [tiny_model(tmp_path / "m", config)], tmp_path / "out", EXACT)
    assert (result.status, result.output) == ("done", "p.png")
    mask = np.array(Picture.open(tmp_path / "out" / "p.png"))
    assert mask.shape == (30, 50)
    assert set(np.unique(mask)) <= {0, 3, 7}


def test_channels_are_given_in_order(tmp_path: Path) -> None:
    how = {"intensity": [{"normalise": "none"}] * 2}
    config = tiny_config(data={"channels": ["t1", "t2"]}, preprocess=how)
    segmenter = load_model(tiny_model(tmp_path / "m", config), options=EXACT)
    t1, t2 = (save(tmp_path / f"{n}.nii", blobs(SHAPE, seed=n), AFFINE) for n in (1, 2))
    assert not np.array_equal(segmenter.segment(t1, t2), segmenter.segment(t2, t1))
    with pytest.raises(DataError, match=r"1\.nii: 1 channel found, expected 2"):
        segmenter.segment(t1)


def test_a_file_of_which_the_network_says_nothing_is_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    segmenter = load_model(folder, options=EXACT)
    for parameter in segmenter.models[0].network.parameters():
        parameter.data.fill_(torch.nan)
    (path,) = some_images(tmp_path / "in", 1)
    with pytest.raises(DataError, match=r"^case0\.nii\.gz: the network gave scores that are no numbers"):
        segmenter.segment(path)


# ---- several models, and turned views


@pytest.mark.parametrize(
    ("tta", "expected"),
    [
        ("none", ((), (), (1.0,))),
        ("flip", ((0, 2), (), (1.0,))),
        ("scale", ((0, 2), (), (1.0, 0.75, 1.25))),
        ("auto", ((1,), ((1, 0, 1),), (1.0, 0.5))),
    ],
)
def test_the_copies_are_those_that_are_asked_for(
    tmp_path: Path, tta: Literal["none", "flip", "scale", "auto"], expected: tuple[Any, ...]
) -> None:
    windows = {"patch_size": [8, 8, 8], "flip_axes": [1], "shifts": [[1, 0, 1]], "scales": [1.0, 0.5]}
    folder = tiny_model(tmp_path / "m", tiny_config(windows=windows, augment={"flip_axes": [0, 2]}))
    found = load_model(folder, options=replace(EXACT, tta=tta)).config.windows
    assert (found.flip_axes, found.shifts, found.scales) == expected


def test_copies_that_are_set_are_seen_whatever_else_is_asked_for(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", tiny_config(augment={"flip_axes": [0, 2]}))
    moved = replace(EXACT, settings={"windows": {"shifts": [[1, 0, 1]]}})
    for tta, axes in (("none", ()), ("flip", (0, 2))):
        found = load_model(folder, options=replace(moved, tta=tta)).config.windows
        assert (found.flip_axes, found.shifts, found.scales) == (axes, ((1, 0, 1),), (1.0,))


def test_an_ensemble_is_the_mean_of_probabilities(tmp_path: Path, model: Path, other_model: Path) -> None:
    one, two, both = (load_model(*m, options=EXACT) for m in ((model,), (other_model,), (model, other_model)))
    (path,) = some_images(tmp_path, 1)
    image = prepare(Case("c", (path,), None, "c"), one.config.preprocess, one.config.data, with_label=False).image
    a, b, mean = one.scores(image), two.scores(image), both.scores(image)
    assert not torch.allclose(a, b, atol=0.1)
    assert torch.allclose(mean, (a + b) / 2, atol=1e-6)
    assert torch.allclose(mean.sum(dim=0), torch.ones(image.shape[1:]), atol=1e-5)


def test_models_of_another_data_set_make_no_ensemble(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ModelError, match="differ in `data`"):
        load_model(model, tiny_model(tmp_path, tiny_config(data={"labels": {"x": 1, "y": 2}})), options=EXACT)


def test_models_whose_labels_stand_in_another_order_make_no_ensemble(tmp_path: Path) -> None:
    # equal as mappings, but their channels mean the labels in turn
    names = {"shell": 3, "core": 7}, {"core": 7, "shell": 3}
    folders = [tiny_model(tmp_path / str(n), tiny_config(data={"labels": labels})) for n, labels in enumerate(names)]
    with pytest.raises(ModelError, match="differ in `data`"):
        load_model(*folders, options=EXACT)


def test_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="no model given"):
        load_model()


def test_flips_make_the_answer_mirror_with_the_image(tmp_path: Path, model: Path) -> None:
    segmenter = load_model(model, options=replace(EXACT, tta="flip"))
    image = torch.as_tensor(blobs((8, 8, 8)))[None]
    for axis in (1, 2, 3):
        assert torch.allclose(segmenter.scores(image.flip(axis)), segmenter.scores(image).flip(axis), atol=1e-5)
    plain = load_model(model, options=EXACT)
    assert not torch.allclose(plain.scores(image.flip(1)), plain.scores(image).flip(1), atol=1e-2)


def test_only_axes_that_were_flipped_in_training_are_flipped(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, tiny_config(augment={"flip_axes": [1]}))
    segmenter = load_model(folder, options=replace(EXACT, tta="flip"))
    image = torch.as_tensor(blobs((8, 8, 8)))[None]
    assert torch.allclose(segmenter.scores(image.flip(2)), segmenter.scores(image).flip(2), atol=1e-5)
    assert not torch.allclose(segmenter.scores(image.flip(1)), segmenter.scores(image).flip(1), atol=1e-2)


def test_mirrored_copies_that_a_model_has_not_learnt_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_model(tmp_path, tiny_config(augment={"flip_axes": []}))
    assert load_model(folder, options=replace(EXACT, tta="flip")).config.windows.flip_axes == ()
    assert "--tta flip: the model sees no mirrored copies, it has learnt from none" in caplog.text


@pytest.mark.parametrize(
    ("window", "words"), [((8, 8), "2 numbers found, expected 3"), ((8, 0, 8), "0 found"), ((8, 2, 8), "patch")]
)
def test_an_impossible_window_is_refused(model: Path, window: tuple[int, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_model(model, options=replace(EXACT, window=window))


def test_a_whole_volume_with_an_overlap_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="leave out --overlap"):
        load_model(model, options=replace(EXACT, window="whole", overlap=0.5))


@pytest.mark.parametrize("overlap", [-0.1, 1.0, float("nan")])
def test_an_impossible_overlap_is_refused(model: Path, overlap: float) -> None:
    with pytest.raises(ConfigError, match="--overlap"):
        load_model(model, options=replace(EXACT, overlap=overlap))


def test_a_link_to_nothing_is_a_case_that_fails(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    (tmp_path / "in/gone.nii.gz").symlink_to("/mnt/share/gone.nii.gz")
    (tmp_path / "in/itself.nii.gz").symlink_to("itself.nii.gz")
    results = {r.case: r for r in infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)}
    assert {case: r.status for case, r in results.items()} == {"case0": "done", "gone": "failed", "itself": "failed"}
    assert "a link to /mnt/share/gone.nii.gz, which is not there" in str(results["gone"].reason)


def test_the_least_size_of_a_part_is_its_true_volume_where_axes_lean(tmp_path: Path) -> None:
    # a tilted gantry: planes shift by three quarters of their distance, so steps are longer but no voxel is larger
    affine = np.diag([1, 1.5, 2, 1.0])
    affine[1, 2] = 1.5
    path, model = save(tmp_path / "tilted.nii.gz", blobs(SHAPE), affine), tiny_model(tmp_path / "model")
    whole = load_model(model, options=EXACT).segment(path).numpy()
    largest = max(np.bincount(ndimage.label(whole == 3, np.ones((3, 3, 3)))[0].flat)[1:])
    for least, left in ((1 * 1.5 * 2 * largest, True), (1 * 1.5 * 2.4 * largest, False)):
        settings = {"postprocess": {"min_size_mm3": {"shell": float(least)}}}
        found = load_model(model, options=replace(EXACT, settings=settings)).segment(path)
        assert bool((found == 3).any()) == left
