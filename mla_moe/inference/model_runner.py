"""Model runner: owns weights and KV cache, and runs the compiled programs prefill, decode and prefix copy on them.

The cache is donated to each program and returned, so that it is updated in place.
"""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from mla_moe.inference.decode import Cache, Carry, DecodeOutput, ProgramOptions, decode_step, empty_output
from mla_moe.inference.input_batch import DecodeState, PrefillBatch
from mla_moe.inference.prefix_cache import PrefixCopy
from mla_moe.inference.sampling import AnyArray
from mla_moe.inference.speculative import speculative_step
from mla_moe.inference.weights import ModelGraph, mesh_of, prepare_for_inference
from mla_moe.nn.kv_cache import cache_shape, cache_sharding, empty_cache
from mla_moe.nn.transformer import Transformer
from mla_moe.ops.cached_attention import BLOCK

DECODE_STEPS = 16
"""Most decode steps in one call, which is one round trip between host and device."""
Tree = TypeVar("Tree")


@partial(jax.jit, static_argnames=("graph", "options"), donate_argnames=("cache_LBSW",))
def decode(
    graph: ModelGraph,
    weights: nnx.State,
    cache_LBSW: Cache,
    state: DecodeState,
    max_steps: Int[AnyArray, ""],
    stop_early: Bool[AnyArray, ""] | bool,
    options: ProgramOptions,
) -> tuple[Cache, DecodeState, DecodeOutput, Int[Array, ""]]:
    """Up to `max_steps` decode steps for every active slot: the cache, the new state, the tokens, the steps taken.

    The loop ends when no slot is active or, with `stop_early`, when any request has finished and others wait for its
    slot.
    """
    model = graph.merge(weights)
    step = partial(speculative_step if options.speculative else decode_step, model, options)
    shape = (DECODE_STEPS, 2) if options.speculative else (DECODE_STEPS,)
    output = empty_output(model.cfg, shape, len(state.token_B), options.record_experts)

    def condition(carry: Carry) -> Bool[Array, ""]:
        i, _, now, _ = carry
        finished = stop_early & (now.active_B.sum() < state.active_B.sum())
        return (i < max_steps) & now.active_B.any() & ~finished

    steps, cache_LBSW, after, output = jax.lax.while_loop(condition, step, (jnp.int32(0), cache_LBSW, state, output))
    if options.speculative:
        output = jax.tree.map(lambda x: x.reshape(2 * DECODE_STEPS, *x.shape[2:]), output)
    sharding = options.cache_sharding
    return constrain_cache(cache_LBSW, sharding), *replicate((after, output, steps), sharding)


@partial(jax.jit, static_argnames=("graph", "options"), donate_argnames=("cache_LBSW",))
def prefill(
    graph: ModelGraph, weights: nnx.State, cache_LBSW: Cache, batch: PrefillBatch, options: ProgramOptions
) -> tuple[Cache, Int[Array, "l b T K"] | None]:
    """Write prefill chunks into the cache, also in the MTP module's layer if it drafts. Returns the cache and, if
    recorded, the routed experts of each token."""
    model = graph.merge(weights)
    at = batch.start_b, batch.slots_b
    h_bTD, cache_LBSW, experts = model.extend(batch.tokens_bT, cache_LBSW, *at, form="expanded")
    if options.speculative:
        _, cache_LBSW = model.mtp_extend(h_bTD, batch.next_bT, cache_LBSW, *at, form="expanded")
    experts = experts.astype(jnp.int16) if options.record_experts and experts is not None else None
    return constrain_cache(cache_LBSW, options.cache_sharding), replicate(experts, options.cache_sharding)


@partial(jax.jit, static_argnames=("sharding",), donate_argnames=("cache_LBSW",))
def copy_prefix(
    cache_LBSW: Cache,
    source: Int[AnyArray, ""] | int,
    target: Int[AnyArray, ""] | int,
    length: Int[AnyArray, ""] | int,
    *,
    sharding: NamedSharding | None,
) -> Cache:
    """Copy the first `length` entries of one slot to another, rounded up to full blocks of attention."""
    L, _, S, W = cache_LBSW.shape
    size = min(BLOCK, S)

    def copy_block(i: Int[Array, ""], cache_LBSW: Cache) -> Cache:
        block = jax.lax.dynamic_slice(cache_LBSW, (0, source, i * size, 0), (L, 1, size, W))
        return jax.lax.dynamic_update_slice(cache_LBSW, block, (0, target, i * size, 0))

    return constrain_cache(jax.lax.fori_loop(0, -(-length // size), copy_block, cache_LBSW), sharding)


def constrain_cache(cache_LBSW: Cache, sharding: NamedSharding | None) -> Cache:
    """Keep the cache's sharding from call to call, so that its buffer can be donated."""
    return cache_LBSW if sharding is None else jax.lax.with_sharding_constraint(cache_LBSW, sharding)


def replicate(tree: Tree, sharding: NamedSharding | None) -> Tree:
    """Replicate what the host reads over the mesh, so that every process of a run can read it."""
    if sharding is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(sharding.mesh, PartitionSpec()))


class ModelRunner:
    """Weights and KV cache of an engine. A model on a mesh stays there; the cache is sharded over the mesh."""

    def __init__(
        self,
        model: Transformer,
        max_num_seqs: int,
        cache_capacity: int,
        *,
        speculative: bool,
        record_experts: bool,
        temperature_scaled_logprobs: bool,
        int8_kv_cache: bool,
    ):
        self.load_weights(model)
        self.mesh = mesh_of(model)
        sharding = None if self.mesh is None else cache_sharding(self.mesh, max_num_seqs)
        self._options = ProgramOptions(speculative, record_experts, temperature_scaled_logprobs, sharding)
        layers = model.cfg.num_hidden_layers + speculative
        dtype = jnp.int8 if int8_kv_cache else model.precision.compute
        shape = cache_shape(model.cfg, max_num_seqs, cache_capacity, dtype, layers=layers, sharding=sharding)
        self.cache_LBSW = empty_cache(shape)

    def load_weights(self, model: Transformer) -> None:
        self.drop_weights()
        self.graph, self.weights = prepare_for_inference(model)

    def drop_weights(self) -> None:
        """Free the weights' memory, until others are loaded."""
        self.weights = None

    def prefill(self, batch: PrefillBatch) -> np.ndarray | None:
        """Prefill chunks; the routed experts `[l, b, T, K]` of their tokens, if recorded."""
        self.cache_LBSW, experts = prefill(self.graph, self.weights, self.cache_LBSW, batch, self._options)
        return None if experts is None else np.asarray(experts)

    def copy_prefix(self, copy: PrefixCopy) -> None:
        self.cache_LBSW = copy_prefix(self.cache_LBSW, *copy, sharding=self._options.cache_sharding)

    def decode(self, state: DecodeState, stop_early: bool) -> tuple[DecodeState, DecodeOutput, int]:
        """Up to `DECODE_STEPS` steps: the new state, the generated tokens and the steps taken, on the host."""
        self.cache_LBSW, *results = decode(
            self.graph, self.weights, self.cache_LBSW, state, np.int32(DECODE_STEPS), stop_early, self._options
        )
        state, output, steps = jax.device_get(results)
        return state, output, int(steps)
