"""Post-training: SFT, preference optimization, reinforcement learning from rule rewards, and rejection sampling."""

import dataclasses
import math
import re
from typing import ClassVar, Literal

from mla_moe.config.errors import (
    MAX_SIZE,
    ConfigError,
    require,
    require_between,
    require_each,
    require_field,
    require_local,
    without_secrets,
)
from mla_moe.config.optimizer import OptimizerConfig, ScheduleConfig
from mla_moe.config.pretraining import TrainingConfig
from mla_moe.config.resume import field
from mla_moe.config.storage import require_path


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Prompts and rewards. Training, validation and test prompts never overlap: a hash of the question decides."""

    name: str = "arithmetic"
    """arithmetic; reasoning_gym:NAME of that library; or a .jsonl file with `question` and `answer` in each line."""
    options: tuple[str, ...] = ()
    """Options of the task, each key=value: arithmetic has least and most (operations), reasoning_gym the library's."""
    heldout: str | None = None
    """A .jsonl file of held-out questions for a task from a .jsonl file. None: a tenth of its questions is the
    validation split, and a tenth the test split."""
    template: str = "r1_zero"
    """Prompt template: r1_zero (DeepSeek's), chat (the tokenizer's chat template), or a text with {question}."""
    format_weight: float = 1.0
    """Weight of the format reward: 1 for `<think>…</think><answer>…</answer>`, each tag once, nothing around it."""
    accuracy_weight: float = 1.0
    """Weight of the accuracy reward: 1 for the correct answer."""
    answer_format: str = "answer_tags"
    """How a completion marks its answer: answer_tags, boxed (`\\boxed{}`), last_number, choice (a letter), or
    regex:PATTERN (its first group); the last one counts. `mla-moe eval` also has auto."""
    reward_functions: tuple[str, ...] = ()
    """Reward functions, each module:name or path.py:name: `f(prompt, completion, example) -> float`, or as in TRL
    `f(prompts, completions, **columns) -> list[float]`; either may be async."""
    reward_weights: tuple[float, ...] = ()
    """Weights of the reward functions; empty: 1 each."""
    timeout: float = 5.0
    """Seconds that one call of a verifier or reward function may take. A call that raises, times out or returns no
    finite number gives reward 0 and is counted."""

    def __post_init__(self):
        require_local("task.name", self.name)
        for path in (self.heldout or "", *self.reward_functions):
            require_local("task.heldout" if path == self.heldout else "task.reward_functions", path)
        names = "format_weight accuracy_weight"
        require_each(self, "task", names, lambda x: 0 <= x < math.inf, "must be a weight of 0 or more")
        require_each(self, "task", "timeout", lambda x: 0 < x < math.inf, "must be a number of seconds")
        ok = self.template in ("r1_zero", "chat") or "{question}" in self.template
        require(ok, "task.template", self.template, "r1_zero, chat, or a text with {question}")
        formats = ("answer_tags", "boxed", "last_number", "choice", "auto")
        known = self.answer_format in formats or self.answer_format.startswith("regex:")
        require(known, "task.answer_format", self.answer_format, f"{', '.join(formats)} or regex:PATTERN")
        try:
            re.compile(self.answer_format.removeprefix("regex:"))
        except re.error as error:
            raise ConfigError(
                "task.answer_format", self.answer_format, f"is not a regular expression: {error}"
            ) from None
        count = len(self.reward_functions)
        finite = all(map(math.isfinite, self.reward_weights))
        require(finite, "task.reward_weights", self.reward_weights, "must be finite numbers")
        fits = len(self.reward_weights) in (0, count)
        require(fits, "task.reward_weights", self.reward_weights, f"give one for each of {count} task.reward_functions")
        fix = "only a task from a .jsonl file has one; remove it"
        require(self.heldout is None or self.name.endswith(".jsonl"), "task.heldout", self.heldout, fix)
        wrong = [option for option in self.options if "=" not in option]
        require(not wrong, "task.options", wrong, "write each as key=value")

    @property
    def weights_of_functions(self) -> tuple[float, ...]:
        return self.reward_weights or (1.0,) * len(self.reward_functions)


