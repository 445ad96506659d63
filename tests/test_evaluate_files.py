"""Files for other tools: nnU-Net's summary, the label tables of 3D Slicer and ITK-SNAP; read by the rules of each."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from geometry import save

from medseg.errors import DataError
from medseg.evaluate import EvaluateOptions
from medseg.evaluate.label_tables import slicer_table, snap_table
from medseg.report import evaluate

REFERENCE = np.array([[[1, 1, 1, 2, 2, 0, 0, 9]]], np.uint8)
PREDICTION = np.array([[[1, 1, 2, 2, 0, 0, 0, 1]]], np.uint8)
NOTHING = np.zeros_like(REFERENCE)


@pytest.fixture
def nnunet(tmp_path: Path):
    """Writes cases a and b (nothing in b but label 1 of the prediction) and reads back what nnU-Net would."""

    def made(**options) -> dict:
        for folder, maps in (("pred", (PREDICTION, NOTHING + 1)), ("ref", (REFERENCE, NOTHING))):
            (tmp_path / folder).mkdir()
            for case, array in zip("ab", maps):
                save(tmp_path / folder / f"{case}.nii.gz", array, np.eye(4))
        report = evaluate(tmp_path / "pred", tmp_path / "ref", EvaluateOptions(**options))
        folder = report.save(tmp_path / "report", nnunet_summary=True)
        return load_as_nnunet((folder / "nnunet_summary.json").read_text())

    return made


def load_as_nnunet(text: str) -> dict:
    """Keys become numbers, or tuples where they are no number, as nnU-Net's loader takes them."""

    def key(name: str):
        return int(name) if name.isdecimal() else tuple(int(part) for part in name.strip("()").split(","))

    found = json.loads(text)
    found["mean"] = {key(name): values for name, values in found["mean"].items()}
    for case in found["metric_per_case"]:
        case["metrics"] = {key(name): values for name, values in case["metrics"].items()}
    return found


def test_nnunet_summary_has_its_counts(nnunet) -> None:
    found = nnunet(labels={"one": 1, "two": 2, "ignore": 9})
    first = found["metric_per_case"][0]
    # seven voxels are judged: the last one is ignored
    assert first["metrics"][1] == {
        "TP": 2,
        "FP": 0,
        "FN": 1,
        "TN": 4,
        "n_pred": 2,
        "n_ref": 3,
        "Dice": pytest.approx(4 / 5),
        "IoU": pytest.approx(2 / 3),
    }
    assert [Path(first[name]).name for name in ("reference_file", "prediction_file")] == ["a.nii.gz", "a.nii.gz"]


def test_nnunet_summary_keeps_nan_and_leaves_it_out_of_means_over_cases(nnunet) -> None:
    found = nnunet(labels={"one": 1, "two": 2, "ignore": 9})
    assert math.isnan(found["metric_per_case"][1]["metrics"][2]["Dice"])
    assert found["mean"][2]["Dice"] == pytest.approx(1 / 2)
    assert found["mean"][1]["FP"] == pytest.approx((0 + 8) / 2)
    assert found["foreground_mean"]["Dice"] == pytest.approx((4 / 5 + 0) / 2 / 2 + 1 / 2 / 2)


def test_nnunet_summary_calls_regions_as_tuples(nnunet) -> None:
    found = nnunet(labels={"both": (1, 2), "one": 1})
    assert list(found["mean"]) == [(1, 2), 1]
    assert found["metric_per_case"][0]["metrics"][1, 2]["n_ref"] == 5


def read_as_slicer(text: str) -> dict[int, tuple[str, tuple[float, ...]]]:
    """Comments begin with #; else value, name without spaces (ticks around it go), and four numbers of 0–255."""
    found = {}
    for line in text.splitlines():
        assert len(line.encode()) < 1024
        if line and not line.startswith("#"):
            value, name, *colour = line.split(" ")
            found[int(value)] = name.strip("'"), tuple(float(part) for part in colour)
    return found


def read_as_snap(text: str) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Comments begin with #; else seven numbers, and what stands between the first two quotation marks."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = re.match(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\S+)\s+([01])\s+([01])\s*"([^"]+)"', line)
            assert match is not None, line
            found[int(match[1])] = match[8], tuple(int(match[n]) for n in (2, 3, 4, 6, 7))
    return found


