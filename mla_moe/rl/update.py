"""From judged answers to new parameters: rows of answers in minibatches, and an update for each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Int

from mla_moe.nn.skeleton import Arrays
from mla_moe.rl import objective
from mla_moe.rl.groups import Groups
from mla_moe.rl.packing import pack, parts
from mla_moe.rl.programs import Part, Programs
from mla_moe.training.setup import Setup
from mla_moe.training.step import TrainState


class Learned(NamedTuple):
    """What a step has to say of its updates. Shares are of the answers' tokens."""

    metrics: dict[str, float]
    load_LE: Int[np.ndarray, "L E"]


class Updater:
    """A minibatch's rows come in parts of `rl.rows`, the activations of one of which exist at a time."""

    def __init__(self, setup: Setup, tx: optax.GradientTransformation):
        self.setup, self.tx, self.rl = setup, tx, setup.recipe.rl
        self.programs = Programs(setup.skeleton, tx, setup.recipe, setup.mesh)

    def learn(self, state: TrainState, reference: Arrays, groups: Groups) -> tuple[TrainState, Learned]:
        """One update for each minibatch of groups; the state passed in is given up."""
        count = self.rl.minibatches
        minibatches = [self._minibatch(groups, slice(first, None, count)) for first in range(count)]
        for part in (part for minibatch in minibatches for part in minibatch):
            # With one minibatch the present parameters are those that sampled, and the update knows them.
            if self.rl.minibatches > 1:
                part["old_logprob_BT"] = self.programs.logprobs(state.params, state.biases, part)
            if objective.beta(self.rl):
                part["reference_logprob_BT"] = self.programs.logprobs(reference, state.biases, part)
        found = []
        for minibatch in minibatches:
            state, metrics = self.update(state, minibatch)
            found.append(metrics)
        return state, learned(jax.device_get(found))

    def update(self, state: TrainState, minibatch: Sequence[Part]) -> tuple[TrainState, dict[str, Any]]:
        total = self.programs.nothing(state.params, state.biases, minibatch[0])
        for part in minibatch:
            total = self.programs.add(state.params, state.biases, part, total)
        return self.programs.apply(state, total)

    def rows(self, groups: Groups, which: slice = slice(None)) -> dict[str, np.ndarray]:
        """The answers of some groups in rows, each token with its advantage and weight."""
        answers = [answer.sampled for group in groups.answers[which] for answer in group]
        rows = pack(answers, self.rl.row_length, self.rl.rows)
        advantage_N = objective.advantages(groups.reward_GS[which], self.rl.objective).ravel()
        weight_N = objective.token_weights(self.rl, np.array([len(answer.tokens) for answer in answers]))
        rows["advantage_BT"] = objective.spread(advantage_N, rows["answer_BT"])
        rows["weight_BT"] = objective.spread(weight_N, rows["answer_BT"])
        return rows

    def _minibatch(self, groups: Groups, which: slice) -> list[Part]:
        rows = self.rows(groups, which)
        return [self.setup.put(part, self.rl.rows) for part in parts(rows, self.rl.rows)]


def learned(updates: Sequence[dict[str, Any]]) -> Learned:
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
        "clip_low": per_token("clipped_low"),
        "clip_high": per_token("clipped_high"),
        "mismatch": per_token("mismatch"),
        "mismatch_max": float(max(s.mismatch_max for s in sums)),
        "importance": per_token("importance"),
        "importance_truncated": per_token("truncated"),
        "off_policy_answers": sum(int(s.off_policy) for s in sums),
    }
    if load_LE.size:
        metrics["moe/load_max"] = float((load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9)).max())
        metrics["moe/dropped"] = sum(int(update["dropped"]) for update in updates)
    return Learned(metrics, load_LE)
