"""Patches: what is cut, how often each case and label comes, and that a state brings the same batches again."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from medseg.grid import Grid
from medseg.patches import Batch, PatchSampler, cut, foreground_locations
from medseg.preprocess import IGNORE_INDEX, Prepared

SHAPE = (9, 12, 15)


def a_case(name: str, label: torch.Tensor | None = None, shape: tuple[int, ...] = SHAPE) -> Prepared:
    # every voxel tells where it is
    image = torch.arange(1.0, 1 + np.prod(shape)).reshape(1, *shape)
    grid = Grid(shape, np.diag([1.0, 2.0, 3.0, 1.0]))
    label = torch.zeros(shape, dtype=torch.uint8) if label is None else label
    return Prepared(name, image, label, grid, grid, torch.zeros(len(image), 9))


def sampler(
    cases: list[Prepared],
    *,
    fraction: float = 0.0,
    batch: int = 2,
    patch: tuple[int, ...] = (4, 4, 4),
    seed: int = 0,
    ignore_value: int | None = None,
) -> PatchSampler:
    return PatchSampler(
        cases,
        patch_size=patch,
        batch_size=batch,
        foreground_fraction=fraction,
        generator=torch.Generator().manual_seed(seed),
        ignore_value=ignore_value,
    )


@pytest.mark.parametrize(
    ("start", "size", "expected"),
    [
        ((1, 1), (2, 2), [[5, 6], [8, 9]]),
        ((-1, 0), (2, 3), [[0, 0, 0], [1, 2, 3]]),
        ((2, 1), (2, 3), [[8, 9, 0], [0, 0, 0]]),
        ((-1, -1), (5, 5), [[0] * 5, [0, 1, 2, 3, 0], [0, 4, 5, 6, 0], [0, 7, 8, 9, 0], [0] * 5]),
        ((5, 0), (2, 2), [[0, 0], [0, 0]]),
        ((0, -9), (2, 2), [[0, 0], [0, 0]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int32])
def test_what_lies_outside_a_volume_is_zero(
    start: tuple[int, int], size: tuple[int, int], expected: list[list[int]], dtype: torch.dtype
) -> None:
    volume = torch.arange(1, 10).reshape(3, 3).to(dtype)
    assert cut(volume, start, size).tolist() == expected
    assert cut(volume[None, None], start, size)[0, 0].tolist() == expected


def test_every_case_comes_equally_often() -> None:
    cases = [a_case(f"c{n}") for n in range(5)]
    drawn = sampler(cases, batch=4)
    counts = Counter(name for _ in range(25) for name in drawn.draw().cases)
    assert counts == {f"c{n}": 20 for n in range(5)}


def test_cases_come_in_another_order_each_time() -> None:
    drawn = sampler([a_case(f"c{n}") for n in range(6)], batch=6)
    assert len({drawn.draw().cases for _ in range(5)}) > 1


def test_a_batch_has_patch_and_margin_alike_on_both_sides() -> None:
    batch = sampler([a_case("c")], patch=(4, 8, 6), batch=3).draw()
    # a quarter more, rounded up to the same on both sides
    assert tuple(batch.image.shape) == (3, 1, 6, 10, 8)
    assert tuple(batch.label.shape) == (3, 6, 10, 8)
    assert batch.spacing_mm.tolist() == [[1, 2, 3]] * len(batch.cases)


def test_image_and_label_are_cut_at_the_same_place() -> None:
    label = (torch.arange(np.prod(SHAPE)).reshape(SHAPE) % 7).to(torch.uint8)
    batch = sampler([a_case("c", label)], fraction=0.5, batch=20).draw()
    inside = batch.image[:, 0] > 0
    assert torch.equal(batch.label[inside], ((batch.image[:, 0][inside] - 1).long() % 7).to(torch.uint8))
    assert not batch.label[~inside].any()


def test_foreground_patches_are_centred_on_the_label_and_labels_come_evenly() -> None:
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[1, 2, 3] = 1
    label[4:8, 6:10, 5:12] = 2
    label[0] = IGNORE_INDEX
    drawn = sampler([a_case("c", label)], fraction=1, batch=50, ignore_value=IGNORE_INDEX)
    batches = [drawn.draw() for _ in range(8)]
    centres = torch.cat([b.label[:, 3, 3, 3] for b in batches])
    counts = Counter(centres.tolist())
    assert set(counts) == {1, 2}
    # five standard deviations of a fair coin thrown 400 times
    assert abs(counts[1] - 200) < 5 * 10


def test_patches_anywhere_reach_every_voxel() -> None:
    drawn = sampler([a_case("c", shape=(6, 7, 8))], batch=1000, patch=(4, 4, 4))
    image = drawn.draw().image
    # without the margin: what is left when augmentation changes nothing
    seen = set(image[:, 0, 1:-1, 1:-1, 1:-1].unique().int().tolist())
    assert seen >= set(range(1, 6 * 7 * 8 + 1))


def test_patches_anywhere_stay_inside_but_for_the_margin() -> None:
    image = sampler([a_case("c")], batch=100).draw().image
    assert (image[:, 0, 1:-1, 1:-1, 1:-1] > 0).all()


def test_a_case_smaller_than_the_patch_is_in_its_middle() -> None:
    image = sampler([a_case("c", shape=(2, 2, 2))], batch=1, patch=(4, 4, 4)).draw().image
    assert torch.nonzero(image[0, 0]).amin(dim=0).tolist() == [2, 2, 2]
    assert int((image > 0).sum()) == 8


def test_state_and_generator_bring_the_same_batches_again() -> None:
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[3:6, 3:6, 3:6] = 1
    cases = [a_case(f"c{n}", label) for n in range(5)]
    generator = torch.Generator().manual_seed(7)
    drawn = PatchSampler(cases, patch_size=(4, 4, 4), batch_size=3, foreground_fraction=0.5, generator=generator)
    drawn.draw()
    deck, state = drawn.state(), generator.get_state()
    assert deck
    wanted = [drawn.draw() for _ in range(4)]
    drawn.draw()
    generator.set_state(state)
    drawn.load_state(deck)
    for batch in wanted:
        again = drawn.draw()
        assert again.cases == batch.cases
        assert torch.equal(again.image, batch.image)
        assert torch.equal(again.label, batch.label)


def test_the_state_is_a_copy() -> None:
    drawn = sampler([a_case(f"c{n}") for n in range(5)], batch=2)
    drawn.draw()
    deck = drawn.state()
    drawn.draw()
    assert len(deck) == 3


def test_one_seed_gives_one_sequence() -> None:
    cases = [a_case(f"c{n}") for n in range(4)]
    first, again, other = (sampler(cases, seed=s).draw() for s in (1, 1, 2))
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)


def test_locations_leave_background_and_ignored_voxels_out() -> None:
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[1, 2, 3], label[4, 5, 6], label[0, 0, 0] = 2, 1, IGNORE_INDEX
    found = foreground_locations(a_case("c", label), torch.Generator().manual_seed(0), IGNORE_INDEX)
    assert [f.tolist() for f in found] == [[[4, 5, 6]], [[1, 2, 3]]]


def test_a_batch_moves_as_a_whole() -> None:
    batch = Batch(torch.zeros(1, 1, 2), torch.zeros(1, 2), torch.ones(1), ("c",)).to(torch.device("meta"))
    assert {batch.image.device.type, batch.label.device.type, batch.spacing_mm.device.type} == {"meta"}
    assert batch.cases == ("c",)
