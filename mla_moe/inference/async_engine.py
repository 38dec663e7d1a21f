"""The engine in a thread of its own, for clients in an event loop."""

import asyncio
import queue
import threading
import traceback
from collections.abc import AsyncIterator
from typing import NamedTuple

from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Completion, FinishReason, Request


class QueueFullError(Exception):
    """As many requests are waiting as may."""


class EngineDeadError(Exception):
    """The engine failed. Its traceback is in the log."""


class RequestOutput(NamedTuple):
    """What is new in a completion, and how far it is."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish: FinishReason | None


class AsyncEngine:
    """Takes requests, passes their news on, and gives up those that nobody waits for any more."""

    def __init__(self, engine: Engine, max_waiting: int):
        self.engine, self.max_waiting = engine, max_waiting
        self.broken = False
        self._open: dict[Completion, asyncio.Queue[RequestOutput | None]] = {}  # touched by the event loop alone
        self._orders: queue.SimpleQueue[tuple[str, Completion | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def open(self) -> int:
        """Requests that are running or waiting."""
        return len(self._open)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        self._orders.put(("stop", None))
        self._thread.join()

    def submit(self, request: Request) -> Completion:
        """Raises `ConfigError` for what the engine cannot serve, and `Busy` when too many wait."""
        completion = self.engine.check(request)
        if self.broken:
            raise EngineDeadError
        if self.open >= self.engine.slots + self.max_waiting:
            raise QueueFullError
        self._open[completion] = asyncio.Queue()
        self._orders.put(("submit", completion))
        return completion

    async def news(self, completion: Completion) -> AsyncIterator[RequestOutput]:
        """Until it is finished. Whoever stops listening early cancels it."""
        try:
            while True:
                news = await self._open[completion].get()
                if news is None:
                    raise EngineDeadError
                yield news
                if news.finish:
                    return
        finally:
            self.cancel(completion)

    def cancel(self, completion: Completion) -> None:
        if self._open.pop(completion, None) is not None:
            self._orders.put(("cancel", completion))

    def _work(self) -> None:
        try:
            self._serve()
        except Exception:
            traceback.print_exc()
            self._loop.call_soon_threadsafe(self._break)

    def _serve(self) -> None:
        told: dict[Completion, tuple[int, int]] = {}  # characters and tokens
        while True:
            while not (self._orders.empty() and self.engine.busy):
                order, completion = self._orders.get()
                if completion is None:
                    return
                if order == "submit":
                    self.engine.waiting.append(completion)
                    told[completion] = 0, 0
                else:
                    self.engine.cancel(completion)
                    told.pop(completion, None)
            for completion in self.engine.step():
                characters, count = told[completion]
                text = completion.text.text if completion.text else ""
                new = slice(count, None)
                news = RequestOutput(
                    text[characters:], completion.tokens[new], completion.logprobs[new], completion.finish
                )
                told[completion] = len(text), len(completion.tokens)
                self._loop.call_soon_threadsafe(self._tell, completion, news)

    def _tell(self, completion: Completion, news: RequestOutput) -> None:
        if completion in self._open:
            self._open[completion].put_nowait(news)

    def _break(self) -> None:
        self.broken = True
        for waiting in self._open.values():
            waiting.put_nowait(None)
