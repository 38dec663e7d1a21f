"""RL: GRPO and related objectives with rule-based rewards (DeepSeek-R1, section 2.2), as in TRL's `GRPOTrainer`.

A step, with the `rl.*` flags that control it:

1. Rollout (`rl/rollout.py`, `rl/group_sampling.py`). The sampler gets the current weights and generates `group_size`
   completions for each of `prompts_per_step` prompts: at most `max_new_tokens` tokens each, at `temperature`,
   `max_num_seqs` sequences at a time. Prompts of more than `max_prompt_tokens` tokens are skipped. With `objective
   dapo`, groups whose rewards are all equal are filtered and replaced by groups of other prompts (dynamic sampling), in
   up to `max_resample_rounds` rounds.
2. Reward (`rl/rewards.py`): format, accuracy and a function of the user, weighted by the `task.*` flags. A completion
   that ends within `overlong_buffer` tokens of `max_new_tokens` gets a penalty that rises to 1.
3. Advantage (`rl/objectives.py`): the reward minus the mean of its group, divided by the group's standard deviation;
   `dr_grpo` does not divide.
4. Update (`rl/learner.py`). The groups are split into `minibatches`, with one update of `optimizer` for each. Gradients
   accumulate over microbatches of `micro_batch_size` packed sequences of `packed_length` tokens. `objective` selects
   the loss. `clip_ratio_low` and `clip_ratio_high` clip the ratio of new to old probability. `kl_coef` is the weight of
   the KL to the reference policy, which becomes the current policy every `ref_sync_steps` steps. `tis_clip` bounds the
   weights of truncated importance sampling (TIS), which correct for the sampler's probabilities.
   `off_policy_mask_threshold` masks completions with a negative advantage that have become much less likely.
   `routing_replay` sends each token to the experts that the sampler selected, and `router_bias_update_rate` updates the
   router biases.
5. Evaluation (`rl/evaluate.py`) before the first step, every `eval_every` steps and at the end, on the first
   `eval_prompts` prompts of `eval_split`: greedy, greedy with the completion prefilled with `<think>`, and
   `eval_samples` samples per prompt for pass@k and majority@k.

There are `steps` such steps. The loop, with checkpoints and logging, is `training.trainer.Trainer`.
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

from mla_moe.checkpoint.manager import DataPosition
from mla_moe.config import Recipe, TaskConfig, require
from mla_moe.nn.abstract_model import Arrays
from mla_moe.nn.transformer import Transformer
from mla_moe.rl.evaluate import evaluate
from mla_moe.rl.group_sampling import GroupBatch, sample_groups
from mla_moe.rl.learner import Learner
from mla_moe.rl.objectives import kl_coefficient
from mla_moe.rl.rewards import Reward
from mla_moe.rl.rollout import Rollout
from mla_moe.rl.tasks import open_task
from mla_moe.training.console import Console, duration
from mla_moe.training.initialization import starting_checkpoint, state_from_checkpoint
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_context import RunContext
from mla_moe.training.run_directory import add_summary
from mla_moe.training.step import TrainState
from mla_moe.training.trainer import StepMetrics, Trainer, Writer

STAGE = "rl"


def train_rl(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Train to `recipe.rl.steps`, from the newest checkpoint if there is one, else from the last earlier stage of this
    run or from `init_from`. Raises as `Trainer.train` does."""
    context = RunContext.create(recipe, run_dir, console)
    task = open_task(recipe.task)
    with Reward(recipe.task, task, log=console.print) as reward:
        rollout = Rollout(recipe.rl, recipe.task.template, task, reward, context.chat_tokenizer)
        RLTrainer(context, rollout, PromptPosition(recipe.task, task.fingerprint)).train()


class RLState(NamedTuple):
    """A `TrainState` and the reference policy."""

    step: jax.Array
    """Number of updates, `rl.minibatches` per step."""
    params: Arrays
    biases: Arrays
    optimizer: optax.OptState
    reference: Arrays
    """Parameters of the reference policy for the KL; empty without a KL term."""

    @property
    def train_state(self) -> TrainState:
        return TrainState(self.step, self.params, self.biases, self.optimizer)


class RolloutBatch(NamedTuple):
    groups: GroupBatch
    sample_seconds: float


class PromptPosition:
    """Position in the training prompts, which checkpoints store."""

    def __init__(self, task: TaskConfig, fingerprint: int):
        """`fingerprint` identifies the prompts, to detect others on resume."""
        self._task, self._fingerprint, self.next = task, fingerprint, 0

    def states(self) -> Mapping[int, str]:
        return {0: json.dumps({"next": self.next, "questions": self._fingerprint})}

    def restore(self, read: Callable[[int], str]) -> None:
        """Raises `ConfigError` if the prompts are not those of the checkpoint."""
        state = json.loads(read(0))
        fix = "has other prompts than at the start of the run; restore them, or start another run"
        require(state["questions"] == self._fingerprint, "task.name", self._task.name, fix)
        self.next = state["next"]


