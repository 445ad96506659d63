"""The command line from the outside: exit codes, messages, and what a mistake leaves behind (nothing)."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from rich.console import Console

import medseg
from medseg import terminal
from medseg.cli import run
from medseg.writers import formats

VERBS = ("demo", "check", "plan", "train", "infer", "evaluate", "compare", "deidentify", "inspect", "models", "export")
OPTIONS = {
    "demo": ("--output", "--time-budget", "--device"),
    "check": ("DATASET", "--verbose"),
    "plan": ("DATASET", "--output", "--set", "--device"),
    "train": (
        *("DATASET", "--output", "--config", "--set", "--fold", "--folds", "--time-budget", "--epochs", "--resume"),
        *("--pretrained", "--devices", "--precision", "--seed", "--deterministic", "--device", "--verbose"),
    ),
    "infer": (
        *("INPUT...", "--model", "--output", "--tta", "none|flip|scale|auto", "--window", "auto|whole|Z,Y,X"),
        *("--overlap", "--shard", "--overwrite", "--device", "--devices", "--precision", "--set"),
    ),
    "compare": ("REPORT...", "--output", "--verbose"),
    "deidentify": (
        *("SOURCE", "--output", "--keep-interval", "--retain-patient-characteristics", "--retain-device"),
        *("--retain-uids", "--salt-file", "--allow-burned-in", "--verbose"),
    ),
    "export": ("RUN|NAME", "--output", "--to", "--overwrite", "--device", "--verbose"),
    "inspect": ("NETWORK|FILE.yaml|RUN", "--list", "--spatial-dims", "--patch", "--json", "--png"),
    "models": ("--json",),
    "evaluate": (
        *("PREDICTIONS", "REFERENCES", "--output", "--labels", "--nsd-tolerance-mm", "--surface", "--allow-missing"),
        *("--resample-prediction", "--jobs", "--metadata", "--group", "--ignore-label", "--extra", "--lesions"),
        *("--probabilities", "--nnunet-summary", "--pdf"),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What a command line left on the screen."""

    code: int
    out: str
    err: str


Medseg = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Medseg:
    """Runs a command line in this process; no user's mistake may show a traceback."""

    def call(*arguments: object) -> Outcome:
        code = run([str(a) for a in arguments])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        return Outcome(code, shown.out, shown.err)

    return call


@pytest.fixture
def train_args(tiny_settings: tuple[str, ...]) -> tuple[str, ...]:
    """Options of a training of one second."""
    chosen = (option for setting in tiny_settings for option in ("--set", setting))
    return (*chosen, "--folds", "2", "--device", "cpu")


@pytest.fixture
def images(tiny_run, tmp_path: Path) -> Path:
    """A copy of the images of the shared data set, to be damaged."""
    return Path(shutil.copytree(tiny_run.dataset / "images", tmp_path / "scans"))


def _files(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else []


# ---- help


def test_medseg_alone_prints_help(cli: Medseg) -> None:
    shown = cli()
    assert all(verb in shown.out + shown.err for verb in VERBS)


def test_version(cli: Medseg) -> None:
    assert cli("--version").out.strip() == f"medseg {medseg.__version__}"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_and_its_options(cli: Medseg, verb: str) -> None:
    shown = cli(verb, "--help")
    assert shown.code == 0
    assert f"Example: medseg {verb}" in shown.out
    assert [option for option in OPTIONS[verb] if option not in shown.out] == []


def test_an_unknown_verb_is_usage(cli: Medseg) -> None:
    shown = cli("segment")
    assert shown.code == 2
    assert "segment" in shown.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--version",), 0, ("medseg ",)),
        (("check", "nowhere"), 2, ("nowhere", "no such file or folder", "imagesTr")),
    ],
)
def test_as_a_process(tmp_path: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "medseg", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr
    assert [word for word in words if word not in done.stdout + done.stderr] == []
    assert _files(tmp_path) == []


def test_a_command_that_does_no_work_does_not_wait_for_torch() -> None:
    code = "import sys, medseg.cli; medseg.cli.run(['--version']); print({'torch', 'monai'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "set()"


# ---- bad data sets: `check` names the file (1), `train` refuses and leaves nothing (2)


def _resave(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    loaded = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(loaded.dataobj)), loaded.affine), path)
    return path


def _truncated(dataset: Path) -> Path:
    path = dataset / "images" / "case1.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    return path


def _nan(dataset: Path) -> Path:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[3, 4, 5:8] = np.nan
        return array

    return _resave(dataset / "images" / "case1.nii.gz", change)


def _other_shape(dataset: Path) -> Path:
    return _resave(dataset / "labels" / "case1.nii.gz", lambda a: a[:-1])


def _half(dataset: Path) -> Path:
    return _resave(dataset / "labels" / "case1.nii.gz", lambda a: a.astype(np.float32) * np.float32(0.5))


def _missing_label(dataset: Path) -> Path:
    (dataset / "labels" / "case1.nii.gz").unlink()
    return dataset / "images" / "case1.nii.gz"


def _four_axes(dataset: Path) -> Path:
    return _resave(dataset / "images" / "case1.nii.gz", lambda a: np.stack([a, a], axis=-1))


def _zero_spacing(dataset: Path) -> Path:
    path = dataset / "images" / "case1.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    # NIfTI-1: pixdim[1] at byte 80, qform_code and sform_code at 252 and 254
    content[80:84] = bytes(4)
    content[252:256] = bytes(4)
    path.write_bytes(gzip.compress(bytes(content)))
    return path


DAMAGES = [
    (_truncated, ("gzip stream", "copy the file again")),
    (_nan, ("3 of", "NaN", "finite numbers", "replace them")),
    (_other_shape, ("shape", "as its image", "resample it to the image")),
    (_half, ("0.5", "whole numbers", "nearest neighbour")),
    (_missing_label, ("image without label", "labels/case1.nii.gz", "add the label")),
    (_four_axes, ("axis 4 has 2 points", "one volume", "split a time series")),
    (_zero_spacing, ("spacing [0.0, 1.0, 1.5]", "above 0", "correct the header")),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[d.__name__[1:] for d, _ in DAMAGES])
