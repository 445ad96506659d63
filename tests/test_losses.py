"""Losses: worked by hand, gradients held against autograd in float64, MONAI where definitions coincide, and memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceCELoss

from medseg import losses
from medseg.config import DataConfig, LossConfig, make_config
from medseg.errors import ConfigError
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
    # sample 2 has no Dice to speak of
    assert float(apart) == pytest.approx(1 - 1.5 / 1.75, abs=1e-4)


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
    entropy = F.binary_cross_entropy_with_logits(logits, target)
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
    logits = 100 * F.one_hot(label.long(), 3).movedim(-1, 1).float()
    assert float(loss(LossConfig(), DATA, logits, label)) == pytest.approx(0, abs=1e-5)


def test_half_precision_scores_are_summed_in_single() -> None:
    logits, label = random_case()
    value = loss(LossConfig(), DATA, logits.bfloat16(), label)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(LossConfig(), DATA, logits.bfloat16().float(), label)))


# ---- labels that a batch lacks


def test_a_label_that_the_batch_lacks_has_no_dice() -> None:
    # voxel 1 background, voxel 2 label a, both with 1/3 for each of three labels; label b is nowhere
    value = loss(LossConfig(cross_entropy_weight=0), DATA, torch.zeros(1, 3, 2), torch.tensor([[0, 1]]))
    assert float(value) == pytest.approx(1 - (2 / 3) / (2 / 3 + 1), abs=1e-5)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("data", [DATA, REGIONS], ids=["labels", "regions"])
def test_without_any_label_cross_entropy_alone_is_left(data: DataConfig, batch_dice: bool) -> None:
    logits = torch.zeros(2, data.out_channels, 3).requires_grad_()
    label = torch.zeros(2, 3, dtype=torch.int32)
    value = loss(LossConfig(batch_dice=batch_dice), data, logits, label)
    assert float(value) == pytest.approx(math.log(2 if data.is_regions else 3))
    value.backward()
    # every label is pushed down
    assert (logits.grad[:, 0 if data.is_regions else 1 :] > 0).all()


# ---- other shapes of cross-entropy


def test_focal_by_hand() -> None:
    value = loss(LossConfig(dice_weight=0, focal=2), ONE, *two_voxels())
    assert float(value) == pytest.approx((math.log(2) / 4 + math.log(4 / 3) / 16) / 2)


def test_label_smoothing_equals_torch() -> None:
    logits, label = random_case()
    value = loss(LossConfig(dice_weight=0, label_smoothing=0.3), DATA, logits, label)
    assert float(value) == pytest.approx(float(F.cross_entropy(logits, label.long(), label_smoothing=0.3)), rel=1e-6)


def test_regions_are_smoothed_and_focused_by_hand() -> None:
    # probability 3/4 of `whole`, which is true, and 1/2 of `core`, which is not
    logits, label = torch.tensor([[[math.log(3)], [0.0]]]), torch.tensor([[1]], dtype=torch.int32)
    smooth = loss(LossConfig(dice_weight=0, label_smoothing=0.2), REGIONS, logits, label)
    focal = loss(LossConfig(dice_weight=0, focal=1), REGIONS, logits, label)
    assert float(smooth) == pytest.approx((0.9 * math.log(4 / 3) + 0.1 * math.log(4) + math.log(2)) / 2)
    assert float(focal) == pytest.approx((math.log(4 / 3) / 4 + math.log(2) / 2) / 2)


def test_voxels_at_a_boundary_count_more() -> None:
    # −log p is 0, log 2, log 4; the last two voxels are neighbours of another label
    logits = torch.tensor([[[50.0, 0.0, math.log(3)], [0.0, 0.0, 0.0]]])
    label = torch.tensor([[0, 0, 1]], dtype=torch.uint8)
    value = loss(LossConfig(dice_weight=0, boundary_weight=3), ONE, logits, label)
    assert float(value) == pytest.approx((4 * math.log(2) + 4 * math.log(4)) / 9)


def test_a_boundary_lies_between_regions_not_between_values_of_one() -> None:
    data = DataConfig(labels={"whole": (1, 2), "ignore": 9}, region_values=(1,))
    logits = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])
    plain, weighted = LossConfig(dice_weight=0), LossConfig(dice_weight=0, boundary_weight=3)
    inside = torch.tensor([[1, 2, 2, 9]], dtype=torch.int32)
    assert float(loss(weighted, data, logits, inside)) == pytest.approx(float(loss(plain, data, logits, inside)))
    beside = torch.tensor([[0, 2, 2, 9]], dtype=torch.int32)
    entropy = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2))]
    expected = (4 * entropy[0] + 4 * entropy[1] + entropy[2]) / 9
    assert float(loss(weighted, data, logits, beside)) == pytest.approx(expected)


def test_focal_and_label_smoothing_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="focal and label_smoothing both found"):
        make_config({"loss": {"focal": 2, "label_smoothing": 0.1}})


# ---- gradients and memory

SHAPES = [
    LossConfig(),
    LossConfig(batch_dice=False, dice_weight=0.7),
    LossConfig(label_smoothing=0.2),
    LossConfig(focal=1.5, boundary_weight=2),
]


@pytest.mark.parametrize("config", SHAPES, ids=["plain", "single", "smoothed", "focal"])
@pytest.mark.parametrize(("data", "ignored"), [(DATA, IGNORE_INDEX), (REGIONS, 9)], ids=["labels", "regions"])
def test_gradients_equal_finite_differences(
    data: DataConfig, ignored: int, config: LossConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # chunks of two voxels, the last of one
    monkeypatch.setitem(losses.CHUNK, "cpu", 4 * data.out_channels)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, data.out_channels, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    label = torch.randint(0, 3, (2, 3, 3), generator=generator, dtype=torch.int32)
    label[0, 0, 0] = ignored
    assert torch.autograd.gradcheck(lambda x: loss(config, data, x, label), logits)


def plain_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The same of torch's own pieces, with a one-hot volume."""
    target = F.one_hot(label.long(), 3).movedim(-1, 1).to(logits.dtype)
    probability = logits.softmax(1)
    axes = (0, *range(2, logits.ndim))
    dice = (2 * (probability * target).sum(axes) + 1e-5) / ((probability + target).sum(axes) + 1e-5)
    return F.cross_entropy(logits, label.long()) + 1 - dice[1:].mean()


