"""A router of your own in `MoE`: experts by cosine similarity (X-MoE, arXiv 2204.09179), with your own activation.

    python examples/custom_router.py

A router is any function of tokens `[N, D]` that returns a `Routing`. Four kinds of tokens have a different target each;
the loss falls when tokens of one kind find an expert of their own, and the auxiliary loss keeps all experts in use.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mla_moe

STEPS, TOKENS, WIDTH, KINDS, EXPERTS = 300, 256, 16, 4, 8


class CosineRouter(nnx.Module):
    """Scores: softmax over experts of `cos(x, expert) / temperature`. The best two of a token are its experts."""

    def __init__(self, rngs: nnx.Rngs):
        self.experts = nnx.Param(jax.random.normal(rngs.params(), (EXPERTS, WIDTH)))
        self.log_temperature = nnx.Param(jnp.log(0.3))

    def __call__(self, x: jax.Array) -> mla_moe.Routing:
        x, experts = (v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in (x, self.experts[...]))
        scores = jax.nn.softmax(x @ experts.T / jnp.exp(self.log_temperature[...]))
        weights, chosen = jax.lax.top_k(scores, 2)
        return mla_moe.Routing(chosen, weights, scores)


def squared_relu(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


rngs = nnx.Rngs(0)
moe = mla_moe.MoE(
    hidden_size=WIDTH, num_experts=EXPERTS, moe_intermediate_size=32, initializer_range=0.3,
    router=CosineRouter(rngs), hidden_act=squared_relu, rngs=rngs,
)  # fmt: skip
optimizer = nnx.Optimizer(moe, optax.adam(1e-2), wrt=nnx.Param)
maps = jax.random.normal(jax.random.key(1), (KINDS, WIDTH, WIDTH)) / WIDTH**0.5


@nnx.jit
def step(moe: mla_moe.MoE, optimizer: nnx.Optimizer, key: jax.Array) -> tuple[jax.Array, mla_moe.RouterStats]:
    x = jax.random.normal(key, (TOKENS, WIDTH))
    kind = x[:, :KINDS].argmax(axis=1)
    x += 3 * jax.nn.one_hot(kind, WIDTH)
    target = jnp.einsum("ND,NDd->Nd", x, maps[kind])

    def loss(moe: mla_moe.MoE) -> tuple[jax.Array, tuple[jax.Array, mla_moe.RouterStats]]:
        y, stats = moe.with_stats(x)  # tokens [N, D]: no batch, no time
        error = jnp.mean((y - target) ** 2) / jnp.mean(target**2)
        return error + 1e-2 * stats.aux_loss, (error, stats)

    gradients, (error, stats) = nnx.grad(loss, has_aux=True)(moe)
    optimizer.update(moe, gradients)
    return error, stats


for number in range(STEPS):
    error, stats = step(moe, optimizer, jax.random.key(number))
    if number % 50 == 49:
        print(f"step {number + 1:3}  error {error:.3f}  tokens per expert {stats.load_E.tolist()}")
assert error < 0.3, "1 is the error of an output of zeros"
