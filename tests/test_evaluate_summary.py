"""What is measured only where asked, and what the summary says of it: worked by hand on rows of voxels."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from geometry import save

from medseg.errors import DataError
from medseg.evaluate import COLUMNS, EvaluateOptions, Evaluation, Pair, evaluate_folders, evaluate_pairs
from medseg.evaluate.calibration import summarise_calibration
from medseg.evaluate.lesions import LESION_COLUMNS
from medseg.evaluate.summary import SUBGROUP_METRICS
from medseg.metrics.calibration import reliability
from medseg.metrics.lesions import LESION_RULES
from medseg.report import evaluate

CONTRACT = [
    "case",
    "label",
    "name",
    "status",
    "tp",
    "fp",
    "fn",
    "dice",
    "iou",
    "precision",
    "recall",
    "hd_mm",
    "hd95_mm",
    "assd_mm",
    "nsd",
    "reference_ml",
    "prediction_ml",
    "volume_difference_ml",
]


def line(*values: int) -> np.ndarray:
    """Voxels in a row."""
    return np.array([[values]], np.uint8)


@pytest.fixture
def judge(tmp_path: Path):
    """Judges {case: (prediction or None, reference)} of voxels of 1 × 1 × 2 mm; options as for `EvaluateOptions`."""

    def judged(cases: dict[str, Any], table: str = "", **options: Any) -> Evaluation:
        for name in ("pred", "ref"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            (tmp_path / name).mkdir()
        for case, (prediction, reference) in cases.items():
            save(tmp_path / "ref" / f"{case}.nii.gz", reference, np.diag([1.0, 1, 2, 1]))
            if prediction is not None:
                save(tmp_path / "pred" / f"{case}.nii.gz", prediction, np.diag([1.0, 1, 2, 1]))
        metadata = tmp_path / "table.csv" if table else None
        if metadata is not None:
            metadata.write_text(table)
        return evaluate_folders(tmp_path / "pred", tmp_path / "ref", EvaluateOptions(**options), metadata=metadata)

    return judged


FULL, HALF, EMPTY = line(0, 1, 1, 1, 1, 0), line(0, 1, 1, 0, 0, 0), line(0, 0, 0, 0, 0, 0)


def strict(evaluation: Evaluation) -> bool:
    return json.loads(json.dumps(evaluation.summary, allow_nan=False)) == evaluation.summary


def test_the_table_begins_with_the_columns_that_are_promised(judge) -> None:
    found = judge({"a": (HALF, FULL)})
    assert list(COLUMNS)[: len(CONTRACT)] == CONTRACT
    assert list(found.table.columns) == [*CONTRACT, "specificity", "masd_mm", "relative_volume_difference"]
    assert found.table["relative_volume_difference"].tolist() == [-0.5]


def test_extra_measures_are_columns_where_asked(judge) -> None:
    found = judge({"a": (FULL, FULL), "b": (FULL, EMPTY)}, extra=("cldice", "boundary_iou"))
    assert list(found.table.columns) == [*COLUMNS, "boundary_iou", "cldice"]
    assert found.table["boundary_iou"].tolist() == [1, 0]
    for name in ("boundary_iou", "cldice"):
        assert found.summary["labels"]["1"][name]["mean"] == found.summary["foreground"][name]["mean"] == 0.5
        assert name in found.summary["definitions"]


def test_every_measure_has_a_summary_and_a_definition(judge) -> None:
    found = judge({"a": (HALF, FULL)})
    measures = set(COLUMNS[7:])
    assert measures <= set(found.summary["labels"]["1"])
    volumes = {"reference_ml", "prediction_ml", "volume_difference_ml"}
    assert measures - volumes <= set(found.summary["definitions"])
    assert found.summary["schema_version"] == 2


def test_what_was_not_asked_for_is_there_and_empty(judge) -> None:
    summary = judge({"a": (HALF, FULL)}).summary
    assert {key: summary[key] for key in ("subgroups", "lesions", "calibration", "groups", "n_groups")} == {
        "subgroups": [],
        "lesions": None,
        "calibration": None,
        "groups": None,
        "n_groups": None,
    }
    assert summary["volumes"] == {"1": None}
    assert summary["labels"]["1"]["dice"]["cases_needed"] is None
    assert summary["resampled_predictions"] == []


def test_the_choices_are_told_for_programs(judge) -> None:
    cases = {"a": (FULL, FULL)}
    assert judge(cases).summary["options"] == {
        "surface": "surfel",
        "nsd_tolerance_mm": 1.0,
        "ignore_value": None,
        "extra": [],
        "lesions": None,
        "resample_prediction": False,
    }
    chosen = {
        "labels": {"one": 1, "two": 2, "ignore": 9},
        "nsd_tolerance_mm": {"*": 3, "one": 2},
        "surface": "voxel",
        "extra": ("cldice",),
        "lesions": "panoptic",
        "resample_prediction": True,
    }
    assert judge(cases, **chosen).summary["options"] == {
        "surface": "voxel",
        "nsd_tolerance_mm": {"one": 2.0, "two": 3.0},
        "ignore_value": 9,
        "extra": ["cldice"],
        "lesions": "panoptic",
        "resample_prediction": True,
    }


def test_labels_may_be_numbers_of_numpy_and_regions_lists() -> None:
    assert EvaluateOptions(labels={"liver": np.int16(1), "both": [1, 2]}).labels == {"liver": 1, "both": (1, 2)}


def test_options_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"options of type dict found, expected medseg\.EvaluateOptions"):
        evaluate_folders(tmp_path, tmp_path, {"surface": "voxel"})


# ---- tolerances


def test_each_label_can_have_its_tolerance(judge) -> None:
    # both labels are off by 2 mm at one end
    prediction, reference = line(0, 1, 1, 0, 2, 2, 0), line(1, 1, 1, 2, 2, 2, 0)
    labels = {"one": 1, "two": 2}
    found = judge({"a": (prediction, reference)}, labels=labels, surface="voxel", nsd_tolerance_mm={"one": 2.0})
    assert found.table["nsd"].tolist() == [1, pytest.approx(4 / 5)]
    assert "within 1 mm (one: 2 mm) of" in found.summary["definitions"]["nsd"]
    others = judge({"a": (prediction, reference)}, surface="voxel", nsd_tolerance_mm={"1": 1.0, "*": 2.0})
    assert others.table["nsd"].tolist() == [pytest.approx(4 / 5), 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": {"liver": 1}, "nsd_tolerance_mm": {"lever": 2}}, "unknown labels lever found, expected .*: liver"),
        ({"nsd_tolerance_mm": {"liver": 2}}, "unknown labels liver found, expected some of: values such as 1"),
        ({"nsd_tolerance_mm": {"*": -1}}, "-1 mm found, expected 0 or more"),
        ({"nsd_tolerance_mm": math.nan}, "expected 0 or more"),
        ({"nsd_tolerance_mm": math.inf}, "expected 0 or more"),
        ({"extra": ("hausdorff",)}, "hausdorff are unknown, expected boundary_iou, cldice"),
        ({"lesions": "brats"}, "'brats' is unknown, expected one of default, panoptic, brats2023"),
        ({"jobs": 0}, "0 jobs found"),
        ({"surface": "sphere"}, "'sphere' is unknown, expected surfel or voxel"),
        ({"labels": {"background": 0, "ignore": 3}}, "nothing but background"),
        ({"labels": {"liver": 1, "ignore": (3, 4)}}, r"'ignore' is the region \(3, 4\), expected one value"),
        ({"labels": ["liver"]}, "expected names with values"),
        ({"labels": {1: "liver"}}, "expected names with values"),
        ({"labels": {"liver": "1"}}, "label 'liver': '1' found, expected a whole number"),
        ({"labels": {"liver": 1.0}}, "label 'liver': 1.0 found, expected a whole number"),
        ({"labels": {"liver": True}}, "label 'liver': True found, expected a whole number"),
        ({"labels": {"liver": -1}}, "label 'liver' is -1, expected 0 to 2147483647"),
        ({"labels": {"liver": ()}}, r"label 'liver' is the region \(\), expected one value or more"),
        ({"labels": {"liver": (0, 1)}}, r"label 'liver' is the region \(0, 1\), expected .* above 0"),
        ({"ignore_value": "255"}, "ignore_value: '255' found, expected a whole number"),
        ({"ignore_value": -1}, "ignore_value is -1, expected 0 to"),
        ({"nsd_tolerance_mm": "1"}, "NSD tolerance '1' found, expected a number of mm"),
        ({"nsd_tolerance_mm": None}, "NSD tolerance None found, expected a number of mm"),
        ({"nsd_tolerance_mm": {1: 2.0, "1": True}}, "NSD tolerance True found, expected a number of mm"),
        ({"extra": "cldice"}, "extra 'cldice' found, expected a tuple"),
        ({"extra": None}, "extra None found, expected a tuple"),
        ({"lesions": True}, "lesion rule True is unknown"),
        ({"jobs": 1.5}, "jobs: 1.5 found, expected a whole number"),
    ],
)
def test_choices_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        EvaluateOptions(**options)


def test_a_tolerance_of_a_value_that_is_nowhere_is_noticed(judge) -> None:
    assert (
        "NSD tolerance for 7 given, but no reference has such a value"
        in judge({"a": (HALF, FULL)}, nsd_tolerance_mm={"7": 2}).warnings
    )


# ---- how many cases, and volumes


def test_cases_needed_follow_from_the_spread(judge) -> None:
    found = judge({"a": (FULL, FULL), "b": (FULL, FULL), "c": (HALF, FULL)})
    # Dice 1, 1, 2/3: variance 1/27; n = (1.96 SD / half width)²
    expected = {key: math.ceil(1.959964**2 / 27 / float(key) ** 2) for key in ("0.01", "0.02", "0.05")}
    assert found.summary["labels"]["1"]["dice"]["cases_needed"] == expected
    assert "cases_needed" not in found.summary["labels"]["1"]["iou"]


def test_where_patients_are_known_patients_are_needed(judge) -> None:
    # every patient three times: their means are what SIX has once
    thrice = {f"{case}{n}": pair for case, pair in SIX.items() for n in (1, 2, 3)}
    table = "case,patient\n" + "".join(f"{case},{case[0]}\n" for case in thrice)
    scans, patients, once = (judge(thrice), judge(thrice, table), judge(SIX))
    needed, of_scans, expected = (
        found.summary["labels"]["1"]["dice"]["cases_needed"] for found in (patients, scans, once)
    )
    assert needed == expected
    assert needed["0.01"] > of_scans["0.01"]
    assert "How many patients" in patients.summary["definitions"]["cases_needed"]
    assert "How many cases" in scans.summary["definitions"]["cases_needed"]


def test_patients_that_have_a_label_are_counted(judge) -> None:
    found = judge({**SIX, "none": (EMPTY, EMPTY)}, TABLE + "none,y,4\n")
    dice = found.summary["labels"]["1"]["dice"]
    assert (found.summary["n_groups"], dice["n"], dice["n_groups"], dice["needed_of"]) == (4, 6, 3, "patients")
    scans = judge(SIX).summary["labels"]["1"]["dice"]
    assert (scans["n_groups"], scans["needed_of"]) == (None, "cases")


def test_volumes_agree_as_bland_and_altman_have_it(judge) -> None:
    found = judge({"a": (FULL, FULL), "b": (FULL, FULL), "c": (HALF, FULL), "none": (EMPTY, EMPTY)})
    # differences 0, 0 and −2 voxels of 2 mm³; where neither has the label there is no volume to agree on
    agreement = found.summary["volumes"]["1"]
    assert agreement["n"] == 3
    assert agreement["bias_ml"] == pytest.approx(-4e-3 / 3)
    assert agreement["sd_ml"] == pytest.approx(4e-3 / math.sqrt(3))
    assert strict(found)


# ---- subgroups and patients

SIX = {name: (FULL if name in "abc" else HALF, FULL) for name in "abcdef"}
TABLE = "case,site,patient\na,x,1\nb,x,1\nc,x,2\nd,y,3\ne,y,3\nf,y,3\n"


def test_subgroups_have_their_own_numbers(judge) -> None:
    found = judge(SIX, TABLE)
    x, y = found.summary["subgroups"]
    assert [(g["column"], g["value"], g["n_cases"], g["n_groups"], g["small"]) for g in (x, y)] == [
        ("site", "x", 3, 2, True),
        ("site", "y", 3, 1, True),
    ]
    assert (x["foreground"]["dice"]["mean"], y["foreground"]["dice"]["mean"]) == (1, pytest.approx(2 / 3))
    counts = ("n", "n_missed", "n_spurious", "n_both_empty", "n_missing_prediction")
    assert [y["labels"]["1"]["dice"][key] for key in counts] == [3, 0, 0, 0, 0]
    assert set(y["labels"]["1"]) == set(SUBGROUP_METRICS)
    assert "subgroups of fewer than 10 patients say little: site x (2), site y (1)" in found.warnings
    assert strict(found)


def test_missing_predictions_are_counted_in_their_subgroup(judge) -> None:
    found = judge({**SIX, "f": (None, FULL)}, TABLE, allow_missing=True)
    x, y = found.summary["subgroups"]
    assert (x["n_cases"], x["labels"]["1"]["dice"]["n_missing_prediction"]) == (3, 0)
    assert (y["n_cases"], y["labels"]["1"]["dice"]["n_missing_prediction"]) == (2, 1)


def test_a_subgroup_of_failed_cases_only_is_none(judge) -> None:
    found = judge({"a": (FULL, FULL), "b": (None, FULL)}, "case,site\na,x\nb,y\n", allow_missing=True)
    # texts that differ from case to case may be names
    assert found.summary["subgroups"] == []
    sites = judge({"a": (FULL, FULL), "b": (None, FULL)}, "case,site\na,1\nb,2\n", allow_missing=True)
    assert [group["value"] for group in sites.summary["subgroups"]] == ["1"]


def test_patients_are_the_unit_of_the_intervals(judge) -> None:
    # every patient twice says what every patient once says
    twice = {f"{case}{n}": pair for case, pair in SIX.items() for n in (1, 2)}
    table = "case,patient\n" + "".join(f"{case},{case[0]}\n" for case in twice)
    scans, patients, once = (
        found.summary["labels"]["1"]["dice"] for found in (judge(twice), judge(twice, table), judge(SIX))
    )
    assert patients["ci95"] == pytest.approx(once["ci95"], abs=1e-12)
    assert scans["ci95"][0] > once["ci95"][0]
    assert [measure["mean"] for measure in (scans, patients)] == pytest.approx([once["mean"]] * 2)


def test_patients_are_counted_and_called_as_their_first_case(judge) -> None:
    patients = judge(SIX, TABLE)
    assert patients.summary["n_groups"] == 3
    assert patients.summary["groups"] == {"a": "a", "b": "a", "c": "c", "d": "d", "e": "d", "f": "d"}


def test_two_patients_have_no_interval(judge) -> None:
    table = "case,patient\n" + "".join(f"{case},{case in 'abc'}\n" for case in SIX)
    assert judge(SIX, table).summary["labels"]["1"]["dice"]["ci95"] is None


def test_groups_can_be_given_with_the_pairs(judge, tmp_path: Path) -> None:
    judge(SIX)
    pairs = [Pair(c, tmp_path / "pred" / f"{c}.nii.gz", tmp_path / "ref" / f"{c}.nii.gz") for c in "abcdef"]
    groups = {case: "Smith" if case in "ab" else case for case in "abcdef"}
    found = evaluate_pairs(pairs, EvaluateOptions(), groups=groups)
    assert (found.summary["n_groups"], found.summary["groups"]["b"], found.metadata) == (5, "a", None)
    # no name of a patient goes further
    assert "Smith" not in json.dumps(found.summary)


def test_a_patient_for_every_case_is_no_grouping(judge, tmp_path: Path) -> None:
    judge({"a": (HALF, FULL)})
    pair = Pair("a", tmp_path / "pred" / "a.nii.gz", tmp_path / "ref" / "a.nii.gz")
    assert evaluate_pairs([pair], EvaluateOptions(), groups={"a": "p"}).summary["groups"] is None


def test_a_column_of_patients_needs_a_table(judge) -> None:
    with pytest.raises(DataError, match="'patient' for patients given without metadata"):
        judge(SIX, group="patient")


def test_a_column_of_the_table_that_is_no_subgroup_goes_no_further(judge) -> None:
    table = "case,site,patient,note\n" + "".join(f"{c},x,Smith{c},Secret{c}\n" for c in SIX)
    found = judge(SIX, table)
    text = json.dumps(found.summary)
    assert "Smith" not in text
    assert "Secret" not in text


# ---- cautions


def said(evaluation: Evaluation, words: str) -> bool:
    return any(words in warning for warning in evaluation.summary["warnings"])


def test_few_cases_are_said_to_be_few(judge) -> None:
    assert said(judge(SIX), "fewer than 10 cases (6)")
    ten = {f"case{n}": (HALF, FULL) for n in range(10)}
    assert not said(judge(ten), "fewer than 10")
    table = "case,patient\n" + "".join(f"case{n},{n // 5}\n" for n in range(10))
    assert said(judge(ten, table), "10 cases are of 2 patients only")


def test_infinite_distances_are_explained(judge) -> None:
    found = judge({"a": (EMPTY, FULL), "b": (FULL, FULL), "c": (FULL, EMPTY)})
    assert said(found, "distances are infinite where a label was missed or spurious (1 in 2 cases)")
    assert not said(judge(SIX), "infinite")


def test_axes_that_are_not_at_right_angles_are_told(tmp_path: Path) -> None:
    tilt = np.deg2rad(20)
    sheared, rounded = np.eye(4), np.eye(4)
    sheared[:3, 2] = [0, 5 * np.sin(tilt), 5 * np.cos(tilt)]
    rounded[:3, 2] = [0, 1e-5, 5]
    for case, affine in (("tilted", sheared), ("upright", rounded)):
        for folder in ("pred", "ref"):
            (tmp_path / folder).mkdir(exist_ok=True)
            save(tmp_path / folder / f"{case}.nii.gz", HALF if folder == "pred" else FULL, affine)
    found = evaluate_folders(tmp_path / "pred", tmp_path / "ref")
    assert said(found, "voxel axes are not at right angles in 1 case (tilted): distances are measured as if they were")
    # four voxels of 1 × 1 × 5 mm, whose height is 5 mm · cos 20° in the first
    volumes = dict(zip(found.table["case"], found.table["reference_ml"]))
    assert volumes == pytest.approx({"tilted": 0.02 * np.cos(tilt), "upright": 0.02})
    alone = evaluate_folders(*(tmp_path / folder / "upright.nii.gz" for folder in ("pred", "ref")))
    assert not said(alone, "angles")


def test_labels_that_are_nowhere_are_named(judge) -> None:
    found = judge({"a": (HALF, FULL)}, labels={"liver": 1, "spleen": 2})
    assert said(found, "in no reference and no prediction of these cases: spleen")


# ---- lesions


def test_lesions_are_counted_over_cases(judge) -> None:
    # a: of two lesions one is found (IoU 1/2) and one missed; b: one is found whole, one invented
    a = (line(1, 0, 0, 0, 0, 0), line(1, 1, 0, 1, 1, 0))
    b = (line(1, 1, 0, 0, 1, 0), line(1, 1, 0, 0, 0, 0))
    found = judge({"a": a, "b": b, "empty": (EMPTY, EMPTY)}, lesions="default")
    assert list(found.lesions.columns) == list(LESION_COLUMNS)
    rows = found.lesions[["case", "n_reference", "n_prediction", "tp", "fp", "fn"]].to_numpy().tolist()
    assert rows == [["a", 2, 1, 1, 0, 1], ["b", 1, 2, 1, 1, 0], ["empty", 0, 0, 0, 0, 0]]
    whole = found.summary["lesions"]["labels"]["1"]
    assert {key: whole[key] for key in ("n_cases", "n_reference", "n_prediction", "tp", "fp", "fn")} == {
        "n_cases": 3,
        "n_reference": 3,
        "n_prediction": 3,
        "tp": 2,
        "fp": 1,
        "fn": 1,
    }
    assert [whole[key] for key in ("f1", "sensitivity", "precision", "rq")] == [pytest.approx(2 / 3)] * 4
    # the two pairs have an IoU of 1/2 and 1
    assert (whole["sq"], whole["pq"]) == (pytest.approx(3 / 4), pytest.approx(3 / 4 * 2 / 3))
    assert whole["per_case"]["sensitivity"]["mean"] == pytest.approx((1 / 2 + 1) / 2)
    assert found.summary["lesions"]["rule"]["name"] == "default"
    assert "lesions" in found.summary["definitions"]
    assert strict(found)


@pytest.mark.parametrize("rule", list(LESION_RULES))
def test_every_rule_gives_strict_json_and_a_definition(judge, rule: str) -> None:
    found = judge({"a": (HALF, FULL), "b": (EMPTY, FULL), "c": (None, FULL)}, lesions=rule, allow_missing=True)
    assert strict(found)
    assert found.summary["definitions"]["lesions"].startswith(f"Rule {rule}: ")
    # a case without a prediction has no lesions to judge
    assert found.lesions["case"].tolist() == ["a", "b"]


def test_a_label_that_one_case_lacks_has_no_lesions_there(judge) -> None:
    found = judge({"a": (FULL, FULL), "b": (FULL * 2, FULL * 2)}, lesions="default")
    counts = {(r["case"], r["name"]): r["n_reference"] for r in found.lesions.to_dict("records")}
    assert counts == {("a", "1"): 1, ("a", "2"): 0, ("b", "1"): 0, ("b", "2"): 1}


def test_lesions_have_a_file_of_their_own(judge, tmp_path: Path) -> None:
    judge({"a": (HALF, FULL)})
    options = EvaluateOptions(lesions="default")
    folder = evaluate(tmp_path / "pred", tmp_path / "ref", options).save(tmp_path / "report")
    rows = (folder / "lesions.csv").read_text().splitlines()
    assert rows[0] == ",".join(LESION_COLUMNS)
    assert rows[1].startswith("a,1,1,1,1,1,0,0,")


# ---- calibration


@pytest.fixture
def probabilities(tmp_path: Path):
    """Writes nnU-Net's file of a case: label 1 with the probabilities given, background with the rest."""

    def write(case: str, of_label: list[float]) -> Path:
        folder = tmp_path / "probabilities"
        folder.mkdir(exist_ok=True)
        chances = np.array(of_label, np.float32).reshape(1, 1, -1)
        # nnU-Net keeps the axes the other way round
        np.savez_compressed(
            folder / f"{case}.npz", probabilities=np.stack([1 - chances, chances]).transpose(0, 3, 2, 1)
        )
        return folder

    return write


