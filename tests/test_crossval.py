"""Cross-validation: locks, folds that are recognised or refused, what is chosen and why, and the command end to end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture
from skimage.io import imread, imsave
from test_ship import ABOUT
from tiny import write_two_channels

import medseg
from medseg import calibrate
from medseg_pipelines import choice, collecting, crossval, folds, locks, processes
from medseg_pipelines.choice import Method, choose_cleaning, choose_ensemble, choose_single, vote, vote_of_others
from medseg_pipelines.compare import Outcome
from medseg_pipelines.crossval import INTERRUPTED, OK, SOME_FAILED, TERMINATED, USAGE, run
from medseg_pipelines.folds import Fold, Found, Weights, look
from medseg_pipelines.judging import Judge, Trained
from medseg_pipelines.locks import STALE_S, Lock, age_s, held, holder_of, publish, take
from medseg_pipelines.ship import ship

# ---- votes and choices


def test_what_more_than_half_of_the_folds_chose_is_elected_label_by_label() -> None:
    one = {"largest_component": ["a", "b"], "min_size_mm3": {"a": 8.0}}
    two = {"largest_component": ["b"], "min_size_mm3": {"a": 2.0, "b": 4.0}, "fill_holes": ["a"]}
    assert vote([one, two, {}]) == {"largest_component": ["b"], "min_size_mm3": {"a": 2.0}}


def test_half_of_the_folds_elects_nothing() -> None:
    assert vote([{"fill_holes": ["a"]}, {}]) == {}


def test_a_fold_has_no_vote_on_its_own_cases() -> None:
    choices = {0: {"fill_holes": ["a"]}, 1: {}, 2: {"fill_holes": ["a"]}}
    assert vote_of_others(choices, 0) == {}
    assert vote_of_others(choices, 1) == {"fill_holes": ["a"]}
    assert vote_of_others({0: {"fill_holes": ["a"]}}, 0) == {}


def scored(name: str, values: Sequence[float], **more: Any) -> Method:
    found = Outcome({"dice": {f"case{n}": v for n, v in enumerate(values)}}, {}, (), 0, 0)
    return Method(name, tuple(name.split("+")), found, **more)


BASE = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def shifted(*by: float) -> list[float]:
    return [value + by[n % len(by)] for n, value in enumerate(BASE)]


@pytest.mark.parametrize(
    ("by", "kept", "said"),
    [
        ((0.01, 0.02), True, "is used: Dice +0.0150"),
        ((0.2, -0.15), False, "not surely above 0"),
        # every case surely gains, but less than is worth a setting
        ((0.0004, 0.0003), False, "not more than 0.0005"),
    ],
)
def test_masks_are_cleaned_only_where_that_surely_helps(by: tuple[float, ...], kept: bool, said: str) -> None:
    plain, cleaned = scored("net", BASE), scored("net-cleaned", shifted(*by), cleaned=True)
    chosen, reason = choose_cleaning(plain, cleaned)
    assert (chosen is cleaned) is kept
    assert said in reason


def test_a_cleaning_that_lacks_masks_is_left_out() -> None:
    plain, cleaned = scored("net", BASE), scored("net-cleaned", shifted(0.01, 0.02)[:-1], cleaned=True)
    cleaned = replace(cleaned, outcome=replace(cleaned.outcome, without_mask=("case5",)))
    chosen, reason = choose_cleaning(plain, cleaned)
    assert chosen is plain
    assert "it lacks masks" in reason


def test_two_cases_are_too_few_to_clean_by() -> None:
    plain, cleaned = scored("net", [0.5, 0.6]), scored("net-cleaned", [0.7, 0.8])
    chosen, reason = choose_cleaning(plain, cleaned)
    assert chosen is plain
    assert "too few cases" in reason


def test_cases_of_one_patient_are_one_unit_of_a_choice() -> None:
    plain, cleaned = scored("net", BASE), scored("net-cleaned", shifted(0.1))
    of_two = {f"case{n}": f"patient{n % 2}" for n in range(len(BASE))}
    assert choose_cleaning(plain, cleaned, of_two)[0] is plain


def test_the_network_of_the_highest_dice_is_chosen() -> None:
    low, high = scored("low", BASE), scored("high", shifted(0.02))
    chosen, reason = choose_single([low, high])
    assert chosen is high
    assert "against low Dice +0.0200" in reason


@pytest.mark.parametrize(
    ("seconds", "devices", "winner"),
    [(0.5, "cpu", "quick"), (0.95, "cpu", "good"), (0.5, "cuda", "good"), (None, "cpu", "good")],
)
def test_of_nearly_equal_networks_the_faster_is_chosen(seconds: float | None, devices: str, winner: str) -> None:
    good = scored("good", shifted(0.0008), seconds=1.0, devices=frozenset({"cpu"}))
    quick = scored("quick", BASE, seconds=seconds, devices=frozenset({devices}))
    assert choose_single([good, quick])[0].name == winner


def test_networks_are_compared_on_the_cases_that_both_have() -> None:
    # the one that could only be judged on easy cases is worse on each of them
    easy = Method("easy", ("easy",), Outcome({"dice": {"case4": 0.75, "case5": 0.85}}, {}, (), 0, 0))
    assert choose_single([easy, scored("whole", BASE)])[0].name == "whole"


def healthy(name: str, *, painted: bool) -> Method:
    """Six patients with a lesion and four without, in whom some is `painted` all the same."""
    sick, well = {f"case{n}": v for n, v in enumerate(BASE)}, [f"well{n}" for n in range(4)]
    dice = sick | (dict.fromkeys(well, 0.0) if painted else {})
    return Method(name, (name,), Outcome({"dice": dice}, {"lesion": dice}, (), 0, 0, cases=(*sick, *well)))


def test_a_network_that_paints_in_healthy_cases_is_not_chosen() -> None:
    bold, careful = healthy("bold", painted=True), healthy("careful", painted=False)
    bold = replace(bold, outcome=replace(bold.outcome, scores={"dice": dict(bold.dice) | {"case0": 0.45}}))
    chosen, reason = choose_single([bold, careful])
    assert chosen.name == "careful"
    assert "bold Dice +0.3950" in reason
    # and cleaning that takes it away is worth what it is
    plain, cleaned = healthy("plain", painted=True), healthy("plain", painted=False)
    assert choose_cleaning(plain, cleaned)[0] is cleaned
    # what has no mask is no empty one
    lacking = replace(careful.outcome, without_mask=("well0",))
    assert lacking.empty == {"well1", "well2", "well3"}


def test_a_network_that_lacks_a_mask_is_not_chosen() -> None:
    lacking = scored("lacking", shifted(0.1))
    lacking = replace(lacking, outcome=replace(lacking.outcome, without_mask=("case9",)))
    chosen, reason = choose_single([lacking, scored("whole", BASE)])
    assert chosen.name == "whole"
    assert "lacking has no mask of 1 cases" in reason


def test_an_ensemble_is_chosen_only_where_it_pays() -> None:
    single = scored("a", BASE)
    surely, perhaps = scored("a+b", shifted(0.01, 0.02)), scored("a+b", shifted(0.2, -0.15))
    assert choose_ensemble(single, [surely])[0] is surely
    chosen, reason = choose_ensemble(single, [perhaps])
    assert chosen is single
    assert "no ensemble of networks pays" in reason


def test_of_two_ensembles_that_pay_the_better_is_chosen() -> None:
    more, less = scored("a+b", shifted(0.02)), scored("a+b+c", shifted(0.01))
    assert choose_ensemble(scored("a", BASE), [less, more])[0] is more


def test_the_margins_are_those_of_a_single_training() -> None:
    mine = choice.LEAST_GAIN, choice.MARGIN, choice.NOISE
    assert mine == (calibrate.LEAST_GAIN, calibrate.MARGIN, calibrate.NOISE)


# ---- locks


def lock_text(**changes: Any) -> str:
    """What a lock of this process says, changed."""
    path = Path(os.environ["PYTEST_LOCK_FOLDER"]) / "pattern.lock"
    assert take(path) is not None
    content = json.loads(path.read_text())
    path.unlink()
    return json.dumps({**content, **changes})


@pytest.fixture(autouse=True)
def _lock_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_LOCK_FOLDER", str(tmp_path_factory.mktemp("locks")))


@pytest.fixture(scope="session")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make_old(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_lock_is_held_by_one_and_free_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "fold_0.lock"
    with held(path) as first:
        assert first is not None
        assert take(path) is None
        assert str(os.getpid()) in str(holder_of(path))
    assert holder_of(path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_free_after_an_interrupt(tmp_path: Path) -> None:
    def interrupted() -> None:
        with held(tmp_path / "fold_0.lock"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path, dead: int) -> None:
    path = tmp_path / "fold_0.lock"
    path.write_text(lock_text(process=dead, token="theirs"))
    assert holder_of(path) is None
    assert take(path) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["fold_0.lock"]


def test_a_lock_lives_as_long_as_the_child_of_its_dead_holder(tmp_path: Path, dead: int) -> None:
    path = tmp_path / "fold_0.lock"
    path.write_text(lock_text(process=dead, worker=os.getpid(), worker_began=None))
    assert take(path) is None


def test_a_number_that_went_to_another_process_keeps_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "fold_0.lock"
    path.write_text(lock_text(process_began="1"))
    assert take(path) is not None


@pytest.mark.parametrize("number", [0, -1, 2**80, "7", None])
def test_a_number_that_is_no_process_keeps_no_lock(tmp_path: Path, number: Any) -> None:
    path = tmp_path / "fold_0.lock"
    path.write_text(lock_text(process=number, process_began=None))
    assert take(path) is not None


@pytest.mark.parametrize(("still_s", "free"), [(0.5 * STALE_S, False), (2 * STALE_S, True)])
def test_the_lock_of_another_machine_falls_when_its_pulse_is_still(
    tmp_path: Path, dead: int, still_s: float, free: bool
) -> None:
    path = tmp_path / "fold_0.lock"
    path.write_text(lock_text(machine="another", process=dead))
    make_old(path, still_s)
    assert (take(path) is not None) is free


@pytest.mark.parametrize(("still_s", "free"), [(0.5 * STALE_S, False), (2 * STALE_S, True)])
def test_a_lock_that_says_nothing_falls_with_time(tmp_path: Path, still_s: float, free: bool) -> None:
    path = tmp_path / "fold_0.lock"
    path.touch()
    make_old(path, still_s)
    assert (take(path) is not None) is free


def test_a_lock_that_another_is_clearing_is_not_cleared_twice(tmp_path: Path, dead: int) -> None:
    path = tmp_path / "fold_0.lock"
    path.write_text(lock_text(process=dead))
    guard = tmp_path / "fold_0.lock.clearing"
    guard.touch()
    assert take(path) is None
    # who was clearing it has died over it: the next but one has it
    make_old(guard, 2 * STALE_S)
    assert take(path) is None
    assert take(path) is not None


def test_a_pulse_keeps_a_lock_young_and_tells_when_it_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "fold_0.lock"
    lock = take(path)
    assert lock is not None
    make_old(path, 100)
    lock.beat()
    age = age_s(path)
    assert age is not None
    assert age < 50
    path.write_text(lock_text(token="theirs"))
    lock.beat()
    assert lock.lost.is_set()


def test_a_disk_that_is_away_for_a_moment_loses_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = take(tmp_path / "fold_0.lock")
    assert lock is not None

    def away(*_: object, **__: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", away)
        with pytest.raises(OSError, match="Stale file handle"):
            lock.beat()
    assert not lock.lost.is_set()
    lock.beat()
    assert not lock.lost.is_set()
    lock.path.unlink()
    lock.beat()
    assert lock.lost.is_set()


def test_a_lock_is_waited_for_until_its_holder_is_known_to_be_gone(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOOK_S", 0.05)
    path = tmp_path / "fold_0.lock"
    path.write_text(lock_text(machine="another", process=dead))
    with held(path, patience_s=0.2) as lock:
        assert lock is None
    make_old(path, STALE_S - 1)
    with held(path, patience_s=20) as lock:
        assert lock is not None


def test_a_lock_that_went_while_it_was_cleared_is_not_removed_from_the_next(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, removed = tmp_path / "fold_0.lock", []
    path.write_text(lock_text(process=dead))

    def overtaken(guard: Path, text: str) -> bool:
        # another has cleared it before the guard was ours
        path.unlink()
        monkeypatch.setattr(Path, "unlink", lambda gone, **_: removed.append(gone.name))
        return publish(guard, text)

    monkeypatch.setattr(locks, "publish", overtaken)
    assert locks._clear(path)
    assert path.name not in removed


def test_the_lock_of_another_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "fold_0.lock"
    with held(path, pulse_s=0.01) as lock:
        assert lock is not None
        path.write_text(lock_text(token="theirs"))
        assert lock.lost.wait(10)
    assert json.loads(path.read_text())["token"] == "theirs"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_published_once(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "config.yaml"
    assert publish(path, "first")
    assert not publish(path, "second")
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_server_that_was_asked_twice_has_published_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def asked_twice(*names: Path) -> None:
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", asked_twice)
    assert publish(tmp_path / "fold_0.lock", "ours")
    assert not publish(tmp_path / "fold_0.lock", "theirs")


# ---- folds that somebody has left

CONFIG = medseg.make_config(
    {
        "data": {"spatial_dims": 2, "labels": {"shell": 1, "core": 2}},
        "preprocess": {"spacing_mm": None},
        "windows": {"patch_size": [32, 32]},
        "augment": {"rotation_deg": [10.0], "flip_axes": []},
        "train": {"epochs": 3, "time_budget_s": None},
    }
)
CASES = 6


@pytest.fixture
def dataset(tiny_dataset: Any) -> Path:
    found: Path = tiny_dataset(spatial_dims=2, cases=CASES)
    return found


def make_fold(dataset: Path, out: Path, number: int, *, name: str = "net", folds: int = 2) -> Fold:
    data = medseg.check_dataset(dataset).dataset
    training, held_back = medseg.fold_split(data, number, folds=folds)
    place = out / name / f"fold_{number}"
    digests = [medseg.data_sha256(part) for part in (training, held_back)]
    return Fold(number, place, dataset, CONFIG, tuple(training), tuple(held_back), *digests, folds, "cpu")


def leave(fold: Fold, *, shift: int = 0, seconds: float = 0.5, choices: Mapping[str, Any] | None = None) -> None:
    """What `medseg train` leaves in the folder of a fold; masks are the references, moved by `shift` pixels."""
    validation = fold.folder / "validation"
    (validation / "report").mkdir(parents=True, exist_ok=True)
    (fold.folder / "model.safetensors").write_bytes(b"weights")
    description = {
        "schema_version": 1,
        "training": {
            "data_sha256": fold.data_sha256,
            "validation_cases": [c.id for c in fold.held_back],
            "validation_sha256": fold.validation_sha256,
            "fold": fold.number,
            "steps": 30,
            "seconds": 4.0,
            "device": "cpu",
            "precision": "32",
        },
        "weights_sha256": hashlib.sha256(b"weights").hexdigest(),
        "config": fold.config.model_dump(mode="json"),
        "inference": {"postprocess": {"settings": dict(choices or {}), "measured": []}},
    }
    (fold.folder / "model.json").write_text(json.dumps(description))
    (fold.folder / "config.yaml").write_text(medseg.dump_yaml(fold.config, {}))
    cases = []
    for case in fold.held_back:
        assert case.label is not None
        mask = np.roll(imread(case.label), shift, axis=0)
        imsave(validation / f"{case.id}.png", mask, check_contrast=False)
        cases.append({"case": case.id, "status": "done", "seconds": {"network": seconds}})
    (validation / "run.json").write_text(json.dumps({"cases": cases}))
    (validation / "report" / "summary.json").write_text("{}")


def change_description(fold: Fold, **training: Any) -> None:
    path = fold.folder / "model.json"
    content = json.loads(path.read_text())
    content["training"] |= training
    path.write_text(json.dumps(content))


def test_a_fold_that_was_trained_elsewhere_is_recognised(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    assert look(fold).state == "missing"
    leave(fold)
    assert look(fold).state == "done"


def test_a_fold_of_moved_data_is_recognised(dataset: Path, tmp_path: Path) -> None:
    leave(make_fold(dataset, tmp_path / "out", 0))
    moved = dataset.rename(tmp_path / "moved")
    assert look(make_fold(moved, tmp_path / "out", 0)).state == "done"


@pytest.mark.parametrize("file", ["model.json", "last.pt"])
def test_the_folder_of_a_run_is_refused(dataset: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).touch()
    with pytest.raises(medseg.ConfigError, match="run: holds a training run"):
        crossval.cross_validate(dataset, tmp_path / "run", crossval.Options(epochs=1, device="cpu"))


def test_a_fold_of_other_settings_is_refused_by_name(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    values = CONFIG.model_dump(mode="json")
    leave(replace(fold, config=medseg.make_config({**values, "train": {**values["train"], "batch_size": 3}})))
    with pytest.raises(medseg.ConfigError, match=r"fold_0: trained with other settings \(train.batch_size: 3 there"):
        look(fold)


def test_a_fold_of_changed_data_is_refused(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    leave(fold)
    label = fold.training[0].label
    assert label is not None
    pixels = imread(label)
    pixels[0, 0] = 1
    imsave(label, pixels, check_contrast=False)
    with pytest.raises(medseg.ConfigError, match=r"fold_0: trained on other data \(SHA-256"):
        look(make_fold(dataset, tmp_path / "out", 0))


def correct(case: medseg.Case) -> None:
    """Another label of the same case."""
    assert case.label is not None
    imsave(case.label, np.roll(imread(case.label), 2, axis=0), check_contrast=False)


def test_a_fold_whose_held_back_files_have_changed_is_gone_on_with(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    leave(fold)
    (fold.folder / "job.json").write_text(json.dumps(fold.job))
    (fold.folder / "last.pt").touch()
    assert look(fold).state == "done"
    correct(fold.held_back[0])
    now = make_fold(dataset, tmp_path / "out", 0)
    assert now.data_sha256 == fold.data_sha256
    found = look(now)
    there, here = fold.validation_sha256[:12], now.validation_sha256[:12]
    assert found.state == "missing"
    assert f"have changed (SHA-256 {there}… there, {here}… now), it is judged again" in found.reason


def test_held_back_files_that_have_changed_are_refused_where_there_is_no_state(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    leave(fold)
    correct(fold.held_back[0])
    with pytest.raises(medseg.ConfigError, match=r"fold_0: files of its held-back cases have changed .*last\.pt back"):
        look(make_fold(dataset, tmp_path / "out", 0))


def test_a_fold_of_before_that_does_not_say_what_it_was_judged_by_is_recognised(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    leave(fold)
    path = fold.folder / "model.json"
    content = json.loads(path.read_text())
    del content["training"]["validation_sha256"]
    path.write_text(json.dumps(content))
    assert look(fold).state == "done"


def test_a_fold_that_was_begun_with_other_data_is_refused(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    fold.folder.mkdir(parents=True)
    (fold.folder / "job.json").write_text(json.dumps({"data_sha256": "other"}))
    with pytest.raises(medseg.ConfigError, match="begun with other data"):
        look(fold)


def test_a_fold_that_began_with_other_weights_is_refused(dataset: Path, tmp_path: Path) -> None:
    plain = make_fold(dataset, tmp_path / "out", 0)
    tuned = replace(plain, pretrained=Weights(tmp_path / "a.pt", "aa" * 32))
    other = replace(plain, pretrained=Weights(tmp_path / "b.pt", "bb" * 32))
    leave(plain)
    with pytest.raises(medseg.ConfigError, match=r"began with random weights, but .*a\.pt \(aaaaaaaaaaaa…\) asked"):
        look(tuned)
    change_description(plain, pretrained={"file": "a.pt", "sha256": "aa" * 32})
    assert look(tuned).state == "done"
    with pytest.raises(medseg.ConfigError, match=r"began with the weights aaaaaaaaaaaa…, but .*b\.pt"):
        look(other)
    # left out, the folds that are missing would begin with nothing
    with pytest.raises(medseg.ConfigError, match="but none asked; give the --pretrained of before"):
        look(plain)


def test_a_fold_that_was_begun_with_other_weights_is_refused(dataset: Path, tmp_path: Path) -> None:
    plain = make_fold(dataset, tmp_path / "out", 0)
    tuned = replace(plain, pretrained=Weights(tmp_path / "a.pt", "aa" * 32))
    tuned.folder.mkdir(parents=True)
    (tuned.folder / "job.json").write_text(json.dumps(tuned.job))
    assert look(tuned).state == "missing"
    with pytest.raises(medseg.ConfigError, match="began with the weights aaaaaaaaaaaa…, but none asked"):
        look(plain)


def test_a_fold_that_held_back_other_cases_is_refused(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    leave(fold)
    change_description(fold, validation_cases=["case77"])
    with pytest.raises(medseg.ConfigError, match=r"held back 1 cases, which are not the 3 of fold 0 \(case"):
        look(fold)


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half of the wei")


def damage_description(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(path.read_text()[:50])


@pytest.mark.parametrize("damage", [damage_weights, damage_description])
def test_a_damaged_fold_is_told_and_made_again_only_from_its_state(
    dataset: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    leave(fold)
    damage(fold.folder)
    found = look(fold)
    assert found.state == "damaged"
    assert "copy it again, or delete it" in found.reason
    (fold.folder / "last.pt").touch()
    assert look(fold).state == "missing"


def test_a_fold_whose_validation_broke_off_is_gone_on_with(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    leave(fold)
    (fold.folder / "validation" / "report" / "summary.json").unlink()
    (fold.folder / "last.pt").touch()
    make_old(fold.folder / "last.pt", 2 * folds.QUIET_S)
    assert look(fold).state == "missing"


def test_a_run_that_somebody_has_begun_by_hand_is_left_alone_while_its_log_grows(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    fold.folder.mkdir(parents=True)
    log = fold.folder / "log.txt"
    log.touch()
    assert look(fold).state == "elsewhere"
    make_old(log, 2 * folds.QUIET_S)
    assert look(fold).state == "missing"
    # it is preparing cases, which its log says nothing of
    (fold.folder / "cache").mkdir()
    assert look(fold).state == "elsewhere"
    make_old(fold.folder / "cache", 2 * folds.QUIET_S)
    assert look(fold).state == "missing"


def test_a_run_by_hand_that_holds_its_log_is_left_alone_however_quiet(dataset: Path, tmp_path: Path) -> None:
    fold = make_fold(dataset, tmp_path / "out", 0)
    fold.folder.mkdir(parents=True)
    log, fcntl = fold.folder / "log.txt", pytest.importorskip("fcntl")
    with log.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        make_old(log, 2 * folds.QUIET_S)
        assert look(fold).state == "elsewhere"
    assert look(fold).state == "missing"


def test_a_training_of_a_fold_knows_nothing_of_the_other_tasks_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    left = processes._environment_of_one()
    assert left["OMP_NUM_THREADS"] == "2"
    assert not [name for name in left if name.startswith(("SLURM", "RANK", "WORLD", "LOCAL", "TORCHELASTIC"))]


# ---- masks of other folds' choice


class Bench(Judge):
    """A judge whose models leave the reference moved by as many pixels as it is told to clean things."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {}, "cpu", lambda *_, **__: None)
        self.asked: list[tuple[str, Any]] = []

    def _segment(
        self,
        folds: Sequence[Fold],
        place: Path,
        postprocess: Mapping[str, Any] | None,
        cases: Sequence[medseg.Case],
        failures: dict[str, str],
    ) -> dict[str, Path]:
        self.asked.append((place.name, postprocess))
        return {c.id: c.label for c in cases if c.label is not None}


