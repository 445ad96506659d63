"""The ablation: comparing, judging claims, counting discs, running trials once, and the page; training is elsewhere."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK
from skimage.io import imread, imsave
from tiny import write_two_channels

import medseg
from medseg_pipelines import processes, trials
from medseg_pipelines import trial as trial_process
from medseg_pipelines.ablation import INTERRUPTED, OK, SOME_FAILED, USAGE, run
from medseg_pipelines.claims import CLAIMS, Claim, Contrast, Variant, choose_claims, judge
from medseg_pipelines.compare import Outcome, difference, mean_of, outcome
from medseg_pipelines.digest import data_sha256
from medseg_pipelines.discs import DIAMETERS, NAME, make_discs, measure_discs
from medseg_pipelines.lineup import Entry, Planner, structure
from medseg_pipelines.markdown import markdown
from medseg_pipelines.page import render, short
from medseg_pipelines.results import Setup, make_record, table_text
from medseg_pipelines.trials import Trial, TrialResult, refuse_other_settings, run_trial


def rows(**dice: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Rows of a result.json: by label and case; None: neither map has the label."""
    return [
        {"case": case, "name": label, "status": "both_empty" if value is None else "ok", "dice": value}
        for label, of in dice.items()
        for case, value in of.items()
    ]


def scored(values: Sequence[float], measure: str = "dice") -> Outcome:
    return Outcome({measure: {f"case{n}": v for n, v in enumerate(values)}}, {}, (), 0, 0)


# ---- from rows to numbers


def test_a_case_counts_the_mean_of_the_labels_that_it_has() -> None:
    found = outcome([{"rows": rows(a={"x": 0.2, "y": 0.5}, b={"x": 0.6, "y": None})}])
    assert found.scores["dice"] == {"x": pytest.approx(0.4), "y": 0.5}
    assert found.labels["b"] == {"x": 0.6}


def test_seeds_are_averaged_by_case() -> None:
    found = outcome([{"rows": rows(a={"x": 0.2, "y": 0.4})}, {"rows": rows(a={"x": 0.6, "y": 0.4})}])
    assert found.scores["dice"] == {"x": pytest.approx(0.4), "y": 0.4}
    assert found.by_seed == (pytest.approx(0.3), 0.5)


def test_missed_and_spurious_labels_are_counted_by_seed() -> None:
    one = rows(a={"x": 0.0, "y": 0.0, "z": 0.5})
    one[0]["status"], one[1]["status"] = "missed", "spurious"
    found = outcome([{"rows": one}, {"rows": rows(a={"x": 0.1, "y": 0.1, "z": 0.1})}])
    assert (found.missed, found.spurious) == (0.5, 0.5)


def test_a_case_without_a_mask_has_no_dice() -> None:
    one = rows(a={"x": 0.0, "y": 0.4})
    one[0]["status"] = "missing_prediction"
    found = outcome([{"rows": one}])
    assert found.scores["dice"] == {"y": 0.4}
    assert (found.cases, found.without_mask) == (("x", "y"), ("x",))


def test_a_case_that_failed_is_without_a_mask() -> None:
    found = outcome([{"rows": rows(a={"x": 0.5}), "failed_cases": {"z": "no memory"}}])
    assert (found.cases, found.without_mask) == (("x", "z"), ("z",))


def test_a_difference_is_paired_and_leaves_out_cases_that_one_lacks() -> None:
    first = Outcome({"dice": {"a": 0.9, "b": 0.5, "c": 0.1}}, {}, (), 0, 0)
    second = Outcome({"dice": {"a": 0.7, "b": 0.5, "d": 1.0}}, {}, (), 0, 0)
    found = difference(first, second)
    assert found is not None
    assert (found.n, found.mean) == (2, pytest.approx(0.1))
    assert (found.first, found.second) == (pytest.approx(0.7), pytest.approx(0.6))


def healthy(*seeds: float | None) -> Outcome:
    """A healthy case beside one of Dice 0.5; `seeds`: None where its mask is rightly empty, 0 where it is not."""
    return outcome([{"rows": rows(a={"sick": 0.5, "well": dice})} for dice in seeds])


def test_each_seed_that_rightly_leaves_a_case_empty_counts() -> None:
    once = healthy(None, 0.0)
    # half of two seeds less 1, over two cases of which the other does not differ
    for other, mean in ((healthy(None, None), -0.25), (healthy(0.0, 0.0), 0.25), (healthy(0.0, None), 0.0)):
        found = difference(once, other)
        assert found is not None
        assert found.mean == pytest.approx(mean)
    # the Dice that is told is of masks and references that have something, as before
    assert once.scores["dice"] == {"sick": 0.5, "well": 0.0}


def test_a_seed_without_a_mask_is_no_empty_one() -> None:
    lacks = rows(a={"well": None})
    lacks[0]["status"] = "missing_prediction"
    for seed in ({"rows": lacks}, {"rows": [], "failed_cases": {"well": "no memory"}}):
        found = outcome([{"rows": rows(a={"well": None})}, seed, {"rows": rows(a={"well": 0.0})}])
        assert found.empty_share == {"well": 0.5}


