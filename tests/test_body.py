"""The body in a CT: lungs belong to it, air around does not, and nothing else than CT is looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medseg.body import CELL, Air, air_of, body_cells
from medseg.config import DataConfig, PreprocessConfig, WindowsConfig
from medseg.units import is_ct

HU = {"intensity": [{"normalise": "fixed", "mean": 50.0, "sd": 200.0, "clip": [-1000, 1000]}]}


def torso() -> torch.Tensor:
    """Air, 48 voxels each way; a body of water 16…40 in the first two axes, cut off at both ends, a lung in it."""
    image = torch.full((48, 48, 48), -1000.0)
    image[16:40, 16:40] = 0
    image[24:32, 24:32] = -900
    return image


def normalised(image: torch.Tensor) -> torch.Tensor:
    return ((image - 50) / 200)[None]


def found(image: torch.Tensor, windows: dict[str, Any] | None = None, channel: str = "CT") -> Air | None:
    data = DataConfig(channels=(channel,), labels={"a": 1, "b": 2})
    return air_of(WindowsConfig(**(windows or {})), data, PreprocessConfig.model_validate(HU), image)


def test_the_body_is_what_is_denser_than_air_and_what_that_encloses() -> None:
    cells = body_cells(torso(), -500.0)
    assert cells.shape == (12, 12, 12)
    # voxels 16…40 are cells 4…10, and one cell more on each side
    assert cells[3:11, 3:11].all()
    assert not cells[:3].any()
    assert not cells[11:].any()
    assert not cells[:, :3].any()


def test_a_box_is_air_where_no_part_of_it_is_body() -> None:
    air = found(normalised(torso()))
    assert air is not None
    assert air.fills((0, 0, 0), (12, 48, 48))
    assert not air.fills((0, 0, 0), (13, 48, 48))
    # inside the lung
    assert not air.fills((26, 26, 20), (4, 4, 4))
    assert air.scores.tolist() == [1, 0, 0]
    # a window that begins in the padding before the image
    assert air.fills((-8, -8, -8), (16, 16, 16))
    assert CELL == 4


def test_where_the_clip_range_hides_air_nothing_is_skipped() -> None:
    how = {"intensity": [{"normalise": "fixed", "mean": 0.0, "sd": 100.0, "clip": [-160, 240]}]}
    data = DataConfig(channels=("CT",), labels={"a": 1})
    image = (torso().clamp(-160, 240) / 100)[None]
    assert air_of(WindowsConfig(), data, PreprocessConfig.model_validate(how), image) is None


def test_an_image_of_lung_alone_is_looked_at() -> None:
    assert found(normalised(torch.full((16, 16, 16), -870.0))) is None


@pytest.mark.parametrize(
    ("windows", "channel", "expected"),
    [({}, "CT", True), ({}, "T1", False), ({"skip_air": "off"}, "CT", False), ({"skip_air": "on"}, "T1", True)],
)
def test_only_ct_is_looked_at_unless_asked(windows: dict[str, Any], channel: str, expected: bool) -> None:
    assert (found(normalised(torso()), windows, channel) is not None) is expected


def test_images_normalised_by_themselves_have_no_known_air() -> None:
    data = DataConfig(channels=("CT",), labels={"a": 1})
    assert air_of(WindowsConfig(), data, PreprocessConfig(), normalised(torso())) is None


@pytest.mark.parametrize(
    ("name", "expected"), [("CT", True), ("ct_venous", True), ("CTA", True), ("T1", False), ("direct", False)]
)
def test_names_of_ct(name: str, expected: bool) -> None:
    assert is_ct(name) is expected