@dataclasses.dataclass(frozen=True)
class FineTuningConfig:
    """What SFT and DPO have in common. Compute dtype, remat and the weights of the other losses are those of
    `training`."""

    section: ClassVar[str]
    """The recipe's section, which errors name."""

    steps: int = field(0, change="stated")
    """Optimizer steps; 0 skips the stage, unless `epochs` is set."""
    epochs: float | None = field(None, change="stated")
    """Passes over the data, in place of steps. Their number follows from how the examples are packed."""
    data: tuple[str, ...] = ()
    """Globs of .jsonl, .json or .parquet files of examples."""
    heldout: tuple[str, ...] = ()
    """Held-out examples in the same formats, for the loss after every eval_every steps, at the start and at the end."""
    eval_every: int = field(0, resume="free")
    """Steps between evaluations on held-out examples; 0 evaluates only before the first and after the last step."""
    batch_size: int = field(32, change="stated")
    """Packed sequences per step. A sequence has several examples."""
    sequence_length: int = 1024
    """Tokens per packed sequence, and of the longest example."""
    gradient_accumulation_steps: int = field(1, change="stated")
    """Gradient accumulation: microbatches per step, whose gradients are added before one update."""
    optimizer: OptimizerConfig = OptimizerConfig()
    router_bias_update_rate: float = 0.0
    """γ: step size of the router bias update; 0 freezes the bias, which narrow data would unbalance."""
    max_malformed_fraction: float = 0.01
    """Largest fraction of malformed records, which are skipped and counted. Beyond it the stage does not start."""

    def __post_init__(self):
        section = self.section
        require_between(self, section, "batch_size sequence_length gradient_accumulation_steps", 1, MAX_SIZE)
        require_between(self, section, "steps eval_every", 0, MAX_SIZE)
        require_each(self, section, "epochs", lambda x: 0 < x < 1e6, "must be a positive number, or None")
        require(not (self.steps and self.epochs), f"{section}.epochs", self.epochs, f"is in place of {section}.steps")
        require_each(self, section, "router_bias_update_rate", lambda x: 0 <= x < math.inf, "must be 0 or more")
        message = "name the files of the examples"
        require_field(self, f"{section}.data", len(self.data) > 0 or not self.active, message)
        require_each(self, section, "max_malformed_fraction", lambda x: 0 <= x <= 1, "must be between 0 and 1")
        count, message = self.gradient_accumulation_steps, f"must divide {section}.batch_size = {self.batch_size}"
        require(self.batch_size % count == 0, f"{section}.gradient_accumulation_steps", count, message)

    @property
    def active(self) -> bool:
        """Whether the stage runs."""
        return self.steps > 0 or self.epochs is not None

    def training(self, pretraining: TrainingConfig, steps: int) -> TrainingConfig:
        """The `TrainingConfig` of `steps` steps. What the stage does not configure is as in pretraining."""
        names = "batch_size sequence_length gradient_accumulation_steps router_bias_update_rate eval_every"
        own = {name: getattr(self, name) for name in names.split()}
        return dataclasses.replace(pretraining, steps=steps, epochs=None, router_bias_freeze_fraction=0.0, **own)


@dataclasses.dataclass(frozen=True)
class SFTConfig(FineTuningConfig):
    """Supervised fine-tuning on what an assistant wrote, after pretraining and before DPO and RL. Default learning
    rates are DeepSeek-V3's (section 5.1).

    Records have `messages`, `conversations` (ShareGPT), `prompt` and `completion`, `question` and `completion`, or
    `instruction`, `input` and `output` (Alpaca). Conversations are rendered with the tokenizer's chat template; the
    loss is over the tokens of the assistant's turns with their end tokens. A text as prompt is rendered with
    `task.template`; the loss is over the completion, which follows it as it is, and an end token."""

    section = "sft"
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=5e-6, warmup_fraction=0.0, decay_fraction=1.0, final_lr_fraction=0.2)
    )
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "question_completion", "alpaca"] = "auto"
    """Format of the records. auto recognises each by its keys."""
    truncation: Literal["cut", "skip"] = "cut"
    """What becomes of an example that is longer than a sequence: cut drops its end, skip leaves it out. Both are
    counted; one whose prompt fills a sequence is always left out."""
    eval_samples: int = field(4, resume="free")
    """Held-out prompts whose completions are sampled at each evaluation, for `samples.jsonl`. Their length is
    sample.max_new_tokens; decoding is greedy."""

    def __post_init__(self):
        super().__post_init__()
        require_between(self, "sft", "eval_samples", 0, 1000)


@dataclasses.dataclass(frozen=True)
class DPOConfig(FineTuningConfig):
    """Preference optimization (DPO, IPO) after SFT and before RL. The reference policy is the model from which the
    stage starts; its parameters are in memory too.

    Records have `prompt`, `chosen` and `rejected`, texts or messages; with messages the prompt may also be the common
    beginning of both sides. A pair fills at most one sequence, each of its sides half of it: longer ones are cut."""

    section = "dpo"
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=1e-6, warmup_fraction=0.1, decay_fraction=0.9, final_lr_fraction=0.0),
        weight_decay=0.0,
    )
    loss: Literal["dpo", "dpo_norm", "ipo"] = "dpo"
    """dpo; dpo_norm, whose log-probabilities are means over the tokens of a completion; or ipo, of such means too."""
    beta: float = 0.1
    """β: how strongly the policy is kept near the reference; the τ of IPO."""

    def __post_init__(self):
        super().__post_init__()
        require_each(self, "dpo", "beta", lambda x: 0 < x < math.inf, "must be a positive number")
        require_field(self, "dpo.sequence_length", self.sequence_length >= 2, "must hold two sides of a pair")


