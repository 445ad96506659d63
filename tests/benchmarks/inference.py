"""Inference against MONAI's documented way and nnU-Net's predictor: seconds, memory and Dice, one table per part.

    python tests/benchmarks/inference.py prepare --work DIR --hippocampus-run RUN [--ct-run RUN]
    python tests/benchmarks/inference.py hippocampus --work DIR     40 held-back cases, three labels
    python tests/benchmarks/inference.py ct3 --work DIR             a torso CT, 62 classes, at its own 3 mm
    python tests/benchmarks/inference.py ct1 --work DIR             the same at 1 mm
    python tests/benchmarks/inference.py big --work DIR             the same on 512×512×300 (--slices)
    python tests/benchmarks/inference.py tall --work DIR            medseg on 300 and 600 slices
    python tests/benchmarks/inference.py native --work DIR          scores on the scan's own 512×512 grid (--slices)

Every way runs in a process of its own, on the same cores, with the same weights, in an order that turns round with
each repeat; `prepare` builds the environment for nnU-Net, the volumes and the plans, and trains what it is not given.
Each part writes `inference_PART.json`. A process is killed when it and its children hold more than `--limit-gb`, and
the row says so. Nothing else should run meanwhile. MEDSEG_DATA names the data, `../shared/data` unless set.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inference_ways.ways import Bench, BenchCase, compare, medseg_ways, monai_ways, nnunet_ways, run_helper

ROOT = Path(__file__).parents[2]
PARTS = ("prepare", "hippocampus", "ct3", "ct1", "big", "tall", "native")
NNUNET = "2.8.1"
CT_CASE = "ct_full"
# slices over the whole height of the CT; other numbers are a part of these, or go on as their mirror image
ALL_SLICES = 300


def main() -> None:
    """Prepare, or measure one part."""
    arguments = read_arguments()
    # so that the process that is measured ends too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # children inherit it: nobody gets more cores than the others
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    bench = Bench(
        work=arguments.work.resolve(),
        results=arguments.results.resolve(),
        threads=arguments.threads,
        limit_mb=arguments.limit_gb * 1000,
        timeout_s=arguments.timeout,
        only=arguments.only,
    )
    bench.work.mkdir(parents=True, exist_ok=True)
    parts = {
        "prepare": prepare,
        "hippocampus": measure_hippocampus,
        "ct3": measure_ct,
        "ct1": measure_ct,
        "big": measure_ct,
        "tall": measure_tall,
        "native": measure_native,
    }
    parts[arguments.part](bench, arguments)


def read_arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--work", type=Path, required=True, help="folder for environment, volumes, models and masks")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--hippocampus-run", type=Path, metavar="RUN", help="trained on fold 0; else it is trained")
    parser.add_argument("--ct-run", type=Path, metavar="RUN", help="of an earlier `prepare`; else it is trained")
    parser.add_argument("--time-budget", default="10m", help="of each training in `prepare`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-gb", type=float, default=20, help="memory that a process and its children may hold")
    parser.add_argument("--timeout", type=float, default=1200, metavar="SECONDS", help="of one process")
    parser.add_argument("--repeats", type=int, help="3 for hippocampus, 1 for the others")
    parser.add_argument("--cases", type=int, help="hippocampus: only the first N")
    parser.add_argument("--slices", type=int, help="big: 300, native: 64")
    parser.add_argument("--plane", type=int, default=512, help="big, tall, native: voxels along each side of a slice")
    parser.add_argument("--tall-slices", type=int, nargs=2, default=(300, 600))
    parser.add_argument("--only", default="", metavar="REGEX", help="only ways whose name matches")
    parser.add_argument("--tag", default="", help="added to the name of the result file")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=OPTIONS",
        help="one more way: medseg with these options of `medseg infer`, such as 'flips=--tta flip'",
    )
    return parser.parse_args()


# ---- what is measured on


def prepare(bench: Bench, arguments: argparse.Namespace) -> None:
    """Environment, data, models and plans; what is there already stays."""
    build_environment(bench.work / "nnunet_venv")
    python = Path(sys.executable)
    ct = bench.work / "ct"
    if not (ct / "dataset.json").is_file():
        job = {"kind": "ct", "dataset": str(data_folder() / "ct_totalseg"), "case": CT_CASE, "out": str(ct)}
        run_helper(bench, python, "volumes.py", job)
    hippocampus_run = arguments.hippocampus_run or train(
        data_folder() / "hippocampus", bench.work / "runs" / "hippocampus", "0", arguments.time_budget
    )
    # one case is to be learnt by heart: little augmentation
    little = ("augment.rotation_deg=[5,5,5]", "augment.scale=[0.95,1.05]")
    ct_run = arguments.ct_run or train(ct, bench.work / "runs" / "ct", "all", arguments.time_budget, *little)
    labels = json.loads((ct / "dataset.json").read_text())["labels"]
    copy_model(hippocampus_run, bench.work / "models" / "hippocampus")
    copy_model(ct_run, bench.work / "models" / "ct", labels=labels)
    copy_model(ct_run, bench.work / "models" / "native", labels=labels, resampled=False)
    volume(bench, "1mm")
    volume(bench, f"512x{ALL_SLICES}")
    theirs = bench.work / "nnunet_venv" / "bin" / "python"
    for folder, name, model in (
        (data_folder() / "hippocampus", "Dataset004_Hippocampus", "hippocampus"),
        (ct, "Dataset005_Torso", "ct"),
    ):
        weights, plans = bench.work / "models" / model, bench.work / "plans" / model
        job = {"dataset": str(folder), "name": name, "model": str(weights), "out": str(plans)}
        known = json.loads((plans / "facts.json").read_text()) if (plans / "facts.json").is_file() else {}
        if known.get("config") != read_configuration(weights):
            run_helper(bench, theirs, "nnunet_plan.py", job)


def data_folder() -> Path:
    """Where the real data sets are."""
    return Path(os.environ.get("MEDSEG_DATA", ROOT.parent / "shared" / "data"))


def build_environment(folder: Path) -> None:
    """A virtual environment with nnU-Net and medseg, and the same torch as here. Raises `RuntimeError` if not."""
    python = folder / "bin" / "python"
    if (folder / "ready").is_file():
        return
    torch = version("torch")
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", *constraints]
    # torch first: what comes after must take it as it is
    subprocess.run([*install, f"torch=={torch}"], check=True)
    subprocess.run([*install, "--editable", str(ROOT)], check=True)
    subprocess.run([*install, f"nnunetv2=={NNUNET}"], check=True)
    code = "import torch, nnunetv2, medseg; print(torch.__version__)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if found != torch:
        raise RuntimeError(f"{folder}: torch {found} found, expected {torch}; nnU-Net's installation replaced it")
    (folder / "ready").touch()


def train(dataset: Path, run: Path, fold: str, time_budget: str, *settings: str) -> Path:
    """Train through the command line; the run folder."""
    if not (run / "model.json").is_file():
        command = [sys.executable, "-m", "medseg", "train", str(dataset), "-o", str(run), "--fold", fold]
        command += ["--time-budget", time_budget, *(text for s in settings for text in ("--set", s))]
        subprocess.run(command, check=True)
    return run


def copy_model(run: Path, out: Path, *, labels: dict[str, int] | None = None, resampled: bool = True) -> None:
    """Weights and description of a run; with these label values, and without resampling, if so asked."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "model.safetensors", out / "model.safetensors")
    description = json.loads((run / "model.json").read_text())
    config = description["config"]
    if labels is not None:
        if list(config["data"]["labels"]) != list(labels):
            raise ValueError(f"{run}: other labels than the prepared data set, or in another order; train it again")
        config["data"]["labels"] = labels
        for entry in description["labels"]:
            entry["value"] = labels[entry["name"]]
    if not resampled:
        config["preprocess"]["spacing_mm"] = None
    (out / "model.json").write_text(json.dumps(description, indent=1))


