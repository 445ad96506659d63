"""What the system tells a process of the memory there is: that of the machine, or the less that it may hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medseg import process
from medseg.process import machine_memory_bytes

MACHINE = 2**34
UNLIMITED = "9223372036854771712"


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/job/step", {"job/memory.max": "1000", "job/step/memory.max": "max"}, 1000),
        ("0::/job/step", {"job/memory.max": "2000", "job/step/memory.max": "1000"}, 1000),
        # of a container, which sees only its own groups
        ("0::/machine/a", {"memory.max": "1000"}, 1000),
        ("0::/../a", {"memory.max": "1000"}, 1000),
        ("0::/", {"memory.max": "max"}, MACHINE),
        ("4:cpu,memory:/job\n0::/", {"memory/job/memory.limit_in_bytes": "1000"}, 1000),
        ("4:memory:/a:b\n0::/", {"memory/memory.limit_in_bytes": "1000"}, 1000),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": UNLIMITED}, MACHINE),
        # no group of memory, and a limit that is not ours
        ("4:cpu:/job", {"memory/job/memory.limit_in_bytes": "1000", "other/memory.max": "1000"}, MACHINE),
        ("0::/job", {"other/memory.max": "1000"}, MACHINE),
        (None, {}, MACHINE),
    ],
)
def test_memory_is_that_of_the_machine_or_the_least_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str | None, limits: dict[str, str], expected: int
) -> None:
    own, top = tmp_path / "own", tmp_path / "groups"
    if groups is not None:
        own.write_text(f"{groups}\n")
    for name, limit in limits.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(f"{limit}\n")
    monkeypatch.setattr(process, "OWN_CONTROL_GROUPS", own)
    monkeypatch.setattr(process, "CONTROL_GROUPS", top)
    monkeypatch.setattr(os, "sysconf", lambda name: MACHINE if name == "SC_PHYS_PAGES" else 1)
    assert machine_memory_bytes() == expected
