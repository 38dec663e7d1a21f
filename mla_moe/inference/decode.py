"""The decode loop: the state of the sequence slots, and one step, which generates a token for each active slot."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mla_moe.inference.request import MAX_STOPS, Completion
from mla_moe.inference.sampling import AnyArray, SamplingParams, sample
from mla_moe.nn.kv_cache import CacheEntries, KVCache
from mla_moe.nn.transformer import Transformer
from mla_moe.parallel.sharding import constrain_decode_logits

NO_TOKEN = -1


class DecodeState(NamedTuple):
    """State of every sequence slot, which the decode loop reads and returns updated."""

    token_B: Int[AnyArray, "B"]
    """The next input token."""
    position_B: Int[AnyArray, "B"]
    """Its position."""
    active_B: Bool[AnyArray, "B"]
    remaining_B: Int[AnyArray, "B"]
    """Tokens left until `max_new_tokens`."""
    generated_B: Int[AnyArray, "B"]
    """Tokens generated so far."""
    stop_BJ: Int[AnyArray, "B J"]
    """Stop tokens, padded with `NO_TOKEN`."""
    draft_B: Int[AnyArray, "B"]
    """Draft of the MTP module for the token after `token_B`, or `NO_TOKEN`."""
    adapter_B: Int[AnyArray, "B"]
    """The adapter of the request; 0 is none."""
    sampling: SamplingParams


class DecodeOutput(NamedTuple):
    """The tokens of several decode steps, or of one."""

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
    mesh: Mesh | None = None


Carry = tuple[Int[Array, ""], CacheEntries, DecodeState, DecodeOutput]
"""Carry of the decode loop: steps taken, entries of the KV cache, state of the slots, tokens so far."""


def empty_batch(max_num_seqs: int) -> DecodeState:
    """The state of inactive slots, as arrays on the host: change them only while no program that reads them runs."""

    def zeros(dtype: DTypeLike = np.int32) -> np.ndarray:
        return np.zeros(max_num_seqs, dtype)

    keys = np.zeros((max_num_seqs, 2), np.uint32)
    sampling = SamplingParams(zeros(np.float32), zeros(), 1 + zeros(np.float32), zeros(np.float32), keys)
    stops, drafts = np.full((max_num_seqs, MAX_STOPS), NO_TOKEN, np.int32), NO_TOKEN + zeros()
    return DecodeState(zeros(), zeros(), zeros(bool), zeros(), zeros(), stops, drafts, zeros(), sampling)


def add_request(batch: DecodeState, slot: int, completion: Completion) -> None:
    """Start or resume decoding in a slot whose cache holds all tokens but the last, the first input of decoding."""
    request, generated = completion.request, len(completion.tokens)
    batch.token_B[slot] = completion.tokens[-1] if generated else request.prompt[-1]
    batch.position_B[slot] = len(request.prompt) + generated - 1
    batch.active_B[slot], batch.generated_B[slot] = True, generated
    batch.remaining_B[slot], batch.adapter_B[slot] = request.max_new_tokens - generated, request.adapter
    batch.stop_BJ[slot] = batch.draft_B[slot] = NO_TOKEN
    batch.stop_BJ[slot, : len(request.stop_ids)] = request.stop_ids
    sampling, key = batch.sampling, jax.random.fold_in(jax.random.key(request.seed), request.sample_index)
    sampling.temperature_B[slot], sampling.top_k_B[slot] = request.temperature, request.top_k
    sampling.top_p_B[slot], sampling.min_p_B[slot] = request.top_p, request.min_p
    sampling.key_B2[slot] = np.asarray(jax.random.key_data(key))


def decode_step(model: Transformer, options: ProgramOptions, carry: Carry) -> Carry:
    i, cache_LBSW, state, output = carry
    cache = KVCache(cache_LBSW, state.position_B)
    tokens_B1, adapters_B = state.token_B[:, None], state.adapter_B
    h_BTD, cache, experts = model.extend(tokens_B1, cache, active=state.active_B, adapter_ids=adapters_B)
    logits_BV = constrain_decode_logits(model.logits(h_BTD)[:, 0])
    scaled = options.temperature_scaled_logprobs
    token_B, logprob_B = sample(logits_BV, state.sampling, state.generated_B, scaled_logprobs=scaled)
    output = store(output, i, DecodeOutput(token_B[None], logprob_B[None], state.active_B[None], experts))
    return i + 1, cache.entries_LBSW, advance(state, token_B), output


def store(output: DecodeOutput, i: Int[Array, ""], step: DecodeOutput) -> DecodeOutput:
    """The output with that of step i. Experts, which the model gives as `l B T K`, are stored if they are recorded."""
    recorded = output.experts_ilBK is not None and step.experts_ilBK is not None
    step = step._replace(experts_ilBK=jnp.moveaxis(step.experts_ilBK, 2, 0) if recorded else None)
    return jax.tree.map(lambda steps, new: steps.at[i].set(new.astype(steps.dtype)), output, step)


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
