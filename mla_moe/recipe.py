"""What a run is: frozen dataclasses of model, data, optimizer, mesh and stages. Each field is a flag of `train.py`."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from mla_moe.config import ConfigError, ModelConfig, preset, require, structure


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
    tokenizer: str = "byte"
    """byte, the path of a tokenizer.json, or bpe:SIZE to train one of SIZE tokens on the training text."""
    shuffle_window: int = 256
    """Sequences among which a packed sequence may move, so that one long document does not fill a batch."""
    streams: int | None = None
    """Streams of documents that are packed side by side and share each batch: a multiple of the number of processes
    that read. None takes as many as divide the batch, at most 4."""
    prefetch: int = 8
    """Batches prepared ahead of the step."""

    def __post_init__(self):
        require(len(self.train) > 0, "data.train", self.train, "name at least one file or glob")
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
        require(self.peak > 0, "optimizer.schedule.peak", self.peak, "a learning rate is positive")
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
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.muon_peak is None or self.muon_peak > 0, "optimizer.muon_peak", self.muon_peak, "a positive rate")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Implementations by name; None takes the one for the platform. All but the buffer compute the same."""

    attention: Literal["reference", "blockwise", "splash", "cudnn"] | None = None
    """splash is a TPU kernel, cudnn a GPU one; by default blockwise elsewhere."""
    grouped_matmul: Literal["reference", "blocks", "ragged", "megablox"] | None = None
    """megablox is a TPU kernel; by default blocks elsewhere."""
    exchange: Literal["all_to_all", "ragged"] | None = None
    """How rows go to experts on other devices: ragged, the default on TPU and GPU, moves the rows alone."""
    expert_buffer: float | None = None
    """How many times its even share of rows a device may send to another before tokens are dropped, which moe/dropped
    counts; None drops none, and takes more rounds where the routing is uneven."""

    def __post_init__(self):
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
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0 evaluates once, at the end."""

    def __post_init__(self):
        for name in ("batch_size", "sequence_length", "accumulation", "loss_chunk", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"training.{name}", value, "at least 1")
        for name in ("steps", "eval_every", "mtp_weight", "balance_weight", "bias_update"):
            value = getattr(self, name)
            require(value >= 0, f"training.{name}", value, "0 or more")
        require(0 <= self.bias_freeze <= 1, "training.bias_freeze", self.bias_freeze, "a share between 0 and 1")
        require(
            self.batch_size % self.accumulation == 0,
            "training.accumulation",
            self.accumulation,
            f"must divide training.batch_size = {self.batch_size}",
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is kept of a run."""

    every: int = 100
    """Steps between checkpoints; the last step is always kept."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self):
        require(self.every >= 1, "checkpoint.every", self.every, "at least 1 step")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "keep at least 1")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text generated at the end of a run."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 96
    temperature: float = 0.7


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked, how it is put to the model, and what an answer is worth. Training, validation and test questions
    never overlap: the text of a question alone decides which it is."""

    name: str = "arithmetic"
    """arithmetic; reasoning_gym:NAME, any of that library's tasks; or the path of JSON lines with question, answer."""
    options: tuple[str, ...] = ()
    """Settings of the task, each `key=value`: arithmetic takes least and most (operations), reasoning_gym its own."""
    template: str = "r1_zero"
    """r1_zero, DeepSeek's prompt; chat, the tokenizer's own template; or a text with {question} in it."""
    format: float = 1.0
    """Weight of the reward for `<think>…</think><answer>…</answer>`, in this order, once, and nothing else."""
    accuracy: float = 1.0
    """Weight of the reward for the right answer."""
    function: str | None = None
    """A reward of your own, `module:name` or `path.py:name`: `reward(prompt, completion, example) -> float`."""
    function_weight: float = 1.0
    timeout: float = 5.0
    """Seconds that judging one completion may take. What raises, hangs or is not a number counts 0, and is counted."""

    def __post_init__(self):
        for name in ("format", "accuracy"):
            require(getattr(self, name) >= 0, f"task.{name}", getattr(self, name), "a weight of 0 or more")
        require(self.timeout > 0, "task.timeout", self.timeout, "a number of seconds")
        ok = self.template in ("r1_zero", "chat") or "{question}" in self.template
        require(ok, "task.template", self.template, "r1_zero, chat, or a text with {question}")
        wrong = [option for option in self.options if "=" not in option]
        require(not wrong, "task.options", wrong, "write each as key=value")


