"""The KV cache of MLA, a latent cache: of each token and layer the normed latent and the rotated shared key, no more.

For DeepSeek-V3 a token takes 70,272 bytes in bfloat16 (DeepSeek-V2, section 2.1.2), and 35,624 in int8, scales
included.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from mla_moe.config import AttentionConfig, require
from mla_moe.nn.layers import require_shape
from mla_moe.nn.rope import CosSin
from mla_moe.ops.cached_attention import BLOCK, Form
from mla_moe.ops.kv_quantization import SCALE_BYTES
from mla_moe.parallel.collectives import shard_map
from mla_moe.parallel.mesh import BATCH_SPEC, MeshView, current_mesh, dividing_axes

CacheEntries = Num[Array, "L B S W"]
NewTokens = Float[Array, "b T D"]
"""Activations of the T new tokens of b sequences."""
NewIds = Int[Array, "b T"]
NewEntries = Num[Array, "b T W"]
NewSelectedKeys = UInt32[Array, "b T w"]
"""`ops.key_selection.SelectedKeys` of new tokens, among those of the cache."""
Slots = Int[Array, "b"]
Lengths = Int[Array, "b"]
Active = Bool[Array, "b"]
LayerIndex = Int[Array, ""] | int

OUT_OF_RANGE = 1 << 30
"""A position beyond the capacity of every cache: nothing is written there."""


class KVCache(NamedTuple):
    """The cached tokens of B sequences: a pytree of two arrays, which `jax.jit`, `jax.lax.scan` and `jax.vmap` take.

    Methods that extend a cache return the new one. Donate the old one (`donate_argnames="cache"`), and it is updated in
    place; without, every call copies it.
    """

    entries_LBSW: CacheEntries
    """`[layers, sequences, positions, width]`. An entry is the normed latent and the rotated shared key of a token,
    `kv_lora_rank + qk_rope_head_dim` values; in int8 also their two float32 scales, as 8 bytes. Behind them are the
    `index_head_dim` values of the indexer's key if there is one (DSA), in int8 with 8 bytes for the scales of their
    rotated part and the rest. The single layer of one `MLAttention` is an axis of size 1. Entries from a sequence's
    length on are arbitrary, and never read."""
    length_B: Int[Array, "B"]
    """int32: the cached tokens of each sequence, and so the position of its next token. A smaller number forgets the
    last tokens (`cache._replace(length_B=…)`), and 0 all of them."""

    @property
    def max_length(self) -> int:
        """Positions of each sequence: what `init_cache` was asked for, rounded up to full blocks of attention."""
        return self.entries_LBSW.shape[-2]


class NewPositions(NamedTuple):
    """Where T new tokens of each of b sequences are in the cache."""

    positions_bT: Int[Array, "b T"]
    """Consecutive; `OUT_OF_RANGE` for padding, and for all tokens of a sequence that has none or whose do not fit."""
    length_b: Lengths | None
    """The tokens of each sequence before padding; None: there is no padding."""
    fits_b: Bool[Array, "b"]
    length_B: Int[Array, "B"]
    """The lengths of the cache with the new tokens."""


class AttentionMetadata(NamedTuple):
    """Where new tokens are in the KV cache, and how attention reads it. Fields from `layer` on are one layer's."""

    slots_b: Slots | None
    """The sequence slot of each batch element; None: the batch is all slots in order."""
    positions_bT: Int[Array, "b T"]
    length_b: Lengths | None
    """Both as in `NewPositions`."""
    cos_sin: CosSin
    form: Form
    adapter_ids_b: Int[Array, "b"] | None = None
    """With several adapters (`nn.stacked_lora`): the adapter of each sequence, 0 for none."""
    layer: LayerIndex = 0
    """The index in the cache."""
    selected_bTw: NewSelectedKeys | None = None
    """The keys that the indexer of the layer before selected (DSA)."""
    shares_keys: Bool[Array, ""] | bool = False
    """Whether this layer uses those."""
    expert_layer: Int[Array, ""] | None = None
    """The index in the stack of layers, where `moe` has the experts of the full stack."""


