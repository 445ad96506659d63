"""The conditional random field: equal to a brute-force one, local, true in mm, and it removes noise but keeps edges."""

from __future__ import annotations

import logging
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medseg import postprocess
from medseg.config import Config, PostprocessConfig, make_config
from medseg.postprocess import refine

Array = npt.NDArray[np.float64]

# every pair of the tiny images is inside
WHOLE = {"crf_radius_mm": 1e3, "crf_radius_voxels": 1000}
SPACINGS = {1: (0.7,), 2: (0.7, 1.9), 3: (0.7, 1.9, 3.1)}
SHAPES = {1: (17,), 2: (5, 7), 3: (4, 3, 5)}


def settings(**changes: float) -> PostprocessConfig:
    return make_config({"postprocess": {"crf": True} | changes}).postprocess


def random_case(
    dims: int, *, labels: int = 3, channels: int = 2, regions: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(dims)
    logits = 2 * torch.randn(labels, *SHAPES[dims], generator=generator)
    image = torch.randn(channels, *SHAPES[dims], generator=generator)
    return (logits.sigmoid() if regions else logits.softmax(dim=0)), image


def fully_connected(
    config: PostprocessConfig, scores: torch.Tensor, image: torch.Tensor, spacing_mm: tuple[float, ...]
) -> Array:
    """The same field in float64 from dense N × N kernels, label by label and pair by pair as the formula says."""
    shape = tuple(scores.shape[1:])
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1).reshape(-1, len(shape))
    place = grid * np.asarray(spacing_mm)
    colour = image.double().numpy().reshape(len(image), -1).T
    apart = ((place[:, None] - place[None]) ** 2).sum(-1)
    unlike = ((colour[:, None] - colour[None]) ** 2).sum(-1)
    smoothness = np.exp(-apart / (2 * config.crf_smoothness_mm**2))
    appearance = np.exp(-apart / (2 * config.crf_appearance_mm**2) - unlike / (2 * config.crf_intensity_sd**2))
    coupling = np.zeros_like(apart)
    for weight, kernel in ((config.crf_smoothness_weight, smoothness), (config.crf_appearance_weight, appearance)):
        n = kernel.sum(axis=1)
        coupling += weight * kernel / np.sqrt(n[:, None] * n[None])
    np.fill_diagonal(coupling, 0)
    p = np.clip(scores.double().numpy().reshape(len(scores), -1), 1e-5, 1 - 1e-5)
    q = p / p.sum(axis=0)
    for _ in range(config.crf_iterations):
        # a label pays for all the others that its neighbours believe in
        price = [sum(coupling @ q[other] for other in range(len(q)) if other != label) for label in range(len(q))]
        new = p * np.exp(-config.crf_compatibility * np.stack(price))
        q = new / new.sum(axis=0)
    return np.asarray(q.reshape(scores.shape))


# ---- brute force


# float32 against float64: after a few iterations of sums over 60 voxels the last digits of 1e-7 have grown, not to 1e-5
BRUTE_FORCE_TOLERANCE = 2e-6


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crf_appearance_weight": 0, "crf_smoothness_weight": 4, "crf_smoothness_mm": 2},
        {"crf_smoothness_weight": 0, "crf_appearance_weight": 5, "crf_intensity_sd": 0.8},
        {"crf_iterations": 1, "crf_compatibility": 2.5},
        {"crf_iterations": 10, "crf_smoothness_mm": 3, "crf_appearance_mm": 0.8, "crf_intensity_sd": 1.7},
    ],
    ids=["defaults", "smoothness", "appearance", "one_iteration", "other_widths"],
)
def test_it_is_the_fully_connected_field_where_the_radius_holds_every_pair(
    dims: int, changes: dict[str, float]
) -> None:
    config = settings(**WHOLE, **changes)
    scores, image = random_case(dims)
    found = refine(config, scores, image, spacing_mm=SPACINGS[dims])
    expected = fully_connected(config, scores, image, SPACINGS[dims])
    assert np.abs(found.numpy() - expected).max() < BRUTE_FORCE_TOLERANCE
    # the field has something to do here
    assert np.abs(expected - scores.numpy()).max() > 0.1


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_each_region_is_a_field_of_yes_and_no(dims: int) -> None:
    config = settings(**WHOLE)
    scores, image = random_case(dims, regions=True)
    found = refine(config, scores, image, spacing_mm=SPACINGS[dims], regions=True)
    for channel, score in zip(found, scores):
        expected = fully_connected(config, torch.stack([1 - score, score]), image, SPACINGS[dims])[1]
        assert np.abs(channel.numpy() - expected).max() < BRUTE_FORCE_TOLERANCE


def test_one_pair_worked_by_hand() -> None:
    # two equal voxels 1 mm apart, only smoothness: k = e^(−1/2), n = 1 + k, so each sends k / (1 + k) times its belief
    config = settings(crf_iterations=1, crf_appearance_weight=0, crf_smoothness_weight=2, crf_smoothness_mm=1)
    found = refine(config, torch.tensor([[0.9, 0.4], [0.1, 0.6]]), torch.zeros(1, 2), spacing_mm=(1,))
    share = math.exp(-0.5) / (1 + math.exp(-0.5))
    first, second = 0.9 * math.exp(2 * share * 0.4), 0.1 * math.exp(2 * share * 0.6)
    # float32
    assert float(found[0, 0]) == pytest.approx(first / (first + second), abs=1e-6)


