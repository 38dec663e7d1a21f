"""The latent cache: of every token and layer the normed latent and the rotated shared key, side by side, and no more.

One array `[L, B, S, W]`: layers, slots, places in time, and `W = kv_lora_rank + qk_rope_head_dim` values. V3 needs
70,272 bytes a token in bfloat16 (DeepSeek-V2, section 2.1.2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mla_moe.config import ModelConfig
from mla_moe.ops.cached_attention import BLOCK, Form
from mla_moe.sharding import BATCH

NOWHERE = 1 << 30
"""A place beyond every cache: what starts there is not written."""


class Reach(NamedTuple):
    """Which places new tokens take, and how they look at those before them: the same for every layer."""

    slots_b: Int[Array, "b"]
    positions_bT: Int[Array, "b T"]
    """Consecutive. Beyond the cache's capacity they are written nowhere."""
    cos_sin: tuple[Float[Array, "b T r"], Float[Array, "b T r"]]
    every_slot: bool
    """Rows are all the slots in order."""
    form: Form


def capacity_for(tokens: int) -> int:
    """The least capacity that holds `tokens` and that attention can read in whole blocks."""
    return 1 << max(tokens - 1, 0).bit_length() if tokens < BLOCK else -(-tokens // BLOCK) * BLOCK


def empty_cache(
    cfg: ModelConfig, slots: int, capacity: int, dtype: DTypeLike, *, layers: int, place: NamedSharding | None = None
) -> Float[Array, "L B S W"]:
    """Zeros. `layers` are the model's, and one more where the prediction module guesses ahead."""
    shape = layers, slots, capacity, cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()


def cache_sharding(mesh: Mesh, slots: int) -> NamedSharding:
    """Slots over the axes that split sequences, as many of them as divide; every device keeps all layers of its own."""
    axes, parts = [], 1
    for axis in BATCH[0]:
        if slots % (parts * mesh.shape[axis]) == 0:
            axes.append(axis)
            parts *= mesh.shape[axis]
    return NamedSharding(mesh, P(None, tuple(axes)))


def write(
    cache_LBSW: Float[Array, "L B S W"],
    new_bTW: Float[Array, "b T W"],
    *,
    layer: Int[Array, ""] | int,
    slots_b: Int[Array, "b"],
    start_b: Int[Array, "b"],
) -> Float[Array, "L B S W"]:
    """Put T new entries into each slot from its `start` on. A run that does not fit is left out whole, which is how
    slots without a request are skipped."""
    places_b3 = jnp.stack([jnp.full_like(start_b, layer), slots_b, start_b], axis=1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 2)
    )
    return jax.lax.scatter(cache_LBSW, places_b3, new_bTW, numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)
