"""Latent attention and a mixture of experts in a model and a training loop of one's own: plain JAX and Optax.

    python examples/own_loop.py

It learns to say again what came eight tokens before.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mla_moe

cfg = mla_moe.preset("tiny")
STEPS, BATCH, LENGTH, SYMBOLS, BACK = 60, 16, 32, 16, 8


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(SYMBOLS, cfg.hidden_size, rngs=rngs)
        self.norms = nnx.List(nnx.RMSNorm(cfg.hidden_size, rngs=rngs) for _ in range(3))
        self.attention = mla_moe.MLAttention(cfg, rngs=rngs)
        self.moe = mla_moe.MoE(cfg, rngs=rngs)
        self.head = nnx.Linear(cfg.hidden_size, SYMBOLS, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x += self.attention(self.norms[0](x))
        y, stats = self.moe.with_stats(self.norms[1](x))
        return self.head(self.norms[2](x + y)), stats


# The router's bias is no `nnx.Param`: it comes into `rest`, where the optimizer does not see it.
graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
adam = optax.adam(3e-3)


@jax.jit
def step(params, rest, moments, tokens):
    def loss(params):
        logits, stats = nnx.merge(graph, params, rest)(tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, BACK:], tokens[:, :-BACK])
        return losses.mean(), stats

    (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = adam.update(gradients, moments)
    load = stats.load_E.astype(jnp.float32)
    rest["moe"]["router"]["bias"][...] += 1e-3 * jnp.sign(load.mean() - load)
    return optax.apply_updates(params, updates), rest, moments, value, load.max() / load.mean()


moments = adam.init(params)
for number in range(STEPS):
    tokens = jax.random.randint(jax.random.key(number), (BATCH, LENGTH), 0, SYMBOLS)
    params, rest, moments, value, busiest = step(params, rest, moments, tokens)
    if number % 10 == 9:
        print(f"step {number + 1:3}  loss {value:.3f}  busiest expert / mean {busiest:.2f}")
