"""Pretraining: batch, loss, router balance, logging and evaluation."""

import dataclasses
import math
from typing import Literal

from mla_moe.config.errors import MAX_SIZE, require, require_between, require_each, require_field
from mla_moe.config.resume import field


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Pretraining on packed text."""

    steps: int = field(1000, change="stated")
    """Optimizer steps; 0 skips the stage, unless `epochs` is set."""
    epochs: float | None = field(None, change="stated")
    """Passes over the text, in place of steps (steps = 0). Their number follows from how the documents are packed, for
    which the stage tokenizes all of the text once, when it first starts."""
    batch_size: int = field(32, full_state="equal", change="stated")
    """Global batch size: packed sequences per step, over all devices and microbatches."""
    sequence_length: int = field(1024, full_state="equal")
    """Tokens per packed sequence."""
    gradient_accumulation_steps: int = field(1, change="stated")
    """Gradient accumulation: microbatches per step, whose gradients are added before one update."""
    loss_chunk: int = field(512, resume="free")
    """Tokens of a sequence whose logits are in memory at one time."""
    remat: Literal["none", "dots", "full", "stage"] = field("none", resume="free")
    """Rematerialization (activation checkpointing) of a layer: none, dots (all but the matrix products), or full; with
    mesh.pipeline also stage, which keeps the input of a pipeline stage instead of the inputs of its layers."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of activations; auto is bfloat16 on accelerators and float32 on CPU. Parameters are float32."""
    mtp_loss_weight: float = 0.3
    """λ: weight of the multi-token-prediction (MTP) loss, if the model has an MTP module."""
    aux_loss_weight: float = 1e-4
    """α: weight of the sequence-wise auxiliary load-balancing loss."""
    router_z_loss_weight: float = 0.0
    """Weight of the router z-loss, which keeps the router's logits small (ST-MoE, arXiv 2202.08906, equation 5, with
    1e-3): the mean over tokens of the squared logsumexp of the logits, added over the MoE layers."""
    router_bias_update_rate: float = 1e-3
    """γ: step size of the router bias update (auxiliary-loss-free load balancing); 0 freezes the bias."""
    router_bias_freeze_fraction: float = 0.0
    """Fraction of the steps, at the end, with a frozen router bias (V3: the last 500 B of 14.8 T tokens, 0.034)."""
    max_skipped_steps: int = field(10, resume="free")
    """Consecutive updates, in any stage, that may be skipped because the loss or gradient is not finite. Then the run
    halts, with the batch saved in its directory."""
    loss_spike_threshold: float | None = field(None, resume="free")
    """Loss spike: a loss this many nats above the mean of the last 32 logged rows. The stage then rewinds to its newest
    checkpoint and skips the batches since. None never rewinds."""
    max_step_minutes: float | None = field(None, resume="free")
    """Watchdog of every stage: a step, evaluation or save that takes longer ends the process with the stacks of all its
    threads, so that a launcher restarts it. None waits for ever."""
    log_every: int = field(1, resume="free")
    """Steps between rows of metrics.jsonl."""
    eval_every: int = field(0, resume="free")
    """Steps between evaluations on held-out text; 0 evaluates only after the last step."""

    def __post_init__(self):
        require_between(self, "training", "batch_size sequence_length gradient_accumulation_steps", 1, MAX_SIZE)
        require_between(self, "training", "steps", 0, MAX_SIZE)
        require_each(self, "training", "epochs", lambda x: 0 < x < 1e6, "must be a positive number, or None")
        fix = "is in place of training.steps; set those to 0"
        require(not (self.steps and self.epochs), "training.epochs", self.epochs, fix)
        require_each(self, "training", "loss_chunk log_every max_skipped_steps", lambda x: x >= 1, "must be at least 1")
        names = "eval_every mtp_loss_weight aux_loss_weight router_z_loss_weight router_bias_update_rate"
        require_each(self, "training", names, lambda x: 0 <= x < math.inf, "must be 0 or more")
        require_each(self, "training", "max_step_minutes", lambda x: 0 < x < 1e5, "must be a positive number, or None")
        require_each(self, "training", "loss_spike_threshold", lambda x: x > 0, "must be a positive number, or None")
        require_each(self, "training", "router_bias_freeze_fraction", lambda x: 0 <= x <= 1, "must be between 0 and 1")
        ok = self.batch_size % self.gradient_accumulation_steps == 0
        message = f"must divide training.batch_size = {self.batch_size}"
        require_field(self, "training.gradient_accumulation_steps", ok, message)

    @property
    def active(self) -> bool:
        """Whether the stage runs."""
        return self.steps > 0 or self.epochs is not None
