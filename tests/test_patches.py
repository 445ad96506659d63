"""Patches: what is cut and how often each case and label comes; a state brings the same batches again; shelves."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from medseg.config import AugmentConfig
from medseg.grid import Grid
from medseg.patches import PatchSampler, Shelf, cut, foreground_locations, locations
from medseg.patches.locations import voxel_at
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
    augment: AugmentConfig | None = None,
    rows: slice = slice(None),
) -> PatchSampler:
    return PatchSampler(
        cases,
        patch_size=patch,
        batch_size=batch,
        foreground_fraction=fraction,
        generator=torch.Generator().manual_seed(seed),
        ignore_value=ignore_value,
        augment=augment,
        rows=rows,
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


@pytest.mark.parametrize("augment", [None, AugmentConfig()])
def test_a_batch_has_the_size_of_the_patch(augment: AugmentConfig | None) -> None:
    batch = sampler([a_case("c")], patch=(4, 8, 6), batch=3, augment=augment).draw()
    assert tuple(batch.image.shape) == (3, 1, 4, 8, 6)
    assert tuple(batch.label.shape) == (3, 4, 8, 6)
    assert (batch.image.dtype, batch.label.dtype) == (torch.float32, torch.uint8)


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
    centres = torch.cat([b.label[:, 2, 2, 2] for b in batches])
    counts = Counter(centres.tolist())
    assert set(counts) == {1, 2}
    # five standard deviations of a fair coin thrown 400 times
    assert abs(counts[1] - 200) < 5 * 10


def test_patches_anywhere_reach_every_voxel() -> None:
    drawn = sampler([a_case("c", shape=(6, 7, 8))], batch=1000, patch=(4, 4, 4))
    assert set(drawn.draw().image.unique().int().tolist()) == set(range(1, 6 * 7 * 8 + 1))


def test_a_case_smaller_than_the_patch_is_in_its_middle() -> None:
    image = sampler([a_case("c", shape=(2, 2, 2))], batch=1, patch=(4, 4, 4)).draw().image
    assert torch.nonzero(image[0, 0]).amin(dim=0).tolist() == [1, 1, 1]
    assert int((image > 0).sum()) == 8


@pytest.mark.parametrize("patch", [(5,), (5, 6), (5, 6, 7)])
def test_a_patch_that_is_turned_and_scaled_reads_image_and_label_at_one_place(patch: tuple[int, ...]) -> None:
    # the image is the label, blurred by nothing but the interpolation between voxels
    n = len(patch)
    shape = (21, 23, 25)[:n]
    label = torch.zeros(shape, dtype=torch.uint8)
    label[tuple(slice(6, 15) for _ in range(n))] = 3
    grid = Grid(shape, np.diag([*(1.0, 2.0, 3.0)[:n], 1.0]))
    case = Prepared("c", label[None].float(), label, grid, grid, torch.zeros(1, 9))
    augment = AugmentConfig(p_intensity=0, p_gamma=0, p_noise=0, p_blur=0, p_low_resolution=0, flip_axes=(0,))
    batch = sampler([case], fraction=1, batch=30, patch=patch, augment=augment).draw()
    certain = (batch.image[:, 0] < 0.01) | (batch.image[:, 0] > 2.99)
    assert 0.3 < float(certain.float().mean()) < 1
    assert torch.equal(batch.label[certain].float(), batch.image[:, 0][certain].round())
    assert set(batch.label.unique().tolist()) == {0, 3}


def test_rows_of_a_batch_are_what_they_are_in_the_whole() -> None:
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[3:6, 3:6, 3:6] = 1
    cases = [a_case(f"c{n}", label) for n in range(5)]
    strong = AugmentConfig(p_noise=1, p_blur=0.5, p_gamma=0.5, p_low_resolution=0.5)
    whole = sampler(cases, fraction=0.5, batch=4, augment=strong)
    parts = [sampler(cases, fraction=0.5, batch=4, augment=strong, rows=slice(r, r + 2)) for r in (0, 2)]
    for _ in range(3):
        wanted, found = whole.draw(), [part.draw() for part in parts]
        # sums over voxels are added in another order, of intensities up to a thousand
        assert torch.allclose(torch.cat([f.image for f in found]), wanted.image, rtol=1e-5, atol=1e-2)
        assert torch.equal(torch.cat([f.label for f in found]), wanted.label)
        assert sum((f.cases for f in found), ()) == wanted.cases


def test_state_and_generator_bring_the_same_batches_again() -> None:
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[3:6, 3:6, 3:6] = 1
    cases = [a_case(f"c{n}", label) for n in range(5)]
    generator = torch.Generator().manual_seed(7)
    drawn = PatchSampler(
        cases,
        patch_size=(4, 4, 4),
        batch_size=3,
        foreground_fraction=0.5,
        generator=generator,
        augment=AugmentConfig(p_noise=1),
    )
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


def test_a_sampler_that_goes_on_from_a_state_alone_brings_the_same_batches() -> None:
    # of the cases that it has not met, it finds the places of the labels only then
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[2:7, 2:7, 2:7] = 1
    cases = [a_case(f"c{n}", label) for n in range(5)]
    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    settings = {"patch_size": (4, 4, 4), "batch_size": 3, "foreground_fraction": 1.0, "augment": AugmentConfig()}
    whole = PatchSampler(cases, generator=first, **settings)
    whole.draw()
    resumed = PatchSampler(cases, generator=second, **settings)
    resumed.load_state(whole.state())
    second.set_state(first.get_state())
    for _ in range(4):
        wanted, found = whole.draw(), resumed.draw()
        assert torch.equal(wanted.image, found.image)


def test_locations_leave_background_and_ignored_voxels_out() -> None:
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[1, 2, 3], label[4, 5, 6], label[0, 0, 0] = 2, 1, IGNORE_INDEX
    found = foreground_locations(a_case("c", label), IGNORE_INDEX)
    assert [[voxel_at(int(place), SHAPE) for place in places] for places in found] == [[[4, 5, 6]], [[1, 2, 3]]]
    assert {places.dtype for places in found} == {torch.int32}


def test_locations_are_found_of_a_case_whose_name_is_no_text() -> None:
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[1, 2, 3] = 1
    (found,) = foreground_locations(a_case("caf\udce9", label))
    assert len(found) == 1


def test_locations_are_drawn_evenly_over_a_label_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "PIECE", 5000)
    label = torch.ones((20, 30, 40), dtype=torch.int32)
    label[19] = 70_000
    label[5, 5, 5] = 0
    large, small = foreground_locations(a_case("c", label, shape=(20, 30, 40)))
    assert (len(large), len(small)) == (4096, 1200)
    assert len(torch.unique(large)) == 4096
    assert (label.flatten()[large.long()] == 1).all()
    assert (label.flatten()[small.long()] == 70_000).all()
    # five standard deviations of the share of a twentieth of the voxels, drawn without return
    counts = torch.bincount(large.long() // (30 * 40), minlength=19)[:19]
    assert (counts - 4096 / 19).abs().max() < 5 * (4096 / 19) ** 0.5


# ---- where cases lie


def spread(case: Prepared) -> Prepared:
    return Prepared(
        case.id,
        torch.randn(case.image.shape, generator=torch.Generator().manual_seed(0)),
        case.label,
        case.grid,
        case.source,
        case.raw,
    )


def test_on_a_cpu_a_box_inside_a_case_is_the_case_itself() -> None:
    case = a_case("c")
    image, label = Shelf([case], torch.device("cpu")).cut(0, (1, 2, 3), (4, 5, 6))
    assert image.data_ptr() == case.image[:, 1:, 2:, 3:].data_ptr()
    assert case.label is not None
    assert label.data_ptr() == case.label[1:, 2:, 3:].data_ptr()


def test_a_shelf_holds_as_many_cases_as_it_has_room_for_and_gives_the_same_boxes_of_all() -> None:
    label = (torch.arange(np.prod(SHAPE)).reshape(SHAPE) % 7).to(torch.uint8)
    cases = [spread(a_case(f"c{n}", label)) for n in range(4)]
    # float16 and a byte
    each = 3 * int(np.prod(SHAPE))
    shelves = [Shelf(cases, torch.device("cpu"), room_bytes=room) for room in (1, 2 * each, 9 * each)]
    for index in (2, 0, 1, 3, 2):
        boxes = [shelf.cut(index, (-1, 3, 2), (5, 12, 4)) for shelf in shelves]
        wanted = cut(cases[index].image, (-1, 3, 2), (5, 12, 4))
        for image, found in boxes:
            assert torch.equal(image, boxes[0][0])
            assert image.dtype == torch.float32
            # half a unit in the eleventh binary digit, or in the last of the smallest numbers
            assert torch.allclose(image, wanted, rtol=2**-11, atol=2**-25)
            assert torch.equal(found, cut(label, (-1, 3, 2), (5, 12, 4)))
    assert [shelf.held for shelf in shelves] == [(), (2, 0), (2, 0, 1, 3)]


@pytest.mark.parametrize("scale", [1e-4, 1e6])
def test_intensities_that_float16_does_not_hold_stay_float32(scale: float) -> None:
    case = spread(a_case("c"))
    case.image.mul_(scale)
    image, _ = Shelf([case], torch.device("cpu"), room_bytes=10**6).cut(0, (0, 0, 0), SHAPE)
    assert torch.equal(image, case.image)


def test_a_case_without_label_is_no_training_case() -> None:
    case = a_case("c")
    bare = Prepared("c", case.image, None, case.grid, case.source, case.raw)
    with pytest.raises(ValueError, match="c was prepared without its label"):
        sampler([bare]).draw()
