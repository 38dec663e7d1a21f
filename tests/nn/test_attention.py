import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import MLAttention
from mla_moe.nn.rope import inverse_frequencies


@pytest.fixture(scope="module", params=["query latent", "no query latent"])
def attention(request, cfg):
    if request.param == "no query latent":
        cfg = dataclasses.replace(cfg, q_lora_rank=None)
    return MLAttention(cfg, rngs=nnx.Rngs(0))


def in_numpy(m, x, positions):
    """Equations 9-19 of DeepSeek-V2 for one sequence, head by head, in NumPy."""
    cfg = m.cfg
    N, R = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    w = {name: np.asarray(v[...], np.float64) for name, v in vars(m).items() if isinstance(v, nnx.Param)}

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale[...])

    def rotate(x):
        angle = np.outer(positions, inverse_frequencies(cfg))
        pair = x.reshape(len(x), -1, 2)
        z = (pair[..., 0] + 1j * pair[..., 1]) * np.exp(1j * angle)
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)

    if cfg.q_lora_rank is None:
        q = np.einsum("TD,DHA->THA", x, w["q"])
    else:
        q = np.einsum("TQ,QHA->THA", norm(x @ w["q_a"], m.q_a_norm.scale), w["q_b"])
    latent = x @ w["kv_a"]
    kv = np.einsum("TC,CHk->THk", norm(latent[:, :-R], m.kv_a_norm.scale), w["kv_b"])
    k_pe, y = rotate(latent[:, -R:]), 0.0
    m_scale = (0.1 * np.log(cfg.rope_scaling.factor) + 1) ** 2 / np.sqrt(N + R)
    for h in range(cfg.num_attention_heads):
        score = (q[:, h, :N] @ kv[:, h, :N].T + rotate(q[:, h, N:]) @ k_pe.T) * m_scale
        score[np.triu_indices(len(x), 1)] = -np.inf
        p = np.exp(score - score.max(-1, keepdims=True))
        y += (p / p.sum(-1, keepdims=True)) @ kv[:, h, N:] @ w["o"][h]
    return y


def test_equals_the_papers_equations_at_any_position(attention):
    x = jax.random.normal(jax.random.key(1), (1, 11, 32))
    positions = jnp.arange(70, 81)
    y = jax.jit(lambda m, x, p: m(x, positions=p))(attention, x, positions[None])
    np.testing.assert_allclose(y[0], in_numpy(attention, np.asarray(x[0], np.float64), positions), rtol=1e-4, atol=1e-5)


@pytest.mark.smoke
def test_usable_alone_in_jit_grad_and_vmap(attention):
    x = jax.random.normal(jax.random.key(1), (3, 7, 32))
    y = attention(x)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(attention, x), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda x: attention(x[None])[0]))(x), y, rtol=1e-5, atol=1e-6)
    grads = jax.jit(jax.grad(lambda m: (m(x) ** 2).sum()))(attention)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_attention_is_causal(attention):
    x = jax.random.normal(jax.random.key(1), (1, 9, 32))
    g = jax.jit(jax.grad(lambda x: attention(x)[0, 4].sum()))(x)[0]
    assert (g[5:] == 0).all()
    assert (jnp.abs(g[:5]).max(axis=-1) > 0).all()


def test_a_packed_sequence_equals_its_documents_alone(attention):
    x = jax.random.normal(jax.random.key(1), (1, 10, 32))
    segments, positions = jnp.array([[1] * 4 + [2] * 6]), jnp.array([[*range(4), *range(6)]])
    run = jax.jit(lambda m, x, **info: m(x, **info))
    packed = run(attention, x, segment_ids=segments, positions=positions)
    np.testing.assert_allclose(packed[:, :4], run(attention, x[:, :4]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(packed[:, 4:], run(attention, x[:, 4:]), rtol=1e-5, atol=1e-6)
