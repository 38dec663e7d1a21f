"""What a model learns from text, and how: data, optimizer, mesh, kernels."""

import dataclasses
import math
from typing import Literal

from mla_moe.config import require, structure


@dataclasses.dataclass(frozen=True)
class Data:
    """Where text comes from and how it becomes tokens."""

    train: tuple[str, ...] = ("cpython:train",)
    """Globs of .txt/.py/.md (a file is a document), .jsonl, .parquet, .arrayrecord; or cpython:train, which is the
    standard library's sources and the language reference of the running Python."""
    heldout: tuple[str, ...] = ("cpython:heldout",)
    """The same for evaluation."""
    text_field: str = "text"
    """Key (JSON lines) or column (Parquet) that holds a document."""
    malformed: float = 0.01
    """Largest share of the documents that may turn out to be malformed: they are empty then, and counted. With more
    the run ends, and names one."""
    tokenizer: str = "byte"
    """byte, the path of a tokenizer.json, or bpe:SIZE to train one of SIZE tokens on the training text. With
    `init_from`, bpe:SIZE is the one that the checkpoint brings."""
    shuffle_window: int = 256
    """Sequences among which a packed sequence may move, so that one long document does not fill a batch."""
    streams: int | None = None
    """Streams of documents that are packed side by side and share each batch: a multiple of the number of processes
    that read. None takes as many as divide the batch, at most 4."""
    prefetch: int = 8
    """Batches prepared ahead of the step."""

    def __post_init__(self):
        require(len(self.train) > 0, "data.train", self.train, "name at least one file or glob")
        require(0 <= self.malformed <= 1, "data.malformed", self.malformed, "a share between 0 and 1")
        require(self.streams is None or self.streams >= 1, "data.streams", self.streams, "at least 1, or None")
        require(self.shuffle_window >= 1, "data.shuffle_window", self.shuffle_window, "1 keeps the order")
        require(self.prefetch >= 1, "data.prefetch", self.prefetch, "prepare at least 1 batch ahead")
        if self.tokenizer.startswith("bpe:"):
            size = self.tokenizer.removeprefix("bpe:")
            require(size.isdigit() and int(size) >= 300, "data.tokenizer", self.tokenizer, "bpe:SIZE with SIZE >= 300")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up, constant, cosine to `final`, and constant again (DeepSeek-V3, section 4.2)."""

    peak: float = 2.2e-4
    """Learning rate after warm-up."""
    warmup: float = 0.01
    """Share of the steps in which it rises from 0."""
    decay: float = 0.3
    """Share of the steps in which it falls from `peak` to `final`, along a cosine."""
    final: float = 0.1
    """The last learning rate, as a share of `peak`."""
    tail: float = 0.0
    """Share of the steps after the decay, spent at `final`."""

    def __post_init__(self):
        require(0 < self.peak < math.inf, "optimizer.schedule.peak", self.peak, "a learning rate is positive")
        for name in ("warmup", "decay", "tail", "final"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.schedule.{name}", value, "a share between 0 and 1")
        total = self.warmup + self.decay + self.tail
        require(total <= 1 + 1e-9, "optimizer.schedule", total, "warmup + decay + tail is at most 1")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW, or Muon for the matrices inside the layers with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    schedule: Schedule = Schedule()
    muon_peak: float | None = None
    """Peak learning rate of the matrices under Muon; None takes the schedule's, as with Moonlight's RMS scaling."""
    beta1: float = 0.9
    beta2: float = 0.95
    muon_momentum: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled, on matrices only: not on norms, nor on the router's bias."""
    clip: float = 1.0
    """Largest global norm of the gradient; a larger one is scaled down to it."""

    def __post_init__(self):
        for name in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "at least 0 and below 1")
        require(self.clip > 0, "optimizer.clip", self.clip, "a positive norm; a very large one clips nothing")
        require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "0 or more")
        ok = self.muon_peak is None or 0 < self.muon_peak < math.inf
        require(ok, "optimizer.muon_peak", self.muon_peak, "a positive rate")
        fix = "a positive number: a gradient of 0 is divided by it"
        require(0 < self.eps < math.inf, "optimizer.eps", self.eps, fix)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Implementations by name; None takes the one for the platform. All but the buffer compute the same."""

    attention: Literal["reference", "blockwise", "splash", "cudnn"] | None = None
    """splash is a TPU kernel, cudnn a GPU one; by default blockwise elsewhere."""
    grouped_matmul: Literal["reference", "blocks", "chunks", "ragged", "megablox"] | None = None
    """megablox is a TPU kernel; by default blocks elsewhere."""
    exchange: Literal["all_to_all", "ragged"] | None = None
    """How rows go to experts on other devices: ragged, the default on TPU and GPU, moves the rows alone."""
    expert_buffer: float | None = None
    """How many times its even share of rows a device may send to another before tokens are dropped, which moe/dropped
    counts; None drops none, and takes more rounds where the routing is uneven."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            structure(field.type, getattr(self, field.name), f"kernels.{field.name}")
        ok = self.expert_buffer is None or self.expert_buffer > 0
        require(ok, "kernels.expert_buffer", self.expert_buffer, "a positive share; 1 is that of an even routing")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; −1 takes what the others leave."""

    data: int = -1
    """Replicas of everything; the axis that may cross a slow network."""
    fsdp: int = 1
    """Parameters and optimizer state split, gathered when used."""
    expert: int = 1
    """Experts split."""
    tensor: int = 1
    """Heads and hidden widths split."""
    context: int = 1
    """Time split."""
    rules: tuple[str, ...] = ()
    """Changes to the table of `sharding.py`, each `axis=mesh_axis`, or `axis=` for whole on every device."""

    def __post_init__(self):
        sizes = {name: size for name, size in dataclasses.asdict(self).items() if name != "rules"}
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name}", size, "a number of devices, or -1 for the rest")
        require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "only one axis can be -1")


@dataclasses.dataclass(frozen=True)
class Training:
    """The pretraining stage."""

    steps: int = 1000
    """Optimizer steps; 0 skips the stage."""
    batch_size: int = 32
    """Sequences a step, over all devices and accumulation steps."""
    sequence_length: int = 1024
    accumulation: int = 1
    """Parts a batch is cut into, whose gradients are added before one update."""
    loss_chunk: int = 512
    """Tokens of a sequence whose logits exist at one time."""
    remat: Literal["none", "dots", "full"] = "none"
    """What a layer's backward pass recomputes: nothing, all but matrix products, or everything."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations; auto is bfloat16 on accelerators and float32 on CPU. Parameters stay float32."""
    mtp_weight: float = 0.3
    """λ of the multi-token-prediction loss, for models that have the module."""
    balance_weight: float = 1e-4
    """α of the sequence-wise balance loss."""
    bias_update: float = 1e-3
    """γ of the router bias; 0 freezes it."""
    bias_freeze: float = 0.0
    """Last share of the steps in which γ is 0 (V3: the last 500 B of 14.8 T tokens, 0.034)."""
    skip_limit: int = 10
    """Updates in a row, of any stage, that are skipped because loss or gradient is not finite, after which the run ends
    and leaves the batch in its directory."""
    spike: float | None = None
    """Nats by which a row's loss may exceed the mean of the last 32 rows. Beyond, the stage goes back to its newest
    checkpoint and leaves out the batches since; None never goes back."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0 evaluates once, at the end."""

    def __post_init__(self):
        for name in ("batch_size", "sequence_length", "accumulation", "loss_chunk", "log_every", "skip_limit"):
            value = getattr(self, name)
            require(value >= 1, f"training.{name}", value, "at least 1")
        for name in ("steps", "eval_every", "mtp_weight", "balance_weight", "bias_update"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"training.{name}", value, "0 or more")
        require(self.spike is None or self.spike > 0, "training.spike", self.spike, "a positive number, or None")
        require(0 <= self.bias_freeze <= 1, "training.bias_freeze", self.bias_freeze, "a share between 0 and 1")
        require(
            self.batch_size % self.accumulation == 0,
            "training.accumulation",
            self.accumulation,
            f"must divide training.batch_size = {self.batch_size}",
        )
