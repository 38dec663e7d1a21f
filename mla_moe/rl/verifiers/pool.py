"""Judging in processes of its own, so that a verifier that raises, hangs or dies costs one completion and no more."""

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mla_moe.config import ConfigError
from mla_moe.rl.verifiers import worker
from mla_moe.rl.verifiers.worker import Example, VerifierSpec

_START_SECONDS = 120.0  # imports from a slow disk, on a busy machine

FailureKind = Literal["raised", "hung", "not_finite", "died"]


class VerifierFailure(NamedTuple):
    """Why a completion could not be judged."""

    kind: FailureKind
    text: str
    """What happened, in words."""


class VerifierCall(NamedTuple):
    """One judge, and what it is asked."""

    judge: str
    texts: tuple[str, ...]
    example: Example


class VerifierPool:
    """A pool of worker processes that each hold all `judges`, under the names of the recipe's fields they come from.

    Raises `ConfigError` on such a field where its judge cannot be loaded. A worker is a fresh interpreter without JAX;
    one that hangs or dies is replaced. Workers end with `close`, with the interpreter, and when the parent is killed.
    """

    def __init__(self, judges: Mapping[str, VerifierSpec], timeout: float, workers: int | None = None):
        """`timeout`: seconds that a call may take. `workers`: half of the processors by default, from 2 to 8."""
        self._judges, self._timeout = dict(judges), timeout
        count = workers or min(8, max(2, (os.cpu_count() or 1) // 2))
        self._workers = [_Worker(self._judges) for _ in range(count)]
        self._finalize = weakref.finalize(self, _end, self._workers)
        first = self._workers[0]
        while (reply := first.reply()) is None:
            first.wait()
        kind, content = reply
        if kind != "ready":
            self.close()
            field, why = content if kind == "unable" else (next(iter(judges)), f"the process {kind}, {content}")
            raise ConfigError(field, self._judges[field][-1], f"cannot be loaded: {why}")
        first.ready = True

    def __call__(self, calls: Sequence[VerifierCall]) -> list[float | VerifierFailure]:
        """The judges' values, finite, in the order of `calls`, which are made in parallel."""
        results: dict[int, float | VerifierFailure] = {}
        queue = collections.deque(range(len(calls)))
        while len(results) < len(calls):
            for worker in self._workers:
                if queue and worker.ready and worker.call is None:
                    worker.call = queue.popleft()
                    worker.give(calls[worker.call], self._timeout)
            busy = [worker for worker in self._workers if not worker.ready or worker.call is not None]
            wait([worker.channel for worker in busy], min(worker.seconds_left for worker in busy))
            for worker in busy:
                if (reply := worker.reply()) is None:
                    continue
                kind, content = reply
                index, worker.call, worker.ready = worker.call, None, True
                result = content if kind == "value" else VerifierFailure(kind, content)
                if kind in ("unable", "hung", "died"):
                    worker.restart()
                    if index is None and queue:  # a worker that cannot start costs a call, so that there is an end
                        index, result = queue.popleft(), VerifierFailure("died", f"no worker could start: {content}")
                if index is not None:
                    results[index] = result
        return [results[index] for index in range(len(calls))]

    def close(self) -> None:
        """End the workers; nothing can be judged afterwards."""
        self._finalize()


class _Worker:
    """A process, and what it is busy with."""

    def __init__(self, judges: Mapping[str, VerifierSpec]):
        self._judges = judges
        self.call: int | None = None
        self._start()

    def _start(self) -> None:
        self.ready = False
        self._allow(_START_SECONDS)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", worker.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a judge prints is no part of the run's output
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # a judge that imports JAX must not take the accelerator
                start_new_session=True,
            )
        self.channel = Connection(ours.detach())
        self._send((sys.path, self._judges))

    def restart(self) -> None:
        self.kill()
        self._start()

    def give(self, call: VerifierCall, timeout: float) -> None:
        self._allow(timeout)
        self._send((timeout, call.judge, call.texts, tuple(call.example)))

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # it died: so says the next `reply`
            self.channel.send(message)

    def _allow(self, seconds: float) -> None:
        self._limit, self._deadline = seconds, time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def wait(self) -> None:
        wait([self.channel], self.seconds_left)

    def reply(self) -> tuple[Any, Any] | None:
        """A kind and its content: the worker's own, `hung` or `died`; None where it has time left."""
        try:
            if self.channel.poll():
                return self.channel.recv()
        except (EOFError, OSError):
            return "died", f"exit code {self.kill()}"
        return None if self.seconds_left else ("hung", f"no answer within {self._limit:g} s")

    def kill(self) -> int:
        """End the process and all that it started; its exit code. Doing so again changes nothing."""
        if self._process.returncode is None:
            for pid in [self._process.pid, *_descendants(self._process.pid)]:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it is ending already
                    os.killpg(os.getpgid(pid), signal.SIGKILL)
        self.channel.close()
        return self._process.wait()


def _descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those they have; none where the system does not tell."""
    try:
        children = [
            int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
        ]
    except OSError:  # one of them has ended
        return []
    return [*children, *(below for child in children for below in _descendants(child))]


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.kill()
