"""Optimizer and learning-rate schedule."""

import dataclasses
import math
from typing import Literal

from mla_moe.config.errors import require, require_each, structure
from mla_moe.config.resume import field


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: linear warmup, constant peak, decay, constant final rate. With cosine decay that of DeepSeek-V3
    (section 4.2), with the others WSD (warmup-stable-decay)."""

    peak_lr: float = 2.2e-4
    """Learning rate between warmup and decay."""
    warmup_fraction: float = 0.01
    """Fraction of the steps with linear warmup from 0."""
    decay_fraction: float = 0.3
    """Fraction of the steps with decay from peak_lr to the final learning rate."""
    decay_shape: Literal["cosine", "linear", "1-sqrt"] = "cosine"
    """Shape of the decay: cosine, linear, or 1-sqrt, 1 − √x of the fraction x of the decay (arXiv 2405.18392)."""
    final_lr_fraction: float = 0.1
    """Final learning rate, as a fraction of peak_lr."""
    tail_fraction: float = 0.0
    """Fraction of the steps after the decay, at the final learning rate."""

    def __post_init__(self):
        structure(Literal["cosine", "linear", "1-sqrt"], self.decay_shape, "optimizer.schedule.decay_shape")
        require(0 < self.peak_lr < math.inf, "optimizer.schedule.peak_lr", self.peak_lr, "a learning rate is positive")
        names = "warmup_fraction decay_fraction tail_fraction final_lr_fraction"
        require_each(self, "optimizer.schedule", names, lambda x: 0 <= x <= 1, "must be between 0 and 1")
        total = self.warmup_fraction + self.decay_fraction + self.tail_fraction
        message = "the sum of warmup_fraction, decay_fraction and tail_fraction is at most 1"
        require(total <= 1 + 1e-9, "optimizer.schedule", total, message)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for all parameters, or Muon for the matrices inside the layers and AdamW for the rest."""

    name: Literal["adamw", "muon"] = field("adamw", full_state="equal")
    """adamw, or muon with Moonlight's RMS scaling of updates."""
    schedule: ScheduleConfig = field(ScheduleConfig(), change="stated")
    muon_peak_lr: float | None = field(None, change="stated")
    """Peak learning rate of the matrices under Muon. None: the schedule's peak_lr, which fits Muon's scaled updates."""
    beta1: float = 0.9
    """AdamW: decay rate of the gradient's moving average."""
    beta2: float = 0.95
    """AdamW: decay rate of the squared gradient's moving average."""
    muon_momentum: float = 0.95
    """Muon: momentum coefficient."""
    eps: float = 1e-8
    """AdamW: added to the denominator of an update."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only: not on norms, nor on the router bias."""
    max_grad_norm: float = 1.0
    """Gradient clipping: a gradient with a larger global norm is scaled down to this norm."""
    freeze: tuple[str, ...] = field((), full_state="equal")
    """Globs of the paths of parameters that stay as they are and have no optimizer state, such as embed or
    moe_layers/moe/*. They do not count for clipping; the metric grad_norm is of all parameters."""

    def __post_init__(self):
        structure(Literal["adamw", "muon"], self.name, "optimizer.name")
        require_each(
            self, "optimizer", "beta1 beta2 muon_momentum", lambda x: 0 <= x < 1, "must be at least 0 and below 1"
        )
        message = "must be a positive norm; a very large one clips nothing"
        require_each(self, "optimizer", "max_grad_norm", lambda x: x > 0, message)
        require_each(self, "optimizer", "weight_decay", lambda x: 0 <= x < math.inf, "must be 0 or more")
        require_each(self, "optimizer", "muon_peak_lr", lambda x: 0 < x < math.inf, "must be a positive learning rate")
        message = "must be a positive number: a gradient of 0 is divided by it"
        require_each(self, "optimizer", "eps", lambda x: 0 < x < math.inf, message)
