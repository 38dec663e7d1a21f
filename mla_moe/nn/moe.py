"""DeepSeekMoE: many small experts of which a token runs a few, and a shared one that every token runs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mla_moe.config import ModelConfig
from mla_moe.nn.mlp import MLP
from mla_moe.nn.param import Precision, matrix
from mla_moe.nn.router import Router, Routing
from mla_moe.ops.chosen_experts import chosen_experts
from mla_moe.ops.dispatch import combine, dispatch, plan
from mla_moe.ops.grouped_matmul import Implementation, grouped_matmul


class RouterStats(NamedTuple):
    """What training needs to know of a layer's routing; padding is left out. Layers add an axis in front."""

    load_E: Int[Array, "E"]
    """Tokens sent to each expert."""
    balance: Float[Array, ""]
    """The sequence-wise balance loss without its α, summed over sequences."""


class MoE(nnx.Module):
    """`shared(x) + Σ_k weight_k · expert_k(x)` over a token's chosen experts (DeepSeek-V3, equation 12).

    No token is dropped and no expert runs on a token that did not choose it. Works alone: no mesh, no globals.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision | None = None,
        implementation: Implementation | None = None,
    ):
        self.cfg = cfg
        self.precision = precision = precision or Precision.default()
        self.implementation = implementation
        E, D, F = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        std, dtype = cfg.initializer_range, precision.param
        gate_up, down = {"experts": E, "embed": D, "gate_up": 2, "expert_hidden": F}, {}
        down = {"experts": E, "expert_hidden": F, "embed": D}
        self.router = Router(cfg, rngs=rngs)
        self.gate_up = matrix(rngs, gate_up, contracts=("embed",), std=std, dtype=dtype)
        self.down = matrix(rngs, down, contracts=("expert_hidden",), std=std, dtype=dtype)
        if cfg.n_shared_experts:
            self.shared = MLP(cfg, cfg.n_shared_experts * F, rngs=rngs, precision=precision)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.with_stats(x_BTD)[0]

    def with_stats(
        self, x_BTD: Float[Array, "B T D"], real_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """The output, and how the router spread the tokens. `real_BT` is False at padding, which is not counted."""
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D).astype(self.precision.compute)
        with jax.named_scope("route"):
            routing = self.router(x_ND)
            stats = router_stats(self.cfg, routing, jnp.ones((B, T), bool) if real_BT is None else real_BT)
        with jax.named_scope("experts"):
            y_BTD = self.routed(x_ND, routing).reshape(B, T, D)
        if self.cfg.n_shared_experts:
            with jax.named_scope("shared"):
                y_BTD += self.shared(x_ND.reshape(B, T, D))
        return y_BTD, stats

    def extend(self, x_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Int[Array, "B T K"]]:
        """The output, and each token's experts. For inference: no derivative."""
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D).astype(self.precision.compute)
        with jax.named_scope("route"):
            routing = self.router(x_ND)
        with jax.named_scope("experts"):
            if jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty:
                weights = self.gate_up[...], self.down[...]
                y_ND = chosen_experts(x_ND, routing.experts_NK, routing.weights_NK, *weights)
            else:
                y_ND = self.routed(x_ND, routing)
        if self.cfg.n_shared_experts:
            with jax.named_scope("shared"):
                y_ND += self.shared(x_ND[None])[0]
        return y_ND.reshape(B, T, D), routing.experts_NK.reshape(B, T, -1)

    def routed(self, x_ND, routing: Routing) -> Float[Array, "N D"]:
        """Sort tokens by expert, run each expert on its own, and bring the results back."""
        E, F = self.cfg.n_routed_experts, self.cfg.moe_intermediate_size
        gate_up, down = (w[...].astype(self.precision.compute) for w in (self.gate_up, self.down))
        block = block_size(routing.experts_NK.size, E)
        p = plan(routing.experts_NK, E, block)

        def multiply(x_RD, w_EDF):
            return grouped_matmul(x_RD, w_EDF, p.group_sizes_E, block=block, implementation=self.implementation)

        gu_R2F = multiply(dispatch(x_ND, p), gate_up.reshape(E, -1, 2 * F)).reshape(-1, 2, F)
        y_RD = multiply(jax.nn.silu(gu_R2F[:, 0]) * gu_R2F[:, 1], down)
        return combine(y_RD, routing.weights_NK, p)


def block_size(rows: int, num_experts: int) -> int:
    """About half of an expert's mean share, a power of two from 8 to 256: small enough that padding costs little (at
    most one block an expert), large enough for a fast matrix product."""
    share = max(rows // (2 * num_experts), 1)
    return min(max(1 << (share.bit_length() - 1), 8), 256)


def router_stats(cfg: ModelConfig, routing: Routing, real_BT: Bool[Array, "B T"]) -> RouterStats:
    """Load per expert, and `Σ_i f_i P_i` of each sequence (DeepSeek-V3, equations 17-20), summed over sequences.

    `f_i` is expert i's share of the sequence's choices times E, `P_i` its mean normalised score before the bias.
    """
    B, T = real_BT.shape
    E, K = cfg.n_routed_experts, cfg.num_experts_per_tok
    sequence_BTK = jnp.broadcast_to(jnp.arange(B)[:, None, None], (B, T, K))
    count_BTK = jnp.broadcast_to(real_BT[..., None], (B, T, K)).astype(jnp.int32)
    load_BE = jnp.zeros((B, E), jnp.int32).at[sequence_BTK, routing.experts_NK.reshape(B, T, K)].add(count_BTK)
    tokens_B1 = jnp.maximum(real_BT.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
    f_BE = load_BE.astype(jnp.float32) * (E / (K * tokens_B1))
    p_NE = routing.scores_NE / (routing.scores_NE.sum(axis=-1, keepdims=True) + 1e-20)
    P_BE = jnp.einsum("BTE,BT->BE", p_NE.reshape(B, T, E), real_BT.astype(jnp.float32)) / tokens_B1
    return RouterStats(load_BE.sum(axis=0), jnp.sum(f_BE * P_BE))
