"""What inference does unless told otherwise, chosen on the held-back cases when training ends; nothing is trained here.

Every choice is a set of settings to lay over the model's own, with the table of what was measured beside it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from medseg.bench import (
    Bench,
    Settings,
    Trial,
    case_dice,
    ignored,
    laid_over,
    prepared_values,
    reference,
)
from medseg.cases import spread_evenly
from medseg.config import Config, overlay
from medseg.infer import SCALES
from medseg.networks import stride_by_axis
from medseg.notebook import Notebook
from medseg.postprocess import LEAST_CASES, choose, clean
from medseg.preprocess import Prepared
from medseg.progress import Progress, silent
from medseg.quality import Profile, QualityModel, fit_quality, profile_of
from medseg.sides import sided_label
from medseg.windows import views

log = logging.getLogger(__name__)

# of two ways whose Dice differs by less, the faster is used
MARGIN = 0.001
# where, by its interval, it does not cost more than this: of few cases a mean alone says little
MOST_LOSS = 0.005
# what takes twice the time must raise Dice by more than this, and surely so
LEAST_GAIN = 0.0005
# seconds of a case up to which time is no reason against copies
SOON_S = 1.0
# kinds of copies that then stay without proof (docs/recipe.md), and for which time to try them is kept
WELCOME = ("flip", "shift")
# share by which two times must differ to mean anything
NOISE = 0.1
# whole volumes are trusted up to this many times the voxels of the largest one they were judged on
LARGER = 1.5
# share of the time that goes into the estimate of Dice
QUALITY_SHARE = 0.4
# training images that are looked at for what is usual; fewer tell it only beside an estimate of Dice, which weighs it
PROFILED, LEAST_PROFILED = 100, 20


def calibrate(
    config: Config,
    network: torch.nn.Module,
    cases: Sequence[Prepared],
    *,
    training: Sequence[Prepared],
    device: torch.device,
    precision: str,
    budget_s: float | None,
    notes: Notebook | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The choices for a trained `network`, for model.json: `windows`, `tta`, `postprocess`, each with its table.

    And `quality`, the way to an expected Dice, which knows what the images of `training` are like.

    Takes about `budget_s` seconds; where that is little, the least of each part is done nevertheless if it takes no
    more than `LEAST_S`. What there was no time to try is not chosen: nothing at all with fewer than `LEAST_CASES`
    cases, with a budget of 0, and where one look at so many cases would take longer. None: the clock decides nothing,
    so that the same network and cases have the same choices; everything is tried on all cases, and of equals the
    plainest is taken, not the fastest.

    `notes` keep what was found for each case, so that a calibration that was ended goes on; they must be about this
    very network, these cases and this device.
    """
    if budget_s == 0:
        log.info("no time to choose windows, copies or post-processing: train.calibration_share is 0")
        return {}
    profile = profile_of(spread_evenly(training, PROFILED), config.data)
    if len(cases) < LEAST_CASES:
        log.info(
            "%d cases held back: too few to choose windows, copies or post-processing by, or to learn what Dice to "
            "expect of a case; of an image unlike training `infer` will %s",
            len(cases),
            "warn" if profile.cases >= LEAST_PROFILED else f"not warn, after {profile.cases} training cases",
        )
        return {"quality": _warnings_alone(profile)}
    trying_s, quality_s = (None if budget_s is None else s * budget_s for s in (1 - QUALITY_SHARE, QUALITY_SHARE))
    bench = Bench(config, network, cases, device, precision, trying_s, notes or Notebook(None, ""), progress)
    usual = bench.first()
    if usual is None:
        return {"quality": _warnings_alone(profile)}
    windows = _choose_windows(bench, usual, keeping=_time_for_copies(bench, usual))
    tta = _choose_copies(bench, windows[-1])
    return {
        "windows": _record(windows),
        "tta": _record(tta, only=("flip_axes", "shifts", "scales")),
        "postprocess": _choose_postprocess(bench, windows[-1], usual),
        "quality": _learn_quality(bench, windows[-1], profile, quality_s),
    }


