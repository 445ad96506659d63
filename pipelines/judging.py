"""All cases out of fold: each segmented by models that did not train on it, and judged once; nothing is chosen here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import medseg
from medseg_pipelines.choice import Method, vote, vote_of_others
from medseg_pipelines.compare import outcome, rows_of
from medseg_pipelines.folds import VALIDATION, Fold, Found, case_seconds, mask_of

log = logging.getLogger("medseg.crossval")

Masks = dict[str, Path]
JUDGED, CLEANED = "judged", "-cleaned"


@dataclass(frozen=True)
class Trained:
    """A network whose folds are all done."""

    name: str
    folds: tuple[Fold, ...]
    found: tuple[Found, ...]

    @property
    def config(self) -> medseg.Config:
        """The configuration of every fold."""
        return self.folds[0].config

    @property
    def backwards(self) -> Iterator[tuple[Fold, Found]]:
        """Folds from the last: where two hold back one case, the masks of the first stay."""
        return reversed([*zip(self.folds, self.found)])

    @property
    def choices(self) -> dict[int, dict[str, Any]]:
        """The post-processing that each fold chose for itself."""
        return {fold.number: found.postprocess for fold, found in zip(self.folds, self.found)}


@dataclass(frozen=True, eq=False)
class Judged:
    """A method with its report and masks; `failures`: a case or part that was not done, and why."""

    method: Method
    report: medseg.Report
    failures: Mapping[str, str] = field(default_factory=dict)


class Judge:
    """Makes masks where they are missing, below `folder`/judged, and judges them. Finished masks are not made again."""

    def __init__(self, folder: Path, groups: Mapping[str, str], device: str, progress: Any) -> None:
        self._folder = folder / JUDGED
        self._groups = groups
        self._device = device
        self._progress = progress

    def plain(self, network: Trained) -> Judged:
        """The masks as the networks made them: those of the validation, but for folds that cleaned theirs."""
        masks, failures = self._plain_masks(network)
        return self._judge(Method(network.name, (network.name,), _NOTHING), network, masks, failures)

    def cleaned(self, network: Trained, plain: Judged) -> Judged | None:
        """Each fold's masks cleaned as the other folds would have it; None where new cases would not be cleaned."""
        elected = vote(list(network.choices.values()))
        votes = {fold.number: vote_of_others(network.choices, fold.number) for fold in network.folds}
        # of half of the folds the others may be more than half: what is judged then is not what new cases get
        if not elected or not any(votes.values()):
            return None
        masks, failures = self._plain_masks(network)
        for fold, found in network.backwards:
            wanted = votes[fold.number]
            if wanted and wanted == found.postprocess:
                masks |= self._validated(network, fold, failures)
            elif wanted:
                place = self._folder / network.name / "cleaned" / fold.folder.name
                masks |= self._segment((fold,), place, wanted, fold.held_back, failures)
        name = f"{network.name}{CLEANED}"
        method = Method(name, (network.name,), _NOTHING, elected, cleaned=True)
        return self._judge(method, network, masks, failures)

    def ensemble(self, networks: Sequence[Trained], *, like: Method, choices: Mapping[int, Any]) -> Judged:
        """Fold by fold the mean of several networks; cleaned as the best of them alone, `like`, whose folds chose so.

        Raises `ModelError` where they cannot be averaged: other data, preprocessing or windows.
        """
        name, masks, failures = "+".join(n.name for n in networks), Masks(), dict[str, str]()
        for parts in reversed([*zip(*(n.folds for n in networks))]):
            wanted = vote_of_others(choices, parts[0].number) if like.cleaned else {}
            place = self._folder / name / parts[0].folder.name
            masks |= self._segment(parts, place, wanted, parts[0].held_back, failures)
        postprocess = like.postprocess if like.cleaned else {}
        method = Method(name, tuple(n.name for n in networks), _NOTHING, postprocess, cleaned=like.cleaned)
        return self._judge(method, networks[0], masks, failures)

    def _plain_masks(self, network: Trained) -> tuple[Masks, dict[str, str]]:
        masks, failures = Masks(), dict[str, str]()
        for fold, found in network.backwards:
            if found.postprocess:
                place = self._folder / network.name / "plain" / fold.folder.name
                masks |= self._segment((fold,), place, {}, fold.held_back, failures)
            else:
                masks |= self._validated(network, fold, failures)
        return masks, failures

    def _validated(self, network: Trained, fold: Fold, failures: dict[str, str]) -> Masks:
        """The masks of the validation as the fold left them; those that are not there are made by its model."""
        there = {case.id: mask_of(fold.folder / VALIDATION, case) for case in fold.held_back}
        missing = [case for case in fold.held_back if there[case.id] is None]
        masks = {case: mask for case, mask in there.items() if mask is not None}
        if missing:
            place = self._folder / network.name / "again" / fold.folder.name
            masks |= self._segment((fold,), place, None, missing, failures)
        return masks

    def _segment(
        self,
        folds: Sequence[Fold],
        place: Path,
        postprocess: Mapping[str, Any] | None,
        cases: Sequence[medseg.Case],
        failures: dict[str, str],
    ) -> Masks:
        """Masks by the models of `folds` together; `postprocess` None: what their training chose."""
        settings = {} if postprocess is None else {"postprocess": dict(postprocess)}
        precision = folds[0].config.train.precision
        options = medseg.InferOptions(device=self._device, precision=precision, settings=settings)
        segmenter = medseg.load_model(*(fold.folder for fold in folds), options=options)
        results = medseg.segment_cases(segmenter, cases, place, progress=self._progress)
        failures |= {r.case: str(r.reason) for r in results if r.status not in ("done", "skipped")}
        return {r.case: place / r.output for r in results if r.output}

    def _judge(self, method: Method, network: Trained, masks: Masks, failures: Mapping[str, str]) -> Judged:
        """Judge every case by its mask; `network` names the labels and folds."""
        data = network.config.data
        cases = {case.id: case for fold in reversed(network.folds) for case in fold.held_back}
        self._progress("evaluate", 0, 1, method.name)
        report = medseg.report_pairs(
            [(c.id, masks.get(c.id), c.label, c.images[0]) for c in cases.values() if c.label is not None],
            medseg.EvaluateOptions(data.labels),
            groups=self._groups,
        )
        failures = {**failures, **{f.case: f.reason for f in report.failures}}
        found = outcome([{"rows": rows_of(report), "failed_cases": failures}])
        spent = [s for s in map(case_seconds, network.folds) if s is not None] if len(method.networks) == 1 else []
        judged = Method(
            method.name,
            method.networks,
            found,
            method.postprocess,
            cleaned=method.cleaned,
            seconds=sum(spent) / len(spent) if spent else None,
            devices=frozenset(str(f.description.get("training", {}).get("device")) for f in network.found),
        )
        return Judged(judged, report, failures)


_NOTHING = outcome([{"rows": []}])
