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
def every_expert(m, x):
    """The oracle: run all experts on all tokens, and keep what was chosen."""
    D = x.shape[-1]
    routing = m.router(x.reshape(-1, D))
    chosen_NE = jnp.einsum("NK,NKE->NE", routing.weights_NK, jax.nn.one_hot(routing.experts_NK, m.cfg.n_routed_experts))
    gu = jnp.einsum("ND,EDgF->NEgF", x.reshape(-1, D), m.gate_up[...])
    y = jnp.einsum("NEF,EFD->NED", jax.nn.silu(gu[:, :, 0]) * gu[:, :, 1], m.down[...])
    return jnp.einsum("NED,NE->ND", y, chosen_NE).reshape(x.shape) + m.shared(x)


@pytest.fixture(params=["v3", "v2", "one expert takes half"])
def moe(request, cfg, v2_cfg):
    m = MoE(v2_cfg if request.param == "v2" else cfg, rngs=nnx.Rngs(0))
    if request.param.startswith("one"):
        m.router.bias[...] = jnp.array([9.0, 8.0, -9, -9, -9, -9, 0, 0])
    return m


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 40)])
def test_equals_every_expert_masked_in_values_and_gradients(moe, shape):
    x = jax.random.normal(jax.random.key(1), (*shape, 32))
    np.testing.assert_allclose(run(moe, x), every_expert(moe, x), rtol=1e-4, atol=1e-5)
    graph, params, rest = nnx.split(moe, nnx.Param, ...)

    def gradients(f):
        grad = jax.grad(lambda p, x: jnp.sin(f(nnx.merge(graph, p, rest), x)).sum(), argnums=(0, 1))
        return jax.jit(grad)(params, x)

    got, wanted = gradients(lambda m, x: m(x)), gradients(every_expert)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "ragged", "blocks"])
def test_implementations_agree(cfg, implementation):
    x = jax.random.normal(jax.random.key(1), (2, 17, 32))
    m = MoE(cfg, rngs=nnx.Rngs(0), kernels=KernelConfig(grouped_matmul=implementation))
    np.testing.assert_allclose(run(m, x), every_expert(m, x), rtol=1e-4, atol=1e-5)


@pytest.mark.smoke
def test_works_alone_in_jit_grad_and_vmap(cfg):
    m = MoE(cfg, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (3, 7, 32))
    y = m(x)
    np.testing.assert_allclose(run(m, x), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda row: m(row[None])[0]))(x), y, rtol=1e-4, atol=1e-5)
    assert jnp.abs(jax.jit(jax.grad(lambda x: m(x).sum()))(x)).max() > 0


def test_scaling_does_not_touch_the_shared_expert(cfg):
    x = jax.random.normal(jax.random.key(1), (1, 5, 32))
    one, two = (MoE(dataclasses.replace(cfg, routed_scaling_factor=f), rngs=nnx.Rngs(0)) for f in (1.0, 2.0))
    np.testing.assert_allclose(run(two, x) - one.shared(x), 2 * (run(one, x) - one.shared(x)), rtol=1e-4, atol=1e-5)


def test_stats_leave_padding_out(cfg):
    m = MoE(cfg, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 12, 32))
    real = jnp.arange(12)[None] < jnp.array([[12], [5]])
    with_stats = jax.jit(lambda m, *inputs: m.with_stats(*inputs))
    _, stats = with_stats(m, x, real)
    assert int(stats.load_E.sum()) == 17 * cfg.num_experts_per_tok
    _, first = with_stats(m, x[:1])
    _, second = with_stats(m, x[1:, :5])
    assert (stats.load_E == first.load_E + second.load_E).all()
    np.testing.assert_allclose(stats.balance, first.balance + second.balance, rtol=1e-5)


def test_balance_loss_is_the_papers(cfg):
    """1 when experts share evenly; E/K · K/E = E/K when all go to the same K with full scores."""
    E, K, T = cfg.n_routed_experts, cfg.num_experts_per_tok, 8
    even = Routing(jnp.arange(T * K).reshape(T, K) % E, jnp.ones((T, K)), jnp.ones((T, E)))
    _, balance = router_stats(cfg, even, jnp.ones((1, T), bool))
    np.testing.assert_allclose(balance, 1.0, rtol=1e-6)
    peaked = Routing(
        jnp.zeros((T, K), jnp.int32) + jnp.arange(K), jnp.ones((T, K)), jnp.zeros((T, E)).at[:, :K].set(1.0)
    )
    _, balance = router_stats(cfg, peaked, jnp.ones((1, T), bool))
    np.testing.assert_allclose(balance, E / K, rtol=1e-6)
    _, balance = router_stats(cfg, even, jnp.arange(T)[None] < 1)  # one token is a sequence too
    np.testing.assert_allclose(balance, 1.0, rtol=1e-6)


def test_block_size_follows_the_share():
    assert [block_size(rows, 32, "megablox") for rows in (1, 512, 4096, 16384, 10**7)] == [8, 8, 64, 256, 256]
    assert block_size(16384, 32, "chunks") == 128
