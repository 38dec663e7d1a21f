"""Learner: from scored groups to new parameters, with one optimizer update per minibatch."""

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
from mla_moe.rl.packing import PackedSequences, microbatches, pack_completions
from mla_moe.training.run_context import RunContext
from mla_moe.training.step import TrainState


class LearnerOutput(NamedTuple):
    """Metrics of a step's updates, over completion tokens, and the tokens per expert."""

    metrics: dict[str, float]
    load_LE: Int[np.ndarray, "L E"]


class Learner:
    """Gradient accumulation over microbatches of `rl.micro_batch_size` packed sequences: the activations of one
    microbatch exist at a time."""

    def __init__(self, context: RunContext, tx: optax.GradientTransformation):
        self.context, self.tx, self.rl = context, tx, context.recipe.rl
        self.programs = LearnerPrograms(context.abstract_model, tx, context.recipe, context.mesh)

    def update_policy(
        self, state: TrainState, reference: Arrays, groups: GroupBatch
    ) -> tuple[TrainState, LearnerOutput]:
        """One update per minibatch of groups. `reference`: parameters of the reference policy. Donates the state."""
        count = self.rl.minibatches
        minibatches = [self._minibatch(groups, slice(first, None, count)) for first in range(count)]
        for microbatch in (microbatch for minibatch in minibatches for microbatch in minibatch):
            # With one minibatch the current policy is the old one: its log-probabilities come with the gradient.
            if self.rl.minibatches > 1:
                microbatch["old_logprob_BT"] = self.programs.logprobs(state.params, state.biases, microbatch)
            if objectives.kl_coefficient(self.rl):
                microbatch["reference_logprob_BT"] = self.programs.logprobs(reference, state.biases, microbatch)
        updates = []
        for minibatch in minibatches:
            state, metrics = self.update_minibatch(state, minibatch)
            updates.append(metrics)
        return state, learner_metrics(jax.device_get(updates))

    def update_minibatch(self, state: TrainState, minibatch: Sequence[Microbatch]) -> tuple[TrainState, dict[str, Any]]:
        """Accumulate the gradients of the microbatches, then apply the optimizer once. Donates the state."""
        total = self.programs.zeros(state.params, state.biases, minibatch[0])
        for microbatch in minibatch:
            total = self.programs.accumulate(state.params, state.biases, microbatch, total)
        return self.programs.apply_gradients(state, total)

    def pack(self, groups: GroupBatch, which: slice = slice(None)) -> PackedSequences:
        """Packed sequences of some groups, with the advantage and the loss weight of each token."""
        completions = [completion.sampled for group in groups.completions[which] for completion in group]
        packed = pack_completions(completions, self.rl.packed_row_length, self.rl.micro_batch_size)
        advantage_N = objectives.advantages(groups.reward_GS[which], self.rl.objective).ravel()
        weight_N = objectives.token_weights(self.rl, np.array([len(c.tokens) for c in completions]))
        packed["advantage_BT"] = objectives.per_token(advantage_N, packed["completion_BT"])
        packed["weight_BT"] = objectives.per_token(weight_N, packed["completion_BT"])
        return packed

    def _minibatch(self, groups: GroupBatch, which: slice) -> list[Microbatch]:
        size = self.rl.micro_batch_size
        return [self.context.put(microbatch, size) for microbatch in microbatches(self.pack(groups, which), size)]


def learner_metrics(updates: Sequence[dict[str, Any]]) -> LearnerOutput:
    """From the metrics of each update, as `LearnerPrograms.apply_gradients` returns them, to those of the step."""
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
        "tis_clipped": per_token("tis_clipped"),
        "off_policy_masked": sum(int(s.off_policy_masked) for s in sums),
    }
    if load_LE.size:
        metrics["moe/load_max"] = float((load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9)).max())
        metrics["moe/dropped"] = sum(int(update["dropped"]) for update in updates)
    return LearnerOutput(metrics, load_LE)
