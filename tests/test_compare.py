"""Comparing reports: pairing, refusals, the table by hand, rankings, sentences, and what is written."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medseg
from medseg import ConfigError, DataError
from medseg.compare.results import sentence

COLUMNS = (
    *("case", "label", "name", "status", "tp", "fp", "fn", "dice", "iou", "precision", "recall"),
    *("hd_mm", "hd95_mm", "assd_mm", "nsd", "reference_ml", "prediction_ml", "volume_difference_ml"),
)
DEFINITIONS = {"surface": "surfel: of marching cubes", "nsd": "Share within 1 mm of the other one.", "dice": "2TP / …"}
OPTIONS = {"surface": "surfel", "nsd_tolerance_mm": 1.0, "ignore_value": None}
INF, NAN = math.inf, math.nan

MakeReport = Callable[..., Path]


def row(
    case: str, dice: float, *, label: int = 1, name: str = "liver", status: str = "ok", hd: float = 2.0, n: int = 100
):
    """A row of metrics.csv whose reference has `n` voxels of 1 mm³."""
    tp = round(n * dice) if status in ("ok", "missed") else 0
    empty = status in ("both_empty", "spurious")
    if status == "missing_prediction":
        counts: tuple[object, ...] = ("", "", "")
        dice = hd = NAN
    elif status == "both_empty":
        counts, dice, hd = (0, 0, 0), NAN, NAN
    elif status in ("missed", "spurious"):
        counts, dice, hd = ((0, 0, n) if status == "missed" else (0, 50, 0)), 0.0, INF
    else:
        counts = (tp, n - tp, n - tp)
    reference = 0.0 if empty else n / 1000
    predicted = reference if status == "ok" else 0.0
    values = (dice, dice / (2 - dice), dice, dice, hd, hd, hd / 2, dice, reference, predicted, predicted - reference)
    cells = ["" if isinstance(v, float) and math.isnan(v) else v for v in values]
    return dict(zip(COLUMNS, (case, label, name, status, *counts, *cells)))


@pytest.fixture
def report(tmp_path: Path) -> MakeReport:
    """Writes a report folder from rows of metrics.csv."""

    def write(name: str, rows: list[Mapping[str, object]], **summary: object) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        told = {"definitions": DEFINITIONS, "options": OPTIONS, "failures": []}
        content = {"schema_version": 2, **told, **summary}
        (folder / "summary.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def nnunet(tmp_path: Path) -> MakeReport:
    """Writes nnU-Net's summary.json from {case: {label: (TP, FP, FN)}}."""

    def write(name: str, cases: Mapping[str, Mapping[str, tuple[int, int, int]]]) -> Path:
        def measures(tp: int, fp: int, fn: int) -> dict[str, float]:
            whole = 2 * tp + fp + fn
            dice, iou = (2 * tp / whole, tp / (tp + fp + fn)) if whole else (NAN, NAN)
            counts = {"TP": tp, "FP": fp, "FN": fn, "TN": 9, "n_pred": tp + fp, "n_ref": tp + fn}
            return {"Dice": dice, "IoU": iou, **counts}

        per_case = [
            {
                "metrics": {label: measures(*counts) for label, counts in labels.items()},
                "prediction_file": f"/predicted/{case}.nii.gz",
                "reference_file": f"/labelsTr/{case}.nii.gz",
            }
            for case, labels in cases.items()
        ]
        file = tmp_path / name / "summary.json"
        file.parent.mkdir()
        file.write_text(json.dumps({"metric_per_case": per_case, "mean": {}, "foreground_mean": {}}))
        return file.parent

    return write


def cases(dice: list[float], **options: object) -> list[Mapping[str, object]]:
    return [row(f"c{n}", value, **options) for n, value in enumerate(dice)]


def line(table: pd.DataFrame, **wanted: object) -> pd.Series:
    """The only row of `table` that has all these values."""
    for column, value in wanted.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


# ---- the table


