"""Whether another engine runs a trained network on the CPU faster than medseg does, and at which labels.

    pip install onnx onnxscript onnxruntime openvino    # what is missing is left out
    python tests/benchmarks/engines.py RUN:DATASET... -o tests/benchmarks/results/engines.json

Every engine gets the same batches of windows, cut from the middle of the first cases of DATASET. `cpu_seconds`: the
processor time of one batch on one thread, the least of all rounds, in which engines take turns; other work on the
machine hardly counts in it. `seconds`: the least by the clock on all threads; that one needs an idle machine.
`faster`: by how much an engine beats `medseg` in processor time. Labels are compared with those of `medseg`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from medseg.datasets import read_dataset
from medseg.device import choose_precision, memory_format
from medseg.infer import make_scorer
from medseg.model import Model, read_model
from medseg.patches import cut
from medseg.preprocess import prepare
from medseg.versions import versions

WORTHWHILE = 1.3
CPU = torch.device("cpu")
Logits = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    """Measure all engines on every model and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="RUN:DATASET")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="windows in a batch")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well, which takes minutes")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    measured = {}
    for pair in arguments.models:
        run, _, dataset = pair.rpartition(":")
        model = read_model(Path(run))
        name = f"{Path(dataset).name} {model.config.network.name}"
        measured[name] = measure(
            model, Path(dataset), arguments.batches, arguments.rounds, threads, compiled=arguments.compile
        )
    result = {
        "models": measured,
        "machine": {"threads": threads, "cores": os.cpu_count(), "processor": processor()},
        "versions": versions("medseg", "torch", "onnxruntime", "openvino"),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    model: Model, dataset: Path, batches: Sequence[int], rounds: int, threads: int, *, compiled: bool
) -> list[dict[str, Any]]:
    """One row for each engine and batch size."""
    rows = []
    for batch in batches:
        windows = real_windows(model, dataset, batch)
        torch.set_num_threads(1)
        engines, ready = make_engines(model, windows, 1, compiled=compiled)
        with torch.inference_mode():
            scores = {name: engine(windows) for name, engine in engines.items()}
            cpu = least(engines, windows, rounds, time.process_time)
            torch.set_num_threads(threads)
            if threads > 1:
                engines, _ = make_engines(model, windows, threads, compiled=compiled)
                for engine in engines.values():
                    engine(windows)
            clock = least(engines, windows, rounds, time.perf_counter)
        own = scores["medseg"]
        for name in engines:
            faster = cpu["medseg"] / cpu[name]
            equal = float((scores[name].argmax(1) == own.argmax(1)).double().mean())
            rows.append(
                {
                    "engine": name,
                    "batch": batch,
                    "window": list(windows.shape[2:]),
                    "cpu_seconds": round(cpu[name], 4),
                    "seconds": round(clock[name], 4),
                    "faster": round(faster, 2),
                    "ready_after_seconds": round(ready[name], 1),
                    "largest_difference": round(float((scores[name] - own).abs().max()), 5),
                    "equal_labels": round(equal, 6),
                    "worthwhile": faster >= WORTHWHILE,
                }
            )
    return rows


def real_windows(model: Model, dataset: Path, count: int) -> torch.Tensor:
    """Windows (count, C, *patch) from the middle of the first cases."""
    config = model.config
    windows = []
    for case in read_dataset(dataset).cases[:count]:
        image = prepare(case, config.preprocess, config.data, with_label=False).image
        patch = config.windows.patch_size
        corner = [(size - side) // 2 for size, side in zip(image.shape[1:], patch)]
        windows.append(torch.as_tensor(cut(image, corner, patch)))
    return torch.stack(windows).contiguous()


def make_engines(
    model: Model, windows: torch.Tensor, threads: int, *, compiled: bool
) -> tuple[dict[str, Logits], dict[str, float]]:
    """Engines by name, windows → probabilities, and the seconds that each took to be ready, its first call included."""
    network, data = model.network.eval(), model.config.data
    memory = memory_format(data.spatial_dims)
    precision = choose_precision("auto", CPU)
    half = copy.deepcopy(network).to(torch.bfloat16).to(memory_format=memory)
    made: dict[str, Callable[[], Logits]] = {
        "medseg": lambda: make_scorer(network, data, CPU, precision),
        "medseg float32": lambda: make_scorer(network, data, CPU, "32"),
        "weights in bf16": lambda: _scored(half, torch.bfloat16, memory),
        "torch.jit frozen, weights in bf16": lambda: _scored(_frozen(half, windows, memory), torch.bfloat16, memory),
    }
    if compiled:
        made |= {
            "torch.compile": lambda: make_scorer(torch.compile(copy.deepcopy(network)), data, CPU, precision),
            "torch.compile, weights in bf16": lambda: _scored(torch.compile(half), torch.bfloat16, memory),
        }
    engines, ready = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        made |= _onnx_engines(copy.deepcopy(network).float(), windows, threads, Path(folder))
        for name, make in made.items():
            start = time.perf_counter()
            engines[name] = make()
            with torch.inference_mode():
                engines[name](windows)
            ready[name] = time.perf_counter() - start
    return engines, ready


def _scored(network: Any, dtype: torch.dtype, memory: torch.memory_format) -> Logits:
    return lambda windows: network(windows.to(dtype).contiguous(memory_format=memory)).float().softmax(dim=1)


def _frozen(network: torch.nn.Module, windows: torch.Tensor, memory: torch.memory_format) -> Any:
    example = windows.to(torch.bfloat16).contiguous(memory_format=memory)
    with torch.no_grad():
        traced = torch.jit.trace(network, example, check_trace=False)
        return torch.jit.optimize_for_inference(torch.jit.freeze(traced))


def _onnx_engines(
    network: torch.nn.Module, windows: torch.Tensor, threads: int, folder: Path
) -> dict[str, Callable[[], Logits]]:
    made: dict[str, Callable[[], Logits]] = {}
    wanted = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
    if not wanted or not importlib.util.find_spec("onnxscript"):
        return made
    path = folder / "network.onnx"
    network = network.to(memory_format=torch.contiguous_format)
    torch.onnx.export(network, (windows,), path, dynamo=True, external_data=False, verbose=False)
    if "onnxruntime" in wanted:
        made["onnxruntime"] = lambda: _onnxruntime(path, threads)
    if "openvino" in wanted:
        made["openvino float32"] = lambda: _openvino(path, threads, "f32")
        made["openvino bf16"] = lambda: _openvino(path, threads, "bf16")
    return made


def _onnxruntime(path: Path, threads: int) -> Logits:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda windows: torch.from_numpy(session.run(None, {name: windows.numpy()})[0]).softmax(dim=1)


def _openvino(path: Path, threads: int, precision: str) -> Logits:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda windows: torch.from_numpy(compiled([windows.numpy()])[0]).float().softmax(dim=1)


def least(
    engines: dict[str, Logits], windows: torch.Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The least time of one batch for each engine."""
    taken: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            start = clock()
            engine(windows)
            taken[name].append(clock() - start)
    return {name: min(times) for name, times in taken.items()}


def processor() -> str:
    """What the kernel calls the processor, or the machine's type where it does not say."""
    information = Path("/proc/cpuinfo")
    lines: Sequence[str] = information.read_text().splitlines() if information.is_file() else ()
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


if __name__ == "__main__":
    main()
