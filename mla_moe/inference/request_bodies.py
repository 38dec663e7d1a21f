"""Request bodies: read within limits of size, time and memory, and parsed and encoded outside the event loop.

One client has one body at a time in the threads, so that clients take turns; and long bodies have a thread of their
own, so that short ones need not wait until they are parsed. Both threads call the one worker process for tokenizers: a
short body may wait there for the prompts of a long one, at most about `ENCODE_TIMEOUT`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest

MAX_BODY = 4 << 20
"""Bytes."""
LONG_BODY = 64 << 10
"""Bytes; a longer body counts towards `MAX_LONG_BODIES`."""
MAX_LONG_BODIES = 64 << 20
"""Bytes of all long bodies that are being received or wait for the thread; of one client, at most a quarter."""
BODY_TIMEOUT = 30.0
"""Seconds in which a body must arrive."""
ENCODE_TIMEOUT = 10.0
"""Seconds of encoding after which no further prompt of a body is begun; each may take as long as `text.isolated` lets
it."""
T = TypeVar("T")


class BodyTooLargeError(Exception):
    """A body has more than `MAX_BODY` bytes."""


class BodyTimeoutError(Exception):
    """A body has not arrived within `BODY_TIMEOUT`."""


class BusyError(Exception):
    """Long bodies fill `MAX_LONG_BODIES`, or the client's part of it."""


class RequestBodies:
    """Reads bodies, and calls functions with them in threads. Used by one event loop."""

    def __init__(self) -> None:
        self._short, self._long = (ThreadPoolExecutor(1, f"{length} bodies") for length in ("short", "long"))
        self._turns: WeakValueDictionary[tuple[str, bool], asyncio.Lock] = WeakValueDictionary()
        self._long_bytes: Counter[str] = Counter()  # by client

    def close(self) -> None:
        for executor in (self._short, self._long):
            executor.shutdown(wait=False, cancel_futures=True)

    async def parse(self, http: HTTPRequest, client: str, parse: Callable[[bytearray], T]) -> T:
        """Read a request's body and return `parse(body)`. Raises `BodyTooLargeError`, `BodyTimeoutError`, `BusyError`,
        `ClientDisconnect` and what `parse` raises."""
        content = bytearray()
        try:
            await self._read(http, client, content)
            is_long = len(content) > LONG_BODY
            turn = self._turns.setdefault((client, is_long), asyncio.Lock())
            async with turn:
                if await http.is_disconnected():
                    raise ClientDisconnect
                executor = self._long if is_long else self._short
                return await asyncio.get_running_loop().run_in_executor(executor, parse, content)
        finally:
            self._long_bytes -= Counter({client: _long(len(content))})  # drops clients without long bodies

    async def _read(self, http: HTTPRequest, client: str, content: bytearray) -> None:
        declared = http.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > MAX_BODY:
            raise BodyTooLargeError
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                async for chunk in http.stream():
                    after = len(content) + len(chunk)
                    if after > MAX_BODY:
                        raise BodyTooLargeError
                    more = _long(after) - _long(len(content))
                    free = MAX_LONG_BODIES - self._long_bytes.total(), MAX_LONG_BODIES // 4 - self._long_bytes[client]
                    if more > min(free):
                        raise BusyError
                    self._long_bytes[client] += more
                    content += chunk
        except TimeoutError:
            raise BodyTimeoutError from None


def _long(length: int) -> int:
    """The bytes of a body that count towards `MAX_LONG_BODIES`."""
    return length if length > LONG_BODY else 0
