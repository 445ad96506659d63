"""What runs a trained network: torch as it is, compiled by torch, or OpenVINO; what logits mean is told elsewhere."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medseg.config import DataConfig
from medseg.device import memory_format, to_memory_format
from medseg.errors import ConfigError
from medseg.optional import require

log = logging.getLogger(__name__)

Engine = Literal["torch", "compile", "openvino"]
# windows (B, C, *S) → logits (B, K, *S); on a GPU they may be overwritten by the next call
Run = Callable[[Tensor], Tensor]

# each shape is compiled anew, which takes minutes; OpenVINO only has to show once for each that it is right
COMPILED_SHAPES, OPENVINO_SHAPES = 2, 16
# another engine must give this share of the labels that torch gives …
EQUAL_LABELS = 0.999
# … and logits this near: root mean square of the difference by that of the logits; two ways to round to bf16 differ by
# 0.002 (measured, hippocampus)
LOGITS_ERROR = 0.02


def prepare_network(name: Engine, network: nn.Module, *, data: DataConfig, device: torch.device, precision: str) -> Run:
    """`network` on `device`, ready to give the logits (B, K, *S), float32 or bf16, of windows (B, C, *S) on `device`.

    `compile` and `openvino` run each shape of windows once beside torch. Where they fail or disagree they are given up
    with a warning, and shapes that they have no room for are left to torch: a result is never silently another one.
    Raises `ConfigError` for an unknown engine, for OpenVINO on a GPU and where OpenVINO is not installed.
    """
    if name not in _ENGINES:
        raise ConfigError(f"engine {name!r}: expected {', '.join(_ENGINES)}")
    return _ENGINES[name](network, data, device, precision)


def _plain(network: nn.Module, data: DataConfig, device: torch.device, precision: str) -> Run:
    network = to_memory_format(network.to(device), data.spatial_dims, device).eval()
    return _with_precision(network, data, device, precision)


def _compiled(network: nn.Module, data: DataConfig, device: torch.device, precision: str) -> Run:
    plain = _plain(network, data, device, precision)
    # on a GPU this records the work as CUDA graphs, so that the processor no longer launches every kernel
    mode = "reduce-overhead" if device.type == "cuda" else None
    compiled = _with_precision(torch.compile(network, mode=mode, dynamic=False), data, device, precision)
    return _Checked("compile", compiled, plain, data, COMPILED_SHAPES)


def _openvino(network: nn.Module, data: DataConfig, device: torch.device, precision: str) -> Run:
    if device.type != "cpu":
        raise ConfigError(
            f"engine openvino runs on the CPU, found device {device}; use --device cpu, or another engine"
        )
    require("openvino", "openvino")
    plain = _plain(network, data, device, precision)
    return _Checked("openvino", _OpenVino(network, precision), plain, data, OPENVINO_SHAPES)


_ENGINES = {"torch": _plain, "compile": _compiled, "openvino": _openvino}


def _with_precision(network: Callable[..., Any], data: DataConfig, device: torch.device, precision: str) -> Run:
    memory = memory_format(data.spatial_dims, device)

    @torch.inference_mode()
    def run(windows: Tensor) -> Tensor:
        windows = windows.contiguous(memory_format=memory)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits: Tensor = network(windows)
        return logits

    return run


class _Checked:
    """Another engine for the shapes for which it has given what torch gives, torch for all others."""

    def __init__(self, name: str, other: Run, plain: Run, data: DataConfig, most_shapes: int) -> None:
        self._name = name
        self._other = other
        self._plain = plain
        self._regions = data.is_regions
        self._room = most_shapes
        self._trusted: set[tuple[int, ...]] = set()

    def __call__(self, windows: Tensor) -> Tensor:
        shape = tuple(windows.shape)
        if shape in self._trusted:
            return self._other(windows)
        logits = self._plain(windows)
        if self._room:
            objection = self._objection(windows, logits)
            if objection:
                log.warning("engine %s: %s; torch runs the network instead", self._name, objection)
                self._room = 0
            else:
                self._trusted.add(shape)
                self._room -= 1
                log.debug("engine %s agrees with torch on %s", self._name, shape)
                if not self._room:
                    log.info("engine %s: no room for further shapes; torch runs those", self._name)
        return logits

    def _objection(self, windows: Tensor, logits: Tensor) -> str:
        """Why the engine cannot be used for windows of this shape; empty where it can."""
        try:
            found = self._other(windows)
        except Exception as error:  # noqa: BLE001
            # compilers fail in any way there is, and torch has just shown that the windows are not to blame
            return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        if found.shape != logits.shape:
            return f"logits of shape {tuple(found.shape)}, expected {tuple(logits.shape)}"
        equal = float((self._labels(found) == self._labels(logits)).double().mean())
        difference = float((found.double() - logits.double()).norm() / logits.double().norm().clamp_min(1e-12))
        # written so that NaN objects too
        if equal >= EQUAL_LABELS and difference <= LOGITS_ERROR:
            return ""
        return f"{100 * equal:.2f} % of the labels are those of torch, its logits differ by {100 * difference:.1f} %"

    def _labels(self, logits: Tensor) -> Tensor:
        return logits > 0 if self._regions else logits.argmax(dim=1)


class _OpenVino:
    """A network in OpenVINO, made of the first windows it meets; for any number and size of windows."""

    def __init__(self, network: nn.Module, precision: str) -> None:
        self._network = network
        self._precision = precision
        self._ready: list[Callable[[Any], Any]] = []

    def __call__(self, windows: Tensor) -> Tensor:
        if not self._ready:
            self._ready.append(_to_openvino(self._network, windows, self._precision))
        return torch.from_numpy(self._ready[0]([windows.contiguous().numpy()])[0])


def _to_openvino(network: nn.Module, windows: Tensor, precision: str) -> Callable[[Any], Any]:
    """`network` traced with `windows` and compiled by OpenVINO with as many threads as torch has.

    By its parts, not with `openvino.convert_model`: that reports its use to the makers of OpenVINO without asking.
    """
    openvino = require("openvino", "openvino")
    decoder = require("openvino.frontend.pytorch.ts_decoder", "openvino")
    # a trace cannot hold tensors of inference mode
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        # that a trace may not hold for other sizes: each is tried out beside torch
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        graph = decoder.TorchScriptPythonDecoder(network, example_input=windows.clone())
    frontend = openvino.frontend.FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(graph))
    model.reshape([-1, windows.shape[1], *(-1 for _ in windows.shape[2:])])
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled: Callable[[Any], Any] = openvino.Core().compile_model(model, "CPU", settings)
    return compiled
