"""Augmentation: draws keep to the ranges asked for, geometry is that of scipy, intensities are what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter1d

from medseg.augment import Draws, change_intensity, draw, resample, source_box
from medseg.augment.draws import draw_affines, rotations
from medseg.config import AugmentConfig
from medseg.patches import cut

NOTHING: dict[str, Any] = {
    "p_affine": 0,
    "p_flip": 0,
    "p_intensity": 0,
    "p_gamma": 0,
    "p_gamma_inverted": 0,
    "p_noise": 0,
    "p_blur": 0,
    "p_low_resolution": 0,
    "p_bias_field": 0,
}
CHANGES = (
    "p_bias_field", "p_blur", "p_low_resolution", "p_intensity", "p_gamma_inverted", "p_gamma", "p_noise",
)  # fmt: skip
EVERYTHING: dict[str, Any] = {"shear": 0.2, "stretch": 0.2, "low_resolution": (0.5, 0.9)} | dict.fromkeys(CHANGES, 0.5)
FIVE_SD = 5.0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_case(*shape: int, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(channels, *shape, generator=seeded(1))
    label = torch.randint(0, 5, shape, generator=seeded(2)).to(torch.uint8)
    label[label == 4] = 255
    return image, label


def drawn(config: AugmentConfig, *, batch: int = 4, n: int = 3, channels: int = 2, seed: int = 0) -> Draws:
    spacing = torch.tensor([1.0, 2.0, 3.5][:n]).expand(batch, n)
    config = config.model_copy(update={"flip_axes": tuple(a for a in config.flip_axes if a < n)})
    return draw(config, patch_size=(8,) * n, spacing_mm=spacing, channels=channels, generator=seeded(seed))


def affines(
    config: AugmentConfig, batch: int, spacing: tuple[float, ...] = (1, 1, 1), patch: tuple[int, ...] = (8, 8, 8)
) -> torch.Tensor:
    return draw_affines(config, patch, torch.tensor(spacing).float().expand(batch, len(spacing)), seeded())


def moved(
    matrix: torch.Tensor, image: torch.Tensor, label: torch.Tensor, patch: tuple[int, ...], centre: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The patch by way of the smallest box that it needs."""
    start, size = source_box(matrix, centre, patch, label.shape)
    inside = [c - s for c, s in zip(centre, start)]
    return resample(matrix, inside, cut(image, start, size), cut(label, start, size), patch)


def middle(shape: tuple[int, ...]) -> list[float]:
    return [(s - 1) / 2 for s in shape]


def affine(linear: torch.Tensor, shift: tuple[float, ...]) -> torch.Tensor:
    return torch.cat([linear, torch.tensor(shift)[:, None]], dim=-1)


def oblique(n: int) -> torch.Tensor:
    """A matrix with no zero, whose mirror image is another."""
    linear = torch.tensor([[0.7, -0.35, 0.2], [0.3, 0.8, -0.25], [-0.15, 0.3, 1.2]])[:n, :n]
    return affine(linear, (1.317, -2.129, 0.431)[:n])


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    # float32 positions of a few dozen voxels are right to about 1e-6 of a voxel
    return a.shape == b.shape and torch.allclose(a, b, atol=2e-5)


# ---- geometry


