"""Expected Dice of a case without a reference: an estimate with an interval, and warnings in words.

How a case is segmented, and where the estimate is kept, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from medseg.config import Section
from medseg.preprocess import Prepared
from medseg.quality.degradations import DEGRADATIONS, Degradation, degrade
from medseg.quality.evidence import Evidence, Features, Floats
from medseg.quality.likeness import ALWAYS, IMAGE_FAMILIES, LABEL_FAMILIES, Novelty, Profile, novelty, profile_of

__all__ = [
    "DEGRADATIONS",
    "Assessment",
    "Degradation",
    "Estimate",
    "Evidence",
    "Novelty",
    "Profile",
    "QualityModel",
    "Regression",
    "Sample",
    "degrade",
    "expected_dice_needs_a_look",
    "features_of",
    "fit_quality",
    "novelty",
    "profile_of",
    "samples_of",
    "tail_share",
]

LOW_DICE = 0.7
COVERAGE = 0.9
# of the regression; every weight has a sign: confidence never lowers an estimate, novelty never raises it
POSITIVE = ("confidence", "certainty", "agreement")
PLAIN = ("confidence", "certainty", *IMAGE_FAMILIES, *LABEL_FAMILIES)
# strength of the pull towards the scores' own view, in samples
PULL = 1.0
# novelty saturates here, so that one absurd header does not decide alone
FARTHEST = 20.0
# so many times the excess of training: look at the case, whatever Dice is expected. Far enough that in the benchmark
# no image was looked at for this alone
FAR = 10.0
# the fit is checked on so many parts of the cases in turn
PARTS = 10


@dataclass(frozen=True)
class Estimate:
    """Expected Dice of a label, and the central 90 % of it (less where fewer than 19 cases taught it).

    None: the label was not found, and need not be there.
    """

    expected: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Assessment:
    """What is thought of one case. `look`: somebody should look at it before it is used; `warnings` say why."""

    estimates: dict[str, Estimate]
    expected: float | None
    look: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One label of a case whose reference is known. `case` is shared by its degraded versions, `version` is not."""

    case: str
    version: str
    label: str
    features: Features
    dice: float


class Regression(Section):
    """Dice = sigmoid(offset of the label + Σ weight · feature); residuals are in units of `_spread`.

    `residuals`: lower and upper quantile of them, over cases that the fit had not seen; see `tail_share`. `look_below`:
    the mean of the expected Dice of a case below which it should be looked at.
    """

    weights: dict[str, float]
    offsets: dict[str, float]
    residuals: tuple[float, float]
    look_below: float

    def expected(self, label: str, features: Mapping[str, float]) -> float:
        """Expected Dice of a label."""
        total = self.offsets.get(label, 0.0) + sum(w * features.get(name, 0.0) for name, w in self.weights.items())
        return float(_sigmoid(np.array(total)))

    def estimate(self, label: str, features: Mapping[str, float]) -> Estimate:
        """Expected Dice with its interval."""
        value = self.expected(label, features)
        low, high = (float(np.clip(value + r * _spread(np.array(value)), 0, 1)) for r in self.residuals)
        return Estimate(value, low, high)


class QualityModel(Section):
    """What is stored with a model: what training was like, and the way from features to Dice, where one was learnt."""

    profile: Profile
    plain: Regression | None = None
    with_members: Regression | None = None

    def assess(self, prepared: Prepared, evidence: Evidence) -> Assessment:
        """Expected Dice and warnings of a segmented case; warnings alone where nothing was learnt."""
        strange = novelty(self.profile, prepared, evidence)
        if self.plain is None:
            return Assessment({}, None, is_far(strange), strange.warnings)
        features = features_of(evidence, strange)
        agreed = any("agreement" in f for f in features.values())
        regression = self.with_members if self.with_members and agreed else self.plain
        estimates: dict[str, Estimate] = {}
        for n, name in enumerate(evidence.data.foreground):
            known = self.profile.labels.get(name)
            if evidence.voxels[n]:
                estimates[name] = regression.estimate(name, features[name])
            elif known is None or known.present < ALWAYS:
                estimates[name] = Estimate(None, None, None)
            else:
                # missed, so its Dice is 0
                estimates[name] = Estimate(0.0, 0.0, 0.0)
        expected = [e.expected for e in estimates.values() if e.expected is not None]
        mean = float(np.mean(expected)) if expected else None
        look = expected_dice_needs_a_look(regression, mean, strange)
        low = [f"{n}: expected Dice {e.expected:.2f}" for n, e in estimates.items() if 0 < (e.expected or 0) < LOW_DICE]
        # where nothing was found, that is all there is to say
        if look and not low and mean and mean < regression.look_below:
            missed = " (0 for what was not found)" if 0.0 in expected else ""
            below = f"below {regression.look_below:.2f} many masks are bad"
            low.append(f"mean expected Dice of the labels {mean:.2f}{missed}, {below}")
        return Assessment(estimates, mean, look, (*low, *strange.warnings))


def features_of(evidence: Evidence, strange: Novelty) -> dict[str, Features]:
    """What the regression reads, by label: the scores' own view, and how unlike training image and label are."""
    own = evidence.label_features()
    found = {}
    for name, numbers in own.items():
        far = strange.image | strange.labels.get(name, {})
        found[name] = numbers | {family: math.log1p(min(v, FARTHEST)) for family, v in far.items()}
    return found


def expected_dice_needs_a_look(regression: Regression, expected: float | None, strange: Novelty) -> bool:
    """Whether a case is likely to be segmented badly: a low expected Dice, nothing found, or an image far from all."""
    return expected is None or expected < regression.look_below or is_far(strange)


