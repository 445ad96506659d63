"""From a folder of predictions and one of references to a table and its summary; no pictures, nothing written."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medseg import metrics
from medseg.config import COLOURS
from medseg.errors import DataError
from medseg.evaluate.options import EvaluateOptions
from medseg.evaluate.pairs import Pair, find_pairs, named, read_pair
from medseg.evaluate.summary import METRICS, Failure, summarise_table
from medseg.metrics import PairMetrics, Value
from medseg.progress import Progress, silent
from medseg.readers import read_label

__all__ = ["COLUMNS", "EvaluateOptions", "Evaluation", "Failure", "Pair", "evaluate_folders", "evaluate_pairs"]

logger = logging.getLogger(__name__)

COLUMNS = ("case", "label", "name", "status", "tp", "fp", "fn", *METRICS)


@dataclass(frozen=True)
class Evaluation:
    """What came out: one row of `table` per case and label; `summary` holds nothing but what strict JSON can."""

    table: pd.DataFrame
    summary: dict[str, Any]
    failures: tuple[Failure, ...]
    warnings: tuple[str, ...]
    pairs: Mapping[str, Pair]
    labels: Mapping[str, Value]
    colours: Mapping[str, str]
    options: EvaluateOptions


def evaluate_folders(
    predictions: Path,
    references: Path,
    options: EvaluateOptions | None = None,
    *,
    images: Path | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> Evaluation:
    """Measure every prediction against the reference of the same case name, label by label.

    Both may also be one file each. A case that cannot be read or lies on another grid is a failure and costs no other
    case. Raises `DataError` where predictions are missing (unless `allow_missing`) or no case is left.
    """
    options = options or EvaluateOptions()
    pairs, warnings = find_pairs(predictions, references, images)
    missing = [pair.case for pair in pairs if pair.prediction is None]
    if missing and not options.allow_missing:
        raise DataError(
            f"{predictions}: missing predictions for {len(missing)} of {len(pairs)} references: {named(missing)}; "
            "predict these cases, or pass --allow-missing to report them apart"
        )
    return evaluate_pairs(pairs, options, jobs=jobs, warnings=warnings, progress=progress)


def evaluate_pairs(
    pairs: Sequence[Pair],
    options: EvaluateOptions,
    *,
    groups: Mapping[str, str] | None = None,
    jobs: int = 1,
    warnings: Sequence[str] = (),
    progress: Progress = silent,
) -> Evaluation:
    """Measure each of `pairs`; those without a prediction are reported apart. Raises `DataError` if no case is left.

    `groups` maps a case to its patient: intervals then resample patients. `warnings` go into the report before those
    found here.
    """
    results, failures = [], []
    for done, result in enumerate(_each(pairs, options, jobs), start=1):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            results.append(result)
        progress("evaluate", done, len(pairs))
    if all(result.missing for result in results):
        reasons = [f.reason for f in failures[:10]] or ["missing predictions for all of them"]
        raise DataError(f"none of {len(pairs)} cases could be evaluated: {'; '.join(reasons)}")
    labels = options.labels or _names_found(results)
    notes = [*warnings, *_unknown_values(results, labels)]
    for note in notes:
        logger.warning(note)
    table = _table(results, labels)
    return Evaluation(
        table=table,
        summary=summarise_table(table, labels, failures, notes, options, groups),
        failures=tuple(failures),
        warnings=tuple(notes),
        pairs={pair.case: pair for pair in pairs},
        labels=labels,
        colours={name: COLOURS[n % len(COLOURS)] for n, name in enumerate(labels)},
        options=options,
    )


@dataclass(frozen=True)
class _CaseResult:
    case: str
    spacing_mm: tuple[float, ...]
    missing: bool
    rows: Mapping[Value, PairMetrics]
    reference_values: frozenset[int]
    prediction_values: frozenset[int]

    def row(self, value: Value) -> PairMetrics:
        if value in self.rows:
            return self.rows[value]
        if self.missing:
            return metrics.missing_prediction(0, spacing_mm=self.spacing_mm)
        return metrics.both_empty(spacing_mm=self.spacing_mm)


def _each(pairs: Sequence[Pair], options: EvaluateOptions, jobs: int) -> Iterator[_CaseResult | Failure]:
    def measure(pair: Pair) -> _CaseResult | Failure:
        return _measure_or_fail(pair, options)

    if jobs <= 1:
        yield from map(measure, pairs)
        return
    # threads suffice: inflating, look-ups and trees run outside Python's lock, and no array is copied between processes
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(measure, pairs)


def _measure_or_fail(pair: Pair, options: EvaluateOptions) -> _CaseResult | Failure:
    try:
        return _measure(pair, options)
    except DataError as error:
        return Failure(pair.case, str(error))
    except Exception as error:
        # whatever is wrong with one case must not cost the others
        logger.debug("%s failed", pair.case, exc_info=True)
        return Failure(pair.case, f"{pair.prediction or pair.reference}: {type(error).__name__}: {error}")


def _measure(pair: Pair, options: EvaluateOptions) -> _CaseResult:
    if pair.prediction is None:
        return _measure_missing(pair, options)
    prediction, reference, grid = read_pair(
        pair.prediction, pair.reference, resample_prediction=options.resample_prediction
    )
    in_prediction = metrics.present_values(prediction) - {options.ignore_value}
    in_reference = metrics.present_values(reference) - {options.ignore_value}
    rows = metrics.measure(
        prediction,
        reference,
        sorted(in_prediction | in_reference) if options.labels is None else list(options.labels.values()),
        spacing_mm=grid.spacing_mm,
        ignore_value=options.ignore_value,
        surface=options.surface,
        nsd_tolerance_mm=options.nsd_tolerance_mm,
    )
    return _CaseResult(pair.case, grid.spacing_mm, False, rows, in_reference, in_prediction)


def _measure_missing(pair: Pair, options: EvaluateOptions) -> _CaseResult:
    reference = read_label(pair.reference)
    present = metrics.present_values(reference.array) - {options.ignore_value}
    values = sorted(present) if options.labels is None else list(options.labels.values())
    spacing = reference.grid.spacing_mm
    rows = {
        value: metrics.missing_prediction(c.reference, spacing_mm=spacing)
        for value, c in metrics.counts(reference.array, reference.array, values).items()
    }
    return _CaseResult(pair.case, spacing, True, rows, present, frozenset())


def _names_found(results: Iterable[_CaseResult]) -> dict[str, Value]:
    values = sorted(frozenset[int]().union(*(r.reference_values for r in results)))
    if not values:
        raise DataError(
            "the references hold nothing but background; check the folder, or say what to look for with --labels"
        )
    return {str(value): value for value in values}


def _unknown_values(results: Iterable[_CaseResult], labels: Mapping[str, Value]) -> list[str]:
    known = {v for value in labels.values() for v in (value if isinstance(value, tuple) else (value,))}
    cases: dict[int, list[str]] = {}
    for result in results:
        for value in (result.reference_values | result.prediction_values) - known:
            cases.setdefault(value, []).append(result.case)
    return [
        f"value {value} is no label and was not judged; it occurs in {len(names)} cases: {named(names)}"
        for value, names in sorted(cases.items())
    ]


def _table(results: Iterable[_CaseResult], labels: Mapping[str, Value]) -> pd.DataFrame:
    rows = [
        {
            "case": result.case,
            "label": "+".join(map(str, value)) if isinstance(value, tuple) else value,
            "name": name,
            **dataclasses.asdict(result.row(value)),
        }
        for result in results
        for name, value in labels.items()
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"tp": "Int64", "fp": "Int64", "fn": "Int64"})