@pytest.mark.parametrize("shape", [(29,), (23, 31), (13, 22, 17)])
@pytest.mark.parametrize("edge", [False, True])
def test_an_affine_is_that_of_scipy_between_voxels_and_midpoints(shape: tuple[int, ...], edge: bool) -> None:
    n = len(shape)
    image, label = a_case(*shape)
    patch, matrix = (8, 6, 5)[:n], oblique(n)
    # the first voxel: a good part of the patch is outside
    centre = [0.0] * n if edge else [s / 2 + 0.313 for s in shape]
    new_image, new_label = moved(matrix, image, label, patch, centre)
    linear = matrix[:, :n].double().numpy()
    offset = np.array(centre) + matrix[:, n].double().numpy() - linear @ np.array(middle(patch))
    for channel, found in zip(image, new_image):
        # one voxel of zeros around it, so that the outermost is blended with what is outside
        finer = with_midpoints(np.pad(channel.numpy().astype(np.float64), 1))
        wanted = affine_transform(finer, 2 * linear, 2 * (offset + 1), patch, order=1, mode="nearest")
        assert np.allclose(found.numpy(), wanted, atol=2e-5)
    framed = np.pad(label.numpy(), 1)
    shares = np.stack(
        [
            affine_transform((framed == v) * 1.0, linear, offset + 1, patch, order=1, mode="nearest")
            for v in np.unique(framed)
        ]
    )
    # float32 positions may turn a tie
    first, second = np.sort(shares, axis=0)[[-1, -2]]
    clear = first - second > 1e-4
    assert clear.mean() > 0.99
    wanted = np.unique(framed)[shares.argmax(axis=0)]
    assert np.array_equal(new_label.numpy()[clear], wanted[clear])
    assert edge == bool((new_image == 0).any())


def with_midpoints(array: np.ndarray) -> np.ndarray:
    """Between each two voxels along each axis the cubic through four."""
    for axis in range(array.ndim):
        x = np.moveaxis(array, axis, 0)
        ends = np.concatenate([x[:1], x, x[-1:]])
        finer = np.empty((2 * len(x) - 1, *x.shape[1:]))
        finer[::2] = x
        finer[1::2] = (9 * (ends[1:-2] + ends[2:-1]) - ends[:-3] - ends[3:]) / 16
        array = np.moveaxis(finer, 0, axis)
    return array


def test_a_turned_ramp_and_parabola_stay_what_they_are() -> None:
    # a cubic goes through them; between midpoints a line leaves a parabola by 1/32 of its second difference at most
    x = torch.arange(24.0) - 11.5
    for power, most in ((1, 1e-4), (2, 2 / 32 * 1.01)):
        image = (x**power)[None, :, None].expand(1, 24, 24).contiguous()
        angle = torch.full((1, 1), 0.3)
        new, _ = moved(affine(rotations(angle, 2)[0], (0.2, -0.1)), image, image[0].int(), (8, 8), middle((24, 24)))
        p = torch.arange(8.0) - 3.5
        row = np.cos(0.3) * p[:, None] - np.sin(0.3) * p[None] + 0.2
        assert float((new[0] - row**power).abs().max()) < most


@pytest.mark.parametrize(
    ("shape", "patch"), [((19,), (8,)), ((20, 28), (14, 16)), ((10, 14, 22), (8, 10, 16)), ((5, 4, 6), (8, 9, 7))]
)
def test_nothing_asked_gives_the_voxels_themselves(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    n = len(shape)
    image, label = a_case(*shape)
    draws = drawn(AugmentConfig(**NOTHING, flip_axes=()), n=n)
    start = [(s - p) // 2 for s, p in zip(shape, patch)]
    new_image, new_label = moved(draws.matrix[0], image, label, patch, [s + m for s, m in zip(start, middle(patch))])
    assert torch.equal(new_image, cut(image, start, patch))
    assert torch.equal(new_label, cut(label, start, patch))
    batch = new_image.expand(4, *new_image.shape)
    assert torch.equal(change_intensity(draws, batch), batch)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_along_each_axis_is_exact(axis: int) -> None:
    shape = (6, 8, 10)
    image, label = a_case(*shape)
    matrix = affines(AugmentConfig(**NOTHING | {"p_flip": 1}, flip_axes=(axis,)), 1)[0]
    new_image, new_label = moved(matrix, image, label, shape, middle(shape))
    assert torch.equal(new_image, image.flip(axis + 1))
    assert torch.equal(new_label, label.flip(axis))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_copy_of_voxels_and_their_interpolation_are_one(n: int) -> None:
    shape, patch = (9, 12, 7)[:n], (6, 7, 8)[:n]
    image, label = a_case(*shape)
    mirrored = torch.diag(torch.tensor([-1.0, 1.0, -1.0][:n]))
    # over the edge; a hair beside the voxels, so that it is interpolated
    centre = [2 + m for m in middle(patch)]
    exact = moved(affine(mirrored, (0.0,) * n), image, label, patch, centre)
    beside = moved(affine(mirrored * (1 + 1e-6), (0.0,) * n), image, label, patch, centre)
    assert close(exact[0], beside[0])
    assert torch.equal(exact[1], beside[1])


@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (2, 0)), (2, (0, 1))])
def test_a_right_angle_about_each_axis_of_a_cube_is_a_turn_of_voxels(axis: int, plane: tuple[int, int]) -> None:
    image, label = a_case(6, 6, 6)
    angles = torch.zeros(1, 3)
    angles[:, axis] = torch.pi / 2
    matrix = affine(rotations(angles, 3)[0], (0.0, 0.0, 0.0))
    new_image, new_label = moved(matrix, image, label, (6, 6, 6), middle((6, 6, 6)))
    assert close(new_image, torch.rot90(image, -1, (plane[0] + 1, plane[1] + 1)))
    assert torch.equal(new_label, torch.rot90(label, -1, plane))


