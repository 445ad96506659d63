"""What all pages share: the environment of their templates and how a number, a name and a count are written."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime, timezone
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medseg.config import COLOURS
from medseg.evaluate import Evaluation

STATUS_NAMES = {
    "ok": "ok",
    "both_empty": "both empty",
    "missed": "missed",
    "spurious": "spurious",
    "missing_prediction": "no prediction",
}


def environment() -> Environment:
    """The templates of all pages, with their filters. Every value is escaped; an unknown name is an error."""
    made = Environment(
        loader=PackageLoader("medseg.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        breakable=breakable,
        fixed=fixed,
        signed=signed,
        figure=figure,
        status=STATUS_NAMES.__getitem__,
        embedded=embedded,
        options=options,
        worded=worded,
        moment=moment,
    )
    return made


def label_marks(evaluation: Evaluation) -> dict[str, str]:
    """What tells labels apart beside the colour: their values, where there are more labels than colours; else ''."""
    repeated = len(evaluation.labels) > len(COLOURS)
    return {name: value_text(value) if repeated else "" for name, value in evaluation.labels.items()}


def value_text(value: int | tuple[int, ...]) -> str:
    """A label's value, or those of a region: `3`, `1+2`."""
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def breakable(text: str) -> Markup:
    """Escaped text in which a line may end after each underscore."""
    return Markup("_<wbr>").join(text.split("_"))


def options(text: str) -> Markup:
    """Escaped text in which the options of a command line (`--labels`) are set as code."""
    parts = re.split(r"(?<!\S)(--[a-z][a-z-]*)", text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else p for n, p in enumerate(parts))


def worded(text: str) -> Markup:
    """As `in_words`, escaped, with what else is called as a column of a file set as code."""
    parts = re.split(r"\b([a-z]+(?:_[a-z]+)+)\b", in_words(text))
    return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else p for n, p in enumerate(parts))


def in_words(text: str) -> str:
    """A definition in the words of the page: those for a status, ∞ for inf."""
    for status, words in STATUS_NAMES.items():
        text = re.sub(rf"\b{status}\b", words, text)
    return re.sub(r"\binf\b", "∞", text)


def moment(created: str) -> str:
    """A time in ISO 8601 as a reader writes it: `2024-05-31 18:04 UTC`."""
    return f"{datetime.fromisoformat(created).astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def fixed(value: Any, digits: int = 3) -> str:
    """A number for the eye: fixed digits, ∞ for infinite, – where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if value == "inf":
        return "∞"
    if value == "-inf":
        return "−∞"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}"
    return (text if float(text) else text.lstrip("-")).replace("-", "−")


def signed(value: Any, digits: int = 2) -> str:
    """As `fixed`, with a sign; zero and what is no number have none."""
    text = fixed(value, digits)
    none = text[0] in "–∞−" or not float(text)
    return text if none else f"+{text}"


def figure(value: Any, metric: str) -> str:
    """A number in the digits of its metric: two for mm and ml (with a sign for a difference), else three."""
    return (signed if "difference" in metric else fixed)(value, digits(metric))


def digits(metric: str) -> int:
    """How many digits of a measure are told after the point."""
    return 2 if metric.endswith(("_mm", "_ml")) else 3


def embedded(value: Any) -> Markup:
    """`value` as JSON inside a `<script>`: no character in it can end the element. NaN and infinity are refused."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
