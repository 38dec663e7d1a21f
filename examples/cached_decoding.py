"""Cached decoding in a loop of your own: padded prompts of several lengths, one prefill, then decode steps in a scan.

    python examples/cached_decoding.py

The cache is kept: a second call appends to the first. Greedy tokens are those of `mla_moe.generate`, whose engine runs
the same methods.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import mla_moe
from mla_moe import KVCache, Transformer

NEW_TOKENS = 8


@partial(jax.jit, donate_argnames="cache")  # the cache is updated in place
def generate(
    model: Transformer, cache: KVCache, prompts: jax.Array, lengths: jax.Array, key: jax.Array, temperature: float
) -> tuple[jax.Array, KVCache]:
    """New tokens `[sequences, NEW_TOKENS]` after prompts `[sequences, longest]`, padded on the right, and the cache."""

    def step(carry: tuple[jax.Array, KVCache], key: jax.Array) -> tuple[tuple[jax.Array, KVCache], jax.Array]:
        logits, cache = carry
        sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, sampled, logits.argmax(axis=-1))
        return model.decode_step(token, cache), token

    carry = model.prefill(prompts, cache, lengths)  # logits of the token after each prompt, and the cache
    (_, cache), tokens = jax.lax.scan(step, carry, jax.random.split(key, NEW_TOKENS))
    return tokens.T, cache


model = mla_moe.Transformer(mla_moe.preset("tiny"), rngs=nnx.Rngs(0))  # or mla_moe.load_pretrained("path")
prompts = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33]]
lengths = jnp.array([len(prompt) for prompt in prompts])
padded = jnp.array([prompt + [0] * (5 - len(prompt)) for prompt in prompts])
cache = model.init_cache(batch=3, max_length=32)

tokens, cache = generate(model, cache, padded, lengths, jax.random.key(0), 0.0)
print("greedy:", *tokens.tolist(), sep="\n  ")
assert tokens.tolist() == mla_moe.generate(model, prompts, max_new_tokens=NEW_TOKENS)

more, cache = generate(model, cache, padded, lengths, jax.random.key(1), 1.0)  # the same prompts, as a second turn
print("second turn, sampled:", *more.tolist(), sep="\n  ")
print(f"cached tokens: {cache.length_B.tolist()} of {cache.max_length}, {cache.entries_LBSW.nbytes:,} bytes")
