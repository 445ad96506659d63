"""Saved probabilities: they say what the mask says, lie on its grid, are whole or not there, and are read back."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pytest
import torch
from geometry import oblique, save
from PIL import Image as Picture
from tiny import AFFINE, EXACT, SHAPE, blobs, some_images, tiny_config, tiny_model

from medseg.cli import run
from medseg.config import Config
from medseg.errors import ConfigError, DataError, GeometryError
from medseg.folder import CaseResult, infer
from medseg.grid import Grid, resample
from medseg.infer import InferOptions, Segmenter, load_model
from medseg.metrics.calibration import reliability
from medseg.readers import Geometry, read_geometry
from medseg.readers.probabilities import STEPS, Channels, read_probabilities
from medseg.restore import Regions, Strongest, restore
from medseg.writers import formats as formats_module
from medseg.writers import probabilities as probabilities_module
from medseg.writers import write_label
from medseg.writers.formats import FORMATS
from medseg.writers.probabilities import ProbabilityStore, probabilities_path, write_probabilities

SAVING = replace(EXACT, save_probabilities=True)
LABELS = Channels(("background", "shell", "core"), (0, 3, 7))
VALUES = np.array(LABELS.values)


def saved(folder: Path, *models: Path, options: InferOptions = SAVING) -> tuple[CaseResult, ...]:
    return infer([folder / "in"], list(models), folder / "out", options)


def of(folder: Path, case: str = "case0") -> np.ndarray:
    """(I, J, K, C) by another library than ours."""
    return np.asarray(nib.load(probabilities_path(folder / "out", case)).dataobj)


def mask_of(folder: Path, case: str = "case0") -> np.ndarray:
    return np.asarray(nib.load(folder / "out" / f"{case}.nii.gz").dataobj)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ProbabilityStore]:
    with ProbabilityStore(tmp_path, (4, 5, 6), LABELS) as opened:
        yield opened


# ---- what is written


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preprocess": {"spacing_mm": [1.25, 1.5, 2.0]}},
        {"preprocess": {"spacing_mm": [0.7, 1.0, 1.9]}},
        {"postprocess": {"crf": True, "crf_smoothness_weight": 20.0, "crf_smoothness_mm": 3.0}},
    ],
    ids=["as it is", "coarser", "finer", "random field"],
)
def test_the_strongest_probability_is_the_mask(tmp_path: Path, changes: dict[str, Any]) -> None:
    some_images(tmp_path / "in", 2)
    model = tiny_model(tmp_path / "model", tiny_config(**changes))
    assert [r.status for r in saved(tmp_path, model)] == ["done", "done"]
    for case in ("case0", "case1"):
        found, mask = of(tmp_path, case), mask_of(tmp_path, case)
        assert found.shape == (*SHAPE, 3)
        assert len(np.unique(mask)) > 1
        np.testing.assert_array_equal(VALUES[found.argmax(axis=-1)], mask)


@pytest.mark.parametrize("options", [{}, {"tta": "flip"}, {"tta": "scale"}, {"window": (8, 8, 8)}])
def test_an_ensemble_and_its_copies_say_what_the_mask_says(tmp_path: Path, options: dict[str, Any]) -> None:
    some_images(tmp_path / "in", 1)
    models = [tiny_model(tmp_path / f"model{n}", seed=n) for n in range(2)]
    saved(tmp_path, *models, options=replace(SAVING, **options))
    np.testing.assert_array_equal(VALUES[of(tmp_path).argmax(axis=-1)], mask_of(tmp_path))


def test_they_are_the_networks_own_to_half_a_step(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    saved(tmp_path, model)
    segmenter = load_model(model, options=EXACT)
    prepared = segmenter.prepare(segmenter_case(path))
    exact = resample(segmenter.scores(prepared.image), prepared.grid, prepared.source).numpy()
    apart = np.abs(np.moveaxis(of(tmp_path), -1, 0) - exact).max()
    # half a step by rounding, one where two labels became equal, and float32
    assert apart <= 1.5 / STEPS + 1e-6
    assert np.abs(of(tmp_path).sum(axis=-1) - 1).max() <= 3 * 1.5 / STEPS


def segmenter_case(path: Path) -> Any:
    from medseg.cases import Case

    return Case(path.name, (path,), None, path.name)


def test_the_mask_is_the_same_with_and_without(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    saved(tmp_path, model)
    infer([tmp_path / "in"], [model], tmp_path / "plain", EXACT)
    assert (tmp_path / "plain" / "case0.nii.gz").read_bytes() == (tmp_path / "out" / "case0.nii.gz").read_bytes()
    assert not (tmp_path / "plain" / "probabilities").exists()


def test_cleaning_the_mask_leaves_the_probabilities(tmp_path: Path) -> None:
    some_images(tmp_path / "in", 1)
    model = tiny_model(tmp_path / "model")
    saved(tmp_path, model)
    cleaned = {"postprocess": {"largest_component": ["shell", "core"]}}
    infer([tmp_path / "in"], [model], tmp_path / "clean", replace(SAVING, settings=cleaned))
    names = ("probabilities/case0.nii.gz", "case0.nii.gz")
    same = [(tmp_path / "clean" / n).read_bytes() == (tmp_path / "out" / n).read_bytes() for n in names]
    assert same == [True, False]


def test_regions_are_above_one_half_where_the_mask_has_them(tmp_path: Path) -> None:
    some_images(tmp_path / "in", 1)
    data = {"labels": {"whole": [3, 7], "core": [7]}, "region_values": [3, 7]}
    config = tiny_config(data=data, preprocess={"spacing_mm": [1.25, 1.5, 2.0]})
    saved(tmp_path, tiny_model(tmp_path / "model", config))
    whole, core = np.moveaxis(of(tmp_path) > 0.5, -1, 0)
    assert whole.any()
    assert core.any()
    np.testing.assert_array_equal(np.where(core, 7, np.where(whole, 3, 0)), mask_of(tmp_path))
    found = read_probabilities(probabilities_path(tmp_path / "out", "case0"))
    assert found.channels == Channels(("whole", "core"), ((3, 7), (7,)), regions=True)


def test_regions_are_written_whole_where_they_lie_over_each_other(tmp_path: Path) -> None:
    (image,) = some_images(tmp_path / "in", 1)
    data = {"labels": {"left": [3, 7], "right": [7, 9]}, "region_values": [3, 9]}
    config = tiny_config(data=data, preprocess={"spacing_mm": [1.25, 1.5, 2.0]})
    model = tiny_model(tmp_path / "model", config)
    both = replace(SAVING, formats=("nifti", "regions"))
    (result,) = saved(tmp_path, model, options=both)
    assert result.files["regions"]["name"] == "regions/case0.nii.gz"
    written = tmp_path / "out" / "regions" / "case0.nii.gz"
    found = nib.load(written)
    left, right = np.moveaxis(np.asarray(found.dataobj), -1, 0)
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(found.affine, nib.load(image).affine)
    # of the left one the mask has only what the right one leaves
    assert (left & right).any()
    np.testing.assert_array_equal(np.where(right, 9, np.where(left, 3, 0)), mask_of(tmp_path))
    np.testing.assert_array_equal(np.stack([left, right], axis=-1), of(tmp_path) > 0.5)
    # it is there, it is done again where it is not
    assert saved(tmp_path, model, options=both)[0].status == "skipped"
    before = written.read_bytes()
    written.unlink()
    assert saved(tmp_path, model, options=both)[0].status == "done"
    assert written.read_bytes() == before


def test_regions_without_probabilities_on_the_command_line(tmp_path: Path) -> None:
    some_images(tmp_path / "in", 1)
    data = {"labels": {"whole": [3, 7], "core": [7]}, "region_values": [3, 7]}
    regions, labels = tiny_model(tmp_path / "model", tiny_config(data=data)), tiny_model(tmp_path / "labels")
    line = ["infer", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--regions", "-m"]
    assert run([*line, str(labels)]) == 2
    assert not (tmp_path / "out").exists()
    assert run([*line, str(regions)]) == 0
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.nii.gz")) == [
        *("case0.nii.gz", "regions/case0.nii.gz"),
    ]
    whole, core = np.moveaxis(np.asarray(nib.load(tmp_path / "out" / "regions" / "case0.nii.gz").dataobj), -1, 0)
    np.testing.assert_array_equal(np.where(core, 7, np.where(whole, 3, 0)), mask_of(tmp_path))


def test_outside_a_crop_all_is_background(tmp_path: Path) -> None:
    image = np.zeros(SHAPE, np.float32)
    image[2:6, 3:9, 4:11] = 1 + np.abs(blobs((4, 6, 7)))
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "case0.nii.gz", image, AFFINE)
    saved(tmp_path, tiny_model(tmp_path / "model", tiny_config(preprocess={"crop": "nonzero"})))
    found = of(tmp_path)
    steps, outside = np.rint(found * STEPS), image == 0
    assert (steps[outside] == [STEPS, 0, 0]).all()
    assert not (steps[~outside] == [STEPS, 0, 0]).all()
    np.testing.assert_array_equal(VALUES[found.argmax(axis=-1)], mask_of(tmp_path))


def flat_config() -> Config:
    return tiny_config(
        data={"spatial_dims": 2},
        preprocess={"orient": False, "shape": [16, 24]},
        augment={"flip_axes": [1], "rotation_deg": [10]},
        windows={"patch_size": [16, 24]},
    )


def test_a_picture_has_rows_and_columns_and_one_plane(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Picture.fromarray((blobs((20, 28)) % 256).astype(np.uint8)).save(tmp_path / "in" / "case0.png")
    saved(tmp_path, tiny_model(tmp_path / "model", flat_config()))
    mask = np.array(Picture.open(tmp_path / "out" / "case0.png"))
    assert of(tmp_path).shape == (20, 28, 1, 3)
    np.testing.assert_array_equal(VALUES[of(tmp_path)[:, :, 0].argmax(axis=-1)], mask)
    assert read_probabilities(probabilities_path(tmp_path / "out", "case0"), spatial_dims=2).shape == (3, 20, 28)


def test_they_lie_on_the_grid_of_the_image_in_sixteen_bits(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    saved(tmp_path, model)
    written = nib.load(probabilities_path(tmp_path / "out", "case0"))
    source = nib.load(path)
    assert written.get_data_dtype() == np.uint16
    assert written.dataobj.slope == np.float32(1 / STEPS)
    np.testing.assert_array_equal(written.affine, source.affine)
    np.testing.assert_array_equal(written.header["pixdim"][:4], source.header["pixdim"][:4])
    for code in ("qform_code", "sform_code"):
        assert written.header[code] == source.header[code]
    told = json.loads(written.header.extensions[0].get_content())
    assert [c["name"] for c in told["probabilities"]] == ["background", "shell", "core"]


def test_a_network_of_sixteen_bits_is_no_exception(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    saved(tmp_path, model, options=replace(SAVING, precision="bf16"))
    np.testing.assert_array_equal(VALUES[of(tmp_path).argmax(axis=-1)], mask_of(tmp_path))


# ---- rounding


def kept(folder: Path, scores: torch.Tensor, decision: Strongest | Regions, channels: Channels) -> np.ndarray:
    grid = Grid(tuple(scores.shape[1:]), np.eye(4))
    with ProbabilityStore(folder, grid.shape, channels) as store:
        restore(scores, grid, grid, decision, keep=store)
        return np.stack([store.planes(c, 0, grid.shape[-1]) for c in range(len(channels.names))])


@pytest.mark.parametrize("values", [(0, 3, 7), (0, 7, 3), (0, 3, 300)])
def test_labels_that_rounding_makes_equal_are_told_apart_by_a_step(tmp_path: Path, values: tuple[int, ...]) -> None:
    # a quarter of a step apart, the later one ahead
    scores = torch.tensor([0.2, 0.4, 0.4 + 0.25 / STEPS]).reshape(3, 1, 1, 1)
    steps = kept(tmp_path, scores, Strongest(values), LABELS).ravel()
    assert steps.argmax() == 2
    assert steps[2] - steps[1] == 1


def test_labels_that_are_equal_go_to_the_first_as_in_the_mask(tmp_path: Path) -> None:
    scores = torch.tensor([0.2, 0.4, 0.4]).reshape(3, 1, 1, 1)
    steps = kept(tmp_path, scores, Strongest((0, 3, 7)), LABELS).ravel()
    assert steps.argmax() == 1
    assert steps[1] == steps[2]


def test_a_region_at_exactly_one_half_is_not_above_it(tmp_path: Path) -> None:
    scores = torch.tensor([[0.5, float(np.nextafter(np.float32(0.5), np.float32(1)))]]).reshape(1, 1, 1, 2)
    steps = kept(tmp_path, scores, Regions((1,)), Channels(("a",), ((1,),), regions=True)).ravel()
    assert (steps / STEPS > 0.5).tolist() == [False, True]


@pytest.mark.parametrize("seed", range(3))
def test_many_near_ties_agree_with_the_labels_on_any_grid(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # differences of a few steps at most
    scores = 1 / 3 + torch.randint(-2, 3, (3, 5, 6, 7), generator=generator) / STEPS / 2
    here = Grid((5, 6, 7), oblique((1.0, 1.5, 2.5)))
    turned = here.affine @ np.array([[0, 0, -1, 4], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    there = Grid((6, 7, 5), turned).with_spacing((1.1, 1.9, 0.7))
    decision = Strongest((0, 3, 7))
    with ProbabilityStore(tmp_path, there.shape, LABELS) as store:
        labels = restore(scores, here, there, decision, keep=store)
        steps = np.stack([store.planes(c, 0, there.shape[-1]) for c in range(3)])
    inside = steps.sum(axis=0) != STEPS
    assert inside.any()
    np.testing.assert_array_equal(VALUES[steps.argmax(axis=0)], labels.numpy())


# ---- the store


def test_what_is_not_added_is_background(store: ProbabilityStore) -> None:
    assert (store.planes(0, 0, 6) == STEPS).all()
    assert not store.planes(1, 0, 6).any()


def test_regions_have_no_background(tmp_path: Path) -> None:
    with ProbabilityStore(tmp_path, (2, 2), Channels(("a",), ((1,),), regions=True)) as store:
        assert not store.planes(0, 0, 2).any()


def test_blocks_are_put_together_and_the_last_one_counts(store: ProbabilityStore) -> None:
    whole = np.arange(120, dtype=np.uint16).reshape(4, 5, 6)
    store.add(1, (slice(0, 4), slice(0, 5), slice(0, 4)), np.full((4, 5, 4), 9, np.uint16))
    store.add(1, (slice(0, 4), slice(0, 5), slice(0, 4)), whole[..., :4])
    store.add(1, (slice(0, 2), slice(0, 5), slice(4, 6)), whole[:2, :, 4:])
    store.add(1, (slice(2, 4), slice(0, 5), slice(4, 6)), whole[2:, :, 4:])
    for start, stop in ((0, 6), (3, 5), (5, 6)):
        np.testing.assert_array_equal(store.planes(1, start, stop), whole[..., start:stop])


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a file has a name as long as it is open")
def test_a_store_has_no_name_to_leave_behind_even_while_it_is_open(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, STEPS, (30, 30), dtype=np.uint16)
    with ProbabilityStore(tmp_path, (30, 30), LABELS) as store:
        store.add(2, (slice(0, 30), slice(0, 30)), noise)
        assert list(tmp_path.iterdir()) == []
        np.testing.assert_array_equal(store.planes(2, 0, 30), noise)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="away: cannot be written"):
        ProbabilityStore(tmp_path / "away", (2, 2), LABELS)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_block_is_kept_however_it_lies_in_memory(store: ProbabilityStore, order: Literal["C", "F"]) -> None:
    block = np.arange(24, dtype=np.uint16).reshape((2, 3, 4), order=order)
    store.add(1, (slice(1, 3), slice(2, 5), slice(1, 5)), block)
    np.testing.assert_array_equal(store.planes(1, 2, 4)[1:3, 2:5], block[..., 1:3])


def test_the_pieces_of_a_file_make_no_difference(
    tmp_path: Path, store: ProbabilityStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(1, (slice(0, 4), slice(0, 5), slice(1, 6)), np.arange(100, dtype=np.uint16).reshape(4, 5, 5))
    like = save(tmp_path / "like.nii.gz", np.zeros((4, 5, 6), np.uint8), AFFINE)
    first = write_probabilities(tmp_path / "a.nii.gz", store, like).read_bytes()
    monkeypatch.setattr(probabilities_module, "PLANES", 1)
    assert write_probabilities(tmp_path / "b.nii.gz", store, read_geometry(like)).read_bytes() == first


def test_memory_does_not_grow_with_the_number_of_channels(tmp_path: Path) -> None:
    like = Geometry(Grid((64, 64, 64), np.eye(4)))
    noise = np.random.default_rng(0).integers(0, STEPS, (32, 64, 64), dtype=np.uint16)
    box = (slice(0, 32), slice(0, 64), slice(0, 64))

    def peak(count: int) -> int:
        channels = Channels(tuple(map(str, range(count))), tuple(range(count)))
        tracemalloc.start()
        with ProbabilityStore(tmp_path, like.grid.shape, channels) as store:
            for channel in range(count):
                store.add(channel, box, noise)
            write_probabilities(tmp_path / "a.nii.gz", store, like)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    # a channel has 524,288 bytes: forty of them held would be 21 MB more than one
    peak(1)
    assert peak(40) < peak(1) + 200_000


def test_another_grid_is_refused(tmp_path: Path, store: ProbabilityStore) -> None:
    like = save(tmp_path / "like.nii.gz", np.zeros((4, 5, 7), np.uint8), AFFINE)
    with pytest.raises(GeometryError, match=r"shape \(4, 5, 6\) found, expected \(4, 5, 7\)"):
        write_probabilities(tmp_path / "a.nii.gz", store, like)
    assert not (tmp_path / "a.nii.gz").exists()


# ---- resuming


def test_finished_cases_are_skipped(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_images(tmp_path / "in", 2)
    saved(tmp_path, model)
    monkeypatch.setattr(Segmenter, "segment_prepared", lambda *_, **__: pytest.fail("segmented again"))
    assert [r.status for r in saved(tmp_path, model)] == ["skipped", "skipped"]


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [Path.unlink, damaged])
def test_probabilities_that_are_not_as_they_were_written_are_made_again(
    tmp_path: Path, model: Path, harm: Callable[[Path], None]
) -> None:
    some_images(tmp_path / "in", 2)
    saved(tmp_path, model)
    path = probabilities_path(tmp_path / "out", "case1")
    before = path.read_bytes()
    harm(path)
    assert [r.status for r in saved(tmp_path, model)] == ["skipped", "done"]
    assert path.read_bytes() == before


def test_masks_without_probabilities_are_done_again_for_them_and_not_the_other_way(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    assert [r.status for r in saved(tmp_path, model, options=EXACT)] == ["done"]
    assert [r.status for r in saved(tmp_path, model)] == ["done"]
    assert [r.status for r in saved(tmp_path, model, options=EXACT)] == ["skipped"]
    assert [r.status for r in saved(tmp_path, model)] == ["skipped"]


def test_overwrite_writes_them_again(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    saved(tmp_path, model)
    path = probabilities_path(tmp_path / "out", "case0")
    before = path.stat().st_mtime_ns
    assert [r.status for r in saved(tmp_path, model, options=replace(SAVING, overwrite=True))] == ["done"]
    assert path.stat().st_mtime_ns > before


def test_those_of_an_earlier_mask_are_told(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    saved(tmp_path, model)
    (result,) = saved(tmp_path, model, options=replace(EXACT, overwrite=True))
    assert result.warnings == ("probabilities/case0.nii.gz is of an earlier mask: do not use it",)


def test_those_of_an_earlier_run_are_told_where_a_case_has_failed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 1)
    saved(tmp_path, model)

    def broken(*_: object, **__: object) -> None:
        raise DataError("broken")

    monkeypatch.setattr(Segmenter, "segment_prepared", broken)
    (result,) = saved(tmp_path, model, options=replace(SAVING, overwrite=True))
    assert result.warnings == (
        "case0.nii.gz is of an earlier run: do not use it",
        "probabilities/case0.nii.gz is of an earlier run: do not use it",
    )


def test_a_picture_with_a_name_too_long_for_probabilities_still_has_its_mask(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    # with .png 254 bytes, with .nii.gz 257: file systems allow 255
    Picture.fromarray(np.zeros((20, 28), np.uint8)).save(tmp_path / "in" / f"{'a' * 250}.png")
    model = tiny_model(tmp_path / "model", flat_config())
    (tmp_path / "out" / "probabilities").mkdir(parents=True)
    assert [r.status for r in saved(tmp_path, model, options=EXACT)] == ["done"]
    assert [r.status for r in saved(tmp_path, model)] == ["failed"]


def test_what_a_killed_run_has_left_is_cleared_away(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    saved(tmp_path, model)
    folder = tmp_path / "out" / "probabilities"
    left = folder / f".case0.medseg-00000000-1-{'0' * 16}.nii.gz"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    saved(tmp_path, model)
    assert [p.name for p in folder.iterdir()] == ["case0.nii.gz"]


def test_a_full_disk_stops_the_run(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_images(tmp_path / "in", 3)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ProbabilityStore, "add", full)
    assert {r.status for r in saved(tmp_path, model)} == {"not_done"}
    assert list((tmp_path / "out" / "probabilities").iterdir()) == []


def test_a_case_whose_probabilities_cannot_be_written_has_failed_and_has_no_mask(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 2)

    def broken(path: Path, *arguments: Any) -> Path:
        if path.name == "case0.nii.gz":
            raise DataError(f"{path}: broken")
        return write_probabilities(path, *arguments)

    monkeypatch.setattr(formats_module, "write_probabilities", broken)
    assert [r.status for r in saved(tmp_path, model)] == ["failed", "done"]
    assert not (tmp_path / "out" / "case0.nii.gz").exists()


def test_a_case_whose_probabilities_cannot_be_written_keeps_the_mask_it_had(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 1)
    saved(tmp_path, model, options=EXACT)
    mask = tmp_path / "out/case0.nii.gz"
    before = mask.read_bytes()

    def otherwise(path: Path, labels: np.ndarray, **named: Any) -> Path:
        changed = labels.copy()
        changed[0, 0, 0] = 3 if labels[0, 0, 0] != 3 else 0
        return write_label(path, changed, **named)

    def full(*_: object) -> None:
        raise DataError("cannot write") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(formats_module, "write_label", otherwise)
    monkeypatch.setattr(formats_module, "write_probabilities", full)
    assert [r.status for r in saved(tmp_path, model)] == ["not_done"]
    assert mask.read_bytes() == before
    monkeypatch.undo()
    # the record still speaks of the mask that is there
    assert [r.status for r in saved(tmp_path, model, options=EXACT)] == ["skipped"]


def test_a_case_whose_mask_cannot_be_written_has_no_probabilities(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise DataError("no luck")

    some_images(tmp_path / "in", 1)
    monkeypatch.setitem(FORMATS, "nifti", replace(FORMATS["nifti"], write=fails))
    (result,) = saved(tmp_path, model)
    assert (result.status, result.reason, result.warnings) == ("failed", "no luck", ())
    assert not list((tmp_path / "out/probabilities").iterdir())


def test_the_folder_is_refused_where_images_are(tmp_path: Path, model: Path) -> None:
    (tmp_path / "out").mkdir()
    some_images(tmp_path / "out" / "probabilities", 1)
    with pytest.raises(ConfigError, match="images or labels are there, among which"):
        infer([tmp_path / "out" / "probabilities"], [model], tmp_path / "out", SAVING)


def test_a_file_in_the_place_of_the_folder_is_told_before_any_work(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probabilities").write_text("mine")
    with pytest.raises(ConfigError, match="probabilities: cannot be made"):
        saved(tmp_path, model)


def test_the_command_line_saves_them(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    arguments = [tmp_path / "in", "-m", model, "-o", tmp_path / "out", "--device", "cpu", "--save-probabilities"]
    assert run(["infer", *map(str, arguments)]) == 0
    np.testing.assert_array_equal(VALUES[of(tmp_path).argmax(axis=-1)], mask_of(tmp_path))


# ---- reading


def test_what_was_written_is_read_back(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    saved(tmp_path, model)
    found = read_probabilities(probabilities_path(tmp_path / "out", "case0"))
    assert (found.shape, found.names, found.values, found.regions) == (
        (3, *SHAPE),
        ("background", "shell", "core"),
        (0, 3, 7),
        False,
    )
    assert found.geometry is not None
    assert found.geometry.grid.matches(read_geometry(path).grid)
    read = np.stack(list(found))
    assert read.dtype == np.float32
    # the scale in the header is float32 too
    assert np.abs(np.moveaxis(read, 0, -1) - of(tmp_path)).max() <= 2e-7
    # a second look begins anew
    assert len(list(found)) == 3


def test_calibration_reads_channel_by_channel(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    saved(tmp_path, model)
    found = read_probabilities(probabilities_path(tmp_path / "out", "case0"))
    assert found.values is not None
    read = reliability(found, mask_of(tmp_path), found.values)
    # judged by its own mask the strongest label is always right: what is missing to 1 is the error
    assert read.ece == pytest.approx(1 - of(tmp_path).max(axis=-1).mean(), abs=1e-6)


def nnunet(path: Path, probabilities: np.ndarray, key: str = "probabilities") -> Path:
    np.savez_compressed(path, **{key: np.ascontiguousarray(probabilities)})
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nnunets_axes_are_turned(tmp_path: Path, dtype: type) -> None:
    ours = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 120
    path = nnunet(tmp_path / "case.npz", ours.transpose(0, 3, 2, 1).astype(dtype))
    found = read_probabilities(path)
    assert (found.shape, found.geometry, found.names, found.values) == ((2, 3, 4, 5), None, None, None)
    np.testing.assert_array_equal(np.stack(list(found)), ours.astype(dtype).astype(np.float32))


def test_a_plane_of_nnunet_loses_its_third_axis(tmp_path: Path) -> None:
    ours = np.arange(12).reshape(1, 3, 4) / 12
    path = nnunet(tmp_path / "case.npz", ours.transpose(0, 2, 1)[:, None].astype(np.float32))
    found = read_probabilities(path, spatial_dims=2)
    assert found.shape == (1, 3, 4)
    np.testing.assert_array_equal(np.stack(list(found)), ours.astype(np.float32))


def test_a_picture_of_nnunet_is_not_turned(tmp_path: Path) -> None:
    ours = np.arange(12).reshape(1, 3, 4) / 12
    path = nnunet(tmp_path / "case.npz", ours[:, None].astype(np.float32))
    found = read_probabilities(path, picture=True)
    assert found.shape == (1, 3, 4)
    np.testing.assert_array_equal(np.stack(list(found)), ours.astype(np.float32))


def test_a_volume_is_no_plane(tmp_path: Path) -> None:
    path = nnunet(tmp_path / "case.npz", np.zeros((2, 3, 4, 5), np.float32))
    with pytest.raises(DataError, match="expected one plane"):
        read_probabilities(path, spatial_dims=2)


def pickled(path: Path) -> Path:
    return nnunet(path, np.array([{"a": 1}], dtype=object))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("case.npz", lambda p: nnunet(p, np.zeros((1, 1, 1, 1)), "softmax"), "softmax found, expected the array"),
        ("case.npz", lambda p: nnunet(p, np.zeros((2, 2))), r"shape \(2, 2\) found"),
        ("case.npz", lambda p: nnunet(p, np.zeros((2, 2, 2, 2), np.uint8)), "type uint8 found"),
        ("case.npz", pickled, "type object found"),
        ("case.npz", lambda p: p.write_bytes(b"PK"), "cannot be read"),
        ("case.txt", lambda p: p.write_text("0.5"), "ending not known"),
        ("case.nii.gz", lambda p: None, "no such file"),
        ("case.nii.gz", lambda p: save(p, np.zeros((2, 2, 2), np.uint8), AFFINE), r"\(2, 2, 2\) found, expected"),
        ("case.nii.gz", lambda p: save(p, np.zeros((2, 2, 2, 2), np.uint8), AFFINE), "without a scale factor"),
    ],
)
def test_what_are_no_probabilities_is_refused_with_the_reason(
    tmp_path: Path, name: str, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(DataError, match=message) as refused:
        read_probabilities(path)
    assert str(path) in str(refused.value)


def test_real_numbers_of_somebody_else_are_read(tmp_path: Path) -> None:
    theirs = np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32)
    found = read_probabilities(save(tmp_path / "case.nii.gz", theirs, AFFINE))
    assert found.channels is None
    np.testing.assert_array_equal(np.stack(list(found)), np.moveaxis(theirs, -1, 0))


@pytest.mark.parametrize("wrong", [-4.0, 12.5, np.nan])
def test_numbers_that_are_no_probabilities_are_named(tmp_path: Path, wrong: float) -> None:
    theirs = np.full((2, 3, 4, 5), 0.5, np.float32)
    theirs[1, 2, 3, 2] = wrong
    with pytest.raises(DataError, match="found in channel 3, expected probabilities"):
        list(read_probabilities(save(tmp_path / "case.nii.gz", theirs, AFFINE)))


@pytest.mark.parametrize("ending", [".nii", ".npz"])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"case{ending}"
    values = np.random.default_rng(0).random((4, 5, 6, 2)).astype(np.float32)
    if ending == ".npz":
        nnunet(path, values)
        content = bytearray(path.read_bytes())
        # in the middle of what is packed
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    else:
        save(path, values, AFFINE)
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="copy"):
        list(read_probabilities(path))
