import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import ConfigError, MLAttention, MoE
from mla_moe.config import rope_scaling
from mla_moe.nn.rope import inverse_frequencies, rotary, rotate, softmax_scale
from mla_moe.ops.dropout import dropout_key, kept_scale


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
    for h in range(cfg.num_heads):
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


def test_settings_as_keywords_or_of_a_model(cfg):
    """The same module from a language model's configuration and from its own arguments, of which it has few."""
    own = MLAttention(
        hidden_size=32, num_heads=2, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=12, rope_scaling=cfg.rope_scaling, initializer_range=0.1, rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert nnx.graphdef(own) == nnx.graphdef(MLAttention(cfg, rngs=nnx.Rngs(0)))
    assert MLAttention(cfg, num_heads=3, rngs=nnx.Rngs(0)).q_b.shape == (24, 3, 12)
    assert MLAttention(hidden_size=8, num_heads=1, rngs=nnx.Rngs(0)).kv_a.shape == (8, 512 + 64)
    moe = MoE(hidden_size=8, num_experts=4, rngs=nnx.Rngs(0))
    assert moe(jnp.ones((1, 3, 8))).shape == (1, 3, 8)
    with pytest.raises(TypeError, match="num_head"):
        MLAttention(hidden_size=8, num_head=1, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="num_experts_per_tok = 9: choose at most the number of experts, 4"):
        MoE(hidden_size=8, num_experts=4, num_experts_per_tok=9, rngs=nnx.Rngs(0))


def test_attention_is_causal(attention):
    x = jax.random.normal(jax.random.key(1), (1, 9, 32))
    g = jax.jit(jax.grad(lambda x: attention(x)[0, 4].sum()))(x)[0]
    assert (g[5:] == 0).all()
    assert (jnp.abs(g[:5]).max(axis=-1) > 0).all()


def plain_attention(m, x, kv, positions, kv_positions, mask_BTS, dropped=1.0):
    """The equations once more, for any mask: softmax over all scores, 0 for a token without keys."""
    cfg = m.cfg
    N, C = cfg.qk_nope_head_dim, cfg.kv_lora_rank

    def rotated(x_BTHR, positions):
        return rotate(x_BTHR, *rotary(cfg, positions))

    q = jnp.einsum("BTQ,QHA->BTHA", m.q_a_norm(x @ m.q_a[...]), m.q_b[...])
    latent = kv @ m.kv_a[...]
    expanded = jnp.einsum("BSC,CHk->BSHk", m.kv_a_norm(latent[..., :C]), m.kv_b[...])
    k_pe = rotated(latent[..., None, C:], kv_positions)[:, :, 0]
    score = jnp.einsum("BTHN,BSHN->BHTS", q[..., :N], expanded[..., :N])
    score += jnp.einsum("BTHR,BSR->BHTS", rotated(q[..., N:], positions), k_pe)
    e = jnp.where(mask_BTS[:, None], jnp.exp(score * softmax_scale(cfg)), 0.0)
    p = e / jnp.where(mask_BTS.any(-1)[:, None, :, None], e.sum(-1, keepdims=True), 1.0)
    return jnp.einsum("BHTS,BSHV,HVD->BTD", p * dropped, expanded[..., N:], m.o[...])


VARIANTS = {
    "sliding window": dict(sliding_window=3),
    "not causal, padding": dict(causal=False, rope_scaling=rope_scaling({"type": "linear", "factor": 2.0})),
    "cross attention, padding": dict(causal=False, rope_theta=None, rope_scaling=None),
    "window, padding, dropout": dict(sliding_window=4, dropout=0.4),
}


LONG = "sliding window", "not causal, padding"


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v in LONG)) for v in VARIANTS])
def test_variants_equal_plain_attention_in_values_and_gradients(cfg, variant):
    """Packed documents, positions that do not begin at 0, keys of padding, tokens without any key, odd sizes."""
    m = MLAttention(cfg, **VARIANTS[variant], rngs=nnx.Rngs(0))
    B, T, S = 2, 11, 7 if "cross" in variant else 11
    x, kv = (jax.random.normal(jax.random.key(i), (B, n, 32)) for i, n in ((1, T), (2, S)))
    segments, kv_segments = (jnp.sort(jnp.arange(B * n).reshape(B, n) % 2, axis=1) for n in (T, S))
    positions, kv_positions = (jnp.broadcast_to(jnp.arange(n) + 40, (B, n)) for n in (T, S))
    padding = (jnp.arange(S) < jnp.array([[S], [3]])) if "padding" in variant else jnp.ones((B, S), bool)
    t, s = jnp.arange(T)[:, None], jnp.arange(S)
    allowed = (segments[:, :, None] == kv_segments[:, None]) & padding[:, None]
    allowed &= (s <= t) | (not m.cfg.causal)
    allowed &= t - s < (m.cfg.sliding_window or 99)
    assert "padding" not in variant or not allowed.any(axis=-1).all()
    key, dropped = jax.random.key(5), 1.0
    if m.cfg.dropout:
        rows = jnp.arange(B * 2 * T, dtype=jnp.uint32).reshape(B, 2, T)
        dropped = kept_scale(m.cfg.dropout, dropout_key(key), rows, 0, S)
    info = dict(segment_ids=segments, positions=positions, mask=padding if "padding" in variant else None, rngs=key)
    graph, params = nnx.split(m)

    def module(params, x, kv):
        m = nnx.merge(graph, params)
        if "cross" in variant:
            return m(x, kv, kv_segment_ids=kv_segments, kv_positions=kv_positions, **info)
        return m(x, **info)

    def plain(params, x, kv):
        kv = kv if "cross" in variant else x
        return plain_attention(nnx.merge(graph, params), x, kv, positions, kv_positions, allowed, dropped)

    def run(f):
        def total(*args):
            y = f(*args)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(params, x, kv)

    for got, wanted in zip(jax.tree.leaves(run(module)), jax.tree.leaves(run(plain)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


def test_dropout_needs_random_numbers_and_ends_with_eval(cfg):
    m, x = MLAttention(cfg, dropout=0.5, rngs=nnx.Rngs(0)), jnp.ones((1, 4, 32))
    with pytest.raises(ConfigError, match=r"dropout = 0\.5: needs random numbers"):
        m(x)
    run = jax.jit(lambda m, x, key: m(x, rngs=key))
    one, other = (run(m, x, nnx.Rngs(dropout=seed).dropout()) for seed in (1, 2))
    assert not np.array_equal(one, other)
    plain = run(MLAttention(cfg, rngs=nnx.Rngs(0)), x, None)
    m.eval()
    np.testing.assert_array_equal(run(m, x, None), plain)


def test_cached_decoding_has_the_sliding_window(cfg):
    m = MLAttention(cfg, sliding_window=5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 14, 32))

    @jax.jit
    def cached(m, x):
        y, cache = m.prefill(x[:, :9], m.init_cache(2, 16))
        _, last = jax.lax.scan(lambda c, x_bD: m.decode(x_bD[:, None], c)[::-1], cache, jnp.moveaxis(x[:, 9:], 1, 0))
        return jnp.concatenate([y, jnp.moveaxis(last[:, :, 0], 0, 1)], axis=1)

    np.testing.assert_allclose(cached(m, x), jax.jit(lambda m, x: m(x))(m, x), rtol=1e-5, atol=1e-6)


def test_what_does_not_go_together_is_an_error(cfg):
    m, x = MLAttention(cfg, rngs=nnx.Rngs(0)), jnp.ones((1, 3, 32))
    with pytest.raises(ConfigError, match="attends to another sequence: set causal=False"):
        m(x, x)
    two_sided = MLAttention(cfg, causal=False, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="causal = False: a token in a cache does not see later ones"):
        two_sided.decode(x, two_sided.init_cache(1, 4))
    with pytest.raises(ConfigError, match="give segment_ids and positions"):
        two_sided(x, kv_positions=jnp.ones((1, 3), jnp.int32))
    with pytest.raises(ConfigError, match=r"mask = 'bool\[1, 2\]': the shape must be \[1, 3\]"):
        two_sided(x, mask=jnp.ones((1, 2), bool))


def test_a_packed_sequence_equals_its_documents_alone(attention):
    x = jax.random.normal(jax.random.key(1), (1, 10, 32))
    segments, positions = jnp.array([[1] * 4 + [2] * 6]), jnp.array([[*range(4), *range(6)]])
    run = jax.jit(lambda m, x, **info: m(x, **info))
    packed = run(attention, x, segment_ids=segments, positions=positions)
    np.testing.assert_allclose(packed[:, :4], run(attention, x[:, :4]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(packed[:, 4:], run(attention, x[:, 4:]), rtol=1e-5, atol=1e-6)
