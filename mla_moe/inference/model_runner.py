"""The compiled parts of the engine: prefill, the decode loop, and copying what a slot holds to others.

The cache is passed, given up and returned. What a slot is doing travels as a few small arrays.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from mla_moe.config import ModelConfig
from mla_moe.inference.request import MAX_STOPS
from mla_moe.inference.sampling import Either, SamplingParams, sample
from mla_moe.inference.weights import ModelGraph
from mla_moe.nn.kv_cache import OUT_OF_RANGE
from mla_moe.ops.cached_attention import BLOCK
from mla_moe.parallel.sharding import constrain_decode_logits

DECODE_STEPS = 16
"""Most tokens a slot makes in one round trip between host and device."""

NO_TOKEN = -1


class SlotState(NamedTuple):
    """What every slot of the batch is doing."""

    token_B: Int[Either, "B"]
    """The next token to read."""
    position_B: Int[Either, "B"]
    """Its place."""
    live_B: Bool[Either, "B"]
    left_B: Int[Either, "B"]
    """How many tokens it may still make."""
    number_B: Int[Either, "B"]
    """How many it has made."""
    stop_BJ: Int[Either, "B J"]
    """Tokens that end it; `NO_TOKEN` fills up."""
    guess_B: Int[Either, "B"]
    """What the prediction module takes for the token after the next, or `NO_TOKEN`."""
    settings: SamplingParams


def empty_slots(slots: int) -> SlotState:
    """Nobody's, in arrays of the host."""
    return SlotState(
        token_B=np.zeros(slots, np.int32),
        position_B=np.zeros(slots, np.int32),
        live_B=np.zeros(slots, bool),
        left_B=np.zeros(slots, np.int32),
        number_B=np.zeros(slots, np.int32),
        stop_BJ=np.full((slots, MAX_STOPS), NO_TOKEN, np.int32),
        guess_B=np.full(slots, NO_TOKEN, np.int32),
        settings=SamplingParams(
            temperature_B=np.zeros(slots, np.float32),
            top_k_B=np.zeros(slots, np.int32),
            top_p_B=np.ones(slots, np.float32),
            min_p_B=np.zeros(slots, np.float32),
            key_B2=np.zeros((slots, 2), np.uint32),
        ),
    )


class DecodeOutput(NamedTuple):
    """The tokens of one round trip."""

    token_iB: Int[Either, "i B"]
    logprob_iB: Float[Either, "i B"]
    live_iB: Bool[Either, "i B"]
    """Whether the slot was live at that step, so that its token counts."""
    experts_ilBK: Int[Either, "i l B K"] | None
    """The experts that read the step's *input* token, layer by layer."""


def empty_output(cfg: ModelConfig, steps: tuple[int, ...], slots: int, record: bool) -> DecodeOutput:
    choices = *steps, cfg.num_moe_layers, slots, cfg.num_experts_per_tok
    return DecodeOutput(
        jnp.zeros((*steps, slots), jnp.int32),
        jnp.zeros((*steps, slots), jnp.float32),
        jnp.zeros((*steps, slots), bool),
        jnp.zeros(choices, jnp.int16) if record else None,
    )


def record_experts(made: DecodeOutput, i, experts_lBTK):
    """The experts of step i put down, if they are recorded."""
    if made.experts_ilBK is None or experts_lBTK is None:
        return None
    experts_TlBK = jnp.moveaxis(experts_lBTK, 2, 0).astype(jnp.int16)
    recorded = jnp.asarray(made.experts_ilBK)
    return recorded.at[i].set(experts_TlBK.reshape(recorded.shape[1:]))


def advance(now: SlotState, token_B) -> SlotState:
    """Live slots after they have made these tokens."""
    stopped_B = (token_B[:, None] == now.stop_BJ).any(axis=1)
    return now._replace(
        token_B=jnp.where(now.live_B, token_B, now.token_B),
        position_B=now.position_B + now.live_B,
        live_B=now.live_B & ~stopped_B & (now.left_B > 1),
        left_B=now.left_B - now.live_B,
        number_B=now.number_B + now.live_B,
    )


