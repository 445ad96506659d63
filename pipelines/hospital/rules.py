"""Which rules take a series, and why the others do not; a function of what is known of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medseg_pipelines.hospital.settings import RuleSettings, WhenSettings


@dataclass(frozen=True)
class SeriesKnown:
    """What a rule may ask about. `thickness_mm` None: not told."""

    modality: str
    body_part: str
    series_description: str
    study_description: str
    protocol_name: str
    thickness_mm: float | None
    images: int
    is_image: bool
    sent_by: str


@dataclass(frozen=True)
class Selection:
    """The rules that take a series, and for each other one why not. Reasons quote nothing of the series."""

    taken: tuple[RuleSettings, ...]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join([f"{rule.name}: takes it" for rule in self.taken] + list(self.reasons)) or "no rules"


def select(rules: Sequence[RuleSettings], known: SeriesKnown) -> Selection:
    """Every rule is asked; a series may go to several models."""
    if not known.is_image:
        return Selection((), ("no images of a patient",))
    taken, reasons = [], []
    for rule in rules:
        against = list(_against(rule.when, known))
        if against:
            reasons.append(f"{rule.name}: {', '.join(against)}")
        else:
            taken.append(rule)
    return Selection(tuple(taken), tuple(reasons))


def _against(when: WhenSettings, known: SeriesKnown) -> Iterator[str]:
    if when.modality and known.modality not in when.modality:
        yield f"modality is not {' or '.join(when.modality)}"
    for name in ("body_part", "series_description", "study_description", "protocol_name"):
        pattern = getattr(when, name)
        if pattern and not re.search(pattern, getattr(known, name), re.IGNORECASE):
            yield f"{name} does not match"
    if when.not_series_description and re.search(when.not_series_description, known.series_description, re.IGNORECASE):
        yield "series_description is ruled out"
    if when.thickness_mm is not None:
        low, high = when.thickness_mm
        if known.thickness_mm is None:
            yield "thickness is not told"
        elif not low <= known.thickness_mm <= high:
            yield f"thickness {known.thickness_mm:g} mm is not {low:g} to {high:g}"
    if when.images is not None and not when.images[0] <= known.images <= when.images[1]:
        yield f"{known.images} images are not {when.images[0]} to {when.images[1]}"
    if when.sent_by and known.sent_by not in when.sent_by:
        yield "sent by another"
