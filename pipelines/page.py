"""The page ablation.html: the record of an ablation laid out for a reader, in one file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

# the drawing in its own units; the page scales it
WIDTH, HEIGHT = 1080.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 190.0, 18.0, 54.0
LABEL_HEIGHT = 15.0
AXES = (
    ("multiply_adds", "Multiply-adds of a patch"),
    ("parameters", "Parameters"),
    ("case_seconds", "Seconds per case"),
    ("peak_memory_mb", "Peak memory, MB"),
)
SIZES = ("multiply_adds", "parameters")
MANY_LABELS = 6


@dataclass(frozen=True)
class Mark:
    """A variant in a figure: its point, the ends of its interval, and its name beside it, shifted to be readable."""

    name: str
    x: float
    y: float
    low: float
    high: float
    label_x: float
    label_y: float
    best: bool
    title: str


@dataclass(frozen=True)
class Figure:
    """Dice against one cost on a logarithmic axis."""

    key: str
    title: str
    marks: tuple[Mark, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def render(record: Mapping[str, Any]) -> str:
    """The whole page as text; everything from the record is escaped."""
    environment = Environment(
        loader=PackageLoader("medseg_pipelines"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(fixed=fixed, signed=signed, short=short, whole=whole, field=field)
    given = [v for v in record["variants"] if v["data"] == "given"]
    done = sorted((v for v in given if v.get("dice")), key=by_dice, reverse=True)
    labels = list(dict.fromkeys(name for v in done for name in v["labels"]))
    discs = [v for v in record["variants"] if v["data"] == "discs" and v.get("diameters")]
    low, high = _dice_range(done)
    return environment.get_template("ablation.html.jinja").render(
        record=record,
        setup=record["setup"],
        rows=done,
        waiting=[v for v in record["variants"] if v["status"] == "waiting"],
        without=sum(v["status"] != "waiting" and not _has_dice(v) for v in record["variants"]),
        lacking=[v for v in record["variants"] if v.get("without_mask")],
        # the cases of discs are others than those that are given
        cases_lacking=len({(v["data"], case) for v in record["variants"] for case in v.get("without_mask", ())}),
        seeds_failed=sum(v["seeds_failed"] for v in record["variants"] if v["status"] == "partial"),
        best=next((v for v in done if v["name"] == record["best"]), None),
        discs=discs,
        diameters=list(dict.fromkeys(diameter for v in discs for diameter in v["diameters"])),
        labels=labels if len(labels) > 1 else [],
        few_labels=len(labels) <= MANY_LABELS,
        figures=_figures(done, record["best"]),
        place=lambda value: round(100 * (value - low) / (high - low), 2),
        ticks=_ticks(low, high),
        size=(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM),
    )


def fixed(value: Any, digits: int = 3) -> str:
    """A number for the eye, – where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: Any, digits: int = 3) -> str:
    """As `fixed`, with a sign."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def short(value: Any) -> str:
    """A large number with k, M or G; small ones with three digits."""
    if value is None:
        return "–"
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def whole(value: Any) -> str:
    """A count: whole where it is, else with one digit."""
    return "–" if value is None else f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def by_dice(variant: Mapping[str, Any]) -> float:
    """What variants are sorted by; one without a Dice comes last."""
    mean = variant["dice"]["mean"]
    return -1.0 if mean is None else float(mean)


def field(variant: Mapping[str, Any], *, whole_image: str) -> str:
    """The receptive field for the eye, with `whole_image` behind it where the network also sees all."""
    if not variant.get("receptive_field"):
        return "–"
    if not variant["field_is_exact"]:
        return "not known"
    return " × ".join(map(str, variant["receptive_field"])) + (whole_image if variant["sees_whole_image"] else "")


def _has_dice(variant: Mapping[str, Any]) -> bool:
    return (variant.get("dice") or {}).get("mean") is not None


def _ends(variant: Mapping[str, Any]) -> tuple[float, float]:
    dice = variant["dice"]
    low, high = dice["ci95"] or (dice["mean"], dice["mean"])
    return float(low), float(high)


def _dice_range(variants: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """A range in steps of 0.05 that holds all intervals."""
    ends = [end for v in variants if v["dice"]["mean"] is not None for end in _ends(v)]
    if not ends:
        return 0.0, 1.0
    low, high = math.floor(min(ends) * 20 - 0.2) / 20, math.ceil(max(ends) * 20 + 0.2) / 20
    return max(0.0, low), max(0.05, min(1.0, high))


def _ticks(low: float, high: float) -> list[float]:
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if (high - low) / s <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 3) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _figures(variants: Sequence[Mapping[str, Any]], best: str | None) -> list[Figure]:
    """One for each cost; first the cost in which the variants differ most, for the others may have been made equal."""

    def spread(key: str) -> float:
        costs = [v[key] for v in variants if v.get(key)]
        return max(costs) / min(costs) if costs else 0.0

    axes = sorted(AXES, key=lambda axis: (axis[0] not in SIZES, -spread(axis[0])))
    return [f for f in (_figure(key, title, variants, best) for key, title in axes) if f is not None]


def _figure(key: str, title: str, variants: Sequence[Mapping[str, Any]], best: str | None) -> Figure | None:
    shown = [v for v in variants if v.get(key) and v["dice"]["mean"] is not None]
    if not shown:
        return None
    low, high = _dice_range(shown)
    costs = [math.log10(v[key]) for v in shown]
    # a tenth of a decade at each side, and never less than a third of one in all
    middle, half = (max(costs) + min(costs)) / 2, max(0.17, (max(costs) - min(costs)) / 2 + 0.1)
    start, end = middle - half, middle + half

    def across(cost: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(cost) - start) / (end - start), 1)

    def up(dice: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (dice - low) / (high - low), 1)

    points = [(v["name"], across(v[key]), up(v["dice"]["mean"])) for v in shown]
    labels = _label_places(points)
    marks = tuple(
        Mark(
            name=name,
            x=x,
            y=y,
            low=up(_ends(v)[0]),
            high=up(_ends(v)[1]),
            label_x=labels[name][0],
            label_y=labels[name][1],
            best=name == best,
            title=f"{name}: Dice {fixed(v['dice']['mean'])}, {title.lower()} {short(v[key])}",
        )
        for v, (name, x, y) in zip(shown, points)
    )
    x_ticks = tuple((across(value), short(value)) for value in _log_ticks(start, end))
    return Figure(key, title, marks, x_ticks, tuple((up(t), f"{t:g}") for t in _ticks(low, high)))


def _log_ticks(start: float, end: float) -> list[float]:
    """Round numbers between 10^start and 10^end, at most eight."""
    decades = range(math.floor(start), math.ceil(end) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**n for n in decades for d in digits if start <= math.log10(d * 10.0**n) <= end]
        if len(ticks) <= 8:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 8)]


def _label_places(points: Sequence[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    """Where names stand: to the right of their point, moved up or down until no two lie on each other."""
    taken: list[tuple[float, float, float]] = []
    places: dict[str, tuple[float, float]] = {}
    for name, x, y in sorted(points, key=lambda p: p[2]):
        width = 6.6 * len(name)
        shifts = sorted((n * LABEL_HEIGHT / 3 for n in range(-40, 41)), key=abs)
        free = (
            y + s
            for s in shifts
            if TOP <= y + s <= HEIGHT - BOTTOM
            and not any(
                abs(y + s - other) < LABEL_HEIGHT and x + 10 < right and left < x + 10 + width
                for left, right, other in taken
            )
        )
        label_y = next(free, y)
        taken.append((x + 10, x + 10 + width, label_y))
        places[name] = (round(x + 10, 1), round(label_y, 1))
    return places
