"""From trials to numbers: scores by case over seeds, their means with intervals, and paired differences; no files."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import medseg

Scores = Mapping[str, float]
NO_MASK = "missing_prediction"


@dataclass(frozen=True)
class Outcome:
    """What the finished trials of one variant measured.

    `scores` maps a measure (`dice`: mean over the labels of a case) to its value for each case, mean over seeds;
    `labels` does so for the Dice of each label; `by_seed` has the mean Dice of each seed. `cases` were held back, and
    those `without_mask` lack one in some seed. `empty_share`: of a case that has a Dice in some seeds alone, the share
    of seeds in which neither its mask nor its reference has any label.
    """

    scores: Mapping[str, Scores]
    labels: Mapping[str, Scores]
    by_seed: tuple[float, ...]
    missed: float
    spurious: float
    cases: tuple[str, ...] = ()
    without_mask: tuple[str, ...] = ()
    empty_share: Mapping[str, float] = field(default_factory=dict)

    @property
    def empty(self) -> frozenset[str]:
        """Cases in which neither the mask nor the reference has any label: no Dice, and nothing wrong."""
        return frozenset(self.cases) - set(self.without_mask) - set(self.scores.get("dice", {}))


@dataclass(frozen=True)
class Difference:
    """Mean over `n` cases that both have of `first` − `second`, with its bootstrap interval."""

    mean: float
    ci95: tuple[float, float] | None
    n: int
    first: float
    second: float


def outcome(results: Sequence[Mapping[str, Any]], more: Sequence[Mapping[str, Scores]] = ()) -> Outcome:
    """`results`: the result.json of each seed; `more`: further measures of each seed, by case."""
    labels = [_by_label(result["rows"]) for result in results]
    dice = [_mean_over(list(of.values())) for of in labels]
    events = [[row["status"] for row in result["rows"]] for result in results]
    scores = {"dice": _mean_over(dice)}
    empty = [_empty(result, of) for result, of in zip(results, dice)]
    rows = [row for result in results for row in result["rows"]]
    without = {row["case"] for row in rows if row["status"] == NO_MASK}
    without |= {case for result in results for case in result.get("failed_cases", {})}
    for measure in dict.fromkeys(name for seed in more for name in seed):
        scores[measure] = _mean_over([seed[measure] for seed in more if measure in seed])
    return Outcome(
        scores=scores,
        labels={
            name: _mean_over([of.get(name, {}) for of in labels])
            for name in dict.fromkeys(n for of in labels for n in of)
        },
        by_seed=tuple(statistics.fmean(seed.values()) for seed in dice if seed),
        missed=statistics.fmean(e.count("missed") for e in events),
        spurious=statistics.fmean(e.count("spurious") for e in events),
        cases=tuple(sorted({row["case"] for row in rows} | without)),
        without_mask=tuple(sorted(without)),
        empty_share={
            case: times / (times + sum(case in of for of in dice))
            for case in scores["dice"]
            if (times := sum(case in cases for cases in empty))
        },
    )


def rows_of(report: medseg.Report) -> list[dict[str, Any]]:
    """Case, label, status and Dice of a report, as `outcome` takes them; None: neither map has the label."""
    rows = report.table[["case", "name", "status", "dice"]].to_dict("records")
    return [{str(k): v for k, v in row.items()} | {"dice": _or_none(row["dice"])} for row in rows]


def mean_of(scores: Scores, *, groups: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Mean, 95 % bootstrap interval over cases (patients where `groups` names them) and number of cases."""
    summary = medseg.summarise(list(scores.values()), groups=_units(scores, groups))
    return {"mean": summary.mean, "ci95": None if summary.ci95 is None else list(summary.ci95), "n": summary.n}


def difference(
    first: Outcome | None, second: Outcome | None, measure: str = "dice", *, groups: Mapping[str, str] | None = None
) -> Difference | None:
    """`first` − `second` over the cases that both have; None where one is missing or no case is common."""
    if first is None or second is None:
        return None
    one, other = comparable((first, second), measure)
    if not one:
        return None
    pairs = {case: one[case] - other[case] for case in one}
    summary = medseg.summarise(list(pairs.values()), groups=_units(pairs, groups))
    return Difference(
        mean=statistics.fmean(pairs.values()),
        ci95=summary.ci95,
        n=len(pairs),
        first=statistics.fmean(one.values()),
        second=statistics.fmean(other.values()),
    )


def comparable(outcomes: Sequence[Outcome], measure: str = "dice") -> list[Scores]:
    """The scores of each over the cases that all have.

    Where one is rightly empty and another has painted something, that one's Dice is 1: else nobody would be worse for
    what is found in healthy cases. Of several seeds, each that is rightly empty counts so.
    """
    scores = [_with_empty(outcome) if measure == "dice" else outcome.scores.get(measure, {}) for outcome in outcomes]
    empty = [outcome.empty if measure == "dice" else frozenset() for outcome in outcomes]
    named = dict.fromkeys(case for found in scores for case in found)
    common = [case for case in named if all(case in found or case in none for found, none in zip(scores, empty))]
    return [{case: found.get(case, 1.0) for case in common} for found in scores]


def _with_empty(outcome: Outcome) -> Scores:
    """The Dice of the cases that have one, in which each seed that is rightly empty counts 1."""
    shares = {case: outcome.empty_share.get(case, 0.0) for case in outcome.scores.get("dice", {})}
    return {case: share + (1 - share) * outcome.scores["dice"][case] for case, share in shares.items()}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _by_label(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Dice by label and case; where neither map has the label, or no mask was made, there is none."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        of_label = found.setdefault(row["name"], {})
        if row["dice"] is not None and row["status"] != NO_MASK:
            of_label[row["case"]] = row["dice"]
    return found


def _empty(result: Mapping[str, Any], dice: Scores) -> set[str]:
    """The cases of one seed with a mask and without a Dice: neither map has any label."""
    without = {row["case"] for row in result["rows"] if row["status"] == NO_MASK} | set(result.get("failed_cases", {}))
    cases: set[str] = {row["case"] for row in result["rows"]}
    return cases - without - set(dice)


def _mean_over(parts: Sequence[Scores]) -> dict[str, float]:
    """For each case the mean of the parts that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for case, value in part.items():
            values[case].append(value)
    return {case: statistics.fmean(values[case]) for case in sorted(values)}


def _units(cases: Iterable[str], groups: Mapping[str, str] | None) -> list[str] | None:
    return None if groups is None else [groups.get(case, case) for case in cases]
