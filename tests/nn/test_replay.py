"""Routing replay: the experts of each token are given, and their weights come from the router."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from mla_moe import MoE, Transformer
from mla_moe.config import MeshConfig
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh


@pytest.fixture(scope="module", params=["v3", "v2"])
def layer(request, cfg, v2_cfg):
    cfg = cfg if request.param == "v3" else v2_cfg
    moe = MoE(cfg, rngs=nnx.Rngs(0))
    x_BTD = jax.random.normal(jax.random.key(1), (8, 5, cfg.hidden_size))
    return cfg, moe, x_BTD


def selected(moe, x_BTD):
    return moe.router(x_BTD.reshape(-1, x_BTD.shape[-1])).experts_NK.reshape(*x_BTD.shape[:2], -1)


def test_replay_of_the_routers_choice_changes_nothing(layer):
    _, moe, x_BTD = layer
    free, stats = moe.with_stats(x_BTD)
    own = selected(moe, x_BTD)
    for replay in (own, own.at[:, ::2].set(-1), jnp.full_like(own, -1)):
        replayed, replayed_stats = moe.with_stats(x_BTD, replay=replay)
        np.testing.assert_array_equal(replayed, free)
        np.testing.assert_array_equal(replayed_stats.load_E, stats.load_E)


def random_experts(cfg, shape):
    """Random distinct experts for every token: rarely the router's choice."""
    draw = np.random.default_rng(0)
    permutations = np.stack([draw.permutation(cfg.n_routed_experts) for _ in range(int(np.prod(shape)))])
    return jnp.asarray(permutations[:, : cfg.num_experts_per_tok].reshape(*shape, -1), jnp.int32)


def test_weights_are_the_scores_of_the_replayed_experts(layer):
    cfg, moe, x_BTD = layer
    replay = random_experts(cfg, x_BTD.shape[:2])
    y_BTD, stats = moe.with_stats(x_BTD, replay=replay)
    np.testing.assert_array_equal(stats.load_E, np.bincount(replay.ravel(), minlength=cfg.n_routed_experts))

    logits = x_BTD @ moe.router.weight[...]
    scores = jax.nn.sigmoid(logits) if cfg.scoring_func == "sigmoid" else jax.nn.softmax(logits)
    weights = jnp.take_along_axis(scores, replay, axis=-1)
    if cfg.norm_topk_prob:
        weights /= weights.sum(axis=-1, keepdims=True)
    gate_up, down = moe.gate_up[...][replay], moe.down[...][replay]
    h = jnp.einsum("BTD,BTKDgF->BTKgF", x_BTD, gate_up)
    out = jnp.einsum("BTKF,BTKFD->BTKD", jax.nn.silu(h[..., 0, :]) * h[..., 1, :], down)
    expected = jnp.einsum("BTKD,BTK->BTD", out, weights * cfg.routed_scaling_factor) + moe.shared(x_BTD)
    np.testing.assert_allclose(y_BTD, expected, atol=1e-5)


def test_the_router_gets_gradients_through_replayed_experts(layer):
    cfg, moe, x_BTD = layer
    replay = random_experts(cfg, x_BTD.shape[:2])
    graph, state = nnx.split(moe)
    grads = jax.grad(lambda s: (nnx.merge(graph, s).with_stats(x_BTD, replay=replay)[0] ** 2).sum())(state)
    assert float(jnp.abs(grads["router"]["weight"].get_value()).max()) > 1e-4


@pytest.mark.parametrize("sizes", [MeshConfig(fsdp=2, expert=4), MeshConfig(data=2, tensor=2, context=2)])
@pytest.mark.slow
def test_replay_on_a_mesh_equals_one_device(cfg, sizes):
    cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    model = Transformer(cfg, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(2), (8, 6), 0, cfg.vocab_size)
    replay = random_experts(cfg, (8, 6, cfg.num_moe_layers)).at[:, 0].set(-1)
    run = jax.jit(lambda model, tokens, replay: model.hidden(tokens, replay=replay)[0])
    expected = run(model, tokens, replay)
    assert float(jnp.abs(expected - run(model, tokens, jnp.full_like(replay, -1))).max()) > 1e-3
    mesh = make_mesh(sizes)
    sharding = NamedSharding(mesh, BATCH_SPEC)
    with jax.set_mesh(mesh):
        found = run(model, jax.device_put(tokens, sharding), jax.device_put(replay, sharding))
    np.testing.assert_allclose(found, expected, atol=1e-5)