def round_up_capacity(tokens: int) -> int:
    """The smallest cache capacity for `tokens` tokens that attention can read in full blocks."""
    return 1 << max(tokens - 1, 0).bit_length() if tokens < BLOCK else -(-tokens // BLOCK) * BLOCK


def index_columns(cfg: AttentionConfig, dtype: DTypeLike) -> int:
    """The columns of a cache that hold the indexer's keys; 0 without an indexer."""
    return 0 if cfg.index_topk is None else cfg.index_head_dim + SCALE_BYTES * (jnp.dtype(dtype) == jnp.int8)


def cache_shape(
    cfg: AttentionConfig,
    slots: int,
    capacity: int,
    dtype: DTypeLike,
    *,
    layers: int,
    sharding: NamedSharding | None = None,
) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a cache's entries. `layers` is the model's, and one more if its MTP module computes
    draft tokens. An `int8` cache stores its quantization scales too."""
    width = cfg.kv_lora_rank + cfg.qk_rope_head_dim + SCALE_BYTES * (jnp.dtype(dtype) == jnp.int8)
    width += index_columns(cfg, dtype)
    return jax.ShapeDtypeStruct((layers, slots, capacity, width), dtype, sharding=sharding)


def init_cache(cfg: AttentionConfig, batch: int, max_length: int, dtype: DTypeLike, *, layers: int) -> KVCache:
    """An empty cache of `batch` sequences. Under a mesh (`jax.set_mesh`) it is created with its sharding."""
    require(batch > 0, "batch", batch, "must be at least 1")
    require(max_length > 0, "max_length", max_length, "must be at least 1")
    ok = jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype) == jnp.int8
    require(ok, "dtype", jnp.dtype(dtype).name, "a cache is of a floating-point type, or int8")
    shape = cache_shape(cfg, batch, round_up_capacity(max_length), dtype, layers=layers)
    return _empty_cache(shape.shape, shape.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _empty_cache(shape: tuple[int, ...], dtype: jnp.dtype) -> KVCache:
    cache = KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape[1], jnp.int32))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return constrain_cache(cache)
    return KVCache(jax.sharding.reshard(cache.entries_LBSW, cache_sharding(MeshView(mesh), shape[1])), cache.length_B)


def cache_sharding(mesh: Mesh | MeshView, slots: int) -> NamedSharding:
    """Slots are sharded over those batch axes of the mesh that divide them; layers and positions are not sharded."""
    view = MeshView(mesh) if isinstance(mesh, Mesh) else mesh
    return view.sharding(P(None, dividing_axes(view, slots, BATCH_SPEC[0])))


def constrain_cache(cache: KVCache) -> KVCache:
    """Constrain a cache to its sharding, if there is a mesh: it stays from call to call, so that the buffer can be
    donated. Lengths are replicated."""
    mesh = current_mesh()
    if mesh is None:
        return cache
    length_B = jax.lax.with_sharding_constraint(cache.length_B, mesh.sharding(P()))
    return KVCache(constrain_entries(cache.entries_LBSW), length_B)


def constrain_entries(cache_LBSW: CacheEntries) -> CacheEntries:
    """`constrain_cache` of the entries alone."""
    mesh = current_mesh()
    if mesh is None:
        return cache_LBSW
    return jax.lax.with_sharding_constraint(cache_LBSW, cache_sharding(mesh, cache_LBSW.shape[1]))


def require_cache(cfg: AttentionConfig, cache: KVCache, layers: int) -> None:
    """Raise `ConfigError` for a cache of another model, or of another number of layers."""
    B, S = cache.entries_LBSW.shape[-3:-1]
    expected = cache_shape(cfg, B, S, cache.entries_LBSW.dtype, layers=layers)
    require_shape("cache.entries_LBSW", cache.entries_LBSW, *expected.shape)
    require_shape("cache.length_B", cache.length_B, B)


def new_positions(
    cache: KVCache,
    shape: tuple[int, ...],
    lengths: Lengths | None,
    active: Active | None,
    slots: Slots | None,
) -> NewPositions:
    """The positions of new tokens of `shape` `[b, T]`, from the end of their sequences on. The tokens of a sequence fit
    all, or none of them is written and its length stays. `lengths`, `active`, `slots`: see `Transformer.extend`.

    Raises `ConfigError` where shapes, or the values of arrays that are not traced, show that tokens do not fit.
    """
    (b, T), (B, S) = shape[:2], cache.entries_LBSW.shape[1:3]
    require(slots is not None or b == B, "batch", b, f"the cache has {B} sequences; name those of the batch by slots")
    require(0 < T <= S, "new tokens", T, f"must be 1 to {S}, the positions of the cache; init_cache has max_length")
    for name, x in ("lengths", lengths), ("active", active), ("slots", slots):
        if x is not None:
            require_shape(name, x, b)
    if slots is not None and _is_known(jnp.asarray(slots)):
        named = np.asarray(slots).tolist()
        ok = len(set(named)) == b and all(0 <= slot < B for slot in named)
        require(ok, "slots", named, f"must be different sequences of the cache, 0 to {B - 1}")
    start_b = cache.length_B if slots is None else cache.length_B[slots]
    new_b = jnp.full_like(start_b, T) if lengths is None else lengths.astype(start_b.dtype)
    ok = not _is_known(new_b) or bool((np.asarray(new_b) <= T).all())
    require(ok, "lengths", lengths, f"must be at most the {T} tokens of the padded batch")
    new_b = jnp.clip(new_b, 0, T) if active is None else jnp.where(active, jnp.clip(new_b, 0, T), 0)
    end_b = start_b + new_b
    if _is_known(end_b):
        fix = f"with {np.max(new_b)} new tokens more than the {S} positions of the cache; init_cache has max_length"
        require(bool((np.asarray(end_b) <= S).all()), "cache.length_B", np.asarray(start_b).tolist(), fix)
    fits_b, t_T = end_b <= S, jnp.arange(T, dtype=start_b.dtype)
    written_bT = fits_b[:, None] & (t_T < new_b[:, None])
    positions_bT = jnp.where(written_bT, start_b[:, None] + t_T, OUT_OF_RANGE)
    end_b = jnp.where(fits_b, end_b, start_b)
    length_B = end_b if slots is None else cache.length_B.at[slots].set(end_b)
    return NewPositions(positions_bT, None if lengths is None or T == 1 else new_b, fits_b, length_B)


def _is_known(x: Array) -> bool:
    """Whether the values can be read now: they are not traced, and this process has them all."""
    return not isinstance(x, Tracer) and (x.is_fully_addressable or x.is_fully_replicated)


MAX_BLOCK_WRITES = 8
"""Most new tokens per sequence that are written block by block on TPU."""


def write_cache(
    cache_LBSW: CacheEntries,
    new_bTW: NewEntries,
    layer: LayerIndex,
    start_b: Slots,
    slots_b: Slots | None,
    length_b: Lengths | None = None,
) -> CacheEntries:
    """Write the first `length` of T new entries (None: all) into each slot, at positions from `start` on, or none if
    they do not all fit, which is how slots without a request are skipped. `slots_b` None: the batch is all slots in
    order."""
    if slots_b is not None:
        return write_sequences(cache_LBSW, new_bTW, layer, start_b, length_b, slots_b)
    mesh, args = current_mesh(), (cache_LBSW, new_bTW, jnp.asarray(layer), start_b, length_b)
    write = write_sequences
    if new_bTW.shape[1] <= MAX_BLOCK_WRITES:
        write = partial(jax.lax.platform_dependent, tpu=write_blocks, default=write_sequences)
    if mesh is None:
        return write(*args)
    slot_axes = dividing_axes(mesh, len(start_b), BATCH_SPEC[0])  # each device writes its own slots
    inputs = P(None, slot_axes), P(slot_axes), P(), P(slot_axes), P(slot_axes)
    return shard_map(write, inputs, P(None, slot_axes))(*args)


def write_sequences(
    cache_LBSW: CacheEntries,
    new_bTW: NewEntries,
    layer: LayerIndex,
    start_b: Slots,
    length_b: Lengths | None = None,
    slots_b: Slots | None = None,
) -> CacheEntries:
    """`write_cache` as one scatter of all sequences."""
    slots_b = jnp.arange(len(start_b), dtype=start_b.dtype) if slots_b is None else slots_b.astype(start_b.dtype)
    if length_b is not None:
        start_b, new_bTW = _around_padding(cache_LBSW, new_bTW, layer, start_b, length_b, slots_b)
    index_b3 = jnp.stack([jnp.full_like(start_b, layer), slots_b, start_b], axis=1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 2)
    )
    return jax.lax.scatter(cache_LBSW, index_b3, new_bTW, numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)


def _index(*index: Array | int) -> list[Array]:
    """Indices of one dtype, with `jax_enable_x64` too."""
    return [jnp.asarray(i, jnp.int32) for i in index]


def _around_padding(
    cache_LBSW: Array, new_bTW: Array, layer: LayerIndex, start_b: Array, length_b: Array, slots_b: Array
) -> tuple[Array, Array]:
    """The start and the T entries of a window that fits into the cache: those before and after the new entries stay as
    they are."""
    (T, W), S = new_bTW.shape[1:], cache_LBSW.shape[2]
    first_b = jnp.minimum(start_b, S - T)
    t_bT = jnp.arange(T) - (start_b - first_b)[:, None]  # the new entry at each position of the window
    shifted_bTW = jnp.take_along_axis(new_bTW, jnp.clip(t_bT, 0, T - 1)[..., None], axis=1)

    def read(slot: Array, first: Array) -> Array:
        return jax.lax.dynamic_slice(cache_LBSW, _index(layer, slot, first, 0), (1, 1, T, W))[0, 0]

    is_new_bT = (t_bT >= 0) & (t_bT < length_b[:, None])
    return first_b, jnp.where(is_new_bT[..., None], shifted_bTW, jax.vmap(read)(slots_b, first_b))


def write_blocks(
    cache_LBSW: CacheEntries,
    new_BTW: NewEntries,
    layer: Int[Array, ""],
    start_B: Slots,
    length_B: Lengths | None = None,
) -> CacheEntries:
    """`write_cache` to all slots, token by token, each with the block of positions around it. On TPU, where the cache's
    innermost axis is that of positions, XLA would transpose the full cache in every layer for a smaller update."""
    (B, T, W), S = new_BTW.shape, cache_LBSW.shape[2]
    size, length_B = min(128, S), jnp.full_like(start_B, T) if length_B is None else length_B

    def write_token(i: Array, cache_LBSW: Array) -> Array:
        b, t = i // T, i % T
        position = jnp.minimum(start_B[b] + t, S - 1)
        is_written = (t < length_B[b]) & (start_B[b] <= S - length_B[b])
        block = _index(layer, b, position // size * size, 0)
        old_11sW = jax.lax.dynamic_slice(cache_LBSW, block, (1, 1, size, W))
        written_s1 = ((jnp.arange(size) == position % size) & is_written)[:, None]
        return jax.lax.dynamic_update_slice(cache_LBSW, jnp.where(written_s1, new_BTW[b, t], old_11sW), block)

    return with_layout_constraint(jax.lax.fori_loop(0, B * T, write_token, cache_LBSW), Layout((0, 1, 3, 2)))
