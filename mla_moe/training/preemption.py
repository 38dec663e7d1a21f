"""Preemption: SIGTERM and Ctrl-C end a run after the current step, with its state saved."""

import contextlib
import signal
from collections.abc import Generator
from typing import Self

import jax
from jax.experimental import multihost_utils

from mla_moe.training.errors import InterruptedRun, LossSpikeError


class _RememberedInterrupt:
    """A handler of SIGINT that raises `KeyboardInterrupt`, and remembers it: Python drops an exception in a destructor
    or a callback of the garbage collector, such as the one that JAX registers."""

    def __init__(self):
        self.received = False

    def __call__(self, _number: int, _frame: object) -> None:
        self.received = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def remember_interrupts() -> Generator[None]:
    """A Ctrl-C before the first step of a stage stops the run there at the latest, also where Python dropped its
    `KeyboardInterrupt`. SIGINT keeps a handler of the caller, and stays ignored where it was."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _RememberedInterrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


class PreemptionSignals:
    """Catches SIGINT and SIGTERM while this context is open, so that a step is not interrupted. A second signal raises
    `KeyboardInterrupt` at once.

    With several processes any of them may receive the signal. JAX's coordination service then agrees on a step, and all
    processes stop after it. A signal that `stop` has not reported when the context closes raises `InterruptedRun`.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._stopped = False

    def __enter__(self) -> Self:
        before = signal.getsignal(signal.SIGINT)
        if isinstance(before, _RememberedInterrupt) and before.received:
            raise KeyboardInterrupt
        # With several processes JAX's coordination service has installed its own handler of SIGTERM.
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # After the last step, as while trackers send what is left, or in one after which the stage rewinds.
        if self.received is not None and (error is None or issubclass(error, LossSpikeError)):
            raise InterruptedRun(f"stopped by {self.name}")

    def stop(self, step: int) -> bool:
        """Whether to stop after this step. All processes get the same result. In a single process a signal may arrive
        between two calls."""
        if jax.process_count() == 1:
            return self.received is not None
        self._stopped = self._stopped or multihost_utils.reached_preemption_sync_point(step)
        return self._stopped

    @property
    def name(self) -> str:
        return (self.received or signal.SIGTERM).name

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