def is_far(strange: Novelty) -> bool:
    """Whether an image is unlike all of training."""
    return max(strange.image.values(), default=0) > FAR


def samples_of(
    profile: Profile, prepared: Prepared, evidence: Evidence, dice: Mapping[str, float], *, case: str, version: str
) -> list[Sample]:
    """What a segmented case teaches. `dice`: true Dice by label, NaN or absent where neither map has it.

    A label that was not found is no sample: its Dice needs no estimate.
    """
    features = features_of(evidence, novelty(profile, prepared, evidence))
    return [
        Sample(case, version, name, features[name], dice[name])
        for name, voxels in zip(evidence.data.foreground, evidence.voxels)
        if voxels and math.isfinite(dice.get(name, math.nan))
    ]


def fit_quality(samples: Sequence[Sample], profile: Profile) -> QualityModel:
    """Learn from cases that training had not seen, as they are and degraded. Raises `ValueError` for no sample."""
    if not samples:
        raise ValueError("no label of any case has a Dice to learn from")
    agreed = all("agreement" in s.features for s in samples)
    return QualityModel(
        profile=profile,
        plain=_fit(samples, PLAIN),
        with_members=_fit(samples, ("agreement", *PLAIN)) if agreed else None,
    )


def tail_share(n_cases: int) -> float:
    """Share of the residuals of `n_cases` to leave out at either end so that `COVERAGE` of new cases lie between.

    One more case of the same kind is as likely to come at any place among those seen (conformal prediction, Vovk et
    al. 2005), so k / (n + 1) of new ones lie below the k-th, which has the share (k − 1) / (n − 1) below it. 0 for
    fewer than 19 cases: (n − 1) / (n + 1) of new ones lie between the lowest and the highest, and no more can be had.
    """
    place = (1 - COVERAGE) / 2 * (n_cases + 1)
    return max(0.0, (place - 1) / (n_cases - 1)) if n_cases > 1 else 0.0


def _fit(samples: Sequence[Sample], names: Sequence[str]) -> Regression:
    cases = sorted({s.case for s in samples})
    held_back = np.zeros(len(samples))
    # every case is judged by a fit that knows none of its versions; ten parts are enough
    part_of = {case: n % PARTS for n, case in enumerate(cases)}
    parts = np.array([part_of[s.case] for s in samples])
    for part in np.unique(parts):
        others = [s for s, p in zip(samples, parts) if p != part]
        weights, offsets = _solve(others, names)
        regression = Regression(weights=weights, offsets=offsets, residuals=(0, 0), look_below=LOW_DICE)
        for n in np.flatnonzero(parts == part).tolist():
            held_back[n] = regression.expected(samples[n].label, samples[n].features)
    dice = np.array([s.dice for s in samples])
    residuals = (dice - held_back) / _spread(held_back)
    weights, offsets = _solve(samples, names)
    # samples of one case are alike: it is cases that count
    tail = tail_share(len(cases))
    low, high = np.quantile(residuals, [tail, 1 - tail])
    return Regression(
        weights=weights,
        offsets=offsets,
        residuals=(min(float(low), 0.0), max(float(high), 0.0)),
        look_below=_look_below(samples, held_back),
    )


def _solve(samples: Sequence[Sample], names: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Weights and offsets that make the cross entropy of Dice and estimate least, pulled towards the scores' view."""
    labels = sorted({s.label for s in samples})
    table = np.array([[s.features.get(name, 0.0) for name in names] for s in samples])
    chosen = np.array([[s.label == label for label in labels] for s in samples], dtype=float)
    table = np.concatenate([table.reshape(len(samples), len(names)), chosen.reshape(len(samples), len(labels))], axis=1)
    dice = np.array([s.dice for s in samples])
    prior = np.array([float(name == "confidence") for name in names] + [0.0] * len(labels))
    bounds = [(0.0, None) if n in POSITIVE else (None, 0.0) for n in names] + [(None, None)] * len(labels)

    def loss(weights: Floats) -> tuple[float, Floats]:
        logits = table @ weights
        cross_entropy = np.logaddexp(0, logits) - dice * logits
        slope = table.T @ (_sigmoid(logits) - dice)
        pull = weights - prior
        return float(cross_entropy.sum() + PULL / 2 * pull @ pull), slope + PULL * pull

    found = optimize.minimize(loss, prior, jac=True, bounds=bounds, method="L-BFGS-B").x.tolist()
    return dict(zip(names, found)), dict(zip(labels, found[len(names) :]))


def _look_below(samples: Sequence[Sample], held_back: Floats) -> float:
    """The threshold on the expected mean of a case that catches most low cases for the fewest false alarms.

    Each 0.01 away from `LOW_DICE` must save one in a hundred of either: few cases would choose at random.
    """
    by_version: dict[tuple[str, str], list[int]] = {}
    for n, s in enumerate(samples):
        by_version.setdefault((s.case, s.version), []).append(n)
    dice = np.array([s.dice for s in samples])
    true = np.array([dice[rows].mean() for rows in by_version.values()])
    expected = np.array([held_back[rows].mean() for rows in by_version.values()])
    bad = true < LOW_DICE
    if not bad.any() or bad.all():
        return LOW_DICE
    best, least = LOW_DICE, math.inf
    for threshold in np.arange(0.5, 0.901, 0.01):
        missed, false = (expected[bad] >= threshold).mean(), (expected[~bad] < threshold).mean()
        cost = missed + false + abs(threshold - LOW_DICE)
        if cost < least:
            best, least = float(round(threshold, 2)), cost
    return best


def _sigmoid(logits: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))))


def _spread(expected: Floats) -> Floats:
    # a share close to 0 or 1 can only be wrong by little
    return np.asarray(0.02 + np.sqrt(expected * (1 - expected)))
