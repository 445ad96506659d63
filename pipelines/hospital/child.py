"""The process that reads DICOM and infers, `python -m medseg_pipelines.hospital.child`: it may crash, the worker not.

Requests come as lines of JSON and are answered so: `ready` once, then for each request its steps and one end. What
libraries print goes to the standard error, which the worker keeps out of the log: it may hold a patient's data.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, cast

import medseg
from medseg_pipelines.hospital.models import ModelFiles, Models
from medseg_pipelines.hospital.request import Request, read_request
from medseg_pipelines.hospital.results import file_name, inputs_of, write_result
from medseg_pipelines.hospital.store import sha256_of

# so many models stay in memory
MOST_MODELS = 2
# of the kernel's when memory runs out: this process first
FIRST_TO_GO = 1000
PR_SET_PDEATHSIG = 1
# what the same input always ends with; and whose texts are the library's own: others' may quote what they stumble over
REFUSALS = ("DataError", "GeometryError")
OUR_TEXTS = ("ConfigError", "MemoryError", "ModelError", "OSError")
UID = re.compile(r"\b[0-2](?:\.\d+){4,}\b")

log = logging.getLogger(__name__)

Tell = Callable[..., None]


class RefusedError(Exception):
    """It is of no use to try again; the text has no patient's data."""


class FailedError(Exception):
    """It may work when it is tried again; the text has no patient's data."""


class Watched(medseg.Segmenter):
    """A model that tells when a series has been read, and when its labels are there."""

    told: Callable[[str], None]

    def watched(self, options: medseg.InferOptions, told: Callable[[str], None]) -> Watched:
        """The same loaded model under other options, of which `told` hears."""
        made = cast(Watched, self.with_options(options))
        made.told = told
        return made

    def prepare(self, case: Any) -> Any:
        """As `Segmenter.prepare`."""
        prepared = super().prepare(case)
        self.told("checked")
        return prepared

    def segment_prepared(self, *prepared: Any, **more: Any) -> Any:
        """As `Segmenter.segment_prepared`."""
        found = super().segment_prepared(*prepared, **more)
        self.told("inferred")
        return found


class Child:
    """Does one request after the other, with the models it has loaded."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._models = Models()
        self._loaded: OrderedDict[tuple[str, ...], Watched] = OrderedDict()

    def answer(self, line: str) -> None:
        """Tells how a request ends: `done` with its result, `refused` or `failed` with the reason."""
        request = read_request(line)
        folder = Path(request.work) / request.job
        try:
            result = self.do(request, folder)
        except RefusedError as error:
            self._tell(job=request.job, end="refused", reason=str(error))
        except FailedError as error:
            self._tell(job=request.job, end="failed", reason=str(error))
        except Exception as error:  # noqa: BLE001
            # whatever it is, the next request must be answered; its text could be of a patient
            log.error("job %s: %s at %s", request.job, type(error).__name__, _place(error))
            self._tell(job=request.job, end="failed", reason=f"{type(error).__name__} at {_place(error)}")
        else:
            self._tell(job=request.job, end="done", result=result)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def do(self, request: Request, folder: Path) -> dict[str, Any]:
        """The result of a request, whose files are in their place. Raises `RefusedError` and `FailedError`."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "link"):
            # the library names a case after its folder
            images = bring_together(request.files, folder / request.job)
        with _timed(seconds, "load"):
            model = self._model(request)
        case = self._segment(request, model, images, folder / "out")
        with _timed(seconds, "place"):
            files = _gathered(case, folder / "out", folder / "made")
            result = {
                "job": request.job,
                "series": request.series_id,
                "revision": request.revision,
                "inputs": inputs_of(request.files),
                "model_sha256": request.weights_sha256,
                "version": medseg.__version__,
                "files": files,
                "quality": {name: dict(told) for name, told in case.quality.items()},
                "warnings": [_clean(warning, images) for warning in case.warnings],
                "look": case.look,
                "peak_memory_mb": case.peak_memory_mb,
            }
            made = write_result(folder / "made", result | {"seconds": dict(case.seconds)}, Path(request.results))
        return made | {"seconds": seconds | made["seconds"]}

    def _segment(self, request: Request, model: Watched, images: Path, out: Path) -> medseg.CaseResult:
        series = medseg.SeriesOptions(resample_tilt=request.resample_tilt, resample_gaps=request.resample_gaps)
        formats = tuple(dict.fromkeys((*request.formats, *(("picture",) if request.picture else ()))))
        options = replace(model.options, formats=formats, revision=request.revision, series=series)
        watched = model.watched(options, lambda step: self._tell(job=request.job, step=step))
        try:
            found = medseg.infer([images], watched, out)
        except medseg.ConfigError as error:
            raise RefusedError(_clean(str(error), images)) from error
        except medseg.MedsegError as error:
            raise FailedError(_clean(str(error), images)) from error
        if len(found) != 1:
            raise RefusedError(f"{len(found)} series of images found, expected one; look at the files of this series")
        (case,) = found
        if case.status == "done":
            return case
        reason = _clean(case.reason or case.status, images)
        if case.status == "failed" and case.cause in REFUSALS:
            raise RefusedError(reason)
        if case.status == "failed" and case.cause not in OUR_TEXTS:
            # what a library says of a file may quote it
            reason = f"{case.cause} in a library; medseg infer on the files of this series says more"
        raise FailedError(reason)

    def _model(self, request: Request) -> Watched:
        """The model of a request: byte for byte the one that the job was made for."""
        asked = ModelFiles(request.weights_sha256, request.description_sha256)
        digests = (asked.weights_sha256, asked.description_sha256)
        key = (request.model, *digests, request.tta, request.precision, request.device)
        self._check_model(request.model, asked)
        if key not in self._loaded:
            options = medseg.InferOptions(device=request.device, precision=request.precision, tta=request.tta)  # type: ignore[arg-type]
            try:
                loaded = medseg.load_model(request.model, options=options)
            except medseg.ModelError as error:
                raise RefusedError(str(error)) from error
            except medseg.MedsegError as error:
                raise FailedError(str(error)) from error
            # what has been loaded could be newer than what was looked at, and a copy may keep the time of the file
            self._check_model(request.model, asked)
            self._check("weights", request.model, loaded.models[0].sha256, asked.weights_sha256)
            self._loaded[key] = Watched(loaded.models, loaded.options)
            while len(self._loaded) > MOST_MODELS:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _check_model(self, model: str, asked: ModelFiles) -> None:
        try:
            found = self._models.of(model)
        except FileNotFoundError as error:
            raise RefusedError(
                f"model {model}: {error.filename} is gone since the job was made; put it back, then replay the job"
            ) from error
        except OSError as error:
            raise FailedError(f"model {model}: {error.filename} cannot be read ({error.strerror})") from error
        self._check("weights", model, found.weights_sha256, asked.weights_sha256)
        self._check("description", model, found.description_sha256, asked.description_sha256)

    def _check(self, what: str, model: str, found: str, asked: str) -> None:
        # jobs of older versions do not say
        if asked and found != asked:
            raise RefusedError(
                f"model {model}: {what} with SHA-256 {found[:12]}… found, {asked[:12]}… expected: the model was "
                "changed since the job was made; put the old one back and replay the job"
            )


