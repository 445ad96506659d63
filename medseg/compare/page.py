"""The page compare.html: a comparison laid out for a reader, in one file that needs no network; no statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from medseg.compare.alignment import HIGHER_IS_BETTER, Aligned, Label
from medseg.compare.charts import against, difference_axis, differences_strip
from medseg.compare.results import METRIC_WORDS, WHOLE, first_is_better, is_shown, p_words, sentence
from medseg.config import COLOURS
from medseg.report.charts import MAX_DOTS, dots_per_label
from medseg.report.page import environment, figure
from medseg.statistics import differences_of

# further pairs of methods are in the tables only
MAX_PAIRS = 6
MAX_DISAGREEMENTS = 8
MAX_TEST_ROWS = 3000
# more numbers than these make the page slow to open: dots then do not tell their case
MAX_TOLD = 150_000
# the measures of the summary; the first that all reports have is that of the charts
HEADLINES = ("dice", "nsd", "hd95_mm")
METRIC_NAMES = {
    "dice": "Dice",
    "nsd": "NSD",
    "hd95_mm": "HD95 (mm)",
    "assd_mm": "ASSD (mm)",
    "hd_mm": "HD (mm)",
    "masd_mm": "MASD (mm)",
    "iou": "IoU",
    "boundary_iou": "Boundary IoU",
    "cldice": "clDice",
    "precision": "Precision",
    "recall": "Recall",
    "volume_error_ml": "Volume error (ml)",
}
TERM_NAMES = {
    **{metric: name.split(" (")[0] for metric, name in METRIC_NAMES.items()},
    "surface": "Surface",
    "ignore": "Ignored voxels",
    "difference": "Difference",
    "better": "Better",
    "p_permutation": "p, permutation",
    "p_wilcoxon": "p, Wilcoxon",
    "p_holm": "p (Holm)",
    "rank_biserial": "Effect",
    "cohens_dz": "Cohen's d",
    "infinite": "Infinite distances",
    "left out": "Left out",
    "all labels": "All labels",
    "rank": "Ranks and places",
    "cases needed": "Sample size",
    "patients": "Patients",
    "worst": "Missed, spurious",
}


@dataclass(frozen=True)
class DifferenceRow:
    """A label's differences: the strip, and what its tests say (`winner` is empty where nothing is shown)."""

    label: Label
    index: int
    chart: Markup
    test: Mapping[Any, Any]
    winner: str
    p: str


@dataclass(frozen=True)
class Disagreement:
    """A case and label on which two methods are furthest apart."""

    case: str
    label: Label
    values: tuple[float, float]
    difference: float
    status: tuple[str, str]


@dataclass(frozen=True)
class PairView:
    """Two methods against each other, the better one first, on the measure of the charts."""

    a: str
    b: str
    indices: tuple[int, int]
    sentences: Sequence[str]
    rows: Sequence[DifferenceRow]
    ticks: Sequence[tuple[float, str]]
    beyond: bool
    thinned: bool
    scatter: Markup | None
    disagreements: Sequence[Disagreement]


@dataclass(frozen=True)
class MethodView:
    """A line of the order of methods, and its numbers by label."""

    name: str
    place: int
    mean_rank: float
    first_share: float
    places: str
    whole: Mapping[str, Any]
    labels: Mapping[str, Mapping[str, Any]]
    kind: str


def render(aligned: Aligned, table: pd.DataFrame, ranking: pd.DataFrame, summary: Mapping[str, Any]) -> str:
    """The whole page as text. Names are escaped; nothing is loaded from elsewhere."""
    headlines = [metric for metric in HEADLINES if metric in aligned.values] or [next(iter(aligned.values))]
    metric = headlines[0]
    methods = _methods(metric, ranking, summary)
    pairs = [_pair_view(aligned, methods, headlines, rows) for rows in _pairs(methods, table)]
    n_pairs = len(methods) * (len(methods) - 1) // 2
    tests = table.head(MAX_TEST_ROWS)
    repeated = len(aligned.labels) > len(COLOURS)
    whole = ranking[(ranking["label"] == "") & (ranking["metric"] == metric)]
    return (
        environment()
        .get_template("compare.html.jinja")
        .render(
            summary=summary,
            metric=metric,
            headlines=headlines,
            higher=HIGHER_IS_BETTER,
            methods=methods,
            labels=aligned.labels,
            several=len(aligned.labels) > 1,
            colours={label.name: COLOURS[n % len(COLOURS)] for n, label in enumerate(aligned.labels)},
            marks={label.name: label.value if repeated else "" for label in aligned.labels},
            pairs=pairs,
            leaders=[*_leaders(ranking, headlines[1:]), _events(aligned, methods, metric)],
            n_more_pairs=n_pairs - len(pairs),
            kendall_tau=whole["kendall_tau"].iloc[0],
            turned=_turned(metric, methods),
            tests=[_test(row) for row in tests.to_dict("records")],
            n_tests=len(table),
            data=_told(aligned, metric),
            metric_names=METRIC_NAMES,
            names=TERM_NAMES,
        )
    )


