"""Training from the inside: what a run folder holds, how a run ends, breaks, and goes on."""

from __future__ import annotations

import contextlib
import csv
import errno
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image as Picture
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event, SessionLog

import medseg
from medseg import bench, cli, preprocess
from medseg.asked import parse_duration
from medseg.cases import fold_split
from medseg.config import settings_from
from medseg.datasets import read_dataset
from medseg.fit import Fit, what_fits
from medseg.logfile import log_file
from medseg.patches import PatchSampler

Train = Callable[..., medseg.Run]

ASKED, MODULE, TRAIN = (import_module(f"medseg.{name}") for name in ("asked", "fit", "train"))


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


def _events(path: Path) -> Iterator[Event]:
    """Of a file of TensorBoard: records of length, 4 bytes, event, 4 bytes."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


def _scalars(path: Path) -> dict[str, dict[int, float]]:
    """Value by step by name."""
    found: dict[str, dict[int, float]] = {}
    for event in _events(path):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
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


def test_events_of_a_training_that_was_killed_before_are_not_shown(tiny_run) -> None:
    events = _events(next(tiny_run.folder.glob("events.*")))
    # TensorBoard drops what earlier files say of this step and later
    assert [e.step for e in events if e.session_log.status == SessionLog.START] == [0]


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


def test_regions_without_an_order_train(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2, form="nnunet")
    _relabel(dataset, lambda a: a, {"background": 0, "core": [2], "whole": [1, 2]})
    run = train(dataset)
    assert run.report is not None
    assert list(run.report.summary["labels"]) == ["whole", "core"]
    assert run.config.data.region_values == (1, 2)


def test_regions_that_would_be_read_as_others_are_refused(train: Train, tiny_dataset, tmp_path: Path) -> None:
    dataset = tiny_dataset(cases=2, form="nnunet")
    _relabel(dataset, lambda a: a, {"background": 0, "whole": [1, 2], "core": [2]}, regions_class_order=[2, 1])
    with pytest.raises(
        medseg.ConfigError, match=r"`whole` is written as 2, which would be read as `core` too.*\[1, 2\]"
    ):
        train(dataset)
    assert not (tmp_path / "run").exists()


def test_labels_of_the_settings_are_what_is_planned_for(tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2)
    assert medseg.plan(dataset, settings={"data": {"labels": {"liver": 1, "core": 2}}}).config.augment.flip_axes == (0,)
    sided = medseg.plan(dataset, settings={"data": {"labels": {"left": 1, "core": 2}}})
    assert sided.config.augment.flip_axes == ()
    assert "`left` tells sides apart" in sided.reasons["augment.flip_axes"]


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
    def scores(*_: Any, **__: Any) -> dict[str, float]:
        time.sleep(pause)
        return {"label_1": 0.5}

    return scores


# ---- how training breaks


def test_a_batch_that_is_nan_is_counted_in_the_model(
    train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = PatchSampler.draw
    drawn: list[tuple[str, ...]] = []

    def poisoned(sampler: PatchSampler) -> Any:
        batch = draw(sampler)
        drawn.append(batch.cases)
        if len(drawn) == 3:
            batch.image[0] = float("nan")
        return batch

    monkeypatch.setattr(PatchSampler, "draw", poisoned)
    run = train(tiny_dataset(cases=3), epochs=2, fold="all")
    assert (run.steps, len(drawn)) == (4, 5)
    assert _description(run.folder)["training"]["skipped_batches"] == 1
    assert f"the loss is nan at step 2; this batch of {', '.join(drawn[2])} is skipped" in _log(run.folder)


def _log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def test_a_case_that_dies_is_named_and_the_others_are_ready(
    train: Train, tiny_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tiny_dataset(cases=4)
    plan = tmp_path / "plan.yaml"
    plan.write_text(medseg.dump_yaml(medseg.plan(dataset, device="cpu").config))
    check = ASKED.check_dataset

    def checked_before(*arguments: Any, **more: Any) -> Any:
        found = check(*arguments, **more)
        # a share that goes away, or a disk that dies, after the look at every file
        path = dataset / "images" / "case1.nii.gz"
        path.write_bytes(path.read_bytes()[:200])
        return found

    monkeypatch.setattr(ASKED, "check_dataset", checked_before)
    with pytest.raises(medseg.DataError, match="1 of 4 cases cannot be read, nothing was trained") as caught:
        train(dataset, fold="all", config=plan)
    assert re.search(r"\n  case1: .*case1\.nii\.gz", str(caught.value))
    cached = {path.name.split("-")[0] for path in (tmp_path / "run" / "cache").iterdir()}
    assert cached == {"case0", "case2", "case3"}


def test_a_disk_that_the_cache_fills_is_no_wrong_usage(
    train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, prepare, full = tiny_dataset(cases=3), TRAIN.prepare_cached, [True]

    def filled(case: Any, *given: Any, **more: Any) -> Any:
        if full[0] and case.id == "case1":
            raise medseg.DataError("cannot write") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return prepare(case, *given, **more)

    monkeypatch.setattr(TRAIN, "prepare_cached", filled)
    with pytest.raises(medseg.TrainingError, match=r"cannot write; what is ready in .*cache stays: then start again"):
        train(dataset, fold="all")
    full[0] = False
    assert train(dataset, fold="all").steps == 2


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_case_that_memory_does_not_hold_is_named(
    train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    dataset = tiny_dataset(cases=4)
    resampled = preprocess.ResampleToGridd.__call__

    def short(self: Any, item: Any) -> Any:
        if "case1" in str(item["image_file"]):
            raise error
        return resampled(self, item)

    monkeypatch.setattr(preprocess.ResampleToGridd, "__call__", short)
    told = r"1 of 4 cases cannot be read.*\n  case1: .*case1\.nii\.gz: the memory of this machine does not hold it"
    with pytest.raises(medseg.DataError, match=re.compile(told, re.DOTALL)):
        train(dataset, fold="all")


def test_a_bug_in_preprocessing_is_not_taken_for_a_bad_case(
    train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, item: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(preprocess.ResampleToGridd, "__call__", broken)
    with pytest.raises(RuntimeError, match="applying transform"):
        train(tiny_dataset(cases=2), fold="all")


def test_warnings_of_the_look_at_every_file_are_told(tiny_dataset, caplog: pytest.LogCaptureFixture) -> None:
    dataset = tiny_dataset(cases=3)
    first = dataset / "images" / "case0.nii.gz"
    # the same voxels in other bytes
    nib.save(nib.load(first), dataset / "images" / "case1.nii")
    (dataset / "images" / "case1.nii.gz").unlink()
    shutil.copyfile(dataset / "labels" / "case0.nii.gz", dataset / "labels" / "case1.nii.gz")
    medseg.plan(dataset, device="cpu")
    assert any("case1.nii: the voxels of case case0" in message for message in caplog.messages)


def test_files_are_hashed_with_progress_before_they_are_compared(
    tiny_dataset, tmp_path: Path, tiny_settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []

    def compared(*_: Any, **more: Any) -> None:
        raise medseg.ConfigError(f"{stages.count('hash')} files hashed")

    monkeypatch.setattr(TRAIN, "refuse_leaks", compared)
    options = medseg.TrainOptions(settings=settings_from(tiny_settings), folds=2, device="cpu")
    with pytest.raises(medseg.ConfigError, match="8 files hashed"):
        medseg.train(
            tiny_dataset(cases=4),
            tmp_path / "run",
            epochs=1,
            options=options,
            progress=lambda stage, *_: stages.append(stage),
        )


def test_each_file_is_hashed_once(train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def digest(path: Path) -> str:
        hashed.append(path)
        return medseg.file_sha256(path)

    def again(path: Path) -> str:
        raise RuntimeError(f"{path} is hashed again")

    monkeypatch.setattr(TRAIN, "file_sha256", digest)
    monkeypatch.setitem(preprocess.prepare_cached.__kwdefaults__, "file_digest", again)
    train(tiny_dataset(cases=2), fold=0)
    assert len(hashed) == len(set(hashed)) == 4


def test_a_disk_that_is_really_full_is_one_message_and_training_goes_on_later(
    train: Train, tiny_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, small = tiny_dataset(cases=2), tmp_path / "run"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    draw = PatchSampler.draw
    drawn: list[int] = []

    def filling(sampler: PatchSampler) -> Any:
        drawn.append(1)
        if len(drawn) == 4:
            with (small / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(1024)):
                    continue
        return draw(sampler)

    monkeypatch.setattr(PatchSampler, "draw", filling)
    try:
        with pytest.raises(medseg.TrainingError, match="No space left on device"):
            train(dataset, "train.save_every_s=1e-9", epochs=3, fold="all")
        assert "Traceback" not in capsys.readouterr().err
        (small / "other").unlink()
        run = train(dataset, epochs=3, fold="all", resume=True)
        # the state of the third step was whole: one was done again
        assert (run.steps, len(drawn)) == (6, 7)
        assert [row["step"] for row in _rows(small)] == ["2", "4", "6"]
    finally:
        # the run's files are still mapped
        subprocess.run(["umount", "--lazy", str(small)], check=True)


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
    assert "train.batch_size=2 fits: go on with --resume --set train.batch_size=2" in str(caught.value)


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
        if len(drawn) == 3:
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


def _command(dataset: Path, folder: Path, settings: tuple[str, ...], *more: str) -> list[str]:
    options = [option for setting in settings for option in ("--set", setting)]
    return [
        *(sys.executable, "-m", "medseg", "train", str(dataset), "-o", str(folder), "--folds", "2", "--device", "cpu"),
        *(*options, *more),
    ]


def test_the_folder_of_a_cross_validation_is_refused(train: Train, tiny_dataset, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "crossval.json").write_text("{}")
    dataset = tiny_dataset(cases=2)
    for resume in (False, True):
        with pytest.raises(medseg.ConfigError, match="run: holds a cross-validation"):
            train(dataset, fold="all", resume=resume)


@pytest.mark.parametrize("part", [".", "images", "labels"])
def test_a_run_among_the_data_is_refused(train: Train, tiny_dataset, tmp_path: Path, part: str) -> None:
    dataset = tiny_dataset(cases=2)
    before = sorted(dataset.rglob("*"))
    (tmp_path / "link").symlink_to(dataset / part)
    for name in (f"{dataset.name}/{part}", "link"):
        with pytest.raises(
            medseg.ConfigError, match="images or labels are there, among which the run would be lost; choose another -o"
        ):
            train(dataset, fold="all", name=name)
    assert sorted(dataset.rglob("*")) == before


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _after_two_epochs(folder: Path, process: subprocess.Popen[str], number: int) -> tuple[str, str]:
    """Sends a signal when a run folder tells of them, and gives what the process printed."""
    deadline = time.monotonic() + 240
    metrics = folder / "metrics.csv"
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") > 2:
            break
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=240)


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_killed_and_resumed_is_the_undisturbed_one(
    train: Train, tiny_dataset, tiny_settings: tuple[str, ...], tmp_path: Path
) -> None:
    dataset, folder = tiny_dataset(cases=2), tmp_path / "run"
    settings = ("train.deterministic=true", "train.save_every_s=1e-9")
    more = ("--epochs", "20", "--fold", "all")
    command = _command(dataset, folder, (*tiny_settings, *settings), *more)
    _after_two_epochs(folder, _start(command), signal.SIGKILL)
    step = int(torch.load(folder / "last.pt", weights_only=True)["course"]["step"])
    assert 4 <= step < 40
    assert not (folder / "model.safetensors").exists()
    resumed = train(dataset, *settings, epochs=20, fold="all", resume=True)
    undisturbed = train(dataset, *settings, epochs=20, fold="all", name="undisturbed")
    assert _weights(resumed.folder) == _weights(undisturbed.folder)
    rows = [[{**row, "seconds": ""} for row in _rows(run.folder)] for run in (resumed, undisturbed)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 20


@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["as it was", "with --resume"])
def test_what_a_cluster_ends_goes_on_with_the_same_command_line(
    tiny_dataset, tiny_settings: tuple[str, ...], tmp_path: Path, resume: tuple[str, ...]
) -> None:
    dataset, folder = tiny_dataset(cases=2), tmp_path / "run"
    # ended after two epochs, and half a second before the end of its time when it goes on
    settings = (*tiny_settings, "train.save_every_s=0.01", "train.calibration_share=0")
    command = _command(dataset, folder, settings, "--fold", "all", "--time-budget", "60", *resume)
    process = _start(command)
    out, err = _after_two_epochs(folder, process, signal.SIGTERM)
    assert (process.returncode, out) == (75, ""), err
    assert "the same command line goes on" in err
    assert "Traceback" not in err
    state = torch.load(folder / "last.pt", weights_only=True)
    state["course"]["elapsed"] = 59.5
    torch.save(state, folder / "last.pt")
    again = _start(command)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert int(out.split(" steps; ")[0]) > state["course"]["step"]
    assert out.splitlines()[-1] == f"Model: {folder}"
    assert f"resumed at step {state['course']['step']}" in _log(folder)
    assert f"command: medseg {shlex.join(command[3:])}" in _log(folder)
    assert _description(folder)["training"]["command"] == f"medseg {shlex.join(command[3:])}"
    # it is finished: nothing writes over it
    third = _start([word for word in command if word != "--resume"])
    out, err = third.communicate(timeout=240)
    assert third.returncode == 2
    assert "holds a training run already" in err


def test_sigterm_in_the_last_validation_is_no_interruption_by_hand(
    train: Train, tiny_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tiny_dataset(cases=2)

    def told(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise medseg.DataError("dropped")

    monkeypatch.setattr(medseg.Segmenter, "segment_prepared", told)
    with pytest.raises(medseg.Preempted):
        train(dataset)
    monkeypatch.undo()
    # the same command line goes on
    run = train(dataset)
    assert (run.steps, [result.status for result in run.results]) == (2, ["done"])


def test_sigterm_before_the_training_is_reached_asks_to_be_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*_: Any, **__: Any) -> None:
        cli._end(signal.SIGTERM, None)

    monkeypatch.setattr(cli.training, "settings_of", told)
    monkeypatch.setattr(cli.training, "log", lambda _: None)
    assert cli.run(["train", "data", "-o", "run"]) == 75
    assert "the same command line goes on" in capsys.readouterr().err


def test_two_trainings_into_one_folder_are_refused(tmp_path: Path) -> None:
    refused = pytest.raises(medseg.ConfigError, match="another training is writing into it")
    with log_file(tmp_path), refused, log_file(tmp_path):
        pass
    # the first one has ended
    with log_file(tmp_path):
        pass


FAULTY = """
import mmap, sys
from pathlib import Path
from medseg.logfile import faults_told, log_file