def test_probabilities_of_all_cases_are_looked_at_together(judge, probabilities) -> None:
    probabilities("a", [0.1, 0.9, 0.9, 0.9, 0.9, 0.1])
    folder = probabilities("b", [0.1, 0.9, 0.9, 0.9, 0.9, 0.1])
    cases = {"a": (FULL, FULL), "b": (FULL, HALF), "c": (FULL, FULL)}
    found = judge(cases, probabilities=folder)
    calibration = found.summary["calibration"]
    # label 1: 0.9 in eight voxels, six of them right; 0.1 in four, none right
    label = calibration["labels"]["1"]
    assert calibration["n_cases"] == 2
    assert label["ece"] == pytest.approx((8 * abs(6 / 8 - 0.9) + 4 * 0.1) / 12, abs=1e-6)
    # the strongest label has 0.9 everywhere; ten of twelve are right
    assert calibration["ece"] == pytest.approx(abs(10 / 12 - 0.9), abs=1e-6)
    filled = [b for b in label["bins"] if b["n"]]
    assert [(b["n"], pytest.approx(b["confidence"]), b["correct"]) for b in filled] == [(4, 0.1, 0), (8, 0.9, 0.75)]
    assert "1 cases have no probabilities: c" in found.warnings
    assert "calibration" in found.summary["definitions"]
    assert strict(found)


