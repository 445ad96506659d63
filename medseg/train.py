"""Training: from a data set to a run folder with a validated model; the steps themselves live in their own rooms."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medseg.asked import TrainOptions, parse_duration, plan_run, values_of
from medseg.calibrate import calibrate
from medseg.cases import Case, Dataset, fold_split, refuse_among, refuse_image_name
from medseg.catalogue import CROSSVAL, WEIGHTS
from medseg.config import (
    Config,
    dump_yaml,
    make_config,
    overlay,
    read_yaml,
)
from medseg.datasets import read_dataset
from medseg.device import choose_device, describe, is_out_of_memory
from medseg.errors import ConfigError, DataError, PeerError, TrainingError
from medseg.evaluate import EvaluateOptions
from medseg.findings import CaseFacts
from medseg.fingerprint import data_sha256, image_digests, voxel_digests
from medseg.fit import Fit
from medseg.folder import CaseResult, segment_cases
from medseg.infer import InferOptions, load_model
from medseg.leaks import refuse_leaks
from medseg.logfile import faults_told, log_file
from medseg.model import DECISIVE, is_complete, read_description, record_choices, save_model
from medseg.networks import build_bare, check_patch
from medseg.notebook import Notebook
from medseg.plan import Plan
from medseg.preprocess import Prepared, prepare_cached
from medseg.pretrained import Pretrained, load_pretrained, read_weights
from medseg.process import Preempted
from medseg.progress import Progress, silent
from medseg.ranks import Ranks
from medseg.readers import file_sha256
from medseg.report import Report, report_pairs
from medseg.sides import keep_sides
from medseg.state import STATE
from medseg.told import unless_repeated
from medseg.versions import versions
from medseg.writers import is_disk_full, remove_stale_temporaries, write_text

log = logging.getLogger(__name__)

CONFIG, CACHE = "config.yaml", "cache"
# while inference is chosen: what was found so far
NOTES = "calibration.jsonl"
# there is such a file where SIGTERM ended a training, with the number of what was asked
PREEMPTED = "preempted"
# cases to train on, cases held back
Folds = tuple[Sequence[Case], Sequence[Case]]


@dataclass(frozen=True)
class Run:
    """A finished training run; `seconds` by stage, `results` of the held-back cases.

    `report` is None where no case was held back, or none of them could be segmented. `pretrained` tells what became of
    the weights that training began with. `waiting_share`: of the time of the steps, the share that they waited for
    data. `rank`: of several processes only the first, 0, validates and reports. `gpu_memory_mb`: the most that tensors
    of this process have held on a GPU until the end; 0 on a CPU.
    """

    folder: Path
    config: Config
    report: Report | None
    results: tuple[CaseResult, ...]
    seconds: Mapping[str, float]
    steps: int
    pretrained: Pretrained | None = None
    waiting_share: float = 0.0
    rank: int = 0
    gpu_memory_mb: float = 0.0


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

    Raises `ConfigError` or `DataError` before anything is done, `TrainingError` where training itself breaks down,
    `KeyboardInterrupt` for Ctrl-C, `Preempted` for SIGTERM (the state in the folder is whole then, and `resume` goes on
    from it), `PeerError` where another process of the same training ended.
    """
    options = options or TrainOptions()
    folder = Path(out)
    ranks = Ranks(choose_device(options.device), devices=options.devices)
    marker = folder / PREEMPTED
    asked = _asked(dataset, time_budget, epochs, options)
    try:
        with ranks.together():
            ranks.agree(str((asked, folder)))
            return _train(dataset, folder, _end(time_budget, epochs), options, asked, ranks, progress)
    except Preempted:
        if ranks.first and folder.is_dir():
            write_text(marker, asked + "\n")
        raise


