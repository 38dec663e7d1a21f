import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import MoE
from mla_moe.config import KernelConfig
from mla_moe.nn.moe import router_stats
from mla_moe.nn.router import Routing
from mla_moe.ops.experts import block_size

run = jax.jit(lambda module, x: module(x))


@jax.jit
def dense_moe(m, x):
    """The oracle: run all experts on all tokens, and weight their outputs by the routing."""
    D = x.shape[-1]
    routing = m.router(x.reshape(-1, D))
    weights_NE = jnp.einsum(
        "NK,NKE->NE", routing.weights_NK, jax.nn.one_hot(routing.experts_NK, m.cfg.n_routed_experts)
    )
    gu = jnp.einsum("ND,EDgF->NEgF", x.reshape(-1, D), m.gate_up[...])
    y = jnp.einsum("NEF,EFD->NED", jax.nn.silu(gu[:, :, 0]) * gu[:, :, 1], m.down[...])
    return jnp.einsum("NED,NE->ND", y, weights_NE).reshape(x.shape) + m.shared(x)


@pytest.fixture(params=["v3", "v2", "one expert has half of the load"])
def moe(request, cfg, v2_cfg):
    m = MoE(v2_cfg if request.param == "v2" else cfg, rngs=nnx.Rngs(0))
    if request.param.startswith("one"):
        m.router.bias[...] = jnp.array([9.0, 8.0, -9, -9, -9, -9, 0, 0])
    return m


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 40)])
def test_values_and_gradients_equal_those_of_a_dense_moe(moe, shape):
    x = jax.random.normal(jax.random.key(1), (*shape, 32))
    np.testing.assert_allclose(run(moe, x), dense_moe(moe, x), rtol=1e-4, atol=1e-5)
    graph, params, rest = nnx.split(moe, nnx.Param, ...)

    def gradients(f):
        grad = jax.grad(lambda p, x: jnp.sin(f(nnx.merge(graph, p, rest), x)).sum(), argnums=(0, 1))
        return jax.jit(grad)(params, x)

    found, expected = gradients(lambda m, x: m(x)), gradients(dense_moe)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "ragged", "blocks"])
def test_grouped_matmul_kernels_agree(cfg, implementation):
    x = jax.random.normal(jax.random.key(1), (2, 17, 32))
    m = MoE(cfg, rngs=nnx.Rngs(0), kernels=KernelConfig(grouped_matmul=implementation))
    np.testing.assert_allclose(run(m, x), dense_moe(m, x), rtol=1e-4, atol=1e-5)


@pytest.mark.smoke
def test_usable_alone_in_jit_grad_and_vmap(cfg):
    m = MoE(cfg, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (3, 7, 32))
    y = m(x)
    np.testing.assert_allclose(run(m, x), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda x: m(x[None])[0]))(x), y, rtol=1e-4, atol=1e-5)
    assert jnp.abs(jax.jit(jax.grad(lambda x: m(x).sum()))(x)).max() > 0


def test_routed_scaling_factor_does_not_scale_the_shared_expert(cfg):
    x = jax.random.normal(jax.random.key(1), (1, 5, 32))
    one, two = (MoE(dataclasses.replace(cfg, routed_scaling_factor=f), rngs=nnx.Rngs(0)) for f in (1.0, 2.0))
    np.testing.assert_allclose(run(two, x) - one.shared(x), 2 * (run(one, x) - one.shared(x)), rtol=1e-4, atol=1e-5)


def test_router_stats_leave_padding_out(cfg):
    m = MoE(cfg, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 12, 32))
    not_padding = jnp.arange(12)[None] < jnp.array([[12], [5]])
    with_stats = jax.jit(lambda m, *inputs: m.with_stats(*inputs))
    _, stats = with_stats(m, x, not_padding)
    assert int(stats.load_E.sum()) == 17 * cfg.num_experts_per_tok
    _, first = with_stats(m, x[:1])
    _, second = with_stats(m, x[1:, :5])
    assert (stats.load_E == first.load_E + second.load_E).all()
    np.testing.assert_allclose(stats.aux_loss, first.aux_loss + second.aux_loss, rtol=1e-5)


def test_auxiliary_loss_is_that_of_the_paper(cfg):
    """1 with an even load; E/K if all tokens select the same K experts with full scores."""
    E, K, T = cfg.n_routed_experts, cfg.num_experts_per_tok, 8
    even = Routing(jnp.arange(T * K).reshape(T, K) % E, jnp.ones((T, K)), jnp.ones((T, E)))
    _, aux_loss = router_stats(cfg, even, jnp.ones((1, T), bool))
    np.testing.assert_allclose(aux_loss, 1.0, rtol=1e-6)
    peaked = Routing(
        jnp.zeros((T, K), jnp.int32) + jnp.arange(K), jnp.ones((T, K)), jnp.zeros((T, E)).at[:, :K].set(1.0)
    )
    _, aux_loss = router_stats(cfg, peaked, jnp.ones((1, T), bool))
    np.testing.assert_allclose(aux_loss, E / K, rtol=1e-6)
    _, aux_loss = router_stats(cfg, even, jnp.arange(T)[None] < 1)  # one token is a sequence too
    np.testing.assert_allclose(aux_loss, 1.0, rtol=1e-6)


def test_block_size_follows_the_tokens_per_expert():
    assert [block_size(rows, 32, "megablox") for rows in (1, 512, 4096, 16384, 10**7)] == [8, 8, 64, 256, 256]
    assert block_size(16384, 32, "chunks") == 128
