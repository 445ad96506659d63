"""What is chosen when training ends: the fastest of equals, what surely helped, nothing where little is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model

from medseg.bench import Bench, Trial, case_dice, label_case, quick_dice
from medseg.calibrate import _choose_copies, _choose_windows, calibrate, shifts_within
from medseg.config import Config, DataConfig
from medseg.errors import ModelError, TrainingError
from medseg.grid import Grid
from medseg.infer import InferOptions, load_model
from medseg.model import chosen_settings, new_network, read_model, record_choices
from medseg.notebook import Notebook
from medseg.preprocess import Prepared
from medseg.quality import Evidence, QualityModel
from medseg.windows import views

CPU = torch.device("cpu")
# gains by case whose mean is not surely above 0, nor below
NOISE = np.array([[0.03], [-0.02], [0.02], [-0.025], [0.03], [-0.02], [0.02], [-0.02]])


class Threshold(torch.nn.Module):
    """Says `shell` where the image is above 0 and `core` where it is above 2; knows nothing of windows."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, *S) → logits (B, 3, *S)."""
        return 20 * torch.cat([-images, images * (images < 2), images - 2 + 18 * (images > 2)], dim=1)


def a_case(number: int, shape: tuple[int, ...] = (12, 10, 9)) -> Prepared:
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(number))
    image[:, :2] = 3.0
    label = (image[0] > 0).to(torch.uint8) + (image[0] > 2).to(torch.uint8)
    grid = Grid(shape, np.eye(4))
    return Prepared(f"case{number}", image, label, grid, grid, torch.zeros(1, 9))


def trial(name: str, dice: float, seconds: float, *, cases: int = 8, spread: float = 0.0, **settings: Any) -> Trial:
    noise = spread * np.random.default_rng(len(name)).normal(size=(cases, 1))
    return Trial(name, settings, np.full((cases, 1), dice) + noise, seconds)


def bench(ways: Mapping[str, Trial | None], **augment: Any) -> Any:
    """A bench whose trials have been made."""
    config = tiny_config(augment=augment)
    asked: list[str] = []

    def run(name: str, settings: Mapping[str, Any], *, expected: float = 0.0, keeping: float = 0.0) -> Trial | None:
        asked.append(name)
        found = ways.get(name)
        return None if found is None else Trial(name, settings, found.dice, found.seconds)

    return SimpleNamespace(
        config=config, cases=[a_case(0)], run=run, asked=asked, pools_locally=lambda settings: False, is_timed=True
    )


# ---- Dice on the network's grid


def test_a_perfect_network_has_a_dice_of_one() -> None:
    config, case = tiny_config(), a_case(0)
    assert quick_dice(config, Threshold(), [case], CPU, "32") == {"shell": 1.0, "core": 1.0}


def test_dice_of_a_case_by_hand() -> None:
    data = DataConfig(labels={"a": 4, "b": 9, "ignore": 7})
    label = torch.tensor([[1, 1, 0, 255]], dtype=torch.uint8)
    grid = Grid((1, 4), np.eye(3))
    case = Prepared("c", torch.zeros(1, 1, 4), label, grid, grid, torch.zeros(1, 9))
    found = case_dice(data, np.array([[1, 0, 1, 1]], np.uint8), case)
    # one of two found, one too many, one where nobody knows
    assert found[0] == pytest.approx(0.5)
    assert np.isnan(found[1])


def test_labels_are_those_of_the_whole_volume_whatever_the_windows() -> None:
    config, case = tiny_config(windows={"patch_size": [8, 8, 8], "mode": "whole"}), a_case(1)
    for windows in (config.windows, config.windows.model_copy(update={"mode": "blend", "overlap": 0.3})):
        way = config.model_copy(update={"windows": windows})
        found = label_case(way, case, lambda w: Threshold()(w).softmax(1), CPU)
        assert case.label is not None
        assert np.array_equal(found, case.label.numpy())


# ---- what is chosen


def test_the_fastest_way_within_a_thousandth_of_the_best_is_used() -> None:
    ways = {
        "overlap 0.25": trial("o", 0.9, 0.5),
        "whole": trial("w", 0.8985, 0.1),
        "large tiles": trial("l", 0.8995, 0.2),
    }
    found = _choose_windows(bench(ways), trial("as in training", 0.9, 1.0))
    assert found[-1].name == "large tiles"
    assert {t.name for t in found} == {"as in training", *ways}


