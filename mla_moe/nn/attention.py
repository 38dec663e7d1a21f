"""Multi-head latent attention (MLA; DeepSeek-V2, section 2.1): keys and values of all heads come from one latent."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn.kv_cache import AttentionMetadata, KVCache, LayerIndex, NewTokens, write_cache
from mla_moe.nn.layers import RMSNorm
from mla_moe.nn.param import Precision, matrix
from mla_moe.nn.rope import CosSin, rotary, rotate, softmax_scale
from mla_moe.ops.attention import attention
from mla_moe.ops.cached_attention import cached_attention
from mla_moe.ops.kv_quantization import quantize
from mla_moe.parallel.mesh import BATCH_SPEC, mesh_axes, token_mesh
from mla_moe.parallel.sharded_einsum import Einsum, plain_einsum, sharded_einsum, weight_spec
from mla_moe.parallel.sharding import all_gather_weight, constrain_decode_activations, constrain_slots

# transformers and DeepSeek's code use this value for the norms of latents, not the config's rms_norm_eps.
LATENT_NORM_EPS = 1e-6


class MLAttention(nnx.Module):
    """Causal self-attention `[B, T, D] -> [B, T, D]` with a latent of `kv_lora_rank` values per token.

    With `q_lora_rank` queries come from a latent too. Usable alone: needs no mesh and no global state.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision | None = None,
        kernels: KernelConfig = KernelConfig(),
    ):
        self.cfg = cfg
        self.kernels = kernels
        self.precision = precision = precision or Precision.default()
        D, H, Q, C = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank
        N, R, V = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim

        def weight(axes: dict[str, int], *contracts: str) -> nnx.Param:
            return matrix(rngs, axes, contracts=contracts, std=cfg.initializer_range, dtype=precision.param)

        if Q is None:
            self.q = weight({"embed": D, "heads": H, "qk": N + R}, "embed")
        else:
            self.q_a = weight({"embed": D, "q_latent": Q}, "embed")
            self.q_a_norm = RMSNorm("q_latent", Q, LATENT_NORM_EPS, precision)
            self.q_b = weight({"q_latent": Q, "heads": H, "qk": N + R}, "q_latent")
        self.kv_a = weight({"embed": D, "kv_latent": C + R}, "embed")
        self.kv_a_norm = RMSNorm("kv_latent", C, LATENT_NORM_EPS, precision)
        self.kv_b = weight({"kv_latent": C, "heads": H, "kv": N + V}, "kv_latent")
        self.o = weight({"heads": H, "v": V, "embed": D}, "heads", "v")

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention within segments, the documents of a packed sequence. Positions default to 0, 1, 2, …"""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        x_BTD = x_BTD.astype(self.precision.compute)
        if not x_BTD.size:
            return x_BTD
        cos_sin = rotary(self.cfg, positions)
        with jax.named_scope("queries"):
            q_BTHA = self.queries(x_BTD, cos_sin, sharded_einsum)
        with jax.named_scope("latent"):
            c_BTC, k_pe_BTR = self.compress_kv(x_BTD, cos_sin, sharded_einsum)
        if segment_ids is None:
            segment_ids = jnp.ones(x_BTD.shape[:2], jnp.int32)
        kv_b_CHk = self.kv_b[...].astype(self.precision.compute)
        y_BTHV = self._attend(q_BTHA, c_BTC, k_pe_BTR, kv_b_CHk, segment_ids)
        return sharded_einsum("BTHV,HVD->BTD", y_BTHV, self.o, self.precision.compute)

    def extend(
        self, x_bTD: NewTokens, cache_LBSW: KVCache, layer: LayerIndex, metadata: AttentionMetadata
    ) -> tuple[NewTokens, KVCache]:
        """Prefill or decode: write the cache entries of new tokens into layer `layer` of the KV cache, and attend over
        their sequence slots. Returns the output and the new cache."""
        x_bTD = x_bTD.astype(self.precision.compute)
        with jax.named_scope("queries"):
            q_bTHA = self.queries(x_bTD, metadata.cos_sin, plain_einsum)
        with jax.named_scope("latent"):
            new_bTW = jnp.concatenate(self.compress_kv(x_bTD, metadata.cos_sin, plain_einsum), axis=-1)
            if cache_LBSW.dtype == jnp.int8:
                new_bTW = quantize(new_bTW, self.cfg.kv_lora_rank)
            slots_b = None if metadata.all_slots else metadata.slots_b
            start_b = metadata.positions_bT[:, 0]
            cache_LBSW = write_cache(cache_LBSW, new_bTW, layer=layer, slots_b=slots_b, start_b=start_b)
        with jax.named_scope("attend"):
            y_bTHV = cached_attention(
                q_bTHA,
                cache_LBSW,
                self.kv_b[...].astype(self.precision.compute),
                metadata.positions_bT,
                layer=layer,
                slots_b=slots_b,
                scale=softmax_scale(self.cfg),
                form=metadata.form,
                constrain=constrain_slots if metadata.all_slots else constrain_decode_activations,
            )
        return plain_einsum("bTHV,HVD->bTD", y_bTHV, self.o, self.precision.compute), cache_LBSW

    def queries(self, x_BTD: Float[Array, "B T D"], cos_sin: CosSin, einsum: Einsum) -> Float[Array, "B T H A"]:
        """Queries of all heads; the last R values of each are rotated by position."""
        compute = self.precision.compute
        if self.cfg.q_lora_rank is None:
            q_BTHA = einsum("BTD,DHA->BTHA", x_BTD, self.q, compute)
        else:
            q_BTQ = self.q_a_norm(einsum("BTD,DQ->BTQ", x_BTD, self.q_a, compute))
            q_BTHA = einsum("BTQ,QHA->BTHA", q_BTQ, self.q_b, compute)
        q_nope, q_pe = jnp.split(q_BTHA, [self.cfg.qk_nope_head_dim], axis=-1)
        return jnp.concatenate([q_nope, rotate(q_pe, *cos_sin)], axis=-1)

    def compress_kv(
        self, x_BTD: Float[Array, "B T D"], cos_sin: CosSin, einsum: Einsum
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B T R"]]:
        """What the KV cache holds of a token: the normed latent, and the rotated key part that all heads share."""
        both_BTC = einsum("BTD,DC->BTC", x_BTD, self.kv_a, self.precision.compute)
        c_BTC, k_pe_BTR = jnp.split(both_BTC, [self.cfg.kv_lora_rank], axis=-1)
        return self.kv_a_norm(c_BTC), rotate(k_pe_BTR[:, :, None], *cos_sin)[:, :, 0]

    def _attend(
        self, q_BTHA: Array, c_BTC: Array, k_pe_BTR: Array, kv_b_CHk: Array, segment_ids: Array
    ) -> Float[Array, "B T H V"]:
        """Under a mesh each device computes its heads (tensor parallelism) for its queries. With context parallelism it
        all-gathers the latent, C + R values per token, where keys and values would be H · (A + V)."""

        def local(
            q_bthA: Array, c_btC: Array, k_pe_btR: Array, kv_b: Array, segments_bt: Array, offset: Array | None = None
        ) -> Array:
            with jax.named_scope("expand"):
                k_bthA, v_bthV = self.expand_kv(c_btC, k_pe_btR, kv_b)
            with jax.named_scope("attend"):
                run = partial(attention, query_offset=offset, implementation=self.kernels.attention)
                return run(q_bthA, k_bthA, v_bthV, segments_bt, scale=softmax_scale(self.cfg))

        mesh = token_mesh(q_BTHA.shape)
        if mesh is None:
            return local(q_BTHA, c_BTC, k_pe_BTR, kv_b_CHk, segment_ids)

        kv_b_spec = weight_spec(self.kv_b, mesh)
        heads = "tensor" if "tensor" in mesh_axes(kv_b_spec[1]) else None

        def sharded(q_bthA: Array, c_btC: Array, k_pe_btR: Array, kv_b: Array, segments_bt: Array) -> Array:
            kv_b = all_gather_weight(kv_b, kv_b_spec)
            if mesh.shape["context"] == 1:
                return local(q_bthA, c_btC, k_pe_btR, kv_b, segments_bt)
            offset = jax.lax.axis_index("context") * q_bthA.shape[1]
            c, k_pe, segments = (
                jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (c_btC, k_pe_btR, segments_bt)
            )
            return local(q_bthA, c, k_pe, kv_b, segments, offset)

        tokens = P(*BATCH_SPEC)
        return jax.shard_map(
            sharded,
            in_specs=(P(*BATCH_SPEC, heads), tokens, tokens, kv_b_spec, tokens),
            out_specs=P(*BATCH_SPEC, heads),
            check_vma=False,
        )(q_BTHA, c_BTC, k_pe_BTR, kv_b_CHk, segment_ids)

    def expand_kv(
        self, c_BTC: Float[Array, "B T C"], k_pe_BTR: Float[Array, "B T R"], kv_b_CHk: Float[Array, "C H k"]
    ) -> tuple[Float[Array, "B T H A"], Float[Array, "B T H V"]]:
        """Keys and values of every head from the latent and the shared key part."""
        kv_BTHk = jnp.einsum("BTC,CHk->BTHk", c_BTC, kv_b_CHk)
        k_nope, v_BTHV = jnp.split(kv_BTHk, [self.cfg.qk_nope_head_dim], axis=-1)
        k_pe = jnp.broadcast_to(k_pe_BTR[:, :, None], (*k_nope.shape[:-1], k_pe_BTR.shape[-1]))
        return jnp.concatenate([k_nope, k_pe], axis=-1), v_BTHV
