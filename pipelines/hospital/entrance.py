"""Connections before their association: one thread holds them until the request is whole, or their time is up.

A library that spends threads on every connection is given only those that have said who they are and may come in.
"""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

log = logging.getLogger(__name__)

# so many connections may be about to ask; where one more comes, the one that has waited longest is closed
MOST_PENDING = 200
# of an association request: 128 presentation contexts of 40 transfer syntaxes each are 170 kB
MOST_REQUEST = 2**18
LOOK_S = 0.2
# so many new ones are taken before the others are looked at again
AT_ONCE = 32
_HEAD = 6
_REQUEST = 1
# PS3.8 9.3.2: where the AE titles stand in the request
_CALLED, _CALLING, _FIXED = slice(10, 26), slice(26, 42), 74


class Verdict(Enum):
    """What becomes of a request: result, source and reason of PS3.8 9.3.4."""

    WELCOME = (0, 0, 0)
    CALLING_UNKNOWN = (1, 1, 3)
    CALLED_UNKNOWN = (1, 1, 7)
    FULL = (2, 3, 2)


@dataclass(frozen=True)
class Request:
    """A connection that asks for an association. `first`: what has been read of it, no byte more than the request."""

    connection: socket.socket
    address: tuple[Any, ...]
    first: bytes
    called: str
    calling: str


@dataclass
class _Pending:
    connection: socket.socket
    address: tuple[Any, ...]
    deadline: float
    read: bytearray = field(default_factory=bytearray)
    is_secure: bool = False
    # has heard that it is not welcome; the peer is to close (PS3.8 9.2.2), else the answer might be lost
    is_leaving: bool = False


class Entrance:
    """Takes the connections of a listening socket.

    `knows`: whether an address may connect at all. `judge`: whether a request is welcome; it is then given to `admit`,
    which owns the connection from then on. `refused` hears of the reason for each other one.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        tls: ssl.SSLContext | None,
        handshake_s: float,
        knows: Callable[[str], bool],
        judge: Callable[[Request], Verdict],
        admit: Callable[[Request], None],
        refused: Callable[[str], None],
    ) -> None:
        self._listener, self._tls, self._handshake_s = listener, tls, handshake_s
        self._knows, self._judge, self._admit, self._refused = knows, judge, admit, refused
        self._pending: dict[int, _Pending] = {}
        self._selector = selectors.DefaultSelector()

    def serve(self, stop: threading.Event) -> None:
        """Lets in whoever comes, until `stop`."""
        self._listener.setblocking(False)
        with self._selector as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not stop.is_set():
                for key, _ in selector.select(LOOK_S):
                    if key.fileobj is self._listener:
                        for _ in range(AT_ONCE):
                            if not self._accept():
                                break
                    elif (pending := self._pending.get(key.fd)) is not None:
                        self._go_on(pending)
                now = time.monotonic()
                for pending in [p for p in self._pending.values() if p.deadline < now]:
                    self._close(pending, "no association request came in time")
            for pending in list(self._pending.values()):
                self._close(pending, "the gateway ends")

    def _accept(self) -> bool:
        """Takes one connection; False where none waits."""
        try:
            connection, address = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            # gone again, or no more files may be open
            log.warning("a connection cannot be taken (%s)", error.strerror)
            self._make_place(0)
            return False
        if not self._knows(str(address[0])):
            self._refused(f"{address[0]}: no address that may connect")
            connection.close()
            return True
        try:
            connection = self._prepared(connection)
        except OSError as error:
            self._refused(f"{address[0]}: broken off ({error.strerror})")
            connection.close()
            return True
        self._make_place(MOST_PENDING - 1)
        pending = _Pending(connection, address, time.monotonic() + self._handshake_s, is_secure=self._tls is None)
        self._pending[connection.fileno()] = pending
        self._selector.register(connection, selectors.EVENT_READ)
        return True

    def _prepared(self, connection: socket.socket) -> socket.socket:
        connection.setblocking(False)
        # answers are small, and a peer waits for each
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._tls is None:
            return connection
        return self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def _make_place(self, most: int) -> None:
        oldest = next(iter(self._pending.values()), None)
        if oldest is not None and len(self._pending) > most:
            self._close(oldest, "another connection needs its place")

    def _go_on(self, pending: _Pending) -> None:
        if pending.is_leaving:
            self._see_off(pending)
            return
        try:
            self._shake_hands(pending)
            while (missing := _missing(pending.read)) > 0:
                part = pending.connection.recv(missing)
                if not part:
                    self._ended(pending)
                    return
                pending.read += part
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except ssl.SSLWantWriteError:
            # what we answer in a handshake always fits into an empty buffer, but for peers that never read
            return
        except ssl.SSLError as error:
            self._close(pending, f"no TLS ({error.reason or type(error).__name__})")
            return
        except ValueError as error:
            self._close(pending, str(error))
            return
        except OSError as error:
            self._close(pending, f"broken off ({error.strerror or type(error).__name__})")
            return
        self._decide(pending)

    def _ended(self, pending: _Pending) -> None:
        if pending.read:
            self._close(pending, "closed before an association request was whole")
            return
        # who only looks whether the port is open
        self._forget(pending)
        pending.connection.close()

    def _shake_hands(self, pending: _Pending) -> None:
        if not pending.is_secure and isinstance(pending.connection, ssl.SSLSocket):
            pending.connection.do_handshake()
            pending.is_secure = True

    def _decide(self, pending: _Pending) -> None:
        first = bytes(pending.read)
        called, calling = (first[part].decode("ascii", "replace").strip(" ") for part in (_CALLED, _CALLING))
        request = Request(pending.connection, pending.address, first, called, calling)
        verdict = self._judge(request)
        if verdict is not Verdict.WELCOME:
            self._refused(f"{pending.address[0]}: {verdict.name.replace('_', ' ').lower()}")
            pending.is_leaving = True
            try:
                pending.connection.send(bytes((3, 0, 0, 0, 0, 4, 0, *verdict.value)))
            except OSError as error:
                self._close(pending, f"a refusal did not arrive ({error.strerror})")
            return
        self._forget(pending)
        self._admit(request)

    def _see_off(self, pending: _Pending) -> None:
        try:
            is_gone = not pending.connection.recv(MOST_REQUEST)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError:
            is_gone = True
        if is_gone:
            self._close(pending, "it has gone")

    def _forget(self, pending: _Pending) -> None:
        del self._pending[pending.connection.fileno()]
        self._selector.unregister(pending.connection)

    def _close(self, pending: _Pending, why: str) -> None:
        self._forget(pending)
        pending.connection.close()
        if not pending.is_leaving:
            self._refused(f"{pending.address[0]}: {why}")


def _missing(read: bytearray) -> int:
    """How many bytes of the request are still to come, as far as that is known. Raises `ValueError` for no request."""
    if read and read[0] != _REQUEST:
        raise ValueError("something that is no association request")
    if len(read) < _HEAD:
        return _HEAD - len(read)
    length = int.from_bytes(read[2:_HEAD], "big")
    if not _FIXED - _HEAD <= length <= MOST_REQUEST:
        raise ValueError(f"an association request of {length} bytes")
    return _HEAD + length - len(read)
