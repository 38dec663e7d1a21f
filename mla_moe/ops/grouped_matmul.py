"""Grouped matmul: `y[r] = x[r] @ w[expert of r]`, with rows sorted by expert.

One function, five implementations:
- `reference`: every expert on every row, masked. The oracle of the tests; E times the work.
- `blocks`, `chunks`: a batched matmul over blocks of rows, one expert per block, in plain XLA. `blocks` computes all
  blocks at once: GPU without tokamax. `chunks` computes a few per iteration of a loop, so that their rows and matrices
  fit the CPU's cache, and skips the unused end of the buffer, up to a third of it: CPU.
- `ragged`: `jax.lax.ragged_dot`. XLA has a TPU kernel for it, but expands the weights' gradient to `reference`'s work;
  on other platforms it expands everything.
- `megablox`: JAX's Pallas kernels for TPU, without extra work in either direction.
- `tokamax`: tokamax's kernels for NVIDIA GPUs (`ops.tokamax_kernels`).
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_moe.config.parallelism import GroupedMatmulKernel
from mla_moe.ops.kernel_choice import supported_grouped_matmul_kernel
from mla_moe.ops.materialize import materialize

BLOCKS_PER_CHUNK = 8


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_GDF: Float[Array, "G D F"],
    group_sizes_E: Int[Array, "E"],
    group_offset: Int[Array, ""] | None = None,
    *,
    block: int,
    implementation: GroupedMatmulKernel | None = None,
) -> Float[Array, "R F"]:
    """`y[r] = x[r] @ w[e]` for the rows r of group e; groups are contiguous and start at row 0.

    `group_sizes_E` and R are multiples of `block`; raises `ValueError` if R is not. Rows behind the last group give
    arbitrary values. With `group_offset` the groups use E of the G matrices, from that index on.
    """
    implementation = supported_grouped_matmul_kernel(implementation, x_RD.dtype)
    if implementation in ("megablox", "tokamax"):
        sizes_G = group_sizes_E
        if group_offset is not None:
            empty_G = jnp.zeros(len(w_GDF), group_sizes_E.dtype)
            sizes_G = jax.lax.dynamic_update_slice(empty_G, group_sizes_E, (group_offset,))
        if implementation == "megablox":
            return _megablox(x_RD, w_GDF, sizes_G, block)
        from mla_moe.ops.tokamax_kernels import ragged_dot

        return ragged_dot(x_RD, w_GDF, sizes_G)
    if implementation in ("blocks", "chunks"):
        if x_RD.shape[0] % block:
            raise ValueError(f"rows = {x_RD.shape[0]}: must be a multiple of block = {block}")
        num_blocks = x_RD.shape[0] // block
        end_E = jnp.cumsum(group_sizes_E) // block
        expert_b = jnp.minimum(jnp.searchsorted(end_E, jnp.arange(num_blocks), side="right"), len(end_E) - 1)
        expert_b = expert_b if group_offset is None else expert_b + group_offset
        chunk = min(BLOCKS_PER_CHUNK, num_blocks) if implementation == "chunks" else num_blocks
        return _by_block(x_RD, w_GDF, expert_b, group_sizes_E.sum() // block, chunk)
    if group_offset is not None:
        w_GDF = jax.lax.dynamic_slice_in_dim(w_GDF, group_offset, len(group_sizes_E))
    return (_reference if implementation == "reference" else jax.lax.ragged_dot)(x_RD, w_GDF, group_sizes_E)


def _reference(x_RD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    R = x_RD.shape[0]
    expert_R = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(R), side="right")
    one_hot_RE = jax.nn.one_hot(expert_R, w_EDF.shape[0], dtype=x_RD.dtype)
    return jnp.einsum("RD,EDF,RE->RF", x_RD, w_EDF, one_hot_RE)


def _megablox(x_RD: Array, w_EDF: Array, group_sizes_E: Array, block: int) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    R = len(x_RD)
    x_RD = jnp.pad(x_RD, ((0, -R % 128), (0, 0)))  # the kernel needs full tiles
    # Tiles need 128 rows; a tile of `block` rows has a single expert.
    rows = next(size for size in (block, 512, 256, 128) if size >= 128 and len(x_RD) % size == 0)
    tiling: Any = _tiling(rows)  # `gmm` accepts a function, though its annotation says tuple
    return gmm(x_RD, w_EDF, group_sizes_E.astype(jnp.int32), x_RD.dtype, tiling)[:R]


@functools.cache
def _tiling(rows: int) -> Callable[[int, int, int], tuple[int, int, int]]:
    """A function of each product's sizes, which differ between forward and backward."""
    return lambda _, depth, width: (rows, min(depth, 1024), min(width, 1024))