def _choose_windows(bench: Bench, usual: Trial, *, keeping: float = 0.0) -> list[Trial]:
    """All trials, the chosen one last: the fastest whose Dice is within `MARGIN` of the best.

    Another way than the training's also has to be surely no more than `MOST_LOSS` below that. It is not tried where it
    would leave less than `keeping` seconds a case.
    """
    trials = [usual]
    for name, settings in _window_ways(bench):
        trial = bench.run(name, settings, expected=usual.seconds, keeping=keeping)
        if trial is not None:
            trials.append(trial)
    able = [trial for trial in trials if trial is usual or _surely_loses_little(trial, usual)]
    best = max(trial.mean for trial in able)
    good = [trial for trial in able if trial.mean >= best - MARGIN]
    fastest = min(trial.seconds for trial in good) if bench.is_timed else math.inf
    # the plainer comes first
    chosen = next(trial for trial in good if trial.seconds <= (1 + NOISE) * fastest)
    return [*(t for t in trials if t is not chosen), chosen]


def _surely_loses_little(trial: Trial, usual: Trial) -> bool:
    interval = trial.gain(usual)[1]
    return interval is not None and interval[0] > -MOST_LOSS


def _window_ways(bench: Bench) -> Iterator[tuple[str, Settings]]:
    """Ways other than the training's to cut the volumes at hand; none where each is a single window anyway."""
    patch = bench.config.windows.patch_size
    if all(s <= p for case in bench.cases for s, p in zip(case.grid.shape, patch)):
        return
    largest = max(math.prod(case.grid.shape) for case in bench.cases)
    yield "overlap 0.25", {"windows": {"overlap": 0.25}}
    local: dict[str, Any] = {"network": {"pooling_window": list(patch)}}
    ways: list[tuple[str, dict[str, Any]]] = [
        ("whole", {"windows": {"mode": "whole", "whole_voxels": round(LARGER * largest)}}),
        ("large tiles", {"windows": {"mode": "halo", "tile_size": [2 * p for p in patch]}}),
    ]
    for name, settings in ways:
        yield name, settings
        if bench.pools_locally(local):
            yield f"{name}, pooling over a patch", settings | local


def _choose_copies(bench: Bench, base: Trial) -> list[Trial]:
    """All trials, the chosen one last: mirrored copies, moved ones, other sizes, each tried beside those before it."""
    trials, chosen = [base], base
    for name, changes in _copy_ways(bench.config).items():
        settings = overlay(chosen.settings, {"windows": changes})
        before, after = (views(laid_over(bench.config, way).windows) for way in (chosen.settings, settings))
        if before == after:
            # no axis to mirror along, or no stride to move within
            continue
        times = len(after) / len(before)
        trial = bench.run(name, settings, expected=times * chosen.seconds)
        if trial is None:
            continue
        trials.append(trial)
        is_soon = trial.seconds <= SOON_S or not bench.is_timed
        if _is_kept(trial, chosen, times=times, is_welcome=is_soon and name in WELCOME):
            chosen = trial
    return [*(t for t in trials if t is not chosen), chosen]


def _copy_ways(config: Config) -> dict[str, dict[str, Any]]:
    """What each kind of copies changes of the windows, in the order in which they are tried."""
    axes = [] if sided_label(config.data) else list(config.augment.flip_axes)
    return {
        "flip": {"flip_axes": axes},
        "shift": {"shifts": shifts_within(stride_by_axis(config.network, config.data.spatial_dims))},
        "scale": {"scales": list(SCALES)},
    }


def _time_for_copies(bench: Bench, usual: Trial) -> float:
    """Seconds a case to try the kinds of copies that are welcome, as far as a case takes no longer than `SOON_S`."""
    needed, settings, before = 0.0, usual.settings, views(laid_over(bench.config, usual.settings).windows)
    ways = _copy_ways(bench.config)
    for name in WELCOME:
        settings = overlay(settings, {"windows": ways[name]})
        after = views(laid_over(bench.config, settings).windows)
        if after != before and len(after) * usual.seconds <= SOON_S:
            needed += len(after) * usual.seconds
        before = after
    return needed


def _is_kept(trial: Trial, chosen: Trial, *, times: float, is_welcome: bool) -> bool:
    """Whether copies that take so many `times` the time stay: where they surely help.

    Where they are welcome, unless they are worse by `MARGIN`: a few dozen cases seldom prove what copies of this kind
    bring on average (docs/recipe.md).
    """
    mean, interval = trial.gain(chosen)
    if interval is None:
        return False
    if is_welcome:
        return mean > -MARGIN and interval[1] > 0
    return mean > LEAST_GAIN * math.log2(times) and interval[0] > 0


