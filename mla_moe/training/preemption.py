"""Preemption: SIGTERM and Ctrl-C end a run after the current step, with its state saved."""

import signal
from typing import Self

import jax
from jax.experimental import multihost_utils


class InterruptedRun(Exception):
    """The run stopped after a signal. Its state is saved."""


class PreemptionSignals:
    """Catches SIGINT and SIGTERM while this context is open, so that a step is not interrupted. A second signal raises
    `KeyboardInterrupt` at once.

    With several processes any of them may receive the signal. JAX's coordination service then agrees on a step, and all
    processes stop after it.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._stopped_at: int | None = None

    def __enter__(self) -> Self:
        # With several processes JAX's coordination service has installed its own handler of SIGTERM.
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stop(self, step: int) -> bool:
        """Whether to stop after this step. All processes get the same result."""
        if jax.process_count() == 1:
            return self.received is not None
        if self._stopped_at is None and multihost_utils.reached_preemption_sync_point(step):
            self._stopped_at = step
        return self._stopped_at is not None

    @property
    def name(self) -> str:
        return (self.received or signal.SIGTERM).name

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
