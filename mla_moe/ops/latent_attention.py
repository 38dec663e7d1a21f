"""Absorbed attention over the latent KV cache as one Pallas kernel for NVIDIA GPUs (MLA: DeepSeek-V2, section 2.1.2).

Absorbed, MLA is multi-query attention whose values are a part of its keys: an entry of the cache is the latent c, which
is key and value, and the rotary key k_pe. XLA copies each block of the cache out of the array, and then reads the copy
twice, for the scores and for the values. This kernel reads each entry once from memory.

The sequence of a slot is divided among several programs, so that a small batch too uses the whole GPU (Flash-Decoding).
Their results are combined by the logarithm of the sum of each softmax.

It is compiled by Pallas's Triton backend, which JAX 0.12 says will be removed: `docs/decisions/decode-on-gpu.md`.
"""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Num

from mla_moe.ops.kernel_choice import LATENT_BLOCK as BLOCK_S

MAX_BLOCK_R = 64
"""Rows of a program. Their sums `[rows, C]` stay in registers, which more rows would not fit."""
PROGRAMS = 128
"""A sequence is divided until there are about as many programs as an H100 has multiprocessors."""
MIN_ENTRIES = 256
"""But a program has at least so many entries, so that the partial results stay small beside what is read."""
EMPTY = -1e30


def latent_attention(
    q_bTHW: Float[Array, "b T H W"],
    cache_LBSZ: Num[Array, "L B S Z"],
    positions_bT: Int[Array, "b T"],
    layer: Int[Array, ""] | int,
    *,
    latent: int,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "b T H C"]:
    """`softmax(scale · q [c; k_pe]ᵀ + mask) c` over the entries of each slot of a layer up to a token's position, of
    the last `window` if given.

    The first `latent` of the W values of a query are multiplied by the latent, the others by the rotary key. In an int8
    cache (`ops.kv_quantization`) the scales follow the values. Positions from S on are padding, whose results are
    arbitrary and finite. Not differentiable.
    """
    layer_1, positions_bT = (jnp.asarray(x, jnp.int32) for x in ([layer], positions_bT))
    return _latent_attention(q_bTHW, cache_LBSZ, positions_bT, layer_1, latent, scale, window, interpret)


