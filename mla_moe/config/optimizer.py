"""Optimizer and learning-rate schedule."""

import dataclasses
import math
from typing import Literal

from mla_moe.config.errors import require


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: linear warm-up, constant, cosine to `final`, and constant again (DeepSeek-V3, section 4.2)."""

    peak_lr: float = 2.2e-4
    """Learning rate after warm-up."""
    warmup_fraction: float = 0.01
    """Share of the steps in which it rises from 0."""
    decay_fraction: float = 0.3
    """Share of the steps in which it falls from `peak` to `final`, along a cosine."""
    final_lr_fraction: float = 0.1
    """The last learning rate, as a share of `peak`."""
    tail_fraction: float = 0.0
    """Share of the steps after the decay, spent at `final`."""

    def __post_init__(self):
        require(0 < self.peak_lr < math.inf, "optimizer.schedule.peak_lr", self.peak_lr, "a learning rate is positive")
        for name in ("warmup_fraction", "decay_fraction", "tail_fraction", "final_lr_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.schedule.{name}", value, "a share between 0 and 1")
        total = self.warmup_fraction + self.decay_fraction + self.tail_fraction
        require(total <= 1 + 1e-9, "optimizer.schedule", total, "warmup + decay + tail is at most 1")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the matrices inside the layers with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    schedule: ScheduleConfig = ScheduleConfig()
    muon_peak_lr: float | None = None
    """Peak learning rate of the matrices under Muon; None takes the schedule's, as with Moonlight's RMS scaling."""
    beta1: float = 0.9
    beta2: float = 0.95
    muon_momentum: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled, on matrices only: not on norms, nor on the router's bias."""
    max_grad_norm: float = 1.0
    """Largest global norm of the gradient; a larger one is scaled down to it."""

    def __post_init__(self):
        for name in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "at least 0 and below 1")
        require(
            self.max_grad_norm > 0,
            "optimizer.max_grad_norm",
            self.max_grad_norm,
            "a positive norm; a very large one clips nothing",
        )
        require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "0 or more")
        ok = self.muon_peak_lr is None or 0 < self.muon_peak_lr < math.inf
        require(ok, "optimizer.muon_peak_lr", self.muon_peak_lr, "a positive rate")
        fix = "a positive number: a gradient of 0 is divided by it"
        require(0 < self.eps < math.inf, "optimizer.eps", self.eps, fix)