# ---- the radius


def test_a_radius_beyond_the_last_pair_changes_nothing() -> None:
    scores, image = random_case(3)
    found = [
        refine(settings(crf_radius_mm=r, crf_radius_voxels=v), scores, image, spacing_mm=SPACINGS[3])
        for r, v in ((40, 60), (1e3, 60), (40, 1000))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("limit", "reach"), [({"crf_radius_mm": 4, "crf_radius_voxels": 50}, 2), ({"crf_radius_voxels": 3}, 3)]
)
def test_news_travel_one_radius_in_each_iteration(limit: dict[str, float], reach: int) -> None:
    # voxels of 2 mm; a wide smoothness, so that the radius alone is what ends it
    config = settings(
        **{"crf_radius_mm": 100, "crf_smoothness_mm": 50, "crf_appearance_mm": 50, "crf_iterations": 2} | limit
    )
    scores = torch.full((2, 31), 0.5)
    changed = scores.clone()
    changed[:, 15] = torch.tensor([0.9, 0.1])
    image = torch.zeros(1, 31)
    before, after = (refine(config, s, image, spacing_mm=(2,)) for s in (scores, changed))
    moved = (before != after).any(dim=0).nonzero().flatten().tolist()
    assert moved == list(range(15 - 2 * reach, 15 + 2 * reach + 1))


def test_the_appearance_reaches_an_ellipsoid() -> None:
    config = settings(crf_smoothness_weight=0, crf_iterations=1, crf_radius_mm=2, crf_appearance_mm=50)
    scores = torch.full((2, 9, 9), 0.5)
    changed = scores.clone()
    changed[:, 4, 4] = torch.tensor([0.9, 0.1])
    before, after = (refine(config, s, torch.zeros(1, 9, 9), spacing_mm=(1, 2)) for s in (scores, changed))
    # two voxels along the first axis, one along the second; none beside both, and no message to itself
    seen = {(i - 4, j - 4) for i, j in ((before != after).any(dim=0)).nonzero().tolist()} - {(0, 0)}
    assert seen == {(-2, 0), (-1, 0), (1, 0), (2, 0), (0, -1), (0, 1)}


def test_a_radius_below_the_spacing_leaves_the_scores_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    scores, image = random_case(2)
    with caplog.at_level(logging.WARNING):
        found = refine(settings(crf_radius_mm=0.5), scores, image, spacing_mm=(2, 3))
    # log and softmax in float32
    assert torch.allclose(found, scores, atol=1e-6)
    assert "radius_mm 0.5 is below the spacing" in caplog.text


# ---- mm


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_twice_the_spacing_with_twice_the_mm_is_the_same(dims: int) -> None:
    scores, image = random_case(dims)
    one = settings(crf_smoothness_mm=1.5, crf_appearance_mm=2.5, crf_radius_mm=6)
    two = settings(crf_smoothness_mm=3, crf_appearance_mm=5, crf_radius_mm=12)
    double = [2 * s for s in SPACINGS[dims]]
    same = refine(two, scores, image, spacing_mm=double)
    assert torch.equal(refine(one, scores, image, spacing_mm=SPACINGS[dims]), same)
    assert not torch.allclose(refine(one, scores, image, spacing_mm=double), same, atol=1e-3)


def test_axes_may_be_swapped_with_their_spacing() -> None:
    scores, image = random_case(3)
    found = refine(settings(), scores, image, spacing_mm=SPACINGS[3])
    turned = refine(
        settings(),
        scores.permute(0, 3, 1, 2),
        image.permute(0, 3, 1, 2),
        spacing_mm=[SPACINGS[3][a] for a in (2, 0, 1)],
    )
    # sums in another order, in float32
    assert torch.allclose(turned.permute(0, 2, 3, 1), found, atol=2e-6)


# ---- what it is for


def a_noisy_step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference, image and probabilities: the image steps at column 12; the network's edge at 10, a tenth is wrong."""
    reference = (torch.arange(24) >= 12).long().expand(24, 24)
    image = 2.0 * reference[None] - 1
    guess = (torch.arange(24) >= 10).long().repeat(24, 1)
    wrong = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) < 0.1
    guess = torch.where(wrong, 1 - guess, guess)
    yes = torch.where(guess == 1, 0.7, 0.3)
    # the two columns that the image contradicts are weakly wrong
    yes[:, 10:12] = 0.55
    return reference, image, torch.stack([1 - yes, yes])


def test_noise_goes_and_the_image_keeps_the_edge() -> None:
    reference, image, scores = a_noisy_step()
    assert (scores.argmax(dim=0) != reference).sum() > 70
    found = refine(settings(), scores, image, spacing_mm=(1, 1))
    assert torch.equal(found.argmax(dim=0), reference)


