"""One pair of label maps after the other to numbers, several at a time; tables and summaries are made elsewhere."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from medseg import metrics
from medseg.errors import DataError
from medseg.evaluate.calibration import measure_calibration
from medseg.evaluate.options import EvaluateOptions
from medseg.evaluate.pairs import Failure, Maps, Pair, printable, read_maps
from medseg.metrics import Labels, PairMetrics, Value
from medseg.metrics.calibration import Reliability
from medseg.metrics.lesions import LesionMetrics, measure_lesions
from medseg.process import machine_memory_bytes
from medseg.readers import read_geometry, read_label

logger = logging.getLogger(__name__)

# no map has more labels; of an image each grey value would be one
MOST_VALUES = 1000
# of more cases at a time nothing was measured
MOST_JOBS = 16
# below this one case at a time was faster: the time goes into Python itself, which runs one thread at a time
FEW_VOXELS = 30_000
# what a pair of float32 label maps was measured to take at its peak (17; int16: 7, uint8: 3), and the share of the
# machine's memory that all cases at a time may take together
BYTES_A_VOXEL, MEMORY_SHARE = 20, 0.5
# the cosine of 89.4 degrees: distances along axes that are taken to be at right angles are off by 1 % at most
MOST_SKEW = 0.01


@dataclass(frozen=True)
class CaseResult:
    """What is kept of a case: numbers only, no array of its size."""

    case: str
    spacing_mm: tuple[float, ...]
    missing: bool
    rows: Mapping[Value, PairMetrics]
    reference_values: frozenset[int]
    prediction_values: frozenset[int]
    voxels: int
    resampled: bool = False
    skewed: bool = False
    lesions: Mapping[Value, LesionMetrics] = field(default_factory=dict)
    calibration: Reliability | None = None
    uncalibrated: str = ""
    oddities: tuple[str, ...] = ()

    def row(self, value: Value) -> PairMetrics:
        """The measures of a label, also of one that neither map holds."""
        if value in self.rows:
            return self.rows[value]
        if self.missing:
            return metrics.missing_prediction(0, spacing_mm=self.spacing_mm)
        return metrics.both_empty(spacing_mm=self.spacing_mm)


def measure_each(pairs: Sequence[Pair], options: EvaluateOptions) -> Iterator[CaseResult | Failure]:
    """The result of each pair in the order of `pairs`, or why there is none; no more than `jobs` at a time."""

    def measure(pair: Pair) -> CaseResult | Failure:
        return _measure_or_fail(pair, options)

    jobs = min(len(pairs), options.jobs or _usual_jobs(pairs))
    if jobs <= 1:
        yield from map(measure, pairs)
        return
    # threads suffice: inflating, look-ups and trees run outside Python's lock, and no array is copied between processes
    pool = ThreadPoolExecutor(max_workers=jobs)
    try:
        yield from pool.map(measure, pairs)
    finally:
        # an interruption waits for the cases under way only
        pool.shutdown(wait=True, cancel_futures=True)


def _usual_jobs(pairs: Sequence[Pair]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = min(cores, MOST_JOBS, len(pairs))
    memory = machine_memory_bytes()
    if wanted <= 1 or memory is None:
        return 1
    voxels = _most_voxels(pairs)
    if voxels < FEW_VOXELS:
        return 1
    return max(1, min(wanted, int(MEMORY_SHARE * memory / (BYTES_A_VOXEL * voxels))))


def _most_voxels(pairs: Sequence[Pair]) -> int:
    """Voxels in the largest file, for the largest grid: reading every header takes longer than small cases."""
    references = [pair.reference for pair in pairs if pair.reference.is_file()]
    for path in sorted(references, key=lambda path: path.stat().st_size, reverse=True):
        try:
            return math.prod(read_geometry(path).grid.shape)
        except DataError as error:
            # its case will be a failure with this reason
            logger.debug("size not known: %s", error)
    return 1


def _measure_or_fail(pair: Pair, options: EvaluateOptions) -> CaseResult | Failure:
    try:
        return _measure(pair, options)
    except DataError as error:
        return Failure(pair.case, printable(str(error)))
    except Exception as error:
        # whatever is wrong with one case must not cost the others
        logger.debug("%s failed", pair.case, exc_info=True)
        return Failure(pair.case, printable(f"{pair.prediction or pair.reference}: {type(error).__name__}: {error}"))


def _measure(pair: Pair, options: EvaluateOptions) -> CaseResult:
    if pair.prediction is None:
        return _measure_missing(pair, options)
    maps = read_maps(pair.prediction, pair.reference, resample_prediction=options.resample_prediction)
    in_prediction = metrics.present_values(maps.prediction) - {options.ignore_value}
    in_reference = metrics.present_values(maps.reference) - {options.ignore_value}
    values = _values(in_prediction | in_reference, options)
    if len(values) > MOST_VALUES and options.labels is None:
        raise DataError(
            f"{pair.prediction}: {len(in_prediction)} values found, {len(in_reference)} in {pair.reference}: this "
            "looks like an image; give label maps, or name the labels with --labels"
        )
    rows = metrics.measure(
        maps.prediction,
        maps.reference,
        values,
        spacing_mm=maps.grid.spacing_mm,
        voxel_mm3=maps.grid.voxel_mm3,
        ignore_value=options.ignore_value,
        surface=options.surface,
        nsd_tolerance_mm=options.tolerances_mm(values),
        extra=options.extra,
    )
    calibration, uncalibrated = _calibrated(pair, maps, options)
    return CaseResult(
        case=pair.case,
        spacing_mm=maps.grid.spacing_mm,
        missing=False,
        rows=rows,
        reference_values=in_reference,
        prediction_values=in_prediction,
        voxels=_judged_voxels(maps.reference, options),
        resampled=maps.resampled,
        skewed=maps.grid.skew > MOST_SKEW,
        lesions=_lesions(maps, values, options),
        calibration=calibration,
        uncalibrated=uncalibrated,
        oddities=maps.oddities,
    )


def _lesions(maps: Maps, values: Sequence[Value], options: EvaluateOptions) -> dict[Value, LesionMetrics]:
    if options.lesion_rule is None:
        return {}
    found = measure_lesions(
        maps.prediction,
        maps.reference,
        values,
        spacing_mm=maps.grid.spacing_mm,
        voxel_mm3=maps.grid.voxel_mm3,
        ignore_value=options.ignore_value,
        rule=options.lesion_rule,
        surface=options.surface,
    )
    # the lesions themselves are not kept: salt noise has a million
    return {value: dataclasses.replace(each, lesions=()) for value, each in found.items()}


def _calibrated(pair: Pair, maps: Maps, options: EvaluateOptions) -> tuple[Reliability | None, str]:
    """What the probabilities of a case say, or why they cannot be used."""
    if pair.probabilities is None:
        return None, ""
    try:
        found = measure_calibration(
            pair.probabilities, maps.reference, maps.geometry, like=pair.reference, ignore_value=options.ignore_value
        )
    except (DataError, ValueError) as error:
        # the masks of a case are judged whatever its probabilities are
        return None, printable(str(error))
    return found, ""


def _measure_missing(pair: Pair, options: EvaluateOptions) -> CaseResult:
    reference = read_label(pair.reference)
    present = metrics.present_values(reference.array) - {options.ignore_value}
    values = _values(present, options)
    spacing = reference.grid.spacing_mm
    rows = {
        value: metrics.missing_prediction(c.reference, spacing_mm=spacing, voxel_mm3=reference.grid.voxel_mm3)
        for value, c in metrics.counts(reference.array, reference.array, values).items()
    }
    return CaseResult(pair.case, spacing, True, rows, present, frozenset(), _judged_voxels(reference.array, options))


def _values(present: Iterable[int], options: EvaluateOptions) -> list[Value]:
    return sorted(present) if options.labels is None else list(options.labels.values())


def _judged_voxels(reference: Labels, options: EvaluateOptions) -> int:
    if options.ignore_value is None:
        return int(reference.size)
    return int(reference.size - (reference == options.ignore_value).sum())
