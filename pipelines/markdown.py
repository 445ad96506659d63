"""The record of an ablation as Markdown, for a README or a pull request; the page is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medseg_pipelines.page import short, whole


def markdown(record: Mapping[str, Any]) -> str:
    """One table of the networks on the given data, the best first, the discs by diameter, and the claims."""
    given = [v for v in record["variants"] if v["data"] == "given" and v.get("dice")]
    given.sort(key=lambda v: v["dice"]["mean"], reverse=True)
    labels = list(dict.fromkeys(name for v in given for name in v["labels"]))
    parts = [_table(_head(labels), [_row(v, labels, record["baseline"]) for v in given])]
    discs = [v for v in record["variants"] if v.get("diameters")]
    if discs:
        sizes = list(discs[0]["diameters"])
        rows = [[v["name"], *(f"{100 * v['diameters'][s]['recall']:.0f} %" for s in sizes)] for v in discs]
        parts.append("Share of each disc that was found, by diameter:")
        parts.append(_table(["variant", *(f"{s} px" for s in sizes)], rows))
    for claim in record["claims"]:
        parts.append(f"**{claim['question']}** {claim['sentence']}")
    for failure in record["failures"]:
        parts.append(f"Failed: {failure['name']}: {failure['reason']}")
    return "\n\n".join(parts) + "\n"


def _head(labels: Sequence[str]) -> list[str]:
    dice = ["mean Dice (95 %)", *(labels if len(labels) > 1 else ())]
    costs = ["parameters", "multiply-adds", "field", "stride", "steps", "s/case", "MB"]
    return ["network", *dice, "against the baseline (95 %)", "missed, spurious", *costs]


def _row(variant: Mapping[str, Any], labels: Sequence[str], baseline: str | None) -> list[str]:
    dice, against = variant["dice"], variant.get("against_baseline")
    cells = [variant["name"], f"{dice['mean']:.3f}{_interval(dice, '.3f')}"]
    if len(labels) > 1:
        cells += [f"{variant['labels'][n]['mean']:.3f}" if n in variant["labels"] else "" for n in labels]
    difference = "baseline" if variant["name"] == baseline else ""
    if against is not None:
        difference = f"{against['mean']:+.3f}{_interval(against, '+.3f')}"
    return [
        *cells,
        difference,
        f"{variant['missed']:g}, {variant['spurious']:g}",
        short(variant["parameters"]),
        short(variant["multiply_adds"]),
        " × ".join(map(str, variant["receptive_field"])) + (" and all" if variant["sees_whole_image"] else ""),
        str(variant["output_stride"]),
        whole(variant["steps"]),
        f"{variant['case_seconds']:.2f}",
        f"{variant['peak_memory_mb']:.0f}",
    ]


def _interval(found: Mapping[str, Any], form: str) -> str:
    ends = found.get("ci95")
    return "" if ends is None else f" ({ends[0]:{form}} to {ends[1]:{form}})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
