"""What a model is taught after it has read: answers to copy, and questions with rewards."""

import dataclasses
import math
from typing import Literal

from mla_moe.config.errors import require
from mla_moe.config.optimizer import OptimizerConfig, ScheduleConfig
from mla_moe.config.pretraining import TrainingConfig


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What is asked, how it is put to the model, and what an answer is worth. Training, validation and test questions
    never overlap: the text of a question alone decides which it is."""

    name: str = "arithmetic"
    """arithmetic; reasoning_gym:NAME, any of that library's tasks; or the path of JSON lines with question, answer."""
    options: tuple[str, ...] = ()
    """Settings of the task, each `key=value`: arithmetic takes least and most (operations), reasoning_gym its own."""
    template: str = "r1_zero"
    """r1_zero, DeepSeek's prompt; chat, the tokenizer's own template; or a text with {question} in it."""
    format_weight: float = 1.0
    """Weight of the reward for `<think>…</think><answer>…</answer>`, in this order, once, and nothing else."""
    accuracy_weight: float = 1.0
    """Weight of the reward for the right answer."""
    reward_function: str | None = None
    """A reward of your own, `module:name` or `path.py:name`: `reward(prompt, completion, example) -> float`."""
    reward_function_weight: float = 1.0
    timeout: float = 5.0
    """Seconds that judging one completion may take. What raises, hangs or is not a number counts 0, and is counted."""

    def __post_init__(self):
        for name in ("format_weight", "accuracy_weight"):
            require(getattr(self, name) >= 0, f"task.{name}", getattr(self, name), "a weight of 0 or more")
        require(0 < self.timeout < math.inf, "task.timeout", self.timeout, "a number of seconds")
        ok = self.template in ("r1_zero", "chat") or "{question}" in self.template
        require(ok, "task.template", self.template, "r1_zero, chat, or a text with {question}")
        wrong = [option for option in self.options if "=" not in option]
        require(not wrong, "task.options", wrong, "write each as key=value")