def gradient(function: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    function(logits).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_gradients_equal_autograd_in_either_layout(layout: torch.memory_format) -> None:
    logits, label = random_case()
    logits = logits.contiguous(memory_format=layout)
    ours = gradient(lambda x: loss(LossConfig(), DATA, x, label), logits)
    theirs = gradient(lambda x: plain_loss(x, label), logits.double())
    # float32 against float64
    assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-8)
    assert ours.is_contiguous(memory_format=layout)


def test_half_precision_gradients_are_rounded_once() -> None:
    logits, label = random_case()
    half = logits.bfloat16()
    exact = gradient(lambda x: loss(LossConfig(), DATA, x, label), half.float())
    assert torch.equal(gradient(lambda x: loss(LossConfig(), DATA, x, label), half), exact.bfloat16())


@pytest.mark.parametrize("data", [DATA, REGIONS], ids=["labels", "regions"])
def test_at_most_one_number_a_voxel_is_kept_beside_the_logits(data: DataConfig) -> None:
    logits, label = random_case()
    logits, label = logits[:, : data.out_channels].clone().requires_grad_(), label.to(torch.int32)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(LossConfig(), data, logits, label)
    beside = [k for p, k in kept.items() if p not in (logits.data_ptr(), label.data_ptr())]
    # a few vectors of labels; for labels log p of the target
    numbers = 0 if data.is_regions else 1
    assert sum(k.untyped_storage().nbytes() for k in beside) <= 4 * numbers * label.numel() + 1000


def test_large_scores_do_not_overflow() -> None:
    logits = torch.tensor([[[3e4, -3e4], [-3e4, 3e4]]]).requires_grad_()
    value = loss(LossConfig(focal=0.5), ONE, logits, torch.tensor([[1, 1]], dtype=torch.uint8))
    # the first voxel is wrong by 6e4, the second right; the Dice of one right of two is 2/3
    assert float(value) == pytest.approx(3e4 + 1 / 3, rel=1e-6)
    value.backward()
    assert torch.isfinite(logits.grad).all()


# ---- several ranks


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("data", [DATA, REGIONS], ids=["labels", "regions"])
def test_ranks_that_sum_have_the_loss_of_the_whole_batch(data: DataConfig, batch_dice: bool) -> None:
    logits, label = random_case()
    logits, label, config = logits[:, : data.out_channels], label.int(), LossConfig(batch_dice=batch_dice)
    label[0][label[0] == 2] = 0
    rows = slice(0, 1), slice(1, 3)
    sent: list[torch.Tensor] = []

    def send(vector: torch.Tensor) -> torch.Tensor:
        sent.append(vector.detach())
        return vector

    for part in rows:
        loss(config, data, logits[part], label[part], reduce=send)
    whole = loss(config, data, logits, label)
    expected = gradient(lambda x: loss(config, data, x, label), logits)
    for n, part in enumerate(rows):
        mine, theirs = label[part], sent[1 - n]
        value = loss(config, data, logits[part], mine, reduce=lambda x, y=theirs: x + y)
        assert float(value) == pytest.approx(float(whole), rel=1e-6)
        found = gradient(
            lambda x, m=mine, y=theirs: loss(config, data, x, m, reduce=lambda v: v + y), logits[part].clone()
        )
        assert torch.allclose(found, expected[part], rtol=1e-4, atol=1e-8)
