"""The compiled programs of an update: log-probabilities, gradients part by part, and the optimizer's step."""

from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mla_moe.config import Recipe
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.rl import objectives
from mla_moe.rl.objectives import ObjectiveSums, TokenInputs
from mla_moe.training.loss import token_logprobs
from mla_moe.training.step import TrainState, apply_updates, compiler_options, shardings, update_router_biases

Microbatch = dict[str, jax.Array]
"""Some rows of a minibatch on their devices, with what `Tokens` names."""


class GradientSums(NamedTuple):
    """What adds up over the parts of a minibatch."""

    gradient: Arrays
    sums: ObjectiveSums
    load_LE: Int[Array, "L E"]
    dropped: Int[Array, ""]


class LearnerPrograms:
    """Rows come in parts of one shape, so each program compiles once, however many answers there are and however
    long."""

    def __init__(self, abstract_model: AbstractModel, tx: optax.GradientTransformation, recipe: Recipe, mesh: Mesh):
        self.abstract_model, self.tx, self.mesh = abstract_model, tx, mesh
        self.rl, self.loss_chunk = recipe.rl, recipe.training.loss_chunk
        self.answers = self.rl.prompts_per_step * self.rl.group_size // self.rl.minibatches

    def _token_logprobs(self, params: Arrays, biases: Arrays, part: Microbatch):
        """Log-probability of each target at the temperature of sampling, entropy where it stands, and the routing."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            model = self.abstract_model.merge(params | biases)
            replay = part["replay"].astype(jnp.int32) if "replay" in part else None
            h_BTD, stats = model.hidden(part["tokens"], part["segment_ids"], part["positions"], replay)
            how: Any = {"chunk": self.loss_chunk, "temperature": self.rl.temperature}
            return *token_logprobs(model, h_BTD, part["targets"], **how), stats

    @cached_property
    def logprobs(self):
        """`(params, biases, part) -> Float[B, T]`, log-probability of each target."""

        @partial(jax.jit, compiler_options=compiler_options(self.mesh))
        def logprobs(params: Arrays, biases: Arrays, part: Microbatch) -> Float[Array, "B T"]:
            return self._token_logprobs(params, biases, part)[0]

        return logprobs

    def _total(self, params: Arrays, biases: Arrays, part: Microbatch) -> GradientSums:
        def loss(params):
            logprob_BT, entropy_BT, stats = self._token_logprobs(params, biases, part)
            tokens = TokenInputs(**{name: part[name] for name in TokenInputs._fields if name in part})
            sums = objectives.objective_sums(logprob_BT, entropy_BT, tokens, self.rl, self.answers)
            return sums.loss, (sums, stats)

        gradient, (sums, stats) = jax.grad(loss, has_aux=True)(params)
        if stats is None:
            return GradientSums(gradient, sums, jnp.zeros((0, 0), jnp.int32), jnp.int32(0))
        return GradientSums(gradient, sums, stats.load_E, stats.dropped.sum())

    @cached_property
    def add(self):
        """`(params, biases, part, Total) -> Total`, with the part's; the one passed in is given up."""

        @partial(jax.jit, donate_argnums=3, out_shardings=self.places, compiler_options=compiler_options(self.mesh))
        def add(params: Arrays, biases: Arrays, part: Microbatch, before: GradientSums) -> GradientSums:
            new = self._total(params, biases, part)
            added = jax.tree.map(jnp.add, before, new)
            return added._replace(sums=objectives.add_sums(before.sums, new.sums))

        return add

    @cached_property
    def nothing(self):
        """Zeros, to which a minibatch's parts are added."""

        @partial(jax.jit, out_shardings=self.places)
        def nothing(params: Arrays, biases: Arrays, part: Microbatch) -> GradientSums:
            shapes = jax.eval_shape(self._total, params, biases, part)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return nothing

    @cached_property
    def apply(self):
        """`(state, Total) -> (state, metrics)`; the state passed in is given up. A gradient that is not finite changes
        nothing but its number."""

        @partial(
            jax.jit,
            donate_argnums=0,
            out_shardings=(shardings(self.abstract_model, self.tx, self.mesh), self._whole),
        )
        def apply(state: TrainState, total: GradientSums):
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

    @cached_property
    def _whole(self):
        """What the host reads is whole on every process."""
        return NamedSharding(self.mesh, P())

    def abstract_total(self, state: TrainState, part: Any) -> GradientSums:
        """Shapes and shardings of a `Total`; what is passed in may be abstract."""

        def lie(place, shapes):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)

        return jax.tree.map(lie, self.places, jax.eval_shape(self._total, state.params, state.biases, part))

    @cached_property
    def places(self) -> GradientSums:
        """Shardings of a `Total`: each gradient lies with its parameter."""
        places = self.abstract_model.shardings(self.mesh)
        gradient: Any = {path: places[path] for path in self.abstract_model.param_paths}
        return GradientSums(gradient, *(self._whole for _ in GradientSums._fields[1:]))
