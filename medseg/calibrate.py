"""What inference does unless told otherwise, chosen on the held-back cases when training ends; nothing is trained here.

Every choice is a set of settings to lay over the model's own, with the table of what was measured beside it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from medseg.body import air_of
from medseg.cases import spread_evenly
from medseg.config import Config, DataConfig, make_config, overlay
from medseg.device import is_out_of_memory
from medseg.errors import DataError
from medseg.infer import SCALES, make_scorer
from medseg.metrics import counts, dice
from medseg.model import new_network
from medseg.networks import stride_by_axis
from medseg.networks.aspp import pools_locally
from medseg.notebook import Notebook
from medseg.postprocess import LEAST_CASES, choose, clean
from medseg.preprocess import IGNORE_INDEX, Prepared
from medseg.progress import Progress, silent
from medseg.quality import (
    DEGRADATIONS,
    Degradation,
    Evidence,
    Profile,
    Sample,
    degrade,
    fit_quality,
    profile_of,
    samples_of,
)
from medseg.restore import Regions, Strongest
from medseg.sides import sided_label
from medseg.statistics import summarise
from medseg.windows import Ensemble, Scorer, stream, views

log = logging.getLogger(__name__)

# of two ways whose Dice differs by less, the faster is used
MARGIN = 0.001
# where, by its interval, it does not cost more than this: of few cases a mean alone says little
MOST_LOSS = 0.005
# what takes twice the time must raise Dice by more than this, and surely so
LEAST_GAIN = 0.0005
# share by which two times must differ to mean anything
NOISE = 0.1
# whole volumes are trusted up to this many times the voxels of the largest one they were judged on
LARGER = 1.5
# share of the time that goes into the estimate of Dice
QUALITY_SHARE = 0.4
# training images that are looked at for what is usual
PROFILED = 100
# what the estimate of Dice learns from beside the cases as they are
WORSE: tuple[tuple[Degradation, float], ...] = tuple((kind, s) for s in (0.2, 0.6) for kind in DEGRADATIONS)
# share of the time that the first look at the cases, with the windows of training, may take of the whole
FIRST_SHARE = 0.15
# the least of each part is done where it takes no longer than this, however short a training was
LEAST_S = 20.0

Settings = Mapping[str, Any]
Labels = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Trial:
    """One way to infer: its `settings`, Dice (cases, labels) on the network's grid, and seconds for a case."""

    name: str
    settings: Settings
    dice: np.ndarray[Any, np.dtype[np.float64]]
    seconds: float

    @property
    def mean(self) -> float:
        """Mean over cases, then over labels; labels that no case has are left out."""
        with np.errstate(invalid="ignore"):
            by_label = [float(np.nanmean(column)) for column in self.dice.T if np.isfinite(column).any()]
        return float(np.mean(by_label)) if by_label else 0.0

    def gain(self, other: Trial) -> tuple[float, tuple[float, float] | None]:
        """How much Dice this way has more than the `other` by case: mean, and its 95 % interval.

        Of a label that one rightly leaves empty, and the other does not, the one has a Dice of 1.
        """
        both_empty = np.isnan(self.dice) & np.isnan(other.dice)
        one, another = (np.where(both_empty, np.nan, np.nan_to_num(way.dice, nan=1.0)) for way in (self, other))
        found = summarise(_by_case(one) - _by_case(another))
        return found.mean or 0.0, found.ci95

    def record(self) -> dict[str, Any]:
        """For model.json."""
        return {
            "name": self.name,
            "settings": self.settings,
            "dice": round(self.mean, 5),
            "seconds_a_case": round(self.seconds, 4),
            "cases": len(self.dice),
        }


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
    if len(cases) < LEAST_CASES:
        log.info("%d cases held back: too few to choose windows, copies or post-processing by", len(cases))
        return {}
    if budget_s == 0:
        log.info("no time to choose windows, copies or post-processing: train.calibration_share is 0")
        return {}
    trying_s, quality_s = (None if budget_s is None else s * budget_s for s in (1 - QUALITY_SHARE, QUALITY_SHARE))
    bench = _Bench(config, network, cases, device, precision, trying_s, notes or Notebook(None, ""), progress)
    usual = bench.first()
    if usual is None:
        return {}
    windows = _choose_windows(bench, usual)
    tta = _choose_copies(bench, windows[-1])
    return {
        "windows": _record(windows),
        "tta": _record(tta, only=("flip_axes", "shifts", "scales")),
        "postprocess": _choose_postprocess(bench, windows[-1], usual),
        "quality": _learn_quality(bench, windows[-1], training, quality_s),
    }


