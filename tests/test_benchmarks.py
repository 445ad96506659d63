"""What the benchmarks tell and compare with: bounds on times, schedules, networks. None of them is run here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script by its name, which may stand in a folder of `benchmarks`, beside the scripts it uses."""
    before = set(sys.modules)

    def call(name: str) -> ModuleType:
        folder = BENCHMARKS / Path(name).parent
        monkeypatch.syspath_prepend(folder)
        return import_module(Path(name).name)

    yield call
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        # their names are common words: nothing else may find them
        if file and Path(file).is_relative_to(BENCHMARKS):
            del sys.modules[name]


def points(*reached: tuple[float, float]) -> list[dict[str, float]]:
    return [{"minutes": minutes, "mean_dice": dice} for minutes, dice in reached]


def test_a_time_to_dice_lies_between_two_moments(load: Any) -> None:
    found = load("training").minutes_to(points((4.0, 0.86), (1.0, 0.7), (2.0, 0.84)))
    assert found == {
        "0.80": {"later_than": 1.0, "at_most": 2.0},
        "0.85": {"later_than": 2.0, "at_most": 4.0},
        "0.87": {"later_than": 4.0, "at_most": None},
    }


def test_one_moment_bounds_a_time_to_dice_on_one_side(load: Any) -> None:
    found = load("training").minutes_to(points((3.0, 0.85)))
    assert found["0.80"] == found["0.85"] == {"later_than": None, "at_most": 3.0}
    assert found["0.87"] == {"later_than": 3.0, "at_most": None}


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "results").glob("training_*.json")), ids=lambda file: file.stem)
def test_records_say_of_times_what_their_moments_show(load: Any, file: Path) -> None:
    record = json.loads(file.read_text())
    assert record["minutes_to"] == {who: load("training").minutes_to(c) for who, c in record["curves"].items()}


def test_moments_of_a_way_grow(load: Any) -> None:
    wrong = load("training").out_of_order
    assert wrong([("medseg", 2.0), ("monai", 1.0), ("medseg", 3.0)]) == ""
    assert wrong([("medseg", 2.0), ("medseg", 2.0)]).startswith("medseg:2: expected more than 2 minutes")
    assert wrong([("nnunet", 5.0), ("medseg", 2.0), ("nnunet", 2.0)]).startswith("nnunet:2: expected more than 5")
    assert wrong([("monai", 0.0)]).startswith("monai:0: expected more than 0")


def test_ways_that_there_are_not_are_refused(load: Any) -> None:
    training = load("training")
    assert training.scheduled("monai_segresnet:2.5") == ("monai_segresnet", 2.5)
    with pytest.raises(argparse.ArgumentTypeError, match="WHO one of medseg, monai, monai_segresnet, nnunet"):
        training.scheduled("monia:2")


def test_what_a_run_tells_is_kept_with_its_share_of_waiting(load: Any, tiny_run: Any) -> None:
    told = json.loads((tiny_run.folder / "model.json").read_text())["training"]
    found = load("training").told_by(tiny_run.folder, told["seconds"] + 1.5)
    assert found["waiting_share"] == told["waiting_share"] > 0
    assert found["beside_s"] == 1.5
    # two steps of two patches
    assert (found["steps"], found["samples_per_s"]) == (2, round(4 / told["seconds"], 3))


def test_every_network_of_monai_gives_logits_for_each_voxel_of_a_patch(load: Any) -> None:
    way, schedule = load("training_ways/monai_way"), load("training")
    image = torch.zeros(1, 1, 16, 24, 16)
    for name in schedule.MONAI_NETWORKS.values():
        network = way.build(name, 3).eval()
        # near the 4.7 million that the page of the recipe names
        assert 4e6 < sum(p.numel() for p in network.parameters()) < 5.5e6
        with torch.no_grad():
            assert network(image).shape == (1, 3, *image.shape[2:])
    with pytest.raises(ValueError, match="expected unet or segresnet"):
        way.build("vnet", 3)
