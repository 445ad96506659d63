"""What a cross-validation found as crossval.json, crossval.md and best.json; nothing is judged or decided here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import medseg
from medseg_pipelines.choice import Method
from medseg_pipelines.compare import mean_of
from medseg_pipelines.folds import Fold, Found, numbers_of
from medseg_pipelines.judging import Judged, Trained
from medseg_pipelines.markdown import interval, line, markdown_table
from medseg_pipelines.page import fixed, short

SCHEMA_VERSION = 1
RECORD, BEST, PAGE = "crossval.json", "best.json", "crossval.md"


def network_record(
    name: str,
    folds: Sequence[tuple[Fold, Found]],
    plain: Judged | None,
    failures: Mapping[str, str],
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A network with its configuration and folds; figures of a fold are those of the cases it held back."""
    rows = []
    for fold, found in folds:
        own = {case.id for case in fold.held_back}
        dice, labels = None, {}
        if plain is not None:
            outcome = plain.method.outcome
            dice = mean_of({c: v for c, v in outcome.scores["dice"].items() if c in own}, groups=groups)
            labels = {
                n: mean_of({c: v for c, v in of.items() if c in own}, groups=groups) for n, of in outcome.labels.items()
            }
        rows.append(
            {
                "fold": fold.number,
                "state": "failed" if fold.folder.name in failures else found.state,
                "reason": failures.get(fold.folder.name, found.reason) or None,
                "cases": sorted(own),
                "dice": dice,
                "labels": labels,
                **numbers_of(fold, found),
            }
        )
    return {
        "name": name,
        "done": all(found.state == "done" for _, found in folds),
        "folds": rows,
        "config": folds[0][0].config.model_dump(mode="json"),
    }


