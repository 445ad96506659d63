"""The training loop of one fit: its course, its clock, its steps; files are read before and judged after, elsewhere."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch

from medseg.bench import ignored, quick_dice
from medseg.config import Config
from medseg.device import (
    choose_precision,
    describe,
    hold_memory,
    is_out_of_memory,
    memory_format,
    peak_bytes,
    release_memory,
    to_memory_format,
)
from medseg.errors import ConfigError, DataError, TrainingError
from medseg.journal import Journal, Row
from medseg.looks import LEAST_S, Ear, ToldToEndError, look
from medseg.losses import loss as loss_of
from medseg.model import new_network
from medseg.optimise import average_weights, learning_rate, make_optimizer, set_rates
from medseg.patches import Batch, PatchSampler
from medseg.preprocess import Prepared
from medseg.pretrained import Pretrained, load_pretrained
from medseg.process import end_asked_by, hearing_signals
from medseg.progress import Progress
from medseg.ranks import Ranks
from medseg.state import STATE, arithmetic, check_arithmetic, check_settings, read_state, settings_of, write_state
from medseg.writers import is_disk_full

log = logging.getLogger(__name__)

# validation while training is spread over about this many moments
MOMENTS = 8
# one bad batch in a night is an accident, several in a row are not: then the weights or the settings are the reason
BAD_BATCHES = 3
# a disk that takes no state for so long does not come back by itself, and each minute more is one to lose
AWAY_S = 900.0


@dataclass
class Course:
    """How far a fit is, all of it kept in the state. Seconds are those of the loop; `losses` those of this epoch.

    `rows`: how many metrics.csv has. `skipped`: batches without a finite loss or gradient; `bad`: the last of them in a
    row. `watched`: held-back cases that are validated on, `look_s`: seconds to have for that, None and 0 before it is
    known in this process; `dice`: of the last time, None before the first, and where there was no time for a last one.
    """

    step: int = 0
    elapsed: float = 0.0
    waiting: float = 0.0
    validating: float = 0.0
    rows: int = 0
    skipped: int = 0
    bad: int = 0
    watched: int | None = None
    validated_at: int = -1
    look_s: float = 0.0
    dice: float | None = None
    losses: list[float] = field(default_factory=list)


class Fit:
    """One fit: network, optimiser, course, random streams, averaged weights. `run` goes to the end.

    The weights that count are the average of those on the way, see `average_weights`; `validation` is looked at to show
    how they do, and chooses nothing: what it says when they are done is about cases that had no part in them. `learnt`:
    SHA-256 of the files of `training`, so that a state is not gone on with on others. A fit begins with the state in
    `folder` where `resume` says so, else with the weights of the file `weights` as far as they fit, else with random
    ones. Raises `ConfigError` where the state is damaged or belongs to another configuration.
    """

    def __init__(
        self,
        config: Config,
        training: Sequence[Prepared],
        validation: Sequence[Prepared],
        folder: Path,
        ranks: Ranks,
        *,
        learnt: str = "",
        weights: Path | None = None,
        resume: bool = False,
    ) -> None:
        self.config = config
        self.learnt = learnt
        self.folder = folder
        self.ranks = ranks
        self.device = ranks.device
        self.training = training
        self.validation = validation
        self.precision = choose_precision(config.train.precision, self.device)
        self.course = Course()
        torch.manual_seed(config.train.seed)
        self.generator = torch.Generator().manual_seed(config.train.seed)
        hold_memory()
        network = new_network(config)
        state = read_state(folder) if resume else None
        self.pretrained = None if weights is None or state is not None else self._load(network, weights)
        self._from = None if self.pretrained is None else self.pretrained.record()
        self._loaded = frozenset() if self.pretrained is None else self.pretrained.loaded
        if state is not None:
            self._check(state)
            self._from, self._loaded = state["pretrained"], frozenset(state["loaded"])
        spread = ranks.spread(network, config.train.batch_size)
        network = to_memory_format(spread, config.data.spatial_dims, self.device)
        # each step adds to it: beside the weights, not across a bus
        self.averaged = average_weights(network).to(self.device)
        optimizer = make_optimizer(config.train, network, loaded=self._loaded)
        self.fabric = ranks.fabric(self.precision)
        self.network, self.optimizer = self.fabric.setup(network, optimizer)
        # statistics of batches, which a bad batch must not reach
        self._averages = list(self.network.buffers())
        self._away_since: float | None = None
        self.sampler = PatchSampler(
            training,
            patch_size=config.windows.patch_size,
            batch_size=config.train.batch_size,
            foreground_fraction=config.train.foreground_fraction,
            generator=self.generator,
            augment=config.augment,
            ignore_value=ignored(config.data),
            device=self.device,
            rows=ranks.rows(config.train.batch_size),
        )
        if state is not None:
            self._go_on(state)

    @property
    def total(self) -> float:
        """The length of the schedule, in seconds or steps."""
        settings = self.config.train
        return settings.time_budget_s or float((settings.epochs or 1) * settings.steps_per_epoch)

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, 0–1."""
        done = self.course.step if self.config.train.time_budget_s is None else self.course.elapsed
        return min(1.0, done / self.total)

    @property
    def waiting_share(self) -> float:
        """Share of the time of the steps that they waited for their batch, 0–1."""
        return self.course.waiting / max(1e-9, self.course.elapsed - self.course.validating)

    def run(self, progress: Progress) -> torch.nn.Module:
        """Train to the end of the schedule and return the network with averaged weights.

        Raises `TrainingError` for losses that are not finite, memory that runs out and a full disk, `KeyboardInterrupt`
        or `Preempted` after the step in which the signal came; the state in the folder is whole then.
        """
        course, settings = self.course, self.config.train
        began = time.perf_counter() - course.elapsed
        saved, validation_s = time.perf_counter(), 0.0
        with self._journal() as journal, _told_to_end() as told, _determinism(settings.deterministic):
            while True:
                course.elapsed, number = self.ranks.highest(time.perf_counter() - began, told())
                if number:
                    self._stop(int(number))
                if time.perf_counter() - saved + validation_s > settings.save_every_s:
                    self._save_on_the_way()
                    saved, validation_s = time.perf_counter(), 0.0
                if self._ends_an_epoch():
                    validation_s = self._end_epoch(journal, told)
                elif self.progress < 1:
                    self._learn()
                    self._show(progress)
                else:
                    break
            self.save()
            (number,) = self.ranks.highest(told())
            if number:
                # it came while the last state was written
                self._stop(int(number))
        progress("train", self.total, self.total)
        log.info("%d steps waited for data %.1f %% of their time", course.step, 100 * self.waiting_share)
        if course.skipped:
            log.warning("%d batches had no finite loss or gradient and were skipped; see log.txt", course.skipped)
        network: torch.nn.Module = self.averaged.module
        return network

    @property
    def held_mb(self) -> float:
        """The most that tensors of this process have held on its GPU so far; 0 on a CPU."""
        return round(peak_bytes(self.device) / 2**20, 1)

    def record(self) -> dict[str, Any]:
        """What model.json says of the fit."""
        course = self.course
        return {
            "steps": course.step,
            "seconds": round(course.elapsed, 1),
            "waiting_share": round(self.waiting_share, 4),
            "skipped_batches": course.skipped,
            "seed": self.config.train.seed,
            "device": describe(self.device),
            "devices": self.ranks.size,
            "precision": self.precision,
            "gpu_memory_mb": self.held_mb,
            "dice_while_training": None if course.dice is None else round(course.dice, 4),
            "pretrained": self._from,
        }

    def save(self) -> None:
        """Write the state that a resumed fit goes on from. Raises `TrainingError` where there is no room."""
        if not self.ranks.first:
            return
        write_state(
            self.folder,
            {
                "course": asdict(self.course),
                "held_back": [case.id for case in self.validation],
                "learnt": self.learnt,
                "meaning": self._meaning(),
                "settings": settings_of(self.config),
                "arithmetic": arithmetic(self.precision, self.device),
                "pretrained": self._from,
                "loaded": sorted(self._loaded),
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "averaged": self.averaged.state_dict(),
                "deck": self.sampler.state(),
                "generator": self.generator.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        )

    def _save_on_the_way(self) -> None:
        """`save`; a disk that is away for a moment ends no training of days, one that is full does."""
        try:
            self.save()
            self._away_since = None
        except TrainingError as error:
            now = time.monotonic()
            self._away_since = self._away_since or now
            if is_disk_full(error) or now - self._away_since > AWAY_S:
                raise
            log.warning("%s; it is tried again in %.0f s", error, self.config.train.save_every_s)

    def _load(self, network: torch.nn.Module, path: Path) -> Pretrained:
        """The weights of a file as far as they fit; the log says what became of each."""
        found = load_pretrained(network, path, spatial_dims=self.config.data.spatial_dims, config=self.config)
        log.info("%s\n%s", found.summary(), found.text_table())
        if found.share < 0.5:
            log.warning("%s: fills only %.0f %% of the network; is it the right file?", path, 100 * found.share)
        for difference in found.differences:
            if difference.far:
                log.warning("%s: %s", path, difference)
        return found

    def _check(self, state: dict[str, Any]) -> None:
        path = self.folder / STATE
        held_back = [case.id for case in self.validation]
        if state["held_back"] != held_back:
            raise ConfigError(
                f"{path}: was trained with {len(state['held_back'])} cases held back that are not the "
                f"{len(held_back)} of this fold, so that it would be judged on cases it has learnt; "
                "resume with the same --fold, or train into a new folder"
            )
        if state["meaning"] != self._meaning():
            raise ConfigError(
                f"{path}: was trained with other cases, or another data, preprocess, network or windows section; "
                "resume with the configuration of the run, or train into a new folder"
            )
        if state["learnt"] != self.learnt:
            raise ConfigError(
                f"{path}: was trained on other files under the same names (SHA-256 {state['learnt'][:12]}… there, "
                f"{self.learnt[:12]}… now); bring them back, or train into a new folder"
            )
        now, deterministic = arithmetic(self.precision, self.device), self.config.train.deterministic
        # the state has the threads of the first process
        self.ranks.led(lambda: check_arithmetic(self.folder, state, now, deterministic=deterministic))

    def _go_on(self, state: dict[str, Any]) -> None:
        try:
            # a batch that ended the fit is not to end it again at once
            # nor is another machine, or another end of the schedule, to look as often as that one could
            self.course = replace(Course(**state["course"]), bad=0, watched=None, look_s=0.0)
            self.network.load_state_dict(state["network"])
            asked = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            # a state brings its settings with it, but those of this configuration are recorded
            for group, settings in zip(self.optimizer.param_groups, asked):
                group.update(settings)
            self.averaged.load_state_dict(state["averaged"])
            self.sampler.load_state(state["deck"])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["torch"])
            if state["cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{self.folder / STATE}: cannot be resumed with this configuration ({type(error).__name__}: {error}); "
                "resume with the configuration of the run, or train into a new folder"
            ) from error
        if self.generator.initial_seed() != self.config.train.seed:
            raise ConfigError(
                f"{self.folder / STATE}: was begun with seed {self.generator.initial_seed()}, found train.seed "
                f"{self.config.train.seed}; resume with the same --seed, or train into a new folder"
            )
        step, elapsed, before = self.course.step, self.course.elapsed, state.get("settings")
        # one warning is enough
        self.ranks.led(lambda: check_settings(self.folder, before, self.config, step=step, elapsed=elapsed))
        log.info("resumed at step %d", step)

    def _meaning(self) -> str:
        """What the weights stand for: a state of another meaning is not resumed."""
        sections = {"data", "preprocess", "network", "windows"}
        return self.config.model_dump_json(include=sections) + " ".join(c.id for c in self.training)

    def _journal(self) -> Any:
        """The record of the epochs, which the first process keeps."""
        if not self.ranks.first:
            return nullcontext()
        return Journal(self.folder, self.config.data.foreground, kept=self.course.rows)

    def _end_epoch(self, journal: Journal | None, told: Callable[[], int]) -> float:
        """Validate where it is time, and write the epoch down; the seconds of the validation."""
        course, settings = self.course, self.config.train
        before = course.validating
        scores = self._validate_if_time(told)
        if scores is None:
            # told to end meanwhile: this epoch is judged when the training goes on
            return 0.0
        loss = float(np.mean(course.losses)) if course.losses else float("nan")
        epoch = -(-course.step // settings.steps_per_epoch)
        if journal is not None:
            rate = learning_rate(settings, self.progress)
            journal.write(Row(epoch, course.step, course.elapsed, rate, loss, scores))
        course.losses.clear()
        course.rows += 1
        return course.validating - before

    def _show(self, progress: Progress) -> None:
        course = self.course
        if course.step % 10 == 0 and course.losses:
            dice = "" if course.dice is None else f", Dice {course.dice:.3f}"
            text = f"loss {np.mean(course.losses[-50:]):.3f}{dice}"
            progress("train", self.progress * self.total, self.total, text)

    def _ends_an_epoch(self) -> bool:
        """Whether a row is due: at the end of an epoch, and of a schedule that ends inside one or during a row."""
        full = self.course.step % self.config.train.steps_per_epoch == 0
        if self.progress >= 1:
            return bool(self.course.losses) or self.course.validated_at != self.course.step
        return bool(self.course.losses) and full

    def _stop(self, number: int) -> None:
        """Save, and end as the signal asks."""
        self.save()
        # whoever ends first may end the others
        self.ranks.highest(0)
        log.warning("%s at step %d; the state is saved", signal.Signals(number).name, self.course.step)
        raise end_asked_by(number)

    def _draw(self) -> Batch:
        start = time.perf_counter()
        batch = self.sampler.draw()
        self.course.waiting += time.perf_counter() - start
        return batch

    def _learn(self) -> None:
        averages = [average.clone() for average in self._averages]
        try:
            value = self._try_step(self._draw(), averages)
            if value is not None:
                self.course.losses.append(value)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # outside the handler: its traceback would keep the tensors that did not fit
        advice = self._what_would_fit()
        self._put_back(averages)
        self._end_without_memory(advice)

    def _put_back(self, averages: Sequence[torch.Tensor]) -> None:
        """The running statistics of the network as they were before a batch that does not count."""
        for average, before in zip(self._averages, averages):
            average.copy_(before)

    def _try_step(self, batch: Batch, averages: Sequence[torch.Tensor]) -> float | None:
        """One step; its loss, or None for a batch that must not move the weights nor `averages`."""
        config, course = self.config, self.course
        set_rates(self.optimizer, config.train, self.progress)
        self.network.train()
        memory = memory_format(config.data.spatial_dims, self.device)
        logits = self.network(batch.image.contiguous(memory_format=memory))
        reduce = None if self.ranks.size == 1 else self.ranks.total
        loss = loss_of(config.loss, config.data, logits, batch.label, reduce=reduce)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        length = self.fabric.clip_gradients(
            self.network, self.optimizer, max_norm=config.train.clip_gradient, error_if_nonfinite=False
        )
        # both at once: each look at a number waits for all that the device has been given to do
        value, norm = map(float, torch.stack([loss.detach(), cast(torch.Tensor, length)]).tolist())
        if not np.isfinite([value, norm]).all():
            self._put_back(averages)
            self._skip(batch, f"the loss is {value}" if not np.isfinite(value) else "the gradient is not finite")
            return None
        self.optimizer.step()
        self.averaged.update_parameters(self.network.module)
        course.step += 1
        course.bad = 0
        return value

    def _skip(self, batch: Batch, what: str) -> None:
        """Count a bad batch, and name its cases. Raises `TrainingError` where it is one of several in a row."""
        course = self.course
        course.skipped += 1
        course.bad += 1
        self.optimizer.zero_grad(set_to_none=True)
        cases = ", ".join(case for part in self.ranks.gathered(batch.cases) for case in part)
        advice = "look at these cases with `medseg check`, lower train.learning_rate, or use --precision 32"
        if course.bad >= BAD_BATCHES:
            self.save()
            # whoever ends first ends the others
            self.ranks.highest(0)
            raise TrainingError(
                f"{what} at step {course.step} and in the {BAD_BATCHES - 1} batches before; the last batch held "
                f"{cases}: {advice}, then go on with --resume"
            )
        log.warning("%s at step %d; this batch of %s is skipped: %s", what, course.step, cases, advice)

    def _end_without_memory(self, advice: str) -> NoReturn:
        """Raises `TrainingError`; the state is whole. Other processes wait for this one and cannot be asked to save."""
        self.save()
        saved = "the state is saved" if self.ranks.first else "the last state that was saved is whole"
        settings, patch = self.config.train, list(self.config.windows.patch_size)
        raise TrainingError(
            f"out of memory on {describe(self.device)} at step {self.course.step}, with train.batch_size "
            f"{settings.batch_size} and windows.patch_size {patch}; {saved}: {advice}"
        )

    def _what_would_fit(self) -> str:
        """What to do where a step did not fit into memory."""
        self.optimizer.zero_grad(set_to_none=True)
        release_memory(self.device)
        if self.ranks.size > 1:
            # an attempt of one process alone would wait for the others for ever
            return "go on with --resume and a smaller --set train.batch_size"
        fits = what_fits(self.config, self._dry_step)
        if fits is None:
            return "not even the smallest patch fits; train a smaller network (network.width) into a new folder"
        batch, patch = fits
        if patch == self.config.windows.patch_size:
            return f"train.batch_size={batch} fits: go on with --resume --set train.batch_size={batch}"
        return (
            f"train.batch_size={batch} with windows.patch_size={list(patch)} fits (change it with --set), into a new "
            "folder: weights of another patch are another model"
        )

    def _dry_step(self, batch_size: int, patch_size: Sequence[int]) -> None:
        """One forward and backward pass on zeros; its gradients are thrown away."""
        image = torch.zeros(batch_size, len(self.config.data.channels), *patch_size, device=self.device)
        self.fabric.backward(self.network(image).float().mean())
        self.optimizer.zero_grad(set_to_none=True)

    def _validate_if_time(self, told: Callable[[], int]) -> dict[str, float] | None:
        """Dice of each label on held-back cases, where it is time for it: as often as their share of a time budget
        allows, or at `MOMENTS` of a number of epochs, since the clock must change nothing there.

        None where the training was told to end meanwhile.
        """
        course, settings = self.course, self.config.train
        by_clock = settings.time_budget_s is not None
        if by_clock:
            due = self._left_for_looks() >= course.look_s
        else:
            due = MOMENTS * course.step // self.total > MOMENTS * max(0, course.validated_at) // self.total
        last = self.progress >= 1
        if not due and not last:
            return {}
        # beyond its share the last look may take a moment more
        limit_s = max(LEAST_S, self._left_for_looks() + (self._moment_s if last else 0.0)) if by_clock else math.inf
        if not self.validation or course.look_s > limit_s:
            course.validated_at = course.step
            # what is known is of other weights
            course.dice = None
            return {}
        if not course.look_s or course.look_s > settings.save_every_s:
            # a kill within a long look is not to cost the steps before it as well
            self._save_on_the_way()
        start = time.perf_counter()
        scores = self.ranks.led(lambda: self._validate(limit_s, told))
        if scores is None:
            return None
        spent = time.perf_counter() - start
        course.validated_at = course.step
        # a look that failed tells no time, but is not to be taken for none
        look_s = max(1e-3, course.look_s) if by_clock else spent
        course.validating, course.elapsed, course.look_s = self.ranks.shared(
            (course.validating + spent, course.elapsed + spent, look_s)
        )
        return scores

    def _left_for_looks(self) -> float:
        """Seconds of what has passed of a time budget that looks at held-back cases may still take."""
        return self.config.train.validation_share * self.course.elapsed - self.course.validating

    @property
    def _moment_s(self) -> float:
        """Seconds for each of some looks that are to fit into their share of the time budget."""
        return self.config.train.validation_share * self.total / MOMENTS

    def _validate(self, limit_s: float, told: Callable[[], int]) -> dict[str, float] | None:
        """Dice by label of a look of at most `limit_s`; with all time there is, of all cases."""
        course = self.course
        try:
            if math.isinf(limit_s):
                scores = self._dice(self.validation, Ear(told))
            else:
                moment_s, watched = self._moment_s, course.watched
                found = look(self._dice, self.validation, told, watched=watched, limit_s=limit_s, moment_s=moment_s)
                scores, course.watched, course.look_s = found.scores, found.watched, found.seconds
        except ToldToEndError:
            return None
        except DataError as error:
            # nothing is chosen by it, so that it is no reason to end
            log.warning("held-back cases are not judged at step %d: %s", course.step, error)
            course.dice = None
            return {}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._end_without_memory(
                "it ran out while held-back cases were judged; free memory, and go on with --resume"
            )
        course.dice = float(np.mean(list(scores.values()))) if scores else None
        return scores

    def _dice(self, cases: Sequence[Prepared], ear: Ear) -> dict[str, float]:
        one_by_one = cast(Sequence[Prepared], ear.before_each(cases))
        return quick_dice(self.config, self.averaged.module, one_by_one, self.device, self.precision, tick=ear.tick)


def what_fits(config: Config, attempt: Callable[[int, tuple[int, ...]], None]) -> tuple[int, tuple[int, ...]] | None:
    """The largest (batch_size, patch_size) that `attempt` does in memory: first the batch shrinks, then the patch."""
    batch, patch = config.train.batch_size, config.windows.patch_size
    while True:
        if batch > 1:
            batch //= 2
        elif max(patch) > 16:
            patch = tuple(min(p, max(16, (p * 3 // 4) // 8 * 8)) for p in patch)
        else:
            return None
        try:
            attempt(batch, patch)
        except DataError:
            # smaller than the network can take
            return None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            continue
        return batch, patch


@contextmanager
def _told_to_end() -> Iterator[Callable[[], int]]:
    """Tells the signal that asks for the end, 0 before, instead of breaking a step in two; in the main thread only.

    SIGTERM after SIGINT counts as SIGTERM; more signals change nothing: the state is saved as soon as it can be.
    """
    told = [0]

    def hear(number: int) -> None:
        told[0] = max(told[0], number)

    with hearing_signals(hear):
        yield lambda: told[0]


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    # on a GPU some operations have no deterministic form: torch then warns
    torch.use_deterministic_algorithms(wanted or before, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
