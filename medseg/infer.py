"""From the files of one case to a label map on their own grid; folders of cases have a room of their own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor

from medseg.cases import Case
from medseg.config import Config, DataConfig
from medseg.device import (
    choose_device,
    choose_precision,
    memory_format,
    to_memory_format,
)
from medseg.errors import ConfigError, ModelError
from medseg.grid import restore
from medseg.model import Model, read_model
from medseg.postprocess import refine
from medseg.preprocess import Prepared, prepare
from medseg.windows import Flips, Scorer, predict

log = logging.getLogger(__name__)


def no_tick(share: float) -> None:
    """Nobody watches how far a case is."""


@dataclass(frozen=True)
class InferOptions:
    """How to infer. `overlap` None: the model's own; `shard` (i, n): every n-th case only, from the i-th of 1…n on.

    `window`: `auto`, what was fastest at the best Dice when training ended; `whole`, one pass over the volume; or the
    voxels of a tile by axis. `tta`: `flip`, mirrored copies; `scale`, copies of other sizes as well; `auto`, those that
    helped when training ended. `devices`: cases are dealt to these, in place of `device`. `settings` are laid over the
    model's: sections network (`output_stride`, with the weights as they are), windows and postprocess.
    """

    device: str = "auto"
    devices: tuple[str, ...] = ()
    precision: str = "auto"
    window: Literal["auto", "whole"] | tuple[int, ...] = "auto"
    tta: Literal["none", "flip", "scale", "auto"] = "none"
    overlap: float | None = None
    shard: tuple[int, int] = (1, 1)
    overwrite: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Segmented:
    """What became of a case: `labels` (I, J[, K]) uint8 or uint16 on the file's grid, and what is thought of them.

    `quality`: for each label its expected Dice with an interval, empty where the model knows none; `warnings`: what a
    reader of the mask should know, in words.
    """

    labels: np.ndarray[Any, np.dtype[Any]]
    quality: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Segmenter:
    """One model, or several as an ensemble (their probabilities are averaged), ready on a device."""

    def __init__(self, models: Sequence[Model], options: InferOptions | None = None) -> None:
        self.options = options or InferOptions()
        if self.options.tta not in ("none", "flip", "scale", "auto"):
            raise ConfigError(f"tta {self.options.tta!r}: expected none, flip, scale or auto")
        self.models = tuple(models)
        self.config = _common_config(self.models)
        self.device = choose_device(self.options.device)
        self.precision = choose_precision(self.options.precision, self.device)
        self._scorers = [make_scorer(m.network, self.config.data, self.device, self.precision) for m in self.models]
        overlap = self.options.overlap
        if overlap is not None and not 0 <= overlap < 1:
            raise ConfigError(f"--overlap {overlap}: expected a number from 0 to below 1")
        windows = self.config.windows
        self._windows = windows if overlap is None else windows.model_copy(update={"overlap": overlap})
        self._flips = Flips(self.config.augment.flip_axes if self.options.tta == "flip" else ())

    @property
    def label_names(self) -> dict[int, str]:
        """Name of every value in the label maps."""
        return self.models[0].label_names

    def segment(self, *files: str | Path) -> MetaTensor:
        """Label map (I, J[, K]) uint8 (uint16 above 255) of one case on its own grid; several files are its channels.

        Raises `DataError` or `GeometryError` naming the file.
        """
        paths = tuple(Path(f) for f in files)
        if not paths:
            raise ConfigError("no file given, expected one, or one for each channel")
        prepared = self.prepare(Case(paths[0].name, paths, None, paths[0].name))
        labels = torch.as_tensor(self.segment_prepared(prepared).labels)
        return MetaTensor(labels, affine=torch.as_tensor(prepared.source.affine_4x4))

    def prepare(self, case: Case) -> Prepared:
        """Read a case and bring it to the network's grid; may run in another thread. Raises `DataError`."""
        return prepare(case, self.config.preprocess, self.config.data, with_label=False)

    def segment_prepared(
        self, prepared: Prepared, seconds: dict[str, float] | None = None, *, tick: Callable[[float], None] = no_tick
    ) -> Segmented:
        """Label map of a prepared case on the grid of its file.

        `seconds` takes the time by stage. `tick` is called between two batches of windows with the share of the case
        that is done, 0–1; what it raises drops the case.
        """
        seconds = {} if seconds is None else seconds
        with timed(seconds, "network"):
            scores = self.scores(prepared.image)
        if self.config.postprocess.crf:
            with timed(seconds, "postprocess"):
                scores = refine(
                    self.config.postprocess,
                    scores,
                    prepared.image,
                    spacing_mm=prepared.grid.spacing_mm,
                    regions=self.config.data.is_regions,
                )
        with timed(seconds, "restore"):
            labels = restore(scores, prepared.grid, prepared.source, decider(self.config.data))
        return Segmented(labels.cpu().numpy())

    def scores(self, image: torch.Tensor) -> torch.Tensor:
        """Probabilities (K, *S) of a prepared image (C, *S)."""
        return predict(self._windows, image.to(self.device), self._scorers, flips=self._flips)


def load_model(*folders: str | Path, options: InferOptions | None = None) -> Segmenter:
    """The model that `medseg train` wrote into a folder; several folders make an ensemble. Raises `ModelError`."""
    changes = options.settings if options else {}
    return Segmenter([read_model(Path(f), changes) for f in folders], options)


def make_scorer(network: torch.nn.Module, data: DataConfig, device: torch.device, precision: str) -> Scorer:
    """Windows (B, C, *S) → probabilities (B, K, *S) float32."""
    memory = memory_format(data.spatial_dims)
    network = to_memory_format(network.to(device), data.spatial_dims).eval()

    @torch.inference_mode()
    def score(windows: torch.Tensor) -> torch.Tensor:
        windows = windows.to(memory_format=memory)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits: torch.Tensor = network(windows)
        logits = logits.float()
        return logits.sigmoid() if data.is_regions else logits.softmax(dim=1)

    return score


def decider(data: DataConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Scores (K, …) → values that are written (…): the strongest label, or each region above one half in turn."""
    values = data.out_values
    dtype = torch.uint8 if max(values, default=0) <= 255 else torch.uint16
    if not data.is_regions:
        lookup = torch.tensor(values, dtype=torch.int32)
        return lambda scores: lookup.to(scores.device)[scores.argmax(dim=0)].to(dtype)

    def regions(scores: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(scores.shape[1:], dtype=torch.int32, device=scores.device)
        for score, value in zip(scores, values):
            labels[score > 0.5] = value
        return labels.to(dtype)

    return regions


def _common_config(models: Sequence[Model]) -> Config:
    if not models:
        raise ConfigError("no model given; use -m RUN")
    first = models[0].config
    for model in models[1:]:
        for section in ("data", "preprocess", "windows", "postprocess"):
            # as text: the order of the labels is the order of the channels, and equal mappings may differ in it
            if getattr(model.config, section).model_dump_json() != getattr(first, section).model_dump_json():
                raise ModelError(f"the models of an ensemble differ in `{section}`; train them with one configuration")
    return first


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds that the block took to `seconds` under `stage`."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 4)
