"""One transformer layer, and how a stack of equal layers is run: under a scan, with rematerialisation."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn.attention import MLAttention
from mla_moe.nn.indexer import selection
from mla_moe.nn.kv_cache import AttentionMetadata, CacheEntries, NewSelectedKeys, NewTokens
from mla_moe.nn.layers import MLP, Activations, Ids, Mask, RMSNorm
from mla_moe.nn.moe import MoE, RouterStats
from mla_moe.nn.param import Precision, normal
from mla_moe.ops.key_selection import SelectedKeys
from mla_moe.parallel.mesh import current_mesh
from mla_moe.parallel.pipeline import in_groups, pipeline_stages, run_pipeline
from mla_moe.parallel.sharded_einsum import plain_einsum
from mla_moe.parallel.sharding import constrain_activations, constrain_decode_activations, named_shardings

Remat = Literal["none", "dots", "full", "stage"]
"""What the backward pass of a layer recomputes: nothing, everything but matrix products, or everything; `stage`: of a
pipeline's stage everything too, once more."""

REMAT = {
    "none": lambda layer: layer,
    "dots": lambda layer: jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
    "stage": jax.checkpoint,
}


class SequenceInfo(NamedTuple):
    """What a layer needs beside the activations. Segment 0 is padding; None: one document and no padding."""

    segment_ids_BT: Ids | None
    positions_BT: Ids
    replay_BTK: Int[Array, "B T K"] | None = None
    """Routing replay: the experts of each token, −1 for the router's choice; None leaves all to the router."""
    selected_BTW: SelectedKeys | None = None
    """The keys that the indexer of the layer before selected (DSA)."""
    shares_keys: Bool[Array, ""] | bool = False
    """Whether this layer uses those."""

    @property
    def not_padding_BT(self) -> Mask | None:
        return None if self.segment_ids_BT is None else self.segment_ids_BT != 0


class Block(nnx.Module):
    """Pre-norm layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`, with a dense MLP or a mixture of experts."""

    num_layers = 1
    """Layers of the KV cache."""

    def __init__(
        self, cfg: ModelConfig, *, experts: bool, has_indexer: bool = True, rngs: nnx.Rngs, precision: Precision,
        kernels: KernelConfig,
    ):  # fmt: skip
        self.attention_norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        self.attention = MLAttention(cfg, rngs=rngs, precision=precision, kernels=kernels, has_indexer=has_indexer)
        self.mlp_norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        if experts:
            self.moe = MoE(cfg, rngs=rngs, precision=precision, kernels=kernels)
            if cfg.post_mlp_norm:
                self.moe_norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        else:
            std = cfg.initializer_range
            self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, std=std, rngs=rngs, precision=precision)
        self.experts, self.post_mlp_norm = experts, experts and cfg.post_mlp_norm

    def __call__(
        self, x_BTD: Activations, sequences: SequenceInfo
    ) -> tuple[Activations, SelectedKeys | None, RouterStats | None]:
        """For training. Returns the output, the keys that an indexer selects, and the router's statistics, None for a
        dense layer."""
        x_BTD, selected_BTW = self.attend(x_BTD, sequences)
        with jax.named_scope("mlp"):
            h_BTD = self.mlp_norm(x_BTD)
            if self.experts:
                y_BTD, stats = self.moe.with_stats(h_BTD, sequences.not_padding_BT, sequences.replay_BTK)
            else:
                y_BTD, stats = self.mlp(h_BTD), None
            if self.post_mlp_norm:
                y_BTD = self.moe_norm(y_BTD)
            return constrain_activations(x_BTD + y_BTD), selected_BTW, stats

    def attend(self, x_BTD: Activations, sequences: SequenceInfo) -> tuple[Activations, SelectedKeys | None]:
        """The first half, `x + attention(norm(x))`, and the keys that an indexer selects."""
        segments_BT, positions_BT, _, selected_BTW, shares_keys = sequences
        with jax.named_scope("attention"):
            h_BTD = self.attention_norm(x_BTD)
            select = partial(self.attention.select_keys, jax.lax.stop_gradient(h_BTD), segments_BT, positions_BT)
            selected_BTW = selection(select, selected_BTW, shares_keys)
            x_BTD += self.attention(h_BTD, segment_ids=segments_BT, positions=positions_BT, selected_keys=selected_BTW)
        return x_BTD, selected_BTW

    def extend(
        self, x_bTD: NewTokens, cache_LBSW: CacheEntries, metadata: AttentionMetadata
    ) -> tuple[NewTokens, CacheEntries, NewSelectedKeys | None, Int[Array, "b T K"] | None]:
        """For prefill and decode: new tokens over the latent cache. Returns the output, the cache, the keys that an
        indexer selects, and each token's experts (None for a dense layer)."""
        x_bTD, cache_LBSW, selected_bTw = self.extend_attention(x_bTD, cache_LBSW, metadata)
        with jax.named_scope("mlp"):
            h_bTD = self.mlp_norm(x_bTD)
            if self.experts:
                y_bTD, experts = self.moe.extend(h_bTD, metadata.expert_layer, metadata.adapter_ids_b)
            else:
                y_bTD, experts = self.mlp(h_bTD, plain_einsum, metadata.adapter_ids_b), None
            if self.post_mlp_norm:
                y_bTD = self.moe_norm(y_bTD)
        return constrain_decode_activations(x_bTD + y_bTD), cache_LBSW, selected_bTw, experts

    def extend_attention(
        self, x_bTD: NewTokens, cache_LBSW: CacheEntries, metadata: AttentionMetadata
    ) -> tuple[NewTokens, CacheEntries, NewSelectedKeys | None]:
        """The first half of `extend`."""
        with jax.named_scope("attention"):
            y_bTD, cache_LBSW, selected_bTw = self.attention.extend(self.attention_norm(x_bTD), cache_LBSW, metadata)
            return constrain_decode_activations(x_bTD + y_bTD), cache_LBSW, selected_bTw


