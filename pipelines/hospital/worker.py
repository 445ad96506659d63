"""What computes: takes jobs from the queue, has each done by a process that may crash, and hands on what was made."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa

import medseg
from medseg_pipelines.hospital.children import COMMAND, START_S, Children, Outcome, StartError
from medseg_pipelines.hospital.housekeeping import clear_leavings, clear_published, mend_times
from medseg_pipelines.hospital.jobs import Job, Released
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.publish import Publisher
from medseg_pipelines.hospital.request import Request
from medseg_pipelines.hospital.results import inputs_of, read_result
from medseg_pipelines.hospital.settings import NodeSettings, RuleSettings, WorkerSettings

log = logging.getLogger(__name__)

# so long a worker waits before it asks again: for a job, for room on the disk, for a database that does not answer
IDLE_S, NO_ROOM_S, FIRST_PAUSE_S, MOST_PAUSE_S = 0.5, 2.0, 1.0, 60.0
# so often it shows that it lives, and looks for those that do not
BEAT_S = 5.0
# so often files of studies are removed that were published long ago
HOUSE_S = 3600.0
# a lease is renewed so often before it ends that one beat may be lost
BEATS_IN_A_LEASE = 4
# so long what is being sent may take when the worker ends
GRACE_S = 15.0
# and so long all that surrounds inference
STUCK_S = 600.0
OUT_OF_REACH = (sa.exc.SQLAlchemyError, OSError)
# pictures are for the pages alone
NOT_SENT = ("picture",)

Value = TypeVar("Value")


def run_worker(node: Node, stop: threading.Event, *, command: Sequence[str] = COMMAND) -> None:
    """Does jobs and sends results until `stop`; then what it was doing is queued again. Raises what breaks it.

    `command`: starts the process that infers.
    """
    _WorkerPart(node, stop, command).run()


def sends_of(settings: NodeSettings, rules: Iterable[RuleSettings], formats: Collection[str]) -> list[tuple[str, str]]:
    """Destination and format of each delivery of what was made for these rules."""
    found = [
        (destination.name, format)
        for rule in rules
        for destination in settings.destinations_of(rule)
        for format in formats
        if format not in NOT_SENT
        and (not destination.formats or format in destination.formats)
        and (format != "nifti" or destination.folder is not None)
    ]
    return list(dict.fromkeys(found))


class _Held:
    """The job that is being done, for the thread that renews its lease."""

    def __init__(self, job_id: str, most_s: float) -> None:
        self.job_id = job_id
        self.lost = threading.Event()
        self._until = time.monotonic() + most_s

    @property
    def is_stuck(self) -> bool:
        """Whether it has been held for longer than anything takes: by a disk that does not answer, for example."""
        return time.monotonic() > self._until


class _WorkerPart:
    """The threads of a worker: the one that does jobs, which starts the others: lives shown, results sent."""

    def __init__(self, node: Node, stop: threading.Event, command: Sequence[str]) -> None:
        self._node, self._stop = node, stop
        self._settings = node.settings.worker
        # of this worker alone: another one may do the same job when a lease is lost
        self._work = (node.store.work / node.me.name).absolute()
        # not in that folder, which is emptied: what a crash has printed is for a person to read
        self._printed = self._work.with_name(f"{node.me.name}.printed")
        self._children = Children(
            self._printed,
            most_s=self._settings.most_s,
            most_memory_gb=self._settings.most_memory_gb,
            threads=_threads(self._settings),
            command=command,
        )
        self._held: _Held | None = None
        self._ending = threading.Event()
        self._broken: BaseException | None = None
        self._said: dict[str, str] = {}
        self._pause_s = FIRST_PAUSE_S

    def run(self) -> None:
        """Until the end."""
        with only_one(self._node):
            self._run()
        if self._broken is not None:
            raise self._broken

    def _run(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        works = (self._pulse, self._keep_house, lambda: Publisher(self._node).run(self._ending))
        threads = [self._thread(work) for work in works]
        recovered = False
        try:
            while not self._is_over():
                try:
                    if not recovered:
                        self._tell_released(self._node.jobs.give_back(self._node.me.name, but=self._node.me.token))
                        recovered = True
                    pause_s = self._turn()
                    self._say("reach", None)
                except OUT_OF_REACH as error:
                    self._say("reach", f"database or disk out of reach ({type(error).__name__}); it is tried again")
                    pause_s = self._longer_pause()
                self._stop.wait(pause_s)
        finally:
            self._children.close()
            self._ending.set()
            for thread in threads:
                thread.join(GRACE_S)
            shutil.rmtree(self._work, ignore_errors=True)
            self._printed.unlink(missing_ok=True)

    def _is_over(self) -> bool:
        return self._stop.is_set() or self._broken is not None

    def _turn(self) -> float:
        """Does one job, where there is one and all is well; so many seconds the next turn has time."""
        if not self._node.store.is_here():
            self._say("folder", f"{self._node.store.folder} is not the node's; is its disk mounted? no job is begun")
            return NO_ROOM_S
        self._say("folder", None)
        if not self._node.store.has_room():
            free, least = self._node.store.free_bytes / 1e9, self._node.settings.storage.least_free_gb
            self._say("room", f"the disk has {free:.1f} GB left, less than {least:g} (least_free_gb): no job is begun")
            return NO_ROOM_S
        self._say("room", None)
        try:
            # before a job is taken: it is no fault of a job where none can be done
            ready = self._children.start(self._is_over)
        except StartError as error:
            self._say("start", str(error))
            return self._longer_pause()
        self._say("start", None)
        self._pause_s = FIRST_PAUSE_S
        job = self._node.jobs.claim(self._node.me) if ready else None
        if job is None:
            return IDLE_S
        with self._holding(job) as held:
            self._do(job, held)
        return 0.0

    @contextmanager
    def _holding(self, job: Job) -> Iterator[_Held]:
        held = self._held = _Held(job.id, self._settings.most_s + START_S + STUCK_S)
        try:
            yield held
        finally:
            self._held = None

    def _do(self, job: Job, held: _Held) -> None:
        rules = [rule for name in job.rules if (rule := self._node.settings.rule(name)) is not None]
        if not rules:
            reason = f"rule {job.rule} is no more in the settings; put it back and replay the job"
            self._fail(job, held, Outcome("refused", reason))
            return
        # what was made before this worker, or another one, was killed
        made = read_result(self._node.store.results / job.id)
        if made is not None and made.get("inputs") == inputs_of(job.files):
            self._finish(job, held, rules, made)
            return
        outcome = self._ask(job, held)
        if outcome.end == "done":
            self._finish(job, held, rules, outcome.result)
        elif outcome.end == "dropped" or not self._node.store.is_here():
            # without its disk nothing can be said of a job
            self._give_up(job, held)
        else:
            self._fail(job, held, outcome)

    def _ask(self, job: Job, held: _Held) -> Outcome:
        if not job.files:
            return Outcome("refused", "no image of the series is in the store; send the series again")

        def step(name: str) -> None:
            try:
                if not self._node.jobs.advance(job.id, self._node.me, name):
                    held.lost.set()
            except OUT_OF_REACH as error:
                log.warning("job %s: step %s could not be written down (%s)", job.id, name, type(error).__name__)

        try:
            return self._children.ask(
                request_of(self._node, job, str(self._work)),
                step=step,
                dropped=lambda: self._is_over() or held.lost.is_set(),
            )
        except StartError as error:
            self._say("start", str(error))
            return Outcome("dropped")
        finally:
            # of a process that was killed; its links would hold the disk
            shutil.rmtree(self._work / job.id, ignore_errors=True)

    def _finish(self, job: Job, held: _Held, rules: Sequence[RuleSettings], result: Mapping[str, Any]) -> None:
        files = result["files"]
        sends = sends_of(self._node.settings, rules, files)
        kept = self._surely(held, lambda: self._node.jobs.finish(job.id, self._node.me, result, sends))
        if not kept:
            log.warning("job %s: its end could not be written down, or came too late; what was made stays", job.id)
            return
        digests = {format.replace("-", "_"): str(made["sha256"]) for format, made in files.items()}
        self._node.audit.record("done", job=job.id, series=job.series_id, revision=job.revision, **digests)
        log.info("job %s is done in %.1f s", job.id, sum(result.get("seconds", {}).values()))

    def _fail(self, job: Job, held: _Held, outcome: Outcome) -> None:
        for_good = outcome.end == "refused"
        state = self._surely(
            held, lambda: self._node.jobs.fail(job.id, self._node.me, outcome.reason, for_good=for_good)
        )
        if state is None or state == "lost":
            log.warning("job %s: its failure could not be written down, or came too late", job.id)
            return
        self._node.audit.record("failed", job=job.id, attempt=job.attempts, state=state, reason=outcome.reason)
        log.error("job %s, attempt %d: %s; it is %s", job.id, job.attempts, outcome.reason, state)

    def _give_up(self, job: Job, held: _Held) -> None:
        if held.lost.is_set():
            log.warning("job %s is given up: it is another's, or a later revision of its series is there", job.id)
            return
        if self._node.jobs.hand_back(job.id, self._node.me):
            log.info("job %s is queued again: this worker ends, or cannot go on", job.id)

    def _surely(self, held: _Held, write: Callable[[], Value]) -> Value | None:
        """What `write` gives once the database has taken it; None where the job is lost, or the worker ends before."""
        while True:
            try:
                return write()
            except OUT_OF_REACH as error:
                self._say("reach", f"database or disk out of reach ({type(error).__name__}); it is tried again")
            if self._stop.wait(FIRST_PAUSE_S) or held.lost.is_set():
                return None

    # ---- in threads of their own

    def _pulse(self) -> None:
        pause_s = min(BEAT_S, self._settings.lease_s / BEATS_IN_A_LEASE)
        while True:
            try:
                held = self._held
                # of one that is stuck the lease ends: another worker may get further
                if held is not None and not held.is_stuck and not self._node.jobs.renew(held.job_id, self._node.me):
                    held.lost.set()
                self._tell_released(self._node.jobs.release_expired())
                self._node.beat(next(iter(tuple(self._said.values())), None))
            except OUT_OF_REACH as error:
                log.info("no sign of life could be written (%s)", type(error).__name__)
            if self._ending.wait(pause_s):
                return

    def _keep_house(self) -> None:
        while not self._ending.wait(HOUSE_S):
            try:
                mend_times(self._node)
                if self._node.store.is_here():
                    clear_published(self._node)
                    clear_leavings(self._node)
            except OUT_OF_REACH as error:
                log.warning("what was published long ago could not be removed (%s)", type(error).__name__)

    def _thread(self, work: Callable[[], None]) -> threading.Thread:
        """A thread whose end by an error ends the worker."""

        def whole() -> None:
            try:
                work()
            except BaseException as error:
                log.exception("a thread of the worker broke")
                self._broken = error

        thread = threading.Thread(target=whole, daemon=True)
        thread.start()
        return thread

    # ---- what is told

    def _tell_released(self, released: Iterable[Released]) -> None:
        for job in released:
            self._node.audit.record("released", job=job.job_id, state=job.state, reason=job.reason)
            log.warning("job %s has lost its worker; it is %s", job.job_id, job.state)

    def _say(self, subject: str, text: str | None) -> None:
        """Logs a trouble when it begins, changes and ends (None), not each time that it is met."""
        before = self._said.pop(subject, None)
        if text is not None:
            self._said[subject] = text
            if before is None:
                log.error("%s", text)
        elif before is not None:
            log.warning("over: %s", before)

    def _longer_pause(self) -> float:
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, MOST_PAUSE_S)
        return pause_s


@contextmanager
def only_one(node: Node) -> Iterator[None]:
    """Keeps other processes from being the same part of the node. Raises `ConfigError` where one is."""
    with (node.store.work / f"{node.me.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise medseg.ConfigError(
                f"{node.me.name} runs already, and would lose its jobs to another one of this name; give another "
                "--number, or each machine a `name`"
            ) from error
        yield


def request_of(node: Node, job: Job, work: str) -> Request:
    """What the process that infers is asked for. What an order of an older version does not say is as it was then."""
    order, settings = job.order, node.settings.worker
    usual = RuleSettings.model_fields
    return Request(
        job=job.id,
        series_id=job.series_id,
        revision=job.revision,
        files=tuple(str((node.store.folder / file).absolute()) for file in job.files),
        work=work,
        results=str((node.store.results / job.id).absolute()),
        model=job.model,
        weights_sha256=job.model_sha256,
        description_sha256=str(order.get("description_sha256", "")),
        formats=tuple(order.get("formats", usual["formats"].default)),
        # a fault in drawing must not cost the result: the last go is without a picture
        picture=settings.pictures and (job.attempts == 1 or job.attempts < settings.attempts),
        tta=str(order.get("tta", usual["tta"].default)),
        precision=settings.precision,
        device=settings.device,
        resample_tilt=bool(order.get("resample_tilt", False)),
        resample_gaps=bool(order.get("resample_gaps", False)),
    )


def _threads(settings: WorkerSettings) -> int | None:
    """How many threads compute: those asked for, else a fair share of the machine among its workers."""
    if settings.threads is not None or settings.workers == 1:
        return settings.threads
    return max((os.cpu_count() or 1) // settings.workers, 1)
