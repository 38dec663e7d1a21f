"""MLA and MoE modules in your own model and training loop, with plain JAX and Optax.

    python examples/own_loop.py

The model learns to repeat the token eight positions before. The router's bias is updated by the load of each expert.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mla_moe
from mla_moe import RouterStats

cfg = mla_moe.preset("tiny")
STEPS, BATCH_SIZE, LENGTH, VOCAB_SIZE, DISTANCE = 60, 16, 32, 16, 8


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB_SIZE, cfg.hidden_size, rngs=rngs)
        self.norms = nnx.List(nnx.RMSNorm(cfg.hidden_size, rngs=rngs) for _ in range(3))
        self.attention = mla_moe.MLAttention(cfg, rngs=rngs)
        self.moe = mla_moe.MoE(cfg, rngs=rngs)
        self.head = nnx.Linear(cfg.hidden_size, VOCAB_SIZE, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, RouterStats]:
        x = self.embed(tokens)
        x += self.attention(self.norms[0](x))
        y, stats = self.moe.with_stats(self.norms[1](x))
        return self.head(self.norms[2](x + y)), stats


# The router's bias is not an `nnx.Param`: it is in `rest`, which the optimizer does not update.
graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
adam = optax.adam(3e-3)


@partial(jax.jit, compiler_options=mla_moe.compiler_options())
def step(
    params: optax.Params, rest: Any, moments: optax.OptState, tokens: jax.Array
) -> tuple[optax.Params, Any, optax.OptState, jax.Array, jax.Array]:
    def loss(params: optax.Params) -> tuple[jax.Array, RouterStats]:
        logits, stats = nnx.merge(graph, params, rest)(tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, DISTANCE:], tokens[:, :-DISTANCE])
        return losses.mean(), stats

    (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = adam.update(gradients, moments)
    load = stats.load_E.astype(jnp.float32)
    rest["moe"]["router"]["bias"][...] += 1e-3 * jnp.sign(load.mean() - load)
    return optax.apply_updates(params, updates), rest, moments, value, load.max() / load.mean()


moments = adam.init(params)
for number in range(STEPS):
    tokens = jax.random.randint(jax.random.key(number), (BATCH_SIZE, LENGTH), 0, VOCAB_SIZE)
    params, rest, moments, value, max_load_ratio = step(params, rest, moments, tokens)
    if number % 10 == 9:
        print(f"step {number + 1:3}  loss {value:.3f}  max load ratio {max_load_ratio:.2f}")
