"""The latent cache: of every token and layer the normed latent and the rotated shared key, side by side, and no more.

One array `[L, B, S, W]`: layers, slots, places in time, and `W = kv_lora_rank + qk_rope_head_dim` values. V3 needs
70,272 bytes a token in bfloat16 (DeepSeek-V2, section 2.1.2), and in eight bits 35,624, W then counting their scales.
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
from mla_moe.ops.cached_attention import BLOCK, Form
from mla_moe.ops.kv_quantization import SCALE_BYTES
from mla_moe.parallel.mesh import BATCH_SPEC, current_mesh, dividing_axes

OUT_OF_RANGE = 1 << 30
"""A place beyond every cache: what starts there is not written."""


class AttentionMetadata(NamedTuple):
    """Which places new tokens take, and how they look at those before them: the same for every layer."""

    slots_b: Int[Array, "b"]
    positions_bT: Int[Array, "b T"]
    """Consecutive. Beyond the cache's capacity they are written nowhere."""
    cos_sin: tuple[Float[Array, "b T r"], Float[Array, "b T r"]]
    every_slot: bool
    """Rows are all the slots in order."""
    form: Form


def round_up_capacity(tokens: int) -> int:
    """The least capacity that holds `tokens` and that attention can read in whole blocks."""
    return 1 << max(tokens - 1, 0).bit_length() if tokens < BLOCK else -(-tokens // BLOCK) * BLOCK


def cache_shape(
    cfg: ModelConfig, slots: int, capacity: int, dtype: DTypeLike, *, layers: int, place: NamedSharding | None = None
) -> jax.ShapeDtypeStruct:
    """`layers`: the model's, and one more where the prediction module guesses ahead. Entries in `int8` have scales."""
    width = cfg.kv_lora_rank + cfg.qk_rope_head_dim + SCALE_BYTES * (jnp.dtype(dtype) == jnp.int8)
    return jax.ShapeDtypeStruct((layers, slots, capacity, width), dtype, sharding=place)


def empty_cache(shape: jax.ShapeDtypeStruct) -> Num[Array, "L B S W"]:
    """Zeros, where `shape` says."""
    return jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype), out_shardings=shape.sharding)()


def cache_sharding(mesh: Mesh, slots: int) -> NamedSharding:
    """Slots over the axes that split sequences, as many of them as divide; every device keeps all layers of its own."""
    return NamedSharding(mesh, P(None, dividing_axes(mesh, slots, BATCH_SPEC[0])))


def write_cache(
    cache_LBSW: Num[Array, "L B S W"],
    new_bTW: Num[Array, "b T W"],
    *,
    layer: Int[Array, ""] | int,
    slots_b: Int[Array, "b"] | None,
    start_b: Int[Array, "b"],
) -> Num[Array, "L B S W"]:
    """Put T new entries into each slot from its `start` on. A run that does not fit is left out whole, which is how
    slots without a request are skipped. Without `slots_b` rows are all slots in order."""
    if slots_b is not None:
        return write_sequences(cache_LBSW, new_bTW, layer, slots_b, start_b)
    mesh, args = current_mesh(), (cache_LBSW, new_bTW, jnp.asarray(layer), start_b)
    if mesh is None:
        return _write_all(*args)
    own = dividing_axes(mesh, len(start_b), BATCH_SPEC[0])  # each device writes into its own slots
    inputs = P(None, own), P(own), P(), P(own)
    return jax.shard_map(_write_all, in_specs=inputs, out_specs=P(None, own), check_vma=False)(*args)


def _write_all(cache_LBSW, new_BTW, layer, start_B):
    def rows(cache_LBSW, new_BTW, layer, start_B):
        return write_sequences(cache_LBSW, new_BTW, layer, jnp.arange(len(start_B)), start_B)

    return jax.lax.platform_dependent(cache_LBSW, new_BTW, layer, start_B, tpu=write_blocks, default=rows)


def write_sequences(cache_LBSW, new_bTW, layer, slots_b, start_b):
    places_b3 = jnp.stack([jnp.full_like(start_b, layer), slots_b, start_b], axis=1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 2)
    )
    return jax.lax.scatter(cache_LBSW, places_b3, new_bTW, numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)


def write_blocks(cache_LBSW, new_BTW, layer, start_B):
    """The same to all slots, a token and a block of places around it at a time. On TPU, where a cache has its places
    innermost, XLA would turn all of it around for anything smaller, layer by layer."""
    (B, T, W), S = new_BTW.shape, cache_LBSW.shape[2]
    size = min(128, S)

    def put(i, cache_LBSW):
        b, t = i // T, i % T
        place, fits = jnp.minimum(start_B[b] + t, S - 1), start_B[b] <= S - T
        block = layer, b, place // size * size, 0
        old_11sW = jax.lax.dynamic_slice(cache_LBSW, block, (1, 1, size, W))
        here_s1 = ((jnp.arange(size) == place % size) & fits)[:, None]
        return jax.lax.dynamic_update_slice(cache_LBSW, jnp.where(here_s1, new_BTW[b, t], old_11sW), block)

    return with_layout_constraint(jax.lax.fori_loop(0, B * T, put, cache_LBSW), Layout((0, 1, 3, 2)))
