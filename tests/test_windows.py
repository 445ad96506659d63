"""The sliding window: it covers everything, gives back what the scorer says, and averages flips and scorers."""

from __future__ import annotations

import itertools

import pytest
import torch

from medseg.config import WindowsConfig
from medseg.windows import Flips, importance, predict, starts

PATCH = (4, 6, 5)


def a_volume(*shape: int, channels: int = 2) -> torch.Tensor:
    return torch.randn(channels, *shape, generator=torch.Generator().manual_seed(0))


def same(windows: torch.Tensor) -> torch.Tensor:
    return windows


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(4, 6, 5), (9, 13, 11), (2, 3, 4), (1, 20, 3), (5, 7, 6)])
def test_overlapping_windows_give_back_what_the_scorer_says(shape: tuple[int, ...], overlap: float) -> None:
    volume = a_volume(*shape)
    found = predict(WindowsConfig(patch_size=PATCH, overlap=overlap), volume, [same])
    assert found.shape == volume.shape
    # weights from 1e-3 to 1 in float32
    assert torch.allclose(found, volume, atol=1e-5)


@pytest.mark.parametrize("shape", [(10,), (3,), (9, 7), (2, 11)])
def test_one_and_two_dimensions(shape: tuple[int, ...]) -> None:
    volume = a_volume(*shape)
    found = predict(WindowsConfig(patch_size=PATCH[: len(shape)]), volume, [same])
    assert torch.allclose(found, volume, atol=1e-5)


def test_the_scorer_sees_whole_patches_in_batches_and_zeros_outside() -> None:
    seen = []

    def watch(windows: torch.Tensor) -> torch.Tensor:
        seen.append(windows)
        return windows

    predict(WindowsConfig(patch_size=PATCH, batch_size=3), torch.ones(1, 9, 2, 5), [watch])
    assert [tuple(w.shape[1:]) for w in seen] == [(1, *PATCH)] * len(seen)
    assert [len(w) for w in seen] == [3, 1]
    # 2 of 6 rows, in the middle
    assert seen[0][0, 0, 0, :, 0].tolist() == [0, 0, 1, 1, 0, 0]


def test_batch_size_does_not_matter() -> None:
    volume = a_volume(9, 13, 11)
    one, many = (predict(WindowsConfig(patch_size=PATCH, batch_size=n), volume, [same]) for n in (1, 100))
    assert torch.equal(one, many)


@pytest.mark.parametrize(
    ("size", "patch", "overlap", "expected"),
    [
        (4, 4, 0.5, [0]),
        (3, 4, 0.5, [0]),
        (5, 4, 0.5, [0, 1]),
        (8, 4, 0.5, [0, 2, 4]),
        (8, 4, 0.0, [0, 4]),
        (9, 4, 0.0, [0, 2, 5]),
        (12, 4, 0.75, list(range(9))),
    ],
)
def test_starts_by_hand(size: int, patch: int, overlap: float, expected: list[int]) -> None:
    assert starts(size, patch, overlap) == expected


def test_starts_cover_with_at_least_the_overlap() -> None:
    for size, patch, overlap in itertools.product(range(1, 40), (1, 3, 8, 10), (0.0, 0.3, 0.5, 0.7, 0.9)):
        found = starts(size, patch, overlap)
        assert found[0] == 0
        assert found[-1] + patch >= size
        assert found[-1] == max(0, size - patch)
        for a, b in itertools.pairwise(found):
            # a patch of 1 voxel cannot share a part of itself and go on
            assert 0 < b - a <= max(1, patch * (1 - overlap) + 1e-9)


def test_importance_is_one_in_the_middle_symmetric_and_never_zero() -> None:
    weight = importance((9, 16))
    assert float(weight.max()) == 1
    assert torch.equal(weight, weight.flip(0).flip(1))
    assert float(weight.min()) >= 1e-3
    # σ is an eighth of the patch: the voxel one σ (2) from the middle pair is exp(−½·(2.5² − 0.5²)/2²) of it
    assert float(weight[4, 5] / weight[4, 7]) == pytest.approx(2.718281828 ** (-0.5 * (2.5**2 - 0.5**2) / 4), rel=1e-4)


def slope(axis: int) -> torch.Tensor:
    """−1.5 … 1.5 and the like along one axis of a window: turned round it is its own negative."""
    size = PATCH[axis]
    return (torch.arange(size) - (size - 1) / 2).reshape([size if a == axis else 1 for a in range(3)])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_is_undone_before_the_mean(axis: int) -> None:
    volume = a_volume(*PATCH)
    tilted = predict(WindowsConfig(patch_size=PATCH), volume, [lambda w: w + slope(axis)])
    level = predict(WindowsConfig(patch_size=PATCH), volume, [lambda w: w + slope(axis)], flips=Flips((axis,)))
    assert torch.allclose(tilted, volume + slope(axis), atol=1e-5)
    assert torch.allclose(level, volume, atol=1e-5)


def test_all_combinations_of_flips_count_once() -> None:
    seen = []

    def watch(windows: torch.Tensor) -> torch.Tensor:
        seen.append(windows.clone())
        return windows

    volume = a_volume(*PATCH)
    predict(WindowsConfig(patch_size=PATCH), volume, [watch], flips=Flips((0, 2)))
    wanted = [volume[None].flip(dims) if dims else volume[None] for dims in ((), (2,), (4,), (2, 4))]
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted))


def test_several_scorers_give_their_mean() -> None:
    volume = a_volume(9, 7, 8)
    found = predict(WindowsConfig(patch_size=PATCH), volume, [same, lambda w: 3 * w, lambda w: w + 6])
    assert torch.allclose(found, (5 * volume + 6) / 3, atol=1e-4)


def test_no_scorer_is_an_error() -> None:
    with pytest.raises(ValueError, match="no network"):
        predict(WindowsConfig(patch_size=PATCH), a_volume(*PATCH), [])