def read_a_page():
    with open("case", "w+b") as file:
        file.truncate(mmap.PAGESIZE)
        page = mmap.mmap(file.fileno(), 0)
        # no disk has it any more
        file.truncate(0)
        return page[0]

with log_file(Path("run")) if sys.argv[1] == "first" else faults_told(sys.stderr):
    read_a_page()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere such a page is another error")
@pytest.mark.parametrize("who", ["first", "another"])
def test_a_page_of_a_mapped_file_that_is_gone_leaves_a_word(tmp_path: Path, who: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONFAULTHANDLER"}
    process = subprocess.run(
        [sys.executable, "-c", FAULTY, who],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert process.returncode == -signal.SIGBUS
    told = _log(tmp_path / "run") if who == "first" else process.stderr
    assert "Fatal Python error: Bus error" in told
    assert "in read_a_page" in told


def test_halves_of_files_that_a_kill_left_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").mkdir()
    old = time.time() - 7200
    left = [tmp_path / name for name in (".last.medseg-{0}-1-{0}{0}.pt", "cache/.a.medseg-{0}-1-{0}{0}.safetensors")]
    for path in left:
        path = Path(str(path).format("0" * 8))
        path.touch()
        os.utime(path, (old, old))
    TRAIN._tidy(tmp_path)
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_another_command_line_does_not_go_on_with_what_a_cluster_ended(
    train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tiny_dataset(cases=2)
    draw = PatchSampler.draw

    def told(sampler: PatchSampler) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(sampler)

    monkeypatch.setattr(PatchSampler, "draw", told)
    with pytest.raises(medseg.Preempted):
        train(dataset, fold="all")
    monkeypatch.undo()
    with pytest.raises(medseg.ConfigError, match="holds a training run already; go on with --resume"):
        train(dataset, "train.seed=1", fold="all")
    assert train(dataset, fold="all").steps == 2


def test_a_budget_of_time_cannot_be_deterministic(train: Train, tiny_dataset, tmp_path: Path) -> None:
    dataset = tiny_dataset(cases=2)
    with pytest.raises(medseg.ConfigError, match=r"deterministic with a time budget of 60 s.*use --epochs N"):
        train(dataset, "train.deterministic=true", time_budget="60s")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["typed", "in a part", "in a whole configuration"])
def test_a_batch_too_small_for_the_processes_is_told_before_files_are_read(
    tiny_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    dataset, file = tiny_dataset(cases=2), tmp_path / "some.yaml"
    settings, whole = {"train": {"batch_size": 2}}, given == "in a whole configuration"
    if given != "typed":
        config = medseg.plan(dataset, settings=settings, device="cpu").config if whole else None
        file.write_text("train: {batch_size: 2}\n" if config is None else medseg.dump_yaml(config))
    options = medseg.TrainOptions(settings=settings) if given == "typed" else medseg.TrainOptions(config=file)

    def read(*_: Any, **__: Any) -> None:
        raise medseg.DataError("files are read")

    monkeypatch.setattr(ASKED, "check_dataset", read)
    for processes, told in ((3, "train.batch_size 2 found for 3 processes"), (2, "files are read")):
        with pytest.raises(medseg.MedsegError, match=told):
            ASKED.plan_run(read_dataset(dataset), options, {}, device=torch.device("cpu"), processes=processes)


def test_the_run_says_what_it_was_made_of(tiny_run) -> None:
    training = _description(tiny_run.folder)["training"]
    assert (training["seed"], training["devices"], training["command"], training["skipped_batches"]) == (0, 1, None, 0)
    assert 0 < training["waiting_share"] < 1
    log = _log(tiny_run.folder)
    assert f'"torch": "{torch.__version__}"' in log
    assert "seed 0, 1 processes" in log
    logged = re.search(r"(\d+) steps waited for data ([\d.]+) %", log)
    assert logged
    assert int(logged[1]) == training["steps"]
    # the log rounds to a tenth of a percent, model.json to a hundredth
    assert float(logged[2]) == pytest.approx(100 * training["waiting_share"], abs=0.05 + 0.005 + 1e-9)


@pytest.mark.parametrize("typed", [False, True], ids=["in a file", "typed"])
def test_regions_in_another_order_than_they_are_written_in_are_gone_on_with(
    train: Train, tiny_dataset, tmp_path: Path, typed: bool
) -> None:
    dataset, part = tiny_dataset(cases=2), tmp_path / "part.yaml"
    part.write_text("data: {labels: {core: [2], whole: [1, 2]}}\n")
    given = ("data.labels={core: [2], whole: [1, 2]}",) if typed else ()
    more = {} if typed else {"config": part}
    first = train(dataset, *given, fold="all", epochs=1, **more)
    run = train(dataset, *given, fold="all", epochs=2, resume=True, **more)
    data = [yaml.safe_load((r.folder / "config.yaml").read_text())["data"] for r in (first, run)]
    assert data[0] == data[1]
    assert (list(data[1]["labels"]), data[1]["region_values"]) == (["whole", "core"], [1, 2])
    assert [row["epoch"] for row in _rows(run.folder)] == ["1", "2"]


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


def test_resume_without_a_state_does_not_replace_a_finished_model(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2)
    run = train(dataset, fold="all")
    before = _weights(run.folder)
    (run.folder / "last.pt").unlink()
    with pytest.raises(medseg.ConfigError, match=r"finished model but no last\.pt, .* would train anew and replace it"):
        train(dataset, fold="all", epochs=2, resume=True)
    assert _weights(run.folder) == before


def test_resume_refuses_files_that_have_changed(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2, form="nnunet")
    train(dataset, fold="all")
    _relabel(dataset, lambda a: np.roll(a, 3, axis=0), json.loads((dataset / "dataset.json").read_text())["labels"])
    with pytest.raises(medseg.ConfigError, match="was trained on other files under the same names"):
        train(dataset, fold="all", epochs=2, resume=True)


def test_weights_that_have_learnt_a_held_back_case_are_refused(train: Train, tiny_dataset, tmp_path: Path) -> None:
    dataset = tiny_dataset(cases=4)
    held_back = {c.id for c in fold_split(read_dataset(dataset), 0, folds=2)[1]}
    first = train(dataset, fold=1, name="first")
    with pytest.raises(
        medseg.ConfigError, match=r"first: has learnt 2 of the 2 cases held back, first case\d"
    ) as caught:
        train(dataset, fold=0, name="second", pretrained=first.folder)
    assert any(case in str(caught.value) for case in held_back)
    # those that they were held back from, and what comes after them
    third = train(dataset, fold=1, name="third", pretrained=first.folder)
    other = train(dataset, fold="all", name="other", pretrained=third.folder)
    learnt = _description(other.folder)["training"]
    assert len(learnt["images_sha256"]) == 4
    assert set(learnt["pretrained"]["images_sha256"]) < set(learnt["images_sha256"])
    assert len(learnt["images_voxels"]) == 4
    assert set(learnt["pretrained"]["images_voxels"]) < set(learnt["images_voxels"])


def test_weights_that_have_learnt_a_held_back_case_in_other_bytes_are_refused(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=4)
    held_back = fold_split(read_dataset(dataset), 0, folds=2)[1]
    first = train(dataset, fold=1, name="first")
    for path in [path for case in held_back for path in case.images]:
        # as a copy that was packed anew
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), mtime=1))
    with pytest.raises(medseg.ConfigError, match=r"first: has learnt 2 of the 2 cases held back, first case\d"):
        train(dataset, fold=0, name="second", pretrained=first.folder)
    # a model of an earlier version, which tells of bytes alone, is taken
    description = _description(first.folder)
    assert len(description["training"].pop("images_voxels")) == 2
    (first.folder / "model.json").write_text(json.dumps(description))
    third = train(dataset, fold=0, name="third", pretrained=first.folder)
    learnt = _description(third.folder)["training"]
    assert learnt["pretrained"]["images_voxels"] == []
    assert set(learnt["pretrained"]["images_sha256"]) == set(description["training"]["images_sha256"])


