"""What a reader sees is what was measured: every number, dot, line, letter, bar and colour of the page."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.evaluate import EvaluateOptions
from medseg.report import Report, evaluate, worst
from medseg.report.figures import PICTURE_PIXELS, contour_pictures
from medseg.report.layers import read_layers
from medseg.report.page import figure

LABELS = {"shell": 1, "core": 2}
METRICS = {"Dice": "dice", "NSD": "nsd", "HD95 (mm)": "hd95_mm", "ASSD (mm)": "assd_mm"}
COLUMNS = {
    **METRICS,
    "IoU": "iou",
    "Precision": "precision",
    "Recall": "recall",
    "Reference (ml)": "reference_ml",
    "Difference (ml)": "volume_difference_ml",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of eight cases whose numbers all differ: one label missed, one spurious, one in neither map."""
    root = tmp_path_factory.mktemp("numbers")
    for number in range(8):
        reference = np.zeros((20, 22, 18), np.uint8)
        reference[3 : 12 + number % 4, 4:15, 3:12] = 1
        reference[6:10, 8:12, 5 : 8 + number % 3] = 2
        prediction = np.roll(reference, number % 3, axis=number % 2)
        if number == 3:
            prediction[prediction == 2] = 1
        if number == 4:
            reference[reference == 2] = 1
        if number == 5:
            prediction[prediction == 2], reference[reference == 2] = 1, 1
        prediction[number, 4, 4] = 1
        for name, array in (("pred", prediction), ("ref", reference)):
            (root / name).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([1.1, 0.9, 2.5, 1.0])), root / name / f"case_{number}.nii.gz")
    return made(root).save(root / "out")


def made(root: Path) -> Report:
    return evaluate(root / "pred", root / "ref", EvaluateOptions(labels=LABELS))


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@dataclass
class Cells(HTMLParser):
    """Rows of a piece of HTML as texts of their cells, lines of a cell apart."""

    rows: list[list[str]] = field(default_factory=list)
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.at: float | None = None

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag == "small" and self.rows and self.rows[-1]:
            self.rows[-1][-1] += "\n"
        style = dict(attributes).get("style") or ""
        self.at = float(style[5:-1]) / 100 if tag == "span" and style.startswith("left:") else None

    def handle_data(self, data):
        if self.at is not None:
            self.ticks.append((self.at, data))
            self.at = None
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def cells(html: str) -> Cells:
    found = Cells()
    found.feed(html)
    return found


def panel(page: str, metric: str) -> str:
    return re.search(rf'<div class="panel" data-metric="{metric}">.*?</table>', page, re.S)[0]


def number(text: str) -> float:
    return {"–": math.nan, "∞": math.inf}.get(text) or float(text.replace("−", "-"))


@pytest.mark.parametrize("metric", METRICS.values())
def test_the_strips_are_told_in_the_numbers_of_the_summary(page, summary, metric):
    rows = cells(panel(page, metric)).rows[1:]
    assert len(rows) == 2
    for row in rows:
        name, _, mean, median, n, missed, spurious, *_ = row
        measure = summary["labels"][name][metric]
        assert mean.split("\n")[:2] == [figure(measure["mean"], metric), interval(measure, metric)]
        assert ("finite only" in mean) == (measure["n_finite"] < measure["n"])
        quartiles = f"{figure(measure['q1'], metric)} to {figure(measure['q3'], metric)}"
        assert median.split("\n") == [figure(measure["median"], metric), quartiles]
        assert n.split("\n")[0] == str(measure["n"])
        assert (missed, spurious) == (str(measure["n_missed"]), str(measure["n_spurious"]))


def interval(measure: dict, metric: str) -> str:
    return " to ".join(figure(end, metric) for end in measure["ci95"])


def test_the_first_numbers_are_those_of_the_summary(page, summary, folder):
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)<span>(.*?)</span>", page)
    with (folder / "metrics.csv").open(newline="") as file:
        status = [row["status"] for row in csv.DictReader(file)]
    dice = summary["foreground"]["dice"]
    assert [(title, value) for title, value, _ in facts] == [
        ("Mean Dice over labels and cases", f"{dice['mean']:.3f}"),
        ("Missed", str(status.count("missed"))),
        ("Spurious", str(status.count("spurious"))),
        ("Not evaluated", "0"),
    ]
    assert facts[0][2] == f"95% interval {dice['ci95'][0]:.3f} to {dice['ci95'][1]:.3f}"
    assert f"of {status.count('ok') + status.count('missed')} in the references" in facts[1][2]


