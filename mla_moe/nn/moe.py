"""DeepSeekMoE: many small experts of which a token runs a few, and a shared one that every token runs."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mla_moe.config import KernelConfig, ModelConfig, require
from mla_moe.nn.mlp import MLP
from mla_moe.nn.param import Precision, matrix
from mla_moe.nn.router import Router, Routing
from mla_moe.ops.experts import experts
from mla_moe.ops.moe_inference_cpu import selected_experts
from mla_moe.parallel.expert_parallel import dispatch_plan, expert_parallel_experts
from mla_moe.parallel.mesh import BATCH_SPEC, TOKEN_AXES, current_mesh, dividing_axes, require_auto_axes, token_mesh
from mla_moe.parallel.sharded_einsum import weight_spec
from mla_moe.parallel.sharding import DECODE_BATCH_AXES, all_gather_weight


class RouterStats(NamedTuple):
    """What training needs to know of a layer's routing; padding is left out. Layers add an axis in front."""

    load_E: Int[Array, "E"]
    """Tokens sent to each expert."""
    balance: Float[Array, ""]
    """The sequence-wise balance loss without its α, summed over sequences."""
    dropped: Int[Array, ""]
    """Choices that were not followed for want of buffer."""


class MoE(nnx.Module):
    """`shared(x) + Σ_k weight_k · expert_k(x)` over a token's chosen experts (DeepSeek-V3, equation 12).

    No token is dropped and no expert runs on a token that did not choose it. Works alone: no mesh, no globals. Under a
    mesh (`jax.set_mesh`) tokens travel to the experts' devices and back (`ops.expert_exchange`).
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
        self.precision = precision = precision or Precision.default()
        self.kernels = kernels
        E, D, F = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        std, dtype = cfg.initializer_range, precision.param
        gate_up = {"experts": E, "embed": D, "gate_up": 2, "expert_hidden": F}
        down = {"experts": E, "expert_hidden": F, "embed": D}
        self.router = Router(cfg, rngs=rngs)
        self.gate_up = matrix(rngs, gate_up, contracts=("embed",), std=std, dtype=dtype)
        self.down = matrix(rngs, down, contracts=("expert_hidden",), std=std, dtype=dtype)
        if cfg.n_shared_experts:
            self.shared = MLP(cfg, cfg.n_shared_experts * F, rngs=rngs, precision=precision)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.with_stats(x_BTD)[0]

    def with_stats(
        self,
        x_BTD: Float[Array, "B T D"],
        real_BT: Bool[Array, "B T"] | None = None,
        replay_BTK: Int[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """The output, and how the router spread the tokens. `real_BT` is False at padding, which is not counted;
        `replay_BTK` names the experts of each token, −1 for the router's choice."""
        require_auto_axes(x_BTD)
        x_BTD = x_BTD.astype(self.precision.compute)
        if not x_BTD.size:
            return x_BTD, RouterStats(jnp.zeros(self.cfg.n_routed_experts, jnp.int32), jnp.float32(0), jnp.int32(0))
        if real_BT is None:
            real_BT = jnp.ones(x_BTD.shape[:2], bool)
        gate_up, down = (w[...].astype(self.precision.compute) for w in (self.gate_up, self.down))
        mesh = token_mesh(x_BTD.shape)
        if mesh is None:
            y_BTD, stats = self._routed(self.router, gate_up, down, x_BTD, real_BT, replay_BTK)
        else:
            y_BTD, stats = self._over(mesh, gate_up, down, x_BTD, real_BT, replay_BTK)
        if self.cfg.n_shared_experts:
            with jax.named_scope("shared"):
                y_BTD += self.shared(x_BTD)
        return y_BTD, stats

    def extend(
        self, x_BTD: Float[Array, "B T D"], layer: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], Int[Array, "B T K"]]:
        """The output, and each token's experts. With `layer` the experts' weights are those of a stack of layers, out
        of which that one's are read in place. For inference: no derivative."""
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D).astype(self.precision.compute)
        with jax.named_scope("route"):
            routing = self.router(x_ND)
        with jax.named_scope("experts"):
            chosen = x_ND, routing.experts_NK, routing.weights_NK
            if jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty and layer is None:
                y_ND = selected_experts(*chosen, self.gate_up[...], self.down[...])
            else:
                gate_up, down = (w[...].astype(self.precision.compute) for w in (self.gate_up, self.down))
                mesh = current_mesh()
                run = experts if mesh is None else partial(decode_expert_parallel, self._whole_experts(mesh))
                y_ND = run(*chosen, gate_up, down, layer=layer, implementation=self.kernels.grouped_matmul)
        if self.cfg.n_shared_experts:
            with jax.named_scope("shared"):
                y_ND += self.shared.extend(x_ND[None])[0]
        return y_ND.reshape(B, T, D), routing.experts_NK.reshape(B, T, -1)

    def _whole_experts(self, mesh: AbstractMesh) -> AbstractMesh:
        """The mesh, over whose axis `expert` all must be split evenly."""
        E, parts = self.cfg.n_routed_experts, mesh.shape["expert"]
        require(E % parts == 0, "n_routed_experts", E, f"must be a multiple of {parts}: experts over mesh.expert")
        return mesh

    def _over(self, mesh: AbstractMesh, gate_up, down, x_BTD, real_BT, replay_BTK):
        """Each device routes its own tokens. Experts lie over `expert`, their hidden width over `tensor` if that
        divides it."""
        graph, router = nnx.split(self.router)
        experts = [weight_spec(w, self._whole_experts(mesh)) for w in (self.gate_up, self.down)]

        def local(router, gate_up, down, x_btD, real_bt, replay_btK):
            parted = zip((gate_up, down), experts, strict=True)
            gate_up, down = (all_gather_weight(w, place, ("expert", "tensor")) for w, place in parted)
            return self._routed(nnx.merge(graph, router), gate_up, down, x_btD, real_bt, replay_btK, mesh)

        tokens = P(*BATCH_SPEC)
        inputs = P(), *experts, tokens, tokens, tokens
        return jax.shard_map(local, in_specs=inputs, out_specs=(tokens, P()), check_vma=False)(
            router, gate_up, down, x_BTD, real_BT, replay_BTK
        )

    def _routed(self, router: Router, gate_up, down, x_BTD, real_BT, replay_BTK, mesh: AbstractMesh | None = None):
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D)
        with jax.named_scope("route"):
            routing = router(x_ND, None if replay_BTK is None else replay_BTK.reshape(B * T, -1))
            stats = router_stats(self.cfg, routing, real_BT, mesh)
        dropped = jnp.int32(0)
        with jax.named_scope("experts"):
            weighted = x_ND, routing.experts_NK, routing.weights_NK, gate_up, down
            kernels = self.kernels
            if mesh is None or mesh.shape["expert"] == 1:
                y_ND = experts(*weighted, implementation=kernels.grouped_matmul)
            else:
                plan = dispatch_plan(
                    self.cfg,
                    B * T,
                    mesh.shape["expert"],
                    buffer=kernels.capacity_factor,
                    exchange=kernels.dispatch,
                    multiply=kernels.grouped_matmul,
                )
                y_ND, dropped = expert_parallel_experts(*weighted, plan, "expert")
                dropped = jax.lax.psum(dropped, TOKEN_AXES)
            if down.shape[1] < self.cfg.moe_intermediate_size:  # a part of the width is here
                y_ND = jax.lax.psum(y_ND, "tensor")
        return y_ND.reshape(B, T, D), RouterStats(*stats, dropped)


