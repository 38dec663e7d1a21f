"""From the figures of a step to a row of `metrics.jsonl`."""

import math
import time
from typing import Any

import jax
import numpy as np
import optax

from mla_moe.config import ModelConfig, TrainingConfig
from mla_moe.data import Batch
from mla_moe.nn.model_costs import train_flops_per_token
from mla_moe.parallel.accelerators import peak_flops
from mla_moe.training.console import Progress
from mla_moe.training.loss_monitor import LossMonitor


class StepMetrics:
    """Turns steps into rows, a step late."""

    LOAD_ROWS = 200  # of the heat map over a whole run

    def __init__(
        self,
        cfg: ModelConfig,
        training: TrainingConfig,
        rate: optax.Schedule,
        writer,
        progress: Progress,
        guard: LossMonitor,
    ):
        self._cfg, self._training, self._rate = cfg, training, rate
        self._writer, self._progress, self._guard = writer, progress, guard
        self._flops = train_flops_per_token(cfg, training.sequence_length)
        peak = peak_flops(jax.devices()[0])
        self._peak = peak and peak * (1 if jax.devices()[0].platform == "cpu" else jax.device_count())
        self._load_every = max(1, training.steps // self.LOAD_ROWS)
        self._pending: tuple[int, dict[str, jax.Array], Batch] | None = None
        self._loads: list[float] = []
        self.loss = math.nan
        self.restart()

    def restart(self) -> None:
        """Begin to time the next step now: what came before was no step."""
        self._since = time.monotonic()

    def record(self, number: int, metrics: dict[str, jax.Array], batch: Batch) -> None:
        self.flush()
        self._pending = number, metrics, batch

    def flush(self) -> None:
        """Fetch what is pending, which waits for its step to end, and write it. Raises what `Guard.see` does."""
        if self._pending is None:
            return
        number, metrics, batch = self._pending
        self._pending = None
        values: dict[str, Any] = jax.device_get(metrics)
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        load, tokens = values.pop("load_LE"), int(values.pop("tokens"))
        rate = float(np.asarray(self._rate(number - 1)))
        row: dict[str, Any] = {"loss": values.pop("loss"), "lr": rate, "tokens_per_s": tokens / seconds}
        if self._peak:
            row["mfu"] = row["tokens_per_s"] * self._flops / self._peak
        row |= values | {"step_seconds": seconds, "tokens": tokens}
        if load.size:
            row["moe/load_max"] = float((load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9)).max())
            row["moe/dropped"] = values.pop("dropped")
            self._loads.append(row["moe/load_max"])
        if not self._cfg.num_nextn_predict_layers:
            del row["mtp_loss"]
        row = {name: float(value) for name, value in row.items()}
        self.loss = row["loss"]
        if number % self._training.log_every == 0 or number == self._training.steps:
            self._writer.write(number, row)
        if load.size and number % self._load_every == 0:
            self._writer.write_load(number, load)
        self._progress.update(number, row)
        self._guard.see(number, row, lambda: batch)

    @property
    def load_last_tenth(self) -> float:
        tail = self._loads[-max(self._training.steps // 10, 1) :]
        return float(np.mean(tail)) if tail else math.nan
