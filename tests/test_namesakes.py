"""Weights of a medseg run find the labels and channels of their names, in every network; what differs is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_networks import odd_shape
from test_networks import tiny as small
from tiny import tiny_config, tiny_model
from torch import Tensor, nn

from medseg.config import Config, NetworkConfig, make_config, overlay
from medseg.errors import ConfigError
from medseg.model import new_network
from medseg.namesakes import Namesakes, differences
from medseg.networks import build_bare, list_networks
from medseg.pretrained import Pretrained, load_pretrained

# float32 has 24 bits; the order of a sum over channels differs, and the layers behind it pass that on
ROUNDING = 1e-4


def with_labels(*names: str) -> Config:
    labels = {name: n + 1 for n, name in enumerate(names)}
    return make_config(overlay(tiny_config().model_dump(mode="json"), {"data": {"labels": labels}}))


def with_channels(*names: str, **changes: Any) -> Config:
    return tiny_config(
        **overlay({"data": {"channels": names}, "preprocess": {"intensity": [{}] * len(names)}}, changes)
    )


def carry(folder: Path, there: Config, here: Config) -> tuple[Any, Any, Pretrained]:
    """The network of a run `there`, one for `here` with its weights, and what became of them."""
    tiny_model(folder, there, seed=3)
    theirs = new_network(there).eval()
    load_pretrained(theirs, folder, spatial_dims=there.data.spatial_dims)
    torch.manual_seed(7)
    ours = new_network(here).eval()
    found = load_pretrained(ours, folder, spatial_dims=here.data.spatial_dims, config=here)
    return theirs, ours, found


def answer(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images)


@pytest.mark.parametrize("name", list_networks())
def test_labels_and_channels_in_another_order_give_the_same_answers(tmp_path: Path, name: str) -> None:
    def config(labels: dict[str, int], channels: list[str]) -> Config:
        values = {
            "data": {"spatial_dims": 2, "labels": labels, "channels": channels},
            "preprocess": {"intensity": [{}] * 3},
            "network": small(name).model_dump(mode="json"),
            "augment": {"rotation_deg": [20.0], "flip_axes": [0]},
            "windows": {"patch_size": [64, 64]},
        }
        return make_config(values)

    theirs, ours, found = carry(
        tmp_path, config({"a": 1, "b": 2}, ["x", "y", "z"]), config({"b": 1, "a": 2}, ["z", "x", "y"])
    )
    assert not [r for r in found.rows if r.outcome in ("skipped", "fresh") or r.partly]
    images = torch.randn(1, 3, *odd_shape(name, 2), generator=torch.Generator().manual_seed(0))
    expected = answer(theirs, images)[:, [0, 2, 1]]
    assert expected.std() > 0
    difference = (answer(ours, images[:, [2, 0, 1]]) - expected).abs().max()
    assert difference < ROUNDING * expected.abs().max()


def test_the_rows_of_a_label_are_all_sub_pixels_of_its_block(tmp_path: Path) -> None:
    # a sub-pixel classifier: 2 × 2 × 2 rows for each of background, shell, core
    theirs, ours, found = carry(tmp_path, with_labels("shell", "core"), with_labels("lesion", "shell"))
    before, after = (network.head.classifier.weight for network in (theirs, ours))
    assert before.shape[0] == after.shape[0] == 24
    assert torch.equal(after[:8], before[:8])
    assert torch.equal(after[16:], before[8:16])
    # the rows of a new label start as equal sub-pixels, as in every new network
    assert torch.equal(after[8:16], after[8:9].expand(8, *after.shape[1:]))
    (row,) = (r for r in found.rows if r.key_here == "head.classifier.weight")
    assert (row.outcome, row.partly) == ("adapted", True)
    assert row.why == "labels taken over: background, shell; new: lesion"
    assert "head.classifier.weight" not in found.loaded
    assert "encoder.stem.0.weight" in found.loaded


@pytest.mark.parametrize("labels", [("shell",), ("core",), ("shell", "core", "rim"), ("rim", "core")])
def test_scores_of_labels_that_stay_are_the_same(tmp_path: Path, labels: tuple[str, ...]) -> None:
    theirs, ours, _ = carry(tmp_path, with_labels("shell", "core"), with_labels(*labels))
    images = torch.randn(1, 1, 9, 8, 7)
    before, after = answer(theirs, images), answer(ours, images)
    kept = [(1 + labels.index(n), 1 + ("shell", "core").index(n)) for n in labels if n != "rim"]
    assert torch.equal(after[:, [0, *(a for a, _ in kept)]], before[:, [0, *(b for _, b in kept)]])


def test_regions_and_labels_are_not_taken_for_each_other(tmp_path: Path) -> None:
    # a yes or no of its own against one choice among many; the shapes are equal
    regions = make_config(
        overlay(
            tiny_config().model_dump(mode="json"),
            {"data": {"labels": {"whole": [1, 2], "shell": [1], "core": [2]}, "region_values": [1, 2, 3]}},
        )
    )
    theirs, ours, found = carry(tmp_path, with_labels("shell", "core"), regions)
    assert not torch.equal(theirs.head.classifier.weight, ours.head.classifier.weight)
    skipped = {r.key_here: r.why for r in found.rows if r.outcome == "skipped"}
    assert skipped == dict.fromkeys(
        ("head.classifier.weight", "head.classifier.bias"),
        "regions and labels do not stand for each other: left as initialised",
    )


def test_a_new_channel_changes_nothing_at_first(tmp_path: Path) -> None:
    theirs, ours, found = carry(tmp_path, with_channels("T1", "FLAIR"), with_channels("CT", "FLAIR", "T1"))
    images = torch.randn(1, 3, 9, 8, 7)
    expected = answer(theirs, images[:, [2, 1]])
    assert (answer(ours, images) - expected).abs().max() < ROUNDING * expected.abs().max()
    partly = {r.key_here: r.why for r in found.rows if r.partly}
    assert partly == dict.fromkeys(
        ("encoder.stem.0.weight", "head.refine.0.weight"), "channels taken over by name; new: CT"
    )


def test_channels_without_namesakes_are_taken_one_by_one_or_dealt_out(tmp_path: Path) -> None:
    theirs, ours, found = carry(tmp_path / "a", with_channels("T1", "FLAIR"), with_channels("x", "y"))
    images = torch.randn(1, 2, 9, 8, 7)
    assert torch.equal(answer(ours, images), answer(theirs, images))
    assert {r.outcome for r in found.rows} == {"loaded"}
    theirs, ours, found = carry(tmp_path / "b", with_channels("T1"), with_channels("x", "y"))
    image = torch.randn(1, 1, 9, 8, 7)
    expected = answer(theirs, image)
    # two equal channels get the response that the one had, in the head that sees the image too
    assert (answer(ours, image.expand(-1, 2, -1, -1, -1)) - expected).abs().max() < ROUNDING * expected.abs().max()
    assert {r.why for r in found.rows if r.outcome == "adapted"} == {"1 input channels dealt out to 2"}


@pytest.mark.parametrize(
    ("there", "here", "order"),
    [
        (("zscore", "zscore"), ("zscore", "zscore"), (0, 1)),
        (("zscore", "zscore", "CT"), ("CT", "zscore", "zscore"), (1, 2, 0)),
    ],
)
def test_channels_of_one_name_are_taken_over_in_turn(
    tmp_path: Path, there: tuple[str, ...], here: tuple[str, ...], order: tuple[int, ...]
) -> None:
    theirs, ours, found = carry(tmp_path, with_channels(*there), with_channels(*here))
    assert not [r for r in found.rows if r.outcome in ("skipped", "fresh") or r.partly]
    images = torch.randn(1, len(here), 9, 8, 7)
    expected = answer(theirs, images[:, order])
    assert (answer(ours, images) - expected).abs().max() < ROUNDING * expected.abs().max()


def test_a_second_channel_of_a_name_that_was_there_once_is_new(tmp_path: Path) -> None:
    theirs, ours, found = carry(tmp_path, with_channels("zscore"), with_channels("zscore", "zscore"))
    before, after = (network.encoder.stem[0].weight for network in (theirs, ours))
    assert torch.equal(after[:, :1], before)
    assert after[:, 1:].abs().max() == 0
    assert {r.why for r in found.rows if r.partly} == {"channels taken over by name; new: zscore"}


def test_another_block_is_not_carried() -> None:
    # 8 sub-pixels for each label there, 27 here
    namesakes = Namesakes(with_labels("a").data, with_labels("a", "b").data, tiny_config().network)
    assert (
        namesakes.carry("head.classifier.weight", torch.ones(2 * 27, 64, 1, 1, 1), torch.ones(24, 64, 1, 1, 1)) is None
    )


def test_a_network_of_monais_is_looked_at_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(labels: dict[str, int], channels: list[str]) -> Config:
        arguments = {"channels": [8, 16], "strides": [2], "num_res_units": 2}
        values = {
            "data": {"labels": labels, "channels": channels},
            "preprocess": {"intensity": [{}] * len(channels)},
            "network": {"name": "monai.UNet", "arguments": arguments},
            "windows": {"patch_size": [32, 32, 32]},
        }
        return make_config(values)

    sizes: list[int] = []

    def watched(network: NetworkConfig, dims: int, inputs: int, outputs: int) -> nn.Module:
        sizes.extend((inputs, outputs))
        return build_bare(network, dims, inputs, outputs)

    monkeypatch.setattr("medseg.namesakes.build_bare", watched)
    there = config({"a": 1, "b": 2}, ["x", "y"])
    theirs, ours, _ = carry(tmp_path, there, config({"b": 1, "a": 2}, ["y", "x"]))
    # its memory grows with the square of either
    assert 2 < max(sizes) < 20
    images = torch.randn(1, 2, 9, 8, 7)
    expected = answer(theirs, images)[:, [0, 2, 1]]
    assert (answer(ours, images.flip(1)) - expected).abs().max() < ROUNDING * expected.abs().max()
    sizes.clear()
    carry(tmp_path, there, there)
    assert sizes == []


class _Fake(nn.Module):
    """A network with a shortcut unless there are 11 channels, and a layer that grows from 9 channels on."""

    def __init__(self, channels: int, scores: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3)
        if channels != 11:
            self.shortcut = nn.Conv2d(channels, 8, 1)
        self.wide = nn.Conv2d(8, max(8, channels), 1)
        self.head = nn.Conv2d(8, 4 * scores, 1)


@pytest.mark.parametrize(
    ("channels", "allowed"),
    [(1, range(99)), (2, range(99)), (4, range(99)), (1, (1, 2, 4, 8, 16)), (2, (1, 2, 4, 8, 16))],
)
def test_layers_that_come_and_go_with_a_number_are_seen_through(
    monkeypatch: pytest.MonkeyPatch, channels: int, allowed: range | tuple[int, ...]
) -> None:
    def fake(_: NetworkConfig, dims: int, inputs: int, outputs: int) -> nn.Module:
        if inputs not in allowed:
            raise ConfigError("not with so many")
        return _Fake(inputs, outputs)

    monkeypatch.setattr("medseg.namesakes.build_bare", fake)
    names = [f"c{n}" for n in range(channels)]
    namesakes = Namesakes(with_channels(*names, "more").data, with_channels(*names).data, tiny_config().network)
    told = {name: namesakes.concern(f"{name}.weight") for name in ("stem", "shortcut", "wide", "head")}
    assert told == {"stem": True, "shortcut": True, "wide": False, "head": False}


def test_a_network_that_is_another_with_each_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(_: NetworkConfig, dims: int, inputs: int, outputs: int) -> nn.Module:
        return nn.Conv2d(1, 2**outputs, 1)

    monkeypatch.setattr("medseg.namesakes.build_bare", fake)
    with pytest.raises(ConfigError, match=r"which weights of deeplabv3plus belong to which label cannot be told"):
        Namesakes(with_labels("a").data, with_labels("b").data, tiny_config().network)


def test_a_bare_network_takes_them_too(tmp_path: Path) -> None:
    tiny_model(tmp_path, with_labels("shell", "core"))
    here = with_labels("shell")
    with torch.device("meta"):
        network = new_network(here)
    found = load_pretrained(network, tmp_path, spatial_dims=3, config=here)
    assert found.count("adapted") == 2


def test_what_differs_is_told() -> None:
    there = with_channels("T1", "FLAIR", preprocess={"spacing_mm": [1, 1, 1]})
    here = with_channels(
        "FLAIR",
        preprocess={"spacing_mm": [1, 1, 3], "intensity": [{"normalise": "none"}]},
        windows={"patch_size": [16, 8, 8]},
        network={"norm": "group"},
    )
    found = differences(there, here)
    assert [str(d) for d in found] == [
        "channels: [T1, FLAIR] where the weights were learnt, [FLAIR] here",
        "preprocess.spacing_mm: [1.0, 1.0, 1.0] where the weights were learnt, [1.0, 1.0, 3.0] here",
        "preprocess.intensity of FLAIR: {normalise: image, mean: 0.0, sd: 1.0} where the weights were learnt, "
        "{normalise: none, mean: 0.0, sd: 1.0} here",
        "windows.patch_size: [8, 8, 8] where the weights were learnt, [16, 8, 8] here",
        "network.norm: instance where the weights were learnt, group here",
    ]
    assert [d.far for d in found] == [False, True, False, False, False]
    assert differences(there, there) == ()


def test_what_differs_is_told_of_each_channel_of_a_name() -> None:
    there, here = (
        with_channels("zscore", "zscore", preprocess={"intensity": [{"normalise": n} for n in kinds]})
        for kinds in (("image", "none"), ("none", "none"))
    )
    (difference,) = differences(there, here)
    assert str(difference).startswith("preprocess.intensity of zscore: {normalise: image, ")


@pytest.mark.parametrize(("spacing", "far"), [((1.4, 1, 1), False), ((1, 0.6, 1), True), (None, True)])
def test_a_spacing_far_from_the_learnt_one_is_marked(spacing: tuple[float, ...] | None, far: bool) -> None:
    there, here = (tiny_config(preprocess={"spacing_mm": s}) for s in ((1, 1, 1), spacing))
    (difference,) = differences(there, here)
    assert difference.far is far


def test_regions_where_labels_were_learnt_are_marked() -> None:
    labels = with_labels("shell", "core")
    regions = tiny_config(data={"labels": {"shell": [1, 2], "core": [2]}, "region_values": [1, 2]})
    (difference,) = differences(regions, labels)
    assert difference.far
    assert "regions, which may overlap where the weights were learnt, labels, which do not here" in str(difference)


def test_pictures_where_volumes_were_learnt_are_told() -> None:
    flat = tiny_config(
        data={"spatial_dims": 2}, windows={"patch_size": [8, 8]}, augment={"rotation_deg": [9.0], "flip_axes": []}
    )
    assert str(differences(tiny_config(), flat)[0]) == "data.spatial_dims: 3 where the weights were learnt, 2 here"


def test_channels_that_are_added_up_are_not_said_to_have_namesakes(tmp_path: Path) -> None:
    *_, found = carry(tmp_path, with_channels("a", "b", "c"), with_channels("x", "y"))
    assert {r.why for r in found.rows if r.outcome == "adapted"} == {"3 input channels dealt out to 2"}


def test_of_many_labels_the_first_are_told() -> None:
    many = with_labels(*(f"l{n:03}" for n in range(200)))
    (difference,) = differences(many, with_labels("shell"))
    assert "l011 and 188 more] where" in str(difference)
    assert len(str(difference)) < 200
