"""What ends a run that has stopped learning, or takes it back: steps that are not finite, and a loss that leaps."""

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mla_moe.config import TrainingConfig
from mla_moe.training.metrics import read_rows

WINDOW = 32
"""Rows whose mean a loss is held against."""


class TrainingHaltedError(Exception):
    """The run has ended itself: what is wrong, and what may help."""


class LossSpikeError(Exception):
    """The loss of a step is far above those before."""

    def __init__(self, step: int, loss: float, mean: float):
        super().__init__(f"the loss leapt to {loss:.3f} in step {step}, from a mean of {mean:.3f}")
        self.step = step


class LossMonitor:
    """Watches the rows of a stage. All processes see the same rows, and so act as one."""

    def __init__(self, training: TrainingConfig, run_dir: Path, stage: str, start: int | None):
        self._training, self._run_dir, self._stage = training, run_dir, stage
        self._skipped = 0  # in a row
        rows = read_rows(run_dir / "metrics.jsonl") if training.loss_spike_threshold is not None and start else []
        losses = (
            row["loss"] for row in rows if row["stage"] == stage and row["step"] <= (start or 0) and "loss" in row
        )
        self._losses = deque((loss for loss in losses if loss is not None), maxlen=WINDOW)

    def see(self, step: int, row: Mapping[str, float], batch: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Count a step's `skipped`, and look at its `loss`; `batch` gives what it learned from.

        Raises `Halted` after `training.max_skipped_steps` skipped updates in a row, when the batch is saved, and `Spike` for a
        loss that is more than `training.loss_spike_threshold` above the mean of the last rows.
        """
        self._skipped = self._skipped + int(row["skipped"]) if row["skipped"] else 0
        if self._skipped >= self._training.max_skipped_steps:
            path = self._run_dir / f"skipped_{self._stage}_{step}.{jax.process_index()}.npz"
            arrays: Any = dict(batch())
            np.savez(path, **arrays)
            raise TrainingHaltedError(
                f"loss or gradient was not finite in {self._skipped} updates in a row (training.max_skipped_steps), up to "
                f"step {step}, whose batch is in {path}: lower the learning rate, or mend the data"
            )
        if self._training.loss_spike_threshold is None or step % self._training.log_every:
            return
        if (
            len(self._losses) == WINDOW
            and row["loss"] > (mean := sum(self._losses) / WINDOW) + self._training.loss_spike_threshold
        ):
            raise LossSpikeError(step, row["loss"], mean)
        if np.isfinite(row["loss"]):
            self._losses.append(row["loss"])
