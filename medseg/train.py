"""Training: from a data set to a run folder with a validated model; the steps themselves live in their own rooms."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import lightning_fabric
import numpy as np
import torch
from tensorboardX import SummaryWriter

from medseg.augment import augment
from medseg.cases import Case, Dataset, fold_split, read_dataset
from medseg.check import check_dataset
from medseg.config import Config, dump_yaml, make_config, overlay, read_yaml
from medseg.device import choose_device, choose_precision, describe, memory_format, to_memory_format
from medseg.errors import ConfigError, DataError, TrainingError
from medseg.infer import InferOptions, Segmenter, decider, make_scorer, segment_cases
from medseg.losses import loss as loss_of
from medseg.metrics import counts, dice
from medseg.model import label_names, new_network, read_model, save_model
from medseg.patches import Batch, PatchSampler
from medseg.plan import Plan, make_plan, measure
from medseg.preprocess import Prepared, prepare_cached
from medseg.progress import Progress, silent
from medseg.report import Report, report_pairs
from medseg.windows import predict
from medseg.writers import atomic_path

log = logging.getLogger(__name__)

STATE = "last.pt"
POWER = 0.9
LICENCE = "as the training data; see training.data_set"


@dataclass(frozen=True)
class TrainOptions:
    """What is asked of a training run beside its configuration.

    `config` None: planned from the data set. `settings` are laid over it. `fold` "all" holds no case back.
    """

    config: Path | Config | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fold: int | Literal["all"] = 0
    folds: int = 5
    device: str = "auto"
    resume: bool = False


@dataclass(frozen=True)
class Run:
    """A finished training run. `report` is None where no case was held back; `seconds` by stage."""

    folder: Path
    config: Config
    report: Report | None
    seconds: Mapping[str, float]
    steps: int


def train(
    dataset: str | Path,
    out: str | Path,
    *,
    time_budget: str | float | None = None,
    epochs: int | None = None,
    options: TrainOptions | None = None,
    progress: Progress = silent,
) -> Run:
    """Train on `dataset` and write the run folder `out`; `time_budget` in seconds or such as "20m".

    Raises `ConfigError` before anything is done, `DataError` naming the bad cases, `TrainingError` where training
    itself breaks down (the state in the folder is whole then, and `resume` goes on from it).
    """
    options = options or TrainOptions()
    folder, device = Path(out), choose_device(options.device)
    _check_folder(folder, resume=options.resume)
    data = read_dataset(Path(dataset))
    plan = plan_run(data, options, _end(time_budget, epochs), device=device, progress=progress)
    config = plan.config
    training, validation = fold_split(data, options.fold, folds=options.folds, seed=config.train.seed)
    with torch.device("meta"):
        # what cannot be built is told before the data set is prepared
        new_network(config)
    seconds: dict[str, float] = {}
    with _run_folder(folder):
        (folder / "config.yaml").write_text(dump_yaml(config, plan.reasons), encoding="utf-8")
        log.info("%d training cases, %d validation cases, %s", len(training), len(validation), describe(device))
        with _stage(seconds, "preprocess"):
            prepared = _prepare(training, config, folder / "cache", progress)
            held_back = _prepare(validation, config, folder / "cache", progress)
        with _stage(seconds, "train"):
            fit = Fit(config, prepared, held_back, folder, device)
            if options.resume:
                fit.load()
            network = fit.run(progress)
        save_model(
            network,
            config,
            folder,
            training=_training_record(data, training, validation, options, fit),
            licence=LICENCE,
        )
        with _stage(seconds, "validate"):
            report = _validate(folder, validation, options.device, progress) if validation else None
        log.info("seconds: %s", json.dumps(seconds))
    return Run(folder, config, report, seconds, fit.step)


def plan_run(
    data: Dataset, options: TrainOptions, end: Mapping[str, Any], *, device: torch.device, progress: Progress = silent
) -> Plan:
    """The configuration of a run: planned from the data set or read from a file, with the given settings laid over."""
    changes = overlay(options.settings, {"train": end} if end else {})
    if isinstance(options.config, Config):
        return Plan(make_config(overlay(options.config.model_dump(mode="json"), changes)), {})
    if options.config is not None:
        make_config(overlay(read_yaml(options.config), changes), source=str(options.config))
    else:
        # a wrong key is told before the files are read
        make_config(overlay(Config().model_dump(mode="json"), _without_shapes(changes)), source="--set")
    _preflight(data, progress)
    if options.config is not None:
        return Plan(make_config(overlay(read_yaml(options.config), changes), source=str(options.config)), {})
    plan = make_plan(data, measure(data, progress=progress), device=device.type)
    return replace(plan, config=make_config(overlay(plan.config.model_dump(mode="json"), changes), source="--set"))


def plan(
    dataset: str | Path, *, settings: Mapping[str, Any] | None = None, device: str = "auto", progress: Progress = silent
) -> Plan:
    """The configuration that `train` would use for `dataset`, each choice with its reason."""
    options = TrainOptions(settings=settings or {})
    return plan_run(read_dataset(Path(dataset)), options, {}, device=choose_device(device), progress=progress)


def parse_duration(text: str | float) -> float:
    """Seconds of "90", "90s", "20m", "1.5h". Raises `ConfigError`."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    words = str(text).strip().lower()
    number, unit = (words[:-1], units[words[-1]]) if words[-1:] in units else (words, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--time-budget {text}: expected a positive time such as 90s, 20m or 1.5h")
    return seconds


class Fit:
    """The state of one fit: network, optimiser, clock, random streams, best weights. `run` goes to the end."""

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
        self.best_dice = -1.0
        self.best: dict[str, torch.Tensor] | None = None
        torch.manual_seed(config.train.seed)
        torch.use_deterministic_algorithms(config.train.deterministic)
        self.generator = torch.Generator().manual_seed(config.train.seed)
        # its notes on precision repeat what log.txt says
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
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
        )

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, 0–1."""
        settings = self.config.train
        if settings.time_budget_s is not None:
            return min(1.0, self.elapsed / settings.time_budget_s)
        return self.step / ((settings.epochs or 1) * settings.steps_per_epoch)

    def run(self, progress: Progress) -> torch.nn.Module:
        """Train to the end of the schedule and return the network with the best weights."""
        settings = self.config.train
        total = settings.time_budget_s or float((settings.epochs or 1) * settings.steps_per_epoch)
        saved, validating, losses = time.perf_counter(), 0.0, []
        began = time.perf_counter() - self.elapsed
        with _Journal(self.folder, self.step, label_names(self.config.data).values()) as journal:
            try:
                while self.progress < 1:
                    losses.append(self._step(self.sampler.draw().to(self.device)))
                    self.elapsed = time.perf_counter() - began
                    if self.step % 10 == 0:
                        dice_text = f", Dice {self.best_dice:.3f}" if self.best_dice >= 0 else ""
                        progress("train", self.progress * total, total, f"loss {np.mean(losses[-50:]):.3f}{dice_text}")
                    if self.step % settings.steps_per_epoch == 0 or self.progress >= 1:
                        scores, cost = self._validate_if_time(validating)
                        validating += cost
                        journal.write(self, float(np.mean(losses)), scores)
                        losses.clear()
                        self.elapsed = time.perf_counter() - began
                    if time.perf_counter() - saved > settings.save_every_s:
                        self.save()
                        saved = time.perf_counter()
            except KeyboardInterrupt:
                self.save()
                log.warning("interrupted at step %d; `--resume` goes on from here", self.step)
                raise
        self.save()
        progress("train", total, total, "")
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

    def save(self) -> None:
        """Write the state that `load` goes on from."""
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "best_dice": self.best_dice,
            "best": self.best,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "deck": self.sampler.state(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
        }
        with atomic_path(self.folder / STATE) as temporary:
            torch.save(state, temporary)

    def load(self) -> None:
        """Go on from the state in the run folder, if there is one."""
        path = self.folder / STATE
        if not path.is_file():
            log.warning("%s: no state to resume from yet; starting from the beginning", self.folder)
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:
            raise TrainingError(
                f"{path}: cannot be resumed with this configuration ({error}); train into a new folder"
            ) from error
        self.step, self.elapsed = int(state["step"]), float(state["elapsed"])
        self.best_dice, self.best = float(state["best_dice"]), state["best"]
        self.sampler.load_state(state["deck"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch"].cpu())
        log.info("resumed at step %d", self.step)

    def _step(self, batch: Batch) -> float:
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
        try:
            self.network.train()
            logits = self.network(image.contiguous(memory_format=memory_format(config.data.spatial_dims)))
            loss = loss_of(config.loss, config.data, logits, label)
            value = float(loss.detach())
            if not np.isfinite(value):
                raise TrainingError(
                    f"the loss became {value} at step {self.step}; the last batch held {', '.join(batch.cases)}: "
                    "look at these cases with `medseg check`, lower train.learning_rate, or use --precision 32"
                )
            self.optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.network, self.optimizer, max_norm=config.train.clip_gradient)
            self.optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(self._out_of_memory()) from error
        self.step += 1
        return value

    def _out_of_memory(self) -> str:
        fits = what_fits(self.config, self._try_step)
        advice = (
            f"batch_size {fits[0]} with patch_size {list(fits[1])} fits" if fits else "not even the smallest patch fits"
        )
        return (
            f"out of memory on {describe(self.device)} with train.batch_size {self.config.train.batch_size} and "
            f"windows.patch_size {list(self.config.windows.patch_size)}; {advice} (set with --set, or --device cpu)"
        )

    def _try_step(self, batch_size: int, patch_size: Sequence[int]) -> None:
        """One forward and backward pass on zeros; its gradients are thrown away."""
        self.optimizer.zero_grad(set_to_none=True)
        image = torch.zeros(batch_size, len(self.config.data.channels), *patch_size, device=self.device)
        self.fabric.backward(self.network(image).float().mean())
        self.optimizer.zero_grad(set_to_none=True)

    def _validate_if_time(self, spent: float) -> tuple[dict[str, float], float]:
        """Dice of each label on the network's grid, where the share of time for it allows; and the seconds it took."""
        share = self.config.train.validation_share
        if not self.validation or (spent > share * self.elapsed and self.progress < 1):
            return {}, 0.0
        start = time.perf_counter()
        scores = quick_dice(self.config, self.network.module, self.validation, self.device, self.precision)
        mean = float(np.mean(list(scores.values())))
        if mean > self.best_dice:
            self.best_dice = mean
            self.best = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
        return scores, time.perf_counter() - start


