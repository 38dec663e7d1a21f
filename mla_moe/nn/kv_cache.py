"""The KV cache of MLA, a latent cache: of each token and layer the normed latent and the rotated shared key, no more.

One array `[L, B, S, W]`: layers, sequence slots, positions, and `W = kv_lora_rank + qk_rope_head_dim` values. For
DeepSeek-V3 a token takes 70,272 bytes in bfloat16 (DeepSeek-V2, section 2.1.2), and 35,624 in int8, scales included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from mla_moe.config import ModelConfig
from mla_moe.nn.rope import CosSin
from mla_moe.ops.cached_attention import BLOCK, Form
from mla_moe.ops.kv_quantization import SCALE_BYTES
from mla_moe.parallel.mesh import BATCH_SPEC, current_mesh, dividing_axes

KVCache = Num[Array, "L B S W"]
NewTokens = Float[Array, "b T D"]
"""Activations of the T new tokens of b sequences."""
LayerIndex = Int[Array, ""] | int

OUT_OF_RANGE = 1 << 30
"""A start position beyond the capacity of every cache: nothing is written."""


class AttentionMetadata(NamedTuple):
    """Where new tokens are in the KV cache, and how attention reads it: the same for every layer."""

    slots_b: Int[Array, "b"]
    """The sequence slot of each batch element."""
    positions_bT: Int[Array, "b T"]
    """Consecutive. Positions at or beyond the cache capacity are not written."""
    cos_sin: CosSin
    all_slots: bool
    """The batch is all slots in order."""
    form: Form


def round_up_capacity(tokens: int) -> int:
    """The smallest cache capacity for `tokens` tokens that attention can read in full blocks."""
    return 1 << max(tokens - 1, 0).bit_length() if tokens < BLOCK else -(-tokens // BLOCK) * BLOCK


def cache_shape(
    cfg: ModelConfig, slots: int, capacity: int, dtype: DTypeLike, *, layers: int, sharding: NamedSharding | None = None
) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a cache. `layers` is the model's, and one more if its MTP module computes draft
    tokens. An `int8` cache stores its quantization scales too."""
    width = cfg.kv_lora_rank + cfg.qk_rope_head_dim + SCALE_BYTES * (jnp.dtype(dtype) == jnp.int8)
    return jax.ShapeDtypeStruct((layers, slots, capacity, width), dtype, sharding=sharding)


def empty_cache(shape: jax.ShapeDtypeStruct) -> KVCache:
    """Zeros, created with their sharding."""
    return jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype), out_shardings=shape.sharding)()


def cache_sharding(mesh: Mesh, slots: int) -> NamedSharding:
    """Slots are sharded over those batch axes of the mesh that divide them; layers and positions are not sharded."""
    return NamedSharding(mesh, P(None, dividing_axes(mesh, slots, BATCH_SPEC[0])))


def write_cache(
    cache_LBSW: KVCache,
    new_bTW: Num[Array, "b T W"],
    *,
    layer: LayerIndex,
    slots_b: Int[Array, "b"] | None,
    start_b: Int[Array, "b"],
) -> KVCache:
    """Write T new entries into each slot, at positions from `start` on, or none if they do not all fit, which is how
    slots without a request are skipped. `slots_b` None: the batch is all slots in order."""
    if slots_b is not None:
        return write_sequences(cache_LBSW, new_bTW, layer, slots_b, start_b)
    mesh, args = current_mesh(), (cache_LBSW, new_bTW, jnp.asarray(layer), start_b)
    if mesh is None:
        return _write_all_slots(*args)
    slot_axes = dividing_axes(mesh, len(start_b), BATCH_SPEC[0])  # each device writes its own slots
    inputs = P(None, slot_axes), P(slot_axes), P(), P(slot_axes)
    return jax.shard_map(_write_all_slots, in_specs=inputs, out_specs=P(None, slot_axes), check_vma=False)(*args)


def _write_all_slots(cache_LBSW: Array, new_BTW: Array, layer: Array, start_B: Array) -> Array:
    def scatter(cache_LBSW: Array, new_BTW: Array, layer: Array, start_B: Array) -> Array:
        return write_sequences(cache_LBSW, new_BTW, layer, jnp.arange(len(start_B)), start_B)

    return jax.lax.platform_dependent(cache_LBSW, new_BTW, layer, start_B, tpu=write_blocks, default=scatter)


def write_sequences(
    cache_LBSW: KVCache,
    new_bTW: Num[Array, "b T W"],
    layer: LayerIndex,
    slots_b: Int[Array, "b"],
    start_b: Int[Array, "b"],
) -> KVCache:
    """`write_cache` as one scatter of all sequences."""
    index_b3 = jnp.stack([jnp.full_like(start_b, layer), slots_b, start_b], axis=1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 2)
    )
    return jax.lax.scatter(cache_LBSW, index_b3, new_bTW, numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)


def write_blocks(
    cache_LBSW: KVCache, new_BTW: Num[Array, "B T W"], layer: Int[Array, ""], start_B: Int[Array, "B"]
) -> KVCache:
    """`write_cache` to all slots, token by token, each with the block of positions around it. On TPU, where the cache's
    innermost axis is that of positions, XLA would transpose the full cache in every layer for a smaller update."""
    (B, T, W), S = new_BTW.shape, cache_LBSW.shape[2]
    size = min(128, S)

    def write_token(i: Array, cache_LBSW: Array) -> Array:
        b, t = i // T, i % T
        position, fits = jnp.minimum(start_B[b] + t, S - 1), start_B[b] <= S - T
        block = layer, b, position // size * size, 0
        old_11sW = jax.lax.dynamic_slice(cache_LBSW, block, (1, 1, size, W))
        written_s1 = ((jnp.arange(size) == position % size) & fits)[:, None]
        return jax.lax.dynamic_update_slice(cache_LBSW, jnp.where(written_s1, new_BTW[b, t], old_11sW), block)

    return with_layout_constraint(jax.lax.fori_loop(0, B * T, write_token, cache_LBSW), Layout((0, 1, 3, 2)))
