"""RL: GRPO and related objectives with rule-based rewards (DeepSeek-R1, section 2.2), as in TRL's `GRPOTrainer`.

A step, with the `rl.*` flags that control it:

1. Rollout (`rl/rollout.py`, `rl/group_sampling.py`). The sampler gets the current weights and generates `group_size`
   completions for each of `prompts_per_step` prompts: at most `max_new_tokens` tokens each, at `temperature`,
   `max_num_seqs` sequences at a time. Prompts of more than `max_prompt_tokens` tokens are skipped. With `objective
   dapo`, groups whose completions all have the same accuracy (with `task.accuracy_weight` 0: the same reward) are
   filtered and replaced by groups of other prompts (dynamic sampling), until the batch is full or `max_resample_rounds`
   rounds, the first sampling included, are over; then filtered groups fill the batch.
2. Reward (`rl/rewards.py`): format, accuracy and the functions of the user, with the weights `task.format_weight`,
   `task.accuracy_weight` and `task.reward_weights`. A call longer than `task.timeout` seconds counts as 0. A linear
   penalty, 0 to 1 over the last `overlong_buffer` tokens before `max_new_tokens`, is subtracted.
3. Advantage (`rl/objectives.py`): the reward minus the mean of its group, divided by the group's standard deviation;
   `dr_grpo` does not divide.
4. Update (`rl/learner.py`). The groups are split into `minibatches`, with one update of `optimizer` for each: one epoch
   per rollout. Gradients accumulate over microbatches of `micro_batch_size` packed sequences (of all devices together)
   of `packed_length` tokens (0: `max_prompt_tokens` + `max_new_tokens`). `objective` selects the loss. The ratio of the
   new probability of a token to the old one, which the trainer computes before the first update, is clipped at
   1 − `clip_ratio_low` and 1 + `clip_ratio_high` (None: the objective's published values). `kl_coef` is the
   weight of the KL to the reference policy, which is replaced by a copy of the current policy every `ref_sync_steps`
   steps (0: never); `dapo` has no KL. Truncated importance sampling (TIS) weights each token by the ratio of the
   trainer's to the sampler's probability, at most `tis_clip`. `off_policy_mask_threshold` masks completions with a
   negative advantage whose mean log(π_sampler / π) per token is above it. With `objective distillation` the loss is the
   KL to `teacher` instead: exact for a checkpoint; exact over the `teacher_top_k` most likely tokens and one event for
   all others for an endpoint, which serves `teacher_model`; with `teacher_top_k` 0 estimated from the sampled tokens,
   and only this estimate uses the ratio (unclipped) and TIS. `routing_replay` sends each token to the experts that the
   sampler selected. `router_bias_update_rate` is the step size of the router biases (0, the default: frozen).
5. Evaluation (`rl/evaluate.py`) before the first step, every `eval_every` steps and at the end, on the first
   `eval_prompts` prompts of `eval_split` (validation or test): greedy, greedy with the completion prefilled with
   `<think>`, and `eval_samples` samples per prompt at `temperature` for pass@k and majority@k, k = `eval_samples`.

There are `steps` such steps; 0 skips RL. The loop, with checkpoints and logging, is `training.trainer.Trainer`.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mla_moe.checkpoint.data_position import DataPosition
from mla_moe.config import Recipe, require
from mla_moe.nn.abstract_model import Arrays
from mla_moe.nn.transformer import Transformer
from mla_moe.rl.evaluate import evaluate
from mla_moe.rl.group_sampling import GroupBatch, sample_groups
from mla_moe.rl.learner import Learner
from mla_moe.rl.objectives import kl_coefficient
from mla_moe.rl.rollout import Rollout, from_process_0, open_rollout
from mla_moe.rl.teacher import Teacher
from mla_moe.rl.teacher_endpoint import TeacherEndpoint, TopTokens
from mla_moe.text.round_trip import lost_fraction
from mla_moe.training.console import Console, duration
from mla_moe.training.initialization import starting_checkpoint, state_from_checkpoint
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_context import RunContext
from mla_moe.training.step import TrainState
from mla_moe.training.trainer import StepMetrics, Trainer, Writer

STAGE = "rl"


def train_rl(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Train to `recipe.rl.steps`, from the newest checkpoint if there is one, else from the last earlier stage of this
    run or from `init_from`. Raises as `Trainer.train` does."""
    context = RunContext.create(recipe, run_dir, console, recipe.lora)
    with open_rollout(context, recipe.rl) as rollout:
        RLTrainer(context, rollout).train()


class RLState(NamedTuple):
    """A `TrainState` and the reference policy."""

    step: jax.Array
    """Number of updates, `rl.minibatches` per step."""
    params: Arrays
    biases: Arrays
    optimizer: optax.OptState
    frozen: Arrays
    reference: Arrays
    """Parameters of the reference policy for the KL; empty without a KL term."""


