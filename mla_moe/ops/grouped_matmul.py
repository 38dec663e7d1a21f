"""Multiply each row by its own expert's matrix: `y[r] = x[r] @ w[expert of r]`, rows sorted by expert.

Five implementations of one function:
- `reference`: every expert on every row, masked. The oracle; E times the work.
- `blocks`: cut the rows into blocks of one expert each, and multiply block by block. Plain XLA; GPU.
- `chunks`: the same, a few blocks at a time: their rows and matrices stay in a processor's cache, and what routing
  leaves empty at the end of the buffer, up to a third of it, costs nothing. CPU.
- `ragged`: `jax.lax.ragged_dot`. XLA has a kernel for it on TPU, but not for the weights' derivative, which it expands
  to `reference`'s work; elsewhere it expands all of it.
- `megablox`: JAX's Pallas kernels for TPU, which do the chosen work alone in both directions.
"""

import functools
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["reference", "blocks", "chunks", "ragged", "megablox"]


def default_implementation(platform: str | None = None) -> Implementation:
    """The path that does only the chosen work on `platform` (`tpu`, `gpu`, `cpu`; by default the attached one)."""
    platform = platform or jax.default_backend()
    return "megablox" if platform == "tpu" else "chunks" if platform == "cpu" else "blocks"


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_GDF: Float[Array, "G D F"],
    group_sizes_E: Int[Array, "E"],
    first: Int[Array, ""] | None = None,
    *,
    block: int,
    implementation: Implementation | None = None,
) -> Float[Array, "R F"]:
    """`y[r] = x[r] @ w[e]` for the rows r of group e, groups standing one after the other from row 0.

    `group_sizes_E` are multiples of `block`, and R is too. Rows behind the last group give arbitrary values. With
    `first` the groups' matrices are E of more, from that one on.
    """
    if implementation is None:
        implementation = default_implementation()
    if implementation == "megablox":
        return _megablox(x_RD, w_GDF, _among(group_sizes_E, first, len(w_GDF)), block)
    if implementation in ("blocks", "chunks"):
        if x_RD.shape[0] % block:
            raise ValueError(f"rows = {x_RD.shape[0]} must be a multiple of block = {block}")
        blocks = x_RD.shape[0] // block
        expert_b = _expert_of_block(group_sizes_E, block, blocks)
        chunk = min(CHUNK, blocks) if implementation == "chunks" else blocks
        expert_b = expert_b if first is None else expert_b + first
        return _blocks(x_RD, w_GDF, expert_b, group_sizes_E.sum() // block, chunk)
    w_EDF = w_GDF if first is None else jax.lax.dynamic_slice_in_dim(w_GDF, first, len(group_sizes_E))
    return (_reference if implementation == "reference" else jax.lax.ragged_dot)(x_RD, w_EDF, group_sizes_E)


def _among(group_sizes_E, first, groups):
    """The sizes of all groups, of which those before and behind have no rows."""
    if first is None:
        return group_sizes_E
    return jax.lax.dynamic_update_slice(jnp.zeros(groups, group_sizes_E.dtype), group_sizes_E, (first,))


def _reference(x_RD, w_EDF, group_sizes_E):
    R = x_RD.shape[0]
    expert_R = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(R), side="right")
    chosen_RE = jax.nn.one_hot(expert_R, w_EDF.shape[0], dtype=x_RD.dtype)
    return jnp.einsum("RD,EDF,RE->RF", x_RD, w_EDF, chosen_RE)


def _megablox(x_RD, w_EDF, group_sizes_E, block):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    R = len(x_RD)
    x_RD = jnp.pad(x_RD, ((0, -R % 128), (0, 0)))  # the kernel wants whole tiles
    rows = next(size for size in (block, 512, 256, 128) if size >= 128 and len(x_RD) % size == 0)  # no tile of two
    tiling: Any = _tiling(rows)  # a function too, though the annotation of `gmm` knows tuples alone
    return gmm(x_RD, w_EDF, group_sizes_E.astype(jnp.int32), x_RD.dtype, tiling)[:R]


@functools.cache
def _tiling(rows: int):
    """Asked for each product, forward and derivative, whose depths and widths differ."""
    return lambda _, depth, width: (rows, min(depth, 1024), min(width, 1024))


def _expert_of_block(group_sizes_E, block, num_blocks):
    last_E = jnp.cumsum(group_sizes_E) // block
    expert_b = jnp.searchsorted(last_E, jnp.arange(num_blocks), side="right")
    return jnp.minimum(expert_b, len(group_sizes_E) - 1)


CHUNK = 8


def _over_chunks(body, chunk, used, num_blocks, carry):
    """`body(new, start, carry)` for each chunk, which begins at block `start`; those before `new` are already done."""
    if chunk == num_blocks:
        return body(0, 0, carry)

    def step(i, carry):
        return body(i * chunk, jnp.minimum(i * chunk, num_blocks - chunk), carry)

    return jax.lax.fori_loop(0, -(-used // chunk), step, carry)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(x_RD, w_EDF, expert_b, used, chunk):
    return _multiply(x_RD, w_EDF, expert_b, used, chunk)


def _multiply(x_RD, w_EDF, expert_b, used, chunk):
    b = len(expert_b)
    part = partial(jax.lax.dynamic_slice_in_dim, slice_size=chunk)
    x_bmD = x_RD.reshape(b, -1, x_RD.shape[1])

    def body(_, start, y_bmF):
        y_cmF = jnp.einsum("cmD,cDF->cmF", part(x_bmD, start), w_EDF[part(expert_b, start)])
        return jax.lax.dynamic_update_slice_in_dim(y_bmF, y_cmF, start, 0)

    y_bmF = jnp.zeros((*x_bmD.shape[:2], w_EDF.shape[2]), jnp.result_type(x_RD, w_EDF))
    return _over_chunks(body, chunk, used, b, y_bmF).reshape(len(x_RD), -1)


def _blocks_forward(x_RD, w_EDF, expert_b, used, chunk):
    return _blocks(x_RD, w_EDF, expert_b, used, chunk), (x_RD, w_EDF, expert_b, used)


def _blocks_backward(chunk, residuals, g_RF):
    x_RD, w_EDF, expert_b, used = residuals
    E, D, F = w_EDF.shape
    b = len(expert_b)
    part = partial(jax.lax.dynamic_slice_in_dim, slice_size=chunk)
    x_bmD, g_bmF = x_RD.reshape(b, -1, D), g_RF.reshape(b, -1, F)

    def body(new, start, gw_EDF):
        gw_cDF = jnp.einsum("cmD,cmF->cDF", part(x_bmD, start), part(g_bmF, start))
        done_c = start + jnp.arange(chunk) < new
        return gw_EDF.at[jnp.where(done_c, E, part(expert_b, start))].add(gw_cDF, mode="drop")

    gw_EDF = _over_chunks(body, chunk, used, b, jnp.zeros(w_EDF.shape, jnp.result_type(x_RD, g_RF)))
    gx_RD = _multiply(g_RF, jnp.swapaxes(w_EDF, 1, 2), expert_b, used, chunk)
    return gx_RD, gw_EDF.astype(w_EDF.dtype), None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)
