"""Seconds, bytes and memory of reading and writing NIfTI: medseg, nibabel, SimpleITK, and each gzip library.

    pip install zlib-ng    # else its rows are left out
    python tests/benchmarks/files.py ct_totalseg -o tests/benchmarks/results/files.json

Files: the real torso of 122 × 101 × 112 voxels with its 61 labels, and 512 × 512 × 300 made of it by linear
interpolation (labels: the strongest after interpolation), once as it is and once with noise of 10 HU, as scanners
have. Seconds are the least of several rounds in which the ways take turns; memory is what a fresh process adds at
its peak. "in file order" is the time until the array's bytes lie as the format wants them, without compression.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK
import torch
from isal import igzip
from machine import processor
from scipy import ndimage
from torch.nn import functional

from medseg.grid import Grid
from medseg.process import peak_memory_mb
from medseg.readers import Geometry, nifti
from medseg.versions import versions
from medseg.writers import nifti as nifti_writer

SHAPE = (512, 512, 300)
NOISE_HU = 10
HEADER_BYTES = 352


def main() -> None:
    """Make the files, measure all ways and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder of the data set ct_totalseg")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(arguments.dataset, Path(folder))
        reading = {name: read_all(path, arguments.rounds) for name, path in files.items()}
        masks = {name: path for name, path in files.items() if "mask" in name}
        writing = {name: write_all(path, arguments.rounds) for name, path in masks.items()}
    result = {
        "reading": reading,
        "writing": writing,
        "machine": {"cores": os.cpu_count(), "processor": processor()},
        "versions": versions("medseg", "numpy", "nibabel", "simpleitk", "isal", "zlib-ng"),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def make_files(dataset: Path, folder: Path) -> dict[str, Path]:
    """The files by name, each alone in its folder: SimpleITK reads an `a.nii` in place of the `a.nii.gz` beside it."""
    image = np.asarray(nib.load(dataset / "imagesTr/ct_full_0000.nii.gz").dataobj)
    label = np.asarray(nib.load(dataset / "labelsTr/ct_full.nii.gz").dataobj).astype(np.uint8)
    factors = [new / old for new, old in zip(SHAPE, image.shape)]
    large = np.rint(ndimage.zoom(image.astype(np.float32), factors, order=1)).astype(np.int16)
    noise = np.random.default_rng(0).normal(0, NOISE_HU, SHAPE)
    arrays = {
        "real image": image.astype(np.int16),
        "large image": large,
        "large image with noise": (large + np.rint(noise)).astype(np.int16),
        "real mask": label,
        "large mask": enlarged(label),
    }
    paths = {}
    for name, array in arrays.items():
        paths[name] = folder / name / "a.nii.gz"
        paths[name].parent.mkdir()
        content = nib.Nifti1Image(array, np.eye(4)).to_bytes()
        paths[name].write_bytes(gzip.compress(content, 6, mtime=0))
    return paths


def enlarged(label: np.ndarray) -> np.ndarray:
    """Label map (I, J, K) on `SHAPE`: for each voxel the label that is strongest after linear interpolation."""
    source = torch.from_numpy(label)
    planes = []
    for k in range(SHAPE[2]):
        at = min(max((k + 0.5) * label.shape[2] / SHAPE[2] - 0.5, 0), label.shape[2] - 1)
        low, high = int(at), min(int(at) + 1, label.shape[2] - 1)
        here = torch.unique(source[:, :, [low, high]])[:, None, None]
        weights = (source[:, :, low] == here) * (1 - at + low) + (source[:, :, high] == here) * (at - low)
        planes.append(
            here[functional.interpolate(weights[None].float(), SHAPE[:2], mode="bilinear")[0].argmax(dim=0), 0, 0]
        )
    return np.ascontiguousarray(torch.stack(planes, dim=-1).numpy())


def read_all(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds and memory of every way to read `path`."""
    ways = readers()
    seconds = least_seconds({name: partial(way, path) for name, way in ways.items()}, rounds)
    size = int(np.prod(nib.load(path).shape)) * nib.load(path).get_data_dtype().itemsize
    rows: dict[str, Any] = {"file_mb": round(path.stat().st_size / 1e6, 2), "voxels_mb": round(size / 1e6, 1)}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        added = pool.starmap(added_memory_mb, [(name, path) for name in ways], chunksize=1)
    for name, memory in zip(ways, added):
        rows[name] = {"seconds": seconds[name], "added_memory_mb": memory}
    return rows


def readers() -> dict[str, Callable[[Path], Any]]:
    """The ways to read by name, those that are not installed left out."""
    ways: dict[str, Callable[[Path], Any]] = {
        "medseg": lambda path: nifti.read(path, spatial_dims=None, channels=None, labels=False),
        "nibabel dataobj": lambda path: np.asarray(nib.load(path).dataobj),
        "nibabel get_fdata": lambda path: nib.load(path).get_fdata(),
        "SimpleITK": lambda path: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))),
    }
    return ways | {f"{name}, bytes only": partial(unzip, library) for name, library in libraries().items()}


def libraries() -> dict[str, Any]:
    """Modules with the face of `gzip`."""
    found: dict[str, Any] = {"gzip": gzip, "isal": igzip}
    if importlib.util.find_spec("zlib_ng"):
        found["zlib-ng"] = importlib.import_module("zlib_ng.gzip_ng")
    return found


def unzip(library: Any, path: Path) -> None:
    """Read through the whole stream, as all readers must, and keep nothing."""
    with library.open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def added_memory_mb(name: str, path: Path) -> float | None:
    """Peak memory that reading adds to a process that has imported everything."""
    before = peak_memory_mb()
    readers()[name](path)
    after = peak_memory_mb()
    return None if before is None or after is None else round(after - before, 1)


def write_all(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds and bytes of medseg's writer and of every level of every library, for the mask in `path`."""
    mask = np.ascontiguousarray(np.asarray(nib.load(path).dataobj))
    content = gzip.decompress(path.read_bytes())
    out = path.with_name("out.nii.gz")
    geometry = Geometry(Grid(mask.shape, np.eye(4)))
    image = nib.Nifti1Image(mask, np.eye(4))
    tasks: dict[str, Callable[[], Any]] = {
        "medseg, not zipped": partial(nifti_writer.write, path.with_name("out.nii"), mask, geometry, {}),
        "only in file order, numpy": partial(mask.tobytes, order="F"),
        "only in file order, plane by plane": lambda: [mask[..., k].tobytes(order="F") for k in range(mask.shape[-1])],
        "medseg": partial(nifti_writer.write, out, mask, geometry, {}),
        "nibabel": partial(nib.save, image, path.with_name("nibabel.nii.gz")),
    }
    rows: dict[str, Any] = {name: {"seconds": s} for name, s in least_seconds(tasks, rounds).items()}
    rows["medseg"]["bytes"] = out.stat().st_size
    rows["nibabel"]["bytes"] = path.with_name("nibabel.nii.gz").stat().st_size
    levels = {"gzip": (1, 3, 6, 9), "isal": (0, 1, 2, 3), "zlib-ng": (1, 2, 4, 5, 6, 7, 9)}
    for name, library in libraries().items():
        packs = {f"{name} {level}": partial(library.compress, content, level) for level in levels[name]}
        for pack, seconds in least_seconds(packs, min(rounds, 3)).items():
            rows[pack] = {"seconds": seconds, "bytes": len(packs[pack]())}
    return rows


def least_seconds(tasks: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least seconds of each task over rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: round(min(all_), 4) for name, all_ in seconds.items()}


if __name__ == "__main__":
    main()
