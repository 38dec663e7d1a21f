"""The indexer of DeepSeek Sparse Attention (DSA; DeepSeek-V3.2, section 2.1): which keys a query attends to.

The released code scores in FP8, after a Hadamard transform of queries and keys. The transform is orthogonal and changes
no product; scores here are of the compute dtype, in float32.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from mla_moe.config import AttentionConfig
from mla_moe.nn.kv_cache import AttentionMetadata, CacheEntries, NewSelectedKeys, NewTokens, index_columns
from mla_moe.nn.layers import Activations, Ids, LayerNorm
from mla_moe.nn.param import Precision, matrix
from mla_moe.nn.rope import CosSin, rotate
from mla_moe.ops.cached_attention import read_cache
from mla_moe.ops.key_selection import KEY_BLOCK, SelectedKeys, select_keys
from mla_moe.ops.kv_quantization import dequantize, quantize
from mla_moe.ops.masking import Masking
from mla_moe.parallel.collectives import all_gather, axis_index, shard_map
from mla_moe.parallel.mesh import BATCH_SPEC, token_mesh
from mla_moe.parallel.sharded_einsum import Einsum, plain_einsum, sharded_einsum

_KEY_NORM_EPS = 1e-6


class Indexer(nnx.Module):
    """Queries from the query latent, one key per token, and a weight for each head, from which `ops.key_selection`
    scores. No gradient of a language-model loss reaches it, as in transformers, so the optimizer leaves it as it is:
    DeepSeek trains it by a loss of its own."""

    def __init__(self, cfg: AttentionConfig, *, rngs: nnx.Rngs, precision: Precision):
        D, H, width = cfg.hidden_size, cfg.index_n_heads, cfg.index_head_dim
        assert cfg.q_lora_rank is not None  # `AttentionConfig`

        def weight(axes: dict[str, int], contracts: str, dtype: DTypeLike) -> nnx.Param:
            return matrix(rngs, axes, contracts=(contracts,), std=cfg.initializer_range, dtype=dtype)

        self.q = weight({"q_latent": cfg.q_lora_rank, "index_heads": H, "qk": width}, "q_latent", precision.param)
        self.k = weight({"embed": D, "qk": width}, "embed", precision.param)
        self.k_norm = LayerNorm("qk", width, _KEY_NORM_EPS, precision)
        self.head_weights = weight({"embed": D, "index_weights": H}, "embed", jnp.float32)
        for variable in (self.q, self.k, self.k_norm.scale, self.k_norm.bias, self.head_weights):
            variable.set_metadata(frozen=True)
        self.cfg, self.precision = cfg, precision

    def queries(
        self, x_BTD: Activations, latent_BTQ: Float[Array, "B T Q"], cos_sin: CosSin, einsum: Einsum
    ) -> tuple[Float[Array, "B T H I"], Float[Array, "B T H"]]:
        """Queries and the weights of heads, which are float32 and include the scale of the products."""
        q_BTHI = self._rotate(einsum("BTQ,QHI->BTHI", latent_BTQ, self.q, self.precision.compute), cos_sin)
        with jax.default_matmul_precision("highest"):
            weight_BTH = einsum("BTD,DH->BTH", x_BTD.astype(jnp.float32), self.head_weights, jnp.float32)
        return q_BTHI, weight_BTH * (self.cfg.index_n_heads * self.cfg.index_head_dim) ** -0.5

    def keys(self, x_BTD: Activations, cos_sin: CosSin, einsum: Einsum) -> Float[Array, "B T I"]:
        """What the cache holds of a token for the indexer."""
        k_BTI = self.k_norm(einsum("BTD,DI->BTI", x_BTD, self.k, self.precision.compute))
        return self._rotate(k_BTI[:, :, None], cos_sin)[:, :, 0]

    def select(
        self, x_BTD: Activations, latent_BTQ: Float[Array, "B T Q"], cos_sin: CosSin, segments: tuple[Ids, Ids]
    ) -> SelectedKeys:
        """The keys of each token for training, of equal `segments` of queries and keys. Under a mesh each device
        selects for its queries; with context parallelism it all-gathers the keys."""
        x_BTD, latent_BTQ = jax.lax.stop_gradient((x_BTD, latent_BTQ))
        with jax.named_scope("indexer"):
            queries = self.queries(x_BTD, latent_BTQ, cos_sin, sharded_einsum)
            inputs = jax.lax.stop_gradient((*queries, self.keys(x_BTD, cos_sin, sharded_einsum)))
        mesh = token_mesh(x_BTD.shape)

        def local(q_btHI: Array, weight_btH: Array, k_bSI: Array, segments_bt: Array, segments_bS: Array) -> Array:
            index_t = jnp.arange(q_btHI.shape[1], dtype=jnp.int32)
            if mesh is not None and mesh.shape["context"] > 1:
                index_t += axis_index("context") * q_btHI.shape[1]
                k_bSI, segments_bS = (all_gather(x, axes="context", axis=1) for x in (k_bSI, segments_bS))
            S = k_bSI.shape[1]
            padding = (0, 0), (0, -S % min(KEY_BLOCK, S))
            k_bSI, segments_bS = jnp.pad(k_bSI, (*padding, (0, 0))), jnp.pad(segments_bS, padding)
            index_bt = jnp.broadcast_to(index_t, q_btHI.shape[:2])
            read = partial(jax.lax.dynamic_slice_in_dim, k_bSI, axis=1)
            return self._score(q_btHI, weight_btH, read, index_bt, k_bSI.shape[1], (segments_bt, segments_bS))

        with jax.named_scope("indexer"):
            run = local if mesh is None else shard_map(local, (BATCH_SPEC,) * 5, BATCH_SPEC)
            return run(*inputs, *segments)

    def cache_entries(self, x_bTD: NewTokens, cos_sin: CosSin, dtype: DTypeLike) -> Num[Array, "b T Z"]:
        """The keys of new tokens as a cache of this dtype stores them."""
        k_bTI = self.keys(x_bTD, cos_sin, plain_einsum)
        return quantize(k_bTI, self.cfg.qk_rope_head_dim) if jnp.dtype(dtype) == jnp.int8 else k_bTI.astype(dtype)

    def select_cached(
        self,
        x_bTD: NewTokens,
        latent_bTQ: Float[Array, "b T Q"],
        cache_LBSW: CacheEntries,
        metadata: AttentionMetadata,
    ) -> NewSelectedKeys:
        """The cached keys of each new token, whose own are in the cache already."""
        (S, Z), width = cache_LBSW.shape[2:], index_columns(self.cfg, cache_LBSW.dtype)
        columns, quantized, compute = (Z - width, width), cache_LBSW.dtype == jnp.int8, self.precision.compute

        def read(start: Array, size: int) -> Array:
            k_bsZ = read_cache(cache_LBSW, metadata.layer, metadata.slots_b, (start, size), columns)
            return dequantize(k_bsZ, self.cfg.qk_rope_head_dim, compute) if quantized else k_bsZ.astype(compute)

        with jax.named_scope("indexer"):
            queries = self.queries(x_bTD, latent_bTQ, metadata.cos_sin, plain_einsum)
            return self._score(*queries, read, metadata.positions_bT, S, None)

    def _score(
        self,
        q_BTHI: Array,
        weight_BTH: Array,
        keys: Callable[[Array, int], Array],
        index_BT: Array,
        num_keys: int,
        segments: tuple[Array, Array] | None,
    ) -> SelectedKeys:
        assert self.cfg.index_topk is not None
        masking = Masking(self.cfg.causal, self.cfg.sliding_window)
        return select_keys(
            q_BTHI, weight_BTH, keys, index_BT, num_keys=num_keys, topk=self.cfg.index_topk, masking=masking,
            segments=segments,
        )  # fmt: skip

    def _rotate(self, x_BTHI: Array, cos_sin: CosSin) -> Array:
        """The first R values of each head are rotated by position, where attention rotates the last."""
        pe, rest = jnp.split(x_BTHI, [self.cfg.qk_rope_head_dim], axis=-1)
        pe = rotate(pe, *cos_sin, interleaved=self.cfg.indexer_rope_interleave)
        return jnp.concatenate([pe, rest], axis=-1)


def selection(
    select: Callable[[], SelectedKeys | None], of_layer_before: SelectedKeys | None, shares: Bool[Array, ""] | bool
) -> SelectedKeys | None:
    """The keys of the layer before if this one shares them, which in a scan over layers only the program knows."""
    if isinstance(shares, bool):
        return of_layer_before if shares else select()
    return jax.lax.cond(shares, lambda: of_layer_before, select)