def quick_dice(
    config: Config,
    network: torch.nn.Module,
    cases: Sequence[Prepared],
    device: torch.device,
    precision: str,
    *,
    tick: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Mean Dice of each label that any of the cases has, on the network's grid: a guide, not the report.

    `tick` hears the share of a case that is done after each of its windows; what it raises ends the look.
    """
    scorer = make_scorer(network, config.data, device, precision)
    found = np.array([case_dice(config.data, label_case(config, c, scorer, device, tick=tick), c) for c in cases])
    return {
        name: float(np.nanmean(column))
        for name, column in zip(config.data.foreground, found.T)
        if np.isfinite(column).any()
    }


def label_case(
    config: Config,
    case: Prepared,
    scorer: Scorer,
    device: torch.device,
    evidence: Evidence | None = None,
    *,
    tick: Callable[[float], None] | None = None,
) -> Labels:
    """Labels (*S) of a prepared case on the network's grid, in the values of a prepared label."""
    windows, data = config.windows, config.data
    decision: Strongest | Regions = Regions(data.out_values)
    if not data.is_regions:
        decision = Strongest(tuple(range(data.out_channels)))
    labels = torch.zeros(case.grid.shape, dtype=decision.dtype)
    seen = views(windows)
    ensemble = Ensemble((scorer,), seen, evidence.add_members if evidence and len(seen) > 1 else None)
    air = air_of(windows, data, config.preprocess, case.image)
    pieces = stream(windows, case.image, ensemble, device=device, out_channels=data.out_channels, air=air, tick=tick)
    for piece in pieces:
        labels[piece.box] = decision.decide(piece.scores, range(data.out_channels)).cpu()
        if evidence is not None:
            evidence.add_piece(piece, case.image)
    return labels.numpy()


def case_dice(data: DataConfig, prediction: Labels, case: Prepared) -> list[float]:
    """Dice of each label of a case on the network's grid; NaN where neither has it."""
    values = list(prepared_values(data).values())
    measured = counts(prediction, _reference(case), values, ignore_value=ignored(data))
    return [dice(measured[value]) for value in values]


def prepared_values(data: DataConfig) -> dict[str, Any]:
    """What stands for each label in a prepared case: the output channel, for regions the values of the file."""
    if data.is_regions:
        return {name: data.labels[name] for name in data.foreground}
    return {name: index for index, name in enumerate(data.foreground, start=1)}


def ignored(data: DataConfig) -> int | None:
    """The value of a prepared label that takes no part."""
    if data.ignore_value is None:
        return None
    return data.ignore_value if data.is_regions else IGNORE_INDEX


class _NoTimeError(Exception):
    """Cases take too long to choose anything by them."""


class _Bench:
    """The cases to judge by, as many as the time allows, and the clock."""

    def __init__(
        self,
        config: Config,
        network: torch.nn.Module,
        cases: Sequence[Prepared],
        device: torch.device,
        precision: str,
        budget_s: float | None,
        notes: Notebook,
        progress: Progress,
    ) -> None:
        self.config = config
        self.cases = list(cases)
        self.device = device
        self._network = network
        self._precision = precision
        self._notes = notes
        self._began = notes.clock()
        self._budget_s = budget_s
        self._progress = progress
        self._masks: dict[str, Labels] = {}

    def first(self) -> Trial | None:
        """The way of training, on as many cases, spread evenly, as leave time for the others; None: on too few."""
        if self._budget_s is not None:
            try:
                chosen = set(self._notes.once(["cases"], partial(self._affordable, self._budget_s)))
            except _NoTimeError as error:
                log.warning("%s", error)
                return None
            if self._notes.goes_on:
                # somebody has to pay for caches again, and no case that is timed
                label_case(self.config, self.cases[0], self._scorer({}), self.device)
            self.cases = [case for case in self.cases if case.id in chosen]
        trial = self.run("as in training", {})
        if trial is None:
            raise RuntimeError("the first trial is never left out")
        return trial

    def _affordable(self, budget_s: float) -> list[str]:
        """Ids of the cases to choose by. Raises `_NoTimeError` where there is no time for `LEAST_CASES`."""
        start, most_s = time.perf_counter(), max(LEAST_S, budget_s)
        scorer = self._scorer({})
        # the first case pays for caches too; the second tells the time
        for number, case in enumerate(self.cases[:2], start=1):
            begun = time.perf_counter()
            label_case(self.config, case, scorer, self.device)
            each = time.perf_counter() - begun
            if each * (LEAST_CASES if number == 2 else 1) > most_s:
                raise _NoTimeError(
                    "windows, copies and post-processing are not chosen, and no Dice is expected of a case: "
                    f"{case.id} took {each:.0f} s, and there are {most_s:.0f} s to try {LEAST_CASES} cases; a larger "
                    "train.calibration_share gives more"
                )
        affordable = int(FIRST_SHARE * budget_s / each)
        wanted = max(LEAST_CASES, min(len(self.cases), affordable))
        picked = spread_evenly(self.cases, wanted)
        log.debug("%.1f s to see what a case takes: %d cases to choose by", time.perf_counter() - start, len(picked))
        return [case.id for case in picked]

    def left(self) -> float:
        """Seconds that are left to try something."""
        return math.inf if self._budget_s is None else max(0.0, self._budget_s - (self._notes.clock() - self._began))

    @property
    def is_timed(self) -> bool:
        """Whether the clock has a say in what is tried and chosen."""
        return self._budget_s is not None

    def run(self, name: str, settings: Settings, *, expected: float = 0.0) -> Trial | None:
        """Try a way, or leave it out where `expected` seconds a case are more than there is time for."""
        # what is known already takes none
        unknown = sum(not self._notes.knows(["trial", settings, case.id]) for case in self.cases)
        if expected * unknown > self.left():
            log.info("no time left to try %s", name)
            return None
        config, scorer = self._changed(settings), self._scorer(settings)
        found, seconds = [], 0.0
        for number, case in enumerate(self.cases):
            self._progress("calibrate", number, len(self.cases), name)
            try:
                # nobody cleans regions
                make = partial(self._try, config, scorer, case, keep=not settings and not config.data.is_regions)
                dices, took = self._notes.once(["trial", settings, case.id], make)
            except (DataError, RuntimeError) as error:
                # too small for the network, or too large for the memory: not this way. The way of training must work
                if not settings or not (isinstance(error, DataError) or is_out_of_memory(error)):
                    raise
                log.info("%s cannot be done: %s", name, error)
                return None
            found.append(dices)
            seconds += took
        trial = Trial(name, settings, np.array(found), seconds / len(self.cases))
        log.info("%s: Dice %.4f, %.3f s a case", name, trial.mean, trial.seconds)
        return trial

    def _try(self, config: Config, scorer: Scorer, case: Prepared, *, keep: bool) -> tuple[list[float], float]:
        """Dice by label, and the seconds from image to labels, which are kept where they will be asked for again."""
        begun = time.perf_counter()
        labels = label_case(config, case, scorer, self.device)
        if keep:
            self._masks[case.id] = labels
        return case_dice(config.data, labels, case), time.perf_counter() - begun

    def has_time_for(self, trial: Trial) -> bool:
        """Whether there is time to see the cases in a way that has been tried once more."""
        return trial.seconds * len(self.cases) <= self.left()

    def labels(self, trial: Trial) -> Iterator[tuple[Labels, Prepared]]:
        """The labels of every case, in a way that has been tried; those of the first way are kept, and given away."""
        config, scorer = self._changed(trial.settings), self._scorer(trial.settings)
        for number, case in enumerate(self.cases):
            self._progress("calibrate", number, len(self.cases), "post-processing")
            known = None if trial.settings else self._masks.pop(case.id, None)
            yield label_case(config, case, scorer, self.device) if known is None else known, case

    def forget_masks(self) -> None:
        """Nobody will ask for the labels of the first way again."""
        self._masks.clear()

    def teaching(self, seconds: float, budget_s: float | None) -> list[Prepared]:
        """As many cases, spread evenly, as can each be seen twice in the time, `seconds` a look; none for too few."""
        if budget_s is None:
            return self.cases
        affordable = int(max(LEAST_S, budget_s) / max(1e-6, 2 * seconds))
        if affordable < LEAST_CASES:
            return []
        return spread_evenly(self.cases, min(affordable, len(self.cases)))

    def samples(
        self, settings: Settings, cases: Sequence[Prepared], profile: Profile, budget_s: float | None
    ) -> list[Sample]:
        """What the cases teach about the estimate of Dice: as they are, then ever worse till time is up, or once."""
        config, scorer = self._changed(settings), self._scorer(settings)
        began = self._notes.clock()
        found: list[Sample] = []
        turns = 2 if budget_s is None else 1 + len(WORSE)
        total = turns * len(cases)
        for turn in range(turns):
            for number, case in enumerate(cases):
                # every case once as it is and once worse: so many were taken
                if turn > 1 and budget_s is not None and self._notes.clock() - began > budget_s:
                    return found
                self._progress("calibrate", turn * len(cases) + number, total, "quality")
                # in one turn all kinds come, each on other cases
                worse = WORSE[(turn + number) % len(WORSE)] if turn else None
                make = partial(self._samples, config, scorer, profile, case, worse, (turn, number))
                rows = self._notes.once(["quality", settings, case.id, worse, turn, number], make)
                found += [Sample(**row) for row in rows]
        return found

    def _samples(
        self,
        config: Config,
        scorer: Scorer,
        profile: Profile,
        case: Prepared,
        worse: tuple[Degradation, float] | None,
        seed: tuple[int, int],
    ) -> list[dict[str, Any]]:
        """What one case teaches, made `worse` by a kind and strength, as the fields of `Sample`."""
        seen, version = case, "as it is"
        if worse is not None:
            kind, strength = worse
            version = f"{kind} {strength}"
            seen = degrade(case, kind, strength, np.random.default_rng(seed))
        evidence = Evidence(config.data)
        labels = label_case(config, seen, scorer, self.device, evidence)
        dices = dict(zip(config.data.foreground, case_dice(config.data, labels, seen)))
        return [asdict(s) for s in samples_of(profile, seen, evidence, dices, case=case.id, version=version)]

    def pools_locally(self, settings: Settings) -> bool:
        """Whether these settings make the network pool over a window."""
        return pools_locally(self._with_settings(settings))

    def _changed(self, settings: Settings) -> Config:
        return _laid_over(self.config, settings)

    def _with_settings(self, settings: Settings) -> torch.nn.Module:
        if "network" not in settings:
            return self._network
        network = new_network(self._changed(settings))
        network.load_state_dict(self._network.state_dict())
        return network

    def _scorer(self, settings: Settings) -> Scorer:
        return make_scorer(self._with_settings(settings), self.config.data, self.device, self._precision)


def _choose_windows(bench: _Bench, usual: Trial) -> list[Trial]:
    """All trials, the chosen one last: the fastest whose Dice is within `MARGIN` of the best.

    Another way than the training's also has to be surely no more than `MOST_LOSS` below that.
    """
    trials = [usual]
    for name, settings in _window_ways(bench):
        trial = bench.run(name, settings, expected=usual.seconds)
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


def _window_ways(bench: _Bench) -> Iterator[tuple[str, Settings]]:
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


def _choose_copies(bench: _Bench, base: Trial) -> list[Trial]:
    """All trials, the chosen one last: mirrored copies, moved ones, other sizes, each kept where it surely helped."""
    trials, chosen = [base], base
    axes = [] if sided_label(bench.config.data) else list(bench.config.augment.flip_axes)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("flip", {"flip_axes": axes}),
        ("shift", {"shifts": shifts_within(stride_by_axis(bench.config.network, bench.config.data.spatial_dims))}),
        ("scale", {"scales": list(SCALES)}),
    ]
    for name, changes in ways:
        settings = overlay(chosen.settings, {"windows": changes})
        factor = _copies(bench.config, settings) / _copies(bench.config, chosen.settings)
        if factor == 1:
            # no axis to mirror along, or no stride to move within
            continue
        trial = bench.run(name, settings, expected=factor * chosen.seconds)
        if trial is None:
            continue
        trials.append(trial)
        mean, interval = trial.gain(chosen)
        if mean > LEAST_GAIN * math.log2(factor) and interval is not None and interval[0] > 0:
            chosen = trial
    return [*(t for t in trials if t is not chosen), chosen]


