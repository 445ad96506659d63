"""What a report folder holds: the CSV, strict JSON, and a page that is whole, safe and needs no network."""

from __future__ import annotations

import csv
import itertools
import json
import re
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.config import COLOURS
from medseg.errors import DataError
from medseg.evaluate import COLUMNS, EvaluateOptions, Failure, Pair
from medseg.evaluate.summary import SCHEMA_VERSION
from medseg.report import Report, evaluate, html, report_pairs, scene
from medseg.report.figures import contour_pictures
from medseg.report.html import PAGE_ROWS, label_marks, left_out, notes, reach, render, without_folders
from medseg.report.layers import read_layers

SOLID = np.zeros((8, 9, 10), np.uint8)
SOLID[1:5, 1:5, 1:5] = 1
NOTHING = np.zeros_like(SOLID)
NASTY = "a<script>alert(1)<!--&\"quoted' ü"


@pytest.fixture
def report(tmp_path):
    """Writes {case: (prediction, reference)} and gives their report."""

    def make(cases, image=None, metadata=None, **options) -> Report:
        for name in ("pred", "ref", "images"):
            (tmp_path / name).mkdir()
        for case, arrays in cases.items():
            for folder, array in zip(("pred", "ref", "images"), (*arrays, image)):
                if array is not None:
                    nib.save(nib.Nifti1Image(array, np.diag([1, 2, 3, 1.0])), tmp_path / folder / f"{case}.nii.gz")
        about = None if metadata is None else tmp_path / "about.csv"
        if about is not None:
            about.write_text(metadata)
        return evaluate(
            str(tmp_path / "pred"),
            tmp_path / "ref",
            EvaluateOptions(**options),
            images=tmp_path / "images",
            metadata=about,
        )

    return make


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def has_class(self, name):
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def page(report, tmp_path):
    return (report.save(tmp_path / "out") / "report.html").read_text(encoding="utf-8")


def test_progress_is_told_while_a_report_is_made(report, tmp_path):
    cases = dict.fromkeys("abc", (SOLID, SOLID))
    told = []
    report(cases).save(tmp_path / "out", progress=lambda *step: told.append(step))
    assert told == [("draw", number, 3) for number in range(4)]
    pairs = [(c, *(tmp_path / f / f"{c}.nii.gz" for f in ("pred", "ref")), None) for c in cases]
    told.clear()
    report_pairs(pairs, progress=lambda *step: told.append(step))
    assert told == [("evaluate", number, 3) for number in (1, 2, 3)]


def test_csv_has_literal_inf_and_empty_nan(report, tmp_path):
    folder = report({"empty": (NOTHING, NOTHING), "missed": (NOTHING, SOLID)}).save(tmp_path / "out")
    with (folder / "metrics.csv").open(newline="") as file:
        empty, missed = csv.DictReader(file)
    assert tuple(empty) == COLUMNS
    assert (empty["status"], empty["dice"], empty["hd95_mm"]) == ("both_empty", "", "")
    assert (missed["status"], missed["dice"], missed["hd95_mm"], missed["fn"]) == ("missed", "0.0", "inf", "64")


def test_json_holds_no_nan_and_no_infinity(report, tmp_path):
    folder = report({"empty": (NOTHING, NOTHING), "missed": (NOTHING, SOLID)}).save(tmp_path / "out")

    def refuse(token):
        raise AssertionError(token)

    summary = json.loads((folder / "summary.json").read_text(), parse_constant=refuse)
    assert summary["schema_version"] == SCHEMA_VERSION
    assert summary["labels"]["1"]["dice"]["n_both_empty"] == 1


