"""Augmentation: nothing asked changes nothing, flips and right angles are exact, turns are rigid in mm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medseg.augment import apply_affines, augment, change_intensity, draw_affines, rotations
from medseg.config import AugmentConfig

NOTHING: dict[str, Any] = {
    "p_affine": 0,
    "p_flip": 0,
    "p_intensity": 0,
    "p_gamma": 0,
    "p_noise": 0,
    "p_blur": 0,
    "p_low_resolution": 0,
}
ONES = torch.ones(3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_batch(*shape: int, batch: int = 2, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(batch, channels, *shape, generator=seeded(1))
    label = torch.randint(0, 5, (batch, *shape), generator=seeded(2)).to(torch.uint8)
    label[label == 4] = 255
    return image, label


def run(config: AugmentConfig, shape: tuple[int, ...], patch: tuple[int, ...], seed: int = 0) -> tuple[Any, Any]:
    image, label = a_batch(*shape)
    spacing = torch.tensor([1.0, 2.0, 3.5][: len(shape)])
    return augment(config, image, label, patch_size=patch, spacing_mm=spacing, generator=seeded(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    # float32 positions of a few dozen voxels are right to about 1e-6 of a voxel
    return a.shape == b.shape and torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(("shape", "patch"), [((10, 14, 22), (8, 10, 16)), ((20, 28), (14, 16)), ((11, 13), (7, 5))])
def test_nothing_asked_gives_the_centre_crop(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    image, label = a_batch(*shape)
    inner = tuple(slice((s - p) // 2, (s - p) // 2 + p) for s, p in zip(shape, patch))
    new_image, new_label = run(AugmentConfig(**NOTHING, flip_axes=()), shape, patch)
    assert close(new_image, image[(..., *inner)])
    assert torch.equal(new_label, label[(..., *inner)])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_along_each_axis_is_exact(axis: int) -> None:
    shape = (6, 8, 10)
    image, label = a_batch(*shape)
    new_image, new_label = run(AugmentConfig(**NOTHING | {"p_flip": 1}, flip_axes=(axis,)), shape, shape)
    assert close(new_image, image.flip(axis + 2))
    assert torch.equal(new_label, label.flip(axis + 1))


def test_axes_that_must_not_be_flipped_never_are() -> None:
    config = AugmentConfig(**NOTHING | {"p_flip": 1}, flip_axes=(1, 2))
    signs = draw_affines(config, 64, (4, 4, 4), ONES, seeded())[:, 0, 0]
    assert (signs == 1).all()


def test_flips_come_as_often_as_asked() -> None:
    config = AugmentConfig(**NOTHING | {"p_flip": 0.5}, flip_axes=(0,))
    signs = draw_affines(config, 2000, (4, 4, 4), ONES, seeded())[:, 0, 0]
    # five standard deviations of a fair coin thrown 2000 times
    assert float((signs < 0).float().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 2000**0.5)


@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (2, 0)), (2, (0, 1))])
def test_a_right_angle_about_each_axis_of_a_cube_is_a_turn_of_voxels(axis: int, plane: tuple[int, int]) -> None:
    image, label = a_batch(6, 6, 6)
    angles = torch.zeros(2, 3)
    angles[:, axis] = torch.pi / 2
    matrices = torch.cat([rotations(angles, 3), torch.zeros(2, 3, 1)], dim=-1)
    new_image, new_label = apply_affines(matrices, image, label, (6, 6, 6))
    assert close(new_image, torch.rot90(image, -1, (plane[0] + 2, plane[1] + 2)))
    assert torch.equal(new_label, torch.rot90(label, -1, (plane[0] + 1, plane[1] + 1)))


def test_a_right_angle_in_a_picture_is_a_turn_of_pixels() -> None:
    image, label = a_batch(8, 8)
    matrices = torch.cat([rotations(torch.full((2, 1), torch.pi / 2), 2), torch.zeros(2, 2, 1)], dim=-1)
    new_image, new_label = apply_affines(matrices, image, label, (8, 8))
    assert close(new_image, torch.rot90(image, -1, (2, 3)))
    assert torch.equal(new_label, torch.rot90(label, -1, (1, 2)))


def test_a_shift_moves_by_voxels_and_brings_in_zeros() -> None:
    image, label = a_batch(4, 5, 6)
    matrices = torch.cat([torch.eye(3), torch.tensor([[1.0], [0.0], [-2.0]])], dim=-1).repeat(2, 1, 1)
    new_image, new_label = apply_affines(matrices, image, label, (4, 5, 6))
    # the patch at i reads the source at i + 1, at k the source at k − 2
    assert close(new_image[:, :, :3, :, 2:], image[:, :, 1:, :, :4])
    assert torch.equal(new_label[:, :3, :, 2:], label[:, 1:, :, :4])
    assert not new_label[:, 3].any()
    assert not new_image[..., :2].abs().gt(2e-5).any()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.8, 5.0)])
def test_rotations_are_rigid_in_mm(spacing: tuple[float, ...]) -> None:
    config = AugmentConfig(**NOTHING | {"p_affine": 1}, scale=(1, 1), shift=0, rotation_deg=(40, 50, 60), flip_axes=())
    matrices = draw_affines(config, 20, (8, 8, 8), torch.tensor(spacing), seeded())[..., :3].double()
    in_mm = torch.diag(torch.tensor(spacing).double()) @ matrices @ torch.diag(1 / torch.tensor(spacing).double())
    assert torch.allclose(in_mm @ in_mm.transpose(1, 2), torch.eye(3).double().expand(20, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(in_mm), torch.ones(20).double(), atol=1e-5)
    assert (in_mm - torch.eye(3)).abs().amax(dim=(1, 2)).max() > 0.1


def test_a_point_turned_in_anisotropic_voxels_lands_where_the_mm_say() -> None:
    # 90 degrees about axis 0 with voxels of 1 × 2 × 4 mm: two voxels along axis 1 are 4 mm, one voxel along axis 2
    config = AugmentConfig(**NOTHING | {"p_affine": 1}, scale=(1, 1), shift=0, rotation_deg=(90, 0, 0), flip_axes=())

    matrices = draw_affines(config, 500, (8, 8, 8), torch.tensor([1.0, 2.0, 4.0]), seeded())[..., :3]
    sharpest = matrices[matrices[:, 2, 1].argmax()]
    # the largest of 500 even draws from ±90° is close to 90°
    assert float((sharpest @ torch.tensor([0.0, 2.0, 0.0]))[2]) == pytest.approx(1, abs=0.01)


def test_scale_above_one_shows_things_larger() -> None:
    config = AugmentConfig(**NOTHING | {"p_affine": 1}, scale=(2, 2), shift=0, rotation_deg=(0, 0, 0), flip_axes=())
    matrices = draw_affines(config, 3, (8, 8, 8), ONES, seeded())
    assert torch.allclose(matrices[..., :3], 0.5 * torch.eye(3).expand(3, 3, 3))


def test_one_seed_gives_one_result() -> None:
    first = run(AugmentConfig(), (10, 12, 14), (8, 8, 8), seed=3)
    again = run(AugmentConfig(), (10, 12, 14), (8, 8, 8), seed=3)
    other = run(AugmentConfig(), (10, 12, 14), (8, 8, 8), seed=4)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_no_label_value_is_invented(dtype: torch.dtype) -> None:
    image, label = a_batch(12, 12, 12)
    label = label.to(dtype)
    if dtype == torch.int32:
        label[label == 3] = 65535
    _, new = augment(AugmentConfig(), image, label, patch_size=(10, 10, 10), spacing_mm=ONES, generator=seeded())
    assert new.dtype == dtype
    assert set(new.unique().tolist()) <= set(label.unique().tolist())


def test_probability_zero_leaves_intensities_bit_equal() -> None:
    image, _ = a_batch(6, 6, 6)
    assert torch.equal(change_intensity(AugmentConfig(**NOTHING), image, seeded()), image)


@pytest.mark.parametrize("what", ["p_intensity", "p_gamma", "p_noise", "p_blur", "p_low_resolution"])
def test_each_change_of_intensity_happens_and_leaves_its_input_alone(what: str) -> None:
    for shape in ((6, 7, 8), (8, 9)):
        image, _ = a_batch(*shape)
        before = image.clone()
        config = AugmentConfig(**NOTHING | {what: 1}, low_resolution=(0.5, 0.6))
        changed = change_intensity(config, image, seeded())
        assert torch.equal(image, before)
        assert changed.shape == image.shape
        assert torch.isfinite(changed).all()
        assert not torch.allclose(changed, image)


def test_contrast_and_brightness_are_what_they_say() -> None:
    image = torch.tensor([0.0, 2.0, 4.0]).reshape(1, 1, 3)
    config = AugmentConfig(**NOTHING | {"p_intensity": 1}, contrast=(2, 2), brightness=0)
    assert change_intensity(config, image, seeded()).flatten().tolist() == [-2, 2, 6]


def test_gamma_keeps_mean_and_deviation_and_constant_images() -> None:
    image, _ = a_batch(6, 6, 6, channels=1)
    config = AugmentConfig(**NOTHING | {"p_gamma": 1})
    changed = change_intensity(config, image, seeded())
    for before, after in zip(image, changed):
        assert float(after.mean()) == pytest.approx(float(before.mean()), abs=1e-5)
        assert float(after.std()) == pytest.approx(float(before.std()), rel=1e-4)
    assert not change_intensity(config, torch.zeros(1, 1, 4, 4, 4), seeded()).any()
