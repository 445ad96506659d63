"""The result of an ablation: one record of strict JSON and one table, from trials, entries and claims; no layout."""

from __future__ import annotations

import csv
import io
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

import medseg
from medseg_pipelines.claims import Claim, judge
from medseg_pipelines.compare import Outcome, difference, mean_of, outcome
from medseg_pipelines.discs import measure_discs
from medseg_pipelines.lineup import BASELINE, Entry
from medseg_pipelines.trials import TrialResult

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
COLUMNS = (
    *("name", "network", "data", "status", "reason", "seeds", "dice", "dice_low", "dice_high", "seed_sd", "cases"),
    *(
        "cases_held_back",
        "cases_without_mask",
        "missed",
        "spurious",
        "against_best",
        "against_best_low",
        "against_best_high",
    ),
    *("against_baseline", "against_baseline_low", "against_baseline_high"),
    *("parameters", "multiply_adds", "receptive_field", "coverage", "output_stride", "width"),
    *("steps", "step_seconds", "case_seconds", "peak_memory_mb"),
)


@dataclass(frozen=True)
class Setup:
    """What was asked; goes into the record as it is."""

    dataset: str
    time_budget_s: float
    seeds: int
    fold: int
    folds: int
    equal: str
    published: bool
    device: str
    reference: Mapping[str, Any]
    """The planned default network, whose size the others were brought to."""