def test_an_image_that_is_held_back_under_another_name_is_refused(train: Train, tiny_dataset, tmp_path: Path) -> None:
    dataset = tiny_dataset(cases=2, form="nnunet")
    for part in ("imagesTr", "labelsTr"):
        first, second = sorted((dataset / part).iterdir())
        shutil.copyfile(first, second)
    told = r"1 of the 1 cases held back are trained on under another name, first case\d as case\d"
    with pytest.raises(medseg.ConfigError, match=told):
        train(dataset, fold=0)
    # before any case was prepared
    assert not (tmp_path / "run" / "cache").exists()
    # where nothing is held back nothing flatters
    train(dataset, fold="all", name="all")


def test_a_run_of_two_channels_says_which_images_it_has_learnt(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2, form="nnunet")
    for path in sorted((dataset / "imagesTr").iterdir()):
        image = nib.load(path)
        other = nib.Nifti1Image(-np.asarray(image.dataobj), image.affine)
        nib.save(other, path.with_name(path.name.replace("_0000", "_0001")))
    described = json.loads((dataset / "dataset.json").read_text())
    described["channel_names"] = {"0": "T1", "1": "T2"}
    (dataset / "dataset.json").write_text(json.dumps(described))
    learnt = _description(train(dataset, fold="all").folder)["training"]
    files = (dataset / "imagesTr").iterdir()
    alone = {hashlib.sha256(medseg.file_sha256(path).encode()).hexdigest()[:16] for path in files}
    assert alone < set(learnt["images_sha256"])
    # and of each case both together
    assert len(learnt["images_sha256"]) == len(learnt["images_voxels"]) == 6