def test_an_interval_of_a_difference_is_narrow_where_the_cases_agree() -> None:
    hard_and_easy = np.linspace(0.1, 0.9, 9)
    found = difference(scored(hard_and_easy + 0.02), scored(hard_and_easy))
    assert found is not None
    assert found.ci95 is not None
    # every case differs by 0.02 up to rounding, though Dice itself runs from 0.1 to 0.9
    assert found.ci95 == (pytest.approx(0.02, abs=1e-9), pytest.approx(0.02, abs=1e-9))


def test_there_is_no_difference_to_what_has_no_result() -> None:
    assert difference(scored([1.0]), None) is None
    assert difference(scored([1.0]), scored([1.0], "small")) is None


def test_cases_of_one_patient_are_drawn_together() -> None:
    scores = {f"case{n}": float(n % 2) for n in range(8)}
    assert mean_of(scores)["ci95"] is not None
    two_patients = {f"case{n}": f"patient{n % 2}" for n in range(8)}
    assert mean_of(scores, groups=two_patients)["ci95"] is None


# ---- claims

A, B = Variant("a", {"name": "x"}), Variant("b", {"name": "y"})
CLAIM = Claim("ab", "Is a better than b?", "It is.", (A, B), (Contrast("a", "b"),))
BASE = [0.4, 0.5, 0.6, 0.7, 0.8]


@pytest.mark.parametrize(
    ("shifts", "word"),
    [
        ([0.1, 0.12, 0.08, 0.1, 0.11], "holds"),
        ([-0.1, -0.12, -0.08, -0.1, -0.11], "does not hold"),
        ([0.1, -0.1, 0.1, -0.1, 0.02], "not decided"),
    ],
)
def test_a_verdict_follows_the_interval(shifts: list[float], word: str) -> None:
    better = [b + s for b, s in zip(BASE, shifts)]
    assert judge(CLAIM, {"a": scored(better), "b": scored(BASE)}).word == word


def test_a_verdict_says_its_numbers() -> None:
    verdict = judge(CLAIM, {"a": scored([v + 0.1 for v in BASE]), "b": scored(BASE)})
    assert verdict.sentence.startswith("Holds: a against b, Dice +0.100 (95 % +0.100 to +0.100; 5 cases)")
    assert "(0.700 and 0.600)" in verdict.sentence


def test_a_claim_without_results_is_not_measured_and_says_what_is_missing() -> None:
    verdict = judge(CLAIM, {"a": scored(BASE)})
    assert verdict.word == "not measured"
    assert "(b has no result)" in verdict.sentence


def test_a_claim_of_two_contrasts_needs_both() -> None:
    claim = Claim("abc", "?", "!", (A, B), (Contrast("a", "b"), Contrast("a", "c")))
    more = scored([v + 0.1 for v in BASE])
    assert judge(claim, {"a": more, "b": scored(BASE)}).word == "not decided"
    assert judge(claim, {"a": more, "b": scored(BASE), "c": scored(BASE)}).word == "holds"
    assert judge(claim, {"a": scored(BASE), "b": more, "c": scored([0.1] * 5)}).word == "does not hold"


def test_every_contrast_is_between_variants_of_its_claim() -> None:
    for claim in CLAIMS:
        names = {v.name for v in claim.variants}
        assert {n for c in claim.contrasts for n in (c.better, c.worse)} <= names, claim.name


def test_a_variant_name_stands_for_one_thing() -> None:
    variants = [v for claim in CLAIMS for v in claim.variants]
    for variant in variants:
        assert all(v == variant for v in variants if v.name == variant.name)


def test_claims_are_chosen_by_name() -> None:
    assert choose_claims("none") == ()
    assert choose_claims("all") == CLAIMS
    assert [c.name for c in choose_claims("gridding, rates,gridding")] == ["gridding", "rates"]
    with pytest.raises(medseg.ConfigError, match="there is no `griding`"):
        choose_claims("griding")


def test_rates_beyond_the_map_are_all_as_large_as_it_or_larger() -> None:
    config = medseg.make_config(
        {"windows": {"patch_size": [40, 56, 40]}, "network": {"output_stride": 4, "aspp_rates": [1, 2, 4]}}
    )
    assert Variant("v", {}, rates_beyond_map=True).settings(config) == {"aspp_rates": [14, 28, 42]}


# ---- discs


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_discs(tmp_path_factory.mktemp("discs"), pictures=2)


def test_discs_have_the_area_of_their_diameter_and_never_touch(discs: Path) -> None:
    table = json.loads((discs / NAME).read_text())["discs"]
    area = sum(math.pi * d**2 / 4 for *_, d in table["discs_000"])
    label = imread(discs / "labels" / "discs_000.png")
    # pixels whose centres lie in a disc: their number differs from its area by a few along the edge
    assert label.sum() == pytest.approx(area, rel=0.03)
    centres = [(r, c, d) for r, c, d in table["discs_000"]]
    gaps = [
        math.hypot(r - s, c - t) - (d + e) / 2 for n, (r, c, d) in enumerate(centres) for s, t, e in centres[n + 1 :]
    ]
    assert min(gaps) > 8


def test_the_same_discs_are_made_again_and_finished_ones_stay(discs: Path, tmp_path: Path) -> None:
    again = make_discs(tmp_path, pictures=2)
    assert (again / "images" / "discs_001.png").read_bytes() == (discs / "images" / "discs_001.png").read_bytes()
    (again / "images" / "discs_001.png").write_bytes(b"mine")
    make_discs(tmp_path, pictures=2)
    assert (again / "images" / "discs_001.png").read_bytes() == b"mine"


