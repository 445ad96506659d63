"""What figures are measured on, told alike in every result."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> dict[str, str | int | None]:
    """The processor as the kernel calls it, or the machine's type where it does not say; cores; system."""
    return {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}


def processor() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
