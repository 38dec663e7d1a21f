"""One transformer layer, and how a stack of equal layers is run: under a scan, with rematerialisation."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn.attention import MLAttention
from mla_moe.nn.kv_cache import AttentionMetadata, CacheEntries, NewTokens
from mla_moe.nn.layers import MLP, Activations, Ids, RMSNorm
from mla_moe.nn.moe import MoE, RouterStats
from mla_moe.nn.param import Precision, normal
from mla_moe.parallel.sharded_einsum import plain_einsum
from mla_moe.parallel.sharding import constrain_activations, constrain_decode_activations

Remat = Literal["none", "dots", "full"]
"""What the backward pass of a layer recomputes: nothing, everything but matrix products, or everything."""

REMAT = {
    "none": lambda layer: layer,
    "dots": lambda layer: jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}


class SequenceInfo(NamedTuple):
    """What every layer needs beside the activations. Segment 0 is padding; None: one document and no padding."""

    segment_ids_BT: Ids | None
    positions_BT: Ids
    replay_BTK: Int[Array, "B T K"] | None = None
    """Routing replay: the experts of each token, −1 for the router's choice; None leaves all to the router."""


class Block(nnx.Module):
    """Pre-norm layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`, with a dense MLP or a mixture of experts."""

    def __init__(self, cfg: ModelConfig, *, experts: bool, rngs: nnx.Rngs, precision: Precision, kernels: KernelConfig):
        self.attention_norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        self.attention = MLAttention(cfg, rngs=rngs, precision=precision, kernels=kernels)
        self.mlp_norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        if experts:
            self.moe = MoE(cfg, rngs=rngs, precision=precision, kernels=kernels)
            if cfg.post_mlp_norm:
                self.moe_norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        else:
            std = cfg.initializer_range
            self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, std=std, rngs=rngs, precision=precision)
        self.experts, self.post_mlp_norm = experts, experts and cfg.post_mlp_norm

    def __call__(self, x_BTD: Activations, sequences: SequenceInfo) -> tuple[Activations, RouterStats | None]:
        """For training. Returns the output and the router's statistics, None for a dense layer."""
        segments_BT, positions_BT, replay_BTK = sequences
        with jax.named_scope("attention"):
            x_BTD += self.attention(self.attention_norm(x_BTD), segment_ids=segments_BT, positions=positions_BT)
        with jax.named_scope("mlp"):
            h_BTD = self.mlp_norm(x_BTD)
            if self.experts:
                not_padding_BT = None if segments_BT is None else segments_BT != 0
                y_BTD, stats = self.moe.with_stats(h_BTD, not_padding_BT, replay_BTK)
            else:
                y_BTD, stats = self.mlp(h_BTD), None
            if self.post_mlp_norm:
                y_BTD = self.moe_norm(y_BTD)
            return constrain_activations(x_BTD + y_BTD), stats

    def extend(
        self, x_bTD: NewTokens, cache_LBSW: CacheEntries, metadata: AttentionMetadata
    ) -> tuple[NewTokens, CacheEntries, Int[Array, "b T K"] | None]:
        """For prefill and decode: new tokens over the latent cache. Returns the output, the cache, and each token's
        experts (None for a dense layer)."""
        with jax.named_scope("attention"):
            y_bTD, cache_LBSW = self.attention.extend(self.attention_norm(x_bTD), cache_LBSW, metadata)
            x_bTD = constrain_decode_activations(x_bTD + y_bTD)
        with jax.named_scope("mlp"):
            h_bTD = self.mlp_norm(x_bTD)
            if self.experts:
                y_bTD, experts = self.moe.extend(h_bTD, metadata.expert_layer)
            else:
                y_bTD, experts = self.mlp(h_bTD, plain_einsum), None
            if self.post_mlp_norm:
                y_bTD = self.moe_norm(y_bTD)
        return constrain_decode_activations(x_bTD + y_bTD), cache_LBSW, experts


def stack_layers(abstract: Block, count: int, rngs: nnx.Rngs) -> Block:
    """Initialise `count` layers like `abstract` as one `Block`, whose parameters have a leading axis of layers."""

    def stacked(variable: nnx.Variable) -> nnx.Variable:
        shape, dtype = (count, *variable.get_value().shape), variable.get_value().dtype
        fill, std = (variable.get_metadata(name, None) for name in ("fill", "std"))
        value = normal(rngs, shape, std, dtype) if fill is None else jnp.full(shape, fill, dtype)
        return variable.replace(value, out_sharding=("layers", *variable.get_metadata("out_sharding")))

    graph, state = nnx.split(abstract)
    filled = [(path, stacked(variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def run_layers(
    layers: Block, x_BTD: Activations, sequences: SequenceInfo, replay_lBTK: Int[Array, "l B T K"] | None, remat: Remat
) -> tuple[Activations, RouterStats | None]:
    """Run stacked layers under a scan, so that 61 layers compile like one. Router statistics come back stacked."""
    graph, state = nnx.split(layers)

    def body(x_BTD: Array, layer: tuple[nnx.State, Array | None]) -> tuple[Array, RouterStats | None]:
        layer_state, replay_BTK = layer
        return nnx.merge(graph, layer_state)(x_BTD, sequences._replace(replay_BTK=replay_BTK))

    return jax.lax.scan(REMAT[remat](body), x_BTD, (state, replay_lBTK))


def extend_layers(
    layers: Block | nnx.List, x_bTD: NewTokens, cache_LBSW: CacheEntries, metadata: AttentionMetadata
) -> tuple[NewTokens, CacheEntries, Int[Array, "l b T K"] | None]:
    """`Block.extend` of stacked layers, or of a list of them (`unstack_layers`), from layer `metadata.layer` of the
    cache on. The cache is updated in place."""
    if isinstance(layers, nnx.List):
        experts = []
        for index, block in enumerate(layers):
            at = metadata._replace(layer=metadata.layer + index)
            x_bTD, cache_LBSW, layer_experts = block.extend(x_bTD, cache_LBSW, at)
            experts.append(layer_experts)
        return x_bTD, cache_LBSW, None if experts[0] is None else jnp.stack(experts)
    # The grouped-matmul kernels index the layer themselves: slicing the experts out of their stack would copy them.
    graph, stacked_experts, state = nnx.split(layers, lambda _, w: "experts" in w.get_metadata("out_sharding"), ...)

    def body(carry: tuple[Array, Array], layer: tuple[Array, nnx.State]) -> tuple[tuple[Array, Array], Array | None]:
        index, layer_state = layer
        block = nnx.merge(graph, stacked_experts, layer_state)
        at = metadata._replace(layer=metadata.layer + index, expert_layer=index if block.experts else None)
        x_bTD, cache_LBSW, experts = block.extend(*carry, at)
        return (x_bTD, cache_LBSW), experts

    indices = jnp.arange(len(jax.tree.leaves(state)[0]))
    (x_bTD, cache_LBSW), experts = jax.lax.scan(body, (x_bTD, cache_LBSW), (indices, state))
    return x_bTD, cache_LBSW, experts
