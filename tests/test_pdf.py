"""The report on paper: whole sheets whatever the names, numbers and files are; what it says is the summary's."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.evaluate import EvaluateOptions, Evaluation
from medseg.report import evaluate
from medseg.report.paper import BOTTOM, TOP, Paper, fitted, plain_text, printable, wrapped
from medseg.report.pdf import MAX_AGREEMENT_PLOTS, write_pdf

HOSTILE = {
    "$x_{1}$ \\frac <script>": 1,
    "肝臓 печень ü 😀": 2,
    "n" * 200: 3,
    "الكبد\u202e left\nlung\x07": 4,
}


@pytest.fixture
def evaluation(tmp_path: Path):
    """Evaluates cases of shifted cubes; of case n the prediction is n voxels off."""

    def make(labels=None, *, cases=("a", "b", "c"), allow_missing=False, broken=()) -> Evaluation:
        labels = {"one": 1} if labels is None else labels
        for name in ("pred", "ref"):
            (tmp_path / name).mkdir()
        for n, case in enumerate(cases):
            reference = np.zeros((14, 12, max(8, len(labels) * 2)), np.uint8)
            for place, value in enumerate(labels.values()):
                reference[4:10, 4:8, 2 * place : 2 * place + 2] = value
            for name, array in (("pred", np.roll(reference, n, axis=0)), ("ref", reference)):
                nib.save(nib.Nifti1Image(array, np.diag([1, 2, 3, 1.0])), tmp_path / name / f"{case}.nii.gz")
        for case in broken:
            (tmp_path / "pred" / f"{case}.nii.gz").write_bytes(b"no")
        options = EvaluateOptions(labels=labels, allow_missing=allow_missing)
        return evaluate(tmp_path / "pred", tmp_path / "ref", options).evaluation

    return make


def pdf(made: Evaluation) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_pdf(made, file)
    return file.getvalue()


def n_pages(data: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", data))


def words(data: bytes, tmp_path: Path) -> str:
    """The text as a reader's program finds it."""
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed (Debian: poppler-utils)")
    (tmp_path / "read.pdf").write_bytes(data)
    done = subprocess.run(["pdftotext", "-layout", tmp_path / "read.pdf", "-"], capture_output=True, check=True)
    return done.stdout.decode("utf-8")


def test_the_numbers_of_the_summary_are_on_paper(evaluation, tmp_path):
    # the cubes are 6 wide: 0, 1 and 2 off give Dice 1, 5/6 and 4/6
    text = words(pdf(evaluation()), tmp_path)
    assert "3 cases compared with their references, 1 label" in text
    assert re.search(r"one +0\.833", text)
    for heading in ("Dice by label", "How Dice is spread", "Volumes", "Worst cases", "What the numbers mean"):
        assert heading in text


def test_text_is_kept_as_text(evaluation):
    data = pdf(evaluation())
    assert b"/CIDFontType2" in data
    assert b"/Type3" not in data


def test_the_same_evaluation_gives_the_same_bytes(evaluation):
    made = evaluation()
    assert pdf(made) == pdf(made)
    assert made.summary["created"][:10].replace("-", "").encode() in pdf(made)


def test_hostile_names_neither_fail_nor_warn_nor_become_formulas(evaluation, tmp_path):
    text = words(pdf(evaluation(HOSTILE, cases=("$a_{1}$ 肝 <b>", "b" * 150))), tmp_path)
    assert "$x_{1}$ \\frac" in text
    assert "$a_{1}$" in text
    assert "…" in text
    assert "□: a letter that this paper's font has not" in text


def test_117_labels_flow_over_sheets_with_all_names(evaluation, tmp_path):
    text = words(pdf(evaluation({f"organ_{n}": n for n in range(1, 118)}, cases=("a", "b", "c"))), tmp_path)
    assert set(re.findall(r"organ_\d+", text)) == {f"organ_{n}" for n in range(1, 118)}
    assert f"Shown are the {MAX_AGREEMENT_PLOTS} of 117 labels" in " ".join(text.split())


