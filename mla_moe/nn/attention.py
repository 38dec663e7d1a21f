"""Multi-head latent attention (MLA; DeepSeek-V2, section 2.1): keys and values of all heads come from one latent."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from mla_moe.config import AttentionConfig, KernelConfig, ModelConfig, require
from mla_moe.nn.expanded_attention import Queries, attend, masking_of
from mla_moe.nn.indexer import Indexer, selection
from mla_moe.nn.kv_cache import (
    Active,
    AttentionMetadata,
    CacheEntries,
    KVCache,
    Lengths,
    NewSelectedKeys,
    NewTokens,
    Slots,
    constrain_cache,
    index_columns,
    init_cache,
    new_positions,
    require_cache,
    write_cache,
)
from mla_moe.nn.layers import Activations, Ids, RMSNorm, require_shape, shape_text
from mla_moe.nn.lora import adapter, project
from mla_moe.nn.param import Precision, matrix
from mla_moe.nn.quantized import value_of, weight_of
from mla_moe.nn.rope import CosSin, query_scale, rotary, rotate, softmax_scale
from mla_moe.ops.cached_attention import Form, cached_attention
from mla_moe.ops.dropout import dropout_key, token_numbers
from mla_moe.ops.key_selection import SelectedKeys
from mla_moe.ops.kv_quantization import quantize
from mla_moe.parallel.context_parallel import needs_balance, swap_queries
from mla_moe.parallel.mesh import under_auto_axes
from mla_moe.parallel.sharded_einsum import Einsum, plain_einsum, sharded_einsum
from mla_moe.parallel.sharding import (
    constrain_decode_activations,
    constrain_decode_heads,
    constrain_slots,
    map_slots,
)

# transformers and DeepSeek's code use this value for the norms of latents, not the config's rms_norm_eps.
LATENT_NORM_EPS = 1e-6


class MLAttention(nnx.Module):
    """Attention `[B, T, D] -> [B, T, D]` with a latent of `kv_lora_rank` values per token, and with `q_lora_rank` one
    of the queries too: causal self-attention, or as `cfg` sets it. Usable alone: needs no mesh and no global state.

    Settings are the fields of `AttentionConfig`, as keywords: `MLAttention(hidden_size=512, num_heads=8, rngs=rngs)`;
    or `cfg`, or the attention of a `ModelConfig`, with the fields given as keywords replaced. `norm(width, rngs=rngs)`
    creates the norm of a latent, as `nnx.LayerNorm` does; by default an RMSNorm. With `index_topk` an indexer selects
    the keys (DSA); in a model's layer that shares those of the layer before it `has_indexer` is false.
    """

    def __init__(
        self,
        cfg: AttentionConfig | ModelConfig | None = None,
        *,
        rngs: nnx.Rngs,
        precision: Precision | None = None,
        kernels: KernelConfig = KernelConfig(),
        norm: Callable[..., nnx.Module] | None = None,
        has_indexer: bool = True,
        **fields: Any,
    ):
        cfg = cfg.attention if isinstance(cfg, ModelConfig) else cfg
        self.cfg = cfg = dataclasses.replace(cfg, **fields) if cfg else AttentionConfig(**fields)
        self.kernels, self.precision = kernels, (precision := precision or Precision.default())
        D, H, Q, C = cfg.hidden_size, cfg.num_heads, cfg.q_lora_rank, cfg.kv_lora_rank
        N, R, V = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim

        def weight(axes: dict[str, int], *contracts: str) -> nnx.Param:
            return matrix(rngs, axes, contracts=contracts, std=cfg.initializer_range, dtype=precision.param)

        def latent_norm(axis: str, width: int) -> Callable[[Array], Array]:
            default = norm is None
            return RMSNorm(axis, width, LATENT_NORM_EPS, precision) if default else norm(width, rngs=rngs)

        if Q is None:
            self.q = weight({"embed": D, "heads": H, "qk": N + R}, "embed")
        else:
            self.q_a = weight({"embed": D, "q_latent": Q}, "embed")
            self.q_a_norm = latent_norm("q_latent", Q)
            self.q_b = weight({"q_latent": Q, "heads": H, "qk": N + R}, "q_latent")
        self.kv_a = weight({"embed": D, "kv_latent": C + R}, "embed")
        self.kv_a_norm = latent_norm("kv_latent", C)
        self.kv_b = weight({"kv_latent": C, "heads": H, "kv": N + V}, "kv_latent")
        self.o = weight({"heads": H, "v": V, "embed": D}, "heads", "v")
        self.has_indexer = cfg.index_topk is not None and has_indexer
        if self.has_indexer:
            self.indexer = Indexer(cfg, rngs=rngs, precision=precision)
        self.deterministic = False
        """Without dropout: set by `eval()` and `train()` of any module around this one."""

    @under_auto_axes(lambda tokens: tokens)
    def __call__(
        self,
        x_BTD: Activations,
        inputs_kv_BSD: Float[Array, "B S D"] | None = None,
        *,
        segment_ids: Ids | None = None,
        positions: Ids | None = None,
        mask: Bool[Array, "B S"] | None = None,
        kv_segment_ids: Int[Array, "B S"] | None = None,
        kv_positions: Int[Array, "B S"] | None = None,
        selected_keys: SelectedKeys | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | Array | None = None,
    ) -> Activations:
        """Attention within segments, the documents of a packed sequence. Positions default to 0, 1, 2, …

        Keys are those of `x_BTD`, or of `inputs_kv_BSD` in cross attention, which has segment ids and positions of its
        own and is not causal. `mask` is False where a key is padding; a token without any key gets 0. `selected_keys`
        replaces the selection of the indexer. Dropout takes a key from `rngs` (its stream `dropout`), or is a key, and
        is off if `deterministic`, by default after `eval()`.
        """
        shape_BTD = require_shape("x", x_BTD, "B", "T", self.cfg.hidden_size)
        cross = inputs_kv_BSD is not None
        kv_BSD = x_BTD if inputs_kv_BSD is None else inputs_kv_BSD
        if cross:
            require_shape("inputs_kv", kv_BSD, shape_BTD[0], "S", self.cfg.hidden_size)
            message = "attends to another sequence: set causal=False and no sliding_window"
            require(not (self.cfg.causal or self.cfg.sliding_window), "inputs_kv", shape_text(kv_BSD), message)
        else:
            given = kv_segment_ids is not None or kv_positions is not None
            message = "describe the keys of inputs_kv; give segment_ids and positions"
            require(not given, "kv_segment_ids or kv_positions", "given", message)
            kv_segment_ids, kv_positions = segment_ids, positions
        x_BTD, kv_BSD = (x.astype(self.precision.compute) for x in (x_BTD, kv_BSD))
        if not x_BTD.size:
            return x_BTD
        positions = _default_positions(x_BTD, positions)
        q_cos_sin = rotary(self.cfg, positions)
        with jax.named_scope("queries"):
            latent_BTQ = self.query_latent(x_BTD, sharded_einsum)
        with jax.named_scope("latent"):
            kv_cos_sin = rotary(self.cfg, _default_positions(kv_BSD, kv_positions)) if cross else q_cos_sin
            c_BSC, k_pe_BSR = self.compress_kv(kv_BSD, kv_cos_sin, sharded_einsum)
        if kv_segment_ids is None:
            kv_segment_ids = jnp.ones(kv_BSD.shape[:2], jnp.int32)
        query_segments = None
        if cross or mask is not None:
            query_segments = jnp.ones(x_BTD.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        if mask is not None:
            require_shape("mask", mask, *kv_BSD.shape[:2])
            fix = "must be boolean, False where a key is padding: give attention_mask == 1 of what transformers takes"
            require(mask.dtype == jnp.bool_, "mask", shape_text(mask), fix)
            kv_segment_ids = jnp.where(mask, kv_segment_ids, jnp.iinfo(kv_segment_ids.dtype).min)
        dropout = self._dropout_key(self.deterministic if deterministic is None else deterministic, rngs)
        if selected_keys is None:
            selected_keys = self._select(x_BTD, latent_BTQ, q_cos_sin, kv_segment_ids, query_segments)
        queries = Queries(latent_BTQ, positions, token_numbers(*x_BTD.shape[:2]), query_segments, selected_keys)
        swapped = needs_balance(x_BTD.shape, masking_of(self.cfg))
        if swapped:  # before their projection, and the result after its own: fewer bytes than those of all heads
            queries = swap_queries(queries)
        with jax.named_scope("queries"):
            latent_BTQ, positions, numbers = queries[:3]
            cos_sin = rotary(self.cfg, positions) if swapped else q_cos_sin
            q_BTHA = self.queries(latent_BTQ, positions, cos_sin, sharded_einsum, numbers=numbers)
        y_BTHV = attend(
            q_BTHA, c_BSC, k_pe_BSR, kv_segment_ids, queries, self.kv_b, weight_of(self, "kv_b"),
            adapter(self, "kv_b"), self.cfg, self.kernels, self.precision.compute, dropout_key_2=dropout,
            swapped=swapped,
        )  # fmt: skip
        y_BTD = project(sharded_einsum, "BTHV,HVD->BTD", y_BTHV, self, "o", self.precision.compute, numbers=numbers)
        return swap_queries(y_BTD) if swapped else y_BTD

    def select_keys(
        self, x_BTD: Activations, segment_ids: Ids | None = None, positions: Ids | None = None
    ) -> SelectedKeys | None:
        """The keys that the indexer selects for each token, for this layer and those that share them; None for all."""
        x_BTD = x_BTD.astype(self.precision.compute)
        segment_ids = jnp.ones(x_BTD.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        cos_sin = rotary(self.cfg, _default_positions(x_BTD, positions))
        return self._select(x_BTD, self.query_latent(x_BTD, sharded_einsum), cos_sin, segment_ids, None)

    def _select(
        self, x_BTD: Array, latent_BTQ: Array, cos_sin: CosSin, segments_BS: Array, query_segments_BT: Array | None
    ) -> SelectedKeys | None:
        if self.cfg.index_topk is None or x_BTD.shape[1] <= self.cfg.index_topk:
            return None
        query_segments_BT = segments_BS if query_segments_BT is None else query_segments_BT
        return self.indexer.select(x_BTD, latent_BTQ, cos_sin, (query_segments_BT, segments_BS))

    def _dropout_key(self, deterministic: bool, rngs: nnx.Rngs | Array | None) -> Array | None:
        if deterministic or not self.cfg.dropout:
            return None
        message = "needs random numbers: give rngs=nnx.Rngs(dropout=seed) or a key, or call eval() first"
        require(rngs is not None, "dropout", self.cfg.dropout, message)
        return dropout_key(rngs.dropout() if isinstance(rngs, nnx.Rngs) else jnp.asarray(rngs))

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike | None = None) -> KVCache:
        """An empty cache for `prefill` and `decode` of `batch` sequences of up to `max_length` tokens, which is rounded
        up to a power of two or, from 256 on, to a multiple of 256. The dtype is by default that of computation; int8
        quantizes each entry. Within `jax.set_mesh` sequences are sharded over the batch axes of the mesh."""
        return init_cache(self.cfg, batch, max_length, dtype or self.precision.compute, layers=1)

    @under_auto_axes(lambda tokens, cache: (tokens, cache))
    def prefill(
        self, x_bTD: NewTokens, cache: KVCache, lengths: Lengths | None = None, *, slots: Slots | None = None
    ) -> tuple[NewTokens, KVCache]:
        """`decode` of many tokens at once: prompts, or chunks of them. `lengths` are the tokens of each sequence, 0
        included, before padding on the right; outputs of padding are arbitrary. `slots` are the sequences of the cache
        that the batch has, by default all in order."""
        return self._append(x_bTD, cache, lengths, None, slots, "expanded")

    @under_auto_axes(lambda tokens, cache: (tokens, cache))
    def decode(self, x_bTD: NewTokens, cache: KVCache, active: Active | None = None) -> tuple[NewTokens, KVCache]:
        """Append new tokens to the cached ones, usually one per sequence, and attend to both: the output for the new
        tokens, as a forward pass over all tokens would give it, and the new cache. Sequences that are not `active` stay
        as they are, with arbitrary outputs.

        Raises `ConfigError` if a cache is full. Under `jax.jit`, where lengths are not known, the outputs of a sequence
        whose tokens do not fit are NaN, and its cache stays as it is. Not differentiable.
        """
        return self._append(x_bTD, cache, None, active, None, "absorbed")

    def _append(
        self, x_bTD: Array, cache: KVCache, lengths: Array | None, active: Array | None, slots: Array | None, form: Form
    ) -> tuple[Array, KVCache]:
        require_shape("x", x_bTD, "b", "T", self.cfg.hidden_size)
        require_cache(self.cfg, cache, layers=1)
        new = new_positions(cache, x_bTD.shape, lengths, active, slots)
        cos_sin = rotary(self.cfg, new.positions_bT)
        metadata = AttentionMetadata(slots, new.positions_bT, new.length_b, cos_sin, form)
        y_bTD, entries_LBSW, _ = self.extend(x_bTD, cache.entries_LBSW, metadata)
        y_bTD = jnp.where(new.fits_b[:, None, None], y_bTD, jnp.nan)
        return y_bTD, constrain_cache(KVCache(entries_LBSW, new.length_B))

    def extend(
        self, x_bTD: NewTokens, cache_LBSW: CacheEntries, metadata: AttentionMetadata
    ) -> tuple[NewTokens, CacheEntries, NewSelectedKeys | None]:
        """`prefill` and `decode` in one layer of a cache that several layers share: write the entries of new tokens,
        and attend over their sequences. Returns the output, the new entries, and the keys that an indexer selects."""
        require(self.cfg.causal, "causal", False, "a token in a cache does not see later ones; call the module instead")
        x_bTD, layer, ids_b = x_bTD.astype(self.precision.compute), metadata.layer, metadata.adapter_ids_b
        with jax.named_scope("queries"):
            latent_bTQ = self.query_latent(x_bTD, plain_einsum, ids_b)
            q_bTHA = self.queries(latent_bTQ, metadata.positions_bT, metadata.cos_sin, plain_einsum, ids_b)
        with jax.named_scope("latent"):
            new_bTW = jnp.concatenate(self.compress_kv(x_bTD, metadata.cos_sin, plain_einsum, ids_b), axis=-1)
            if cache_LBSW.dtype == jnp.int8:
                new_bTW = quantize(new_bTW, self.cfg.kv_lora_rank)
            if self.cfg.index_topk is not None:
                k_bTZ = jnp.zeros((*new_bTW.shape[:2], index_columns(self.cfg, cache_LBSW.dtype)), cache_LBSW.dtype)
                if self.has_indexer:  # a layer without one leaves its columns empty
                    k_bTZ = self.indexer.cache_entries(x_bTD, metadata.cos_sin, cache_LBSW.dtype)
                new_bTW = jnp.concatenate([new_bTW.astype(k_bTZ.dtype), k_bTZ], axis=-1)
            slots_b, start_b = metadata.slots_b, metadata.positions_bT[:, 0]
            new_bTW = new_bTW.astype(cache_LBSW.dtype)
            cache_LBSW = write_cache(cache_LBSW, new_bTW, layer, start_b, slots_b, metadata.length_b)
        selected_bTw = None
        if self.cfg.index_topk is not None and self.cfg.index_topk < cache_LBSW.shape[2]:
            select = lambda: self.indexer.select_cached(x_bTD, latent_bTQ, cache_LBSW, metadata)  # noqa: E731
            selected_bTw = selection(select, metadata.selected_bTw, metadata.shares_keys)
        lora = adapter(self, "kv_b")
        with jax.named_scope("attend"):
            y_bTHV = cached_attention(
                q_bTHA, cache_LBSW, value_of(self, "kv_b").astype(self.precision.compute), metadata.positions_bT,
                lora=None if lora is None else lora.factors(self.precision.compute, ids_b), layer=layer,
                slots_b=slots_b, scale=softmax_scale(self.cfg), form=metadata.form, window=self.cfg.sliding_window,
                selected_bTw=selected_bTw, index_width=index_columns(self.cfg, cache_LBSW.dtype),
                constrain=constrain_slots if slots_b is None else constrain_decode_activations,
                map_slots=map_slots, implementation=self.kernels.attention,
            )  # fmt: skip
        y_bTHV = constrain_decode_heads(y_bTHV)
        y_bTD = project(plain_einsum, "bTHV,HVD->bTD", y_bTHV, self, "o", self.precision.compute, ids_b)
        return y_bTD, cache_LBSW, selected_bTw

    def query_latent(
        self, x_BTD: Activations, einsum: Einsum, adapter_ids: Int[Array, "B"] | None = None
    ) -> Float[Array, "B T Q"]:
        """What the queries of all heads come from: the normed latent, or without `q_lora_rank` the input."""
        if self.cfg.q_lora_rank is None:
            return x_BTD
        compute = self.precision.compute
        latent_BTQ = project(einsum, "BTD,DQ->BTQ", x_BTD, self, "q_a", compute, adapter_ids)
        latent_BTQ = self.q_a_norm(latent_BTQ).astype(compute)
        return self._scaled(latent_BTQ) if self.cfg.mla_scale_q_lora else latent_BTQ

    def queries(
        self,
        latent_BTQ: Float[Array, "B T Q"],
        positions_BT: Ids,
        cos_sin: CosSin,
        einsum: Einsum,
        adapter_ids: Int[Array, "B"] | None = None,
        numbers: UInt32[Array, "B T"] | None = None,
    ) -> Float[Array, "B T H A"]:
        """Queries of all heads; the last R values of each are rotated by position. `numbers` are those of the tokens
        in `project`."""
        name, compute = "q" if self.cfg.q_lora_rank is None else "q_b", self.precision.compute
        q_BTHA = project(einsum, "BTQ,QHA->BTHA", latent_BTQ, self, name, compute, adapter_ids, numbers=numbers)
        q_nope, q_pe = jnp.split(q_BTHA, [self.cfg.qk_nope_head_dim], axis=-1)
        q_BTHA = jnp.concatenate([q_nope, self._rotate(q_pe, cos_sin)], axis=-1)
        scale_BT = query_scale(self.cfg, positions_BT)
        return q_BTHA if scale_BT is None else q_BTHA * scale_BT[..., None, None].astype(q_BTHA.dtype)

    def compress_kv(
        self, x_BTD: Activations, cos_sin: CosSin, einsum: Einsum, adapter_ids: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B T R"]]:
        """What the KV cache holds of a token: the normed latent, and the rotated key part that all heads share."""
        both_BTC = project(einsum, "BTD,DC->BTC", x_BTD, self, "kv_a", self.precision.compute, adapter_ids)
        c_BTC, k_pe_BTR = jnp.split(both_BTC, [self.cfg.kv_lora_rank], axis=-1)
        c_BTC = self.kv_a_norm(c_BTC).astype(c_BTC.dtype)
        c_BTC = self._scaled(c_BTC) if self.cfg.mla_scale_kv_lora else c_BTC
        return c_BTC, self._rotate(k_pe_BTR[:, :, None], cos_sin)[:, :, 0]

    def _scaled(self, latent_BTC: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """A normed latent with the norm that activations of width D have, so that its rank does not change the variance
        of queries and keys (LongCat-Flash, arXiv 2509.01322, section 2.3.1)."""
        return latent_BTC * math.sqrt(self.cfg.hidden_size / latent_BTC.shape[-1])

    def _rotate(self, x_BTHR: Float[Array, "B T H R"], cos_sin: CosSin) -> Float[Array, "B T H R"]:
        return rotate(x_BTHR, *cos_sin, interleaved=self.cfg.rope_interleave)


def _default_positions(x_BTD: Activations, positions: Ids | None) -> Ids:
    return jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2]) if positions is None else positions