def test_a_perfect_mask_finds_all_discs(discs: Path) -> None:
    found = measure_discs(discs / "labels", discs)
    assert list(found["diameters"]) == [str(d) for d in DIAMETERS]
    assert all(v == {"discs": 4, "found": 1, "dice": 1, "recall": 1} for v in found["diameters"].values())
    assert found["scores"]["small_beyond_large"] == {"discs_000": 0, "discs_001": 0}


def test_a_mask_without_the_small_discs_is_told_so(discs: Path, tmp_path: Path) -> None:
    mask = imread(discs / "labels" / "discs_000.png")
    table = json.loads((discs / NAME).read_text())["discs"]["discs_000"]
    for row, column, diameter in table:
        if diameter < 16:
            reach = diameter // 2 + 2
            mask[int(row) - reach : int(row) + reach + 1, int(column) - reach : int(column) + reach + 1] = 0
    imsave(tmp_path / "discs_000.png", mask, check_contrast=False)
    found = measure_discs(tmp_path, discs)
    assert found["scores"]["small"] == {"discs_000": 0}
    assert found["scores"]["large"] == {"discs_000": 1}
    assert {d: v["found"] for d, v in found["diameters"].items()} == {
        **dict.fromkeys(("4", "6", "8", "12"), 0),
        **dict.fromkeys(("16", "24", "32"), 1),
    }


# ---- trials


def make_trial(folder: Path, *, data: str = "a digest", place: str = "data", **train: Any) -> Trial:
    config = medseg.make_config({"train": train})
    return Trial(folder / "run", "net", 0, folder / place, data, config, 0, 5, "cpu")