def shifts_within(strides: Sequence[int]) -> list[list[int]]:
    """Three moves, in voxels by axis, that with none at all meet each axis's stride at its four quarters."""
    quarters = ((1, 2, 3), (2, 3, 1), (3, 1, 2))
    moves = [[stride * part // 4 for stride, part in zip(strides, parts)] for parts in quarters]
    return [move for move in moves if any(move)]


def _copies(config: Config, settings: Settings) -> int:
    """How many copies of a window a network sees with these settings."""
    return len(views(_laid_over(config, settings).windows))


def _choose_postprocess(bench: _Bench, base: Trial, usual: Trial) -> dict[str, Any]:
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
        ((labels, _reference(case), case.grid.voxel_mm3) for labels, case in seen), values, ignore_value=ignored(data)
    )
    settings: dict[str, Any] = {"postprocess": dict(found.settings)} if found.settings else {}
    if settings:
        config = _laid_over(bench.config, settings)
        cleaned = [
            case_dice(data, clean(config.postprocess, labels.copy(), values, voxel_mm3=case.grid.voxel_mm3), case)
            for labels, case in seen
        ]
        together = Trial("post-processing", settings, np.array(cleaned), base.seconds)
        log.info("%s: Dice %.4f in place of %.4f", together.settings, together.mean, base.mean)
        if together.mean <= base.mean:
            settings = {}
    return {"settings": settings, "measured": [dict(row) for row in found.table]}


def _learn_quality(bench: _Bench, base: Trial, training: Sequence[Prepared], budget_s: float | None) -> dict[str, Any]:
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
        return {"settings": {}, "measured": []}
    plain_s = budget_s / 3 if axes and budget_s is not None else budget_s
    profile = profile_of(spread_evenly(training, PROFILED), data)
    plain = bench.samples(base.settings, cases, profile, plain_s)
    if not plain:
        return {"settings": {}, "measured": []}
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
    return {"settings": {}, "measured": measured, "flip_axes": axes, "model": model.model_dump(mode="json")}


def _laid_over(config: Config, settings: Settings) -> Config:
    return make_config(overlay(config.model_dump(mode="json"), settings), source="calibration")


def _reference(case: Prepared) -> Labels:
    if case.label is None:
        raise DataError(f"{case.id}: no label to judge by")
    return case.label.numpy()


def _record(trials: Sequence[Trial], *, only: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of the last trial, of the windows' those in `only` if any are named, and the table of all."""
    settings = dict(trials[-1].settings)
    if only:
        settings = {"windows": {k: v for k, v in settings.get("windows", {}).items() if k in only}}
    return {"settings": settings, "measured": [t.record() for t in trials]}


def _by_case(table: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean over the labels of each case; NaN for a case without any."""
    defined = np.isfinite(table)
    total = np.where(defined, table, 0).sum(axis=1)
    number = defined.sum(axis=1)
    return np.asarray(np.where(number > 0, total / np.maximum(number, 1), np.nan))