def test_saving_leaves_whole_files_and_replaces_old_ones(report, tmp_path):
    made = report({"a": (SOLID, SOLID)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.csv").write_text("old")
    folder = made.save(str(tmp_path / "out"))
    assert sorted(p.name for p in folder.iterdir()) == [
        *("labels.ctbl", "labels.label", "metrics.csv", "report.html", "summary.json")
    ]
    assert (folder / "metrics.csv").read_text().startswith("case,label,")


def test_names_cannot_become_markup(report, tmp_path):
    html = page(report({NASTY: (SOLID, SOLID)}, labels={"<b>liver</b>": 1}), tmp_path)
    parsed = Page(html)
    assert not parsed.named("b")
    assert NASTY in parsed.words
    assert "<b>liver</b>" in parsed.words
    assert "<script>alert" not in html


def test_names_keep_their_direction_to_themselves(report, tmp_path):
    parsed = Page(page(report({"a\u202e": (SOLID, SOLID), "b": (NOTHING, SOLID)}), tmp_path))
    isolated = [n for n, word in enumerate(parsed.words) if "\u202e" in word and not word.startswith(("{", "\n"))]
    assert isolated
    assert len(parsed.named("bdi")) >= len(isolated)


def test_nothing_is_loaded_from_elsewhere(report, tmp_path):
    html = page(report({"a": (SOLID, SOLID)}, image=SOLID), tmp_path)
    links = [a[key] for _, a in Page(html).elements for key in ("src", "href") if key in a]
    assert any(link.startswith("data:image/jpeg;base64,") for link in links)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"https?://|@import|url\(", html)


def test_links_on_the_page_lead_somewhere(report, tmp_path):
    parsed = Page(page(report(dict.fromkeys("abc", (SOLID, SOLID))), tmp_path))
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in parsed.named("a")} <= set(ids)


def test_headings_leave_out_no_level(report, tmp_path):
    parsed = Page(page(report(dict.fromkeys("abc", (SOLID, SOLID))), tmp_path))
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_every_table_says_what_it_holds_and_every_chart_too(report, tmp_path):
    parsed = Page(page(report(dict.fromkeys("abc", (SOLID, SOLID))), tmp_path))
    assert len(parsed.named("caption")) == len(parsed.named("table"))
    charts = parsed.named("svg")
    outer = [c for c in charts if "class" in c]
    assert outer
    assert all(c["role"] == "img" and c["aria-label"] for c in outer)


def test_three_planes_of_a_volume_are_pictured(report, tmp_path):
    pictures = Page(page(report({"a": (SOLID, SOLID)}), tmp_path)).named("img")
    assert [re.search(r"axial|coronal|sagittal", p["alt"]).group() for p in pictures] == [
        "axial",
        "coronal",
        "sagittal",
    ]


def test_an_image_on_another_grid_is_left_out_of_the_picture(report, caplog):
    made = report({"a": (SOLID, SOLID)}, image=np.zeros((3, 3, 3), np.uint8)).evaluation
    assert len(contour_pictures(read_layers(made.pairs["a"], made), made.pairs["a"], made)) == 3
    assert "another grid" in caplog.text


def test_a_picture_of_a_volume_is_left_out(tmp_path, caplog):
    for name in ("pred", "ref", "images"):
        (tmp_path / name).mkdir()
    for name in ("pred", "ref"):
        nib.save(nib.Nifti1Image(np.ones((4, 4), np.uint8), np.eye(4)), tmp_path / name / "a.nii.gz")
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / "images" / "a.png")
    made = evaluate(tmp_path / "pred", tmp_path / "ref", images=tmp_path / "images").evaluation
    assert read_layers(made.pairs["a"], made).image is None
    assert "a.png is a picture" in caplog.text


def test_an_image_of_another_plane_is_left_out_of_the_picture(tmp_path, caplog):
    for name, place in (("pred", 1.0), ("ref", 1.0), ("images", -1.0)):
        (tmp_path / name).mkdir()
        nib.save(nib.Nifti1Image(SOLID[:, :, 2], np.diag([place, 1, 1, 1])), tmp_path / name / "a.nii.gz")
    made = evaluate(tmp_path / "pred", tmp_path / "ref", images=tmp_path / "images").evaluation
    assert read_layers(made.pairs["a"], made).image is None
    assert "another grid" in caplog.text


def test_an_unreadable_image_does_not_cost_the_pictures(report, tmp_path, caplog):
    made = report({"a": (SOLID, SOLID)}, image=SOLID).evaluation
    (tmp_path / "images" / "a.nii.gz").write_bytes(b"not an image")
    assert len(contour_pictures(read_layers(made.pairs["a"], made), made.pairs["a"], made)) == 3
    assert "a.nii.gz" in caplog.text


def test_of_many_labels_the_worst_are_named_per_case(report, tmp_path):
    reference = np.zeros((3, 3, 40), np.uint8)
    reference[:] = np.arange(40)
    prediction = np.where(reference == 30, 0, reference).astype(np.uint8)
    words = Page(page(report({"a": (prediction, reference)}), tmp_path)).words
    assert "and 29 with a higher Dice" in words


