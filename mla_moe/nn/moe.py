"""DeepSeekMoE: many small routed experts, of which each token uses its top-k, and shared experts for all tokens."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mla_moe.config import KernelConfig, ModelConfig, require
from mla_moe.config.parallelism import GroupedMatmulKernel
from mla_moe.nn.layers import MLP
from mla_moe.nn.param import Precision, matrix
from mla_moe.nn.router import Router, Routing
from mla_moe.ops.experts import experts
from mla_moe.ops.moe_inference_cpu import selected_experts
from mla_moe.parallel.expert_parallel import dispatch_plan, expert_parallel_experts
from mla_moe.parallel.mesh import BATCH_SPEC, TOKEN_AXES, current_mesh, dividing_axes, require_auto_axes, token_mesh
from mla_moe.parallel.sharded_einsum import weight_spec
from mla_moe.parallel.sharding import DECODE_BATCH_AXES, all_gather_weight


class RouterStats(NamedTuple):
    """Statistics of a layer's routing, without padding. Stacked layers add a leading axis."""

    load_E: Int[Array, "E"]
    """Expert load: tokens per expert."""
    aux_loss: Float[Array, ""]
    """The sequence-wise auxiliary load-balancing loss without its weight α, summed over sequences."""
    dropped: Int[Array, ""]
    """(Token, expert) pairs dropped at capacity; 0 where routing is dropless."""