MAX_TOP_K = 128
"""Largest number of most likely tokens per position whose log-probabilities a request can have."""


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning from rule rewards: GRPO and related objectives (DeepSeek-R1)."""

    steps: int = field(0, change="stated")
    """RL steps: each samples completions and makes `minibatches` optimizer updates. 0 skips the stage."""
    objective: Literal["grpo", "dr_grpo", "dapo", "gspo", "distillation"] = "grpo"
    """Objective: grpo (as in R1), dr_grpo (no division by standard deviation or length), dapo (clip-higher, dynamic
    sampling, no KL), gspo (one importance ratio per completion), or distillation (on-policy: the KL to `teacher` of
    each sampled token's distribution; rewards are measured only)."""
    teacher: str | None = None
    """Checkpoint of the teacher of distillation: what init_from takes, with the same vocabulary. It may be another
    model; its parameters are in memory too, in the compute dtype, on the same mesh. Or the URL of an endpoint with
    OpenAI's API, http://HOST:PORT/v1 (`mla-moe serve`, vLLM), which scores the sampled tokens."""
    teacher_model: str | None = None
    """Name of the model of a teacher behind an endpoint."""
    teacher_top_k: int = 0
    """With an endpoint: number of most likely tokens per position. The KL is then exact between the distributions over
    these tokens and one event for all others. The endpoint needs `prompt_logprobs`, as `mla-moe serve` and vLLM have
    it. 0 estimates the KL from the sampled tokens alone, with more variance."""
    prompts_per_step: int = field(32, change="stated")
    """Prompts per step."""
    group_size: int = 16
    """Completions per prompt. Advantages are relative to the mean reward of this group."""
    max_resample_rounds: int = 8
    """Dynamic sampling (dapo): largest number of sampling rounds per step, the first included (verl's
    max_num_gen_batches). Each further round replaces the groups whose completions all have the same accuracy (with
    task.accuracy_weight 0: the same reward); 1 replaces none."""
    minibatches: int = 1
    """Optimizer updates per step, each on its fraction of the groups."""
    max_prompt_tokens: int = 512
    """Longer prompts are skipped and counted."""
    max_new_tokens: int = 1024
    """Longest completion in tokens; longer ones are truncated."""
    temperature: float = 1.0
    """Sampling temperature. The trainer's log-probabilities are at the same temperature."""
    clip_ratio_low: float | None = None
    """ε_low: the importance ratio is clipped at 1 − ε_low. None: the objective's own (0.2; gspo 3e-4)."""
    clip_ratio_high: float | None = None
    """ε_high: the importance ratio is clipped at 1 + ε_high. None: the objective's own (0.2; dapo 0.28; gspo 4e-4)."""
    kl_coef: float = field(1e-3, change="stated")
    """β: weight of the KL from the reference policy in the loss; 0 keeps no reference policy."""
    ref_sync_steps: int = 400
    """Steps between updates of the reference policy to the current policy; 0 keeps the initial one."""
    off_policy_mask_threshold: float | None = None
    """δ: mask completions with a negative advantage and a mean log(π_sampler / π) above δ (V3.2). None masks none."""
    tis_clip: float | None = 2.0
    """C: truncated importance sampling (TIS) weights each token by the ratio of the trainer's to the sampler's
    probability, at most C. None does not weight."""
    overlong_buffer: int = 0
    """Soft overlong penalty (DAPO): over this many tokens before max_new_tokens the penalty rises from 0 to 1."""
    routing_replay: bool = True
    """The trainer dispatches each token to the experts that the sampler selected; it recomputes the routing weights."""
    router_bias_update_rate: float = 0.0
    """γ: step size of the router bias update; 0 freezes the bias."""
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=3e-6, warmup_fraction=0.0, decay_fraction=0.0), weight_decay=0.0
    )
    packed_length: int = 0
    """Tokens per packed sequence of an update. 0: max_prompt_tokens + max_new_tokens."""
    micro_batch_size: int = field(8, resume="free")
    """Packed sequences per microbatch of an update, over all devices: only their activations are in memory at once."""
    max_num_seqs: int = field(64, resume="free")
    """Sequence slots of the sampler: completions that are generated concurrently (continuous batching)."""
    eval_every: int = field(0, resume="free")
    """Steps between evaluations; the stage is always evaluated before its first and after its last step. 0: only
    then."""
    eval_split: Literal["validation", "test"] = "test"
    """Held-out split of the evaluations: choose settings on validation, report on test."""
    eval_prompts: int = 128
    """Held-out prompts per evaluation."""
    eval_samples: int = 4
    """Sampled completions per held-out prompt, for pass@k and majority@k, in addition to the greedy completions."""

    @property
    def teacher_is_endpoint(self) -> bool:
        return str(self.teacher).startswith(("http://", "https://"))

    @property
    def packed_sequence_length(self) -> int:
        """Tokens per packed sequence of an update."""
        return self.packed_length or self.max_prompt_tokens + self.max_new_tokens

    def __post_init__(self):
        names = "prompts_per_step group_size minibatches max_prompt_tokens max_new_tokens micro_batch_size max_num_seqs"
        require_between(self, "rl", f"{names} eval_prompts", 1, MAX_SIZE)
        require_between(self, "rl", "steps overlong_buffer packed_length eval_samples", 0, MAX_SIZE)
        require_each(self, "rl", "max_resample_rounds", lambda x: x >= 1, "must be at least 1")
        names = "kl_coef ref_sync_steps router_bias_update_rate eval_every"
        require_each(self, "rl", names, lambda x: 0 <= x < math.inf, "must be 0 or more")
        distills = self.objective == "distillation"
        message = "the completions of a group are compared with each other: at least 2"
        require(self.group_size >= 2 or distills or not self.steps, "rl.group_size", self.group_size, message)
        endpoint = self.teacher_is_endpoint
        if not endpoint:
            require_path("rl.teacher", self.teacher)
        else:
            url = without_secrets(str(self.teacher))
            ok = re.fullmatch(
                r"https?://(\w[\w.-]*|\[[\da-fA-F:.]+\])(:\d+)?(/[\w.~%-]+)*/?", str(self.teacher), re.ASCII
            )
            fix = "write http://HOST:PORT/v1; a key is taken from MLA_MOE_TEACHER_API_KEY, and is no part of the URL"
            require(ok is not None, "rl.teacher", url, fix)
        fix = "name the endpoint's model" if endpoint else "is for an endpoint; remove it, or give rl.teacher its URL"
        require(endpoint == bool(self.teacher_model), "rl.teacher_model", self.teacher_model, fix)
        require(endpoint or not self.teacher_top_k, "rl.teacher_top_k", self.teacher_top_k, "is for an endpoint; set 0")
        require_between(self, "rl", "teacher_top_k", 0, MAX_TOP_K)
        fix = "the log-probabilities of an endpoint are those at temperature 1"
        require(not endpoint or self.temperature == 1, "rl.temperature", self.temperature, fix)
        fix = "distillation needs a teacher, name its checkpoint" if distills else "needs rl.objective = 'distillation'"
        require(distills == (self.teacher is not None), "rl.teacher", self.teacher, fix)
        message = "sampling needs a positive temperature"
        require(0 < self.temperature < math.inf, "rl.temperature", self.temperature, message)
        message = f"must divide rl.prompts_per_step = {self.prompts_per_step}: a group is never split"
        require(self.prompts_per_step % self.minibatches == 0, "rl.minibatches", self.minibatches, message)
        message = f"must be below rl.max_new_tokens = {self.max_new_tokens}"
        require(self.overlong_buffer < self.max_new_tokens, "rl.overlong_buffer", self.overlong_buffer, message)
        message = "a packed sequence must hold a prompt and its completion: max_prompt_tokens + max_new_tokens, or 0"
        longest = self.max_prompt_tokens + self.max_new_tokens
        require(self.packed_sequence_length >= longest, "rl.packed_length", self.packed_length, message)
        names = "clip_ratio_low clip_ratio_high off_policy_mask_threshold tis_clip"
        require_each(self, "rl", names, lambda x: x > 0, "must be a positive number, or None")


@dataclasses.dataclass(frozen=True)
class RejectionConfig:
    """Rejection sampling after RL: completions of training prompts that are correct and in format become data for
    fine-tuning (DeepSeek-R1, section 2.3.3). They are sampled as in `rl` and trained on as in `sft`."""

    steps: int = field(0, change="stated")
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
    """Model to fine-tune: base, from which `sft` started (as for R1), or last, the newest of the run."""
    sampler: str | None = None
    """Checkpoint of another model that generates the completions (sequence-level distillation): what init_from takes,
    with the same vocabulary. None: the newest model of the run."""

    def __post_init__(self):
        require_path("rejection.sampler", self.sampler)
        require_between(self, "rejection", "steps", 0, MAX_SIZE)
        require_between(self, "rejection", "prompts samples", 1, MAX_SIZE)
        require_each(self, "rejection", "keep", lambda x: x >= 1, "must be at least 1")