def test_two_dimensional_cases_have_one_picture(tmp_path):
    for name in ("pred", "ref"):
        (tmp_path / name).mkdir()
        Image.fromarray(SOLID[:, :, 2]).save(tmp_path / name / "scan.png")
    assert len(Page(page(evaluate(tmp_path / "pred", tmp_path / "ref"), tmp_path)).named("img")) == 1


def test_failed_and_missing_cases_are_named_without_folders(report, tmp_path):
    made = report({"good": (SOLID, SOLID), "broken": (SOLID[:-1], SOLID), "absent": (None, SOLID)}, allow_missing=True)
    html = page(made, tmp_path)
    words = "".join(Page(html).words)
    assert "2 of 3 cases in none of these numbers" in words
    assert "broken shape (7, 9, 10) found" in words
    assert "Without a prediction: absent" in words
    assert str(tmp_path) not in html
    assert made.failures[0].case == "broken"


def test_a_mean_beside_infinite_values_says_so(report, tmp_path):
    html = page(report({"a": (SOLID, SOLID), "b": (NOTHING, SOLID)}), tmp_path)
    assert "finite only (1)" in html


def test_the_text_table_has_a_line_per_label_and_one_for_all(report):
    both = SOLID.copy()
    both[6:, 6:, 6:] = 2
    rows = report({"a": (SOLID, both)}, labels={"liver": 1, "tumour": 2}).text_rows()
    assert [(r[0], r[1], r[5]) for r in rows[1:]] == [
        ("liver", "1.000", "0"),
        ("tumour", "0.000", "1"),
        ("all labels", "0.500", "1"),
    ]


def test_text_table_columns_are_aligned(report):
    lines = report({"a": (SOLID, SOLID)}).text_table().splitlines()
    assert len({len(line) for line in lines}) == 1


def test_listed_pairs_and_groups(report, tmp_path):
    report({name: (SOLID if n else NOTHING, SOLID) for n, name in enumerate("abcd")})
    pairs = [(n, tmp_path / "pred" / f"{n}.nii.gz", tmp_path / "ref" / f"{n}.nii.gz", None) for n in "abcd"]
    alone = report_pairs([*pairs, ("e", None, tmp_path / "ref" / "a.nii.gz", None)])
    assert alone.summary["missing_predictions"] == ["e"]
    assert alone.summary["labels"]["1"]["dice"]["ci95"] is not None
    grouped = report_pairs(pairs, groups={"a": "p", "b": "p", "c": "q", "d": "q"})
    # two patients are too few to resample
    assert grouped.summary["labels"]["1"]["dice"]["ci95"] is None


def test_labels_in_no_case_are_named_once(report, tmp_path):
    words = "".join(Page(page(report({"a": (SOLID, SOLID)}, labels={"liver": 1, "spleen": 2}), tmp_path)).words)
    assert "In no reference and no prediction of these cases: spleen" in words
    assert words.count("in no case") + words.count("In no reference") == 1


def rows_of(html):
    """The data of the case table."""
    return json.loads(re.search(r'id="rows">(.*?)</script>', html)[1])


def test_the_first_rows_stand_in_the_page_and_all_in_its_data(report, tmp_path):
    reference = np.arange(1, 121, dtype=np.uint8).reshape(2, 3, 20)
    html = page(report({"a": (reference, reference)}), tmp_path)
    static = re.search(r'<table id="cases">.*?</table>', html, re.S)[0]
    assert static.count("<tr>") == 1 + PAGE_ROWS
    assert len(rows_of(html)["case"]) == 120


def test_the_data_of_the_table_is_worst_first_with_infinity_and_nothing_said(report, tmp_path):
    html = page(report({"a": (SOLID, SOLID), "b": (NOTHING, SOLID), "c": (NOTHING, NOTHING)}), tmp_path)
    data = rows_of(html)
    assert [data["cases"][n] for n in data["case"]] == ["b", "a", "c"]
    assert [data["statuses"][n][0] for n in data["status"]] == ["missed", "ok", "both_empty"]
    numbers = dict(zip((column["name"] for column in data["columns"]), data["numbers"]))
    assert numbers["Dice"] == [0, 1, None]
    assert numbers["HD95 (mm)"] == ["inf", 0, None]


