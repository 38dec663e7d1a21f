"""Context parallelism: which queries of a sequence each device computes attention for.

Device i of n has T contiguous tokens, the chunks 2i and 2i + 1 of 2n. Causal attention of these would take the last
device nearly twice as long as the mean. So it computes the chunks 2i and 2n − 1 − 2i, together as many pairs of queries
and keys as any other device: it keeps its first chunk and swaps the second with device n − 1 − i. That balances as the
zig-zag order of Llama 3 (arXiv 2407.21783, section 3.3.2) does, and moves half as many tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mla_moe.ops.masking import Masking
from mla_moe.parallel.collectives import axis_index, permute, shard_map
from mla_moe.parallel.mesh import BATCH_SPEC, token_mesh


def needs_balance(shape: tuple[int, ...], masking: Masking) -> bool:
    """Whether devices swap queries of tokens `[B, T, …]`: where attention is causal, and no sliding window that is
    shorter than a device's tokens bounds its work already."""
    mesh = token_mesh(shape)
    if mesh is None or (n := mesh.shape["context"]) == 1 or not masking.causal:
        return False
    return shape[1] % (2 * n) == 0 and (masking.window is None or masking.window > shape[1] // n)


def swap_queries(arrays: Any) -> Any:
    """A tree of arrays `[B, T, …]` of tokens, sharded over the mesh, in the order in which devices compute attention;
    the inverse too. Differentiable."""
    mesh = token_mesh(jax.tree.leaves(arrays)[0].shape)
    assert mesh is not None
    n = mesh.shape["context"]

    def swap(x: Array) -> Array:
        kept, sent = jnp.split(x, 2, axis=1)
        return jnp.concatenate([kept, permute(sent, "context", [(i, n - 1 - i) for i in range(n)])], axis=1)

    return shard_map(lambda arrays: jax.tree.map(swap, arrays), (BATCH_SPEC,), BATCH_SPEC)(arrays)


def query_starts(tokens: int, devices: int, swapped: bool) -> Int[Array, "P"]:
    """Inside a `shard_map`: the positions of the first tokens of the equal chunks that are this device's `tokens`
    queries."""
    i = axis_index("context")
    if not swapped:
        return i[None] * tokens
    return jnp.stack([2 * i, 2 * devices - 1 - 2 * i]) * (tokens // 2)