def volume(bench: Bench, name: str) -> BenchCase:
    """The CT as it is (`3mm`), at `1mm`, or as 512x300: voxels along each side of a slice, and slices."""
    source = bench.work / "ct" / "as_is"
    folder = source if name == "3mm" else bench.work / "volumes" / name
    if not (folder / "label.nii.gz").is_file():
        job: dict[str, Any] = {"kind": "spacing", "spacing_mm": 1.0}
        if name != "1mm":
            plane, slices = (int(n) for n in name.split("x"))
            job = {"kind": "shape", "shape": [plane, plane, ALL_SLICES], "slices": slices}
        run_helper(bench, Path(sys.executable), "volumes.py", {**job, "source": str(source), "out": str(folder)})
    return BenchCase("image", folder / "image.nii.gz", folder / "label.nii.gz")


# ---- what is measured


def measure_hippocampus(bench: Bench, arguments: argparse.Namespace) -> None:
    """The held-back cases of fold 0, one folder at once."""
    data = data_folder() / "hippocampus"
    names = json.loads((data / "splits_final.json").read_text())[0]["val"][: arguments.cases]
    cases = [BenchCase(n, data / "imagesTr" / f"{n}_0000.nii.gz", data / "labelsTr" / f"{n}.nii.gz") for n in names]
    model = bench.work / "models" / "hippocampus"
    config = read_configuration(model)
    plans = bench.work / "plans" / "hippocampus"
    variants = {"flips": "--tta flip", **read_variants(arguments.variant)}
    ways = [
        *medseg_ways(config["windows"]["patch_size"], variants),
        *monai_ways(spacing=False, workers=(0, 2)),
        *nnunet_ways(bench, plans, model, config["augment"]["flip_axes"], (0, 1, 3)),
    ]
    facts = model_facts(model, plans)
    compare(bench, f"hippocampus{arguments.tag}", ways, cases, model=model, repeats=arguments.repeats or 3, facts=facts)


