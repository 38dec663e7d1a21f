import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.nn.router import sigmoid_gate, softmax_gate


def v3_by_hand(cfg, logits, bias):
    """Equations 12-16 of DeepSeek-V3, a token at a time, in plain Python."""
    E, G = cfg.n_routed_experts, cfg.n_group
    rows = []
    for logit in np.asarray(logits, np.float64):
        s = 1 / (1 + np.exp(-logit))
        choice = s + bias
        groups = np.split(np.arange(E), G)
        best = sorted(groups, key=lambda g: -np.sort(choice[g])[-2:].sum())[: cfg.topk_group]
        allowed = sorted(np.concatenate(best), key=lambda e: -choice[e])
        chosen = allowed[: cfg.num_experts_per_tok]
        weight = s[chosen] / s[chosen].sum() if cfg.norm_topk_prob else s[chosen]
        rows.append(dict(zip(chosen, weight * cfg.routed_scaling_factor, strict=True)))
    return rows


@pytest.mark.smoke
@pytest.mark.parametrize("bias_mean", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("normalise", [True, False])
def test_sigmoid_gate_also_with_negative_biases(cfg, bias_mean, normalise):
    cfg = dataclasses.replace(cfg, norm_topk_prob=normalise)
    logits = 2 * jax.random.normal(jax.random.key(0), (50, cfg.n_routed_experts))
    bias = bias_mean + 0.5 * jax.random.normal(jax.random.key(1), (cfg.n_routed_experts,))
    routing = sigmoid_gate(cfg, logits, bias)
    for wanted, experts, weights in zip(
        v3_by_hand(cfg, logits, np.asarray(bias)), routing.experts_NK, routing.weights_NK, strict=True
    ):
        got = dict(zip(experts.tolist(), weights.tolist(), strict=True))
        assert set(got) == set(wanted)
        for expert, weight in wanted.items():
            assert got[expert] == pytest.approx(weight, rel=1e-5)


def test_a_bias_selects_but_never_weighs(cfg):
    cfg = dataclasses.replace(cfg, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)
    logits = jnp.zeros((1, 8))
    routing = sigmoid_gate(cfg, logits, jnp.zeros(8).at[5].set(9.0))
    assert 5 in routing.experts_NK.tolist()[0]
    np.testing.assert_allclose(routing.weights_NK, 0.5)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_softmax_gate(v2_cfg, method):
    cfg = dataclasses.replace(v2_cfg, topk_method=method, routed_scaling_factor=16.0)
    logits = jax.random.normal(jax.random.key(0), (40, 8))
    routing = softmax_gate(cfg, logits)
    for logit, experts, weights in zip(np.asarray(logits), routing.experts_NK, routing.weights_NK, strict=True):
        p = np.exp(logit) / np.exp(logit).sum()
        groups = np.argsort(-p.reshape(4, 2).max(axis=1))[:2] if method != "greedy" else range(4)
        allowed = [e for e in range(8) if e // 2 in groups]
        wanted = sorted(allowed, key=lambda e: -p[e])[:2]
        assert set(experts.tolist()) == set(wanted)
        np.testing.assert_allclose(weights, 16 * p[np.asarray(experts)], rtol=1e-5)


def test_the_bias_gets_no_gradient(cfg):
    logits = jax.random.normal(jax.random.key(0), (5, 8))
    grads = jax.grad(lambda x, b: sigmoid_gate(cfg, x, b).weights_NK[:, 0].sum(), argnums=(0, 1))(logits, jnp.zeros(8))
    assert jnp.abs(grads[0]).max() > 0
    assert (grads[1] == 0).all()
