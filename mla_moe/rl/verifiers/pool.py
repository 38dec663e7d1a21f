"""Verifiers in worker processes: one that raises, hangs, forks or dies fails a single call."""

import collections
import logging
import os
import typing
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mla_moe.rl.verifiers import worker
from mla_moe.rl.verifiers.worker import VerifierSpec
from mla_moe.workers.process import ENDED, WorkerProcess, printable

logger = logging.getLogger(__name__)

_MAX_REPLY_BYTES = 1 << 20  # rewards of a few thousand completions
_MAX_FAILED_STARTS = 2  # in a row

FailureKind = Literal["raised", "hung", "not_finite", "died", "unparsed"]


class VerifierFailure(NamedTuple):
    """Why a call of a verifier has no value."""

    kind: FailureKind
    message: str
    """One line of bounded length."""


class VerifierCall(NamedTuple):
    """A verifier by name, and its arguments (`worker.open_service`)."""

    verifier: str
    arguments: tuple[Any, ...]
    """Picklable; the last one is the fields of the example, as a tuple."""


class VerifierLoadError(Exception):
    """A verifier cannot be loaded: its name, and why."""


class VerifierPool:
    """A pool of worker processes, each with all verifiers of `specs`, by name.

    Raises `VerifierLoadError` if one cannot be loaded. A worker that hangs or dies is replaced, unless it twice cannot
    start; the others get its calls. Workers end with `close`, with the interpreter, and if the parent is killed, and so
    do processes that verifiers have started.
    """

    def __init__(self, specs: Mapping[str, VerifierSpec], timeout: float, workers: int | None = None):
        """`timeout`: seconds per call. `workers`: by default half the number of CPUs, but 2 to 8."""
        self._timeout = timeout
        count = workers or min(8, max(2, (os.cpu_count() or 1) // 2))
        service = Path(worker.__file__)
        self._workers = [WorkerProcess(service, [dict(specs)], max_reply_bytes=_MAX_REPLY_BYTES) for _ in range(count)]
        self._finalize = weakref.finalize(self, _end_all, self._workers)
        self._failed_starts: collections.Counter[WorkerProcess] = collections.Counter()
        self._first = next(iter(specs))
        self._load_error: VerifierLoadError | None = None
        kind, content = self._workers[0].wait()
        if kind != "ready":
            self.close()
            raise self._failed_start(self._workers[0], kind, content)
        self.batched = frozenset(content)
        """Names of the reward functions that take several completions at once."""

    def __call__(self, calls: Sequence[VerifierCall]) -> list[Any]:
        """What the verifiers return for the calls, in order, or a `VerifierFailure`; the calls run in parallel.

        A value is JSON, and it is the verifier's: whoever uses it checks its type. Raises `VerifierLoadError` if no
        worker can start any more.
        """
        for process in self._workers:
            if process.ready and process.busy:  # an exception has ended the last calls
                process.restart()
        results: dict[int, Any] = {}
        running: dict[WorkerProcess, int] = {}
        queue = collections.deque(range(len(calls)))
        while len(results) < len(calls):
            for process in self._workers:
                if queue and process.ready and not process.busy:
                    running[process] = queue.popleft()
                    process.submit(self._timeout, *calls[running[process]])
            busy = [process for process in self._workers if process.busy]
            if not busy:
                assert self._load_error is not None
                raise self._load_error
            wait([process.channel for process in busy], min(process.seconds_left for process in busy))
            for process in busy:
                if (reply := process.poll()) is None:
                    continue
                kind, content = reply
                index = running.pop(process, None)
                if index is not None:
                    results[index] = content if kind == "value" else _failure(kind, content)
                else:  # it has started, or could not
                    self._failed_starts[process] = self._failed_starts[process] + 1 if kind in ENDED else 0
                if kind in ENDED and self._failed_starts[process] < _MAX_FAILED_STARTS:
                    process.restart()
                elif kind in ENDED:
                    self._load_error = self._failed_start(process, kind, content)
                    logger.warning("a worker process for rewards cannot start: %s", _message(kind, content))
        return [results[index] for index in range(len(calls))]

    def _failed_start(self, process: WorkerProcess, kind: str, content: Any) -> VerifierLoadError:
        return VerifierLoadError(process.loading or self._first, _message(kind, content))

    def close(self) -> None:
        """End the workers; the pool cannot be called afterwards."""
        self._finalize()


def _failure(kind: str, content: Any) -> VerifierFailure:
    known: Any = kind if kind in typing.get_args(FailureKind) else "died"
    return VerifierFailure(known, printable(str(content)))


def _message(kind: str, content: Any) -> str:
    return printable(str(content) if kind == "unable" else f"{kind}, {content}")


def _end_all(workers: Sequence[WorkerProcess]) -> None:
    for process in workers:
        process.end()