def test_differences_by_hand(report):
    a = report("a", cases([0.9, 0.8, 0.7, 0.6, 0.5]))
    b = report("b", cases([0.8, 0.6, 0.6, 0.7, 0.4]))
    found = line(medseg.compare([a, b]).table, name="liver", metric="dice")
    assert (found["a"], found["b"], found["n"], found["n_better"], found["n_worse"]) == ("a", "b", 5, 4, 1)
    assert found["mean_a"] == pytest.approx(0.7)
    assert found["mean_difference"] == pytest.approx((0.1 + 0.2 + 0.1 - 0.1 + 0.1) / 5)
    # gains of 2.5 + 5 + 2.5 + 2.5 ranks against 2.5: rank sums up to 2.5 have chances 1/32 and 4/32
    assert found["p_wilcoxon"] == pytest.approx(2 * 5 / 32)
    assert found["rank_biserial"] == pytest.approx((12.5 - 2.5) / 15)


def test_every_label_measure_and_pair_has_a_row(report):
    folders = [report(m, [*cases([0.5, 0.6]), *cases([0.7, 0.8], label=2, name="spleen")]) for m in "abc"]
    comparison = medseg.compare(folders)
    table = comparison.table
    # overlaps, distances and the volume error; two labels and all of them; three pairs
    assert len(table) == len(comparison.summary["metrics"]) * 3 * 3
    assert set(table["name"]) == {"all labels", "liver", "spleen"}
    assert {"dice", "nsd", "hd95_mm", "assd_mm", "volume_error_ml"} <= set(table["metric"])


def test_holm_adjusts_over_labels_and_pairs_of_one_measure(report):
    a = report("a", [*cases([0.9] * 6), *cases([0.9, 0.8, 0.9, 0.9, 0.9, 0.9], label=2, name="spleen")])
    b = report("b", [*cases([0.8] * 6), *cases([0.8, 0.9, 0.8, 0.8, 0.8, 0.8], label=2, name="spleen")])
    table = medseg.compare([a, b]).table
    liver, spleen = (line(table, name=name, metric="dice") for name in ("liver", "spleen"))
    # six gains: 2 of 64 signs; five of six: 2 · 7 of 64
    assert (liver["p_permutation"], spleen["p_permutation"]) == (2 / 64, 14 / 64)
    assert (liver["p_holm"], spleen["p_holm"]) == (4 / 64, 14 / 64)
    whole = line(table, name="all labels", metric="dice")
    assert whole["p_holm"] == whole["p_permutation"]


def test_the_row_of_all_labels_compares_means_over_labels(report):
    a = report("a", [*cases([0.9, 0.7, 0.5]), *cases([0.7, 0.7, 0.7], label=2, name="spleen")])
    b = report("b", [*cases([0.8, 0.6, 0.5]), *cases([0.6, 0.7, 0.8], label=2, name="spleen")])
    found = line(medseg.compare([a, b]).table, name="all labels", metric="dice")
    assert found["mean_difference"] == pytest.approx((0.1 + 0.05 - 0.05) / 3)


def test_a_missed_label_is_counted_and_ranked_last(report):
    a = report("a", [row("c0", 0.9, hd=1.0), row("c1", 0.9, hd=1.0), row("c2", 0, status="missed")])
    b = report("b", [row("c0", 0.9, hd=2.0), row("c1", 0.9, hd=3.0), row("c2", 0.5, hd=9.0)])
    found = line(medseg.compare([a, b]).table, name="liver", metric="hd95_mm")
    assert (found["n_missed_a"], found["n_missed_b"], found["n_cases"], found["n_finite"]) == (1, 0, 3, 2)
    assert found["mean_difference"] == pytest.approx(-1.5)
    # ranks 1 and 2 for a, 3 for b
    assert found["rank_biserial"] == 0


def test_cases_without_a_value_on_one_side_are_counted(report):
    a = report("a", [row("c0", 0.9), row("c1", 0, status="spurious"), row("c2", 0, status="both_empty")])
    b = report("b", [row("c0", 0.8), row("c1", 0, status="both_empty"), row("c2", 0, status="both_empty")])
    found = line(medseg.compare([a, b]).table, name="liver", metric="dice")
    assert (found["n_cases"], found["n_one_undefined"], found["n_undefined"]) == (1, 1, 1)
    assert (found["n_spurious_a"], found["n_spurious_b"], found["n_both_empty_b"]) == (1, 0, 2)


def test_a_missing_prediction_is_left_out_counted_and_ranked_last(report):
    a = report("a", [row("c0", 0.5), row("c1", 0, status="missing_prediction")])
    b = report("b", [row("c0", 0.5), row("c1", 0.1)])
    comparison = medseg.compare([a, b])
    found = line(comparison.table, name="liver", metric="dice")
    assert (found["n_cases"], found["n_missing_prediction_a"]) == (1, 1)
    assert line(comparison.ranking, name="liver", metric="dice", method="a")["mean_rank"] == (1.5 + 2) / 2


