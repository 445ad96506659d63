"""Digests of a data set: what is the same data, and what is another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from medseg.cases import Case
from medseg.errors import ConfigError
from medseg.fingerprint import data_sha256, image_digests
from medseg.leaks import refuse_leaks


def a_case(folder: Path, value: int, ending: str) -> Case:
    folder.mkdir()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.full((4, 5, 6), value, np.int16)), str(folder / f"i{ending}"))
    return Case(folder.name, (folder / f"i{ending}",), None, folder.name)


@pytest.mark.parametrize("ending", [".mhd", ".nhdr", ".mha"])
def test_equal_headers_of_other_voxels_are_other_data(tmp_path: Path, ending: str) -> None:
    one, other, copy = (a_case(tmp_path / n, v, ending) for n, v in (("a", 1), ("b", 2), ("c", 1)))
    digests = image_digests([one, other, copy])
    assert digests["a"] == digests["c"] != digests["b"]
    assert data_sha256([one]) == data_sha256([copy]) != data_sha256([other])
    refuse_leaks([one], [other])
    with pytest.raises(ConfigError, match="1 of the 1 cases held back are trained on under another name, first c as a"):
        refuse_leaks([one], [copy])
