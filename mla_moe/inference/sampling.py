"""The next token out of logits, with every row's own settings and randomness."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

Either = Array | np.ndarray
"""On the host between steps, on the device within one."""


class SamplingParams(NamedTuple):
    """How each row draws. Filters apply in this order, as in transformers."""

    temperature_B: Float[Either, "B"]
    """0 takes the likeliest token."""
    top_k_B: Int[Either, "B"]
    """Only so many of the likeliest; 0 for all."""
    top_p_B: Float[Either, "B"]
    """Only the fewest of the likeliest that reach this share (arXiv 1904.09751), and what ties with the last of them; 1
    for all."""
    min_p_B: Float[Either, "B"]
    """Only tokens at least this share of the likeliest one's probability (arXiv 2407.01082); 0 for all."""
    key_B2: UInt[Either, "B 2"]
    """A row's randomness comes from its key and the number of its token, not from who stands beside it."""


def sample(
    logits_BV: Float[Array, "B V"], settings: SamplingParams, number_B: Int[Either, "B"], *, tempered: bool = False
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Each row's token, and the logarithm of its probability under the model: at temperature 1, or if `tempered` at the
    row's own where that is not 0; nothing is filtered."""

    def drawn(_):
        noise_BV = jax.vmap(lambda key, n: gumbel(key, n, logits_BV.shape[1]))(settings.key_B2, number_B)
        kept_BV = jnp.where(
            settings.temperature_B[:, None] > 0, filter_logits(logits_BV, settings) + noise_BV, logits_BV
        )
        return jnp.argmax(kept_BV, axis=-1)

    # Greedy batches, the usual ones in evaluation, pay for no random numbers.
    greedy = jnp.all(settings.temperature_B == 0)
    token_B = jax.lax.cond(greedy, lambda _: jnp.argmax(logits_BV, axis=-1), drawn, None)
    if tempered:
        logits_BV /= jnp.where(settings.temperature_B > 0, settings.temperature_B, 1)[:, None]
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def gumbel(key_2: UInt[Array, "2"], number: Int[Array, ""], size: int) -> Float[Array, "size"]:
    """Noise whose sum with log-probabilities is largest at a token drawn from them."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key_2), number), (size,))


def filter_logits(logits_BV: Float[Array, "B V"], settings: SamplingParams) -> Float[Array, "B V"]:
    """Logits over the temperature, −inf where a filter leaves a token out."""
    V = logits_BV.shape[1]
    scaled_BV = logits_BV / jnp.maximum(settings.temperature_B, 1e-6)[:, None]
    top_k_B = jnp.where(settings.top_k_B > 0, jnp.minimum(settings.top_k_B, V), V)

    def by_rank(_):
        """The least logit that top-k and top-p keep."""
        sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
        rank_BV = jnp.where(jnp.arange(V) < top_k_B[:, None], sorted_BV, -jnp.inf)
        probability_BV = jax.nn.softmax(rank_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        kept_B = jnp.clip((before_BV < settings.top_p_B[:, None]).sum(axis=-1), 1, top_k_B)
        return jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=-1)

    # Sorting the vocabulary costs more than the rest of a small model's step.
    ranked = jnp.any((top_k_B < V) | (settings.top_p_B < 1))
    all_B1 = jnp.full((len(scaled_BV), 1), -jnp.inf, scaled_BV.dtype)
    least_B1 = jax.lax.cond(ranked, by_rank, lambda _: all_B1, None)
    # log(0) is −inf: nothing is left out.
    floor_B1 = scaled_BV.max(axis=-1, keepdims=True) + jnp.log(settings.min_p_B)[:, None]
    return jnp.where((scaled_BV >= least_B1) & (scaled_BV >= floor_B1), scaled_BV, -jnp.inf)