def test_probabilities_that_do_not_fit_cost_no_case(judge, probabilities) -> None:
    probabilities("a", [0.5] * 6)
    folder = probabilities("b", [0.5] * 5)
    found = judge({"a": (FULL, FULL), "b": (FULL, FULL)}, probabilities=folder)
    assert (len(found.table), found.failures, found.summary["calibration"]["n_cases"]) == (2, (), 1)
    assert any(w.startswith("probabilities of b were left out: ") for w in found.warnings)


def test_a_folder_without_probabilities_is_refused(judge, probabilities) -> None:
    folder = probabilities("other", [0.5] * 6)
    with pytest.raises(DataError, match="no probabilities of any case found"):
        judge({"a": (FULL, FULL)}, probabilities=folder)


def test_a_region_of_one_value_is_the_label_of_that_value() -> None:
    chances = np.array([[1.0, 1.0], [0.0, 1.0]])
    found = reliability(chances, np.array([1, 2]), [(2, 1), (2,)], regions=True)
    summary = summarise_calibration(found, {"core": 2, "whole": (1, 2), "other": 3})
    assert summary is not None
    assert {name: label["ece"] for name, label in summary["labels"].items()} == {"core": 0, "whole": 0}


def test_probabilities_of_other_labels_are_left_out(judge, probabilities) -> None:
    probabilities("a", [0.5] * 6)
    folder = probabilities("b", [0.5] * 6)
    # a third channel
    np.savez_compressed(folder / "b.npz", probabilities=np.full((3, 6, 1, 1), 1 / 3, np.float32))
    found = judge({"a": (FULL, FULL), "b": (FULL, FULL)}, probabilities=folder)
    assert found.summary["calibration"]["n_cases"] == 1
    assert "probabilities of b were left out: other labels than those of the cases before" in found.warnings