def test_smoothness_alone_leaves_the_edge_where_the_network_had_it() -> None:
    reference, image, scores = a_noisy_step()
    config = settings(crf_appearance_weight=0, crf_smoothness_weight=4, crf_smoothness_mm=2)
    found = refine(config, scores, image, spacing_mm=(1, 1)).argmax(dim=0)
    assert (found[:, 10:12] == 1).all()
    assert torch.equal(found[:, 12:], reference[:, 12:])


def test_smoothness_alone_eats_a_thin_line_that_appearance_keeps() -> None:
    line = torch.zeros(15, 15)
    line[:, 7] = 1
    yes = 0.3 + 0.4 * line
    scores, image = torch.stack([1 - yes, yes]), 4 * line[None]
    smooth = settings(crf_appearance_weight=0, crf_smoothness_weight=4, crf_smoothness_mm=2)
    assert not refine(smooth, scores, image, spacing_mm=(1, 1)).argmax(dim=0).any()
    kept = refine(settings(crf_smoothness_weight=0, crf_appearance_weight=4), scores, image, spacing_mm=(1, 1))
    assert torch.equal(kept.argmax(dim=0), line.long())


# ---- what always holds


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_probabilities_sum_to_one(dims: int) -> None:
    scores, image = random_case(dims, labels=5)
    found = refine(settings(crf_compatibility=50), scores, image, spacing_mm=SPACINGS[dims])
    assert found.dtype == torch.float32
    # five float32 summed
    assert torch.allclose(found.sum(dim=0), torch.ones(SHAPES[dims]), atol=1e-6)
    assert found.min() >= 0


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("certain", [1.0, 1 - 1e-7, 0.6])
def test_a_uniform_field_never_flips(certain: float, regions: bool) -> None:
    image = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([1 - certain, certain])[:, None, None].expand(2, 9, 8)
    found = refine(settings(crf_compatibility=100), scores, image, spacing_mm=(1, 1), regions=regions)
    assert torch.isfinite(found).all()
    assert (found[1] > 0.5).all()
    assert (found[0] < 0.5).all()


def test_certain_scores_of_zero_and_one_stay_finite_and_can_be_outvoted() -> None:
    scores = torch.zeros(2, 9, 9)
    scores[0] = 1
    scores[:, 4, 4] = torch.tensor([0.0, 1.0])
    found = refine(settings(crf_compatibility=10), scores, torch.zeros(1, 9, 9), spacing_mm=(1, 1))
    assert torch.isfinite(found).all()
    assert not found.argmax(dim=0).any()


def test_an_image_with_huge_differences_stays_finite() -> None:
    scores, image = random_case(2)
    found = refine(settings(), scores, 1e30 * image, spacing_mm=SPACINGS[2])
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 7), (7, 1, 1), (1, 1, 1), (5, 1, 4), (0, 4)])
@pytest.mark.parametrize("regions", [False, True])
def test_axes_of_one_voxel_and_of_none(shape: tuple[int, ...], regions: bool) -> None:
    scores = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    scores = scores if regions else scores / scores.sum(dim=0)
    found = refine(settings(), scores, torch.zeros(1, *shape), spacing_mm=(1,) * len(shape), regions=regions)
    assert found.shape == scores.shape
    if math.prod(shape) == 1:
        # alone: what the network said, through log and back in float32
        assert torch.allclose(found, scores, atol=1e-6)


def test_the_only_label_is_certain() -> None:
    found = refine(settings(), torch.ones(1, 4, 4), torch.zeros(1, 4, 4), spacing_mm=(1, 1))
    assert torch.equal(found, torch.ones(1, 4, 4))


def test_inputs_stay_as_they_are() -> None:
    scores, image = random_case(2)
    before = scores.clone(), image.clone()
    for regions in (False, True):
        refine(settings(), scores, image, spacing_mm=SPACINGS[2], regions=regions)
    assert torch.equal(scores, before[0])
    assert torch.equal(image, before[1])


def test_nothing_happens_unless_it_is_asked_for() -> None:
    scores, image = random_case(2)
    assert refine(Config().postprocess, scores, image, spacing_mm=SPACINGS[2]) is scores


@pytest.mark.parametrize(("shape", "spacing"), [((5, 6), (1, 1)), ((5, 7), (1, 1, 1))])
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    scores, _ = random_case(2)
    with pytest.raises(ValueError, match=r"expected \(5, 7\)"):
        refine(settings(), scores, torch.zeros(1, *shape), spacing_mm=spacing)


# ---- how it works


@pytest.mark.parametrize("voxels", [1, 30])
def test_slabs_change_nothing(voxels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, image = (torch.rand(2, 7, 4, 3, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    whole = refine(settings(), scores, image, spacing_mm=(1, 1, 1))
    monkeypatch.setitem(postprocess.SLAB_VOXELS, "cpu", voxels)
    # sums in another order, in float32
    assert torch.allclose(refine(settings(), scores, image, spacing_mm=(1, 1, 1)), whole, atol=2e-6)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_is_larger_than_the_scores() -> None:
    scores, image = random_case(3)
    with Largest() as largest:
        refine(settings(**WHOLE, crf_iterations=1), scores, image, spacing_mm=SPACINGS[3])
    assert largest.elements == scores.numel()
