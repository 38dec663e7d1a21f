"""Continue prompts, a whole batch at a time."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mla_moe.nn.transformer import Transformer


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, up to and without `eos_id`. Temperature 0 takes the likeliest token.

    Every step runs the model over the whole rows, so time grows with the square of the length. A prompt's result does
    not depend on its neighbours. Raises `ValueError` for an empty prompt or a negative temperature.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: each needs at least one token; begin with the tokenizer's bos_id")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature = {temperature} must be >= 0 and top_p = {top_p} in (0, 1]")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    rows = np.zeros((len(prompts), lengths.max() + max_new_tokens), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    # A row's randomness comes from the seed and its own number, not from who stands beside it.
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(prompts)))
    filled = np.asarray(
        _continue(model, rows, lengths, keys, jnp.float32(temperature), jnp.float32(top_p), max_new_tokens)
    )
    new = [row[n : n + max_new_tokens].tolist() for row, n in zip(filled, lengths, strict=True)]
    return [tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens for tokens in new]


@partial(jax.jit, static_argnums=6)
def _continue(model, rows_BT, lengths_B, keys_B, temperature, top_p, count):
    def body(i, rows_BT):
        h_BTD, _ = model.hidden(rows_BT)
        row_B = jnp.arange(len(lengths_B))
        logits_BV = model.logits(h_BTD[row_B, lengths_B + i - 1][:, None])[:, 0]
        keys = jax.vmap(partial(jax.random.fold_in, data=i))(keys_B)
        token_B = jax.vmap(sample, in_axes=(0, 0, None, None))(keys, logits_BV, temperature, top_p)
        return rows_BT.at[row_B, lengths_B + i].set(token_B)

    return jax.lax.fori_loop(0, count, body, rows_BT)


def sample(
    key: Array, logits_V: Float[Array, "V"], temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, ""]:
    """A token from the smallest set of likeliest ones whose probability reaches `top_p` (arXiv 1904.09751)."""
    scaled_V = logits_V / jnp.maximum(temperature, 1e-6)
    order_V = jnp.argsort(-scaled_V)
    probability_V = jax.nn.softmax(scaled_V[order_V])
    before_V = jnp.cumsum(probability_V) - probability_V
    kept_V = jnp.where(before_V < top_p, scaled_V[order_V], -jnp.inf)
    drawn = order_V[jax.random.categorical(key, kept_V)]
    return jnp.where(temperature == 0, order_V[0], drawn).astype(jnp.int32)
