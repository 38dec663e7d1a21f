"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads come from one small latent."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn.kv_cache import AttentionMetadata, write_cache
from mla_moe.nn.norm import RMSNorm
from mla_moe.nn.param import Precision, matrix
from mla_moe.nn.rope import rotary, rotate, softmax_scale
from mla_moe.ops.attention import attention
from mla_moe.ops.cached_attention import cached_attention
from mla_moe.ops.kv_quantization import quantize
from mla_moe.parallel.mesh import BATCH_SPEC, mesh_axes, token_mesh
from mla_moe.parallel.sharded_einsum import Einsum, plain_einsum, sharded_einsum, weight_spec
from mla_moe.parallel.sharding import all_gather_weight, constrain_decode_activations, constrain_slots

# transformers and the released code fix this value, whatever the config's rms_norm_eps.
LATENT_NORM_EPS = 1e-6


class MLAttention(nnx.Module):
    """Causal self-attention `[B, T, D] -> [B, T, D]` with a latent of `kv_lora_rank` values per token.

    With `q_lora_rank` queries pass through a latent too. Works alone: no mesh, no globals.
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

        def weight(axes, *contracts):
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
        """Attend within segments (documents packed into a row). Positions default to 0, 1, 2, …"""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        x_BTD = x_BTD.astype(self.precision.compute)
        if not x_BTD.size:
            return x_BTD
        cos_sin = rotary(self.cfg, positions)
        with jax.named_scope("queries"):
            q_BTHA = self.queries(x_BTD, cos_sin, sharded_einsum)
        with jax.named_scope("latent"):
            c_BTC, k_pe_BTR = self.latent(x_BTD, cos_sin, sharded_einsum)
        if segment_ids is None:
            segment_ids = jnp.ones(x_BTD.shape[:2], jnp.int32)
        y_BTHV = self._attend(q_BTHA, c_BTC, k_pe_BTR, self.use(self.kv_b), segment_ids)
        return sharded_einsum("BTHV,HVD->BTD", y_BTHV, self.o, self.precision.compute)

    def extend(
        self,
        x_bTD: Float[Array, "b T D"],
        cache_LBSW: Num[Array, "L B S W"],
        layer: Int[Array, ""] | int,
        reach: AttentionMetadata,
    ) -> tuple[Float[Array, "b T D"], Num[Array, "L B S W"]]:
        """New tokens at the end of what their slots hold: the cache with their entries, and attention over it."""
        x_bTD = x_bTD.astype(self.precision.compute)
        with jax.named_scope("queries"):
            q_bTHA = self.queries(x_bTD, reach.cos_sin, plain_einsum)
        with jax.named_scope("latent"):
            new_bTW = jnp.concatenate(self.latent(x_bTD, reach.cos_sin, plain_einsum), axis=-1)
            if cache_LBSW.dtype == jnp.int8:
                new_bTW = quantize(new_bTW, self.cfg.kv_lora_rank)
            slots_b = None if reach.every_slot else reach.slots_b
            cache_LBSW = write_cache(
                cache_LBSW, new_bTW, layer=layer, slots_b=slots_b, start_b=reach.positions_bT[:, 0]
            )
        with jax.named_scope("attend"):
            y_bTHV = cached_attention(
                q_bTHA,
                cache_LBSW,
                self.use(self.kv_b),
                reach.positions_bT,
                layer=layer,
                slots_b=slots_b,
                scale=softmax_scale(self.cfg),
                form=reach.form,
                spread=constrain_slots if reach.every_slot else constrain_decode_activations,
            )
        return plain_einsum("bTHV,HVD->bTD", y_bTHV, self.o, self.precision.compute), cache_LBSW

    def use(self, weight: nnx.Param) -> Array:
        return weight[...].astype(self.precision.compute)

    def queries(self, x_BTD, cos_sin, product: Einsum) -> Float[Array, "B T H A"]:
        """Queries, the last R of each head turned by position."""
        compute = self.precision.compute
        if self.cfg.q_lora_rank is None:
            q_BTHA = product("BTD,DHA->BTHA", x_BTD, self.q, compute)
        else:
            q_BTQ = self.q_a_norm(product("BTD,DQ->BTQ", x_BTD, self.q_a, compute))
            q_BTHA = product("BTQ,QHA->BTHA", q_BTQ, self.q_b, compute)
        q_nope, q_pe = jnp.split(q_BTHA, [self.cfg.qk_nope_head_dim], axis=-1)
        return jnp.concatenate([q_nope, rotate(q_pe, *cos_sin)], axis=-1)

    def latent(self, x_BTD, cos_sin, product: Einsum) -> tuple[Float[Array, "B T C"], Float[Array, "B T R"]]:
        """What a cache keeps of a token: the normed latent, and the one key part that knows the position."""
        both_BTC = product("BTD,DC->BTC", x_BTD, self.kv_a, self.precision.compute)
        c_BTC, k_pe_BTR = jnp.split(both_BTC, [self.cfg.kv_lora_rank], axis=-1)
        return self.kv_a_norm(c_BTC), rotate(k_pe_BTR[:, :, None], *cos_sin)[:, :, 0]

    def _attend(self, q_BTHA, c_BTC, k_pe_BTR, kv_b, segment_ids) -> Float[Array, "B T H V"]:
        """Under a mesh each device attends with its heads, for its queries. Of a sequence that devices share
        (`context`), each gathers the latent, C + R values a token, where keys and values would be H · (A + V)."""

        def local(q_bthA, c_btC, k_pe_btR, kv_b, segments_bt, first=None):
            with jax.named_scope("expand"):
                k_bthA, v_bthV = self.expand(c_btC, k_pe_btR, kv_b)
            with jax.named_scope("attend"):
                how: Any = {"scale": softmax_scale(self.cfg), "first": first}
                return attention(q_bthA, k_bthA, v_bthV, segments_bt, **how, implementation=self.kernels.attention)

        mesh = token_mesh(q_BTHA.shape)
        if mesh is None:
            return local(q_BTHA, c_BTC, k_pe_BTR, kv_b, segment_ids)

        place = weight_spec(self.kv_b, mesh)
        heads = "tensor" if "tensor" in mesh_axes(place[1]) else None

        def shared(q_bthA, c_btC, k_pe_btR, kv_b, segments_bt):
            kv_b = all_gather_weight(kv_b, place)
            if mesh.shape["context"] == 1:
                return local(q_bthA, c_btC, k_pe_btR, kv_b, segments_bt)
            first = jax.lax.axis_index("context") * q_bthA.shape[1]
            c, k_pe, segments = (
                jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (c_btC, k_pe_btR, segments_bt)
            )
            return local(q_bthA, c, k_pe, kv_b, segments, first)

        tokens = P(*BATCH_SPEC)
        return jax.shard_map(
            shared,
            in_specs=(P(*BATCH_SPEC, heads), tokens, tokens, place, tokens),
            out_specs=P(*BATCH_SPEC, heads),
            check_vma=False,
        )(q_BTHA, c_BTC, k_pe_BTR, kv_b, segment_ids)

    def expand(self, c_BTC, k_pe_BTR, kv_b_CHk) -> tuple[Float[Array, "B T H A"], Float[Array, "B T H V"]]:
        """Keys and values of every head, out of the latent."""
        kv_BTHk = jnp.einsum("BTC,CHk->BTHk", c_BTC, kv_b_CHk)
        k_nope, v_BTHV = jnp.split(kv_BTHk, [self.cfg.qk_nope_head_dim], axis=-1)
        k_pe = jnp.broadcast_to(k_pe_BTR[:, :, None], (*k_nope.shape[:-1], k_pe_BTR.shape[-1]))
        return jnp.concatenate([k_nope, k_pe], axis=-1), v_BTHV
