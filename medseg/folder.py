"""A folder of cases: read, segmented and written side by side, each on its own; what became of them is in record."""

from __future__ import annotations

import logging
import os
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from medseg.cases import Case, infer_inputs, refuse_among, refuse_image_name
from medseg.device import choose_device, is_out_of_memory
from medseg.errors import ConfigError, DataError, MedsegError
from medseg.infer import InferOptions, Segmenter, load_model, timed
from medseg.preprocess import Prepared
from medseg.process import PeakMemory, heeding_signals
from medseg.progress import Pace, Progress, silent
from medseg.readers import file_sha256, stored_in
from medseg.readers.series import SourceImages
from medseg.record import CaseResult, Record, open_record
from medseg.writers import held_room, ignores_case, is_disk_full, remove_stale_temporaries
from medseg.writers.formats import (
    FORMATS,
    NIFTI,
    REGIONS,
    Outcome,
    WrittenFile,
    file_name,
    file_names,
    source_for,
    write_files,
)
from medseg.writers.probabilities import ProbabilityStore, probabilities_path

__all__ = ["CaseResult", "infer", "segment_cases"]

log = logging.getLogger(__name__)

# so many cases of a device are being read or wait for it, and so many wait for the writer or are being written: with
# the one in the network no more than three volumes of a device are in memory, however many cases there are
AHEAD, BEHIND = 1, 1
# writing the record after every case would cost the square of their number
SECONDS_BETWEEN_RECORDS = 2.0
SECONDS_BETWEEN_LOOKS = 0.2


def infer(
    inputs: str | Path | Sequence[str | Path],
    models: str | Path | Sequence[str | Path] | Segmenter,
    out: str | Path,
    options: InferOptions | None = None,
    *,
    progress: Progress = silent,
) -> tuple[CaseResult, ...]:
    """Segment files and folders into `out`/CASE.nii.gz (pictures: .png), and write `out`/run.json.

    `models`: folders or names, several for an ensemble; or a loaded model, whose own options hold (see
    `Segmenter.with_options`). Of other `formats` than the mask the files lie beside it or in its place; with
    `save_probabilities` those of a case go into `out`/probabilities/CASE.nii.gz, of pictures too. A case is only
    skipped where all that is asked for is as it was written.

    A case that fails costs no other; masks that the same models and options made of the same input, and that are still
    as they were written, are skipped. A full disk stops the run: the cases that it did not reach are `not_done`. Raises
    `ConfigError` or `ModelError` before anything is done, `KeyboardInterrupt` after SIGINT or SIGTERM once the record
    is written.
    """
    if isinstance(models, Segmenter) and options is not None:
        raise ConfigError("options beside a loaded model: its own hold; use `models.with_options(options)`")
    if isinstance(models, Segmenter) and models.options.devices:
        raise ConfigError(
            f"devices {', '.join(models.options.devices)} for a loaded model, which is on one: leave them out"
        )
    options = models.options if isinstance(models, Segmenter) else options or InferOptions()
    part, parts = options.shard
    if not 1 <= part <= parts:
        raise ConfigError(f"--shard {part}/{parts}: expected i/n with i from 1 to n")
    first, *others = (models,) if isinstance(models, Segmenter) else _loaded(_each(models), options)
    cases = infer_inputs(
        [Path(i) for i in _each(inputs)], channels=len(first.config.data.channels), series=options.series
    )
    if part > len(cases):
        log.warning("shard %d/%d has none of the %d cases", part, parts, len(cases))
    mine = cases[part - 1 :: parts]
    return segment_cases(first, mine, Path(out), of=cases, beside=others, forget_peak=True, progress=progress)