class PromptPosition:
    """Position in the training prompts, which checkpoints store."""

    def __init__(self, task: str, fingerprint: int):
        """`fingerprint` identifies the prompts of the task, to detect others on resume."""
        self._task, self._fingerprint, self.next = task, fingerprint, 0

    def states(self) -> Mapping[int, str]:
        return {0: json.dumps({"next": self.next, "questions": self._fingerprint})}

    def restore(self, read: Callable[[int], str]) -> None:
        """Raises `ConfigError` if the prompts are not those of the checkpoint."""
        state = json.loads(read(0))
        fix = "has other prompts than at the start of the run; restore them, or start another run"
        require(state["questions"] == self._fingerprint, "task.name", self._task, fix)
        self.next = state["next"]


class RLTrainer(Trainer[RLState, GroupBatch]):
    metrics_one_step_late = False  # the learner returns them on the host
    evaluates_first = True

    def __init__(self, context: RunContext, rollout: Rollout):
        self.rl, self.rollout = context.recipe.rl, rollout
        self._prompts = PromptPosition(context.recipe.task.name, rollout.task.fingerprint)
        self.updates_per_step = self.rl.minibatches
        # The mean policy-gradient loss is near 0 at any quality of the policy, so it has no spikes to detect.
        loop = {"steps": self.rl.steps, "epochs": None, "eval_every": self.rl.eval_every, "log_every": 1}
        training = dataclasses.replace(context.recipe.training, **loop, loss_spike_threshold=None)
        super().__init__(STAGE, context, training, self.rl.optimizer)
        self.expert_load_every = 1

    @cached_property
    def abstract_state(self) -> RLState:
        state = self.abstract_train_state
        return RLState(*state, reference=state.params if kl_coefficient(self.rl) else {})

    def initial_state(self, position: DataPosition) -> tuple[RLState, int | None]:
        state = state_from_checkpoint(self.start, self.context, self.tx)
        self.context.console.print(f"started from {self.start}")
        return RLState(*state, reference=_copy(state.params) if kl_coefficient(self.rl) else {}), None

    @cached_property
    def start(self) -> str | Path:
        return starting_checkpoint(STAGE, self.context.recipe, self.context.run_dir)

    @property
    def position(self) -> PromptPosition:
        return self._prompts

    @cached_property
    def teacher(self) -> Teacher | None:
        path = None if self.rl.teacher_is_endpoint else self.rl.teacher
        return Teacher(path, "rl.teacher", self.context) if path is not None else None

    @cached_property
    def teacher_endpoint(self) -> TeacherEndpoint | None:
        url, model, tokenizer = self.rl.teacher, self.rl.teacher_model, self.context.tokenizer
        if url is None or model is None:
            return None
        top_k = self.rl.teacher_top_k
        return TeacherEndpoint(url, model, tokenizer.vocab_size, tokenizer.token_bytes, top_k=top_k)

    def prepare(self) -> None:
        context, teacher = self.context, self.teacher
        model = teacher.model if teacher else None
        self.learner = Learner(context.abstract_model, self.tx, context.recipe, context.mesh, model)
        self._teacher_arrays = teacher.load() if teacher else {}

    def memory_per_device(self) -> dict[str, float]:
        memory = super().memory_per_device()
        return memory | ({"teacher": self.teacher.bytes_per_device} if self.teacher else {})

    def model(self, state: RLState) -> Transformer:
        return self.context.abstract_model.merge(TrainState(*state[:-1]).arrays)

    def next_batch(self, state: RLState, status: Callable[[str], None]) -> GroupBatch:
        """Sample and score a group of completions for each of the next prompts, with the current weights."""
        start = time.monotonic()
        self.rollout.load_weights(self.model(state))
        groups = sample_groups(self.rollout, self.rl, self.context.recipe.seed, self._prompts.next, status)
        self._prompts.next = groups.next_prompt
        self.rollout.drop_weights()
        if (endpoint := self.teacher_endpoint) is not None:
            status("scored by the teacher")
            completions = [scored.completion for group in groups.completions for scored in group]
            texts = [[*completion.request.prompt, *completion.tokens] for completion in completions]
            if self.rl.teacher_top_k:
                tops = iter(from_process_0(lambda: endpoint.score_top(texts)))
                top = [[_last(next(tops), scored.length) for scored in group] for group in groups.completions]
                groups = dataclasses.replace(groups, teacher_top=top)
            else:
                found = iter(from_process_0(lambda: endpoint.score(texts)))
                scores = [[next(found)[-scored.length :] for scored in group] for group in groups.completions]
                groups = dataclasses.replace(groups, teacher_logprobs=scores)
        return dataclasses.replace(groups, sample_seconds=time.monotonic() - start)

    def step(self, number: int, state: RLState, batch: GroupBatch) -> tuple[RLState, dict[str, Any]]:
        """Update the policy on each minibatch of groups, and sync the reference policy when it is due."""
        if self.rl.objective != "distillation" and not batch.has_signal:
            causes = ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in batch.uniform.items())
            why = f"in every group all rewards are equal ({causes})"
            if batch.prompts_too_long:
                limit = f"longer than rl.max_prompt_tokens = {self.rl.max_prompt_tokens}"
                why += f"; {batch.prompts_too_long} prompts skipped: {limit} (longest {self.rollout.longest_prompt})"
            self.context.console.print(f"step {number} has no signal: {why}")
        policy, teacher = TrainState(*state[:-1]), self._teacher_arrays
        updated, metrics = self.learner.update_policy(policy, state.reference, batch, teacher)
        state = RLState(*updated, reference=state.reference)
        if kl_coefficient(self.rl) and self.rl.ref_sync_steps and number % self.rl.ref_sync_steps == 0:
            state = state._replace(reference=_copy(state.params))
        return state, metrics

    def row(self, number: int, values: dict[str, Any], batch: GroupBatch, seconds: float) -> dict[str, float]:
        del values["load_LE"]
        tokens = sum(completion.length for group in batch.completions for completion in group)
        row = batch.metrics() | values | {"lr": self.learning_rate(number), "tokens_per_s": tokens / seconds}
        if self.teacher_endpoint is not None:
            row["distillation/teacher_retries"] = self.teacher_endpoint.retries
        return row | {"sample_seconds": batch.sample_seconds, "step_seconds": seconds}

    def batch_arrays(self, batch: GroupBatch) -> Mapping[str, np.ndarray]:
        return self.learner.pack(batch)

    def describe(self) -> list[tuple[str, str]]:
        task, rl = self.context.recipe.task, self.rl
        self.rollout.prompts("train", 0, 1)  # raises for prompts that cannot be used
        self.rollout.prompts(rl.eval_split, 0, rl.eval_prompts)
        questions = [self.rollout.task.example("train", number).question for number in range(64)]
        limit = self.context.recipe.data.max_lost_bytes_fraction
        lost = lost_fraction(self.context.tokenizer, questions, "the questions of task.name", limit)
        kl = f"KL coefficient {kl_coefficient(rl):g}" if kl_coefficient(rl) else "no KL"
        kl = f"teacher {rl.teacher}, {self.teacher.size}" if self.teacher else kl
        if (endpoint := self.teacher_endpoint) is not None:
            from_process_0(endpoint.check)  # raises for one that cannot be used
            kl = f"teacher {rl.teacher_model} at {rl.teacher}"
            kl += f", its {rl.teacher_top_k} most likely tokens" * (rl.teacher_top_k > 0)
        prompts, count = rl.prompts_per_step, rl.prompts_per_step * rl.group_size
        return [
            ("task", " ".join((task.name, *task.options))),
            ("objective", f"{rl.objective}, {kl}, {rl.minibatches} updates per step"),
            ("completions per step", f"{count}: {rl.group_size} for each of {prompts} prompts"),
            ("lost by the tokenizer", f"{lost:.2%} of the bytes of a sample"),
        ]

    def evaluate(self, number: int, state: RLState, writer: Writer) -> dict[str, float]:
        rl = self.rl
        self.rollout.load_weights(self.model(state))
        result = evaluate(self.rollout, rl.eval_split, rl.eval_prompts, rl.eval_samples, self.context.recipe.seed + 1)
        scores = result.metrics()
        writer.append_samples(result.sample_rows(number))
        texts = (f"{name.strip()} {scores[key]:{form}}" for name, key, form in _SHOWN if key in scores)
        self.context.console.print(f"step {number}: {', '.join(texts)}")
        return scores

    def finish(self, state: RLState, scores: Mapping[str, float], metrics: StepMetrics, writer: Writer) -> None:
        """Write a summary for the report and the console: evaluation scores before and after training."""
        if jax.process_index() > 0:
            return
        rows = read_rows(self.context.run_dir / "metrics.jsonl", STAGE)
        evaluations = [row for row in rows if _SHOWN[0][1] in row]
        first, last = evaluations[0], evaluations[-1]
        table = {name: f"{first[key]:{form}} -> {last[key]:{form}}" for name, key, form in _SHOWN if key in first}
        table |= {"time in RL steps": duration(self.seconds)}
        self.context.write_result("held-out prompts, before and after", table)


_SHOWN = (
    ("correct answers", "eval/accuracy", ".1%"),
    ("  prefilled with <think>", "eval/forced_accuracy", ".1%"),
    ("correct format", "eval/format_rate", ".1%"),
    ("tokens of a sampled completion", "eval/response_length", ".1f"),
)


@jax.jit
def _copy(params: Arrays) -> Arrays:
    return jax.tree.map(jnp.copy, params)


def _last(top: TopTokens, count: int) -> TopTokens:
    """The entries of the last `count` positions."""
    ids, logprobs = top
    return TopTokens(ids[-count:], logprobs[-count:])