class ShortcutBlock(nnx.Module):
    """Two dense layers and a mixture of experts beside them (shortcut-connected MoE; LongCat-Flash, arXiv 2509.01322,
    section 2.2). The experts' input is that of the first layer's MLP, and nothing waits for their output before the
    second layer has run: dispatch and combine can overlap with it."""

    num_layers, experts = 2, True

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, precision: Precision, kernels: KernelConfig):
        layer = partial(Block, cfg, experts=False, rngs=rngs, precision=precision, kernels=kernels)
        self.first, self.second = layer(), layer()
        self.moe = MoE(cfg, rngs=rngs, precision=precision, kernels=kernels)

    def __call__(self, x_BTD: Activations, sequences: SequenceInfo) -> tuple[Activations, None, RouterStats]:
        """As `Block`."""
        x_BTD, _ = self.first.attend(x_BTD, sequences)
        with jax.named_scope("mlp"):
            h_BTD = self.first.mlp_norm(x_BTD)
            y_BTD, stats = self.moe.with_stats(h_BTD, sequences.not_padding_BT, sequences.replay_BTK)
            x_BTD = constrain_activations(x_BTD + self.first.mlp(h_BTD))
        x_BTD, _, _ = self.second(x_BTD, sequences)
        return constrain_activations(x_BTD + y_BTD), None, stats

    def extend(
        self, x_bTD: NewTokens, cache_LBSW: CacheEntries, metadata: AttentionMetadata
    ) -> tuple[NewTokens, CacheEntries, None, Int[Array, "b T K"]]:
        """As `Block.extend`, of two layers of the cache."""
        x_bTD, cache_LBSW, _ = self.first.extend_attention(x_bTD, cache_LBSW, metadata)
        with jax.named_scope("mlp"):
            h_bTD = self.first.mlp_norm(x_bTD)
            y_bTD, experts = self.moe.extend(h_bTD, metadata.expert_layer, metadata.adapter_ids_b)
            first_bTD = self.first.mlp(h_bTD, plain_einsum, metadata.adapter_ids_b)
            x_bTD = constrain_decode_activations(x_bTD + first_bTD)
        metadata = metadata._replace(layer=metadata.layer + 1)
        x_bTD, cache_LBSW, _, _ = self.second.extend(x_bTD, cache_LBSW, metadata)
        return constrain_decode_activations(x_bTD + y_bTD), cache_LBSW, None, experts


Stack = Block | ShortcutBlock
"""Stacked layers: each parameter has a leading axis."""