def decode_expert_parallel(mesh: AbstractMesh, x_ND, experts_NK, weights_NK, gate_up, down, *, layer, implementation):
    """`ops.experts` for the few tokens of a decode step: each device of `expert` runs its own experts on all tokens,
    and what they give is added up."""

    def local(x_nD, experts_nK, weights_nK, gate_up, down, layer):
        e = down.shape[-3]
        here_nK = experts_nK - jax.lax.axis_index("expert") * e
        here_nK = jnp.where((here_nK >= 0) & (here_nK < e), here_nK, e)
        how = {"layer": layer, "most": len(x_nD) * min(here_nK.shape[1], e), "implementation": implementation}
        y_nD = experts(x_nD, here_nK, weights_nK, gate_up, down, **how).astype(jnp.float32)
        return jax.lax.psum(y_nD, ("expert", *width)).astype(x_nD.dtype)

    rows, width = P(dividing_axes(mesh, len(x_ND), DECODE_BATCH_AXES)), dividing_axes(mesh, down.shape[-2], ("tensor",))
    stack = (None,) * (down.ndim - 3)
    between = (None,) * (gate_up.ndim - down.ndim + 1)  # width, and gate and up where they are an axis
    inputs = rows, rows, rows, P(*stack, "expert", *between, width), P(*stack, "expert", width), P()
    return jax.shard_map(local, in_specs=inputs, out_specs=rows, check_vma=False)(
        x_ND, experts_NK, weights_NK, gate_up, down, layer
    )


def router_stats(
    cfg: ModelConfig, routing: Routing, real_BT: Bool[Array, "B T"], mesh: AbstractMesh | None = None
) -> tuple[Int[Array, "E"], Float[Array, ""]]:
    """Load per expert, and `Σ_i f_i P_i` of each sequence (DeepSeek-V3, equations 17-20), summed over sequences.

    `f_i` is expert i's share of the sequence's choices times E, `P_i` its mean normalised score before the bias. Within
    a `shard_map` over `mesh` both are those of all devices.
    """
    B, T = real_BT.shape
    E, K = cfg.n_routed_experts, cfg.num_experts_per_tok

    def whole(x, axes):
        return x if mesh is None else jax.lax.psum(x, axes)

    chosen_BTKE = routing.experts_NK.reshape(B, T, K, 1) == jnp.arange(E)
    load_BE = (chosen_BTKE & real_BT[..., None, None]).sum(axis=(1, 2), dtype=jnp.int32)
    p_NE = routing.scores_NE / (routing.scores_NE.sum(axis=-1, keepdims=True) + 1e-20)
    P_BE = jnp.einsum("BTE,BT->BE", p_NE.reshape(B, T, E), real_BT.astype(jnp.float32))
    load_BE, P_BE, tokens_B1 = whole((load_BE, P_BE, real_BT.sum(axis=1, keepdims=True)), "context")
    tokens_B1 = jnp.maximum(tokens_B1, 1).astype(jnp.float32)
    f_BE = load_BE.astype(jnp.float32) * (E / (K * tokens_B1))
    return whole((load_BE.sum(axis=0), jnp.sum(f_BE * P_BE / tokens_B1)), BATCH_SPEC[0])