def test_failures_and_missing_predictions_are_named(evaluation, tmp_path):
    made = evaluation(cases=("good", "broken"), broken=("broken",))
    text = words(pdf(made), tmp_path)
    assert "1 of 2 cases in none of these numbers" in text
    assert "broken: not a NIfTI file" in text
    assert str(tmp_path) not in text


def test_nothing_is_said_of_letters_where_none_is_missing(evaluation, tmp_path):
    assert "□" not in words(pdf(evaluation()), tmp_path)


def test_one_case_has_neither_spread_nor_limits(evaluation, tmp_path):
    text = words(pdf(evaluation(cases=("only",))), tmp_path)
    assert "How Dice is spread" not in text
    assert "Volumes: prediction" not in text
    assert "too few cases for an interval" in text


def test_a_case_that_is_gone_is_shown_with_the_reason(evaluation, tmp_path):
    made = evaluation()
    (tmp_path / "pred" / "c.nii.gz").unlink()
    assert "No picture: " in words(pdf(made), tmp_path)


def test_subgroups_and_lesions_are_there_where_asked_for(evaluation, tmp_path):
    made = evaluation()
    group = {"column": "site", "value": "north", "n_cases": 2, "n_groups": 1, "small": True}
    group["foreground"] = {"dice": {"mean": 0.7512, "median": 0.75, "ci95": None}}
    counts = {"n_reference": 31, "n_prediction": 32, "tp": 28, "fn": 3, "fp": 4, "f1": 0.889, "pq": None}
    added = {"subgroups": [group], "lesions": {"rule": {}, "labels": {"one": counts}}}
    text = words(pdf(replace(made, summary={**made.summary, **added})), tmp_path)
    assert re.search(r"site: north \(few\) +2 +1 +0\.751 +– +0\.750", text)
    assert re.search(r"one +31 +32 +28 +3 +4 +0\.889 +–", text)
    assert "Subgroups" not in words(pdf(made), tmp_path)


def test_many_failures_are_counted_not_listed(evaluation):
    made = evaluation()
    failure = {"case": "x", "reason": "word " * 60}
    many = replace(made, summary={**made.summary, "failures": [failure] * 500})
    # summary, twelve failures of three lines, table, spread and volumes: 2; worst cases: 1; definitions: 1 or 2
    assert n_pages(pdf(many)) <= 5


def test_a_file_is_written_by_its_path(evaluation, tmp_path):
    write_pdf(evaluation(), tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")


# ---- paper


def test_a_line_is_cut_where_it_is_too_long():
    assert fitted("short", 1.0, 9) == "short"
    cut = fitted("x" * 100, 1.0, 9)
    assert cut.endswith("…")
    # an x of DejaVu Sans is 0.592 × 9 = 5.3 points wide, the dots are 9: (72 − 9) / 5.3 = 11.8
    assert cut == "x" * 11 + "…"


def test_nothing_fits_where_there_is_no_room():
    assert fitted("words", 0.01, 9) == "…"


def test_paragraphs_break_at_spaces_and_inside_long_words():
    lines = wrapped("one two " + "y" * 40, 1.0, 9)
    assert lines[0] == "one two"
    assert "".join(lines[1:]) == "y" * 40
    assert len(lines) > 2


def test_what_the_font_lacks_becomes_a_box():
    assert printable("a肝\nb\x00\udc80\u202ec") == "a□ b□□c"


def test_a_new_sheet_is_taken_when_there_is_no_room():
    paper = Paper()
    with plain_text():
        assert paper.room(1)
        assert not paper.room(1)
        paper.y = BOTTOM - 0.5
        assert paper.room(1)
    assert (paper.n_sheets, paper.y) == (2, TOP)


def test_a_long_paragraph_goes_on_over_sheets():
    paper = Paper()
    with plain_text():
        paper.paragraph("word " * 5000)
    assert paper.n_sheets > 2


def test_sheets_are_numbered(tmp_path):
    paper = Paper()
    with plain_text():
        paper.begin()
        paper.begin()
        paper.save(tmp_path / "two.pdf", title="Title", creator="x", created=datetime(2024, 5, 1, tzinfo=timezone.utc))
    data = (tmp_path / "two.pdf").read_bytes()
    assert n_pages(data) == 2
    assert "2 of 2" in words(data, tmp_path)
