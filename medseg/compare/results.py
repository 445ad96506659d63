"""What sets methods apart: paired tests by label and measure, summaries, rankings and sentences; no files, no HTML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from medseg.compare.alignment import ALL_LABELS, HIGHER_IS_BETTER, Aligned, Floats, Label
from medseg.evaluate.pairs import counted
from medseg.progress import Progress, silent
from medseg.statistics import (
    CONFIDENCE,
    PERMUTATIONS,
    PairedTest,
    Ranking,
    cases_to_show,
    compare_pairs,
    holm,
    rank_all,
    summarise_all,
)
from medseg.versions import versions

SCHEMA_VERSION = 1
SIGNIFICANCE = 1 - CONFIDENCE
# Cohen's d that takes 78,489 cases to show
_SMALLEST_EFFECT = 0.01
EVENTS = ("missed", "spurious", "missing_prediction", "both_empty")
WHOLE = Label(ALL_LABELS, "")
METRIC_WORDS = {
    "dice": "Dice",
    "nsd": "NSD",
    "hd95_mm": "mm HD95",
    "assd_mm": "mm ASSD",
    "hd_mm": "mm HD",
    "masd_mm": "mm MASD",
    "iou": "IoU",
    "boundary_iou": "boundary IoU",
    "cldice": "clDice",
    "precision": "precision",
    "recall": "recall",
    "volume_error_ml": "ml volume error",
}
DEFINITIONS = {
    "difference": "First method minus second, on the same case and label. The mean and its 95% bootstrap interval "
    "(BCa, else percentile, widened for few cases) are those of the finite differences, their number is n_finite.",
    "better": "Whether more is better depends on the measure: yes for overlaps (Dice, IoU, NSD, precision, recall), no "
    "for distances and volume errors.",
    "p_permutation": "Paired permutation test of the mean difference, two-sided: signs are flipped, all 2ⁿ ways up to "
    f"16 cases, else {PERMUTATIONS:,} random ones, or 100 for each p-value of the family where that is more, with "
    f"p = (k + 1)/(flips + 1); it ends after the first {PERMUTATIONS:,} where 100 of them are as extreme. Where a "
    "difference is infinite it tests the sum of signed ranks. 1 where nothing differs.",
    "p_wilcoxon": "Wilcoxon's signed-rank test, two-sided; cases without a difference are left out, tied ranks "
    "averaged; exact up to 100 cases, else by the normal approximation.",
    "p_holm": "p_permutation adjusted by Holm's method. The family is all labels and all pairs of methods for one "
    "measure; of the rows over all labels it is all pairs of methods. p_wilcoxon_holm is that for the other test.",
    "rank_biserial": "Effect size: the rank sum of differences in favour of the first method minus that of the "
    "second, over both: 1 where the first is always better, −1 where the second is.",
    "cohens_dz": "Mean difference over the standard deviation of differences, positive where the first method is "
    "better; not given where a difference is infinite.",
    "infinite": "A distance is infinite where only one of prediction and reference has the label. Infinite minus "
    "finite is ±infinite and has the largest rank; infinite minus infinite is 0.",
    "left out": "A case in which either method has no value is left out of the pair and counted: n_undefined where "
    "neither has one (the label is in neither map), n_one_undefined where one has none.",
    "all labels": "Mean of each case over its labels that have a value, then compared over cases. Ranks are those of "
    "each case and label, averaged.",
    "rank": "Each case is ranked by each measure: 1 is best, ties share the average. No prediction is worst; correctly "
    "finding nothing is best. Places are those of the mean ranks; their shares and intervals, and Kendall's τ between "
    "order and resampled order, come from bootstrap resamples (Wiesenfarth et al. 2021).",
    "cases needed": "Cases, or patients where reports name them, after which a two-sided test at 5% finds a difference "
    "like the one observed with a chance of 80%, if mean and spread of differences stay as they are: "
    "((1.96 + 0.84) · SD / mean)².",
    "patients": "Where reports name patients, tests count each patient once, by the mean of its differences, and "
    "intervals and ranks resample patients.",
    "worst": "missed: only the reference has the label. spurious: only the prediction has it.",
}


def comparisons(aligned: Aligned, progress: Progress = silent) -> pd.DataFrame:
    """One row per label (and one for all), measure and pair of methods, with adjusted p-values."""
    planned = [
        (label, metric, values, a, b)
        for metric in aligned.values
        for label, values in _by_label(aligned, metric)
        for a, b in combinations(range(len(aligned.methods)), 2)
    ]
    tests_together = len(aligned.labels) * math.comb(len(aligned.methods), 2)
    tests = compare_pairs(_fed(planned, progress), groups=aligned.groups, family=tests_together)
    rows = [_row(aligned, *plan, test) for plan, test in zip(planned, tests)]
    families: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault((row["metric"], row["label"] == ""), []).append(row)
    for family in families.values():
        _adjust(family)
    table = pd.DataFrame(rows)
    return table.astype({name: "Int64" for name in table.columns if name == "n" or name.startswith("n_")})


def rankings(aligned: Aligned) -> pd.DataFrame:
    """One row per label (and one for all), measure and method."""
    units = list(aligned.groups or aligned.cases)
    planned: list[tuple[Label, str, Floats, list[str]]] = []
    for metric in aligned.values:
        scores = _scores(aligned, metric)
        planned.append((WHOLE, metric, scores.reshape(len(scores), -1), units * len(aligned.labels)))
        planned += [(label, metric, scores[:, n], units) for n, label in enumerate(aligned.labels)]
    found = rank_all((scores, HIGHER_IS_BETTER[metric], groups) for _, metric, scores, groups in planned)
    rows = [
        row for (label, metric, *_), ranking in zip(planned, found) for row in _ranked(aligned, label, metric, ranking)
    ]
    return pd.DataFrame(rows).astype({"place_low": "Int64", "place_high": "Int64"})


def summary(aligned: Aligned, table: pd.DataFrame, ranking: pd.DataFrame) -> dict[str, Any]:
    """What summary.json holds; strict JSON: infinite is "inf" or "-inf", NaN is null."""
    definitions = {term: text for method in aligned.methods for term, text in method.definitions.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "n_cases": len(aligned.cases),
        "n_groups": None if aligned.groups is None else len(set(aligned.groups)),
        "findings": findings(aligned, table, ranking),
        "methods": _methods(aligned),
        "labels": [dataclasses.asdict(label) for label in aligned.labels],
        "metrics": list(aligned.values),
        "cases": list(aligned.cases),
        "left_out": {name: list(cases) for name, cases in aligned.left_out.items()},
        "comparisons": [_plain(row) for row in table.to_dict("records")],
        "ranking": [_plain(row) for row in ranking.to_dict("records")],
        "warnings": list(aligned.warnings),
        "definitions": {
            **{term: text for term, text in definitions.items() if term in (*aligned.values, "surface", "ignore")},
            **DEFINITIONS,
        },
        "versions": versions("medseg", "numpy", "scipy", "pandas"),
    }


def findings(aligned: Aligned, table: pd.DataFrame, ranking: pd.DataFrame) -> list[str]:
    """Sentences on the first measure over all labels: the method that ranks first against each other one."""
    metric = next(iter(aligned.values))
    rows = table[(table["label"] == "") & (table["metric"] == metric)]
    order = ranking[(ranking["label"] == "") & (ranking["metric"] == metric)].sort_values("place", kind="stable")
    best = order["method"].iloc[0]
    concerned = rows[(rows["a"] == best) | (rows["b"] == best)].to_dict("records")
    several = "mean " if len(aligned.labels) > 1 else ""
    return [sentence(row, several=several, grouped=aligned.groups is not None) for row in concerned]


def is_shown(row: Mapping[Any, Any]) -> bool:
    """Whether a row shows a difference: adjusted p below 0.05, and an interval, if there is one, that leaves out 0."""
    if row["p_holm"] is None or not row["p_holm"] < SIGNIFICANCE:
        return False
    if row["n_finite"] < row["n_cases"]:
        # the ranks decide: the mean does not know of what was missed
        return True
    return not math.isnan(row["ci95_low"]) and row["ci95_low"] * row["ci95_high"] > 0


def first_is_better(row: Mapping[Any, Any]) -> bool:
    """Whether the first method is the better one, by the mean, or by ranks where a difference is infinite."""
    if row["n_finite"] < row["n_cases"]:
        return bool(row["rank_biserial"] > 0)
    return bool((row["mean_difference"] > 0) == HIGHER_IS_BETTER[row["metric"]])


def sentence(row: Mapping[Any, Any], *, several: str = "", grouped: bool = False) -> str:
    """What one row of the table says, with its uncertainty. `several`: a word before the measure, such as `mean `."""
    words = METRIC_WORDS[row["metric"]]
    unit, measure = words.split(" ", 1) if row["metric"].endswith(("_mm", "_ml")) else ("", words)
    over = counted(row["n_cases"], "case") + (f" of {counted(row['n'], 'patient')}" if grouped else "")
    if not row["n"]:
        return f"{row['a']} and {row['b']} have no case in common that has a {measure}."
    p = p_words(row["p_holm"])
    gap = "no finite difference" if _absent(row["mean_difference"]) else _gap(row, unit, several, measure)
    if not is_shown(row):
        start = (
            f"No difference in {several}{measure} was shown between {row['a']} and {row['b']} over {over}: {gap}, {p}."
        )
        return start + _needed(row, "patients" if grouped else "cases")
    first = first_is_better(row)
    better, worse = (row["a"], row["b"]) if first else (row["b"], row["a"])
    if row["n_finite"] == row["n_cases"]:
        return (
            f"{better} is better than {worse} by {_gap(row, unit, several, measure, absolute=True)} over {over}, {p}."
        )
    won, lost = (row["n_better"], row["n_worse"]) if first else (row["n_worse"], row["n_better"])
    events = f"better in {won}, worse in {lost}, equal in {row['n_equal']}"
    return f"{better} is better than {worse} in {several}{measure} over {over}: {events}, {p}; {gap}."


def p_words(p: float | None) -> str:
    """`p = 0.012`, or `p < 0.001`."""
    if p is None or math.isnan(p):
        return "p not defined"
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _gap(row: Mapping[Any, Any], unit: str, several: str, measure: str, absolute: bool = False) -> str:
    digits = 2 if unit else 3
    values = [row["mean_difference"], row["ci95_low"], row["ci95_high"]]
    if absolute and values[0] < 0:
        values = [-values[0], -values[2], -values[1]]
    difference, low, high = (f"{v:.{digits}f}".replace("-", "−") for v in values)
    interval = f" [{low}, {high}]" if not math.isnan(values[1]) else " (too few cases for an interval)"
    name = f" {unit}" if unit else ""
    if absolute:
        return f"{difference}{name} {several}{measure}{interval}"
    over = f", finite only ({row['n_finite']})" if row["n_finite"] < row["n_cases"] else ""
    return f"{row['a']} − {row['b']} = {difference}{name}{interval}{over}"


def _needed(row: Mapping[Any, Any], units: str) -> str:
    if row["n_finite"] < row["n_cases"] or _absent(row["n_needed"]) or row["n_needed"] <= row["n"]:
        return ""
    return f" With the observed spread about {row['n_needed']:,} {units} would be needed to show such a difference."


def _by_label(aligned: Aligned, metric: str) -> Iterator[tuple[Label, Floats]]:
    yield WHOLE, aligned.mean_over_labels(metric)
    for n, label in enumerate(aligned.labels):
        yield label, aligned.values[metric][:, n]


def _fed(
    planned: Sequence[tuple[Label, str, Floats, int, int]], progress: Progress
) -> Iterator[tuple[Floats, Floats, bool]]:
    for done, (_, metric, values, a, b) in enumerate(planned, start=1):
        yield values[a], values[b], HIGHER_IS_BETTER[metric]
        progress("compare", done, len(planned))


def _row(
    aligned: Aligned, label: Label, metric: str, values: Floats, a: int, b: int, test: PairedTest
) -> dict[str, Any]:
    both = np.isfinite(values[a]) & np.isfinite(values[b])
    low, high = test.ci95 or (math.nan, math.nan)
    return {
        "label": label.value,
        "name": label.name,
        "metric": metric,
        "a": aligned.methods[a].name,
        "b": aligned.methods[b].name,
        "n": test.n,
        "n_cases": test.n_cases,
        "n_finite": test.n_finite,
        "n_undefined": test.n_undefined,
        "n_one_undefined": test.n_one_undefined,
        "mean_a": _mean(values[a][both]),
        "mean_b": _mean(values[b][both]),
        "mean_difference": _number(test.mean_difference),
        "ci95_low": low,
        "ci95_high": high,
        "median_difference": _number(test.median_difference),
        "p_wilcoxon": _number(test.p_wilcoxon),
        "p_permutation": _number(test.p_permutation),
        "p_holm": math.nan,
        "p_wilcoxon_holm": math.nan,
        "rank_biserial": _number(test.rank_biserial),
        "cohens_dz": _number(test.cohens_dz),
        "n_better": test.better,
        "n_worse": test.worse,
        "n_equal": test.equal,
        "n_needed": _cases_needed(test),
        "needed_of": "cases" if aligned.groups is None else "patients",
        **{
            f"n_{event}_{side}": _events(aligned, label, method)[event]
            for event in EVENTS
            for side, method in (("a", a), ("b", b))
        },
    }


def _cases_needed(test: PairedTest) -> int | None:
    # of a difference that is next to nothing nobody wants to be told how many cases would show it
    if test.cohens_dz is None or abs(test.cohens_dz) < _SMALLEST_EFFECT:
        return None
    return cases_to_show(1.0, abs(test.cohens_dz))


def _adjust(rows: Sequence[dict[str, Any]]) -> None:
    for source, target in (("p_permutation", "p_holm"), ("p_wilcoxon", "p_wilcoxon_holm")):
        for row, p in zip(rows, holm([row[source] for row in rows])):
            row[target] = p


def _events(aligned: Aligned, label: Label, method: int) -> dict[str, int]:
    status = aligned.status[method]
    if label is not WHOLE:
        status = status[aligned.labels.index(label)]
    return {event: int((status == event).sum()) for event in EVENTS}


def _scores(aligned: Aligned, metric: str) -> Floats:
    """Values to rank: what was rightly not found is better than any number, no prediction NaN.

    A case in which nobody has a value is NaN for all, unless one rightly found nothing and another has no prediction.
    """
    values, empty = aligned.values[metric], aligned.status == "both_empty"
    best = math.inf if HIGHER_IS_BETTER[metric] else -math.inf
    scores = np.where(empty, best, values)
    told_apart = empty.any(axis=0) & (aligned.status == "missing_prediction").any(axis=0)
    nobody = (empty | np.isnan(values)).all(axis=0) & ~told_apart
    return np.where(nobody, np.nan, scores)


def _ranked(aligned: Aligned, label: Label, metric: str, found: Ranking) -> list[dict[str, Any]]:
    rows = []
    for n, method in enumerate(aligned.methods):
        low, high = (None, None) if found.place_ci95 is None else map(int, found.place_ci95[n])
        rows.append(
            {
                "label": label.value,
                "name": label.name,
                "metric": metric,
                "method": method.name,
                "place": int(found.place[n]),
                "mean_rank": float(found.mean_rank[n]),
                "first_share": math.nan if found.first_share is None else float(found.first_share[n]),
                "place_low": low,
                "place_high": high,
                "n": found.n,
                "kendall_tau": _number(found.kendall_tau),
            }
        )
    return rows


def _methods(aligned: Aligned) -> list[dict[str, Any]]:
    wanted = [
        (n, metric, *of)
        for n in range(len(aligned.methods))
        for metric in aligned.values
        for of in _by_label(aligned, metric)
    ]
    found = summarise_all((values[n] for n, _, _, values in wanted), groups=aligned.groups)
    methods: list[dict[str, Any]] = [
        {
            "name": method.name,
            "report": str(method.source),
            "kind": method.kind,
            "n_cases": int(method.table["case"].nunique()),
            "n_failed": len(method.failed),
            "foreground": {},
            "labels": {label.name: {} for label in aligned.labels},
        }
        for method in aligned.methods
    ]
    for (n, metric, label, _), one in zip(wanted, found):
        method = methods[n]
        place = method["foreground"] if label is WHOLE else method["labels"][label.name]
        events = {f"n_{event}": count for event, count in _events(aligned, label, n).items()}
        place[metric] = {**_plain(dataclasses.asdict(one)), **events}
    return methods


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _json(value) for key, value in row.items()}


def _json(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    if isinstance(value, tuple | list):
        return [_json(v) for v in value]
    if isinstance(value, bool | int | str):
        return value
    if math.isnan(value):
        return None
    return ("inf" if value > 0 else "-inf") if math.isinf(value) else float(value)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _absent(value: Any) -> bool:
    return value is None or value is pd.NA or math.isnan(value)