def test_finding_nothing_rightly_ranks_before_no_prediction(report):
    absent = row("c0", 0, status="missing_prediction", n=0)
    a = report("a", [absent, row("c1", 0.5), row("c2", 0, status="both_empty")])
    b = report("b", [row("c0", 0, status="both_empty"), row("c1", 0.5), row("c2", 0, status="both_empty")])
    ranking = medseg.compare([a, b]).ranking
    for metric in ("dice", "hd95_mm"):
        first = line(ranking, name="liver", metric=metric, method="b")
        # where both rightly found nothing there is nothing to rank
        assert (first["mean_rank"], first["n"]) == ((1 + 1.5) / 2, 2)


def test_patients_are_the_unit_where_reports_name_them(report):
    groups = {f"c{n}": f"p{n % 4}" for n in range(12)}
    a = report("a", cases(list(np.linspace(0.6, 0.9, 12))), groups=groups)
    b = report("b", cases(list(np.linspace(0.5, 0.8, 12))), groups=groups)
    comparison = medseg.compare([a, b])
    found = line(comparison.table, name="liver", metric="dice")
    assert (found["n"], found["n_cases"], found["p_permutation"]) == (4, 12, 2 / 16)
    assert comparison.summary["n_groups"] == 4


def test_patients_are_the_same_whatever_they_are_called(report):
    a = report("a", cases([0.5, 0.6, 0.7]), groups={"c0": "p", "c1": "p", "c2": "q"})
    b = report("b", cases([0.5, 0.6, 0.7]), groups={"c0": "x", "c1": "x", "c2": "y"})
    assert medseg.compare([a, b]).summary["n_groups"] == 2


def test_other_patients_are_refused(report):
    a = report("a", cases([0.5, 0.6]), groups={"c0": "p", "c1": "p"})
    b = report("b", cases([0.5, 0.6]), groups={"c0": "p", "c1": "q"})
    with pytest.raises(DataError, match=r"other patients than in .* for 1 case: c1"):
        medseg.compare([a, b])


# ---- rankings


def test_finding_nothing_rightly_ranks_before_a_spurious_find(report):
    a = report("a", [row("c0", 0, status="spurious"), row("c1", 0.5)])
    b = report("b", [row("c0", 0, status="both_empty"), row("c1", 0.5)])
    ranking = medseg.compare([a, b]).ranking
    for metric in ("dice", "hd95_mm"):
        assert line(ranking, name="liver", metric=metric, method="b")["mean_rank"] == (1 + 1.5) / 2


def test_ranks_over_all_labels_are_those_of_each_case_and_label(report):
    a = report("a", [*cases([0.9, 0.9, 0.9]), *cases([0.5, 0.5, 0.9], label=2, name="spleen")])
    b = report("b", [*cases([0.8, 0.8, 0.8]), *cases([0.6, 0.6, 0.8], label=2, name="spleen")])
    found = line(medseg.compare([a, b]).ranking, name="all labels", metric="dice", method="a")
    assert (found["mean_rank"], found["n"], found["place"]) == (pytest.approx((4 * 1 + 2 * 2) / 6), 6, 1)


# ---- which cases and labels


def test_only_common_cases_are_compared_and_the_others_named(report):
    a, b = report("a", cases([0.5, 0.6, 0.7])), report("b", cases([0.5, 0.6]))
    comparison = medseg.compare([a, b])
    assert comparison.summary["n_cases"] == 2
    assert comparison.summary["left_out"] == {"a": ["c2"], "b": []}
    assert "a: 1 case not in all reports, left out: c2" in comparison.warnings


def test_no_common_case_is_refused(report):
    a, b = report("a", [row("c0", 0.5)]), report("b", [row("d0", 0.5)])
    with pytest.raises(DataError, match=r"no case is in all 2 reports .*a: c0; b: d0"):
        medseg.compare([a, b])


def test_failed_cases_are_named(report):
    a = report("a", cases([0.5, 0.6]), failures=[{"case": "c9", "reason": "broken"}])
    comparison = medseg.compare([a, report("b", cases([0.5, 0.6]))])
    assert "a: 1 case could not be evaluated, left out: c9" in comparison.warnings


