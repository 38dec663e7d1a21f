"""The training step: gradient accumulation over microbatches, an optimizer update and a router bias update."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped
from jaxtyping import Array

from mla_moe.config import TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.nn.lora import seed_dropout
from mla_moe.nn.loss import Batch, LossCounts, LossSums, loss_counts
from mla_moe.parallel.compiler_options import mesh_compiler_options
from mla_moe.parallel.mesh import BATCH_SPEC

Sums = TypeVar("Sums")
"""A gradient, and sums over the tokens of a microbatch."""


class TrainState(NamedTuple):
    """The state of training, without the position in the data. Arrays are by parameter path.

    There is no random state: each use derives its key from the recipe's seed and the step.
    """

    step: Array
    """Steps done."""
    params: Arrays
    biases: Arrays
    """Router biases, updated from the expert load and without gradient."""
    optimizer: optax.OptState
    frozen: Arrays
    """With LoRA the parameters that are not trained; checkpoints do not store them."""

    @property
    def fixed(self) -> Arrays:
        """The model's arrays without gradient."""
        return self.biases | self.frozen

    @property
    def arrays(self) -> Arrays:
        """All arrays of the model."""
        return self.params | self.fixed


def init_state(
    abstract_model: AbstractModel, tx: optax.GradientTransformation, seed: int, mesh: Mesh, arrays: Arrays | None = None
) -> TrainState:
    """The state of step 0, sharded over the mesh: newly initialised, or with the parameters `arrays`, which it
    donates."""
    shardings = state_shardings(abstract_model, tx, mesh)
    init = jax.jit(partial(_initial_state, abstract_model, tx), out_shardings=shardings, donate_argnums=0)
    return init(abstract_model.init(seed, mesh) if arrays is None else arrays)


def abstract_state(abstract_model: AbstractModel, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a `TrainState`, into which a checkpoint is restored.

    An optimizer moment is sharded as its parameter, by whose path its last key is named; counters are replicated.
    """
    shardings = abstract_model.shardings(mesh)

    def abstract(keys: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = shardings.get(getattr(keys[-1], "key", None), NamedSharding(mesh, P()))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    arrays = {path: variable.get_value() for path, variable in abstract_model.variables.items()}
    shapes = jax.eval_shape(partial(_initial_state, abstract_model, tx), arrays)
    return jax.tree_util.tree_map_with_path(abstract, shapes)


def state_shardings(abstract_model: AbstractModel, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shardings of a `TrainState`, one for each array."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(abstract_model, tx, mesh))


def _initial_state(abstract_model: AbstractModel, tx: optax.GradientTransformation, arrays: Arrays) -> TrainState:
    params = {path: arrays[path] for path in abstract_model.param_paths}
    biases = {path: arrays[path] for path in abstract_model.bias_paths}
    frozen = {path: arrays[path] for path in abstract_model.frozen_paths}
    return TrainState(jnp.int32(0), params, biases, tx.init(params), frozen)


def make_train_step(
    abstract_model: AbstractModel,
    tx: optax.GradientTransformation,
    training: TrainingConfig,
    mesh: Mesh,
    seed: int = 0,
) -> Wrapped:
    """The jitted step `(state, batch) -> (state, metrics)`, which donates the state. `seed` and the step are those of
    the adapters' dropout, of which each microbatch has a key of its own.

    An update whose loss or gradient norm is not finite is skipped: only the step number changes, and the metric
    `skipped` is 1.
    """
    with_mtp = abstract_model.cfg.num_nextn_predict_layers > 0 and training.mtp_loss_weight > 0
    freeze_step = round(training.steps * (1 - training.router_bias_freeze_fraction))
    count, dropout = training.gradient_accumulation_steps, abstract_model.lora.dropout > 0
    # All microbatches pass through a pipeline in one program.
    microbatches, count = (count, 1) if mesh.shape["pipeline"] > 1 else (None, count)

    @partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(state_shardings(abstract_model, tx, mesh), NamedSharding(mesh, P())),  # metrics are replicated
        compiler_options=mesh_compiler_options(mesh, abstract_model.kernels),
    )
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH_SPEC))
        counts = loss_counts(batch)
        if dropout:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), count)
            batch |= {"dropout_key": jax.random.key_data(keys)}
        grads, sums = accumulate_gradients(partial(gradient, state.params, state.fixed, counts), batch, count)
        bias_update_rate = jnp.where(state.step < freeze_step, training.router_bias_update_rate, 0.0)
        state, metrics = update_state(state, tx, grads, sums.nats, sums.load_LE, bias_update_rate, mtp=with_mtp)
        return state, metrics | {
            "loss": sums.nats / jnp.maximum(counts.targets, 1),
            "tokens": counts.tokens_without_padding,
            "load_LE": sums.load_LE,
            "aux_loss": sums.aux_loss / (counts.sequences * max(sums.load_LE.shape[0], 1)),
            "router_z_loss": sums.z_loss / (counts.tokens_without_padding * max(sums.load_LE.shape[0], 1)),
            "dropped": sums.dropped,
            "mtp_loss": sums.mtp_nats / jnp.maximum(counts.mtp_targets, 1),
        }

    def loss(params: Arrays, fixed: Arrays, counts: LossCounts, microbatch: Batch) -> tuple[Array, LossSums]:
        """A microbatch's part of the loss, normalised by the counts of the full batch."""
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = abstract_model.merge(params | fixed)
            if dropout:
                key = microbatch["dropout_key"][0]
                microbatch = {name: x for name, x in microbatch.items() if name != "dropout_key"}
                seed_dropout(model, jax.random.wrap_key_data(key))
            sums = model.loss_sums(microbatch, chunk=training.loss_chunk, mtp=with_mtp, microbatches=microbatches)
        total = sums.nats / jnp.maximum(counts.targets, 1) + training.aux_loss_weight * sums.aux_loss / counts.sequences
        if training.router_z_loss_weight:  # otherwise the backward pass keeps no logits of the router
            total += training.router_z_loss_weight * sums.z_loss / counts.tokens_without_padding
        if with_mtp:
            total += training.mtp_loss_weight * sums.mtp_nats / jnp.maximum(counts.mtp_targets, 1)
        return total, sums

    gradient = jax.grad(loss, has_aux=True)
    return train_step


def accumulate_gradients(gradient: Callable[[Batch], Sums], batch: Batch, count: int) -> Sums:
    """Gradient accumulation: the sum of what `gradient` returns for each of `count` microbatches. Only one has
    activations in memory at a time."""
    if count == 1:
        return gradient(batch)
    microbatches = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

    def add(total: Sums, microbatch: Batch) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, gradient(microbatch)), None

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, microbatches)[0]


