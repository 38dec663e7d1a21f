"""One step of training: gradients over the batch's parts, one optimizer update, one update of the router biases."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped
from jaxtyping import Array

from mla_moe.config import TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.parallel.mesh import BATCH_SPEC
from mla_moe.training.loss import LossSums, loss_counts, loss_sums


class TrainState(NamedTuple):
    """Everything that training changes, but for the place in the data. Arrays go by path.

    Random numbers need no state here: each use derives its key from the recipe's seed and the step.
    """

    step: Array
    """Steps done."""
    params: Arrays
    biases: Arrays
    """Of the routers: set by counting, no gradient."""
    optimizer: optax.OptState


def init_state(
    abstract_model: AbstractModel, tx: optax.GradientTransformation, seed: int, mesh: Mesh, arrays: Arrays | None = None
) -> TrainState:
    """A state of step 0, each array in its place on the mesh: fresh parameters, or those of `arrays`, which are given
    up."""
    new = jax.jit(
        partial(_new, abstract_model, tx), out_shardings=shardings(abstract_model, tx, mesh), donate_argnums=0
    )
    return new(abstract_model.init(seed, mesh) if arrays is None else arrays)


def abstract_state(abstract_model: AbstractModel, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of a `TrainState`: what a checkpoint is restored into, straight to its place."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        _shapes(abstract_model, tx),
        shardings(abstract_model, tx, mesh),
    )


def _new(abstract_model: AbstractModel, tx: optax.GradientTransformation, arrays: Arrays) -> TrainState:
    params = {path: arrays[path] for path in abstract_model.param_paths}
    biases = {path: arrays[path] for path in abstract_model.bias_paths}
    return TrainState(jnp.int32(0), params, biases, tx.init(params))


def _shapes(abstract_model: AbstractModel, tx: optax.GradientTransformation) -> TrainState:
    arrays = {path: variable.get_value() for path, variable in abstract_model.variables.items()}
    return jax.eval_shape(partial(_new, abstract_model, tx), arrays)


def shardings(abstract_model: AbstractModel, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Parameters lie where the table says, their moments (whose last key is the path) with them, counters anywhere."""
    shardings = abstract_model.shardings(mesh)

    def place(keys, _):
        return shardings.get(getattr(keys[-1], "key", None), NamedSharding(mesh, P()))

    return jax.tree_util.tree_map_with_path(place, _shapes(abstract_model, tx))


def make_train_step(
    abstract_model: AbstractModel, tx: optax.GradientTransformation, training: TrainingConfig, mesh: Mesh
) -> Wrapped:
    """The compiled step `(state, batch) -> (state, metrics)`; the state passed in is given up.

    A step whose loss or gradient is not finite changes nothing but the step's number, and is counted as `skipped`.
    """
    with_mtp = abstract_model.cfg.num_nextn_predict_layers > 0 and training.mtp_loss_weight > 0
    freeze_from = round(training.steps * (1 - training.router_bias_freeze_fraction))

    def loss(params, biases, part, size):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            s = loss_sums(abstract_model.merge(params | biases), part, chunk=training.loss_chunk, mtp=with_mtp)
        total = s.nats / jnp.maximum(size.tokens, 1) + training.aux_loss_weight * s.balance / size.sequences
        if with_mtp:
            total += training.mtp_loss_weight * s.mtp_nats / jnp.maximum(size.mtp_tokens, 1)
        return total, s

    def gradients(params, biases, batch):
        """Gradient and sums of the whole batch, a part at a time: the activations of one part exist at once."""
        size = loss_counts(batch)
        parts = jax.tree.map(lambda x: _parts(x, training.gradient_accumulation_steps), batch)
        grad = jax.grad(loss, has_aux=True)
        if training.gradient_accumulation_steps == 1:
            return *grad(params, biases, batch, size), size

        def body(total, part):
            return jax.tree.map(jnp.add, total, grad(params, biases, part, size)), None

        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, params, biases, first, size))
        (grads, s), _ = jax.lax.scan(body, zeros, parts)
        return grads, s, size

    def update(state, grads, s):
        updates, optimizer = tx.update(grads, state.optimizer, state.params)
        gamma = jnp.where(state.step < freeze_from, training.router_bias_update_rate, 0.0)
        params = apply_updates(state.params, updates, mtp=with_mtp)
        return params, update_router_biases(state.biases, s.load_LE, gamma), optimizer

    everywhere = NamedSharding(mesh, P())  # what the host reads of a step is whole on every process

    place = shardings(abstract_model, tx, mesh)

    @partial(jax.jit, donate_argnums=0, out_shardings=(place, everywhere), compiler_options=compiler_options(mesh))
    def step(state: TrainState, batch):
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH_SPEC))
        grads, s, size = gradients(state.params, state.biases, batch)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(s.nats)
        kept = (state.params, state.biases, state.optimizer)
        # Chosen element by element, each in its old place: a branch would hold a second copy of the whole state.
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(state, grads, s), kept)
        metrics = _metrics(s, size, norm) | {"skipped": 1 - finite.astype(jnp.int32)}
        return TrainState(state.step + 1, *new), metrics

    return step


def compiler_options(mesh: Mesh) -> dict[str, bool | str] | None:
    """For every program that goes through all layers.

    XLA for TPU would turn all layers' weights to bfloat16 before the loop over them, and keep both: this way each
    layer's are cast when they are used. XLA for CPU would give products to YNNPACK, whose batched ones, attention's,
    are slower than Eigen's by a third.
    """
    options: dict[str, dict[str, bool | str]] = {
        "tpu": {"xla_jf_bf16_propagation": False},
        "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    }
    return options.get(mesh.devices.flat[0].platform)


def apply_updates(params: Arrays, updates: optax.Updates, *, mtp: bool) -> Arrays:
    """The updated parameters. A prediction module that was not run stays what it was: it would only decay."""
    new: Any = optax.apply_updates(params, updates)
    return new if mtp else new | {path: old for path, old in params.items() if path.startswith("mtp/")}


def update_router_biases(biases: Arrays, load_LE: Array, gamma: Array | float) -> Arrays:
    """`b_i += γ · sign(mean(c) − c_i)` with c the whole batch's tokens per expert (DeepSeek-V3, section 2.1.2). The
    prediction module's moves only if it was run, which adds its load behind those of the stacked layers."""
    load_LE = load_LE.astype(jnp.float32)
    move_LE = gamma * jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
    stacked = sum(b.shape[0] for b in biases.values() if b.ndim == 2)
    moves = {2: move_LE[:stacked], 1: move_LE[-1] if len(move_LE) > stacked else 0}
    return {path: b + moves[b.ndim] for path, b in biases.items()}


def make_eval_step(
    abstract_model: AbstractModel, chunk: int, mesh: Mesh
) -> Callable[[TrainState, dict[str, Array]], Array]:
    """The compiled `(state, batch) -> nats` of held-out text."""

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def nats(state: TrainState, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return loss_sums(abstract_model.merge(state.params | state.biases), batch, chunk=chunk, mtp=False).nats

    return nats


def _parts(x, count):
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])


def _metrics(s: LossSums, size, norm) -> dict[str, Array]:
    tokens = jnp.maximum(size.tokens, 1)
    metrics = {"loss": s.nats / tokens, "grad_norm": norm, "tokens": size.read, "load_LE": s.load_LE}
    metrics["aux_loss"] = s.balance / (size.sequences * max(s.load_LE.shape[0], 1))
    metrics["dropped"] = s.dropped
    metrics["mtp_loss"] = s.mtp_nats / jnp.maximum(size.mtp_tokens, 1)
    return metrics