def _train(
    dataset: str | Path,
    folder: Path,
    end: Mapping[str, Any],
    options: TrainOptions,
    asked: str,
    ranks: Ranks,
    progress: Progress,
) -> Run:
    progress = progress if ranks.first else silent
    options = ranks.led(lambda: _begun(folder, options, asked))
    resumed = options.resume and ranks.led((folder / STATE).is_file)
    weights = None if resumed else options.pretrained
    data, made, folds = ranks.led(lambda: _planned(dataset, options, end, weights, ranks, progress))
    files = (file for case in data.cases for file in (*case.images, case.label) if file is not None)
    refuse_among({data.path, *(file.parent for file in files)}, folder, written="the run")
    config, (training, validation) = made.config, folds
    seconds: dict[str, float] = {}
    with log_file(folder) if ranks.first else faults_told(sys.stderr):
        if ranks.first:
            _tidy(folder)
        _log_beginning(training, validation, config, options, ranks)
        # before training: a share that goes away meanwhile must not cost the model
        with _stage(seconds, "hash"):
            digests = ranks.led(lambda: _file_digests(folds, progress))
            record = ranks.led(lambda: _data_record(data, made.facts, folds, options, weights, digests))
        with _stage(seconds, "preprocess"):
            prepared, held_back = _prepare(folds, config, folder / CACHE, digests, ranks, progress)
        fit = Fit(
            config, prepared, held_back, folder, ranks, learnt=record["data_sha256"], weights=weights, resume=resumed
        )
        # after the state was read, which refuses a configuration that it does not belong to
        ranks.led(lambda: _write_config(folder / CONFIG, made))
        with _stage(seconds, "train"):
            network = fit.run(progress)
        ranks.part()
        steps, waiting = fit.course.step, fit.waiting_share
        if not ranks.first:
            held = fit.held_mb
            return Run(
                folder, config, None, (), seconds, steps, waiting_share=waiting, rank=ranks.rank, gpu_memory_mb=held
            )
        with _training_is_done():
            # what was chosen and segmented before it was ended need not be again: a slot of a cluster may be short
            anew = not (resumed and is_complete(network, config, folder, judged_by=record["validation_sha256"]))
            if anew:
                # that of an earlier model, or of cases that have changed since, would be taken for the one of this
                (folder / "validation" / "report" / "summary.json").unlink(missing_ok=True)
                save_model(network, config, folder, training=record | fit.record(), licence=data.licence)
            with _stage(seconds, "calibrate"):
                if anew:
                    record_choices(folder, _calibrated(config, network, fit, prepared, held_back, progress))
                (folder / NOTES).unlink(missing_ok=True)
            report: Report | None = None
            results: tuple[CaseResult, ...] = ()
            with _stage(seconds, "validate"):
                if validation:
                    how = InferOptions(device=str(fit.device), precision=fit.precision, overwrite=anew)
                    report, results = _validate(folder, validation, how, progress)
        log.info("seconds: %s", json.dumps(seconds))
        (folder / PREEMPTED).unlink(missing_ok=True)
    return Run(folder, config, report, results, seconds, steps, fit.pretrained, waiting, gpu_memory_mb=fit.held_mb)


def _asked(dataset: str | Path, time_budget: str | float | None, epochs: int | None, options: TrainOptions) -> str:
    """A number for all that decides what a training becomes: the same command line has the same."""
    what = replace(options, resume=False, command=None, device="", devices=1)
    return hashlib.sha256(repr((str(dataset), time_budget, epochs, what)).encode()).hexdigest()[:20]


def _begun(folder: Path, options: TrainOptions, asked: str) -> TrainOptions:
    """The options, resuming what SIGTERM ended where the same is asked again. Raises `ConfigError`."""
    marker = folder / PREEMPTED
    if marker.is_file() and marker.read_text(encoding="utf-8").strip() == asked:
        options = replace(options, resume=True)
    _check_folder(folder, resume=options.resume)
    if options.resume and (folder / CONFIG).is_file():
        # not planned again: a plan depends on what memory is free at the moment
        began = read_yaml(folder / CONFIG)
        values = overlay(began, unless_repeated(values_of(options.config), began))
        source = folder / CONFIG if options.config is None else options.config
        config = make_config(values, source=str(source))
        if isinstance(options.config, Path):
            # what was left out when it was begun is left out again
            axes = make_config(began, source=str(folder / CONFIG)).augment.flip_axes
            config, _ = keep_sides(config, source=str(source), typed=False, begun=axes)
        options = replace(options, config=config, settings=unless_repeated(options.settings, began))
    return options


def _write_config(path: Path, made: Plan) -> None:
    """What is resumed stays as it is: the reasons stand in it, and are not known any more."""
    if made.reasons or not path.is_file() or make_config(read_yaml(path), source=str(path)) != made.config:
        write_text(path, dump_yaml(made.config, made.reasons))