def test_of_equally_fast_ways_the_plainer_is_used() -> None:
    ways = {"overlap 0.25": trial("o", 0.9, 0.5), "whole": trial("w", 0.9, 0.105), "large tiles": trial("l", 0.9, 0.1)}
    assert _choose_windows(bench(ways), trial("as in training", 0.9, 1.0))[-1].name == "whole"


def test_a_way_that_is_better_raises_the_bar() -> None:
    ways = {"overlap 0.25": trial("o", 0.95, 0.9)}
    assert _choose_windows(bench(ways), trial("as in training", 0.9, 0.1))[-1].name == "overlap 0.25"


def test_a_faster_way_that_a_few_cases_speak_against_is_not_used() -> None:
    usual, quick = trial("as in training", 0.9, 1.0), trial("o", 0.9, 0.1)
    # the same mean, and a hundredth lost in each of half of the cases
    quick.dice[:4] -= 0.01
    quick.dice[4:] += 0.01
    assert _choose_windows(bench({"overlap 0.25": quick}), usual)[-1].name == "as in training"


def test_a_way_that_paints_in_healthy_cases_is_worse_than_one_that_does_not() -> None:
    right, wrong = trial("right", 0.9, 1.0), trial("wrong", 0.9, 1.0)
    right.dice[:4], wrong.dice[:4] = np.nan, 0.0
    assert wrong.gain(right)[0] == pytest.approx(-0.5)
    assert right.gain(wrong)[0] == pytest.approx(0.5)
    # what both leave empty says nothing
    assert right.gain(right)[0] == 0


def test_where_every_case_is_one_window_there_is_nothing_to_choose() -> None:
    there = bench({})
    there.cases = [a_case(0, (8, 7, 8))]
    assert _choose_windows(there, trial("as in training", 0.9, 0.1))[-1].name == "as in training"
    assert there.asked == []