def test_the_table_of_cases_is_that_of_the_file(page, folder):
    static = cells(re.search(r'<table id="cases">.*?</table>', page, re.S)[0]).rows
    data = json.loads(re.search(r'id="rows">(.*?)</script>', page)[1])
    with (folder / "metrics.csv").open(newline="") as file:
        rows = {(row["case"], row["name"]): row for row in csv.DictReader(file)}
    assert len(static) - 1 == len(data["case"]) == len(rows)
    for n, shown in enumerate(static[1:]):
        case, name, _, *values = shown
        row = rows[case, name]
        assert (data["cases"][data["case"][n]], data["labels"][data["label"][n]][0]) == (case, name)
        for title, value, column in zip(static[0][3:], values, data["numbers"], strict=True):
            metric = COLUMNS[title]
            measured = float(row[metric]) if row[metric] else math.nan
            assert value == figure(measured, metric), (case, name, title)
            embedded = {None: math.nan, "inf": math.inf}.get(column[n], column[n])
            assert figure(embedded, metric) == value, (case, name, title)


@pytest.mark.parametrize("metric", ["dice", "nsd"])
def test_a_dot_lies_where_its_value_is_between_the_marks(page, folder, metric):
    html = panel(page, metric)
    (low, low_text), *_, (high, high_text) = cells(html).ticks
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for svg, name in zip(
        re.findall(r'<svg class="chart strip".*?</svg></svg>|<svg class="chart strip".*?</svg>.*?</svg>', html, re.S),
        LABELS,
    ):
        places = sorted(float(x) / 1000 for x in re.findall(r"M([\d.e+-]+) [\d.e+-]+h", svg))
        told = [number(low_text) + (x - low) / (high - low) * (number(high_text) - number(low_text)) for x in places]
        expected = sorted(float(row[metric]) for row in rows if row["name"] == name and row[metric])
        # five digits are drawn, and the marks of the axis stand to a ten-thousandth
        assert told == pytest.approx(expected, abs=2e-4)


def test_the_lines_of_agreement_lie_at_the_numbers_of_the_summary(page, summary):
    section = page[page.index('<section aria-labelledby="volumes">') :]
    figures = re.findall(r'<figure class="keep">.*?</figure>', section, re.S)
    assert len(figures) == 2
    for html, name in zip(figures, LABELS):
        chart = re.findall(r'<svg class="chart plane".*?</svg>', html, re.S)[1]
        marks = re.findall(r'class="grid" x1="58".*?y1="([\d.]+)".*?<text[^>]*>([^<]*)</text>', chart)
        heights, values = zip(*((float(y), number(text)) for y, text in marks))
        slope, start = np.polyfit(heights, values, 1)
        limits = summary["volumes"][name]
        for kind, key in (("bias", ["bias_ml"]), ("limit", ["low_ml", "high_ml"]), ("nil", [])):
            drawn = [float(y) for y in re.findall(rf'class="{kind}" x1="58".*?y1="([\d.]+)"', chart)]
            expected = [limits[k] for k in key] or [0.0]
            # lines stand to a tenth of a unit, as the marks they are measured by
            assert [start + slope * y for y in drawn] == pytest.approx(expected, abs=0.2 * abs(slope))


