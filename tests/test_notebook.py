"""What was found is not found again, whatever a kill has left of the file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from medseg.errors import DataError, TrainingError
from medseg.notebook import Notebook


def never() -> object:
    raise AssertionError("found again")


def test_what_was_found_is_not_found_again(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    first = Notebook(path, "one network")
    assert first.once(["trial", {"b": 1, "a": 2}, "case"], lambda: [0.1 + 0.2, 3]) == [0.1 + 0.2, 3]
    assert math.isnan(first.once(["nothing"], lambda: math.nan))
    again = Notebook(path, "one network")
    assert again.knows(["trial", {"a": 2, "b": 1}, "case"])
    assert not again.knows(["trial", {"a": 2}, "case"])
    assert again.once(["trial", {"a": 2, "b": 1}, "case"], never) == [0.1 + 0.2, 3]
    assert math.isnan(again.once(["nothing"], never))
    assert again.once(["trial", {"a": 2}, "case"], lambda: 5) == 5


def test_findings_of_something_else_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    Notebook(path, "one network").once(["x"], lambda: 1)
    assert Notebook(path, "another").once(["x"], lambda: 2) == 2
    # and what the first found is gone, since nobody knows when it comes back
    assert Notebook(path, "one network").once(["x"], lambda: 3) == 3


@pytest.mark.parametrize("left", [0.3, 0.6, 0.99])
def test_a_torn_line_costs_what_it_told(tmp_path: Path, left: float) -> None:
    path = tmp_path / "notes.jsonl"
    notes = Notebook(path, "network")
    for number in range(3):
        notes.once([number], lambda: "a finding")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    there = path.read_bytes().count(b"\n") - 1
    again, found = Notebook(path, "network"), []
    for number in range(3):
        again.once([number], lambda: found.append(0) or "a finding")
    assert len(found) == 3 - max(0, there)
    assert Notebook(path, "network").once([2], never) == "a finding"


def test_the_clock_counts_what_earlier_findings_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("medseg.notebook.time.perf_counter", lambda: now[0])

    def slow() -> int:
        now[0] += 7
        return 1

    first = Notebook(tmp_path / "notes.jsonl", "network")
    began = first.clock()
    first.once(["x"], slow)
    assert first.clock() - began == 7
    now[0] = 3.0
    again = Notebook(tmp_path / "notes.jsonl", "network")
    began = again.clock()
    again.once(["x"], never)
    assert again.clock() - began == 7


def test_without_a_file_nothing_is_kept() -> None:
    notes = Notebook(None, "")
    assert [notes.once(["x"], lambda n=n: n) for n in range(2)] == [0, 1]


@pytest.mark.parametrize(
    "line",
    [
        '{"about": "network"}',
        '{"key": ["x"], "seconds": null, "found": 1}',
        '{"key": ["x"], "seconds": Infinity, "found": 1}',
        '{"key": ["x"], "seconds": 1' + "0" * 400 + ', "found": 1}',
        '{"key": ["x"], "seconds": 1}',
        "[" * 100_000,
        "5",
        "\x00",
    ],
)
def test_a_line_that_is_none_of_ours_is_no_finding(tmp_path: Path, line: str) -> None:
    path = tmp_path / "notes.jsonl"
    Notebook(path, "network").once(["y"], lambda: 1)
    with path.open("a") as file:
        file.write(line + "\n")
    again = Notebook(path, "network")
    assert again.once(["x"], lambda: 2) == 2
    assert again.once(["y"], never) == 1


def test_a_file_that_is_whole_is_only_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.jsonl"
    Notebook(path, "network").once(["x"], lambda: 1)
    monkeypatch.setattr("medseg.notebook.write_text", lambda *_: pytest.fail("written anew"))
    before = path.read_text()
    Notebook(path, "network").once(["y"], lambda: 2)
    assert path.read_text().startswith(before)


def test_what_cannot_be_kept_is_told(tmp_path: Path) -> None:
    notes = Notebook(tmp_path / "notes.jsonl", "network")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "notes.jsonl").unlink()
    (tmp_path / "notes.jsonl").symlink_to(full)
    with pytest.raises(TrainingError, match=r"notes.jsonl: cannot be written \(No space.*finish it with --resume"):
        notes.once(["x"], lambda: 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot write folder"):
        Notebook(tmp_path / "folder", "network")
