"""Attention of new tokens over the latent KV cache, in two equivalent forms (MLA: DeepSeek-V2, section 2.1.2).

- `expanded`: computes every head's keys and values from the latent. Cheaper for many queries: prefill.
- `absorbed`: folds `W_UK` into the query and `W_UV` into the output, so that attention runs on the latent itself, as
  multi-query attention. Cheaper for the few queries of a decode step.

Both read the cache block by block with a running softmax, up to the last position that some query attends to: time
follows the sequence length, not the cache capacity. `reference` computes all scores at once: the oracle of the tests.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mla_moe.ops.kv_quantization import SCALE_BYTES, dequantize

Form = Literal["reference", "expanded", "absorbed"]

BLOCK = 256

_Products = Callable[[Array], tuple[Array, Callable[[Array], Array]]]
"""From a block's start to its scores, and the function from weights to weighted values."""


def cached_attention(
    q_bTHA: Float[Array, "b T H A"],
    cache_LBSW: Num[Array, "L B S W"],
    kv_b_CHk: Float[Array, "C H k"],
    positions_bT: Int[Array, "b T"],
    *,
    layer: Int[Array, ""] | int,
    slots_b: Int[Array, "b"] | None,
    scale: float,
    form: Form,
    constrain: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "b T H V"]:
    """`softmax(scale · q kᵀ + mask) v`: a token at `positions` attends to its sequence slot's entries up to itself.

    `kv_b` is `[W_UK; W_UV]` of each head, so k = N + V. `slots_b` is the sequence slot of each batch element; None
    means all slots in order. Positions at or beyond the cache capacity S mark padding and give arbitrary finite values.
    `constrain` is the sharding constraint of absorbed queries and values, where heads and slots are on different axes.
    """
    S, Z = cache_LBSW.shape[2:]
    quantized = cache_LBSW.dtype == jnp.int8
    W, C = Z - SCALE_BYTES * quantized, kv_b_CHk.shape[0]
    R = W - C
    N = q_bTHA.shape[3] - R
    uk_CHN, uv_CHV = kv_b_CHk[:, :, :N], kv_b_CHk[:, :, N:]
    size = min(BLOCK, S)

    def read(start: Array | int, size: int) -> Array:
        """`[b, size, W]` of this layer."""

        def block(slot: Array | int, slots: int) -> Array:
            index = [jnp.asarray(i, jnp.int32) for i in (layer, slot, start, 0)]  # one dtype, with jax_enable_x64 too
            return jax.lax.dynamic_slice(cache_LBSW, index, (1, slots, size, Z))[0]

        if slots_b is None:
            entries = block(0, cache_LBSW.shape[1])
        else:
            entries = jax.vmap(lambda slot: block(slot, 1)[0])(slots_b)
        return dequantize(entries, C, q_bTHA.dtype) if quantized else entries

    def expand(entries_bsW: Array) -> tuple[Array, Array]:
        kv_bsHk = jnp.einsum("bsC,CHk->bsHk", entries_bsW[..., :C], kv_b_CHk)
        k_pe = jnp.broadcast_to(entries_bsW[:, :, None, C:], (*kv_bsHk.shape[:3], R))
        return jnp.concatenate([kv_bsHk[..., :N], k_pe], axis=-1), kv_bsHk[..., N:]

    if form == "reference":
        k_bSHA, v_bSHV = expand(read(0, S))
        score_bHTS = jnp.einsum("bTHA,bSHA->bHTS", q_bTHA, k_bSHA, preferred_element_type=jnp.float32) * scale
        mask_bTS = jnp.arange(S) <= positions_bT[..., None]
        weight_bHTS = jax.nn.softmax(jnp.where(mask_bTS[:, None], score_bHTS, -jnp.inf), axis=-1)
        return jnp.einsum("bHTS,bSHV->bTHV", weight_bHTS.astype(v_bSHV.dtype), v_bSHV)
    blocks = jnp.max(jnp.where(positions_bT < S, positions_bT, 0)) // size + 1
    if form == "expanded":

        def products(start: Array) -> tuple[Array, Callable[[Array], Array]]:
            k_bsHA, v_bsHV = expand(read(start, size))
            score_bHTs = jnp.einsum("bTHA,bsHA->bHTs", q_bTHA, k_bsHA, preferred_element_type=jnp.float32)
            return score_bHTs, lambda w: jnp.einsum("bHTs,bsHV->bHTV", w, v_bsHV, preferred_element_type=jnp.float32)

        y_bHTV = _running_softmax(products, positions_bT, blocks, size, uv_CHV.shape[1:], scale, q_bTHA.dtype)
        return jnp.moveaxis(y_bHTV, 1, 2).astype(q_bTHA.dtype)

    q_nope, q_pe = q_bTHA[..., :N], q_bTHA[..., N:]
    q_bTHW = jnp.concatenate([jnp.einsum("bTHN,CHN->bTHC", q_nope, uk_CHN), q_pe], axis=-1)
    q_bHTW = jnp.moveaxis(constrain(q_bTHW), 2, 1)

    def products(start: Array) -> tuple[Array, Callable[[Array], Array]]:
        entries_bsW = read(start, size)
        score_bHTs = jnp.einsum("bHTW,bsW->bHTs", q_bHTW, entries_bsW, preferred_element_type=jnp.float32)
        # The rotary key is weighted too and dropped later: cheaper than slicing the latent out of the entries.
        return score_bHTs, lambda w: jnp.einsum("bHTs,bsW->bHTW", w, entries_bsW, preferred_element_type=jnp.float32)

    y_bHTW = _running_softmax(products, positions_bT, blocks, size, (q_bTHA.shape[2], W), scale, q_bTHA.dtype)
    return jnp.einsum("bHTC,CHV->bTHV", constrain(y_bHTW[..., :C].astype(q_bTHA.dtype)), uv_CHV)


def _running_softmax(
    products: _Products, positions_bT: Array, blocks: Array, size: int, HV: tuple[int, ...], scale: float, dtype: Any
) -> Float[Array, "b H T V"]:
    """Softmax-weighted values over `blocks` blocks of the cache (FlashAttention, arXiv 2205.14135), in float32."""
    (b, T), (H, V) = positions_bT.shape, HV

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        max_bHT, sum_bHT, y_bHTV = carry
        score_bHTs, weighted_values = products(i * size)
        mask_bTs = i * size + jnp.arange(size) <= positions_bT[..., None]
        score_bHTs = jnp.where(mask_bTs[:, None], score_bHTs * scale, -1e30)
        new_max_bHT = jnp.maximum(max_bHT, score_bHTs.max(axis=-1))
        weight_bHTs = jnp.exp(score_bHTs - new_max_bHT[..., None])
        rescale_bHT = jnp.exp(max_bHT - new_max_bHT)
        y_bHTV = y_bHTV * rescale_bHT[..., None] + weighted_values(weight_bHTs.astype(dtype))
        return new_max_bHT, sum_bHT * rescale_bHT + weight_bHTs.sum(axis=-1), y_bHTV

    # Every query attends to position 0, so the maximum is a real score from the first block on.
    start = jnp.full((b, H, T), -1e30), jnp.zeros((b, H, T)), jnp.zeros((b, H, T, V))
    _, sum_bHT, y_bHTV = jax.lax.fori_loop(0, blocks, body, start)
    return y_bHTV / sum_bHT[..., None]
