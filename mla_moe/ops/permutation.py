"""Move tokens to their experts and back, by gathers alone in both directions.

A token chooses K experts, so N tokens make N·K rows. Rows are sorted by expert into one buffer in which each expert's
part begins at a multiple of `block`; the grouped matmul then never has two experts in one block. No row is dropped:
the buffer holds the worst case, N·K + E·(block − 1) rows rounded up.

The derivative of a gather is a scatter-add, which is slow on every platform. Here both gathers know each other's
indices, so each one's derivative is again a gather. Rows are weighed before they come back, where padding gets 0.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

FEW = 2048
"""The rows of so many choices may stand side by side, as those of a decode step do."""


class Permutation(NamedTuple):
    """Where every row goes. `R` is the number of rows in the buffer, padding included."""

    row_NK: Int[Array, "N K"]
    """The row of the buffer that holds a token's k-th choice; one behind the buffer for nobody's."""
    token_R: Int[Array, "R"]
    """The token in each row; 0 where the row is padding."""
    filled_R: Bool[Array, "R"]
    """False where the row is padding."""
    group_sizes_E: Int[Array, "E"]
    """Rows of each expert, rounded up to whole blocks. Their sum is at most R."""


def permutation(experts_NK: Int[Array, "N K"], num_experts: int, block: int, most: int | None = None) -> Permutation:
    """Sort the rows by expert, each expert's part a whole number of blocks.

    A choice of `num_experts` is nobody's: it takes no row. `most` bounds the choices that are somebody's.
    """
    N, K = experts_NK.shape
    rows = N * K
    most = rows if most is None else min(most, rows)
    R = -(-most // block) * block + min(num_experts, most) * block * (block > 1)
    expert_R = experts_NK.reshape(rows)
    chosen_RE = expert_R[:, None] == jnp.arange(num_experts)
    padded_E = -(-chosen_RE.sum(axis=0, dtype=jnp.int32) // block) * block
    start_E = jnp.cumsum(padded_E) - padded_E
    place_R = jnp.sum(jnp.where(chosen_RE, running_sum(chosen_RE) + start_E, 0), axis=1)
    number_R = jnp.arange(rows, dtype=jnp.int32)
    target = jnp.where(expert_R < num_experts, place_R, R + number_R)
    token_R = jnp.zeros(R, jnp.int32).at[target].set(number_R // K, unique_indices=True, mode="drop")
    filled_R = jnp.zeros(R, bool).at[target].set(True, unique_indices=True, mode="drop")
    return Permutation(target.reshape(N, K), token_R, filled_R, padded_E)


def running_sum(x: Num[Array, "R *more"] | Bool[Array, "R *more"]) -> Int[Array, "R *more"]:
    """What the rows before each one add up to: whole numbers that float32 holds.

    By products with a triangle, 128 rows at a time: sorting to the same end takes TPUs' compiler 40 seconds each time,
    and `cumsum` 15.
    """
    R, more, size = x.shape[0], x.shape[1:], 128
    x_bsX = jnp.pad(x.astype(jnp.float32).reshape(R, -1), ((0, -R % size), (0, 0))).reshape(-1, size, math.prod(more))
    before_st = jnp.tri(size, k=-1)
    within_bsX = jnp.einsum("st,btX->bsX", before_st, x_bsX, precision="highest")
    blocks = len(x_bsX)
    start_bX = jnp.einsum("bc,cX->bX", jnp.tri(blocks, k=-1), x_bsX.sum(axis=1), precision="highest")
    return (within_bsX + start_bX[:, None]).astype(jnp.int32).reshape(-1, *more)[:R]


@jax.custom_vjp
def permute(x_ND: Float[Array, "N D"], p: Permutation) -> Float[Array, "R D"]:
    """Copy each token into the rows of its experts. Padding rows hold some token; nobody reads what becomes of them."""
    return x_ND[p.token_R]


def _permute_forward(x_ND, p):
    return permute(x_ND, p), p


def _permute_backward(p, g_RD):
    return _sum_choices(g_RD, p), None


permute.defvjp(_permute_forward, _permute_backward)


def weights_by_row(weight_NK: Float[Array, "N K"], p: Permutation) -> Float[Array, "R"]:
    """The weight of each row, 0 where it is padding."""
    return jnp.zeros(len(p.token_R), weight_NK.dtype).at[p.row_NK].set(weight_NK, unique_indices=True, mode="drop")


@jax.custom_vjp
def unpermute(y_RD: Float[Array, "R D"], p: Permutation) -> Float[Array, "N D"]:
    """Add up each token's K rows: `Σ_k y[row[n, k]]`. The derivative gives padding rows that of some token: what they
    came from must have been multiplied by 0."""
    return _sum_choices(y_RD, p)


def _unpermute_forward(y_RD, p):
    return unpermute(y_RD, p), p


def _unpermute_backward(p, g_ND):
    return g_ND[p.token_R], None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _sum_choices(y_RD, p: Permutation):
    """Sum of a token's rows, one choice at a time: K·N·D values never stand side by side. Where most choices are
    nobody's, the few rows are added to their tokens instead."""
    N, K = p.row_NK.shape
    total = jnp.zeros((N, y_RD.shape[1]), jnp.float32)
    if 2 * len(y_RD) < N * K:
        token_R = jnp.where(p.filled_R, p.token_R, N)
        return total.at[token_R].add(y_RD.astype(jnp.float32), mode="drop").astype(y_RD.dtype)

    if N * K <= FEW:
        y_NKD = y_RD.at[p.row_NK].get(mode="fill", fill_value=0)
        return y_NKD.astype(jnp.float32).sum(axis=1).astype(y_RD.dtype)

    def add(k, total):
        row_N = jax.lax.dynamic_index_in_dim(p.row_NK, k, 1, keepdims=False)
        return total + y_RD.at[row_N].get(mode="fill", fill_value=0).astype(jnp.float32)

    return jax.lax.fori_loop(0, K, add, total).astype(y_RD.dtype)
