"""What dilation costs: each rate that the networks use against the dense convolution of the same maps.

    python tests/benchmarks/dilated.py -o tests/benchmarks/results/dilated.json

For the convolution, the gradient of its input and the gradient of its weights, in 3D with the maps of the usual network
(10 × 14 × 10 voxels, batch 4) and on a GPU larger ones too: milliseconds by route and, as `ratio`, of torch's own way
and of the one that is chosen, both against torch's own way at rate 1. On a CPU it is the processor time of the process,
so that a busy machine shifts little; on a GPU it is the GPU's own. Ways are measured in turn, the median counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import machine
from torch import Tensor

from medseg.networks._dilated import ROUTES, Operation, Route, choose_route, convolve, maps_gradient, weight_gradient

RATES = ((1, 1, 1), (2, 2, 2), (4, 4, 4), (4, 6, 4), (5, 5, 5))
KERNEL = (3, 3, 3)
CPU_MAPS = (((4, 64, 10, 14, 10), 128), ((4, 128, 10, 14, 10), 128), ((4, 128, 10, 14, 10), 64))
GPU_MAPS = (*CPU_MAPS, ((4, 128, 32, 32, 32), 128), ((2, 256, 48, 48, 48), 256))


def main() -> None:
    """Measure every shape, rate and number format; write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape, outer in GPU_MAPS if device.type == "cuda" else CPU_MAPS:
            found += measure_shape(shape, outer, dtype, device, arguments.rounds)
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": arguments.threads,
        "measurements": found,
        "machine": machine(),
        "versions": {"torch": version("torch"), "medseg": version("medseg")},
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure_shape(
    shape: tuple[int, ...], outer: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """One entry for each operation and rate."""
    last = torch.channels_last_3d
    maps = torch.randn(shape, device=device).to(dtype, memory_format=last)
    gradient = torch.randn((shape[0], outer, *shape[2:]), device=device).to(dtype, memory_format=last)
    weight = torch.randn((outer, shape[1], *KERNEL), device=device).to(dtype, memory_format=last)
    found = []
    operations: tuple[Operation, ...] = ("forward", "maps", "weight")
    for operation in operations:
        dense = None
        for rate in RATES:
            run = runner(operation, maps, weight, gradient, rate)
            times = measure(dict.fromkeys(ROUTES[operation], run), device, rounds)
            dense = dense or times["native"]
            chosen = choose_route(operation, maps, weight, rate, run)
            found.append(
                {
                    "operation": operation,
                    "maps": list(shape),
                    "out_channels": outer,
                    "dtype": str(dtype).removeprefix("torch."),
                    "rate": list(rate),
                    "milliseconds": {route: round(t, 3) for route, t in times.items()},
                    "chosen": chosen,
                    "ratio": {"native": round(times["native"] / dense, 2), "chosen": round(times[chosen] / dense, 2)},
                }
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def runner(
    operation: Operation, maps: Tensor, weight: Tensor, gradient: Tensor, rate: tuple[int, ...]
) -> Callable[[Route], Tensor]:
    """`operation` by a route."""
    if operation == "forward":
        return lambda route: convolve(maps, weight, rate, route)
    if operation == "maps":
        return lambda route: maps_gradient(gradient, maps, weight, rate, route)
    return lambda route: weight_gradient(gradient, maps, KERNEL, rate, route)


def measure(runs: dict[Route, Callable[[Route], Tensor]], device: torch.device, rounds: int) -> dict[Route, float]:
    """Median milliseconds of each, measured in turn after one round that warms up."""
    times: dict[Route, list[float]] = {route: [] for route in runs}
    for _ in range(rounds + 1):
        for route, run in runs.items():
            began = now(device)
            run(route)
            times[route].append((now(device) - began) * 1e3)
    return {route: median(each[1:]) for route, each in times.items()}


def now(device: torch.device) -> float:
    """Seconds: of the process on a CPU, of the clock once a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