def test_whole_volumes_are_trusted_little_beyond_the_largest_one_seen() -> None:
    found = _choose_windows(bench({"whole": trial("w", 0.9, 0.1)}), trial("as in training", 0.9, 1.0))
    assert found[-1].settings["windows"] == {"mode": "whole", "whole_voxels": 12 * 10 * 9 * 3 // 2}


def test_copies_are_used_where_they_surely_help() -> None:
    base = trial("base", 0.8, 1.0, spread=0.05)
    better = Trial("flip", {}, base.dice + 0.01, 2.0)
    found = _choose_copies(bench({"flip": better, "scale": Trial("scale", {}, better.dice, 6.0)}, flip_axes=[0]), base)
    assert found[-1].name == "flip"
    assert found[-1].settings == {"windows": {"flip_axes": [0]}}


def test_copies_moved_within_the_stride_are_mirrored_in_turn() -> None:
    base = trial("base", 0.8, 1.0, spread=0.05)
    ways = {"flip": Trial("flip", {}, base.dice + 0.01, 2.0), "shift": Trial("shift", {}, base.dice + 0.02, 4.0)}
    there = bench(ways, flip_axes=[0])
    found = _choose_copies(there, base)
    assert there.asked == ["flip", "shift", "scale"]
    assert found[-1].settings == {"windows": {"flip_axes": [0], "shifts": shifts_within((2, 2, 2))}}


def test_four_times_the_time_must_bring_twice_the_least_gain() -> None:
    base = trial("base", 0.8, 1.0)
    for gain, name in ((0.0009, "base"), (0.0011, "shift")):
        there = bench({"shift": Trial("shift", {}, base.dice + gain, 4.0)}, flip_axes=[])
        assert _choose_copies(there, base)[-1].name == name


def test_moves_meet_every_quarter_of_a_stride() -> None:
    assert shifts_within((4, 4, 4)) == [[1, 2, 3], [2, 3, 1], [3, 1, 2]]
    assert shifts_within((1, 16)) == [[0, 8], [0, 12], [0, 4]]
    assert shifts_within((1, 1)) == []


@pytest.mark.parametrize("change", [0.0004, NOISE])
def test_copies_that_take_long_and_whose_gain_is_small_or_noise_are_not_used(change: Any) -> None:
    base = trial("base", 0.8, 1.0)
    there = bench({"flip": Trial("flip", {}, base.dice + change, 2.0)}, flip_axes=[0])
    assert _choose_copies(there, base)[-1] is base


@pytest.mark.parametrize(
    ("change", "seconds", "kept"),
    [
        (NOISE, 0.9, True),
        (NOISE - 0.0025, 0.9, True),
        (NOISE - 0.004, 0.9, False),
        (NOISE, 1.1, False),
        (-0.0005, 0.9, False),
        (0.0, 0.9, False),
    ],
)
def test_copies_that_take_no_second_stay_unless_they_are_worse(change: Any, seconds: float, kept: bool) -> None:
    base = trial("base", 0.8, 0.4)
    there = bench({"flip": Trial("flip", {}, base.dice + change, seconds)}, flip_axes=[0])
    assert (_choose_copies(there, base)[-1].name == "flip") is kept


def test_where_the_clock_decides_nothing_time_is_no_reason_against_copies() -> None:
    base = trial("base", 0.8, 4.0)
    there = bench({"flip": Trial("flip", {}, base.dice + NOISE, 8.0)}, flip_axes=[0])
    there.is_timed = False
    assert _choose_copies(there, base)[-1].name == "flip"


def test_other_sizes_must_surely_help_however_quick_they_are() -> None:
    base = trial("base", 0.8, 0.1)
    for change, name in ((NOISE, "base"), (0.01, "scale")):
        there = bench({"scale": Trial("scale", {}, base.dice + change, 0.3)}, flip_axes=[])
        assert _choose_copies(there, base)[-1].name == name


def test_moves_are_tried_where_they_cost_nothing_beside_as_many_mirrored_copies() -> None:
    base = trial("base", 0.8, 1.0)
    ways = {"flip": Trial("flip", {}, base.dice + 0.01, 4.0), "shift": Trial("shift", {}, base.dice + 0.02, 4.0)}
    there = bench(ways, flip_axes=[0, 1])
    assert _choose_copies(there, base)[-1].name == "shift"


def test_labels_that_tell_sides_apart_are_never_mirrored() -> None:
    there = bench({"scale": None}, flip_axes=[0])
    there.config = tiny_config(data={"labels": {"kidney_left": 3, "kidney_right": 7}}, augment={"flip_axes": [0]})
    _choose_copies(there, trial("base", 0.8, 1.0))
    assert there.asked == ["shift", "scale"]


def test_what_there_is_no_time_for_is_left_out() -> None:
    config = tiny_config()
    there = Bench(
        config, Threshold(), [a_case(n) for n in range(6)], CPU, "32", 1e-6, Notebook(None, ""), lambda *_: None
    )
    usual = there.first()
    assert len(usual.dice) == 5
    assert there.run("slow", {"windows": {"overlap": 0.75}}, expected=10.0) is None


def test_what_was_tried_before_a_kill_needs_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cases, way, looks = tiny_config(), [a_case(n) for n in range(6)], {"windows": {"overlap": 0.75}}, []

    def look(*given: Any, **tick: Any) -> Any:
        looks.append(given[1].id)
        return label_case(*given, **tick)

    def begun() -> Bench:
        looks.clear()
        notes = Notebook(tmp_path / "notes.jsonl", "this network")
        return Bench(config, Threshold(), cases, CPU, "32", 600.0, notes, lambda *_: None)

    monkeypatch.setattr("medseg.bench.label_case", look)
    first = begun()
    usual, tried = first.first(), first.run("tried", way)
    again = begun()
    # somebody pays for the caches of a new process, and no case that counts
    assert again.first().seconds == usual.seconds
    assert looks == ["case0"]
    # of a way that would take ten times what there is
    assert again.run("tried", way, expected=1000.0).dice.tolist() == tried.dice.tolist()
    assert again.run("not tried", {"windows": {"overlap": 0.25}}, expected=1000.0) is None
    assert looks == ["case0"]


@pytest.fixture
def looks_take(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], float]], list[float]]:
    """Let a look at a case take the seconds that are given for its number and its copies; the clock, in a list."""

    def made(seconds: Callable[[int, int], float]) -> list[float]:
        now, number = [0.0], itertools.count(1)

        def look(config: Config, *given: Any, **tick: Any) -> Any:
            now[0] += seconds(next(number), len(views(config.windows)))
            return label_case(config, *given, **tick)

        monkeypatch.setattr(Bench, "pools_locally", lambda *given: False)
        monkeypatch.setattr("medseg.bench.label_case", look)
        monkeypatch.setattr("medseg.bench.time.perf_counter", lambda: now[0])
        return now

    return made


