"""DeepSeekMoE: many small routed experts, of which each token uses its top-k, and shared experts for all tokens."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mla_moe.config import KernelConfig, ModelConfig, MoEConfig, require
from mla_moe.nn.layers import MLP, Activations, Mask, require_shape
from mla_moe.nn.lora import adapter
from mla_moe.nn.param import Precision, matrix
from mla_moe.nn.quantized import weight_of
from mla_moe.nn.router import FunctionRouter, Router, RouterFunction, Routing
from mla_moe.ops.dropout import FeatureDropout, token_numbers
from mla_moe.ops.experts import ExpertAdapters, experts, find_activation
from mla_moe.ops.kernel_choice import target_platform
from mla_moe.ops.lora import LoRAFactors
from mla_moe.ops.moe_inference_cpu import selected_experts
from mla_moe.ops.quantized_matrix import Matrix, QuantizedMatrix
from mla_moe.parallel.collectives import axis_index, psum, shard_map
from mla_moe.parallel.dispatch_plan import dispatch_plan
from mla_moe.parallel.expert_parallel import expert_parallel_experts
from mla_moe.parallel.mesh import (
    BATCH_SPEC,
    TOKEN_AXES,
    MeshView,
    batch_shards,
    current_mesh,
    dividing_axes,
    token_mesh,
    under_auto_axes,
)
from mla_moe.parallel.quantized_weight import QuantizedWeight, all_gather_matrix, matrix_of, matrix_specs
from mla_moe.parallel.sharded_einsum import plain_einsum, weight_spec
from mla_moe.parallel.sharding import DECODE_BATCH_AXES, is_weight


class RouterStats(NamedTuple):
    """Statistics of a layer's routing, without padding. Stacked layers add a leading axis."""

    load_E: Int[Array, "E"]
    """Expert load: tokens per expert, zero-computation ones included."""
    aux_loss: Float[Array, ""]
    """The sequence-wise auxiliary loss of load balancing without its weight α, summed over sequences."""
    z_loss: Float[Array, ""]
    """The router z-loss without its weight, summed over tokens."""
    dropped: Int[Array, ""]
    """(Token, expert) pairs dropped at capacity; 0 where routing is dropless."""


ExpertWeights = tuple[Matrix, Matrix, ExpertAdapters]
"""Gate and up projection, down projection, and their adapters, in the compute dtype or quantized."""
Tokens = tuple[Activations, Mask, Int[Array, "B T K"] | None, "AdapterDropout"]
"""Activations, where they are no padding, the experts of a routing replay, and dropout of adapters' inputs."""


class AdapterDropout(NamedTuple):
    """Dropout of the inputs of adapters, with a number for each token `[B, T]`. None: without."""

    router: FeatureDropout | None = None
    gate_up: FeatureDropout | None = None
    down: FeatureDropout | None = None