def quick_dice(
    config: Config, network: torch.nn.Module, cases: Sequence[Prepared], device: torch.device, precision: str
) -> dict[str, float]:
    """Mean Dice of each label over cases on the network's grid: a guide while training, not the report."""
    data = config.data
    scorer = make_scorer(network, data, device, precision)
    decide = decider(data)
    found: dict[str, list[float]] = {name: [] for name in data.foreground}
    lookup = np.array([*data.out_values, *([0] * 256)][:256] if not data.is_regions else [0])
    for case in cases:
        predicted = decide(predict(config.windows, case.image.to(device), [scorer])).cpu().numpy()
        reference = case.label.numpy() if case.label is not None else np.zeros_like(predicted)
        ignored = None
        if not data.is_regions:
            reference, ignored = lookup[reference], reference == 255
            predicted = np.where(ignored, 0, predicted)
        measured = counts(predicted, reference, [data.labels[name] for name in data.foreground])
        for name in data.foreground:
            found[name].append(dice(measured[data.labels[name]]))
    return {name: float(np.nanmean(v)) if np.isfinite(v).any() else 0.0 for name, v in found.items()}


def what_fits(config: Config, attempt: Any) -> tuple[int, tuple[int, ...]] | None:
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
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            continue
        return batch, patch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or on the CPU (which has no exception of its own)."""
    return (
        isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error) or "can't allocate" in str(error)
    )


class _Journal:
    """metrics.csv and TensorBoard events, one row an epoch."""

    def __init__(self, folder: Path, step: int, labels: Any) -> None:
        self._path = folder / "metrics.csv"
        self._labels = tuple(labels)
        self._writer = SummaryWriter(str(folder), purge_step=step or None)
        if step == 0 or not self._path.is_file():
            self._append(
                ["epoch", "step", "seconds", "learning_rate", "loss", "dice", *(f"dice_{n}" for n in self._labels)], "w"
            )

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, fit: Fit, loss: float, scores: Mapping[str, float]) -> None:
        epoch = -(-fit.step // fit.config.train.steps_per_epoch)
        mean = float(np.mean(list(scores.values()))) if scores else None
        each = [scores.get(n) for n in self._labels]
        row = [epoch, fit.step, fit.elapsed, fit.learning_rate(), loss, mean, *each]
        self._append(["" if v is None else v if isinstance(v, int) else f"{v:.6g}" for v in row], "a")
        self._writer.add_scalar("loss", loss, fit.step)
        self._writer.add_scalar("learning_rate", fit.learning_rate(), fit.step)
        for name, value in scores.items():
            self._writer.add_scalar(f"dice/{name}", value, fit.step)
        log.info(
            "epoch %d, step %d, %.0f s: loss %.4f%s",
            epoch,
            fit.step,
            fit.elapsed,
            loss,
            f", Dice {mean:.4f}" if mean else "",
        )

    def _append(self, row: Sequence[Any], mode: Literal["a", "w"]) -> None:
        with self._path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)


def _end(time_budget: str | float | None, epochs: int | None) -> dict[str, Any]:
    if time_budget is not None and epochs is not None:
        raise ConfigError("--time-budget and --epochs: give one of them")
    if epochs is not None:
        return {"epochs": epochs, "time_budget_s": None}
    return {} if time_budget is None else {"epochs": None, "time_budget_s": parse_duration(time_budget)}


def _without_shapes(changes: Mapping[str, Any]) -> dict[str, Any]:
    # lengths that depend on the data are checked once the plan is there; other keys and types are checked now
    later = {"spatial_dims", "channels", "spacing_mm", "shape", "intensity", "strides", "flip_axes", "patch_size"}
    return {
        section: {k: v for k, v in values.items() if k not in later} if isinstance(values, Mapping) else values
        for section, values in changes.items()
    }


def _check_folder(folder: Path, *, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file, expected a folder for the run")
    if (folder / STATE).is_file() and not resume:
        raise ConfigError(f"{folder}: holds a training run already; go on with --resume, or choose another -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / ".writable") as probe:
            probe.write_bytes(b"")
        (folder / ".writable").unlink()
    except (OSError, DataError) as error:
        raise ConfigError(f"{folder}: cannot be written ({error}); choose another -o") from error


@contextmanager
def _run_folder(folder: Path) -> Iterator[None]:
    """Everything that is logged also goes into log.txt."""
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("medseg")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


@contextmanager
def _stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def _preflight(data: Dataset, progress: Progress) -> None:
    findings = check_dataset(data.path, progress=progress)
    if findings.errors:
        listed = "\n".join(
            f"  {f.file or f.case}: {f.found}; expected {f.expected}; {f.fix}" for f in findings.errors[:20]
        )
        raise DataError(
            f"{data.path}: {len(findings.errors)} errors found, nothing was trained; `medseg check` shows all\n{listed}"
        )


def _prepare(cases: Sequence[Case], config: Config, cache: Path, progress: Progress) -> list[Prepared]:
    done = []
    for n, case in enumerate(cases):
        progress("preprocess", n, len(cases), case.id)
        done.append(prepare_cached(case, config.preprocess, config.data, cache))
    return done


def _validate(folder: Path, cases: Sequence[Case], device: str, progress: Progress) -> Report:
    """Infer the held-back cases with the model as it was written, at full resolution, and judge the files."""
    segmenter = Segmenter([read_model(folder)], InferOptions(device=device, overwrite=True))
    out = folder / "validation"
    results = segment_cases(segmenter, cases, out, progress=progress)
    failed = [r for r in results if r.status == "failed"]
    for result in failed:
        log.warning("validation case failed: %s", result.reason)
    data = segmenter.config.data
    outputs = {r.case: out / r.output for r in results if r.output}
    report = report_pairs(
        [(c.id, outputs.get(c.id), c.label, c.images[0]) for c in cases if c.label is not None],
        labels={n: data.labels[n] for n in data.foreground},
        ignore_value=data.ignore_value,
        groups={c.id: c.group for c in cases},
    )
    report.save(out / "report")
    return report


def _training_record(
    data: Dataset, training: Sequence[Case], validation: Sequence[Case], options: TrainOptions, fit: Fit
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for case in sorted(training, key=lambda c: c.id):
        for path in (*case.images, *([case.label] if case.label else [])):
            digest.update(path.read_bytes())
    return {
        "data_set": data.path.name,
        "data_sha256": digest.hexdigest(),
        "cases": len(training),
        "validation_cases": [c.id for c in validation],
        "fold": options.fold,
        "steps": fit.step,
        "seconds": round(fit.elapsed, 1),
        "device": describe(fit.device),
        "precision": fit.precision,
        "best_dice_while_training": None if fit.best is None else round(fit.best_dice, 4),
    }