def test_a_few_cases_tell_nothing_but_training_tells_what_is_unlike_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    cases, training = [a_case(n) for n in range(4)], [a_case(n) for n in range(20)]
    found = calibrate(tiny_config(), Threshold(), cases, training=training, device=CPU, precision="32", budget_s=60)
    assert list(found) == ["quality"]
    assert "4 cases held back: too few" in caplog.text
    assert "of an image unlike training `infer` will warn" in caplog.text
    learnt = QualityModel.model_validate(found["quality"]["model"])
    case = replace(a_case(9), image=torch.full((1, 12, 10, 9), 5.0))
    evidence = Evidence(tiny_config().data)
    label_case(tiny_config(), case, lambda w: Threshold()(w).softmax(1), CPU, evidence)
    assessed = learnt.assess(case, evidence)
    assert assessed.estimates == {}
    assert any("constant" in warning for warning in assessed.warnings)


def test_a_few_training_cases_do_not_tell_what_is_usual(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    cases = [a_case(n) for n in range(4)]
    found = calibrate(tiny_config(), Threshold(), cases, training=cases, device=CPU, precision="32", budget_s=60)
    assert found == {"quality": {"settings": {}, "measured": []}}
    assert "`infer` will not warn, after 4 training cases" in caplog.text


def test_a_budget_of_nothing_chooses_nothing() -> None:
    cases = [a_case(n) for n in range(6)]
    assert calibrate(tiny_config(), Threshold(), cases, training=cases, device=CPU, precision="32", budget_s=0) == {}


@pytest.mark.parametrize(
    ("budget_s", "known"), [(180.0, set()), (500.0, {"windows"}), (3600.0, {"windows", "quality"})]
)
def test_cases_that_take_long_are_looked_at_no_more_often_than_there_is_time(
    budget_s: float, known: set[str], looks_take: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # a large scan on a CPU; a mirrored copy takes as long again
    now = looks_take(lambda number, copies: 40.0 * copies)
    config, cases = tiny_config(augment={"flip_axes": [0]}), [a_case(n) for n in range(8)]
    found = calibrate(config, Threshold(), cases, training=cases, device=CPU, precision="32", budget_s=budget_s)
    assert now[0] <= budget_s
    measured = {part for part, chosen in found.items() if chosen["measured"]}
    assert measured >= known
    assert ("quality" in measured) == ("quality" in known)
    if not known:
        assert list(found) == ["quality"]
        assert "case1 took 40 s, and there are 108 s to try 5 cases" in caplog.text
    if "quality" not in known:
        assert "a larger train.calibration_share gives more" in caplog.text


def test_a_cold_start_does_not_cost_the_choices(looks_take: Any) -> None:
    looks_take(lambda number, copies: 6.0 if number == 1 else 0.1)
    cases = [a_case(n) for n in range(6)]
    found = calibrate(tiny_config(), Threshold(), cases, training=cases, device=CPU, precision="32", budget_s=27)
    assert all(found[part]["measured"] for part in ("windows", "tta", "quality"))


@pytest.mark.parametrize(("budget_s", "ways"), [(6.8, 0), (8.2, 2)])
def test_quick_copies_are_tried_before_other_windows(budget_s: float, ways: int, looks_take: Any) -> None:
    looks_take(lambda number, copies: 0.1 * copies)
    config, cases = tiny_config(augment={"flip_axes": [0]}), [a_case(n) for n in range(8)]
    found = calibrate(config, Threshold(), cases, training=cases, device=CPU, precision="32", budget_s=budget_s)
    # of 4.1 and 4.9 seconds; five cases take 0.5 a look, copies three, and to see what a case takes 0.2
    assert {row["name"] for row in found["tta"]["measured"]} >= {"flip", "shift"}
    assert len(found["windows"]["measured"]) == 1 + ways


def test_no_time_is_kept_for_copies_that_take_long(looks_take: Any) -> None:
    looks_take(lambda number, copies: 0.6 * copies)
    config, cases = tiny_config(augment={"flip_axes": [0]}), [a_case(n) for n in range(8)]
    found = calibrate(config, Threshold(), cases, training=cases, device=CPU, precision="32", budget_s=27)
    assert len(found["windows"]["measured"]) > 1


def test_an_estimate_from_the_plain_image_is_better_than_none(looks_take: Any) -> None:
    now = looks_take(lambda number, copies: 5.0 * copies)
    config, cases = tiny_config(augment={"flip_axes": [0]}), [a_case(n) for n in range(8)]
    # of 72 s a third is too little for ten looks of 5 s, and all of it is enough
    found = calibrate(config, Threshold(), cases, training=cases, device=CPU, precision="32", budget_s=180)
    assert found["quality"]["model"]["plain"]
    assert found["quality"]["model"]["with_members"] is None
    assert now[0] <= 180


def test_masks_that_nobody_asks_for_are_not_kept() -> None:
    config = tiny_config(data={"labels": {"whole": [1, 2], "core": 2}, "region_values": [1, 2]})
    cases = [a_case(n) for n in range(6)]
    there = Bench(config, Threshold(), cases, CPU, "32", 600.0, Notebook(None, ""), lambda *_: None)
    there._scorer = lambda settings: lambda w: Threshold()(w)[:, 1:].sigmoid()  # type: ignore[method-assign]
    there.first()
    assert there._masks == {}


def test_masks_of_the_first_way_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def look(*given: Any, **tick: Any) -> Any:
        looks.append(given[1].id)
        return label_case(*given, **tick)

    monkeypatch.setattr("medseg.bench.label_case", look)
    cases = [a_case(n) for n in range(6)]
    there = Bench(tiny_config(), Threshold(), cases, CPU, "32", 600.0, Notebook(None, ""), lambda *_: None)
    usual = there.first()
    assert usual is not None
    before = len(looks)
    masks = {case.id: labels for labels, case in there.labels(usual)}
    assert len(looks) == before
    for case in cases:
        assert case.label is not None
        assert np.array_equal(masks[case.id], case.label.numpy())
    # they were given away
    assert len(list(there.labels(usual))) == len(looks) - before == 6


class Lopsided(torch.nn.Module):
    """Thinks, not surely, that the lower half of every window is `shell`: of two mirrored copies one denies it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, *S) → logits (B, 3, *S)."""
        shell = torch.full_like(images, -9.0)
        shell[:, :, : images.shape[2] // 2] = 1.0
        return torch.cat([torch.zeros_like(images), shell, torch.full_like(images, -9.0)], dim=1)


def test_held_back_cases_without_any_label_do_not_end_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.bench.WORSE", (("noise", 0.5),))
    monkeypatch.setattr(Bench, "pools_locally", lambda *given: False)
    config, cases = tiny_config(augment={"flip_axes": [0]}, windows={"mode": "whole"}), [a_case(n) for n in range(5)]
    healthy = [replace(case, label=torch.zeros_like(case.label)) for case in cases if case.label is not None]
    found = calibrate(config, Lopsided(), healthy, training=cases, device=CPU, precision="32", budget_s=600)
    # what the plain image shows where nothing is teaches; in the mean of both nothing is left to judge
    assert found["quality"]["model"]["with_members"] is None
    assert found["quality"]["flip_axes"] == []


def test_everything_that_was_measured_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.bench.WORSE", (("noise", 0.5), ("blur", 0.5)))
    config, cases = tiny_config(), [a_case(n) for n in range(5)]
    found = calibrate(config, new_network(config), cases, training=cases, device=CPU, precision="32", budget_s=600)
    assert {"windows", "tta", "postprocess"} <= set(found)
    names = [row["name"] for row in found["windows"]["measured"]]
    assert sorted(names) == [
        "as in training",
        "large tiles",
        "large tiles, pooling over a patch",
        "overlap 0.25",
        "whole",
        "whole, pooling over a patch",
    ]
    assert all(0 <= row["dice"] <= 1 and row["seconds_a_case"] > 0 for row in found["windows"]["measured"])
    assert {row["name"] for row in found["tta"]["measured"]} >= {"flip", "scale"}
    assert set(found["quality"]["model"]) == {"profile", "plain", "with_members"}


def test_without_a_budget_the_clock_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cases = tiny_config(), [a_case(n) for n in range(6)]
    network = new_network(config)
    found = []
    for pace in (1e-3, 1e4):
        clock = itertools.count()
        monkeypatch.setattr("medseg.bench.time.perf_counter", lambda: pace * next(clock) ** 2)  # noqa: B023
        made = calibrate(config, network, cases, training=cases, device=CPU, precision="32", budget_s=None)
        assert [row["cases"] for row in made["windows"]["measured"]] == [6] * 6
        found.append(
            [made[part]["settings"] for part in ("windows", "tta", "postprocess")] + [made["quality"]["model"]]
        )
    assert found[0] == found[1]


def test_a_calibration_that_was_killed_goes_on_with_the_case_it_had_come_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cases, looks, ends = tiny_config(), [a_case(n) for n in range(6)], [], [0]
    # all windows are equally good, so that those of training are kept, and their masks serve for post-processing
    monkeypatch.setattr(Bench, "pools_locally", lambda *given: False)
    network = Threshold()

    def look(*given: Any, **tick: Any) -> Any:
        looks.append(given[1].id)
        if len(looks) == ends[0]:
            raise KeyboardInterrupt
        return label_case(*given, **tick)

    def made(*, killed_at: int = 0) -> dict[str, Any]:
        looks.clear()
        ends[0] = killed_at
        notes = Notebook(tmp_path / "notes.jsonl", "this network")
        return calibrate(config, network, cases, training=cases, device=CPU, precision="32", budget_s=None, notes=notes)

    def without_seconds(found: dict[str, Any]) -> Any:
        return json.loads(
            json.dumps(found), object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds_a_case"}
        )

    monkeypatch.setattr("medseg.bench.label_case", look)
    whole, all_looks = without_seconds(made()), len(looks)
    (tmp_path / "notes.jsonl").unlink()
    for killed_at in (15, 20, 20):
        with pytest.raises(KeyboardInterrupt):
            made(killed_at=killed_at)
    assert without_seconds(made()) == whole
    # each kill cost the look it came in; masks for post-processing, which outlive no process, were made in the last two
    assert len(looks) == all_looks - 14 - 19 - 19 + 2 * len(cases)
    # nothing but these masks is looked at once more
    made()
    assert looks == [case.id for case in cases]


def test_a_disk_that_is_full_makes_no_way_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cases = tiny_config(), [a_case(n) for n in range(6)]
    notes, add = Notebook(tmp_path / "notes.jsonl", "this network"), Notebook._add

    def full(self: Notebook, text: str) -> None:
        if '"overlap"' in text:
            raise TrainingError("no space")
        add(self, text)

    monkeypatch.setattr(Notebook, "_add", full)
    with pytest.raises(TrainingError, match="no space"):
        calibrate(config, Threshold(), cases, training=cases, device=CPU, precision="32", budget_s=None, notes=notes)


# ---- what inference makes of it


def chosen(folder: Path, **choices: Any) -> Path:
    tiny_model(folder)
    record_choices(folder, {name: {"settings": settings, "measured": []} for name, settings in choices.items()})
    return folder


def config_of(*folders: Path, **options: Any) -> Config:
    return load_model(*folders, options=InferOptions(device="cpu", **options)).config


def test_inference_does_what_was_chosen_unless_told_otherwise(tmp_path: Path) -> None:
    cleaned = {"postprocess": {"largest_component": ["core"]}}
    run = chosen(tmp_path / "run", windows={"windows": {"mode": "whole"}}, postprocess=cleaned)
    assert config_of(run).windows.mode == "whole"
    assert config_of(run).postprocess.largest_component == ("core",)
    assert config_of(run, overlap=0.25).windows.mode == "blend"
    assert config_of(run, window=(9, 9, 9)).windows.tile_size == (9, 9, 9)
    assert config_of(run, settings={"windows": {"overlap": 0.75}}).windows.mode == "blend"
    assert config_of(run, settings={"postprocess": {"largest_component": []}}).postprocess.largest_component == ()


def test_copies_that_helped_are_used_unless_others_are_asked_for(tmp_path: Path) -> None:
    run = chosen(tmp_path / "run", windows={}, tta={"windows": {"scales": [1.0, 0.75]}})
    assert config_of(run).windows.scales == (1.0, 0.75)
    assert config_of(run, tta="none").windows.scales == (1.0,)
    assert config_of(run, tta="auto", overlap=0.25).windows.scales == (1.0, 0.75)
    assert config_of(run, tta="flip").windows.flip_axes == (0, 1, 2)
    sided = tiny_model(tmp_path / "sided", tiny_config(data={"labels": {"left": 3, "right": 7}}))
    assert config_of(sided, tta="flip").windows.flip_axes == ()
    assert len(config_of(run, tta="scale").windows.scales) == 3


def test_a_model_without_choices_works_as_it_was_trained(tmp_path: Path) -> None:
    run = tiny_model(tmp_path)
    assert config_of(run, tta="auto").windows == read_model(run).config.windows


def test_an_ensemble_does_what_all_of_its_models_chose(tmp_path: Path) -> None:
    one = chosen(tmp_path / "one", windows={"windows": {"mode": "whole"}}, postprocess={})
    two = chosen(tmp_path / "two", windows={"windows": {"mode": "whole"}}, postprocess={})
    three = chosen(tmp_path / "three", windows={"windows": {"overlap": 0.25}}, postprocess={})
    assert config_of(one, two).windows.mode == "whole"
    assert config_of(one, three).windows == read_model(one).config.windows
    assert chosen_settings([one, three], ["windows"]) == {}


def test_an_ensemble_looks_at_the_copies_that_most_of_its_models_chose(tmp_path: Path) -> None:
    flips, moves = {"flip_axes": [0]}, {"shifts": [[1, 1, 1]]}
    wanted: list[dict[str, Any]] = [flips | moves, flips, flips | moves | {"scales": [1.0, 0.75]}, {}]
    runs = [chosen(tmp_path / str(n), windows={}, tta={"windows": w} if w else {}) for n, w in enumerate(wanted)]
    assert chosen_settings(runs[:3], ["tta"]) == {"windows": flips | moves}
    # two of four are not most
    assert chosen_settings(runs, ["tta"]) == {"windows": flips}
    assert config_of(*runs[:3]).windows.shifts == ((1, 1, 1),)


def test_an_ensemble_is_mirrored_only_as_all_of_its_models_have_learnt(tmp_path: Path) -> None:
    flips = {"tta": {"windows": {"flip_axes": [0, 1], "shifts": [[1, 1, 1]]}}}
    runs = [chosen(tmp_path / str(n), windows={}, **flips) for n in range(3)]
    described = json.loads((runs[2] / "model.json").read_text())
    described["config"]["augment"]["flip_axes"] = [1]
    (runs[2] / "model.json").write_text(json.dumps(described))
    assert chosen_settings(runs[:2], ["tta"])["windows"]["flip_axes"] == [0, 1]
    assert chosen_settings(runs, ["tta"]) == {"windows": {"flip_axes": [1], "shifts": [[1, 1, 1]]}}
    for order in (runs, runs[::-1]):
        assert config_of(*order, tta="flip").windows.flip_axes == (1,)


def test_of_limits_that_differ_an_ensemble_takes_the_smallest(tmp_path: Path) -> None:
    runs = [
        chosen(
            tmp_path / str(n),
            windows={"windows": {"mode": "whole", "whole_voxels": n}},
            postprocess={"postprocess": {"min_size_mm3": {"core": 10.0 * n, f"label{n}": 1.0}}},
        )
        for n in (3, 2)
    ]
    assert chosen_settings(runs, ["windows", "postprocess"]) == {
        "windows": {"mode": "whole", "whole_voxels": 2},
        "postprocess": {"min_size_mm3": {"core": 20.0}},
    }


@pytest.mark.parametrize(
    "inference",
    [None, [], {"windows": None}, {"windows": {"settings": None}}, {"windows": {"settings": {"windows": 3}}}],
)
def test_damaged_choices_are_a_model_error(tmp_path: Path, inference: Any) -> None:
    run = tiny_model(tmp_path)
    described = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(described | {"inference": inference}))
    with pytest.raises(ModelError, match="inference"):
        load_model(run, options=InferOptions(device="cpu"))


def test_a_choice_that_is_no_setting_is_a_model_error(tmp_path: Path) -> None:
    run = chosen(tmp_path / "run", windows={"windows": {"mode": "nonsense"}})
    with pytest.raises(ModelError, match="does not fit"):
        load_model(run, options=InferOptions(device="cpu"))


def test_a_way_that_memory_does_not_hold_is_left_out() -> None:
    class Small(Threshold):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images[0].numel() > 8**3:
                raise torch.OutOfMemoryError("too much")
            return super().forward(images)

    there = Bench(tiny_config(), Small(), [a_case(0)], CPU, "32", 60, Notebook(None, ""), lambda *_: None)
    assert there.run("as in training", {}) is not None
    assert there.run("whole", {"windows": {"mode": "whole"}}) is None


def test_a_choice_that_the_model_cannot_have_is_refused(tmp_path: Path) -> None:
    run = chosen(tmp_path / "run", windows={"data": {"labels": {"x": 1}}})
    with pytest.raises(ModelError, match=r"data\.labels"):
        load_model(run, options=InferOptions(device="cpu"))
