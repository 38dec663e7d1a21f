"""Compiled programs: decode, prefill, prefix copy. The KV cache is donated to each and returned, updated in place."""

import math
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mla_moe.inference.decode import Carry, DecodeOutput, DecodeState, ProgramOptions, decode_step
from mla_moe.inference.prefix_cache import PrefixCopy
from mla_moe.inference.sampling import AnyArray
from mla_moe.inference.speculative import speculative_step
from mla_moe.inference.weights import ModelGraph
from mla_moe.nn.kv_cache import CacheEntries, KVCache, NewTokens, constrain_entries
from mla_moe.nn.transformer import Transformer
from mla_moe.ops.cached_attention import BLOCK
from mla_moe.parallel.sharding import constrain_decode_logits

DECODE_STEPS = 16
"""Most decode steps in one call, which is one round trip between host and device."""
Tree = TypeVar("Tree")


class PrefillBatch(NamedTuple):
    """Prefill chunks of `b` prompts, padded to `T` tokens."""

    tokens_bT: Int[AnyArray, "b T"]
    next_bT: Int[AnyArray, "b T"]
    """The token after each, which the MTP module reads too."""
    start_b: Int[AnyArray, "b"]
    """Position of a chunk's first token."""
    slots_b: Int[AnyArray, "b"]
    adapter_b: Int[AnyArray, "b"]


@partial(jax.jit, static_argnames=("graph", "options"), donate_argnames=("cache_LBSW",))
def decode(
    graph: ModelGraph,
    weights: nnx.State,
    cache_LBSW: CacheEntries,
    state: DecodeState,
    max_steps: Int[AnyArray, ""],
    stop_early: Bool[AnyArray, ""] | bool,
    options: ProgramOptions,
) -> tuple[CacheEntries, DecodeState, DecodeOutput, Int[Array, ""]]:
    """Up to `max_steps` decode steps for every active slot: the cache, the new state, the tokens, the steps taken.

    The loop ends when no slot is active or, with `stop_early`, when any request has finished and others wait for its
    slot.
    """
    model = graph.merge(weights)
    step = partial(speculative_step if options.speculative else decode_step, model, options)
    tokens, slots = (DECODE_STEPS, 1 + options.speculative), len(state.token_B)
    token, logprob, valid = (jnp.zeros((*tokens, slots), dtype) for dtype in (jnp.int32, jnp.float32, bool))
    experts = *tokens, model.cfg.num_moe_layers, slots, model.cfg.num_experts_per_tok
    recorded = jnp.zeros(experts, jnp.int16) if options.record_experts else None
    output = DecodeOutput(token, logprob, valid, recorded)

    def condition(carry: Carry) -> Bool[Array, ""]:
        i, _, now, _ = carry
        finished = stop_early & (now.active_B.sum() < state.active_B.sum())
        return (i < max_steps) & now.active_B.any() & ~finished

    steps, cache_LBSW, after, output = jax.lax.while_loop(condition, step, (jnp.int32(0), cache_LBSW, state, output))
    output = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)
    return cache_LBSW, *replicate((after, output, steps), options.mesh)


class NextLogprobs(NamedTuple):
    """Log-probabilities of the next token at each position of a prefill."""

    logprob_bT: Float[Array, "b T"]
    """Log-probability of the prompt's token."""
    top_ids_bTk: Int[Array, "b T k"]
    """The most likely tokens, in order."""
    top_logprob_bTk: Float[Array, "b T k"]


@partial(jax.jit, static_argnames=("graph", "options", "logprobs"), donate_argnames=("cache_LBSW",))
def prefill(
    graph: ModelGraph,
    weights: nnx.State,
    cache_LBSW: CacheEntries,
    batch: PrefillBatch,
    options: ProgramOptions,
    logprobs: int | None = None,
) -> tuple[CacheEntries, Int[Array, "b T l K"] | None, NextLogprobs | None]:
    """Write prefill chunks into the cache, also in the MTP module's layer if it drafts. Returns the cache, the routed
    experts of each token if they are recorded, and with `logprobs` the log-probabilities of the token after each, and
    of so many most likely ones."""
    model = graph.merge(weights)
    length_B = jnp.zeros(cache_LBSW.shape[1], jnp.int32).at[batch.slots_b].set(batch.start_b)
    cache, slots = KVCache(cache_LBSW, length_B), batch.slots_b
    adapters = batch.adapter_b
    h_bTD, extended, experts = model.extend(batch.tokens_bT, cache, slots=slots, form="expanded", adapter_ids=adapters)
    next_logprobs = None if logprobs is None else _next_logprobs(model, h_bTD, batch.next_bT, logprobs)
    if options.speculative:
        cache = KVCache(extended.entries_LBSW, length_B)
        _, extended = model.mtp_extend(h_bTD, batch.next_bT, cache, slots=slots, form="expanded")
    recorded = options.record_experts and experts is not None
    experts_bTlK = jnp.transpose(experts, (1, 2, 0, 3)).astype(jnp.int16) if recorded else None
    return extended.entries_LBSW, *replicate((experts_bTlK, next_logprobs), options.mesh)


def _next_logprobs(model: Transformer, h_bTD: NewTokens, next_bT: Int[AnyArray, "b T"], top_k: int) -> NextLogprobs:
    """A few tokens of each sequence at a time: logits of all would be as large as the weights."""
    (b, T, D), size = h_bTD.shape, math.gcd(h_bTD.shape[1], 16)

    def chunk(inputs: tuple[Array, Array]) -> NextLogprobs:
        h_btD, next_bt = inputs
        logprobs_btV = jax.nn.log_softmax(constrain_decode_logits(model.logits(h_btD)).astype(jnp.float32))
        logprob_bt = jnp.take_along_axis(logprobs_btV, next_bt[..., None], axis=-1)[..., 0]
        top_btk, ids_btk = jax.lax.top_k(logprobs_btV, top_k)
        return NextLogprobs(logprob_bt, ids_btk, top_btk)

    chunks = jnp.moveaxis(h_bTD.reshape(b, -1, size, D), 1, 0), jnp.moveaxis(next_bT.reshape(b, -1, size), 1, 0)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, T, *x.shape[3:]), jax.lax.map(chunk, chunks))


@partial(jax.jit, donate_argnames=("cache_LBSW",))
def copy_prefix(cache_LBSW: CacheEntries, copy: PrefixCopy) -> CacheEntries:
    """Copy the first `length` entries of one slot to another, rounded up to full blocks of attention."""
    (source, target, length), (L, _, S, W) = copy, cache_LBSW.shape
    size = min(BLOCK, S)

    def copy_block(i: Int[Array, ""], cache_LBSW: CacheEntries) -> CacheEntries:
        block = jax.lax.dynamic_slice(cache_LBSW, (0, source, i * size, 0), (L, 1, size, W))
        return jax.lax.dynamic_update_slice(cache_LBSW, block, (0, target, i * size, 0))

    return constrain_entries(jax.lax.fori_loop(0, -(-length // size), copy_block, cache_LBSW))


def replicate(tree: Tree, mesh: Mesh | None) -> Tree:
    """Replicate what the host reads over the mesh, so that every process of a run can read it."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))
