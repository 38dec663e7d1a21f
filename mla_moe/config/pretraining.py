"""What a model learns from text, and how: data, optimizer, mesh, kernels."""

import dataclasses
import math
from typing import Literal

from mla_moe.config.errors import require


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The pretraining stage."""

    steps: int = 1000
    """Optimizer steps; 0 skips the stage."""
    batch_size: int = 32
    """Sequences a step, over all devices and accumulation steps."""
    sequence_length: int = 1024
    gradient_accumulation_steps: int = 1
    """Parts a batch is cut into, whose gradients are added before one update."""
    loss_chunk: int = 512
    """Tokens of a sequence whose logits exist at one time."""
    remat: Literal["none", "dots", "full"] = "none"
    """What a layer's backward pass recomputes: nothing, all but matrix products, or everything."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations; auto is bfloat16 on accelerators and float32 on CPU. Parameters stay float32."""
    mtp_loss_weight: float = 0.3
    """λ of the multi-token-prediction loss, for models that have the module."""
    aux_loss_weight: float = 1e-4
    """α of the sequence-wise balance loss."""
    router_bias_update_rate: float = 1e-3
    """γ of the router bias; 0 freezes it."""
    router_bias_freeze_fraction: float = 0.0
    """Last share of the steps in which γ is 0 (V3: the last 500 B of 14.8 T tokens, 0.034)."""
    max_skipped_steps: int = 10
    """Updates in a row, of any stage, that are skipped because loss or gradient is not finite, after which the run ends
    and leaves the batch in its directory."""
    loss_spike_threshold: float | None = None
    """Nats by which a row's loss may exceed the mean of the last 32 rows. Beyond, the stage goes back to its newest
    checkpoint and leaves out the batches since; None never goes back."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0 evaluates once, at the end."""

    def __post_init__(self):
        for name in (
            "batch_size",
            "sequence_length",
            "gradient_accumulation_steps",
            "loss_chunk",
            "log_every",
            "max_skipped_steps",
        ):
            value = getattr(self, name)
            require(value >= 1, f"training.{name}", value, "at least 1")
        for name in ("steps", "eval_every", "mtp_loss_weight", "aux_loss_weight", "router_bias_update_rate"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"training.{name}", value, "0 or more")
        require(
            self.loss_spike_threshold is None or self.loss_spike_threshold > 0,
            "training.loss_spike_threshold",
            self.loss_spike_threshold,
            "a positive number, or None",
        )
        require(
            0 <= self.router_bias_freeze_fraction <= 1,
            "training.router_bias_freeze_fraction",
            self.router_bias_freeze_fraction,
            "a share between 0 and 1",
        )
        require(
            self.batch_size % self.gradient_accumulation_steps == 0,
            "training.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            f"must divide training.batch_size = {self.batch_size}",
        )
