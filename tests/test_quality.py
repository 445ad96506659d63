"""Expected Dice without a reference: evidence from scores, likeness to training, the fit, degradations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medseg.config import DataConfig
from medseg.grid import Grid
from medseg.preprocess import PERCENTILES, Prepared
from medseg.quality import (
    DEGRADATIONS,
    Degradation,
    Evidence,
    Profile,
    QualityModel,
    Sample,
    degrade,
    expected_dice_needs_a_look,
    features_of,
    fit_quality,
    novelty,
    profile_of,
    samples_of,
    tail_share,
)

LIVER = DataConfig(spatial_dims=3, channels=("MR",), labels={"liver": 1})
OBLIQUE = np.array([[0.0, -1.5, 0.0, 7.0], [1.2, 0.0, 0.0, -3.0], [0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]])


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def scores_of(liver: Sequence[float]) -> torch.Tensor:
    """Two channels on a line of voxels, as a picture of one row."""
    p = torch.tensor(liver, dtype=torch.float32)
    return torch.stack([1 - p, p])[:, None, None]


def a_case(
    seed: int, *, side_mm: float = 1.0, radius: float = 5.0, offset: float = 0.0, scale: float = 100.0
) -> Prepared:
    """A bright ball in smooth noise, 20 × 22 × 24 voxels; spacing, radius and scale vary a little with the seed."""
    generator = np.random.default_rng(seed)
    shape = (20, 22, 24)
    spacing = side_mm * generator.uniform(0.95, 1.05)
    radius *= generator.uniform(0.9, 1.1)
    centre = np.array(shape) / 2 + generator.uniform(-1, 1, 3)
    distance = np.sqrt(sum((i - c) ** 2 for i, c in zip(np.indices(shape), centre)))
    label = distance < radius
    texture = gaussian_filter(generator.normal(size=shape), 1.0)
    volume = 2 + 2.0 * label + 2 * texture + 0.05 * generator.normal(size=shape)
    raw = offset + scale * generator.uniform(0.9, 1.1) * np.maximum(volume, 0)
    image = torch.as_tensor((raw - raw.mean()) / raw.std(), dtype=torch.float32)[None]
    grid = Grid(shape, np.diag([spacing, spacing, spacing, 1.0]))
    percentiles = torch.as_tensor(np.percentile(raw, PERCENTILES), dtype=torch.float32)[None]
    return Prepared(f"case{seed}", image, torch.as_tensor(label.astype(np.uint8)), grid, grid, percentiles)


def evidence_of(prepared: Prepared, label: torch.Tensor | None = None) -> Evidence:
    """A network that is right and quite sure."""
    shape = prepared.grid.shape
    chosen = (prepared.label if label is None else label) == 1
    liver = torch.where(chosen, 0.98, 0.0)
    evidence = Evidence(LIVER)
    evidence.add(torch.stack([1 - liver, liver]), (0, 0, 0), shape, prepared.image)
    return evidence


def words(profile: Profile, prepared: Prepared, label: torch.Tensor | None = None) -> str:
    return "\n".join(novelty(profile, prepared, evidence_of(prepared, label)).warnings)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profile_of((a_case(n) for n in range(60)), LIVER)


# evidence


def test_confidence_is_the_dice_that_the_scores_expect() -> None:
    evidence = Evidence(LIVER)
    evidence.add(scores_of([0.9, 0.8, 0.3, 0.0]), (0, 0, 0), (1, 1, 4))
    # chosen: 0.9 and 0.8; 2 · 1.7 / (2.0 + 2); mean score of the chosen 0.85
    features = evidence.label_features()["liver"]
    assert features["confidence"] == pytest.approx(logit(0.85), abs=1e-5)
    assert features["certainty"] == pytest.approx(logit(0.85), abs=1e-5)


def test_boxes_in_any_order_tell_what_the_whole_tells() -> None:
    prepared = a_case(1)
    label = prepared.label
    assert label is not None
    whole, parts = evidence_of(prepared), Evidence(LIVER)
    liver = torch.where(label == 1, 0.98, 0.0)
    scores = torch.stack([1 - liver, liver])
    for first, last in ((13, 20), (0, 6), (6, 13)):
        box = slice(first, last)
        parts.add(scores[:, box], (first, 0, 0), prepared.grid.shape, prepared.image[:, box])
    assert parts.label_features()["liver"] == pytest.approx(whole.label_features()["liver"])
    assert parts.measured(prepared.grid)["liver"] == pytest.approx(whole.measured(prepared.grid)["liver"])
    assert parts.touching() == whole.touching()


def test_regions_overlap_and_each_has_its_own_confidence() -> None:
    data = DataConfig(labels={"whole": (1, 2), "core": (2,)}, region_values=(1, 2))
    evidence = Evidence(data)
    evidence.add(torch.tensor([[0.9, 0.7, 0.2], [0.8, 0.1, 0.1]])[:, None, None], (0, 0, 0), (1, 1, 3))
    features = evidence.label_features()
    assert evidence.voxels.tolist() == [2, 1]
    assert features["whole"]["confidence"] == pytest.approx(logit(2 * 1.6 / (1.8 + 2)), abs=1e-5)
    assert features["core"]["confidence"] == pytest.approx(logit(2 * 0.8 / (1.0 + 1)), abs=1e-5)


def test_agreement_is_the_dice_of_members_against_their_mean() -> None:
    evidence = Evidence(LIVER)
    one, other = (scores_of(p)[None] for p in ([0.9, 0.9, 0.1], [0.9, 0.2, 0.1]))
    # the mean chooses voxels 0 and 1; members agree with Dice 4/4 and 2·1/3, pooled (4 + 2) / (4 + 3)
    evidence.add_members([one, other], (one + other) / 2)
    assert evidence.label_features()["liver"]["agreement"] == pytest.approx(logit(6 / 7), abs=1e-5)


def test_agreement_of_regions_counts_each_region() -> None:
    data = DataConfig(labels={"whole": (1, 2), "core": (2,)}, region_values=(1, 2))
    evidence = Evidence(data)
    one = torch.tensor([[[0.9, 0.9], [0.9, 0.1]]])
    other = torch.tensor([[[0.9, 0.9], [0.4, 0.1]]])
    evidence.add_members([one, other], (one + other) / 2)
    features = evidence.label_features()
    assert features["whole"]["agreement"] == pytest.approx(logit(0.995))  # the highest there is
    assert features["core"]["agreement"] == pytest.approx(logit(2 / 3), abs=1e-5)


def test_a_label_at_the_edge_of_the_grid_touches_it_and_one_at_the_edge_of_a_box_does_not() -> None:
    inside, outside = Evidence(LIVER), Evidence(LIVER)
    scores = torch.zeros(2, 1, 3, 3)
    scores[0] = 1
    scores[:, 0, 1, 1] = torch.tensor([0.0, 1.0])
    inside.add(scores, (2, 0, 0), (5, 3, 3))
    outside.add(scores, (4, 0, 0), (5, 3, 3))
    assert inside.touching() == set()
    assert outside.touching() == {"liver"}


def test_volume_place_and_brightness_of_a_label() -> None:
    evidence = Evidence(LIVER)
    image = torch.tensor([[[[1.0, 2.0, 4.0, 0.0]]]])
    evidence.add(scores_of([0.0, 0.9, 0.9, 0.0]), (0, 0, 0), (1, 1, 4), image)
    found = evidence.measured(Grid((1, 1, 4), np.diag([10.0, 10.0, 5.0, 1.0])))["liver"]
    assert found["volume"] == pytest.approx(math.log(1.0))  # two voxels of 500 mm³
    assert found["position.2"] == pytest.approx(0.5)
    assert found["brightness.0"] == pytest.approx(3.0)


# likeness


def test_new_cases_like_those_of_training_carry_no_warning(profile: Profile) -> None:
    warned = sum(bool(words(profile, a_case(n))) for n in range(1000, 1100))
    # 1 in 40 is meant; more than 8 of 100 has a chance below 1 in 500 then
    assert warned <= 8


def test_few_training_cases_leave_one_out(profile: Profile) -> None:
    few = profile_of((a_case(n) for n in range(6)), LIVER)
    # a range of six says little, so that far more is let pass
    assert few.beyond > profile.beyond


def test_intensities_of_ct_are_named(profile: Profile) -> None:
    found = words(profile, a_case(100, offset=-1200.0, scale=300.0))
    # the noise itself begins at 220 in this unit
    assert "look like CT (minimum −980" in found
    assert "trained on MR (minimum 7" in found


def test_the_scale_of_intensities_is_free(profile: Profile) -> None:
    assert "intensities" not in words(profile, a_case(100, scale=1e5))


def test_another_spacing_is_told_with_both_numbers(profile: Profile) -> None:
    found = words(profile, a_case(100, side_mm=5.0))
    assert "spacing 5" in found
    assert "training had 0.95–1" in found


def test_noise_is_told(profile: Profile) -> None:
    noisy = degrade(a_case(100), "noise", 0.8, np.random.default_rng(0))
    assert "noisier than any training image" in words(profile, noisy)


def test_blur_is_told(profile: Profile) -> None:
    assert "blurred" in words(profile, degrade(a_case(100), "blur", 0.8, np.random.default_rng(0)))


def test_blur_along_one_axis_names_its_direction_in_the_patient(profile: Profile) -> None:
    prepared = a_case(100)
    image = torch.as_tensor(gaussian_filter(prepared.image.numpy(), (0, 0, 0, 3.0)))
    found = words(profile, replace(prepared, image=image))
    assert "the finest detail along S-I is" in found
    # the same voxels, the third axis of which runs from back to front
    turned = prepared.grid.affine[:, [0, 2, 1, 3]]
    grid = Grid(prepared.grid.shape, turned)
    assert "the finest detail along A-P is" in words(profile, replace(prepared, image=image, grid=grid, source=grid))


def test_blur_in_all_directions_names_none(profile: Profile) -> None:
    prepared = a_case(100)
    image = torch.as_tensor(gaussian_filter(prepared.image.numpy(), (0, 3.0, 3.0, 3.0)))
    assert "the finest detail is" in words(profile, replace(prepared, image=image))


def test_of_a_constant_image_only_that_is_told(profile: Profile) -> None:
    prepared = a_case(100)
    flat = replace(prepared, image=torch.zeros_like(prepared.image), raw=torch.full_like(prepared.raw, 7.0))
    assert words(profile, flat).splitlines() == [
        "the image is constant (7)",
        "liver covers brighter or darker tissue than in training",
    ]


def test_the_percentile_that_is_unlike_training_is_named(profile: Profile) -> None:
    prepared = a_case(100)
    image = prepared.image.clone()
    # far from the usual 25th percentile, less so from the 5th, and just where the 0.5th is
    image[image < image.flatten().quantile(0.3)] = -1.7
    found = words(profile, replace(prepared, image=image))
    assert "spread unlike training: the 25th percentile is −1.7 once normalised, in training −0.59 to −0.54" in found


def test_where_zero_lies_is_told_where_it_is_unlike_training(profile: Profile) -> None:
    prepared = a_case(100)
    # from 300 on, and a range of some hundred
    found = words(profile, replace(prepared, raw=prepared.raw + 3000.0))
    assert "the 0.5th percentile, as a share of the range from there to the 99.5th, is 2, in training " in found


def test_a_label_that_is_too_small_is_told_with_both_volumes(profile: Profile) -> None:
    prepared = a_case(100)
    assert prepared.label is not None
    small = torch.zeros_like(prepared.label)
    small[10, 11, 12] = 1
    found = words(profile, prepared, small)
    # one voxel of 1 mm³ within the 5 % that spacing varies; balls of radius 4.5 to 5.5 mm have 0.4 to 0.7 ml
    assert "liver: 0.0" in found
    assert "ml, training had 0.3" in found


def test_a_label_at_the_edge_is_told(profile: Profile) -> None:
    prepared = a_case(100)
    assert prepared.label is not None
    moved = torch.roll(prepared.label, -7, dims=0)
    assert "liver touches the edge of the image (in training: never)" in words(profile, prepared, moved)


def test_a_label_that_was_always_there_is_missed(profile: Profile) -> None:
    prepared = a_case(100)
    assert prepared.label is not None
    assert "liver was not found" in words(profile, prepared, torch.zeros_like(prepared.label))


def test_another_orientation_is_told_and_weighs_nothing(profile: Profile) -> None:
    prepared = a_case(100)
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    turned = Prepared(
        prepared.id,
        prepared.image,
        prepared.label,
        prepared.grid,
        Grid(prepared.source.shape, turn @ prepared.source.affine),
        prepared.raw,
    )
    strange = novelty(profile, turned, evidence_of(turned))
    assert any("LPS" in w and "RAS" in w for w in strange.warnings)
    assert max(strange.image.values()) < 1


def test_a_profile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no case"):
        profile_of([], LIVER)


def test_pictures_have_a_profile_without_a_third_axis() -> None:
    data = DataConfig(spatial_dims=2, labels={"nerve": 1})

    def pictures() -> Iterator[Prepared]:
        for n in range(5):
            case = a_case(n)
            assert case.label is not None
            grid = Grid((22, 24), np.eye(3))
            yield Prepared(case.id, case.image[:, 10], case.label[10], grid, grid, case.raw)

    profile = profile_of(pictures(), data)
    assert profile.orientations == ("",)
    # in % of the picture: a disc of radius 4.5 to 5.5 in 22 × 24 pixels
    assert 8 < math.exp(profile.ranges["nerve/volume"].low) < math.exp(profile.ranges["nerve/volume"].high) < 20


# the fit


def samples(count: int, *, agreement: bool = True, seed: int = 0) -> list[Sample]:
    """Scores that are surer than they should be: Dice is the sigmoid of the logit of confidence less 1, ± 0.05."""
    generator = np.random.default_rng(seed)
    found = []
    for n in range(count):
        confidence = float(generator.uniform(-2, 5))
        dice = 1 / (1 + math.exp(1 - confidence)) + generator.uniform(-0.05, 0.05)
        features = {"confidence": confidence, "spacing": 0.0}
        if agreement:
            features["agreement"] = confidence
        found.append(Sample(f"case{n // 4}", f"version{n}", "liver", features, float(np.clip(dice, 0, 1))))
    return found


def test_the_fit_corrects_scores_that_are_too_sure(profile: Profile) -> None:
    model = fit_quality(samples(160), profile)
    assert model.plain.expected("liver", {"confidence": 1.0}) == pytest.approx(0.5, abs=0.03)
    assert model.plain.expected("liver", {"confidence": 3.0}) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.03)


def test_nine_in_ten_new_cases_lie_in_the_interval(profile: Profile) -> None:
    model = fit_quality(samples(160), profile)
    new = samples(400, seed=1)
    inside = 0
    for s in new:
        estimate = model.plain.estimate(s.label, s.features)
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.expected is not None
        assert 0 <= estimate.low <= estimate.expected <= estimate.high <= 1
        inside += estimate.low <= s.dice <= estimate.high
    # 360 are meant; quantiles of 160 residuals are off by 0.02, a count of 400 by 0.015
    assert 0.84 <= inside / 400 <= 0.96


@pytest.mark.parametrize(("n", "covered"), [(5, 4 / 6), (10, 9 / 11), (19, 0.9), (25, 0.9), (39, 0.9), (200, 0.9)])
def test_nine_in_ten_new_cases_lie_between_the_tails_or_as_many_as_can(n: int, covered: float) -> None:
    # of uniform numbers the share below a place between two of them is exact too
    drawn = np.random.default_rng(n).uniform(size=(20_000, n + 1))
    low, high = np.quantile(drawn[:, 1:], [tail_share(n), 1 - tail_share(n)], axis=1)
    # three standard errors of a share of 20,000 are 0.01 at most
    assert ((low <= drawn[:, 0]) & (drawn[:, 0] <= high)).mean() == pytest.approx(covered, abs=0.01)


def test_of_one_case_all_residuals_count() -> None:
    assert tail_share(1) == 0


def test_five_samples_and_constant_features_are_enough(profile: Profile) -> None:
    few = [Sample(f"case{n}", "clean", "liver", {"confidence": 2.0, "certainty": 2.0}, 0.8) for n in range(5)]
    model = fit_quality(few, profile)
    assert model.with_members is None
    # pulled towards what the scores say, which is 0.88
    assert 0.8 <= (model.plain.expected("liver", {"confidence": 2.0, "certainty": 2.0})) <= 0.85


def test_novelty_never_raises_an_estimate(profile: Profile) -> None:
    # by chance, strange cases were better than their scores say
    odd = []
    for s in samples(80):
        better = s.dice > 1 / (1 + math.exp(1 - s.features["confidence"]))
        odd.append(replace(s, features=s.features | {"spacing": float(better)}))
    assert fit_quality(odd, profile).plain.weights["spacing"] == 0


def test_agreement_is_used_only_where_all_samples_have_it(profile: Profile) -> None:
    assert fit_quality(samples(20), profile).with_members is not None
    assert fit_quality([*samples(20), *samples(4, agreement=False)], profile).with_members is None


def test_no_sample_is_refused(profile: Profile) -> None:
    with pytest.raises(ValueError, match="no label"):
        fit_quality([], profile)


def test_a_label_that_was_not_found_or_is_nowhere_is_no_sample(profile: Profile) -> None:
    prepared = a_case(100)
    assert prepared.label is not None
    found, nothing = evidence_of(prepared), evidence_of(prepared, torch.zeros_like(prepared.label))
    assert [s.dice for s in samples_of(profile, prepared, found, {"liver": 0.8}, case="a", version="b")] == [0.8]
    assert samples_of(profile, prepared, found, {"liver": math.nan}, case="a", version="b") == []
    assert samples_of(profile, prepared, nothing, {"liver": 0.0}, case="a", version="b") == []


def test_one_case_is_enough(profile: Profile) -> None:
    alone = Sample("case", "clean", "liver", {"confidence": 2.0}, 0.8)
    assert 0.8 < fit_quality([alone], profile).plain.expected("liver", {"confidence": 2.0}) < 0.881


def test_a_model_survives_json(profile: Profile) -> None:
    model = fit_quality(samples(40), profile)
    assert QualityModel.model_validate_json(model.model_dump_json()) == model


def test_a_case_like_training_needs_no_look_and_has_its_estimate(profile: Profile) -> None:
    model = fit_quality(samples(160), profile)
    prepared = a_case(100)
    assessment = model.assess(prepared, evidence_of(prepared))
    assert assessment.warnings == ()
    assert not assessment.look
    assert assessment.expected is not None
    own = logit(2 * 0.98 / 1.98)
    assert assessment.expected == pytest.approx(1 / (1 + math.exp(1 - own)), abs=0.03)


def test_scores_that_are_unsure_need_a_look(profile: Profile) -> None:
    model = fit_quality(samples(160), profile)
    prepared = a_case(100)
    evidence = Evidence(LIVER)
    assert prepared.label is not None
    liver = torch.where(prepared.label == 1, 0.55, 0.4)
    evidence.add(torch.stack([1 - liver, liver]), (0, 0, 0), prepared.grid.shape)
    assessment = model.assess(prepared, evidence)
    assert assessment.look
    assert any(w.startswith("liver: expected Dice 0.") for w in assessment.warnings)


def test_where_nothing_was_found_no_dice_is_told(profile: Profile) -> None:
    model = fit_quality(samples(160), profile)
    prepared = a_case(100)
    assert prepared.label is not None
    assessment = model.assess(prepared, evidence_of(prepared, torch.zeros_like(prepared.label)))
    assert assessment.look
    assert assessment.warnings == ("liver was not found; 100% of the training cases had it",)


def test_a_low_mean_is_told_as_that_of_the_labels(profile: Profile) -> None:
    model = fit_quality(samples(160), profile)
    # no label is low by itself: its 0.95 or so is below this threshold only
    strict = model.model_copy(update={"plain": model.plain.model_copy(update={"look_below": 0.99})})
    prepared = a_case(100)
    assessment = strict.assess(prepared, evidence_of(prepared))
    assert assessment.look
    assert len(assessment.warnings) == 1
    assert assessment.warnings[0].startswith("mean expected Dice of the labels 0.9")
    assert assessment.warnings[0].endswith("below 0.99 many masks are bad")


def test_an_image_far_from_training_needs_a_look_whatever_the_scores_say(profile: Profile) -> None:
    model = fit_quality(samples(160), profile)
    prepared = a_case(100, side_mm=1000.0)
    strange = novelty(profile, prepared, evidence_of(prepared))
    assert expected_dice_needs_a_look(model.plain, 0.95, strange)


def test_a_label_that_need_not_be_there_has_no_estimate_where_it_was_not_found(profile: Profile) -> None:
    model = fit_quality(samples(40), profile)
    rare = profile.model_copy(update={"labels": {"liver": profile.labels["liver"].model_copy(update={"present": 0.5})}})
    prepared = a_case(100)
    assert prepared.label is not None
    nothing = evidence_of(prepared, torch.zeros_like(prepared.label))
    assert model.assess(prepared, nothing).estimates["liver"].expected == 0
    assert model.model_copy(update={"profile": rare}).assess(prepared, nothing).estimates["liver"].expected is None


def test_features_hold_both_views(profile: Profile) -> None:
    prepared = a_case(100, side_mm=5.0)
    evidence = evidence_of(prepared)
    found = features_of(evidence, novelty(profile, prepared, evidence))["liver"]
    assert found["spacing"] > math.log1p(1)
    assert found["confidence"] == evidence.label_features()["liver"]["confidence"]


# degradations


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_a_degraded_case_is_whole_and_repeatable(kind: Degradation) -> None:
    prepared = a_case(3)
    one, two = (degrade(prepared, kind, 0.6, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(one.image, two.image)
    assert one.label is not None
    assert tuple(one.image.shape[1:]) == tuple(one.label.shape) == one.grid.shape
    assert torch.isfinite(one.image).all()
    assert torch.isfinite(one.raw).all()
    # normalised as a file of this quality would be
    assert float(one.image.mean()) == pytest.approx(0, abs=1e-4)
    assert float(one.image.std()) == pytest.approx(1, abs=1e-2)
    assert one.image.shape != prepared.image.shape or not torch.allclose(one.image, prepared.image, atol=0.05)


def test_inversion_at_full_strength_mirrors_the_intensities() -> None:
    prepared = a_case(3)
    inverted = degrade(prepared, "inversion", 1.0, np.random.default_rng(0))
    assert torch.allclose(inverted.image, -prepared.image, atol=1e-4)


def test_voxels_of_another_size_claim_their_old_one() -> None:
    prepared = a_case(3)
    small = next(
        d for s in range(9) if (d := degrade(prepared, "spacing", 1.0, np.random.default_rng(s))).grid.shape[0] < 20
    )
    assert small.grid.shape == (8, 9, 10)  # 20, 22, 24 divided by 2.5
    assert small.grid.spacing_mm == prepared.grid.spacing_mm
    assert small.label is not None
    assert prepared.label is not None
    assert float(small.label.sum()) == pytest.approx(float(prepared.label.sum()) / 2.5**3, rel=0.25)


def test_a_crop_stays_where_it_was_in_the_patient() -> None:
    prepared = a_case(3)
    turned = Prepared("t", prepared.image, prepared.label, Grid((20, 22, 24), OBLIQUE), prepared.source, prepared.raw)
    turned = Prepared("t", prepared.image, prepared.label, turned.grid, turned.grid, prepared.raw)
    for seed in range(6):
        part = degrade(turned, "crop", 0.5, np.random.default_rng(seed))
        assert part.source.matches(part.grid)
        corner = np.linalg.solve(turned.grid.affine, part.grid.affine[:, -1])[:3]
        first = tuple(round(float(c)) for c in corner)
        box = tuple(slice(f, f + s) for f, s in zip(first, part.grid.shape))
        assert part.label is not None
        assert turned.label is not None
        assert torch.equal(part.label, turned.label[box])


def test_percentiles_follow_the_noise_in_the_unit_of_the_file() -> None:
    prepared = a_case(3)
    noisy = degrade(prepared, "noise", 1.0, np.random.default_rng(0))
    # noise of two SDs stretches the range to √5 as much, about
    before, after = (float(p.raw[0, -2] - p.raw[0, 1]) for p in (prepared, noisy))
    assert after / before == pytest.approx(math.sqrt(5), rel=0.2)


def test_an_unknown_degradation_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of noise, blur"):
        degrade(a_case(3), "rust", 0.5, np.random.default_rng(0))  # type: ignore[arg-type]
