"""The bench on which ways to infer are tried on held-back cases: Dice and seconds of each; nothing is chosen here."""

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
from medseg.infer import make_scorer
from medseg.metrics import counts, dice
from medseg.model import new_network
from medseg.networks.aspp import pools_locally
from medseg.notebook import Notebook
from medseg.postprocess import LEAST_CASES
from medseg.preprocess import IGNORE_INDEX, Prepared
from medseg.progress import Progress
from medseg.quality import DEGRADATIONS, Degradation, Evidence, Profile, Sample, degrade, samples_of
from medseg.restore import Regions, Strongest
from medseg.statistics import summarise
from medseg.windows import Ensemble, Scorer, stream, views

log = logging.getLogger(__name__)

# share of the time that the first look at the cases, with the windows of training, may take of the whole: mirrored and
# moved copies take six such looks more, and the machine may be slower then
FIRST_SHARE = 0.1
# what the estimate of Dice learns from beside the cases as they are
WORSE: tuple[tuple[Degradation, float], ...] = tuple((kind, s) for s in (0.2, 0.6) for kind in DEGRADATIONS)
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
    measured = counts(prediction, reference(case), values, ignore_value=ignored(data))
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


class Bench:
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

    def run(self, name: str, settings: Settings, *, expected: float = 0.0, keeping: float = 0.0) -> Trial | None:
        """Try a way, or leave it out where `expected` seconds a case are more than there is time for.

        Of which `keeping` seconds a case are kept for what comes later.
        """
        # what is known already takes none
        unknown = sum(not self._notes.knows(["trial", settings, case.id]) for case in self.cases)
        if unknown and expected * unknown + keeping * len(self.cases) > self.left():
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
                looks = turn * len(cases) + number
                # every case once as it is and once worse: so many were taken. Of more, the next one has to fit
                if turn > 1 and budget_s is not None and (self._notes.clock() - began) * (1 + 1 / looks) > budget_s:
                    return found
                self._progress("calibrate", looks, total, "quality")
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
        return laid_over(self.config, settings)

    def _with_settings(self, settings: Settings) -> torch.nn.Module:
        if "network" not in settings:
            return self._network
        network = new_network(self._changed(settings))
        network.load_state_dict(self._network.state_dict())
        return network

    def _scorer(self, settings: Settings) -> Scorer:
        return make_scorer(self._with_settings(settings), self.config.data, self.device, self._precision)


def laid_over(config: Config, settings: Settings) -> Config:
    """The configuration with these settings in place of its own. Raises `ConfigError` for what it cannot have."""
    return make_config(overlay(config.model_dump(mode="json"), settings), source="calibration")


def reference(case: Prepared) -> Labels:
    """The label (*S) of a prepared case. Raises `DataError` where it has none."""
    if case.label is None:
        raise DataError(f"{case.id}: no label to judge by")
    return case.label.numpy()


def _by_case(table: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean over the labels of each case; NaN for a case without any."""
    defined = np.isfinite(table)
    total = np.where(defined, table, 0).sum(axis=1)
    number = defined.sum(axis=1)
    return np.asarray(np.where(number > 0, total / np.maximum(number, 1), np.nan))