def test_a_right_angle_in_a_picture_is_a_turn_of_pixels() -> None:
    image, label = a_case(8, 8)
    matrix = affine(rotations(torch.full((1, 1), torch.pi / 2), 2)[0], (0.0, 0.0))
    new_image, new_label = moved(matrix, image, label, (8, 8), middle((8, 8)))
    assert close(new_image, torch.rot90(image, -1, (1, 2)))
    assert torch.equal(new_label, torch.rot90(label, -1, (0, 1)))


def test_a_patch_reads_what_the_case_has_however_far_it_reaches() -> None:
    # turned by 45° and shown at half its size, the corners of a patch are 2√2 times as far away
    image = torch.ones(1, 60, 60)
    label = torch.ones(60, 60, dtype=torch.uint8)
    matrix = affine(2 * rotations(torch.full((1, 1), torch.pi / 4), 2)[0], (0.0, 0.0))
    new_image, new_label = moved(matrix, image, label, (20, 20), middle((60, 60)))
    assert new_image.min() > 1 - 1e-5
    assert bool(new_label.all())


def test_the_box_is_no_larger_than_the_patch_needs() -> None:
    matrix = affine(torch.diag(torch.tensor([2.0, 0.5])), (0.0, 1.0))
    # rows 20 ± 9; columns 31 ± 2.25, rounded outwards; one more on either side for the cubic
    assert source_box(matrix, [20, 30], (10, 10), (99, 99)) == ((10, 27), (21, 9))
    # beyond the edge one voxel of zeros, and no more
    assert source_box(matrix, [2, 30], (10, 10), (99, 99)) == ((-1, 27), (14, 9))
    assert source_box(matrix, [-50, 30], (10, 10), (99, 99)) == ((-1, 27), (1, 9))