@dataclasses.dataclass(frozen=True)
class SFTConfig:
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
    gradient_accumulation_steps: int = 1
    """Parts a batch is cut into, whose gradients are added before one update."""
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=5e-6, warmup_fraction=0.0, decay_fraction=1.0, final_lr_fraction=0.2)
    )
    router_bias_update_rate: float = 0.0
    """γ of the router bias; 0 freezes it, for so narrow a text says little of the balance of all."""
    max_malformed_fraction: float = 0.01
    """Largest share of lines that may be broken: they are left out and counted. With more the stage does not start."""

    def __post_init__(self):
        for name in ("batch_size", "sequence_length", "gradient_accumulation_steps"):
            require(getattr(self, name) >= 1, f"sft.{name}", getattr(self, name), "at least 1")
        for name in ("steps", "router_bias_update_rate"):
            require(getattr(self, name) >= 0, f"sft.{name}", getattr(self, name), "0 or more")
        require(
            len(self.data) > 0 or not self.steps, "sft.data", self.data, "name JSON lines with question and completion"
        )
        require(
            0 <= self.max_malformed_fraction <= 1,
            "sft.max_malformed_fraction",
            self.max_malformed_fraction,
            "a share between 0 and 1",
        )
        fix = f"must divide sft.batch_size = {self.batch_size}"
        require(
            self.batch_size % self.gradient_accumulation_steps == 0,
            "sft.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            fix,
        )

    def training(self, rest: TrainingConfig, steps: int) -> TrainingConfig:
        """The numbers of `steps` of fine-tuning, with the `rest` of what pretraining has."""
        return dataclasses.replace(
            rest,
            steps=steps,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            router_bias_update_rate=self.router_bias_update_rate,
            router_bias_freeze_fraction=0.0,
            eval_every=0,
        )


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning from rule rewards: groups of answers, compared with each other (DeepSeek-R1)."""

    steps: int = 0
    """Rollouts, each with `minibatches` updates; 0 skips the stage."""
    objective: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    """How answers that are better than their group become likelier (docs/reinforcement-learning.md)."""
    prompts_per_step: int = 32
    """Questions a step."""
    group_size: int = 16
    """Answers to each question."""
    max_resample_rounds: int = 8
    """Times that dapo asks other questions, in place of those whose answers are all right or all wrong."""
    minibatches: int = 1
    """Updates a step, each on its share of the groups."""
    max_prompt_tokens: int = 512
    """Questions with a longer prompt are passed over, and counted."""
    max_new_tokens: int = 1024
    """Longest answer; longer ones are cut off."""
    temperature: float = 1.0
    """Of sampling; the trainer's probabilities are of the same."""
    clip_ratio_low: float | None = None
    """How far a ratio may fall below 1; None takes the objective's own (0.2; gspo 3e-4)."""
    clip_ratio_high: float | None = None
    """How far it may rise above 1; None takes the objective's own (0.2; dapo 0.28; gspo 4e-4)."""
    kl_coef: float = 1e-3
    """β, weight of the divergence from the reference."""
    ref_sync_steps: int = 400
    """Steps after which the reference becomes the model of that time; 0 keeps the first."""
    off_policy_mask_threshold: float | None = None
    """δ: answers with a negative advantage whose mean log(π_old / π) is larger are left out (V3.2); None keeps all."""
    tis_clip: float | None = 2.0
    """C: the trainer's over the sampler's probability weighs a token, at most so much; None does not weigh."""
    overlong_buffer: int = 0
    """Length of the zone before `max_new_tokens`, in tokens, over which a penalty rises to 1 (DAPO)."""
    routing_replay: bool = True
    """The trainer sends tokens to the experts that the sampler chose; gate scores are its own."""
    router_bias_update_rate: float = 0.0
    """γ of the router bias; 0 freezes it."""
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=3e-6, warmup_fraction=0.0, decay_fraction=0.0), weight_decay=0.0
    )
    packed_length: int = 0
    """Tokens of a row into which answers are packed for an update; 0 takes what the longest may need."""
    micro_batch_size: int = 8
    """Rows whose activations exist at one time."""
    max_num_seqs: int = 64
    """Answers sampled at a time."""
    eval_every: int = 0
    """Steps between evaluations; the stage always has one before and one after."""
    eval_split: Literal["validation", "test"] = "test"
    """Held-out questions: choose settings on validation, report on test."""
    eval_prompts: int = 128
    """Held-out questions of an evaluation."""
    eval_samples: int = 4
    """Answers sampled to each question, for pass@k and the majority's; greedy answers come on top."""

    @property
    def packed_row_length(self) -> int:
        """Tokens of a row for an update."""
        return self.packed_length or self.max_prompt_tokens + self.max_new_tokens

    def __post_init__(self):
        for name in (
            "prompts_per_step",
            "group_size",
            "minibatches",
            "max_resample_rounds",
            "max_prompt_tokens",
            "max_new_tokens",
            "micro_batch_size",
            "max_num_seqs",
            "eval_prompts",
        ):
            require(getattr(self, name) >= 1, f"rl.{name}", getattr(self, name), "at least 1")
        for name in (
            "steps",
            "kl_coef",
            "ref_sync_steps",
            "overlong_buffer",
            "router_bias_update_rate",
            "packed_length",
            "eval_samples",
        ):
            require(getattr(self, name) >= 0, f"rl.{name}", getattr(self, name), "0 or more")
        require(
            self.group_size >= 2 or not self.steps, "rl.group_size", self.group_size, "answers are compared: 2 or more"
        )
        require(self.temperature > 0, "rl.temperature", self.temperature, "sampling needs a positive one")
        fix = f"must divide rl.prompts_per_step = {self.prompts_per_step}: a group stays together"
        require(self.prompts_per_step % self.minibatches == 0, "rl.minibatches", self.minibatches, fix)
        fix = f"must be below rl.max_new_tokens = {self.max_new_tokens}"
        require(self.overlong_buffer < self.max_new_tokens, "rl.overlong_buffer", self.overlong_buffer, fix)
        fix = "an answer and its prompt must fit a row: max_prompt_tokens + max_new_tokens, or 0"
        longest = self.max_prompt_tokens + self.max_new_tokens
        require(self.packed_row_length >= longest, "rl.packed_length", self.packed_length, fix)
        for name in ("clip_ratio_low", "clip_ratio_high", "off_policy_mask_threshold", "tis_clip"):
            value = getattr(self, name)
            require(value is None or value > 0, f"rl.{name}", value, "a positive number, or None")


@dataclasses.dataclass(frozen=True)
class RejectionConfig:
    """Rejection sampling after reinforcement learning: answers to training questions that are right and in form become
    pairs to fine-tune on (DeepSeek-R1, section 2.3.3). Answers are sampled as in `rl`, and learned as in `sft`."""

    steps: int = 0
    """Optimizer steps of the fine-tuning; 0 skips the stage."""
    prompts: int = 1024
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
        for name in ("prompts", "samples", "keep"):
            require(getattr(self, name) >= 1, f"rejection.{name}", getattr(self, name), "at least 1")