def _planned(
    dataset: str | Path,
    options: TrainOptions,
    end: Mapping[str, Any],
    weights: Path | None,
    ranks: Ranks,
    progress: Progress,
) -> tuple[Dataset, Plan, Folds]:
    """The cases, what is made of them, and which of them are trained on and held back."""
    if weights is not None:
        # a file that cannot be read is told before the data set is
        read_weights(weights)
    data = read_dataset(Path(dataset))
    made = plan_run(data, options, end, device=ranks.device, processes=ranks.size, progress=progress)
    folds = fold_split(data, options.fold, folds=options.folds)
    _check_network(made.config, weights)
    return data, made, folds


def _log_beginning(
    training: Sequence[Case], validation: Sequence[Case], config: Config, options: TrainOptions, ranks: Ranks
) -> None:
    log.info("command: %s", options.command or "none, called from Python")
    log.info("versions: %s", json.dumps(versions(*DECISIVE)))
    log.info("seed %d, %d processes", config.train.seed, ranks.size)
    log.info("%d training cases, %d validation cases, %s", len(training), len(validation), describe(ranks.device))


def _tidy(folder: Path) -> None:
    """Remove the halves of files that killed trainings left in the run folder and its cache."""
    for place in (folder, folder / CACHE):
        for name in remove_stale_temporaries(place) if place.is_dir() else []:
            log.info("removed %s, which a killed run has left", name)


@contextmanager
def _training_is_done() -> Iterator[None]:
    """A disk that is full now costs no step: the state is whole, and the end is all that is missing."""
    try:
        yield
    except DataError as error:
        raise TrainingError(f"{error}; training itself is done: then finish it with --resume") from error


def _end(time_budget: str | float | None, epochs: int | None) -> dict[str, Any]:
    if time_budget is not None and epochs is not None:
        raise ConfigError("--time-budget and --epochs: give one of them")
    if epochs is not None:
        return {"epochs": epochs, "time_budget_s": None}
    return {} if time_budget is None else {"epochs": None, "time_budget_s": parse_duration(time_budget)}