class MoE(nnx.Module):
    """`shared(x) + Σ_k weight_k · expert_k(x)` over the K routed experts of each token (DeepSeek-V3, equation 12).

    Dropless unless `kernels.capacity_factor` is set. Usable alone: needs no mesh and no global state. Under a mesh
    (`jax.set_mesh`) with an axis `expert`, tokens are dispatched to the devices of their experts, and the outputs are
    combined (`parallel.expert_parallel`).
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
        not_padding_BT: Bool[Array, "B T"] | None = None,
        replay_BTK: Int[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """The output and the router's statistics, which leave padding out. Routing replay: `replay_BTK` gives each
        token's experts, −1 for the router's choice."""
        require_auto_axes(x_BTD)
        x_BTD = x_BTD.astype(self.precision.compute)
        if not x_BTD.size:
            return x_BTD, RouterStats(jnp.zeros(self.cfg.n_routed_experts, jnp.int32), jnp.float32(0), jnp.int32(0))
        if not_padding_BT is None:
            not_padding_BT = jnp.ones(x_BTD.shape[:2], bool)
        gate_up, down = (w[...].astype(self.precision.compute) for w in (self.gate_up, self.down))
        mesh = token_mesh(x_BTD.shape)
        if mesh is None:
            y_BTD, stats = self._routed(self.router, gate_up, down, x_BTD, not_padding_BT, replay_BTK)
        else:
            y_BTD, stats = self._sharded(mesh, gate_up, down, x_BTD, not_padding_BT, replay_BTK)
        if self.cfg.n_shared_experts:
            with jax.named_scope("shared"):
                y_BTD += self.shared(x_BTD)
        return y_BTD, stats

    def extend(
        self, x_BTD: Float[Array, "B T D"], layer: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], Int[Array, "B T K"]]:
        """For prefill and decode: the output and each token's experts; not differentiable. With `layer` the experts'
        weights are those of a stack of layers, and the kernels read that layer without a copy."""
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D).astype(self.precision.compute)
        with jax.named_scope("route"):
            routing = self.router(x_ND)
        with jax.named_scope("experts"):
            routed = x_ND, routing.experts_NK, routing.weights_NK
            if jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty and layer is None:
                y_ND = selected_experts(*routed, self.gate_up[...], self.down[...])
            else:
                gate_up, down = (w[...].astype(self.precision.compute) for w in (self.gate_up, self.down))
                mesh = current_mesh()
                run = experts if mesh is None else partial(decode_expert_parallel, self._divisible(mesh))
                y_ND = run(*routed, gate_up, down, layer=layer, implementation=self.kernels.grouped_matmul)
        if self.cfg.n_shared_experts:
            with jax.named_scope("shared"):
                y_ND += self.shared.extend(x_ND[None])[0]
        return y_ND.reshape(B, T, D), routing.experts_NK.reshape(B, T, -1)

    def _divisible(self, mesh: AbstractMesh) -> AbstractMesh:
        """The mesh. Raises `ConfigError` if its axis `expert` does not divide the number of experts."""
        E, devices = self.cfg.n_routed_experts, mesh.shape["expert"]
        require(E % devices == 0, "n_routed_experts", E, f"must be a multiple of {devices}: experts over mesh.expert")
        return mesh

    def _sharded(
        self,
        mesh: AbstractMesh,
        gate_up: Array,
        down: Array,
        x_BTD: Array,
        not_padding_BT: Array,
        replay_BTK: Array | None,
    ) -> tuple[Array, RouterStats]:
        """Each device routes its own tokens. Experts are sharded over `expert`, and their hidden width over `tensor` if
        that divides it; over other axes their weights are all-gathered before use."""
        graph, router = nnx.split(self.router)
        specs = [weight_spec(w, self._divisible(mesh)) for w in (self.gate_up, self.down)]

        def local(
            router: nnx.State, gate_up: Array, down: Array, x_btD: Array, not_padding_bt: Array, replay: Array | None
        ) -> tuple[Array, RouterStats]:
            weights = zip((gate_up, down), specs, strict=True)
            gate_up, down = (all_gather_weight(w, spec, ("expert", "tensor")) for w, spec in weights)
            return self._routed(nnx.merge(graph, router), gate_up, down, x_btD, not_padding_bt, replay, mesh)

        tokens = P(*BATCH_SPEC)
        inputs = P(), *specs, tokens, tokens, tokens
        return jax.shard_map(local, in_specs=inputs, out_specs=(tokens, P()), check_vma=False)(
            router, gate_up, down, x_BTD, not_padding_BT, replay_BTK
        )

    def _routed(
        self, router: Router, gate_up: Array, down: Array, x_BTD: Array, not_padding_BT: Array,
        replay_BTK: Array | None, mesh: AbstractMesh | None = None,
    ) -> tuple[Array, RouterStats]:  # fmt: skip
        """Route tokens and run their experts; with `mesh` inside a `shard_map` over it."""
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D)
        with jax.named_scope("route"):
            routing = router(x_ND, None if replay_BTK is None else replay_BTK.reshape(B * T, -1))
            stats = router_stats(self.cfg, routing, not_padding_BT, mesh)
        dropped = jnp.int32(0)
        with jax.named_scope("experts"):
            inputs = x_ND, routing.experts_NK, routing.weights_NK, gate_up, down
            kernels = self.kernels
            if mesh is None or mesh.shape["expert"] == 1:
                y_ND = experts(*inputs, implementation=kernels.grouped_matmul)
            else:
                plan = dispatch_plan(
                    self.cfg,
                    B * T,
                    mesh.shape["expert"],
                    capacity_factor=kernels.capacity_factor,
                    dispatch=kernels.dispatch,
                    grouped_matmul=kernels.grouped_matmul,
                )
                y_ND, dropped = expert_parallel_experts(*inputs, plan, "expert")
                dropped = jax.lax.psum(dropped, TOKEN_AXES)
            if down.shape[1] < self.cfg.moe_intermediate_size:  # the hidden width is sharded over `tensor`
                y_ND = jax.lax.psum(y_ND, "tensor")
        return y_ND.reshape(B, T, D), RouterStats(*stats, dropped)


def decode_expert_parallel(
    mesh: AbstractMesh,
    x_ND: Float[Array, "N D"],
    experts_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    gate_up: Float[Array, "*axes"],
    down: Float[Array, "*L E F D"],
    *,
    layer: Int[Array, ""] | None,
    implementation: GroupedMatmulKernel | None,
) -> Float[Array, "N D"]:
    """`ops.experts` for the few tokens of a decode step, without token dispatch: each device of `expert` runs its own
    experts on all tokens, and a psum combines the outputs."""

    def local(
        x_nD: Array, experts_nK: Array, weights_nK: Array, gate_up: Array, down: Array, layer: Array | None
    ) -> Array:
        e = down.shape[-3]
        local_nK = experts_nK - jax.lax.axis_index("expert") * e
        local_nK = jnp.where((local_nK >= 0) & (local_nK < e), local_nK, e)
        run = partial(
            experts, layer=layer, max_pairs=len(x_nD) * min(local_nK.shape[1], e), implementation=implementation
        )
        y_nD = run(x_nD, local_nK, weights_nK, gate_up, down).astype(jnp.float32)
        return jax.lax.psum(y_nD, ("expert", *width)).astype(x_nD.dtype)

    batch, width = (
        P(dividing_axes(mesh, len(x_ND), DECODE_BATCH_AXES)),
        dividing_axes(mesh, down.shape[-2], ("tensor",)),
    )
    stack = (None,) * (down.ndim - 3)
    between = (None,) * (gate_up.ndim - down.ndim + 1)  # width, and gate and up where they are an axis
    inputs = batch, batch, batch, P(*stack, "expert", *between, width), P(*stack, "expert", width), P()
    return jax.shard_map(local, in_specs=inputs, out_specs=batch, check_vma=False)(
        x_ND, experts_NK, weights_NK, gate_up, down, layer
    )


def router_stats(
    cfg: ModelConfig, routing: Routing, not_padding_BT: Bool[Array, "B T"], mesh: AbstractMesh | None = None
) -> tuple[Int[Array, "E"], Float[Array, ""]]:
    """Expert load, and the sequence-wise auxiliary load-balancing loss without α: `Σ_i f_i P_i` of each sequence
    (DeepSeek-V3, equations 17-20), summed over sequences.

    `f_i` is E times the fraction of the sequence's (token, expert) pairs that expert i has, `P_i` the mean of its
    normalised score without bias. Inside a `shard_map` over `mesh` both are summed over all devices.
    """
    B, T = not_padding_BT.shape
    E, K = cfg.n_routed_experts, cfg.num_experts_per_tok

    def total(x: Any, axes: str | tuple[str, ...]) -> Any:
        return x if mesh is None else jax.lax.psum(x, axes)

    selected_BTKE = routing.experts_NK.reshape(B, T, K, 1) == jnp.arange(E)
    load_BE = (selected_BTKE & not_padding_BT[..., None, None]).sum(axis=(1, 2), dtype=jnp.int32)
    p_NE = routing.scores_NE / (routing.scores_NE.sum(axis=-1, keepdims=True) + 1e-20)
    P_BE = jnp.einsum("BTE,BT->BE", p_NE.reshape(B, T, E), not_padding_BT.astype(jnp.float32))
    load_BE, P_BE, tokens_B1 = total((load_BE, P_BE, not_padding_BT.sum(axis=1, keepdims=True)), "context")
    tokens_B1 = jnp.maximum(tokens_B1, 1).astype(jnp.float32)
    f_BE = load_BE.astype(jnp.float32) * (E / (K * tokens_B1))
    return total((load_BE.sum(axis=0), jnp.sum(f_BE * P_BE / tokens_B1)), BATCH_SPEC[0])
