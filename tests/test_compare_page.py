"""The page of a comparison, and the verb that makes it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import medseg
from medseg.cli import run
from medseg.compare.alignment import ALL_LABELS
from medseg.compare.charts import against, difference_axis, differences_strip

INF, NAN = math.inf, math.nan
MakeReport = Callable[..., Path]
EVIL = ("<script>alert(1)</script>", "quote\" and 'apostrophe", "Ünïcode 中文", "x" * 200, "</script><b>")


@pytest.fixture
def report(tmp_path: Path) -> MakeReport:
    """Writes a report of Dice values by case and label; 0 is a missed label, NaN one that is in neither map."""

    def write(name: str, dice: np.ndarray, cases: list[str] | None = None, labels: list[str] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        header = ("case", "label", "name", "status", "tp", "fp", "fn", "dice", "nsd", "hd95_mm")
        with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for n, row in enumerate(dice):
                for k, value in enumerate(row):
                    identity = (cases[n] if cases else f"case {n}", k + 1, labels[k] if labels else f"organ {k}")
                    if math.isnan(value):
                        writer.writerow((*identity, "both_empty", 0, 0, 0, "", "", ""))
                        continue
                    tp = round(1000 * value)
                    status, distance = ("ok", 2 - value) if value else ("missed", INF)
                    writer.writerow((*identity, status, tp, 1000 - tp, 1000 - tp, value, value, distance))
        (folder / "summary.json").write_text(json.dumps({"schema_version": 1, "definitions": {}}))
        return folder

    return write


def values(n_cases: int, n_labels: int = 2, gain: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.uniform(0.5, 0.8, (n_cases, n_labels)) + gain, 0.01, 1)


def page(folders: list[Path], where: Path) -> str:
    return (medseg.compare(folders).save(where) / "compare.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags, their attributes, and the text of a page; an element that is not closed is an error."""

    VOID = frozenset(("meta", "link", "input", "br", "wbr", "img", "hr"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_begins_with_the_finding(report, tmp_path):
    folders = [report("ours", values(12, gain=0.1)), report("theirs", values(12))]
    shown = " ".join(Outline(page(folders, tmp_path / "out")).text)
    first = re.search(r"ours is better than theirs by 0\.100 mean Dice \[0\.100, 0\.100\] over 12 cases", shown)
    assert first is not None
    assert first.start() < shown.index("Order of the methods")


def test_nothing_is_loaded_from_elsewhere(report, tmp_path):
    text = page([report("a", values(5)), report("b", values(5, seed=1))], tmp_path / "out")
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#|data:)[\w/.:]""", text) == []
    assert "default-src 'none'" in text


def test_names_cannot_become_markup(report, tmp_path):
    names = [*EVIL, "plain"]
    folders = [
        report(f"m{n}", values(len(names), 3, seed=n), names, ["<b>organ</b>", "\"'", "ü" * 150]) for n in range(2)
    ]
    text = page([f"<i>&{n}={folder}" for n, folder in enumerate(folders)], tmp_path / "out")
    outline = Outline(text)
    assert "alert(1)" not in "".join(re.findall(r"<script>.*?</script>", text, flags=re.S))
    assert {"b", "i"}.isdisjoint(tag for tag, _ in outline.tags)
    told = json.loads(text.split('id="told">')[1].split("</script>")[0])
    assert set(told["cases"]) == set(names)
    assert told["methods"] == ["<i>&0", "<i>&1"]


def test_every_table_has_a_caption_and_heads(report, tmp_path):
    outline = Outline(page([report(n, values(6, seed=k)) for k, n in enumerate("abc")], tmp_path / "out"))
    tables = sum(tag == "table" for tag, _ in outline.tags)
    assert tables == sum(tag == "caption" for tag, _ in outline.tags) > 4
    assert all("scope" in attributes for tag, attributes in outline.tags if tag == "th")
    charts = [of for tag, of in outline.tags if tag == "svg" and "chart" in (of.get("class") or "")]
    assert charts
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)


def test_headings_skip_no_level(report, tmp_path):
    outline = Outline(page([report(n, values(6, seed=k)) for k, n in enumerate("abc")], tmp_path / "out"))
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_missed_labels_stand_on_the_page(report, tmp_path):
    a = values(6)
    a[2, 1] = 0
    shown = " ".join(Outline(page([report("a", a), report("b", values(6, seed=1))], tmp_path / "out")).text)
    assert "Missed: a 1, b 0. Spurious: a 0, b 0 (of 12 labels in 6 cases)." in shown


@pytest.mark.parametrize(("n_cases", "n_labels", "n_methods"), [(1, 1, 2), (2, 1, 3), (3, 117, 2), (40, 1, 8)], ids=str)
def test_sizes_from_one_case_to_many_methods(report, tmp_path, n_cases, n_labels, n_methods):
    folders = [report(f"m{n}", values(n_cases, n_labels, seed=n)) for n in range(n_methods)]
    outline = Outline(page(folders, tmp_path / "out"))
    strips = sum("strip" in (attributes.get("class") or "") for tag, attributes in outline.tags if tag == "svg")
    pairs = min(6, n_methods * (n_methods - 1) // 2)
    assert strips == pairs * (n_labels + (n_labels > 1))


def test_a_label_that_nobody_has_is_no_obstacle(report, tmp_path):
    a, b = values(4), values(4, seed=1)
    a[:, 1] = b[:, 1] = NAN
    comparison = medseg.compare([report("a", a), report("b", b)])
    Outline((comparison.save(tmp_path / "out") / "compare.html").read_text(encoding="utf-8"))
    rows = comparison.table[(comparison.table["name"] == "organ 1") & (comparison.table["metric"] == "dice")]
    assert rows["n"].tolist() == [0]
    assert rows["n_both_empty_a"].tolist() == [4]


def test_reports_without_any_label_anywhere_are_refused(report):
    empty = np.full((3, 1), NAN)
    with pytest.raises(medseg.DataError, match="no measure has a value in all reports"):
        medseg.compare([report("a", empty), report("b", empty)])


def test_a_method_that_ranks_first_with_a_lower_mean_is_explained(report, tmp_path):
    # ahead by 0.01 in nine cases, behind by 0.6 in one
    ours, theirs = np.full((10, 1), 0.81), np.full((10, 1), 0.80)
    ours[0] = 0.2
    shown = " ".join(Outline(page([report("ours", ours), report("theirs", theirs)], tmp_path / "out")).text)
    assert "theirs has the higher mean Dice, yet ours is first: ahead more often, but by less." in shown


def test_nothing_is_explained_where_rank_and_mean_agree(report, tmp_path):
    folders = [report("ours", values(12, gain=0.1)), report("theirs", values(12))]
    assert "yet" not in " ".join(Outline(page(folders, tmp_path / "out")).text)


@pytest.mark.parametrize(("n_methods", "columns"), [(2, 14), (3, 16)])
def test_of_two_methods_the_tests_need_no_names(report, tmp_path, n_methods, columns):
    text = page([report(f"m{n}", values(6, seed=n)) for n in range(n_methods)], tmp_path / "out")
    table = re.search(r'<table id="test-table".*?</table>', text, re.DOTALL)[0]
    titles = [of["data-title"] for tag, of in Outline(table).tags if tag == "th" and of["scope"] == "col"]
    assert len(titles) == columns
    assert ("First" in titles) == (n_methods > 2)
    # the name of the label is a heading
    assert table.count("<td") == (columns - 1) * table.count('<th scope="row"')


# ---- charts


def test_the_scale_of_differences_has_zero_in_its_middle():
    scale, beyond = difference_axis(np.array([-0.1, 0.05, 0.2]), [0.1])
    assert scale.place(0.0) == 0.5
    assert (scale.place(0.2) < 1, beyond) == (True, False)


def test_a_few_far_differences_stand_at_the_edge():
    scale, beyond = difference_axis(np.array([0.01] * 99 + [0.9]), [0.02])
    assert beyond
    assert scale.high < 0.1


def test_infinite_differences_stand_at_the_edge():
    scale, beyond = difference_axis(np.array([1.0, INF, -INF]), [])
    assert beyond
    text = str(differences_strip(np.array([1.0, INF, -INF]), scale, "t", interval=None, limit=9))
    assert "M1000 " in text
    assert "M0 " in text
    assert "nan" not in text


def test_no_difference_at_all_has_a_scale():
    scale, beyond = difference_axis(np.zeros(4), [0.0, 0.0])
    assert (scale.place(0.0), beyond) == (0.5, False)


def test_equal_methods_stand_on_the_diagonal():
    text = str(against(np.array([0.8, 1.0]), np.array([0.8, 1.0]), ("a", "b"), "t", limit=9))
    even = [
        float(number) for number in re.search(r'class="even" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', text).groups()
    ]
    dots = [[float(x), float(y)] for x, y in re.findall(r"M([\d.]+) ([\d.]+)h", text)]
    # 0.8 is where the axis begins, 1 where it ends
    assert np.allclose(dots, [even[:2], even[2:]], atol=0.06)


# ---- the command line


def test_the_verb_writes_the_folder_and_says_where(report, tmp_path, capsys):
    folders = [report("ours", values(12, gain=0.1)), report("theirs", values(12))]
    assert run(["compare", *map(str, folders), "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert ALL_LABELS in shown
    assert "ours is better than theirs by 0.100 mean Dice" in shown
    assert shown.rstrip().endswith(f"Comparison: {tmp_path / 'out' / 'compare.html'}")


def test_the_verb_takes_names(report, tmp_path, capsys):
    a, b = report("a", values(3)), report("b", values(3, seed=1))
    assert run(["compare", f"first={a}", f"second={b}", "-o", str(tmp_path / "out")]) == 0
    assert "first − second" in capsys.readouterr().out


def test_one_report_is_a_wrong_call(report, tmp_path, capsys):
    assert run(["compare", str(report("a", values(3))), "-o", str(tmp_path / "out")]) == 2
    assert "expected two or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_report_is_a_wrong_call(report, tmp_path, capsys):
    arguments = ["compare", str(report("a", values(3))), str(tmp_path), "-o", str(tmp_path / "out")]
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert "no report found" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_help_has_an_example(capsys):
    assert run(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example: medseg compare" in shown
    assert "--output" in shown