def make_record(
    setup: Setup,
    entries: Sequence[Entry],
    trials: Mapping[str, Sequence[TrialResult]],
    claims: Sequence[Claim],
    *,
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that was measured so far; `trials` by entry name. `groups` maps a case to its patient."""
    outcomes: dict[str, Outcome] = {}
    variants, judged = [], []
    for entry in entries:
        results = trials.get(entry.name, ())
        try:
            found, variant = _measured(entry, results, groups)
        except Exception as error:
            # whatever one variant has left behind must not cost the others
            log.debug("%s cannot be judged", entry.name, exc_info=True)
            entry = replace(entry, reason=f"its results cannot be judged: {type(error).__name__}: {error}")
            found, variant = None, _variant(entry, results)
        if found is not None:
            outcomes |= dict.fromkeys(entry.names, found)
        variants.append(variant)
        judged.append(entry)
    best = _best(variants)
    for variant in variants:
        if variant["data"] == "given":
            variant["against_best"] = _against(outcomes, variant["name"], best, groups)
            variant["against_baseline"] = _against(outcomes, variant["name"], BASELINE, groups)
    verdicts = [judge(claim, outcomes, groups=groups) for claim in claims]
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "medseg": medseg.__version__,
        "setup": asdict(setup),
        "best": best,
        "baseline": BASELINE if BASELINE in outcomes else None,
        "variants": variants,
        "claims": [
            {
                "name": v.claim.name,
                "question": v.claim.question,
                "expectation": v.claim.expectation,
                "verdict": v.word,
                "sentence": v.sentence,
                "variants": [variant.name for variant in v.claim.variants],
                "contrasts": [
                    {"better": c.better, "worse": c.worse, "measure": c.measure, **({} if d is None else _plain(d))}
                    for c, d in v.differences
                ],
            }
            for v in verdicts
        ],
        "failures": failures(judged, trials),
        "definitions": DEFINITIONS,
    }


def failures(entries: Sequence[Entry], trials: Mapping[str, Sequence[TrialResult]]) -> list[dict[str, str]]:
    """What has no result, and why: entries without a configuration, trials that failed, cases without a mask."""
    found = [{"name": entry.name, "reason": entry.reason} for entry in entries if entry.reason is not None]
    for name, results in trials.items():
        for result in results:
            label = f"{name}, seed {result.trial.seed}"
            if result.reason is not None:
                found.append({"name": label, "reason": result.reason})
            cases = result.content.get("failed_cases", {})
            found += [{"name": f"{label}, case {case}", "reason": reason} for case, reason in cases.items()]
    return found


def table_text(record: Mapping[str, Any]) -> str:
    """The variants as CSV, one a line, in the columns of ablation.csv; Dice of each label at the end."""
    labels = list(dict.fromkeys(name for v in record["variants"] for name in v.get("labels", {})))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"dice_{name}" for name in labels)])
    for variant in record["variants"]:
        cells = {**variant, **_spread(variant)}
        label_cells = [variant.get("labels", {}).get(name, {}).get("mean") for name in labels]
        writer.writerow(["" if v is None else v for v in (*(cells.get(c) for c in COLUMNS), *label_cells)])
    return text.getvalue()


def _spread(variant: Mapping[str, Any]) -> dict[str, Any]:
    """The nested numbers of a variant as the columns of the table."""
    cells: dict[str, Any] = {"seeds": len(variant["by_seed"])}
    for key, column in (("dice", "dice"), ("against_best", "against_best"), ("against_baseline", "against_baseline")):
        found = variant.get(key) or {}
        low, high = found.get("ci95") or (None, None)
        cells |= {column: found.get("mean"), f"{column}_low": low, f"{column}_high": high}
    cells["cases"] = (variant.get("dice") or {}).get("n")
    field = variant.get("receptive_field")
    cells["receptive_field"] = None if field is None else " ".join(map(str, field))
    if not variant.get("field_is_exact", True):
        cells |= {"receptive_field": "not known", "coverage": None}
    return cells


def _discs(entry: Entry, results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    if entry.data != "discs":
        return []
    return [measure_discs(r.trial.folder / "validation", entry.dataset) for r in results if r.reason is None]


def _measured(
    entry: Entry, results: Sequence[TrialResult], groups: Mapping[str, str] | None
) -> tuple[Outcome | None, dict[str, Any]]:
    """The outcome of a variant, where a trial of it is done, and its part of the record."""
    variant, discs = _variant(entry, results), _discs(entry, results)
    done = [r.content for r in results if r.reason is None]
    if not done:
        return None, variant
    found = outcome(done, [of["scores"] for of in discs])
    return found, variant | _numbers(found, done, groups, discs)


def _variant(entry: Entry, results: Sequence[TrialResult]) -> dict[str, Any]:
    """What there is to say of a variant without its results."""
    failed = [r for r in results if r.reason is not None]
    done = len(failed) < len(results) and entry.reason is None
    network = None if entry.config is None else entry.config.network
    status = "waiting" if not (results or entry.reason) else "failed" if not done else "partial" if failed else "done"
    return {
        "name": entry.name,
        "also": list(entry.names[1:]),
        "network": None if network is None else network.name,
        "data": entry.data,
        "status": status,
        "reason": entry.reason or next((r.reason for r in failed), None),
        "seeds_failed": len(failed),
        **entry.structure,
        "width": None if network is None else network.width,
        "settings": None if network is None else network.model_dump(mode="json"),
        "by_seed": [],
    }


def _numbers(
    found: Outcome,
    done: Sequence[Mapping[str, Any]],
    groups: Mapping[str, str] | None,
    discs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the trials that are `done` measured."""
    steps, seconds = sum(r["steps"] for r in done), sum(r["train_seconds"] for r in done)
    cases = [s for r in done for s in r["case_seconds"].values()]
    return {
        "by_seed": list(found.by_seed),
        "dice": mean_of(found.scores["dice"], groups=groups),
        "cases_held_back": len(found.cases),
        "cases_without_mask": len(found.without_mask),
        "without_mask": list(found.without_mask),
        "seed_sd": statistics.stdev(found.by_seed) if len(found.by_seed) > 1 else None,
        "labels": {name: mean_of(scores, groups=groups) for name, scores in found.labels.items()},
        "missed": found.missed,
        "spurious": found.spurious,
        "steps": round(steps / len(done)),
        "step_seconds": seconds / steps if steps else None,
        "case_seconds": statistics.fmean(cases) if cases else None,
        "peak_memory_mb": max(r["peak_memory_mb"] for r in done),
        "stage_seconds": {stage: statistics.fmean(r["stages"][stage] for r in done) for stage in done[0]["stages"]},
        "device": done[0]["device"],
        "precision": done[0]["precision"],
        **({"diameters": _diameters([of["diameters"] for of in discs])} if discs else {}),
    }


def _diameters(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        diameter: {key: statistics.fmean(s[diameter][key] for s in seeds if diameter in s) for key in numbers}
        for diameter, numbers in {d: n for seed in seeds for d, n in seed.items()}.items()
    }


def _best(variants: Sequence[Mapping[str, Any]]) -> str | None:
    """The variant of the highest mean Dice among those with a mask for every case."""
    done = [v for v in variants if v["data"] == "given" and (v.get("dice") or {}).get("mean") is not None]
    judged = [v for v in done if v["cases_without_mask"] == 0]
    return max(judged, key=lambda v: v["dice"]["mean"])["name"] if judged else None


def _against(
    outcomes: Mapping[str, Outcome], name: str, other: str | None, groups: Mapping[str, str] | None
) -> dict[str, Any] | None:
    if other is None or name == other:
        return None
    found = difference(outcomes.get(name), outcomes.get(other), groups=groups)
    return None if found is None else _plain(found)


def _plain(found: Any) -> dict[str, Any]:
    values = asdict(found)
    return {**values, "ci95": None if found.ci95 is None else list(found.ci95)}


DEFINITIONS = {
    "Dice": "Mean over the labels of each case, then over cases; with several seeds first over the seeds of a case. "
    "Where neither mask nor reference has a label, it is left out; where only one has it, it counts 0. So the mean may "
    "be over n of N held-back cases. A case without a mask is left out too, which could flatter: whatever lacks one is "
    "never the best.",
    "95 % interval": "Bootstrap over cases (patients, where the data set names them), BCa. It holds the luck of the "
    "cases; the luck of training shows in the seeds.",
    "Differences": "Of the mean Dice of the same cases, paired; an interval that leaves out 0 decides. A case that one "
    "rightly leaves empty, and another does not, counts 1 for the first; of several seeds, each that leaves it empty "
    "counts 1.",
    "Missed, spurious": "Labels that only the reference or only the mask has, summed over cases, mean over seeds.",
    "Inference": "Windows, copies and cleaning are those that each training chose on its own held-back cases, in the "
    "time that its calibration had, as `medseg train` does; a slow network has less time to choose in.",
    "Multiply-adds": "Of one patch through the network.",
    "Field": "Receptive field in voxels by axis. Coverage: share of the voxels within it that reach the output. Not "
    "known: the network mixes voxels in a way that cannot be followed, or the field is larger than could be followed.",
    "Steps": "What the time allowed, mean over seeds. Where other work shared the machine, a run took fewer of them.",
    "Step": "Seconds of the training loop by step, with the validation in it (at most a twentieth).",
    "Case": "Seconds from file to written mask.",
    "Memory": "The most that the process of a run held, training and inference together; on a GPU that of its tensors, "
    "without what the libraries and the system take beside them.",
}
