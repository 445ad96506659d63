"""The training loop of one fit: its state, its clock, its steps; files are read before and judged after, elsewhere."""

from __future__ import annotations

import csv
import io
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning_fabric
import numpy as np
import torch
from tensorboardX import SummaryWriter

from medseg.augment import augment
from medseg.calibrate import ignored, quick_dice
from medseg.config import Config
from medseg.device import (
    choose_precision,
    describe,
    hold_memory,
    is_out_of_memory,
    memory_format,
    release_memory,
    to_memory_format,
)
from medseg.errors import ConfigError, DataError, TrainingError
from medseg.losses import loss as loss_of
from medseg.model import new_network
from medseg.patches import Batch, PatchSampler
from medseg.preprocess import Prepared
from medseg.pretrained import Pretrained, load_pretrained
from medseg.progress import Progress
from medseg.writers import atomic_path

log = logging.getLogger(__name__)

STATE = "last.pt"
POWER = 0.9
# validation while training is spread over about this many moments of a time budget
MOMENTS = 8


class Fit:
    """The state of one fit: network, optimiser, clock, random streams, best weights. `run` goes to the end.

    The weights that count are those with the best Dice on `validation`, on the network's grid; without it, the last.
    """

    def __init__(
        self,
        config: Config,
        training: Sequence[Prepared],
        validation: Sequence[Prepared],
        folder: Path,
        device: torch.device,
    ) -> None:
        self.config = config
        self.folder = folder
        self.device = device
        self.validation = validation
        self.precision = choose_precision(config.train.precision, device)
        self.step = 0
        self.elapsed = 0.0
        self.validating = 0.0
        self.watched: int | None = None
        self.validated_at = -1
        self.best_dice = -1.0
        self.best: dict[str, torch.Tensor] | None = None
        self.pretrained: dict[str, Any] | None = None
        torch.manual_seed(config.train.seed)
        self.generator = torch.Generator().manual_seed(config.train.seed)
        # its notes on precision repeat what log.txt says
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        hold_memory()
        self.fabric = lightning_fabric.Fabric(
            accelerator=device.type,
            devices=1 if device.type == "cpu" else [device.index or 0],
            precision="bf16-mixed" if self.precision == "bf16" else "32-true",
        )
        network = to_memory_format(new_network(config), config.data.spatial_dims)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=True
        )
        self.network, self.optimizer = self.fabric.setup(network, optimizer)
        self.sampler = PatchSampler(
            training,
            patch_size=config.windows.patch_size,
            batch_size=config.train.batch_size,
            foreground_fraction=config.train.foreground_fraction,
            generator=self.generator,
            ignore_value=ignored(config.data),
        )

    @property
    def total(self) -> float:
        """The length of the schedule, in seconds or steps."""
        settings = self.config.train
        return settings.time_budget_s or float((settings.epochs or 1) * settings.steps_per_epoch)

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, 0–1."""
        done = self.step if self.config.train.time_budget_s is None else self.elapsed
        return min(1.0, done / self.total)

    def start_from(self, path: Path) -> Pretrained:
        """Begin with the weights of a file as far as they fit; the log says what became of each."""
        found = load_pretrained(self.network.module, path, spatial_dims=self.config.data.spatial_dims)
        log.info("%s\n%s", found.summary(), found.text_table())
        if found.share < 0.5:
            log.warning("%s: fills only %.0f %% of the network; is it the right file?", path, 100 * found.share)
        self.pretrained = found.record()
        return found

    def run(self, progress: Progress) -> torch.nn.Module:
        """Train to the end of the schedule and return the network with the weights that count.

        Raises `TrainingError` for a loss that is not finite and for memory that runs out, `KeyboardInterrupt` after
        the step in which it came; the state in the folder is whole then.
        """
        settings = self.config.train
        losses: list[float] = []
        began = time.perf_counter() - self.elapsed
        saved = time.perf_counter()
        with (
            _Journal(self.folder, self) as journal,
            _interruptible() as interrupted,
            _determinism(settings.deterministic),
        ):
            while self.progress < 1:
                losses.append(self._step(self.sampler.draw().to(self.device)))
                self.elapsed = time.perf_counter() - began
                if self.step % 10 == 0:
                    dice_text = f", Dice {self.best_dice:.3f}" if self.best_dice >= 0 else ""
                    text = f"loss {np.mean(losses[-50:]):.3f}{dice_text}"
                    progress("train", self.progress * self.total, self.total, text)
                if self.step % settings.steps_per_epoch == 0:
                    journal.write(float(np.mean(losses)), self._validate_if_time())
                    losses.clear()
                    self.elapsed = time.perf_counter() - began
                if interrupted.is_set():
                    self.save()
                    log.warning("interrupted at step %d; `--resume` goes on from here", self.step)
                    raise KeyboardInterrupt
                if time.perf_counter() - saved > settings.save_every_s:
                    self.save()
                    saved = time.perf_counter()
            if losses or self.validated_at != self.step:
                # the end of the schedule lies inside an epoch, or came while the last one was written down
                journal.write(float(np.mean(losses)) if losses else float("nan"), self._validate_if_time())
            self.save()
        progress("train", self.total, self.total)
        if self.best is not None:
            self.network.load_state_dict(self.best)
        network: torch.nn.Module = self.network.module
        return network

    def learning_rate(self) -> float:
        """Linear rise over the warm-up, then (1 − progress)^0.9, as in DeepLab."""
        settings, done = self.config.train, self.progress
        if done < settings.warm_up:
            # the first step must move too, so the rise begins at a hundredth
            return settings.learning_rate * max(0.01, done / settings.warm_up)
        return float(settings.learning_rate * (1 - (done - settings.warm_up) / (1 - settings.warm_up + 1e-9)) ** POWER)

    def record(self) -> dict[str, Any]:
        """What model.json says of the fit."""
        return {
            "steps": self.step,
            "seconds": round(self.elapsed, 1),
            "device": describe(self.device),
            "precision": self.precision,
            "best_dice_while_training": None if self.best is None else round(self.best_dice, 4),
            "pretrained": self.pretrained,
        }

    def save(self) -> None:
        """Write the state that `load` goes on from, whole or not at all. Raises `DataError` where there is no room."""
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "validating": self.validating,
            "best_dice": self.best_dice,
            "best": self.best,
            "pretrained": self.pretrained,
            "watched": self.watched,
            "validated_at": self.validated_at,
            "held_back": [case.id for case in self.validation],
            "meaning": self._meaning(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "deck": self.sampler.state(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
        }
        # into memory first: torch reports a full disk as an error of its own that names no file
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with atomic_path(self.folder / STATE) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load(self) -> None:
        """Go on from the state in the run folder. Raises `ConfigError` where it belongs to another configuration."""
        path = self.folder / STATE
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.sampler.load_state(state["deck"])
            self.watched, self.validated_at = state["watched"], state["validated_at"]
            self.step, self.elapsed, self.validating = state["step"], state["elapsed"], state["validating"]
            self.best_dice, self.best = state["best_dice"], state["best"]
            self.generator.set_state(state["generator"].cpu())
            torch.set_rng_state(state["torch"].cpu())
            held_back, meaning = state["held_back"], state["meaning"]
            self.pretrained = state.get("pretrained")
        except Exception as error:
            raise ConfigError(
                f"{path}: cannot be resumed with this configuration ({type(error).__name__}: {error}); "
                "resume with the configuration of the run, or train into a new folder"
            ) from error
        if held_back != [case.id for case in self.validation]:
            raise ConfigError(
                f"{path}: was trained with {len(held_back)} cases held back that are not the "
                f"{len(self.validation)} of this fold, so that it would be judged on cases it has learnt; "
                "resume with the same --fold, or train into a new folder"
            )
        if meaning != self._meaning():
            raise ConfigError(
                f"{path}: was trained with other cases, or another data, preprocess, network or windows section; "
                "resume with the configuration of the run, or train into a new folder"
            )
        log.info("resumed at step %d", self.step)

    def _meaning(self) -> str:
        """What the weights stand for: a state of another meaning is not resumed."""
        sections = {"data", "preprocess", "network", "windows"}
        return self.config.model_dump_json(include=sections) + " ".join(self.sampler.cases)

    def _step(self, batch: Batch) -> float:
        try:
            return self._try_step(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # outside the handler: its traceback would keep the tensors that did not fit
        raise TrainingError(self._out_of_memory())

    def _try_step(self, batch: Batch) -> float:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        image, label = augment(
            config.augment,
            batch.image,
            batch.label,
            patch_size=config.windows.patch_size,
            spacing_mm=batch.spacing_mm,
            generator=self.generator,
        )
        self.network.train()
        logits = self.network(image.contiguous(memory_format=memory_format(config.data.spatial_dims)))
        loss = loss_of(config.loss, config.data, logits, label)
        value = float(loss.detach())
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.network, self.optimizer, max_norm=config.train.clip_gradient, error_if_nonfinite=False
        )
        if not np.isfinite(value) or not torch.isfinite(norm):
            what = f"the loss became {value}" if not np.isfinite(value) else "the gradient is no longer finite"
            raise TrainingError(
                f"{what} at step {self.step}; the last batch held {', '.join(batch.cases)}: look at these cases with "
                "`medseg check`, lower train.learning_rate, or use --precision 32"
            )
        self.optimizer.step()
        self.step += 1
        return value

    def _out_of_memory(self) -> str:
        self.optimizer.zero_grad(set_to_none=True)
        release_memory(self.device)
        fits = what_fits(self.config, self._dry_step)
        advice = "not even the smallest patch fits"
        if fits:
            advice = f"train.batch_size={fits[0]} with windows.patch_size={list(fits[1])} fits"
        return (
            f"out of memory on {describe(self.device)} with train.batch_size {self.config.train.batch_size} and "
            f"windows.patch_size {list(self.config.windows.patch_size)}; {advice} (change it with --set)"
        )

    def _dry_step(self, batch_size: int, patch_size: Sequence[int]) -> None:
        """One forward and backward pass on zeros; its gradients are thrown away."""
        image = torch.zeros(batch_size, len(self.config.data.channels), *patch_size, device=self.device)
        self.fabric.backward(self.network(image).float().mean())
        self.optimizer.zero_grad(set_to_none=True)

    def _validate_if_time(self) -> dict[str, float]:
        """Dice of each label on held-back cases, where the share of time for it allows; keeps the best weights."""
        settings = self.config.train
        by_clock = settings.time_budget_s is not None and not settings.deterministic
        due = self.progress >= 1 or not by_clock or self.validating <= settings.validation_share * self.elapsed
        if not due:
            return {}
        self.validated_at = self.step
        if not self.validation:
            return {}
        start = time.perf_counter()
        if self.watched is None:
            self.watched = self._count_watched() if by_clock else len(self.validation)
        picked = np.unique(np.linspace(0, len(self.validation) - 1, self.watched).round().astype(int))
        scores = self._dice([self.validation[i] for i in picked])
        mean = float(np.mean(list(scores.values())))
        if mean > self.best_dice:
            self.best_dice = mean
            self.best = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
        self.validating += time.perf_counter() - start
        return scores

    def _count_watched(self) -> int:
        """How many held-back cases fit into one of some moments of a time budget, judged by the first of them."""
        settings = self.config.train
        start = time.perf_counter()
        self._dice(self.validation[:1])
        each = time.perf_counter() - start
        affordable = settings.validation_share * (settings.time_budget_s or 0) / MOMENTS / each
        return max(1, min(len(self.validation), int(affordable)))

    def _dice(self, cases: Sequence[Prepared]) -> dict[str, float]:
        return quick_dice(self.config, self.network.module, cases, self.device, self.precision)


def what_fits(config: Config, attempt: Callable[[int, tuple[int, ...]], None]) -> tuple[int, tuple[int, ...]] | None:
    """The largest (batch_size, patch_size) that `attempt` does in memory: first the batch shrinks, then the patch."""
    batch, patch = config.train.batch_size, config.windows.patch_size
    while True:
        if batch > 1:
            batch //= 2
        elif max(patch) > 16:
            patch = tuple(max(16, (p * 3 // 4) // 8 * 8) for p in patch)
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


class _Journal:
    """metrics.csv and TensorBoard events, one row an epoch; rows after the state that is resumed are dropped."""

    def __init__(self, folder: Path, fit: Fit) -> None:
        self._path = folder / "metrics.csv"
        self._fit = fit
        self._labels = fit.config.data.foreground
        self._writer = SummaryWriter(str(folder), purge_step=fit.step or None)
        header = ["epoch", "step", "seconds", "learning_rate", "loss", "dice", *(f"dice_{n}" for n in self._labels)]
        kept = [row for row in self._rows() if int(row[1]) <= fit.step] if fit.step else []
        with self._path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *kept])

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, loss: float, scores: Mapping[str, float]) -> None:
        fit = self._fit
        epoch = -(-fit.step // fit.config.train.steps_per_epoch)
        mean = float(np.mean(list(scores.values()))) if scores else None
        numbers = [fit.elapsed, fit.learning_rate(), loss, mean, *(scores.get(n) for n in self._labels)]
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([epoch, fit.step, *("" if v is None else f"{v:.6g}" for v in numbers)])
        self._writer.add_scalar("loss", loss, fit.step)
        self._writer.add_scalar("learning_rate", fit.learning_rate(), fit.step)
        for name, value in scores.items():
            self._writer.add_scalar(f"dice/{name}", value, fit.step)
        said = "" if mean is None else f", Dice {mean:.4f}"
        log.info("epoch %d, step %d, %.0f s: loss %.4f%s", epoch, fit.step, fit.elapsed, loss, said)

    def _rows(self) -> list[list[str]]:
        if not self._path.is_file():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.reader(file) if len(row) > 1 and row[1].isdecimal()]


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of breaking a step in two; outside the main thread it never comes."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    # on a GPU some operations have no deterministic form: torch then warns
    torch.use_deterministic_algorithms(wanted or before, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