def test_check_names_the_bad_file(cli: Medseg, tiny_dataset, damage, words: tuple[str, ...]) -> None:
    dataset = tiny_dataset(cases=3)
    bad = damage(dataset)
    shown = cli("check", dataset)
    assert shown.code == 1
    line = next(line for line in shown.out.splitlines() if line.startswith("error"))
    assert [word for word in (str(bad), "expected", *words) if word not in line] == []
    assert "case0" not in shown.out


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[d.__name__[1:] for d, _ in DAMAGES])
def test_train_refuses_a_bad_file(
    cli: Medseg, tiny_dataset, tmp_path: Path, train_args, damage, words: tuple[str, ...]
) -> None:
    dataset = tiny_dataset(cases=3)
    bad = damage(dataset)
    shown = cli("train", dataset, "-o", tmp_path / "run", *train_args, "--epochs", 1)
    assert shown.code == 2
    assert [word for word in (str(bad), "nothing was trained", *words) if word not in shown.err] == []
    assert _files(tmp_path / "run") == []


def test_check_of_a_good_data_set(cli: Medseg, tiny_run) -> None:
    shown = cli("check", tiny_run.dataset)
    assert shown.code == 0
    assert shown.out.splitlines()[-1] == f"{tiny_run.dataset}: 4 cases read, 0 errors, 0 other findings"


@pytest.mark.parametrize("verb", ["check", "plan", "train"])
def test_a_data_set_that_is_not_there(cli: Medseg, tmp_path: Path, verb: str) -> None:
    more = ("-o", tmp_path / "out") if verb == "train" else ()
    shown = cli(verb, tmp_path / "nowhere", *more)
    assert shown.code == 2
    assert f"{tmp_path / 'nowhere'}: no such file or folder" in shown.err
    assert _files(tmp_path) == []


def test_an_empty_folder_is_no_data_set(cli: Medseg, tmp_path: Path) -> None:
    shown = cli("check", tmp_path)
    assert shown.code == 2
    assert f"{tmp_path}: none of dataset.json, imagesTr" in shown.err
    assert "CSV or JSON list" in shown.err


def test_a_data_set_without_cases(cli: Medseg, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    shown = cli("check", tmp_path)
    assert shown.code == 2
    assert f"{tmp_path}: no case found" in shown.err


@pytest.mark.parametrize("name", ["../../case", "/case", "a\\\\b", ".."])
def test_a_case_name_stays_in_its_folder(cli: Medseg, tiny_run, tmp_path: Path, name: str) -> None:
    listed = tmp_path / "list.csv"
    image, label = (tiny_run.dataset / f / "case0.nii.gz" for f in ("images", "labels"))
    listed.write_text(f"case,image,label\n{name},{image},{label}\n")
    shown = cli("check", listed)
    assert shown.code == 2
    assert f"{listed}: case name {name!r} found" in shown.err


# ---- wrong settings of `train`: 2, before anything is done


@pytest.fixture
def settings_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a YAML file."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  learning_rte: 0.1\n", ("unknown key `train.learning_rte`", "learning_rate")),
        ("trian:\n  seed: 1\n", ("unknown key `trian`", "train")),
        ("train:\n  seed: often\n", ("train.seed", "'often'", "integer")),
        ("- a\n- b\n", ("holds list", "sections")),
        ("train: [\n", ("not valid YAML",)),
    ],
)
def test_train_refuses_a_settings_file(
    cli: Medseg, tiny_run, tmp_path: Path, settings_file, text: str, words: tuple[str, ...]
) -> None:
    path = settings_file(text)
    shown = cli("train", tiny_run.dataset, "-o", tmp_path / "run", "-c", path)
    assert shown.code == 2
    assert [word for word in (f"{path}: ", *words) if word not in shown.err] == []
    assert _files(tmp_path / "run") == []