def test_labels_are_paired_by_name_whatever_their_value(report):
    a, b = report("a", cases([0.5, 0.6])), report("b", cases([0.5, 0.6], label=7))
    assert [label["name"] for label in medseg.compare([a, b]).summary["labels"]] == ["liver"]


def test_labels_are_paired_by_value_where_one_report_has_no_names(report):
    a, b = report("a", cases([0.5, 0.6], name="1")), report("b", cases([0.5, 0.6]))
    comparison = medseg.compare([a, b])
    assert [label["name"] for label in comparison.summary["labels"]] == ["liver"]
    assert "labels were paired by value, for these reports have no names of labels: a" in comparison.warnings


def test_no_common_label_is_refused(report):
    a, b = report("a", cases([0.5])), report("b", cases([0.5], name="spleen"))
    with pytest.raises(DataError, match=r"no label is in all 2 reports .*a: liver; b: spleen.*--labels"):
        medseg.compare([a, b])


def test_a_case_called_na_and_one_called_007_keep_their_names(report):
    folders = [report(name, [row("NA", 0.5), row("007", 0.6)]) for name in "ab"]
    assert medseg.compare(folders).summary["cases"] == ["007", "NA"]


# ---- what cannot be compared


def test_other_references_are_refused_and_the_cases_named(report):
    a = report("a", [row("c0", 0.5), row("c1", 0.5), row("c2", 0.5)])
    b = report("b", [row("c0", 0.5), row("c1", 0.5, n=120), row("c2", 0.5)])
    with pytest.raises(DataError, match=r"c1, label liver, 120 voxels .*expected 100 voxels .*1 case differ"):
        medseg.compare([a, b])


def test_other_references_of_missing_predictions_are_refused(report):
    a = report("a", [row("c0", 0.5), row("c1", 0, status="missing_prediction")])
    b = report("b", [row("c0", 0.5), row("c1", 0.5, n=120)])
    with pytest.raises(DataError, match="references are not those"):
        medseg.compare([a, b])


EARLIER = {"volumes": "from the voxel spacing"}
PRESENT = {"volumes": "from the volume of a voxel"}


def skewed(rows, *, share=0.95):
    """The same rows where the axes of the image are no right angles: a voxel is smaller than its spacing tells."""
    return [{**r, **{c: r[c] * share for c in ("reference_ml", "prediction_ml", "volume_difference_ml")}} for r in rows]


@pytest.mark.parametrize("status", ["ok", "missing_prediction"])
def test_the_same_references_in_another_definition_of_volume_are_compared(report, status):
    rows = [row("c0", 0.5), row("c1", 0.5, status=status)]
    a = report("a", rows, definitions={**DEFINITIONS, **EARLIER})
    b = report("b", skewed([row("c0", 0.5), row("c1", 0.5)]), definitions={**DEFINITIONS, **PRESENT})
    told = medseg.compare([a, b]).warnings
    assert any(
        text.startswith("a and b measure other volumes of the same reference in 2 cases: c0, c1; ") for text in told
    )


def test_other_words_for_equal_volumes_are_no_warning(report):
    a, b = (report(n, cases([0.5]), definitions={**DEFINITIONS, **w}) for n, w in (("a", EARLIER), ("b", PRESENT)))
    assert medseg.compare([a, b]).warnings == ()


def test_other_voxels_are_other_references_whatever_their_volume(report):
    a = report("a", [row("c0", 0.5)], definitions={**DEFINITIONS, **EARLIER})
    b = report("b", skewed([row("c0", 0.5, n=120)], share=100 / 120), definitions={**DEFINITIONS, **PRESENT})
    with pytest.raises(DataError, match=r"120 voxels .*expected 100 voxels "):
        medseg.compare([a, b])


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("surface", "voxel", "surface is voxel, expected surfel as in "),
        ("nsd_tolerance_mm", 2, r"NSD tolerance \(mm\) of liver is 2.0, expected 1.0"),
        ("nsd_tolerance_mm", {"liver": 2, "spleen": 1}, r"NSD tolerance \(mm\) of liver is 2.0, expected 1.0"),
        ("ignore_value", 255, "ignored value is 255, expected not set"),
    ],
)
def test_other_settings_are_refused(report, setting, value, message):
    a = report("a", cases([0.5]))
    b = report("b", cases([0.5]), options={**OPTIONS, setting: value})
    with pytest.raises(DataError, match=message):
        medseg.compare([a, b])


