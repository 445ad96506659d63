"""Which channels hold Hounsfield units, by their names, and what air is there."""

from __future__ import annotations

import re

CT_NAMES = ("ct", "cta", "cect", "ncct", "hu")
# half way between air (−1000 HU) and water (0 HU)
AIR_HU = -500.0


def is_ct(channel: str) -> bool:
    """Whether a channel's name says that it holds Hounsfield units."""
    return any(word in CT_NAMES for word in re.split(r"[^a-z]+", channel.lower()))
