"""Several processes that train one network: the same as one, and no hang when one of them ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks_fit import noise_config, noise_fit, run_noted

import medseg
from medseg.cli import processes, run
from medseg.cli.shared import USAGE
from medseg.ranks import Ranks

HERE = Path(__file__).parent
SECONDS = 240


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE))),
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def _together(*commands: list[str]) -> list[tuple[int, str, str]]:
    """Code, output and errors of processes that run side by side as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=_environment(rank, len(commands), port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        shown = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, shown)]


# batch statistics and dropout in all of them; three rows for two processes are two and one
KINDS: tuple[dict[str, Any], ...] = (
    {"train": {"batch_size": 3}},
    {"train": {"batch_size": 2}, "loss": {"batch_dice": False}, "network": {"norm": "instance"}},
)


def test_two_processes_are_one(tmp_path: Path) -> None:
    program = [str(HERE / "ranks_fit.py"), str(tmp_path / "two"), json.dumps(KINDS)]
    (code, out, err), (other_code, other_out, other_err) = _together(program, program)
    assert (code, other_code) == (0, 0), err + other_err
    assert other_out + other_err == ""
    for n, (changes, two) in enumerate(zip(KINDS, json.loads(out.splitlines()[-1]))):
        one = run_noted(noise_fit(tmp_path / "one" / str(n), noise_config(**changes)))
        # float32 sums in another order
        assert np.allclose(two["losses"], one.losses, rtol=0, atol=1e-5)
        assert len(one.losses) == 6
        assert np.allclose(two["weights"], one.weights, rtol=0, atol=1e-4)
        assert two["same"]
        assert two["dice"] == pytest.approx(one.dice, abs=0.01)
        rows = [
            (tmp_path / where / str(n) / "metrics.csv").read_text().splitlines()[-1].split(",")[:2]
            for where in ("one", "two")
        ]
        assert rows[0] == rows[1] == ["3", "6"]


BROKEN = """
import sys
from pathlib import Path
import torch
from ranks_fit import noise_config, noise_fit
from medseg.progress import silent
from medseg.ranks import Ranks

ranks = Ranks(torch.device("cpu"))
fit = noise_fit(Path(sys.argv[1]), noise_config(), ranks)
draw = fit.sampler.draw
def broken():
    if ranks.rank == 1 and fit.course.step == 3:
        raise OSError("the cable is out")
    return draw()
fit.sampler.draw = broken
with ranks.together():
    fit.run(silent)
"""


def test_a_process_that_breaks_down_ends_the_others(tmp_path: Path) -> None:
    first, second = _together(*[["-c", BROKEN, str(tmp_path)]] * 2)
    assert second[0] == 1
    assert "OSError: the cable is out" in second[2]
    assert first[0] == 1
    assert "PeerError: another process of this training ended, and its message says why" in first[2]


