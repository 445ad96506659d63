"""From folders to a table: pairing, edge cases, refusals, and failures that cost only their own case."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.errors import DataError
from medseg.evaluate import COLUMNS, EvaluateOptions, Pair, evaluate_folders, evaluate_pairs, measuring

OBLIQUE = np.array([[0, -1.6, 0.3, 10], [2.0, 0, 0, -20], [0, 0.4, 2.9, 5], [0, 0, 0, 1]])


def block(start, stop, value=1, shape=(8, 9, 10)):
    array = np.zeros(shape, np.uint8)
    array[tuple(slice(a, b) for a, b in zip(start, stop))] = value
    return array


SOLID = block((1, 1, 1), (5, 5, 5))  # 64 voxels
HALF = block((1, 1, 1), (5, 5, 3))  # 32 of them
NOTHING = np.zeros_like(SOLID)


@pytest.fixture
def folders(tmp_path):
    """Writes {case: array or None} into pred/ and ref/ and gives both folders."""

    def write(predictions, references, affine=OBLIQUE):
        for name, arrays in (("pred", predictions), ("ref", references)):
            (tmp_path / name).mkdir()
            for case, array in arrays.items():
                nib.save(nib.Nifti1Image(array, affine), tmp_path / name / f"{case}.nii.gz")
        return tmp_path / "pred", tmp_path / "ref"

    return write


def rows(evaluation):
    return {(r["case"], r["name"]): r for r in evaluation.table.to_dict("records")}


def test_one_row_per_case_and_label(folders):
    two = SOLID + block((6, 6, 6), (8, 8, 8), value=5)
    found = evaluate_folders(*folders({"a": HALF, "b": two}, {"a": SOLID, "b": two}))
    assert list(found.table.columns) == list(COLUMNS)
    assert [(r["case"], r["label"], r["status"]) for r in found.table.to_dict("records")] == [
        ("a", 1, "ok"),
        ("a", 5, "both_empty"),
        ("b", 1, "ok"),
        ("b", 5, "ok"),
    ]
    row = rows(found)["a", "1"]
    assert (row["tp"], row["fp"], row["fn"], row["dice"]) == (32, 0, 32, pytest.approx(2 / 3))


def test_edge_cases_and_their_counts(folders):
    found = evaluate_folders(
        *folders(
            {"both_empty": NOTHING, "missed": NOTHING, "spurious": SOLID, "fine": SOLID},
            {"both_empty": NOTHING, "missed": SOLID, "spurious": NOTHING, "fine": SOLID},
        )
    )
    assert all(r["status"] == ("ok" if case == "fine" else case) for (case, _), r in rows(found).items())
    dice = found.summary["labels"]["1"]["dice"]
    assert (dice["n_missed"], dice["n_spurious"], dice["n_both_empty"], dice["n"]) == (1, 1, 1, 3)
    assert dice["mean"] == pytest.approx(1 / 3)
    hd95 = found.summary["labels"]["1"]["hd95_mm"]
    assert (hd95["median"], hd95["mean"], hd95["n"], hd95["n_finite"]) == ("inf", 0, 3, 1)


def test_the_summary_is_strict_json(folders):
    found = evaluate_folders(*folders({"a": NOTHING, "b": SOLID}, {"a": SOLID, "b": NOTHING}))
    assert json.loads(json.dumps(found.summary, allow_nan=False)) == found.summary


def test_worst_case_first(folders):
    found = evaluate_folders(*folders({"a": SOLID, "b": HALF}, {"a": SOLID, "b": SOLID}))
    assert [(w["case"], w["lowest_label"]) for w in found.summary["worst_cases"]] == [("b", "1"), ("a", "1")]


def test_foreground_is_the_mean_over_labels_then_cases(folders):
    reference = SOLID + block((6, 6, 6), (8, 8, 8), value=2)
    found = evaluate_folders(*folders({"a": HALF, "b": SOLID}, {"a": reference, "b": SOLID}))
    # a: (2/3 + 0) / 2; b: label 2 is in neither map, so label 1 alone: 1
    assert found.summary["foreground"]["dice"]["mean"] == pytest.approx((1 / 3 + 1) / 2)


def test_names_regions_background_and_ignore_come_from_the_labels(folders):
    prediction = np.array([[[1, 2, 2, 1, 0]]], np.uint8)
    reference = np.array([[[2, 2, 0, 9, 1]]], np.uint8)
    labels = {"background": 0, "whole": (1, 2), "core": 2, "ignore": 9}
    found = rows(evaluate_folders(*folders({"a": prediction}, {"a": reference}), EvaluateOptions(labels=labels)))
    assert {key: (r["label"], r["tp"], r["fp"], r["fn"]) for key, r in found.items()} == {
        ("a", "whole"): ("1+2", 2, 1, 1),
        ("a", "core"): (2, 1, 1, 1),
    }


def test_the_ignored_value_is_no_label_of_its_own(folders):
    found = evaluate_folders(
        *folders({"a": SOLID}, {"a": SOLID + block((6, 6, 6), (8, 8, 8), value=9)}), EvaluateOptions(ignore_value=9)
    )
    assert list(found.labels) == ["1"]


def test_values_that_are_no_label_are_named(folders):
    found = evaluate_folders(*folders({"a": SOLID * 3}, {"a": SOLID}))
    assert rows(found)["a", "1"]["status"] == "missed"
    assert any("value 3" in warning and "a" in warning for warning in found.warnings)
    assert not any("asked for" in warning for warning in found.warnings)


def test_labels_that_no_mask_has_are_told(folders):
    found = evaluate_folders(*folders({"a": SOLID * 3}, {"a": SOLID}), EvaluateOptions(labels={"tumour": 7, "cyst": 8}))
    assert found.warnings[0] == "no mask has a label of those asked for (tumour, cyst); are they right?"
    assert set(found.table["status"]) == {"both_empty"}


def test_a_label_that_no_mask_has_is_judged_where_masks_are_empty(folders):
    found = evaluate_folders(*folders({"a": NOTHING}, {"a": NOTHING}), EvaluateOptions(labels={"tumour": 7}))
    assert rows(found)["a", "tumour"]["status"] == "both_empty"
    assert not any("asked for" in warning for warning in found.warnings)


def test_missing_predictions_are_refused_by_name(folders):
    with pytest.raises(DataError, match=r"missing predictions for 1 of 2 references: b; .*--allow-missing"):
        evaluate_folders(*folders({"a": SOLID}, {"a": SOLID, "b": SOLID}))


def test_missing_predictions_can_be_reported_apart(folders):
    found = evaluate_folders(*folders({"a": SOLID}, {"a": SOLID, "b": SOLID}), EvaluateOptions(allow_missing=True))
    row = rows(found)["b", "1"]
    assert row["status"] == "missing_prediction"
    assert math.isnan(row["dice"])
    # 64 voxels of |det| mm³
    assert row["reference_ml"] == pytest.approx(64 * abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000)
    dice = found.summary["labels"]["1"]["dice"]
    assert (dice["mean"], dice["n"], dice["n_missing_prediction"]) == (1, 1, 1)
    assert found.summary["missing_predictions"] == ["b"]


def test_predictions_without_a_reference_are_a_warning(folders):
    found = evaluate_folders(*folders({"a": SOLID, "more": SOLID}, {"a": SOLID}))
    assert list(found.pairs) == ["a"]
    assert "more" in found.warnings[0]


def test_other_files_among_the_predictions_do_not_matter(folders):
    predictions, references = folders({"a": SOLID}, {"a": SOLID})
    before = evaluate_folders(predictions, references).warnings
    # of medseg, nnU-Net, macOS and an export that was broken off
    names = ("run.json", "dataset.json", "plans.json", "summary.json", "a.npz", "a.pkl", ".DS_Store", "._a.nii.gz")
    for name in (*names, ".a.nii"):
        (predictions / name).write_text("{}")
    (predictions / "probabilities").mkdir()
    nib.save(nib.Nifti1Image(SOLID, OBLIQUE), predictions / "probabilities" / "b.nii.gz")
    found = evaluate_folders(predictions, references)
    assert (list(found.pairs), found.warnings, found.failures) == (["a"], before, ())


@pytest.mark.parametrize("double", ["pred", "ref"])
def test_one_case_in_two_files_costs_that_case_only(folders, tmp_path, double):
    predictions, references = folders({"a": SOLID, "b": SOLID}, {"a": SOLID, "b": SOLID})
    nib.save(nib.Nifti1Image(SOLID, OBLIQUE), tmp_path / double / "a.nii")
    found = evaluate_folders(predictions, references)
    assert set(rows(found)) == {("b", "1")}
    assert found.failures[0].case == "a"
    assert "one case in 2 files (a.nii, a.nii.gz); keep one" in found.failures[0].reason
    assert found.summary["n_failed"] == 1


def test_endings_need_not_agree_nor_be_small(folders):
    predictions, references = folders({"a": SOLID}, {"a": SOLID})
    (predictions / "a.nii.gz").rename(predictions / "a.NII.GZ")
    nib.save(nib.Nifti1Image(SOLID, OBLIQUE), references / "a.nii")
    (references / "a.nii.gz").unlink()
    assert rows(evaluate_folders(predictions, references))["a", "1"]["dice"] == 1


def test_accents_may_be_spelled_in_two_ways(folders):
    # one letter, or a letter and its accent as macOS writes it
    predictions, references = folders({"e\u0301": SOLID}, {"\u00e9": SOLID})
    assert rows(evaluate_folders(predictions, references))["\u00e9", "1"]["dice"] == 1


def test_names_that_are_no_text_are_shown_by_their_codes(folders):
    predictions, references = folders({"a": HALF, "b": SOLID}, {"a": SOLID, "b": SOLID})
    for folder in (predictions, references):
        (folder / "a.nii.gz").rename(folder / b"caf\xe9.nii.gz".decode("utf-8", "surrogateescape"))
    (references / "b.nii.gz").write_bytes(b"broken")
    found = evaluate_folders(predictions, references)
    assert set(rows(found)) == {(r"caf\udce9", "1")}
    assert json.dumps(found.summary, ensure_ascii=False).encode()


def test_one_folder_given_twice_is_refused(folders, tmp_path):
    predictions, _ = folders({"a": SOLID}, {"a": SOLID})
    (tmp_path / "link").symlink_to(predictions)
    for other in (predictions, tmp_path / "pred" / ".." / "pred", tmp_path / "link"):
        with pytest.raises(DataError, match="given as predictions and as references"):
            evaluate_folders(predictions, other)


def test_a_prediction_that_is_its_reference_is_named(folders):
    predictions, references = folders({"b": HALF}, {"a": SOLID, "b": SOLID})
    (predictions / "a.nii.gz").symlink_to(references / "a.nii.gz")
    assert (
        "in 1 cases prediction and reference are one and the same file: a"
        in evaluate_folders(predictions, references).warnings
    )


def test_predictions_that_equal_every_reference_are_noticed(folders):
    predictions, references = folders({"a": SOLID, "b": SOLID}, {"a": SOLID, "b": SOLID})
    said = "every prediction equals its reference"
    assert any(said in warning for warning in evaluate_folders(predictions, references).warnings)
    nib.save(nib.Nifti1Image(HALF, OBLIQUE), predictions / "b.nii.gz")
    assert not any(said in warning for warning in evaluate_folders(predictions, references).warnings)


@pytest.mark.parametrize("nested", ["pred", "ref"])
def test_folders_in_a_folder_without_label_maps_are_named(folders, tmp_path, nested):
    predictions, references = folders({"a": SOLID}, {"a": SOLID})
    (tmp_path / nested / "fold_0").mkdir()
    (tmp_path / nested / "a.nii.gz").rename(tmp_path / nested / "fold_0" / "a.nii.gz")
    with pytest.raises(
        DataError, match=rf"{nested}: no label maps found, .*folders in it \(fold_0\): give one of these"
    ):
        evaluate_folders(predictions, references)


def test_names_that_nowhere_agree_are_shown(folders):
    with pytest.raises(
        DataError, match=r"missing predictions for 1 .*: a; no names agree \(1 predictions .*: a_mask\)"
    ):
        evaluate_folders(*folders({"a_mask": SOLID}, {"a": SOLID}))


def test_an_interruption_ends_the_work_and_waits_for_no_other_case(folders):
    arrays = {f"case{n:02}": SOLID for n in range(40)}
    done = []

    def interrupt(stage, count, total, detail=""):
        done.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_folders(*folders(arrays, arrays), EvaluateOptions(jobs=2), progress=interrupt)
    assert done == [1]


@pytest.mark.parametrize(("images", "image"), [(".", "case_0000.nii.gz"), ("other.nii.gz", "other.nii.gz")])
def test_one_file_against_one_file(folders, tmp_path, images, image):
    folders({"anything": HALF}, {"case": SOLID})
    (tmp_path / "images").mkdir()
    for name in ("case_0000.nii.gz", "other.nii.gz"):
        nib.save(nib.Nifti1Image(SOLID, OBLIQUE), tmp_path / "images" / name)
    found = evaluate_folders(
        tmp_path / "pred/anything.nii.gz", tmp_path / "ref/case.nii.gz", images=tmp_path / "images" / images
    )
    assert rows(found)["case", "1"]["dice"] == pytest.approx(2 / 3)
    assert found.pairs["case"].image == tmp_path / "images" / image


@pytest.mark.parametrize(
    ("array", "affine", "said"),
    [
        (SOLID[:-1], OBLIQUE, r"shape \(7, 9, 10\) found, expected \(8, 9, 10\)"),
        (SOLID, OBLIQUE + np.eye(4, k=3) * 5, r"origin \(15, .*expected \(10,"),
        (SOLID, OBLIQUE @ np.diag([1, 1, 2, 1]), "spacing"),
        # backwards along the second axis about its middle: every voxel lies where another one was
        (SOLID, OBLIQUE @ np.array([[1, 0, 0, 0], [0, -1, 0, 8], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "origin"),
        (SOLID, OBLIQUE[:, [1, 0, 2, 3]] * [2 / math.hypot(1.6, 0.4), math.hypot(1.6, 0.4) / 2, 1, 1], "directions"),
    ],
)
def test_another_grid_is_a_failure_of_that_case_only(folders, array, affine, said):
    predictions, references = folders({"good": SOLID}, {"good": SOLID, "bad": SOLID})
    nib.save(nib.Nifti1Image(array, affine), predictions / "bad.nii.gz")
    found = evaluate_folders(predictions, references)
    assert set(rows(found)) == {("good", "1")}
    assert found.failures[0].case == "bad"
    assert "bad.nii.gz" in found.failures[0].reason
    assert "--resample-prediction" in found.failures[0].reason
    assert re.search(said, found.failures[0].reason)


def test_a_prediction_on_a_flipped_and_cropped_grid_can_be_resampled(folders):
    predictions, references = folders({"b": SOLID}, {"a": SOLID, "b": SOLID})
    # the same voxels in space: the last slice left out, the first axis backwards
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = SOLID.shape[0] - 1
    nib.save(nib.Nifti1Image(SOLID[::-1, :, :-1], OBLIQUE @ flip), predictions / "a.nii.gz")
    found = evaluate_folders(predictions, references, EvaluateOptions(resample_prediction=True))
    row = rows(found)["a", "1"]
    assert (row["dice"], row["fp"], row["fn"]) == (1, 0, 0)
    assert found.summary["resampled_predictions"] == ["a"]
    assert any(w.startswith("1 prediction on another grid") and w.endswith(": a") for w in found.warnings)


FLAT = np.array([[2.0, 0, 0, 10], [0, 0, 0, -20], [0, 3.0, 0, 5], [0, 0, 0, 1]]) + np.outer([0, 1, 0, 0], [0, 0, 1, 0])


def test_a_mirrored_plane_is_refused_or_turned(folders):
    plane = SOLID[:, :, 2]
    predictions, references = folders({"a": plane}, {"a": plane}, FLAT)
    mirror = np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = 7
    nib.save(nib.Nifti1Image(plane[::-1], FLAT @ mirror), predictions / "a.nii.gz")
    with pytest.raises(DataError, match=r"a plane at another place in space, or mirrored, .* --resample-prediction"):
        evaluate_folders(predictions, references)
    found = evaluate_folders(predictions, references, EvaluateOptions(resample_prediction=True))
    assert rows(found)["a", "1"]["dice"] == 1
    assert found.summary["resampled_predictions"] == ["a"]


def test_a_plane_of_another_height_is_not_resampled(folders):
    predictions, references = folders({"a": SOLID[:, :, 2]}, {"a": SOLID[:, :, 2]}, FLAT)
    away = FLAT.copy()
    away[1, 3] += 60
    nib.save(nib.Nifti1Image(SOLID[:, :, 2], away), predictions / "a.nii.gz")
    with pytest.raises(DataError, match="a plane at another height or angle"):
        evaluate_folders(predictions, references, EvaluateOptions(resample_prediction=True))


def test_outside_a_resampled_prediction_is_background(folders):
    predictions, references = folders({}, {"a": np.ones_like(SOLID)})
    nib.save(nib.Nifti1Image(np.ones((4, 9, 10), np.uint8), OBLIQUE), predictions / "a.nii.gz")
    found = rows(evaluate_folders(predictions, references, EvaluateOptions(resample_prediction=True)))["a", "1"]
    assert (found["tp"], found["fn"]) == (360, 360)


def test_an_unreadable_file_costs_only_its_case(folders):
    predictions, references = folders({"good": SOLID}, {"good": SOLID, "bad": SOLID})
    (predictions / "bad.nii.gz").write_bytes(b"not an image")
    found = evaluate_folders(predictions, references)
    assert [f.case for f in found.failures] == ["bad"]
    assert found.summary["failures"] == [{"case": "bad", "reason": found.failures[0].reason}]
    assert rows(found)["good", "1"]["dice"] == 1


@pytest.mark.parametrize("side", [0, 1])
def test_a_link_to_nothing_costs_its_case(folders, side):
    maps = {"good": SOLID, "gone": SOLID}
    both = folders(maps, maps)
    (both[side] / "gone.nii.gz").unlink()
    (both[side] / "gone.nii.gz").symlink_to("/mnt/share/gone.nii.gz")
    (failure,) = evaluate_folders(*both).failures
    assert failure.case == "gone"
    assert "/mnt/share/gone.nii.gz, which is not there" in failure.reason


def test_nothing_left_is_an_error_with_the_reasons(folders):
    predictions, references = folders({}, {"bad": SOLID})
    (predictions / "bad.nii.gz").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"none of 1 cases could be evaluated: .*bad\.nii\.gz"):
        evaluate_folders(predictions, references)


def test_references_without_any_label_are_an_error(folders):
    with pytest.raises(DataError, match="nothing but background"):
        evaluate_folders(*folders({"a": SOLID}, {"a": NOTHING}))


@pytest.mark.parametrize("missing", ["pred", "ref"])
def test_folders_must_exist(folders, tmp_path, missing):
    predictions, references = folders({"a": SOLID}, {"a": SOLID})
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"{missing}: no such file or folder"):
        evaluate_folders(predictions, references)


def test_a_folder_that_cannot_be_reached_is_named(folders, tmp_path):
    predictions, _ = folders({"a": SOLID}, {"a": SOLID})
    with pytest.raises(DataError, match=r"xxx: cannot be reached \(File name too long\)"):
        evaluate_folders(predictions, tmp_path / ("x" * 300))


def test_an_empty_folder_is_an_error(folders):
    with pytest.raises(DataError, match="no label maps found"):
        evaluate_folders(*folders({"a": SOLID}, {}))


def test_more_jobs_give_the_same_table(folders):
    arrays = {f"case{n}": np.roll(SOLID, n, axis=1) for n in range(4)}
    predictions, references = folders(arrays, dict.fromkeys(arrays, SOLID))
    one, three = (evaluate_folders(predictions, references, EvaluateOptions(jobs=jobs)) for jobs in (1, 3))
    assert one.table.equals(three.table)


def test_progress_is_told_after_every_case(folders):
    told = []
    evaluate_folders(
        *folders({"a": SOLID, "b": SOLID}, {"a": SOLID, "b": SOLID}), progress=lambda *step: told.append(step)
    )
    assert told == [("evaluate", 1, 2), ("evaluate", 2, 2)]


def test_pictures_are_compared_in_pixels(tmp_path):
    for name, columns in (("pred", slice(2, 6)), ("ref", slice(3, 7))):
        (tmp_path / name).mkdir()
        array = np.zeros((8, 12), np.uint8)
        array[2:6, columns] = 1
        Image.fromarray(array).save(tmp_path / name / "scan.png")
    row = rows(evaluate_folders(tmp_path / "pred", tmp_path / "ref"))["scan", "1"]
    assert (row["dice"], row["hd_mm"]) == (0.75, 1)
    assert math.isnan(row["reference_ml"])


def test_images_are_found_with_and_without_channel_number(folders, tmp_path):
    predictions, references = folders({"a": SOLID, "b": SOLID, "c": SOLID}, {"a": SOLID, "b": SOLID, "c": SOLID})
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz"):
        nib.save(nib.Nifti1Image(SOLID, OBLIQUE), images / name)
    pairs = evaluate_folders(predictions, references, images=images).pairs
    assert {case: pair.image and pair.image.name for case, pair in pairs.items()} == {
        "a": "a.nii.gz",
        "b": "b_0000.nii.gz",
        "c": None,
    }


def test_an_image_is_found_twice(folders, tmp_path):
    predictions, references = folders({"a": HALF}, {"a": SOLID})
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.nii.gz", "a.nii"):
        nib.save(nib.Nifti1Image(SOLID, OBLIQUE), images / name)
    found = evaluate_folders(predictions, references, images=images)
    assert found.pairs["a"].image is None
    assert "1 images are there in two files and were not shown: a" in found.warnings


def test_an_image_in_the_place_of_a_label_map_costs_its_case(folders):
    image = np.arange(8 * 9 * 20, dtype=np.int16).reshape(8, 9, 20)
    found = evaluate_folders(*folders({"a": HALF, "b": image}, {"a": SOLID, "b": np.zeros_like(image)}))
    assert [failure.case for failure in found.failures] == ["b"]
    assert "1439 values found, 0 in" in found.failures[0].reason
    assert "looks like an image" in found.failures[0].reason


@pytest.mark.parametrize(
    ("cores", "memory", "jobs"), [(4, 2**30, 3), (2, 2**30, 2), (4, 2 * 20 * 720 * 2, 2), (4, 1, 1), (64, 2**40, 3)]
)
def test_as_many_cases_at_a_time_as_cores_and_memory_allow(folders, monkeypatch, cores, memory, jobs):
    # three cases of 720 voxels, one of them damaged
    predictions, references = folders(dict.fromkeys("abc", HALF), dict.fromkeys("abc", SOLID))
    (references / "b.nii.gz").write_bytes(b"x" * 10_000)
    asked = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("os.sysconf", lambda name: memory if name == "SC_PHYS_PAGES" else 1)

    class Pool(ThreadPoolExecutor):
        def __init__(self, max_workers):
            asked.append(max_workers)
            super().__init__(max_workers)

    monkeypatch.setattr(measuring, "ThreadPoolExecutor", Pool)
    assert evaluate_folders(predictions, references).failures
    # cases as small as these are not worth a thread
    assert asked == []
    monkeypatch.setattr(measuring, "FEW_VOXELS", 0)
    evaluate_folders(predictions, references)
    assert asked == ([] if jobs == 1 else [jobs])


def test_a_reference_that_is_gone_costs_its_case(folders):
    predictions, references = folders({"a": HALF, "b": HALF}, {"a": SOLID})
    pairs = [Pair(case, predictions / f"{case}.nii.gz", references / f"{case}.nii.gz") for case in "ab"]
    found = evaluate_pairs(pairs, EvaluateOptions())
    assert [failure.case for failure in found.failures] == ["b"]
    assert "no such file" in found.failures[0].reason


def test_a_folder_that_cannot_be_read_is_named(folders, monkeypatch):
    predictions, references = folders({"a": SOLID}, {"a": SOLID})

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(references), "iterdir", refuse)
    with pytest.raises(DataError, match=r"ref: cannot be read \(Permission denied\)"):
        evaluate_folders(predictions, references)


def test_whatever_breaks_in_one_case_costs_only_that_case(folders, monkeypatch):
    whole = measuring.metrics.measure

    def broken(prediction, *others, **named):
        if prediction.sum() == HALF.sum():
            raise RuntimeError("of a library")
        return whole(prediction, *others, **named)

    monkeypatch.setattr(measuring.metrics, "measure", broken)
    found = evaluate_folders(*folders({"a": HALF, "b": SOLID}, {"a": SOLID, "b": SOLID}))
    assert set(rows(found)) == {("b", "1")}
    assert found.failures[0].reason.endswith("a.nii.gz: RuntimeError: of a library")


def test_a_label_that_a_case_without_prediction_lacks_has_no_volume_there(folders):
    found = evaluate_folders(*folders({"a": SOLID}, {"a": SOLID, "b": SOLID * 2}), EvaluateOptions(allow_missing=True))
    row = rows(found)["b", "1"]
    assert (row["status"], row["reference_ml"]) == ("missing_prediction", 0)


def test_damaged_references_alone_are_an_error_with_their_reasons(folders):
    predictions, references = folders({"a": SOLID, "b": SOLID}, {"a": SOLID, "b": SOLID})
    for case in "ab":
        (references / f"{case}.nii.gz").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"none of 2 cases could be evaluated: .*a\.nii\.gz.*b\.nii\.gz"):
        evaluate_folders(predictions, references)


def test_line_breaks_in_a_name_are_shown_by_their_codes(folders):
    found = evaluate_folders(*folders({"a\rb\nc": SOLID}, {"a\rb\nc": SOLID}))
    assert found.table["case"].unique().tolist() == ["a\\rb\\nc"]


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1)])
def test_a_picture_is_not_held_against_another_format(tmp_path, shape):
    (tmp_path / "pred").mkdir()
    (tmp_path / "ref").mkdir()
    Image.fromarray(np.ones((4, 4), np.uint8)).save(tmp_path / "pred" / "a.png")
    nib.save(nib.Nifti1Image(np.ones(shape, np.uint8), np.eye(4)), tmp_path / "ref" / "a.nii.gz")
    with pytest.raises(DataError, match=r"a\.png is a picture, a\.nii\.gz is not: rows and columns against x and y"):
        evaluate_folders(tmp_path / "pred", tmp_path / "ref", EvaluateOptions(resample_prediction=True))


def test_a_plane_is_not_held_against_a_volume_of_one_slice(tmp_path):
    for name, shape in (("pred", (4, 5)), ("ref", (4, 5, 1))):
        (tmp_path / name).mkdir()
        nib.save(nib.Nifti1Image(np.ones(shape, np.uint8), np.eye(4)), tmp_path / name / "a.nii.gz")
    with pytest.raises(DataError, match=r"2 axes found .* expected 3 .*; save both with the same axes") as refused:
        evaluate_folders(tmp_path / "pred", tmp_path / "ref", EvaluateOptions(resample_prediction=True))
    assert "--resample-prediction" not in str(refused.value)


def test_a_folder_of_files_by_label_for_each_case_is_explained(folders):
    predictions, references = folders({}, {"a": SOLID, "b": SOLID})
    for case in ("a", "b"):
        (predictions / case).mkdir()
        nib.save(nib.Nifti1Image(SOLID, OBLIQUE), predictions / case / "liver.nii.gz")
    with pytest.raises(DataError, match=r"a folder for each case found \(a, b\), expected one file for each .*--ml"):
        evaluate_folders(predictions, references)


def test_headers_that_contradict_themselves_are_told(folders):
    predictions, references = folders({"a": SOLID}, {"a": SOLID})
    image = nib.Nifti1Image(SOLID, OBLIQUE)
    image.set_sform(OBLIQUE, 1)
    image.set_qform(np.diag([1.0, 1, 1, 1]), 1)
    nib.save(image, predictions / "a.nii.gz")
    assert evaluate_folders(predictions, references).warnings[0] == (
        "in 1 cases the header of the prediction looks odd (sform and qform place the voxels differently; the sform is "
        "used): a"
    )


def test_reasons_that_are_not_shown_are_counted(folders):
    many = {f"c{n:02d}": SOLID for n in range(12)}
    predictions, references = folders(many, many)
    for path in predictions.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 12 cases could be evaluated: .*; and 2 more$"):
        evaluate_folders(predictions, references)
