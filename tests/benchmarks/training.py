"""Time to accuracy: medseg, MONAI the documented way and nnU-Net, on one machine, in one run, judged by one evaluation.

    python tests/benchmarks/training.py DATASET --schedule medseg:3.33 monai:10 nnunet:10 --environment FOLDER \
        -o RESULT.json

In turn: medseg trains with its defaults through its command line with that time budget, MONAI trains its UNet (`monai`)
or its SegResNet (`monai_segresnet`) with a schedule that ends then, and nnU-Net's one training goes on until then. The
held-back cases of fold 0 are segmented by each, which is not counted, and judged by `medseg evaluate`. Kept are Dice,
samples per second, the share of waiting for data, the seconds beside training, and in `minutes_to` between which of its
moments each way came to a mean Dice: how long that takes is known only where a way has moments before and after it, as
in `--schedule medseg:1 medseg:2 medseg:4`. One moment a way, as above, compares Dice and gives bounds.
DATASET is in nnU-Net's form with one file per case and `splits_final.json`, of three dimensions. FOLDER is where
nnU-Net's environment is made, with the torch of this one. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import machine

import medseg
from medseg.datasets import read_dataset

WAYS = Path(__file__).parent / "training_ways"
WHO = ("medseg", "monai", "monai_segresnet", "nnunet")
NNUNET = "2.8.1"
MONAI_NETWORKS = {"monai": "unet", "monai_segresnet": "segresnet"}
TARGETS = (0.80, 0.85, 0.87)
POLL_S = 0.2
FOLD = 0


def main() -> None:
    """Train each for each time, judge, write after each so that a run that is broken off leaves what it had."""
    arguments = read_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments, Path(temporary))
        with bench.nnunet() if any(who == "nnunet" for who, _ in arguments.schedule) else nothing():
            for who, minutes in arguments.schedule:
                bench.curves[who].append({"minutes": minutes} | bench.train(who, minutes * 60))
                print(who, json.dumps(bench.curves[who][-1]), flush=True)
                bench.write(arguments.output)


def read_arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument(
        "--schedule",
        type=scheduled,
        nargs="+",
        metavar="WHO:MINUTES",
        default=[(who, minutes) for minutes in (2.0, 5.0, 10.0) for who in WHO],
        help=f"who trains how long, in this order; who: {', '.join(WHO)}",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--environment", type=Path, help="folder of nnU-Net's virtual environment, made if not there")
    parser.add_argument("--cases", type=int, help="judge only so many of the held-back cases; to try the script")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    if any(who == "nnunet" for who, _ in arguments.schedule) and arguments.environment is None:
        parser.error("nnunet needs --environment FOLDER")
    if wrong := out_of_order(arguments.schedule):
        parser.error(wrong)
    return arguments


def scheduled(text: str) -> tuple[str, float]:
    """`medseg:3.33` as who and minutes."""
    who, _, minutes = text.partition(":")
    if who not in WHO:
        raise argparse.ArgumentTypeError(f"{text}: expected WHO:MINUTES, WHO one of {', '.join(WHO)}")
    return who, float(minutes)


def out_of_order(schedule: Sequence[tuple[str, float]]) -> str:
    """What is wrong with a schedule in which a way's moments do not grow; nothing where they do."""
    last: dict[str, float] = {}
    for who, minutes in schedule:
        if minutes <= last.get(who, 0.0):
            return (
                f"{who}:{minutes:g}: expected more than {last.get(who, 0.0):g} minutes, its moment before; each is a "
                "point of its own, and nnU-Net's training goes on from the one before"
            )
        last[who] = minutes
    return ""


