"""What figures are measured on, told alike in every result."""

from __future__ import annotations

import os
import platform
from pathlib import Path

INSTRUCTIONS = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}


def machine() -> dict[str, str | int | None]:
    """The processor as the kernel calls it, or the machine's type where it does not say; what it has for convolutions
    (AVX2 to AMX, bf16), which decides how fast a training is; cores; system."""
    instructions = " ".join(sorted(INSTRUCTIONS & {*_told("flags").split()}))
    return {
        "processor": processor(),
        "instructions": instructions,
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def processor() -> str:
    """The processor's name."""
    return _told("model name") or platform.processor() or platform.machine()


def _told(what: str) -> str:
    """Of the first processor, by the kernel."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.split(":")[0].strip() == what), "")
