"""Causal attention over packed documents, for keys wider than values (MLA: 192 and 128).

Two implementations of one function:
- `reference`: all scores at once. The oracle.
- `blockwise`: a block of queries against a block of keys at a time, with a running softmax (FlashAttention, arXiv
  2205.14135 and 2307.08691). Memory grows with T, not T², forward and backward, and blocks above the diagonal are
  never computed.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["reference", "blockwise"]

BLOCK = 128


def attention(
    q_BTHA: Float[Array, "B T H A"],
    k_BTHA: Float[Array, "B T H A"],
    v_BTHV: Float[Array, "B T H V"],
    segment_ids_BT: Int[Array, "B T"] | None,
    *,
    scale: float,
    implementation: Implementation = "blockwise",
) -> Float[Array, "B T H V"]:
    """`softmax(scale · q kᵀ + mask) v`, softmax in float32 (DeepSeek-V2, equations 9-11 and 17-18).

    Token t sees token s when s ≤ t and both are of the same segment; without `segment_ids_BT` a row is one document.
    """
    B, T = q_BTHA.shape[:2]
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros((B, T), jnp.int32)
    if implementation == "reference":
        return _reference(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale)
    # Heads in front of time make every product a plain batched one; padding to whole blocks is masked by causality.
    padding = (0, 0), (0, 0), (0, -T % min(BLOCK, T)), (0, 0)
    q, k, v = (jnp.pad(jnp.moveaxis(x, 2, 1), padding) for x in (q_BTHA, k_BTHA, v_BTHV))
    segments = jnp.pad(segment_ids_BT, padding[1:3])
    return jnp.moveaxis(_blockwise(q, k, v, segments, scale)[:, :, :T], 1, 2)


def _reference(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale):
    seen_BTS = jnp.tril(segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    score_BHTS = jnp.einsum("BTHA,BSHA->BHTS", q_BTHA, k_BTHA, preferred_element_type=jnp.float32) * scale
    weight_BHTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], score_BHTS, -jnp.inf), axis=-1)
    return jnp.einsum("BHTS,BSHV->BTHV", weight_BHTS.astype(v_BTHV.dtype), v_BTHV)


# Below, t and s are the queries and keys of one block.


def _block(x, i, axis=2):
    """Block i of the time axis."""
    size = min(BLOCK, x.shape[axis])
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _stack(x_nBHtV):
    """Blocks back into one time axis."""
    n, B, H, t, V = x_nBHtV.shape
    return jnp.moveaxis(x_nBHtV, 0, 2).reshape(B, H, n * t, V)


def _scores(q_BHtA, k_BHsA, segments, i, j, scale):
    """Scores of query block i and key block j, −1e30 where a token is not seen: finite, so that a running maximum over
    blocks that see nothing yet stays a number."""
    score_BHts = jnp.einsum("BHtA,BHsA->BHts", q_BHtA, k_BHsA, preferred_element_type=jnp.float32) * scale
    t = q_BHtA.shape[2]
    later_ts = (i * t + jnp.arange(t))[:, None] < j * t + jnp.arange(t)
    other_Bts = _block(segments, i, 1)[:, :, None] != _block(segments, j, 1)[:, None, :]
    # The barrier keeps XLA from working the mask out again for every head.
    mask_Bts = jax.lax.optimization_barrier(jnp.where(later_ts | other_Bts, -1e30, 0.0))
    return score_BHts + mask_Bts[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q_BHTA, k_BHTA, v_BHTV, segments_BT, scale):
    return _blockwise_forward(q_BHTA, k_BHTA, v_BHTV, segments_BT, scale)[0]


def _blockwise_forward(q_BHTA, k_BHTA, v_BHTV, segments_BT, scale):
    B, H, T, _ = q_BHTA.shape
    size = min(BLOCK, T)

    def queries(i):
        q_BHtA = _block(q_BHTA, i)

        def keys(j, carry):
            top_BHt, mass_BHt, y_BHtV = carry
            score_BHts = _scores(q_BHtA, _block(k_BHTA, j), segments_BT, i, j, scale)
            new_top_BHt = jnp.maximum(top_BHt, score_BHts.max(axis=-1))
            weight_BHts = jnp.exp(score_BHts - new_top_BHt[..., None])
            shrink_BHt = jnp.exp(top_BHt - new_top_BHt)
            v_BHsV = _block(v_BHTV, j)
            new_BHtV = jnp.einsum(
                "BHts,BHsV->BHtV", weight_BHts.astype(v_BHsV.dtype), v_BHsV, preferred_element_type=jnp.float32
            )
            return (
                new_top_BHt,
                mass_BHt * shrink_BHt + weight_BHts.sum(axis=-1),
                y_BHtV * shrink_BHt[..., None] + new_BHtV,
            )

        start = jnp.full((B, H, size), -1e30), jnp.zeros((B, H, size)), jnp.zeros((B, H, size, v_BHTV.shape[3]))
        # The diagonal comes first: there every query sees itself, so that the maximum is real from then on.
        carry = keys(i, start)
        top_BHt, mass_BHt, y_BHtV = jax.lax.fori_loop(0, i, keys, carry)
        return (y_BHtV / mass_BHt[..., None]).astype(v_BHTV.dtype), (top_BHt + jnp.log(mass_BHt))[..., None]

    y_nBHtV, log_z_nBHt1 = jax.lax.map(queries, jnp.arange(T // size))
    y_BHTV = _stack(y_nBHtV)
    return y_BHTV, (q_BHTA, k_BHTA, v_BHTV, segments_BT, y_BHTV, _stack(log_z_nBHt1))


def _blockwise_backward(scale, residuals, g_BHTV):
    q_BHTA, k_BHTA, v_BHTV, segments_BT, y_BHTV, log_z_BHT1 = residuals
    T = q_BHTA.shape[2]
    blocks = T // min(BLOCK, T)
    # Σ_s p_ts · ∂p_ts, which the softmax's derivative subtracts
    mean_BHT1 = jnp.sum(g_BHTV.astype(jnp.float32) * y_BHTV.astype(jnp.float32), axis=-1, keepdims=True)

    def pair(i, j):
        """Weights of query block i on key block j, and the derivative of their scores."""
        score_BHts = _scores(_block(q_BHTA, i), _block(k_BHTA, j), segments_BT, i, j, scale)
        weight_BHts = jnp.exp(score_BHts - _block(log_z_BHT1, i))
        g_weight_BHts = jnp.einsum(
            "BHtV,BHsV->BHts", _block(g_BHTV, i), _block(v_BHTV, j), preferred_element_type=jnp.float32
        )
        return weight_BHts, weight_BHts * (g_weight_BHts - _block(mean_BHT1, i)) * scale

    def keys(g_q_BHTA, j):
        """The gradient of key block j, and its part of the queries' gradient."""
        k_BHsA, v_BHsV = _block(k_BHTA, j), _block(v_BHTV, j)

        def queries(i, carry):
            g_q_BHTA, g_k_BHsA, g_v_BHsV = carry
            weight_BHts, g_score_BHts = pair(i, j)
            g_score_BHts = g_score_BHts.astype(k_BHsA.dtype)
            q_BHtA, g_BHtV = _block(q_BHTA, i), _block(g_BHTV, i)
            wide = dict(preferred_element_type=jnp.float32)
            g_q_BHtA = _block(g_q_BHTA, i) + jnp.einsum("BHts,BHsA->BHtA", g_score_BHts, k_BHsA, **wide)
            g_k_BHsA += jnp.einsum("BHts,BHtA->BHsA", g_score_BHts, q_BHtA, **wide)
            g_v_BHsV += jnp.einsum("BHts,BHtV->BHsV", weight_BHts.astype(g_BHtV.dtype), g_BHtV, **wide)
            start = i * q_BHtA.shape[2]
            return jax.lax.dynamic_update_slice_in_dim(g_q_BHTA, g_q_BHtA, start, 2), g_k_BHsA, g_v_BHsV

        zeros = jnp.zeros(k_BHsA.shape, jnp.float32), jnp.zeros(v_BHsV.shape, jnp.float32)
        g_q_BHTA, *g_kv = jax.lax.fori_loop(j, blocks, queries, (g_q_BHTA, *zeros))
        return g_q_BHTA, g_kv

    g_q_BHTA, (g_k_nBHsA, g_v_nBHsV) = jax.lax.scan(keys, jnp.zeros(q_BHTA.shape, jnp.float32), jnp.arange(blocks))
    g_q, g_k, g_v = g_q_BHTA, _stack(g_k_nBHsA), _stack(g_v_nBHsV)
    return g_q.astype(q_BHTA.dtype), g_k.astype(k_BHTA.dtype), g_v.astype(v_BHTV.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
