"""Verifiers in worker processes: one that raises, hangs or dies fails a single call."""

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
    """Why a call of a verifier has no value."""

    kind: FailureKind
    message: str


class VerifierCall(NamedTuple):
    """A verifier by name, and its arguments."""

    verifier: str
    texts: tuple[str, ...]
    """The answer, or prompt and completion (`worker.load`)."""
    example: Example


class VerifierPool:
    """A pool of worker processes, each with all verifiers of `specs`, which go by the recipe field that names them.

    Raises `ConfigError` on that field if a verifier cannot be loaded. A worker is a fresh interpreter without JAX; one
    that hangs or dies is replaced. Workers end with `close`, with the interpreter, and if the parent is killed.
    """

    def __init__(self, specs: Mapping[str, VerifierSpec], timeout: float, workers: int | None = None):
        """`timeout`: seconds per call. `workers`: by default half the number of CPUs, but 2 to 8."""
        self._specs, self._timeout = dict(specs), timeout
        count = workers or min(8, max(2, (os.cpu_count() or 1) // 2))
        self._workers = [_Worker(self._specs) for _ in range(count)]
        self._finalize = weakref.finalize(self, _kill_all, self._workers)
        first = self._workers[0]
        while (reply := first.poll()) is None:
            first.wait()
        kind, content = reply
        if kind != "ready":
            self.close()
            field, why = content if kind == "unable" else (next(iter(specs)), f"the process {kind}, {content}")
            raise ConfigError(field, self._specs[field][-1], f"cannot be loaded: {why}")
        first.ready = True

    def __call__(self, calls: Sequence[VerifierCall]) -> list[float | VerifierFailure]:
        """The finite values of the calls, in order; the calls run in parallel."""
        results: dict[int, float | VerifierFailure] = {}
        queue = collections.deque(range(len(calls)))
        while len(results) < len(calls):
            for process in self._workers:
                if queue and process.ready and process.call is None:
                    process.call = queue.popleft()
                    process.submit(calls[process.call], self._timeout)
            busy = [process for process in self._workers if not process.ready or process.call is not None]
            wait([process.channel for process in busy], min(process.seconds_left for process in busy))
            for process in busy:
                if (reply := process.poll()) is None:
                    continue
                kind, content = reply
                index, process.call, process.ready = process.call, None, True
                result = content if kind == "value" else VerifierFailure(kind, content)
                if kind in ("unable", "hung", "died"):
                    process.restart()
                    if index is None and queue:  # a worker that cannot start fails a call, so that the loop ends
                        index, result = queue.popleft(), VerifierFailure("died", f"no worker could start: {content}")
                if index is not None:
                    results[index] = result
        return [results[index] for index in range(len(calls))]

    def close(self) -> None:
        """End the workers; the pool cannot be called afterwards."""
        self._finalize()


class _Worker:
    """A worker process."""

    def __init__(self, specs: Mapping[str, VerifierSpec]):
        self._specs = specs
        self.call: int | None = None  # index of the call that it runs
        self._start()

    def _start(self) -> None:
        self.ready = False
        self._set_deadline(_START_SECONDS)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", worker.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a verifier prints goes to stderr: stdout is the run's
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # a verifier that imports JAX must not use the accelerator
                start_new_session=True,
            )
        self.channel = Connection(ours.detach())
        self._send((sys.path, self._specs))

    def restart(self) -> None:
        self.kill()
        self._start()

    def submit(self, call: VerifierCall, timeout: float) -> None:
        self._set_deadline(timeout)
        self._send((timeout, call.verifier, call.texts, tuple(call.example)))

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # it died: the next `poll` reports that
            self.channel.send(message)

    def _set_deadline(self, seconds: float) -> None:
        self._limit, self._deadline = seconds, time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def wait(self) -> None:
        wait([self.channel], self.seconds_left)

    def poll(self) -> tuple[Any, Any] | None:
        """The worker's reply (`worker.serve`), or `hung` or `died` with a message; None before the deadline."""
        try:
            if self.channel.poll():
                return self.channel.recv()
        except (EOFError, OSError):
            return "died", f"exit code {self.kill()}"
        return None if self.seconds_left else ("hung", f"no answer within {self._limit:g} s")

    def kill(self) -> int:
        """End the process and its descendants, and return its exit code. Idempotent."""
        if self._process.returncode is None:
            for pid in [self._process.pid, *_descendants(self._process.pid)]:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended already
                    os.killpg(os.getpgid(pid), signal.SIGKILL)
        self.channel.close()
        return self._process.wait()


def _descendants(pid: int) -> list[int]:
    """Process ids of all descendants; empty without `/proc`."""
    try:
        children = [
            int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
        ]
    except OSError:  # one of them has ended
        return []
    return [*children, *(below for child in children for below in _descendants(child))]


def _kill_all(workers: Sequence[_Worker]) -> None:
    for process in workers:
        process.kill()
