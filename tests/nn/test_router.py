import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.config import MoEConfig
from mla_moe.nn.router import gate


def python_gate(cfg, logits, bias):
    """Equations 12-16 of DeepSeek-V3 in Python, token by token."""
    E, G = cfg.n_routed_experts, cfg.n_group
    tokens = []
    for logit in np.asarray(logits, np.float64):
        s = 1 / (1 + np.exp(-logit))
        selection = s + bias
        groups = np.split(np.arange(E), G)
        best = sorted(groups, key=lambda g: -np.sort(selection[g])[-2:].sum())[: cfg.topk_group]
        allowed = sorted(np.concatenate(best), key=lambda e: -selection[e])
        selected = allowed[: cfg.num_experts_per_tok]
        weight = s[selected] / s[selected].sum() if cfg.norm_topk_prob else s[selected]
        tokens.append(dict(zip(selected, weight * cfg.routed_scaling_factor, strict=True)))
    return tokens


@pytest.mark.smoke
@pytest.mark.parametrize("bias_mean", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_gate_also_with_negative_router_biases(cfg, bias_mean, normalize):
    cfg = dataclasses.replace(cfg, norm_topk_prob=normalize)
    logits = 2 * jax.random.normal(jax.random.key(0), (50, cfg.n_routed_experts))
    bias = bias_mean + 0.5 * jax.random.normal(jax.random.key(1), (cfg.n_routed_experts,))
    routing = gate(cfg.moe, logits, bias)
    for expected, experts, weights in zip(
        python_gate(cfg, logits, np.asarray(bias)), routing.experts_NK, routing.weights_NK, strict=True
    ):
        found = dict(zip(experts.tolist(), weights.tolist(), strict=True))
        assert set(found) == set(expected)
        for expert, weight in expected.items():
            assert found[expert] == pytest.approx(weight, rel=1e-5)


def test_the_router_bias_affects_the_selection_only(cfg):
    cfg = dataclasses.replace(cfg, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)
    logits = jnp.zeros((1, 8))
    routing = gate(cfg.moe, logits, jnp.zeros(8).at[5].set(9.0))
    assert 5 in routing.experts_NK.tolist()[0]
    np.testing.assert_allclose(routing.weights_NK, 0.5)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_softmax_gate_greedy_and_group_limited(v2_cfg, method):
    cfg = dataclasses.replace(v2_cfg, topk_method=method, routed_scaling_factor=16.0)
    logits = jax.random.normal(jax.random.key(0), (40, 8))
    routing = gate(cfg.moe, logits)
    for logit, experts, weights in zip(np.asarray(logits), routing.experts_NK, routing.weights_NK, strict=True):
        p = np.exp(logit) / np.exp(logit).sum()
        groups = np.argsort(-p.reshape(4, 2).max(axis=1))[:2] if method != "greedy" else range(4)
        allowed = [e for e in range(8) if e // 2 in groups]
        expected = sorted(allowed, key=lambda e: -p[e])[:2]
        assert set(experts.tolist()) == set(expected)
        np.testing.assert_allclose(weights, 16 * p[np.asarray(experts)], rtol=1e-5)


def test_normalized_softmax_is_that_over_the_selected_experts():
    """As in Mixtral and Qwen-MoE; and a bias affects the selection of softmax scores too."""
    cfg = MoEConfig(hidden_size=4, num_experts=6, num_experts_per_tok=3, scoring_func="softmax", router_bias=False)
    logits = jax.random.normal(jax.random.key(0), (40, 6))
    routing = gate(cfg, logits)
    best, experts = jax.lax.top_k(logits, 3)
    np.testing.assert_array_equal(routing.experts_NK, experts)
    np.testing.assert_allclose(routing.weights_NK, jax.nn.softmax(best), rtol=1e-5)
    biased = gate(cfg, logits, jnp.zeros(6).at[5].set(9.0))
    assert (biased.experts_NK[:, 0] == 5).all()
    np.testing.assert_allclose(biased.weights_NK.sum(axis=1), 1, rtol=1e-5)


def test_the_router_bias_has_no_gradient(cfg):
    logits = jax.random.normal(jax.random.key(0), (5, 8))
    grads = jax.grad(lambda x, b: gate(cfg.moe, x, b).weights_NK[:, 0].sum(), argnums=(0, 1))(logits, jnp.zeros(8))
    assert jnp.abs(grads[0]).max() > 0
    assert (grads[1] == 0).all()
