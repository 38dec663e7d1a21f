"""Keys that an indexer selects for each query (DeepSeek Sparse Attention, DSA; DeepSeek-V3.2, section 2.1).

The score of key s for query t is `Σ_h w_th · relu(q_th · k_s)` over the heads of the indexer. It is computed in blocks
of queries and keys, and what is kept of it is one bit: no array has a number for each query and key.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from mla_moe.ops.masking import CAUSAL, Masking

SelectedKeys = UInt32[Array, "B T W"]
"""One bit for each query and key: key s is bit s % 32 of word s // 32."""

QUERY_BLOCK = 128
KEY_BLOCK = 256
WORD_BITS = 32


def selected_words(num_keys: int) -> int:
    """The words of each query in `SelectedKeys`. Keys are padded to full blocks."""
    return -(-(num_keys + -num_keys % min(KEY_BLOCK, num_keys)) // WORD_BITS)


def select_keys(
    q_BTHI: Float[Array, "B T H I"],
    weight_BTH: Float[Array, "B T H"],
    keys: Callable[[Array, int], Array],
    index_BT: Int[Array, "B T"],
    *,
    num_keys: int,
    topk: int,
    masking: Masking = CAUSAL,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> SelectedKeys:
    """The `topk` visible keys of each query with the highest scores, of equal ones the first; all if there are fewer.

    `keys(start, size)` gives the keys `[B, size, I]`, of which there are `num_keys`, a multiple of `KEY_BLOCK` or less
    than it. `index_BT` is each query's index among the keys, from which `masking`, which is causal, tells what it sees,
    beside equal `segments` of queries and keys. An index beyond the keys is padding, and its keys are arbitrary. Not
    differentiable: no gradient of the output reaches an indexer.
    """
    (B, T), size = q_BTHI.shape[:2], min(KEY_BLOCK, num_keys)
    t = min(QUERY_BLOCK, T)
    words = selected_words(num_keys)
    query_segments_BT, key_segments_BS = segments or (index_BT, None)

    def split(x: Array) -> Array:
        """`[B, T, …]` to blocks `[n, B, t, …]`."""
        padded = jnp.pad(x, ((0, 0), (0, -T % t), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(B, -1, t, *x.shape[2:]), 1, 0)

    def query_block(block: tuple[Array, Array, Array, Array]) -> Array:
        q_BtHI, weight_BtH, index_Bt, segments_Bt = block

        def key_block(j: Array, score_BtS: Array) -> Array:
            start = j * size
            key_s = start + jnp.arange(size, dtype=index_Bt.dtype)
            product = jnp.einsum("BtHI,BsI->BtHs", q_BtHI, keys(start, size), preferred_element_type=jnp.float32)
            score_Bts = (jax.nn.relu(product) * weight_BtH[..., None]).sum(axis=2)
            visible_Bts = masking.allowed(index_Bt[..., None], key_s)
            if key_segments_BS is not None:
                own_Bs = jax.lax.dynamic_slice_in_dim(key_segments_BS, start, size, 1)
                visible_Bts &= segments_Bt[:, :, None] == own_Bs[:, None, :]
            score_Bts = jnp.where(visible_Bts, score_Bts, -jnp.inf)
            return jax.lax.dynamic_update_slice_in_dim(score_BtS, score_Bts, start, 2)

        last = jnp.max(jnp.where(index_Bt < num_keys, index_Bt, 0)) // size
        none_BtS = jnp.full((B, t, words * WORD_BITS), -jnp.inf, jnp.float32)
        score_BtS = jax.lax.fori_loop(jnp.zeros_like(last), last + 1, key_block, none_BtS)
        return _pack(_highest(score_BtS, min(topk, num_keys)) & (score_BtS > -jnp.inf))

    blocks = split(q_BTHI), split(weight_BTH.astype(jnp.float32)), split(index_BT), split(query_segments_BT)
    selected_nBtW = jax.lax.map(query_block, blocks)
    return jnp.moveaxis(selected_nBtW, 0, 1).reshape(B, -1, words)[:, :T]


def _highest(score_BtS: Array, count: int) -> Array:
    """Which are the `count` highest, of equal scores the first. Scores that relu cut off are equal."""
    lowest_Bt1 = jax.lax.top_k(score_BtS, count)[0][..., -1:]
    above_BtS, equal_BtS = score_BtS > lowest_Bt1, score_BtS == lowest_Bt1
    left_Bt1 = count - above_BtS.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return above_BtS | (equal_BtS & (jnp.cumsum(equal_BtS, axis=-1, dtype=jnp.int32) <= left_Bt1))


def _pack(bits_BtS: Array) -> Array:
    bits_BtWb = bits_BtS.reshape(*bits_BtS.shape[:2], -1, WORD_BITS).astype(jnp.uint32)
    return (bits_BtWb << jnp.arange(WORD_BITS, dtype=jnp.uint32)).sum(axis=-1, dtype=jnp.uint32)


def selected_range(selected_BTW: SelectedKeys, start: Int[Array, ""] | int, size: int) -> Bool[Array, "B T s"]:
    """Which of the keys from `start` on are selected; what follows the last word is arbitrary."""
    key_s = start + jnp.arange(size, dtype=jnp.int32)
    words_BTs = jnp.take(selected_BTW, key_s // WORD_BITS, axis=2, mode="clip")
    return ((words_BTs >> (key_s % WORD_BITS).astype(jnp.uint32)) & jnp.uint32(1)) != 0
