"""The way back: labels are exact where voxels only move, whatever the pieces, and none is left out wrongly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from geometry import oblique, orientations, reorient

from medseg import grid as grid_module
from medseg.config import DataConfig
from medseg.errors import GeometryError
from medseg.grid import Grid, resample
from medseg.restore import Piece, Regions, Restorer, Strongest, decision_of, restore

SPACING = (1.0, 1.5, 2.5)


def source(shape: tuple[int, ...] = (4, 5, 7)) -> Grid:
    return Grid(shape, oblique(SPACING))


def random_scores(channels: int, shape: tuple[int, ...], *, seed: int = 0, sharpness: float = 4.0) -> torch.Tensor:
    noise = torch.randn(channels, *shape, generator=torch.Generator().manual_seed(seed))
    return (sharpness * noise).softmax(dim=0)


def one_hot(labels: torch.Tensor, channels: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels.long(), channels).movedim(-1, 0).float()


def in_pieces(
    scores: torch.Tensor, here: Grid, there: Grid, decision: Strongest | Regions, size: int, order: tuple[int, ...]
) -> torch.Tensor:
    """`restore` with pieces of `size` voxels along every axis, `order`'s last axis fastest."""
    restorer = Restorer(here, there, decision, order=order)
    cuts = [range(0, here.shape[a], size) for a in order]
    for found in itertools.product(*cuts):
        start = tuple(found[order.index(a)] for a in range(len(order)))
        box = tuple(slice(a, a + size) for a in start)
        restorer.add(Piece(start, scores.movedim(0, -1)[box]))
    return restorer.labels


def test_labels_turn_back_in_all_48_orientations() -> None:
    here = source()
    labels = np.random.default_rng(1).integers(0, 3, here.shape)
    scores = one_hot(torch.as_tensor(labels), 3)
    for order, flipped in orientations():
        turned, affine = reorient(labels, here.affine, order, flipped)
        result = restore(scores, here, Grid(turned.shape, affine), Strongest((0, 1, 2)))
        assert torch.equal(result, torch.as_tensor(turned).to(torch.uint8)), (order, flipped)


@pytest.mark.parametrize(("value", "dtype"), [(200, torch.uint8), (300, torch.uint16)])
def test_outside_a_crop_all_is_background(value: int, dtype: torch.dtype) -> None:
    whole = source((6, 7, 8))
    affine = whole.affine.copy()
    affine[:, 3] = whole.affine @ [1, 2, 3, 1]
    part = Grid((3, 2, 4), affine)
    scores = torch.zeros(2, *part.shape)
    scores[1] = 1
    result = restore(scores, part, whole, Strongest((0, value)))
    expected = torch.zeros(whole.shape, dtype=torch.int32)
    expected[1:4, 2:4, 3:7] = value
    assert result.dtype == dtype
    assert torch.equal(result.int(), expected)


def test_a_grid_that_lies_apart_is_all_background() -> None:
    here = source()
    apart = here.affine.copy()
    apart[:, 3] = here.affine @ [50, 0, 0, 1]
    assert not restore(torch.ones(1, *here.shape), here, Grid(here.shape, apart), Regions((7,))).any()


