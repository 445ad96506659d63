"""What a report folder holds: the CSV, strict JSON, and a page that is whole, safe and needs no network."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.errors import DataError
from medseg.evaluate import COLUMNS, EvaluateOptions, Pair
from medseg.grid import Grid
from medseg.report import Report, evaluate, report_pairs
from medseg.report.figures import MAX_DOTS, contour_pictures, strip, upright
from medseg.report.html import breakable, fixed, signed

SOLID = np.zeros((8, 9, 10), np.uint8)
SOLID[1:5, 1:5, 1:5] = 1
NOTHING = np.zeros_like(SOLID)
NASTY = "a<script>alert(1)<!--&\"quoted' ü"


@pytest.fixture
def report(tmp_path):
    """Writes {case: (prediction, reference)} and gives their report."""

    def make(cases, image=None, **options) -> Report:
        for name in ("pred", "ref", "images"):
            (tmp_path / name).mkdir()
        for case, arrays in cases.items():
            for folder, array in zip(("pred", "ref", "images"), (*arrays, image)):
                if array is not None:
                    nib.save(nib.Nifti1Image(array, np.diag([1, 2, 3, 1.0])), tmp_path / folder / f"{case}.nii.gz")
        return evaluate(
            str(tmp_path / "pred"), tmp_path / "ref", EvaluateOptions(**options), images=tmp_path / "images"
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


def page(report, tmp_path):
    return (report.save(tmp_path / "out") / "report.html").read_text(encoding="utf-8")


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
    assert summary["schema_version"] == 1
    assert summary["labels"]["1"]["dice"]["n_both_empty"] == 1


def test_saving_leaves_three_whole_files_and_replaces_old_ones(report, tmp_path):
    made = report({"a": (SOLID, SOLID)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.csv").write_text("old")
    folder = made.save(str(tmp_path / "out"))
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.csv", "report.html", "summary.json"]
    assert (folder / "metrics.csv").read_text().startswith("case,label,")


def test_names_cannot_become_markup(report, tmp_path):
    html = page(report({NASTY: (SOLID, SOLID)}, labels={"<b>liver</b>": 1}), tmp_path)
    parsed = Page(html)
    assert len(parsed.named("script")) == 1
    assert not parsed.named("b")
    assert NASTY in parsed.words
    assert "<b>liver</b>" in parsed.words


def test_nothing_is_loaded_from_elsewhere(report, tmp_path):
    html = page(report({"a": (SOLID, SOLID)}, image=SOLID), tmp_path)
    links = [a[key] for _, a in Page(html).elements for key in ("src", "href") if key in a]
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"https?://|@import|url\(", html)


def test_three_planes_of_a_volume_are_pictured(report, tmp_path):
    pictures = Page(page(report({"a": (SOLID, SOLID)}), tmp_path)).named("img")
    assert [re.search(r"axial|coronal|sagittal", p["alt"]).group() for p in pictures] == [
        "axial",
        "coronal",
        "sagittal",
    ]


def test_the_pictured_slice_is_the_one_with_the_most_wrong_voxels(report):
    # wrong are all 16 voxels of k = 3; in i and j the four slices 1..4 are equally wrong, and the first is taken
    prediction = SOLID.copy()
    prediction[:, :, 3] = 0
    made = report({"a": (prediction, SOLID)}).evaluation
    captions = [p.caption for p in contour_pictures(made.pairs["a"], made)]
    assert captions == ["axial, slice 4 of 10", "coronal, slice 2 of 9", "sagittal, slice 2 of 8"]


def test_an_image_on_another_grid_is_left_out_of_the_picture(report, caplog):
    made = report({"a": (SOLID, SOLID)}, image=np.zeros((3, 3, 3), np.uint8)).evaluation
    assert len(contour_pictures(made.pairs["a"], made)) == 3
    assert "another grid" in caplog.text


def test_an_unreadable_image_does_not_cost_the_pictures(report, tmp_path, caplog):
    made = report({"a": (SOLID, SOLID)}, image=SOLID).evaluation
    (tmp_path / "images" / "a.nii.gz").write_bytes(b"not an image")
    assert len(contour_pictures(made.pairs["a"], made)) == 3
    assert "a.nii.gz" in caplog.text


def test_pictures_lie_right_way_up():
    # voxel axes run to the left, to the front and down; the one marked voxel is far right, front and top
    grid = Grid((4, 5, 6), np.diag([-1.0, 2.0, -3.0, 1.0]))
    marked = np.zeros(grid.shape, np.uint8)
    marked[0, 4, 0] = 1
    (turned,), spacing = upright([marked], grid)
    assert spacing == (1, 2, 3)
    assert np.argwhere(turned).tolist() == [[3, 4, 5]]


def test_an_image_under_the_outlines_changes_the_picture(report):
    made = report({"a": (SOLID, SOLID)}, image=np.arange(SOLID.size, dtype=np.uint16).reshape(SOLID.shape)).evaluation
    with_image = contour_pictures(made.pairs["a"], made)
    without = contour_pictures(replace(made.pairs["a"], image=None), made)
    assert all(a.data_uri != b.data_uri for a, b in zip(with_image, without))


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


def test_failed_and_missing_cases_are_named_on_the_page(report, tmp_path):
    made = report({"good": (SOLID, SOLID), "broken": (SOLID[:-1], SOLID), "absent": (None, SOLID)}, allow_missing=True)
    words = " ".join(Page(page(made, tmp_path)).words)
    assert "1 case could not be evaluated" in words
    assert "broken.nii.gz: shape (7, 9, 10) found" in words
    assert "1 case without a prediction" in words
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


def test_a_strip_plot_of_very_many_cases_keeps_its_ends():
    values = list(np.linspace(0.5, 1, 5 * MAX_DOTS))
    dots = strip(values, [f"{v}" for v in values], low=0.5)
    assert (len(dots), dots[0].x, dots[-1].x) == (MAX_DOTS, 0, 1)


def test_long_names_break_after_underscores_and_stay_escaped():
    assert breakable("left_<b>lung") == "left_<wbr>&lt;b&gt;lung"


def test_labels_in_no_case_are_named_below_the_table(report, tmp_path):
    words = "".join(Page(page(report({"a": (SOLID, SOLID)}, labels={"liver": 1, "spleen": 2}), tmp_path)).words)
    assert "In neither the reference nor the prediction of any case: spleen." in words


def test_numbers_for_the_eye():
    shown = (fixed(0.12345), fixed(None), fixed(math.nan), fixed("inf"), fixed(math.inf), signed(1.0), signed(-0.256))
    assert shown == ("0.123", "–", "–", "∞", "∞", "+1.00", "−0.26")


def test_a_pair_without_prediction_has_no_pictures(report, tmp_path):
    made = report({"a": (SOLID, SOLID)}).evaluation
    assert contour_pictures(Pair("x", None, tmp_path / "ref" / "a.nii.gz"), made) == ()


def test_settings_refuse_an_unknown_surface():
    with pytest.raises(DataError, match="surfel or voxel"):
        EvaluateOptions(surface="sphere")
