"""Async engine: the engine in a thread of its own, for clients in an event loop."""

import asyncio
import contextlib
import queue
import threading
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from mla_moe.config import require
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Completion, FinishReason

MAX_QUEUE_RATIO = 7
"""While the queue has capacity for `free` more requests, a client has at most `MAX_QUEUE_RATIO * (free + 1)`: alone it
can have 7/8 of the capacity."""


class QueueFullError(Exception):
    """Too many requests are running or waiting, of all clients or of one."""


class EngineDeadError(Exception):
    """The engine failed. Its traceback is in the log."""


class DecodeError(Exception):
    """The tokenizer failed to decode a completion. Its error is in the log."""


class RequestOutput(NamedTuple):
    """What a completion has got since its previous output."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None


class AsyncEngine:
    """Queues requests, streams their outputs, and aborts those whose client has disconnected."""

    def __init__(
        self,
        engine: Engine,
        max_waiting: int,
        max_requests_per_client: int | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ):
        self.engine, self._capacity, self._on_failure = engine, engine.max_num_seqs + max_waiting, on_failure
        # By the rule of `submit`.
        alone = max(engine.max_num_seqs, MAX_QUEUE_RATIO * (self._capacity + 1) // (MAX_QUEUE_RATIO + 1))
        self._max_requests_per_client = min(alone, max_requests_per_client or alone)
        self._error = ""
        self._requests_of: Counter[str] = Counter()  # by client
        self._outputs: dict[Completion, asyncio.Queue[RequestOutput | None]] = {}  # used by the event loop alone
        self._commands: queue.SimpleQueue[tuple[Callable[[Completion], None], Completion] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def num_unfinished(self) -> int:
        """Requests that are running or waiting."""
        return len(self._outputs)

    @property
    def error(self) -> str:
        """Why the engine is dead, or empty while it runs."""
        is_alive = self._thread.is_alive() or self._thread.ident is None  # before its start it is healthy too
        return self._error or ("" if is_alive else "the engine has stopped")

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        self._commands.put(None)
        self._thread.join()

    def submit(self, completions: Sequence[Completion]) -> None:
        """Queue what `Engine.check` has returned, all for one client, or nothing. Raises `QueueFullError`,
        `EngineDeadError`, and `ConfigError` for more than a client may ever have."""
        if self.error:
            raise EngineDeadError
        client, count, most = completions[0].owner.client, len(completions), self._max_requests_per_client
        fix = f"at most {most} choices (n times the number of prompts) of one client run or wait: send fewer at a time"
        require(count <= most, "n", count, fix)
        total = self._requests_of[client] + count
        if total > most:
            raise QueueFullError(f"at most {most} choices of one client run or wait at the same time; try again later")
        free = self._capacity - self.num_unfinished - count
        if free < 0 or total > max(self.engine.max_num_seqs, MAX_QUEUE_RATIO * (free + 1)):
            raise QueueFullError("too many requests are waiting; try again later")
        self._requests_of[client] = total
        for completion in completions:
            self._outputs[completion] = asyncio.Queue()
            self._commands.put((self.engine.enqueue, completion))

    async def stream(self, completion: Completion) -> AsyncIterator[RequestOutput]:
        """Outputs until the request has finished. Closing the iterator earlier aborts the request. Raises
        `EngineDeadError` and `DecodeError`."""
        try:
            while True:
                output = await self._outputs[completion].get()
                if output is None:
                    raise EngineDeadError
                if output.finish_reason == "error":
                    raise DecodeError
                yield output
                if output.finish_reason:
                    return
        finally:
            self.abort(completion)

    def abort(self, completion: Completion) -> None:
        if self._outputs.pop(completion, None) is not None:
            self._requests_of -= Counter([completion.owner.client])  # drops clients without requests
            self._commands.put((self.engine.abort, completion))

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except BaseException:  # a panic of a tokenizer's Rust code is no Exception
            traceback.print_exc()
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._fail)

    def _step_until_stopped(self) -> None:
        streamed: dict[Completion, tuple[int, int]] = {}  # characters and tokens
        while True:
            while not (self._commands.empty() and self.engine.has_unfinished_requests):
                command = self._commands.get()
                if command is None:
                    return
                action, completion = command
                action(completion)
                streamed.pop(completion, None)
            for completion in self.engine.step():
                characters, count = streamed.get(completion, (0, 0))
                text, tokens, logprobs = completion.text, completion.tokens, completion.logprobs
                streamed[completion] = len(text), len(tokens)
                output = RequestOutput(text[characters:], tokens[count:], logprobs[count:], completion.finish_reason)
                self._loop.call_soon_threadsafe(self._deliver, completion, output)

    def _deliver(self, completion: Completion, output: RequestOutput) -> None:
        if completion in self._outputs:
            self._outputs[completion].put_nowait(output)

    def _fail(self) -> None:
        self._error = "the engine failed; see the server's log"
        for outputs in self._outputs.values():
            outputs.put_nowait(None)
        self._on_failure()
