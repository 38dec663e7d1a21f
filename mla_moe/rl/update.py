"""From judged answers to new parameters: log-probabilities, gradients part by part, and an optimizer's updates."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mla_moe.nn.skeleton import Arrays
from mla_moe.rl import objective
from mla_moe.rl.groups import Groups
from mla_moe.rl.objective import Sums, Tokens
from mla_moe.rl.packing import pack, parts
from mla_moe.training.loss import token_logprobs
from mla_moe.training.setup import Setup
from mla_moe.training.step import TrainState, move_biases, shardings

Part = dict[str, jax.Array]
"""Some rows of a minibatch on their devices, with what `Tokens` names."""


class Total(NamedTuple):
    """What adds up over the parts of a minibatch."""

    gradient: Arrays
    sums: Sums
    load_LE: Int[Array, "L E"]
    dropped: Int[Array, ""]


class Learned(NamedTuple):
    """What a step has to say of its updates. Shares are of the answers' tokens."""

    metrics: dict[str, float]
    load_LE: Int[np.ndarray, "L E"]


class Updater:
    """The compiled programs of the stage. Rows come in parts of one shape, so each program compiles once, however many
    answers there are and however long."""

    def __init__(self, setup: Setup, tx: optax.GradientTransformation):
        self.setup, self.tx, self.rl = setup, tx, setup.recipe.rl
        self.answers = self.rl.prompts * self.rl.group_size // self.rl.minibatches

    def learn(self, state: TrainState, reference: Arrays, groups: Groups) -> tuple[TrainState, Learned]:
        """One update for each minibatch of groups; the state passed in is given up."""
        count = self.rl.minibatches
        minibatches = [self._minibatch(groups, slice(first, None, count)) for first in range(count)]
        for part in (part for minibatch in minibatches for part in minibatch):
            # With one minibatch the present parameters are those that sampled, and the update knows them.
            if self.rl.minibatches > 1:
                part["old_logprob_BT"] = self.logprobs(state.params, state.biases, part)
            if objective.beta(self.rl):
                part["reference_logprob_BT"] = self.logprobs(reference, state.biases, part)
        found = []
        for minibatch in minibatches:
            state, metrics = self.update(state, minibatch)
            found.append(metrics)
        return state, self._learned(jax.device_get(found))

    def update(self, state: TrainState, minibatch: Sequence[Part]) -> tuple[TrainState, dict[str, Any]]:
        total = self._nothing(state.params, state.biases, minibatch[0])
        for part in minibatch:
            total = self._add(state.params, state.biases, part, total)
        return self._apply(state, total)

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

    def _token_logprobs(self, params: Arrays, biases: Arrays, part: Part):
        """Log-probability of each target at the temperature of sampling, entropy where it stands, and the routing."""
        with jax.sharding.use_abstract_mesh(self.setup.mesh.abstract_mesh):
            model = self.setup.skeleton.merge(params | biases)
            replay = part["replay"].astype(jnp.int32) if "replay" in part else None
            h_BTD, stats = model.hidden(part["tokens"], part["segment_ids"], part["positions"], replay)
            how: Any = {"chunk": self.setup.recipe.training.loss_chunk, "temperature": self.rl.temperature}
            return *token_logprobs(model, h_BTD, part["targets"], **how), stats

    @cached_property
    def logprobs(self):
        """`(params, biases, part) -> Float[B, T]`, log-probability of each target."""

        @jax.jit
        def logprobs(params: Arrays, biases: Arrays, part: Part) -> Float[Array, "B T"]:
            return self._token_logprobs(params, biases, part)[0]

        return logprobs

    def _total(self, params: Arrays, biases: Arrays, part: Part) -> Total:
        def loss(params):
            logprob_BT, entropy_BT, stats = self._token_logprobs(params, biases, part)
            tokens = Tokens(**{name: part[name] for name in Tokens._fields if name in part})
            sums = objective.sums(logprob_BT, entropy_BT, tokens, self.rl, self.answers)
            return sums.loss, (sums, stats)

        gradient, (sums, stats) = jax.grad(loss, has_aux=True)(params)
        if stats is None:
            return Total(gradient, sums, jnp.zeros((0, 0), jnp.int32), jnp.int32(0))
        return Total(gradient, sums, stats.load_E, stats.dropped.sum())

    @cached_property
    def _add(self):
        @partial(jax.jit, donate_argnums=3, out_shardings=self._places)
        def add(params: Arrays, biases: Arrays, part: Part, before: Total) -> Total:
            new = self._total(params, biases, part)
            added = jax.tree.map(jnp.add, before, new)
            return added._replace(sums=objective.add(before.sums, new.sums))

        return add

    @cached_property
    def _nothing(self):
        """Zeros, to which a minibatch's parts are added."""

        @partial(jax.jit, out_shardings=self._places)
        def nothing(params: Arrays, biases: Arrays, part: Part) -> Total:
            shapes = jax.eval_shape(self._total, params, biases, part)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return nothing

    @cached_property
    def _apply(self):
        @partial(
            jax.jit,
            donate_argnums=0,
            out_shardings=(shardings(self.setup.skeleton, self.tx, self.setup.mesh), self._whole),
        )
        def apply(state: TrainState, total: Total):
            norm = optax.tree.norm(total.gradient)
            finite = jnp.isfinite(norm) & jnp.isfinite(total.sums.loss)

            updates, optimizer = self.tx.update(total.gradient, state.optimizer, state.params)
            biases = move_biases(state.biases, total.load_LE, self.rl.bias_update)
            new = optax.apply_updates(state.params, updates), biases, optimizer
            kept = state.params, state.biases, state.optimizer
            new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, kept)
            metrics = total._asdict() | {"grad_norm": norm, "skipped": 1 - finite.astype(jnp.int32)}
            del metrics["gradient"]
            return TrainState(state.step + 1, *new), metrics

        return apply

    @cached_property
    def _whole(self):
        """What the host reads is whole on every process."""
        return NamedSharding(self.setup.mesh, P())

    @cached_property
    def _places(self) -> Any:
        places = self.setup.skeleton.shardings(self.setup.mesh)
        gradient: Any = {path: places[path] for path in self.setup.skeleton.param_paths}
        return Total(gradient, *(self._whole for _ in Total._fields[1:]))

    def _learned(self, updates: Sequence[dict[str, Any]]) -> Learned:
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