def segment_cases(
    segmenter: Segmenter,
    cases: Sequence[Case],
    folder: Path,
    *,
    of: Sequence[Case] = (),
    beside: Sequence[Segmenter] = (),
    forget_peak: bool = False,
    progress: Progress = silent,
) -> tuple[CaseResult, ...]:
    """`infer` for cases and a model that are at hand; `beside`: the same model on further devices.

    `of`: all cases that are to be written there, where other processes segment the rest: none may take another's name.
    Results are in the order of `cases`, whatever device was free for them. `forget_peak`: begin the peak of the
    process's memory anew with every case, so that each has its own; who measures the process from outside loses it.
    """
    segmenters = (segmenter, *beside)
    formats = sorted({s.precision for s in segmenters})
    if len(formats) > 1:
        raise ConfigError(f"--devices: they would compute in {' and '.join(formats)}; choose one with --precision")
    _refuse_overlaps(segmenter)
    _refuse_regions(segmenter)
    everyone = of or cases
    _refuse_clashes(everyone, folder, segmenter.options.formats)
    probabilities = probabilities_path(folder, "").parent
    parts = [probabilities] if segmenter.options.save_probabilities else []
    parts += [folder / FORMATS[name].folder for name in segmenter.options.formats if FORMATS[name].folder]
    sources = {path.parent for case in everyone for path in _files(case) if os.path.isfile(path)}
    for made in (folder, *parts):
        refuse_among(sources, made, written="masks" if made == folder else made.name)
        refuse_image_name(made, written="masks")
        try:
            made.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{made}: cannot be made ({error.strerror}); choose another -o") from error
    try:
        known = {probabilities, *(folder / f.folder for f in FORMATS.values())}
        removed = [name for made in sorted(known) if made.is_dir() for name in remove_stale_temporaries(made)]
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror}); choose another -o") from error
    for name in removed:
        log.info("removed %s, which a killed run has left", name)
    _refuse_namesakes(everyone, folder, segmenter.options.formats)
    record, again = open_record(folder, segmenters), {case.id for case in cases}
    left = [name for case, name in record.others.items() if case not in again]
    if left:
        log.warning(
            "%s: %d masks of another model or other settings stay, such as %s, and %s will say nothing of them; choose "
            "another -o to keep them apart, or remove them",
            *(folder, len(left), left[0], record.path.name),
        )
    run = _Run(segmenters, tuple(cases), folder, record, forget_peak=forget_peak)
    with heeding_signals(run.interrupt):
        results = run.to_the_end(progress)
        if run.interrupted:
            undone = sum(r.status == "not_done" for r in results)
            log.warning(
                "stopped by a signal: %d of %d cases are not done; the same command goes on", undone, len(results)
            )
    return results


@dataclass(frozen=True)
class _Read:
    """A case that waits for a device."""

    case: Case
    inputs: dict[str, str]
    seconds: dict[str, float]
    prepared: Prepared
    source: SourceImages | None
    kept: Mapping[str, WrittenFile]


@dataclass(frozen=True)
class _Labelled:
    """A case that waits for the writer."""

    inputs: dict[str, str]
    seconds: dict[str, float]
    outcome: Outcome
    look: bool
    kept: Mapping[str, WrittenFile]
    peak_memory_mb: float | None


class _Dropped(BaseException):
    """Leaves a case that is in the network; no error, and not to be caught as one on its way up."""


