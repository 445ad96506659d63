"""What holds for every answer of the pages: strict headers, small and quick requests, errors that tell nothing."""

from __future__ import annotations

import asyncio
import logging
import traceback

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

# forms hold a name, a password or a few words
MOST_BODY_BYTES = 2**16
# so long a request may take to be there, looked at so often meanwhile
REQUEST_S, LOOKS = 20.0, 4
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """Around the application. `sorry`: the page for an error that nobody foresaw."""

    def __init__(self, app: ASGIApp, *, over_tls: bool, sorry: bytes) -> None:
        self._app, self._sorry = app, sorry
        self._headers = HEADERS | ({"Strict-Transport-Security": "max-age=31536000"} if over_tls else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        begun = False

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers.update(self._headers)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        held = 0

        async def counted() -> Message:
            nonlocal held
            message = await receive()
            held += len(message.get("body", b""))
            if held > MOST_BODY_BYTES:
                raise _TooMuchError
            return message

        try:
            if not length.isdecimal() or int(length) > MOST_BODY_BYTES:
                raise _TooMuchError
            await self._app(scope, counted, guarded)
        except _TooMuchError:
            await _answer(guarded, 413, b"Too much.", "text/plain")
        except Exception as error:  # noqa: BLE001
            # its text may hold anything, a patient's name too; where it came from does not
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("an answer failed: %s\n%s", type(error).__name__, where)
            if begun:
                raise ConnectionAbortedError("an answer broke off") from None
            await _answer(guarded, 500, self._sorry, "text/html; charset=utf-8")


class Impatient(H11Protocol):
    """A connection that is closed where its peer takes longer than `REQUEST_S` to say what it wants, or to read on.

    The server knows no such limit, and a few hundred peers that never finish would keep all others out. Where there are
    as many as it serves, the one that has said nothing for longest makes place.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As of every connection; and the watch begins."""
        super().connection_made(transport)
        self._waits = self._unsent = 0
        self._since = self.loop.time()
        self._next_look = self.loop.call_later(REQUEST_S / LOOKS, self._look)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            silent = [c for c in self.connections if c is not self and isinstance(c, Impatient) and c._is_unfinished()]
            if silent:
                longest = min(silent, key=lambda c: c._since)
                longest.transport.abort()
                # that it is lost is told later, and until then more may come
                self.connections.discard(longest)

    def connection_lost(self, exc: Exception | None) -> None:
        """As of every connection; and the watch ends."""
        self._next_look.cancel()
        super().connection_lost(exc)

    def _is_unfinished(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _look(self) -> None:
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        is_stuck = self._unsent > 0 and self._unsent == before
        self._waits = self._waits + 1 if is_stuck or self._is_unfinished() else 0
        if self._waits >= LOOKS:
            # to close it politely would be to wait until all is read
            self.transport.abort()
        else:
            self._next_look = self.loop.call_later(REQUEST_S / LOOKS, self._look)


class _TooMuchError(Exception):
    """A request is larger than any form of ours."""


async def _answer(send: Send, status: int, body: bytes, kind: str) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