def test_a_tolerance_of_a_label_that_is_not_compared_does_not_matter(report):
    a = report("a", cases([0.5]))
    more = [*cases([0.5]), row("c0", 0.5, label=2, name="spleen")]
    b = report("b", more, options={**OPTIONS, "nsd_tolerance_mm": {"liver": 1, "spleen": 3}})
    assert medseg.compare([a, b]).warnings == ("b: 1 label not in all reports, left out: spleen",)


@pytest.mark.parametrize("options", [[], {"surface": "surfel"}, {**OPTIONS, "nsd_tolerance_mm": "wide"}])
def test_settings_that_are_damaged_are_refused(report, options):
    a, b = report("a", cases([0.5])), report("b", cases([0.5]), options=options)
    with pytest.raises(DataError, match=r"summary\.json: options are not as medseg writes them"):
        medseg.compare([a, b])


def test_a_report_that_does_not_tell_its_settings_is_named(report, nnunet):
    a = report("a", cases([0.5]))
    first = report("first", cases([0.5]), schema_version=1, options=None)
    told = medseg.compare([a, first, nnunet("nn", {"c0": {"1": (50, 50, 50)}})]).warnings
    assert any(
        text.startswith("surface, NSD tolerance and ignored value are not told by first, nn; make") for text in told
    )
    assert "other versions of medseg made these reports (schema version 1: first; version 2: a)" in told


def test_cases_without_a_prediction_are_named(report):
    a = report("a", [row("c0", 0.5), row("c1", 0.5)])
    b = report("b", [row("c0", 0.5), row("c1", 0, status="missing_prediction")])
    assert medseg.compare([a, b]).warnings == (
        "b: 1 case without a prediction: c1; differences leave them out, ranks count them as worst",
    )


def test_what_several_methods_are_told_is_said_once(report):
    two = [*cases([0.5]), row("c0", 0.5, label=2, name="spleen")]
    found = medseg.compare([report("a", two), report("b", two), report("c", cases([0.5]))])
    assert found.warnings == ("a, b: 1 label not in all reports, left out: spleen",)


def test_a_comparison_is_no_report(report, tmp_path):
    a, b = report("a", cases([0.5])), report("b", cases([0.5]))
    folder = medseg.compare([a, b]).save(tmp_path / "comparison")
    with pytest.raises(DataError, match="a comparison found, expected a report"):
        medseg.compare([a, folder])


def test_a_comparison_does_not_replace_a_report(report, tmp_path):
    a, b = report("a", cases([0.5])), report("b", cases([0.5]))
    before = (a / "summary.json").read_bytes()
    with pytest.raises(
        DataError, match=r"summary\.json: that of a report found, expected a folder for the comparison alone"
    ):
        medseg.compare([a, b]).save(tmp_path / "b" / ".." / "a")
    assert (a / "summary.json").read_bytes() == before


def test_a_terminal_is_shown_the_whole_where_labels_are_many(report):
    many = [row("c0", 0.5, label=n, name=f"organ {n}") for n in range(1, 62)]
    found = medseg.compare([report("a", many), report("b", many)])
    shown = [line.split("  ")[0] for line in found.text_table().splitlines()]
    assert shown == ["label", "all labels", "61 rows by label: comparison.csv"]
    assert len(found.text_rows()) == 1 + 1 + 61


def test_the_background_of_nnunet_is_no_label(nnunet):
    both = {"c0": {"0": (900, 9, 9), "1": (50, 50, 50)}}
    assert [label.name for label in medseg.compare([nnunet("a", both), nnunet("b", both)]).aligned.labels] == ["1"]


def test_accents_of_nnunet_may_be_spelled_in_two_ways(report, nnunet):
    found = medseg.compare([report("a", [row("Zo\u00eb", 0.5)]), nnunet("b", {"Zoe\u0308": {"1": (50, 50, 50)}})])
    assert list(found.aligned.cases) == ["Zo\u00eb"]


def test_other_words_for_a_measure_are_told(report):
    a, b = report("a", cases([0.5])), report("b", cases([0.5]), definitions={**DEFINITIONS, "dice": "new words"})
    assert "a and b define in other words: dice" in medseg.compare([a, b]).warnings


def test_one_report_is_a_wrong_call(report):
    a = report("a", cases([0.5]))
    for given in ([a], a, str(a)):
        with pytest.raises(ConfigError, match="1 report given, expected two or more"):
            medseg.compare(given)