def update_state(
    state: TrainState, tx: optax.GradientTransformation, grads: Arrays, loss: Array, load_LE: Array,
    bias_update_rate: Array | float, *, mtp: bool,
) -> tuple[TrainState, dict[str, Array]]:  # fmt: skip
    """Optimizer update and router bias update, and the metrics `grad_norm` and `skipped`.

    If the loss or the gradient norm is not finite, only the step number changes, and `skipped` is 1. Without `mtp` the
    MTP module stays unchanged, because its loss was not computed: weight decay alone would shrink it.
    """
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    updates, optimizer = tx.update(grads, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    if not mtp:
        params |= {path: old for path, old in state.params.items() if path.startswith("mtp/")}
    new: Any = params, update_router_biases(state.biases, load_LE, bias_update_rate), optimizer
    # `where` on each array, in the memory that is donated: `cond` would hold a second copy of the full state.
    kept = state.params, state.biases, state.optimizer
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, kept)
    return TrainState(state.step + 1, *new, state.frozen), {
        "grad_norm": grad_norm,
        "skipped": 1 - finite.astype(jnp.int32),
    }


def update_router_biases(biases: Arrays, load_LE: Array, update_rate: Array | float) -> Arrays:
    """Router bias update of auxiliary-loss-free load balancing: `b_i += γ · sign(mean(c) − c_i)`, where c is the tokens
    per expert of the full batch and γ the update rate (DeepSeek-V3, section 2.1.2). The MTP module's bias is updated
    if `load_LE` has its load, after that of the stacked layers."""
    load_LE = load_LE.astype(jnp.float32)
    delta_LE = update_rate * jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
    stacked = sum(b.shape[0] for b in biases.values() if b.ndim == 2)
    deltas = {2: delta_LE[:stacked], 1: delta_LE[-1] if len(delta_LE) > stacked else 0}
    return {path: b + deltas[b.ndim] for path, b in biases.items()}


def make_eval_step(abstract_model: AbstractModel, chunk: int, mesh: Mesh) -> Callable[[TrainState, Batch], Array]:
    """The jitted evaluation `(state, batch) -> nats`, the summed next-token cross-entropy of a batch."""

    @partial(
        jax.jit,
        out_shardings=NamedSharding(mesh, P()),
        compiler_options=mesh_compiler_options(mesh, abstract_model.kernels),
    )
    def eval_step(state: TrainState, batch: Batch) -> Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return abstract_model.merge(state.arrays).loss_sums(batch, chunk=chunk, mtp=False).nats

    return eval_step
