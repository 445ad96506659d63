"""What medseg's loss and MONAI's cost, forward and backward: seconds, and memory at the peak beyond the logits.

    python tests/benchmarks/losses.py -o tests/benchmarks/results/losses.json

Both get the same logits, as a network under autocast gives them (bfloat16, and float32), and the same labels, and give
the same loss. MONAI's is its `DiceCELoss(to_onehot_y=True, softmax=True)` with the background left out of Dice, on
`logits.float()`, which it needs. Every figure comes from a process of its own: memory is the kernel's high-water mark
less what the process held before the loss, the gradient of the logits included; seconds are the least of `--rounds`
after one to warm up, in which the two take turns to be started.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import machine
from monai.losses.dice import DiceCELoss

from medseg.config import DataConfig, LossConfig
from medseg.device import hold_memory
from medseg.losses import loss
from medseg.versions import versions

WAYS = ("medseg", "monai")
# labels beside the background, batch, patch
SIZES = {"117 labels": (117, 2, (96, 96, 96)), "2 labels": (2, 4, (40, 56, 40))}


def main() -> None:
    """Measure every way, size and number format in a process of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SIZE", "DTYPE"), help="measure this alone and print it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    rows = []
    for size, (labels, batch, patch) in SIZES.items():
        for dtype in ("bfloat16", "float32"):
            about = {"labels": labels, "batch": batch, "patch": patch, "logits": dtype}
            found = [one(way, size, dtype, arguments.threads) for _ in range(arguments.rounds) for way in WAYS]
            for way in WAYS:
                same = [row for row in found if row["way"] == way]
                rows.append(about | {key: min(row[key] for row in same) for key in same[0]})
                print(rows[-1], flush=True)
    result = {
        "rows": rows,
        "machine": machine() | {"threads": arguments.threads, "load_at_the_end": os.getloadavg()[0]},
        "versions": versions("medseg", "torch", "monai"),
        "date": date.today().isoformat(),
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def one(way: str, size: str, dtype: str, threads: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--one", way, size, dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(way: str, size: str, dtype: str) -> dict[str, Any]:
    """Seconds forward and backward, bytes at the peak, and the loss."""
    labels, batch, patch = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(batch, labels + 1, *patch, dtype=getattr(torch, dtype))
    # label by label: noise in float32 would itself raise the high-water mark
    for channel in range(labels + 1):
        logits[:, channel] = torch.randn(batch, *patch, generator=generator)
    label = torch.randint(0, labels + 1, (batch, *patch), generator=generator, dtype=torch.uint8)
    logits.requires_grad_()
    function = FUNCTIONS[way](labels)
    # memory first, of one pass with nothing freed before it
    before = peak_bytes()
    function(logits, label).backward()
    memory = peak_bytes() - before
    hold_memory()
    seconds = []
    for _ in range(3):
        logits.grad = None
        start = time.perf_counter(), time.process_time()
        value = function(logits, label)
        value.backward()
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    best = min(seconds)
    return {
        "way": way,
        "loss": float(value.detach()),
        "seconds": round(best[0], 4),
        "cpu_seconds": round(min(s[1] for s in seconds), 4),
        "peak_mib": round(memory / 2**20, 1),
        "gradient_mib": round(logits.nbytes / 2**20, 1),
    }


def peak_bytes() -> int:
    """The most memory that this process ever had (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(labels: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """medseg's loss as training calls it."""
    data = DataConfig(labels={f"label {n}": n for n in range(1, labels + 1)})
    return lambda logits, label: loss(LossConfig(), data, logits, label)


def monai(_: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """MONAI's loss with the same definition."""
    function = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )
    return lambda logits, label: function(logits.float(), label[:, None])


FUNCTIONS = {"medseg": ours, "monai": monai}


if __name__ == "__main__":
    main()
