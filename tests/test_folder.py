"""Folders of cases: failures stay apart, nothing stale is kept, and the record says what was done."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from geometry import oblique, save
from tiny import blobs, tiny_config, tiny_model

from medseg.cases import Case
from medseg.errors import ConfigError
from medseg.folder import CaseResult, infer, segment_cases
from medseg.infer import InferOptions, Segmenter, load_model

SHAPE = (7, 10, 13)
AFFINE = oblique((1.0, 1.5, 2.5))
EXACT = InferOptions(device="cpu", precision="32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tiny_config(preprocess={"spacing_mm": [1.25, 1.5, 2.0]}))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(preprocess={"spacing_mm": [1.25, 1.5, 2.0]})
    return tiny_model(tmp_path_factory.mktemp("other"), config, seed=1)


def some_images(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [save(folder / f"case{n}.nii.gz", blobs(SHAPE, seed=n), AFFINE) for n in range(count)]


def statuses(results: tuple[CaseResult, ...]) -> list[str]:
    return [r.status for r in results]


def record(folder: Path, name: str = "run.json") -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


# ---- many cases


def test_masks_lie_on_the_grids_of_their_images(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in")
    results = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert [(r.case, r.status, r.output) for r in results] == [
        (f"case{n}", "done", f"case{n}.nii.gz") for n in range(3)
    ]
    for path in images:
        mask = nib.load(tmp_path / "out" / path.name)
        assert mask.shape == SHAPE
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, nib.load(path).affine)


def test_a_written_mask_is_what_segment_gives(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    infer([path], [model], tmp_path / "out", EXACT)
    written = np.asarray(nib.load(tmp_path / "out" / "case0.nii.gz").dataobj)
    assert np.array_equal(written, load_model(model, options=EXACT).segment(path))


def test_a_case_that_fails_costs_no_other(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in")
    images[1].write_bytes(images[1].read_bytes()[:200])
    results = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert statuses(results) == ["done", "failed", "done"]
    assert "case1.nii.gz" in str(results[1].reason)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["case0.nii.gz", "case2.nii.gz", "run.json"]
    assert [c["status"] for c in record(tmp_path / "out")["cases"]] == ["done", "failed", "done"]


def test_an_unexpected_error_of_one_case_is_named_and_kept_apart(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 2)
    whole = Segmenter.scores
    calls = []

    def first_breaks(self: Segmenter, image: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return whole(self, image)

    monkeypatch.setattr(Segmenter, "scores", first_breaks)
    results = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert statuses(results) == ["failed", "done"]
    assert "case0.nii.gz: the device ran out of memory" in str(results[0].reason)


def test_an_interruption_is_not_swallowed(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_images(tmp_path / "in", 1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Segmenter, "scores", stop)
    with pytest.raises(KeyboardInterrupt):
        infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)


# ---- resuming


def run(folder: Path, *models: Path, options: InferOptions = EXACT) -> list[str]:
    return statuses(infer([folder / "in"], list(models), folder / "out", options))


def test_finished_cases_are_skipped_without_a_look_at_the_network(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_images(tmp_path / "in", 2)
    run(tmp_path, model)
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").glob("*.gz"))]
    monkeypatch.setattr(Segmenter, "scores", lambda *_: pytest.fail("segmented again"))
    assert run(tmp_path, model) == ["skipped", "skipped"]
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").glob("*.gz"))] == before


def test_a_skipped_case_keeps_what_was_known_of_it(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    first = record(tmp_path / "out")["cases"][0]
    run(tmp_path, model)
    assert record(tmp_path / "out")["cases"][0] == first | {"status": "skipped"}
    assert run(tmp_path, model) == ["skipped"]


def test_another_model_does_everything_again(tmp_path: Path, model: Path, other_model: Path) -> None:
    some_images(tmp_path / "in", 2)
    run(tmp_path, model)
    before = (tmp_path / "out" / "case0.nii.gz").read_bytes()
    assert run(tmp_path, other_model) == ["done", "done"]
    assert (tmp_path / "out" / "case0.nii.gz").read_bytes() != before
    assert run(tmp_path, other_model, model) == ["done", "done"]


def test_a_mask_that_another_model_left_in_between_is_done_again(
    tmp_path: Path, model: Path, other_model: Path
) -> None:
    some_images(tmp_path / "in", 2)
    run(tmp_path, model)
    mine = (tmp_path / "out" / "case0.nii.gz").read_bytes()
    # into the same folder, with a record of its own
    run(tmp_path, other_model, options=replace(EXACT, shard=(1, 2)))
    assert (tmp_path / "out" / "case0.nii.gz").read_bytes() != mine
    assert run(tmp_path, model) == ["done", "skipped"]
    assert (tmp_path / "out" / "case0.nii.gz").read_bytes() == mine


def test_a_random_field_is_one_setting_away_and_makes_masks_of_its_own(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    plain = np.asarray(nib.load(tmp_path / "out" / "case0.nii.gz").dataobj)
    field = {"postprocess": {"crf": True, "crf_smoothness_weight": 20.0, "crf_smoothness_mm": 3.0}}
    assert run(tmp_path, model, options=replace(EXACT, settings=field)) == ["done"]
    smooth = np.asarray(nib.load(tmp_path / "out" / "case0.nii.gz").dataobj)
    edges = [int(sum((np.diff(a, axis=axis) != 0).sum() for axis in range(3))) for a in (plain, smooth)]
    assert edges[1] < 0.8 * edges[0]
    assert "postprocess" in record(tmp_path / "out")["cases"][0]["seconds"]


@pytest.mark.parametrize("change", [{"tta": "flip"}, {"overlap": 0.25}, {"precision": "bf16"}, {"overwrite": True}])
def test_other_options_do_everything_again(tmp_path: Path, model: Path, change: dict[str, Any]) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    assert run(tmp_path, model, options=replace(EXACT, **change)) == ["done"]


def test_a_changed_input_is_done_again_and_only_that(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in", 2)
    run(tmp_path, model)
    save(images[1], blobs(SHAPE, seed=9), AFFINE)
    assert run(tmp_path, model) == ["skipped", "done"]


@pytest.mark.parametrize("damage", ["cut", "gone", "elsewhere"])
def test_a_mask_that_is_not_whole_or_not_in_its_place_is_made_again(tmp_path: Path, model: Path, damage: str) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    mask = tmp_path / "out" / "case0.nii.gz"
    whole = mask.read_bytes()
    if damage == "cut":
        mask.write_bytes(whole[:-20])
    elif damage == "gone":
        mask.unlink()
    else:
        save(mask, np.zeros(SHAPE, np.uint8), oblique((1.0, 1.5, 2.6)))
    assert run(tmp_path, model) == ["done"]
    assert mask.read_bytes() == whole


def test_a_mask_of_unknown_origin_is_made_again(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    (tmp_path / "out" / "run.json").unlink()
    assert run(tmp_path, model) == ["done"]


def test_a_damaged_record_is_named_and_its_cases_done_again(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    (tmp_path / "out" / "run.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, model) == ["done"]
    assert "run.json" in caplog.text


def test_a_failed_case_is_tried_again(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in", 1)
    good = images[0].read_bytes()
    images[0].write_bytes(good[:100])
    assert run(tmp_path, model) == ["failed"]
    images[0].write_bytes(good)
    assert run(tmp_path, model) == ["done"]


def test_a_failed_case_says_that_an_older_mask_is_still_there(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    images[0].write_bytes(images[0].read_bytes()[:100])
    (result,) = infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
    assert result.status == "failed"
    assert result.warnings == ("case0.nii.gz is of an earlier run: do not use it",)


def test_cases_of_earlier_runs_stay_in_the_record(tmp_path: Path, model: Path) -> None:
    images = some_images(tmp_path / "in", 3)
    infer(images[:2], [model], tmp_path / "out", EXACT)
    infer(images[2:], [model], tmp_path / "out", EXACT)
    assert [c["case"] for c in record(tmp_path / "out")["cases"]] == ["case0", "case1", "case2"]


# ---- shards and records


def test_shards_share_the_cases_and_know_each_other(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 3)
    first = infer([tmp_path / "in"], [model], tmp_path / "out", replace(EXACT, shard=(1, 2)))
    second = infer([tmp_path / "in"], [model], tmp_path / "out", replace(EXACT, shard=(2, 2)))
    assert ([r.case for r in first], [r.case for r in second]) == (["case0", "case2"], ["case1"])
    assert {p.name for p in (tmp_path / "out").glob("*.json")} == {"run.1-of-2.json", "run.2-of-2.json"}
    assert run(tmp_path, model) == ["skipped"] * 3


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0)])
def test_an_impossible_shard_is_refused_before_anything_is_done(
    tmp_path: Path, model: Path, shard: tuple[int, int]
) -> None:
    some_images(tmp_path / "in", 1)
    with pytest.raises(ConfigError, match="--shard"):
        infer([tmp_path / "in"], [model], tmp_path / "out", replace(EXACT, shard=shard))
    assert not (tmp_path / "out").exists()


def test_the_record_says_what_was_done_with_what(tmp_path: Path, model: Path) -> None:
    (path,) = some_images(tmp_path / "in", 1)
    run(tmp_path, model)
    found = record(tmp_path / "out")
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert found["schema_version"] == 1
    told = {k: v for k, v in found["settings"].items() if k != "configuration"}
    assert told == {"models": [weights], "tta": "none", "overlap": None, "precision": "32", "settings": {}}
    assert len(found["settings"]["configuration"]) == 64
    assert found["labels"] == {"3": "shell", "7": "core"}
    assert found["device"].startswith("cpu")
    assert {"python", "medseg", "torch", "monai", "numpy"} <= set(found["versions"])
    (case,) = found["cases"]
    assert case["inputs"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    assert set(case["seconds"]) == {"read", "network", "restore", "write"}
    assert all(s >= 0 for s in case["seconds"].values())
    assert case["peak_memory_mb"] > 10


def test_progress_is_told_case_by_case(tmp_path: Path, model: Path) -> None:
    told = []
    segmenter = load_model(model, options=EXACT)
    cases = [Case(p.name, (p,), None, p.name) for p in some_images(tmp_path / "in", 2)]
    segment_cases(
        segmenter,
        cases,
        tmp_path / "out",
        progress=lambda stage, done, total, detail="": told.append((stage, done, total)),
    )
    assert told == [("infer", 0, 2), ("infer", 1, 2), ("infer", 2, 2)]


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path, model: Path) -> None:
    some_images(tmp_path / "in", 1)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be made"):
        infer([tmp_path / "in"], [model], tmp_path / "out", EXACT)