def test_a_folder_without_a_report_is_named(report, tmp_path):
    with pytest.raises(DataError, match="nowhere: no report found, expected a folder that `medseg evaluate` wrote"):
        medseg.compare([report("a", cases([0.5])), tmp_path / "nowhere"])


def test_a_summary_of_something_else_is_refused(report, tmp_path):
    (tmp_path / "summary.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="no schema_version found"):
        medseg.compare([report("a", cases([0.5])), tmp_path])


def test_a_summary_that_is_no_json_is_refused(report, tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json: cannot be read as JSON"):
        medseg.compare([report("a", cases([0.5])), tmp_path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("dice", "dise"), "no column dice found"),
        (lambda text: text.replace("iou", "dice"), "column dice found twice"),
        (lambda text: text.splitlines()[0], "no rows found"),
        (lambda text: text.replace("ok", "fine"), "status 'fine' found, expected one of ok"),
        (lambda text: text.replace("0.5", "half"), "'half' found in column"),
        (lambda text: text.rsplit(",", 3)[0], "row 3 has 15 cells, expected 18"),
        (lambda text: text + text.splitlines()[1] + "\n", "case c0 with label liver found twice"),
    ],
)
def test_a_damaged_table_is_refused_by_name(report, change, message):
    a, b = (report(name, cases([0.5, 0.5])) for name in "ab")
    text = (b / "metrics.csv").read_text()
    (b / "metrics.csv").write_text(change(text))
    with pytest.raises(DataError, match=message) as raised:
        medseg.compare([a, b])
    assert str(b / "metrics.csv") in str(raised.value)


def test_a_table_that_is_no_text_is_refused(report):
    a, b = (report(name, cases([0.5])) for name in "ab")
    (b / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        medseg.compare([a, b])


def test_a_hole_in_a_table_is_refused(report):
    rows = [*cases([0.5, 0.5]), *cases([0.5, 0.5], label=2, name="spleen")]
    a, b = report("a", rows), report("b", rows[:-1])
    with pytest.raises(DataError, match="case c1 has no row for label spleen"):
        medseg.compare([a, b])


# ---- names of methods


def test_methods_are_called_as_their_folders(report):
    comparison = medseg.compare([report("runs/one", cases([0.5])), report("runs/two", cases([0.5]))])
    assert [method["name"] for method in comparison.summary["methods"]] == ["one", "two"]


def test_folders_of_one_name_are_told_apart_by_what_lies_above(report):
    folders = [report(f"runs/{name}/validation/report", cases([0.5])) for name in ("x", "y")]
    assert [method["name"] for method in medseg.compare(folders).summary["methods"]] == ["x", "y"]


def test_a_name_can_be_given(report):
    a, b = report("a", cases([0.5])), report("b", cases([0.5]))
    assert [m["name"] for m in medseg.compare([f"our method={a}", b]).summary["methods"]] == ["our method", "b"]
    assert [m["name"] for m in medseg.compare({"x": a, "y": b}).summary["methods"]] == ["x", "y"]


def test_a_folder_with_an_equals_sign_is_a_folder(report):
    comparison = medseg.compare([str(report("lr=0.1", cases([0.5]))), report("b", cases([0.5]))])
    assert comparison.summary["methods"][0]["name"] == "lr=0.1"


def test_one_name_for_two_methods_is_refused(report):
    a, b = report("a", cases([0.5])), report("b", cases([0.5]))
    with pytest.raises(ConfigError, match="2 reports are called 'x'"):
        medseg.compare([f"x={a}", f"x={b}"])


def test_an_empty_name_is_refused(report):
    with pytest.raises(ConfigError, match="expected NAME=FOLDER"):
        medseg.compare([f"={report('a', cases([0.5]))}", "b"])


def test_a_report_against_itself_shows_nothing_and_is_told(report):
    a = report("a", cases([0.5, 0.6, 0.7]))
    comparison = medseg.compare([a, a])
    assert comparison.table["p_holm"].eq(1).all()
    assert comparison.table["rank_biserial"].eq(0).all()
    assert any("one and the same report" in warning for warning in comparison.warnings)


# ---- nnU-Net


def test_a_summary_of_nnunet_is_a_method(report, nnunet):
    a = report("a", [row("c0", 0.5), row("c1", 0.8)])
    b = nnunet("b", {"c0": {"1": (60, 40, 40)}, "c1": {"1": (0, 0, 100)}})
    comparison = medseg.compare([a, b])
    found = line(comparison.table, name="liver", metric="dice")
    assert found["mean_difference"] == pytest.approx((-0.1 + 0.8) / 2)
    assert (found["n_missed_a"], found["n_missed_b"]) == (0, 1)
    assert set(comparison.summary["metrics"]) == {"dice", "iou", "precision", "recall"}
    assert any(warning.startswith("not measured by b, so not compared: nsd") for warning in comparison.warnings)


def test_the_file_itself_is_a_report_too(nnunet):
    a, b = (nnunet(name, {"c0": {"1": (5, 1, 1)}}) for name in "ab")
    assert [m["name"] for m in medseg.compare([a / "summary.json", b]).summary["methods"]] == ["a", "b"]


def test_regions_of_nnunet_are_paired_by_their_values(report, nnunet):
    a = report("a", [row("c0", 0.5, label="1+2", name="whole")])
    b = nnunet("b", {"c0": {"(1, 2)": (50, 50, 50)}})
    assert medseg.compare([a, b]).summary["labels"] == [{"name": "whole", "value": "1+2"}]


def test_what_nnunet_leaves_undefined_is_empty_or_spurious(nnunet):
    a = nnunet("a", {"c0": {"1": (0, 0, 0)}, "c1": {"1": (0, 7, 0)}, "c2": {"1": (5, 1, 1)}})
    b = nnunet("b", {"c0": {"1": (0, 0, 0)}, "c1": {"1": (0, 0, 0)}, "c2": {"1": (6, 1, 0)}})
    found = line(medseg.compare([a, b]).table, name="1", metric="dice")
    assert (found["n_both_empty_a"], found["n_spurious_a"], found["n_both_empty_b"], found["n_cases"]) == (1, 1, 2, 1)


def test_other_references_of_nnunet_are_refused(report, nnunet):
    with pytest.raises(DataError, match="101 voxels found, expected 100 voxels"):
        medseg.compare([report("a", [row("c0", 0.5)]), nnunet("b", {"c0": {"1": (60, 40, 41)}})])


def test_a_damaged_summary_of_nnunet_is_refused(report, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"metric_per_case": [{"metrics": {"1": {"Dice": 1}}}]}))
    with pytest.raises(DataError, match="metric_per_case is not as nnU-Net writes it"):
        medseg.compare([report("a", cases([0.5])), tmp_path])


