"""Compiled programs of the learner: log-probabilities, gradient accumulation over microbatches, optimizer update."""

from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped
from jaxtyping import Array, Float, Int

from mla_moe.config import Recipe
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.nn.moe import RouterStats
from mla_moe.rl import objectives
from mla_moe.rl.objectives import ObjectiveSums, TokenInputs
from mla_moe.training.step import TrainState, apply_updates, compiler_options, state_shardings, update_router_biases

Microbatch = dict[str, jax.Array]
"""`rl.micro_batch_size` packed sequences of a minibatch on the devices, with the arrays that `TokenInputs` names."""


class GradientSums(NamedTuple):
    """Accumulated over the microbatches of a minibatch."""

    gradient: Arrays
    sums: ObjectiveSums
    load_LE: Int[Array, "L E"]
    """Tokens per expert."""
    dropped: Int[Array, ""]
    """(Token, expert) pairs dropped at capacity."""


class LearnerPrograms:
    """All microbatches have one shape, so each program compiles once, at any number and length of completions."""

    def __init__(self, abstract_model: AbstractModel, tx: optax.GradientTransformation, recipe: Recipe, mesh: Mesh):
        self.abstract_model, self.tx, self.mesh = abstract_model, tx, mesh
        self.rl, self.loss_chunk = recipe.rl, recipe.training.loss_chunk
        self._replicated = NamedSharding(mesh, P())  # for what the host reads
        self.num_completions = self.rl.prompts_per_step * self.rl.group_size // self.rl.minibatches

    def _token_logprobs(
        self, params: Arrays, biases: Arrays, microbatch: Microbatch
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"], RouterStats | None]:
        """Log-probability of each target at the sampling temperature, entropy, and statistics of the routers."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            model = self.abstract_model.merge(params | biases)
            replay = microbatch["replay"].astype(jnp.int32) if "replay" in microbatch else None
            inputs = (microbatch[name] for name in ("tokens", "segment_ids", "positions"))
            h_BTD, stats = model.hidden(*inputs, replay)
            chunk, temperature = self.loss_chunk, self.rl.temperature
            return *model.token_logprobs(h_BTD, microbatch["targets"], chunk=chunk, temperature=temperature), stats

    @cached_property
    def logprobs(self) -> Wrapped:
        """`(params, biases, microbatch) -> Float[B, T]`, log-probability of each target."""

        @partial(jax.jit, compiler_options=compiler_options(self.mesh))
        def logprobs(params: Arrays, biases: Arrays, microbatch: Microbatch) -> Float[Array, "B T"]:
            return self._token_logprobs(params, biases, microbatch)[0]

        return logprobs

    def _gradient_sums(self, params: Arrays, biases: Arrays, microbatch: Microbatch) -> GradientSums:
        def loss(params: Arrays) -> tuple[Array, tuple[ObjectiveSums, RouterStats | None]]:
            logprob_BT, entropy_BT, stats = self._token_logprobs(params, biases, microbatch)
            tokens = TokenInputs(**{name: microbatch[name] for name in TokenInputs._fields if name in microbatch})
            sums = objectives.objective_sums(logprob_BT, entropy_BT, tokens, self.rl, self.num_completions)
            return sums.loss, (sums, stats)

        gradient, (sums, stats) = jax.grad(loss, has_aux=True)(params)
        if stats is None:
            return GradientSums(gradient, sums, jnp.zeros((0, 0), jnp.int32), jnp.int32(0))
        return GradientSums(gradient, sums, stats.load_E, stats.dropped.sum())

    @cached_property
    def accumulate(self) -> Wrapped:
        """Gradient accumulation: `(params, biases, microbatch, GradientSums) -> GradientSums`. Donates the sums."""
        outputs, options = self.sum_shardings, compiler_options(self.mesh)

        @partial(jax.jit, donate_argnums=3, out_shardings=outputs, compiler_options=options)
        def add(params: Arrays, biases: Arrays, microbatch: Microbatch, before: GradientSums) -> GradientSums:
            new = self._gradient_sums(params, biases, microbatch)
            added = jax.tree.map(jnp.add, before, new)
            return added._replace(sums=objectives.add_sums(before.sums, new.sums))

        return add

    @cached_property
    def zeros(self) -> Wrapped:
        """`(params, biases, microbatch) -> GradientSums` of zeros, to which microbatches are added."""

        @partial(jax.jit, out_shardings=self.sum_shardings)
        def zeros(params: Arrays, biases: Arrays, microbatch: Microbatch) -> GradientSums:
            shapes = jax.eval_shape(self._gradient_sums, params, biases, microbatch)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return zeros

    @cached_property
    def apply_gradients(self) -> Wrapped:
        """`(state, GradientSums) -> (state, metrics)`. Donates the state. With a gradient that is not finite, only the
        step number changes."""
        outputs = state_shardings(self.abstract_model, self.tx, self.mesh), self._replicated

        @partial(jax.jit, donate_argnums=0, out_shardings=outputs)
        def apply(state: TrainState, total: GradientSums) -> tuple[TrainState, dict[str, Any]]:
            norm = optax.tree.norm(total.gradient)
            finite = jnp.isfinite(norm) & jnp.isfinite(total.sums.loss)

            updates, optimizer = self.tx.update(total.gradient, state.optimizer, state.params)
            biases = update_router_biases(state.biases, total.load_LE, self.rl.router_bias_update_rate)
            new = apply_updates(state.params, updates, mtp=False), biases, optimizer
            kept = state.params, state.biases, state.optimizer
            new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, kept)
            metrics = total._asdict() | {"grad_norm": norm, "skipped": 1 - finite.astype(jnp.int32)}
            del metrics["gradient"]
            return TrainState(state.step + 1, *new), metrics

        return apply

    def abstract_sums(self, state: TrainState, microbatch: Any) -> GradientSums:
        """Shapes and shardings of a `GradientSums`; the arguments may be abstract."""

        def abstract(sharding: Sharding, shapes: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

        shapes = jax.eval_shape(self._gradient_sums, state.params, state.biases, microbatch)
        return jax.tree.map(abstract, self.sum_shardings, shapes)

    @cached_property
    def sum_shardings(self) -> GradientSums:
        """Shardings of a `GradientSums`: each gradient like its parameter (reduce-scattered), all else replicated."""
        of_model = self.abstract_model.shardings(self.mesh)
        gradient: Any = {path: of_model[path] for path in self.abstract_model.param_paths}
        replicated: Any = self._replicated
        return GradientSums(gradient, replicated, replicated, replicated)
