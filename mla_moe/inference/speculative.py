"""Decoding that also guesses the token after the next with the prediction module (DeepSeek-V3, sections 2.2 and 5.4.3).

A step reads the next token and a guess of the one behind it. If the token drawn after the first is the guess, what was
read of the guess counts, and the step has made two tokens.

It is exact in the strongest sense: token n is the same function of the model's logits and of the noise of number n as
in plain decoding, whether it was guessed or not, so both make the same tokens, greedy or drawn, as far as the logits
round alike (in bfloat16 near-ties may fall otherwise). A guess is drawn with the noise of its number too: then guess
and token agree nearly as often as their distributions overlap (Gumbel coupling), and no distribution has to be
corrected after a wrong guess.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mla_moe.inference.model_runner import (
    DECODE_STEPS,
    DecodeOutput,
    SlotState,
    advance,
    constrain_cache,
    empty_output,
    record_experts,
    replicate,
    should_continue,
)
from mla_moe.inference.sampling import sample
from mla_moe.inference.weights import ModelGraph
from mla_moe.nn.kv_cache import OUT_OF_RANGE


@partial(jax.jit, static_argnames=("structure", "record", "tempered", "place"), donate_argnames=("cache_LBSW",))
def speculative_decode(
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
    """`steps.decode` with up to two tokens a step; the cache's last layer is the prediction module's."""
    model = structure.merge(state)
    made = empty_output(model.cfg, (DECODE_STEPS, 2), len(slots.token_B), record)

    def step(carry):
        i, cache_LBSW, now, made = carry
        position_B = jnp.where(now.live_B, now.position_B, OUT_OF_RANGE)
        read_B2 = jnp.stack([now.token_B, jnp.maximum(now.guess_B, 0)], axis=1)
        h_B2D, cache_LBSW, experts = model.extend(read_B2, cache_LBSW, position_B)
        logits_B2V = model.logits(h_B2D)
        first_B, first_logprob_B = sample(logits_B2V[:, 0], now.settings, now.number_B, tempered=tempered)
        one = advance(now, first_B)
        right_B = one.live_B & (first_B == now.guess_B)
        second_B, second_logprob_B = sample(logits_B2V[:, 1], now.settings, one.number_B, tempered=tempered)
        two = advance(one._replace(live_B=right_B), second_B)
        # A wrong guess leaves entries behind the text; the next step writes over them.
        after_B2 = jnp.stack([first_B, second_B], axis=1)
        h_B2D, cache_LBSW = model.mtp_extend(h_B2D, after_B2, cache_LBSW, position_B)
        end_BD = jnp.where(right_B[:, None], h_B2D[:, 1], h_B2D[:, 0])
        guess_B, _ = sample(model.logits(end_BD[:, None], model.mtp_head)[:, 0], now.settings, two.number_B)
        made = DecodeOutput(
            made.token_iB.at[i].set(after_B2.T),
            made.logprob_iB.at[i].set(jnp.stack([first_logprob_B, second_logprob_B])),
            made.live_iB.at[i].set(jnp.stack([now.live_B, right_B])),
            record_experts(made, i, experts),
        )
        live_B = jnp.where(right_B, two.live_B, one.live_B)
        return i + 1, cache_LBSW, two._replace(live_B=live_B, guess_B=guess_B), made

    start = jnp.int32(0), cache_LBSW, slots, made
    taken, cache_LBSW, slots, made = jax.lax.while_loop(should_continue(steps, stop_early, slots), step, start)
    made = jax.tree.map(lambda x: x.reshape(2 * DECODE_STEPS, *x.shape[2:]), made)
    return constrain_cache(cache_LBSW, place), *replicate((slots, made, taken), place)
