"""Checkpoint schedule: after which steps a stage is saved, by number and by time; the same in all processes."""

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from mla_moe.config import CheckpointConfig


class CheckpointSchedule:
    """`checkpoint.every` steps, or `checkpoint.every_minutes` after the last save if that is earlier.

    Clocks of processes differ, so the first one decides by time and tells the others. Asking it waits for the devices,
    so that this is not done in each step: with the answer comes the step in which to ask next, after about half of the
    time that is left. It is at most twice as many steps after the start as this one: the first step is dispatched at
    once, and says nothing of how long a step takes.
    """

    def __init__(self, config: CheckpointConfig, step: int, clock: Callable[[], float] = time.monotonic):
        """`step` is the one from which the stage starts."""
        self._every, self._clock = config.every, clock
        self._seconds = None if config.every_minutes is None else config.every_minutes * 60
        self._saved = self._asked = clock(), step
        self._start, self._ask_at = step, step + 1

    def is_due(self, step: int) -> bool:
        """Whether to save after this step. Call it once for each step."""
        due = step % self._every == 0
        if self._seconds is not None and step >= self._ask_at:
            by_time, self._ask_at = self._ask(step, self._seconds)
            due = due or by_time
        return due

    def saved(self, step: int) -> None:
        """Count the time from now."""
        self._saved = self._clock(), step
        self._ask_at = min(self._ask_at, step + 1)

    def _ask(self, step: int, seconds: float) -> tuple[bool, int]:
        """Whether `seconds` have passed since the last save, and when to ask next: of the first process."""
        now = self._clock()
        since, last = self._asked
        per_step = max((now - since) / max(step - last, 1), 1e-6)
        left = self._saved[0] + seconds - now
        wait = 1 if left <= 0 else max(int(min(left / per_step / 2, step - self._start)), 1)
        self._asked = now, step
        answer = np.array([left <= 0, min(step + wait, np.iinfo(np.int32).max)], np.int32)
        if jax.process_count() > 1:
            answer = multihost_utils.broadcast_one_to_all(answer)
        return bool(answer[0]), int(answer[1])
