"""Causal attention over packed sequences, with keys wider than values (MLA: 192 and 128).

One function, four implementations:
- `reference`: materialises all scores. The oracle of the tests.
- `blockwise`: FlashAttention (arXiv 2205.14135, 2307.08691) in plain XLA, for any platform: a running softmax over
  blocks of keys. Memory grows with T, not T², forward and backward, and blocks above the diagonal are skipped.
- `splash`: JAX's Pallas kernel for TPU.
- `cudnn`: cuDNN's kernel for GPU. It requires equal key and value widths, so values are padded.
"""

import functools
import logging
from functools import partial
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_moe.config.parallelism import AttentionKernel

logger = logging.getLogger(__name__)
_JaxKernel = Literal["cudnn", "xla"]


def default_attention_kernel(platform: str | None = None) -> AttentionKernel:
    """The kernel for `platform` (`tpu`, `gpu`, `cpu`; by default the attached one)."""
    platform = platform or jax.default_backend()
    return "splash" if platform == "tpu" else "cudnn" if platform in ("gpu", "cuda") else "blockwise"


def attention(
    q_BTHA: Float[Array, "B T H A"],
    k_BSHA: Float[Array, "B S H A"],
    v_BSHV: Float[Array, "B S H V"],
    segment_ids_BS: Int[Array, "B S"] | None,
    *,
    scale: float,
    query_offset: Int[Array, ""] | None = None,
    implementation: AttentionKernel | None = None,
) -> Float[Array, "B T H V"]:
    """`softmax(scale · q kᵀ + mask) v`, softmax in float32 (DeepSeek-V2, equations 9-11 and 17-18).

    Token t attends to token s if s ≤ t and both have the same segment id; without `segment_ids_BS` a sequence is one
    segment. `query_offset` is for context parallelism, where a device has T of the S tokens as queries: the position of
    the first one, a multiple of T; T is then a multiple of 128 or below 128. A kernel that does not support the inputs
    is replaced by `blockwise`, which is logged once.
    """
    B, S = k_BSHA.shape[:2]
    T = q_BTHA.shape[1]
    if segment_ids_BS is None:
        segment_ids_BS = jnp.zeros((B, S), jnp.int32)
    if implementation is None:
        implementation = default_attention_kernel()
    start = jnp.int32(0) if query_offset is None else query_offset
    if implementation == "reference":
        return _reference(q_BTHA, k_BSHA, v_BSHV, segment_ids_BS, start, scale)
    if implementation == "splash":
        if query_offset is None and T % 128 == 0:
            return _splash(q_BTHA, k_BSHA, v_BSHV, segment_ids_BS, scale)
        _log_fallback("splash", f"{T} queries of {S} tokens: needs all queries, and a multiple of 128")
    if implementation == "cudnn":
        try:
            return dot_product(q_BTHA, k_BSHA, v_BSHV, segment_ids_BS, start, scale, "cudnn")
        except (NotImplementedError, RuntimeError) as reason:  # unsupported width, dtype or device
            _log_fallback("cudnn", str(reason))
    # With heads before time, every product is a plain batched matmul. Causality masks the padding to full blocks.
    size = block_size(T, divides=query_offset is not None)
    padding = (0, 0), (0, 0), (0, -T % size), (0, 0)
    q, k, v = (jnp.pad(jnp.moveaxis(x, 2, 1), padding) for x in (q_BTHA, k_BSHA, v_BSHV))
    segments = jnp.pad(segment_ids_BS, padding[1:3])
    return jnp.moveaxis(_blockwise_by_group(q, k, v, segments, start // size, scale, size)[:, :, :T], 1, 2)


def block_size(T: int, divides: bool = False) -> int:
    """Queries, and keys, per block: 256, or 128 where 256 would leave much of a block empty. With `divides` it divides
    T, which is then a multiple of 128 or below 128."""
    if T < 64 or (divides and T < 128):
        return T
    return 256 if T % 256 == 0 or (T >= 1024 and not divides) else 128


def _group_shape(B: int, H: int, size: int) -> tuple[int, int]:
    """Sequences and heads computed at a time: as many as keep a block's scores within 2 MB of CPU cache; several
    sequences only with all of their heads."""
    limit = max(2**19 // size**2, 1)
    heads = next(h for h in range(min(H, limit), 0, -1) if H % h == 0)
    sequences = next(b for b in range(max(min(B, limit // H), 1), 0, -1) if B % b == 0)
    return sequences, heads


def _blockwise_by_group(
    q_BHTA: Array, k_BHSA: Array, v_BHSV: Array, segments_BS: Array, first_block: Array, scale: float, size: int
) -> Array:
    B, H = q_BHTA.shape[:2]
    b, h = _group_shape(B, H, size)

    def split(x: Array) -> Array:
        """`[B, H, …]` to groups `[B/b · H/h, b, h, …]`."""
        return jnp.moveaxis(x.reshape(B // b, b, H // h, h, *x.shape[2:]), 2, 1).reshape(-1, b, h, *x.shape[2:])

    segments = jnp.repeat(segments_BS.reshape(B // b, b, -1), H // h, axis=0)
    group = partial(_blockwise, scale=scale, size=size)
    y = jax.lax.map(lambda x: group(*x, first_block), (*(split(x) for x in (q_BHTA, k_BHSA, v_BHSV)), segments))
    y = jnp.moveaxis(y.reshape(B // b, H // h, b, h, *y.shape[3:]), 1, 2)
    return y.reshape(B, H, *y.shape[4:])


@functools.cache
def _log_fallback(implementation: str, reason: str) -> None:
    """Once per reason."""
    logger.warning("attention: using blockwise instead of %s: %s", implementation, reason)


def _attention_mask(q_BTHA: Array, segments_BS: Array, start: Array) -> Array:
    T, S = q_BTHA.shape[1], segments_BS.shape[1]
    query_segments_BT = jax.lax.dynamic_slice_in_dim(segments_BS, start, T, 1)
    causal_TS = jnp.arange(S) <= start + jnp.arange(T)[:, None]
    return causal_TS & (query_segments_BT[:, :, None] == segments_BS[:, None, :])


def _reference(q_BTHA: Array, k_BSHA: Array, v_BSHV: Array, segments_BS: Array, start: Array, scale: float) -> Array:
    mask_BTS = _attention_mask(q_BTHA, segments_BS, start)
    score_BHTS = jnp.einsum("BTHA,BSHA->BHTS", q_BTHA, k_BSHA, preferred_element_type=jnp.float32) * scale
    weight_BHTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], score_BHTS, -jnp.inf), axis=-1)
    return jnp.einsum("BHTS,BSHV->BTHV", weight_BHTS.astype(v_BSHV.dtype), v_BSHV)


def dot_product(
    q_BTHA: Array, k_BSHA: Array, v_BSHV: Array, segments_BS: Array, start: Array, scale: float, kernel: _JaxKernel
) -> Array:
    """`jax.nn.dot_product_attention`, with values padded to the keys' width."""
    A, V = q_BTHA.shape[3], v_BSHV.shape[3]
    v_BSHA = jnp.pad(v_BSHV, ((0, 0), (0, 0), (0, 0), (0, A - V)))
    mask_B1TS = _attention_mask(q_BTHA, segments_BS, start)[:, None]
    y_BTHA = jax.nn.dot_product_attention(q_BTHA, k_BSHA, v_BSHA, mask=mask_B1TS, scale=scale, implementation=kernel)
    return y_BTHA[..., :V]


def _splash(q_BTHA: Array, k_BSHA: Array, v_BSHV: Array, segments_BS: Array, scale: float) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H = q_BTHA.shape[1:3]
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=_splash_blocks(splash, T))

    def sequence(q_THA: Array, k_SHA: Array, v_SHV: Array, segments_S: Array) -> Array:
        heads_first = (jnp.moveaxis(x, 1, 0) for x in (q_THA * scale, k_SHA, v_SHV))
        y_HTV = kernel(*heads_first, segment_ids=splash.SegmentIds(segments_S, segments_S))
        return jnp.moveaxis(y_HTV, 0, 1).astype(v_SHV.dtype)

    return jax.vmap(sequence)(q_BTHA, k_BSHA, v_BSHV, segments_BS)


def _splash_blocks(splash: ModuleType, T: int) -> Any:
    block, wide = (next(size for size in sizes if T % size == 0) for sizes in ((512, 256, 128), (2048, 512, 256, 128)))
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv")
    # The fused backward kernel computes scores once, but one gradient of the queries per block of keys: hence wide
    # blocks, processed 256 keys at a time. With 512 it needs 16.1 MB of a core's vector memory, which has 16.
    backward = {"block_kv_dkv": wide, "block_kv_dkv_compute": min(block, 256), "use_fused_bwd_kernel": True}
    return splash.BlockSizes(**dict.fromkeys(names, block), **backward)


# Below, t and s are the queries and keys of one block.

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _block(x: Array, i: Array, size: int, axis: int = 2) -> Array:
    """Block i of the time axis."""
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _stack(x_nBHtV: Array) -> Array:
    """n blocks to one time axis."""
    n, B, H, t, V = x_nBHtV.shape
    return jnp.moveaxis(x_nBHtV, 0, 2).reshape(B, H, n * t, V)


def _mask(segments_BS: Array, i: Array, j: Array, size: int) -> Array:
    """−1e30 where a query of block i must not attend to a key of block j, both counted over all S tokens. Finite, so
    that the running maximum stays finite over blocks that are fully masked."""
    future_ts = (i * size + jnp.arange(size))[:, None] < j * size + jnp.arange(size)
    other_Bts = _block(segments_BS, i, size, 1)[:, :, None] != _block(segments_BS, j, size, 1)[:, None, :]
    return jnp.where(future_ts | other_Bts, -1e30, 0.0)


def _broadcast_over_heads(mask_B__: Array) -> Array:
    """The barrier prevents XLA from recomputing the mask for each head."""
    return jax.lax.optimization_barrier(mask_B__)[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blockwise(
    q_BHTA: Array, k_BHSA: Array, v_BHSV: Array, segments_BS: Array, first_block: Array, scale: float, size: int
) -> Array:
    return _blockwise_forward(q_BHTA, k_BHSA, v_BHSV, segments_BS, first_block, scale, size)[0]


def _blockwise_forward(
    q_BHTA: Array, k_BHSA: Array, v_BHSV: Array, segments_BS: Array, first_block: Array, scale: float, size: int
) -> tuple[Array, tuple[Array, ...]]:
    B, H, T, _ = q_BHTA.shape

    def query_block(own: Array) -> tuple[Array, Array]:
        q_BHtA, i = _block(q_BHTA, own, size), first_block + own

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            max_BHt, sum_BHt, y_BHtV = carry
            score_BHts = _einsum("BHtA,BHsA->BHts", q_BHtA, _block(k_BHSA, j, size)) * scale
            score_BHts += _broadcast_over_heads(_mask(segments_BS, i, j, size))
            new_max_BHt = jnp.maximum(max_BHt, score_BHts.max(axis=-1))
            weight_BHts = jnp.exp(score_BHts - new_max_BHt[..., None])
            rescale_BHt = jnp.exp(max_BHt - new_max_BHt)
            v_BHsV = _block(v_BHSV, j, size)
            new_BHtV = _einsum("BHts,BHsV->BHtV", weight_BHts.astype(v_BHsV.dtype), v_BHsV)
            return (
                new_max_BHt,
                sum_BHt * rescale_BHt + weight_BHts.sum(axis=-1),
                y_BHtV * rescale_BHt[..., None] + new_BHtV,
            )

        start = jnp.full((B, H, size), -1e30), jnp.zeros((B, H, size)), jnp.zeros((B, H, size, v_BHSV.shape[3]))
        # The diagonal first: there every query attends to itself, so the maximum is a real score from then on.
        carry = key_block(i, start)
        max_BHt, sum_BHt, y_BHtV = jax.lax.fori_loop(0, i, key_block, carry)
        return (y_BHtV / sum_BHt[..., None]).astype(v_BHSV.dtype), max_BHt + jnp.log(sum_BHt)

    y_nBHtV, logsumexp_nBHt = jax.lax.map(query_block, jnp.arange(T // size))
    y_BHTV, logsumexp_BHT = _stack(y_nBHtV), _stack(logsumexp_nBHt[..., None])[..., 0]
    return y_BHTV, (q_BHTA, k_BHSA, v_BHSV, segments_BS, first_block, y_BHTV, logsumexp_BHT)


def _blockwise_backward(
    scale: float, size: int, residuals: tuple[Array, ...], g_BHTV: Array
) -> tuple[Array | None, ...]:
    """Scores have the key axis before the query axis: then four of the five products are plain matmuls, and only the
    fifth, the queries' gradient, transposes the small keys. Contracting the row axis of both operands is half as fast
    on CPU."""
    q_BHTA, k_BHSA, v_BHSV, segments_BS, first_block, y_BHTV, logsumexp_BHT = residuals
    (B, H, T, A), S = q_BHTA.shape, k_BHSA.shape[2]
    # Σ_s p_st · ∂p_st of the softmax's derivative (D in FlashAttention-2)
    delta_BHT = jnp.sum(g_BHTV.astype(jnp.float32) * y_BHTV.astype(jnp.float32), axis=-1)

    def key_block(g_q_BHAT: Array, j: Array) -> tuple[Array, list[Array]]:
        """The gradient of key block j, and its contribution to the queries' gradient."""
        k_BHsA, v_BHsV = _block(k_BHSA, j, size), _block(v_BHSV, j, size)
        k_BHAs = jax.lax.optimization_barrier(jnp.swapaxes(k_BHsA, 2, 3))

        def query_block(own: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            g_q_BHAT, g_k_BHsA, g_v_BHsV = carry
            q_BHtA, g_BHtV = _block(q_BHTA, own, size), _block(g_BHTV, own, size)
            score_BHst = _einsum("BHsA,BHtA->BHst", k_BHsA, q_BHtA) * scale
            score_BHst += _broadcast_over_heads(jnp.swapaxes(_mask(segments_BS, first_block + own, j, size), 1, 2))
            weight_BHst = jnp.exp(score_BHst - _block(logsumexp_BHT, own, size)[:, :, None])
            g_weight_BHst = _einsum("BHsV,BHtV->BHst", v_BHsV, g_BHtV)
            g_score_BHst = weight_BHst * (g_weight_BHst - _block(delta_BHT, own, size)[:, :, None]) * scale
            g_score_BHst = g_score_BHst.astype(k_BHsA.dtype)
            g_k_BHsA += _einsum("BHst,BHtA->BHsA", g_score_BHst, q_BHtA)
            g_v_BHsV += _einsum("BHst,BHtV->BHsV", weight_BHst.astype(g_BHtV.dtype), g_BHtV)
            g_q_BHAt = _block(g_q_BHAT, own, size, 3) + _einsum("BHAs,BHst->BHAt", k_BHAs, g_score_BHst)
            return jax.lax.dynamic_update_slice_in_dim(g_q_BHAT, g_q_BHAt, own * size, 3), g_k_BHsA, g_v_BHsV

        zeros = jnp.zeros(k_BHsA.shape, jnp.float32), jnp.zeros(v_BHsV.shape, jnp.float32)
        start = jnp.maximum(j - first_block, 0)
        g_q_BHAT, *g_kv = jax.lax.fori_loop(start, T // size, query_block, (g_q_BHAT, *zeros))
        return g_q_BHAT, g_kv

    zeros_BHAT = jnp.zeros((B, H, A, T), jnp.float32)
    g_q_BHAT, (g_k_nBHsA, g_v_nBHsV) = jax.lax.scan(key_block, zeros_BHAT, jnp.arange(S // size))
    g_q_BHTA, g_k, g_v = jnp.swapaxes(g_q_BHAT, 2, 3), _stack(g_k_nBHsA), _stack(g_v_nBHsV)
    return g_q_BHTA.astype(q_BHTA.dtype), g_k.astype(k_BHSA.dtype), g_v.astype(v_BHSV.dtype), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