def bring_together(files: Sequence[str], folder: Path) -> Path:
    """Links files into a new folder, which it gives back; raises `RefusedError` where one is gone."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        link = folder / f"{number:06d}.dcm"
        try:
            os.link(file, link)
        except FileNotFoundError as error:
            raise RefusedError(
                f"{Path(file).name}, an image of the series, is no more in the store; send the series again"
            ) from error
        except OSError:
            # another disk, or one without hard links, or with too many of this file
            link.symlink_to(file)
    return folder


def _gathered(case: medseg.CaseResult, out: Path, made: Path) -> dict[str, dict[str, Any]]:
    """Moves the files of a case into the folder `made`, under names of their formats; what they are, by format."""
    written = {name: file["name"] for name, file in case.files.items()}
    if case.output is not None:
        written["nifti"] = case.output
    made.mkdir()
    files = {}
    for name in sorted(written):
        path = (out / written[name]).rename(made / file_name(name))
        files[name] = {"file": path.name, "sha256": sha256_of(path), "size": path.stat().st_size}
    return files


def _clean(text: str, images: Path) -> str:
    """A text of the library without the folder of links, which nobody finds, and without UIDs."""
    return UID.sub("UID", text.replace(f"{images}: ", "").replace(f"{images}/", "").replace(str(images), "the series"))


def _place(error: BaseException) -> str:
    """Where an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 6)


class _Answers:
    """The standard output as it was, line by line; several threads may tell."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def tell(self, **facts: Any) -> None:
        """Adds a line."""
        with self._lock:
            self._stream.write(json.dumps(facts) + "\n")
            self._stream.flush()


class _LogToWorker(logging.Handler):
    """What medseg logs, which has no patient's data in it, goes to the worker's log."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(logging.INFO)
        self._told = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Tells level and text."""
        self._told(log=record.levelno, text=UID.sub("UID", record.getMessage()))


def _die_with_the_worker() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            Path("/proc/self/oom_score_adj").write_text(str(FIRST_TO_GO), encoding="ascii")
        except OSError as error:
            log.debug("the kernel may take another process than this one when memory runs out (%s)", error.strerror)


def _requests(lines: TextIO) -> Iterator[str]:
    """Lines as they come. The process ends with the last one, whatever it does then: the worker is gone."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in lines:
            waiting.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield waiting.get()


def main(kind: type[Child] = Child) -> None:
    """Answers until the standard input ends. `kind`: how requests are done."""
    _die_with_the_worker()
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # what libraries print must not stand between the answers
    os.dup2(2, 1)
    faulthandler.enable()
    answers = _Answers(stream)
    for name in ("medseg", "medseg_pipelines"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(_LogToWorker(answers.tell))
        logger.propagate = False
    child = kind(answers.tell)
    answers.tell(ready=True)
    for line in _requests(sys.stdin):
        child.answer(line)


if __name__ == "__main__":
    main()
