"""How many augmented training patches a processor makes a second: medseg beside MONAI, with the same changes.

    python tests/benchmarks/augmentation.py DATASET -c configs/hippocampus3d.yaml \\
        -o tests/benchmarks/results/augmentation.json

Two kinds of patches: those of DATASET with the configuration's, from its first cases, and 96 × 96 × 96 out of noise of
200 × 200 × 160 voxels, as large as an abdomen at 2 mm. Cases are in memory. MONAI runs the dictionary transforms that
its tutorials use, one after the other, with the probabilities and ranges of the configuration; its places of the
foreground are found beforehand (FgBgToIndicesd). Each way has one thread; they take turns batch by batch. `seconds` by
the clock and `cpu_seconds` of processor time are means for one sample; the clock needs an idle machine.

`outside` is the share of voxels of the large patches in which a case that is 1 everywhere is not: medseg reads what
lies around a patch when it turns it, MONAI turns what was cut out. `locations_cpu_seconds` is what finding the places
of 20 labels in 512 × 512 × 300 voxels takes, once for each case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from monai import transforms as mt
from monai.data.utils import list_data_collate

from medseg.config import AugmentConfig, read_config
from medseg.datasets import read_dataset
from medseg.grid import Grid
from medseg.patches import PatchSampler, foreground_locations
from medseg.preprocess import Prepared, prepare
from medseg.versions import versions

FOREGROUND = 1 / 3
CT_SHAPE, CT_PATCH = (200, 200, 160), (96, 96, 96)
Batches = Callable[[], torch.Tensor]


def main() -> None:
    """Measure both kinds of patches and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-c", "--config", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60, help="for each kind of patches")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = read_config(arguments.config)
    cases = read_dataset(arguments.dataset).cases
    small = [prepare(c, config.preprocess, config.data, with_label=True) for c in islice(cases, arguments.cases)]
    large = [noise(f"noise{n}", n) for n in range(2)]
    augment, patch = config.augment, config.windows.patch_size
    result = {
        "rows": [
            *measure(arguments.dataset.name, small, augment, patch, config.train.batch_size, arguments.seconds),
            *measure("noise like CT", large, augment, CT_PATCH, 2, arguments.seconds),
        ],
        "outside": outside(augment),
        "locations_cpu_seconds": round(locations(), 3),
        "augment": augment.model_dump(mode="json"),
        "threads": 1,
        "machine": machine(),
        "versions": versions("medseg", "torch", "monai"),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    name: str, cases: Sequence[Prepared], augment: AugmentConfig, patch: Sequence[int], batch: int, seconds: float
) -> list[dict[str, Any]]:
    """One row a way: means over as many batches as fit into `seconds`, taken in turns."""
    ways = {"medseg": ours(cases, augment, patch, batch), "monai": monais(cases, augment, patch, batch)}
    spent = {way: np.zeros(2) for way in ways}
    for make in ways.values():
        make()
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < 2 or time.perf_counter() < end:
        rounds += 1
        for way, make in ways.items():
            start = time.perf_counter(), time.process_time()
            make()
            spent[way] += (time.perf_counter() - start[0], time.process_time() - start[1])
    rows = []
    monai_clock, monai_processor = spent["monai"].tolist()
    for way, (clock, processor) in ((way, total.tolist()) for way, total in spent.items()):
        rows.append(
            {
                "patches": name,
                "patch_size": list(patch),
                "batch": batch,
                "way": way,
                "samples": rounds * batch,
                "seconds": round(clock / rounds / batch, 5),
                "cpu_seconds": round(processor / rounds / batch, 5),
                "samples_per_cpu_second": round(rounds * batch / processor, 1),
                "faster": round(monai_clock / clock, 2),
                "faster_cpu": round(monai_processor / processor, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def ours(cases: Sequence[Prepared], augment: AugmentConfig, patch: Sequence[int], batch: int) -> Batches:
    """Batches the way `medseg train` makes them."""
    sampler = PatchSampler(
        cases,
        patch_size=patch,
        batch_size=batch,
        foreground_fraction=FOREGROUND,
        generator=torch.Generator().manual_seed(0),
        augment=augment,
    )
    return lambda: sampler.draw().image


def monais(cases: Sequence[Prepared], augment: AugmentConfig, patch: Sequence[int], batch: int) -> Batches:
    """Batches of the chain of MONAI's transforms that does the same."""
    keys, modes = ("image", "label"), ("bilinear", "nearest")
    cached = mt.Compose([mt.SpatialPadd(keys, patch), mt.FgBgToIndicesd("label")])
    items = [cached({"image": c.image.clone(), "label": label_of(c)[None].clone()}) for c in cases]
    chain: list[Any] = [
        mt.RandCropByPosNegLabeld(
            keys,
            "label",
            patch,
            pos=FOREGROUND,
            neg=1 - FOREGROUND,
            fg_indices_key="label_fg_indices",
            bg_indices_key="label_bg_indices",
        ),
        mt.RandAffined(
            keys,
            prob=augment.p_affine,
            rotate_range=[np.deg2rad(a) for a in augment.rotation_deg],
            scale_range=[(augment.scale[0] - 1, augment.scale[1] - 1)] * len(patch),
            translate_range=[augment.shift * p for p in patch],
            mode=modes,
            padding_mode="zeros",
        ),
        *(mt.RandFlipd(keys, prob=augment.p_flip, spatial_axis=axis) for axis in augment.flip_axes),
        mt.RandGaussianSmoothd("image", *[augment.blur_voxels] * 3, prob=augment.p_blur),
        mt.RandSimulateLowResolutiond("image", prob=augment.p_low_resolution, zoom_range=augment.low_resolution),
        mt.RandScaleIntensityFixedMeand(
            "image", factors=(augment.contrast[0] - 1, augment.contrast[1] - 1), prob=augment.p_intensity
        ),
        mt.RandShiftIntensityd("image", offsets=augment.brightness, prob=augment.p_intensity),
        mt.RandAdjustContrastd("image", prob=augment.p_gamma, gamma=augment.gamma, retain_stats=True),
        mt.RandGaussianNoised("image", prob=augment.p_noise, std=augment.noise),
    ]
    change = mt.Compose(chain).set_random_state(0)
    random = np.random.default_rng(0)

    def make() -> torch.Tensor:
        chosen = random.integers(len(items), size=batch)
        collated = list_data_collate([sample for index in chosen for sample in change(items[index])])
        return torch.as_tensor(collated["image"])

    return make


def outside(augment: AugmentConfig) -> dict[str, float]:
    """The share of voxels of large patches that are not from the case, for each way."""
    still = {"p_blur": 0, "p_low_resolution": 0, "p_intensity": 0, "p_gamma": 0, "p_noise": 0}
    quiet = augment.model_copy(update=still)
    case = noise("ones", 0)
    case.image.fill_(1)
    found = {}
    for way, make in (("medseg", ours), ("monai", monais)):
        batches = make([case], quiet, CT_PATCH, 1)
        found[way] = round(float(np.mean([float((batches() < 0.5).float().mean()) for _ in range(8)])), 4)
    print(found)
    return found


def locations() -> float:
    """Seconds of a processor for the places of 20 labels, cubes of 50 voxels, in a large case."""
    shape = (512, 512, 300)
    label = torch.zeros(shape, dtype=torch.uint8)
    for value in range(1, 21):
        row, column = 90 * (value % 5), 120 * (value // 6)
        label[row : row + 50, column : column + 50, 100:150] = value
    grid = Grid(shape, np.eye(4))
    case = Prepared("large", torch.zeros(1, 1, 1, 1), label, grid, grid, torch.zeros(1, 9))
    start = time.process_time()
    foreground_locations(case)
    return time.process_time() - start


def label_of(case: Prepared) -> torch.Tensor:
    """The label of a case that was prepared with it."""
    if case.label is None:
        raise ValueError(f"{case.id} has no label")
    return case.label


def noise(name: str, seed: int) -> Prepared:
    """A case of white noise with a block of label 1 in its middle."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.zeros(CT_SHAPE, dtype=torch.uint8)
    label[tuple(slice(s // 3, s // 2) for s in CT_SHAPE)] = 1
    grid = Grid(CT_SHAPE, np.diag([2.0, 2.0, 2.0, 1.0]))
    return Prepared(name, torch.randn(1, *CT_SHAPE, generator=generator), label, grid, grid, torch.zeros(1, 9))


if __name__ == "__main__":
    main()
