"""Results out: what is to be sent is sent, by whichever way the settings name, until it is there or given up."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import sqlalchemy as sa

import medseg
from medseg_pipelines.hospital import commitment
from medseg_pipelines.hospital.commitment import Reports
from medseg_pipelines.hospital.cstore import PeerSender
from medseg_pipelines.hospital.deliveries import Batch, Delivery, open_deliveries
from medseg_pipelines.hospital.folder_out import FolderSender
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.parcels import (
    DestinationDownError,
    Parcel,
    Said,
    Sender,
    UnsendableError,
    open_parcel,
)
from medseg_pipelines.hospital.settings import DestinationSettings, NodeSettings
from medseg_pipelines.hospital.stow import DicomwebSender

log = logging.getLogger(__name__)

LOOK_S = 0.25
# files over one association
BATCH = 8
# the database may be away for a while
PAUSE_S = 5.0


class _StoppedError(Exception):
    """The node ends."""


class Publisher:
    """Sends what the jobs of all workers have made; every worker may run one."""

    def __init__(self, node: Node) -> None:
        self._node, self._settings = node, node.settings.publish
        self._destinations = {d.name: d for d in self._settings.destinations}
        self._deliveries = open_deliveries(node)
        self._reports = Reports(self._deliveries, node.audit)
        self._running: dict[Future[None], Batch] = {}
        self._stop = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Sends until `stop`; then what is being sent ends, and the rest waits for the next start."""
        self._stop = stop
        threads = self._settings.at_once * max(len(self._destinations), 1)
        with ThreadPoolExecutor(threads, thread_name_prefix="publish") as pool:
            ready, upkeep_at = False, 0.0
            while not stop.is_set():
                pause_s = LOOK_S
                try:
                    if not ready:
                        self._prepare()
                        ready = True
                    if time.monotonic() >= upkeep_at:
                        self._keep_up()
                        upkeep_at = time.monotonic() + self._node.settings.worker.lease_s / 4
                    if self._node.store.is_here():
                        # else all would be missing; the worker says so
                        self._look(pool)
                except sa.exc.SQLAlchemyError as error:
                    log.error("publishing waits: the database cannot be used (%s)", type(error).__name__)
                    pause_s = PAUSE_S
                stop.wait(pause_s)

    def _prepare(self) -> None:
        self._deliveries.prepare(self._destinations)
        if freed := self._deliveries.give_back(self._node.me.name):
            log.info("%d deliveries of an earlier start are sent again", freed)
        for name, destination in self._destinations.items():
            if not destination.commitment:
                self._deliveries.confirm_all(name)

    def _keep_up(self) -> None:
        """What is done once in a while: leases, those of the dead, destinations that are gone."""
        self._forget_ended()
        self._deliveries.renew([batch.token for batch in self._running.values()])
        if freed := self._deliveries.release_expired():
            log.warning("%d deliveries of a worker that is gone are sent again", freed)
        for job, name, format in self._deliveries.supersede():
            self._node.audit.record("superseded", job=job, destination=name, format=format)
            log.info("%s of job %s to %s: superseded by a later revision", format, job, name)
        for job, format in self._deliveries.give_up_unknown(self._destinations):
            self._node.audit.record("dead", job=job, format=format, reason="its destination is not in the settings")

    def _look(self, pool: ThreadPoolExecutor) -> None:
        self._forget_ended()
        for name, states in self._deliveries.due().items():
            destination = self._destinations.get(name)
            if destination is None:
                continue
            for state in sorted(states):
                while self._busy(name) < self._settings.at_once:
                    claim = self._deliveries.claim if state == "waiting" else self._deliveries.claim_unconfirmed
                    batch = claim(name, self._node.me.name, most=BATCH)
                    if batch is None:
                        break
                    work = self._send if state == "waiting" else self._ask
                    self._running[pool.submit(work, destination, batch)] = batch

    def _busy(self, destination: str) -> int:
        return sum(batch.destination == destination for batch in self._running.values())

    def _forget_ended(self) -> None:
        for future in [future for future in self._running if future.done()]:
            del self._running[future]
            if (error := future.exception()) is not None:
                # its lease runs out, and it is sent again
                log.error("a batch of deliveries broke off (%s)", _where(error))

    def _send(self, destination: DestinationSettings, batch: Batch) -> None:
        """Sends a batch and writes down what became of each delivery."""
        left = list(batch.deliveries)
        works = False

        def tell(parcel: Parcel, said: Said, reason: str) -> None:
            nonlocal works
            works = works or said is not Said.NEVER
            left.remove(parcel.delivery)
            self._write_down(destination, batch, parcel, said, reason)
            if self._stop.is_set():
                raise _StoppedError

        parcels, unread = self._opened(batch, left)
        for delivery, reason in unread.items():
            left.remove(delivery)
            self._put_off(batch, delivery, reason, reached=False)
        try:
            if parcels:
                sender_to(destination, self._node.settings).send(parcels, tell)
        except (DestinationDownError, medseg.ConfigError) as error:
            during = error.during.delivery if isinstance(error, DestinationDownError) and error.during else None
            self._write_down_failure(destination, batch, left, str(error), during)
            return
        except _StoppedError:
            log.info("%s: stopped with %d files of a batch to send", destination.name, len(left))
        except sa.exc.SQLAlchemyError:
            raise
        except Exception as error:  # noqa: BLE001
            # a fault of ours with one file must not hold up the others; its text could be of a patient
            works = self._write_down_fault(destination, batch, left, error)
        if left or not works:
            self._deliveries.put_back(batch, left)

    def _opened(self, batch: Batch, left: list[Delivery]) -> tuple[list[Parcel], dict[Delivery, str]]:
        """The files of a batch, and why some of them cannot be read at the moment.

        What cannot be sent at all is dead, and taken out of `left`.
        """
        parcels: list[Parcel] = []
        unread: dict[Delivery, str] = {}
        for delivery in batch.deliveries:
            try:
                parcels.append(open_parcel(self._node.store, delivery))
            except UnsendableError as error:
                if not self._node.store.is_here():
                    continue
                left.remove(delivery)
                if self._deliveries.never(batch, delivery, str(error)):
                    self._tell("dead", delivery, str(error))
            except OSError as error:
                if self._node.store.is_here():
                    why = error.strerror or type(error).__name__
                    unread[delivery] = f"its file in the results of the job cannot be read ({why}); check the disk"
        return parcels, unread

    def _write_down(
        self, destination: DestinationSettings, batch: Batch, parcel: Parcel, said: Said, reason: str
    ) -> None:
        delivery = parcel.delivery
        if said is Said.STORED:
            if self._deliveries.sent(batch, delivery, confirmed=not destination.commitment):
                self._tell("sent", delivery, "", sha256=parcel.sha256)
                if not destination.commitment:
                    self._tell("confirmed", delivery, "")
        elif said is Said.LATER:
            self._put_off(batch, delivery, reason)
        elif self._deliveries.never(batch, delivery, reason):
            self._tell("dead", delivery, reason)

    def _put_off(self, batch: Batch, delivery: Delivery, reason: str, *, reached: bool = True) -> None:
        state = self._deliveries.later(batch, delivery, reason, reached=reached)
        if state != "lost":
            self._tell("failed", delivery, reason)
        if state == "dead":
            self._tell("dead", delivery, reason)

    def _write_down_failure(
        self,
        destination: DestinationSettings,
        batch: Batch,
        left: Sequence[Delivery],
        reason: str,
        during: Delivery | None = None,
    ) -> None:
        dead = self._deliveries.down(batch, left, reason, during=during)
        log.warning("%s rests: %s", destination.name, reason)
        self._node.audit.record("failed", destination=destination.name, deliveries=len(left), reason=reason)
        self._tell_dead(destination, dead, reason)

    def _write_down_fault(
        self, destination: DestinationSettings, batch: Batch, left: list[Delivery], error: Exception
    ) -> bool:
        reason = f"sending broke off ({_where(error)})"
        log.error("%s: %s", destination.name, reason)
        if not left:
            return True
        delivery = left.pop(0)
        state = self._deliveries.later(batch, delivery, reason)
        if state != "lost":
            self._tell("dead" if state == "dead" else "failed", delivery, reason)
        return True

    def _tell_dead(self, destination: DestinationSettings, dead: Sequence[tuple[str, str]], reason: str) -> None:
        for job, format in dead:
            log.error("%s of job %s to %s: dead: %s", format, job, destination.name, reason)
            self._node.audit.record("dead", job=job, destination=destination.name, format=format, reason=reason)

    def _ask(self, destination: DestinationSettings, batch: Batch) -> None:
        """Asks for storage commitment of a batch."""
        left = list(batch.deliveries)
        opened, unread = self._opened(batch, left)
        parcels = {parcel.delivery: parcel for parcel in opened}
        peer = self._node.settings.peers[destination.peer or ""]
        uids = {delivery: parcel.sop_instance_uid for delivery, parcel in parcels.items()}
        for delivery, why in unread.items():
            # it was sent: like what the peer does not answer for, it is asked about again
            log.warning("%s of job %s to %s: %s", delivery.format, delivery.job_id, delivery.destination, why)
        reason = ""
        if parcels:
            try:
                reason = commitment.ask(
                    peer,
                    parcels,
                    settings=self._settings,
                    reports=self._reports,
                    written=lambda transaction: self._deliveries.asked(batch, uids, transaction),
                )
            except DestinationDownError as error:
                self._write_down_failure(destination, batch, left, str(error))
                return
        if reason:
            log.warning("%s: %s", destination.name, reason)
        wait_s = self._settings.commitment_wait_s
        dead = self._deliveries.ask_again(batch, wait_s, reason, reached=bool(parcels), unread=unread)
        unread_of = {(delivery.job_id, delivery.format): why for delivery, why in unread.items()}
        for one in dead:
            self._tell_dead(destination, [one], unread_of.get(one) or reason or "it was sent, and never confirmed")

    def _tell(self, event: str, delivery: Delivery, reason: str, **facts: str) -> None:
        self._node.audit.record(
            event,
            job=delivery.job_id,
            destination=delivery.destination,
            format=delivery.format,
            attempt=delivery.attempts + 1,
            reason=reason,
            **facts,
        )
        how = log.error if event == "dead" else log.warning if event == "failed" else log.info
        how(
            "%s of job %s to %s: %s%s",
            delivery.format,
            delivery.job_id,
            delivery.destination,
            event,
            reason and f": {reason}",
        )


def sender_to(destination: DestinationSettings, settings: NodeSettings) -> Sender:
    """The way to a destination."""
    publish = settings.publish
    if destination.peer is not None:
        return PeerSender(settings.peers[destination.peer], publish.ae_title, publish.timeout_s)
    if destination.dicomweb is not None:
        return DicomwebSender(settings.dicomweb[destination.dicomweb], publish.timeout_s)
    if destination.folder is not None:
        return FolderSender(destination.folder)
    raise ValueError(f"destination {destination.name}: no way found, expected peer, dicomweb or folder")


def _where(error: BaseException) -> str:
    """The kind of an error and its place: its text could quote what is a patient's."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