class MoE(nnx.Module):
    """`shared(x) + Σ_k weight_k · expert_k(x)` over the K routed experts of each token (DeepSeek-V3, equation 12). Of
    zero-computation experts `expert_k(x)` is x.

    Settings are the fields of `MoEConfig`, as keywords: `MoE(hidden_size=512, num_experts=8, rngs=rngs)`; or `cfg`, or
    the MoE layers of a `ModelConfig`, with the fields given as keywords replaced.
    Dropless unless `kernels.capacity_factor` is set. Usable alone: needs no mesh and no global state. Under a mesh
    (`jax.set_mesh`) with an axis `expert`, tokens are dispatched to the devices of their experts, and the outputs are
    combined (`parallel.expert_parallel`).
    """

    def __init__(
        self,
        cfg: MoEConfig | ModelConfig | None = None,
        *,
        rngs: nnx.Rngs,
        precision: Precision | None = None,
        kernels: KernelConfig = KernelConfig(),
        router: RouterFunction | None = None,
        **fields: Any,
    ):
        cfg = cfg.moe if isinstance(cfg, ModelConfig) else cfg
        self.cfg = cfg = dataclasses.replace(cfg, **fields) if cfg else MoEConfig(**fields)
        self.kernels, self.precision = kernels, (precision := precision or Precision.default())
        E, D, F = cfg.num_experts, cfg.hidden_size, cfg.expert_width
        std, dtype = cfg.initializer_range, precision.param
        gate_up = {"experts": E, "embed": D, "gate_up": 2, "expert_hidden": F}
        down = {"experts": E, "expert_hidden": F, "embed": D}
        self.activation = find_activation(cfg.hidden_act)
        router = router or Router(cfg, rngs=rngs)
        self.router = router if isinstance(router, nnx.Module) else FunctionRouter(router)
        self.gate_up = matrix(rngs, gate_up, contracts=("embed",), std=std, dtype=dtype)
        self.down = matrix(rngs, down, contracts=("expert_hidden",), std=std, dtype=dtype)
        if cfg.n_shared_experts:
            mlp = partial(MLP, std=std, activation=self.activation, rngs=rngs, precision=precision)
            self.shared = mlp(D, cfg.n_shared_experts * F)

    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """The output for sequences `[B, T, D]`, or for tokens `[N, D]`."""
        return self.with_stats(x)[0]

    @under_auto_axes(lambda tokens: (tokens, P()))
    def with_stats(
        self,
        x: Float[Array, "*tokens D"],
        not_padding: Bool[Array, "*tokens"] | None = None,
        replay: Int[Array, "*tokens K"] | None = None,
    ) -> tuple[Float[Array, "*tokens D"], RouterStats]:
        """The output and the router's statistics, which leave padding out. Routing replay as in `Router`. Tokens
        `[N, D]` are one sequence of the auxiliary loss."""
        flat = x.ndim == 2
        shape = require_shape("x", x, *("B", "T")[: 1 if flat else 2], self.cfg.hidden_size)
        if flat:  # as many sequences as the mesh can shard, or one
            B = batch_shards()
            B = B if shape[0] % B == 0 and token_mesh((B, shape[0] // B)) else 1
            x, not_padding, replay = jax.tree.map(lambda a: a.reshape(B, -1, *a.shape[1:]), (x, not_padding, replay))
        y_BTD, stats = self._of_sequences(flat, x, not_padding, replay)
        return y_BTD.reshape(shape), stats

    def _of_sequences(
        self, one_sequence: bool, x_BTD: Activations, not_padding_BT: Mask | None, replay_BTK: Array | None
    ) -> tuple[Activations, RouterStats]:
        x_BTD = x_BTD.astype(self.precision.compute)
        if not x_BTD.size:
            no_tokens_E, zero = jnp.zeros(self.cfg.router_width, jnp.int32), jnp.float32(0)
            return x_BTD, RouterStats(no_tokens_E, zero, zero, jnp.int32(0))
        if not_padding_BT is None:
            not_padding_BT = jnp.ones(x_BTD.shape[:2], bool)
        compute = self.precision.compute
        gate_up, down = (matrix_of(weight_of(self, name), compute) for name in ("gate_up", "down"))
        mesh = token_mesh(x_BTD.shape)
        inputs = (gate_up, down, self._adapters()), (x_BTD, not_padding_BT, replay_BTK, self._dropout(x_BTD))
        if mesh is None:
            y_BTD, stats = self._routed(self.router, one_sequence, *inputs)
        else:
            y_BTD, stats = self._sharded(mesh, one_sequence, *inputs)
        if self.cfg.n_shared_experts:
            with jax.named_scope("shared"):
                y_BTD += self.shared(x_BTD)
        return y_BTD, stats

    def extend(
        self, x_BTD: Activations, layer: Int[Array, ""] | None = None, adapter_ids_B: Int[Array, "B"] | None = None
    ) -> tuple[Activations, Int[Array, "B T K"]]:
        """For prefill and decode: the output and each token's experts; not differentiable. With `layer` the experts'
        weights are those of a stack of layers, and the kernels read that layer without a copy. `adapter_ids_B`: see
        `Transformer.extend`."""
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D).astype(self.precision.compute)
        ids_N = None if adapter_ids_B is None else jnp.repeat(adapter_ids_B, T, total_repeat_length=B * T)
        with jax.named_scope("route"):
            of_router = {"adapter_ids_N": ids_N} if hasattr(self.router, "lora") else {}
            routing = self._route(partial(self.router, **of_router), x_ND)
        experts_NK, zero_N = self._split(routing)
        with jax.named_scope("experts"):
            adapters = self._adapters(ids_N)
            on_one_cpu = target_platform() == "cpu" and jax.sharding.get_abstract_mesh().empty and layer is None
            if on_one_cpu and not hasattr(self, "quantized"):
                inputs = x_ND, experts_NK, routing.weights_NK, self.gate_up[...], self.down[...]
                y_ND = selected_experts(*inputs, self.activation, adapters)
            else:
                y_ND = self._decode_experts(x_ND, experts_NK, routing.weights_NK, layer, adapters)
        if zero_N is not None:
            y_ND += x_ND * zero_N[:, None].astype(x_ND.dtype)
        if self.cfg.n_shared_experts:
            with jax.named_scope("shared"):
                y_ND += self.shared(x_ND[None], plain_einsum, None if ids_N is None else ids_N[None])[0]
        return y_ND.reshape(B, T, D), routing.experts_NK.reshape(B, T, -1)

    def _split(self, routing: Routing) -> tuple[Int[Array, "N K"], Float[Array, "N"] | None]:
        """The routed experts of each token, with `num_experts` (unassigned) in place of zero-computation ones, and the
        sum of the weights of these, None if there are none."""
        if not self.cfg.zero_expert_num:
            return routing.experts_NK, None
        zero_NK = routing.experts_NK >= self.cfg.num_experts
        weight_N = jnp.where(zero_NK, routing.weights_NK, 0).sum(axis=1)
        return jnp.minimum(routing.experts_NK, self.cfg.num_experts), weight_N

    def _adapters(self, adapter_ids_N: Int[Array, "N"] | None = None) -> ExpertAdapters:
        loras = adapter(self, "gate_up"), adapter(self, "down")
        compute = self.precision.compute
        return ExpertAdapters(*(None if lora is None else lora.factors(compute, adapter_ids_N) for lora in loras))

    def _dropout(self, x_BTD: Activations) -> AdapterDropout:
        loras = adapter(self.router, "weight"), adapter(self, "gate_up"), adapter(self, "down")
        rows_BT = token_numbers(*x_BTD.shape[:2])
        return AdapterDropout(*(None if lora is None else lora.feature_dropout(rows_BT) for lora in loras))

    def _decode_experts(
        self,
        x_ND: Float[Array, "N D"],
        experts_NK: Array,
        weights_NK: Array,
        layer: Array | None,
        adapters: ExpertAdapters,
    ) -> Float[Array, "N D"]:
        """`ops.experts` for the few tokens of a decode step. Under a mesh without token dispatch: each device of
        `expert` runs its own experts on all tokens, and a psum combines the outputs."""
        weights = tuple(matrix_of(weight_of(self, name), self.precision.compute) for name in ("gate_up", "down"))
        if layer is not None and hasattr(self, "quantized"):  # a layer's matrices are dequantized, not the stack's
            weights = jax.tree.map(lambda x: x[layer], weights)
            loras = (lora and lora._replace(a=lora.a[layer], b=lora.b[layer]) for lora in adapters)
            adapters, layer = ExpertAdapters(*loras), None
        gate_up, down = weights
        inputs = x_ND, experts_NK, weights_NK, gate_up, down
        mesh = current_mesh()
        run = partial(experts, activation=self.activation, implementation=self.kernels.grouped_matmul)
        if mesh is None:
            return run(*inputs, layer=layer, adapters=adapters)
        self._require_divisible(mesh)

        def local(
            x_nD: Array, experts_nK: Array, weights_nK: Array, gate_up: Matrix, down: Matrix, adapters: ExpertAdapters,
            layer: Array | None,
        ) -> Array:  # fmt: skip
            stay = ("expert", "tensor")
            gate_up, down = (all_gather_matrix(w, s, stay) for w, s in ((gate_up, columns), (down, rows)))
            e = down.shape[-3]
            local_nK = experts_nK - axis_index("expert") * e
            local_nK = jnp.where((local_nK >= 0) & (local_nK < e), local_nK, e)
            max_pairs = len(x_nD) * min(local_nK.shape[1], e)
            inputs = x_nD, local_nK, weights_nK, gate_up, down
            y_nD = run(*inputs, layer=layer, adapters=adapters, max_pairs=max_pairs)
            return psum(y_nD.astype(jnp.float32), ("expert", *width)).astype(x_nD.dtype)

        batch = P(dividing_axes(mesh, len(x_ND), DECODE_BATCH_AXES))
        width = dividing_axes(mesh, down.shape[-2], ("tensor",))
        stack = (None,) * (down.ndim - 3)

        def last(axes: int) -> P:
            """Sharding of an array whose last axis is the width; gate and up are one before it, or joined with it."""
            return P(*stack, "expert", *(None,) * (axes - len(stack) - 2), width)

        columns, rows, whole = last(gate_up.ndim), P(*stack, "expert", width, None), P(*stack, "expert")
        of_b = whole if adapters.gate_up is None else last(adapters.gate_up.b.ndim)
        of_loras = map(LoRAFactors._make, ((whole, of_b, batch, None), (rows, whole, batch, None)))
        columns, rows = (
            matrix_specs(w, s, mesh) if isinstance(w, QuantizedMatrix) else s
            for w, s in ((gate_up, columns), (down, rows))
        )
        of_loras = (None if lora is None else specs for lora, specs in zip(adapters, of_loras, strict=True))
        specs = batch, batch, batch, columns, rows, ExpertAdapters(*of_loras), P()
        return shard_map(local, specs, batch)(*inputs, adapters, layer)

    def _require_divisible(self, mesh: MeshView) -> None:
        E, devices = self.cfg.num_experts, mesh.shape["expert"]
        require(E % devices == 0, "num_experts", E, f"must be a multiple of {devices}: experts over mesh.expert")

    def _route(self, router: RouterFunction, x_ND: Array, replay: tuple[Array, ...] = ()) -> Routing:
        routing, N, K = router(x_ND, *replay), len(x_ND), self.cfg.num_experts_per_tok
        require(isinstance(routing, Routing), "router", type(routing).__name__, "must return a mla_moe.Routing")
        require_shape("experts of the router", routing.experts_NK, N, K)
        require_shape("weights of the router", routing.weights_NK, N, K)
        require_shape("scores of the router", routing.scores_NE, N, self.cfg.router_width)
        return routing

    def _sharded(
        self, mesh: MeshView, one_sequence: bool, weights: ExpertWeights, tokens: Tokens
    ) -> tuple[Array, RouterStats]:
        """`_routed` under a mesh: each device routes its own tokens. Experts are sharded over `expert`, and their
        hidden width over `tensor` if that divides it; over other axes their weights are all-gathered before use."""
        self._require_divisible(mesh)
        graph, router = nnx.split(self.router)
        loras = adapter(self, "gate_up"), adapter(self, "down")
        factors = (None if lora is None else LoRAFactors._make((lora.a, lora.b, None, None)) for lora in loras)
        weights_with_axes = weight_of(self, "gate_up"), weight_of(self, "down"), ExpertAdapters(*factors)
        is_leaf = lambda node: is_weight(node) or isinstance(node, QuantizedWeight)  # noqa: E731
        specs = jax.tree.map(lambda w: weight_spec(w, mesh), weights_with_axes, is_leaf=is_leaf)

        def local(router: nnx.State, weights: ExpertWeights, tokens: Tokens) -> tuple[Array, RouterStats]:
            gather = partial(all_gather_matrix, keep_sharded=("expert", "tensor"))
            weights = jax.tree.map(gather, weights, specs, is_leaf=lambda node: isinstance(node, QuantizedMatrix))
            return self._routed(nnx.merge(graph, router), one_sequence, weights, tokens, mesh)

        of_dropout = jax.tree.map(lambda x: BATCH_SPEC if jnp.ndim(x) == 2 else P(), tokens[-1])
        of_tokens = BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, of_dropout
        in_specs, out_specs = (P(), specs, of_tokens), (BATCH_SPEC, P())
        return shard_map(local, in_specs, out_specs)(router, weights, tokens)

    def _routed(
        self,
        router: RouterFunction,
        one_sequence: bool,
        weights: ExpertWeights,
        tokens: Tokens,
        mesh: MeshView | None = None,
    ) -> tuple[Array, RouterStats]:
        """Route tokens and run their experts; with `mesh` inside a `shard_map` over it. `one_sequence`: all tokens are
        one sequence of the auxiliary loss."""
        x_BTD, not_padding_BT, replay_BTK, dropout = tokens
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D)
        dropout = AdapterDropout(*(d and dataclasses.replace(d, rows=d.rows.reshape(B * T)) for d in dropout))
        if dropout.router is not None:
            router = partial(router, dropout=dropout.router)
        with jax.named_scope("route"):
            routing = self._route(router, x_ND, () if replay_BTK is None else (replay_BTK.reshape(B * T, -1),))
            stats = router_stats(self.cfg, routing, not_padding_BT, mesh, one_sequence)
        dropped = jnp.int32(0)
        experts_NK, zero_N = self._split(routing)
        with jax.named_scope("experts"):
            gate_up, down, adapters = weights
            is_sharded = down.shape[1] < self.cfg.expert_width  # the hidden width, over `tensor`
            of_down = dropout.down
            if of_down is not None and is_sharded:
                of_down = dataclasses.replace(of_down, first=axis_index("tensor") * down.shape[1])
            of_adapters = zip(adapters, (dropout.gate_up, of_down), strict=True)
            adapters = ExpertAdapters(*(lora and lora._replace(dropout=d) for lora, d in of_adapters))
            inputs = x_ND, experts_NK, routing.weights_NK, gate_up, down
            if mesh is None or mesh.shape["expert"] == 1:
                run = partial(experts, activation=self.activation, implementation=self.kernels.grouped_matmul)
                y_ND = run(*inputs, adapters=adapters)
            else:
                plan = dispatch_plan(self.cfg, B * T, mesh.shape["expert"], self.kernels)
                y_ND, dropped = expert_parallel_experts(*inputs, plan, adapters)
                dropped = psum(dropped, TOKEN_AXES)
            if is_sharded:
                y_ND = psum(y_ND, "tensor")
        if zero_N is not None:
            y_ND += x_ND * zero_N[:, None].astype(x_ND.dtype)
        return y_ND.reshape(B, T, D), RouterStats(*stats, dropped)


