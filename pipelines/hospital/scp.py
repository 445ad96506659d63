"""pynetdicom's acceptor with bounds: of a PDU, a message, what waits, and the time that either may take.

What it does with a received file is the gateway's; who may connect is decided before, at the entrance.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import N_EVENT_REPORT_RQ, DIMSEMessage
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationServer, AssociationSocket, RequestHandler

from medseg_pipelines.hospital.dimse import MAXIMUM_PDU
from medseg_pipelines.hospital.entrance import MOST_REQUEST, Request

log = logging.getLogger(__name__)

# of a message that is no file: its command, and what a report may hold. Commands have some hundred bytes; pydicom takes
# ten seconds and 85 MB for a megabyte of empty items in one
MOST_SMALL = 2**16
# nobody is offered to send before the last message is answered
MOST_WAITING = 2
# reports begin a thread each at once: so many on one association are a flood
MOST_REPORTS = 256
# so often the disk is asked for its room while a file comes
ROOM_EVERY = 2**26
# so long what is being done may go on at the end
END_S = 15.0


@dataclass(frozen=True)
class Bounds:
    """What a peer may ask of this node. `has_room`: whether the disk can hold so many bytes more."""

    most_bytes: int
    idle_s: float
    has_room: Callable[[int], bool]


class Wire(AssociationSocket):
    """A connection whose first bytes have been read already; no PDU is longer, or longer on its way, than agreed."""

    def __init__(self, association: Association, connection: socket.socket, first: bytes, bounds: Bounds) -> None:
        super().__init__(association, client_socket=connection)
        self._first, self._idle_s = bytearray(first), bounds.idle_s
        connection.settimeout(bounds.idle_s)

    @property
    def ready(self) -> bool:
        """Whether there is something to read."""
        return bool(self._first) or super().ready

    def recv(self, nr_bytes: int) -> bytearray:
        """So many bytes, or fewer where the connection ends. Raises `OSError` beyond the bounds."""
        if nr_bytes > max(MAXIMUM_PDU, MOST_REQUEST):
            raise OSError(f"a PDU of {nr_bytes} bytes")
        read, self._first = self._first[:nr_bytes], self._first[nr_bytes:]
        connection = self.socket
        if connection is None:
            return read
        deadline = time.monotonic() + self._idle_s
        while len(read) < nr_bytes:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = connection.recv(nr_bytes - len(read))
            if not part:
                break
            read += part
        connection.settimeout(self._idle_s)
        return read


class Messages(DIMSEServiceProvider):
    """The messages of an association; what breaks a bound, or cannot be understood, ends it.

    `dropped`: files that were not written to the end, because the disk had no room. `unfit`: why the association was
    ended here; empty where it was not.
    """

    def __init__(self, association: Association, bounds: Bounds) -> None:
        super().__init__(association)
        self._bounds = bounds
        self._command = self._data = self._asked_at = self._reports = 0
        self._is_commanded = False
        self._files: set[Path] = set()
        self.msg_queue = _Noting(self._files)
        self.dropped: set[Path] = set()
        self.unfit = ""

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Adds a part to the message that is being received."""
        if self.unfit:
            return
        # the base class forgets a message once it is whole
        message = self.message or DIMSEMessage()
        try:
            self._check(primitive)
            self.message = message
            super().receive_primitive(primitive)
        except _BoundError as error:
            self.end(str(error))
        except Exception as error:  # noqa: BLE001
            # whatever a peer sends: pynetdicom and pydicom have no common class for what they cannot read
            self._note(message)
            self.end(f"a message that cannot be read ({type(error).__name__})")
        else:
            self._watch(message)
            self._reports += isinstance(message, N_EVENT_REPORT_RQ)
            if self._reports > MOST_REPORTS:
                self.end(f"more than {MOST_REPORTS} reports")

    def end(self, why: str) -> None:
        """The association is aborted, as after a PDU that nobody understands."""
        self.unfit = why
        log.warning("association of %s is ended: %s", self.assoc.requestor.ae_title, why)
        self.dul.event_queue.put("Evt19")

    def took(self, path: Path) -> None:
        """A file that is another's to care for now."""
        self._files.discard(path)
        self.dropped.discard(path)

    def tidy(self) -> None:
        """Removes what was received and can no longer be taken: the association is over."""
        if self.message is not None and self.message._data_set_file is not None:
            self.message._data_set_file.close()
        for path in self._files:
            path.unlink(missing_ok=True)
        self._files.clear()

    def _check(self, primitive: P_DATA) -> None:
        if self.message is None:
            self._command = self._data = self._asked_at = 0
            self._is_commanded = False
            if self.msg_queue.qsize() >= MOST_WAITING:
                raise _BoundError("too many messages before an answer")
        packed = False
        for _, data in primitive.presentation_data_value_list:
            # PS3.8 E.2: bit 0, a command; bit 1, its end
            if data[0] & 1:
                if self._is_commanded:
                    raise _BoundError("a second command in a message")
                packed, self._is_commanded = True, bool(data[0] & 2)
                self._command += len(data)
            else:
                self._data += len(data)
        if self._command > MOST_SMALL:
            raise _BoundError(f"a message of more than {MOST_SMALL} bytes")
        is_file = self.message is not None and self.message._data_set_file is not None
        # what comes together with its command may be the beginning of a file
        most = self._bounds.most_bytes if is_file else MAXIMUM_PDU if packed else MOST_SMALL
        if self._data > most:
            raise _BoundError(f"a message of more than {most} bytes")

    def _note(self, message: DIMSEMessage) -> None:
        if message._data_set_path is not None:
            self._files.add(Path(str(message._data_set_path)))

    def _watch(self, message: DIMSEMessage) -> None:
        """Looks after a file of which more is to come."""
        if message._data_set_file is None or message._data_set_path is None:
            return
        path = Path(str(message._data_set_path))
        is_new = path not in self._files
        self._note(message)
        if path in self.dropped or (not is_new and self._data - self._asked_at < ROOM_EVERY):
            return
        self._asked_at = self._data
        if not self._bounds.has_room(0):
            self.dropped.add(path)
            message._data_set_file.close()
            path.unlink(missing_ok=True)
            message._data_set_file = _Nowhere(path)  # type: ignore[assignment]