class RLTrainer(Trainer[RLState, RolloutBatch]):
    metrics_one_step_late = False  # the learner returns them on the host
    evaluates_first = True

    def __init__(self, context: RunContext, rollout: Rollout, prompts: PromptPosition):
        self.rl, self.rollout, self._prompts = context.recipe.rl, rollout, prompts
        self.updates_per_step = self.rl.minibatches
        # The mean loss of advantages is near 0 at any quality of the policy, so it has no spikes to detect.
        loop = {"steps": self.rl.steps, "eval_every": self.rl.eval_every, "log_every": 1}
        training = dataclasses.replace(context.recipe.training, **loop, loss_spike_threshold=None)
        super().__init__(STAGE, context, training, self.rl.optimizer)

    @property
    def abstract_state(self) -> RLState:
        state = self.abstract_train_state
        return RLState(*state, reference=state.params if kl_coefficient(self.rl) else {})

    def initial_state(self, position: DataPosition) -> tuple[RLState, int | None]:
        context, recipe = self.context, self.context.recipe
        path = starting_checkpoint(STAGE, recipe, context.run_dir)
        state = state_from_checkpoint(path, recipe, context.abstract_model, self.tx, context.mesh)
        context.console.print(f"started from {path}")
        return RLState(*state, reference=_copy(state.params) if kl_coefficient(self.rl) else {}), None

    @property
    def position(self) -> PromptPosition:
        return self._prompts

    @cached_property
    def learner(self) -> Learner:
        return Learner(self.context, self.tx)

    def model(self, state: RLState) -> Transformer:
        return self.context.abstract_model.merge(state.params | state.biases)

    def next_batch(self, state: RLState, status: Callable[[str], None]) -> RolloutBatch:
        """Sample and score a group of completions for each of the next prompts, with the current weights."""
        start = time.monotonic()
        self.rollout.load_weights(self.model(state))
        groups = sample_groups(self.rollout, self.rl, self.context.recipe.seed, self._prompts.next, status)
        self._prompts.next = groups.next_prompt
        self.rollout.drop_weights()
        return RolloutBatch(groups, time.monotonic() - start)

    def step(self, number: int, state: RLState, batch: RolloutBatch) -> tuple[RLState, dict[str, Any]]:
        """Update the policy on each minibatch of groups, and sync the reference policy when it is due."""
        updated, output = self.learner.update_policy(state.train_state, state.reference, batch.groups)
        state = RLState(*updated, reference=state.reference)
        if kl_coefficient(self.rl) and self.rl.ref_sync_steps and number % self.rl.ref_sync_steps == 0:
            state = state._replace(reference=_copy(state.params))
        return state, output.metrics | {"load_LE": output.load_LE}

    def row(
        self, number: int, values: dict[str, Any], load_LE: np.ndarray, batch: RolloutBatch, seconds: float
    ) -> dict[str, float]:
        timing = {
            "lr": self.learning_rate(number),
            "tokens_per_s": batch.groups.tokens / seconds,
            "sample_seconds": batch.sample_seconds,
            "step_seconds": seconds,
        }
        return batch.groups.metrics() | values | timing

    def batch_arrays(self, batch: RolloutBatch) -> Mapping[str, np.ndarray]:
        return self.learner.pack(batch.groups)

    @property
    def expert_load_every(self) -> int:
        return 1

    def describe(self) -> list[tuple[str, str]]:
        task, rl = self.context.recipe.task, self.rl
        self.rollout.prompts("train", 0, 1)  # raises for prompts that cannot be used
        self.rollout.prompts(rl.eval_split, 0, rl.eval_prompts)
        kl = f"KL coefficient {kl_coefficient(rl):g}" if kl_coefficient(rl) else "no KL"
        completions = (
            f"{rl.prompts_per_step * rl.group_size}: {rl.group_size} for each of {rl.prompts_per_step} prompts"
        )
        return [
            ("task", " ".join((task.name, *task.options))),
            ("objective", f"{rl.objective}, {kl}, {rl.minibatches} updates per step"),
            ("completions per step", completions),
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
        add_summary(self.context.run_dir, table)
        self.context.console.result_table("held-out prompts, before and after", list(table.items()))


_SHOWN = (
    ("correct answers", "eval/accuracy", ".1%"),
    ("  prefilled with <think>", "eval/forced_accuracy", ".1%"),
    ("correct format", "eval/format_rate", ".1%"),
    ("tokens of a sampled completion", "eval/response_length", ".1f"),
)


@jax.jit
def _copy(params: Arrays) -> Arrays:
    return jax.tree.map(jnp.copy, params)
