import contextlib
import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import ConfigError, MoE
from mla_moe.config import KernelConfig, MeshConfig
from mla_moe.nn.moe import router_stats
from mla_moe.nn.router import Routing
from mla_moe.ops.experts import block_size
from mla_moe.parallel.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
run = jax.jit(lambda module, x: module(x))


@jax.jit
def dense_moe(m, x):
    """The oracle: run all experts on all tokens, and weight their outputs by the routing."""
    D = x.shape[-1]
    routing = m.router(x.reshape(-1, D))
    weights_NE = jnp.einsum("NK,NKE->NE", routing.weights_NK, jax.nn.one_hot(routing.experts_NK, m.cfg.num_experts))
    gu = jnp.einsum("ND,EDgF->NEgF", x.reshape(-1, D), m.gate_up[...])
    y = jnp.einsum("NEF,EFD->NED", jax.nn.silu(gu[:, :, 0]) * gu[:, :, 1], m.down[...])
    zero_N = jnp.where(routing.experts_NK >= m.cfg.num_experts, routing.weights_NK, 0).sum(axis=1)
    y_ND = jnp.einsum("NED,NE->ND", y, weights_NE) + x.reshape(-1, D) * zero_N[:, None]
    return y_ND.reshape(x.shape) + m.shared(x)


@pytest.fixture(params=["v3", "v2", "one expert has half of the load", "zero-computation experts"])
def moe(request, cfg, v2_cfg):
    if request.param.startswith("zero"):
        return MoE(cfg.moe, zero_expert_num=3, n_group=1, topk_group=1, rngs=nnx.Rngs(0))
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
    _, aux_loss, _ = router_stats(cfg.moe, even, jnp.ones((1, T), bool))
    np.testing.assert_allclose(aux_loss, 1.0, rtol=1e-6)
    peaked = Routing(
        jnp.zeros((T, K), jnp.int32) + jnp.arange(K), jnp.ones((T, K)), jnp.zeros((T, E)).at[:, :K].set(1.0)
    )
    _, aux_loss, _ = router_stats(cfg.moe, peaked, jnp.ones((1, T), bool))
    np.testing.assert_allclose(aux_loss, E / K, rtol=1e-6)
    _, aux_loss, _ = router_stats(cfg.moe, even, jnp.arange(T)[None] < 1)  # one token is a sequence too
    np.testing.assert_allclose(aux_loss, 1.0, rtol=1e-6)


@pytest.mark.parametrize("sizes", [None, MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(data=4, context=2)], ids=str)
def test_router_z_loss_and_its_gradients_equal_pytorch(cfg, sizes):
    golden = np.load(GOLDEN / "router_z_loss.npz")
    m = MoE(cfg, rngs=nnx.Rngs(0))
    m.router.weight[...] = jnp.asarray(golden["weight"])
    graph, params, rest = nnx.split(m, nnx.Param, ...)

    def z_loss(params, x):
        return nnx.merge(graph, params, rest).with_stats(x, jnp.asarray(golden["not_padding"]))[1].z_loss

    with jax.set_mesh(make_mesh(sizes)) if sizes else contextlib.nullcontext():
        loss, (of_params, of_x) = jax.jit(jax.value_and_grad(z_loss, argnums=(0, 1)))(params, jnp.asarray(golden["x"]))
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    np.testing.assert_allclose(of_params.router.weight[...], golden["weight_gradient"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_x, golden["x_gradient"], rtol=1e-4, atol=1e-5)


def test_block_size_follows_the_tokens_per_expert():
    assert [block_size(rows, 32, "megablox") for rows in (1, 512, 4096, 16384, 10**7)] == [8, 8, 64, 256, 256]
    assert block_size(16384, 32, "chunks") == 128


def own_router(x_ND):
    """Experts by hashing, all with the same weight: no parameters, and no replay."""
    N = len(x_ND)
    experts_NK = (jnp.arange(N)[:, None] + jnp.array([0, 3])) % 8
    return Routing(experts_NK, jnp.full((N, 2), 0.5), jnp.ones((N, 8)))


@pytest.mark.parametrize("hidden_act", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("gelu", "relu")), jnp.sin])
def test_own_router_and_activation_equal_plain_experts(hidden_act):
    m = MoE(
        hidden_size=32, num_experts=8, moe_intermediate_size=16, n_shared_experts=1, hidden_act=hidden_act,
        initializer_range=0.3, router=own_router, rngs=nnx.Rngs(0),
    )  # fmt: skip
    act = {"gelu": partial(jax.nn.gelu, approximate=False), "relu": jax.nn.relu}.get(hidden_act, jnp.sin)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 9, 32))

    def plain(m, x_BTD):
        x_ND = x_BTD.reshape(-1, 32)
        gu = jnp.einsum("ND,EDgF->NEgF", x_ND, m.gate_up[...])
        y_NED = jnp.einsum("NEF,EFD->NED", act(gu[:, :, 0]) * gu[:, :, 1], m.down[...])
        chosen = jnp.take_along_axis(y_NED, own_router(x_ND).experts_NK[..., None], axis=1).mean(axis=1)
        gate, up = (x_ND @ m.shared.gate_up[:, i] for i in (0, 1))
        return (chosen + (act(gate) * up) @ m.shared.down[...]).reshape(x_BTD.shape)

    def run(f):
        def total(m, x):
            y = f(m, x)
            return jnp.cos(y).sum(), y

        return jax.tree.leaves(jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(m, x_BTD))

    found, expected = run(lambda m, x: m(x)), run(plain)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(m.extend(x_BTD)[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("N", "sizes"),
    [
        (16, MeshConfig(data=2, expert=4)),
        pytest.param(12, MeshConfig(data=2, expert=2, context=2), marks=pytest.mark.slow),  # 3 tokens per sequence
    ],
)
def test_tokens_alone_are_one_sequence(cfg, N, sizes):
    m, x_ND = MoE(cfg, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (N, 32))
    not_padding = jnp.arange(N) < N - 3
    run = jax.jit(lambda m, *args: m.with_stats(*args))
    y, stats = run(m, x_ND[None], not_padding[None])
    flat_y, flat_stats = run(m, x_ND, not_padding)
    np.testing.assert_array_equal(flat_y, y[0])
    jax.tree.map(np.testing.assert_array_equal, flat_stats, stats)
    with jax.set_mesh(make_mesh(sizes)):
        sharded_y, sharded_stats = run(m, x_ND, not_padding)
    np.testing.assert_allclose(sharded_y, y[0], rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sharded_stats, stats)


def test_what_a_router_or_an_activation_may_not_be():
    options = dict(hidden_size=8, num_experts=4, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="hidden_act = 'swish': use one of silu, gelu"):
        MoE(**options, hidden_act="swish")
    with pytest.raises(ConfigError, match=r"scores of the router = 'float32\[5, 8\]': the shape must be \[5, 4\]"):
        MoE(**options, router=own_router)(jnp.ones((5, 8)))