def _over_chunks(body: Callable[..., Array], chunk: int, used: Array, num_blocks: int, carry: Array) -> Array:
    """`body(first_new, start, carry)` for each chunk of blocks from `start` on. The last chunk is shifted to end within
    the buffer; its blocks before `first_new` are already done."""
    if chunk == num_blocks:
        return body(0, 0, carry)

    def step(i: Array, carry: Array) -> Array:
        return body(i * chunk, jnp.minimum(i * chunk, num_blocks - chunk), carry)

    return jax.lax.fori_loop(0, -(-used // chunk), step, carry)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_block(x_RD: Array, w_EDF: Array, expert_b: Array, used: Array, chunk: int) -> Array:
    """Multiply block i by `w[expert_b[i]]`, `chunk` blocks at a time; `chunk = len(expert_b)` is without a loop. A loop
    stops after the first `used` blocks."""
    b = len(expert_b)
    blocks = partial(jax.lax.dynamic_slice_in_dim, slice_size=chunk)
    x_bmD = x_RD.reshape(b, -1, x_RD.shape[1])

    def body(_: Array | int, start: Array | int, y_bmF: Array) -> Array:
        y_cmF = jnp.einsum("cmD,cDF->cmF", blocks(x_bmD, start), w_EDF[blocks(expert_b, start)])
        return jax.lax.dynamic_update_slice_in_dim(y_bmF, y_cmF, start, 0)

    y_bmF = jnp.zeros((*x_bmD.shape[:2], w_EDF.shape[2]), jnp.result_type(x_RD, w_EDF))
    return _over_chunks(body, chunk, used, b, y_bmF).reshape(len(x_RD), -1)


def _by_block_forward(
    x_RD: Array, w_EDF: Array, expert_b: Array, used: Array, chunk: int
) -> tuple[Array, tuple[Array, ...]]:
    return _by_block(x_RD, w_EDF, expert_b, used, chunk), (x_RD, w_EDF, expert_b, used)


def _by_block_backward(chunk: int, residuals: tuple[Array, ...], g_RF: Array) -> tuple[Array | None, ...]:
    x_RD, w_EDF, expert_b, used = residuals
    E, D, F = w_EDF.shape
    b = len(expert_b)
    blocks = partial(jax.lax.dynamic_slice_in_dim, slice_size=chunk)
    x_bmD, g_bmF = x_RD.reshape(b, -1, D), g_RF.reshape(b, -1, F)

    def body(first_new: Array | int, start: Array | int, gw_EDF: Array) -> Array:
        gw_cDF = jnp.einsum("cmD,cmF->cDF", blocks(x_bmD, start), blocks(g_bmF, start))
        done_c = start + jnp.arange(chunk) < first_new
        return gw_EDF.at[jnp.where(done_c, E, blocks(expert_b, start))].add(gw_cDF, mode="drop")

    gw_EDF = _over_chunks(body, chunk, used, b, jnp.zeros(w_EDF.shape, jnp.result_type(x_RD, g_RF)))
    gx_RD = _by_block(g_RF, materialize(jnp.swapaxes(w_EDF, 1, 2)), expert_b, used, chunk)
    return gx_RD, gw_EDF.astype(w_EDF.dtype), None, None


_by_block.defvjp(_by_block_forward, _by_block_backward)