def test_train_refuses_a_settings_file_that_is_not_there(cli: Medseg, tiny_run, tmp_path: Path) -> None:
    shown = cli("train", tiny_run.dataset, "-o", tmp_path / "run", "-c", tmp_path / "none.yaml")
    assert shown.code == 2
    assert f"{tmp_path / 'none.yaml'}: cannot be read" in shown.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "train.batch_size=many"), ("--set", "train.batch_size", "'many'", "integer")),
        (("--set", "train.batch_size=0"), ("train.batch_size", "greater than 0")),
        (("--set", "train.batchsize=2"), ("--set", "unknown key `train.batchsize`", "batch_size")),
        (("--set", "batch_size"), ("--set batch_size", "section.key=value")),
        (("--set", "network.name=unnet"), ("network.name", "`unnet`", "deeplabv3plus")),
        (("--set", "network.name=deeplabv3", "--set", "network.output_stride=64"), ("output_stride 64", "it can have")),
        (
            ("--set", "network.name=deeplabv3", "--set", "network.aspp_rates=[]"),
            ("--set", "network.aspp_rates", "1 item"),
        ),
        (("--set", "network.name=monai.SegRestNet"), ("none of MONAI's segmentation networks", "monai.SegResNet")),
        (
            ("--set", "network.name=monai.SegResNet", "--set", "network.arguments={init_filter: 8}"),
            ("no `init_filter`", "closest are init_filters"),
        ),
        (("--set", "network.name=fcn32s", "--set", "windows.patch_size=[16,16,16]"), ("patch_size", "smaller than")),
        (("--fold", "2"), ("fold 2", "0 to 1 or all")),
        (("--fold", "first"), ("--fold first", "number from 0 or all")),
        (("--folds", "9"), ("9 folds", "4 groups", "--fold all")),
        (("--time-budget", "soon"), ("--time-budget soon", "90s, 20m or 1.5h")),
        (("--time-budget", "-5m"), ("--time-budget", "positive")),
        (("--time-budget", "1m", "--epochs", "1"), ("--time-budget", "--epochs", "one of them")),
        (("--epochs", "0"), ("--epochs", "greater than or equal to 1")),
        (("--device", "cuda:99"), ("--device cuda:99", "CUDA devices found", "--device cpu")),
        (("--device", "gpu"), ("--device gpu", "cuda:N")),
        (("--precision", "16"), ("--precision", "bf16")),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_train_refuses(
    cli: Medseg, tiny_run, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    folds = () if "--folds" in arguments else ("--folds", 2)
    shown = cli("train", tiny_run.dataset, "-o", tmp_path / "run", *folds, *arguments)
    assert shown.code == 2
    assert [word for word in words if word not in shown.err] == []
    assert _files(tmp_path / "run") == []


@pytest.mark.parametrize(
    "line",
    [
        ("check", "data"),
        ("evaluate", "masks", "references", "-o", "report"),
        ("compare", "a", "b", "-o", "out"),
        ("convert", "scan", "-o", "scan.nii.gz"),
        ("deidentify", "scans", "-o", "out"),
        ("models",),
        ("export", "run", "-o", "a.onnx", "--to", "onnx"),
    ],
    ids=lambda line: line[0],
)
def test_verbs_without_need_of_a_gpu_know_devices_too(cli: Medseg, line: tuple[str, ...]) -> None:
    shown = cli(*line, "--device", "banana")
    assert shown.code == 2
    assert "'banana' found, expected auto, cpu, cuda or cuda:N" in shown.err
    assert "expected auto" not in cli(*line, "--device", "cuda:1").err


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_train_needs_a_folder_it_can_write(cli: Medseg, tiny_run, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("kept")
    shown = cli("train", tiny_run.dataset, "-o", tmp_path / place, "--folds", 2, "--epochs", 1)
    assert shown.code == 2
    assert str(tmp_path / place) in shown.err
    assert (tmp_path / "file").read_text() == "kept"


def test_train_does_not_write_over_a_run(cli: Medseg, tiny_run, train_args) -> None:
    before = (tiny_run.folder / "model.safetensors").read_bytes()
    shown = cli("train", tiny_run.dataset, "-o", tiny_run.folder, *train_args, "--epochs", 1)
    assert shown.code == 2
    assert f"{tiny_run.folder}: holds a training run already" in shown.err
    assert "--resume" in shown.err
    assert (tiny_run.folder / "model.safetensors").read_bytes() == before


def test_train_goes_on_with_resume(cli: Medseg, tiny_run, tmp_path: Path, train_args) -> None:
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    shown = cli("train", tiny_run.dataset, "-o", folder, *train_args, "--epochs", 2, "--resume")
    assert shown.code == 0
    # one epoch of two steps was done before
    assert shown.out.startswith("4 steps; ")
    assert shown.out.splitlines()[-1] == f"Model: {folder}"


def test_resume_refuses_another_network(cli: Medseg, tiny_run, tmp_path: Path, train_args) -> None:
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    wider = ("--set", "network.channels=[4,16]")
    shown = cli("train", tiny_run.dataset, "-o", folder, *train_args, *wider, "--epochs", 2, "--resume")
    assert shown.code in (1, 2)
    assert str(folder) in shown.err
    assert "train into a new folder" in shown.err


def test_a_broken_state_cannot_be_resumed(cli: Medseg, tiny_run, tmp_path: Path, train_args) -> None:
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:500])
    shown = cli("train", tiny_run.dataset, "-o", folder, *train_args, "--epochs", 2, "--resume")
    assert shown.code == 2
    assert f"{folder / 'last.pt'}: cannot be resumed" in shown.err


# ---- plan


def test_plan_prints_yaml_with_reasons_that_train_takes(
    cli: Medseg, tiny_run, tmp_path: Path, settings_file, train_args
) -> None:
    shown = cli("plan", tiny_run.dataset, "--device", "cpu")
    assert shown.code == 0
    assert "  # median of the data set" in shown.out
    planned = yaml.safe_load(shown.out)
    assert planned["preprocess"]["spacing_mm"] == [1.0, 1.0, 1.5]
    assert planned["data"]["labels"] == {"background": 0, "label_1": 1, "label_2": 2}
    path = settings_file(shown.out)
    trained = cli("train", tiny_run.dataset, "-o", tmp_path / "run", "-c", path, *train_args, "--epochs", 1)
    assert trained.code == 0