# `mla_moe.plan` recognises the kernel by the name of this jitted function.
@partial(jax.jit, static_argnums=(4, 5, 6, 7), inline=False)
def _latent_attention(
    q_bTHW: Array, cache_LBSZ: Array, positions_bT: Array, layer_1: Array,
    latent: int, scale: float, window: int | None, interpret: bool,
) -> Array:  # fmt: skip
    (B, T, H, W), S = q_bTHW.shape, cache_LBSZ.shape[2]
    R = T * H
    rows = min(MAX_BLOCK_R, max(16, pl.next_power_of_2(R)))
    padding = -R % rows
    row_blocks = (R + padding) // rows
    splits = max(1, min(PROGRAMS // (B * row_blocks), S // MIN_ENTRIES))
    q_bRW = jnp.pad(q_bTHW.reshape(B, R, W), ((0, 0), (0, padding), (0, 0)))
    position_bR = jnp.pad(jnp.repeat(positions_bT, H, axis=1), ((0, 0), (0, padding)), constant_values=S)

    inside_bT = positions_bT < S
    last_b = jnp.where(inside_bT, positions_bT, -1).max(axis=1)
    first_b = jnp.where(inside_bT, positions_bT, S).min(axis=1) - (S if window is None else window - 1)
    blocks_2b = jnp.stack([jnp.maximum(first_b, 0) // BLOCK_S, (last_b + BLOCK_S) // BLOCK_S])
    kernel = partial(_kernel, latent=latent, rotary=W - latent, scale=scale, window=window, splits=splits)
    y_bnRC, log_sum_bnR = pl.pallas_call(
        kernel,
        grid=(B, row_blocks, splits),
        in_specs=[
            pl.BlockSpec((1,), lambda b, r, n: (0,)),
            pl.BlockSpec((2, None), lambda b, r, n: (0, b)),
            pl.BlockSpec((None, rows), lambda b, r, n: (b, r)),
            pl.BlockSpec((None, rows, W), lambda b, r, n: (b, r, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[
            pl.BlockSpec((None, None, rows, latent), lambda b, r, n: (b, n, r, 0)),
            pl.BlockSpec((None, None, rows), lambda b, r, n: (b, n, r)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, splits, R + padding, latent), q_bTHW.dtype),
            jax.ShapeDtypeStruct((B, splits, R + padding), jnp.float32),
        ],
        compiler_params=_compiler_params(interpret),
        interpret=interpret,
        name="latent_attention",
    )(layer_1, blocks_2b, position_bR, q_bRW, cache_LBSZ)
    weight_bnR = jax.nn.softmax(log_sum_bnR, axis=1)
    y_bRC = jnp.einsum("bnR,bnRC->bRC", weight_bnR, y_bnRC.astype(jnp.float32)).astype(q_bTHW.dtype)
    return y_bRC[:, :R].reshape(B, T, H, latent)


def _compiler_params(interpret: bool) -> Any:
    if interpret:
        return None
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=8, num_stages=2)


def _kernel(
    layer_1: Any, blocks_2: Any, position_R: Any, q_RW: Any, cache_LBSZ: Any, y_RC: Any, log_sum_R: Any,
    *, latent: int, rotary: int, scale: float, window: int | None, splits: int,
) -> None:  # fmt: skip
    """One program: a block of rows, over its part of the blocks of one sequence."""
    layer, slot = layer_1[0], pl.program_id(0)
    first, end = blocks_2[0], blocks_2[1]
    blocks = pl.cdiv(end - first, splits)
    start = first + pl.program_id(2) * blocks
    position_R1, q_RC, q_Rr = position_R[:][:, None], q_RW[:, :latent], q_RW[:, latent:]
    product = partial(jnp.dot, preferred_element_type=jnp.float32)

    def read(block: Array, column: int, width: int) -> Array:
        return cache_LBSZ[layer, slot, pl.ds(block * BLOCK_S, BLOCK_S), pl.ds(column, width)]

    def scale_of(block: Array, column: int) -> Array:
        """`[s]`, of four bytes; the lowest comes first."""
        entries = pl.ds(block * BLOCK_S, BLOCK_S)
        byte = [cache_LBSZ[layer, slot, entries, column + i].astype(jnp.int32) & 255 for i in range(4)]
        bits = reduce(jnp.bitwise_or, [b << 8 * i for i, b in enumerate(byte)])
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def body(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum_R, sum_R, y_RC = carry
        c_sC, k_sr = read(block, 0, latent).astype(q_RC.dtype), read(block, latent, rotary).astype(q_RC.dtype)
        score_Rs, pe_Rs = product(q_RC, c_sC.T), product(q_Rr, k_sr.T)
        quantized = cache_LBSZ.dtype == jnp.int8
        if quantized:
            scale_s = scale_of(block, latent + rotary)
            score_Rs, pe_Rs = score_Rs * scale_s, pe_Rs * scale_of(block, latent + rotary + 4)
        before_Rs = position_R1 - (block * BLOCK_S + jnp.arange(BLOCK_S, dtype=jnp.int32))
        visible_Rs = (before_Rs >= 0) if window is None else (before_Rs >= 0) & (before_Rs < window)
        score_Rs = jnp.where(visible_Rs, (score_Rs + pe_Rs) * scale, EMPTY)
        new_R = jnp.maximum(maximum_R, score_Rs.max(axis=1))
        weight_Rs, correction_R = jnp.exp(score_Rs - new_R[:, None]), jnp.exp(maximum_R - new_R)
        sum_R = sum_R * correction_R + weight_Rs.sum(axis=1)
        weight_Rs = (weight_Rs * scale_s if quantized else weight_Rs).astype(q_RC.dtype)
        return new_R, sum_R, y_RC * correction_R[:, None] + product(weight_Rs, c_sC)

    rows = q_RC.shape[0]
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    empty = zeros(rows) + EMPTY, zeros(rows), zeros((rows, latent))
    maximum_R, sum_R, sums_RC = jax.lax.fori_loop(start, jnp.minimum(start + blocks, end), body, empty)
    # A program without blocks has weight 0 beside one with a visible entry.
    sum_R = jnp.maximum(sum_R, jnp.finfo(jnp.float32).tiny)
    y_RC[:, :] = (sums_RC / sum_R[:, None]).astype(y_RC.dtype)
    log_sum_R[:] = maximum_R + jnp.log(sum_R)