def measure_ct(bench: Bench, arguments: argparse.Namespace) -> None:
    """The torso CT on one grid; the network works at 3 mm, the masks are on the image's own grid."""
    size = f"{arguments.plane}x{arguments.slices or ALL_SLICES}"
    name = {"ct3": "3mm", "ct1": "1mm"}.get(arguments.part, size)
    case = volume(bench, name)
    model = bench.work / "models" / "ct"
    config = read_configuration(model)
    plans = bench.work / "plans" / "ct"
    ways = [
        *medseg_ways(config["windows"]["patch_size"], read_variants(arguments.variant)),
        *monai_ways(spacing=True),
        *nnunet_ways(bench, plans, model, config["augment"]["flip_axes"], (1,)),
    ]
    part = f"big_{size}" if arguments.part == "big" else arguments.part
    facts = model_facts(model, plans) | volume_facts(bench, name, model)
    compare(bench, f"{part}{arguments.tag}", ways, [case], model=model, repeats=arguments.repeats or 1, facts=facts)


def measure_tall(bench: Bench, arguments: argparse.Namespace) -> None:
    """medseg on two numbers of slices: is its memory flat in them? One result file for each number."""
    model = bench.work / "models" / "ct"
    patch = read_configuration(model)["windows"]["patch_size"]
    ways = medseg_ways(patch, read_variants(arguments.variant))
    for slices in arguments.tall_slices:
        size = f"{arguments.plane}x{slices}"
        case = volume(bench, size)
        facts = model_facts(model, None) | volume_facts(bench, size, model)
        part = f"tall_{size}{arguments.tag}"
        compare(bench, part, ways, [case], model=model, repeats=arguments.repeats or 1, facts=facts)


def measure_native(bench: Bench, arguments: argparse.Namespace) -> None:
    """The same weights on the scan's own grid, nothing resampled: time and memory only, the masks mean nothing."""
    size = f"{arguments.plane}x{arguments.slices or 64}"
    case = volume(bench, size)
    model = bench.work / "models" / "native"
    patch = read_configuration(model)["windows"]["patch_size"]
    ways = [*medseg_ways(patch, read_variants(arguments.variant), command_line=False), *monai_ways(spacing=False)]
    facts = model_facts(model, None) | volume_facts(bench, size, model)
    # no reference: agreement only
    cases = [BenchCase(case.name, case.image, None)]
    part = f"native_{size}{arguments.tag}"
    compare(bench, part, ways, cases, model=model, repeats=arguments.repeats or 1, facts=facts)


def read_variants(texts: Sequence[str]) -> dict[str, str]:
    """NAME=OPTIONS as a mapping."""
    return {name: options for name, _, options in (t.partition("=") for t in texts)}


def read_configuration(model: Path) -> dict[str, Any]:
    """The configuration of a copied model."""
    config: dict[str, Any] = json.loads((model / "model.json").read_text())["config"]
    return config


def model_facts(model: Path, plans: Path | None) -> dict[str, Any]:
    """What the reader of a table should know of the networks."""
    description = json.loads((model / "model.json").read_text())
    config, training = description["config"], description.get("training", {})
    facts: dict[str, Any] = {
        "network": config["network"]["name"],
        "patch_size": config["windows"]["patch_size"],
        "classes": len(config["data"]["labels"]),
        "spacing_mm": config["preprocess"]["spacing_mm"],
        "weights_sha256": description["weights_sha256"],
        "training_seconds": training.get("seconds", config["train"]["time_budget_s"]),
    }
    if plans is not None:
        known = json.loads((plans / "facts.json").read_text())
        facts["work"] = {whose: known[whose] for whose in ("ours", "own")}
    return facts


def volume_facts(bench: Bench, name: str, model: Path) -> dict[str, Any]:
    """Voxels of a volume, what its labels take in memory, and what a plain array of all scores would."""
    shape, spacing = _shape_and_spacing(volume(bench, name).image)
    voxels = shape[0] * shape[1] * shape[2]
    classes = len(read_configuration(model)["data"]["labels"])
    return {
        "shape": shape,
        "spacing_of_the_image_mm": spacing,
        "image_int16_mb": round(voxels * 2 / 1e6, 1),
        "labels_mb": round(voxels / 1e6, 1),
        "all_scores_float32_mb": round(voxels * classes * 4 / 1e6, 1),
    }


def _shape_and_spacing(path: Path) -> tuple[list[int], list[float]]:
    code = (
        "import sys, json, nibabel as n; h = n.load(sys.argv[1]).header;"
        "print(json.dumps([[int(s) for s in h.get_data_shape()], [round(float(z), 4) for z in h.get_zooms()]]))"
    )
    output = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    shape, spacing = json.loads(output)
    return shape, spacing


if __name__ == "__main__":
    main()
