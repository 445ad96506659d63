"""run.json: what became of every case of a folder, with which model and settings; the cases are done in folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from medseg.device import describe
from medseg.errors import ConfigError
from medseg.infer import InferOptions, Segmenter, text_sha256
from medseg.model import DECISIVE
from medseg.readers import file_sha256
from medseg.versions import versions
from medseg.writers import write_text
from medseg.writers.formats import NIFTI, WrittenFile, names_other, references

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
# what a case takes more of once it is done: times, digest, quality and warnings; half of it is usual
BYTES_OF_A_CASE = 3000


class Expected(TypedDict):
    """The expected Dice of a label and its interval; None: not found, and need not be there."""

    expected: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class CaseResult:
    """What became of one case.

    `status`: done; skipped, its finished mask was there; failed; not_done, the run stopped before it or while it was
    in the network. `reason`: why it failed, or what stopped the run; `cause`: the class of the error that failed it. A
    `DataError` or `GeometryError` comes again with the same input; `OSError`: the system let a file not be read or
    written, whatever class the text is of; `MemoryError`: that of a device too. `seconds` by stage. `peak_memory_mb`:
    the most that the process held while the case was in the network and its neighbours were read and written; where
    Linux does not let that be measured, or several devices share the process, the most since it began (run.json says
    which under `peak_memory_of`). `inputs`: SHA-256 by file. `output`, `output_sha256`: the mask, None where it was not
    asked for; `files`: what was written beside it, by format. `probabilities_sha256`: None where they were not asked
    for. `quality`: the expected Dice of each label; `look`: whether somebody should look at the mask.
    """

    case: str
    status: Literal["done", "skipped", "failed", "not_done"]
    output: str | None = None
    reason: str | None = None
    cause: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_mb: float | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    output_sha256: str | None = None
    files: Mapping[str, WrittenFile] = field(default_factory=dict)
    probabilities_sha256: str | None = None
    quality: Mapping[str, Expected] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    look: bool = False

    def whole_files(self, folder: Path, names: Mapping[str, str], inputs: Mapping[str, str]) -> dict[str, WrittenFile]:
        """Of `names`, by format, the files in `folder` that hold the bytes that this result tells of.

        None where it was made of other input bytes. A mask is on the grid of its input, and both are known to the byte:
        nothing of its grid can differ then. Where the input lies does not matter. Raises `DataError` for a file that
        cannot be read.
        """
        if self.status not in ("done", "skipped") or list(self.inputs.values()) != list(inputs.values()):
            return {}
        known = dict(self.files)
        if self.output is not None and self.output_sha256 is not None:
            known[NIFTI] = WrittenFile(name=self.output, sha256=self.output_sha256)
        return {
            format_: {**known[format_], "name": name}
            for format_, name in names.items()
            if format_ in known and (folder / name).is_file() and file_sha256(folder / name) == known[format_]["sha256"]
        }

    def refers_to_all(self, folder: Path, names: Mapping[str, str]) -> bool:
        """Whether each of `names`, by format, refers to all others that it would if they were written together.

        What the record does not tell is looked for in the files, which have to be whole.
        """
        return all(
            other in self.files[name].get("refers_to", ()) or names_other(folder / names[name], folder / names[other])
            for name in names
            if name in self.files
            for other in references(name, names)
        )

    def has_probabilities(self, path: Path) -> bool:
        """Whether `path` holds the bytes of the probabilities that were written with the mask."""
        known = self.probabilities_sha256
        return known is not None and path.is_file() and file_sha256(path) == known


@dataclass(frozen=True)
class _Told:
    """What is read of a record that is there."""

    settings: Mapping[str, Any]
    cases: tuple[CaseResult, ...]


class _ForeignError(Exception):
    """The file is of somebody else."""


class _VersionError(ValueError):
    """The record is of another version."""


_RECORD = TypeAdapter(_Told)


@dataclass(frozen=True)
class Record:
    """The record of a run: where it is, what it says beside the cases, and what earlier runs left.

    `own`: cases of the same file, by name; `earlier`: what all records in the folder say of a case, shards included.
    Both only of runs with the same models and settings. `others`: the masks of other ones that are still there, by
    case, which the next record will say nothing of.
    """

    path: Path
    head: Mapping[str, Any]
    own: Mapping[str, CaseResult]
    earlier: Mapping[str, Sequence[CaseResult]]
    others: Mapping[str, str]

    def finished(
        self, case: str, names: Mapping[str, str], inputs: Mapping[str, str], probabilities: Path | None = None
    ) -> CaseResult | None:
        """The earlier result of a case whose files are still there, byte for byte, and made of the same input bytes.

        `names`: of the files that have to be there, by format. `probabilities`: a file that has to be there too.
        """
        folder = self.path.parent
        found = [r for r in self.earlier.get(case, ()) if r.whole_files(folder, names, inputs).keys() == names.keys()]
        known = [r for r in found if r.refers_to_all(folder, names)]
        return next((r for r in known if probabilities is None or r.has_probabilities(probabilities)), None)

    def whole_files(self, case: str, names: Mapping[str, str], inputs: Mapping[str, str]) -> dict[str, WrittenFile]:
        """Of the files `names` of a case, by format, those that earlier runs made of the same input bytes."""
        found: dict[str, WrittenFile] = {}
        for result in self.earlier.get(case, ()):
            found |= result.whole_files(self.path.parent, names, inputs)
        return found

    def growth(self, cases: int) -> int:
        """Bytes that the next records may take, which are written beside the one that is there: whole or not at all."""
        return (self.path.stat().st_size if self.path.is_file() else 0) + cases * BYTES_OF_A_CASE

    def write(self, results: Iterable[CaseResult], more: Mapping[str, Any]) -> None:
        """Write the record, whole or not at all; `more` is told beside the cases.

        A case that was not reached keeps what was known of its mask. Raises `DataError`.
        """
        found = dict(self.own)
        for result in results:
            known = found.get(result.case)
            if result.status != "not_done" or known is None or known.status not in ("done", "skipped"):
                found[result.case] = result
        content = {**self.head, **more, "cases": [asdict(r) for r in found.values()]}
        write_text(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def open_record(folder: Path, segmenters: Sequence[Segmenter]) -> Record:
    """The record of a run of `segmenters`, one model on several devices, into `folder`. Nothing is written yet.

    Raises `ConfigError` where a file of that name is there that is no record.
    """
    first = segmenters[0]
    settings = _settings(first)
    path = folder / _name(first.options)
    earlier: dict[str, list[CaseResult]] = {}
    own: dict[str, CaseResult] = {}
    others: dict[str, str] = {}
    for file in sorted(folder.glob("run*.json")):
        try:
            found = _read(file)
        except _ForeignError as error:
            # a file of somebody else is no record that could be written over
            if file == path:
                raise ConfigError(f"{file}: is not a record of medseg and would be lost; choose another -o") from error
            continue
        except (OSError, ValueError) as error:
            log.warning("%s %s: its cases are done again", file.name, _why_not(error))
            continue
        if found.settings != settings:
            made = {r.case: r.output for r in found.cases if r.status in ("done", "skipped") and r.output is not None}
            others |= {case: name for case, name in made.items() if file == path and os.path.exists(folder / name)}
            continue
        for result in found.cases:
            earlier.setdefault(result.case, []).append(result)
        if file == path:
            own = {r.case: r for r in found.cases}
    head = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "device": ", ".join(describe(s.device) for s in segmenters),
        "versions": versions(*DECISIVE),
        "labels": {str(v): n for v, n in first.label_names.items()},
    }
    return Record(path, head, own, earlier, others)


def _name(options: InferOptions) -> str:
    part, parts = options.shard
    return "run.json" if parts == 1 else f"run.{part}-of-{parts}.json"


def _settings(segmenter: Segmenter) -> dict[str, Any]:
    """What decides a mask, beside the input, as JSON gives it back."""
    options = segmenter.options
    told = {
        "models": [m.sha256 for m in segmenter.models],
        # what training has found out about windows, copies and masks stands beside the weights
        "descriptions": [text_sha256(json.dumps(dict(m.description), sort_keys=True)) for m in segmenter.models],
        "window": options.window,
        "tta": options.tta,
        "overlap": options.overlap,
        "settings": dict(options.settings),
        "configuration": segmenter.config_sha256,
        "precision": segmenter.precision,
        "engine": options.engine,
    }
    # left out unless asked for: records of before stay good
    asked: dict[str, Any] = {n: True for n in ("resample_tilt", "resample_gaps") if getattr(options.series, n)}
    if options.revision > 1:
        asked["revision"] = options.revision
    return dict(json.loads(json.dumps(told | asked)))


def _read(path: Path) -> _Told:
    """A record. Raises `_ForeignError` where it never was one, `ValueError` for one damaged or of another version."""
    told = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(told, dict) or "schema_version" not in told:
        raise _ForeignError
    if told["schema_version"] != SCHEMA_VERSION:
        raise _VersionError(f"is of another version of medseg (schema {told['schema_version']})")
    # not as JSON: the name of a file may be no text, and is there as the codes that Python has for its bytes
    return _RECORD.validate_python(told)


def _why_not(error: OSError | ValueError) -> str:
    if isinstance(error, _VersionError):
        return str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"is damaged ({'.'.join(str(part) for part in first['loc'])}: {first['msg']})"
    return f"is not a record of medseg ({error.strerror if isinstance(error, OSError) else 'no JSON'})"