class _Run:
    """The threads of a run and what they know of each other: for each device one that reads, computes, and writes.

    Readers take the cases in their order; whichever device is free takes what has been read. What became of a case
    comes back to the thread that started the run, which alone writes the record and tells the progress.
    """

    def __init__(
        self,
        segmenters: Sequence[Segmenter],
        cases: Sequence[Case],
        folder: Path,
        record: Record,
        *,
        forget_peak: bool,
    ) -> None:
        self.interrupted = False
        self._saves_probabilities = segmenters[0].options.save_probabilities
        self._segmenters, self._cases, self._folder, self._record = segmenters, cases, folder, record
        self._stopping = threading.Event()
        self._full = False
        # whole masks that the last record has no room for
        self._untold = 0
        self._broken: BaseException | None = None
        self._waiting: SimpleQueue[Case] = SimpleQueue()
        # None: a thread before has nothing left to do
        self._ready: SimpleQueue[_Read | None] = SimpleQueue()
        self._labelled: SimpleQueue[_Labelled | None] = SimpleQueue()
        self._events: SimpleQueue[CaseResult | BaseException | None] = SimpleQueue()
        self._ahead = threading.Semaphore(AHEAD * len(segmenters))
        self._behind = threading.Semaphore(BEHIND * len(segmenters))
        self._results: dict[str, CaseResult] = {}
        self._recorded: dict[str, CaseResult] = {}
        self._shares: dict[str, float] = {}
        # cases that are in the network at the same time cannot be told apart
        self._memory = PeakMemory(apart=forget_peak and len(segmenters) == 1)

    def interrupt(self) -> None:
        """Drop what is in the network and finish what is being written. A signal may call it at any moment."""
        self.interrupted = True
        self._stopping.set()

    def to_the_end(self, progress: Progress) -> tuple[CaseResult, ...]:
        """Do all cases, or those up to a stop, and write the record whatever happens."""
        for case in self._cases:
            self._waiting.put(case)
        # a folder that cannot be written is told before any work
        self._write_record()
        try:
            # given back before the last record is written
            with held_room(self._folder, self._record.growth(len(self._cases))):
                self._work(progress)
        finally:
            while not self._events.empty():
                self._take(self._events.get())
            if not self._write_record():
                # what is not on record will be done again
                self._untold = sum(r.status == "done" and r != self._recorded.get(c) for c, r in self._results.items())
                self._results = self._recorded
        if self._broken is not None:
            raise self._broken
        return self._all()

    def _work(self, progress: Progress) -> None:
        threads: list[tuple[threading.Thread, SimpleQueue[Any]]] = []
        for segmenter in self._segmenters:
            threads += [
                (self._thread(self._read, self._ready), self._ready),
                (self._thread(partial(self._compute, segmenter), self._labelled), self._labelled),
                (self._thread(self._write, self._events), self._events),
            ]
        try:
            for thread, _ in threads:
                thread.start()
            self._watch(progress)
        finally:
            self._stopping.set()
            # the system may have had no room for one: the others must not wait for it
            for _, after in (pair for pair in threads if pair[0].ident is None):
                self._open_gates()
                after.put(None)
            for thread in (t for t, _ in threads if t.ident is not None):
                thread.join()

    def _thread(self, work: Callable[[], None], after: SimpleQueue[Any]) -> threading.Thread:
        """A thread that tells `after` that it has ended, and the run why, whatever happens in it."""

        def whole() -> None:
            try:
                work()
            except BaseException as error:
                log.debug("a thread of the run broke", exc_info=True)
                self._end_with(error)
                self._open_gates()
            finally:
                after.put(None)

        return threading.Thread(target=whole)

    def _open_gates(self) -> None:
        """Nobody gives the permits of a thread that broke back: who waits for them would wait for ever."""
        self._ahead.release(len(self._cases) + len(self._segmenters))
        self._behind.release(len(self._cases) + len(self._segmenters))

    def _end_with(self, error: BaseException) -> None:
        self._stopping.set()
        self._events.put(error)

    # ---- in the thread that started the run

    def _watch(self, progress: Progress) -> None:
        pace = Pace(len(self._cases))
        writers, written = len(self._segmenters), time.monotonic()
        while writers:
            with suppress(Empty):
                event = self._events.get(timeout=SECONDS_BETWEEN_LOOKS)
                writers -= event is None
                self._take(event)
            skipped = sum(r.status == "skipped" for r in self._results.values())
            pace.measure(len(self._results) - skipped + sum(tuple(self._shares.values())), skipped=skipped)
            progress("infer", pace.done, pace.total, pace.words())
            if time.monotonic() - written >= SECONDS_BETWEEN_RECORDS:
                self._write_record()
                written = time.monotonic()

    def _take(self, event: CaseResult | BaseException | None) -> None:
        if isinstance(event, CaseResult):
            self._shares.pop(event.case, None)
            self._results[event.case] = event
        elif event is not None:
            self._broken = self._broken or event

    def _all(self) -> tuple[CaseResult, ...]:
        """Results in the order of the cases."""
        why = f"{self._folder}: the disk is full" if self._full else "interrupted" if self.interrupted else None
        if self._untold:
            why = f"{why}; {self._untold} more masks there are whole, but {self._record.path.name} has no room for them"
        return tuple(self._results.get(c.id, CaseResult(c.id, "not_done", reason=why)) for c in self._cases)

    def _write_record(self) -> bool:
        try:
            self._record.write(self._all(), self._memory.told())
        except DataError as error:
            if not is_disk_full(error):
                raise
            log.info("%s is not up to date", self._record.path.name, exc_info=True)
            self._full = True
            self._stopping.set()
            return False
        self._recorded = dict(self._results)
        return True

    # ---- in threads of their own

    def _read(self) -> None:
        while True:
            self._ahead.acquire()
            try:
                case = None if self._stopping.is_set() else self._waiting.get_nowait()
            except Empty:
                case = None
            if case is None:
                break
            seconds: dict[str, float] = {}
            inputs: dict[str, str] = {}
            with self._kept_apart(case, seconds, inputs):
                if (read := self._read_one(case, seconds, inputs)) is not None:
                    self._ready.put(read)
                    # the permit goes along with the case
                    continue
            self._ahead.release()
        self._ahead.release()

    def _read_one(self, case: Case, seconds: dict[str, float], inputs: dict[str, str]) -> _Read | None:
        """None for a case that is done already; `inputs` takes the SHA-256 of its files."""
        options, kept = self._segmenters[0].options, {}
        with timed(seconds, "hash"):
            inputs.update(_digests(case))
            if not options.overwrite:
                probabilities = probabilities_path(self._folder, case.id) if self._saves_probabilities else None
                wanted = {name: file_name(case, name) for name in options.formats}
                earlier = self._record.finished(case.id, wanted, inputs, probabilities)
                if earlier is not None:
                    self._events.put(replace(earlier, status="skipped", inputs=inputs))
                    return None
                kept = self._record.whole_files(case.id, file_names(case), inputs)
        with timed(seconds, "read"):
            source = source_for(case, options.formats)
            return _Read(case, inputs, seconds, self._segmenters[0].prepare(case), source, kept)

    def _compute(self, segmenter: Segmenter) -> None:
        if segmenter.device.type == "cuda":
            torch.cuda.set_device(segmenter.device)
        for read in iter(self._ready.get, None):
            self._ahead.release()
            with self._kept_apart(read.case, read.seconds, read.inputs):
                labelled = self._compute_one(segmenter, read)
                self._behind.acquire()
                self._labelled.put(labelled)
                del labelled
            # a volume must not be held while the next one is waited for
            del read

    def _compute_one(self, segmenter: Segmenter, read: _Read) -> _Labelled:
        def tick(share: float) -> None:
            self._shares[read.case.id] = share
            if self._stopping.is_set():
                raise _Dropped

        tick(0.0)
        self._memory.begin()
        with ExitStack() as kept:
            store = None
            if self._saves_probabilities or any(FORMATS[n].needs_scores for n in segmenter.options.formats):
                store = ProbabilityStore(self._folder, read.prepared.source.shape, segmenter.channels)
                kept.enter_context(store)
            found = segmenter.segment_prepared(read.prepared, read.seconds, tick=tick, keep=store)
            # from here on the writer closes it
            kept.pop_all()
        outcome = Outcome(
            read.case,
            found.labels,
            read.prepared.source,
            segmenter.segments,
            segmenter.algorithm,
            source=read.source,
            channels=len(segmenter.config.data.channels),
            quality=dict(found.quality),
            warnings=(*read.prepared.notes, *found.warnings),
            revision=segmenter.options.revision,
            formats=segmenter.options.formats,
            scores=store,
        )
        return _Labelled(read.inputs, read.seconds, outcome, found.look, read.kept, self._memory.end())

    def _write(self) -> None:
        for labelled in iter(self._labelled.get, None):
            case = labelled.outcome.case
            kept_apart = self._kept_apart(case, labelled.seconds, labelled.inputs)
            with kept_apart, labelled.outcome.scores or nullcontext():
                self._write_one(labelled)
            self._behind.release()
            del labelled

    def _write_one(self, labelled: _Labelled) -> None:
        if self._full:
            raise _Dropped
        outcome, case = labelled.outcome, labelled.outcome.case
        beside, probabilities = probabilities_path(self._folder, case.id), None
        with timed(labelled.seconds, "write"):
            written = write_files(self._folder, outcome, beside if self._saves_probabilities else None)
            if self._saves_probabilities:
                probabilities = file_sha256(beside)
            # what earlier runs have made of the same input is of the same mask
            files = {**labelled.kept, **written}
        others = [self._folder / name for format_, name in file_names(case).items() if format_ not in files]
        mask = files.pop(NIFTI, None)
        stale = self._stale([*others, *(() if probabilities else [beside])], "mask")
        result = CaseResult(
            case.id,
            "done",
            mask["name"] if mask else None,
            seconds=labelled.seconds,
            peak_memory_mb=labelled.peak_memory_mb,
            inputs=labelled.inputs,
            output_sha256=mask["sha256"] if mask else None,
            files=files,
            probabilities_sha256=probabilities,
            quality=outcome.quality,
            warnings=(*outcome.warnings, *stale),
            look=labelled.look,
        )
        self._events.put(result)

    def _stale(self, files: Sequence[Path], of: str) -> tuple[str, ...]:
        """Warnings of the `files` that are there: they do not belong to what this run has made of the case."""
        # unlike that of a Path, this `exists` does not raise for a name that is too long or a disk that is broken
        there = [f.relative_to(self._folder).as_posix() for f in files if os.path.exists(f)]
        return tuple(f"{name} is of an earlier {of}: do not use it" for name in there)

    @contextmanager
    def _kept_apart(self, case: Case, seconds: dict[str, float], inputs: Mapping[str, str]) -> Iterator[None]:
        """Whatever happens to a case stays with it, but for what must end the run."""
        try:
            yield
        except _Dropped:
            log.info("case %s is dropped", case.id)
        except Exception as error:
            log.debug("case %s failed", case.id, exc_info=True)
            if is_disk_full(error):
                self._full = True
                self._stopping.set()
                return
            files = [self._folder / name for name in file_names(case).values()]
            stale = self._stale([*files, probabilities_path(self._folder, case.id)], "run")
            reason, cause = _why(case, error)
            failed = CaseResult(case.id, "failed", reason=reason, cause=cause, seconds=seconds, inputs=dict(inputs))
            self._events.put(replace(failed, warnings=stale))
        except BaseException as error:
            log.debug("case %s ends the run", case.id, exc_info=True)
            self._end_with(error)


