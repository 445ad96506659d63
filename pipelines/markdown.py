"""The record of an ablation as Markdown, for a README or a pull request; the page is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medseg_pipelines.page import by_dice, field, fixed, short, whole

NOTE = "Steps are those that fitted into the time: where other work shared the machine, a run took fewer."


def markdown(record: Mapping[str, Any]) -> str:
    """One table of the networks on the given data, the best first, the discs by diameter, and the claims."""
    given = [v for v in record["variants"] if v["data"] == "given" and v.get("dice")]
    given.sort(key=by_dice, reverse=True)
    labels = list(dict.fromkeys(name for v in given for name in v["labels"]))
    parts = [markdown_table(_head(labels), [_row(v, labels, record["baseline"]) for v in given]), NOTE]
    discs = [v for v in record["variants"] if v.get("diameters")]
    if discs:
        sizes = list(dict.fromkeys(size for v in discs for size in v["diameters"]))
        rows = [[v["name"], *(_share(v["diameters"].get(s)) for s in sizes)] for v in discs]
        parts.append("Share of each disc that was found, by diameter:")
        parts.append(markdown_table(["variant", *(f"{s} px" for s in sizes)], rows))
    for claim in record["claims"]:
        parts.append(f"**{line(claim['question'])}** {line(claim['sentence'])}")
    for failure in record["failures"]:
        parts.append(f"Failed: {line(failure['name'])}: {line(failure['reason'])}")
    return "\n\n".join(parts) + "\n"


def _head(labels: Sequence[str]) -> list[str]:
    dice = ["mean Dice (95 %)", *(labels if len(labels) > 1 else ())]
    costs = ["parameters", "multiply-adds", "field", "stride", "steps", "s/case", "MB"]
    return ["network", *dice, "against the baseline (95 %)", "missed, spurious", *costs]


def _row(variant: Mapping[str, Any], labels: Sequence[str], baseline: str | None) -> list[str]:
    dice, against = variant["dice"], variant.get("against_baseline")
    cells = [variant["name"], f"{fixed(dice['mean'])}{interval(dice, '.3f')}{_cases(variant)}"]
    if len(labels) > 1:
        cells += [fixed(variant["labels"].get(name, {}).get("mean")) for name in labels]
    difference = "baseline" if variant["name"] == baseline else ""
    if against is not None:
        difference = f"{against['mean']:+.3f}{interval(against, '+.3f')}"
    return [
        *cells,
        difference,
        f"{variant['missed']:g}, {variant['spurious']:g}",
        short(variant["parameters"]),
        short(variant["multiply_adds"]),
        field(variant, whole_image=" and all"),
        whole(variant["output_stride"]),
        whole(variant["steps"]),
        fixed(variant["case_seconds"], 2),
        fixed(variant["peak_memory_mb"], 0),
    ]


def _cases(variant: Mapping[str, Any]) -> str:
    """How many cases the Dice is of, where it is not of all; how many have no mask."""
    n, held_back, without = variant["dice"]["n"], variant["cases_held_back"], variant["cases_without_mask"]
    return (f", {n} of {held_back} cases" if n != held_back else "") + (
        f", {without} without a mask" if without else ""
    )


def _share(numbers: Mapping[str, Any] | None) -> str:
    return "–" if numbers is None else f"{100 * numbers['recall']:.0f} %"


def interval(found: Mapping[str, Any], form: str) -> str:
    """The interval of a mean or difference, to stand behind it; nothing where there is none."""
    ends = found.get("ci95")
    return "" if ends is None else f" ({ends[0]:{form}} to {ends[1]:{form}})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; whatever is in a cell stays in it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return line(text).replace("\\", "\\\\").replace("|", "\\|")


def line(text: str) -> str:
    """`text` in one line, whatever breaks it has."""
    return " ".join(text.split())