def test_a_cropped_coarse_grid_ends_at_the_faces_of_its_voxels() -> None:
    # one axis that counts: coarse voxels of 2 mm with centres at 4.5 and 6.5 mm cover 3.5…7.5 mm
    coarse = Grid((2, 1, 1), np.array([[2.0, 0, 0, 4.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    fine = Grid((10, 1, 1), np.eye(4))
    result = restore(torch.ones(1, 2, 1, 1), coarse, fine, Regions((1,)))
    assert result[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("size", [7, 12, 109, 127])
@pytest.mark.parametrize("spacing", [0.7, 1.9, 2.0, 5.0])
def test_nothing_of_an_uncropped_image_is_lost(size: int, spacing: float) -> None:
    here = Grid((size, 3, 2), np.eye(4))
    there = here.with_spacing((spacing, 1.0, 1.0))
    assert restore(torch.ones(1, *there.shape), there, here, Regions((1,))).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("spacing", [SPACING, (0.6, 1.9, 1.1), (2.7, 1.0, 4.9), (0.4, 0.4, 0.4)])
def test_pieces_of_any_size_in_any_order_give_the_labels_of_the_whole(
    size: int, order: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    here = source((5, 6, 7))
    # turned, mirrored and of another spacing
    shape, affine = (7, 5, 6), here.affine[:, [2, 0, 1, 3]].copy()
    affine[:, 3] += 4 * affine[:, 1]
    affine[:, 1] *= -1
    there = Grid(shape, affine).with_spacing([spacing[2], spacing[0], spacing[1]])
    scores = random_scores(6, here.shape)
    decision = Strongest((0, 1, 2, 3, 4, 5))
    # the strongest of what was interpolated in full
    expected = resample(scores, here, there).argmax(dim=0).to(torch.uint8)
    assert torch.equal(restore(scores, here, there, decision), expected)
    assert torch.equal(in_pieces(scores, here, there, decision, size, order), expected)


@pytest.mark.parametrize("shape", [(9,), (6, 7)])
def test_one_and_two_dimensions(shape: tuple[int, ...]) -> None:
    here = Grid(shape, np.eye(len(shape) + 1))
    there = here.with_spacing((0.7,) * len(shape))
    scores = random_scores(4, shape)
    expected = resample(scores, here, there).argmax(dim=0).to(torch.uint8)
    order = tuple(reversed(range(len(shape))))
    assert torch.equal(in_pieces(scores, here, there, Strongest((0, 1, 2, 3)), 2, order), expected)


def test_labels_on_long_axes_are_those_on_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Grid((12, 9, 20), oblique((1.0, 1.5, 2.5)))
    there, scores = here.with_spacing((0.7, 2.0, 2.5)), random_scores(4, here.shape)
    expected = restore(scores, here, there, Strongest((0, 1, 2, 3)))
    monkeypatch.setattr(grid_module, "MOST_WEIGHTS", 1)
    # a label would differ where two scores are equal to rounding alone
    assert torch.equal(restore(scores, here, there, Strongest((0, 1, 2, 3))), expected)


def test_later_regions_overwrite_earlier_ones_also_between_voxels() -> None:
    here = source((5, 6, 7))
    there = here.with_spacing((0.6, 1.9, 1.1))
    scores = torch.rand(3, *here.shape, generator=torch.Generator().manual_seed(3))
    fine = resample(scores, here, there)
    expected = torch.zeros(there.shape, dtype=torch.uint8)
    for value, score in zip((4, 9, 2), fine):
        expected[score > 0.5] = value
    assert torch.equal(in_pieces(scores, here, there, Regions((4, 9, 2)), 3, (1, 0, 2)), expected)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("seed", range(5))
def test_no_label_that_could_win_between_voxels_is_left_out(seed: int, sharpness: float) -> None:
    scores = random_scores(40, (3, 2, 3), seed=seed, sharpness=sharpness)
    here = Grid((3, 2, 3), np.eye(4))
    kept = set(Strongest(tuple(range(40))).candidates(scores.movedim(0, -1)))
    winners = resample(scores, here, here.with_spacing((0.1, 0.1, 0.1))).argmax(dim=0)
    assert set(winners.unique().tolist()) <= kept


def test_few_labels_are_looked_at_where_few_can_be() -> None:
    scores = torch.full((2, 2, 2, 61), 0.001)
    scores[..., 7], scores[0, ..., 9] = 0.9, 0.3
    decision = Strongest(tuple(range(61)))
    assert list(decision.candidates(scores)) == [7, 9]
    assert list(decision.candidates(scores[1:])) == [7]
    assert decision.constant([7]) == 7
    assert decision.constant([7, 9]) is None


def test_of_equal_scores_the_first_label_wins() -> None:
    here = Grid((2, 1, 1), np.eye(4))
    assert restore(torch.full((3, 2, 1, 1), 1 / 3), here, here, Strongest((5, 6, 7))).unique().tolist() == [5]
    assert restore(torch.full((2, 2, 1, 1), 0.5), here, here, Strongest((5, 6))).unique().tolist() == [5]


def test_where_memory_runs_out_blocks_get_smaller_and_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = source((5, 6, 7))
    there = here.with_spacing((0.1, 0.2, 0.3))
    scores = random_scores(4, here.shape)
    expected = restore(scores, here, there, Strongest((0, 1, 2, 3)))
    whole = Strongest.decide

    def small_device(self: Strongest, scores: torch.Tensor, channels: list[int]) -> torch.Tensor:
        if scores[..., 0].numel() > 20**3:
            raise torch.OutOfMemoryError("too much")
        return whole(self, scores, channels)

    monkeypatch.setattr(Strongest, "decide", small_device)
    assert torch.equal(restore(scores, here, there, Strongest((0, 1, 2, 3))), expected)
    assert "blocks of 24 voxels" in caplog.text
    assert "blocks of 12 voxels" in caplog.text


def test_the_decision_follows_the_labels_of_the_data() -> None:
    assert decision_of(DataConfig(labels={"a": 3, "b": 200})) == Strongest((0, 3, 200))
    regions = DataConfig(labels={"whole": (1, 2), "core": (2,)}, region_values=(1, 2))
    assert decision_of(regions) == Regions((1, 2))
    assert (Strongest((0, 255)).dtype, Strongest((0, 256)).dtype) == (torch.uint8, torch.uint16)


def test_grids_oblique_to_each_other_are_refused() -> None:
    here = source()
    tilted = Grid(here.shape, oblique(SPACING, degrees=21))
    with pytest.raises(GeometryError, match="oblique to each other"):
        restore(torch.zeros(1, *here.shape), here, tilted, Strongest((0,)))


def test_scores_that_are_not_on_their_grid_are_refused() -> None:
    with pytest.raises(GeometryError, match="on a grid of"):
        restore(torch.zeros(1, 7, 5, 4), source(), source(), Strongest((0,)))
