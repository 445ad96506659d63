"""From a folder of predictions and one of references to a table and its summary; no pictures, nothing written."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage

from medseg import metrics
from medseg.config import BACKGROUND, COLOURS, IGNORE
from medseg.errors import DataError, GeometryError
from medseg.grid import ROUNDING_TOLERANCE, Grid
from medseg.metrics import Labels, PairMetrics, Surface, Value
from medseg.progress import Progress, silent
from medseg.readers import ENDINGS, is_image_file, read_label, split_ending
from medseg.statistics import Summary, summarise
from medseg.versions import versions

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# share of a voxel that two grids may be apart at a corner: headers hold 32-bit numbers and rounded quaternions
GRID_TOLERANCE_VOXELS = ROUNDING_TOLERANCE
OVERLAPS = ("dice", "iou", "precision", "recall", "nsd")
METRICS = (
    *("dice", "iou", "precision", "recall", "hd_mm", "hd95_mm", "assd_mm", "nsd"),
    *("reference_ml", "prediction_ml", "volume_difference_ml"),
)
COLUMNS = ("case", "label", "name", "status", "tp", "fp", "fn", *METRICS)
WORST_CASES = 10
_NAMED_AT_MOST = 10


@dataclass(frozen=True)
class Pair:
    """The files of one case; `prediction` is None where it is missing."""

    case: str
    prediction: Path | None
    reference: Path
    image: Path | None = None


@dataclass(frozen=True)
class Failure:
    """A case that could not be evaluated, and why."""

    case: str
    reason: str


@dataclass(frozen=True)
class Settings:
    """How cases are measured. `labels` maps a name to its value, or to all values of a region; None: as found."""

    labels: Mapping[str, Value] | None
    ignore_value: int | None
    resample_prediction: bool
    surface: Surface
    nsd_tolerance_mm: float


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
    settings: Settings


def evaluate_folders(
    predictions: Path,
    references: Path,
    *,
    labels: Mapping[str, Value] | None = None,
    allow_missing: bool = False,
    resample_prediction: bool = False,
    ignore_value: int | None = None,
    surface: Surface = "surfel",
    nsd_tolerance_mm: float = 1.0,
    jobs: int = 1,
    images: Path | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure every prediction against the reference of the same case name, label by label.

    Both may also be one file each. `labels` maps a name to its value or, for a region, to all its values; None takes
    the values found in the references. A name `background` is left out, the value of `ignore` is left out of the
    counts. A case that cannot be read or lies on another grid is a failure and costs
    no other case. Raises `DataError` where predictions are missing (unless `allow_missing`) or no case is left.
    """
    settings = make_settings(
        labels,
        ignore_value=ignore_value,
        resample_prediction=resample_prediction,
        surface=surface,
        nsd_tolerance_mm=nsd_tolerance_mm,
    )
    pairs, warnings = find_pairs(predictions, references, images)
    missing = [pair.case for pair in pairs if pair.prediction is None]
    if missing and not allow_missing:
        raise DataError(
            f"{predictions}: missing predictions for {len(missing)} of {len(pairs)} references: {_some(missing)}; "
            "predict these cases, or pass --allow-missing to report them apart"
        )
    return evaluate_pairs(pairs, settings, jobs=jobs, warnings=warnings, progress=progress)