def should_continue(steps, stop_early, before: SlotState):
    """Whether a decode loop, whose carry is `(i, cache, slots, made)`, takes another step."""

    def condition(carry):
        i, _, now, _ = carry
        someone_left = stop_early & (now.live_B.sum() < before.live_B.sum())
        return (i < steps) & now.live_B.any() & ~someone_left

    return condition


@partial(jax.jit, static_argnames=("structure", "record", "tempered", "place"), donate_argnames=("cache_LBSW",))
def decode(
    structure: ModelGraph,
    state,
    cache_LBSW,
    slots: SlotState,
    steps,
    stop_early,
    *,
    record: bool,
    tempered: bool,
    place,
):
    """Up to `steps` tokens for every live slot: `(cache, slots, made, taken)`.

    With `stop_early` the loop ends as soon as any slot is done, because others wait for its place.
    """
    model = structure.merge(state)
    made = empty_output(model.cfg, (DECODE_STEPS,), len(slots.token_B), record)

    def step(carry):
        i, cache_LBSW, now, made = carry
        position_B = jnp.where(now.live_B, now.position_B, OUT_OF_RANGE)
        h_BTD, cache_LBSW, experts = model.extend(now.token_B[:, None], cache_LBSW, position_B)
        token_B, logprob_B = sample(
            constrain_decode_logits(model.logits(h_BTD)[:, 0]), now.settings, now.number_B, tempered=tempered
        )
        made = DecodeOutput(
            made.token_iB.at[i].set(token_B),
            made.logprob_iB.at[i].set(logprob_B),
            made.live_iB.at[i].set(now.live_B),
            record_experts(made, i, experts),
        )
        return i + 1, cache_LBSW, advance(now, token_B), made

    start = jnp.int32(0), cache_LBSW, slots, made
    taken, cache_LBSW, slots, made = jax.lax.while_loop(should_continue(steps, stop_early, slots), step, start)
    return constrain_cache(cache_LBSW, place), *replicate((slots, made, taken), place)


@partial(jax.jit, static_argnames=("structure", "guess", "record", "place"), donate_argnames=("cache_LBSW",))
def prefill(
    structure: ModelGraph, state, cache_LBSW, tokens_bT, next_bT, start_b, slots_b, *, guess: bool, record: bool, place
):
    """Read pieces of prompts into their slots: the cache, and each token's experts. With `guess` the prediction module
    reads them too, and needs the token after each (`next_bT`)."""
    model = structure.merge(state)
    h_bTD, cache_LBSW, experts = model.extend(tokens_bT, cache_LBSW, start_b, slots_b, form="expanded")
    if guess:
        _, cache_LBSW = model.mtp_extend(h_bTD, next_bT, cache_LBSW, start_b, slots_b, form="expanded")
    experts = experts.astype(jnp.int16) if record and experts is not None else None
    return constrain_cache(cache_LBSW, place), replicate(experts, place)


@partial(jax.jit, static_argnames=("place",), donate_argnames=("cache_LBSW",))
def copy_prefix(cache_LBSW, source, target, length, *, place):
    """The first `length` entries of one slot to another, in whole blocks."""
    L, _, S, W = cache_LBSW.shape
    size = min(BLOCK, S)

    def block(i, cache_LBSW):
        part = jax.lax.dynamic_slice(cache_LBSW, (0, source, i * size, 0), (L, 1, size, W))
        return jax.lax.dynamic_update_slice(cache_LBSW, part, (0, target, i * size, 0))

    return constrain_cache(jax.lax.fori_loop(0, -(-length // size), block, cache_LBSW), place)


def constrain_cache(cache_LBSW, place):
    """On a mesh the cache stays where it was, call after call."""
    return cache_LBSW if place is None else jax.lax.with_sharding_constraint(cache_LBSW, place)


def replicate(tree, place):
    """What the host reads is whole on every device, so that every process of a run can."""
    if place is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(place.mesh, PartitionSpec()))
