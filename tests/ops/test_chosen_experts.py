import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.chosen_experts import chosen_experts


@pytest.mark.parametrize(("tokens", "num_experts", "choices"), [(1, 8, 3), (5, 7, 2), (16, 9, 9), (70, 7, 2)])
def test_is_the_sum_over_choices(tokens, num_experts, choices):
    keys = jax.random.split(jax.random.key(0), 5)
    x, down = jax.random.normal(keys[0], (tokens, 6)), jax.random.normal(keys[1], (num_experts, 4, 6))
    gate_up = jax.random.normal(keys[2], (num_experts, 6, 2, 4))
    weights = jax.random.normal(keys[3], (tokens, choices))
    experts = jnp.argsort(jax.random.normal(keys[4], (tokens, num_experts)), axis=1)[:, :choices]

    def one(x, expert):
        gate, up = jnp.einsum("D,DgF->gF", x, gate_up[expert])
        return (jax.nn.silu(gate) * up) @ down[expert]

    each = jax.vmap(jax.vmap(one, in_axes=(None, 0)))(x, experts)
    y = jax.jit(chosen_experts)(x, experts, weights, gate_up, down)
    np.testing.assert_allclose(y, (each * weights[..., None]).sum(axis=1), rtol=1e-5, atol=1e-5)
