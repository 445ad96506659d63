"""Losses: two voxels worked by hand, ignored voxels take no part, and MONAI agrees where definitions coincide."""

from __future__ import annotations

import math

import pytest
import torch
from monai.losses.dice import DiceCELoss

from medseg.config import DataConfig, LossConfig
from medseg.losses import loss
from medseg.preprocess import IGNORE_INDEX

DATA = DataConfig(labels={"a": 1, "b": 2})
ONE = DataConfig(labels={"a": 1})
REGIONS = DataConfig(labels={"whole": (1, 2), "core": (2,), "ignore": 9}, region_values=(1, 2))


def two_voxels() -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the label: 1/2 where it is not, 3/4 where it is."""
    return torch.tensor([[[0.0, 0.0], [0.0, math.log(3)]]]), torch.tensor([[0, 1]], dtype=torch.uint8)


def random_case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 3, 4, 5, 6, generator=generator)
    return logits, torch.randint(0, 3, (3, 4, 5, 6), generator=generator).to(torch.uint8)


def test_cross_entropy_by_hand() -> None:
    value = loss(LossConfig(dice_weight=0), ONE, *two_voxels())
    assert float(value) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_soft_dice_by_hand() -> None:
    # overlap 3/4, sizes 1/2 + 3/4 and 1: Dice 1.5 / 2.25
    value = loss(LossConfig(cross_entropy_weight=0), ONE, *two_voxels())
    assert float(value) == pytest.approx(1 - 1.5 / 2.25, abs=1e-5)


def test_weights_multiply_their_parts() -> None:
    parts = (math.log(2) + math.log(4 / 3)) / 2, 1 - 1.5 / 2.25
    value = loss(LossConfig(cross_entropy_weight=2, dice_weight=3), ONE, *two_voxels())
    assert float(value) == pytest.approx(2 * parts[0] + 3 * parts[1], abs=1e-4)


def test_batch_dice_sums_before_the_ratio() -> None:
    # sample 1 has the label and finds it with 3/4, sample 2 has not and says 1/2
    logits = torch.tensor([[[0.0], [math.log(3)]], [[0.0], [0.0]]])
    label = torch.tensor([[1], [0]], dtype=torch.uint8)
    together = loss(LossConfig(cross_entropy_weight=0, batch_dice=True), ONE, logits, label)
    apart = loss(LossConfig(cross_entropy_weight=0, batch_dice=False), ONE, logits, label)
    assert float(together) == pytest.approx(1 - 1.5 / 2.25, abs=1e-4)
    assert float(apart) == pytest.approx(1 - (1.5 / 1.75 + 0) / 2, abs=1e-4)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_equals_monai(batch_dice: bool) -> None:
    logits, label = random_case()
    # background left out of Dice, plain sums in the denominator, one smoothing term above and below
    theirs = DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        squared_pred=False,
        batch=batch_dice,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        lambda_dice=0.7,
        lambda_ce=1.3,
    )
    ours = loss(
        LossConfig(dice_weight=0.7, cross_entropy_weight=1.3, smooth=1e-5, batch_dice=batch_dice), DATA, logits, label
    )
    assert float(ours) == pytest.approx(float(theirs(logits, label[:, None])), rel=1e-5)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_regions_equal_monai(batch_dice: bool) -> None:
    logits, label = random_case()
    logits = logits[:, :2]
    target = torch.stack([label > 0, label == 2], dim=1).float()
    theirs = DiceCELoss(sigmoid=True, batch=batch_dice, smooth_nr=1e-5, smooth_dr=1e-5, lambda_ce=0)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    ours = loss(LossConfig(batch_dice=batch_dice), REGIONS, logits, label.int())
    assert float(ours) == pytest.approx(float(theirs(logits, target) + entropy), rel=1e-5)


def test_regions_by_hand() -> None:
    # probability 1/2 everywhere; voxel 1 is `whole` only, voxel 2 is both
    value = loss(LossConfig(), REGIONS, torch.zeros(1, 2, 2), torch.tensor([[1, 2]], dtype=torch.int32))
    assert float(value) == pytest.approx(math.log(2) + 1 - (2 / 3 + 1 / 2) / 2, abs=1e-5)


@pytest.mark.parametrize(("data", "ignored"), [(DATA, IGNORE_INDEX), (REGIONS, 9)])
def test_ignored_voxels_take_no_part(data: DataConfig, ignored: int) -> None:
    logits, label = random_case()
    logits, label = logits[:, : data.out_channels], label.int() if data.is_regions else label
    hidden = torch.rand(label.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    label[hidden] = ignored
    other = torch.where(hidden[:, None], 50 * torch.randn(logits.shape), logits)
    first, second = logits.clone().requires_grad_(), other.clone().requires_grad_()
    values = [loss(LossConfig(), data, x, label) for x in (first, second)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    torch.autograd.backward(values)
    for x in (first, second):
        assert not x.grad.movedim(1, -1)[hidden].any()
        assert x.grad.movedim(1, -1)[~hidden].abs().sum(-1).all()


def test_ignoring_equals_leaving_out() -> None:
    logits, label = random_case()
    flat, values = logits.movedim(1, -1).reshape(-1, 3), label.flatten()
    keep = torch.arange(len(values)) % 3 > 0
    whole = loss(LossConfig(), DATA, flat.T[None], torch.where(keep, values, IGNORE_INDEX)[None].to(torch.uint8))
    part = loss(LossConfig(), DATA, flat[keep].T[None], values[keep][None])
    assert float(whole) == pytest.approx(float(part), rel=1e-5)


@pytest.mark.parametrize(("data", "ignored"), [(DATA, IGNORE_INDEX), (REGIONS, 9)])
def test_all_ignored_is_zero_with_a_gradient_of_zero(data: DataConfig, ignored: int) -> None:
    logits = torch.randn(2, data.out_channels, 3, 4).requires_grad_()
    value = loss(LossConfig(), data, logits, torch.full((2, 3, 4), ignored, dtype=torch.int32))
    assert value.item() == 0
    value.backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad.any()


def test_a_perfect_answer_costs_nothing() -> None:
    _, label = random_case()
    logits = 100 * torch.nn.functional.one_hot(label.long(), 3).movedim(-1, 1).float()
    assert float(loss(LossConfig(), DATA, logits, label)) == pytest.approx(0, abs=1e-5)


def test_half_precision_scores_are_summed_in_single() -> None:
    logits, label = random_case()
    value = loss(LossConfig(), DATA, logits.bfloat16(), label)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(LossConfig(), DATA, logits.bfloat16().float(), label)))
