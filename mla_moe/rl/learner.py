"""From judged answers to new parameters: rows of answers in minibatches, and an update for each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Int

from mla_moe.nn.abstract_model import Arrays
from mla_moe.rl import objectives
from mla_moe.rl.group_sampling import GroupBatch
from mla_moe.rl.learner_programs import LearnerPrograms, Microbatch
from mla_moe.rl.packing import microbatches, pack_completions
from mla_moe.training.run_context import RunContext
from mla_moe.training.step import TrainState


class LearnerOutput(NamedTuple):
    """What a step has to say of its updates. Shares are of the answers' tokens."""

    metrics: dict[str, float]
    load_LE: Int[np.ndarray, "L E"]


class Learner:
    """A minibatch's rows come in parts of `rl.micro_batch_size`, the activations of one of which exist at a time."""

    def __init__(self, setup: RunContext, tx: optax.GradientTransformation):
        self.setup, self.tx, self.rl = setup, tx, setup.recipe.rl
        self.programs = LearnerPrograms(setup.abstract_model, tx, setup.recipe, setup.mesh)

    def learn(self, state: TrainState, reference: Arrays, groups: GroupBatch) -> tuple[TrainState, LearnerOutput]:
        """One update for each minibatch of groups; the state passed in is given up."""
        count = self.rl.minibatches
        minibatches = [self._minibatch(groups, slice(first, None, count)) for first in range(count)]
        for part in (part for minibatch in minibatches for part in minibatch):
            # With one minibatch the present parameters are those that sampled, and the update knows them.
            if self.rl.minibatches > 1:
                part["old_logprob_BT"] = self.programs.logprobs(state.params, state.biases, part)
            if objectives.kl_coefficient(self.rl):
                part["reference_logprob_BT"] = self.programs.logprobs(reference, state.biases, part)
        found = []
        for minibatch in minibatches:
            state, metrics = self.update(state, minibatch)
            found.append(metrics)
        return state, step_metrics(jax.device_get(found))

    def update(self, state: TrainState, minibatch: Sequence[Microbatch]) -> tuple[TrainState, dict[str, Any]]:
        total = self.programs.nothing(state.params, state.biases, minibatch[0])
        for part in minibatch:
            total = self.programs.add(state.params, state.biases, part, total)
        return self.programs.apply(state, total)

    def rows(self, groups: GroupBatch, which: slice = slice(None)) -> dict[str, np.ndarray]:
        """The answers of some groups in rows, each token with its advantage and weight."""
        answers = [answer.sampled for group in groups.answers[which] for answer in group]
        rows = pack_completions(answers, self.rl.packed_row_length, self.rl.micro_batch_size)
        advantage_N = objectives.advantages(groups.reward_GS[which], self.rl.objective).ravel()
        weight_N = objectives.token_weights(self.rl, np.array([len(answer.tokens) for answer in answers]))
        rows["advantage_BT"] = objectives.per_token(advantage_N, rows["answer_BT"])
        rows["weight_BT"] = objectives.per_token(weight_N, rows["answer_BT"])
        return rows

    def _minibatch(self, groups: GroupBatch, which: slice) -> list[Microbatch]:
        rows = self.rows(groups, which)
        return [self.setup.put(part, self.rl.micro_batch_size) for part in microbatches(rows, self.rl.micro_batch_size)]


def step_metrics(updates: Sequence[dict[str, Any]]) -> LearnerOutput:
    """Of the updates of a step."""
    sums = [update["sums"] for update in updates]
    tokens = sum(int(s.tokens) for s in sums)

    def per_token(name: str) -> float:
        return sum(float(getattr(s, name)) for s in sums) / max(tokens, 1)

    load_LE = np.sum([update["load_LE"] for update in updates], axis=0)
    metrics = {
        "loss": float(np.mean([s.loss for s in sums])),
        "grad_norm": float(np.mean([update["grad_norm"] for update in updates])),
        "skipped": sum(int(update["skipped"]) for update in updates),
        "kl": per_token("kl"),
        "entropy": per_token("entropy"),
        "clip_ratio/low": per_token("clipped_low"),
        "clip_ratio/high": per_token("clipped_high"),
        "sampler_logprob_diff": per_token("sampler_logprob_diff"),
        "sampler_logprob_diff_max": float(max(s.sampler_logprob_diff_max for s in sums)),
        "tis_weight": per_token("tis_weight"),
        "tis_clipped": per_token("truncated"),
        "off_policy_masked": sum(int(s.off_policy) for s in sums),
    }
    if load_LE.size:
        metrics["moe/load_max"] = float((load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9)).max())
        metrics["moe/dropped"] = sum(int(update["dropped"]) for update in updates)
    return LearnerOutput(metrics, load_LE)
