"""From a folder of predictions and one of references to a table and its summary; no pictures, nothing written."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from medseg.config import COLOURS
from medseg.errors import CasesError, DataError
from medseg.evaluate.cautions import cautions
from medseg.evaluate.lesions import lesion_row, lesion_table, no_lesions
from medseg.evaluate.measuring import CaseResult, measure_each
from medseg.evaluate.metadata import Metadata, called_by_case, read_metadata
from medseg.evaluate.options import EvaluateOptions
from medseg.evaluate.pairs import Failure, Found, Pair, find_pairs, named
from medseg.evaluate.summary import METRICS, Judged, summarise_table
from medseg.metrics import Value
from medseg.metrics.calibration import Reliability
from medseg.metrics.codes import members
from medseg.progress import Progress, silent

__all__ = ["COLUMNS", "EvaluateOptions", "Evaluation", "Failure", "Pair", "evaluate_folders", "evaluate_pairs"]

logger = logging.getLogger(__name__)

_REASONS_AT_MOST = 10
COLUMNS = ("case", "label", "name", "status", "tp", "fp", "fn", *METRICS)


@dataclass(frozen=True)
class Evaluation:
    """What came out: one row of `table` per case and label; `summary` holds nothing but what strict JSON can.

    `lesions`: one row per case and label, where lesions were asked for. `metadata`: subgroups by case (index).
    `voxels`: those judged, by case.
    """

    table: pd.DataFrame
    summary: dict[str, Any]
    failures: tuple[Failure, ...]
    warnings: tuple[str, ...]
    pairs: Mapping[str, Pair]
    labels: Mapping[str, Value]
    colours: Mapping[str, str]
    options: EvaluateOptions
    lesions: pd.DataFrame | None = None
    metadata: pd.DataFrame | None = None
    voxels: Mapping[str, int] = field(default_factory=dict)


def evaluate_folders(
    predictions: Path,
    references: Path,
    options: EvaluateOptions | None = None,
    *,
    images: Path | None = None,
    metadata: Path | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure every prediction against the reference of the same case name, label by label.

    Both may also be one file each; what belongs together is said at `find_pairs`. `metadata` is a CSV file with a
    column `case`, see `read_metadata`. A case that cannot be read or lies on another grid is a failure and costs no
    other case. Raises `DataError` where predictions are missing (unless `allow_missing`) or no case is left.
    """
    options = EvaluateOptions() if options is None else options
    if not isinstance(options, EvaluateOptions):
        raise DataError(f"options of type {type(options).__name__} found, expected medseg.EvaluateOptions(…)")
    if options.group is not None and metadata is None:
        raise DataError(f"column {options.group!r} for patients given without metadata; give the CSV file that has it")
    probabilities = None if options.probabilities is None else Path(options.probabilities)
    found = find_pairs(predictions, references, images=images, probabilities=probabilities)
    missing = [pair.case for pair in found.pairs if pair.prediction is None]
    if missing and not options.allow_missing:
        raise DataError(
            f"{predictions}: missing predictions for {len(missing)} of {len(found.pairs)} references: "
            f"{named(missing)}; {_hint(found, missing)}predict these cases, or pass --allow-missing to report them "
            "apart"
        )
    cases = sorted([pair.case for pair in found.pairs] + [failure.case for failure in found.failures])
    about = None if metadata is None else read_metadata(metadata, cases, group=options.group)
    return _evaluate(found, options, about, progress)


def evaluate_pairs(
    pairs: Sequence[Pair],
    options: EvaluateOptions,
    *,
    groups: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
    progress: Progress = silent,
) -> Evaluation:
    """Measure each of `pairs`; those without a prediction are reported apart. Raises `DataError` if no case is left.

    `groups` maps a case to its patient: intervals then resample patients, and the summary calls each as the first of
    its cases. `warnings` go into the report before those found here.
    """
    patients = None
    # where every case is a patient of its own, there are no patients to speak of
    if groups is not None and len(set(groups.values())) < len(groups):
        patients = called_by_case(groups, [pair.case for pair in pairs])
    about = Metadata(pd.DataFrame(), patients, ())
    return _evaluate(Found(tuple(pairs), (), tuple(warnings)), options, about, progress)