def test_a_fold_is_cleaned_as_the_others_would_have_it(dataset: Path, tmp_path: Path) -> None:
    made = [make_fold(dataset, tmp_path / "out", n, folds=3) for n in range(3)]
    fill, grow = {"postprocess": {"fill_holes": ["core"]}}, {"postprocess": {"largest_component": ["core"]}}
    for fold, chosen in zip(made, (fill, grow, fill)):
        leave(fold, choices=chosen)
    network = Trained("net", tuple(made), tuple(look(fold) for fold in made))
    bench = Bench(tmp_path / "out")
    plain = bench.plain(network)
    # every fold has cleaned its masks: none of them is as the network made it
    assert sorted(bench.asked) == [("fold_0", {}), ("fold_1", {}), ("fold_2", {})]
    bench.asked.clear()
    cleaned = bench.cleaned(network, plain)
    # folds 0 and 2 see one vote for each of two things, fold 1 two for holes
    assert [a for a in bench.asked if a[1]] == [("fold_1", {"fill_holes": ["core"]})]
    assert cleaned is not None
    assert cleaned.method.postprocess == {"fill_holes": ["core"]}


def test_what_new_cases_would_not_get_is_not_judged(dataset: Path, tmp_path: Path) -> None:
    # one fold of two fills holes: to the other that is all votes there are, to new cases half of them
    made = [make_fold(dataset, tmp_path / "out", n) for n in range(2)]
    leave(made[0], choices={"postprocess": {"fill_holes": ["core"]}})
    leave(made[1])
    network = Trained("net", tuple(made), tuple(look(fold) for fold in made))
    bench = Bench(tmp_path / "out")
    assert bench.cleaned(network, bench.plain(network)) is None