NAMES = {'left "small" lobe': 1, "vena cava": 2, "ʻaorta\n#": 7, "#": 8}
COLOURS = dict(zip(NAMES, ("#E69F00", "#56B4E9", "#000001", "#FFFFFF")))


def test_slicer_reads_every_label_with_its_colour() -> None:
    assert read_as_slicer(slicer_table(NAMES, COLOURS)) == {
        0: ("Background", (0, 0, 0, 0)),
        1: ('left_"small"_lobe', (230, 159, 0, 255)),
        2: ("vena_cava", (86, 180, 233, 255)),
        7: ("ʻaorta_#", (0, 0, 1, 255)),
        8: ("#", (255, 255, 255, 255)),
    }
    assert slicer_table(NAMES, COLOURS).startswith("# Color table file")


def test_snap_reads_every_label_with_its_colour() -> None:
    assert read_as_snap(snap_table(NAMES, COLOURS)) == {
        0: ("Clear Label", (0, 0, 0, 0, 0)),
        1: ("left 'small' lobe", (230, 159, 0, 1, 1)),
        2: ("vena cava", (86, 180, 233, 1, 1)),
        7: ("ʻaorta #", (0, 0, 1, 1, 1)),
        8: ("#", (255, 255, 255, 1, 1)),
    }


@pytest.mark.parametrize(("write", "read"), [(slicer_table, read_as_slicer), (snap_table, read_as_snap)])
def test_values_of_regions_are_named_by_all_that_hold_them(write, read) -> None:
    labels = {"whole": (1, 2, 4), "core": (1, 4), "enhancing": 4}
    text = write(labels, {"whole": "#0000FF", "core": "#00FF00", "enhancing": "#FF0000"})
    found = read(text)
    assert {value: name for value, (name, _) in found.items() if value} == {
        1: "whole+core",
        2: "whole",
        4: "enhancing",
    }
    # of several regions the smallest gives its colour
    assert [found[value][1][:3] for value in (1, 2, 4)] == [(0, 255, 0), (0, 0, 255), (255, 0, 0)]
    assert "# whole is the region of the values 1, 2, 4\n" in text


@pytest.mark.parametrize(
    ("write", "read", "most"), [(slicer_table, read_as_slicer, 32768), (snap_table, read_as_snap, 65535)]
)
def test_values_that_the_reader_cannot_take_are_left_out_with_a_word(write, read, most: int) -> None:
    text = write({"last": most, "beyond": most + 1}, {"last": "#000000", "beyond": "#000000"})
    assert list(read(text)) == [0, most]
    assert f"# value {most + 1} is above {most} and left out\n" in text


@pytest.mark.parametrize(("write", "read"), [(slicer_table, read_as_slicer), (snap_table, read_as_snap)])
@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_a_label_without_a_name_is_called_by_its_value(write, read, name: str) -> None:
    assert read(write({name: 5}, {name: "#000000"}))[5][0] == "5"


@pytest.mark.parametrize(("write", "read"), [(slicer_table, read_as_slicer), (snap_table, read_as_snap)])
def test_a_long_name_fits_a_line(write, read) -> None:
    name = "ü" * 3000
    shown = read(write({name: 5}, {name: "#000000"}))[5][0]
    assert shown == "ü" * len(shown)
    assert len(shown) > 100


def test_a_report_holds_one_report(nnunet, tmp_path: Path) -> None:
    nnunet(labels={"one": 1, "two": 2})
    kept = {"metrics.csv", "summary.json", "report.html", "labels.ctbl", "labels.label"}
    (tmp_path / "report" / "notes.txt").write_text("mine")
    (tmp_path / "report" / "lesions.csv").write_text("of an earlier report")
    evaluate(tmp_path / "pred", tmp_path / "ref").save(tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == kept | {"notes.txt"}


def test_a_report_that_cannot_be_written_whole_leaves_the_old_one(nnunet, tmp_path: Path) -> None:
    nnunet(labels={"one": 1, "two": 2})
    before = (tmp_path / "report" / "metrics.csv").read_bytes()
    (tmp_path / "report" / "labels.label").unlink()
    # a folder in the place of the last file
    (tmp_path / "report" / "report.pdf").mkdir()
    with pytest.raises(DataError, match=r"report\.pdf"):
        evaluate(tmp_path / "pred", tmp_path / "ref", EvaluateOptions(labels={"other": 2})).save(
            tmp_path / "report", pdf=True
        )
    assert (tmp_path / "report" / "metrics.csv").read_bytes() == before
