"""Windows: they cover everything, give what the plain method gives, piece by piece, and hold little at a time."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch

from medseg.body import CELL, Air
from medseg.config import WindowsConfig
from medseg.errors import DataError
from medseg.grid import Grid
from medseg.patches import cut
from medseg.restore import Restorer, Strongest, restore
from medseg.windows import Ensemble, Scorer, View, edge_weights, predict, starts, stream, stream_order, views

PATCH = (4, 6, 5)
CPU = torch.device("cpu")


def a_volume(*shape: int, channels: int = 2) -> torch.Tensor:
    return torch.randn(channels, *shape, generator=torch.Generator().manual_seed(0))


def same(windows: torch.Tensor) -> torch.Tensor:
    return windows


def a_network(dims: int, *, kernel: int = 3, channels: int = 4) -> Scorer:
    torch.manual_seed(1)
    conv = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1](2, channels, kernel, padding="same")
    return lambda windows: conv(windows).softmax(dim=1)


def test_scores_that_no_memory_holds_are_told_as_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.windows.beyond_memory", lambda numbers: "all")
    with pytest.raises(MemoryError, match=r"^2 scores of 120 voxels at once take all; use a machine with more, or cut"):
        predict(WindowsConfig(patch_size=PATCH), a_volume(4, 6, 5), same)


def plain(config: WindowsConfig, image: torch.Tensor, scorer: Scorer) -> torch.Tensor:
    """The textbook's way: all weighted scores and all weights at full size, in float64, divided at the end."""
    shape, patch = image.shape[1:], config.patch_size
    padded = [max(s, p) for s, p in zip(shape, patch)]
    before = [(p - s) // 2 for s, p in zip(shape, padded)]
    weight = torch.ones((), dtype=torch.float64)
    for size in patch:
        weight = weight[..., None] * edge_weights(size)
    total, norm = torch.zeros(1, dtype=torch.float64), torch.zeros(padded, dtype=torch.float64)
    for corner in itertools.product(*(starts(s, p, config.overlap) for s, p in zip(padded, patch))):
        scores = scorer(cut(image, [c - b for c, b in zip(corner, before)], patch)[None])[0].double()
        total = total if total.ndim > 1 else torch.zeros(len(scores), *padded, dtype=torch.float64)
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch))
        total[(slice(None), *box)] += scores * weight
        norm[box] += weight
    return (total / norm)[(slice(None), *(slice(b, b + s) for b, s in zip(before, shape)))]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize(
    "shape", [(4, 6, 5), (9, 13, 11), (2, 3, 4), (1, 20, 3), (5, 7, 6), (10,), (3,), (9, 7), (2, 11)]
)
def test_streamed_scores_equal_those_of_the_plain_method(shape: tuple[int, ...], overlap: float) -> None:
    config = WindowsConfig(patch_size=PATCH[: len(shape)], overlap=overlap)
    volume, scorer = a_volume(*shape), a_network(len(shape))
    found = predict(config, volume, scorer)
    assert found.shape == (4, *shape)
    assert (found - plain(config, volume, scorer)).abs().max() < 1e-6


def test_pieces_cover_the_volume_once_in_the_order_that_is_told() -> None:
    config, volume = WindowsConfig(patch_size=PATCH, overlap=0.5), a_volume(9, 13, 11)
    order = stream_order(config, (9, 13, 11))
    seen = torch.zeros(9, 13, 11, dtype=torch.int64)
    places = []
    for piece in stream(config, volume, same, device=CPU):
        seen[piece.box] += 1
        places.append([piece.start[a] for a in order])
    assert (seen == 1).all()
    assert places == sorted(places)


def test_the_first_axis_is_the_one_with_the_smallest_section_to_keep() -> None:
    # 8 of 16 voxels shared on all axes: the longest axis first
    config = WindowsConfig(patch_size=(16, 16, 16), overlap=0.5)
    assert stream_order(config, (50, 300, 100)) == (1, 2, 0)
    # what is kept across axis 0 is 4 voxels thick, across axis 1 16
    config = WindowsConfig(patch_size=(8, 32, 16), overlap=0.5)
    assert stream_order(config, (100, 300, 50))[0] == 0