def _methods(metric: str, ranking: pd.DataFrame, summary: Mapping[str, Any]) -> list[MethodView]:
    places = ranking[(ranking["label"] == "") & (ranking["metric"] == metric)].set_index("method")
    views = []
    for method in summary["methods"]:
        row = places.loc[method["name"]]
        low, high = row["place_low"], row["place_high"]
        views.append(
            MethodView(
                name=method["name"],
                place=int(row["place"]),
                mean_rank=float(row["mean_rank"]),
                first_share=float(row["first_share"]),
                places="–" if pd.isna(low) else str(low) if low == high else f"{low} to {high}",
                whole=method["foreground"],
                labels=method["labels"],
                kind=method["kind"],
            )
        )
    return sorted(views, key=lambda view: view.mean_rank)


def _turned(metric: str, methods: Sequence[MethodView]) -> str:
    """Why the method with the best mean is not the first one, where that is so."""
    means = {view.name: view.whole[metric]["mean"] for view in methods}
    known = {name: mean for name, mean in means.items() if isinstance(mean, float) and math.isfinite(mean)}
    first = methods[0].name
    if metric.endswith(("_mm", "_ml")) or first not in known:
        return ""
    best = max(known, key=lambda name: known[name])
    if known[best] <= known[first]:
        return ""
    absent = {view.name: view.whole[metric]["n_missing_prediction"] for view in methods}
    # the mean knows nothing of cases without a prediction, and a rank nothing of how far apart two methods are
    why = "ahead more often, but by less" if absent[best] <= absent[first] else "cases without a prediction rank last"
    return f"{best} has the higher mean {METRIC_NAMES[metric]}, yet {first} is first: {why}."


