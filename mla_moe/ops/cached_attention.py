"""Attention of new tokens over the latent cache, in two forms of one function (DeepSeek-V2, section 2.1.2).

- `expanded`: keys and values of every head are made from the latent. Cheaper when many tokens ask at once: prefill.
- `absorbed`: `W_UK` is folded into the query and `W_UV` into the output, so that scores are taken against the latent
  itself, as if all heads shared one key. Cheaper for the few tokens of a decode step.

Both read the cache a block of places at a time with a running softmax, up to the last place that anybody sees: time
follows the length of the text, not the capacity of the cache. `reference` makes all scores at once: the oracle.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mla_moe.ops.kv_quantization import SCALE_BYTES, dequantize

Form = Literal["reference", "expanded", "absorbed"]

BLOCK = 256


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
    spread: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "b T H V"]:
    """`softmax(scale · q kᵀ + mask) v` for tokens at `positions` over the entries of their slots up to themselves.

    `kv_b` is `[W_UK; W_UV]` of each head, so that k = N + V. `slots_b` says which slot a row asks; None means all
    slots in order. Positions at or beyond the capacity S belong to nobody, and give arbitrary finite values. `spread`
    says where queries and values meet the cache, if heads lie on other devices than slots.
    """
    S, Z = cache_LBSW.shape[2:]
    packed = cache_LBSW.dtype == jnp.int8
    W, C = Z - SCALE_BYTES * packed, kv_b_CHk.shape[0]
    R = W - C
    N = q_bTHA.shape[3] - R
    uk_CHN, uv_CHV = kv_b_CHk[:, :, :N], kv_b_CHk[:, :, N:]
    size = min(BLOCK, S)

    def at(*places):
        return [jnp.asarray(place, jnp.int32) for place in places]  # of one type, with 64-bit numbers too

    def read(start, size):
        """`[b, size, W]` of this layer."""
        if slots_b is None:
            B = cache_LBSW.shape[1]
            entries = jax.lax.dynamic_slice(cache_LBSW, at(layer, 0, start, 0), (1, B, size, Z))[0]
        else:

            def one(slot):
                return jax.lax.dynamic_slice(cache_LBSW, at(layer, slot, start, 0), (1, 1, size, Z))[0, 0]

            entries = jax.vmap(one)(slots_b)
        return dequantize(entries, C, q_bTHA.dtype) if packed else entries

    def expand(entries_bsW):
        kv_bsHk = jnp.einsum("bsC,CHk->bsHk", entries_bsW[..., :C], kv_b_CHk)
        k_pe = jnp.broadcast_to(entries_bsW[:, :, None, C:], (*kv_bsHk.shape[:3], R))
        return jnp.concatenate([kv_bsHk[..., :N], k_pe], axis=-1), kv_bsHk[..., N:]

    if form == "reference":
        k_bSHA, v_bSHV = expand(read(0, S))
        score_bHTS = jnp.einsum("bTHA,bSHA->bHTS", q_bTHA, k_bSHA, preferred_element_type=jnp.float32) * scale
        seen_bTS = jnp.arange(S) <= positions_bT[..., None]
        weight_bHTS = jax.nn.softmax(jnp.where(seen_bTS[:, None], score_bHTS, -jnp.inf), axis=-1)
        return jnp.einsum("bHTS,bSHV->bTHV", weight_bHTS.astype(v_bSHV.dtype), v_bSHV)
    blocks = jnp.max(jnp.where(positions_bT < S, positions_bT, 0)) // size + 1
    if form == "expanded":

        def products(start):
            k_bsHA, v_bsHV = expand(read(start, size))
            score_bHTs = jnp.einsum("bTHA,bsHA->bHTs", q_bTHA, k_bsHA, preferred_element_type=jnp.float32)
            return score_bHTs, lambda w: jnp.einsum("bHTs,bsHV->bHTV", w, v_bsHV, preferred_element_type=jnp.float32)

        y_bHTV = _running_softmax(products, positions_bT, blocks, size, uv_CHV.shape, scale, q_bTHA.dtype)
        return jnp.moveaxis(y_bHTV, 1, 2).astype(q_bTHA.dtype)

    q_nope, q_pe = q_bTHA[..., :N], q_bTHA[..., N:]
    q_bTHW = jnp.concatenate([jnp.einsum("bTHN,CHN->bTHC", q_nope, uk_CHN), q_pe], axis=-1)
    q_bHTW = jnp.moveaxis(spread(q_bTHW), 2, 1)

    def products(start):
        entries_bsW = read(start, size)
        score_bHTs = jnp.einsum("bHTW,bsW->bHTs", q_bHTW, entries_bsW, preferred_element_type=jnp.float32)
        # The rotated keys are summed along: cheaper than cutting the latent out of the entries.
        return score_bHTs, lambda w: jnp.einsum("bHTs,bsW->bHTW", w, entries_bsW, preferred_element_type=jnp.float32)

    shape = (W, q_bTHA.shape[2], W)
    y_bHTW = _running_softmax(products, positions_bT, blocks, size, shape, scale, q_bTHA.dtype)
    return jnp.einsum("bHTC,CHV->bTHV", spread(y_bHTW[..., :C].astype(q_bTHA.dtype)), uv_CHV)


def _running_softmax(products: Callable, positions_bT, blocks, size, value_shape, scale, dtype):
    """Softmax-weighted values over `blocks` blocks (FlashAttention, arXiv 2205.14135), `float32[b, H, T, V]`.

    `products(start)` gives a block's scores, and the function from weights to weighted values.
    """
    b, T = positions_bT.shape
    _, H, V = value_shape

    def body(i, carry):
        top_bHT, mass_bHT, y_bHTV = carry
        score_bHTs, weigh = products(i * size)
        seen_bTs = i * size + jnp.arange(size) <= positions_bT[..., None]
        score_bHTs = jnp.where(seen_bTs[:, None], score_bHTs * scale, -1e30)
        new_top_bHT = jnp.maximum(top_bHT, score_bHTs.max(axis=-1))
        weight_bHTs = jnp.exp(score_bHTs - new_top_bHT[..., None])
        shrink_bHT = jnp.exp(top_bHT - new_top_bHT)
        y_bHTV = y_bHTV * shrink_bHT[..., None] + weigh(weight_bHTs.astype(dtype))
        return new_top_bHT, mass_bHT * shrink_bHT + weight_bHTs.sum(axis=-1), y_bHTV

    # Place 0 is seen by every query, so the maximum is real from the first block on.
    start = jnp.full((b, H, T), -1e30), jnp.zeros((b, H, T)), jnp.zeros((b, H, T, V))
    _, mass_bHT, y_bHTV = jax.lax.fori_loop(0, blocks, body, start)
    return y_bHTV / mass_bHT[..., None]