def shifts_within(strides: Sequence[int]) -> list[list[int]]:
    """Three moves, in voxels by axis, that with none at all meet each axis's stride at its four quarters."""
    quarters = ((1, 2, 3), (2, 3, 1), (3, 1, 2))
    moves = [[stride * part // 4 for stride, part in zip(strides, parts)] for parts in quarters]
    return [move for move in moves if any(move)]


def _choose_postprocess(bench: Bench, base: Trial, usual: Trial) -> dict[str, Any]:
    """What helped on the cases, tried together once more before it is used.

    Where there is no time for the masks of `base`, by those of the `usual` way, which are forgotten then.
    """
    data = bench.config.data
    if data.is_regions:
        return {"settings": {}, "measured": []}
    values = prepared_values(data)
    if base is not usual and not bench.has_time_for(base):
        base = usual
    seen = list(bench.labels(base))
    bench.forget_masks()
    found = choose(
        ((labels, reference(case), case.grid.voxel_mm3) for labels, case in seen), values, ignore_value=ignored(data)
    )
    settings: dict[str, Any] = {"postprocess": dict(found.settings)} if found.settings else {}
    if settings:
        config = laid_over(bench.config, settings)
        cleaned = [
            case_dice(data, clean(config.postprocess, labels.copy(), values, voxel_mm3=case.grid.voxel_mm3), case)
            for labels, case in seen
        ]
        together = Trial("post-processing", settings, np.array(cleaned), base.seconds)
        log.info("%s: Dice %.4f in place of %.4f", together.settings, together.mean, base.mean)
        if together.mean <= base.mean:
            settings = {}
    return {"settings": settings, "measured": [dict(row) for row in found.table]}


def _learn_quality(bench: Bench, base: Trial, profile: Profile, budget_s: float | None) -> dict[str, Any]:
    """The estimate of Dice, from the cases as they are and worse; with mirrored copies too, where sides are alike."""
    data = bench.config.data
    axes = [] if sided_label(data) else list(bench.config.augment.flip_axes)[:1]
    # what choosing has left over may go into the least of it
    spare_s = None if budget_s is None else budget_s + bench.left()
    cases = bench.teaching(base.seconds, spare_s / 3 if axes and spare_s is not None else spare_s)
    if axes and not cases:
        # better an estimate from the plain image than none
        axes, cases = [], bench.teaching(base.seconds, spare_s)
    if not cases:
        log.warning("no time to learn what Dice to expect of a case; a larger train.calibration_share gives more")
        return _warnings_alone(profile)
    plain_s = budget_s / 3 if axes and budget_s is not None else budget_s
    plain = bench.samples(base.settings, cases, profile, plain_s)
    if not plain:
        return _warnings_alone(profile)
    model = fit_quality(plain, profile)
    if axes:
        flipped = overlay(base.settings, {"windows": {"flip_axes": axes}})
        mirrored = bench.samples(flipped, cases, profile, None if plain_s is None else 2 * plain_s)
        if mirrored:
            model = model.model_copy(update={"with_members": fit_quality(mirrored, profile).with_members})
        else:
            # a label that only the plain image shows, spurious, is in no mean of both
            axes = []
    measured = [{"samples": len(plain), "cases": len({s.case for s in plain})}]
    return _quality_record(model, measured, axes)


def _warnings_alone(profile: Profile) -> dict[str, Any]:
    """No estimate of Dice: what is unlike training is told of nevertheless, where that was enough to know."""
    if profile.cases < LEAST_PROFILED:
        return {"settings": {}, "measured": []}
    return _quality_record(QualityModel(profile=profile))


def _quality_record(
    model: QualityModel, measured: Sequence[Mapping[str, int]] = (), flip_axes: Sequence[int] = ()
) -> dict[str, Any]:
    return {
        "settings": {},
        "measured": list(measured),
        "flip_axes": list(flip_axes),
        "model": model.model_dump(mode="json"),
    }


def _record(trials: Sequence[Trial], *, only: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of the last trial, of the windows' those in `only` if any are named, and the table of all."""
    settings = dict(trials[-1].settings)
    if only:
        settings = {"windows": {k: v for k, v in settings.get("windows", {}).items() if k in only}}
    return {"settings": settings, "measured": [t.record() for t in trials]}
