"""Speculative decoding: the MTP module drafts the token after the next (DeepSeek-V3, sections 2.2 and 5.4.3).

The input of a step is the next token and the draft token after it. If the token sampled after the first equals the
draft token, the draft is accepted, its output counts too, and the step has generated two tokens: the fraction of draft
tokens that are accepted is the acceptance rate.

It is exact: token n is the same function of the model's logits and of the noise with index n as in plain decoding, so
both generate the same tokens, greedy or sampled, up to the rounding of logits (bfloat16 may decide near-ties
differently). A draft token is sampled with the noise of its index too: draft and token then agree nearly as often as
their distributions overlap (Gumbel coupling), and no distribution needs a correction after a rejected draft.
"""

from functools import partial

import jax.numpy as jnp

from mla_moe.inference.decode import Carry, DecodeOutput, ProgramOptions, advance, store
from mla_moe.inference.sampling import sample
from mla_moe.nn.kv_cache import KVCache
from mla_moe.nn.transformer import Transformer


def speculative_step(model: Transformer, options: ProgramOptions, carry: Carry) -> Carry:
    """`decode_step` with up to two tokens. The cache's last layer is the MTP module's."""
    i, cache_LBSW, state, output = carry
    sample_tokens = partial(sample, scaled_logprobs=options.temperature_scaled_logprobs)
    cache = KVCache(cache_LBSW, state.position_B)
    input_B2 = jnp.stack([state.token_B, jnp.maximum(state.draft_B, 0)], axis=1)
    adapters_B = state.adapter_B  # the drafts are those of the model's own MTP module
    h_B2D, extended, experts = model.extend(input_B2, cache, active=state.active_B, adapter_ids=adapters_B)
    logits_B2V = model.logits(h_B2D)
    first_B, first_logprob_B = sample_tokens(logits_B2V[:, 0], state.sampling, state.generated_B)
    one = advance(state, first_B)
    accepted_B = one.active_B & (first_B == state.draft_B)
    second_B, second_logprob_B = sample_tokens(logits_B2V[:, 1], state.sampling, one.generated_B)
    two = advance(one._replace(active_B=accepted_B), second_B)
    # A rejected draft token leaves cache entries after the text; the next step overwrites them.
    sampled_B2 = jnp.stack([first_B, second_B], axis=1)
    cache = KVCache(extended.entries_LBSW, state.position_B)
    h_B2D, cache = model.mtp_extend(h_B2D, sampled_B2, cache, active=state.active_B)
    last_BD = jnp.where(accepted_B[:, None], h_B2D[:, 1], h_B2D[:, 0])
    draft_B, _ = sample(model.logits(last_BD[:, None], model.mtp_head_DV)[:, 0], state.sampling, two.generated_B)
    logprob_2B, valid_2B = jnp.stack([first_logprob_B, second_logprob_B]), jnp.stack([state.active_B, accepted_B])
    output = store(output, i, DecodeOutput(sampled_B2.T, logprob_2B, valid_2B, experts))
    active_B = jnp.where(accepted_B, two.active_B, one.active_B)
    return i + 1, cache.entries_LBSW, two._replace(active_B=active_B, draft_B=draft_B), output