@dataclasses.dataclass(frozen=True)
class RL:
    """Reinforcement learning from rule rewards: groups of answers, compared with each other (DeepSeek-R1)."""

    steps: int = 0
    """Rollouts, each with `minibatches` updates; 0 skips the stage."""
    objective: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    prompts: int = 32
    """Questions a step."""
    group_size: int = 16
    """Answers to each question."""
    minibatches: int = 1
    """Updates a step, each on its share of the groups."""
    max_prompt_tokens: int = 512
    """Questions with a longer prompt are passed over, and counted."""
    max_new_tokens: int = 1024
    temperature: float = 1.0
    clip_low: float | None = None
    """How far a ratio may fall below 1; None takes the objective's own (0.2; gspo 3e-4)."""
    clip_high: float | None = None
    """How far it may rise above 1; None takes the objective's own (0.2; dapo 0.28; gspo 4e-4)."""
    kl: float = 1e-3
    """β, weight of the divergence from the reference."""
    reference_every: int = 400
    """Steps after which the reference becomes the model of that time; 0 keeps the first."""
    off_policy_limit: float | None = None
    """δ: answers with a negative advantage whose mean log(π_old / π) is larger are left out (V3.2); None keeps all."""
    importance_limit: float | None = 2.0
    """C: the trainer's over the sampler's probability weighs a token, at most so much; None does not weigh."""
    overlong: int = 0
    """Length of the zone before `max_new_tokens`, in tokens, over which a penalty rises to 1 (DAPO)."""
    routing_replay: bool = True
    """The trainer sends tokens to the experts that the sampler chose; gate scores are its own."""
    bias_update: float = 0.0
    """γ of the router bias; 0 freezes it."""
    optimizer: Optimizer = Optimizer(schedule=Schedule(peak=3e-6, warmup=0.0, decay=0.0), weight_decay=0.0)
    row_tokens: int = 0
    """Tokens of a row into which answers are packed for an update; 0 takes what the longest may need."""
    rows: int = 8
    """Rows whose activations exist at one time."""
    slots: int = 64
    """Answers sampled at a time."""
    eval_every: int = 0
    """Steps between evaluations; the stage always has one before and one after."""
    eval_split: Literal["validation", "test"] = "test"
    """Held-out questions: choose settings on validation, report on test."""
    eval_prompts: int = 128
    eval_samples: int = 4
    """Answers sampled to each question, for pass@k and the majority's; greedy answers come on top."""

    @property
    def row_length(self) -> int:
        """Tokens of a row for an update."""
        return self.row_tokens or self.max_prompt_tokens + self.max_new_tokens

    def __post_init__(self):
        for name in (
            "prompts",
            "group_size",
            "minibatches",
            "max_prompt_tokens",
            "max_new_tokens",
            "rows",
            "slots",
            "eval_prompts",
        ):
            require(getattr(self, name) >= 1, f"rl.{name}", getattr(self, name), "at least 1")
        for name in ("steps", "kl", "reference_every", "overlong", "bias_update", "row_tokens", "eval_samples"):
            require(getattr(self, name) >= 0, f"rl.{name}", getattr(self, name), "0 or more")
        require(
            self.group_size >= 2 or not self.steps, "rl.group_size", self.group_size, "answers are compared: 2 or more"
        )
        require(self.temperature > 0, "rl.temperature", self.temperature, "sampling needs a positive one")
        fix = f"must divide rl.prompts = {self.prompts}: a group stays together"
        require(self.prompts % self.minibatches == 0, "rl.minibatches", self.minibatches, fix)
        fix = f"must be below rl.max_new_tokens = {self.max_new_tokens}"
        require(self.overlong < self.max_new_tokens, "rl.overlong", self.overlong, fix)
        fix = "an answer and its prompt must fit a row: max_prompt_tokens + max_new_tokens, or 0"
        longest = self.max_prompt_tokens + self.max_new_tokens
        require(self.row_length >= longest, "rl.row_tokens", self.row_tokens, fix)
        for name in ("clip_low", "clip_high", "off_policy_limit", "importance_limit"):
            value = getattr(self, name)
            require(value is None or value > 0, f"rl.{name}", value, "a positive number, or None")