# ---- sentences


def test_a_shown_difference_is_one_sentence(report):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.6, 0.8, 20)
    a, b = report("a", cases(list(base + 0.05))), report("b", cases(list(base + rng.normal(0, 0.001, 20))))
    (finding,) = medseg.compare([a, b]).findings
    assert finding.startswith("a is better than b by 0.050 Dice [0.0")
    assert finding.endswith("over 20 cases, p < 0.001.")


def test_the_better_method_is_named_first(report):
    base = np.linspace(0.5, 0.8, 20)
    comparison = medseg.compare([report("a", cases(list(base))), report("b", cases(list(base + 0.05)))])
    assert comparison.findings[0].startswith("b is better than a by 0.050 Dice")


def test_where_nothing_is_shown_the_cases_needed_are_told(report):
    # differences ±0.1 and one of 0.1 more: mean 0.02, SD √0.012
    a, b = report("a", cases([0.6, 0.5, 0.6, 0.5, 0.6])), report("b", cases([0.5, 0.6, 0.5, 0.6, 0.5]))
    needed = math.ceil(((1.959964 + 0.841621) * math.sqrt(0.012) / 0.02) ** 2)
    found = medseg.compare([a, b])
    assert set(found.table["needed_of"]) == {"cases"}
    (finding,) = found.findings
    assert finding.startswith("No difference in Dice was shown between a and b over 5 cases: a − b = 0.020 [")
    assert finding.endswith(f"about {needed} cases would be needed to show such a difference.")


def test_where_patients_are_known_the_patients_needed_are_told(report):
    # five patients with two cases each: the differences of the test above, each twice
    groups = {f"c{n}": f"p{n % 5}" for n in range(10)}
    a = report("a", cases([0.6, 0.5, 0.6, 0.5, 0.6] * 2), groups=groups)
    b = report("b", cases([0.5, 0.6, 0.5, 0.6, 0.5] * 2), groups=groups)
    needed = math.ceil(((1.959964 + 0.841621) * math.sqrt(0.012) / 0.02) ** 2)
    found = medseg.compare([a, b])
    assert set(found.table["needed_of"]) == {"patients"}
    (finding,) = found.findings
    assert "over 10 cases of 5 patients" in finding
    assert finding.endswith(f"about {needed} patients would be needed to show such a difference.")


