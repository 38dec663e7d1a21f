"""JAX's splash attention (Pallas, TPU) for any queries of a sequence: all of them, or those of a device.

JAX builds the description of a mask, which blocks of keys each block of queries needs, by evaluating the mask in NumPy,
element by element, for queries that are known at compile time. Here it follows from the indices of the queries, which
with context parallelism only the device knows; and a long sequence takes no time to trace.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float, Int

from mla_moe.ops.masking import Masking

MAX_GRADIENT_BYTES = 2**31
"""Of the queries' gradients that the backward kernel writes, one for each wide block of keys: with more it runs on
some of the heads at a time, which changes no FLOPs."""

BLOCKS, WIDE_BLOCKS = (512, 256, 128), (2048, 512, 256, 128)


def splash_attention(
    q_BTHA: Float[Array, "B T H A"],
    k_BSHA: Float[Array, "B S H A"],
    v_BSHV: Float[Array, "B S H V"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    index_T: Int[Array, "T"] | None,
    scale: float,
    masking: Masking,
    chunk: int | None,
) -> Float[Array, "B T H V"]:
    """`ops.attention.attention`, which see. `index_T` are the indices of the queries if they are a part of the tokens;
    `chunk` of them at a time are adjacent. T and S are multiples of 128."""
    (B, T, H, A), S = q_BTHA.shape, k_BSHA.shape[1]
    run = splash_kernel(np.arange(T, dtype=np.int32) if index_T is None else index_T, S, masking, chunk or T)

    def of_heads(inputs: tuple[Array, Array, Array]) -> Array:
        return jax.vmap(lambda q, k, v, *ids: run(q, k, v, segment_ids=splash.SegmentIds(*ids)))(*inputs, *segments)

    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q_BTHA * scale, k_BSHA, v_BSHV))
    gradients = B * S // next(n for n in WIDE_BLOCKS if S % n == 0) * T * A * q_BTHA.dtype.itemsize
    h = next(h for h in range(H, 0, -1) if H % h == 0 and (h == 1 or h * gradients <= MAX_GRADIENT_BYTES))
    if h == H:
        y_BHTV = of_heads((q, k, v))
    else:
        groups = tuple(jnp.moveaxis(x.reshape(B, H // h, h, *x.shape[2:]), 1, 0) for x in (q, k, v))
        y_BHTV = jnp.moveaxis(jax.lax.map(of_heads, groups), 0, 1).reshape(B, H, T, -1)
    return jnp.moveaxis(y_BHTV, 1, 2).astype(v_BSHV.dtype)


def splash_kernel(index_T: Any, S: int, masking: Masking, chunk: int) -> Callable[..., Any]:
    """What `splash.make_splash_mha` returns."""
    # A block of queries that are not adjacent would need the keys of all of them.
    block_q = next((n for n in BLOCKS if chunk % n == 0), BLOCKS[-1])
    block_kv, wide = (next(n for n in sizes if S % n == 0) for sizes in (BLOCKS, WIDE_BLOCKS))
    # The fused backward kernel computes scores once, but one gradient of the queries per block of keys: hence wide
    # blocks, processed 256 keys at a time. With 512 it needs 16.1 MB of a core's vector memory, which has 16.
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv, block_q_dkv=block_q, block_kv_dkv=wide,
        block_kv_dkv_compute=min(wide, 256), use_fused_bwd_kernel=True,
    )  # fmt: skip
    masked = masking.reach != (None, None)
    return kernel.SplashAttentionKernel(
        _forward_blocks(index_T, block_q, block_kv, S // block_kv, masking, chunk),
        None,
        _backward_blocks(index_T, block_q, wide, S // wide, masking),
        block_sizes=sizes, is_mqa=False, save_residuals=False, mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None, residual_checkpoint_name=None, interpret=False,
        mask_function=_mask_function(masking) if masked else None,
    )  # fmt: skip


@functools.cache
def _mask_function(masking: Masking) -> Callable[[Array, Array], Array]:
    """The same object for equal masks, so that JAX traces the kernel once."""
    return lambda query, key: masking.allowed(query, key)


def _key_blocks(index_T: Any, block_q: int, block_kv: int, key_blocks: int, masking: Masking) -> tuple[Any, Any]:
    """The first and the last block of keys that each block of queries attends to."""
    np_ = _numpy(index_T)
    index_nq, (left, right) = index_T.reshape(-1, block_q), masking.reach
    first_n = np_.zeros(len(index_nq), np.int32)
    last_n = np_.full(len(index_nq), key_blocks - 1, np.int32)
    if left is not None:
        first_n = np_.maximum(index_nq.min(axis=1) - left, 0) // block_kv
    if right is not None:
        last_n = np_.minimum((index_nq.max(axis=1) + right) // block_kv, key_blocks - 1)
    return first_n, last_n


def _forward_blocks(
    index_T: Any, block_q: int, block_kv: int, key_blocks: int, masking: Masking, chunk: int
) -> MaskInfo:
    """For each block of queries the blocks of keys in turn, only as many of them as a sliding window can reach. A step
    without one loads the first of the next block of queries."""
    np_, (left, right) = _numpy(index_T), masking.reach
    first_n, last_n = _key_blocks(index_T, block_q, block_kv, key_blocks, masking)
    steps = key_blocks
    if left is not None and right is not None and chunk % block_q == 0:
        steps = min((left + block_q - 1 + right + block_kv - 1) // block_kv + 1, key_blocks)
    block_nj = first_n[:, None] + np.arange(steps, dtype=np.int32)
    attends_nj = block_nj <= last_n[:, None]
    next_nj = np_.where(attends_nj, block_nj, np_.roll(first_n, -1)[:, None])
    return _mask_info(next_nj, attends_nj, key_blocks, index_T, masking)


def _backward_blocks(index_T: Any, block_q: int, block_kv: int, key_blocks: int, masking: Masking) -> MaskInfo:
    """For each block of keys all blocks of queries in turn. A step of one that does not attend to it loads the next one
    that does, or that of the next block of keys."""
    np_ = _numpy(index_T)
    first_n, last_n = _key_blocks(index_T, block_q, block_kv, key_blocks, masking)
    key_m = np.arange(key_blocks, dtype=np.int32)
    attends_mn = (first_n <= key_m[:, None]) & (key_m[:, None] <= last_n)
    n = len(first_n)
    index_mn = np_.where(attends_mn, np.arange(n, dtype=np.int32), n)
    if np_ is np:
        next_mn: Any = np.minimum.accumulate(index_mn[:, ::-1], axis=1)[:, ::-1]
    else:
        next_mn = jax.lax.cummin(index_mn, axis=1, reverse=True)
    following_m1 = np_.roll(next_mn[:, :1], -1, axis=0)
    next_mn = np_.where(next_mn < n, next_mn, np_.where(following_m1 < n, following_m1, 0))
    return _mask_info(next_mn.T, attends_mn.T, n, index_T, masking)


def _mask_info(next_nj: Any, attends_nj: Any, blocks: int, index_T: Any, masking: Masking) -> MaskInfo:
    """Of one mask for all heads, with the smallest integers, because a core's scalar memory is small. The kernel
    applies the mask in every block."""
    q_sequence: Any = None if masking.reach == (None, None) else jnp.asarray(index_T)
    dtype = next(dtype for dtype in (jnp.int8, jnp.int16, jnp.int32) if blocks <= jnp.iinfo(dtype).max)
    return MaskInfo(
        data_next=jnp.asarray(next_nj, dtype)[None],
        block_mask=jnp.asarray(attends_nj, jnp.int8)[None],
        mask_next=None,
        partial_mask_blocks=None,
        q_sequence=q_sequence,
    )


def _numpy(index_T: Any) -> Any:
    """NumPy for indices that are known at compile time."""
    return np if isinstance(index_T, np.ndarray) else jnp