@dataclasses.dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning on completions of prompts, after pretraining and before reinforcement learning. What is
    not said here is as in `training`: types, recomputation, weights of the other losses. Rates are DeepSeek-V3's
    (section 5.1)."""

    steps: int = 0
    """Optimizer steps; 0 skips the stage."""
    data: tuple[str, ...] = ()
    """Globs of .jsonl, an object a line: `question`, which is put as `task.template` says, and `completion`, the text
    that follows. The loss counts the completion's tokens, and the one that ends it."""
    batch_size: int = 32
    """Sequences a step, each packed with several pairs."""
    sequence_length: int = 1024
    """Pairs whose prompt leaves no room are left out, and completions that reach further are cut; both are counted."""
    accumulation: int = 1
    """Parts a batch is cut into, whose gradients are added before one update."""
    optimizer: Optimizer = Optimizer(schedule=Schedule(peak=5e-6, warmup=0.0, decay=1.0, final=0.2))
    bias_update: float = 0.0
    """γ of the router bias; 0 freezes it, for so narrow a text says little of the balance of all."""
    malformed: float = 0.01
    """Largest share of lines that may be broken: they are left out and counted. With more the stage does not start."""

    def __post_init__(self):
        for name in ("batch_size", "sequence_length", "accumulation"):
            require(getattr(self, name) >= 1, f"sft.{name}", getattr(self, name), "at least 1")
        for name in ("steps", "bias_update"):
            require(getattr(self, name) >= 0, f"sft.{name}", getattr(self, name), "0 or more")
        require(
            len(self.data) > 0 or not self.steps, "sft.data", self.data, "name JSON lines with question and completion"
        )
        require(0 <= self.malformed <= 1, "sft.malformed", self.malformed, "a share between 0 and 1")
        fix = f"must divide sft.batch_size = {self.batch_size}"
        require(self.batch_size % self.accumulation == 0, "sft.accumulation", self.accumulation, fix)

    def training(self, rest: Training, steps: int) -> Training:
        """The numbers of `steps` of fine-tuning, with the `rest` of what pretraining has."""
        return dataclasses.replace(
            rest,
            steps=steps,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            accumulation=self.accumulation,
            bias_update=self.bias_update,
            bias_freeze=0.0,
            eval_every=0,
        )


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Rejection sampling after reinforcement learning: answers to training questions that are right and in form become
    pairs to fine-tune on (DeepSeek-R1, section 2.3.3). Answers are sampled as in `rl`, and learned as in `sft`."""

    steps: int = 0
    """Optimizer steps of the fine-tuning; 0 skips the stage."""
    questions: int = 1024
    """Training questions asked."""
    samples: int = 4
    """Answers to each."""
    keep: int = 1
    """Most answers kept of a question, all different."""
    prefer: Literal["random", "shortest"] = "random"
    """Which are kept where more are right."""
    start: Literal["base", "last"] = "base"
    """What is fine-tuned: the model with which `sft` began, as for R1, or the one that answered."""

    def __post_init__(self):
        require(self.steps >= 0, "rejection.steps", self.steps, "0 or more")
        for name in ("questions", "samples", "keep"):
            require(getattr(self, name) >= 1, f"rejection.{name}", getattr(self, name), "at least 1")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run, complete: `recipe.json` in the run's directory is one of these and can be run again."""

    run_dir: str
    """Directory of the run. Running again with the same one resumes."""
    model: ModelConfig = preset("tiny")
    seed: int = 0
    init_from: str | None = None
    """Where the first stage's weights come from in place of random ones: a Hugging Face directory, or a run's
    directory or one of its checkpoints."""
    init_parts: Literal["parameters", "whole"] = "parameters"
    """What is taken: parameters and router biases; or, of a run on the same data, also optimizer, step and place in the
    data, so that a branch goes on where the other stood."""
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    kernels: Kernels = Kernels()
    training: Training = Training()
    task: Task = Task()
    sft: SFT = SFT()
    rl: RL = RL()
    rejection: Rejection = Rejection()
    checkpoint: Checkpoint = Checkpoint()
    sample: Sample = Sample()

    def __post_init__(self):
        limit = self.model.max_position_embeddings
        fix = f"at most model.max_position_embeddings = {limit}"
        if self.training.steps:
            length = self.training.sequence_length
            require(length <= limit, "training.sequence_length", length, fix)
        if self.rl.steps:
            length = self.rl.max_prompt_tokens + self.rl.max_new_tokens
            require(length <= limit, "rl.max_prompt_tokens + rl.max_new_tokens", length, fix)
        if self.tunes:
            require(self.sft.sequence_length <= limit, "sft.sequence_length", self.sft.sequence_length, fix)
        streams = self.data.streams or 1
        for field, rows in (("training", self.training.batch_size), ("sft", self.sft.batch_size if self.tunes else 0)):
            require(rows % streams == 0, "data.streams", streams, f"must divide {field}.batch_size = {rows}")
        whole = self.init_parts == "whole"
        require(not whole or self.init_from is not None, "init_parts", "whole", "name a run's checkpoint in init_from")

    @property
    def tunes(self) -> bool:
        """Whether a stage fine-tunes as `sft` says."""
        return self.sft.steps > 0 or self.rejection.steps > 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Read `to_json`'s text back. Raises `ConfigError` for a field that is unknown, missing or of a wrong type."""
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError("recipe", str(error), "write it as JSON") from None
        return structure(cls, value, "recipe")


def load(path: str | Path) -> Recipe:
    """The recipe that a Python file binds to the name `recipe`, or that a `recipe.json` holds."""
    import runpy

    path = Path(path)
    require(path.is_file(), "recipe", str(path), "no such file; try configs/quickstart.py")
    if path.suffix == ".json":
        return Recipe.from_json(path.read_text())
    recipe = runpy.run_path(str(path)).get("recipe")
    if not isinstance(recipe, Recipe):
        raise ConfigError("recipe", str(path), "the file must bind `recipe = Recipe(…)`")
    return recipe
