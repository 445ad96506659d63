"""The ways that are compared, how one of them is run and scored, and the table over their repeats; no data here."""

from __future__ import annotations

import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from inference_ways.guard import run_guarded

HERE = Path(__file__).parent
# nnU-Net trains with mirroring of all axes, and then mirrors all of them at inference
OWN_MIRROR_AXES = (0, 1, 2)
VERSIONS = ("torch", "monai", "numpy", "nibabel", "SimpleITK", "nnunetv2", "scikit-image", "medseg")


@dataclass(frozen=True)
class BenchCase:
    """An image with its reference, None where there is none to compare with."""

    name: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class Way:
    """A way to segment. `script` None: the command line `medseg infer` with `arguments`; else a file here with `job`.

    `scored`: whether its masks mean anything (random weights do not).
    """

    name: str
    what: str
    python: Path
    script: str | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    scored: bool = True

    def mask(self, out: Path, case: BenchCase) -> Path:
        """Where the way writes the mask of a case."""
        # MONAI keeps the whole name of the input
        keeps_name = self.script == "monai_way.py"
        return out / (case.image.name if keeps_name else f"{case.name}.nii.gz")


@dataclass(frozen=True)
class Bench:
    """Where things are, and what a process may take."""

    work: Path
    results: Path
    threads: int
    limit_mb: float
    timeout_s: float
    only: str

    def environment(self) -> dict[str, str]:
        """Threads, the same for everyone."""
        n = str(self.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
        folder = self.work / "nnunet"
        places = {f"nnUNet_{kind}": str(folder / kind) for kind in ("raw", "preprocessed", "results")}
        return dict.fromkeys(names, n) | places


def medseg_ways(patch: Sequence[int], variants: Mapping[str, str], *, command_line: bool = True) -> list[Way]:
    """medseg at equal overlap and windows, with its own choice, and with the `variants` (name → options as typed)."""
    here = Path(sys.executable)
    size = ",".join(str(p) for p in patch)
    equal = ("--overlap", "0.5", *(("--window", size) if _knows_window(here) else ()))
    ways = [
        _medseg("medseg equal 32", "Python, the same windows and overlap as the others, float32", equal, "32"),
        _medseg("medseg equal bf16", "Python, the same windows and overlap as the others, bf16", equal, "bf16"),
        _medseg("medseg default", "Python, nothing chosen: precision auto, window auto", (), "auto"),
    ]
    for name, text in variants.items():
        ways.append(_medseg(f"medseg {name}", f"Python, {text}", tuple(text.split()), "auto"))
    if command_line:
        ways.append(Way("medseg infer", "the command line with its defaults, a fresh process", here))
        # typed, three axes begin with the slowest; from Python they are those of the network's grid
        typed = tuple(",".join(reversed(v.split(","))) if v == size and len(patch) == 3 else v for v in equal)
        ways.append(Way("medseg infer equal", "the command line, windows and overlap as others", here, arguments=typed))
    return ways


def _medseg(name: str, what: str, arguments: tuple[str, ...], precision: str) -> Way:
    options = {"precision": precision, **_options(arguments)}
    return Way(name, what, Path(sys.executable), "medseg_way.py", {"options": options})


def _options(arguments: Sequence[str]) -> dict[str, Any]:
    """Options of `medseg infer` as fields of `InferOptions`. Raises `ValueError` for one that is not known here."""
    found: dict[str, Any] = {}
    pairs = list(zip(arguments[::2], arguments[1::2]))
    if len(arguments) % 2:
        raise ValueError(f"{' '.join(arguments)}: expected options with one value each")
    for name, value in pairs:
        if name == "--overlap":
            found["overlap"] = float(value)
        elif name == "--window":
            found["window"] = [int(v) for v in value.split(",")] if value[0].isdigit() else value
        elif name in ("--tta", "--precision"):
            found[name[2:]] = value
        elif name == "--set":
            key, _, text = value.partition("=")
            section, _, entry = key.partition(".")
            found.setdefault("settings", {}).setdefault(section, {})[entry] = json.loads(text)
        else:
            raise ValueError(f"{name}: expected --overlap, --window, --tta, --precision or --set")
    return found


def _knows_window(python: Path) -> bool:
    help_text = subprocess.run([python, "-m", "medseg", "infer", "--help"], capture_output=True, text=True, check=True)
    return "--window" in help_text.stdout


def monai_ways(*, spacing: bool, workers: Sequence[int] = (0,)) -> list[Way]:
    """MONAI as documented, in both precisions, and with the labels taken early where there is something to invert."""
    python = Path(sys.executable)
    job = {"overlap": 0.5, "early_argmax": False}
    ways = []
    for count in workers:
        tail = f" workers {count}" if count else ""
        for precision in ("bf16", "32") if not count else ("bf16",):
            what = f"MONAI's documented chain, {precision}, DataLoader with {count} workers"
            ways.append(
                Way(
                    f"monai {precision}{tail}",
                    what,
                    python,
                    "monai_way.py",
                    job | {"precision": precision, "workers": count},
                )
            )
    if spacing:
        what = "MONAI, argmax before Invertd (nearest): another, coarser result that needs less memory; bf16"
        early = job | {"precision": "bf16", "workers": 0, "early_argmax": True}
        ways.append(Way("monai early argmax", what, python, "monai_way.py", early))
    return ways


def nnunet_ways(bench: Bench, plans: Path, model: Path, mirror_axes: Sequence[int], counts: Sequence[int]) -> list[Way]:
    """nnU-Net's predictor with our network and its own; `counts`: numbers of workers, 0 for none (only ours)."""
    python = bench.work / "nnunet_venv" / "bin" / "python"
    ways = []
    for network, axes in (("ours", list(mirror_axes)), ("own", list(OWN_MIRROR_AXES))):
        for count in counts if network == "ours" else [c for c in counts if c]:
            job = {
                "plans": str(plans / f"{network}.json"),
                "dataset_json": str(plans / "dataset.json"),
                "network": network,
                "model": str(model),
                "mirror_axes": axes,
                "workers": count,
            }
            # 3 is what its command line starts; then nothing else is touched either
            threads = {} if count == 3 else {"nnUNet_def_n_proc": str(bench.threads)}
            tail = f"{count} workers" if count else "sequential"
            whose = "our network and weights" if network == "ours" else "its own network of equal work, random weights"
            what = f"nnUNetPredictor, {whose}, mirror axes {axes}, {tail}"
            ways.append(
                Way(
                    f"nnunet {network} {tail}",
                    what,
                    python,
                    "nnunet_way.py",
                    job,
                    environment=threads,
                    scored=network == "ours",
                )
            )
    return ways


def compare(
    bench: Bench,
    part: str,
    ways: Sequence[Way],
    cases: Sequence[BenchCase],
    *,
    model: Path,
    repeats: int,
    facts: Mapping[str, Any],
) -> None:
    """Run every way `repeats` times in alternating order; the result file is written after each of them."""
    chosen = [w for w in ways if re.search(bench.only, w.name)]
    result: dict[str, Any] = {
        "part": part,
        "command": " ".join(["python", "tests/benchmarks/inference.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "cases": len(cases),
        "facts": dict(facts),
        "limits": {"memory_mb": bench.limit_mb, "seconds": bench.timeout_s, "threads": bench.threads},
        "machine": machine(),
        "versions": {"medseg and MONAI": versions(Path(sys.executable))},
        "ways": {w.name: w.what for w in chosen},
        "table": {},
        "rows": [],
    }
    theirs = bench.work / "nnunet_venv" / "bin" / "python"
    if theirs.is_file():
        result["versions"]["nnU-Net"] = versions(theirs)
    path = bench.results / f"inference_{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = result["rows"]
    for repeat in range(repeats):
        for way in chosen if repeat % 2 == 0 else chosen[::-1]:
            row = run_way(bench, part, way, cases, model)
            rows.append({"way": way.name, "repeat": repeat, **row})
            if row["status"] == "done" and repeat == 0 and way.scored:
                out = bench.work / "out" / part
                rows[-1]["score"] = score(bench, way, cases, out, compare_with=chosen[0])
            result["table"] = table(rows, labels_mb=facts.get("labels_mb"))
            path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
            print(_line(rows[-1]), flush=True)


def run_way(bench: Bench, part: str, way: Way, cases: Sequence[BenchCase], model: Path) -> dict[str, Any]:
    """One way over all cases in a process of its own; a row of the result."""
    name = re.sub(r"\W+", "_", way.name)
    out = bench.work / "out" / part / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    logs = bench.work / "logs" / part
    logs.mkdir(parents=True, exist_ok=True)
    record = logs / f"{name}.record.json"
    images = [str(c.image) for c in cases]
    if way.script is None:
        command = [str(way.python), "-m", "medseg", "infer", *images, "-m", str(model), "-o", str(out), *way.arguments]
    else:
        job = {
            "images": images,
            "cases": [c.name for c in cases],
            "model": str(model),
            "out": str(out),
            "record": str(record),
            **way.job,
        }
        file = logs / f"{name}.job.json"
        file.write_text(json.dumps(job, indent=1))
        command = [str(way.python), str(HERE / way.script), str(file)]
    row = run_guarded(
        command,
        log=logs / f"{name}.log",
        record=None if way.script is None else record,
        environment=bench.environment() | way.environment,
        limit_mb=bench.limit_mb,
        timeout_s=bench.timeout_s,
    ).as_row()
    if way.script is None and row["status"] == "done":
        recorded = json.loads((out / "run.json").read_text())["cases"]
        sums: dict[str, float] = {}
        for case in recorded:
            for stage, value in case["seconds"].items():
                sums[f"case.{stage}"] = round(sums.get(f"case.{stage}", 0.0) + value, 4)
        row["seconds"], row["facts"] = sums, {"n": len(recorded)}
    return row


def score(bench: Bench, way: Way, cases: Sequence[BenchCase], out: Path, *, compare_with: Way) -> dict[str, Any]:
    """Dice and agreement of the masks that `way` wrote below `out`."""
    folder = out / re.sub(r"\W+", "_", way.name)
    other = out / re.sub(r"\W+", "_", compare_with.name)
    pairs = [
        {
            "prediction": str(way.mask(folder, c)),
            "reference": None if c.label is None else str(c.label),
            "compare": None if way is compare_with else str(compare_with.mask(other, c)),
        }
        for c in cases
    ]
    found = run_helper(bench, Path(sys.executable), "score.py", {"pairs": pairs})
    if "agreement" in found:
        found["agreement_with"] = compare_with.name
    return found


def run_helper(bench: Bench, python: Path, script: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a file here that is not measured; the facts it found. Raises `RuntimeError` where it fails."""
    logs = bench.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    record, file = logs / f"{script}.record.json", logs / f"{script}.job.json"
    file.write_text(json.dumps({**job, "record": str(record)}))
    outcome = run_guarded(
        [str(python), str(HERE / script), str(file)],
        log=logs / f"{script}.log",
        record=record,
        environment=bench.environment(),
        limit_mb=bench.limit_mb,
        timeout_s=1800,
    )
    if outcome.status != "done":
        raise RuntimeError(f"{script}: {outcome.status}: {outcome.message}; see {logs / (script + '.log')}")
    return dict(outcome.facts)


def table(rows: Sequence[Mapping[str, Any]], *, labels_mb: float | None) -> dict[str, Any]:
    """Per way the median over its finished repeats, and of a way that never finished how it ended.

    `seconds_per_case`: without interpreter and imports where the process says so, `wall_seconds_per_case` with them.
    `peak_less_labels_mb`: without one label map of one byte per voxel.
    """
    result: dict[str, Any] = {}
    for name in dict.fromkeys(r["way"] for r in rows):
        mine = [r for r in rows if r["way"] == name]
        done = [r for r in mine if r["status"] == "done"]
        if not done:
            last = mine[-1]
            kept = ("status", "last_stage", "wall_s", "peak_mb", "peak_tree_mb", "message")
            result[name] = {k: last[k] for k in kept}
            continue
        entry: dict[str, Any] = {"repeats": len(done)}
        inside = [r["seconds"]["cases"] / r["facts"]["n"] for r in done if "cases" in r["seconds"]]
        if inside:
            entry["seconds_per_case"] = _median(inside)
            entry["start_up_s"] = _median([r["seconds"]["start"] + r["seconds"]["import"] for r in done])
        entry["wall_seconds_per_case"] = _median([r["wall_s"] / r["facts"]["n"] for r in done])
        entry["cases_per_second"] = round(1 / entry.get("seconds_per_case", entry["wall_seconds_per_case"]), 3)
        entry["cpu_seconds_per_case"] = _median([r["cpu_s"] / r["facts"]["n"] for r in done])
        stages = [k for k in done[0]["seconds"] if k.startswith("case.")]
        entry["stages_s_per_case"] = {
            k.removeprefix("case."): _median([r["seconds"].get(k, 0.0) / r["facts"]["n"] for r in done]) for k in stages
        }
        entry["peak_mb"] = round(max(r["peak_mb"] for r in done), 1)
        entry["peak_tree_mb"] = round(max(r["peak_tree_mb"] for r in done), 1)
        if labels_mb is not None:
            entry["peak_less_labels_mb"] = round(entry["peak_mb"] - labels_mb, 1)
        entry |= {k: v for r in done for k, v in r.get("score", {}).items() if k != "dice_by_label"}
        result[name] = entry
    return result


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)


def _line(row: Mapping[str, Any]) -> str:
    cases = row["seconds"].get("cases")
    inside = f"{cases:8.2f} s in cases" if cases else " " * 19
    dice = row.get("score", {}).get("dice")
    ended = "" if row["status"] == "done" else f"  {row['status']} in {row['last_stage']}: {row['message'][-120:]}"
    return (
        f"{row['way']:28} {row['wall_s']:8.2f} s {inside} {row['peak_mb']:9.0f} MB {row['peak_tree_mb']:9.0f} MB tree"
        f"  load {row['load_before']:.1f}" + (f"  Dice {dice:.4f}" if dice is not None else "") + ended
    )


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names),
        "bf16_instructions": [f for f in ("avx512_bf16", "amx_bf16") if f in flags.split()],
        "memory_gb": round(int(memory) * 1024 / 1e9, 1),
        "system": platform.platform(),
    }


def versions(python: Path) -> dict[str, str]:
    """Versions in the environment of `python`."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        "def v(n):\n    try:\n        return m.version(n)\n    except m.PackageNotFoundError:\n        return None\n"
        f"print(json.dumps({{'python': platform.python_version(), **{{n: v(n) for n in {VERSIONS!r} if v(n)}}}}))"
    )
    output = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(output)
    return found
