"""Data sets as users keep them: what is odd in a folder or a list is named, and no case is lost without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg.datasets import read_dataset
from medseg.errors import DataError


def touch(root: Path, *names: str) -> Path:
    """Empty files: listing opens none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def listed(root: Path, text: str) -> Path:
    """A list of this text, beside files of the names a to d."""
    touch(root, *(f"{name}.nii" for name in "abcd"))
    (root / "l.csv").write_text(text)
    return root / "l.csv"


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"l\.csv: column 'image' found twice.*image2"):
        read_dataset(listed(tmp_path, "case,image,image,label\nx,a.nii,b.nii,c.nii\n"))
