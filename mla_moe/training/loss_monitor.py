"""Loss monitor: halts a run after skipped (non-finite) updates, and reports loss spikes for a rewind."""

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from mla_moe.config import TrainingConfig
from mla_moe.training.errors import LossSpikeError, TrainingHaltedError
from mla_moe.training.metrics import read_rows

WINDOW = 32
"""Rows whose mean loss is the reference for a loss spike."""


class LossMonitor:
    """Checks the rows of a stage. All processes see the same rows, and so make the same decision."""

    def __init__(self, training: TrainingConfig, run_dir: Path, stage: str, start: int | None):
        """`start` is the restored step, up to which earlier losses are read from `metrics.jsonl`."""
        self._training, self._run_dir, self._stage = training, run_dir, stage
        self._consecutive_skipped = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        if start and training.loss_spike_threshold is not None:
            rows = (row for row in read_rows(run_dir / "metrics.jsonl", stage) if row["step"] <= start)
            self._losses.extend(row["loss"] for row in rows if row.get("loss") is not None)

    def check(self, step: int, row: Mapping[str, float], batch: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Count the step's `skipped` updates and compare its `loss`; `batch` returns the arrays of its batch.

        Raises `TrainingHaltedError` after `training.max_skipped_steps` consecutive skipped updates, with the batch
        saved, and `LossSpikeError` for a loss more than `training.loss_spike_threshold` above the mean of the last
        `WINDOW` rows.
        """
        self._consecutive_skipped = self._consecutive_skipped + int(row["skipped"]) if row["skipped"] else 0
        if self._consecutive_skipped >= self._training.max_skipped_steps:
            path = self._run_dir / f"skipped_{self._stage}_{step}.{jax.process_index()}.npz"
            np.savez(path, **batch())  # ty: ignore[invalid-argument-type]
            raise TrainingHaltedError(
                f"loss or gradient was not finite in {self._consecutive_skipped} updates in a row "
                f"(training.max_skipped_steps), up to step {step}, whose batch is saved in {path}; lower the learning "
                "rate, or repair the data"
            )
        threshold = self._training.loss_spike_threshold
        if threshold is None or step % self._training.log_every:
            return
        mean = sum(self._losses) / WINDOW
        if len(self._losses) == WINDOW and row["loss"] > mean + threshold:
            raise LossSpikeError(step, row["loss"], mean)
        if np.isfinite(row["loss"]):
            self._losses.append(row["loss"])