def test_what_is_held_does_not_grow_with_the_length_of_the_volume() -> None:
    from medseg.windows import _Blend

    def most_held(length: int) -> int:
        config = WindowsConfig(patch_size=(8, 8, 8), overlap=0.5, batch_size=1)
        image = torch.zeros(1, length, 16, 16)
        plan, most = _Blend(config, image), 0
        for window in plan.windows:
            plan.finish(window, torch.zeros(10, 8, 8, 8))
            most = max(most, sum(t.numel() for t in plan._carried.values()))
        assert not plan._carried
        return most

    assert most_held(200) == most_held(64)
    # half a window across the section, a row of windows, a window; 10 channels
    assert most_held(64) <= 10 * (4 * 16 * 16 + 8 * 4 * 16 + 8 * 8 * 4)


def test_the_scorer_sees_whole_patches_in_batches_and_zeros_outside() -> None:
    seen = []

    def watch(windows: torch.Tensor) -> torch.Tensor:
        seen.append(windows)
        return windows

    predict(WindowsConfig(patch_size=PATCH, batch_size=3), torch.ones(1, 9, 2, 5), watch)
    assert [tuple(w.shape[1:]) for w in seen] == [(1, *PATCH)] * len(seen)
    assert [len(w) for w in seen] == [3, 1]
    # 2 of 6 rows, in the middle
    assert seen[0][0, 0, 0, :, 0].tolist() == [0, 0, 1, 1, 0, 0]


def test_batch_size_does_not_matter() -> None:
    volume = a_volume(9, 13, 11)
    one, many = (predict(WindowsConfig(patch_size=PATCH, batch_size=n), volume, same) for n in (1, 100))
    assert torch.equal(one, many)


def test_left_open_the_batch_grows_once_one_window_has_shown_its_size() -> None:
    sizes = []

    def watch(windows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(windows))
        return windows

    predict(WindowsConfig(patch_size=PATCH), a_volume(9, 13, 11), watch)
    assert sizes[:2] == [1, 4]


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


def test_weights_fall_from_the_middle_as_a_gaussian_of_an_eighth_of_the_patch() -> None:
    weight = edge_weights(16)
    assert torch.equal(weight, weight.flip(0))
    # 2.5 and 0.5 voxels from the middle, σ = 2
    assert float(weight[7] / weight[5]) == pytest.approx(2.718281828 ** (0.5 * (2.5**2 - 0.5**2) / 4), rel=1e-6)
    assert float(weight.min()) > 0


# ---- tiles and whole volumes


@pytest.mark.parametrize("shape", [(70, 40), (33, 64), (5, 6), (100,)])
def test_a_whole_volume_is_one_look(shape: tuple[int, ...]) -> None:
    scorer, seen = a_network(len(shape)), []

    def watch(windows: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(windows.shape[2:]))
        return scorer(windows)

    volume = a_volume(*shape)
    found = predict(WindowsConfig(patch_size=(4,) * len(shape), mode="whole"), volume, watch)
    assert seen == [shape]
    assert torch.allclose(found, scorer(volume[None])[0], atol=1e-6)


