"""Attention over packed sequences, causal or not, with keys wider than values (MLA: 192 and 128).

One function, five implementations:
- `reference`: materialises all scores. The oracle of the tests.
- `blockwise`: FlashAttention (arXiv 2205.14135, 2307.08691) in plain XLA, for any platform: a running softmax over
  blocks of keys. Memory grows with T, not T², forward and backward, and blocks above the diagonal are skipped.
- `splash`: JAX's Pallas kernel for TPU (`ops.splash_kernel`).
- `tokamax`: tokamax's kernels for NVIDIA GPUs (`ops.tokamax_kernels`).
- `cudnn`: cuDNN's kernel for GPU. It requires equal key and value widths, so values are padded.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_moe.config.parallelism import AttentionKernel
from mla_moe.ops.blockwise_attention import BlockSpec, Inputs, block_size, blockwise_attention
from mla_moe.ops.dropout import Dropout, kept_scale
from mla_moe.ops.kernel_choice import log_fallback, supported_attention_kernel
from mla_moe.ops.key_selection import SelectedKeys, selected_range
from mla_moe.ops.masking import CAUSAL, Masking, attention_mask

_JaxKernel = Literal["cudnn", "xla"]


def attention(
    q_BTHA: Float[Array, "B T H A"],
    k_BSHA: Float[Array, "B S H A"],
    v_BSHV: Float[Array, "B S H V"],
    segment_ids_BS: Int[Array, "B S"] | None,
    *,
    scale: float,
    masking: Masking = CAUSAL,
    query_segment_ids_BT: Int[Array, "B T"] | None = None,
    query_starts_P: Int[Array, "P"] | None = None,
    dropout: Dropout | None = None,
    selected_BTW: SelectedKeys | None = None,
    implementation: AttentionKernel | None = None,
) -> Float[Array, "B T H V"]:
    """`softmax(scale · q kᵀ + mask) v`, softmax in float32 (DeepSeek-V2, equations 9-11 and 17-18).

    Token t attends to token s if `masking` allows it and both have the same segment id; without `segment_ids_BS` a
    sequence is one segment. The tokens of a segment must be adjacent, as packed documents are. `query_starts_P` is for
    context parallelism, where a device has T of the S tokens as queries, in P chunks of T / P adjacent tokens: the
    indices of the first token of each, in any order, multiples of T / P.

    `query_segment_ids_BT`: queries have segment ids of their own, because they are of another sequence (cross
    attention; then nothing is causal or windowed) or because some keys are padding, whose segment id no query has. A
    query without any key gives 0. `dropout` is applied to the weights. `selected_BTW` are the keys that an indexer has
    selected among those (DSA), at least one for each query that has any. A kernel that does not support the inputs is
    replaced by `blockwise`, which is logged once.
    """
    B, S = k_BSHA.shape[:2]
    T = q_BTHA.shape[1]
    if segment_ids_BS is None:
        segment_ids_BS = jnp.zeros((B, S), jnp.int32)
    own_segments = query_segment_ids_BT is not None
    implementation = supported_attention_kernel(
        implementation, q_BTHA.dtype, queries=T, tokens=S, widths=(q_BTHA.shape[3], v_BSHV.shape[3]),
        keys_in_ranges=not own_segments, dropout=dropout is not None, selected=selected_BTW is not None,
    )  # fmt: skip
    index_T = chunk = None
    if query_starts_P is not None:
        chunk = T // len(query_starts_P)
        index_T = (query_starts_P[:, None] + jnp.arange(chunk, dtype=jnp.int32)).reshape(T)
    if query_segment_ids_BT is None:
        query_segment_ids_BT = segment_ids_BS if index_T is None else segment_ids_BS[:, index_T]
    segments = query_segment_ids_BT, segment_ids_BS
    if implementation == "reference":
        mask_BTS = attention_mask(*segments, masking, index_T)
        if selected_BTW is not None:
            mask_BTS &= selected_range(selected_BTW, 0, S)
        return masked_attention(q_BTHA, k_BSHA, v_BSHV, mask_BTS, scale, dropout)
    if implementation == "splash":
        from mla_moe.ops.splash_kernel import splash_attention

        return splash_attention(q_BTHA, k_BSHA, v_BSHV, segments, index_T, scale, masking, chunk)
    if implementation == "tokamax":
        from mla_moe.ops.tokamax_kernels import flash_attention

        return flash_attention(q_BTHA, k_BSHA, v_BSHV, segment_ids_BS, index_T, scale, masking)
    if implementation == "cudnn":
        try:
            mask_BTS = attention_mask(*segments, masking, index_T)
            return dot_product(q_BTHA, k_BSHA, v_BSHV, mask_BTS, scale, "cudnn")
        except (NotImplementedError, RuntimeError) as reason:  # unsupported width, dtype or device
            log_fallback("attention", "cudnn", "blockwise", str(reason))
    # With heads before time, every product is a plain batched matmul.
    size = block_size(max(T, S)) if chunk is None else block_size(chunk, divides=True)
    q, k, v = (_pad_to(jnp.moveaxis(x, 2, 1), size, 2) for x in (q_BTHA, k_BSHA, v_BSHV))
    no_segment = jnp.iinfo(segment_ids_BS.dtype).min  # so that no query attends to keys that pad a block
    q_segments, k_segments = (_pad_to(x, size, 1, no_segment) for x in segments)
    rows = None if dropout is None else _pad_to(dropout.rows_BHT, size, 2)
    spec = BlockSpec(scale, size, masking, own_segments, 0.0 if dropout is None else dropout.rate)
    selected = None if selected_BTW is None else _pad_to(selected_BTW, size, 1)
    inputs = Inputs(q, k, v, q_segments, k_segments, rows, selected)
    blocks_n = jnp.arange(q.shape[2] // size, dtype=jnp.int32) if index_T is None else index_T[::size] // size
    y_BHTV = blockwise_attention(inputs, blocks_n, None if dropout is None else dropout.key_2, spec)
    return jnp.moveaxis(y_BHTV[:, :, :T], 1, 2)


def _pad_to(x: Array, size: int, axis: int, value: int = 0) -> Array:
    """Pad an axis to a multiple of `size`."""
    padding = [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, padding, constant_values=value)


def masked_attention(
    q_BTHA: Array, k_BSHA: Array, v_BSHV: Array, mask_BTS: Array, scale: float, dropout: Dropout | None = None
) -> Array:
    """With all scores at once: the oracle of the tests. A query without keys gives 0."""
    score_BHTS = jnp.einsum("BTHA,BSHA->BHTS", q_BTHA, k_BSHA, preferred_element_type=jnp.float32) * scale
    weight_BHTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], score_BHTS, -1e30), axis=-1)
    weight_BHTS = jnp.where(mask_BTS[:, None], weight_BHTS, 0.0)
    if dropout is not None:
        weight_BHTS *= kept_scale(*dropout, first_key=0, keys=k_BSHA.shape[1])
    return jnp.einsum("BHTS,BSHV->BTHV", weight_BHTS.astype(v_BSHV.dtype), v_BSHV)


def dot_product(
    q_BTHA: Array, k_BSHA: Array, v_BSHV: Array, mask_BTS: Array, scale: float, kernel: _JaxKernel
) -> Array:
    """`jax.nn.dot_product_attention`, with values padded to the keys' width. A query without keys gives 0."""
    A, V = q_BTHA.shape[3], v_BSHV.shape[3]
    v_BSHA = jnp.pad(v_BSHV, ((0, 0), (0, 0), (0, 0), (0, A - V)))
    y_BTHA = jax.nn.dot_product_attention(
        q_BTHA, k_BSHA, v_BSHA, mask=mask_BTS[:, None], scale=scale, implementation=kernel
    )
    return jnp.where(mask_BTS.any(axis=-1)[..., None, None], y_BTHA[..., :V], 0)