def test_threads_do_not_change_a_patch() -> None:
    image, label = a_case(20, 20, 20)
    args = (oblique(3), image, label, (12, 8, 8), middle((20, 20, 20)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = moved(*args)
        torch.set_num_threads(3)
        three = moved(*args)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], three[0])
    assert torch.equal(one[1], three[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_no_label_value_is_invented(dtype: torch.dtype) -> None:
    image, label = a_case(12, 12, 12)
    label = label.to(dtype)
    largest = {torch.uint8: 254, torch.int16: 32767, torch.int32: 2**31 - 1}[dtype]
    label[label == 3] = largest
    for matrix in drawn(AugmentConfig(**EVERYTHING), batch=5).matrix:
        _, new = moved(matrix, image, label, (10, 10, 10), middle((12, 12, 12)))
        assert new.dtype == dtype
        assert set(new.unique().tolist()) <= {0, 1, 2, 255, largest}


# ---- what is drawn


def test_axes_that_must_not_be_flipped_never_are() -> None:
    signs = affines(AugmentConfig(**NOTHING | {"p_flip": 1}, flip_axes=(1, 2)), 64)
    assert (signs[:, 0, 0] == 1).all()
    assert (signs[:, 1, 1] == -1).all()


def test_flips_come_as_often_as_asked() -> None:
    signs = affines(AugmentConfig(**NOTHING | {"p_flip": 0.3}, flip_axes=(0,)), 2000)[:, 0, 0]
    assert float((signs < 0).float().mean()) == pytest.approx(0.3, abs=FIVE_SD * (0.21 / 2000) ** 0.5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.8, 5.0)])
