"""How fast each engine of medseg runs a trained network, and whether at equal labels.

    pip install -e '.[openvino]' onnx onnxscript onnxruntime    # the last three: for `--onnxruntime` alone
    python tests/benchmarks/engines.py RUN:DATASET... -o tests/benchmarks/results/engines.json

Every engine gets the same windows, cut from the middle of the first cases of DATASET. `seconds` by the clock and
`cpu_seconds` of processor time (all threads) for one batch are each the least of all rounds, in which engines take
turns; by the clock that needs an idle machine. `faster` compares `seconds`, and `faster_cpu` processor time, with
engine torch, and so are labels. An engine that medseg gives up is listed with its `warnings` and the times of torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import processor

from medseg.datasets import read_dataset
from medseg.device import choose_precision
from medseg.engines import prepare_network
from medseg.model import Model, read_model
from medseg.patches import cut
from medseg.preprocess import prepare
from medseg.versions import versions

CPU = torch.device("cpu")
Logits = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    """Measure all engines on every model and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="RUN:DATASET")
    parser.add_argument("--engines", nargs="+", default=["torch", "compile", "openvino"])
    parser.add_argument("--onnxruntime", action="store_true", help="ONNX Runtime in float32 as well")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="windows in a batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # engine torch first: the others are compared with it
    names = ["torch", *(n for n in arguments.engines if n != "torch"), *["onnxruntime"][: arguments.onnxruntime]]
    precision = choose_precision("auto", CPU)
    rows = []
    for pair in arguments.models:
        run, _, dataset = pair.rpartition(":")
        model = read_model(Path(run))
        for batch in arguments.batches:
            windows = real_windows(model, Path(dataset), batch)
            about = {"dataset": Path(dataset).name, "network": model.config.network.name}
            rows += [about | row for row in measure(model, windows, names, precision, arguments.rounds)]
            for row in rows[-len(names) :]:
                print(row, flush=True)
    result = {
        "rows": rows,
        "precision": precision,
        "machine": {
            "threads": arguments.threads,
            "cores": os.cpu_count(),
            "processor": processor(),
            "load_at_the_end": os.getloadavg()[0],
        },
        "versions": versions("medseg", "torch", "openvino", "onnxruntime"),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    model: Model, windows: torch.Tensor, names: Sequence[str], precision: str, rounds: int
) -> list[dict[str, Any]]:
    """One row for each engine."""
    heard = _Heard()
    logger = logging.getLogger("medseg.engines")
    logger.addHandler(heard)
    engines, logits, ready, told = {}, {}, {}, {}
    for name in names:
        heard.messages = []
        start = time.perf_counter()
        engines[name] = make(name, model, windows, precision)
        # the first call compiles and is checked beside torch, the second is the engine's own
        engines[name](windows)
        ready[name] = time.perf_counter() - start
        logits[name] = engines[name](windows).float()
        told[name] = heard.messages
    logger.removeHandler(heard)
    clock, cpu = least(engines, windows, rounds)
    own = logits["torch"]
    return [
        {
            "engine": name,
            "batch": len(windows),
            "window": list(windows.shape[2:]),
            "seconds": round(clock[name], 5),
            "cpu_seconds": round(cpu[name], 5),
            "faster": round(clock["torch"] / clock[name], 2),
            "faster_cpu": round(cpu["torch"] / cpu[name], 2),
            "ready_after_seconds": round(ready[name], 1),
            "equal_labels": round(float((logits[name].argmax(1) == own.argmax(1)).double().mean()), 6),
            "logits_difference": round(float((logits[name] - own).norm() / own.norm()), 6),
            "warnings": told[name],
        }
        for name in names
    ]


def make(name: str, model: Model, windows: torch.Tensor, precision: str) -> Logits:
    """An engine, windows → logits."""
    network = copy.deepcopy(model.network)
    if name == "onnxruntime":
        return onnx_runtime(network.eval(), windows)
    return prepare_network(name, network, data=model.config.data, device=CPU, precision=precision)  # type: ignore[arg-type]


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


def onnx_runtime(network: torch.nn.Module, windows: torch.Tensor) -> Logits:
    """ONNX Runtime in float32, its only format that is fast on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(network, (windows,), path, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda seen: torch.from_numpy(session.run(None, {name: seen.numpy()})[0])


def least(engines: dict[str, Logits], windows: torch.Tensor, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """The least time of one batch for each engine: by the clock, and of the processor."""
    clock: dict[str, list[float]] = {name: [] for name in engines}
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            start, busy = time.perf_counter(), time.process_time()
            engine(windows)
            clock[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - busy)
    return {n: min(t) for n, t in clock.items()}, {n: min(t) for n, t in cpu.items()}


class _Heard(logging.Handler):
    """Keeps what an engine warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    main()
