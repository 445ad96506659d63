"""Which network, which post-processing, and whether an ensemble pays: decided by paired Dice, with reasons; no files.

What is judged here saw every case once, by models that did not train on it. What the folds chose for themselves they
chose on the very cases that they are judged on; so a fold's cases are cleaned as the *other* folds would have it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medseg_pipelines.compare import Difference, Outcome, comparable, difference, mean_of

Groups = Mapping[str, str]
Postprocess = Mapping[str, Any]

# the rules by which a single training chooses its windows and copies: see medseg.calibrate
LEAST_GAIN = 0.0005
MARGIN = 0.001
NOISE = 0.1


@dataclass(frozen=True)
class Method:
    """One way to segment new cases, and how it did on all cases out of fold.

    `networks`: entries whose folds are averaged; `postprocess`: what is laid over for new cases; `seconds` for a case
    of one fold's model (None: not known, or not comparable); `devices` that these were taken on.
    """

    name: str
    networks: tuple[str, ...]
    outcome: Outcome
    postprocess: Postprocess = field(default_factory=dict)
    cleaned: bool = False
    seconds: float | None = None
    devices: frozenset[str] = frozenset()

    @property
    def dice(self) -> Mapping[str, float]:
        """Mean Dice over its labels of each case."""
        return self.outcome.scores["dice"]


def vote(choices: Sequence[Postprocess]) -> dict[str, Any]:
    """What more than half of the folds chose, label by label; of minimum sizes the smallest that one of them chose."""
    found: dict[str, Any] = {}
    for key in ("largest_component", "fill_holes"):
        named = [name for choice in choices for name in choice.get(key, ())]
        kept = [name for name in dict.fromkeys(named) if 2 * named.count(name) > len(choices)]
        if kept:
            found[key] = sorted(kept)
    sizes: dict[str, list[float]] = {}
    for choice in choices:
        for name, size in choice.get("min_size_mm3", {}).items():
            sizes.setdefault(name, []).append(size)
    smallest = {name: min(each) for name, each in sorted(sizes.items()) if 2 * len(each) > len(choices)}
    return found | ({"min_size_mm3": smallest} if smallest else {})


def vote_of_others(choices: Mapping[int, Postprocess], fold: int) -> dict[str, Any]:
    """What the folds other than `fold` would have done to its cases; {} where there are no others."""
    return vote([choice for number, choice in choices.items() if number != fold])


def choose_cleaning(plain: Method, cleaned: Method, groups: Groups | None = None) -> tuple[Method, str]:
    """The cleaned masks where they surely help, and why."""
    gain = difference(cleaned.outcome, plain.outcome, groups=groups)
    lacking = len(cleaned.outcome.without_mask) > len(plain.outcome.without_mask)
    chosen = cleaned if _pays(gain) and not lacking else plain
    which = "is used" if chosen is cleaned else "is left out"
    why = ", it lacks masks" if lacking else _condition(gain)
    return chosen, f"{plain.name}: post-processing {which}: {_words(gain)}{why}"


def choose_single(methods: Sequence[Method], groups: Groups | None = None) -> tuple[Method, str]:
    """The method of the highest mean Dice, or one within `MARGIN` of it that is faster by more than `NOISE`.

    One that lacks masks which another has is out; means are over the cases that all the others have.
    """
    fewest = min(len(m.outcome.without_mask) for m in methods)
    able = [m for m in methods if len(m.outcome.without_mask) == fewest]
    means = {
        m.name: statistics.fmean(scores.values()) if scores else -1.0
        for m, scores in zip(able, comparable([m.outcome for m in able]))
    }
    best = max(able, key=lambda m: means[m.name])
    if len(methods) == 1:
        return best, f"{best.name}: the only one"
    good = [m for m in able if means[m.name] >= means[best.name] - MARGIN and m.devices == best.devices]
    timed = [m for m in good if m.seconds is not None]
    fastest = min(timed, key=lambda m: m.seconds or 0.0, default=best)
    if best.seconds is not None and fastest.seconds is not None and fastest.seconds < (1 - NOISE) * best.seconds:
        words = f"{fastest.name}: within {MARGIN} of the Dice of {best.name} ({means[best.name]:.4f}), and faster"
        return fastest, f"{words} ({fastest.seconds:.2f} s a case in place of {best.seconds:.2f} s)"
    others = [f"{m.name} {_words(difference(best.outcome, m.outcome, groups=groups))}" for m in able if m is not best]
    out = [f"{m.name} has no mask of {len(m.outcome.without_mask)} cases" for m in methods if m not in able]
    return best, f"{best.name}: the highest mean Dice, {means[best.name]:.4f}; against {'; '.join([*others, *out])}"


def choose_ensemble(single: Method, ensembles: Sequence[Method], groups: Groups | None = None) -> tuple[Method, str]:
    """The ensemble that gains most over `single` where it surely does, else `single`, and why."""
    gains = {e.name: difference(e.outcome, single.outcome, groups=groups) for e in ensembles}
    whole = [e for e in ensembles if len(e.outcome.without_mask) <= len(single.outcome.without_mask)]
    paying = [e for e in whole if _pays(gains[e.name])]
    told = "; ".join(f"{name}: {_words(gain)}{_condition(gain)}" for name, gain in gains.items())
    if not paying:
        return single, f"{single.name} alone, no ensemble of networks pays: {told}"
    best = max(paying, key=lambda e: gains[e.name].mean if gains[e.name] else 0.0)  # type: ignore[union-attr]
    return best, f"{best.name} in place of {single.name} alone, it pays: {told}"


def table(methods: Sequence[Method], chosen: Method, groups: Groups | None = None) -> list[dict[str, Any]]:
    """One row for each method, the best first: Dice with its interval, and the paired difference to the chosen one."""
    rows = []
    for method in sorted(methods, key=lambda m: statistics.fmean(m.dice.values()) if m.dice else -1.0, reverse=True):
        against = None if method is chosen else difference(method.outcome, chosen.outcome, groups=groups)
        rows.append(
            {
                "name": method.name,
                "networks": list(method.networks),
                "postprocess": dict(method.postprocess) if method.cleaned else {},
                "dice": mean_of(method.dice, groups=groups),
                "labels": {name: mean_of(scores, groups=groups) for name, scores in method.outcome.labels.items()},
                "missed": method.outcome.missed,
                "spurious": method.outcome.spurious,
                "cases": len(method.outcome.cases),
                "cases_without_mask": list(method.outcome.without_mask),
                "against_chosen": None if against is None else plain(against),
                "seconds_a_case": method.seconds,
                "chosen": method is chosen,
            }
        )
    return rows


def plain(found: Difference) -> dict[str, Any]:
    """A difference for JSON."""
    ends = None if found.ci95 is None else list(found.ci95)
    return {"mean": found.mean, "ci95": ends, "n": found.n, "first": found.first, "second": found.second}


def _pays(gain: Difference | None) -> bool:
    return gain is not None and gain.mean > LEAST_GAIN and gain.ci95 is not None and gain.ci95[0] > 0


def _condition(gain: Difference | None) -> str:
    """Why something did not pay."""
    if gain is None or _pays(gain):
        return ""
    if gain.mean <= LEAST_GAIN:
        return f", not more than {LEAST_GAIN}"
    return ", no interval: too few cases" if gain.ci95 is None else ", not surely above 0"


def _words(found: Difference | None) -> str:
    if found is None:
        return "no case in common"
    ends = "" if found.ci95 is None else f" (95 % {found.ci95[0]:+.4f} to {found.ci95[1]:+.4f})"
    return f"Dice {found.mean:+.4f}{ends} on {found.n} cases"