def test_cases_with_pictures_are_linked_from_the_table(report, tmp_path):
    html = page(report({"a": (SOLID, SOLID), "b": (NOTHING, SOLID)}), tmp_path)
    assert rows_of(html)["links"] == ["case-1", "case-2"]
    assert '<article class="card case" id="case-1"' in html


def test_measures_can_be_switched_and_infinite_ones_have_a_place(report, tmp_path):
    html = page(report({"a": (SOLID, SOLID), "b": (NOTHING, SOLID)}), tmp_path)
    parsed = Page(html)
    assert [a["id"] for a in parsed.named("input") if a.get("name") == "measure"] == [
        *("measure-dice", "measure-nsd", "measure-hd95_mm", "measure-assd_mm")
    ]
    assert "∞: the label is missed or spurious" in html


def test_three_cases_have_charts_over_volume_and_two_have_none(report, tmp_path):
    three = dict.fromkeys("abc", (SOLID, SOLID))
    assert "Bland–Altman" in "".join(Page(page(report(three), tmp_path)).words)


def test_two_cases_have_no_charts_over_volume(report, tmp_path):
    assert 'id="volumes"' not in page(report(dict.fromkeys("ab", (SOLID, SOLID))), tmp_path)


def test_small_subgroups_carry_a_warning(report, tmp_path):
    made = report(dict.fromkeys("abcd", (SOLID, SOLID)), metadata="case,site\na,x\nb,x\nc,<y>\nd,<y>\n")
    parsed = Page(page(made, tmp_path))
    assert "By " in "".join(parsed.words)
    assert "<y>" in parsed.words
    assert parsed.words.count("fewer than 10") == 2


def test_lesions_are_told_where_they_were_asked_for(report, tmp_path):
    words = "".join(Page(page(report({"a": (SOLID, SOLID)}, lesions="default"), tmp_path)).words)
    assert "Panoptic quality" in words


def test_calibration_is_drawn_where_the_summary_has_it(report):
    made = report({"a": (SOLID, SOLID)}).evaluation
    bins = [{"low": 0.5, "high": 1.0, "n": 4, "confidence": 0.8, "correct": 0.75}]
    calibration = {"n_cases": 1, "ece": 0.05, "bins": bins, "labels": {"1": {"ece": 0.05, "bins": bins}}}
    html = render(replace(made, summary={**made.summary, "calibration": calibration}))
    assert html.count('class="even"') == 2
    assert "ECE 0.050" in html


@pytest.mark.parametrize(
    ("cases", "labels", "said"),
    [
        ({"a": (SOLID, SOLID)}, None, "1 case compared with its reference, 1 label"),
        ({"a": (NOTHING, SOLID), "b": (NOTHING, SOLID)}, None, "2of 2 in the references"),
        ({"a": (SOLID, SOLID)}, {"spleen": 7}, "No label occurs in any reference or prediction"),
    ],
    ids=["one case", "all missed", "no label present"],
)
def test_states_with_little_to_show(report, tmp_path, cases, labels, said):
    assert said in "".join(Page(page(report(cases, labels=labels), tmp_path)).words)


def test_reach_says_how_far_a_mean_is_known_and_what_more_would_take():
    dice = {"n": 20, "ci95": [0.8, 0.9], "cases_needed": {"0.02": 60}}
    summary = {"n_cases": 20, "n_groups": None, "foreground": {"dice": dice}, "labels": {"liver": {"dice": dice}}}
    assert reach(summary)[:2] == [
        "With 20 cases the mean Dice is known to about ±0.050.",
        "For ±0.02 about 60 cases would be needed (liver).",
    ]


def test_reach_counts_patients_where_they_are_known():
    dice = {"n": 20, "n_groups": 4, "ci95": [0.8, 0.9], "cases_needed": {"0.02": 16}}
    summary = {"n_cases": 20, "n_groups": 4, "foreground": {"dice": dice}, "labels": {"liver": {"dice": dice}}}
    assert reach(summary)[:2] == [
        "With 4 patients the mean Dice is known to about ±0.050.",
        "For ±0.02 about 16 patients would be needed (liver).",
    ]


