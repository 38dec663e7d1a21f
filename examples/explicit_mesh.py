"""A transformer of your own with MLA and experts on a mesh of your own, whose axes are Explicit, JAX's default.

    python examples/explicit_mesh.py

The mesh has axes `dp` and `tp`; on a computer with fewer than eight devices it is one of eight virtual CPU devices. The
model learns to repeat the token eight positions before.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before JAX is imported

import jax
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mla_moe

STEPS, BATCH_SIZE, LENGTH, VOCAB_SIZE, WIDTH, DISTANCE = 60, 16, 32, 16, 64, 8


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm, self.moe_norm = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = mla_moe.MLAttention(hidden_size=WIDTH, num_heads=4, kv_lora_rank=32, rngs=rngs)
        self.moe = mla_moe.MoE(hidden_size=WIDTH, num_experts=8, moe_intermediate_size=32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x += self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Param(rngs.normal((VOCAB_SIZE, WIDTH)))
        self.layers = nnx.List(Layer(rngs) for _ in range(2))
        self.head = nnx.Linear(WIDTH, VOCAB_SIZE, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed[...].at[tokens].get(out_sharding=P("dp"))  # batch over dp, as the tokens
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


mesh = jax.make_mesh((2, 4), ("dp", "tp"))
# What the axes mean to `mla_moe`: batch, weights and experts are sharded over dp; heads and widths over tp.
with jax.set_mesh(mesh), mla_moe.use_mesh_axes(dp="expert", tp="tensor"):
    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    shardings = mla_moe.named_shardings(params, mesh)
    params = jax.device_put(params, shardings)
    rest = jax.device_put(rest, mla_moe.named_shardings(rest, mesh))
    print(f"experts {jax.typeof(params['layers'][0]['moe']['gate_up'][...])}")
    print(f"heads   {jax.typeof(params['layers'][0]['attention']['o'][...])}")
    config = mla_moe.OptimizerConfig(schedule=mla_moe.ScheduleConfig(peak_lr=1e-2))
    tx = mla_moe.grouped_optimizer(params, config, steps=STEPS)

    @jax.jit
    def step(
        params: nnx.State, moments: optax.OptState, tokens: jax.Array
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        def loss(params: nnx.State) -> jax.Array:
            logits = jax.nn.log_softmax(nnx.merge(graph, params, rest)(tokens))[:, DISTANCE:]
            wanted = jax.nn.one_hot(tokens[:, :-DISTANCE], VOCAB_SIZE)
            return -(logits * wanted).sum(axis=-1).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = tx.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments = jax.jit(tx.init)(params)
    for number in range(STEPS):
        tokens = jax.random.randint(jax.random.key(number), (BATCH_SIZE, LENGTH), 0, VOCAB_SIZE)
        tokens = jax.device_put(tokens, NamedSharding(mesh, P("dp")))
        params, moments, value = step(params, moments, tokens)
        if number % 10 == 9:
            print(f"step {number + 1:3}  loss {value:.3f}")
