import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.moe_inference_cpu import pack_bfloat16, selected_experts


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 8, 3), (5, 7, 2), (16, 99, 9), (70, 7, 2)])
def test_equals_the_weighted_sum_over_selected_experts(tokens, num_experts, top_k):
    keys = jax.random.split(jax.random.key(0), 5)
    x, down = jax.random.normal(keys[0], (tokens, 6)), jax.random.normal(keys[1], (num_experts, 4, 6))
    gate_up = jax.random.normal(keys[2], (num_experts, 6, 2, 4))
    weights = jax.random.normal(keys[3], (tokens, top_k))
    experts = jnp.argsort(jax.random.normal(keys[4], (tokens, num_experts)), axis=1)[:, :top_k]
    experts = experts.at[0, 1].set(num_experts)  # unassigned

    def one(x, expert):
        gate, up = jnp.einsum("D,DgF->gF", x, gate_up[expert])
        return (jax.nn.silu(gate) * up) @ down[expert]

    each = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0))))(x, experts).at[0, 1].set(0)
    y = jax.jit(selected_experts)(x, experts, weights, gate_up, down)
    np.testing.assert_allclose(y, (each * weights[..., None]).sum(axis=1), rtol=1e-5, atol=1e-5)


def test_packed_bfloat16_weights_give_the_same_values():
    x, weights = jnp.ones((2, 6)), jax.random.normal(jax.random.key(0), (3, 6, 2, 4)).astype(jnp.bfloat16)
    down = jax.random.normal(jax.random.key(1), (3, 4, 6)).astype(jnp.bfloat16)
    experts, pair_weights = jnp.array([[0, 2], [1, 0]]), jnp.ones((2, 2))
    wide = selected_experts(x, experts, pair_weights, weights.astype(jnp.float32), down.astype(jnp.float32))
    assert pack_bfloat16(weights).nbytes == weights.nbytes
    np.testing.assert_array_equal(
        selected_experts(x, experts, pair_weights, pack_bfloat16(weights), pack_bfloat16(down)), wide
    )