def _command(dataset: Path, folder: Path, settings: tuple[str, ...]) -> list[str]:
    options = [word for setting in settings for word in ("--set", setting)]
    return ["train", str(dataset), "-o", str(folder), "--folds", "2", "--device", "cpu", "--deterministic", *options]


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture
def two_devices(
    tiny_dataset: Callable[..., Path], tiny_settings: tuple[str, ...], tmp_path: Path
) -> Callable[..., subprocess.Popen[str]]:
    """Starts `medseg train --devices 2` into `tmp_path`/run, and waits for its first state."""
    dataset = tiny_dataset(cases=4)

    def start(*more: str) -> subprocess.Popen[str]:
        command = _command(dataset, tmp_path / "run", (*tiny_settings, "train.save_every_s=0.01"))
        process = subprocess.Popen(
            [sys.executable, "-m", "medseg", *command, "--devices", "2", *more],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        _wait_for(tmp_path / "run" / "last.pt", process)
        return process

    return start


@pytest.mark.usefixtures("one_thread")
def test_a_training_on_two_devices_is_pre_empted_and_goes_on_alone(two_devices, tmp_path: Path) -> None:
    process = two_devices("--epochs", "100000")
    process.terminate()
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, err
    assert err.count("the same command line goes on") == 1
    assert (out, "Traceback" in err) == ("", False)
    step = int(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["course"]["step"])
    options = medseg.TrainOptions(resume=True, folds=2, device="cpu")
    run = medseg.train(tmp_path / "tiny", tmp_path / "run", epochs=step // 2 + 1, options=options)
    assert run.steps == 2 * (step // 2 + 1)


@pytest.mark.usefixtures("one_thread")
def test_torchrun_trains_with_a_planned_batch_and_one_process_goes_on_with_the_same(
    tiny_dataset: Callable[..., Path], tiny_settings: tuple[str, ...], tmp_path: Path
) -> None:
    dataset, folder = tiny_dataset(cases=2), tmp_path / "run"
    planned = tuple(setting for setting in tiny_settings if "batch_size" not in setting)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "medseg"]
    command = [*_command(dataset, folder, planned), "--fold", "all", "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, *torchrun, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    training = json.loads((folder / "model.json").read_text())["training"]
    assert (training["devices"], training["steps"]) == (2, 2)
    # that of a CPU, which both share
    assert medseg.read_config(folder / "config.yaml").train.batch_size == 4
    options = medseg.TrainOptions(resume=True, fold="all", device="cpu")
    run = medseg.train(dataset, folder, epochs=2, options=options)
    assert (run.steps, run.config.train.batch_size) == (4, 4)


def test_a_process_that_is_killed_ends_all(two_devices) -> None:
    process = two_devices("--epochs", "100000")
    children = [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(children[1], signal.SIGKILL)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "process 1 was ended by SIGKILL" in err
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.parametrize("how", ["exit 75", "kill -TERM $$"])
def test_a_process_told_to_end_leaves_none_behind_that_no_signal_reaches(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SECONDS_TO_END", 0.1)
    deaf, told = subprocess.Popen(["sleep", "20"]), subprocess.Popen(["sh", "-c", how])
    try:
        assert processes._watch([deaf, told]) == 75
        assert deaf.poll() is None
    finally:
        deaf.kill()
        deaf.wait()


@pytest.mark.parametrize(("rank", "rows"), [(0, [0, 1]), (1, [2, 3]), (2, [4, 5, 6])])
def test_rows_are_shared_out(rank: int, rows: list[int]) -> None:
    ranks = Ranks(torch.device("cpu"))
    ranks.rank, ranks.size = rank, 3
    assert list(range(7))[ranks.rows(7)] == rows


def test_fewer_samples_than_processes_are_refused() -> None:
    ranks = Ranks(torch.device("cpu"))
    ranks.size = 3
    with pytest.raises(medseg.ConfigError, match="2 found for 3 processes, expected at least one sample for each"):
        ranks.rows(2)


def test_several_devices_need_several_processes() -> None:
    with pytest.raises(medseg.ConfigError, match="use `medseg train --devices 2`"):
        Ranks(torch.device("cpu"), devices=2)


@pytest.mark.parametrize(("starter", "told"), [("test", True), ("medseg", False)])
def test_a_mistake_may_be_that_of_one_machine_of_several(
    starter: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "end_with_the_one_that_started_us", lambda: None)
    # for good, which other tests would notice
    monkeypatch.setattr("medseg.cli.training.silence", lambda: None)
    for name, value in {"TORCHELASTIC_RUN_ID": starter, "RANK": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run(["train", str(tmp_path), "-o", str(tmp_path / "run"), "--device", "cuda:99"]) == USAGE
    assert ("error: process 4: --device cuda:99" in capsys.readouterr().err) is told


@pytest.mark.parametrize(
    "told",
    [
        {"TORCHELASTIC_RUN_ID": "test", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "train"},
    ],
)
def test_devices_that_nobody_started_a_process_for_are_refused(
    told: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert run(["train", str(tmp_path), "-o", str(tmp_path / "run"), "--devices", "4"]) == USAGE
    assert "started 1 processes on this machine, expected 4" in " ".join(capsys.readouterr().err.split())


def test_slurm_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.ranks import _environment as environment

    told = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_JOB_NAME": "train"}
    for name, value in {**told, "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "1234"}.items():
        monkeypatch.setenv(name, value)
    found = environment()
    assert found is not None
    assert (found.global_rank(), found.world_size(), found.local_rank()) == (3, 4, 1)
    assert (processes.rank(), processes.is_one_of_several()) == (3, True)
    # one task, and a shell on a node, whose commands srun did not start
    for name, value in (("SLURM_NTASKS", "1"), ("SLURM_JOB_NAME", "bash")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert environment() is None
            assert (processes.rank(), processes.is_one_of_several()) == (0, False)