def test_rotations_are_rigid_in_mm(spacing: tuple[float, ...]) -> None:
    config = AugmentConfig(**NOTHING | {"p_affine": 1}, scale=(1, 1), shift=0, rotation_deg=(40, 50, 60), flip_axes=())
    matrices = affines(config, 20, spacing)[..., :3].double()
    in_mm = torch.diag(torch.tensor(spacing).double()) @ matrices @ torch.diag(1 / torch.tensor(spacing).double())
    assert torch.allclose(in_mm @ in_mm.transpose(1, 2), torch.eye(3).double().expand(20, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(in_mm), torch.ones(20).double(), atol=1e-5)
    assert (in_mm - torch.eye(3)).abs().amax(dim=(1, 2)).max() > 0.1


def test_a_point_turned_in_anisotropic_voxels_lands_where_the_mm_say() -> None:
    # 90 degrees about axis 0 with voxels of 1 × 2 × 4 mm: two voxels along axis 1 are 4 mm, one voxel along axis 2
    config = AugmentConfig(**NOTHING | {"p_affine": 1}, scale=(1, 1), shift=0, rotation_deg=(90, 0, 0), flip_axes=())
    matrices = affines(config, 500, (1.0, 2.0, 4.0))[..., :3]
    sharpest = matrices[matrices[:, 2, 1].argmax()]
    # the largest of 500 even draws from ±90° is close to 90°
    assert float((sharpest @ torch.tensor([0.0, 2.0, 0.0]))[2]) == pytest.approx(1, abs=0.01)


STILL: dict[str, Any] = NOTHING | {"p_affine": 1, "scale": (1, 1), "shift": 0, "rotation_deg": (0, 0, 0)}


def test_scale_above_one_shows_things_larger() -> None:
    config = AugmentConfig(**STILL | {"scale": (2, 2)}, flip_axes=())
    assert torch.allclose(affines(config, 3)[..., :3], 0.5 * torch.eye(3).expand(3, 3, 3))


def test_stretch_is_of_each_axis_alone_and_as_often_longer_as_shorter() -> None:
    found = affines(AugmentConfig(**STILL, stretch=0.25, flip_axes=()), 2000)[..., :3]
    factors = torch.diagonal(found, dim1=1, dim2=2)
    assert not (found - torch.diag_embed(factors)).any()
    assert 0.8 <= float(factors.min()) < 0.81
    assert 1.24 < float(factors.max()) <= 1.25 + 1e-6
    assert float((factors > 1).float().mean()) == pytest.approx(0.5, abs=FIVE_SD * 0.5 / 6000**0.5)
    assert torch.corrcoef(factors.T)[0, 1].abs() < FIVE_SD / 2000**0.5


def test_shear_is_of_mm_and_keeps_lengths_along_the_axes() -> None:
    spacing = torch.tensor([1.0, 2.0, 5.0])
    found = affines(AugmentConfig(**STILL, shear=0.3, flip_axes=()), 2000, (1.0, 2.0, 5.0))[..., :3]
    in_mm = torch.diag(spacing) @ found @ torch.diag(1 / spacing)
    assert torch.allclose(torch.diagonal(in_mm, dim1=1, dim2=2), torch.ones(3), atol=1e-6)
    lean = in_mm[:, ~torch.eye(3, dtype=torch.bool)]
    assert 0.29 < float(lean.amax()) <= 0.3 + 1e-6
    assert -0.3 - 1e-6 <= float(lean.amin()) < -0.29


def test_shift_is_a_share_of_the_patch() -> None:
    shift = affines(AugmentConfig(**STILL | {"shift": 0.1}, flip_axes=()), 1000, patch=(10, 20, 40))[..., 3]
    reached = shift.abs().amax(0)
    assert (reached <= torch.tensor([1.0, 2.0, 4.0])).all()
    assert (reached > torch.tensor([0.98, 1.96, 3.92])).all()


@pytest.mark.parametrize(
    ("field", "probability", "neutral", "changes", "low", "high"),
    [
        ("blur", "p_blur", 0, {"blur_voxels": (0.5, 1.5)}, 0.5, 1.5),
        ("low_resolution", "p_low_resolution", 1, {"low_resolution": (0.5, 0.9)}, 0.5, 0.9),
        ("contrast", "p_intensity", 1, {"contrast": (0.6, 0.9)}, 0.6, 0.9),
        ("brightness", "p_intensity", 0, {"brightness": 0.7}, -0.7, 0.7),
        ("gamma", "p_gamma", 1, {"gamma": (1.2, 1.5)}, 1.2, 1.5),
        ("inverted_gamma", "p_gamma_inverted", 1, {"gamma": (1.2, 1.5)}, 1.2, 1.5),
        ("noise", "p_noise", 0, {"noise": 0.4}, 0, 0.4),
        ("bias", "p_bias_field", 0, {"bias_field": 0.4}, -0.4, 0.4),
    ],
)
def test_each_change_is_drawn_as_often_and_as_strong_as_asked(
    field: str, probability: str, neutral: float, changes: dict[str, Any], low: float, high: float
) -> None:
    batch = 3000
    numbers = getattr(drawn(AugmentConfig(**NOTHING | {probability: 0.2}, **changes), batch=batch), field)
    numbers = numbers.reshape(batch, -1)
    used = (numbers != neutral).any(1)
    assert float(used.float().mean()) == pytest.approx(0.2, abs=FIVE_SD * 0.4 / batch**0.5)
    strong = numbers[used]
    strong = strong[strong != neutral] if field == "bias" else strong
    assert low <= float(strong.min()) < low + 0.02 * (high - low)
    assert high - 0.02 * (high - low) < float(strong.max()) <= high + 1e-6
    # even: the mean of so many even draws
    spread = (high - low) / 12**0.5
    assert float(strong.mean()) == pytest.approx((low + high) / 2, abs=FIVE_SD * spread / strong.numel() ** 0.5)


def test_channels_differ_in_how_much_but_not_in_whether() -> None:
    draws = drawn(AugmentConfig(**EVERYTHING), batch=50)
    for field, neutral in (("blur", 0), ("low_resolution", 1), ("contrast", 1), ("gamma", 1)):
        numbers = getattr(draws, field)
        used = numbers != neutral
        assert torch.equal(used[:, 0], used[:, 1])
        assert not torch.equal(numbers[used[:, 0], 0], numbers[used[:, 0], 1])


def test_one_probability_does_not_move_the_numbers_of_another_change() -> None:
    plain, other = (drawn(AugmentConfig(p_gamma=p, p_noise=0.5), batch=20) for p in (0.0, 1.0))
    assert torch.equal(plain.matrix, other.matrix)
    assert torch.equal(plain.contrast, other.contrast)
    assert torch.equal(plain.noise, other.noise)
    assert torch.equal(plain.seed, other.seed)


def test_one_seed_gives_one_draw() -> None:
    first, again, other = (drawn(AugmentConfig(**EVERYTHING), seed=s) for s in (3, 3, 4))
    assert torch.equal(first.matrix, again.matrix)
    assert torch.equal(first.seed, again.seed)
    assert not torch.equal(first.matrix, other.matrix)


# ---- intensities


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("shape", [(12,), (8, 9), (6, 7, 8)])
def test_each_change_of_intensity_happens_and_leaves_its_input_alone(what: str, shape: tuple[int, ...]) -> None:
    image = torch.stack([a_case(*shape)[0]] * 4)
    before = image.clone()
    draws = drawn(AugmentConfig(**NOTHING | {what: 1}, low_resolution=(0.5, 0.6)), n=len(shape))
    changed = change_intensity(draws, image)
    assert torch.equal(image, before)
    assert changed.shape == image.shape
    assert torch.isfinite(changed).all()
    assert not torch.isclose(changed, image).flatten(2).all(-1).any()


@pytest.mark.parametrize("shape", [(40,), (12, 14), (8, 9, 10)])
def test_a_row_comes_out_alike_alone_and_in_its_batch(shape: tuple[int, ...]) -> None:
    batch = 12
    image = torch.randn(batch, 2, *shape, generator=seeded(1))
    draws = drawn(AugmentConfig(**EVERYTHING), batch=batch, n=len(shape))
    whole = change_intensity(draws, image)
    for row in range(batch):
        alone = change_intensity(draws.rows(slice(row, row + 1)), image[row : row + 1])
        # sums over voxels are added in another order
        assert torch.allclose(alone[0], whole[row], atol=1e-5)


def test_contrast_and_brightness_are_what_they_say() -> None:
    image = torch.tensor([0.0, 2.0, 4.0]).reshape(1, 1, 3)
    twice = drawn(
        AugmentConfig(**NOTHING | {"p_intensity": 1}, contrast=(2, 2), brightness=0), batch=1, n=1, channels=1
    )
    assert change_intensity(twice, image).flatten().tolist() == [-2, 2, 6]
    brighter = drawn(AugmentConfig(**NOTHING | {"p_intensity": 1}, contrast=(1, 1)), batch=1, n=1, channels=1)
    addition = change_intensity(brighter, image) - image
    assert addition.flatten().tolist() == pytest.approx([float(brighter.brightness)] * 3, abs=1e-6)


@pytest.mark.parametrize("shape", [(31,), (9, 14), (7, 8, 9)])
def test_blur_is_a_gaussian_along_each_axis(shape: tuple[int, ...]) -> None:
    image = torch.randn(3, 2, *shape, generator=seeded(1))
    draws = drawn(AugmentConfig(**NOTHING | {"p_blur": 1}, blur_voxels=(0.4, 2.0)), batch=3, n=len(shape))
    changed = change_intensity(draws, image).numpy()
    for row in range(3):
        for channel in range(2):
            sigma = float(draws.blur[row, channel])
            wanted = image[row, channel].double().numpy()
            for axis in range(len(shape)):
                wanted = gaussian_filter1d(wanted, sigma, axis, mode="nearest", radius=int(np.ceil(3 * sigma)))
            assert np.allclose(changed[row, channel], wanted, atol=1e-5)


def test_low_resolution_by_a_half_worked_by_hand() -> None:
    image = torch.tensor([0.0, 4.0, 8.0, 20.0]).reshape(1, 1, 4)
    draws = drawn(
        AugmentConfig(**NOTHING | {"p_low_resolution": 1}, low_resolution=(0.5, 0.5)), batch=1, n=1, channels=1
    )
    # the two coarse voxels read 4 and 20; a quarter and three quarters of the way between their centres
    assert change_intensity(draws, image).flatten().tolist() == [4, 8, 16, 20]


@pytest.mark.parametrize("what", ["p_gamma", "p_gamma_inverted"])
def test_gamma_keeps_mean_and_deviation_and_constant_images(what: str) -> None:
    image = torch.randn(3, 1, 6, 6, 6, generator=seeded(1))
    draws = drawn(AugmentConfig(**NOTHING | {what: 1}), batch=3, channels=1)
    changed = change_intensity(draws, image)
    for before, after in zip(image, changed):
        assert float(after.mean()) == pytest.approx(float(before.mean()), abs=1e-5)
        assert float(after.std()) == pytest.approx(float(before.std()), rel=1e-4)
    assert not change_intensity(draws, torch.zeros(3, 1, 4, 4, 4)).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1)])