def _check_folder(folder: Path, *, resume: bool) -> None:
    """Whether the run folder may be written; it is made later, once there is something to write."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file, expected a folder for the run")
    refuse_image_name(folder, written="the run")
    if (folder / CROSSVAL).is_file():
        raise ConfigError(f"{folder}: holds a cross-validation, whose folder means its choice; choose another -o")
    state, model = ((folder / name).is_file() for name in (STATE, WEIGHTS))
    if not resume and (state or model):
        raise ConfigError(f"{folder}: holds a training run already; go on with --resume, or choose another -o")
    if model and not state:
        raise ConfigError(
            f"{folder}: holds a finished model but no {STATE}, without which --resume would train anew and replace it; "
            "choose another -o"
        )
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written, because {nearest} is no writable folder; choose another -o")


def _check_network(config: Config, weights: Path | None) -> None:
    """Whether the network can be built, takes a patch and the weights, without spending memory on it."""
    data = config.data
    network = build_bare(config.network, data.spatial_dims, len(data.channels), data.out_channels)
    check_patch(network, config.network, config.windows.patch_size)
    if weights is not None:
        load_pretrained(network, weights, spatial_dims=config.data.spatial_dims, config=config)


@contextmanager
def _stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def _is_short_of_memory(error: BaseException | None) -> bool:
    # MONAI wraps what a transform raises
    while isinstance(error, MemoryError | RuntimeError):
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            return True
        error = error.__cause__
    return False


def _prepare(
    folds: Folds, config: Config, cache: Path, digests: Mapping[Path, str], ranks: Ranks, progress: Progress
) -> tuple[list[Prepared], list[Prepared]]:
    """Both folds on the network's grid; the processes share the work, and the cache of what is ready.

    Raises `DataError` with every case that cannot be read, when all others are in the cache: a training without some of
    its cases would be another one than was asked for.
    """

    def prepared(case: Case) -> Prepared:
        return prepare_cached(case, config.preprocess, config.data, cache, file_digest=digests.__getitem__)

    cases = [case for fold in folds for case in fold]
    mine = cases[ranks.rank :: ranks.size]
    failures = []
    for n, case in enumerate(mine):
        progress("preprocess", n, len(mine), case.id)
        try:
            prepared(case)
        except (DataError, OSError) as error:
            if is_disk_full(error):
                # what is asked is right, and may do better once more
                raise TrainingError(f"{error}; what is ready in {cache} stays: then start again") from error
            failures.append(f"  {case.id}: {error}")
        except (MemoryError, RuntimeError) as error:
            if not _is_short_of_memory(error):
                raise
            failures.append(
                f"  {case.id}: {case.images[0]}: the memory of this machine does not hold it on the network's grid; "
                "free memory, use a larger preprocess.spacing_mm, or cut the image"
            )
    failed = [line for lines in ranks.gathered(failures) for line in lines]
    if failed and ranks.first:
        listed = "\n".join(failed[:20])
        raise DataError(
            f"{len(failed)} of {len(cases)} cases cannot be read, nothing was trained; the others are ready in "
            f"{cache}: repair these, or take them out of the data set, and start again\n{listed}"
        )
    if failed:
        raise PeerError("cases cannot be read; the first process names them")
    training, validation = ([prepared(case) for case in fold] for fold in folds)
    return training, validation


def _calibrated(
    config: Config,
    network: torch.nn.Module,
    fit: Fit,
    training: Sequence[Prepared],
    held_back: Sequence[Prepared],
    progress: Progress,
) -> dict[str, Any]:
    """What the held-back cases choose for inference, in a share of the time that training took."""
    share = config.train.calibration_share
    # without a share nothing is done, whatever the clock says
    budget_s = None if config.train.deterministic and share else share * fit.course.elapsed
    said = read_description(fit.folder)
    about = [said[name] for name in ("weights_sha256", "config", "versions")]
    about += [said["training"]["validation_sha256"], fit.device.type, fit.precision]
    return calibrate(
        config,
        network,
        held_back,
        training=training,
        device=fit.device,
        precision=fit.precision,
        budget_s=budget_s,
        notes=Notebook(fit.folder / NOTES, json.dumps(about)),
        progress=progress,
    )


def _validate(
    folder: Path, cases: Sequence[Case], options: InferOptions, progress: Progress
) -> tuple[Report | None, tuple[CaseResult, ...]]:
    """Infer the held-back cases with the model as it was written, at full resolution, and judge the files."""
    segmenter = load_model(folder, options=options)
    out = folder / "validation"
    results = segment_cases(segmenter, cases, out, progress=progress)
    masks = {r.case: out / r.output for r in results if r.output}
    if not masks:
        return None, results
    data = segmenter.config.data
    report = report_pairs(
        [(c.id, masks.get(c.id), c.label, c.images[0]) for c in cases if c.label is not None],
        EvaluateOptions(data.labels),
        groups={c.id: c.group for c in cases},
        progress=progress,
    )
    report.save(out / "report", progress=progress)
    return report, results


def _file_digests(folds: Folds, progress: Progress) -> dict[Path, str]:
    """SHA-256 of every file of all cases, each read once for all that ask for it. Raises `DataError`."""
    files = tuple(dict.fromkeys(file for fold in folds for case in fold for file in case.files))
    digests = {}
    for n, path in enumerate(files):
        progress("hash", n, len(files), path.name)
        digests[path] = file_sha256(path)
    return digests


def _data_record(
    data: Dataset,
    facts: Sequence[CaseFacts],
    folds: Folds,
    options: TrainOptions,
    weights: Path | None,
    digests: Mapping[Path, str],
) -> dict[str, Any]:
    """What model.json says of the data; `digests` of all its files.

    Raises `ConfigError` where what is held back is learnt all the same: from `weights`, or under another name.
    """
    training, validation = folds
    known = digests.__getitem__
    learnt, held_back = (data_sha256(part, file_digest=known) for part in folds)
    refuse_leaks(training, validation, weights=weights, file_digest=known, facts=facts)
    cases = [case for fold in folds for case in fold]
    images, voxels = image_digests(cases, file_digest=known), voxel_digests(cases, facts)
    return {
        "data_set": data.path.resolve().name,
        "data_sha256": learnt,
        "images_sha256": sorted(set().union(*(images[case.id] for case in training))),
        "images_voxels": sorted(set().union(*(voxels.get(case.id, ()) for case in training))),
        "cases": len(training),
        "validation_cases": [c.id for c in validation],
        "validation_sha256": held_back,
        "fold": options.fold,
        "command": options.command,
    }