def named(n, needed, n_groups=None):
    return {"dice": {"n": n, "n_groups": n_groups, "cases_needed": needed and {"0.02": needed}}}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        # it has to be measured in as many: twenty livers do not tell of five tumours
        (
            {"liver": named(20, 12), "tumour": named(5, 17)},
            "about 17 cases would be needed (tumour, which has a Dice in 5)",
        ),
        (
            {"liver": named(20, 19), "tumour": named(5, 17)},
            "about 17 cases would be needed (tumour, which has a Dice in 5)",
        ),
        ({"liver": named(20, 12), "spleen": named(20, 17)}, "about 17 cases suffice (spleen, which spreads most)"),
        ({"liver": named(20, 12), "tumour": named(5, 4)}, "about 12 cases suffice (liver, which spreads most)"),
        ({"liver": named(20, 12), "absent": named(0, None)}, "about 12 cases suffice (liver)"),
        # two tumours tell nothing at all
        ({"liver": named(20, 12), "tumour": named(2, None)}, None),
    ],
)
def test_reach_counts_the_cases_that_have_the_label(labels, said):
    summary = {"n_cases": 20, "n_groups": None, "foreground": {"dice": {"ci95": [0.8, 0.9]}}, "labels": labels}
    found = [text for text in reach(summary) if "±0.02" in text]
    assert found == ([] if said is None else [f"For ±0.02 {said}."])


def test_reach_counts_the_patients_that_have_the_label():
    labels = {"liver": named(20, 6, 10), "tumour": named(9, 8, 4)}
    summary = {"n_cases": 20, "n_groups": 10, "foreground": {"dice": {"ci95": [0.8, 0.9]}}, "labels": labels}
    assert reach(summary)[1] == "For ±0.02 about 8 patients would be needed (tumour, which has a Dice in 4)."


def test_the_page_says_patients_where_they_are_known(report, tmp_path):
    less = SOLID.copy()
    less[1] = 0
    cases = {"a": (SOLID, SOLID), "b": (less, SOLID), "c": (SOLID, SOLID), "d": (less, SOLID)}
    words = Page(page(report(cases, metadata="case,patient\na,1\nb,2\nc,3\nd,3\n"), tmp_path)).words
    assert "Patients for ±0.02" in words
    assert "Cases for ±0.02" not in words


def test_nothing_is_said_of_reach_where_there_is_no_interval():
    assert reach({"n_cases": 2, "n_groups": None, "foreground": {"dice": {"n": 2, "ci95": None}}, "labels": {}}) == []


def test_few_cases_are_warned_of_once(report):
    found = notes(report(dict.fromkeys("ab", (SOLID, SOLID))).evaluation)
    assert sum("ewer than 10" in note or "too few" in note for note in found) == 1
    assert all(note[0] == note[0].upper() for note in found)


def test_labels_that_share_a_colour_carry_their_values(report):
    reference = np.arange(1, 9, dtype=np.uint8).reshape(2, 2, 2)
    made = report({"a": (reference, reference)}).evaluation
    assert len(made.labels) > len(COLOURS)
    assert label_marks(made) == {str(n): str(n) for n in range(1, 9)}


def test_few_labels_need_no_values(report):
    assert label_marks(report({"a": (SOLID, SOLID)}).evaluation) == {"1": ""}


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("/home/someone/pred/a.nii.gz: is odd", "a.nii.gz: is odd"),
        # of another case of the same folder
        ("/home/someone/ref/b.nii.gz: one case in 2 files", "b.nii.gz: one case in 2 files"),
        ("/other/home/someone/ref/b.nii.gz: stays", "/other/home/someone/ref/b.nii.gz: stays"),
    ],
)
def test_reasons_name_files_without_their_folders(reason, said):
    pair = Pair("a", Path("/home/someone/pred/a.nii.gz"), Path("/home/someone/ref/a.nii.gz"))
    assert without_folders(reason, [pair]) == said


def test_a_relative_folder_is_not_cut_out_of_a_longer_word():
    pair = Pair("a", Path("data/a.nii.gz"), Path("a.nii.gz"))
    assert without_folders("data/a.nii.gz or metadata/a.nii.gz", [pair]) == "a.nii.gz or metadata/a.nii.gz"


