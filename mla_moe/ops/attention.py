"""Causal attention over packed documents, for keys wider than values (MLA: 192 and 128).

Four implementations of one function:
- `reference`: all scores at once. The oracle.
- `blockwise`: a block of queries against a block of keys at a time, with a running softmax (FlashAttention, arXiv
  2205.14135 and 2307.08691). Memory grows with T, not T², forward and backward, and blocks above the diagonal are
  never computed. Plain XLA, on any platform.
- `splash`: JAX's Pallas kernel for TPU.
- `cudnn`: NVIDIA's kernel; it wants keys and values of one width, so values are padded.
"""

import functools
import logging
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

logger = logging.getLogger(__name__)

Implementation = Literal["reference", "blockwise", "splash", "cudnn"]


def default_implementation(platform: str | None = None) -> Implementation:
    """The kernel of `platform` (`tpu`, `gpu`, `cpu`; by default the attached one)."""
    platform = platform or jax.default_backend()
    return "splash" if platform == "tpu" else "cudnn" if platform in ("gpu", "cuda") else "blockwise"


def attention(
    q_BTHA: Float[Array, "B T H A"],
    k_BSHA: Float[Array, "B S H A"],
    v_BSHV: Float[Array, "B S H V"],
    segment_ids_BS: Int[Array, "B S"] | None,
    *,
    scale: float,
    first: Int[Array, ""] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H V"]:
    """`softmax(scale · q kᵀ + mask) v`, softmax in float32 (DeepSeek-V2, equations 9-11 and 17-18).

    Token t sees token s when s ≤ t and both are of the same segment; without `segment_ids_BS` a row is one document.
    Queries are the keys' own tokens or, of a sequence that devices share, those from place `first` on: a multiple of
    T, which is a multiple of 128 or less than that.
    """
    B, S = k_BSHA.shape[:2]
    T = q_BTHA.shape[1]
    if segment_ids_BS is None:
        segment_ids_BS = jnp.zeros((B, S), jnp.int32)
    if implementation is None:
        implementation = default_implementation()
    start = jnp.int32(0) if first is None else first
    if implementation == "reference":
        return _reference(q_BTHA, k_BSHA, v_BSHV, segment_ids_BS, start, scale)
    if implementation == "splash":
        if first is None and T % 128 == 0:
            return _splash(q_BTHA, k_BSHA, v_BSHV, segment_ids_BS, scale)
        _log_fallback("splash", f"{T} queries of {S} tokens: it wants whole sequences, a multiple of 128 long")
    if implementation == "cudnn":
        try:
            return dot_product(q_BTHA, k_BSHA, v_BSHV, segment_ids_BS, start, scale, "cudnn")
        except (NotImplementedError, RuntimeError) as reason:  # a width, type or device
            _log_fallback("cudnn", str(reason))
    # Heads in front of time make every product a plain batched one; padding to whole blocks is masked by causality.
    size = block_size(T, whole=first is not None)
    padding = (0, 0), (0, 0), (0, -T % size), (0, 0)
    q, k, v = (jnp.pad(jnp.moveaxis(x, 2, 1), padding) for x in (q_BTHA, k_BSHA, v_BSHV))
    segments = jnp.pad(segment_ids_BS, padding[1:3])
    return jnp.moveaxis(_in_groups(q, k, v, segments, start // size, scale, size)[:, :, :T], 1, 2)


def block_size(T: int, whole: bool = False) -> int:
    """Queries, and keys, of a block: 256, or 128 where that would leave much of a block empty; a part of T if `whole`,
    when T is a multiple of 128 or less than that."""
    if T < 64 or (whole and T < 128):
        return T
    return 256 if T % 256 == 0 or (T >= 1024 and not whole) else 128


def _group(B: int, H: int, size: int) -> tuple[int, int]:
    """Sequences and heads that attend at a time: as many as keep a block's scores within 2 MB of a processor's cache,
    sequences only with all of their heads."""
    most = max(2**19 // size**2, 1)
    heads = next(h for h in range(min(H, most), 0, -1) if H % h == 0)
    sequences = next(b for b in range(max(min(B, most // H), 1), 0, -1) if B % b == 0)
    return sequences, heads


def _in_groups(q_BHTA, k_BHSA, v_BHSV, segments_BS, first, scale, size):
    B, H = q_BHTA.shape[:2]
    b, h = _group(B, H, size)

    def cut(x):
        """`[B, H, …]` to groups `[B/b · H/h, b, h, …]`."""
        return jnp.moveaxis(x.reshape(B // b, b, H // h, h, *x.shape[2:]), 2, 1).reshape(-1, b, h, *x.shape[2:])

    segments = jnp.repeat(segments_BS.reshape(B // b, b, -1), H // h, axis=0)
    one = partial(_blockwise, scale=scale, size=size)
    y = jax.lax.map(lambda x: one(*x, first), (*(cut(x) for x in (q_BHTA, k_BHSA, v_BHSV)), segments))
    y = jnp.moveaxis(y.reshape(B // b, H // h, b, h, *y.shape[3:]), 1, 2)
    return y.reshape(B, H, *y.shape[4:])


@functools.cache
def _log_fallback(implementation: str, why: str) -> None:
    """Said once for each reason."""
    logger.warning("attention: blockwise in place of %s for %s", implementation, why)


def _attention_mask(q_BTHA, segments_BS, start):
    T, S = q_BTHA.shape[1], segments_BS.shape[1]
    own_BT = jax.lax.dynamic_slice_in_dim(segments_BS, start, T, 1)
    earlier_TS = jnp.arange(S) <= start + jnp.arange(T)[:, None]
    return earlier_TS & (own_BT[:, :, None] == segments_BS[:, None, :])


def _reference(q_BTHA, k_BSHA, v_BSHV, segments_BS, start, scale):
    seen_BTS = _attention_mask(q_BTHA, segments_BS, start)
    score_BHTS = jnp.einsum("BTHA,BSHA->BHTS", q_BTHA, k_BSHA, preferred_element_type=jnp.float32) * scale
    weight_BHTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], score_BHTS, -jnp.inf), axis=-1)
    return jnp.einsum("BHTS,BSHV->BTHV", weight_BHTS.astype(v_BSHV.dtype), v_BSHV)


def dot_product(q_BTHA, k_BSHA, v_BSHV, segments_BS, start, scale, implementation: Literal["cudnn", "xla"]):
    """JAX's own function, with values padded to the keys' width."""
    A, V = q_BTHA.shape[3], v_BSHV.shape[3]
    v_BSHA = jnp.pad(v_BSHV, ((0, 0), (0, 0), (0, 0), (0, A - V)))
    mask_B1TS = _attention_mask(q_BTHA, segments_BS, start)[:, None]
    y_BTHA = jax.nn.dot_product_attention(
        q_BTHA, k_BSHA, v_BSHA, mask=mask_B1TS, scale=scale, implementation=implementation
    )
    return y_BTHA[..., :V]


def _splash(q_BTHA, k_BSHA, v_BSHV, segments_BS, scale):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H = q_BTHA.shape[1:3]
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=_splash_blocks(splash, T))

    def one(q_THA, k_SHA, v_SHV, segments_S):
        heads_first = (jnp.moveaxis(x, 1, 0) for x in (q_THA * scale, k_SHA, v_SHV))
        y_HTV = kernel(*heads_first, segment_ids=splash.SegmentIds(segments_S, segments_S))
        return jnp.moveaxis(y_HTV, 0, 1).astype(v_SHV.dtype)

    return jax.vmap(one)(q_BTHA, k_BSHA, v_BSHV, segments_BS)


def _splash_blocks(splash, T: int):
    block, wide = (next(size for size in sizes if T % size == 0) for sizes in ((512, 256, 128), (2048, 512, 256, 128)))
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv")
    # One kernel for the whole derivative makes scores once, and a gradient of the queries for each wide block of keys,
    # of which it looks at few at a time: with 512 it takes 16.1 MB of a core's own memory, where 16 are free.
    derivative = {"block_kv_dkv": wide, "block_kv_dkv_compute": min(block, 256), "use_fused_bwd_kernel": True}
    return splash.BlockSizes(**dict.fromkeys(names, block), **derivative)


# Below, t and s are the queries and keys of one block.


def _block(x, i, size, axis=2):
    """Block i of the time axis."""
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _stack(x_nBHtV):
    """Blocks back into one time axis."""
    n, B, H, t, V = x_nBHtV.shape
    return jnp.moveaxis(x_nBHtV, 0, 2).reshape(B, H, n * t, V)


def _mask(segments_BS, i, j, size):
    """−1e30 where a query of block i, counted among all blocks of keys, does not see a key of block j: finite, so that
    a running maximum over blocks that see nothing yet stays a number."""
    later_ts = (i * size + jnp.arange(size))[:, None] < j * size + jnp.arange(size)
    other_Bts = _block(segments_BS, i, size, 1)[:, :, None] != _block(segments_BS, j, size, 1)[:, None, :]
    return jnp.where(later_ts | other_Bts, -1e30, 0.0)


def _of_heads(mask_B__):
    """The same for every head; the barrier keeps XLA from working it out again for each."""
    return jax.lax.optimization_barrier(mask_B__)[:, None]


_WIDE: Any = {"preferred_element_type": jnp.float32}


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blockwise(q_BHTA, k_BHSA, v_BHSV, segments_BS, first, scale, size):
    return _blockwise_forward(q_BHTA, k_BHSA, v_BHSV, segments_BS, first, scale, size)[0]


def _blockwise_forward(q_BHTA, k_BHSA, v_BHSV, segments_BS, first, scale, size):
    B, H, T, _ = q_BHTA.shape

    def queries(own):
        q_BHtA, i = _block(q_BHTA, own, size), first + own

        def keys(j, carry):
            top_BHt, mass_BHt, y_BHtV = carry
            score_BHts = jnp.einsum("BHtA,BHsA->BHts", q_BHtA, _block(k_BHSA, j, size), **_WIDE) * scale
            score_BHts += _of_heads(_mask(segments_BS, i, j, size))
            new_top_BHt = jnp.maximum(top_BHt, score_BHts.max(axis=-1))
            weight_BHts = jnp.exp(score_BHts - new_top_BHt[..., None])
            shrink_BHt = jnp.exp(top_BHt - new_top_BHt)
            v_BHsV = _block(v_BHSV, j, size)
            new_BHtV = jnp.einsum("BHts,BHsV->BHtV", weight_BHts.astype(v_BHsV.dtype), v_BHsV, **_WIDE)
            return (
                new_top_BHt,
                mass_BHt * shrink_BHt + weight_BHts.sum(axis=-1),
                y_BHtV * shrink_BHt[..., None] + new_BHtV,
            )

        start = jnp.full((B, H, size), -1e30), jnp.zeros((B, H, size)), jnp.zeros((B, H, size, v_BHSV.shape[3]))
        # The diagonal comes first: there every query sees itself, so that the maximum is real from then on.
        carry = keys(i, start)
        top_BHt, mass_BHt, y_BHtV = jax.lax.fori_loop(0, i, keys, carry)
        return (y_BHtV / mass_BHt[..., None]).astype(v_BHSV.dtype), top_BHt + jnp.log(mass_BHt)

    y_nBHtV, log_z_nBHt = jax.lax.map(queries, jnp.arange(T // size))
    y_BHTV = _stack(y_nBHtV)
    return y_BHTV, (q_BHTA, k_BHSA, v_BHSV, segments_BS, first, y_BHTV, _stack(log_z_nBHt[..., None])[..., 0])


def _blockwise_backward(scale, size, residuals, g_BHTV):
    """Scores stand with their keys in front: so four of the five products are plain ones, and the fifth, which gives
    the queries' gradient, turns the small keys over. One that contracts rows of both sides is half as fast on CPU."""
    q_BHTA, k_BHSA, v_BHSV, segments_BS, first, y_BHTV, log_z_BHT = residuals
    (B, H, T, A), S = q_BHTA.shape, k_BHSA.shape[2]
    # Σ_s p_st · ∂p_st, which the softmax's derivative subtracts
    mean_BHT = jnp.sum(g_BHTV.astype(jnp.float32) * y_BHTV.astype(jnp.float32), axis=-1)

    def keys(g_q_BHAT, j):
        """The gradient of key block j, and its part of the queries' gradient."""
        k_BHsA, v_BHsV = _block(k_BHSA, j, size), _block(v_BHSV, j, size)
        k_BHAs = jax.lax.optimization_barrier(jnp.swapaxes(k_BHsA, 2, 3))

        def queries(own, carry):
            g_q_BHAT, g_k_BHsA, g_v_BHsV = carry
            q_BHtA, g_BHtV = _block(q_BHTA, own, size), _block(g_BHTV, own, size)
            score_BHst = jnp.einsum("BHsA,BHtA->BHst", k_BHsA, q_BHtA, **_WIDE) * scale
            score_BHst += _of_heads(jnp.swapaxes(_mask(segments_BS, first + own, j, size), 1, 2))
            weight_BHst = jnp.exp(score_BHst - _block(log_z_BHT, own, size)[:, :, None])
            g_weight_BHst = jnp.einsum("BHsV,BHtV->BHst", v_BHsV, g_BHtV, **_WIDE)
            g_score_BHst = weight_BHst * (g_weight_BHst - _block(mean_BHT, own, size)[:, :, None]) * scale
            g_score_BHst = g_score_BHst.astype(k_BHsA.dtype)
            g_k_BHsA += jnp.einsum("BHst,BHtA->BHsA", g_score_BHst, q_BHtA, **_WIDE)
            g_v_BHsV += jnp.einsum("BHst,BHtV->BHsV", weight_BHst.astype(g_BHtV.dtype), g_BHtV, **_WIDE)
            g_q_BHAt = _block(g_q_BHAT, own, size, 3) + jnp.einsum("BHAs,BHst->BHAt", k_BHAs, g_score_BHst, **_WIDE)
            return jax.lax.dynamic_update_slice_in_dim(g_q_BHAT, g_q_BHAt, own * size, 3), g_k_BHsA, g_v_BHsV

        zeros = jnp.zeros(k_BHsA.shape, jnp.float32), jnp.zeros(v_BHsV.shape, jnp.float32)
        g_q_BHAT, *g_kv = jax.lax.fori_loop(jnp.maximum(j - first, 0), T // size, queries, (g_q_BHAT, *zeros))
        return g_q_BHAT, g_kv

    g_q_BHAT, (g_k_nBHsA, g_v_nBHsV) = jax.lax.scan(keys, jnp.zeros((B, H, A, T), jnp.float32), jnp.arange(S // size))
    g_q_BHTA, g_k, g_v = jnp.swapaxes(g_q_BHAT, 2, 3), _stack(g_k_nBHsA), _stack(g_v_nBHsV)
    return g_q_BHTA.astype(q_BHTA.dtype), g_k.astype(k_BHSA.dtype), g_v.astype(v_BHSV.dtype), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
