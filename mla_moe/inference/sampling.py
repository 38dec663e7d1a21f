"""Sampling: the next token from logits, with each sequence's own parameters and random numbers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

AnyArray = Any
"""A NumPy array on the host between steps, a JAX array in a compiled step."""


class SamplingParams(NamedTuple):
    """Sampling parameters of every sequence. Filters apply in this order, as in transformers."""

    temperature_B: Float[AnyArray, "B"]
    """0 is greedy decoding."""
    top_k_B: Int[AnyArray, "B"]
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p_B: Float[AnyArray, "B"]
    """Nucleus sampling (arXiv 1904.09751): keep the fewest likeliest tokens whose probabilities reach p, and those that
    tie with the last of them; 1 keeps all."""
    min_p_B: Float[AnyArray, "B"]
    """Keep tokens of at least this fraction of the highest probability (arXiv 2407.01082); 0 keeps all."""
    key_B2: UInt[AnyArray, "B 2"]
    """Random numbers depend on this key and on the index of the token in its completion, not on the rest of the
    batch."""


def sample(
    logits_BV: Float[Array, "B V"], params: SamplingParams, index_B: Int[AnyArray, "B"], scaled_logprobs: bool = False
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Each sequence's next token, number `index` of its completion, and the token's log-probability.

    The log-probability is at temperature 1 or, with `scaled_logprobs`, at the sequence's temperature unless
    that is 0; always before top-k, top-p and min-p.
    """

    def gumbel_noise(key_2: UInt[Array, "2"], index: Int[Array, ""]) -> Float[Array, "V"]:
        """The argmax of its sum with log-probabilities is a sample from them."""
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key_2), index), (logits_BV.shape[1],))

    def draw(_: None) -> Int[Array, "B"]:
        noisy_BV = filter_logits(logits_BV, params) + jax.vmap(gumbel_noise)(params.key_B2, index_B)
        return jnp.argmax(jnp.where(params.temperature_B[:, None] > 0, noisy_BV, logits_BV), axis=-1)

    # Greedy batches, the usual ones in evaluation, generate no random numbers.
    greedy = jnp.all(params.temperature_B == 0)
    token_B = jax.lax.cond(greedy, lambda _: jnp.argmax(logits_BV, axis=-1), draw, None)
    if scaled_logprobs:
        logits_BV /= jnp.where(params.temperature_B > 0, params.temperature_B, 1)[:, None]
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def filter_logits(logits_BV: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    """Logits divided by the temperature, −inf for tokens that top-k, top-p or min-p removes."""
    V = logits_BV.shape[1]
    scaled_BV = logits_BV / jnp.maximum(params.temperature_B, 1e-6)[:, None]
    top_k_B = jnp.where(params.top_k_B > 0, jnp.minimum(params.top_k_B, V), V)

    def rank_threshold(_: None) -> Float[Array, "B 1"]:
        """The lowest logit that top-k and top-p keep."""
        sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
        top_k_BV = jnp.where(jnp.arange(V) < top_k_B[:, None], sorted_BV, -jnp.inf)
        probability_BV = jax.nn.softmax(top_k_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        kept_B = jnp.clip((before_BV < params.top_p_B[:, None]).sum(axis=-1), 1, top_k_B)
        return jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=-1)

    # Sorting the vocabulary costs more than the rest of a small model's step.
    ranked = jnp.any((top_k_B < V) | (params.top_p_B < 1))
    keep_all_B1 = jnp.full((len(scaled_BV), 1), -jnp.inf, scaled_BV.dtype)
    threshold_B1 = jax.lax.cond(ranked, rank_threshold, lambda _: keep_all_B1, None)
    # log(0) is −inf: min_p = 0 keeps all.
    min_p_threshold_B1 = scaled_BV.max(axis=-1, keepdims=True) + jnp.log(params.min_p_B)[:, None]
    return jnp.where((scaled_BV >= threshold_B1) & (scaled_BV >= min_p_threshold_B1), scaled_BV, -jnp.inf)