def test_the_script_writes_the_same_cells_as_the_file_holds(folder, page, visit):
    static = cells(re.search(r'<table id="cases">.*?</table>', page, re.S)[0]).rows[1:]
    opened = visit(folder / "report.html").page
    drawn = opened.evaluate(
        "[...document.querySelectorAll('#cases tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert drawn == static


def test_labels_have_one_colour_everywhere(folder, page):
    root = folder.parent
    report = made(root)
    colours = dict(report.evaluation.colours)
    swatches = re.findall(r'class="swatch[^"]*" style="background:(#\w+)"[^>]*>[^<]*</span><bdi>([^<]*)', page)
    assert set(swatches) == {(colour, name) for name, colour in colours.items()}
    data = json.loads(re.search(r'id="rows">(.*?)</script>', page)[1])
    assert {name: colour for name, colour, _ in data["labels"]} == colours
    scenes = json.loads(re.search(r'id="viewer-data">(.*?)</script>', page)[1])["scenes"]
    assert {(name, label["colour"]) for s in scenes for label in s["labels"] for name in label["names"]} == set(
        colours.items()
    )
    rgb = {name: [str(int(colour[n : n + 2], 16)) for n in (1, 3, 5)] for name, colour in colours.items()}
    lines = [line.split() for line in (folder / "labels.ctbl").read_text().splitlines()]
    assert {line[1]: line[2:5] for line in lines if line[1] in rgb} == rgb


# ---- pictures

# x runs along the second axis and backwards, y along the third, z along the first and backwards; all a little tilted
TURNED = np.array([[0.1, -2.0, 0.05, 30.0], [0.05, 0.1, 1.5, -20.0], [-3.0, 0.1, 0.1, 50.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.fixture
def case(tmp_path):
    """Writes a case and gives its three pictures as arrays (row, column, RGB)."""

    def make(reference, image, affine):
        for name, array in (("pred", np.zeros_like(reference)), ("ref", reference), ("image", image)):
            nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
        found = evaluate(tmp_path / "pred.nii.gz", tmp_path / "ref.nii.gz", images=tmp_path / "image.nii.gz").evaluation
        (pair,) = found.pairs.values()
        return [pixels(p) for p in contour_pictures(read_layers(pair, found), pair, found)]

    return make


def pixels(picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.data_uri.split(",")[1]))), dtype=int)


def test_letters_are_true_in_a_tilted_and_mirrored_volume(case):
    shape = (16, 20, 24)
    reference = np.zeros(shape, np.uint8)
    reference[4:12, 5:15, 6:18] = 1
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) @ TURNED[:3, :3].T + TURNED[:3, 3]
    middle = places[4:12, 5:15, 6:18].reshape(-1, 3).mean(axis=0)
    # brighter towards the patient's right, front and top
    bright = ((places > middle) @ np.array([1.0, 2.0, 4.0])).astype(np.float32)
    quarter = PICTURE_PIXELS // 4
    first, second, inner = slice(quarter, 2 * quarter), slice(2 * quarter, 3 * quarter), slice(quarter, 3 * quarter)
    # R and A, R and S, A and S stand at the left and the upper edge
    for picture in case(reference, bright, TURNED):
        grey = picture.sum(axis=-1)
        assert grey[inner, first].mean() > grey[inner, second].mean()
        assert grey[first, inner].mean() > grey[second, inner].mean()


def test_the_bar_is_as_long_as_it_says(case):
    reference = np.zeros((60, 60, 60), np.uint8)
    reference[10:50, 10:50, 10:50] = 1
    axial = case(reference, np.zeros(reference.shape, np.float32), np.eye(4))[0]
    white = (axial > 200).all(axis=-1)
    # not in the middle, where the letters are
    outline = np.flatnonzero(white[2 * PICTURE_PIXELS // 5])
    left, right = outline[outline < PICTURE_PIXELS // 2], outline[outline > PICTURE_PIXELS // 2]
    mm_per_pixel = 40 / (right.mean() - left.mean())
    bar = int(white[round(0.965 * PICTURE_PIXELS)].sum())
    # 40 × 1.35 + 4 mm are shown, of which 30% are 17.4: the bar is 10 mm, to a pixel at each end
    assert bar * mm_per_pixel == pytest.approx(10, abs=2 * mm_per_pixel)


def test_a_case_is_read_once_for_the_page_the_viewer_and_the_pdf(folder, monkeypatch, tmp_path):
    read = []

    def counted(pair, evaluation):
        read.append(pair.case)
        return read_layers(pair, evaluation)

    monkeypatch.setattr(worst, "read_layers", counted)
    report = made(folder.parent)
    report.save(tmp_path, pdf=True)
    assert read == [case["case"] for case in report.summary["worst_cases"]]


def test_many_labels_can_be_put_in_the_order_of_their_means(tmp_path, visit):
    # of label n the n-th part of 20 voxels is found
    reference, prediction = np.zeros((20, 20, 2), np.uint8), np.zeros((20, 20, 2), np.uint8)
    for n in range(1, 21):
        reference[n - 1, :, 0] = n
        prediction[n - 1, : 1 + (7 * n) % 20, 0] = n
    for name, array in (("pred", prediction), ("ref", reference)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    path = evaluate(tmp_path / "pred.nii.gz", tmp_path / "ref.nii.gz").save(tmp_path / "out") / "report.html"
    opened = visit(path).page
    means = "[...document.querySelectorAll('[data-metric=dice] tbody tr')].map(row => Number(row.dataset.mean))"
    listed = opened.evaluate(means)
    opened.get_by_role("combobox", name="Order").select_option(label="Worst mean first")
    assert opened.evaluate(means) == sorted(listed) != listed
    opened.get_by_role("combobox", name="Order").select_option(label="As listed")
    assert opened.evaluate(means) == listed
