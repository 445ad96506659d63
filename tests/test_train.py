"""Training from the inside: what a run folder holds, how a run ends, breaks, and goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event

import medseg
from medseg.config import settings_from
from medseg.fit import Fit, what_fits
from medseg.patches import PatchSampler
from medseg.train import parse_duration

Train = Callable[..., medseg.Run]

MODULE = import_module("medseg.fit")


@pytest.fixture
def train(tmp_path: Path, tiny_settings: tuple[str, ...]) -> Train:
    """Trains the tiny network on a data set, into `tmp_path`/`name`."""

    def call(
        dataset: Path, *settings: str, name: str = "run", time_budget: str | None = None, epochs: int = 1, **more: Any
    ) -> medseg.Run:
        options = medseg.TrainOptions(
            settings=settings_from([*tiny_settings, *settings]), device="cpu", **{"folds": 2, **more}
        )
        if time_budget is not None:
            return medseg.train(dataset, tmp_path / name, time_budget=time_budget, options=options)
        return medseg.train(dataset, tmp_path / name, epochs=epochs, options=options)

    return call


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _scalars(path: Path) -> dict[str, dict[int, float]]:
    """Value by step by name in a file of TensorBoard events: records of length, 4 bytes, event, 4 bytes."""
    content, found, at = path.read_bytes(), {}, 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
        at += length + 16
    return found


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ---- the run folder


def test_a_run_folder_holds_what_is_promised(tiny_run) -> None:
    names = {f.name for f in tiny_run.folder.iterdir()}
    assert {"config.yaml", "model.safetensors", "model.json", "metrics.csv", "log.txt", "last.pt"} <= names
    assert len([n for n in names if n.startswith("events.out.tfevents")]) == 1
    masks = sorted(f.name for f in (tiny_run.folder / "validation").glob("*.nii.gz"))
    assert masks == [f"{c}.nii.gz" for c in _description(tiny_run.folder)["training"]["validation_cases"]]
    report = {f.name for f in (tiny_run.folder / "validation" / "report").iterdir()}
    assert report == {"metrics.csv", "summary.json", "report.html", "labels.ctbl", "labels.label"}
    assert [n for n in names if n.startswith(".")] == []


def _description(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "model.json").read_text()))


def test_the_configuration_is_whole_and_readable(tiny_run) -> None:
    config = medseg.read_config(tiny_run.folder / "config.yaml")
    assert config.network.channels == (4, 8)
    assert (config.train.epochs, config.train.time_budget_s) == (1, None)
    assert "# median of the data set" in (tiny_run.folder / "config.yaml").read_text()
    assert config == medseg.make_config(_description(tiny_run.folder)["config"])


def test_the_model_says_what_it_was_trained_on(tiny_run) -> None:
    described = _description(tiny_run.folder)
    assert described["training"]["cases"] == 2
    assert len(described["training"]["data_sha256"]) == 64
    assert [(label["name"], label["value"]) for label in described["labels"]] == [("label_1", 1), ("label_2", 2)]
    assert described["versions"]["torch"] == torch.__version__


def test_metrics_and_events_tell_the_same(tiny_run) -> None:
    (row,) = _rows(tiny_run.folder)
    assert (row["epoch"], row["step"]) == ("1", "2")
    assert list(row)[5:] == ["dice", "dice_label_1", "dice_label_2"]
    events = _scalars(next(tiny_run.folder.glob("events.*")))
    assert events["loss"][2] == pytest.approx(float(row["loss"]), rel=1e-5)
    assert events["dice/label_1"][2] == pytest.approx(float(row["dice_label_1"]), abs=1e-5)


def test_the_validation_report_judges_the_written_masks(tiny_run) -> None:
    with (tiny_run.folder / "validation" / "report" / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    mask, reference = (
        np.asarray(nib.load(folder / f"{row['case']}.nii.gz").dataobj) == int(row["label"])
        for folder in (tiny_run.folder / "validation", tiny_run.dataset / "labels")
    )
    assert int(row["tp"]) == (mask & reference).sum()
    assert int(row["fn"]) == (~mask & reference).sum()


def test_loading_a_model_never_unpickles(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    labels = medseg.load_model(tiny_run.folder).segment(tiny_run.dataset / "images" / "case0.nii.gz")
    assert labels.shape == nib.load(tiny_run.dataset / "images" / "case0.nii.gz").shape


# ---- folds


def test_fold_all_holds_nothing_back(train: Train, tiny_dataset) -> None:
    run = train(tiny_dataset(cases=2), fold="all")
    assert run.report is None
    assert not (run.folder / "validation").exists()
    assert _description(run.folder)["training"]["cases"] == 2
    assert _rows(run.folder)[0]["dice"] == ""


def test_the_folds_of_the_data_set_win(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=3, form="nnunet")
    split = [{"train": ["case0", "case1"], "val": ["case2"]}, {"train": ["case1", "case2"], "val": ["case0"]}]
    (dataset / "splits_final.json").write_text(json.dumps(split))
    run = train(dataset, fold=1, folds=5)
    assert _description(run.folder)["training"]["validation_cases"] == ["case0"]
    assert [f.name for f in (run.folder / "validation").glob("*.nii.gz")] == ["case0.nii.gz"]


def test_a_fold_without_training_cases_is_refused(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=3, form="nnunet")
    split = [{"train": ["patient7"], "val": ["case2"]}]
    (dataset / "splits_final.json").write_text(json.dumps(split))
    with pytest.raises(medseg.MedsegError, match="has 0 labelled cases to train on and 1 to validate on"):
        train(dataset)


# ---- kinds of data


def test_pictures_train_end_to_end(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=3, spatial_dims=2)
    run = train(dataset, "windows.patch_size=[32,32]", "network.output_stride=4", folds=3)
    (mask,) = (run.folder / "validation").glob("*.png")
    with Picture.open(mask) as found, Picture.open(dataset / "images" / mask.name) as image:
        assert found.size == image.size
        assert set(np.unique(np.array(found))) <= {0, 1, 2}


def _relabel(dataset: Path, change: Callable[[np.ndarray], np.ndarray], labels: dict[str, Any], **more: Any) -> None:
    """Changes all label files of an nnU-Net folder and what its dataset.json says about them."""
    for path in (dataset / "labelsTr").iterdir():
        loaded = nib.load(path)
        nib.save(nib.Nifti1Image(change(np.asarray(loaded.dataobj)).astype(np.uint8), loaded.affine), path)
    description = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**description, "labels": labels, **more}))


# enough steps for the network to find the bright shell; a constant rate, large for so few
LEARN = ("train.steps_per_epoch=40", "train.learning_rate=0.02", "augment.p_affine=0", "augment.p_low_resolution=0")


def test_values_with_gaps_come_back_in_the_masks(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2, form="nnunet")
    _relabel(dataset, lambda a: np.array([0, 3, 7])[a], {"background": 0, "shell": 3, "core": 7})
    run = train(dataset, *LEARN)
    (mask,) = (run.folder / "validation").glob("*.nii.gz")
    values = set(np.unique(np.asarray(nib.load(mask).dataobj)).tolist())
    assert values <= {0, 3, 7}
    assert 3 in values


def test_regions_train_and_infer(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2, form="nnunet")
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    _relabel(dataset, lambda a: a, labels, regions_class_order=[1, 2])
    run = train(dataset, *LEARN)
    assert run.report is not None
    assert list(run.report.summary["labels"]) == ["whole", "core"]
    (mask,) = (run.folder / "validation").glob("*.nii.gz")
    values = set(np.unique(np.asarray(nib.load(mask).dataobj)).tolist())
    assert values <= {0, 1, 2}
    assert values & {1, 2}


def test_ignored_voxels_are_neither_learnt_nor_written(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2, form="nnunet")
    labels = {"background": 0, "shell": 1, "ignore": 2}
    _relabel(dataset, lambda a: a, labels)
    run = train(dataset, *LEARN)
    assert run.config.data.out_channels == 2
    (mask,) = (run.folder / "validation").glob("*.nii.gz")
    assert 2 not in np.asarray(nib.load(mask).dataobj)
    assert run.report is not None
    assert list(run.report.summary["labels"]) == ["shell"]


def test_two_channels(train: Train, tiny_dataset, tmp_path: Path) -> None:
    dataset = tiny_dataset(cases=2, form="nnunet")
    for path in list((dataset / "imagesTr").iterdir()):
        loaded = nib.load(path)
        second = path.with_name(path.name.replace("_0000", "_0001"))
        nib.save(nib.Nifti1Image(-np.asarray(loaded.dataobj), loaded.affine), second)
    description = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**description, "channel_names": {"0": "T1", "1": "T2"}}))
    run = train(dataset)
    assert run.config.data.channels == ("T1", "T2")
    assert 2 in {w.shape[1] for w in load_file(run.folder / "model.safetensors").values() if w.ndim == 5}
    (result,) = medseg.infer([dataset / "imagesTr"], [run.folder], tmp_path / "out", medseg.InferOptions(shard=(1, 2)))
    assert (result.case, result.status, len(result.inputs)) == ("case0", "done", 2)


# ---- how training ends


def test_the_time_budget_ends_training_on_time(train: Train, tiny_dataset) -> None:
    run = train(tiny_dataset(cases=2), time_budget="3s")
    # a step of this network takes 0.1 s, the validation after the last step 0.2 s
    assert 2.9 <= run.seconds["train"] <= 4.0
    assert run.config.train.epochs is None
    assert float(_rows(run.folder)[-1]["seconds"]) >= 3.0


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400), (7, 7)])
def test_durations(text: str | int, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "0", "-1m", "nan", "inf", "2 weeks"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(medseg.ConfigError, match="expected a positive time"):
        parse_duration(text)


def test_the_best_weights_are_kept(train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = iter([0.2, 0.9, 0.4])
    seen: list[dict[str, torch.Tensor]] = []

    def scores(config: Any, network: torch.nn.Module, *_: Any) -> dict[str, float]:
        seen.append({k: v.clone() for k, v in network.state_dict().items()})
        return {"label_1": next(dice)}

    monkeypatch.setattr(MODULE, "quick_dice", scores)
    run = train(tiny_dataset(cases=2), "train.validation_share=1", epochs=3)
    assert [row["dice"] for row in _rows(run.folder)] == ["0.2", "0.9", "0.4"]
    kept = load_file(run.folder / "model.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in seen[1].items())
    assert not all(torch.equal(kept[k], v) for k, v in seen[2].items())
    assert _description(run.folder)["training"]["best_dice_while_training"] == 0.9


def test_the_same_seed_gives_the_same_weights(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2)
    one, two, other = (
        train(dataset, "train.deterministic=true", f"train.seed={seed}", name=name, fold="all", epochs=2)
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    torch.use_deterministic_algorithms(False)
    assert _weights(one.folder) == _weights(two.folder)
    assert _weights(one.folder) != _weights(other.folder)


def test_with_a_validation_fold_the_clock_does_not_choose_the_weights(
    train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, epochs = tiny_dataset(cases=2), []
    for name, pause in (("quick", 0.0), ("slow", 0.2)):
        monkeypatch.setattr(MODULE, "quick_dice", _slow_dice(pause))
        run = train(dataset, "train.deterministic=true", "train.validation_share=0.3", name=name, epochs=4)
        epochs.append([row["epoch"] for row in _rows(run.folder) if row["dice"]])
    torch.use_deterministic_algorithms(False)
    assert epochs[0] == epochs[1]


def _slow_dice(pause: float) -> Callable[..., dict[str, float]]:
    def scores(*_: Any) -> dict[str, float]:
        time.sleep(pause)
        return {"label_1": 0.5}

    return scores


# ---- how training breaks


def test_a_loss_that_is_nan_names_the_batch(train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = PatchSampler.draw
    drawn: list[tuple[str, ...]] = []

    def poisoned(sampler: PatchSampler) -> Any:
        batch = draw(sampler)
        drawn.append(batch.cases)
        if len(drawn) == 3:
            batch.image[0] = float("nan")
        return batch

    monkeypatch.setattr(PatchSampler, "draw", poisoned)
    with pytest.raises(medseg.TrainingError, match="the loss became nan at step 2") as caught:
        train(tiny_dataset(cases=3), epochs=5, fold="all")
    assert ", ".join(drawn[2]) in str(caught.value)
    assert "train.learning_rate" in str(caught.value)


def test_a_gradient_that_is_nan_names_the_batch(train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    # √(0·x): 0 with the gradient 0/0
    monkeypatch.setattr(MODULE, "loss_of", lambda _c, _d, logits, _l: (0 * logits).sum().sqrt())
    with pytest.raises(medseg.TrainingError, match="gradient is no longer finite at step 0; the last batch held case"):
        train(tiny_dataset(cases=2), fold="all")


def _short_of_memory(monkeypatch: pytest.MonkeyPatch, *, voxels: int) -> None:
    """The first layer of every network runs out of memory above a number of voxels in a batch."""
    from medseg.networks.deeplabv3plus import DeepLabV3Plus

    forward = DeepLabV3Plus.forward

    def limited(network: Any, image: torch.Tensor) -> Any:
        if image.numel() > voxels:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(network, image)

    monkeypatch.setattr(DeepLabV3Plus, "forward", limited)


def test_out_of_memory_says_which_batch_fits(train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    _short_of_memory(monkeypatch, voxels=2 * 16**3)
    with pytest.raises(medseg.TrainingError, match="out of memory on cpu") as caught:
        train(tiny_dataset(cases=2), "train.batch_size=5", fold="all")
    assert "train.batch_size 5" in str(caught.value)
    assert "train.batch_size=2 with windows.patch_size=[16, 16, 16] fits" in str(caught.value)


def test_out_of_memory_says_which_patch_fits(train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    _short_of_memory(monkeypatch, voxels=24 * 24 * 16)
    with pytest.raises(medseg.TrainingError, match=r"train.batch_size=1 with windows.patch_size=\[24, 24, 16\] fits"):
        train(tiny_dataset(cases=2), "windows.patch_size=[32,32,24]", fold="all")


def test_what_fits_gives_up_at_the_smallest_patch() -> None:
    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert what_fits(medseg.Config(), never) is None


def test_a_bug_is_not_taken_for_lack_of_memory() -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        what_fits(medseg.Config(), broken)


# ---- going on


def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(
    train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tiny_dataset(cases=3)
    deterministic = ("train.deterministic=true", "train.save_every_s=1e-9")
    whole = train(dataset, *deterministic, name="whole", epochs=3, fold="all")
    draw = PatchSampler.draw
    drawn: list[int] = []

    def killed(sampler: PatchSampler) -> Any:
        if len(drawn) == 4:
            raise SystemExit
        drawn.append(1)
        return draw(sampler)

    monkeypatch.setattr(PatchSampler, "draw", killed)
    with pytest.raises(SystemExit):
        train(dataset, *deterministic, name="parts", epochs=3, fold="all")
    monkeypatch.undo()
    parts = train(dataset, *deterministic, name="parts", epochs=3, fold="all", resume=True)
    torch.use_deterministic_algorithms(False)
    assert [r["loss"] for r in _rows(whole.folder)] == [r["loss"] for r in _rows(parts.folder)]
    assert _weights(whole.folder) == _weights(parts.folder)


def test_a_killed_run_goes_on(train: Train, tiny_dataset, tiny_settings: tuple[str, ...], tmp_path: Path) -> None:
    dataset, folder = tiny_dataset(cases=2), tmp_path / "run"
    settings = [option for setting in tiny_settings for option in ("--set", setting)]
    started = subprocess.Popen(
        [
            *(sys.executable, "-m", "medseg", "train", str(dataset), "-o", str(folder), "--epochs", "100000"),
            *("--folds", "2", "--device", "cpu", "--set", "train.save_every_s=0.01", *settings),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "last.pt").is_file() and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    step = int(torch.load(folder / "last.pt", weights_only=True)["step"])
    assert step > 0
    assert not (folder / "model.safetensors").exists()
    run = train(dataset, epochs=step // 2 + 2, resume=True)
    assert run.steps == 2 * (step // 2 + 2)
    assert medseg.load_model(run.folder).label_names == {1: "label_1", 2: "label_2"}


def test_resume_does_not_repeat_rows(train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tiny_dataset(cases=2)
    train(dataset, fold="all", epochs=1)
    # a kill after two more epochs, of which no state was saved
    monkeypatch.setattr(Fit, "save", _stop)
    with pytest.raises(SystemExit):
        train(dataset, fold="all", epochs=3, resume=True)
    monkeypatch.undo()
    run = train(dataset, fold="all", epochs=4, resume=True)
    assert [row["epoch"] for row in _rows(run.folder)] == ["1", "2", "3", "4"]


def _stop(_: Fit) -> None:
    raise SystemExit


def test_resume_does_not_train_on_the_cases_held_back(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2)
    first = train(dataset, fold=1)
    before = (first.folder / "config.yaml").read_bytes()
    with pytest.raises(medseg.ConfigError, match="cases held back that are not the 1 of this fold"):
        train(dataset, fold=0, epochs=2, resume=True)
    assert (first.folder / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("change", ["data.labels={b: 2, a: 1}", "preprocess.spacing_mm=[2,2,2]"])
def test_resume_refuses_a_state_of_another_meaning(train: Train, tiny_dataset, change: str) -> None:
    dataset = tiny_dataset(cases=2)
    train(dataset, fold="all")
    with pytest.raises(medseg.ConfigError, match="was trained with other cases, or another data, preprocess"):
        train(dataset, change, fold="all", epochs=2, resume=True)


def test_a_configuration_that_lacks_sections_is_laid_over_the_plan(tiny_dataset, tmp_path: Path, tiny_settings) -> None:
    part = tmp_path / "part.yaml"
    part.write_text("train: {learning_rate: 0.0321}\n")
    options = medseg.TrainOptions(config=part, settings=settings_from(tiny_settings), fold="all")
    run = medseg.train(tiny_dataset(cases=2), tmp_path / "run", epochs=1, options=options)
    assert run.config.train.learning_rate == 0.0321
    assert run.config.data.foreground == ("label_1", "label_2")


def test_resume_keeps_the_configuration_of_the_run(tiny_dataset, tmp_path: Path, tiny_settings) -> None:
    dataset, folder = tiny_dataset(cases=2), tmp_path / "run"
    settings = settings_from([*tiny_settings, "train.learning_rate=0.0123"])
    medseg.train(dataset, folder, epochs=1, options=medseg.TrainOptions(settings=settings, fold="all"))
    run = medseg.train(dataset, folder, epochs=2, options=medseg.TrainOptions(fold="all", resume=True))
    assert run.config.train.learning_rate == 0.0123
    assert run.config.train.epochs == 2


# ---- the demo


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    done = medseg.demo(tmp_path / "demo", time_budget="5s", device="cpu")
    assert {r.status for r in done.results} == {"done"}
    assert (tmp_path / "demo" / "report.html").is_file()
    assert set(done.report.table["case"]) == {r.case for r in done.results}
    assert done.run.folder == tmp_path / "demo" / "run"