class Attempts:
    """Stands in for the process of a trial: ends with each of `codes` in turn and writes what it would write."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.seen: list[set[str]] = []

    def __call__(self, folder: Path, quiet_s: float) -> int:
        self.seen.append({p.name for p in folder.iterdir()})
        code = self.codes.pop(0)
        (folder / "last.pt").write_text("state")
        if code == 0:
            (folder / "result.json").write_text(json.dumps({"steps": 7}))
        elif code > 0:
            (folder / "failure.json").write_text(json.dumps({"reason": f"broke with {code}"}))
        return code


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(*codes: int) -> Attempts:
        stand_in = Attempts(*codes)
        monkeypatch.setattr(trials, "_attempt", stand_in)
        return stand_in

    return use


def test_a_finished_trial_is_not_done_again(tmp_path: Path, attempts: Any) -> None:
    attempts(0)
    trial = make_trial(tmp_path)
    assert run_trial(trial, cache=tmp_path / "cache").content == {"steps": 7}
    again = run_trial(trial, cache=tmp_path / "cache")
    assert (again.reused, again.content) == (True, {"steps": 7})
    assert {p.name for p in trial.folder.iterdir()} == {"job.json", "result.json"}


def test_a_trial_of_other_settings_begins_anew(tmp_path: Path, attempts: Any) -> None:
    used = attempts(0, 0)
    run_trial(make_trial(tmp_path), cache=tmp_path / "cache")
    other = make_trial(tmp_path, batch_size=1)
    assert not run_trial(other, cache=tmp_path / "cache", overwrite=True).reused
    assert used.seen[1] == {"job.json", "cache"}


def test_a_trial_of_changed_data_begins_anew_and_of_moved_data_does_not(tmp_path: Path, attempts: Any) -> None:
    attempts(0, 0)
    run_trial(make_trial(tmp_path), cache=tmp_path / "cache")
    assert run_trial(make_trial(tmp_path, place="moved"), cache=tmp_path / "cache").reused
    assert not run_trial(make_trial(tmp_path, data="another"), cache=tmp_path / "cache", overwrite=True).reused


def test_a_finished_trial_of_other_settings_is_refused(tmp_path: Path, attempts: Any) -> None:
    attempts(0)
    run_trial(make_trial(tmp_path, batch_size=2), cache=tmp_path / "cache")
    refuse_other_settings([make_trial(tmp_path, batch_size=2)])
    with pytest.raises(medseg.ConfigError, match=r"train.batch_size: 2 there, 1 asked.*--overwrite"):
        refuse_other_settings([make_trial(tmp_path, batch_size=1)])
    with pytest.raises(medseg.ConfigError, match="data_sha256"):
        refuse_other_settings([make_trial(tmp_path, batch_size=2, data="another")])


def begin(trial: Trial, medseg_version: str = medseg.__version__) -> Path:
    """The state of a trial that was begun and not finished."""
    trial.folder.mkdir(exist_ok=True)
    (trial.folder / "job.json").write_text(json.dumps({**trial.job, "medseg": medseg_version}))
    state = trial.folder / "last.pt"
    state.write_text("ten hours")
    return state


def test_a_begun_training_of_other_settings_stays_unless_it_is_to_be_replaced(tmp_path: Path, attempts: Any) -> None:
    used, other = attempts(0), make_trial(tmp_path, batch_size=1)
    state = begin(make_trial(tmp_path, batch_size=2))
    told = r"holds a begun training of something else \(config.train.batch_size: 2 there, 1 asked\).*--overwrite"
    with pytest.raises(medseg.ConfigError, match=told):
        refuse_other_settings([other])
    # it came there after all were looked at
    assert re.search(told, str(run_trial(other, cache=tmp_path / "cache").reason))
    assert (used.seen, state.read_text()) == ([], "ten hours")
    assert run_trial(other, cache=tmp_path / "cache", overwrite=True).reason is None
    assert used.seen == [{"job.json", "cache"}]


def test_what_a_trial_left_before_its_first_state_may_go(tmp_path: Path, attempts: Any) -> None:
    used = attempts(0)
    begin(make_trial(tmp_path, batch_size=2)).unlink()
    refuse_other_settings([make_trial(tmp_path, batch_size=1)])
    assert run_trial(make_trial(tmp_path, batch_size=1), cache=tmp_path / "cache").reason is None
    assert used.seen == [{"job.json", "cache"}]


@pytest.mark.parametrize("kept", ["last.pt", "result.json"])
@pytest.mark.parametrize(("text", "word"), [('{"medseg": ', "damaged"), ("[]", "damaged"), (None, "missing")])
def test_a_run_that_does_not_say_what_it_is_of_stays(
    tmp_path: Path, attempts: Any, kept: str, text: str | None, word: str
) -> None:
    used, trial = attempts(), make_trial(tmp_path)
    begin(trial).rename(trial.folder / kept)
    (trial.folder / "job.json").unlink()
    if text is not None:
        (trial.folder / "job.json").write_text(text)
    with pytest.raises(medseg.ConfigError, match=rf"job.json, which says of what, is {word}"):
        refuse_other_settings([trial])
    assert word in str(run_trial(trial, cache=tmp_path / "cache").reason)
    assert used.seen == []
    assert (trial.folder / kept).is_file()


def test_a_disk_that_is_away_for_a_moment_loses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    state = begin(make_trial(tmp_path))
    monkeypatch.setattr(Path, "read_text", away)
    with pytest.raises(OSError, match="Stale file handle"):
        run_trial(make_trial(tmp_path), cache=tmp_path / "cache", overwrite=True)
    assert state.exists()


def test_a_begun_training_goes_on_with_another_medseg_and_a_finished_one_is_refused(
    tmp_path: Path, attempts: Any
) -> None:
    used, trial = attempts(0), make_trial(tmp_path)
    begin(trial, "0.0.1")
    # a setting that the earlier one did not have
    job = json.loads((trial.folder / "job.json").read_text())
    del job["config"]["train"]["save_every_s"]
    (trial.folder / "job.json").write_text(json.dumps(job))
    with pytest.raises(medseg.ConfigError, match=r"train.batch_size: 4 there, 1 asked"):
        refuse_other_settings([make_trial(tmp_path, batch_size=1)])
    refuse_other_settings([trial])
    assert run_trial(trial, cache=tmp_path / "cache").reason is None
    assert "last.pt" in used.seen[0]
    assert json.loads((trial.folder / "job.json").read_text()) == trial.job
    (trial.folder / "job.json").write_text(json.dumps({**trial.job, "medseg": "0.0.1"}))
    with pytest.raises(medseg.ConfigError, match=r"a finished run of something else \(medseg: 0.0.1 there"):
        refuse_other_settings([trial])


def test_what_is_to_be_replaced_is_of_one_medseg(tmp_path: Path, attempts: Any) -> None:
    used, trial = attempts(0), make_trial(tmp_path)
    begin(trial, "0.0.1")
    assert run_trial(trial, cache=tmp_path / "cache", overwrite=True).reason is None
    assert used.seen == [{"job.json", "cache"}]


def test_a_digest_changes_with_the_data_and_not_with_their_place(tiny_dataset: Any, tmp_path: Path) -> None:
    folder = tiny_dataset(spatial_dims=2, cases=2)
    first = data_sha256(medseg.check_dataset(folder))
    moved = folder.rename(tmp_path / "moved")
    assert data_sha256(medseg.check_dataset(moved)) == first
    label = imread(moved / "labels" / "case0.png")
    label[0, 0] = 1
    imsave(moved / "labels" / "case0.png", label, check_contrast=False)
    assert data_sha256(medseg.check_dataset(moved)) != first


def test_voxels_beside_a_header_are_part_of_the_digest(tiny_dataset: Any) -> None:
    folder = tiny_dataset(spatial_dims=3, cases=1)
    (source,) = (folder / "images").iterdir()
    header = folder / "images" / "case0.mhd"
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(source)), str(header))
    source.unlink()
    first = data_sha256(medseg.check_dataset(folder))
    assert data_sha256(medseg.check_dataset(folder)) == first
    voxels = bytearray(header.with_suffix(".raw").read_bytes())
    voxels[0] ^= 1
    header.with_suffix(".raw").write_bytes(voxels)
    assert data_sha256(medseg.check_dataset(folder)) != first


def test_a_trial_that_breaks_down_is_gone_on_with_once(tmp_path: Path, attempts: Any) -> None:
    used = attempts(1, 0)
    assert run_trial(make_trial(tmp_path), cache=tmp_path / "cache").reason is None
    assert "last.pt" in used.seen[1]
    used = attempts(1, 1)
    assert (
        run_trial(replace(make_trial(tmp_path), folder=tmp_path / "other"), cache=tmp_path / "cache").reason
        == "broke with 1"
    )


def test_wrong_settings_are_tried_once(tmp_path: Path, attempts: Any) -> None:
    attempts(2)
    assert run_trial(make_trial(tmp_path), cache=tmp_path / "cache").reason == "broke with 2"


def test_a_killed_trial_says_that_memory_may_have_run_out(tmp_path: Path, attempts: Any) -> None:
    attempts(-9, -9)
    assert "memory" in str(run_trial(make_trial(tmp_path), cache=tmp_path / "cache").reason)


def end_of(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, quiet_s: float) -> int:
    """The end of a shell in the place of a trial, which has `folder` as $1."""
    start = subprocess.Popen
    monkeypatch.setattr(processes, "SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **more: start(["/bin/sh", "-c", script, "sh", str(folder)], **more)
    )
    return processes.attempt(folder, quiet_s)


def test_a_trial_lasts_as_long_as_it_makes_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 5 s in all; on a machine that is busy, a fortieth of it may take half
    script = 'for n in $(seq 40); do touch "$1/output.txt"; sleep 0.125; done; exit 7'
    assert end_of(script, tmp_path, monkeypatch, quiet_s=2.5) == 7


def test_a_trial_without_progress_is_stopped_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = end_of("exec sleep 60", tmp_path, monkeypatch, quiet_s=0.3)
    assert code == -signal.SIGALRM
    told = processes.reason_of(tmp_path, code, 0.3)
    assert told == f"made no progress for 0 s and was stopped; see {tmp_path / 'output.txt'}"


def test_a_trial_that_hangs_is_gone_on_with_once(tmp_path: Path, attempts: Any) -> None:
    attempts(-signal.SIGALRM, -signal.SIGALRM)
    trial = make_trial(tmp_path, time_budget_s=1000.0, validation_share=0.05, calibration_share=0.15)
    # an hour, and 0.2 of the training
    assert "made no progress for 3800 s" in str(run_trial(trial, cache=tmp_path / "cache").reason)


def test_progress_shows_and_the_same_again_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, file = [0.0], tmp_path / "output.txt"
    monkeypatch.setattr(trial_process, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pulse = trial_process.Pulse(file)

    def shows(stage: str, done: float, detail: str = "", *, after_s: float) -> bool:
        now[0] += after_s
        file.unlink(missing_ok=True)
        pulse(stage, done, 9, detail)
        return file.exists()

    assert shows("check", 0, after_s=0)
    assert not shows("check", 1, after_s=1)
    assert shows("check", 2, after_s=6)
    assert shows("infer", 2, "9 s left", after_s=6)
    assert not shows("infer", 2, "8 s left", after_s=6)
    assert shows("infer", 2.1, "8 s left", after_s=6)
    # a disk that is away ends nothing
    now[0] += 6
    trial_process.Pulse(tmp_path / "away" / "output.txt")("infer", 3, 9)


def test_a_trial_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object, progress: Any, **__: object) -> None:
        progress("check", 1, 9)
        raise medseg.DataError("seen")

    monkeypatch.setattr(medseg, "train", train)
    (tmp_path / "job.json").write_text(json.dumps(make_trial(tmp_path).job))
    assert trial_process.run(tmp_path) == 2
    assert (tmp_path / "output.txt").is_file()


@pytest.mark.parametrize(("trained", "whole", "told"), [(100.0, 250.0, 250.0), (100.0, 40.0, 100.0)])
def test_the_memory_of_a_trial_on_a_gpu_is_the_most_of_all_stages(
    trained: float, whole: float, told: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = make_trial(tmp_path)
    trial.folder.mkdir()
    (trial.folder / "job.json").write_text(json.dumps(trial.job))
    training = {"steps": 7, "seconds": 1.0, "device": "cuda:0", "precision": "32", "gpu_memory_mb": trained}
    (trial.folder / "model.json").write_text(json.dumps({"training": training}))
    report = SimpleNamespace(table=pd.DataFrame(columns=["case", "name", "status", "dice"]), failures=())
    done = SimpleNamespace(report=report, results=(), seconds={}, gpu_memory_mb=whole)
    monkeypatch.setattr(medseg, "train", lambda *_, **__: done)
    assert trial_process.run(trial.folder) == 0
    assert json.loads((trial.folder / "result.json").read_text())["peak_memory_mb"] == told


def test_an_interrupted_trial_interrupts(tmp_path: Path, attempts: Any) -> None:
    attempts(130)
    with pytest.raises(KeyboardInterrupt):
        run_trial(make_trial(tmp_path), cache=tmp_path / "cache")


# ---- the command, end to end


@pytest.fixture
def command(tiny_dataset: Any, tiny_settings: tuple[str, ...], tmp_path: Path) -> list[str]:
    settings = [word for setting in tiny_settings for word in ("--set", setting)]
    ends = ["--networks", "deeplabv3,fcn32s", "--time-budget", "0.2s", "--folds", "2", "--device", "cpu"]
    return [str(tiny_dataset()), "-o", str(tmp_path / "out"), *ends, *settings]


@pytest.mark.slow
def test_networks_are_compared_and_one_that_fails_costs_no_other(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command) == SOME_FAILED
    # a patch of 16 is less than an FCN-32s takes
    assert "fcn32s" in capsys.readouterr().err.splitlines()[-1]
    text = (tmp_path / "out" / "ablation.json").read_text()
    record = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    done = {v["name"]: v for v in record["variants"] if v["status"] == "done"}
    assert set(done) == {"deeplabv3", "residual_unet"}
    assert all(v["steps"] >= 1 and v["peak_memory_mb"] > 50 and v["multiply_adds"] > 0 for v in done.values())
    assert done["deeplabv3"]["against_baseline"]["n"] == 2
    assert [f["name"] for f in record["failures"]] == ["fcn32s"]
    table = list(csv.DictReader((tmp_path / "out" / "ablation.csv").open()))
    assert {row["name"]: row["status"] for row in table}["fcn32s"] == "failed"
    page = (tmp_path / "out" / "ablation.html").read_text()
    assert all(name in page for name in ("deeplabv3", "residual_unet", "fcn32s"))
    assert "http" not in page.replace("http-equiv", "")
    # a second run trains nothing
    monkeypatch.setattr(trials, "_attempt", lambda *_: pytest.fail("trained again"))
    assert run(command) == SOME_FAILED
    again = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert again["variants"] == record["variants"]
    # nor does one with other settings, which would cost what is there
    assert run([*command, "--set", "train.batch_size=1"]) == USAGE
    assert "--overwrite" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())["variants"] == record["variants"]


def test_ctrl_c_is_130_and_says_how_to_go_on(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "_attempt", interrupt)
    assert run(command) == INTERRUPTED
    assert "goes on from here" in capsys.readouterr().err


def test_a_disk_that_is_full_after_the_first_run_is_no_wrong_usage(
    command: list[str], attempts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts(2, 2, 2)
    write = medseg.write_text
    written: list[str] = []

    def full(path: Path, text: str) -> None:
        written.append(path.name)
        if written.count("ablation.json") > 1:
            raise medseg.DataError(f"{path.parent}: cannot write {path.name} (No space left on device)")
        write(path, text)

    monkeypatch.setattr(medseg, "write_text", full)
    assert run(command) == SOME_FAILED
    told = capsys.readouterr().err
    assert "cannot write ablation.json (No space left on device); what is finished stays" in " ".join(told.split())
    # before the first one nothing was done
    assert run(command) == USAGE


@pytest.mark.parametrize("where", ["discs", "runs", "cache"])
def test_a_folder_that_cannot_be_written_is_one_message(
    where: str, command: list[str], tmp_path: Path, attempts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts(2, 2, 2)
    (tmp_path / "out").mkdir()
    # a file in the place of a folder: the superuser is refused, too
    (tmp_path / "out" / where).touch()
    words = [*command, "--claims", "small-structures"] if where == "discs" else command
    # the pictures of discs are made before anything is trained
    assert run(words) == (USAGE if where == "discs" else SOME_FAILED)
    last = " ".join(capsys.readouterr().err.split()).rpartition("error: ")[2]
    assert last.startswith(str(tmp_path / "out" / where))
    assert last.endswith(
        "; see to it and try again" if where == "discs" else "; what is finished stays, and the same command goes on"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--networks", "deeplabv33"], "there is no `deeplabv33`"),
        (["--claims", "everything"], "there is no `everything`"),
        (["--time-budget", "soon"], "--time-budget soon"),
        (["--networks", "monai.NoSuchNetwork"], "`monai.NoSuchNetwork` is none of"),
        (["--fold", "99"], "fold 99 asked, expected 0 to 1"),
        (["--set", "network.name=unet"], "choose some with --networks"),
        (["--set", "network.width=0.5"], "keep it with --equal none"),
        (["--set", "network.width=0.5", "--as-published"], "--as-published takes those of the papers"),
        (["--set", "train.seed=3"], "--seeds"),
        (["--set", "train.epochs=3"], "--time-budget"),
        (["--set", "train.time_budget_s=3"], "--time-budget"),
    ],
)
def test_wrong_use_is_told_before_anything_is_done(
    arguments: list[str], said: str, tiny_dataset: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(tiny_dataset()), "-o", str(tmp_path / "out"), "--folds", "2", *arguments]) == USAGE
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_are_looked_at_with_the_channels_that_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[medseg.Config] = []

    def note(_: object, __: object, planners: Mapping[str, Planner], **___: object) -> list[Entry]:
        planned.append(planners["given"].default)
        raise medseg.TrainingError("planned")

    monkeypatch.setattr("medseg_pipelines.ablation.line_up", note)
    dataset, out = write_two_channels(tmp_path / "set"), tmp_path / "out"
    run([str(dataset), "-o", str(out), "--folds", "2", "--set", "data.channels=[A,B]"])
    assert [config.data.channels for config in planned] == [("A", "B")]


@pytest.mark.parametrize("setting", ["data.channels=3", "data.chanels=[A,B]"])
def test_a_wrong_section_of_the_data_is_told(setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(tmp_path), "-o", str(tmp_path / "out"), "--set", setting]) == USAGE
    assert "--set: " in capsys.readouterr().err


def test_a_width_is_kept_where_nothing_is_made_equal(tmp_path: Path) -> None:
    settings = {"network": {"width": 0.5}}
    assert Planner(tmp_path, settings, device="cpu", equal="none").settings == settings


def test_help_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == OK
    assert "--time-budget" in capsys.readouterr().out


# ---- the record


def entry(name: str, data: str = "given") -> Entry:
    # the fields of a network without one: what is under test are the results
    return Entry(
        (name,), data, Path("data"), medseg.make_config({}), {"receptive_field": [9, 9], "field_is_exact": True}
    )


def result(name: str, **content: Any) -> TrialResult:
    numbers = {"steps": 5, "train_seconds": 1.0, "case_seconds": {}, "peak_memory_mb": 9.0, "stages": {}}
    where = {"device": "cpu", "precision": "float32"}
    return TrialResult(make_trial(Path(name)), {**numbers, **where, "rows": [], **content})


def make(*results: TrialResult, data: str = "given") -> dict[str, Any]:
    names = [r.trial.folder.parts[0] for r in results]
    setup = Setup("data", 60.0, 1, 0, 5, "none", False, "cpu", {"name": "unet"})
    entries = [entry(name, data) for name in names]
    return make_record(setup, entries, {n: [r] for n, r in zip(names, results)}, ())


def test_a_variant_without_a_mask_of_every_case_is_never_the_best() -> None:
    lacks = rows(a={"x": 0.0, "y": 0.9})
    lacks[0]["status"] = "missing_prediction"
    found = make(result("lacks", rows=lacks), result("whole", rows=rows(a={"x": 0.2, "y": 0.4})))
    assert found["best"] == "whole"
    counts = [(v["dice"]["n"], v["cases_held_back"], v["cases_without_mask"]) for v in found["variants"]]
    assert counts == [(1, 2, 1), (2, 2, 0)]
    assert [v["without_mask"] for v in found["variants"]] == [["x"], []]


def test_seeds_that_failed_are_counted_beside_those_that_are_done() -> None:
    done = result("net", rows=rows(a={"x": 0.2}))
    setup = Setup("data", 60.0, 2, 0, 5, "none", False, "cpu", {"name": "unet"})
    failed = TrialResult(make_trial(Path("net")), reason="broke")
    (found,) = make_record(setup, [entry("net", "given")], {"net": [done, failed]}, ())["variants"]
    assert (found["status"], found["seeds_failed"], len(found["by_seed"])) == ("partial", 1, 1)


def test_a_case_where_both_are_empty_keeps_none_from_being_the_best() -> None:
    assert make(result("net", rows=rows(a={"x": None, "y": 0.9})))["best"] == "net"


def test_what_cannot_be_judged_costs_no_other_variant() -> None:
    found = make(result("broken", rows=[{"case": "x"}]), result("whole", rows=rows(a={"x": 0.2})))
    assert [v["status"] for v in found["variants"]] == ["failed", "done"]
    assert [f["name"] for f in found["failures"]] == ["broken"]
    assert "cannot be judged" in found["failures"][0]["reason"]


@pytest.mark.parametrize("exact", [True, False])
def test_a_structure_says_whether_its_field_is_known(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    true = medseg.analyse
    monkeypatch.setattr(medseg, "analyse", lambda *a, **k: replace(true(*a, **k), field_is_exact=exact))
    values = {
        "data": {"channels": ["image"], "labels": {"a": 1}},
        "windows": {"patch_size": [16, 16, 16]},
        "network": {"name": "unet", "channels": [4, 8]},
    }
    assert structure(medseg.make_config(values))["field_is_exact"] is exact


# ---- the page


def variant(name: str, mean: float, **more: Any) -> dict[str, Any]:
    numbers = {"mean": mean, "ci95": [mean - 0.05, mean + 0.04], "n": 9}
    return {
        "name": name,
        "also": [],
        "network": name,
        "data": "given",
        "status": "done",
        "reason": None,
        "by_seed": [mean],
        "seed_sd": None,
        "dice": numbers,
        "labels": {"liver": numbers},
        "against_best": None,
        "against_baseline": {**numbers, "mean": -0.1, "ci95": [-0.2, -0.05]},
        "missed": 1.0,
        "spurious": 0.5,
        "parameters": 1_234_567,
        "multiply_adds": 2_000_000_000,
        "receptive_field": [31, 31],
        "coverage": 0.25,
        "field_is_exact": True,
        "cases_held_back": 9,
        "cases_without_mask": 0,
        "output_stride": 8,
        "sees_whole_image": False,
        "width": 0.5,
        "steps": 77,
        "step_seconds": 0.3,
        "case_seconds": 1.5,
        "peak_memory_mb": 900.0,
        "device": "cpu (2 threads)",
        **more,
    }


def record(*variants: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    setup = {
        "dataset": "nerves",
        "time_budget_s": 120.0,
        "seeds": 1,
        "fold": 0,
        "equal": "multiply-adds",
        "published": False,
        "reference": {"name": "deeplabv3plus", "multiply_adds": 2e9, "parameters": 3e6, "patch_size": [240, 256]},
    }
    return {
        "created": "2024-05-01T12:00:00+00:00",
        "medseg": "0.1.0",
        "setup": setup,
        "best": variants[0]["name"] if variants else None,
        "baseline": "residual_unet",
        "variants": list(variants),
        "claims": [],
        "failures": [],
        "definitions": {"Dice": "2TP"},
        **more,
    }


def test_a_page_shows_every_number_of_a_variant() -> None:
    page = render(record(variant("unet", 0.8)))
    for text in ("0.800", "0.750–0.840", "−0.100", "1.23 M", "2 G", "31 × 31", "0.25", "77", "900", "2 min"):
        assert text in page, text


def without_dice(name: str) -> dict[str, Any]:
    """A variant whose only case has no label in mask and reference, so that nothing is measured but time."""
    nothing = {"mean": None, "ci95": None, "n": 0}
    return variant(name, 0.0, dice=nothing, labels={"a": nothing, "b": nothing}, case_seconds=None)


def test_a_variant_without_a_dice_is_shown_last_on_the_page_and_in_markdown() -> None:
    both = record(without_dice("none"), variant("some", 0.8), best="some")
    lines = [line for line in markdown(both).splitlines() if line.startswith(("| none", "| some"))]
    assert [line.split(" |")[0] for line in lines] == ["| some", "| none"]
    assert lines[1].startswith("| none | –, 0 of 9 cases | – | – | –")
    page = render(both)
    assert page.index('scope="row">some') < page.index('scope="row">none')


def test_cells_of_markdown_hold_no_bar_and_no_break() -> None:
    odd = variant("a|b\nc", 0.8, labels={"x|y": {"mean": 0.5}, "z": {"mean": 0.5}})
    text = markdown(record(odd, failures=[{"name": "n", "reason": "one\ntwo"}]))
    assert "| a\\|b c |" in text
    assert "| x\\|y |" in text
    assert "Failed: n: one two" in text


def test_a_field_that_is_not_exact_is_not_known() -> None:
    found = record(variant("unet", 0.8, field_is_exact=False))
    assert "| not known |" in markdown(found)
    page = render(found)
    assert ">not known</td>" in page
    assert "31 × 31" not in page
    assert "0.25" not in page
    (row,) = csv.DictReader(io.StringIO(table_text(found)))
    assert (row["receptive_field"], row["coverage"]) == ("not known", "")


def test_cases_without_a_mask_are_told_and_the_head_is_of_the_best() -> None:
    lacks = variant("lacks", 0.9, cases_held_back=11, cases_without_mask=2)
    both = record(lacks, variant("whole", 0.8), best="whole")
    page = render(both)
    assert "9 of 11 cases" in page
    assert "2 without a mask" in page
    assert "<dd>whole<span>0.800," in page
    assert "9 of 11 cases, 2 without a mask |" in markdown(both)
    assert "none has a mask for every case" in render(record(lacks, best=None))


def test_variants_without_a_dice_are_counted_apart_from_cases_without_a_mask() -> None:
    lacks = variant("lacks", 0.9, cases_held_back=11, cases_without_mask=2, without_mask=["x0", "x1"])
    failed = {"name": "hdc", "data": "given", "status": "failed", "also": [], "reason": "broke"}
    listed = [{"name": f"lacks, seed 0, case x{n}", "reason": "no memory"} for n in range(2)]
    found = record(lacks, failures=[*listed, {"name": "hdc, seed 0", "reason": "broke"}])
    page = render({**found, "variants": [lacks, failed, without_dice("none")]})
    assert (
        "<dt>Without a Dice</dt><dd>2 variants<span>all others are done, 2 cases without a mask in 1 variant</span>"
        in page
    )
    assert "<dd>1 variant<span>all others are done</span>" in render(record(variant("unet", 0.8), without_dice("none")))
    waiting = {"name": "unet", "data": "given", "status": "waiting", "also": []}
    assert "<dd>0 variants<span>1 variant still to come</span>" in render({**record(), "variants": [waiting]})


def test_a_case_that_many_variants_lack_is_one_case() -> None:
    lacking = [variant(f"net{n}", 0.8, cases_without_mask=1, without_mask=["x0"]) for n in range(13)]
    page = render(record(*lacking))
    assert "<dd>0 variants<span>all are done, 1 case without a mask in 13 variants</span>" in page


def test_a_seed_that_failed_is_told_beside_the_variants() -> None:
    partial = variant("unet", 0.8, status="partial", seeds_failed=1)
    assert "<dd>0 variants<span>all are done, but 1 seed that failed</span>" in render(record(partial))


def test_a_shared_machine_is_mentioned_beside_the_steps() -> None:
    found = record(variant("unet", 0.8))
    assert "shared the machine" in markdown(found)
    assert "shared the machine" in render(found)


def test_a_page_before_the_first_result_says_what_is_to_come() -> None:
    waiting = {"name": "unet", "data": "given", "status": "waiting", "also": []}
    page = render({**record(), "variants": [waiting]})
    assert "Still to come: unet" in page
    assert "nothing is finished yet" in page


def test_a_page_shows_claims_with_their_verdict_and_escapes_what_is_foreign() -> None:
    claim = {
        "question": "Is it <b>better</b>?",
        "expectation": "Yes.",
        "verdict": "does not hold",
        "sentence": "Does not hold: a against b.",
        "contrasts": [{"better": "a", "worse": "b", "measure": "dice", "mean": -0.1, "ci95": [-0.2, -0.05]}],
    }
    failure = {"name": "hdc", "reason": "<script>alert(1)</script>"}
    page = render(record(variant("unet", 0.8), claims=[claim], failures=[failure]))
    assert 'class="pill bad">does not hold' in page
    assert "−0.200 to −0.050" in page
    assert "<b>better</b>" not in page
    assert "<script>alert" not in page


def test_names_in_the_figure_do_not_lie_on_each_other() -> None:
    page = render(record(*(variant(f"network{n}", 0.8 + n * 1e-4) for n in range(6))))
    first = page.split('id="figure-multiply_adds"')[1].split("</figure>")[0]
    heights = sorted(float(part.split(' y="')[1].split('"')[0]) for part in first.split('class="name"')[1:])
    assert len(heights) == 6
    assert min(np.diff(heights)) >= 15


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (2.276e9, "2.28 G"), (999, "999"), (0.25, "0.25")])
def test_large_numbers_are_shortened(value: float | None, text: str) -> None:
    assert short(value) == text