def router_stats(
    cfg: MoEConfig,
    routing: Routing,
    not_padding_BT: Mask,
    mesh: MeshView | None = None,
    one_sequence: bool = False,
) -> tuple[Int[Array, "E"], Float[Array, ""], Float[Array, ""]]:
    """Expert load, the sequence-wise auxiliary load-balancing loss without α: `Σ_i f_i P_i` of each sequence
    (DeepSeek-V3, equations 17-20), summed over sequences; and the router z-loss, the squared logsumexp of the logits
    (ST-MoE, arXiv 2202.08906, equation 5), summed over tokens.

    `f_i` is E times the fraction of the sequence's (token, expert) pairs that expert i has, `P_i` the mean of its
    normalised score without bias. Inside a `shard_map` over `mesh` all are summed over all devices. `one_sequence`:
    all tokens of all devices are one sequence, which each device has a part of; B is 1.
    """
    B, T = not_padding_BT.shape
    E, K = cfg.router_width, cfg.num_experts_per_tok

    def total(x: Any, axes: str | tuple[str, ...]) -> Any:
        return x if mesh is None else psum(x, axes)

    parts = TOKEN_AXES if one_sequence else "context"
    selected_BTKE = routing.experts_NK.reshape(B, T, K, 1) == jnp.arange(E)
    load_BE = (selected_BTKE & not_padding_BT[..., None, None]).sum(axis=(1, 2), dtype=jnp.int32)
    p_NE = routing.scores_NE / (routing.scores_NE.sum(axis=-1, keepdims=True) + 1e-20)
    P_BE = jnp.einsum("BTE,BT->BE", p_NE.reshape(B, T, E), not_padding_BT.astype(jnp.float32))
    z_BT = jnp.zeros((B, T), jnp.float32)
    if routing.logits_NE is not None:
        z_N = jnp.square(jax.nn.logsumexp(routing.logits_NE, axis=-1))
        z_BT = jnp.where(not_padding_BT, z_N.reshape(B, T), 0)
    counted = load_BE, P_BE, z_BT.sum(axis=1), not_padding_BT.sum(axis=1, keepdims=True)
    load_BE, P_BE, z_B, tokens_B1 = total(counted, parts)
    tokens_B1 = jnp.maximum(tokens_B1, 1).astype(jnp.float32)
    f_BE = load_BE.astype(jnp.float32) * (E / (K * tokens_B1))
    sums = load_BE.sum(axis=0), jnp.sum(f_BE * P_BE / tokens_B1), z_B.sum()
    return sums if one_sequence else total(sums, BATCH_SPEC[0])
