"""Dice, HD95, NSD and ASSD by medseg, DeepMind's surface-distance and MONAI: seconds, memory and agreement.

    pip install --no-deps --target OTHERS surface-distance-based-measures
    MEDSEG_DATA=../shared/data python tests/benchmarks/evaluation.py --others OTHERS \
        -o tests/benchmarks/results/evaluation.json

Every tool gets the same label maps, each case in a process of its own on one thread; rounds take turns, the least
seconds and the most memory stand. Seconds are those of measuring alone; the memory is the peak of the whole process,
the maps and the tool's own libraries included. surface-distance 0.1 uses names that NumPy 2 no longer has: they are
given back to it in memory, nothing of it is changed. It and MONAI are called label by label, as their documentation
does, each on what it crops for itself; with all labels one-hot at once MONAI needs several times the memory.

Agreement is the largest difference over all labels: surfel surfaces with surface-distance, voxel surfaces with MONAI.
Cases of 512 × 512 × 200 voxels of 0.8 × 0.8 × 1.5 mm: ten organs (ellipsoids) moved by two voxels; one organ and its
prediction in opposite corners; one organ with 0.5 % of all other voxels predicted besides; one organ within a shell of
two voxels; one organ within one of eight times its volume. Real maps: the torso of ct_totalseg with values up to 117
(61 occur), and all hippocampi, each moved by a voxel. `report` is the command `medseg evaluate` on the hippocampi, from
files to report.html, on all cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SHAPE, SPACING_MM = (512, 512, 200), (0.8, 0.8, 1.5)
MEASURES = ("dice", "hd95_mm", "nsd", "assd_mm")
TOLERANCE_MM = 1.0
# surface kind of medseg that is defined as the other tool's
PEERS = {"surface-distance": "medseg surfel", "monai": "medseg voxel"}
TOOLS = ("medseg surfel", "medseg voxel", "surface-distance", "monai")
Maps = tuple[np.ndarray, np.ndarray]
Values = tuple[float, float, float, float]


def main() -> None:
    """Measure all tools on all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=Path, help="folder where surface-distance is; left out: without it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some of the cases")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--limit-s", type=float, default=60, help="a process that takes longer is stopped, and said so")
    parser.add_argument("--without-report", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "FOLDER"), help="what the processes of their own are told")
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_one(arguments.one[0], Path(arguments.one[1]))))
        return
    if arguments.output is None:
        parser.error("-o is needed")
    tools = [t for t in arguments.tools if t != "surface-distance" or arguments.others]
    result: dict[str, Any] = {"cases": {}}
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.only:
            result["cases"][name] = measure_case(name, Path(work) / name, tools, arguments)
        if not arguments.without_report:
            result["report"] = report(Path(work) / "report", arguments.rounds)
    result |= {
        "measures": MEASURES,
        "nsd_tolerance_mm": TOLERANCE_MM,
        "rounds": arguments.rounds,
        "threads": 1,
        "limit_s": arguments.limit_s,
        "surface_distance_needs": "np.Inf and np.NaN, which NumPy 2 dropped: given back to it in memory",
        "machine": machine(),
        "versions": versions(arguments.others),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure_case(name: str, folder: Path, tools: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of each tool on one case, and how far each is from medseg."""
    folder.mkdir()
    count = 0
    spacing, values, pairs = CASES[name]()
    for prediction, reference in pairs:
        np.save(folder / f"{count}_prediction.npy", prediction)
        np.save(folder / f"{count}_reference.npy", reference)
        count += 1
    (folder / "case.json").write_text(json.dumps({"spacing_mm": spacing, "values": values, "pairs": count}))
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    stopped: set[str] = set()
    for _ in range(arguments.rounds):
        for tool in tools:
            if tool in stopped:
                continue
            run = in_own_process(tool, folder, arguments.others, arguments.limit_s)
            if run is None:
                stopped.add(tool)
            else:
                runs[tool].append(run)
    for file in folder.iterdir():
        file.unlink()
    rows: dict[str, Any] = {"pairs": count, "labels": len(values)}
    for tool, all_ in runs.items():
        if tool in stopped:
            rows[tool] = {"stopped_after_seconds": arguments.limit_s}
            continue
        rows[tool] = {key: min(run[key] for run in all_) for key in ("seconds", "cpu_seconds")}
        rows[tool]["peak_rss_mb"] = max(run["peak_rss_mb"] for run in all_)
        peer = PEERS.get(tool)
        if runs.get(peer):
            rows[tool]["difference"] = differences(all_[0]["values"], runs[peer][0]["values"])
            for key in ("seconds", "cpu_seconds"):
                rows[tool][f"times_medsegs_{key}"] = round(rows[tool][key] / rows[peer][key], 2)
    print(json.dumps({name: rows}, indent=1), flush=True)
    return rows


def in_own_process(tool: str, folder: Path, others: Path | None, limit_s: float) -> dict[str, Any] | None:
    """What `measure_one` gives in a fresh process on one thread; None where it takes longer than `limit_s`."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    paths = os.pathsep.join(str(p) for p in (others, os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, __file__, "--one", tool, str(folder)]
    environment = os.environ | one_thread | {"PYTHONPATH": paths}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_one(tool: str, folder: Path) -> dict[str, Any]:
    """Seconds, peak memory and the values (pairs × labels × measures) of one tool on the maps in `folder`."""
    case = json.loads((folder / "case.json").read_text())
    measure = READY[tool]()
    wall, cpu, found = 0.0, 0.0, []
    for n in range(case["pairs"]):
        maps = np.load(folder / f"{n}_prediction.npy"), np.load(folder / f"{n}_reference.npy")
        start = time.perf_counter(), time.process_time()
        found.append(measure(maps, case["values"], case["spacing_mm"]))
        wall, cpu = wall + time.perf_counter() - start[0], cpu + time.process_time() - start[1]
    return {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "peak_rss_mb": peak_rss_mb(), "values": found}


def peak_rss_mb() -> float:
    """The most memory this process has held; unlike `ru_maxrss` without that of the process it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024, 1)


def differences(one: list[list[Values]], other: list[list[Values]]) -> dict[str, Any]:
    """Largest difference of each measure where both are finite, and of how many labels."""
    pairs = [(a, b) for case in zip(one, other) for a, b in zip(*case)]
    both = [(a, b) for a, b in pairs if all(map(math.isfinite, (*a, *b)))]
    largest = {name: max((abs(a[n] - b[n]) for a, b in both), default=None) for n, name in enumerate(MEASURES)}
    return {"labels_compared": len(both), **largest}


# ---- tools; each is made ready first, so that its imports cost no seconds


def ready_medseg(surface: str) -> Callable[[Maps, list[int], Sequence[float]], list[Values]]:
    """medseg's measures, all labels of a pair in one call."""
    from medseg import metrics

    def measure(maps: Maps, values: list[int], spacing_mm: Sequence[float]) -> list[Values]:
        rows = metrics.measure(
            *maps, values, spacing_mm=spacing_mm, surface=surface, nsd_tolerance_mm=TOLERANCE_MM  # type: ignore[arg-type]
        )  # fmt: skip
        return [tuple(float(getattr(rows[v], name)) for name in MEASURES) for v in values]  # type: ignore[misc]

    return measure


def ready_surface_distance() -> Callable[[Maps, list[int], Sequence[float]], list[Values]]:
    """DeepMind's, label by label; ASSD is the area-weighted mean over both of the surfaces it gives."""
    from scipy import ndimage

    warnings.simplefilter("ignore", DeprecationWarning)
    for old, new in (("Inf", np.inf), ("NaN", np.nan)):
        if old not in vars(np):
            setattr(np, old, new)
    for old in ("filters", "morphology"):
        if not hasattr(ndimage, old):
            setattr(ndimage, old, ndimage)
    sd: Any = import_module("surface_distance")

    def measure(maps: Maps, values: list[int], spacing_mm: Sequence[float]) -> list[Values]:
        found = []
        for value in values:
            prediction, reference = (m == value for m in maps)
            if not prediction.any() and not reference.any():
                found.append((math.nan,) * 4)
                continue
            d = sd.compute_surface_distances(reference, prediction, spacing_mm)
            areas = d["surfel_areas_gt"], d["surfel_areas_pred"]
            means = sd.compute_average_surface_distance(d)
            found.append(
                (
                    float(sd.compute_dice_coefficient(reference, prediction)),
                    float(sd.compute_robust_hausdorff(d, 95)),
                    float(sd.compute_surface_dice_at_tolerance(d, TOLERANCE_MM)),
                    float(sum(m * a.sum() for m, a in zip(means, areas)) / sum(a.sum() for a in areas)),
                )
            )
        return found

    return measure


def ready_monai() -> Callable[[Maps, list[int], Sequence[float]], list[Values]]:
    """MONAI's four functions, label by label."""
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    warnings.simplefilter("ignore")

    def measure(maps: Maps, values: list[int], spacing_mm: Sequence[float]) -> list[Values]:
        found = []
        for value in values:
            one, other = (torch.from_numpy(m == value)[None, None] for m in maps)
            if not one.any() and not other.any():
                found.append((math.nan,) * 4)
                continue
            how: dict[str, Any] = {"include_background": True, "spacing": tuple(spacing_mm)}
            found.append(
                (
                    float(compute_dice(one, other)),
                    float(compute_hausdorff_distance(one, other, percentile=95, **how)),
                    float(compute_surface_dice(one, other, [TOLERANCE_MM], **how)),
                    float(compute_average_surface_distance(one, other, symmetric=True, **how)),
                )
            )
        return found

    return measure


READY: dict[str, Callable[[], Callable[[Maps, list[int], Sequence[float]], list[Values]]]] = {
    "medseg surfel": lambda: ready_medseg("surfel"),
    "medseg voxel": lambda: ready_medseg("voxel"),
    "surface-distance": ready_surface_distance,
    "monai": ready_monai,
}

# ---- cases: spacing in mm, values, pairs of prediction and reference

Case = tuple[Sequence[float], list[int], Iterator[Maps]]


def ten_organs() -> Case:
    """Ellipsoids one over the other, the prediction moved by two voxels."""
    generator = np.random.default_rng(0)
    reference = np.zeros(SHAPE, np.uint8)
    for label in range(1, 11):
        centre, radii = generator.uniform((90, 90, 40), (420, 420, 160)), generator.uniform((20, 20, 10), (80, 80, 35))
        reference[ellipsoid(centre, radii)] = label
    return SPACING_MM, list(range(1, 11)), iter([(np.roll(reference, 2, 0), reference)])


def far_apart() -> Case:
    """An organ and its prediction in opposite corners."""
    return one_label(ellipsoid((130, 130, 60), (90, 90, 50)), ellipsoid((380, 380, 140), (90, 90, 50)))


def salt() -> Case:
    """An organ, predicted two voxels off and with 0.5 % of all voxels besides."""
    reference = ellipsoid((256, 256, 100), (90, 90, 50))
    noise = np.random.default_rng(0).random(SHAPE, dtype=np.float32) < 0.005
    return one_label(np.roll(reference, 2, 0) | noise, reference)


def within_a_shell() -> Case:
    """An organ, predicted as a shell of two voxels far around it."""
    shell = ellipsoid((256, 256, 100), (240, 240, 95)) & ~ellipsoid((256, 256, 100), (238, 238, 93))
    return one_label(shell, ellipsoid((256, 256, 100), (120, 120, 48)))


def within_another() -> Case:
    """An organ, predicted twice as large along each axis."""
    return one_label(ellipsoid((256, 256, 100), (240, 240, 95)), ellipsoid((256, 256, 100), (120, 120, 48)))


def torso() -> Case:
    """The torso of ct_totalseg, the prediction moved by a voxel."""
    import nibabel as nib

    file = nib.load(data() / "ct_totalseg" / "labelsTr" / "ct_full.nii.gz")
    reference = np.asanyarray(file.dataobj)
    spacing = [float(s) for s in file.header.get_zooms()]
    return spacing, list(range(1, 118)), iter([(np.roll(reference, 1, 0), reference)])


def hippocampi() -> Case:
    """Every reference of the data set hippocampus, each prediction moved by a voxel."""
    import nibabel as nib

    paths = sorted((data() / "hippocampus" / "labelsTr").glob("*.nii.gz"))
    maps = (np.asanyarray(nib.load(path).dataobj).astype(np.uint8) for path in paths)
    return [1.0, 1.0, 1.0], [1, 2], ((np.roll(m, 1, 0), m) for m in maps)


CASES: dict[str, Callable[[], Case]] = {
    "ten organs": ten_organs,
    "far apart": far_apart,
    "salt": salt,
    "within a shell": within_a_shell,
    "within another": within_another,
    "torso, 117 labels": torso,
    "hippocampi": hippocampi,
}


def one_label(prediction: np.ndarray, reference: np.ndarray) -> Case:
    """A case of one label from two masks."""
    return SPACING_MM, [1], iter([(prediction.astype(np.uint8), reference.astype(np.uint8))])


def ellipsoid(centre: Iterable[float], radii: Iterable[float]) -> np.ndarray:
    """Where an ellipsoid lies in `SHAPE`; `centre` and `radii` in voxels."""
    axes = np.ogrid[tuple(slice(n) for n in SHAPE)]
    return np.asarray(sum(((x - m) / r) ** 2 for x, m, r in zip(axes, centre, radii)) <= 1)


def data() -> Path:
    """Where the real data sets are."""
    return Path(os.environ.get("MEDSEG_DATA", DATA))


def report(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of `medseg evaluate` on all hippocampi, from files to the page, with everything it imports."""
    import nibabel as nib

    references = data() / "hippocampus" / "labelsTr"
    (folder / "predictions").mkdir(parents=True)
    paths = sorted(references.glob("*.nii.gz"))
    for path in paths:
        file = nib.load(path)
        moved = np.roll(np.asanyarray(file.dataobj).astype(np.uint8), 1, 0)
        nib.save(nib.Nifti1Image(moved, file.affine, file.header), folder / "predictions" / path.name)
    seconds = []
    for n in range(rounds):
        out = folder / f"report{n}"
        command = [sys.executable, "-m", "medseg", "evaluate", str(folder / "predictions"), str(references)]
        start = time.perf_counter()
        subprocess.run([*command, "-o", str(out)], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    page = out / "report.html"
    return {"pairs": len(paths), "seconds": round(min(seconds), 2), "page_mb": round(page.stat().st_size / 1e6, 2)}


def versions(others: Path | None) -> dict[str, str]:
    """Versions of every tool and of what they stand on."""
    from importlib.metadata import distributions, version

    found = {name: version(name) for name in ("medseg", "numpy", "scipy", "torch", "monai")}
    for one in distributions(path=[str(others)]) if others else ():
        found[one.metadata["Name"]] = one.version
    return found


if __name__ == "__main__":
    main()