def _evaluate(found: Found, options: EvaluateOptions, about: Metadata | None, progress: Progress) -> Evaluation:
    results, failures = [], list(found.failures)
    for done, result in enumerate(measure_each(found.pairs, options), start=1):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            results.append(result)
        progress("evaluate", done, len(found.pairs))
    if all(result.missing for result in results):
        reasons = [failure.reason for failure in failures] or ["missing predictions for all of them"]
        n = len(found.pairs) + len(found.failures)
        more = f"; and {len(reasons) - _REASONS_AT_MOST} more" if len(reasons) > _REASONS_AT_MOST else ""
        message = f"none of {n} cases could be evaluated: {'; '.join(reasons[:_REASONS_AT_MOST])}{more}"
        if failures:
            raise CasesError(message, [f"{failure.case}: {failure.reason}" for failure in failures])
        raise DataError(message)
    labels = options.labels or _names_found(results)
    calibration, uncalibrated = _calibration(results, options)
    judged = Judged(
        table=_table(results, labels, options),
        labels=labels,
        options=options,
        failures=failures,
        groups=None if about is None else about.patients,
        metadata=None if about is None or about.table.empty else about.table,
        lesions=_lesions(results, labels, options),
        calibration=calibration,
        resampled=[result.case for result in results if result.resampled],
        skewed=[result.case for result in results if result.skewed],
    )
    notes = [*found.warnings, *(about.warnings if about else ()), *_odd(results), *_unknown(results, judged)]
    notes += uncalibrated
    for note in notes:
        logger.warning(note)
    # these are for the reader of the numbers: a terminal that shows them on every run soon is read no more
    notes += cautions(judged)
    return Evaluation(
        table=judged.table,
        summary=summarise_table(judged, notes),
        failures=tuple(failures),
        warnings=tuple(notes),
        pairs={pair.case: pair for pair in found.pairs},
        labels=labels,
        colours={name: COLOURS[n % len(COLOURS)] for n, name in enumerate(labels)},
        options=options,
        lesions=judged.lesions,
        metadata=judged.metadata,
        voxels={result.case: result.voxels for result in results},
    )


def _names_found(results: Iterable[CaseResult]) -> dict[str, Value]:
    values = sorted(frozenset[int]().union(*(r.reference_values for r in results)))
    if not values:
        raise DataError(
            "the references hold nothing but background; check the folder, or say what to look for with --labels"
        )
    return {str(value): value for value in values}


def _odd(results: Iterable[CaseResult]) -> list[str]:
    """What looks odd in the headers of the files."""
    cases: dict[str, list[str]] = {}
    for result in results:
        for oddity in result.oddities:
            cases.setdefault(oddity, []).append(result.case)
    return [f"in {len(names)} cases {oddity}: {named(names)}" for oddity, names in cases.items()]


def _unknown(results: Iterable[CaseResult], judged: Judged) -> list[str]:
    """Values that are no label, and tolerances of labels that there are none of."""
    known = {v for value in judged.labels.values() for v in members(value)}
    cases: dict[int, list[str]] = {}
    for result in results:
        for value in result.reference_values | result.prediction_values:
            cases.setdefault(value, []).append(result.case)
    are_strange = bool(cases) and known.isdisjoint(cases)
    warnings = [
        f"value {value} is no label and was not judged; it occurs in {len(names)} cases: {named(names)}"
        for value, names in sorted(cases.items())
        if value not in known
    ]
    if are_strange:
        warnings.insert(0, f"no mask has a label of those asked for ({named(list(judged.labels))}); are they right?")
    unused = [name for name in judged.options.own_tolerances_mm if name not in judged.labels]
    if unused:
        warnings.append(f"NSD tolerance for {named(unused)} given, but no reference has such a value")
    return warnings


def _hint(found: Found, missing: Sequence[str]) -> str:
    alone = [warning for warning in found.warnings if "without a reference" in warning]
    if len(missing) < len(found.pairs) or not alone:
        return ""
    return f"no names agree ({alone[0]}): rename the files; or "


def _table(results: Iterable[CaseResult], labels: Mapping[str, Value], options: EvaluateOptions) -> pd.DataFrame:
    rows = _rows(results, labels, lambda result, value: dataclasses.asdict(result.row(value)))
    table = pd.DataFrame(rows, columns=[*COLUMNS, *options.extra])
    return table.astype({"tp": "Int64", "fp": "Int64", "fn": "Int64"})


def _lesions(
    results: Iterable[CaseResult], labels: Mapping[str, Value], options: EvaluateOptions
) -> pd.DataFrame | None:
    rule = options.lesion_rule
    if rule is None:
        return None

    def found(result: CaseResult, value: Value) -> dict[str, Any]:
        return lesion_row(result.lesions.get(value) or no_lesions(value, len(result.spacing_mm), rule))

    return lesion_table(_rows((result for result in results if not result.missing), labels, found))


def _rows(
    results: Iterable[CaseResult],
    labels: Mapping[str, Value],
    measured: Callable[[CaseResult, Value], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    return [
        {
            "case": result.case,
            "label": "+".join(map(str, value)) if isinstance(value, tuple) else value,
            "name": name,
            **measured(result, value),
        }
        for result in results
        for name, value in labels.items()
    ]


def _calibration(results: Sequence[CaseResult], options: EvaluateOptions) -> tuple[Reliability | None, list[str]]:
    """The probabilities of all cases together, and what is missing of them."""
    if options.probabilities is None:
        return None, []
    judged = [result for result in results if not result.missing]
    whole: Reliability | None = None
    warnings = [f"probabilities of {r.case} were left out: {r.uncalibrated}" for r in judged if r.uncalibrated]
    for result in judged:
        if result.calibration is None:
            continue
        if whole is not None and list(whole.labels) != list(result.calibration.labels):
            warnings.append(
                f"probabilities of {result.case} were left out: other labels than those of the cases before"
            )
            continue
        whole = result.calibration if whole is None else whole + result.calibration
    absent = [r.case for r in judged if r.calibration is None and not r.uncalibrated]
    if absent:
        warnings.append(f"{len(absent)} cases have no probabilities: {named(absent)}")
    return whole, warnings
