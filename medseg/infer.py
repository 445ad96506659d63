"""From files to label maps on their own grids: one case, and a folder of cases with failures kept apart."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor

from medseg.cases import Case, infer_inputs
from medseg.config import Config, DataConfig
from medseg.device import (
    choose_device,
    choose_precision,
    describe,
    memory_format,
    peak_memory_mb,
    to_memory_format,
)
from medseg.errors import ConfigError, MedsegError, ModelError
from medseg.grid import restore
from medseg.model import DECISIVE, Model, read_model
from medseg.postprocess import refine
from medseg.preprocess import Prepared, prepare
from medseg.progress import Progress, silent
from medseg.readers import file_sha256
from medseg.versions import versions
from medseg.windows import Flips, Scorer, predict
from medseg.writers import label_ending, write_label, write_text

log = logging.getLogger(__name__)

# sections of the configuration that decide a mask
DECIDING = {"data", "preprocess", "network", "windows", "postprocess"}


@dataclass(frozen=True)
class InferOptions:
    """How to infer. `overlap` None: the model's own; `shard` (i, n): every n-th case only, from the i-th of 1…n on.

    `settings` are laid over the model's: sections network (`output_stride`, with the weights as they are), windows and
    postprocess.
    """

    device: str = "auto"
    precision: str = "auto"
    tta: Literal["none", "flip"] = "none"
    overlap: float | None = None
    shard: tuple[int, int] = (1, 1)
    overwrite: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseResult:
    """What became of one case. `status`: done, skipped (its finished mask was there) or failed."""

    case: str
    status: Literal["done", "skipped", "failed"]
    output: str | None = None
    reason: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    output_sha256: str | None = None
    warnings: tuple[str, ...] = ()


class Segmenter:
    """One model, or several as an ensemble (their probabilities are averaged), ready on a device."""

    def __init__(self, models: Sequence[Model], options: InferOptions | None = None) -> None:
        self.options = options or InferOptions()
        if self.options.tta not in ("none", "flip"):
            raise ConfigError(f"tta {self.options.tta!r}: expected none or flip")
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
        labels, prepared = self.segment_case(Case(paths[0].name, paths, None, paths[0].name))
        return MetaTensor(torch.as_tensor(labels), affine=torch.as_tensor(prepared.source.affine_4x4))

    def segment_case(
        self, case: Case, seconds: dict[str, float] | None = None
    ) -> tuple[np.ndarray[Any, np.dtype[Any]], Prepared]:
        """Label map on the grid of the case's file, and what the network saw."""
        seconds = {} if seconds is None else seconds
        with _timed(seconds, "read"):
            prepared = prepare(case, self.config.preprocess, self.config.data, with_label=False)
        with _timed(seconds, "network"):
            scores = self.scores(prepared.image)
        if self.config.postprocess.crf:
            with _timed(seconds, "postprocess"):
                scores = refine(
                    self.config.postprocess,
                    scores,
                    prepared.image,
                    spacing_mm=prepared.grid.spacing_mm,
                    regions=self.config.data.is_regions,
                )
        with _timed(seconds, "restore"):
            labels = restore(scores, prepared.grid, prepared.source, decider(self.config.data))
        return labels.cpu().numpy(), prepared

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


def infer(
    inputs: Sequence[str | Path],
    models: Sequence[str | Path],
    out: str | Path,
    options: InferOptions | None = None,
    *,
    progress: Progress = silent,
) -> tuple[CaseResult, ...]:
    """Segment files and folders into `out`/CASE.nii.gz (pictures: .png), and write `out`/run.json.

    A case that fails costs no other; masks that the same models and options made of the same input, and that are still
    as they were written, are skipped. Raises `ConfigError` or `ModelError` before anything is done.
    """
    folder = Path(out)
    segmenter = load_model(*models, options=options)
    cases = infer_inputs([Path(i) for i in inputs], channels=len(segmenter.config.data.channels))
    part, parts = segmenter.options.shard
    if not 1 <= part <= parts:
        raise ConfigError(f"--shard {part}/{parts}: expected i/n with i from 1 to n")
    return segment_cases(segmenter, cases[part - 1 :: parts], folder, progress=progress)