def stack_layers(abstract: Stack, shares: Sequence[bool], rngs: nnx.Rngs) -> Stack:
    """Initialise layers like `abstract` as one module, whose parameters have a leading axis of layers; those of
    indexers one of the layers that do not share another's keys. The stages of a pipeline divide layers with experts."""
    layers = "layers" if abstract.experts else "dense_layers"

    def stacked(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        count = shares.count(False) if of_indexer(path, variable) else len(shares)
        shape, dtype = (count, *variable.get_value().shape), variable.get_value().dtype
        fill, std = (variable.get_metadata(name, None) for name in ("fill", "std"))
        value = normal(rngs, shape, std, dtype) if fill is None else jnp.full(shape, fill, dtype)
        return variable.replace(value, out_sharding=(layers, *variable.get_metadata("out_sharding")))

    graph, state = nnx.split(abstract)
    filled = [(path, stacked(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def of_indexer(path: tuple[Any, ...], _: Any) -> bool:
    """Whether a variable of a block is one of its indexer."""
    return "indexer" in path


def indexer_of_layer(shares: Sequence[bool]) -> list[int]:
    """For each of stacked layers the index of the indexer whose keys it uses, among those of the stack; 0 for layers
    that use one of an earlier stack."""
    return np.maximum(np.cumsum(np.logical_not(shares)) - 1, 0).tolist()


def _by_layer(shares: Sequence[bool]) -> tuple[Array, Array | None]:
    """What a scan over layers takes beside their parameters: `indexer_of_layer`, and whether each layer shares the keys
    of the one before, None if all or none do."""
    return jnp.asarray(indexer_of_layer(shares), jnp.int32), jnp.asarray(shares) if len(set(shares)) > 1 else None


def run_layers(
    layers: Stack,
    x_BTD: Activations,
    sequences: SequenceInfo,
    replay_lBTK: Int[Array, "l B T K"] | None,
    remat: Remat,
    shares: Sequence[bool],
    scan: bool = True,
) -> tuple[Activations, SelectedKeys | None, RouterStats | None]:
    """Run stacked layers under a scan, so that 61 layers compile like one, or one after another without `scan`. Router
    statistics come back stacked. `shares`: which layers use the keys that an indexer selected in the layer before. The
    keys of the last layer are returned if `sequences` has such keys, for the first."""
    graph, indexers, state = nnx.split(layers, of_indexer, ...)
    carries = sequences.selected_BTW is not None

    def body(carry: tuple[Array, Array | None], layer: Any) -> tuple[tuple[Array, Array | None], RouterStats | None]:
        x_BTD, selected_BTW = carry
        layer_state, replay_BTK, (index, shared) = layer
        block = nnx.merge(graph, jax.tree.map(lambda w: w[index], indexers), layer_state)
        shared = shares[0] if shared is None else shared
        info = sequences._replace(replay_BTK=replay_BTK, selected_BTW=selected_BTW, shares_keys=shared)
        x_BTD, selected_BTW, stats = block(x_BTD, info)
        return (x_BTD, selected_BTW if carries else None), stats

    inputs = state, replay_lBTK, _by_layer(shares)
    carry, run = (x_BTD, sequences.selected_BTW), REMAT[remat](body)
    (x_BTD, selected_BTW), stats = jax.lax.scan(run, carry, inputs, unroll=not scan)
    return x_BTD, selected_BTW, stats


def run_pipelined_layers(
    dense: Stack | None,
    layers: Stack,
    x_BTD: Activations,
    sequences: SequenceInfo,
    replay_BTlK: Int[Array, "B T l K"] | None,
    remat: Remat,
    groups: int,
) -> tuple[Activations, RouterStats]:
    """`run_layers` of dense layers and of `layers` with experts, none of which share keys, on a mesh with a pipeline.
    Its stages have equal numbers of the layers with experts; the first few, which are left over, run outside of it as
    the dense ones do, on one group of microbatches after the other."""
    left_over, staged = _split_stages(layers)
    count = 0 if left_over is None else _num_layers(left_over)

    def before(x_BTD: Array, sequences: Any, replay_BTlK: Array | None) -> tuple[Array, RouterStats | None]:
        info, stats = SequenceInfo(*sequences), None
        if dense is not None:
            x_BTD, _, _ = run_layers(dense, x_BTD, info, None, remat, [False] * _num_layers(dense))
        if left_over is not None:
            replay_lBTK = None if replay_BTlK is None else jnp.moveaxis(replay_BTlK, 2, 0)
            x_BTD, _, stats = run_layers(left_over, x_BTD, info, replay_lBTK, remat, [False] * count)
        return x_BTD, stats

    graph, state = nnx.split(staged)

    def stage(state: Any, x_bTD: Array, sequences: Any, index: Array) -> tuple[Array, RouterStats | None]:
        of_tokens, replay_bTlK = sequences
        info, count, replay_lbTK = SequenceInfo(*of_tokens), len(jax.tree.leaves(state)[0]), None
        if replay_bTlK is not None:
            own_bTlK = jax.lax.dynamic_slice_in_dim(replay_bTlK, index * count, count, axis=2)
            replay_lbTK = jnp.moveaxis(own_bTlK, 2, 0)
        x_bTD, _, stats = run_layers(nnx.merge(graph, state), x_bTD, info, replay_lbTK, remat, [False] * count)
        return x_bTD, stats

    of_tokens, first_stats = (sequences.segment_ids_BT, sequences.positions_BT), None
    first, rest = (None, None) if replay_BTlK is None else (replay_BTlK[:, :, :count], replay_BTlK[:, :, count:])
    if dense is not None or left_over is not None:
        x_BTD, first_stats = in_groups(before, groups, x_BTD, of_tokens, first)
    run = jax.checkpoint(stage) if remat == "stage" else stage
    x_BTD, stats = run_pipeline(run, state, x_BTD, (of_tokens, rest), groups)
    if first_stats is not None:
        stats = jax.tree.map(lambda *parts: jnp.concatenate(parts), first_stats, stats)
    return x_BTD, stats


def _num_layers(layers: Stack) -> int:
    return len(jax.tree.leaves(nnx.state(layers))[0])


def _split_stages(layers: Stack) -> tuple[Stack | None, Stack]:
    """The first layers, as many as are left over when the current mesh's pipeline divides them, or None; and the
    others. If some are left over, layers are not stored on their stages (`partition_spec`), but resharded to them."""
    mesh, (graph, state) = current_mesh(), nnx.split(layers)
    count = len(jax.tree.leaves(state)[0]) % pipeline_stages()
    if not count or mesh is None:
        return None, layers
    first, others = jax.tree.map(lambda w: w[:count], state), jax.tree.map(lambda w: w[count:], state)
    others = jax.lax.with_sharding_constraint(others, named_shardings(others, mesh.mesh))
    return nnx.merge(graph, first), nnx.merge(graph, others)


def extend_layers(
    layers: Stack | nnx.List,
    x_bTD: NewTokens,
    cache_LBSW: CacheEntries,
    metadata: AttentionMetadata,
    shares: Sequence[bool],
) -> tuple[NewTokens, CacheEntries, NewSelectedKeys | None, Int[Array, "l b T K"] | None]:
    """`Block.extend` of stacked layers, or of a list of them (`unstack_layers`), from layer `metadata.layer` of the
    cache on. The cache is updated in place. `shares` and selected keys: see `run_layers`."""
    carries = metadata.selected_bTw is not None
    if isinstance(layers, nnx.List):
        experts, selected_bTw = [], metadata.selected_bTw
        for index, (block, shared) in enumerate(zip(layers, shares, strict=True)):
            layer = metadata.layer + index * block.num_layers
            at = metadata._replace(layer=layer, selected_bTw=selected_bTw, shares_keys=shared)
            x_bTD, cache_LBSW, selected_bTw, layer_experts = block.extend(x_bTD, cache_LBSW, at)
            experts.append(layer_experts)
        stacked = None if experts[0] is None else jnp.stack(experts)
        return x_bTD, cache_LBSW, selected_bTw if carries else None, stacked
    # The grouped-matmul kernels index the layer themselves: slicing the experts out of their stack would copy them.
    graph, stacked_experts, indexers, state = nnx.split(
        layers, lambda _, w: "experts" in w.get_metadata("out_sharding"), of_indexer, ...
    )

    def body(carry: tuple[Array, Array, Array | None], layer: Any) -> tuple[tuple[Array, Array, Any], Array | None]:
        x_bTD, cache_LBSW, selected_bTw = carry
        index, layer_state, (own, shared) = layer
        block = nnx.merge(graph, stacked_experts, jax.tree.map(lambda w: w[own], indexers), layer_state)
        layer = metadata.layer + index * block.num_layers
        at = metadata._replace(layer=layer, expert_layer=index if block.experts else None)
        at = at._replace(selected_bTw=selected_bTw, shares_keys=shares[0] if shared is None else shared)
        x_bTD, cache_LBSW, selected_bTw, experts = block.extend(x_bTD, cache_LBSW, at)
        return (x_bTD, cache_LBSW, selected_bTw if carries else None), experts

    inputs = jnp.arange(len(shares)), state, _by_layer(shares)
    carry, experts = jax.lax.scan(body, (x_bTD, cache_LBSW, metadata.selected_bTw), inputs)
    return *carry, experts