def test_a_case_in_two_files_shows_no_folder(report, tmp_path):
    made = report({"a": (SOLID, SOLID), "b": (SOLID, SOLID)})
    nib.save(nib.Nifti1Image(SOLID, np.eye(4)), tmp_path / "pred" / "b.nii")
    made = evaluate(tmp_path / "pred", tmp_path / "ref")
    ((case, reason),) = left_out(made.evaluation)
    assert case == "b"
    assert reason.startswith("one case in 2 files")
    assert str(tmp_path) not in render(made.evaluation)


def test_numbers_of_the_table_are_those_of_the_page_to_the_last_digit(report, tmp_path):
    # 13 of 16 voxels: 0.8125 is rounded to even by Python and up by a browser
    reference, prediction = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    reference[0], prediction[0] = 1, 1
    prediction[0, 0, :3], prediction[1, 0, :3] = 0, 1
    html = page(report({"a": (prediction, reference)}), tmp_path)
    assert rows_of(html)["numbers"][0] == [0.812]
    assert '<td class="num">0.812</td>' in html


def test_values_of_an_atlas_are_drawn_as_small_ones_are(report):
    less = SOLID.astype(np.int32)
    less[1] = 0
    # a value of the Allen mouse brain atlas
    large = 614454277
    cases = {"small": (less, SOLID.astype(np.int32)), "large": (less * large, SOLID.astype(np.int32) * large)}
    made = report(cases, labels={"one": 1, "other": large}).evaluation
    alike = replace(made, colours=dict.fromkeys(made.labels, COLOURS[0]))
    layers = {case: read_layers(made.pairs[case], made) for case in cases}
    tracemalloc.start()
    pictures = {case: contour_pictures(layers[case], made.pairs[case], alike) for case in cases}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [p.data_uri for p in pictures["small"]] == [p.data_uri for p in pictures["large"]]
    # a picture takes 10 MB at the most; one colour for each value up to that one would take 7 GB
    assert peak < 100e6


def test_the_parts_of_a_page_leave_room_below_15_megabytes():
    # a row of the table takes 100 bytes at most: eight numbers of up to ten characters and three indices
    rows = 100 * html.MAX_TABLE_ROWS
    assert html.MAX_PICTURE_BYTES + scene.MAX_BYTES + len(scene.niivue_script()) + rows < 14_500_000


def test_very_many_failures_and_missing_cases_are_folded(report):
    made = report({"a": (SOLID, SOLID)}).evaluation
    failures = tuple(Failure(f"case {n}", "broken") for n in range(30))
    missing = [f"absent {n}" for n in range(30)]
    html = render(replace(made, failures=failures, summary={**made.summary, "missing_predictions": missing}))
    open_part = html[html.index('class="notice"') :].partition("<details>")[0]
    assert (open_part.count("broken"), html.count("broken")) == (20, 30)
    assert html.count("and 10 more") == 2
    assert html.count("<bdi>absent ") == 30


def test_the_summary_of_another_program_is_not_replaced(report, tmp_path):
    made = report({"a": (SOLID, SOLID)})
    foreign = tmp_path / "out" / "summary.json"
    foreign.parent.mkdir()
    foreign.write_text('{"metric_per_case": []}')
    (tmp_path / "out" / "report.pdf").write_text("theirs")
    with pytest.raises(DataError, match=r"summary\.json: written by another program"):
        made.save(tmp_path / "out")
    assert foreign.read_text() == '{"metric_per_case": []}'
    assert (tmp_path / "out" / "report.pdf").read_text() == "theirs"


def test_a_comparison_is_not_replaced_by_a_report(report, tmp_path):
    made = report({"a": (SOLID, SOLID)})
    theirs = tmp_path / "out" / "summary.json"
    theirs.parent.mkdir()
    theirs.write_text('{"schema_version": 1, "comparisons": []}')
    with pytest.raises(DataError, match=r"summary\.json: that of a comparison found, expected a folder for the report"):
        made.save(tmp_path / "out")
    assert "comparisons" in theirs.read_text()


def test_a_report_leaves_what_it_did_not_write_and_clears_away_its_own(report, tmp_path):
    made = report({"a": (SOLID, SOLID)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.pdf").write_text("theirs")
    folder = made.save(tmp_path / "out", nnunet_summary=True)
    assert (folder / "report.pdf").exists()
    assert (folder / "nnunet_summary.json").exists()
    made.save(folder)
    assert not (folder / "nnunet_summary.json").exists()