def test_a_scan_that_is_held_back_in_other_bytes_is_refused(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2)
    for part in ("images", "labels"):
        first = dataset / part / "case0.nii.gz"
        (dataset / part / "case1.nii.gz").unlink()
        nib.save(nib.load(first), dataset / part / "case1.nii")
    with pytest.raises(medseg.ConfigError, match="1 of the 1 cases held back are trained on under another name"):
        train(dataset, fold=0)


def test_the_memory_of_a_run_is_told_of_all_its_stages(
    train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, validate = [100 * 2**20], TRAIN._validate

    def validated(*given: Any) -> Any:
        held[0] = 250 * 2**20
        return validate(*given)

    dataset = tiny_dataset(cases=2)
    assert train(dataset, name="cpu").gpu_memory_mb == 0
    monkeypatch.setattr(MODULE, "peak_bytes", lambda _: held[0])
    monkeypatch.setattr(TRAIN, "_validate", validated)
    run = train(dataset, name="gpu")
    # model.json is written when training ends
    assert _description(run.folder)["training"]["gpu_memory_mb"] == 100
    assert run.gpu_memory_mb == 250


def test_what_was_done_after_training_is_not_done_again(
    train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot of a cluster may end while held-back cases are segmented, and the next one must get further."""
    dataset, calibrate, validate, calls = tiny_dataset(cases=8), TRAIN.calibrate, TRAIN._validate, []

    def counted(*given: Any, **more: Any) -> dict[str, Any]:
        calls.append("calibrate")
        return calibrate(*given, **more)

    def ended(*given: Any) -> Any:
        validate(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(TRAIN, "calibrate", counted)
    monkeypatch.setattr(TRAIN, "_validate", ended)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, fold=0)
    monkeypatch.setattr(TRAIN, "_validate", validate)
    again = train(dataset, fold=0, resume=True)
    assert calls == ["calibrate"]
    assert {result.status for result in again.results} == {"skipped"}
    assert again.report is not None
    assert "inference" in _description(again.folder)
    # with more steps it is another network
    longer = train(dataset, fold=0, epochs=2, resume=True)
    assert calls == ["calibrate"] * 2
    assert {result.status for result in longer.results} == {"done"}


def test_a_new_model_is_not_left_beside_the_report_of_the_one_before(
    train: Train, tiny_dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any) -> Any:
        raise KeyboardInterrupt

    dataset = tiny_dataset(cases=2, spatial_dims=2)
    flat = ("windows.patch_size=[16,16]", "network.output_stride=2")
    run = train(dataset, *flat, fold=0)
    report = run.folder / "validation" / "report" / "summary.json"
    assert report.is_file()
    monkeypatch.setattr(TRAIN, "_validate", ended)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, *flat, fold=0, epochs=2, resume=True)
    assert not report.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "model.json", "report.html"])
def test_a_disk_that_is_full_after_the_last_step_costs_no_step(
    train: Train, tiny_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    dataset, folder = tiny_dataset(cases=4), tmp_path / "run"
    name, ending = file.rsplit(".", 1)

    def filling(write: Callable[..., int]) -> Callable[..., int]:
        def full(path: Path, *given: Any, **more: Any) -> int:
            # the temporary name of the file
            if path.name.startswith(f".{name}.") and path.suffix == f".{ending}":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(path, *given, **more)

        return full

    for how in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, how, filling(getattr(Path, how)))
    told = r"run.*: cannot write \S+ \(No space left on device\).*training itself is done: then finish it with --resume"
    with pytest.raises(medseg.TrainingError, match=told):
        train(dataset)
    monkeypatch.undo()
    assert not [path for path in folder.rglob(".*") if path.is_file()]

    def learn(_: Fit) -> None:
        raise AssertionError("a step is done again")

    monkeypatch.setattr(Fit, "_learn", learn)
    run = train(dataset, resume=True)
    assert run.report is not None
    assert (run.steps, [result.status for result in run.results]) == (
        2,
        ["skipped" if file == "report.html" else "done"] * 2,
    )
    assert (folder / "validation" / "report" / "report.html").is_file()
    assert {"inference", "weights_sha256"} <= set(_description(folder))


def test_a_calibration_goes_on_where_it_was_ended_with_the_same_cases_alone(
    train: Train, tiny_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, look, looks, ends = tiny_dataset(cases=10, form="nnunet"), bench.label_case, [0], [0]

    def counted(*given: Any, **tick: Any) -> Any:
        looks[0] += 1
        if looks[0] == ends[0]:
            raise KeyboardInterrupt
        return look(*given, **tick)

    def choices(run: medseg.Run) -> Any:
        text = json.dumps(_description(run.folder)["inference"])
        return json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds_a_case"})

    def ended(name: str, at: int) -> None:
        looks[0], ends[0] = 0, at
        with pytest.raises(KeyboardInterrupt):
            train(dataset, plain, fold=0, name=name)
        assert (tmp_path / name / "calibration.jsonl").is_file()
        looks[0], ends[0] = 0, 0

    plain = "train.deterministic=true"
    monkeypatch.setattr("medseg.bench.label_case", counted)
    # half of the time, and as notes no different
    monkeypatch.setattr("medseg.calibrate._learn_quality", lambda *_: {})
    whole = train(dataset, plain, fold=0, name="whole")
    all_looks = looks[0]
    for name in ("a", "b"):
        ended(name, 2 * all_looks // 3)
    again = train(dataset, plain, fold=0, name="a", resume=True)
    assert choices(again) == choices(whole)
    assert looks[0] < all_looks // 2
    assert not (again.folder / "calibration.jsonl").exists()
    # other labels to choose by
    held_back = _description(whole.folder)["training"]["validation_cases"]
    for case in held_back:
        path = next((dataset / "labelsTr").glob(f"{case}.*"))
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.roll(np.asarray(image.dataobj), 3, axis=0), image.affine), path)
    corrected = train(dataset, plain, fold=0, name="b", resume=True)
    assert choices(corrected) != choices(whole)
    assert choices(corrected) == choices(train(dataset, plain, fold=0, name="fresh"))


def test_what_is_resumed_keeps_its_reasons(train: Train, tiny_dataset) -> None:
    dataset = tiny_dataset(cases=2)
    first = train(dataset, fold="all")
    before = (first.folder / "config.yaml").read_text()
    assert "# 2 cases with labels" in before
    train(dataset, fold="all", resume=True)
    assert (first.folder / "config.yaml").read_text() == before


def test_resume_with_a_part_of_a_configuration_does_not_plan_again(
    tiny_dataset, tmp_path: Path, tiny_settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    part, dataset = tmp_path / "part.yaml", tiny_dataset(cases=2)
    part.write_text("train: {learning_rate: 0.0321}\n")
    options = medseg.TrainOptions(config=part, settings=settings_from(tiny_settings), fold="all")
    medseg.train(dataset, tmp_path / "run", epochs=1, options=options)

    def planned(*_: Any, **__: Any) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(ASKED, "make_plan", planned)
    part.write_text("train: {learning_rate: 0.0123}\n")
    again = medseg.TrainOptions(config=part, fold="all", resume=True)
    run = medseg.train(dataset, tmp_path / "run", epochs=2, options=again)
    assert (run.config.train.learning_rate, run.steps) == (0.0123, 2 * run.config.train.steps_per_epoch)


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