def test_plan_writes_the_file_it_is_given(cli: Medseg, tiny_run, tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.yaml"
    shown = cli("plan", tiny_run.dataset, "-o", path, "--device", "cpu")
    assert (shown.code, shown.out) == (0, f"Plan: {path}\n")
    assert medseg.read_config(path).preprocess.spacing_mm == (1.0, 1.0, 1.5)


def test_plan_cannot_write_below_a_file(cli: Medseg, tiny_run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    shown = cli("plan", tiny_run.dataset, "-o", tmp_path / "file" / "plan.yaml")
    assert shown.code == 2
    assert "cannot write plan.yaml" in shown.err


# ---- infer


def _record(folder: Path) -> dict[str, dict[str, object]]:
    content = json.loads((folder / "run.json").read_text())
    return {case["case"]: case for case in content["cases"]}


def test_infer_writes_masks_on_the_images_grid(cli: Medseg, tiny_run, images: Path, tmp_path: Path) -> None:
    shown = cli("infer", images, "-m", tiny_run.folder, "-o", tmp_path / "out")
    assert shown.code == 0
    assert shown.out == f"{tmp_path / 'out'}: 4 masks written, 0 there already, 0 cases failed\n"
    assert _files(tmp_path / "out") == [*(f"case{n}.nii.gz" for n in range(4)), "run.json"]
    mask, image = (nib.load(f / "case1.nii.gz") for f in (tmp_path / "out", images))
    assert mask.shape == image.shape
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, image.affine)


def test_infer_skips_what_is_done_unless_told(cli: Medseg, tiny_run, images: Path, tmp_path: Path) -> None:
    call = ("infer", images / "case0.nii.gz", images / "case1.nii.gz", "-m", tiny_run.folder, "-o", tmp_path / "out")
    cli(*call)
    mask = tmp_path / "out" / "case1.nii.gz"
    mask.write_bytes(mask.read_bytes()[:100])
    assert "1 masks written, 1 there already" in cli(*call).out
    assert "2 masks written, 0 there already" in cli(*call, "--overwrite").out


def test_infer_does_the_good_and_names_the_bad(cli: Medseg, tiny_run, images: Path, tmp_path: Path) -> None:
    truncated = images / "case1.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:1000])
    four_axes = _resave(images / "case2.nii.gz", lambda a: np.stack([a, a], axis=-1))
    shown = cli("infer", images, "-m", tiny_run.folder, "-o", tmp_path / "out")
    assert shown.code == 1
    assert "2 masks written, 0 there already, 2 cases failed" in shown.out
    assert f"failed: case1: {truncated}: the gzip stream is damaged" in shown.err
    assert f"failed: case2: {four_axes}: " in shown.err
    assert _files(tmp_path / "out") == ["case0.nii.gz", "case3.nii.gz", "run.json"]
    record = _record(tmp_path / "out")
    assert {name: case["status"] for name, case in record.items()} == {
        "case0": "done",
        "case1": "failed",
        "case2": "failed",
        "case3": "done",
    }
    assert "gzip" in str(record["case1"]["reason"])


def test_infer_takes_other_settings_with_the_weights_as_they_are(
    cli: Medseg, tiny_run, images: Path, tmp_path: Path
) -> None:
    call = ("infer", images / "case0.nii.gz", "-m", tiny_run.folder, "-o", tmp_path / "out")
    assert "1 masks written" in cli(*call).out
    denser = cli(*call, "--set", "network.output_stride=2", "--set", "postprocess.crf=true")
    assert (denser.code, denser.err) == (0, "")
    assert "1 masks written, 0 there already" in denser.out
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["settings"]
    assert settings == {"network": {"output_stride": 2}, "postprocess": {"crf": True}}


def test_infer_shards_share_the_work(cli: Medseg, tiny_run, images: Path, tmp_path: Path) -> None:
    call = ("infer", images, "-m", tiny_run.folder, "-o", tmp_path / "out", "--shard")
    cli(*call, "1/2")
    assert [f for f in _files(tmp_path / "out") if f.endswith(".gz")] == ["case0.nii.gz", "case2.nii.gz"]
    cli(*call, "2/2")
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shard", "3/2"), ("--shard 3/2", "from 1 to n")),
        (("--shard", "0/2"), ("--shard 0/2", "from 1 to n")),
        (("--shard", "half"), ("--shard half", "i/n")),
        (("--overlap", "2"), ("--overlap 2", "0 to below 1")),
        (("--overlap", "much"), ("--overlap", "a valid number")),
        (("--tta", "turn"), ("--tta", "flip")),
        (("--format", "nifti,dicom"), ("--format dicom:", "nifti, dicom-seg, rtstruct, dicom-sr, dicom-sc, picture")),
        (("--window", "big"), ("--window big", "auto, whole or voxels")),
        (("--window", "64"), ("--window 64", "Z,Y,X")),
        (("--window", "0,8,8"), ("--window 0,8,8", "64,128,128")),
        (("--devices", "cpu,,cpu"), ("--devices cpu,,cpu", "0,1")),
        (("--devices", "99,cpu"), ("--devices 99:", "CUDA devices found")),
        (("--set", "preprocess.orient=false"), ("--set preprocess.orient", "learnt", "network.output_stride")),
        (("--set", "network.output_stride=32"), ("output_stride 32 is not possible", "it can have 2, 4")),
        (("--set", "network.aspp_channels=8"), ("--set network.aspp_channels", "learnt")),
        (("--set", "postprocess.crff=true"), ("unknown key `postprocess.crff`", "crf_iterations")),
        (("--device", "cuda:99"), ("--device cuda:99", "CUDA devices found")),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") and len(value) == 2 else "",
)
def test_infer_refuses(
    cli: Medseg, tiny_run, images: Path, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    shown = cli("infer", images, "-m", tiny_run.folder, "-o", tmp_path / "out", *arguments)
    assert shown.code == 2
    assert [word for word in words if word not in shown.err] == []
    assert not (tmp_path / "out").exists()


def _forbid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the permission to read a file away, from root too, who could read it all the same."""
    path.chmod(0)
    whole = Path.open

    def guarded(self: Path, *arguments, **named):
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return whole(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", guarded)


def test_infer_of_forty_files_with_five_bad_ones(
    cli: Medseg, tiny_run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = nib.load(images / "case0.nii.gz").slicer[:8, :9, :10]
    scans = tmp_path / "forty"
    scans.mkdir()
    for n in range(40):
        nib.save(small, scans / f"scan{n:02}.nii.gz")
    bad = {name: scans / f"scan{name}.nii.gz" for name in ("03", "11", "17", "28", "39")}
    bad["03"].write_bytes(bad["03"].read_bytes()[:300])
    bad["11"].write_bytes(b"")
    _resave(bad["17"], lambda a: np.where(a == a.max(), np.nan, a).astype(np.float32))
    _resave(bad["28"], lambda a: np.stack([a, a], axis=-1))
    _forbid(bad["39"], monkeypatch)
    shown = cli("infer", scans, "-m", tiny_run.folder, "-o", tmp_path / "out")
    assert shown.code == 1
    assert "35 masks written, 0 there already, 5 cases failed" in shown.out
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 35
    named = shown.err.splitlines()
    why = {"03": "gzip", "11": "empty", "17": "NaN", "28": "axis 4", "39": "Permission denied"}
    assert [line for line, name in zip(named, why) if f"failed: scan{name}: {bad[name]}: " not in line] == []
    assert [line for line, words in zip(named, why.values()) if words not in line] == []
    assert len(named) == 5


@pytest.mark.parametrize(
    ("given", "window"),
    [("auto", "auto"), ("whole", "whole"), ("16, 24,32", (32, 24, 16)), ("96,128", (96, 128))],
)
def test_infer_hands_its_options_on(
    cli: Medseg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, window: object
) -> None:
    told = []
    monkeypatch.setattr(medseg, "infer", lambda *arguments, **_: told.append(arguments) or ())
    more = ("--tta", "scale", "--devices", "0,cuda:1", "--shard", "2/3", "--overlap", "0.25", "--overwrite")
    more += ("--format", "dicom-seg, picture")
    assert cli("infer", "in", "-m", "a", "-m", "b", "-o", tmp_path, "--window", given, *more).code == 0
    ((inputs, models, out, options),) = told
    assert (inputs, models, out) == ([Path("in")], [Path("a"), Path("b")], tmp_path)
    assert options == medseg.InferOptions(
        window=window,
        tta="scale",
        devices=("0", "cuda:1"),
        shard=(2, 3),
        overlap=0.25,
        overwrite=True,
        formats=("dicom-seg", "picture"),
    )


def test_infer_says_once_that_the_disk_is_full(
    cli: Medseg, tiny_run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = formats.write_label

    def full(path: Path, *arguments, **named):
        if path.name == "case1.nii.gz":
            raise medseg.DataError("cannot write") from OSError(errno.ENOSPC, "No space left on device")
        return whole(path, *arguments, **named)

    monkeypatch.setattr(formats, "write_label", full)
    call = ("infer", images, "-m", tiny_run.folder, "-o", tmp_path / "out")
    shown = cli(*call)
    assert (shown.code, shown.out) == (1, "")
    assert shown.err == (
        f"error: {tmp_path / 'out'}: the disk is full: 1 masks are written and on record, 0 were there already, "
        "3 cases are not done; free space and run the same command again\n"
    )
    assert _files(tmp_path / "out") == ["case0.nii.gz", "run.json"]
    monkeypatch.undo()
    assert "3 masks written, 1 there already, 0 cases failed" in cli(*call).out


def test_infer_says_which_masks_want_a_look(cli: Medseg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(case: str, expected: float | None, *warnings: str) -> medseg.CaseResult:
        quality = {"liver": {"expected": expected, "low": 0.4, "high": 0.78}}
        return medseg.CaseResult(case, "done", f"{case}.nii.gz", quality=quality, warnings=warnings)

    results = [
        found("good", 0.9),
        found("absent", None),
        found("edge", 0.8, "liver touches the edge of the image"),
        replace(found("strange", 0.75), look=True),
        found("fair", 0.65),
        replace(
            found("poor", 0.614, "liver: expected Dice 0.61", "noisier than any training image (3 times)"), look=True
        ),
    ]
    monkeypatch.setattr(medseg, "infer", lambda *_, **__: tuple(results))
    shown = cli("infer", "in", "-m", "a", "-o", tmp_path)
    assert shown.code == 0
    assert shown.err.splitlines() == [
        "look at poor: expected Dice of liver 0.61 (0.40–0.78); noisier than any training image (3 times)",
        "look at strange: expected Dice of liver 0.75 (0.40–0.78)",
        "note on fair: expected Dice of liver 0.65 (0.40–0.78)",
        "note on edge: liver touches the edge of the image",
    ]
    assert shown.out == f"{tmp_path}: 6 masks written, 0 there already, 0 cases failed\n"
    results[:] = [replace(results[5], case=f"case{n}") for n in range(12)]
    lines = cli("infer", "in", "-m", "a", "-o", tmp_path).err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "look at 2 more cases: run.json names them"


SLOW = """
import sys, time
from medseg import cli
from medseg.infer import Segmenter

whole = Segmenter.segment_prepared

def slow(self, prepared, seconds, *, tick, **_):
    for n in range(10):
        tick(n / 10)
        time.sleep(0.02)
    return whole(self, prepared, seconds, tick=tick)

Segmenter.segment_prepared = slow
sys.exit(cli.run(sys.argv[1:]))
"""


def test_infer_ends_cleanly_when_it_is_told_to_terminate(cli: Medseg, tiny_run, images: Path, tmp_path: Path) -> None:
    for n in range(4, 12):
        shutil.copy(images / f"case{n % 4}.nii.gz", images / f"case{n}.nii.gz")
    call = ("infer", images, "-m", tiny_run.folder, "--device", "cpu", "-o")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, call), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "out" / "case1.nii.gz").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; what was finished is valid" in err
    assert "Traceback" not in err
    left = [p.name for p in (tmp_path / "out").iterdir()]
    written = [name for name in left if name.endswith(".nii.gz") and not name.startswith(".")]
    assert 2 <= len(written) < 12
    assert sorted(left) == sorted([*written, "run.json"])
    again = cli(*call, tmp_path / "out")
    assert f"{12 - len(written)} masks written, {len(written)} there already, 0 cases failed" in again.out
    cli(*call, tmp_path / "undisturbed")
    for name in _files(tmp_path / "undisturbed"):
        if name != "run.json":
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


LOADING = """
import time
from medseg import cli, folder

def load(*_, **__):
    print("on", flush=True)
    time.sleep(60)

folder.load_model = load
cli.main()
"""
IMPORTING = """
from medseg import cli

print("on", flush=True)
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", [LOADING, IMPORTING], ids=["loading", "importing"])
def test_infer_that_is_told_to_end_before_its_work_is_interrupted_too(
    tiny_run, images: Path, tmp_path: Path, number: int, program: str
) -> None:
    call = ("infer", images, "-m", tiny_run.folder, "--device", "cpu", "-o", tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, call)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    # to import torch takes longer than this
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert "interrupted; what was finished is valid" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_infer_whose_words_nobody_takes_keeps_its_outcome(tiny_run, images: Path, tmp_path: Path) -> None:
    call = ("infer", images, "-m", tiny_run.folder, "--device", "cpu", "-o", tmp_path / "out")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "medseg", *map(str, call)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 4


def test_infer_of_an_empty_folder(cli: Medseg, tiny_run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shown = cli("infer", tmp_path / "empty", "-m", tiny_run.folder, "-o", tmp_path / "out")
    assert shown.code == 2
    assert f"{tmp_path / 'empty'}: no image found, expected DICOM or a file ending in .nii.gz" in shown.err
    assert not (tmp_path / "out").exists()


def test_infer_of_nothing_at_all(cli: Medseg, tiny_run, tmp_path: Path) -> None:
    shown = cli("infer", tmp_path / "nowhere", "-m", tiny_run.folder, "-o", tmp_path / "out")
    assert shown.code == 2
    assert f"{tmp_path / 'nowhere'}: no such file or folder" in shown.err


def test_infer_of_two_inputs_of_one_name(cli: Medseg, tiny_run, images: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(images, tmp_path / "later")
    shown = cli("infer", images, twin, "-m", tiny_run.folder, "-o", tmp_path / "out")
    assert shown.code == 2
    assert [str(f / "case0.nii.gz") for f in (images, twin) if str(f / "case0.nii.gz") not in shown.err] == []
    assert "4 names are shared by several inputs" in shown.err
    assert "would both become case case0" in shown.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_infer_needs_a_folder_it_can_write(cli: Medseg, tiny_run, images: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("kept")
    shown = cli("infer", images, "-m", tiny_run.folder, "-o", tmp_path / place)
    assert shown.code == 2
    assert f"{tmp_path / place}: cannot be made" in shown.err
    assert "choose another -o" in shown.err
    assert (tmp_path / "file").read_text() == "kept"


def test_infer_does_not_write_over_its_input(cli: Medseg, tiny_run, images: Path) -> None:
    before = (images / "case0.nii.gz").read_bytes()
    shown = cli("infer", images, "-m", tiny_run.folder, "-o", images)
    assert shown.code == 2
    assert f"{images / 'case0.nii.gz'}: the mask would replace an input image; choose another -o" in shown.err
    assert (images / "case0.nii.gz").read_bytes() == before
    assert _files(images) == [f"case{n}.nii.gz" for n in range(4)]


# ---- models


def _without_weights(folder: Path) -> tuple[str, ...]:
    (folder / "model.safetensors").unlink()
    return str(folder), "no model.safetensors found", "a model folder holds"


def _without_description(folder: Path) -> tuple[str, ...]:
    (folder / "model.json").unlink()
    return str(folder), "no model.json found"


def _damaged_weights(folder: Path) -> tuple[str, ...]:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return str(path), "safetensors", "copy the run folder again"


def _changed_weights(folder: Path) -> tuple[str, ...]:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return str(path), "not the weights that model.json describes"


def _other_network(folder: Path) -> tuple[str, ...]:
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"aspp_channels": 4', '"aspp_channels": 8'))
    return str(folder / "model.safetensors"), "weights of another network", "expected"


def _no_json(folder: Path) -> tuple[str, ...]:
    (folder / "model.json").write_text("{")
    return str(folder / "model.json"), "not valid JSON"


def _newer(folder: Path) -> tuple[str, ...]:
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"schema_version": 1,', '"schema_version": 99,', 1))
    return str(path), "schema_version 99 found, expected 1"


def _text_file(folder: Path) -> tuple[str, ...]:
    shutil.rmtree(folder)
    folder.write_text("my model")
    return str(folder), "`medseg train -o` wrote"


def _gone(folder: Path) -> tuple[str, ...]:
    shutil.rmtree(folder)
    return str(folder), "no such folder"


@pytest.mark.parametrize(
    "damage",
    [
        *(_without_weights, _without_description, _damaged_weights, _changed_weights, _other_network),
        *(_no_json, _newer, _text_file, _gone),
    ],
)
def test_infer_refuses_a_model(
    cli: Medseg, tiny_run, images: Path, tmp_path: Path, damage: Callable[[Path], tuple[str, ...]]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_run.folder, folder, ignore=shutil.ignore_patterns("cache", "validation"))
    words = damage(folder)
    shown = cli("infer", images, "-m", folder, "-o", tmp_path / "out")
    assert shown.code == 2
    assert [word for word in words if word not in shown.err] == []
    assert not (tmp_path / "out").exists()


def test_infer_with_an_ensemble_of_one_model_twice(cli: Medseg, tiny_run, images: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    cli("infer", images / "case0.nii.gz", "-m", tiny_run.folder, "-o", one)
    shown = cli("infer", images / "case0.nii.gz", "-m", tiny_run.folder, "-m", tiny_run.folder, "-o", two)
    assert shown.code == 0
    assert (one / "case0.nii.gz").read_bytes() == (two / "case0.nii.gz").read_bytes()


# ---- evaluate


@pytest.fixture
def folders(tiny_run, tmp_path: Path) -> tuple[Path, Path]:
    """Predictions, which are the references, and the references."""
    return Path(shutil.copytree(tiny_run.dataset / "labels", tmp_path / "masks")), tiny_run.dataset / "labels"


def test_evaluate_writes_a_report(cli: Medseg, tiny_run, folders, tmp_path: Path) -> None:
    shown = cli("evaluate", *folders, "-o", tmp_path / "report", "--labels", tiny_run.folder)
    assert shown.code == 0
    assert _files(tmp_path / "report") == [
        *("labels.ctbl", "labels.label", "metrics.csv", "report.html", "summary.json"),
    ]
    assert shown.out.splitlines()[1].split()[:2] == ["label_1", "1.000"]
    assert shown.out.splitlines()[-1] == f"Report: {tmp_path / 'report' / 'report.html'}"


def test_evaluate_takes_the_labels_of_a_model_that_comes_with_medseg(cli: Medseg, folders, tmp_path: Path) -> None:
    assert cli("evaluate", *folders, "-o", tmp_path / "report", "--labels", "hippocampus").code == 0
    named = (tmp_path / "report" / "metrics.csv").read_text()
    assert ",anterior," in named
    assert ",posterior," in named


def test_evaluate_refuses_missing_predictions(cli: Medseg, folders, tmp_path: Path) -> None:
    (folders[0] / "case2.nii.gz").unlink()
    shown = cli("evaluate", *folders, "-o", tmp_path / "report")
    assert shown.code == 2
    assert f"{folders[0]}: missing predictions for 1 of 4 references: case2; predict these cases" in shown.err
    assert not (tmp_path / "report").exists()


def test_evaluate_reports_missing_predictions_where_allowed(cli: Medseg, folders, tmp_path: Path) -> None:
    (folders[0] / "case2.nii.gz").unlink()
    assert cli("evaluate", *folders, "-o", tmp_path / "report", "--allow-missing").code == 0
    rows = (tmp_path / "report" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[3] for row in rows if row.startswith("case2,")] == ["missing_prediction"] * 2


def test_evaluate_names_a_case_on_another_grid(cli: Medseg, folders, tmp_path: Path) -> None:
    moved = _resave(folders[0] / "case2.nii.gz", lambda a: a[:-2])
    shown = cli("evaluate", *folders, "-o", tmp_path / "report")
    assert shown.code == 1
    assert f"failed: case2: {moved}: shape" in shown.err
    assert "--resample-prediction" in shown.err
    rows = (tmp_path / "report" / "metrics.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == {"case0", "case1", "case3"}
    assert cli("evaluate", *folders, "-o", tmp_path / "again", "--resample-prediction").code == 0


def test_evaluate_names_a_file_it_cannot_read(cli: Medseg, folders, tmp_path: Path) -> None:
    bad = folders[0] / "case2.nii.gz"
    bad.write_bytes(bad.read_bytes()[:60])
    shown = cli("evaluate", *folders, "-o", tmp_path / "report")
    assert shown.code == 1
    assert f"failed: case2: {bad}: the gzip stream is damaged" in shown.err
    assert (tmp_path / "report" / "report.html").is_file()


def test_evaluate_names_every_case_where_none_can_be_read(cli: Medseg, folders, tmp_path: Path) -> None:
    broken = sorted(folders[0].iterdir())
    for file in broken:
        file.write_bytes(file.read_bytes()[:60])
    shown = cli("evaluate", *folders, "-o", tmp_path / "report")
    assert shown.code == 1
    assert [line[:14] for line in shown.err.splitlines() if line.startswith("failed:")] == [
        f"failed: {file.name[:5]}:"[:14] for file in broken
    ]
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--surface", "smooth"), ("--surface", "surfel")),
        (("--nsd-tolerance-mm", "-1"), ("--nsd-tolerance-mm -1: expected mm of 0 or more",)),
        (("--nsd-tolerance-mm", "nan"), ("--nsd-tolerance-mm nan: expected mm of 0 or more",)),
        (("--nsd-tolerance-mm", "1,1=2,3"), ("1,1=2,3: expected mm of 0 or more", "each label once")),
        (("--nsd-tolerance-mm", "1,liver=2"), ("unknown labels liver", "values such as 1")),
        (("--extra", "hausdorff"), ("hausdorff are unknown", "boundary_iou, cldice")),
        (("--lesions", "brats"), ("'brats' is unknown", "brats2023")),
        (("--group", "patient"), ("'patient'", "without metadata")),
        (("--metadata", "nowhere.csv"), ("nowhere.csv: cannot be read",)),
        (("--probabilities", "nowhere"), ("nowhere: no such file or folder",)),
        (("--labels", "nowhere.yaml"), ("nowhere.yaml", "cannot be read")),
        (("--jobs", "0"), ("--jobs", "greater than or equal to 1")),
    ],
)
def test_evaluate_refuses(
    cli: Medseg, folders, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    shown = cli("evaluate", *folders, "-o", tmp_path / "report", *arguments)
    assert shown.code == 2
    assert [word for word in words if word not in shown.err] == []
    assert not (tmp_path / "report").exists()


def test_evaluate_writes_all_that_can_be_asked_for(cli: Medseg, folders, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("case;site;patient\ncase0;x;1\ncase1;x;1\ncase2;y;2\ncase3;y;3\n")
    asked = ("--nnunet-summary", "--pdf", "--lesions", "brats2023", "--extra", "boundary-iou", "--metadata", table)
    shown = cli("evaluate", *folders, "-o", tmp_path / "report", *asked, "--nsd-tolerance-mm", "1,2=3", "--jobs", 2)
    assert shown.code == 0
    assert _files(tmp_path / "report") == [
        *("labels.ctbl", "labels.label", "lesions.csv", "metrics.csv", "nnunet_summary.json", "report.html"),
        *("report.pdf", "summary.json"),
    ]
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert [(group["value"], group["n_cases"]) for group in summary["subgroups"]] == [("x", 2), ("y", 2)]
    assert summary["n_groups"] == 3
    assert summary["lesions"]["rule"]["name"] == "brats2023"
    assert "within 1 mm (2: 3 mm) of" in summary["definitions"]["nsd"]
    assert summary["labels"]["1"]["boundary_iou"]["mean"] == 1
    assert "names patients" in shown.err


def test_evaluate_leaves_out_an_ignored_value(cli: Medseg, folders, tmp_path: Path) -> None:
    assert cli("evaluate", *folders, "-o", tmp_path / "report", "--ignore-label", 2).code == 0
    assert list(json.loads((tmp_path / "report" / "summary.json").read_text())["labels"]) == ["1"]


def test_evaluate_refuses_one_folder_given_twice(cli: Medseg, folders, tmp_path: Path) -> None:
    shown = cli("evaluate", folders[1], folders[1], "-o", tmp_path / "report")
    assert shown.code == 2
    assert "given as predictions and as references" in shown.err


def test_an_interrupted_evaluate_leaves_no_report(
    cli: Medseg, folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    # the page is the last that is made
    monkeypatch.setattr("medseg.report.render", interrupt)
    assert cli("evaluate", *folders, "-o", tmp_path / "report").code == 130
    assert not (tmp_path / "report").exists()


def test_evaluate_of_a_folder_that_is_not_there(cli: Medseg, folders, tmp_path: Path) -> None:
    shown = cli("evaluate", tmp_path / "nowhere", folders[1], "-o", tmp_path / "report")
    assert shown.code == 2
    assert f"{tmp_path / 'nowhere'}: no such file or folder" in shown.err


@pytest.mark.parametrize("which", [0, 1])
def test_evaluate_writes_no_report_among_the_masks(cli: Medseg, folders, tmp_path: Path, which: int) -> None:
    masks = [Path(shutil.copytree(folder, tmp_path / f"own{n}")) for n, folder in enumerate(folders)]
    (masks[which] / "summary.json").write_text("of nnU-Net")
    shown = cli("evaluate", *masks, "-o", masks[which] / ".")
    assert shown.code == 2
    assert f"give {masks[which] / 'report'}" in shown.err
    assert (masks[which] / "summary.json").read_text() == "of nnU-Net"
    assert cli("evaluate", *masks, "-o", masks[which] / "report").code == 0


def test_what_would_be_replaced_is_refused_before_any_work(
    cli: Medseg, folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(medseg, "evaluate", work)
    monkeypatch.setattr(medseg, "compare", work)
    (tmp_path / "summary.json").write_text('{"metric_per_case": []}')
    for line in (("evaluate", *folders), ("compare", "a", "b")):
        shown = cli(*line, "-o", tmp_path)
        assert shown.code == 2
        assert f"{tmp_path / 'summary.json'}: written by another program" in shown.err


def test_evaluate_wants_a_folder_for_its_report(cli: Medseg, folders, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    shown = cli("evaluate", *folders, "-o", tmp_path / "report.html")
    assert (shown.code, (tmp_path / "report.html").read_text()) == (2, "mine")
    assert "report.html is a file, expected a folder for the report" in shown.err


def test_evaluate_says_before_any_work_that_it_cannot_write(
    cli: Medseg, folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path.resolve())
    shown = cli("evaluate", *folders, "-o", tmp_path / "new" / "report")
    assert shown.code == 2
    assert f"nothing can be written in {tmp_path.resolve()}" in shown.err


def test_a_folder_that_cannot_be_looked_at_is_refused(cli: Medseg, folders, tmp_path: Path) -> None:
    # as in a closed folder, but for the superuser too
    for line in (("evaluate", *folders), ("compare", "a", "b")):
        shown = cli(*line, "-o", tmp_path / ("a" * 300) / "report")
        assert shown.code == 2
        assert "/report: cannot be looked at (File name too long); " in shown.err


def test_evaluate_cannot_write_below_a_file(cli: Medseg, folders, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    shown = cli("evaluate", *folders, "-o", tmp_path / "file" / "report")
    assert shown.code == 2
    assert str(tmp_path / "file" / "report") in shown.err


# ---- what is shown


def test_verbose_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["check", str(tmp_path / "nowhere"), "-v"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_without_a_terminal_a_line_now_and_then_has_the_same_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    with terminal.shown_progress() as progress:
        progress("infer", 12, 40, "3.1 s a case, 1 min 27 s left")
        progress("infer", 12.44, 40, "3.1 s a case, 1 min 25 s left")
        progress("check", 3, 7)
    assert capsys.readouterr().err.splitlines() == [
        "infer: 12 of 40, 3.1 s a case, 1 min 27 s left",
        "infer: 12.4 of 40, 3.1 s a case, 1 min 25 s left",
        "check: 3 of 7",
    ]


def test_without_a_terminal_lines_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.shown_progress() as progress:
        for n in range(50):
            progress("infer", n, 50)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_cases_pace_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(terminal, "err", console)
    with terminal.shown_progress() as progress:
        progress("infer", 12.44, 40, "3.1 s a case, 1 min 25 s left")
    shown = screen.getvalue()
    assert [w for w in ("infer", "12.4 of 40", "3.1 s a case, 1 min 25 s left") if w not in shown] == []
    # the library's own guess would contradict it
    assert "-:--:--" not in shown


@pytest.fixture
def odd_name(tmp_path: Path) -> Path:
    """A name that a terminal library might take for its own markup."""
    return tmp_path / "scan[red] :heart:"


def test_file_names_are_shown_as_they_are(cli: Medseg, odd_name: Path) -> None:
    assert str(odd_name) in cli("check", odd_name).err


def test_an_interruption_is_130_and_leaves_a_state(
    cli: Medseg, tiny_run, tmp_path: Path, train_args, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medseg.patches import PatchSampler

    draw = PatchSampler.draw
    drawn: list[int] = []

    def interrupted(sampler: PatchSampler) -> object:
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        drawn.append(1)
        return draw(sampler)

    monkeypatch.setattr(PatchSampler, "draw", interrupted)
    folder = tmp_path / "run"
    shown = cli("train", tiny_run.dataset, "-o", folder, *train_args, "--epochs", 5)
    assert shown.code == 130
    assert "interrupted" in shown.err
    assert (folder / "last.pt").is_file()
    assert not (folder / "model.safetensors").exists()
    monkeypatch.undo()
    assert cli("train", tiny_run.dataset, "-o", folder, *train_args, "--epochs", 5, "--resume").out.startswith(
        "10 steps"
    )


def test_names_that_are_no_text_are_shown_by_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", screen)
    terminal.show_any_name()
    terminal.out.print("caf\udce9.nii.gz: \u00e9")
    screen.flush()
    assert screen.buffer.getvalue().decode() == "caf\\udce9.nii.gz: \u00e9\n"


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that lets a folder be found but not be listed."""

    def refuse(*given: object, **more: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "data")

    monkeypatch.setattr("medseg.check_dataset", refuse)


@pytest.mark.usefixtures("stale")
def test_an_error_of_the_system_is_one_line(cli: Medseg) -> None:
    shown = cli("check", "data")
    assert shown.code == 1
    assert shown.err.count("\n") == 1
    assert "data: Stale file handle; see to it and try again" in shown.err


@pytest.mark.usefixtures("stale")
def test_verbose_shows_the_traceback_of_an_error_of_the_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "-v", "data"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_a_mistake_like_another(cli: Medseg, tmp_path: Path) -> None:
    shown = cli("check", tmp_path / ("x" * 300))
    assert shown.code == 2
    assert "Traceback" not in shown.err
