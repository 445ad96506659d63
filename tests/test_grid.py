"""Grids: turns, flips and crops are exact, ramps and parabolas are reproduced, and nothing oblique slips through."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from geometry import oblique, orientations, reorient

from medseg import grid as grid_module
from medseg.errors import GeometryError
from medseg.grid import AxisWeights, Grid, nearest_ras, resample, resample_labels, turned

SPACING = (0.9, 1.7, 3.1)


def source(shape: tuple[int, int, int] = (4, 5, 7)) -> Grid:
    return Grid(shape, oblique(SPACING))


def voxel_positions(grid: Grid) -> np.ndarray:
    """(*shape, 3) in mm."""
    index = np.stack(np.meshgrid(*[np.arange(s) for s in grid.shape], indexing="ij"), -1)
    return index @ grid.affine[:3, :3].T + grid.affine[:3, 3]


def one_hot(labels: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([(labels == k).float() for k in range(count)])


def strongest(scores: torch.Tensor) -> torch.Tensor:
    return scores.argmax(dim=0).to(torch.uint8)


# ---- grids


def test_axes_are_turned_to_those_of_another_grid_and_voxels_stay_where_they_are() -> None:
    array = np.arange(4 * 5 * 7).reshape(4, 5, 7)
    for order, flipped in orientations():
        other, affine = reorient(array, source().affine, order, flipped)
        moved, grid = turned(other, Grid(other.shape, affine), source())
        np.testing.assert_array_equal(moved, array)
        np.testing.assert_allclose(grid.affine, source().affine, atol=1e-12)


def test_a_grid_of_another_size_and_place_is_turned_too() -> None:
    like = Grid((9, 9, 9), source().affine @ np.diag([-2.0, 1, 1, 1]))
    moved, grid = turned(np.arange(140).reshape(4, 5, 7), source(), like)
    assert moved[0, 0, 0] == 3 * 35
    np.testing.assert_allclose(grid.affine[:, 3], source().affine @ [3, 0, 0, 1])


def test_spacing_of_an_oblique_grid_is_the_length_of_its_axes() -> None:
    assert source().spacing_mm == pytest.approx(SPACING)


# 1 × 1 × 5 mm, the planes shifted as by a gantry tilted by 20 degrees
SHEARED = np.eye(4)
SHEARED[:3, 2] = [0, 5 * np.sin(np.deg2rad(20)), 5 * np.cos(np.deg2rad(20))]


def test_a_voxel_between_oblique_axes_has_the_volume_of_a_parallelepiped() -> None:
    assert source().voxel_mm3 == pytest.approx(np.prod(SPACING))
    # base 1 mm², height 5 mm · cos 20°
    assert Grid((3, 3, 3), SHEARED).voxel_mm3 == pytest.approx(4.698463)
    assert Grid((3, 3), np.array([[1, 1, 0], [0, 2, 0], [0, 0, 1.0]])).voxel_mm3 == pytest.approx(2)


def test_skew_is_the_cosine_between_axes() -> None:
    assert Grid((3, 3, 3), SHEARED).skew == pytest.approx(np.sin(np.deg2rad(20)))
    # rounding of products of sines and cosines
    assert source().skew == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "affine", "words"),
    [
        ((3, 3, 3), np.eye(3), "affine of shape"),
        ((3, 0, 3), np.eye(4), "at least one voxel"),
        ((3, 3, 3), np.diag([1, np.nan, 1, 1]), "NaN"),
        ((3, 3, 3), np.diag([1, 0, 1, 1]), "singular"),
        ((2, 2), np.array([[1, 2, 0], [2, 4, 0], [0, 0, 1]]), "singular"),
    ],
)
def test_impossible_grids_are_refused(shape: tuple[int, ...], affine: np.ndarray, words: str) -> None:
    with pytest.raises(GeometryError, match=words):
        Grid(shape, affine)


def test_grids_match_up_to_the_tolerance_in_voxels_of_the_finest_axis() -> None:
    grid = source()
    moved = grid.affine.copy()
    moved[0, 3] += 0.05 * 0.9
    assert not grid.matches(Grid(grid.shape, moved))
    assert grid.matches(Grid(grid.shape, moved), tolerance=0.06)
    assert not grid.matches(Grid(grid.shape, moved), tolerance=0.04)


def test_grids_of_other_shape_never_match() -> None:
    assert not source((4, 5, 7)).matches(source((4, 5, 6)), tolerance=1e9)


def test_a_tilt_counts_at_the_far_corner() -> None:
    long = Grid((1001, 2, 2), np.eye(4))
    tilted = np.eye(4)
    tilted[1, 0] = 1e-4
    assert long.matches(Grid(long.shape, tilted), tolerance=0.11)
    assert not long.matches(Grid(long.shape, tilted), tolerance=0.09)


def test_with_spacing_keeps_outer_faces() -> None:
    grid = Grid((6, 4, 10), oblique((1.0, 1.5, 0.5)))
    finer = grid.with_spacing((0.5, 3.0, 1.0))
    assert finer.shape == (12, 2, 5)
    assert finer.spacing_mm == pytest.approx((0.5, 3.0, 1.0))
    for low, high in ((grid, finer), (finer, grid)):
        # the same faces, whichever is asked: the corner at index −1/2
        corner = np.array([-0.5, -0.5, -0.5, 1])
        np.testing.assert_allclose(low.affine @ corner, high.affine @ corner, atol=1e-12)


def test_with_shape_keeps_outer_faces_of_a_picture() -> None:
    grid = Grid((30, 20), np.eye(3)).with_shape((10, 40))
    assert grid.spacing_mm == (3.0, 0.5)
    np.testing.assert_allclose(grid.affine @ [-0.5, -0.5, 1], [-0.5, -0.5, 1])


@pytest.mark.parametrize("size", [20, 21, 22])
def test_whole_and_half_voxels_give_one_shape_whatever_the_rounding_of_the_header(size: int) -> None:
    shapes = {
        Grid((size, 4, 4), np.diag([1 + change, 1, 1, 1])).with_spacing((2, 1, 1)).shape for change in (-1e-7, 0, 1e-7)
    }
    assert shapes == {(-(-size // 2), 4, 4)}


def test_a_coarse_spacing_leaves_one_voxel() -> None:
    assert Grid((3, 3, 3), np.eye(4)).with_spacing((100, 1, 1)).shape == (1, 3, 3)


# ---- turns, flips, crops


@pytest.mark.parametrize("kernel", ["nearest", "linear", "cubic"])
def test_all_48_orientations_of_an_oblique_volume_come_out_exactly(kernel: grid_module.Kernel) -> None:
    here = source()
    array = np.random.default_rng(0).normal(size=here.shape).astype(np.float32)
    for order, flipped in orientations():
        turned, affine = reorient(array, here.affine, order, flipped)
        # as a header would hold it
        there = Grid(turned.shape, affine.astype(np.float32).astype(np.float64))
        result = resample(torch.as_tensor(array)[None], here, there, kernel=kernel)
        assert torch.equal(result[0], torch.as_tensor(turned)), (order, flipped)


def test_a_crop_is_exact() -> None:
    here = source()
    array = torch.randn(2, *here.shape, generator=torch.Generator().manual_seed(0))
    affine = here.affine.copy()
    affine[:, 3] = here.affine @ [1, 2, 3, 1]
    result = resample(array, here, Grid((2, 3, 4), affine), kernel="cubic")
    assert torch.equal(result, array[:, 1:3, 2:5, 3:7])


# ---- spacings


def ramp(grid: Grid) -> torch.Tensor:
    """2x − 3y + 0.5z + 7 mm at the centres of the voxels."""
    return torch.as_tensor(voxel_positions(grid) @ [2.0, -3.0, 0.5] + 7, dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["linear", "cubic"])
@pytest.mark.parametrize("spacing", [(0.45, 1.1, 2.0), (0.9, 0.3, 3.1), (1.8, 1.7, 3.1), (1.8, 5.1, 9.3)])
def test_a_ramp_stays_a_ramp_when_spacing_changes(kernel: grid_module.Kernel, spacing: tuple[float, ...]) -> None:
    here = source((18, 21, 24))
    there = here.with_spacing(spacing)
    result = resample(ramp(here)[None], here, there, kernel=kernel)[0]
    # two voxels of the coarser grid: as far as a kernel reaches
    edge = tuple(
        slice(e, s - e)
        for s, e in zip(there.shape, (int(np.ceil(2 * max(1, a / b))) for a, b in zip(SPACING, spacing)))
    )
    inner = result[edge]
    assert inner.numel() > 0
    # values reach 150 in float32
    np.testing.assert_allclose(inner, ramp(there)[edge], atol=1e-4)


def test_keys_cubic_reproduces_a_parabola() -> None:
    weights = AxisWeights(12, 40, 0.3, -0.1, "cubic").whole
    at = 0.3 * np.arange(40) - 0.1
    inside = (at > 1) & (at < 10)
    np.testing.assert_allclose((weights @ (np.arange(12.0) ** 2))[inside], at[inside] ** 2, atol=1e-12)


def test_keys_cubic_half_way_has_the_weights_of_the_paper() -> None:
    assert AxisWeights(4, 1, 1.0, 1.5, "cubic").whole[0] == pytest.approx([-1 / 16, 9 / 16, 9 / 16, -1 / 16])


@pytest.mark.parametrize("kernel", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize(("scale", "offset"), [(0.3, -2.0), (1.0, 0.5), (2.7, 0.4), (-2.7, 25.0), (8.0, 3.5)])
def test_weights_of_every_row_sum_to_one(kernel: grid_module.Kernel, scale: float, offset: float) -> None:
    weights = AxisWeights(11, 13, scale, offset, kernel).whole
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("kernel", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize(
    ("scale", "offset"), [(1.0, 0.0), (0.3, -2.0), (1.0, 0.5), (-1.0, 10.0), (2.7, 0.4), (-2.7, 25.0), (8.0, 3.5)]
)
def test_some_rows_after_the_other_have_the_weights_of_the_whole(
    kernel: grid_module.Kernel, scale: float, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = AxisWeights(11, 13, scale, offset, kernel).whole
    monkeypatch.setattr(grid_module, "MOST_WEIGHTS", 11 * 13 - 1)
    monkeypatch.setattr(grid_module, "ROWS", 4)
    weights = AxisWeights(11, 13, scale, offset, kernel)
    assert weights.whole is None
    found, row = np.zeros((13, 11)), 0
    for columns, part in weights.parts():
        found[row : row + len(part), columns] = part
        row += len(part)
    # rows are divided by their sum, which is rounded by the order of what is added
    np.testing.assert_allclose(found, whole, atol=1e-15)
    first, last = weights.reach
    assert all(not row[:a].any() and not row[b + 1 :].any() for row, a, b in zip(whole, first, last))
    assert row == 13


@pytest.mark.parametrize("kernel", ["nearest", "linear", "cubic"])
def test_long_axes_are_read_as_short_ones_are(kernel: grid_module.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    here = source((18, 21, 24))
    there, volume = here.with_spacing((1.1, 0.7, 4.0)), torch.randn(2, *here.shape)
    whole = resample(volume, here, there, kernel=kernel)
    # fewer than any axis has, and enough for five rows
    monkeypatch.setattr(grid_module, "MOST_WEIGHTS", 300)
    monkeypatch.setattr(grid_module, "ROWS", 5)
    # products of float32 are added in another order
    assert torch.allclose(resample(volume, here, there, kernel=kernel), whole, atol=1e-6)
    assert torch.equal(resample(volume, here, here, kernel=kernel), volume)


@pytest.mark.parametrize("kernel", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("scale", [1.0, 7.3, -60.0, 100.0])
def test_of_an_axis_that_shrinks_much_fewer_rows_are_made_at_once(
    kernel: grid_module.Kernel, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "MOST_WEIGHTS", 2**14)
    weights = AxisWeights(int(200 * abs(scale)), 200, scale, 0.0 if scale > 0 else 199 * 60, kernel)
    sizes = [part.size for _, part in weights.parts()]
    assert max(sizes) <= 2**14
    # not one by one: ten rows of a hundred voxels each, and what they reach, are 14,000 weights
    assert len(sizes) <= 20


def test_what_a_long_signal_takes_does_not_grow_with_its_square() -> None:
    # all weights of it would be 288 MB
    here, signal = Grid((6000,), np.eye(2)), torch.arange(6000.0)[None]
    tracemalloc.start()
    same, halved = (resample(signal, here, grid) for grid in (here, here.with_spacing((2.0,))))
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 20e6
    assert torch.equal(same, signal)
    # voxel 100 lies between 200 and 201, and reads as much on either side
    assert float(halved[0, 100]) == 200.5


def test_shrinking_averages_instead_of_skipping() -> None:
    # a stripe pattern that the coarse grid cannot hold becomes its mean
    here = Grid((16, 1, 1), np.eye(4))
    stripes = (torch.arange(16) % 2).float().reshape(1, 16, 1, 1)
    result = resample(stripes, here, here.with_spacing((4, 1, 1)))
    np.testing.assert_allclose(result[0, 1:-1, 0, 0], 0.5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["nearest", "linear", "cubic"])
def test_outside_the_edge_voxel_goes_on(kernel: grid_module.Kernel) -> None:
    here = Grid((3, 1, 1), np.eye(4))
    wide = np.eye(4)
    wide[0, 3] = -4
    values = torch.tensor([5.0, 6.0, 8.0]).reshape(1, 3, 1, 1)
    result = resample(values, here, Grid((11, 1, 1), wide), kernel=kernel)[0, :, 0, 0]
    np.testing.assert_allclose(result, [5, 5, 5, 5, 5, 6, 8, 8, 8, 8, 8], atol=1e-6)


# ---- labels


def test_resampled_labels_hold_no_new_value() -> None:
    here = source((6, 7, 8))
    values = torch.tensor([0, 3, 200, 40000], dtype=torch.int32)
    labels = values[torch.randint(0, 4, here.shape, generator=torch.Generator().manual_seed(3))]
    for spacing in ((0.5, 0.5, 0.5), (1.3, 2.9, 4.0)):
        result = resample_labels(labels, here, here.with_spacing(spacing))
        assert result.dtype == torch.int32
        assert set(result.unique().tolist()) <= set(values.tolist())


def test_labels_turn_exactly() -> None:
    here = source()
    labels = np.random.default_rng(4).integers(0, 300, here.shape).astype(np.int32)
    for order, flipped in orientations():
        turned, affine = reorient(labels, here.affine, order, flipped)
        assert torch.equal(
            resample_labels(torch.as_tensor(labels), here, Grid(turned.shape, affine)), torch.as_tensor(turned)
        )


def test_a_label_edge_stays_in_its_place_when_the_spacing_is_halved() -> None:
    here = Grid((6, 2, 2), np.eye(4))
    labels = torch.zeros(here.shape, dtype=torch.uint8)
    labels[3:] = 7
    finer = resample_labels(labels, here, here.with_spacing((0.5, 1, 1)))
    assert finer[:, 0, 0].tolist() == [0] * 6 + [7] * 6


# ---- what is refused


@pytest.mark.parametrize("function", ["resample", "resample_labels"])
def test_grids_oblique_to_each_other_are_refused(function: str) -> None:
    here = source()
    tilted = Grid(here.shape, oblique(SPACING, degrees=21))
    with pytest.raises(GeometryError, match="oblique to each other"):
        {
            "resample": lambda: resample(torch.zeros(1, *here.shape), here, tilted),
            "resample_labels": lambda: resample_labels(torch.zeros(here.shape), here, tilted),
        }[function]()


def test_a_sheared_grid_is_refused() -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    with pytest.raises(GeometryError, match="oblique"):
        resample(torch.zeros(1, 3, 3, 3), Grid((3, 3, 3), np.eye(4)), Grid((3, 3, 3), sheared))


def test_a_volume_that_is_not_on_its_grid_is_refused() -> None:
    with pytest.raises(GeometryError, match="on a grid of"):
        resample(torch.zeros(1, 7, 5, 4), source(), source())


def test_grids_of_other_dimensions_are_refused() -> None:
    with pytest.raises(GeometryError, match="2 axes"):
        resample(torch.zeros(1, 4, 5, 7), source(), Grid((4, 5), np.eye(3)))


@pytest.mark.parametrize(("order", "flips"), itertools.product([(0, 1), (1, 0)], [(1, 1), (-1, 1), (1, -1), (-1, -1)]))
def test_pictures_turn_exactly_too(order: tuple[int, int], flips: tuple[int, int]) -> None:
    picture = torch.arange(12.0).reshape(1, 3, 4)
    change = np.zeros((3, 3))
    change[2, 2] = 1
    for new, old in enumerate(order):
        change[old, new] = flips[new]
        change[old, 2] = (3, 4)[old] - 1 if flips[new] < 0 else 0
    expected = picture.permute(0, 1 + order[0], 1 + order[1]).flip([1 + a for a in range(2) if flips[a] < 0])
    result = resample(picture, Grid((3, 4), np.eye(3)), Grid(tuple(expected.shape[1:]), change))
    assert torch.equal(result, expected)


def test_a_plane_lies_in_the_first_two_of_three_axes() -> None:
    grid = Grid((3, 2), np.array([[0.0, 2, 5], [3, 0, 6], [0, 0, 1]]))
    assert grid.affine_4x4.tolist() == [[0, 2, 0, 5], [3, 0, 0, 6], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("degrees", [0, 20, 40])
def test_48_ways_to_store_a_volume_come_out_in_one_order(degrees: float) -> None:
    volume, affine = np.arange(24).reshape(2, 3, 4), oblique((1.0, 1.5, 2.5), degrees=degrees)
    for order, flipped in orientations():
        stored, place = reorient(volume, affine, order, flipped)
        np.testing.assert_array_equal(nearest_ras(stored, Grid(stored.shape, place)), volume)