class _Noting(queue.Queue[Any]):
    """Messages that are whole; the files of those that nobody serves must be known, too."""

    def __init__(self, files: set[Path]) -> None:
        super().__init__()
        self._files = files

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if path := getattr(item[1], "_dataset_path", None):
            self._files.add(Path(path))
        super().put(item, block, timeout)


class _BoundError(Exception):
    """A peer goes beyond what it may ask for."""


class _Nowhere:
    """In place of a file that the disk has no room for: its sender is told once all of it has come."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.file = self

    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        return

    def close(self) -> None:
        return


class Acceptor(AssociationServer):
    """Associations of those that the entrance lets in."""

    # connections that the entrance has not seen yet: beyond these, a peer waits for a second and more
    request_queue_size = 128

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # the signature is that which AE.make_server calls
        super().__init__(*arguments, **options)
        self._running: list[Association] = []
        self._lock = threading.Lock()
        self.bounds = Bounds(0, 0.0, lambda _: False)

    @property
    def listener(self) -> socket.socket:
        """The socket that connections come to."""
        if self.socket is None:
            raise OSError("the port is closed")
        return self.socket

    def admit(self, request: Request) -> None:
        """Begins an association in threads of its own."""
        _Handler(request, self)

    def count(self) -> int:
        """How many associations there are."""
        with self._lock:
            return sum(association.is_alive() for association in self._running)

    def collect(self) -> list[Association]:
        """Those that are over since the last time; what was left of them is removed."""
        with self._lock:
            over = [a for a in self._running if not a.is_alive()]
            self._running = [a for a in self._running if a.is_alive()]
        for association in over:
            messages_of(association).tidy()
        return over

    def end(self) -> None:
        """Breaks all associations off; a file that has come whole is still taken."""
        with self._lock:
            running = list(self._running)
        for association in running:
            wire = association.dul.socket
            if wire is not None and wire.socket is not None:
                # whoever reads from it stops waiting
                wire._shutdown_socket()
        deadline = time.monotonic() + END_S
        for association in running:
            association.join(max(deadline - time.monotonic(), 0.0))
        self.collect()

    def begun(self, association: Association) -> None:
        """An association whose thread runs."""
        with self._lock:
            self._running.append(association)


class _Handler(RequestHandler):
    def __init__(self, request: Request, server: Acceptor) -> None:
        self._asked, self._acceptor = request, server
        super().__init__(request.connection, request.address, server)

    def handle(self) -> None:
        super().handle()
        self._acceptor.begun(self._made)

    def _create_association(self) -> Association:
        association = super()._create_association()
        # a wire for the one made there, which has told the state machine of the new connection already
        association.dul.event_queue.get_nowait()
        association.dul.socket = Wire(association, self.request, self._asked.first, self._acceptor.bounds)
        association.dimse = Messages(association, self._acceptor.bounds)
        self._made = association
        return association


def messages_of(association: Association) -> Messages:
    """The messages of an association that an `Acceptor` made."""
    if not isinstance(association.dimse, Messages):
        raise TypeError(f"{type(association.dimse).__name__} found, expected Messages")
    return association.dimse


def make_acceptor(
    ae: AE, address: tuple[str, int], contexts: Sequence[Any], handlers: Sequence[Any], bounds: Bounds
) -> Acceptor:
    """An acceptor that listens at `address`. Raises `OSError` where it cannot."""
    made = ae.make_server(address, contexts=list(contexts), evt_handlers=list(handlers), server_class=Acceptor)
    if not isinstance(made, Acceptor):
        raise TypeError(f"{type(made).__name__} found, expected Acceptor")
    made.bounds = bounds
    return made