def _each(given: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [given] if isinstance(given, (str, os.PathLike)) else given


def _loaded(models: Sequence[str | Path], options: InferOptions) -> list[Segmenter]:
    """The model once for each device: a network is on one."""
    devices = [_device(name) for name in options.devices] or [options.device]
    return [load_model(*models, options=replace(options, device=d, devices=())) for d in devices]


def _refuse_overlaps(segmenter: Segmenter) -> None:
    """Raises `ConfigError` where a file would tell a part of a region as the whole: its volume would be too small.

    In a label map the later region covers the earlier one; NIfTI says so, and evaluation puts them together again.
    """
    labels = [value for value in segmenter.config.data.labels.values() if isinstance(value, tuple)]
    single = [(value,) for value in segmenter.config.data.labels.values() if not isinstance(value, tuple)]
    values = [value for members in (*labels, *single) for value in members]
    wrong = [name for name in segmenter.options.formats if name not in (NIFTI, REGIONS)]
    if segmenter.config.data.is_regions and wrong and len(set(values)) < len(values):
        raise ConfigError(
            f"--format {','.join(wrong)}: the labels of this model are regions that overlap, of which these files "
            "would show and measure only what no other one covers; ask for --format nifti"
        )


def _refuse_regions(segmenter: Segmenter) -> None:
    """Raises `ConfigError` where regions are asked for of a model that has labels."""
    if REGIONS in segmenter.options.formats and not segmenter.config.data.is_regions:
        raise ConfigError(
            "--regions: the labels of this model do not lie over each other, and the mask holds each of them whole; "
            "leave the option out"
        )


def _refuse_clashes(cases: Sequence[Case], folder: Path, formats: Sequence[str]) -> None:
    """Raises `ConfigError` where a file to be written is an input image, or of two cases."""
    # a link to itself cannot be resolved
    sources = {Path(os.path.realpath(path)) for case in cases for path in case.images}
    owners: dict[Path, Case] = {}
    for path, case in ((folder / file_name(case, name), case) for case in cases for name in formats):
        if path.resolve() in sources:
            raise ConfigError(f"{path}: the mask would replace an input image; choose another -o")
        if owners.setdefault(path, case) is not case:
            raise ConfigError(
                f"{path}: both {owners[path].images[0]} and {case.images[0]} would become it; rename one, or run apart"
            )


def _refuse_namesakes(cases: Sequence[Case], folder: Path, formats: Sequence[str]) -> None:
    """Raises `ConfigError` where the disk of `folder` would take the names of two files to be written for one."""
    owners: dict[str, Case] = {}
    for called, case in ((file_name(case, name), case) for case in cases for name in formats):
        # there two spellings of an accent may be the same as well
        other = owners.setdefault(unicodedata.normalize("NFC", called).casefold(), case)
        if other is not case and ignores_case(folder):
            raise ConfigError(
                f"{folder / called}: both {other.images[0]} and {case.images[0]} would become it, since this disk "
                "takes small and capital letters for the same; rename one, or run apart"
            )


def _device(name: str) -> str:
    """`cuda:1` for 1. Raises `ConfigError`, with the option as it was given, where there is no such device."""
    device = f"cuda:{name}" if name.isdecimal() else name
    try:
        choose_device(device)
    except ConfigError as error:
        raise ConfigError(f"--devices {name}: {str(error).removeprefix(f'--device {device}: ')}") from error
    return device


def _files(case: Case) -> tuple[Path, ...]:
    """The files that a case is read from."""
    return case.images if case.series is None else tuple(f.path for f in case.series.files)


def _digests(case: Case) -> dict[str, str]:
    """SHA-256 by file; of a series one for all its files. A folder without a series has none: reading says why.

    The voxels of a header that names other files lie in these.
    """
    if case.series is not None:
        return {str(case.series.source): case.series.sha256()}
    return {str(file): file_sha256(file) for p in case.images if not p.is_dir() for file in stored_in(p)}


def _why(case: Case, error: Exception) -> tuple[str, str]:
    """What a user can act on, and the class of that: libraries wrap an error in one that names their inner parts."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    for found in chain:
        if isinstance(found, MedsegError):
            system = any(isinstance(one, OSError) for one in chain)
            return str(found), "OSError" if system else type(found).__name__
    for found in chain:
        if isinstance(found, RuntimeError) and is_out_of_memory(found):
            why = "the device ran out of memory; try --device cpu or a smaller windows.batch_size"
            return f"{case.images[0]}: {why}", "MemoryError"
        if isinstance(found, MemoryError):
            told = str(found).removeprefix(f"{case.images[0]}: ") or "MemoryError"
            why = f"the memory of this machine does not hold it ({told})"
            return f"{case.images[0]}: {why}", "MemoryError"
    name = type(chain[-1]).__name__
    return f"{case.images[0]}: {name}: {chain[-1]}", name
