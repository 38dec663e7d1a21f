"""Post-training: SFT, reinforcement learning from rule rewards, and rejection sampling."""

import dataclasses
import math
from typing import Literal

from mla_moe.config.errors import require, require_each
from mla_moe.config.optimizer import OptimizerConfig, ScheduleConfig
from mla_moe.config.pretraining import TrainingConfig
from mla_moe.config.resume import field


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Prompts and rewards. Training, validation and test prompts never overlap: a hash of the question's text assigns
    the split."""

    name: str = "arithmetic"
    """arithmetic; reasoning_gym:NAME for a task of that library; or the path of a .jsonl file with `question` and
    `answer` in each line."""
    options: tuple[str, ...] = ()
    """Options of the task, each key=value: arithmetic has least and most (operations), reasoning_gym the library's."""
    template: str = "r1_zero"
    """Prompt template: r1_zero (DeepSeek's), chat (the tokenizer's chat template), or a text with {question}."""
    format_weight: float = 1.0
    """Weight of the format reward: 1 for `<think>…</think><answer>…</answer>`, each tag once, nothing around it."""
    accuracy_weight: float = 1.0
    """Weight of the accuracy reward: 1 for the correct answer."""
    reward_function: str | None = None
    """Custom reward function, module:name or path.py:name, called as `reward(prompt, completion, example) -> float`."""
    reward_function_weight: float = 1.0
    """Weight of the custom reward."""
    timeout: float = 5.0
    """Seconds that one call of a verifier or reward function may take. A call that raises, times out or returns no
    finite number gives reward 0 and is counted."""

    def __post_init__(self):
        require_each(self, "task", "format_weight accuracy_weight", lambda x: x >= 0, "a weight of 0 or more")
        require_each(self, "task", "timeout", lambda x: 0 < x < math.inf, "a number of seconds")
        ok = self.template in ("r1_zero", "chat") or "{question}" in self.template
        require(ok, "task.template", self.template, "r1_zero, chat, or a text with {question}")
        wrong = [option for option in self.options if "=" not in option]
        require(not wrong, "task.options", wrong, "write each as key=value")


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on completions, after pretraining and before RL. Compute dtype, remat and the weights of
    the other losses are those of `training`. Default learning rates are DeepSeek-V3's (section 5.1)."""

    steps: int = 0
    """Optimizer steps; 0 skips the stage."""
    data: tuple[str, ...] = ()
    """Globs of .jsonl files with `question` and `completion` in each line. `task.template` makes the prompt of the
    question. The loss is over the tokens of the completion and its end-of-sequence token, not over the prompt."""
    batch_size: int = 32
    """Packed sequences per step. A sequence has several prompt-completion pairs."""
    sequence_length: int = 1024
    """Tokens per packed sequence. A pair whose prompt fills it is skipped, a longer completion truncated; both are
    counted."""
    gradient_accumulation_steps: int = 1
    """Gradient accumulation: microbatches per step, whose gradients are added before one update."""
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=5e-6, warmup_fraction=0.0, decay_fraction=1.0, final_lr_fraction=0.2)
    )
    router_bias_update_rate: float = 0.0
    """γ: step size of the router bias update; 0 freezes the bias, which narrow data would unbalance."""
    max_malformed_fraction: float = 0.01
    """Largest fraction of malformed lines. They are skipped and counted; beyond this fraction the stage does not
    start."""

    def __post_init__(self):
        names = "batch_size sequence_length gradient_accumulation_steps"
        require_each(self, "sft", names, lambda x: x >= 1, "at least 1")
        require_each(self, "sft", "steps router_bias_update_rate", lambda x: x >= 0, "0 or more")
        message = "name JSON lines with question and completion"
        require(len(self.data) > 0 or not self.steps, "sft.data", self.data, message)
        require_each(self, "sft", "max_malformed_fraction", lambda x: 0 <= x <= 1, "must be between 0 and 1")
        count, message = self.gradient_accumulation_steps, f"must divide sft.batch_size = {self.batch_size}"
        require(self.batch_size % count == 0, "sft.gradient_accumulation_steps", count, message)

    def training(self, pretraining: TrainingConfig, steps: int) -> TrainingConfig:
        """The `TrainingConfig` of `steps` steps of SFT. What SFT does not configure is as in pretraining."""
        return dataclasses.replace(
            pretraining,
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
    """Reinforcement learning from rule rewards: GRPO and related objectives (DeepSeek-R1)."""

    steps: int = 0
    """RL steps: each samples completions and makes `minibatches` optimizer updates. 0 skips the stage."""
    objective: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    """Objective: grpo (as in R1), dr_grpo (no division by standard deviation or length), dapo (clip-higher, dynamic
    sampling, no KL), or gspo (one importance ratio per completion)."""
    prompts_per_step: int = 32
    """Prompts per step."""
    group_size: int = 16
    """Completions per prompt. Advantages are relative to the mean reward of this group."""
    max_resample_rounds: int = 8
    """Dynamic sampling (dapo): largest number of rounds in which filtered groups, whose completions are all correct or
    all incorrect, are replaced by groups of other prompts."""
    minibatches: int = 1
    """Optimizer updates per step, each on its fraction of the groups."""
    max_prompt_tokens: int = 512
    """Longer prompts are skipped and counted."""
    max_new_tokens: int = 1024
    """Longest completion in tokens; longer ones are truncated."""
    temperature: float = 1.0
    """Sampling temperature. The learner's log-probabilities are at the same temperature."""
    clip_ratio_low: float | None = None
    """ε_low: the importance ratio is clipped at 1 − ε_low. None: the objective's own (0.2; gspo 3e-4)."""
    clip_ratio_high: float | None = None
    """ε_high: the importance ratio is clipped at 1 + ε_high. None: the objective's own (0.2; dapo 0.28; gspo 4e-4)."""
    kl_coef: float = 1e-3
    """β: weight of the KL from the reference policy in the loss; 0 keeps no reference policy."""
    ref_sync_steps: int = 400
    """Steps between updates of the reference policy to the current policy; 0 keeps the initial one."""
    off_policy_mask_threshold: float | None = None
    """δ: completions with a negative advantage and a mean log(π_old / π) above δ are masked out of the loss (V3.2).
    None masks none."""
    tis_clip: float | None = 2.0
    """C: truncated importance sampling (TIS) weights each token by the ratio of the trainer's to the sampler's
    probability, at most C. None does not weight."""
    overlong_buffer: int = 0
    """Soft overlong penalty (DAPO): over this many tokens before max_new_tokens the penalty rises from 0 to 1."""
    routing_replay: bool = True
    """The learner dispatches each token to the experts that the sampler selected; it recomputes the routing weights."""
    router_bias_update_rate: float = 0.0
    """γ: step size of the router bias update; 0 freezes the bias."""
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=3e-6, warmup_fraction=0.0, decay_fraction=0.0), weight_decay=0.0
    )
    packed_length: int = 0
    """Tokens per packed sequence of an update. 0: max_prompt_tokens + max_new_tokens."""
    micro_batch_size: int = field(8, resume="free")
    """Packed sequences per microbatch of an update, over all devices: only their activations are in memory at one
    time."""
    max_num_seqs: int = field(64, resume="free")
    """Sequence slots of the sampler: completions that are generated concurrently (continuous batching)."""
    eval_every: int = field(0, resume="free")
    """Steps between evaluations; the stage is always evaluated before its first and after its last step."""
    eval_split: Literal["validation", "test"] = "test"
    """Held-out split of the evaluations: choose settings on validation, report on test."""
    eval_prompts: int = 128
    """Held-out prompts per evaluation."""
    eval_samples: int = 4
    """Sampled completions per held-out prompt, for pass@k and majority@k, in addition to the greedy completions."""

    @property
    def packed_row_length(self) -> int:
        """Tokens per packed sequence of an update."""
        return self.packed_length or self.max_prompt_tokens + self.max_new_tokens

    def __post_init__(self):
        names = "prompts_per_step group_size minibatches max_resample_rounds max_prompt_tokens max_new_tokens"
        names += " micro_batch_size max_num_seqs eval_prompts"
        require_each(self, "rl", names, lambda x: x >= 1, "at least 1")
        names = "steps kl_coef ref_sync_steps overlong_buffer router_bias_update_rate packed_length eval_samples"
        require_each(self, "rl", names, lambda x: x >= 0, "0 or more")
        message = "the completions of a group are compared with each other: at least 2"
        require(self.group_size >= 2 or not self.steps, "rl.group_size", self.group_size, message)
        require(self.temperature > 0, "rl.temperature", self.temperature, "sampling needs a positive temperature")
        message = f"must divide rl.prompts_per_step = {self.prompts_per_step}: a group is never split"
        require(self.prompts_per_step % self.minibatches == 0, "rl.minibatches", self.minibatches, message)
        message = f"must be below rl.max_new_tokens = {self.max_new_tokens}"
        require(self.overlong_buffer < self.max_new_tokens, "rl.overlong_buffer", self.overlong_buffer, message)
        message = "a packed sequence must hold a prompt and its completion: max_prompt_tokens + max_new_tokens, or 0"
        longest = self.max_prompt_tokens + self.max_new_tokens
        require(self.packed_row_length >= longest, "rl.packed_length", self.packed_length, message)
        names = "clip_ratio_low clip_ratio_high off_policy_mask_threshold tis_clip"
        require_each(self, "rl", names, lambda x: x > 0, "a positive number, or None")


@dataclasses.dataclass(frozen=True)
class RejectionConfig:
    """Rejection sampling after RL: completions of training prompts that are correct and in format become data for
    fine-tuning (DeepSeek-R1, section 2.3.3). They are sampled as in `rl` and trained on as in `sft`."""

    steps: int = 0
    """Optimizer steps of the fine-tuning; 0 skips the stage."""
    prompts: int = 1024
    """Training prompts to sample completions of."""
    samples: int = 4
    """Completions sampled per prompt."""
    keep: int = 1
    """Largest number of different completions kept per prompt."""
    prefer: Literal["random", "shortest"] = "random"
    """Which correct completions are kept, if there are more."""
    start: Literal["base", "last"] = "base"
    """Model that is fine-tuned: base, from which `sft` started (as for R1), or last, which generated the
    completions."""

    def __post_init__(self):
        require(self.steps >= 0, "rejection.steps", self.steps, "0 or more")
        require_each(self, "rejection", "prompts samples keep", lambda x: x >= 1, "at least 1")
