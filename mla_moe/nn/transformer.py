"""The language model: embedding, dense layers, MoE layers, final norm, output head and MTP module; and its loss."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mla_moe.config import KernelConfig, ModelConfig, require
from mla_moe.nn import loss
from mla_moe.nn.block import (
    REMAT,
    Block,
    Remat,
    SequenceInfo,
    ShortcutBlock,
    Stack,
    extend_layers,
    indexer_of_layer,
    of_indexer,
    run_layers,
    run_pipelined_layers,
    stack_layers,
)
from mla_moe.nn.kv_cache import (
    Active,
    AttentionMetadata,
    CacheEntries,
    KVCache,
    Lengths,
    NewIds,
    NewPositions,
    NewTokens,
    Slots,
    constrain_cache,
    init_cache,
    new_positions,
    require_cache,
)
from mla_moe.nn.layers import Activations, Ids, RMSNorm, embedding_lookup, output_head, require_shape, token_embedding
from mla_moe.nn.loss import Batch, LossSums
from mla_moe.nn.moe import RouterStats
from mla_moe.nn.param import Precision, matrix
from mla_moe.nn.rope import rotary
from mla_moe.ops.cached_attention import Form
from mla_moe.ops.key_selection import SelectedKeys, selected_words
from mla_moe.ops.weight_einsum import weight_einsum
from mla_moe.parallel.mesh import under_auto_axes
from mla_moe.parallel.pipeline import in_groups, pipeline_groups, pipeline_stages
from mla_moe.parallel.sharded_einsum import Einsum, plain_einsum, sharded_einsum
from mla_moe.parallel.sharding import constrain_decode_activations, constrain_decode_logits


class Transformer(nnx.Module):
    """A DeepSeek-family language model: `int32[B, T] -> float32[B, T, V]`.

    Equal layers are stacked and run under a scan, or without `scan_layers` one after another: compilation takes longer,
    and a training step of few layers on CPU is faster, because their activations are not copied into stacks and back.
    `remat` sets what the backward pass recomputes of each layer.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision | None = None,
        kernels: KernelConfig = KernelConfig(),
        remat: Remat = "none",
        scan_layers: bool = True,
    ):
        require(remat in REMAT, "remat", remat, f"choose one of {', '.join(REMAT)}")
        self.cfg, self.remat, self.scan_layers = cfg, remat, scan_layers
        self.precision = precision = precision or Precision.default()

        def layers(shares: Sequence[bool], experts: bool) -> Stack:
            block = partial(Block, cfg, experts=experts, has_indexer=not all(shares))
            if experts and cfg.moe_shortcut:
                block = partial(ShortcutBlock, cfg)
            block = partial(block, precision=precision, kernels=kernels)
            return stack_layers(nnx.eval_shape(lambda: block(rngs=nnx.Rngs(0))), shares, rngs)

        self.embed = token_embedding(cfg, rngs, precision)
        if not cfg.tie_word_embeddings:
            self.head = output_head(cfg, rngs, precision)
        if cfg.first_k_dense_replace:
            self.dense_layers = layers(self._shares(experts=False), experts=False)
        if cfg.num_moe_layers:
            self.moe_layers = layers(self._shares(experts=True), experts=True)
        self.norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        if cfg.num_nextn_predict_layers:
            self.mtp = MTP(cfg, rngs=rngs, precision=precision, kernels=kernels)

    @under_auto_axes(lambda tokens: tokens)
    def __call__(
        self, tokens: Ids, segment_ids: Ids | None = None, positions: Ids | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the next token. Segment ids separate the documents of a packed sequence (0 is padding); positions
        default to 0, 1, 2, …, so give them too for packed sequences."""
        return self.logits(self.hidden(tokens, segment_ids, positions)[0])

    @under_auto_axes(lambda _: P())
    def loss_sums(self, batch: Batch, *, chunk: int, mtp: bool, microbatches: int | None = None) -> LossSums:
        """The losses of a microbatch, summed over its tokens: next-token cross-entropy, with `mtp` that of the MTP
        module, the sequence-wise auxiliary load-balancing loss and the router z-loss; with the router's statistics.
        `chunk` is how many tokens of each sequence have logits at one time. Under a mesh with a pipeline the batch has
        several `microbatches`, by default one for each stage."""
        sequences = batch["segment_ids"], batch["positions"]
        groups = pipeline_groups(len(batch["tokens"]), microbatches) if pipeline_stages() > 1 else 1
        chunk = max(1, chunk // groups)  # more sequences at a time, so fewer tokens of each
        h_BTD, stats = self.hidden(batch["tokens"], *sequences, microbatches=microbatches)
        weights_BT = loss.target_mask(batch).astype(jnp.float32)
        nats = loss.cross_entropy(h_BTD, self.head_DV, batch["targets"], weights_BT, chunk=chunk)
        loads = [] if stats is None else [stats.load_E]
        aux_loss = z_loss = jnp.float32(0)
        dropped = jnp.int32(0)
        if stats is not None:
            aux_loss, z_loss, dropped = stats.aux_loss.sum(), stats.z_loss.sum(), stats.dropped.sum()
        mtp_nats = jnp.float32(0)
        if mtp:
            # The gradients of the two uses of the head one after the other: each is as large as the head, in float32.
            h_BTD, nats = jax.lax.optimization_barrier((h_BTD, nats))
            h_BTD, stats = in_groups(self.mtp_hidden, groups, h_BTD, batch["targets"], *sequences)
            targets_BT = loss.shift_left(batch["targets"])
            weights_BT = loss.mtp_target_mask(batch).astype(jnp.float32)
            mtp_nats = loss.cross_entropy(h_BTD, self.mtp_head_DV, targets_BT, weights_BT, chunk=chunk)
            loads.append(stats.load_E[None])
            aux_loss += stats.aux_loss
            z_loss += stats.z_loss
            dropped += stats.dropped
        load_LE = jnp.concatenate(loads) if loads else jnp.zeros((0, self.cfg.moe.router_width), jnp.int32)
        return LossSums(nats, mtp_nats, aux_loss, z_loss, load_LE, dropped)

    @under_auto_axes(lambda tokens: (tokens, P()))
    def hidden(
        self,
        tokens: Ids,
        segment_ids: Ids | None = None,
        positions: Ids | None = None,
        replay: Int[Array, "B T l K"] | None = None,
        *,
        microbatches: int | None = None,
    ) -> tuple[Activations, RouterStats | None]:
        """Hidden states after the final norm, and the router statistics of the MoE layers, stacked. Routing replay
        (arXiv 2507.18071, section 5.3): `replay` gives each token's experts in each MoE layer, −1 for the router's
        choice. `microbatches` are those of a pipeline, as in `loss_sums`."""
        sequences = _sequence_info(tokens, segment_ids, positions)
        if pipeline_stages() > 1:
            groups, dense = pipeline_groups(len(tokens), microbatches), getattr(self, "dense_layers", None)
            inputs = self.embedding(tokens), sequences, replay, self.remat, groups
            x_BTD, stats = run_pipelined_layers(dense, self.moe_layers, *inputs)
            return self.norm(x_BTD), stats
        sequences = sequences._replace(selected_BTW=self._no_keys(tokens.shape, tokens.shape[1]))
        x_BTD, stats = self.embedding(tokens), None
        if self.cfg.first_k_dense_replace:
            layers, shares = self.dense_layers, self._shares(experts=False)
            x_BTD, selected_BTW, _ = run_layers(layers, x_BTD, sequences, None, self.remat, shares, self.scan_layers)
            sequences = sequences._replace(selected_BTW=selected_BTW)
        if self.cfg.num_moe_layers:
            layers, shares = self.moe_layers, self._shares(experts=True)
            replay_lBTK = None if replay is None else jnp.moveaxis(replay, 2, 0)
            x_BTD, _, stats = run_layers(layers, x_BTD, sequences, replay_lBTK, self.remat, shares, self.scan_layers)
        return self.norm(x_BTD), stats

    def _shares(self, *, experts: bool) -> Sequence[bool]:
        """`ModelConfig.shared_indexers` of the stacked dense layers, or of those with experts."""
        first, step = self.cfg.first_k_dense_replace, self.cfg.layers_per_moe
        return self.cfg.shared_indexers[first::step] if experts else self.cfg.shared_indexers[:first]

    def _no_keys(self, shape: tuple[int, ...], num_keys: int) -> SelectedKeys | None:
        """What stands for the keys of a layer before the first if some layers share keys; None if no indexer selects
        among `num_keys`, or if none share."""
        topk = self.cfg.index_topk
        if topk is None or num_keys <= topk or not any(self.cfg.shared_indexers):
            return None
        return jnp.zeros((*shape, selected_words(num_keys)), jnp.uint32)

    @under_auto_axes(lambda hidden: (hidden, P()))
    def mtp_hidden(
        self, h_BTD: Activations, next_tokens: Ids, segment_ids: Ids | None = None, positions: Ids | None = None
    ) -> tuple[Activations, RouterStats]:
        """From `hidden` and the next tokens the hidden states that predict the tokens after them, and the router
        statistics of the MTP module."""
        run = REMAT[self.remat](partial(self.mtp, sequences=_sequence_info(next_tokens, segment_ids, positions)))
        return run(h_BTD, embedding_lookup(self._cast(self.mtp_embed), next_tokens))

    @under_auto_axes(lambda tokens: tokens)
    def embedding(self, tokens_BT: Ids) -> Activations:
        """Embeddings of tokens, in the compute dtype."""
        return embedding_lookup(self._cast(self.embed), tokens_BT)

    @under_auto_axes(lambda hidden: hidden)
    def logits(self, h_BTD: Activations, head_DV: Float[Array, "D V"] | None = None) -> Float[Array, "B T V"]:
        """Logits of hidden states. The head is the model's, or `mtp_head_DV` for hidden states of the MTP module."""
        head_DV = self.head_DV if head_DV is None else head_DV
        logits_BTV = weight_einsum("BTD,DV->BTV", h_BTD, head_DV, jnp.float32)
        return logits_BTV.astype(self.precision.logits)

    @under_auto_axes(lambda hidden, targets: (targets, targets))
    def token_logprobs(
        self, h_BTD: Activations, targets_BT: Ids, *, chunk: int, temperature: float = 1.0
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Log-probability of each target and entropy: `nn.loss.token_logprobs` with the model's head."""
        return loss.token_logprobs(h_BTD, self.head_DV, targets_BT, chunk=chunk, temperature=temperature)

    @property
    def mtp_embed(self) -> nnx.Param:
        """The embedding of the MTP module."""
        return self.embed if self.cfg.mtp_shares_embedding else self.mtp.embed

    @property
    def head_DV(self) -> Float[Array, "D V"]:
        """The output head in the compute dtype: a parameter, or the transposed embedding (`tie_word_embeddings`)."""
        return self._cast(self.embed).T if self.cfg.tie_word_embeddings else self._cast(self.head)

    @property
    def mtp_head_DV(self) -> Float[Array, "D V"]:
        """The output head of the MTP module, in the compute dtype."""
        return self.head_DV if self.cfg.mtp_shares_embedding else self._cast(self.mtp.head)

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike | None = None, *, mtp: bool = False) -> KVCache:
        """An empty cache for `prefill` and `decode_step`, as `MLAttention.init_cache`, of all layers; with `mtp` of the
        MTP module too (`mtp_extend`)."""
        fix = "needs a model with an MTP module (num_nextn_predict_layers = 1)"
        require(not mtp or self.cfg.num_nextn_predict_layers > 0, "mtp", mtp, fix)
        layers = self.cfg.num_hidden_layers + mtp
        return init_cache(self.cfg.attention, batch, max_length, dtype or self.precision.compute, layers=layers)

    @under_auto_axes(lambda tokens, cache: (P(tokens[0]), cache))
    def prefill(
        self, tokens: NewIds, cache: KVCache, lengths: Lengths | None = None, *, slots: Slots | None = None
    ) -> tuple[Float[Array, "b V"], KVCache]:
        """Append prompts, or chunks of them, to the cache. Returns the logits of the token after each, and the cache.

        `lengths` are the tokens of each sequence, 0 included, before padding on the right; by default there is no
        padding. `slots` are the sequences of the cache that the batch has; by default all in order. A full cache: see
        `extend`.
        """
        h_bTD, cache, _ = self.extend(tokens, cache, lengths, slots=slots, form="expanded")
        last_b = jnp.full(len(tokens), h_bTD.shape[1]) if lengths is None else jnp.maximum(lengths, 1)
        h_b1D = jnp.take_along_axis(h_bTD, (last_b - 1)[:, None, None], axis=1)
        return constrain_decode_logits(self.logits(h_b1D)[:, 0]), cache

    @under_auto_axes(lambda tokens, cache: (tokens, cache))
    def decode_step(
        self, tokens: Int[Array, "b"], cache: KVCache, active: Active | None = None
    ) -> tuple[Float[Array, "b V"], KVCache]:
        """Append one token to each sequence. Returns the logits of the token after it, and the cache. Sequences that
        are not `active` stay as they are, with arbitrary logits. A full cache: see `extend`."""
        require_shape("tokens", tokens, "b")
        h_B1D, cache, _ = self.extend(tokens[:, None], cache, active=active)
        return constrain_decode_logits(self.logits(h_B1D)[:, 0]), cache

    @under_auto_axes(lambda tokens, cache: (tokens, cache, P(None, *tokens)))
    def extend(
        self,
        tokens: NewIds,
        cache: KVCache,
        lengths: Lengths | None = None,
        *,
        active: Active | None = None,
        slots: Slots | None = None,
        form: Form = "absorbed",
        adapter_ids: Int[Array, "b"] | None = None,
    ) -> tuple[NewTokens, KVCache, Int[Array, "l b T K"] | None]:
        """Prefill or decode: append T new tokens to each of b sequences. `lengths`, `active` and `slots` are those of
        `prefill` and `decode_step`; `form` is how attention reads the latent cache (`ops.cached_attention`), and
        `adapter_ids` which of several adapters each sequence has (`nn.stacked_lora`).

        Returns hidden states after the final norm, the new cache, and the selected experts of each MoE layer. Raises
        `ConfigError` if a cache is full. Under `jax.jit`, where lengths are not known, the outputs of a sequence whose
        tokens do not fit are NaN, and its cache stays as it is. Not differentiable.
        """
        require_shape("tokens", tokens, "b", "T")
        layers = cache.entries_LBSW.shape[0]
        has_mtp = self.cfg.num_nextn_predict_layers > 0 and layers == self.cfg.num_hidden_layers + 1
        require_cache(self.cfg.attention, cache, layers=self.cfg.num_hidden_layers + has_mtp)
        new = new_positions(cache, tokens.shape, lengths, active, slots)
        metadata, entries_LBSW = self._attention_metadata(new, slots, form), cache.entries_LBSW
        no_keys = self._no_keys(tokens.shape, cache.max_length)
        metadata = metadata._replace(selected_bTw=no_keys, adapter_ids_b=adapter_ids)
        x_bTD, experts = constrain_decode_activations(self._cast(self.embed)[tokens]), None
        if self.cfg.first_k_dense_replace:
            shares, layers = self._shares(experts=False), self.dense_layers
            x_bTD, entries_LBSW, selected, _ = extend_layers(layers, x_bTD, entries_LBSW, metadata, shares)
            metadata = metadata._replace(selected_bTw=selected)
        if self.cfg.num_moe_layers:
            metadata = metadata._replace(layer=self.cfg.first_k_dense_replace)
            shares, layers = self._shares(experts=True), self.moe_layers
            x_bTD, entries_LBSW, _, experts = extend_layers(layers, x_bTD, entries_LBSW, metadata, shares)
        h_bTD = jnp.where(new.fits_b[:, None, None], self.norm(x_bTD), jnp.nan)
        return h_bTD, constrain_cache(KVCache(entries_LBSW, new.length_B)), experts

    @under_auto_axes(lambda hidden, _, cache: (hidden, cache))
    def mtp_extend(
        self,
        h_bTD: NewTokens,
        next_tokens: NewIds,
        cache: KVCache,
        *,
        active: Active | None = None,
        slots: Slots | None = None,
        form: Form = "absorbed",
    ) -> tuple[NewTokens, KVCache]:
        """`mtp_hidden` over a cache whose last layer is that of the MTP module, for draft tokens. The lengths of
        `cache` are those before `extend` of the same positions."""
        require_cache(self.cfg.attention, cache, layers=self.cfg.num_hidden_layers + 1)
        new = new_positions(cache, next_tokens.shape, None, active, slots)
        metadata = self._attention_metadata(new, slots, form, self.cfg.num_hidden_layers)
        x_bTD = constrain_decode_activations(self._cast(self.mtp_embed)[next_tokens])
        h_bTD, entries_LBSW = self.mtp.extend(h_bTD, x_bTD, cache.entries_LBSW, metadata)
        return h_bTD, constrain_cache(KVCache(entries_LBSW, new.length_B))

    def _attention_metadata(
        self, new: NewPositions, slots_b: Slots | None, form: Form, layer: int = 0
    ) -> AttentionMetadata:
        cos_sin = rotary(self.cfg.attention, new.positions_bT)
        return AttentionMetadata(slots_b, new.positions_bT, new.length_b, cos_sin, form, layer=layer)

    def _cast(self, weight: nnx.Param) -> Array:
        return weight[...].astype(self.precision.compute)


class MTP(nnx.Module):
    """The MTP module (DeepSeek-V3, section 2.2): predicts the token after the next one.

    Embedding and head are the model's, and are stored here only if `mtp_shares_embedding` is false. The projection
    takes [embedding; hidden], as in the released weights; the paper prints the other order.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, precision: Precision, kernels: KernelConfig):
        D = cfg.hidden_size
        self.embedding_norm = RMSNorm("embed", D, cfg.rms_norm_eps, precision)
        self.hidden_norm = RMSNorm("embed", D, cfg.rms_norm_eps, precision)
        axes = {"mtp_in": 2 * D, "embed": D}
        self.project = matrix(rngs, axes, contracts=("mtp_in",), std=cfg.initializer_range, dtype=precision.param)
        self.block = Block(cfg, experts=True, rngs=rngs, precision=precision, kernels=kernels)
        self.norm = RMSNorm("embed", D, cfg.rms_norm_eps, precision)
        if not cfg.mtp_shares_embedding:
            self.embed, self.head = token_embedding(cfg, rngs, precision), output_head(cfg, rngs, precision)
        self.precision = precision

    def __call__(
        self, h_BTD: Activations, next_embedding_BTD: Activations, sequences: SequenceInfo
    ) -> tuple[Activations, RouterStats]:
        """From the model's final-normed `h_i` and the embedding of token i+1 to the hidden state that predicts i+2."""
        x_BTD, _, stats = self.block(self._project(h_BTD, next_embedding_BTD, sharded_einsum), sequences)
        assert stats is not None  # the block has experts
        return self.norm(x_BTD), stats

    def extend(
        self, h_bTD: NewTokens, next_embedding_bTD: NewTokens, cache_LBSW: CacheEntries, metadata: AttentionMetadata
    ) -> tuple[NewTokens, CacheEntries]:
        """The same for prefill and decode, over the latent cache."""
        x_bTD = self._project(h_bTD, next_embedding_bTD, plain_einsum)
        x_bTD, cache_LBSW, _, _ = self.block.extend(x_bTD, cache_LBSW, metadata)
        return self.norm(x_bTD), cache_LBSW

    def _project(self, h_BTD: Activations, next_embedding_BTD: Activations, einsum: Einsum) -> Activations:
        both = jnp.concatenate([self.embedding_norm(next_embedding_BTD), self.hidden_norm(h_BTD)], axis=-1)
        return einsum("BTd,dD->BTD", both, self.project, self.precision.compute)


def unstack_layers(model: Transformer) -> Transformer:
    """The model with a list of layers in place of each stack, which `extend` runs one by one: in a scan XLA:CPU would
    copy every layer's weights out of the stack at each step."""
    model = nnx.clone(model)
    for name in ("dense_layers", "moe_layers"):
        if hasattr(model, name):
            graph, indexers, state = nnx.split(getattr(model, name), of_indexer, ...)
            layer = jax.jit(lambda state, i: jax.tree.map(lambda x: x[i], state))
            own = indexer_of_layer(model._shares(experts=name == "moe_layers"))
            indexer = [layer(indexers, i) for i in range(max(own) + 1)]  # layers that share keys hold no copy
            blocks = (nnx.merge(graph, indexer[i], layer(state, index)) for index, i in enumerate(own))
            setattr(model, name, nnx.List(blocks))
    return model


def _sequence_info(tokens_BT: Ids, segment_ids: Ids | None, positions: Ids | None) -> SequenceInfo:
    require_shape("tokens", tokens_BT, "B", "T")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return SequenceInfo(segment_ids, positions)