def test_a_mean_of_finite_differences_says_of_how_many(report):
    a = report("a", [*(row(f"c{n}", 0.9, hd=1.0 + n / 10) for n in range(5)), row("c5", 0, status="missed")])
    b = report("b", [row(f"c{n}", 0.9, hd=1.2 + n / 9) for n in range(6)])
    found = line(medseg.compare([a, b]).table, name="liver", metric="hd95_mm")
    assert (found["n_cases"], found["n_finite"]) == (6, 5)
    assert "], finite only (5)" in sentence(found)


def test_the_best_method_is_held_against_each_other_one(report):
    base = np.linspace(0.5, 0.8, 12)
    folders = [report(name, cases(list(base + gain))) for name, gain in (("a", 0.0), ("b", 0.1), ("c", 0.05))]
    findings = medseg.compare(folders).findings
    assert [finding.split(" by ")[0] for finding in findings] == ["b is better than a", "b is better than c"]


# ---- what is written


def test_the_folder_holds_strict_json_tables_and_a_page(report, tmp_path):
    a = report("a", [row("c0", 0.9), row("c1", 0, status="missed"), row("c2", 0.4)])
    b = report("b", [row("c0", 0.8), row("c1", 0.5), row("c2", 0, status="missed")])
    folder = medseg.compare([a, b]).save(tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {
        *("comparison.csv", "ranking.csv", "summary.json", "compare.html")
    }

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert summary["schema_version"] == 1
    assert {"methods", "comparisons", "ranking", "findings", "definitions", "versions", "warnings"} <= set(summary)
    assert [m["labels"]["liver"]["dice"]["n_missed"] for m in summary["methods"]] == [1, 1]
    table = pd.read_csv(folder / "comparison.csv")
    assert {"p_wilcoxon", "p_permutation", "p_holm", "ci95_low", "ci95_high", "rank_biserial"} <= set(table.columns)
    assert len(table) == len(summary["comparisons"])


@pytest.mark.parametrize(
    ("theirs", "found"),
    [
        ('{"metric_per_case": []}', "written by another program"),
        ('{"schema_version": 2, "labels": {}}', "that of a report found"),
        ("[]", "written by another program"),
        ("no JSON", "no whole JSON found"),
        ('{"schema_version": 1, "compari', "no whole JSON found"),
    ],
    ids=["nnU-Net", "report", "list", "text", "cut off"],
)
def test_a_summary_that_no_comparison_wrote_is_not_replaced(report, tmp_path, theirs, found):
    comparison = medseg.compare([report(name, cases([0.5, 0.6])) for name in "ab"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text(theirs)
    with pytest.raises(DataError, match=rf"summary\.json: {found}, expected a folder for the comparison alone"):
        comparison.save(tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"summary.json": theirs}


def test_a_summary_that_cannot_be_read_is_not_called_that_of_another_program(report, tmp_path):
    comparison = medseg.compare([report(name, cases([0.5, 0.6])) for name in "ab"])
    # a folder in its place: the superuser cannot read it either
    (tmp_path / "out" / "summary.json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"summary\.json: cannot be read \(Is a directory\), .* give another folder"):
        comparison.save(tmp_path / "out")
    with pytest.raises(DataError, match=r"summary\.json: cannot be read \(File name too long\)"):
        comparison.save(tmp_path / ("a" * 300))


def test_an_earlier_comparison_is_replaced(report, tmp_path):
    comparison = medseg.compare([report(name, cases([0.5, 0.6])) for name in "ab"])
    assert comparison.save(tmp_path / "out") == comparison.save(tmp_path / "out")


def test_the_same_reports_give_the_same_numbers(report):
    rng = np.random.default_rng(1)
    folders = [report(name, cases(list(rng.uniform(0.5, 0.9, 30)))) for name in "abc"]
    one, two = medseg.compare(folders), medseg.compare(folders)
    pd.testing.assert_frame_equal(one.table, two.table)
    pd.testing.assert_frame_equal(one.ranking, two.ranking)
