"""One decode step: each active sequence slot reads its next input token and generates a token."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Num

from mla_moe.config import ModelConfig
from mla_moe.inference.input_batch import DecodeState
from mla_moe.inference.sampling import AnyArray, sample
from mla_moe.nn.kv_cache import OUT_OF_RANGE
from mla_moe.nn.transformer import Transformer
from mla_moe.parallel.sharding import constrain_decode_logits

Cache = Num[Array, "L B S W"]


class DecodeOutput(NamedTuple):
    """The tokens of several decode steps."""

    token_iB: Int[AnyArray, "i B"]
    logprob_iB: Float[AnyArray, "i B"]
    valid_iB: Bool[AnyArray, "i B"]
    """Whether the slot was active at that step; other tokens do not count."""
    experts_ilBK: Int[AnyArray, "i l B K"] | None
    """The routed experts of the step's *input* token in every MoE layer, if they are recorded."""


class ProgramOptions(NamedTuple):
    """Static options of the compiled programs."""

    speculative: bool = False
    record_experts: bool = False
    temperature_scaled_logprobs: bool = False
    cache_sharding: NamedSharding | None = None


Carry = tuple[Int[Array, ""], Cache, DecodeState, DecodeOutput]
"""Of the decode loop: steps taken, KV cache, state of the slots, tokens so far."""


def empty_output(cfg: ModelConfig, steps: tuple[int, ...], slots: int, record_experts: bool) -> DecodeOutput:
    experts = *steps, cfg.num_moe_layers, slots, cfg.num_experts_per_tok
    return DecodeOutput(
        jnp.zeros((*steps, slots), jnp.int32),
        jnp.zeros((*steps, slots), jnp.float32),
        jnp.zeros((*steps, slots), bool),
        jnp.zeros(experts, jnp.int16) if record_experts else None,
    )


def decode_step(model: Transformer, options: ProgramOptions, carry: Carry) -> Carry:
    i, cache_LBSW, state, output = carry
    position_B = jnp.where(state.active_B, state.position_B, OUT_OF_RANGE)
    h_BTD, cache_LBSW, experts = model.extend(state.token_B[:, None], cache_LBSW, position_B)
    logits_BV = constrain_decode_logits(model.logits(h_BTD)[:, 0])
    scaled = options.temperature_scaled_logprobs
    token_B, logprob_B = sample(logits_BV, state.sampling, state.generated_B, temperature_scaled_logprobs=scaled)
    output = store(output, i, token_B, logprob_B, state.active_B, experts)
    return i + 1, cache_LBSW, advance(state, token_B), output


def store(
    output: DecodeOutput,
    i: Int[Array, ""],
    token: Int[Array, "..."],
    logprob: Float[Array, "..."],
    valid: Bool[Array, "..."],
    experts_lBTK: Int[Array, "l B T K"] | None,
) -> DecodeOutput:
    """The output with the tokens of step i, and their experts if they are recorded."""
    recorded = output.experts_ilBK
    if recorded is not None and experts_lBTK is not None:
        experts_TlBK = jnp.moveaxis(experts_lBTK, 2, 0).astype(jnp.int16)
        recorded = recorded.at[i].set(experts_TlBK.reshape(recorded.shape[1:]))
    return DecodeOutput(
        output.token_iB.at[i].set(token), output.logprob_iB.at[i].set(logprob), output.valid_iB.at[i].set(valid),
        recorded,
    )  # fmt: skip


def advance(state: DecodeState, token_B: Int[Array, "B"]) -> DecodeState:
    """The state after every active slot has generated its token."""
    stopped_B = (token_B[:, None] == state.stop_BJ).any(axis=1)
    return state._replace(
        token_B=jnp.where(state.active_B, token_B, state.token_B),
        position_B=state.position_B + state.active_B,
        active_B=state.active_B & ~stopped_B & (state.remaining_B > 1),
        remaining_B=state.remaining_B - state.active_B,
        generated_B=state.generated_B + state.active_B,
    )