def segment_cases(
    segmenter: Segmenter, cases: Sequence[Case], folder: Path, *, progress: Progress = silent
) -> tuple[CaseResult, ...]:
    """`infer` for cases and a model that are at hand."""
    sources = {path.resolve() for case in cases for path in case.images}
    for case in cases:
        if _output(folder, case).resolve() in sources:
            raise ConfigError(f"{_output(folder, case)}: the mask would replace an input image; choose another -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror}); choose another -o") from error
    earlier = _earlier_results(folder, segmenter)
    results: dict[str, CaseResult] = {}
    for n, case in enumerate(cases):
        progress("infer", n, len(cases), case.id)
        results[case.id] = _one(segmenter, case, folder, earlier.get(case.id))
        _write_record(folder, segmenter, earlier | results)
    progress("infer", len(cases), len(cases), "")
    return tuple(results.values())


def _one(segmenter: Segmenter, case: Case, folder: Path, earlier: CaseResult | None) -> CaseResult:
    output = _output(folder, case)
    seconds: dict[str, float] = {}
    try:
        inputs = {str(p): file_sha256(p) for p in case.images}
        if not segmenter.options.overwrite and earlier and _still_there(earlier, output, inputs):
            return replace(earlier, status="skipped")
        labels, _ = segmenter.segment_case(case, seconds)
        with _timed(seconds, "write"):
            write_label(output, labels, like=case.images[0], names=segmenter.label_names)
    except Exception as error:
        log.debug("case %s failed", case.id, exc_info=True)
        stale = (f"{output.name} is of an earlier run: do not use it",) if output.exists() else ()
        return CaseResult(case.id, "failed", reason=_reason(case, error), seconds=seconds, warnings=stale)
    return CaseResult(case.id, "done", output.name, None, seconds, peak_memory_mb(), inputs, file_sha256(output))


def _output(folder: Path, case: Case) -> Path:
    return folder / f"{case.id}{label_ending(case.images[0])}"


def _still_there(earlier: CaseResult, output: Path, inputs: Mapping[str, str]) -> bool:
    """Whether `output` holds the bytes that the same model made of the same input, not those of another run."""
    if earlier.status == "failed" or earlier.inputs != inputs or not output.is_file():
        return False
    return file_sha256(output) == earlier.output_sha256


def _reason(case: Case, error: Exception) -> str:
    if isinstance(error, MedsegError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"{case.images[0]}: the device ran out of memory; try --device cpu or a smaller windows.batch_size"
    return f"{case.images[0]}: {type(error).__name__}: {error}"


def _record_name(options: InferOptions) -> str:
    part, parts = options.shard
    return "run.json" if parts == 1 else f"run.{part}-of-{parts}.json"


def _settings(segmenter: Segmenter) -> dict[str, Any]:
    """What decides a mask, beside the input."""
    return {
        "models": [m.sha256 for m in segmenter.models],
        "tta": segmenter.options.tta,
        "overlap": segmenter.options.overlap,
        "settings": dict(segmenter.options.settings),
        "configuration": hashlib.sha256(segmenter.config.model_dump_json(include=DECIDING).encode()).hexdigest(),
        "precision": segmenter.precision,
    }


def _write_record(folder: Path, segmenter: Segmenter, results: Mapping[str, CaseResult]) -> None:
    record = {
        "schema_version": 1,
        "settings": _settings(segmenter),
        "device": describe(segmenter.device),
        "versions": versions(*DECISIVE),
        "labels": {str(v): n for v, n in segmenter.label_names.items()},
        "cases": [asdict(r) for r in results.values()],
    }
    write_text(folder / _record_name(segmenter.options), json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _earlier_results(folder: Path, segmenter: Segmenter) -> dict[str, CaseResult]:
    """Cases that an earlier run with the same models and settings wrote into `folder`, all shards together."""
    found: dict[str, CaseResult] = {}
    for path in sorted(folder.glob("run*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["settings"] == _settings(segmenter):
                found |= {c["case"]: CaseResult(**c) for c in record["cases"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not a record of medseg (%s): its cases are done again", path.name, type(error).__name__)
    return found


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
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 4)
