"""A Linen model with a mixture of experts of `mla_moe`, trained with Linen's own `TrainState`.

    python examples/linen_moe.py

The model learns to return the token that it reads. All weights of the experts are in `params`, beside those of the
host's own layers. The router's bias is a collection of its own, `router_bias`: it has no gradient, and is updated from
the load.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import mla_moe

STEPS, BATCH_SIZE, LENGTH, VOCAB_SIZE, WIDTH = 60, 16, 32, 16, 64


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, mla_moe.RouterStats]:
        x = nn.Embed(VOCAB_SIZE, WIDTH)(tokens)
        moe = nnx.bridge.to_linen(
            mla_moe.MoE, hidden_size=WIDTH, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, name="moe"
        )
        y, stats = moe(nn.RMSNorm()(x), nnx_method="with_stats")
        return nn.Dense(VOCAB_SIZE)(x + y), stats


class State(TrainState):
    router_bias: FrozenDict


@jax.jit
def step(state: State, tokens: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    def loss(params: FrozenDict) -> tuple[jax.Array, mla_moe.RouterStats]:
        logits, stats = state.apply_fn({"params": params, "router_bias": state.router_bias}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean(), stats

    (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    load = stats.load_E.astype(jnp.float32)
    router_bias = jax.tree.map(lambda bias: bias + 1e-3 * jnp.sign(load.mean() - load), state.router_bias)
    return state.apply_gradients(grads=gradients, router_bias=router_bias), value, load.max() / load.mean()


def batch(number: int) -> jax.Array:
    return jax.random.randint(jax.random.key(number), (BATCH_SIZE, LENGTH), 0, VOCAB_SIZE)


model = Model()
variables = jax.jit(model.init)(jax.random.key(0), batch(0))
assert set(variables) == {"params", "router_bias"}
params = variables["params"]
config = mla_moe.OptimizerConfig(schedule=mla_moe.ScheduleConfig(peak_lr=2e-3))
tx = mla_moe.grouped_optimizer(params, config, steps=STEPS)  # no weight decay for norms and biases
state = State.create(apply_fn=model.apply, params=params, tx=tx, router_bias=variables["router_bias"])
for number in range(STEPS):
    state, value, max_load_ratio = step(state, batch(number))
    if number % 10 == 9:
        print(f"step {number + 1:3}  loss {value:.3f}  max load ratio {max_load_ratio:.2f}")