def test_a_single_voxel_stays_finite_whatever_is_done(shape: tuple[int, ...]) -> None:
    config = AugmentConfig(**{"flip_axes": ()} | dict.fromkeys(CHANGES, 1))
    draws = draw(config, patch_size=shape, spacing_mm=torch.ones(3, len(shape)), channels=1, generator=seeded())
    assert change_intensity(draws, torch.randn(3, 1, *shape, generator=seeded(1))).isfinite().all()


def test_gamma_bends_the_dark_and_inverted_gamma_the_bright() -> None:
    image = torch.linspace(0, 1, 101).reshape(1, 1, 101)
    steps = {}
    for what in ("p_gamma", "p_gamma_inverted"):
        draws = drawn(AugmentConfig(**NOTHING | {what: 1}, gamma=(2, 2)), batch=1, n=1, channels=1)
        steps[what] = change_intensity(draws, image).diff().flatten()
    # x² is flat at 0 and steep at 1; seen from the other end of the scale, flat at 1
    assert steps["p_gamma"][0] < 0.05 * steps["p_gamma"][-1]
    assert torch.allclose(steps["p_gamma_inverted"], steps["p_gamma"].flip(0), atol=1e-6)


def test_noise_has_the_level_drawn_and_each_channel_its_own() -> None:
    draws = drawn(AugmentConfig(**NOTHING | {"p_noise": 1}, noise=0.5), batch=2)
    noise = change_intensity(draws, torch.zeros(2, 2, 24, 24, 24))
    voxels = 24**3
    for row, level in zip(noise, draws.noise.tolist()):
        for channel in row:
            assert float(channel.mean()) == pytest.approx(0, abs=FIVE_SD * level / voxels**0.5)
            assert float(channel.std()) == pytest.approx(level, rel=FIVE_SD / (2 * voxels) ** 0.5)
        assert float(torch.corrcoef(row.flatten(1))[0, 1].abs()) < FIVE_SD / voxels**0.5


def test_a_bias_field_of_one_term_is_its_polynomial() -> None:
    draws = drawn(AugmentConfig(**NOTHING | {"p_bias_field": 1}), batch=1, n=2, channels=1)
    draws.bias.zero_()
    # twice P1 along the second axis; then P2 along the first: (3x² − 1) / 2
    draws.bias[0, 0, 0, 1], draws.bias[0, 0, 2, 0] = 2, 1
    image = torch.ones(1, 1, 4, 2)
    image[..., 0, 0] = 0
    field = change_intensity(draws, image)[0, 0]
    x, y = torch.tensor([-0.75, -0.25, 0.25, 0.75]), torch.tensor([-0.5, 0.5])
    wanted = torch.exp(2 * y[None, :] + ((3 * x**2 - 1) / 2)[:, None])
    wanted[0, 0] = 0
    assert torch.allclose(field, wanted, atol=1e-5)


def test_a_bias_field_has_no_constant_and_no_term_above_degree_three() -> None:
    terms = drawn(AugmentConfig(p_bias_field=1)).bias
    assert not terms[..., 0, 0, 0].any()
    assert not terms[..., 1, 2, 1].any()
    assert terms[..., 1, 1, 1].all()
    assert terms[..., 0, 3, 0].all()