class Bench:
    """One comparison: its data, where it works, what it found."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.dataset, self.threads, self.work = arguments.dataset.resolve(), arguments.threads, work
        self.environment = arguments.environment and arguments.environment.resolve()
        self.curves: dict[str, list[dict[str, Any]]] = {who: [] for who, _ in arguments.schedule}
        data = read_dataset(self.dataset)
        self.labels = {value: name for name, value in (data.labels or {}).items() if value}
        training, held_back = medseg.fold_split(data, FOLD)
        self.training = [(c.id, str(c.images[0]), str(c.label)) for c in training]
        self.held_back = [(c.id, str(c.images[0]), str(c.label)) for c in held_back[: arguments.cases]]
        self.patch = list(medseg.plan(self.dataset, device="cpu").config.windows.patch_size)
        self.references = work / "references"
        self.references.mkdir()
        for case, _, label in self.held_back:
            (self.references / f"{case}.nii.gz").symlink_to(label)
        self._process: subprocess.Popen[str] | None = None

    def train(self, who: str, seconds: float) -> dict[str, Any]:
        """What became of one way in that time."""
        if who == "medseg":
            return self._train_medseg(seconds)
        if who == "nnunet":
            return self._train_nnunet(seconds)
        return self._train_monai(who, seconds)

    def _train_medseg(self, seconds: float) -> dict[str, Any]:
        """With its defaults, as a user would."""
        run = self.work / f"medseg_{seconds:.0f}"
        command = [sys.executable, "-m", "medseg", "train", str(self.dataset), "-o", str(run), "--fold", str(FOLD)]
        began = time.perf_counter()
        self._run([*command, "--time-budget", f"{seconds:.0f}s", "--device", "cpu"], run.with_suffix(".log"))
        whole = time.perf_counter() - began
        judged = run / "judged"
        judged.mkdir()
        predictions = {path.name: path for path in (run / "validation").rglob("*.nii.gz")}
        for case, _, _ in self.held_back:
            (judged / f"{case}.nii.gz").symlink_to(predictions[f"{case}.nii.gz"])
        return self._judge(judged) | told_by(run, whole)

    def _train_monai(self, who: str, seconds: float) -> dict[str, Any]:
        """Caching, training, prediction in one process."""
        out = self.work / f"{who}_{seconds:.0f}"
        result = out.with_suffix(".json")
        job = {
            "training": self.training,
            "validation": self.held_back,
            "network": MONAI_NETWORKS[who],
            "patch": self.patch,
            "classes": len(self.labels) + 1,
            "seconds": seconds,
            "threads": self.threads,
            "out": str(out),
            "result": str(result),
        }
        self._run([sys.executable, str(WAYS / "monai_way.py"), self._job(who, job)], out.with_suffix(".log"))
        return self._judge(out) | json.loads(result.read_text())

    def _train_nnunet(self, seconds: float) -> dict[str, Any]:
        """The training that is there goes on until then."""
        if self._process is None or self._process.stdin is None:
            raise RuntimeError("nnU-Net was not started")
        out = self.work / f"nnunet_{seconds:.0f}"
        result = out.with_suffix(".json")
        self._process.stdin.write(f"{seconds}\t{out}\t{result}\n")
        self._process.stdin.flush()
        self._wait_for(result)
        return self._judge(out) | json.loads(result.read_text())

    @contextmanager
    def nnunet(self) -> Iterator[None]:
        """Its process, prepared and at rest between the times it is asked to train."""
        python = build_environment(self.environment)
        job = {
            "dataset": str(self.dataset),
            "name": "Dataset900_Benchmark",
            "fold": FOLD,
            "validation": self.held_back,
            "threads": self.threads,
            "work": str(self.work),
        }
        folders = {name: str(self.work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        environment = os.environ | folders | {"nnUNet_n_proc_DA": str(self.threads), "nnUNet_compile": "f"}
        command = [str(python), str(WAYS / "nnunet_way.py"), self._job("nnunet", job)]
        log = self.work / "nnunet.log"
        with log.open("w") as told:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=told,
                stderr=told,
                text=True,
                env=environment,
                start_new_session=True,
            )
        try:
            self._wait_for(self.work / "ready.json")
            yield
        finally:
            # its processes for augmentation do not end with it
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def write(self, path: Path) -> None:
        """All that is known so far."""
        result = {
            "data_set": self.dataset.name,
            "fold": FOLD,
            "held_back_cases": len(self.held_back),
            "threads": self.threads,
            "curves": self.curves,
            "minutes_to": {who: minutes_to(curve) for who, curve in self.curves.items()},
            "machine": machine(),
            "versions": {name: version(name) for name in ("medseg", "torch", "monai")} | {"nnunetv2": NNUNET},
            "date": date.today().isoformat(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")

    def _judge(self, predictions: Path) -> dict[str, Any]:
        found = medseg.evaluate(predictions, self.references).summary["labels"]
        dice = {label["name"]: round(label["dice"]["mean"], 4) for label in named(found, self.labels)}
        return {"dice": dice, "mean_dice": round(sum(dice.values()) / len(dice), 4)}

    def _job(self, name: str, job: Mapping[str, Any]) -> str:
        path = self.work / f"{name}_job.json"
        path.write_text(json.dumps(job))
        return str(path)

    def _run(self, command: Sequence[str], log: Path) -> None:
        with log.open("w") as told:
            code = subprocess.run(command, stdout=told, stderr=told, env=os.environ | self._threads()).returncode
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-3000:]}")

    def _threads(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads)}

    def _wait_for(self, path: Path) -> None:
        while not path.is_file():
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"nnU-Net ended by itself:\n{(self.work / 'nnunet.log').read_text()[-3000:]}")
            time.sleep(POLL_S)


@contextmanager
def nothing() -> Iterator[None]:
    """No process is needed."""
    yield


def named(found: Mapping[str, Any], labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """The rows of a summary whose keys are names or values, with names."""
    return [row | {"name": labels.get(int(key), key) if key.isdecimal() else key} for key, row in found.items()]


def told_by(run: Path, whole_s: float) -> dict[str, Any]:
    """What a run folder of medseg tells of a training that took `whole_s` seconds with all that comes with it."""
    model = json.loads((run / "model.json").read_text())
    told, batch = model["training"], model["config"]["train"]["batch_size"]
    return {
        "training_s": told["seconds"],
        "beside_s": round(whole_s - told["seconds"], 2),
        "steps": told["steps"],
        "samples_per_s": round(told["steps"] * batch / told["seconds"], 3),
        "waiting_share": told["waiting_share"],
        "precision": told["precision"],
    }


def minutes_to(curve: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Between which of the measured moments the mean Dice came to each target.

    `at_most` is the first moment at which it was there, `later_than` the moment before, at which it was not; null where
    none was measured, so that a way with one moment has one of the two.
    """
    points = sorted(curve, key=lambda point: point["minutes"])
    moments = [None, *(point["minutes"] for point in points), None]
    found = {}
    for target in TARGETS:
        first = next((n for n, point in enumerate(points) if point["mean_dice"] >= target), len(points))
        found[f"{target:.2f}"] = {"later_than": moments[first], "at_most": moments[first + 1]}
    return found


def build_environment(folder: Path) -> Path:
    """A virtual environment with nnU-Net that sees the packages of this one; its python.

    Raises `RuntimeError` where the installation brought another torch.
    """
    python = folder / "bin" / "python"
    if (folder / "ready").is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    theirs = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (Path(theirs) / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={version('torch').partition('+')[0]}\n")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, f"nnunetv2=={NNUNET}"]
    subprocess.run(install, check=True)
    code = "import nnunetv2, torch; print(torch.__version__)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if found != version("torch"):
        raise RuntimeError(f"{folder}: torch {found} found, expected {version('torch')}; nnU-Net's brought its own")
    (folder / "ready").touch()
    return python


if __name__ == "__main__":
    main()
