"""One transformer layer, and how a stack of equal layers is run: under a scan, with rematerialisation."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn.attention import MLAttention
from mla_moe.nn.kv_cache import AttentionMetadata, KVCache, LayerIndex, NewTokens
from mla_moe.nn.layers import MLP, RMSNorm
from mla_moe.nn.moe import MoE, RouterStats
from mla_moe.nn.param import Precision, stacked
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

    segment_ids_BT: Int[Array, "B T"] | None
    positions_BT: Int[Array, "B T"]
    replay_BTK: Int[Array, "B T K"] | None = None
    """Routing replay: the experts of each token, −1 for the router's choice; None leaves all to the router."""

    @property
    def not_padding_BT(self) -> Bool[Array, "B T"] | None:
        return None if self.segment_ids_BT is None else self.segment_ids_BT != 0


class Block(nnx.Module):
    """Pre-norm layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`, with a dense MLP or a mixture of experts."""

    def __init__(self, cfg: ModelConfig, *, experts: bool, rngs: nnx.Rngs, precision: Precision, kernels: KernelConfig):
        self.attention_norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        self.attention = MLAttention(cfg, rngs=rngs, precision=precision, kernels=kernels)
        self.mlp_norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        if experts:
            self.moe = MoE(cfg, rngs=rngs, precision=precision, kernels=kernels)
        else:
            self.mlp = MLP(cfg, cfg.intermediate_size, rngs=rngs, precision=precision)
        self.experts = experts

    def __call__(
        self, x_BTD: Float[Array, "B T D"], sequences: SequenceInfo
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """For training. Returns the output and the router's statistics, None for a dense layer."""
        with jax.named_scope("attention"):
            x_BTD += self.attention(
                self.attention_norm(x_BTD), segment_ids=sequences.segment_ids_BT, positions=sequences.positions_BT
            )
        with jax.named_scope("mlp"):
            h_BTD = self.mlp_norm(x_BTD)
            if self.experts:
                y_BTD, stats = self.moe.with_stats(h_BTD, sequences.not_padding_BT, sequences.replay_BTK)
            else:
                y_BTD, stats = self.mlp(h_BTD), None
            return constrain_activations(x_BTD + y_BTD), stats

    def extend(
        self,
        x_bTD: NewTokens,
        cache_LBSW: KVCache,
        layer: LayerIndex,
        metadata: AttentionMetadata,
        expert_layer: Int[Array, ""] | None = None,
    ) -> tuple[NewTokens, KVCache, Int[Array, "b T K"] | None]:
        """For prefill and decode: new tokens over the latent cache. Returns the output, the cache, and each token's
        experts (None for a dense layer). `layer` is the index in the cache; `expert_layer` the index in the stack,
        where `moe` has the experts of all layers of the stack."""
        with jax.named_scope("attention"):
            y_bTD, cache_LBSW = self.attention.extend(self.attention_norm(x_bTD), cache_LBSW, layer, metadata)
            x_bTD = constrain_decode_activations(x_bTD + y_bTD)
        with jax.named_scope("mlp"):
            h_bTD = self.mlp_norm(x_bTD)
            y_bTD, experts = self.moe.extend(h_bTD, expert_layer) if self.experts else (self.mlp.extend(h_bTD), None)
        return constrain_decode_activations(x_bTD + y_bTD), cache_LBSW, experts


def stack_layers(abstract: Block, count: int, rngs: nnx.Rngs) -> Block:
    """Initialise `count` layers like `abstract` as one `Block`, whose parameters have a leading axis of layers."""
    graph, state = nnx.split(abstract)
    filled = [(path, stacked(variable, count, rngs)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def run_layers(
    layers: Block,
    x_BTD: Float[Array, "B T D"],
    sequences: SequenceInfo,
    replay_lBTK: Int[Array, "l B T K"] | None,
    remat: Remat,
) -> tuple[Float[Array, "B T D"], RouterStats | None]:
    """Run stacked layers under a scan, so that 61 layers compile like one. Router statistics come back stacked."""
    graph, state = nnx.split(layers)

    def body(x_BTD: Array, layer: tuple[nnx.State, Array | None]) -> tuple[Array, RouterStats | None]:
        layer_state, replay_BTK = layer
        return nnx.merge(graph, layer_state)(x_BTD, sequences._replace(replay_BTK=replay_BTK))

    return jax.lax.scan(REMAT[remat](body), x_BTD, (state, replay_lBTK))


def extend_layers(
    layers: Block | nnx.List, x_bTD: NewTokens, cache_LBSW: KVCache, first_layer: int, metadata: AttentionMetadata
) -> tuple[NewTokens, KVCache, Int[Array, "l b T K"] | None]:
    """`Block.extend` of stacked layers, or of a list of them (`unstack_layers`). The cache is updated in place."""
    if isinstance(layers, nnx.List):
        experts = []
        for layer, block in enumerate(layers, first_layer):
            x_bTD, cache_LBSW, layer_experts = block.extend(x_bTD, cache_LBSW, layer, metadata)
            experts.append(layer_experts)
        return x_bTD, cache_LBSW, None if experts[0] is None else jnp.stack(experts)
    # The grouped-matmul kernels index the layer themselves: slicing the experts out of their stack would copy them.
    graph, stacked_experts, state = nnx.split(layers, lambda _, weight: "experts" in weight.get_metadata("axes"), ...)

    def body(carry: tuple[Array, Array], layer: tuple[Array, nnx.State]) -> tuple[tuple[Array, Array], Array | None]:
        index, layer_state = layer
        block = nnx.merge(graph, stacked_experts, layer_state)
        expert_layer = index if block.experts else None
        x_bTD, cache_LBSW, experts = block.extend(*carry, first_layer + index, metadata, expert_layer)
        return (x_bTD, cache_LBSW), experts

    indices = jnp.arange(len(jax.tree.leaves(state)[0]))
    (x_bTD, cache_LBSW), experts = jax.lax.scan(body, (x_bTD, cache_LBSW), (indices, state))
    return x_bTD, cache_LBSW, experts