def _leaders(ranking: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    lines = []
    for metric in metrics:
        rows = ranking[(ranking["label"] == "") & (ranking["metric"] == metric)]
        first = rows[rows["place"] == 1]
        if len(first) > 1:
            lines.append(f"In {METRIC_NAMES[metric]} {' and '.join(first['method'])} share the best mean rank.")
            continue
        share = first["first_share"].iloc[0]
        firm = "" if math.isnan(share) else f", first in {100 * share:.0f}% of resamples"
        lines.append(f"In {METRIC_NAMES[metric]} {first['method'].iloc[0]} has the best mean rank{firm}.")
    return lines


def _events(aligned: Aligned, methods: Sequence[MethodView], metric: str) -> str:
    parts = []
    for key, word in (
        ("n_missed", "Missed"),
        ("n_spurious", "Spurious"),
        ("n_missing_prediction", "Without prediction"),
    ):
        counts = [view.whole[metric][key] for view in methods]
        if key != "n_missing_prediction" or any(counts):
            parts.append(f"{word}: {', '.join(f'{view.name} {count}' for view, count in zip(methods, counts))}")
    n = len(aligned.cases) * len(aligned.labels)
    return f"{'. '.join(parts)} (of {n} labels in {len(aligned.cases)} cases)."


def _pairs(methods: Sequence[MethodView], table: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each pair to draw: the method that ranks first against each other one, then the second, and so on."""
    order = {view.name: n for n, view in enumerate(methods)}
    by_pair = [rows for _, rows in table.groupby(["a", "b"], sort=False)]
    by_pair.sort(key=lambda rows: sorted((order[rows["a"].iloc[0]], order[rows["b"].iloc[0]])))
    return by_pair[:MAX_PAIRS]


def _pair_view(
    aligned: Aligned, methods: Sequence[MethodView], headlines: Sequence[str], rows: pd.DataFrame
) -> PairView:
    metric, a, b = headlines[0], str(rows["a"].iloc[0]), str(rows["b"].iloc[0])
    numbers = {method.name: n for n, method in enumerate(aligned.methods)}
    first, second = numbers[a], numbers[b]
    views = sorted((view for view in methods if view.name in (a, b)), key=lambda view: view.name != a)
    values = aligned.values[metric]
    differences = differences_of(values[first], values[second])
    whole = aligned.mean_over_labels(metric)
    tests = {(row["metric"], row["label"], row["name"]): row for row in rows.to_dict("records")}
    of_metric = [tests[metric, label.value, label.name] for label in aligned.labels]
    overall = tests[metric, WHOLE.value, WHOLE.name]
    lines = [(WHOLE, -1, differences_of(whole[first], whole[second]), overall)] if len(aligned.labels) > 1 else []
    lines += [(label, n, differences[n], of_metric[n]) for n, label in enumerate(aligned.labels)]
    ends = [test[end] for *_, test in lines for end in ("ci95_low", "ci95_high")]
    scale, beyond = difference_axis(differences, ends)
    limit = dots_per_label(len(lines))
    return PairView(
        a=a,
        b=b,
        indices=(first, second),
        sentences=[*_sentences(aligned, tests, headlines, of_metric), _events(aligned, views, metric)],
        rows=[_difference_row(*line, scale=scale, limit=limit) for line in lines],
        ticks=scale.ticks,
        beyond=beyond,
        thinned=len(aligned.cases) > limit,
        scatter=_scatter(aligned, metric, first, second) if not metric.endswith(("_mm", "_ml")) else None,
        disagreements=_disagreements(aligned, values, differences, first, second),
    )


def _sentences(
    aligned: Aligned,
    tests: Mapping[Any, Mapping[Any, Any]],
    headlines: Sequence[str],
    of_metric: Sequence[Mapping[Any, Any]],
) -> list[str]:
    several = "mean " if len(aligned.labels) > 1 else ""
    grouped = aligned.groups is not None
    lines = [sentence(tests[metric, WHOLE.value, WHOLE.name], several=several, grouped=grouped) for metric in headlines]
    if len(of_metric) > 1:
        lines.append(_by_label(of_metric, METRIC_WORDS[headlines[0]]))
    return lines


def _by_label(rows: Sequence[Mapping[Any, Any]], words: str) -> str:
    wins: dict[str, list[str]] = {rows[0]["a"]: [], rows[0]["b"]: []}
    open_ = []
    for row in rows:
        if is_shown(row):
            wins[row["a"] if first_is_better(row) else row["b"]].append(row["name"])
        else:
            open_.append(row["name"])
    parts = [f"{method} is better for {_some(names)}" for method, names in wins.items() if names]
    parts += [f"no difference was shown for {_some(open_)}"] if open_ else []
    return f"{words} by label: {'; '.join(parts)}."


def _some(names: Sequence[str]) -> str:
    more = len(names) - 8
    return ", ".join(names[:8]) + (f" and {more} more" if more > 0 else "")


def _difference_row(
    label: Label, index: int, differences: Any, test: Mapping[Any, Any], *, scale: Any, limit: int
) -> DifferenceRow:
    known = not math.isnan(test["ci95_low"])
    interval = (test["ci95_low"], test["mean_difference"], test["ci95_high"]) if known else None
    metric = test["metric"]
    text = f"Differences of {test['n_cases']} cases for {label.name}"
    if known:
        text += f": mean {figure(test['mean_difference'], metric)}, 95% interval {figure(test['ci95_low'], metric)} to "
        text += figure(test["ci95_high"], metric)
    winner = (test["a"] if first_is_better(test) else test["b"]) if is_shown(test) else ""
    chart = differences_strip(differences, scale, text, interval=interval, limit=limit)
    return DifferenceRow(label, index, chart, test, winner, _p(test["p_holm"]))


def _scatter(aligned: Aligned, metric: str, first: int, second: int) -> Markup:
    x, y = aligned.values[metric][first].ravel(), aligned.values[metric][second].ravel()
    a, b = aligned.methods[first].name, aligned.methods[second].name
    above, below = int((y > x).sum()), int((y < x).sum())
    name = METRIC_NAMES[metric]
    text = f"{name} of {b} against {a}: higher for {b} in {above} dots, for {a} in {below}"
    return against(x, y, (f"{name}, {_short(a)}", f"{name}, {_short(b)}"), text, limit=8 * MAX_DOTS)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:11]}…{name[-11:]}"


def _disagreements(aligned: Aligned, values: Any, differences: Any, first: int, second: int) -> list[Disagreement]:
    sizes = np.nan_to_num(np.abs(differences), nan=-1.0, posinf=np.inf)
    found = []
    for flat in np.argsort(-sizes, axis=None, kind="stable")[:MAX_DISAGREEMENTS]:
        label, case = np.unravel_index(flat, sizes.shape)
        if sizes[label, case] <= 0:
            break
        found.append(
            Disagreement(
                case=aligned.cases[case],
                label=aligned.labels[label],
                values=(float(values[first, label, case]), float(values[second, label, case])),
                difference=float(differences[label, case]),
                status=(str(aligned.status[first, label, case]), str(aligned.status[second, label, case])),
            )
        )
    return found


def _test(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        **{str(key): None if value is pd.NA else value for key, value in row.items()},
        "winner": (row["a"] if first_is_better(row) else row["b"]) if is_shown(row) else "",
        **{f"{p}_words": _p(row[p]) for p in ("p_permutation", "p_wilcoxon", "p_holm")},
    }


def _p(p: float) -> str:
    words = p_words(p)
    return "–" if words.endswith("defined") else words.removeprefix("p = ").removeprefix("p ")


def _told(aligned: Aligned, metric: str) -> dict[str, Any] | None:
    """What dots tell of themselves: values of each method, label and case, the mean over labels last."""
    values = aligned.values[metric]
    if values.size > MAX_TOLD:
        return None
    whole = aligned.mean_over_labels(metric)[:, None]
    return {
        "cases": list(aligned.cases),
        "methods": [method.name for method in aligned.methods],
        "values": [
            [[_written(v, metric) for v in row] for row in of] for of in np.concatenate([values, whole], axis=1)
        ],
    }


def _written(value: float, metric: str) -> str:
    return figure(float(value), metric)
