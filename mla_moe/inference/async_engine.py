"""Async engine: the engine in a thread of its own, for clients in an event loop."""

import asyncio
import queue
import threading
import traceback
from collections.abc import AsyncIterator
from typing import NamedTuple

from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Completion, FinishReason, Request


class QueueFullError(Exception):
    """Too many requests are waiting."""


class EngineDeadError(Exception):
    """The engine failed. Its traceback is in the log."""


class RequestOutput(NamedTuple):
    """What a completion has got since its previous output."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None


class AsyncEngine:
    """Queues requests, streams their outputs, and aborts those whose client has disconnected."""

    def __init__(self, engine: Engine, max_waiting: int):
        self.engine, self.max_waiting = engine, max_waiting
        self.errored = False
        self._outputs: dict[Completion, asyncio.Queue[RequestOutput | None]] = {}  # used by the event loop alone
        self._commands: queue.SimpleQueue[tuple[str, Completion | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def num_unfinished(self) -> int:
        """Requests that are running or waiting."""
        return len(self._outputs)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        self._commands.put(("stop", None))
        self._thread.join()

    def submit(self, request: Request) -> Completion:
        """Raises `ConfigError` for what the engine cannot run, `QueueFullError` and `EngineDeadError`."""
        completion = self.engine.check(request)
        if self.errored:
            raise EngineDeadError
        if self.num_unfinished >= self.engine.max_num_seqs + self.max_waiting:
            raise QueueFullError
        self._outputs[completion] = asyncio.Queue()
        self._commands.put(("submit", completion))
        return completion

    async def stream(self, completion: Completion) -> AsyncIterator[RequestOutput]:
        """Outputs until the request has finished. Closing the iterator earlier aborts the request."""
        try:
            while True:
                output = await self._outputs[completion].get()
                if output is None:
                    raise EngineDeadError
                yield output
                if output.finish_reason:
                    return
        finally:
            self.abort(completion)

    def abort(self, completion: Completion) -> None:
        if self._outputs.pop(completion, None) is not None:
            self._commands.put(("abort", completion))

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except Exception:
            traceback.print_exc()
            self._loop.call_soon_threadsafe(self._fail)

    def _step_until_stopped(self) -> None:
        streamed: dict[Completion, tuple[int, int]] = {}  # characters and tokens
        while True:
            while not (self._commands.empty() and self.engine.has_unfinished_requests):
                command, completion = self._commands.get()
                if completion is None:
                    return
                if command == "submit":
                    self.engine.enqueue(completion)
                    streamed[completion] = 0, 0
                else:
                    self.engine.abort(completion)
                    streamed.pop(completion, None)
            for completion in self.engine.step():
                characters, count = streamed[completion]
                text, tokens, logprobs = completion.text, completion.tokens, completion.logprobs
                streamed[completion] = len(text), len(tokens)
                output = RequestOutput(text[characters:], tokens[count:], logprobs[count:], completion.finish_reason)
                self._loop.call_soon_threadsafe(self._deliver, completion, output)

    def _deliver(self, completion: Completion, output: RequestOutput) -> None:
        if completion in self._outputs:
            self._outputs[completion].put_nowait(output)

    def _fail(self) -> None:
        self.errored = True
        for outputs in self._outputs.values():
            outputs.put_nowait(None)