@pytest.mark.parametrize("shape", [(70, 40), (33, 100), (5, 6), (200,), (40, 66, 33)])
def test_tiles_whose_margin_holds_the_field_of_view_equal_the_whole(shape: tuple[int, ...]) -> None:
    dims = len(shape)
    scorer = a_network(dims, kernel=7)
    config = WindowsConfig(patch_size=(8,) * dims, mode="halo", tile_size=(32,) * dims, halo=(3,) * dims)
    volume = a_volume(*shape)
    pieces = list(stream(config, volume, scorer, device=CPU))
    assert len(pieces) == torch.tensor([-(-s // 32) for s in shape]).prod()
    assert torch.allclose(predict(config, volume, scorer), scorer(volume[None])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "patch", "tiles"), [((20,), 40, 1), ((10, 70), 160, 3), ((20, 41, 20), 40, 2), ((3,), 69, 1)]
)
def test_no_tile_lies_in_the_padding_alone(shape: tuple[int, ...], patch: int, tiles: int) -> None:
    # in a patch of 40 the tiles are 0–31 and 32–39, and 20 voxels lie at 10–29
    dims = len(shape)
    scorer, volume = a_network(dims, kernel=7), a_volume(*shape)
    tile = (min(patch, 63),) * dims
    config = WindowsConfig(patch_size=(patch,) * dims, mode="halo", tile_size=tile, halo=(3,) * dims)
    pieces = list(stream(config, volume, scorer, device=CPU))
    assert len(pieces) == tiles
    assert all(piece.scores.numel() for piece in pieces)
    assert torch.allclose(predict(config, volume, scorer), scorer(volume[None])[0], atol=1e-6)


def test_what_is_too_large_to_be_done_whole_is_blended_also_where_an_axis_is_smaller_than_a_patch() -> None:
    scorer, volume = a_network(2), a_volume(20, 90)
    config = WindowsConfig(patch_size=(40, 40), tile_size=(8, 8))
    whole = config.model_copy(update={"mode": "whole", "whole_voxels": 1000})
    assert torch.equal(predict(whole, volume, scorer), predict(config, volume, scorer))


def test_tiles_of_a_strided_network_lie_on_its_grid() -> None:
    def strided(windows: torch.Tensor) -> torch.Tensor:
        return windows[..., ::16].repeat_interleave(16, dim=-1)[..., : windows.shape[-1]]

    config = WindowsConfig(patch_size=(16,), mode="halo", tile_size=(40,), halo=(5,))
    volume = a_volume(150)
    assert torch.equal(predict(config, volume, strided), strided(volume[None])[0])


# ---- copies and ensembles


def slope(axis: int) -> torch.Tensor:
    """−1.5 … 1.5 and the like along one axis of a window: turned round it is its own negative."""
    size = PATCH[axis]
    return (torch.arange(size) - (size - 1) / 2).reshape([size if a == axis else 1 for a in range(3)])


class Watch:
    """A scorer that keeps what it saw, and gives it back."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        self.seen.append(windows.clone())
        return windows


def with_views(scorer: Scorer, *flip_axes: int, **copies: Any) -> Ensemble:
    return Ensemble((scorer,), views(WindowsConfig(flip_axes=flip_axes, **copies)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_is_undone_before_the_mean(axis: int) -> None:
    volume = a_volume(*PATCH)
    config = WindowsConfig(patch_size=PATCH)
    tilted = predict(config, volume, lambda w: w + slope(axis))
    level = predict(config, volume, with_views(lambda w: w + slope(axis), axis))
    assert torch.allclose(tilted, volume + slope(axis), atol=1e-5)
    assert torch.allclose(level, volume, atol=1e-5)


def test_all_combinations_of_flips_count_once() -> None:
    watch = Watch()
    volume = a_volume(*PATCH)
    predict(WindowsConfig(patch_size=PATCH), volume, with_views(watch, 0, 2))
    wanted = [volume[None].flip(dims) if dims else volume[None] for dims in ((), (2,), (4,), (2, 4))]
    assert len(watch.seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(watch.seen, wanted))


def test_copies_of_other_sizes_come_back_at_the_size_of_the_window() -> None:
    watch = Watch()
    ramp = torch.arange(16.0).expand(1, 16, 16)
    found = predict(WindowsConfig(patch_size=(16, 16)), ramp, with_views(watch, scales=(1.0, 0.75, 1.25)))
    assert [tuple(w.shape[2:]) for w in watch.seen] == [(16, 16), (12, 12), (20, 20)]
    # a ramp survives linear resizing but for its ends
    assert torch.allclose(found[:, :, 2:-2], ramp[:, :, 2:-2], atol=1e-4)


def test_views_are_all_pairs_of_flips_and_sizes() -> None:
    found = views(WindowsConfig(flip_axes=(0,), scales=(1.0, 0.75)))
    assert found == (View(), View((0,)), View((), 0.75), View((0,), 0.75))


def test_a_moved_copy_comes_back_whole_to_where_it_was() -> None:
    watch = Watch()
    volume = a_volume(*PATCH)
    found = predict(WindowsConfig(patch_size=PATCH), volume, with_views(watch, shifts=((1, 0, 3),)))
    assert torch.allclose(found, volume, atol=1e-6)
    assert watch.seen[1].shape[2:] == (PATCH[0] + 1, PATCH[1], PATCH[2] + 3)
    assert torch.equal(watch.seen[1][:, :, 1:, :, 3:], volume[None])
    assert not watch.seen[1][:, :, :1].any()
    assert not watch.seen[1][..., :3].any()


def test_moved_copies_turn_what_the_stride_of_a_network_leaves_behind() -> None:
    volume = torch.zeros(1, 8, 8)
    pattern = torch.arange(8.0) % 4

    def striped(windows: torch.Tensor) -> torch.Tensor:
        return windows + (torch.arange(windows.shape[-1]) % 4).float()

    config = WindowsConfig(patch_size=(8, 8))
    assert torch.equal(predict(config, volume, striped)[0, 0], pattern)
    moved = predict(config, volume, with_views(striped, shifts=((0, 1), (0, 2), (0, 3))))
    assert torch.allclose(moved, torch.full((1, 8, 8), 1.5))


def test_mirrored_and_moved_copies_take_turns() -> None:
    found = views(WindowsConfig(flip_axes=(0,), shifts=((1, 2), (2, 3), (3, 1))))
    assert found == (View(), View((0,), 1.0, (1, 2)), View((), 1.0, (2, 3)), View((0,), 1.0, (3, 1)))
    # every mirrored copy once plain and once moved, where their numbers are no multiples of each other
    assert len(views(WindowsConfig(flip_axes=(0,), shifts=((1, 2), (2, 3))))) == 6


def test_several_networks_give_their_mean_batch_by_batch() -> None:
    volume, calls = a_volume(9, 7, 8), []

    def named(name: str, factor: float, shift: float) -> Scorer:
        def score(windows: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            return factor * windows + shift

        return score

    ensemble = Ensemble((named("a", 1, 0), named("b", 3, 0), named("c", 1, 6)))
    found = predict(WindowsConfig(patch_size=PATCH), volume, ensemble)
    assert torch.allclose(found, (5 * volume + 6) / 3, atol=1e-4)
    # all of them see one batch before the next
    assert calls == ["a", "b", "c"] * (len(calls) // 3)


def test_an_observer_hears_every_member_and_their_mean() -> None:
    heard = []
    ensemble = Ensemble((same, lambda w: 3 * w), observe=lambda members, mean: heard.append((members, mean)))
    mean = ensemble(torch.ones(1, 1, 4))
    ((members, told),) = heard
    assert [float(m.mean()) for m in members] == [1, 3]
    assert torch.equal(told, mean)
    assert float(mean.mean()) == 2


def test_no_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="no network"):
        predict(WindowsConfig(patch_size=PATCH), a_volume(*PATCH), Ensemble(()))


# ---- air


def test_windows_of_air_are_background_without_a_look(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    def watch(windows: torch.Tensor) -> torch.Tensor:
        seen.extend(windows)
        return torch.cat([torch.zeros_like(windows), torch.ones_like(windows)], dim=1)

    body = torch.zeros(10, 2, 2, dtype=torch.bool)
    body[5] = True
    config = WindowsConfig(patch_size=(8, 8, 8), overlap=0.0)
    with caplog.at_level(logging.INFO, logger="medseg"):
        pieces = list(
            stream(config, torch.ones(1, 40, 8, 8), watch, device=CPU, air=Air(body, torch.tensor([1.0, 0.0])))
        )
    # of five windows only the one at 16…24 touches the body, which lies at 20…24
    assert len(seen) == 1
    strongest = torch.cat([p.scores.argmax(dim=-1) for p in sorted(pieces, key=lambda p: p.start)])
    assert [int(n) for n in strongest.float().mean(dim=(1, 2))] == [0] * 16 + [1] * 8 + [0] * 16
    assert "4 of 5 windows lie outside the body" in caplog.text
    assert CELL == 4


# ---- when memory runs out


def limited(scorer: Scorer, most: int) -> Scorer:
    """A device that holds windows of `most` voxels altogether."""

    def score(windows: torch.Tensor) -> torch.Tensor:
        if windows[:, 0].numel() > most:
            raise torch.OutOfMemoryError("too much")
        return scorer(windows)

    return score


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_done_twice(caplog: pytest.LogCaptureFixture) -> None:
    volume, scorer, done = a_volume(9, 13, 11), a_network(3), []

    def counting(windows: torch.Tensor) -> torch.Tensor:
        done.extend(range(len(windows)))
        return scorer(windows)

    config = WindowsConfig(patch_size=PATCH, batch_size=8)
    expected = predict(config, volume, scorer)
    found = predict(config, volume, limited(counting, 2 * 4 * 6 * 5))
    assert torch.allclose(found, expected, atol=1e-6)
    windows = [len(starts(s, p, 0.5)) for s, p in zip((9, 13, 11), PATCH)]
    assert len(done) == windows[0] * windows[1] * windows[2]
    assert "4 windows at a time" in caplog.text
    assert "2 windows at a time" in caplog.text


def test_the_last_resort_is_to_keep_sums_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    volume, scorer, refusals = a_volume(9, 13, 11), a_network(3), [1]

    def once(windows: torch.Tensor) -> torch.Tensor:
        if refusals:
            refusals.pop()
            raise torch.OutOfMemoryError("too much")
        return scorer(windows)

    config = WindowsConfig(patch_size=PATCH, batch_size=1)
    assert torch.allclose(predict(config, volume, once), predict(config, volume, scorer), atol=1e-6)
    assert "sums of windows are kept on the CPU" in caplog.text


def test_a_window_that_never_fits_is_an_error_that_names_it() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"\(4, 6, 5\)"):
        predict(WindowsConfig(patch_size=PATCH), a_volume(9, 13, 11), limited(same, 10))


def test_a_whole_volume_that_does_not_fit_is_done_in_tiles(caplog: pytest.LogCaptureFixture) -> None:
    volume, scorer = a_volume(200, 40), a_network(2)
    config = WindowsConfig(patch_size=(8, 8), mode="whole", halo=(1, 1))
    found = predict(config, volume, limited(scorer, 150 * 40))
    assert torch.allclose(found, scorer(volume[None])[0], atol=1e-6)
    assert "are done in parts" in caplog.text


def test_a_cpu_is_not_asked_for_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, scorer, seen = a_volume(200, 40), a_network(2), []

    def watch(windows: torch.Tensor) -> torch.Tensor:
        seen.append(windows[0, 0].numel())
        return scorer(windows)

    monkeypatch.setattr("medseg.windows.most_voxels", lambda device, channels: 170 * 40)
    config = WindowsConfig(patch_size=(8, 8), mode="whole", halo=(1, 1))
    found = predict(config, volume, watch)
    assert torch.allclose(found, scorer(volume[None])[0], atol=1e-6)
    assert max(seen) <= 170 * 40


def test_a_tile_that_does_not_fit_is_divided_wherever_it_lies() -> None:
    # the tile in the middle is larger than those at the border, which see a margin on one side only
    volume, scorer = a_volume(220, 32), a_network(2)
    config = WindowsConfig(patch_size=(8, 8), mode="halo", tile_size=(64, 32), halo=(1, 1))
    found = predict(config, volume, limited(scorer, 100 * 32))
    assert torch.allclose(found, scorer(volume[None])[0], atol=1e-6)


def test_labels_of_a_divided_volume_are_those_of_the_whole() -> None:
    volume, scorer = a_volume(200, 70), a_network(2)
    config = WindowsConfig(patch_size=(8, 8), mode="whole", halo=(1, 1))
    here = Grid((200, 70), np.eye(3))
    there = here.with_spacing((0.7, 1.3))
    decision = Strongest((0, 1, 2, 3))
    restorer = Restorer(here, there, decision, order=stream_order(config, here.shape))
    for piece in stream(config, volume, limited(scorer, 165 * 70), device=CPU):
        restorer.add(piece)
    assert torch.equal(restorer.labels, restore(scorer(volume[None])[0], here, there, decision))


def test_sums_that_find_no_room_move_to_the_cpu_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, scorer = a_volume(9, 13, 11), a_network(3)
    config = WindowsConfig(patch_size=PATCH, batch_size=2)
    expected = predict(config, volume, scorer)
    whole, calls = torch.Tensor.narrow, []

    def full_once(self: torch.Tensor, *arguments: int) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 12:
            raise torch.OutOfMemoryError("too much")
        return whole(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "narrow", full_once)
    found = predict(config, volume, scorer)
    assert len(calls) > 12
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 20, 20), (40, 70, 20)])
def test_windows_smaller_than_a_patch_cover_volumes_smaller_than_it(shape: tuple[int, ...]) -> None:
    scorer = a_network(3)
    config = WindowsConfig(patch_size=(64, 64, 64), tile_size=(16, 16, 16))
    volume = a_volume(*shape)
    small = WindowsConfig(patch_size=(16, 16, 16))
    assert torch.allclose(predict(config, volume, scorer), predict(small, volume, scorer), atol=1e-6)


def test_scores_that_are_no_numbers_are_an_error() -> None:
    def broken(windows: torch.Tensor) -> torch.Tensor:
        scores = windows.clone()
        scores[0, 0, 1, 1, 1] = torch.nan
        return scores

    with pytest.raises(DataError, match="no numbers"):
        predict(WindowsConfig(patch_size=PATCH), a_volume(*PATCH), broken)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(windows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        predict(WindowsConfig(patch_size=PATCH), a_volume(*PATCH), broken)


def test_the_share_that_is_done_is_told_and_may_end_the_work() -> None:
    told = []
    config = WindowsConfig(patch_size=PATCH, overlap=0.0)
    list(stream(config, a_volume(8, 12, 10), same, device=CPU, tick=told.append))
    assert told == [n / 8 for n in range(1, 9)]

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(stream(config, a_volume(8, 12, 10), same, device=CPU, tick=stop))
