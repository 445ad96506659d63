"""A trained network as one ONNX file, with all that its user must know in the metadata."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medseg.export.agreement import Checked, Free, Logits, free_axes, make_and_check, shapes_to_try
from medseg.export.facts import facts
from medseg.model import Model
from medseg.optional import require
from medseg.progress import Progress
from medseg.writers import atomic_path

EXTRA = "onnx"
IMAGE, LOGITS, FACTS = "image", "logits", "medseg"
"""Names of the input, of the output, and of the property of the file that holds `facts` as JSON."""


def write_onnx(model: Model, output: Path, progress: Progress) -> Checked[bytes]:
    """Write `image` (B, C, *S) float32, preprocessed → `logits` (B, K, *S), once ONNX Runtime agrees with PyTorch.

    Batch and sizes are free where the network allows it, else the batch alone, else nothing. Raises `ConfigError` where
    the extra is missing, `ModelError` where no such file agrees.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, EXTRA)

    def make(free: Free) -> tuple[bytes, Logits]:
        content = _converted(model, free)
        return content, _in_onnx_runtime(content)

    checked = make_and_check(model, make, name=output.name, progress=progress)
    with atomic_path(output) as temporary:
        temporary.write_bytes(checked.made)
    return checked


def _converted(model: Model, free: Free) -> bytes:
    onnx = require("onnx", EXTRA)
    axes = free_axes(free, model.config.data.spatial_dims)
    # one image alone would be taken for a constant
    example = torch.zeros(2 if axes else 1, *shapes_to_try(model, free)[0][1:])
    with _quiet():
        program = torch.onnx.export(
            model.network,
            (example,),
            input_names=[IMAGE],
            output_names=[LOGITS],
            dynamic_shapes=(axes,) if axes else None,
            dynamo=True,
            verbose=False,
        )
    file: Any = program.model_proto  # type: ignore[union-attr]
    _forget_paths(file.graph)
    onnx.helper.set_model_props(file, {FACTS: json.dumps(facts(model, free), ensure_ascii=False)})
    onnx.checker.check_model(file)
    content: bytes = file.SerializeToString()
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """The converter warns of its own parts, and of packages that it does without."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _forget_paths(graph: Any) -> None:
    """Leave out the lines of code that each node comes from: they tell the folders of this machine."""
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def _in_onnx_runtime(content: bytes) -> Logits:
    runtime = require("onnxruntime", EXTRA)
    # on Windows it would report its use to its makers
    runtime.disable_telemetry_events()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run([LOGITS], {IMAGE: image.numpy()})[0])
