"""Attention as a running softmax over blocks of keys (FlashAttention, arXiv 2205.14135, 2307.08691) in plain XLA.

Blocks of which no query sees a key are skipped, forward and backward. In the shapes, t and s are the queries and keys
of one block.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from mla_moe.ops.dropout import kept_scale
from mla_moe.ops.key_selection import selected_range
from mla_moe.ops.masking import Masking

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def block_size(T: int, divides: bool = False) -> int:
    """Queries, and keys, per block: 256, or 128 where 256 would leave much of a block empty. With `divides` it divides
    T: 256, 128, or the largest below 256 that does."""
    if T < 64:
        return T
    if divides:
        return next(n for n in (256, 128, *range(min(T, 255), 0, -1)) if T % n == 0)
    return 256 if T % 256 == 0 or T >= 1024 else 128


class Inputs(NamedTuple):
    """Inputs of blockwise attention, time padded to full blocks. In a group b sequences and h heads."""

    q_BHTA: Array
    k_BHSA: Array
    v_BHSV: Array
    query_segments_BT: Array
    key_segments_BS: Array
    dropout_rows_BHT: Array | None
    selected_BTW: Array | None = None
    """The keys that an indexer selects for each query (`ops.key_selection`); None: all."""


class BlockSpec(NamedTuple):
    """What is fixed at compile time."""

    scale: float
    size: int
    masking: Masking
    may_be_empty: bool
    """Whether a query may have no key: otherwise each attends to itself at least."""
    dropout_rate: float


def blockwise_attention(inputs: Inputs, blocks_n: Array, dropout_key: Array | None, spec: BlockSpec) -> Array:
    """`blocks_n` are this device's blocks of queries, counted along the sequence, in any order.

    Sequences b and heads h at a time: as many as keep a block's scores within 2 MB of CPU cache; several sequences
    only with all of their heads. With selected keys one sequence with all heads, so that they are not repeated."""
    B, H = inputs.q_BHTA.shape[:2]
    limit = max(2**19 // spec.size**2, 1)
    h = next(h for h in range(min(H, limit), 0, -1) if H % h == 0)
    b = next(b for b in range(max(min(B, limit // H), 1), 0, -1) if B % b == 0)
    selected_BTW = inputs.selected_BTW
    if selected_BTW is not None:
        h, b, selected_BTW = H, 1, selected_BTW[:, None]

    def split(x: Array) -> Array:
        """`[B, H, …]` to groups `[B/b · H/h, b, h, …]`; segments have no heads."""
        if x.ndim == 2:
            return jnp.repeat(x.reshape(B // b, b, -1), H // h, axis=0)
        return jnp.moveaxis(x.reshape(B // b, b, H // h, h, *x.shape[2:]), 2, 1).reshape(-1, b, h, *x.shape[2:])

    groups = jax.tree.map(split, inputs._replace(selected_BTW=None))._replace(selected_BTW=selected_BTW)
    y = jax.lax.map(lambda group: _blockwise(group, blocks_n, dropout_key, spec), groups)
    y = jnp.moveaxis(y.reshape(B // b, H // h, b, h, *y.shape[3:]), 1, 2)
    return y.reshape(B, H, *y.shape[4:])


SoftmaxSums = tuple[Array, Array, Array]
"""Running softmax: maximum of the scores and sum of the weights `[B, H, t]`, weighted values `[B, H, t, V]`."""


def empty_sums(B: int, H: int, t: int, V: int) -> SoftmaxSums:
    return jnp.full((B, H, t), -1e30), jnp.zeros((B, H, t)), jnp.zeros((B, H, t, V))


def add_block(
    sums: SoftmaxSums, score_BHts: Array, equation: str, v: Array, dtype: DTypeLike, dropped: Array | None = None
) -> SoftmaxSums:
    """Continue a running softmax with a block of keys. `equation` multiplies weights, cast to `dtype`, and values. The
    factors `dropped` are applied to the weights after the softmax."""
    max_BHt, sum_BHt, y_BHtV = sums
    new_max_BHt = jnp.maximum(max_BHt, score_BHts.max(axis=-1))
    weight_BHts = jnp.exp(score_BHts - new_max_BHt[..., None])
    rescale_BHt = jnp.exp(max_BHt - new_max_BHt)
    kept_BHts = weight_BHts if dropped is None else weight_BHts * dropped
    y_BHtV = y_BHtV * rescale_BHt[..., None] + _einsum(equation, kept_BHts.astype(dtype), v)
    return new_max_BHt, sum_BHt * rescale_BHt + weight_BHts.sum(axis=-1), y_BHtV


def _block(x: Array, i: Array, size: int, axis: int = 2) -> Array:
    """Block i of the time axis."""
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _stack(x_nBHtV: Array) -> Array:
    """n blocks to one time axis."""
    n, B, H, t, V = x_nBHtV.shape
    return jnp.moveaxis(x_nBHtV, 0, 2).reshape(B, H, n * t, V)


def _mask(inputs: Inputs, own: Array, i: Array, j: Array, spec: BlockSpec, keys_first: bool = False) -> Array:
    """−1e30 where a query of block i, counted over all S tokens, must not attend to a key of block j; `own` counts this
    device's queries. Finite, so that the running maximum stays finite over blocks that are fully masked. `[B, 1, t, s]`
    for all heads, or with `keys_first` `[B, 1, s, t]`; the barrier prevents XLA from computing it again for each."""
    of_queries, of_keys = (partial(jnp.expand_dims, axis=axis) for axis in ((-2, -1) if keys_first else (-1, -2)))
    index = jnp.arange(spec.size)
    visible_B__ = spec.masking.allowed(of_queries(i * spec.size + index), of_keys(j * spec.size + index))
    own_segments_Bt = _block(inputs.query_segments_BT, own, spec.size, 1)
    key_segments_Bs = _block(inputs.key_segments_BS, j, spec.size, 1)
    visible_B__ = visible_B__ & (of_queries(own_segments_Bt) == of_keys(key_segments_Bs))
    if inputs.selected_BTW is not None:
        selected_Bts = selected_range(_block(inputs.selected_BTW, own, spec.size, 1), j * spec.size, spec.size)
        visible_B__ &= jnp.swapaxes(selected_Bts, 1, 2) if keys_first else selected_Bts
    return jax.lax.optimization_barrier(jnp.where(visible_B__, 0.0, -1e30))[:, None]


def _dropout_scale(inputs: Inputs, dropout_key: Array, own: Array, j: Array, spec: BlockSpec) -> Array:
    """Factors of the weights `[B, H, t, s]` of a block of queries and a block of keys."""
    assert inputs.dropout_rows_BHT is not None
    rows_BHt = _block(inputs.dropout_rows_BHT, own, spec.size)
    return kept_scale(spec.dropout_rate, dropout_key, rows_BHt, j * spec.size, spec.size)


def _key_blocks(i: Array, blocks: int, spec: BlockSpec) -> tuple[Array | int, Array | int]:
    """The first block of keys that queries of block i attend to, and the one after the last."""
    (left, right), start = spec.masking.reach, i * spec.size
    first = 0 if left is None else jnp.maximum(start - left, 0) // spec.size
    last = blocks if right is None else jnp.minimum((start + spec.size - 1 + right) // spec.size + 1, blocks)
    return first, last


def _query_blocks(j: Array, blocks_n: Array, spec: BlockSpec) -> tuple[Array, Array]:
    """This device's blocks of queries in an order in which those that attend to keys of block j come first, and the
    number of these."""
    (left, right), start = spec.masking.reach, j * spec.size
    attends_n = jnp.ones(blocks_n.shape, bool)
    attends_n = attends_n if right is None else attends_n & (blocks_n >= (start - right) // spec.size)
    attends_n = attends_n if left is None else attends_n & (blocks_n <= (start + spec.size - 1 + left) // spec.size)
    return jnp.argsort(~attends_n, stable=True), attends_n.sum()


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blockwise(inputs: Inputs, blocks_n: Array, dropout_key: Array | None, spec: BlockSpec) -> Array:
    return _blockwise_forward(inputs, blocks_n, dropout_key, spec)[0]


Residuals = tuple[Inputs, Array, Array | None, Array, Array]


def _blockwise_forward(
    inputs: Inputs, blocks_n: Array, dropout_key: Array | None, spec: BlockSpec
) -> tuple[Array, Residuals]:
    q_BHTA, k_BHSA, v_BHSV, *_ = inputs
    (B, H, T, _), S, size = q_BHTA.shape, k_BHSA.shape[2], spec.size

    def query_block(own: Array) -> tuple[Array, Array]:
        q_BHtA, i = _block(q_BHTA, own, size), blocks_n[own]

        def key_block(j: Array, sums: SoftmaxSums) -> SoftmaxSums:
            score_BHts = _einsum("BHtA,BHsA->BHts", q_BHtA, _block(k_BHSA, j, size)) * spec.scale
            score_BHts += _mask(inputs, own, i, j, spec)
            dropped = None if dropout_key is None else _dropout_scale(inputs, dropout_key, own, j, spec)
            return add_block(sums, score_BHts, "BHts,BHsV->BHtV", _block(v_BHSV, j, size), v_BHSV.dtype, dropped)

        sums, (first, last) = empty_sums(B, H, size, v_BHSV.shape[3]), _key_blocks(i, S // size, spec)
        if spec.masking.causal:
            # The diagonal first: there every query sees itself, so the maximum is a real score from then on, or with
            # selected keys from a later block on, which takes the weight from masked keys before it.
            sums, last = key_block(i, sums), i
        max_BHt, sum_BHt, y_BHtV = jax.lax.fori_loop(first, last, key_block, sums)
        if spec.may_be_empty:  # the weights of masked keys are 1 if there is no real score, and 0 otherwise
            empty_BHt = max_BHt <= -1e29
            sum_BHt, y_BHtV = jnp.where(empty_BHt, 1.0, sum_BHt), jnp.where(empty_BHt[..., None], 0.0, y_BHtV)
            max_BHt = jnp.where(empty_BHt, 0.0, max_BHt)
        return (y_BHtV / sum_BHt[..., None]).astype(v_BHSV.dtype), max_BHt + jnp.log(sum_BHt)

    y_nBHtV, logsumexp_nBHt = jax.lax.map(query_block, jnp.arange(T // size))
    y_BHTV, logsumexp_BHT = _stack(y_nBHtV), _stack(logsumexp_nBHt[..., None])[..., 0]
    return y_BHTV, (inputs, blocks_n, dropout_key, y_BHTV, logsumexp_BHT)


def _blockwise_backward(spec: BlockSpec, residuals: Residuals, g_BHTV: Array) -> tuple[Inputs, None, None]:
    """Scores have the key axis before the query axis: then four of the five products are plain matmuls, and only the
    fifth, the queries' gradient, transposes the small keys. Contracting the row axis of both operands is half as fast
    on CPU."""
    inputs, blocks_n, dropout_key, y_BHTV, logsumexp_BHT = residuals
    q_BHTA, k_BHSA, v_BHSV, *_ = inputs
    (B, H, T, A), S, size = q_BHTA.shape, k_BHSA.shape[2], spec.size
    # Σ_s p_st · ∂p_st of the softmax's derivative (D in FlashAttention-2), which dropout does not change
    delta_BHT = jnp.sum(g_BHTV.astype(jnp.float32) * y_BHTV.astype(jnp.float32), axis=-1)

    def key_block(g_q_BHAT: Array, j: Array) -> tuple[Array, list[Array]]:
        """The gradient of key block j, and its contribution to the queries' gradient."""
        k_BHsA, v_BHsV = _block(k_BHSA, j, size), _block(v_BHSV, j, size)
        k_BHAs = jax.lax.optimization_barrier(jnp.swapaxes(k_BHsA, 2, 3))

        order_n, count = _query_blocks(j, blocks_n, spec)

        def query_block(n: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            g_q_BHAT, g_k_BHsA, g_v_BHsV = carry
            own = order_n[n]
            q_BHtA, g_BHtV = _block(q_BHTA, own, size), _block(g_BHTV, own, size)
            score_BHst = _einsum("BHsA,BHtA->BHst", k_BHsA, q_BHtA) * spec.scale
            score_BHst += _mask(inputs, own, blocks_n[own], j, spec, keys_first=True)
            weight_BHst = jnp.exp(score_BHst - _block(logsumexp_BHT, own, size)[:, :, None])
            g_weight_BHst = _einsum("BHsV,BHtV->BHst", v_BHsV, g_BHtV)
            kept_BHst = weight_BHst
            if dropout_key is not None:
                dropped_BHst = jnp.swapaxes(_dropout_scale(inputs, dropout_key, own, j, spec), 2, 3)
                kept_BHst, g_weight_BHst = weight_BHst * dropped_BHst, g_weight_BHst * dropped_BHst
            g_score_BHst = weight_BHst * (g_weight_BHst - _block(delta_BHT, own, size)[:, :, None]) * spec.scale
            g_score_BHst = g_score_BHst.astype(k_BHsA.dtype)
            g_k_BHsA += _einsum("BHst,BHtA->BHsA", g_score_BHst, q_BHtA)
            g_v_BHsV += _einsum("BHst,BHtV->BHsV", kept_BHst.astype(g_BHtV.dtype), g_BHtV)
            g_q_BHAt = _block(g_q_BHAT, own, size, 3) + _einsum("BHAs,BHst->BHAt", k_BHAs, g_score_BHst)
            return jax.lax.dynamic_update_slice_in_dim(g_q_BHAT, g_q_BHAt, own * size, 3), g_k_BHsA, g_v_BHsV

        zeros = jnp.zeros(k_BHsA.shape, jnp.float32), jnp.zeros(v_BHsV.shape, jnp.float32)
        g_q_BHAT, *g_kv = jax.lax.fori_loop(0, count, query_block, (g_q_BHAT, *zeros))
        return g_q_BHAT, g_kv

    zeros_BHAT = jnp.zeros((B, H, A, T), jnp.float32)
    g_q_BHAT, (g_k_nBHsA, g_v_nBHsV) = jax.lax.scan(key_block, zeros_BHAT, jnp.arange(S // size))
    g_q_BHTA, g_k, g_v = jnp.swapaxes(g_q_BHAT, 2, 3), _stack(g_k_nBHsA), _stack(g_v_nBHsV)
    g_q, g_k, g_v = (g.astype(x.dtype) for g, x in zip((g_q_BHTA, g_k, g_v), inputs[:3], strict=True))
    others: dict[str, Any] = dict.fromkeys(("query_segments_BT", "key_segments_BS", "dropout_rows_BHT", "selected_BTW"))
    return inputs._replace(q_BHTA=g_q, k_BHSA=g_k, v_BHSV=g_v, **others), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
