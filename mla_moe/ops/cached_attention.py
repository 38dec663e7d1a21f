"""Attention of new tokens over the latent KV cache, in two equivalent forms (MLA: DeepSeek-V2, section 2.1.2).

- `expanded`: computes every head's keys and values from the latent. Cheaper for many queries: prefill.
- `absorbed`: folds `W_UK` into the query and `W_UV` into the output, so that attention runs on the latent itself, as
  multi-query attention. Cheaper for the few queries of a decode step.

Both read the cache block by block with a running softmax, up to the last position that some query attends to: time
follows the sequence length, not the cache capacity. On NVIDIA GPUs a kernel computes the absorbed form
(`ops.latent_attention`). `reference` computes all scores at once: the oracle of the tests.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, UInt32

from mla_moe.config.parallelism import AttentionKernel
from mla_moe.ops.attention import masked_attention
from mla_moe.ops.blockwise_attention import SoftmaxSums, add_block, empty_sums
from mla_moe.ops.kernel_choice import has_latent_kernel
from mla_moe.ops.key_selection import selected_range
from mla_moe.ops.kv_quantization import SCALE_BYTES, dequantize
from mla_moe.ops.latent_attention import latent_attention
from mla_moe.ops.lora import LoRAFactors, keep_own

Form = Literal["reference", "expanded", "absorbed"]

BLOCK = 256


def read_cache(
    cache_LBSW: Num[Array, "L B S W"],
    layer: Int[Array, ""] | int,
    slots_b: Int[Array, "b"] | None,
    positions: tuple[Array | int, int],
    columns: tuple[int, int],
) -> Num[Array, "b s w"]:
    """A block of positions and of columns, each as its start and size, of one layer's slots (None: of all)."""
    (start, size), (first, width) = positions, columns

    def block(slot: Array | int, slots: int) -> Array:
        index = [jnp.asarray(i, jnp.int32) for i in (layer, slot, start, first)]  # one dtype, with jax_enable_x64 too
        return jax.lax.dynamic_slice(cache_LBSW, index, (1, slots, size, width))[0]

    return block(0, cache_LBSW.shape[1]) if slots_b is None else jax.vmap(lambda i: block(i, 1)[0])(slots_b)


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
    lora: LoRAFactors | None = None,
    window: int | None = None,
    selected_bTw: UInt32[Array, "b T w"] | None = None,
    index_width: int = 0,
    constrain: Callable[[Array], Array] = lambda x: x,
    map_slots: Callable[..., Array] = lambda kernel, *arrays: kernel(*arrays),
    implementation: AttentionKernel | None = None,
) -> Float[Array, "b T H V"]:
    """`softmax(scale · q kᵀ + mask) v`: a token at `positions` attends to its sequence slot's entries up to itself.

    `kv_b` is `[W_UK; W_UV]` of each head, so k = N + V; `lora` are the factors of its adapters, `[C, r]` and
    `[r, H, k]`. `slots_b` is the sequence slot of each batch element; None means all slots in order. `window` is the
    sliding window: of these entries the last so many; `selected_bTw` are those that an indexer has selected (DSA),
    whose keys are the last `index_width` columns of the cache. Positions at or beyond the cache capacity S mark padding
    and give arbitrary finite values. `constrain` is the sharding constraint of absorbed queries and values, where heads
    and slots are on different axes; `map_slots` runs a kernel on each device's slots. `implementation` is the attention
    kernel of the model's `KernelConfig`.
    """
    (B, T, H, A), S, Z = q_bTHA.shape, cache_LBSW.shape[2], cache_LBSW.shape[3] - index_width
    quantized = cache_LBSW.dtype == jnp.int8
    W, C = Z - SCALE_BYTES * quantized, kv_b_CHk.shape[0]
    N = A - (W - C)
    uk_CHN, uv_CHV = kv_b_CHk[:, :, :N], kv_b_CHk[:, :, N:]
    size = min(BLOCK, S)

    def read(start: Array | int, size: int) -> Array:
        """`[b, size, W]` of this layer."""
        entries = read_cache(cache_LBSW, layer, slots_b, (start, size), (0, Z))
        return dequantize(entries, C, q_bTHA.dtype) if quantized else entries.astype(q_bTHA.dtype)

    def visible(entry_s: Array) -> Array:
        """`[b, T, s]`: which entries each query attends to."""
        before_bTs = positions_bT[..., None] - entry_s
        ok_bTs = (before_bTs >= 0) if window is None else (before_bTs >= 0) & (before_bTs < window)
        return ok_bTs if selected_bTw is None else ok_bTs & selected_range(selected_bTw, entry_s[0], len(entry_s))

    def expand(entries_bsW: Array) -> tuple[Array, Array]:
        kv_bsHk = jnp.einsum("bsC,CHk->bsHk", entries_bsW[..., :C], kv_b_CHk)
        if lora is not None:
            z_bsr = keep_own(jnp.einsum("bsC,Cr->bsr", entries_bsW[..., :C], lora.a), lora.own_Nr)
            kv_bsHk += jnp.einsum("bsr,rHk->bsHk", z_bsr, lora.b)
        k_pe = jnp.broadcast_to(entries_bsW[:, :, None, C:], (*kv_bsHk.shape[:3], W - C))
        return jnp.concatenate([kv_bsHk[..., :N], k_pe], axis=-1), kv_bsHk[..., N:]

    if form == "reference":
        return masked_attention(q_bTHA, *expand(read(0, S)), visible(jnp.arange(S)), scale)
    if form == "expanded":
        q, V, equations = q_bTHA, uv_CHV.shape[2], ("bTHA,bsHA->bHTs", "bHTs,bsHV->bHTV")
    else:
        q_nope, q_pe = q_bTHA[..., :N], q_bTHA[..., N:]
        q_bTHC = jnp.einsum("bTHN,CHN->bTHC", q_nope, uk_CHN)
        if lora is not None:
            z_bTHr = keep_own(jnp.einsum("bTHN,rHN->bTHr", q_nope, lora.b[..., :N]), lora.own_Nr)
            q_bTHC += jnp.einsum("bTHr,Cr->bTHC", z_bTHr, lora.a)
        q_bTHW = jnp.concatenate([q_bTHC, q_pe], axis=-1)
        # The rotary key is weighted too and dropped later: cheaper than slicing the latent out of the entries.
        q_bTHW = constrain(q_bTHW)
        q, V, equations = jnp.moveaxis(q_bTHW, 2, 1), W, ("bHTW,bsW->bHTs", "bHTs,bsW->bHTW")

    def body(i: Array, sums: SoftmaxSums) -> SoftmaxSums:
        entries_bsW = read(i * size, size)
        k, v = expand(entries_bsW) if form == "expanded" else (entries_bsW, entries_bsW)
        score_bHTs = jnp.einsum(equations[0], q, k, preferred_element_type=jnp.float32)
        score_bHTs = jnp.where(visible(i * size + jnp.arange(size))[:, None], score_bHTs * scale, -1e30)
        return add_block(sums, score_bHTs, equations[1], v, q_bTHA.dtype)

    def blockwise() -> Array:
        """`[b, H, T, V]`, by a loop over blocks of the cache."""
        last = jnp.max(jnp.where(positions_bT < S, positions_bT, 0)) // size
        earliest = jnp.min(jnp.where(positions_bT < S, positions_bT, S)) - (S if window is None else window - 1)
        first = jnp.minimum(jnp.maximum(earliest, 0) // size, last)
        # The weights of masked entries vanish with the first real score, which every query has: of itself, or selected.
        _, sum_bHT, y_bHTV = jax.lax.fori_loop(first, last + 1, body, empty_sums(B, H, T, V))
        return y_bHTV / sum_bHT[..., None]

    if form == "expanded":
        return jnp.moveaxis(blockwise(), 1, 2).astype(q_bTHA.dtype)
    if has_latent_kernel(
        implementation, q_bTHA.dtype, cache_LBSW.dtype, latent=C, rotary=W - C, capacity=S,
        all_slots=slots_b is None, selected=selected_bTw is not None,
    ):  # fmt: skip
        kernel = partial(latent_attention, latent=C, scale=scale, window=window)
        y_bHTC = jnp.moveaxis(map_slots(kernel, q_bTHW, cache_LBSW, positions_bT, layer), 1, 2)
    else:
        y_bHTC = blockwise()[..., :C].astype(q_bTHA.dtype)
    y_bHTC = constrain(y_bHTC)
    y_bTHV = jnp.einsum("bHTC,CHV->bTHV", y_bHTC, uv_CHV)
    if lora is not None:
        z_bHTr = keep_own(jnp.einsum("bHTC,Cr->bHTr", y_bHTC, lora.a), lora.own_Nr)
        y_bTHV += jnp.einsum("bHTr,rHV->bTHV", z_bHTr, lora.b[..., N:])
    return y_bTHV
