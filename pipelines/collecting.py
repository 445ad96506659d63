"""From finished folds to the result: masks judged, the best chosen, reports and record written; nothing is trained."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medseg
from medseg_pipelines.choice import choose_cleaning, choose_ensemble, choose_single, table
from medseg_pipelines.crossrecord import make_best, make_record, network_record, write
from medseg_pipelines.folds import Fold, Found
from medseg_pipelines.judging import Judge, Judged, Trained

log = logging.getLogger("medseg.crossval")

REPORT, OTHERS, COMPARISON = "report", "reports", "compare"
Failures = list[dict[str, str]]


@dataclass(frozen=True)
class Network:
    """All folds of one network with what is in their folders; `failures`: why a fold failed, by its folder's name."""

    name: str
    folds: tuple[tuple[Fold, Found], ...]
    failures: Mapping[str, str]

    @property
    def whole(self) -> bool:
        """Whether every fold is done."""
        return all(found.state == "done" for _, found in self.folds)

    @property
    def trained(self) -> Trained:
        """The folds that are done."""
        done = [(fold, found) for fold, found in self.folds if found.state == "done"]
        return Trained(self.name, tuple(f for f, _ in done), tuple(f for _, f in done))


@dataclass(frozen=True)
class _Decided:
    judged: Judged
    methods: Sequence[Judged]
    reasons: Sequence[str]


def collect(
    folder: Path,
    networks: Sequence[Network],
    setup: Mapping[str, Any],
    groups: Mapping[str, str],
    *,
    device: str,
    progress: Any,
) -> tuple[dict[str, Any], Judged | None]:
    """Judge, choose and write everything into `folder`: the record, and the method whose report is in report/.

    A network without all of its folds is judged on those that are there, and not chosen from. What fails is in the
    record by name, and costs nothing else. Reports of an earlier collection that this one does not write are removed
    once its own are written; where no network could be judged, they stay.
    """
    judge = Judge(folder, groups, device, progress)
    failures = [_failure(n.name, fold, reason) for n in networks for fold, reason in n.failures.items()]
    plain: dict[str, Judged] = {}
    for network in networks:
        if network.trained.folds:
            try:
                plain[network.name] = judge.plain(network.trained)
            except medseg.MedsegError as error:
                failures.append({"name": network.name, "reason": str(error)})
    candidates = [n.trained for n in networks if n.whole and n.name in plain]
    decided = _decide(judge, candidates, plain, groups, failures) if candidates else None
    shown = decided.judged if decided else next(iter(plain.values()), None)
    best, rows = None, []
    if decided is not None:
        rows = table([j.method for j in decided.methods], decided.judged.method, groups)
        dice = next(row["dice"] for row in rows if row["chosen"])
        best = make_best(folder, decided.judged.method, candidates, decided.reasons, dice)
    for judged in (decided.methods if decided else plain.values()) if shown else ():
        failures += [{"name": f"{judged.method.name}, case {c}", "reason": r} for c, r in judged.failures.items()]
    records = [network_record(n.name, n.folds, plain.get(n.name), n.failures, groups) for n in networks]
    if shown is not None:
        shown.report.save(folder / REPORT)
        written = _compare(folder, decided, failures) if decided is not None and len(decided.methods) > 1 else set()
        _remove_earlier(folder, written)
    record = make_record(setup, records, rows, best, failures)
    write(folder, record)
    return record, shown


def _decide(
    judge: Judge,
    networks: Sequence[Trained],
    plain: Mapping[str, Judged],
    groups: Mapping[str, str],
    failures: Failures,
) -> _Decided:
    """The table is filled in the order of the decisions: post-processing, network, ensemble."""
    judged, kept, reasons = [], [], []
    for network in networks:
        usual = plain[network.name]
        judged.append(usual)
        cleaned = judge.cleaned(network, usual)
        if cleaned is None:
            kept.append(usual)
            continue
        judged.append(cleaned)
        method, reason = choose_cleaning(usual.method, cleaned.method, groups)
        kept.append(cleaned if method is cleaned.method else usual)
        reasons.append(reason)
    single, reason = choose_single([j.method for j in kept], groups)
    reasons.append(reason)
    if len(networks) == 1:
        return _Decided(_of(judged, single), judged, reasons)
    best = next(n for n in networks if n.name == single.networks[0])
    ensembles = []
    for parts in _ensembles(networks, [j.method.networks[0] for j in sorted(kept, key=_mean, reverse=True)]):
        try:
            ensembles.append(judge.ensemble(parts, like=single, choices=best.choices))
        except medseg.ModelError as error:
            names = " and ".join(n.name for n in parts)
            log.info("%s make no ensemble", names, exc_info=True)
            reasons.append(f"{names} make no ensemble: {error}")
        except medseg.MedsegError as error:
            failures.append({"name": "+".join(n.name for n in parts), "reason": str(error)})
    judged += ensembles
    if ensembles:
        single, reason = choose_ensemble(single, [e.method for e in ensembles], groups)
        reasons.append(reason)
    return _Decided(_of(judged, single), judged, reasons)


def _ensembles(networks: Sequence[Trained], by_dice: Sequence[str]) -> list[list[Trained]]:
    """All networks together, and where they are more than two, the two best."""
    named = {n.name: n for n in networks}
    return [list(networks), *([[named[name] for name in by_dice[:2]]] if len(networks) > 2 else [])]


def _mean(judged: Judged) -> float:
    values = list(judged.method.dice.values())
    return sum(values) / len(values) if values else -1.0


def _of(judged: Sequence[Judged], method: Any) -> Judged:
    return next(j for j in judged if j.method is method)


def _remove_earlier(folder: Path, written: Set[Path]) -> None:
    """What an earlier collection wrote beside the chosen, unless `written` now, would be taken for its result."""
    places = [(folder / COMPARISON, medseg.Comparison.check_folder)]
    places += [(place, medseg.Report.check_folder) for place in sorted((folder / OTHERS).glob("*"))]
    for place, check in places:
        if place in written or not _is_earlier(place, check):
            continue
        if place.is_symlink():
            # what it points to is elsewhere, and perhaps the only one
            place.unlink()
        else:
            shutil.rmtree(place)
    if (folder / OTHERS).is_dir() and not any((folder / OTHERS).iterdir()):
        (folder / OTHERS).rmdir()


def _is_earlier(place: Path, check: Callable[[Path], None]) -> bool:
    """Whether a folder holds a report or comparison, as `check` refuses others; what a user has put there stays."""
    try:
        check(place)
    except medseg.DataError:
        return False
    return (place / "summary.json").is_file()


def _compare(folder: Path, decided: _Decided, failures: Failures) -> set[Path]:
    """A report of every method beside that of the chosen one, and their paired statistics: the folders written."""
    places = {}
    for judged in decided.methods:
        place = folder / REPORT
        if judged is not decided.judged:
            place = judged.report.save(folder / OTHERS / judged.method.name)
        places[judged.method.name] = place
    written = set(places.values())
    try:
        medseg.compare(places).save(folder / COMPARISON)
        written.add(folder / COMPARISON)
    except medseg.MedsegError as error:
        failures.append({"name": COMPARISON, "reason": str(error)})
    return written


def _failure(network: str, fold: str, reason: str) -> dict[str, str]:
    return {"name": f"{network}, {fold}", "reason": reason}