def evaluate_pairs(
    pairs: Sequence[Pair],
    settings: Settings,
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
    for done, result in enumerate(_each(pairs, settings, jobs), start=1):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            results.append(result)
        progress("evaluate", done, len(pairs))
    if all(result.missing for result in results):
        reasons = [f.reason for f in failures[:_NAMED_AT_MOST]] or ["missing predictions for all of them"]
        raise DataError(f"none of {len(pairs)} cases could be evaluated: {'; '.join(reasons)}")
    labels = settings.labels or _names_found(results)
    notes = [*warnings, *_unknown_values(results, labels)]
    for note in notes:
        logger.warning(note)
    table = _table(results, labels)
    return Evaluation(
        table=table,
        summary=_summarise(table, labels, failures, notes, settings, groups),
        failures=tuple(failures),
        warnings=tuple(notes),
        pairs={pair.case: pair for pair in pairs},
        labels=labels,
        colours={name: COLOURS[n % len(COLOURS)] for n, name in enumerate(labels)},
        settings=settings,
    )


def make_settings(
    labels: Mapping[str, Value] | None = None,
    *,
    ignore_value: int | None = None,
    resample_prediction: bool = False,
    surface: Surface = "surfel",
    nsd_tolerance_mm: float = 1.0,
) -> Settings:
    """Checked settings, without background; a label named `ignore` gives the value to ignore. Raises `DataError`."""
    if surface not in metrics.SURFACES:
        raise DataError(f"surface {surface!r} is unknown, expected {' or '.join(metrics.SURFACES)}")
    if not nsd_tolerance_mm >= 0:
        raise DataError(f"NSD tolerance of {nsd_tolerance_mm} mm found, expected 0 or more")
    if labels is not None:
        if ignore_value is None and IGNORE in labels:
            value = labels[IGNORE]
            ignore_value = value[0] if isinstance(value, tuple) else value
        labels = {name: value for name, value in labels.items() if name not in (BACKGROUND, IGNORE) and value != 0}
        if not labels:
            raise DataError("labels name nothing but background; give at least one name with its value")
    return Settings(labels, ignore_value, resample_prediction, surface, nsd_tolerance_mm)


def find_pairs(predictions: Path, references: Path, images: Path | None = None) -> tuple[list[Pair], list[str]]:
    """Every reference with its prediction and image, sorted by case, and warnings. Raises `DataError`."""
    for path in (predictions, references, *([] if images is None else [images])):
        if not path.exists():
            raise DataError(f"{path}: does not exist, expected a folder of label maps or one file")
    if predictions.is_file() and references.is_file():
        return [Pair(split_ending(references.name)[0], predictions, references, _only_file(images))], []
    found = _files_by_case(references)
    if not found:
        raise DataError(f"{references}: no label maps found, expected files ending in {', '.join(ENDINGS)}")
    predicted = _files_by_case(predictions)
    pictured = {} if images is None else _files_by_case(images)
    pairs = [
        Pair(
            case,
            _single(predicted.get(case, ())),
            _single(files) or files[0],
            _single(pictured.get(case) or pictured.get(f"{case}_0000") or ()),
        )
        for case, files in sorted(found.items())
    ]
    alone = sorted(set(predicted) - set(found))
    warnings = [f"{len(alone)} predictions without a reference were left out: {_some(alone)}"] if alone else []
    return pairs, warnings


def read_pair(prediction: Path, reference: Path, *, resample_prediction: bool = False) -> tuple[Labels, Labels, Grid]:
    """Both label maps on the reference's grid.

    Raises `GeometryError` if the grids differ, unless the prediction may be resampled (nearest neighbour, 0 outside).
    """
    found, expected = read_label(prediction), read_label(reference)
    if found.grid.matches(expected.grid, tolerance=GRID_TOLERANCE_VOXELS):
        return found.array, expected.array, expected.grid
    if resample_prediction and found.grid.spatial_dims == expected.grid.spatial_dims:
        return _nearest(found.array, found.grid, expected.grid), expected.array, expected.grid
    raise GeometryError(
        f"{prediction}: {_difference(found.grid, expected.grid)}; save the prediction on the reference's grid, or pass "
        "--resample-prediction"
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


def _files_by_case(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in [folder] if folder.is_file() else sorted(folder.iterdir()):
        if path.is_file() and is_image_file(path):
            files.setdefault(split_ending(path.name)[0], []).append(path)
    return files


def _single(files: Sequence[Path]) -> Path | None:
    if len(files) > 1:
        raise DataError(f"{files[0]}: one case in {len(files)} files ({_some([f.name for f in files])}); keep one")
    return files[0] if files else None


def _only_file(images: Path | None) -> Path | None:
    return images if images is not None and images.is_file() else None


def _each(pairs: Sequence[Pair], settings: Settings, jobs: int) -> Iterator[_CaseResult | Failure]:
    def measure(pair: Pair) -> _CaseResult | Failure:
        return _measure_or_fail(pair, settings)

    if jobs <= 1:
        yield from map(measure, pairs)
        return
    # threads suffice: inflating, look-ups and trees run outside Python's lock, and no array is copied between processes
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(measure, pairs)


def _measure_or_fail(pair: Pair, settings: Settings) -> _CaseResult | Failure:
    try:
        return _measure(pair, settings)
    except DataError as error:
        return Failure(pair.case, str(error))
    except Exception as error:
        # whatever is wrong with one case must not cost the others
        logger.debug("%s failed", pair.case, exc_info=True)
        return Failure(pair.case, f"{pair.prediction or pair.reference}: {type(error).__name__}: {error}")


def _measure(pair: Pair, settings: Settings) -> _CaseResult:
    if pair.prediction is None:
        return _measure_missing(pair, settings)
    prediction, reference, grid = read_pair(
        pair.prediction, pair.reference, resample_prediction=settings.resample_prediction
    )
    in_prediction = metrics.present_values(prediction) - {settings.ignore_value}
    in_reference = metrics.present_values(reference) - {settings.ignore_value}
    rows = metrics.measure(
        prediction,
        reference,
        sorted(in_prediction | in_reference) if settings.labels is None else list(settings.labels.values()),
        spacing_mm=grid.spacing_mm,
        ignore_value=settings.ignore_value,
        surface=settings.surface,
        nsd_tolerance_mm=settings.nsd_tolerance_mm,
    )
    return _CaseResult(pair.case, grid.spacing_mm, False, rows, in_reference, in_prediction)


def _measure_missing(pair: Pair, settings: Settings) -> _CaseResult:
    reference = read_label(pair.reference)
    present = metrics.present_values(reference.array) - {settings.ignore_value}
    values = sorted(present) if settings.labels is None else list(settings.labels.values())
    spacing = reference.grid.spacing_mm
    rows = {
        value: metrics.missing_prediction(c.reference, spacing_mm=spacing)
        for value, c in metrics.counts(reference.array, reference.array, values).items()
    }
    return _CaseResult(pair.case, spacing, True, rows, present, frozenset())


def _nearest(labels: Labels, from_grid: Grid, to_grid: Grid) -> Labels:
    n = from_grid.spatial_dims
    back = np.linalg.solve(from_grid.affine, to_grid.affine)
    moved = ndimage.affine_transform(
        labels, back[:n, :n], back[:n, n], output_shape=to_grid.shape, order=0, mode="grid-constant", cval=0
    )
    return np.asarray(moved)


def _difference(found: Grid, expected: Grid) -> str:
    if found.shape != expected.shape:
        return f"shape {found.shape} found, expected {expected.shape} of the reference"
    if not np.allclose(found.spacing_mm, expected.spacing_mm, rtol=1e-3):
        return (
            f"spacing {_numbers(found.spacing_mm)} mm found, expected {_numbers(expected.spacing_mm)} of the reference"
        )
    n = found.spatial_dims
    origins = found.affine[:n, n], expected.affine[:n, n]
    if not np.allclose(*origins, atol=1e-2):
        return f"origin {_numbers(origins[0])} mm found, expected {_numbers(origins[1])} of the reference"
    return "axes in other directions than those of the reference found, expected the same"


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


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
        f"value {value} is no label and was not judged; it occurs in {len(names)} cases: {_some(names)}"
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


def _summarise(
    table: pd.DataFrame,
    labels: Mapping[str, Value],
    failures: Sequence[Failure],
    warnings: Sequence[str],
    settings: Settings,
    groups: Mapping[str, str] | None,
) -> dict[str, Any]:
    missing = table["status"] == "missing_prediction"
    judged = table[~missing]
    by_case = judged.groupby("case", sort=True)[list(OVERLAPS)].mean()
    absent = list(dict.fromkeys(table.loc[missing, "case"]))
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "n_cases": len(by_case),
        "n_failed": len(failures),
        "n_missing_prediction": len(absent),
        "foreground": {metric: _summary(by_case.reset_index(), metric, groups) for metric in OVERLAPS},
        "labels": {
            name: {
                "value": list(value) if isinstance(value, tuple) else value,
                **_label(judged, name, len(absent), groups),
            }
            for name, value in labels.items()
        },
        "worst_cases": _worst(judged, by_case["dice"]),
        "missing_predictions": absent,
        "failures": [dataclasses.asdict(failure) for failure in failures],
        "warnings": list(warnings),
        "definitions": _definitions(settings),
        "versions": versions("medseg", "numpy", "scipy", "pandas"),
    }


def _label(
    judged: pd.DataFrame, name: str, n_missing_prediction: int, groups: Mapping[str, str] | None
) -> dict[str, Any]:
    rows = judged[judged["name"] == name]
    events = {f"n_{s}": int((rows["status"] == s).sum()) for s in ("missed", "spurious", "both_empty")}
    events["n_missing_prediction"] = n_missing_prediction
    return {metric: {**_summary(rows, metric, groups), **events} for metric in METRICS}


def _summary(rows: pd.DataFrame, metric: str, groups: Mapping[str, str] | None) -> dict[str, Any]:
    units = None if groups is None else [groups.get(case, case) for case in rows["case"]]
    return _plain(summarise(rows[metric].to_numpy(dtype=float), groups=units))


def _worst(judged: pd.DataFrame, dice_by_case: pd.Series[float]) -> list[dict[str, Any]]:
    worst = []
    for case, mean in dice_by_case.dropna().sort_values(kind="stable").head(WORST_CASES).items():
        rows = judged[(judged["case"] == case) & judged["dice"].notna()]
        lowest = rows.sort_values("dice", kind="stable").iloc[0]
        worst.append({"case": str(case), "dice": float(mean), "lowest_label": str(lowest["name"])})
    return worst


def _plain(summary: Summary) -> dict[str, Any]:
    def number(value: Any) -> Any:
        return "inf" if value == float("inf") else value

    fields = dataclasses.asdict(summary)
    return {name: list(value) if isinstance(value, tuple) else number(value) for name, value in fields.items()}


def _definitions(settings: Settings) -> dict[str, str]:
    surfaces = {
        "surfel": "marching-cubes surface elements weighted by their area, as in DeepMind's surface-distance",
        "voxel": "voxels of the label that have a neighbour outside across a face, as in MONAI",
    }
    texts = {
        "dice": "2TP / (2TP + FP + FN). Not defined where both are empty; 0 where only one of the two has the label.",
        "iou": "TP / (TP + FP + FN), with the same edge cases.",
        "precision": "TP / (TP + FP); not defined where nothing was predicted.",
        "recall": "TP / (TP + FN); not defined where the reference is empty.",
        "surface": f"{settings.surface}: {surfaces[settings.surface]}; distances follow the voxel spacing.",
        "hd_mm": "Largest distance between the two surfaces. Infinite where only one of the two has the label.",
        "hd95_mm": "The larger of the two directed 95th percentiles of the distances between the surfaces.",
        "assd_mm": "Mean distance over both surfaces, weighted by the size of their elements.",
        "nsd": f"Share of both surfaces that lies within {settings.nsd_tolerance_mm:g} mm of the other one.",
        "volumes": "Millilitres, from the voxel spacing; not given for two-dimensional images. Difference: prediction "
        "− reference. In pictures without a physical size a pixel counts as 1 mm.",
        "status": "ok: both have the label. missed: only the reference has it. spurious: only the prediction has it. "
        "both_empty: neither has it; left out of means and counted. missing_prediction: no prediction was found; left "
        "out of all summaries and counted.",
        "mean": "Mean and standard deviation are those of the finite values, with their number where some are infinite "
        "(n_finite). Median and quartiles include infinite values, written as inf.",
        "ci95": "95% bootstrap interval of the mean over cases (BCa, else percentile); not given below three cases.",
        "foreground": "Mean over the labels of each case, then summarised over cases.",
    }
    if settings.ignore_value is not None:
        texts["ignore"] = f"Voxels where the reference is {settings.ignore_value} belong to neither map."
    return texts
