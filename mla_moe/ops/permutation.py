"""Permute tokens to expert-sorted rows on one device and back, with gathers in both directions.

N tokens with K experts each make N·K (token, expert) pairs, one row per pair. Rows are sorted by expert into one buffer
in which each expert's rows start at a multiple of `block`, so that no block of the grouped matmul has two experts.
Dropless: the buffer has room for the worst case, N·K + E·(block − 1) rows rounded up.

The derivative of a gather is a scatter-add, which is slow on every platform. Here each of the two gathers knows the
other's indices, so its derivative is a gather as well. Rows are weighted before `unpermute`, padding rows with 0.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from mla_moe.ops.kernel_choice import target_platform

MAX_PAIRS_AT_ONCE = 2048
"""Up to this many pairs, as in a decode step, `[N, K, D]` is materialised."""


class Permutation(NamedTuple):
    """The row of each (token, expert) pair. `R` is the number of rows in the buffer, padding included."""

    row_NK: Int[Array, "N K"]
    """The row of a token's k-th expert; beyond the buffer for an unassigned pair."""
    token_R: Int[Array, "R"]
    """The token of each row; 0 for padding."""
    filled_R: Bool[Array, "R"]
    """False for padding."""
    group_sizes_E: Int[Array, "E"]
    """Rows per expert, rounded up to full blocks. Their sum is at most R."""


def permutation(
    experts_NK: Int[Array, "N K"], num_experts: int, block: int, max_pairs: int | None = None
) -> Permutation:
    """Sort (token, expert) pairs by expert; each expert gets a number of full blocks.

    A pair with the expert `num_experts` is unassigned: it gets no row. At most `max_pairs` pairs may be assigned.
    """
    N, K = experts_NK.shape
    pairs = N * K
    max_pairs = pairs if max_pairs is None else min(max_pairs, pairs)
    R = -(-max_pairs // block) * block + min(num_experts, max_pairs) * block * (block > 1)
    expert_P = experts_NK.reshape(pairs)
    one_hot_PE = expert_P[:, None] == jnp.arange(num_experts)
    padded_E = -(-one_hot_PE.sum(axis=0, dtype=jnp.int32) // block) * block
    start_E = jnp.cumsum(padded_E) - padded_E
    row_P = jnp.sum(jnp.where(one_hot_PE, exclusive_cumsum(one_hot_PE) + start_E, 0), axis=1)
    pair_P = jnp.arange(pairs, dtype=jnp.int32)
    row_P = jnp.where(expert_P < num_experts, row_P, R + pair_P)
    token_R = jnp.zeros(R, jnp.int32).at[row_P].set(pair_P // K, unique_indices=True, mode="drop")
    filled_R = jnp.zeros(R, bool).at[row_P].set(True, unique_indices=True, mode="drop")
    return Permutation(row_P.reshape(N, K), token_R, filled_R, padded_E)


def exclusive_cumsum(x: Num[Array, "R *more"] | Bool[Array, "R *more"]) -> Int[Array, "R *more"]:
    """The sum of all earlier rows, for integers that float32 represents exactly.

    Computed as products with a triangular matrix, 128 rows at a time: the TPU compiler takes 40 seconds for a sort to
    the same end, and 15 for `cumsum`, each time.
    """
    R, more, size = x.shape[0], x.shape[1:], 128
    x_bsX = jnp.pad(x.astype(jnp.float32).reshape(R, -1), ((0, -R % size), (0, 0))).reshape(-1, size, math.prod(more))
    earlier_st = jnp.tri(size, k=-1)
    within_bsX = jnp.einsum("st,btX->bsX", earlier_st, x_bsX, precision="highest")
    blocks = len(x_bsX)
    start_bX = jnp.einsum("bc,cX->bX", jnp.tri(blocks, k=-1), x_bsX.sum(axis=1), precision="highest")
    return (within_bsX + start_bX[:, None]).astype(jnp.int32).reshape(-1, *more)[:R]


@jax.custom_vjp
def permute(x_ND: Float[Array, "N D"], p: Permutation) -> Float[Array, "R D"]:
    """Copy each token to the rows of its experts. Padding rows hold token 0; their results must not be used."""
    return x_ND[p.token_R]


def _permute_forward(x_ND: Array, p: Permutation) -> tuple[Array, Permutation]:
    return permute(x_ND, p), p


def _permute_backward(p: Permutation, g_RD: Array) -> tuple[Array, None]:
    return _sum_rows(g_RD, p), None


permute.defvjp(_permute_forward, _permute_backward)


def weights_by_row(weight_NK: Float[Array, "N K"], p: Permutation) -> Float[Array, "R"]:
    """The weight of each row, 0 for padding."""
    return jnp.zeros(len(p.token_R), weight_NK.dtype).at[p.row_NK].set(weight_NK, unique_indices=True, mode="drop")


@jax.custom_vjp
def unpermute(y_RD: Float[Array, "R D"], p: Permutation) -> Float[Array, "N D"]:
    """Sum the rows of each token: `Σ_k y[row[n, k]]`. The gradient of padding rows is that of token 0, not 0: the rows
    must come from a product with `weights_by_row`, whose derivative multiplies it by 0."""
    return _sum_rows(y_RD, p)


def _unpermute_forward(y_RD: Array, p: Permutation) -> tuple[Array, Permutation]:
    return unpermute(y_RD, p), p


def _unpermute_backward(p: Permutation, g_ND: Array) -> tuple[Array, None]:
    return g_ND[p.token_R], None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _sum_rows(y_RD: Array, p: Permutation) -> Array:
    """Sum each token's rows, one k at a time: `[N, K, D]` is not materialised. If most pairs are unassigned, the few
    rows are scatter-added to their tokens instead. XLA:GPU fuses all K gathers and their sum into one kernel."""
    N, K = p.row_NK.shape
    if target_platform() == "gpu":
        gathered = (y_RD.at[p.row_NK[:, k]].get(mode="fill", fill_value=0).astype(jnp.float32) for k in range(K))
        return sum(gathered, jnp.float32(0)).astype(y_RD.dtype)
    total = jnp.zeros((N, y_RD.shape[1]), jnp.float32)
    if 2 * len(y_RD) < N * K:
        token_R = jnp.where(p.filled_R, p.token_R, N)
        return total.at[token_R].add(y_RD.astype(jnp.float32), mode="drop").astype(y_RD.dtype)

    if N * K <= MAX_PAIRS_AT_ONCE:
        y_NKD = y_RD.at[p.row_NK].get(mode="fill", fill_value=0)
        return y_NKD.astype(jnp.float32).sum(axis=1).astype(y_RD.dtype)

    def add(k: Array, total: Array) -> Array:
        row_N = jax.lax.dynamic_index_in_dim(p.row_NK, k, 1, keepdims=False)
        return total + y_RD.at[row_N].get(mode="fill", fill_value=0).astype(jnp.float32)

    return jax.lax.fori_loop(0, K, add, total).astype(y_RD.dtype)
