"""A folder of cases: what is done already, what failed, and the record of both; one case is done in infer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from medseg.cases import Case, infer_inputs
from medseg.device import describe, peak_memory_mb
from medseg.errors import ConfigError, MedsegError
from medseg.infer import InferOptions, Segmenter, load_model, timed
from medseg.model import DECISIVE
from medseg.progress import Progress, silent
from medseg.readers import file_sha256
from medseg.versions import versions
from medseg.writers import label_ending, write_label, write_text

log = logging.getLogger(__name__)

# sections of the configuration that decide a mask
DECIDING = {"data", "preprocess", "network", "windows", "postprocess"}


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
        with timed(seconds, "read"):
            prepared = segmenter.prepare(case)
        found = segmenter.segment_prepared(prepared, seconds)
        with timed(seconds, "write"):
            write_label(output, found.labels, like=case.images[0], names=segmenter.label_names)
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