def test_every_case_is_judged_once_by_the_first_fold_that_held_it_back(dataset: Path, tmp_path: Path) -> None:
    first, second = (make_fold(dataset, tmp_path / "out", n) for n in range(2))
    both = replace(second, held_back=(*second.held_back, first.held_back[0]))
    leave(first)
    leave(both, shift=9)
    network = Trained("net", (first, both), (Found("done"), Found("done")))
    found = Bench(tmp_path / "out").plain(network)
    dice = found.method.dice
    assert len(dice) == CASES
    assert dice[first.held_back[0].id] == 1.0
    assert all(dice[case.id] < 1 for case in second.held_back)


# ---- the command on folds that are there


def command(dataset: Path, out: Path, *more: str) -> list[str]:
    return [str(dataset), "-o", str(out), "--folds", "2", "--device", "cpu", "--networks", "unet", *more]


SAVE = medseg.Report.save


def save_table(report: medseg.Report, folder: Path) -> Path:
    """The report without its page, which takes seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    report.table.to_csv(folder / "metrics.csv", index=False)
    (folder / "summary.json").write_text('{"schema_version": 2}')
    return folder


@pytest.fixture
def left(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Leaves both folds of networks with masks moved by as many pixels as told; training anything is a failure."""
    monkeypatch.setattr(folds, "attempt", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(medseg.Report, "save", save_table)

    def make(skip: Sequence[tuple[str, int]] = (), **shifts: int) -> Path:
        out = tmp_path / "out"
        for name, shift in shifts.items():
            for number in range(2):
                if (name, number) not in skip:
                    fold = make_fold(dataset, out, number, name=name)
                    values = CONFIG.model_dump(mode="json")
                    config = medseg.make_config({**values, "network": {**values["network"], "name": name}})
                    leave(replace(fold, config=config), shift=shift)
        return out

    return make


def crossval_folds(dataset: Path, out: Path) -> list[tuple[str, Fold]]:
    """Both folds of a network, as the command has them."""
    return [("unet", make_fold(dataset, out, number, name="unet")) for number in range(2)]


def record_of(out: Path) -> dict[str, Any]:
    text = (out / "crossval.json").read_text()
    found: dict[str, Any] = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return found


def test_folds_that_are_there_are_collected_into_one_report(
    dataset: Path, left: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = left(unet=1)
    monkeypatch.setattr(medseg.Report, "save", SAVE)
    assert run(command(dataset, out)) == OK
    record = record_of(out)
    assert record["complete"]
    (network,), (method,) = record["networks"], record["methods"]
    assert sorted(case for fold in network["folds"] for case in fold["cases"]) == [f"case{n}" for n in range(CASES)]
    assert method["dice"]["n"] == CASES
    low, high = method["dice"]["ci95"]
    assert low <= method["dice"]["mean"] <= high
    # three cases are the fewest that give an interval
    assert all(fold["dice"]["n"] == 3 and fold["train_seconds"] == 4.0 for fold in network["folds"])
    rows = (out / "report" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * CASES
    assert (out / "report" / "report.html").is_file()
    best = json.loads((out / "best.json").read_text())
    assert best["models"] == ["unet/fold_0", "unet/fold_1"]
    said = capsys.readouterr().out
    assert best["command"] in said
    assert best["command"] == f"medseg infer SCAN.png -m {out} -o masks"
    assert "| 0 | 0." in (out / "crossval.md").read_text()


def test_the_best_of_two_networks_is_chosen_and_the_table_shown(
    dataset: Path, left: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise medseg.ModelError("the models of an ensemble differ in `windows`")

    monkeypatch.setattr(medseg, "load_model", refuse)
    out = left(unet=3, fcn8s=1)
    monkeypatch.setattr(medseg.Report, "save", SAVE)
    assert run(command(dataset, out, "--networks", "unet,fcn8s")) == OK
    record = record_of(out)
    assert record["best"]["networks"] == ["fcn8s"]
    first, second = record["methods"]
    assert (first["name"], second["name"], first["chosen"]) == ("fcn8s", "unet", True)
    assert second["against_chosen"]["mean"] < 0
    assert second["against_chosen"]["n"] == CASES
    said = capsys.readouterr().out
    assert "| fcn8s |" in said
    assert "unet and fcn8s make no ensemble: the models of an ensemble differ in `windows`" in said
    assert (out / "compare" / "compare.html").is_file()
    assert (out / "reports" / "unet" / "report.html").is_file()


def refuse_to_load(*_: object, **__: object) -> Any:
    raise medseg.ModelError("no ensemble")


def compare_names(places: Mapping[str, Path]) -> Any:
    """A comparison that only says of what it is."""

    def save(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "compare.html").write_text(" ".join(places))
        (folder / "summary.json").write_text('{"schema_version": 1, "comparisons": []}')

    return SimpleNamespace(save=save)


def test_what_is_not_compared_any_more_is_removed(
    dataset: Path, left: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(medseg, "load_model", refuse_to_load)
    monkeypatch.setattr(medseg, "compare", compare_names)
    out = left(unet=3, fcn8s=1, fcn16s=2)
    assert run(command(dataset, out, "--networks", "unet,fcn8s,fcn16s")) == OK
    assert {p.name for p in (out / "reports").iterdir()} == {"unet", "fcn16s"}
    assert run(command(dataset, out, "--networks", "unet,fcn16s")) == OK
    assert {p.name for p in (out / "reports").iterdir()} == {"unet"}
    assert (out / "compare" / "compare.html").read_text() == "unet fcn16s"
    assert run(command(dataset, out)) == OK
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"report", "unet", "fcn8s", "fcn16s"}
    # the folds themselves stay, and are compared again where that is asked for
    assert run(command(dataset, out, "--networks", "unet,fcn8s")) == OK
    assert {p.name for p in (out / "reports").iterdir()} == {"unet"}


def test_what_is_not_of_an_earlier_collection_is_not_removed(
    dataset: Path, left: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(medseg, "load_model", refuse_to_load)
    monkeypatch.setattr(medseg, "compare", compare_names)
    out, elsewhere = left(unet=3, fcn8s=1), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / "compare").symlink_to(elsewhere)
    assert run(command(dataset, out, "--networks", "unet,fcn8s")) == OK
    (out / "reports" / "notes").mkdir()
    (out / "reports" / "nnunet").mkdir()
    (out / "reports" / "nnunet" / "summary.json").write_text('{"metric_per_case": []}')
    assert run(command(dataset, out)) == OK
    assert {p.name for p in (out / "reports").iterdir()} == {"notes", "nnunet"}
    # of a link the link goes alone
    assert not (out / "compare").is_symlink()
    assert (elsewhere / "compare.html").read_text() == "unet fcn8s"


def test_a_comparison_that_fails_leaves_none_of_before(
    dataset: Path, left: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(medseg, "load_model", refuse_to_load)
    monkeypatch.setattr(medseg, "compare", compare_names)
    out = left(unet=3, fcn8s=1)
    words = command(dataset, out, "--networks", "unet,fcn8s")
    assert run(words) == OK
    monkeypatch.setattr(medseg, "compare", refuse_to_load)
    assert run(words) == SOME_FAILED
    assert not (out / "compare").exists()


@pytest.mark.parametrize("breaks", ["judging", "the disk", "the device"])
def test_reports_of_before_stay_where_no_others_are_written(
    breaks: str, dataset: Path, left: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Path:
        raise medseg.DataError("cv/report: cannot write report.html (No space left on device)")

    monkeypatch.setattr(medseg, "load_model", refuse_to_load)
    monkeypatch.setattr(medseg, "compare", compare_names)
    out = left(unet=3, fcn8s=1)
    words = command(dataset, out, "--networks", "unet,fcn8s")
    assert run(words) == OK
    before = sorted(path for path in out.rglob("*") if path.is_dir())
    assert {out / "report", out / "reports" / "unet", out / "compare"} <= set(before)
    if breaks == "judging":
        monkeypatch.setattr(Judge, "plain", refuse_to_load)
    elif breaks == "the disk":
        monkeypatch.setattr(medseg.Report, "save", full)
        words = command(dataset, out)
    else:
        words += ["--device", "cuda:99"]
    assert run(words) == (USAGE if breaks == "the device" else SOME_FAILED)
    assert sorted(path for path in out.rglob("*") if path.is_dir()) == before
    if breaks == "the device":
        assert record_of(out)["complete"]


def test_an_ensemble_is_judged_fold_by_fold_and_used_where_it_pays(
    dataset: Path, left: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(*folders: Path, **_: Any) -> Any:
        loaded.append([f"{f.parent.name}/{f.name}" for f in folders])

    def segment(_: Any, cases: Sequence[medseg.Case], place: Path, **__: Any) -> tuple[medseg.CaseResult, ...]:
        place.mkdir(parents=True)
        for case in cases:
            assert case.label is not None
            shutil.copy(case.label, place / f"{case.id}.png")
        return tuple(medseg.CaseResult(case.id, "done", output=f"{case.id}.png") for case in cases)

    monkeypatch.setattr(medseg, "load_model", load)
    monkeypatch.setattr(medseg, "segment_cases", segment)
    monkeypatch.setattr(collecting, "_compare", lambda *_: set())
    out = left(unet=1, fcn8s=2)
    assert run(command(dataset, out, "--networks", "unet,fcn8s")) == OK
    assert sorted(loaded) == [["unet/fold_0", "fcn8s/fold_0"], ["unet/fold_1", "fcn8s/fold_1"]]
    best = record_of(out)["best"]
    assert best["networks"] == ["unet", "fcn8s"]
    assert best["dice"]["mean"] == 1.0
    assert "it pays" in best["reasons"][-1]
    assert len(best["models"]) == 4


def test_what_folds_chose_for_themselves_and_is_not_chosen_is_taken_back(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "_compare", lambda *_: set())
    monkeypatch.setattr(medseg.Report, "save", save_table)
    monkeypatch.setattr(Judge, "_segment", Bench._segment)
    monkeypatch.setattr(Judge, "asked", [], raising=False)
    out = tmp_path / "out"
    values = CONFIG.model_dump(mode="json")
    config = medseg.make_config({**values, "network": {**values["network"], "name": "unet"}})
    for number in range(2):
        chosen = {"postprocess": {"fill_holes": ["core"]}} if number else {}
        leave(replace(make_fold(dataset, out, number, name="unet"), config=config), choices=chosen)
    assert run(command(dataset, out)) == OK
    best = json.loads((out / "best.json").read_text())
    # one of two folds is no majority: its own choice is not for new cases
    assert best["settings"] == {"postprocess": {"largest_component": [], "min_size_mm3": {}, "fill_holes": []}}


def test_a_damaged_fold_costs_no_other_and_there_is_no_best(
    dataset: Path, left: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = left(unet=1)
    assert run(command(dataset, out)) == OK
    damage_weights(out / "unet" / "fold_1")
    assert run(command(dataset, out)) == SOME_FAILED
    assert "unet, fold_1: " in capsys.readouterr().err.splitlines()[-1]
    record = record_of(out)
    assert not record["complete"]
    assert [fold["state"] for fold in record["networks"][0]["folds"]] == ["done", "failed"]
    assert record["best"] is None
    assert not (out / "best.json").exists()
    # the report is of the cases that are there
    assert len((out / "report" / "metrics.csv").read_text().splitlines()) == 1 + 2 * 3


def test_a_mask_that_cannot_be_read_is_named(
    dataset: Path, left: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = left(unet=1)
    mask = next((out / "unet" / "fold_0" / "validation").glob("*.png"))
    mask.write_bytes(mask.read_bytes()[:40])
    assert run(command(dataset, out)) == SOME_FAILED
    assert f"unet, case {mask.stem}: " in capsys.readouterr().err.splitlines()[-1]
    assert record_of(out)["methods"][0]["cases_without_mask"] == [mask.stem]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "train.batch_size=3"], "train.batch_size: 4 there, 3 asked"),
        (["--epochs", "4"], "train.epochs: 3 there, 4 asked"),
        (["--seed", "9"], "train.seed: 0 there, 9 asked"),
        (["--folds", "3"], "give the --folds it was trained with"),
        (["--only-fold", "2"], "fold 2 asked, expected 0 to 1"),
        (["--epochs", "3", "--time-budget", "3m"], "give one of them"),
        (["--set", "network.name=unet"], "give either this or --networks"),
        (["--networks", "unett"], "unett"),
        (["--networks", "unet,unet"], "given twice"),
        (["-c", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--pretrained", "nowhere"], "--pretrained nowhere: no such file"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_touched(
    arguments: list[str], said: str, dataset: Path, left: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = left(unet=1)
    before = sorted(out.rglob("fold_*/**/*"))
    assert run(command(dataset, out, *arguments)) == USAGE
    assert said in capsys.readouterr().err
    assert sorted(out.rglob("fold_*/**/*")) == before


def test_a_wrong_key_is_told_before_a_file_of_the_data_is_read(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr("medseg_pipelines.crossval.checked", read.append)
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  rate: 1\n")
    right = tmp_path / "right.yaml"
    # of pictures, whose number of axes only the plan knows
    right.write_text("network:\n  strides: [[1, 2], [2, 2], [2, 2], [2, 2]]\n")
    for source, words in (("--set", ["-c", str(right), "--set", "train.rate=1"]), (str(file), ["-c", str(file)])):
        assert run([str(dataset), "-o", str(tmp_path / "out"), *words]) == USAGE
        assert f"{source}: unknown key `train.rate`" in " ".join(capsys.readouterr().err.split())
    assert not read
    assert not (tmp_path / "out").exists()


def test_a_configuration_of_other_data_is_refused(
    tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tiny_dataset(spatial_dims=2, cases=2, form="nnunet")
    file = tmp_path / "other.yaml"
    file.write_text("data: {labels: {core: 1, shell: 2}}\n")
    assert run(command(named, tmp_path / "out", "-c", str(file))) == USAGE
    assert "other.yaml: is of other data" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_file_does_not_mirror_labels_that_tell_sides_apart(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crossval, "_train", lambda *_: {})
    file, sides = tmp_path / "mine.yaml", "data.labels={left: 1, right: 2}"
    file.write_text("augment: {flip_axes: [1], p_noise: 0.5}\n")
    # the second one finds what the first has planned
    for out in ("out", "out"):
        assert run(command(dataset, tmp_path / out, "-c", str(file), "--set", sides)) != USAGE
    found = medseg.read_config(tmp_path / "out" / "unet" / "config.yaml").augment
    assert (found.flip_axes, found.p_noise) == ((), 0.5)
    assert "mine.yaml: augment.flip_axes [1] is left out, since label `left` tells sides apart" in caplog.text
    typed = ("-c", str(file), "--set", sides, "--set", "augment.flip_axes=[1]")
    assert run(command(dataset, tmp_path / "typed", *typed)) != USAGE
    assert medseg.read_config(tmp_path / "typed" / "unet" / "config.yaml").augment.flip_axes == (1,)
    # what was begun mirrored goes on so, and says nothing else
    caplog.clear()
    assert run(command(dataset, tmp_path / "typed", "-c", str(file), "--set", sides)) != USAGE
    assert "left out" not in caplog.text
    other = ("-c", str(file), "--set", sides, "--set", "augment.flip_axes=[0]")
    assert run(command(dataset, tmp_path / "out", *other)) == USAGE


def test_a_file_mirrors_along_axes_that_are_not_left_to_right(
    tiny_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossval, "_train", lambda *_: {})
    file, sides = tmp_path / "mine.yaml", "data.labels={left: 1, right: 2}"
    file.write_text("augment: {flip_axes: [1, 2]}\n")
    assert run(command(tiny_dataset(cases=4), tmp_path / "out", "-c", str(file), "--set", sides)) != USAGE
    assert medseg.read_config(tmp_path / "out" / "unet" / "config.yaml").augment.flip_axes == (1, 2)


def test_what_was_trained_with_a_configuration_that_would_be_refused_now_is_collected(
    dataset: Path, left: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = left(unet=1)
    pairs = [{part: f"{part}s/case{n}.png" for part in ("image", "label")} for n in range(CASES)]
    described = {"labels": {"core": 1, "shell": 2}, "modality": {"0": "MRI"}, "training": pairs}
    (dataset / "dataset.json").write_text(json.dumps(described))
    file = tmp_path / "mine.yaml"
    file.write_text("data: {labels: {shell: 1, core: 2}}\n")
    assert run(command(dataset, out, "-c", str(file))) == OK
    assert run(command(dataset, tmp_path / "new", "-c", str(file))) == USAGE
    assert "mine.yaml: is of other data" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("typed", [True, False])
def test_files_are_looked_at_with_the_channels_that_are_given(
    typed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {channels: [A, B]}\n")
    planned: list[Fold] = []
    monkeypatch.setattr(crossval, "_train", lambda found, *_: planned.extend(f for _, f in found) or {})
    given = ("--set", "data.channels=[A,B]") if typed else ("-c", str(file))
    run(command(write_two_channels(tmp_path / "set"), tmp_path / "out", *given))
    assert [fold.config.data.channels for fold in planned] == [("A", "B")] * 2


def test_a_scan_that_is_held_back_in_other_bytes_is_refused(
    tiny_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twins = tiny_dataset(cases=2, spatial_dims=2)
    for part in ("images", "labels"):
        first = twins / part / "case0.png"
        (twins / part / "case1.png").unlink()
        Picture.open(first).save(twins / part / "case1.tif")
    assert run(command(twins, tmp_path / "out")) == USAGE
    assert "error: fold 0: " in (told := capsys.readouterr().err)
    assert "are trained on under another name" in " ".join(told.split())


def test_what_the_command_sets_is_right_or_wrong_together_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {time_budget_s: null, epochs: 3}\n")
    asked = crossval._asked(crossval.Options(configs=(file,), settings={"train": {"epochs": 4}}))
    assert asked["deeplabv3plus"]["train"] == {"time_budget_s": None, "epochs": 4}


@pytest.mark.parametrize("told_by", ["images_sha256", "images_voxels"])
def test_weights_that_have_learnt_the_cases_are_refused_before_anything_is_trained(
    told_by: str, dataset: Path, left: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out, findings = tmp_path / "learnt", tmp_path / "new", medseg.check_dataset(dataset)
    cases = medseg.fold_split(findings.dataset, 1, folds=2)[1]
    case, digest = cases[0].id, hashlib.sha256(medseg.file_sha256(cases[0].images[0]).encode()).hexdigest()[:16]
    if told_by == "images_voxels":
        (digest,) = (fact.voxels[:16] for fact in findings.facts if fact.case == case)
    before.mkdir()
    (before / "model.safetensors").write_bytes(b"")
    (before / "model.json").write_text(json.dumps({"schema_version": 1, "training": {told_by: [digest]}}))
    assert run(command(dataset, out, "--pretrained", str(before))) == USAGE
    told = capsys.readouterr().err
    assert "error: fold 1: " in told
    assert f"has learnt 1 of the {len(cases)} cases held back, first {case}" in told
    # a plan made of these weights must not be found by the next command
    assert not out.exists()
    # folds that are there change nothing, nor does a link to the weights
    link = tmp_path / "link.safetensors"
    link.symlink_to(before / "model.safetensors")
    there = left(unet=1)
    for given in (before, link):
        assert run(command(dataset, there, "--pretrained", str(given))) == USAGE
        assert "has learnt 1 of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["report", "cache", "unet-cleaned", "a+b"])
def test_settings_of_a_name_that_is_taken_are_refused(
    name: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{n}.yaml" for n in (name, "other")]
    for file in files:
        file.write_text("network:\n  name: unet\n")
    words = [word for file in files for word in ("-c", str(file))]
    assert run([str(dataset), "-o", str(tmp_path / "out"), *words]) == USAGE
    assert f"{name} would be mixed up" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_networks_that_segment_different_things_are_refused_and_leave_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(_: Path, *, config: Path, settings: Mapping[str, Any], **__: Any) -> medseg.Plan:
        values = medseg.overlay(CONFIG.model_dump(mode="json"), medseg.read_yaml(config), settings)
        return medseg.Plan(medseg.make_config(values), {})

    monkeypatch.setattr(medseg, "plan", planned)
    two, one = tmp_path / "two.yaml", tmp_path / "one.yaml"
    two.write_text("data: {labels: {shell: 1, core: 2}}\n")
    one.write_text("data: {labels: {shell: [1, 2]}}\n")
    words = [str(dataset), "-o", str(tmp_path / "out"), "--folds", "2", "--device", "cpu"]
    assert run([*words, "-c", str(two), "-c", str(one)]) == USAGE
    said = " ".join(capsys.readouterr().err.split())
    assert "two and one: segment different things (data.labels: shell is [1] in two and [1, 2] in one)" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("labels", "unlike"),
    [
        ({"core": 2, "shell": 1}, None),
        ({"background": 0, "shell": 1, "core": 2}, None),
        ({"shell": [1], "core": [2]}, None),
        ({"shell": 1}, r"core is \[2\] in a and not there in b"),
        ({"shell": 2, "core": 1}, r"shell is \[1\] in a and \[2\] in b"),
        ({"shell": 1, "core": 2, "rim": 3}, r"rim is not there in a and \[3\] in b"),
        ({"shell": 1, "core": 2, "ignore": 3}, r"ignore is not there in a and \[3\] in b"),
    ],
)
def test_networks_are_chosen_from_where_their_labels_mean_the_same(labels: dict[str, Any], unlike: str | None) -> None:
    data = {"spatial_dims": 2, "labels": labels}
    configs = {"a": CONFIG, "b": medseg.make_config({**CONFIG.model_dump(mode="json"), "data": data})}
    if unlike is None:
        crossval._refuse_other_labels(configs)
    else:
        with pytest.raises(medseg.ConfigError, match=unlike):
            crossval._refuse_other_labels(configs)


def test_a_network_that_cannot_be_is_told_once_and_leaves_nothing(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(dataset), "-o", str(tmp_path / "out"), "--folds", "2", "--device", "cpu"]
    assert run([*words, "--set", "network.channels=[4,8]"]) == USAGE
    assert "network.output_stride 8 is not possible" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_cannot_be_written_is_one_message(
    dataset: Path, left: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "cv/collect.lock")

    out = left(unet=1)
    monkeypatch.setattr("medseg_pipelines.locks.take", refuse)
    assert run(command(dataset, out)) == SOME_FAILED
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cv/collect.lock: Read-only file system")


@pytest.mark.parametrize("stage", ["train", "collect"])
def test_a_disk_that_is_full_after_hours_is_no_wrong_usage(
    stage: str, attempts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> Any:
        raise medseg.DataError("cv: cannot write job.json (No space left on device)")

    _, words = attempts(0)
    monkeypatch.setattr(crossval, "train_fold" if stage == "train" else "collect", full)
    assert run(words) == SOME_FAILED
    assert "(No space left on device); what is finished stays" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("trained", "error", "code", "said"),
    [
        (False, medseg.ConfigError("cv: other data; choose another -o"), USAGE, "cv: other data; choose another -o"),
        (
            True,
            medseg.ConfigError("cv: other data; choose another -o"),
            SOME_FAILED,
            "cv: other data; choose another -o",
        ),
        (False, medseg.ModelError("cv: damaged; delete it"), SOME_FAILED, "cv: damaged; delete it"),
        (True, medseg.DataError("cv: cannot be read"), SOME_FAILED, "cv: cannot be read; what is finished stays, and"),
        (True, OSError(errno.EIO, "Input/output error", "cv"), SOME_FAILED, "cv: Input/output error; what is finished"),
    ],
)
def test_what_ends_all_is_told_with_what_is_true_of_it(
    trained: bool,
    error: Exception,
    code: int,
    said: str,
    attempts: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise error

    _, words = attempts(0)
    if not trained:
        assert run(words) == OK
    monkeypatch.setattr(crossval, "_collect", refuse)
    assert run(words) == code
    told = " ".join(capsys.readouterr().err.split()).rpartition("error: ")[2]
    assert told.startswith(said)
    assert ("what is finished" in told) == ("what is finished" in said)


def test_a_file_that_cannot_be_read_before_anything_is_trained_is_wrong_usage(
    dataset: Path, left: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), "data/dataset.json")

    out = left(unet=1)
    monkeypatch.setattr(medseg, "read_dataset", refuse)
    assert run(command(dataset, out)) == USAGE
    assert capsys.readouterr().err.splitlines()[-1].endswith("Permission denied; see to it and try again")


def test_settings_that_say_what_is_there_go_on(dataset: Path, left: Callable[..., Path]) -> None:
    out = left(unet=1)
    assert run(command(dataset, out, "--epochs", "3", "--set", "train.batch_size=4")) == OK


def test_a_fold_that_another_machine_trains_is_waited_for(
    dataset: Path, left: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = left(unet=1, skip=[("unet", 1)])
    (out / "unet" / "fold_1.lock").write_text(lock_text(machine="another", host="node7", process=42))
    assert run(command(dataset, out)) == OK
    said = capsys.readouterr().out
    assert "waiting: unet, fold 1: node7, process 42 trains it" in said
    assert "not collected yet" in said
    assert not (out / "crossval.json").exists()


def test_one_fold_alone_leaves_the_others_to_others(
    dataset: Path, left: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = left(unet=1, skip=[("unet", 1)])
    assert run(command(dataset, out, "--only-fold", "0")) == OK
    assert "waiting: unet, fold 1: not trained yet" in capsys.readouterr().out


def test_one_fold_that_a_living_process_trains_is_left_to_it(
    dataset: Path, left: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossval, "UNTIL_STALE_S", 0.1)
    out = left(unet=1, skip=[("unet", 1)])
    (out / "unet" / "fold_1.lock").write_text(lock_text(machine="another", host="node7", process=42))
    assert run(command(dataset, out, "--only-fold", "1")) == OK
    assert "waiting: unet, fold 1: node7, process 42 trains it" in capsys.readouterr().out


def test_one_fold_of_a_process_that_was_killed_elsewhere_is_trained_once_that_is_known(
    attempts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOOK_S", 0.05)
    used, words = attempts(0)
    lock = Path(words[2]) / "unet" / "fold_1.lock"
    lock.write_text(lock_text(machine="another", host="node7", process=42))
    make_old(lock, STALE_S - 1)
    assert run([*words, "--only-fold", "1"]) == OK
    assert [job["fold"] for job in used.jobs] == [1]


@pytest.mark.parametrize("early", [False, True])
def test_what_another_task_has_collected_meanwhile_is_not_collected_again(
    early: bool,
    dataset: Path,
    left: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locks, "LOOK_S", 0.05)
    out = left(unet=1)
    assert run(command(dataset, out)) == OK
    before = (out / "crossval.json").read_text()
    lock, taken = out / "collect.lock", locks.take
    record = json.loads(before) | {"medseg": "of another task"}
    if early:
        # it had looked before the last fold was done
        record["networks"][0]["folds"][1]["weights_sha256"] = None

    def slow(path: Path) -> Lock | None:
        if path == lock and lock.is_file():
            # the other one ends while this one waits
            lock.unlink()
            (out / "crossval.json").write_text(json.dumps(record))
            return None
        return taken(path)

    lock.write_text(lock_text(machine="another", host="node7", process=42))
    monkeypatch.setattr(locks, "take", slow)
    assert run(command(dataset, out, "--only-fold", "1")) == OK
    assert "waiting" not in capsys.readouterr().out
    found = json.loads((out / "crossval.json").read_text())
    assert (found["medseg"] == "of another task") == (not early)
    assert found["networks"] == json.loads(before)["networks"]


@pytest.mark.parametrize("killed", [False, True])
def test_the_last_task_reports_what_failed_in_another(
    killed: bool, attempts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = [-signal.SIGKILL] * 2 if killed else [1, 1]
    _, words = attempts(*codes, 0)
    out = Path(words[2])
    assert run([*words, "--only-fold", "1"]) == SOME_FAILED
    reason = "killed from outside" if killed else "broke with 1"
    assert reason in capsys.readouterr().err
    (out / "crossval.json").unlink()
    assert run([*words, "--only-fold", "0"]) == SOME_FAILED
    assert reason in capsys.readouterr().err
    assert [fold["state"] for fold in record_of(out)["networks"][0]["folds"]] == ["done", "failed"]
    # and is forgotten once it has been done after all
    assert run([*words, "--only-fold", "1"]) == OK
    assert record_of(out)["complete"]


def test_while_others_are_at_work_their_failures_are_theirs(attempts: Any) -> None:
    _, words = attempts()
    out = Path(words[2])
    shutil.rmtree(out / "unet" / "fold_0")
    for number in range(2):
        (out / "unet" / f"fold_{number}").mkdir()
    (out / "unet" / "fold_0" / "failure.json").write_text(json.dumps({"reason": "broke with 1"}))
    found = crossval._collect(out, crossval_folds(Path(words[0]), out), {}, {}, {}, "cpu", 0.0)
    assert found.failed == ()
    assert found.waiting == (
        "unet, fold 0: not trained yet; it failed before: broke with 1",
        "unet, fold 1: not trained yet",
    )


def test_folds_of_a_gpu_and_of_a_cpu_are_told_apart(
    dataset: Path, left: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    out = left(unet=1)
    description = out / "unet" / "fold_1" / "model.json"
    content = json.loads(description.read_text())
    content["training"]["device"] = "cuda:0 (a GPU)"
    description.write_text(json.dumps(content))
    assert run(command(dataset, out)) == OK
    assert "devices of several kinds (" in caplog.text
    assert "cuda: unet, fold 1" in caplog.text


# ---- the process that trains


class Attempts:
    """Stands in for that process: ends with each of `codes` in turn; 0: leaves a finished fold, else a reason."""

    def __init__(self, dataset: Path, *codes: int | Callable[[], int]) -> None:
        self.dataset = dataset
        self.codes = list(codes)
        self.jobs: list[dict[str, Any]] = []

    def __call__(self, folder: Path, quiet_s: None, *, started: Any, forbidden: Any) -> int:
        assert quiet_s is None
        started(os.getpid())
        self.jobs.append(json.loads((folder / "job.json").read_text()))
        code = self.codes.pop(0)
        code = code() if callable(code) else code
        if code == 0:
            job = self.jobs[-1]
            fold = make_fold(self.dataset, folder.parent.parent, job["fold"], name=folder.parent.name)
            leave(replace(fold, config=medseg.make_config(job["config"])))
        elif code > 0:
            (folder / "failure.json").write_text(json.dumps({"reason": f"broke with {code}"}))
        return code


@pytest.fixture
def attempts(dataset: Path, left: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fold 0 is there; the process of fold 1 ends with the codes that are given."""
    out = left(unet=1, skip=[("unet", 1)])

    def use(*codes: int | Callable[[], int]) -> tuple[Attempts, list[str]]:
        stand_in = Attempts(dataset, *codes)
        monkeypatch.setattr(folds, "attempt", stand_in)
        return stand_in, command(dataset, out)

    return use


def test_only_what_is_missing_is_trained(attempts: Any) -> None:
    used, words = attempts(0)
    assert run(words) == OK
    assert [job["fold"] for job in used.jobs] == [1]
    assert not list(Path(words[2]).rglob("*.lock"))
    assert run(words) == OK
    assert len(used.jobs) == 1


def test_a_fold_whose_held_back_files_have_changed_is_judged_again_once(
    attempts: Any, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used, words = attempts(0, 0)
    fold = make_fold(dataset, Path(words[2]), 0, name="unet")
    (fold.folder / "job.json").write_text(json.dumps(fold.job))
    (fold.folder / "last.pt").touch()
    correct(fold.held_back[0])
    assert run([*words, "--only-fold", "1"]) == OK
    waiting = capsys.readouterr().out
    assert "waiting: unet, fold 0: files of its held-back cases have changed" in " ".join(waiting.split())
    assert run(words) == OK
    said = " ".join(capsys.readouterr().out.split())
    assert "1/2 unet, fold 0: files of its held-back cases have changed" in said
    assert [job["fold"] for job in used.jobs] == [1, 0]
    assert run(words) == OK
    assert len(used.jobs) == 2


def test_a_training_that_breaks_down_is_gone_on_with_once(attempts: Any) -> None:
    used, words = attempts(1, 0)
    assert run(words) == OK
    assert len(used.jobs) == 2


def test_a_fold_that_fails_is_named_and_the_others_are_done(attempts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, words = attempts(1, 1)
    assert run(words) == SOME_FAILED
    assert "unet, fold_1: broke with 1" in capsys.readouterr().err.splitlines()[-1]
    record = record_of(Path(words[2]))
    assert [fold["state"] for fold in record["networks"][0]["folds"]] == ["done", "failed"]


def test_wrong_settings_are_tried_once(attempts: Any) -> None:
    used, words = attempts(2)
    assert run(words) == SOME_FAILED
    assert len(used.jobs) == 1


def test_ctrl_c_ends_with_130_and_leaves_no_lock(attempts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, words = attempts(130)
    assert run(words) == INTERRUPTED
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not list(Path(words[2]).rglob("*.lock"))


def test_sigterm_ends_with_75(attempts: Any) -> None:
    def told() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return 0

    _, words = attempts(told)
    assert run(words) == TERMINATED
    assert not list(Path(words[2]).rglob("*.lock"))


def test_a_fold_that_was_taken_over_is_not_ours_any_more(
    attempts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Lock, "name_worker", lambda lock, _: lock.lost.set())
    _, words = attempts(-9)
    assert run(words) == SOME_FAILED
    assert "another machine took it over" in capsys.readouterr().err


# ---- end to end


@pytest.mark.slow
def test_folds_from_elsewhere_and_from_here_become_one_report(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    name = medseg.read_config(tiny_run.folder / "config.yaml").network.name
    shutil.copytree(tiny_run.folder, out / name / "fold_0")
    words = [str(tiny_run.dataset), "-o", str(out), "--folds", "2", "--device", "cpu"]
    assert run(words) == OK
    record = record_of(out)
    assert record["complete"]
    first, second = record["networks"][0]["folds"]
    assert (first["machine"], second["machine"] is None) == (None, False)
    assert first["steps"] == second["steps"] == 2
    assert record["methods"][0]["dice"]["n"] == 4
    # nothing is trained again, and a mask that has gone is made again
    monkeypatch.setattr(folds, "attempt", lambda *_, **__: pytest.fail("trained again"))
    gone = next((out / name / "fold_1" / "validation").glob("*.nii.gz"))
    gone.unlink()
    assert run(words) == OK
    assert (out / "judged" / name / "again" / "fold_1" / gone.name).is_file()
    again = record_of(out)
    assert again["methods"][0]["dice"] == record["methods"][0]["dice"]
    # the folder takes a new case: its models together
    image = tiny_run.dataset / "images" / "case0.nii.gz"
    options = medseg.InferOptions(device="cpu")
    assert [r.status for r in medseg.infer([image], [out], tmp_path / "masks", options)] == ["done"]
    used = json.loads((tmp_path / "masks" / "run.json").read_text())["settings"]["models"]
    trained = [fold["weights_sha256"] for fold in again["networks"][0]["folds"]]
    assert (used, again["best"]["models"]) == (trained, [f"{name}/fold_0", f"{name}/fold_1"])
    # and a model may ship with the figures of its record
    about = tmp_path / "about.yaml"
    about.write_text(json.dumps(ABOUT))
    made = ship(out / name / "fold_0", out / "crossval.json", tmp_path / "egg", about=about)
    figures = {label: figure.mean for label, figure in made.card.dice.items()}
    assert figures == {label: figure["mean"] for label, figure in record["methods"][0]["labels"].items()}
    assert "2-fold cross-validation of the same recipe, 4 cases, each judged by" in made.card.judged


@pytest.mark.slow
def test_a_run_on_the_sample_that_is_told_to_end_goes_on_from_its_state(
    tiny_settings: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = Path(medseg.__file__).parent / "sample"
    changes = [
        *(s for s in tiny_settings if "patch" not in s),
        "train.epochs=1",
        "train.steps_per_epoch=100",
        "train.save_every_s=0.001",
    ]
    out = tmp_path / "out"
    words = [str(sample), "-o", str(out), "--folds", "2", "--device", "cpu", "--set", "train.time_budget_s=null"]
    words += [word for change in changes for word in ("--set", change)]
    whole = [sys.executable, "-m", "medseg_pipelines.crossval", *words]
    with subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            end = time.monotonic() + 300
            while not list(out.rglob("last.pt")) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=180)
        finally:
            process.kill()
    assert process.returncode == TERMINATED, said
    (state,) = out.rglob("last.pt")
    log = state.parent / "log.txt"
    assert "the state is saved" in log.read_text()
    assert not (state.parent / "model.json").exists()
    assert not list(out.rglob("*.lock"))
    # nothing is asked any more: what is there says it all
    assert run([*words[:7], "--only-fold", "0"]) == OK
    assert "resumed at step" in log.read_text()
    assert "not trained yet" in capsys.readouterr().out


@pytest.mark.slow
def test_an_ensemble_of_real_networks_is_made_fold_by_fold(tiny_dataset: Any, tmp_path: Path) -> None:
    dataset, out = tiny_dataset(spatial_dims=2), tmp_path / "out"
    changes = (
        "network.channels=[4,8]",
        "network.aspp_channels=4",
        "network.skip_channels=4",
        "network.decoder_channels=4",
        "network.output_stride=4",
        "windows.patch_size=[32,32]",
        "train.batch_size=2",
        "train.steps_per_epoch=2",
        "train.precision='32'",
    )
    words = [str(dataset), "-o", str(out), "--folds", "2", "--device", "cpu", "--epochs", "1"]
    words += ["--networks", "deeplabv3plus,unet", *(word for change in changes for word in ("--set", change))]
    assert run(words) == OK
    record = record_of(out)
    assert record["complete"]
    name = "deeplabv3plus+unet"
    methods = {method["name"]: method for method in record["methods"]}
    assert methods.keys() == {"deeplabv3plus", "unet", name}
    assert methods[name]["dice"]["n"] == 4
    assert (out / "compare" / "compare.html").is_file()
    # each mask is that of both models of the fold that held the case back, of no others, and of neither alone
    options = medseg.InferOptions(device="cpu", precision="32", settings={"postprocess": {}})
    pairs = [[out / network / f"fold_{n}" for network in ("deeplabv3plus", "unet")] for n in range(2)]
    together = [medseg.load_model(*pair, options=options) for pair in pairs]
    alone = [[medseg.load_model(folder, options=options) for folder in pair] for pair in pairs]
    for fold in record["networks"][0]["folds"]:
        number = fold["fold"]
        for case in fold["cases"]:
            image = dataset / "images" / f"{case}.png"
            made = imread(out / "judged" / name / f"fold_{number}" / f"{case}.png")
            assert np.array_equal(made, together[number].segment(image))
            for other in (together[1 - number], *alone[number]):
                assert not np.array_equal(made, other.segment(image))