def make_record(
    setup: Mapping[str, Any],
    networks: Sequence[Mapping[str, Any]],
    methods: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    failures: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """What crossval.json holds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "medseg": medseg.__version__,
        "setup": dict(setup),
        "complete": all(network["done"] for network in networks) and not failures,
        "networks": list(networks),
        "methods": list(methods),
        "best": None if best is None else dict(best),
        "failures": list(failures),
        "definitions": DEFINITIONS,
    }


def make_best(
    folder: Path, chosen: Method, networks: Sequence[Trained], reasons: Sequence[str], dice: Mapping[str, Any]
) -> dict[str, Any]:
    """What best.json holds: the folders of all models to average, the settings to lay over, and why these."""
    parts = [network for network in networks if network.name in chosen.networks]
    models = [fold.folder.relative_to(folder).as_posix() for part in parts for fold in part.folds]
    own = any(found.postprocess for part in parts for found in part.found)
    wanted = chosen.postprocess if chosen.cleaned else {}
    # what the folds have chosen for themselves and what is not wanted has to be taken back by name
    keys = ("largest_component", "min_size_mm3", "fill_holes") if own else ()
    planned = parts[0].config.postprocess.model_dump(mode="json")
    settings = {**{key: planned[key] for key in keys}, **wanted}
    ending = ".png" if parts[0].config.data.spatial_dims == 2 else ".nii.gz"
    return {
        "schema_version": SCHEMA_VERSION,
        "method": chosen.name,
        "networks": list(chosen.networks),
        "models": models,
        "settings": {"postprocess": settings} if settings else {},
        "dice": dict(dice),
        "reasons": list(reasons),
        # the folder stands for the models and settings above
        "command": shlex.join(["medseg", "infer", f"SCAN{ending}", "-m", str(folder), "-o", "masks"]),
    }


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """crossval.json, crossval.md, and best.json where there is a best: one of an earlier, whole run must not stay."""
    if record["best"] is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        medseg.write_text(folder / BEST, _json(record["best"]))
    medseg.write_text(folder / PAGE, page(record))
    medseg.write_text(folder / RECORD, _json(record))


def page(record: Mapping[str, Any]) -> str:
    """The record as Markdown: what was decided from, what was decided, and every fold."""
    setup, parts = record["setup"], []
    parts.append(f"# Cross-validation of {line(setup['dataset'])}")
    # a data set that names no patients counts every case as one
    patients = f", {setup['patients']} patients" if setup["patients"] != setup["cases"] else ""
    parts.append(f"{setup['folds']} folds, {setup['cases']} cases{patients}.")
    if never := setup["cases_never_held_back"]:
        parts.append(f"**{len(never)} labelled cases are held back in no fold, and so not judged.**")
    if record["methods"]:
        parts += ["## Methods", methods_table(record["methods"])]
    if record["best"] is not None:
        parts += ["## Chosen", "\n".join(f"- {line(reason)}" for reason in record["best"]["reasons"])]
        parts.append(f"For new cases:\n\n```\n{record['best']['command']}\n```")
    parts.append("## Folds")
    for network in record["networks"]:
        labels = list(dict.fromkeys(name for fold in network["folds"] for name in fold["labels"]))
        head = ["fold", "mean Dice (95 %)", *(labels if len(labels) > 1 else ()), "cases", "steps", "training s"]
        rows = [_fold_row(fold, labels if len(labels) > 1 else ()) for fold in network["folds"]]
        parts += [f"### {line(network['name'])}", markdown_table([*head, "s/case", "MB", "where"], rows)]
    if record["failures"]:
        parts.append("## Failed")
        parts.append("\n".join(f"- {line(f['name'])}: {line(f['reason'])}" for f in record["failures"]))
    parts += ["## Definitions", "\n".join(f"- **{name}**: {text}" for name, text in record["definitions"].items())]
    return "\n\n".join(parts) + "\n"


def methods_table(methods: Sequence[Mapping[str, Any]]) -> str:
    """The table that was decided from."""
    labels = list(dict.fromkeys(name for method in methods for name in method["labels"]))
    labels = labels if len(labels) > 1 else []
    head = ["method", "mean Dice (95 %)", *labels, "cases", "against the chosen (95 %)", "missed, spurious", "s/case"]
    rows = []
    for m in methods:
        against = m["against_chosen"]
        difference = "chosen" if m["chosen"] else "–"
        if against is not None:
            difference = f"{against['mean']:+.4f}{interval(against, '+.4f')}"
        without = f" ({len(m['cases_without_mask'])} without a mask)" if m["cases_without_mask"] else ""
        rows.append(
            [
                m["name"],
                f"{fixed(m['dice']['mean'], 4)}{interval(m['dice'], '.4f')}",
                *(fixed(m["labels"].get(name, {}).get("mean"), 4) for name in labels),
                f"{m['cases']}{without}",
                difference,
                f"{m['missed']:g}, {m['spurious']:g}",
                fixed(m["seconds_a_case"], 2),
            ]
        )
    return markdown_table(head, rows)


def _fold_row(fold: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    if fold["state"] != "done":
        dice = {"missing": "not trained", "elsewhere": "in training elsewhere"}.get(fold["state"], fold["state"])
    else:
        dice = "–" if fold["dice"] is None else f"{fixed(fold['dice']['mean'])}{interval(fold['dice'], '.3f')}"
    where = ", ".join(str(part) for part in (fold["machine"], fold["device"]) if part)
    return [
        str(fold["fold"]),
        dice,
        *(fixed((fold["labels"].get(name) or {}).get("mean")) for name in labels),
        str(len(fold["cases"])),
        short(fold["steps"]) if fold["steps"] is None else str(fold["steps"]),
        fixed(fold["train_seconds"], 0),
        fixed(fold["case_seconds"], 2),
        fixed(fold["peak_memory_mb"], 0),
        where or "–",
    ]


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


DEFINITIONS = {
    "Dice": "Mean over the labels of each case, then over cases. Every case is judged once, by models that did not "
    "train on it. Where neither mask nor reference has a label, it is left out; where only one has it, it counts 0. A "
    "case without a mask is left out too, which could flatter: a method that lacks more masks than another is never "
    "chosen.",
    "95 % interval": "Bootstrap over patients (cases, where the data set names none), BCa. It holds the luck of the "
    "cases; folds share most of their training cases, so that it says little about the luck of training.",
    "Differences": "Of the mean Dice of the same cases, paired. A case that one method rightly leaves empty, and "
    "another does not, counts 1 for the first.",
    "Cleaned": "Post-processing that more than half of the folds chose on their own held-back cases. The masks judged "
    "here were cleaned as more than half of the *other* folds would have it; for new cases all folds have a vote.",
    "Windows and copies": "Each fold chose those of its own models on the cases that are judged here, as its training "
    "does, which flatters a little; for new cases the copies that more than half of all models chose are used, and "
    "the windows of training unless all chose the same others. The plan (spacing, patch, intensities of CT) was "
    "measured on all cases with labels.",
    "Ensemble of networks": "A case is segmented by the models of its fold, one of each network, averaged. The average "
    "over folds, which new cases get, cannot be judged here: every case is known to all folds but one.",
    "Choice": "The chosen was chosen on the cases whose Dice is told: where several are nearly equal, that of the "
    "best flatters a little.",
    "Seconds": "Of training: the training loop alone. Of a case: from file to written mask, one model.",
    "MB": "The most memory that the process of a fold held, training and inference together; on a GPU that of its "
    "tensors. Not known of a fold that was trained by hand.",
}
