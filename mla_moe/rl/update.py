"""From judged answers to new parameters: log-probabilities, gradients part by part, one optimizer update."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mla_moe.nn.skeleton import Arrays
from mla_moe.recipe import RL
from mla_moe.rl.objective import objective
from mla_moe.training.loss import token_logprobs
from mla_moe.training.setup import Setup
from mla_moe.training.step import TrainState, move_biases

Part = dict[str, jax.Array]
"""Rows of `packing.Rows` on their devices, with `advantage` and `weight` [R, T] of each token, and the log-probabilities
`old_logprob` and `reference_logprob` where the objective wants them."""


class Updater:
    """The compiled programs of the stage. A part has a fixed shape, so each compiles once however many answers there
    are; gradients add up over the parts of a minibatch."""

    def __init__(self, setup: Setup, tx: optax.GradientTransformation, rl: RL):
        self._setup, self._tx, self._rl = setup, tx, rl

    def logprobs(self, params: Arrays, biases: Arrays, part: Part) -> jax.Array:
        """Of every target under these parameters, with the sampler's routing if that is replayed."""
        return self._logprobs(params, biases, part)

    def update(self, state: TrainState, minibatch: Sequence[Part]) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer update on a minibatch; the state passed in is given up. Metrics are sums over its tokens."""
        total = self._nothing(state, minibatch[0])
        for part in minibatch:
            total = self._gradient(state.params, state.biases, part, total)
        return self._apply(state, total)

    def _nothing(self, state: TrainState, part: Part):
        """Zeros to which the parts of a minibatch are added."""
        shapes = jax.eval_shape(self._sums, state.params, state.biases, part)
        return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))()

    def _model(self, params, biases):
        return self._setup.skeleton.merge(params | biases)

    def _token_logprobs(self, params, biases, part):
        """Log-probabilities and entropies [R, T], and the routing."""
        with jax.sharding.use_abstract_mesh(self._setup.mesh.abstract_mesh):
            model = self._model(params, biases)
            replay = part["replay"].astype(jnp.int32) if "replay" in part else None
            h_BTD, stats = model.hidden(part["tokens"], part["segment_ids"], part["positions"], replay)
            chunk, temperature = self._setup.recipe.training.loss_chunk, self._rl.temperature
            return *token_logprobs(model, h_BTD, part["targets"], chunk=chunk, temperature=temperature), stats

    @cached_property
    def _logprobs(self):
        @jax.jit
        def run(params, biases, part):
            return self._token_logprobs(params, biases, part)[0]

        return run

    def _sums(self, params, biases, part):
        """The gradient, and sums over the tokens of a part."""

        def loss(params):
            logprob_BT, entropy_BT, stats = self._token_logprobs(params, biases, part)
            value, sums = objective(self._rl, logprob_BT, entropy_BT, part)
            load_LE = jnp.zeros((0, 1), jnp.int32) if stats is None else stats.load_E
            dropped = jnp.int32(0) if stats is None else stats.dropped.sum()
            return value, sums | {"loss": value, "load_LE": load_LE, "dropped": dropped}

        return jax.grad(loss, has_aux=True)(params)

    @cached_property
    def _gradient(self):
        @partial(jax.jit, donate_argnums=3)
        def run(params, biases, part, total):
            return jax.tree.map(jnp.add, total, self._sums(params, biases, part))

        return run

    @cached_property
    def _apply(self):
        everywhere = NamedSharding(self._setup.mesh, P())

        @partial(jax.jit, donate_argnums=(0, 1))
        def run(state: TrainState, total):
            grads, sums = total
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(norm)

            def step(_):
                updates, optimizer = self._tx.update(grads, state.optimizer, state.params)
                biases = move_biases(state.biases, sums["load_LE"], self._rl.bias_update)
                return optax.apply_updates(state.params, updates), biases, optimizer

            new = jax.lax.cond(finite, step, lambda _: (state.params, state.biases, state.optimizer), None)
            metrics: dict[str, Array] = sums | {"grad_norm": norm, "skipped": 1 - finite.astype(jnp.int32)}
            return TrainState(state.step + 1, *new), jax.lax.with_sharding_constraint(metrics, everywhere)

        return run
