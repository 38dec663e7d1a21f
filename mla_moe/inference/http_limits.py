"""Limits on connections: uvicorn's HTTP protocol with deadlines and a bounded number of connections.

uvicorn limits the time between two requests only: a client that sends half a request, or does not read its response,
keeps its connection. Here a connection has `HEADER_TIMEOUT` for the head of each request and `WRITE_TIMEOUT` to take
what is sent; `request_bodies` limits the time for the body, `openai_server` that for the response.

When there are too many connections, the oldest that has not sent a complete request is closed, so that a new client
gets in. If all have, the new one is refused: it gets 503 for everything but `/health`.
"""

import asyncio
import json
import resource
import time
from collections import Counter
from typing import Any

import h11
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mla_moe.inference.access import network_of
from mla_moe.inference.openai_api import error_body

HEADER_TIMEOUT = 10.0
"""Seconds in which the head of a request must arrive, after the connection or the response before."""
WRITE_TIMEOUT = 30.0
"""Seconds in which a client must take `MIN_READ` bytes of its response, or what is left of it."""
MIN_READ = 32 << 10
CHECK_INTERVAL = 1.0
MAX_CONNECTIONS = 1024
_RESERVED_FILES = 64
"""File descriptors for other things than connections, and for `MAX_REFUSED`."""
MAX_REFUSED = 32
"""Connections that are one too many, and wait for their status 503. If there are more, the oldest is closed."""


def max_connections() -> int:
    """`MAX_CONNECTIONS`, or less where the process may not open so many files."""
    return max(2, min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _RESERVED_FILES))


class LimitedProtocol(H11Protocol):
    """One connection. What is closed or refused is counted by reason, in `closed` of the application's state."""

    connections: set["LimitedProtocol"]

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._network = network_of(self.client[0]) if self.client else ""
        self._opened = time.monotonic()  # a loop may have one time for many connections
        self._idle_since = self._reading_since = self.loop.time()
        self._unsent, self._is_refused = 0, False
        self.app = _until_shutdown(self.app)
        self._make_room()
        self._check_later = self.loop.call_later(CHECK_INTERVAL, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        self._check_later.cancel()
        super().connection_lost(exc)

    @property
    def _is_responding(self) -> bool:
        """Whether a request's head has arrived, and its response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete and not self.transport.is_closing()

    @property
    def _may_be_closed(self) -> bool:
        """Whether nothing is lost that a client waits for, or it does not read it."""
        is_sending = self.transport.get_write_buffer_size() > 0
        return self.flow.write_paused or not (is_sending or (self._is_responding and not self.cycle.more_body))

    def _make_room(self) -> None:
        """If there are too many connections, close the oldest that may be closed, of the network that has the most of
        them; a network that is full makes room itself. If there is none, refuse this one."""
        admitted, limit = [c for c in self.connections if not c._is_refused], max_connections()
        count = Counter(c._network for c in admitted)
        is_full = count[self._network] > limit // 2  # a network has at most half
        if len(admitted) <= limit and not is_full:
            return
        others = [c for c in admitted if c is not self and c._may_be_closed]
        others = [c for c in others if not is_full or c._network == self._network]
        if others:
            min(others, key=lambda c: (-count[c._network], c._opened))._close("replaced")
            return
        self._count("refused")
        self._is_refused, self.app = True, _busy(self.app)
        refused = [c for c in self.connections if c._is_refused]
        if len(refused) > MAX_REFUSED:
            min(refused, key=lambda c: c._opened)._close("replaced")

    def _check(self) -> None:
        """Close the connection if it sends no request, or does not read its response."""
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if self._is_responding or unsent:
            self._idle_since = now
        # While the buffer is below its limit a response may grow faster than it is read; then nothing is written.
        if unsent <= max(0, self._unsent - MIN_READ) or (self._is_responding and not self.flow.write_paused):
            self._unsent, self._reading_since = unsent, now
        self._unsent = max(self._unsent, unsent)
        if now - self._idle_since > HEADER_TIMEOUT:
            self._close("header_timeout")
        elif now - self._reading_since > WRITE_TIMEOUT:
            self._close("write_timeout")
        else:
            self._check_later = self.loop.call_later(CHECK_INTERVAL, self._check)

    def _close(self, reason: str) -> None:
        self._count(reason)
        self.connections.discard(self)  # the transport tells of its end later
        self.transport.abort()

    def _count(self, reason: str) -> None:
        closed: Counter[str] = self.app_state.setdefault("closed", Counter())
        closed[reason] += 1
        if closed[reason] == 1:
            self.logger.warning("a connection was closed or refused: %s. /health counts more of them", reason)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets an error in OpenAI's format, unless a response has begun."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(msg, "invalid_request_error")).encode()
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()


def _until_shutdown(app: Any) -> ASGIApp:
    """The application, with a response to what a shutdown cancels: the server would log a traceback of each request."""

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await app(scope, receive, note)
        except asyncio.CancelledError:
            if not has_begun:
                body = error_body("the server is shutting down", "server_error")
                await JSONResponse(body, status_code=503)(scope, receive, send)

    return respond


def _busy(app: Any) -> ASGIApp:
    """The application of a connection that is one too many."""

    async def respond(scope: Scope, receive: Receive, send: Send) -> Any:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        if scope["path"] == "/health":
            return await app(scope, receive, send_and_close)
        body = error_body("all connections are in use; try again later", "server_error")
        headers = {"Connection": "close", "Retry-After": "1"}
        return await JSONResponse(body, status_code=503, headers=headers)(scope, receive, send)

    return respond
