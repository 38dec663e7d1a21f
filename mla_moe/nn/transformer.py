"""The model, top to bottom: embedding, dense layers, expert layers, final norm, head, and the prediction module."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn.attention import MLAttention
from mla_moe.nn.kv_cache import AttentionMetadata
from mla_moe.nn.mlp import MLP
from mla_moe.nn.moe import MoE, RouterStats
from mla_moe.nn.norm import RMSNorm
from mla_moe.nn.param import Embedding, Precision, matrix, stacked
from mla_moe.nn.rope import rotary
from mla_moe.ops.cached_attention import Form
from mla_moe.parallel.mesh import BATCH_SPEC, require_auto_axes, token_mesh
from mla_moe.parallel.sharded_einsum import Einsum, plain_einsum, sharded_einsum
from mla_moe.parallel.sharding import constrain_activations, constrain_decode_activations

Remat = Literal["none", "dots", "full"]

_REMAT = {
    "none": lambda layer: layer,
    "dots": lambda layer: jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}


class SequenceInfo(NamedTuple):
    """What every layer is told of the tokens. Segment 0 is padding; None means one document and no padding."""

    segment_ids_BT: Int[Array, "B T"] | None
    positions_BT: Int[Array, "B T"]
    replay_BTK: Int[Array, "B T K"] | None = None
    """Experts that the tokens go to, −1 for the router's choice; None leaves all to the router."""

    @property
    def real_BT(self):
        return None if self.segment_ids_BT is None else self.segment_ids_BT != 0


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, where the MLP is dense or a mixture of experts."""

    def __init__(self, cfg: ModelConfig, *, experts: bool, rngs: nnx.Rngs, precision: Precision, kernels: KernelConfig):
        self.attention_norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        self.attention = MLAttention(cfg, rngs=rngs, precision=precision, kernels=kernels)
        self.mlp_norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        if experts:
            self.moe = MoE(cfg, rngs=rngs, precision=precision, kernels=kernels)
        else:
            self.mlp = MLP(cfg, cfg.intermediate_size, rngs=rngs, precision=precision)
        self.experts = experts

    def __call__(self, x_BTD, context: SequenceInfo) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        with jax.named_scope("attention"):
            x_BTD += self.attention(
                self.attention_norm(x_BTD), segment_ids=context.segment_ids_BT, positions=context.positions_BT
            )
        with jax.named_scope("mlp"):
            h_BTD = self.mlp_norm(x_BTD)
            if self.experts:
                y_BTD, stats = self.moe.with_stats(h_BTD, context.real_BT, context.replay_BTK)
            else:
                y_BTD, stats = self.mlp(h_BTD), None
            return constrain_activations(x_BTD + y_BTD), stats

    def extend(self, x_bTD, cache_LBSW, layer, reach: AttentionMetadata, place: Int[Array, ""] | None = None):
        """The same for new tokens over the cache. Returns `x`, the cache, and each token's experts or None. Where
        experts' weights are those of a whole stack of layers, `place` is the block's in it."""
        with jax.named_scope("attention"):
            y_bTD, cache_LBSW = self.attention.extend(self.attention_norm(x_bTD), cache_LBSW, layer, reach)
            x_bTD = constrain_decode_activations(x_bTD + y_bTD)
        with jax.named_scope("mlp"):
            h_bTD = self.mlp_norm(x_bTD)
            y_bTD, experts = self.moe.extend(h_bTD, place) if self.experts else (self.mlp.extend(h_bTD), None)
        return constrain_decode_activations(x_bTD + y_bTD), cache_LBSW, experts


class MTP(nnx.Module):
    """Multi-token prediction (DeepSeek-V3, section 2.2): one more block that predicts the token after the next.

    Embedding and head are the model's, so they are not stored here unless `mtp_shares_embedding` is false. The
    projection takes [embedding; hidden], as in the released weights; the paper prints the other order.
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
            self.embed, self.head = embedding_and_head(cfg, rngs, precision)
        self.precision = precision

    def __call__(
        self, h_BTD, next_embedding_BTD, context: SequenceInfo
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """From the model's final-normed `h_i` and the embedding of token i+1 to the hidden state that predicts i+2."""
        x_BTD, stats = self.block(self._join(h_BTD, next_embedding_BTD, sharded_einsum), context)
        return self.norm(x_BTD), stats

    def extend(self, h_bTD, next_embedding_bTD, cache_LBSW, layer, reach: AttentionMetadata):
        """The same for new tokens over the cache."""
        x_bTD = self._join(h_bTD, next_embedding_bTD, plain_einsum)
        x_bTD, cache_LBSW, _ = self.block.extend(x_bTD, cache_LBSW, layer, reach)
        return self.norm(x_bTD), cache_LBSW

    def _join(self, h_BTD, next_embedding_BTD, product: Einsum):
        both = jnp.concatenate([self.embedding_norm(next_embedding_BTD), self.hidden_norm(h_BTD)], axis=-1)
        return product("BTd,dD->BTD", both, self.project, self.precision.compute)


def embedding_and_head(cfg: ModelConfig, rngs: nnx.Rngs, precision: Precision) -> tuple[nnx.Param, nnx.Param]:
    V, D, std, dtype = cfg.vocab_size, cfg.hidden_size, cfg.initializer_range, precision.param
    embed = matrix(rngs, {"vocab": V, "embed": D}, contracts=(), std=std, dtype=dtype, kind=Embedding)
    head = matrix(rngs, {"embed": D, "vocab": V}, contracts=("embed",), std=std, dtype=dtype, kind=Embedding)
    return embed, head


class Transformer(nnx.Module):
    """A DeepSeek-family language model: `int32[B, T] -> float32[B, T, V]`.

    Equal layers are stacked and run under a scan, so that 61 layers compile like one. `remat` says what a layer's
    backward pass recomputes: nothing (`none`), all but matrix products (`dots`) or everything (`full`).
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision | None = None,
        kernels: KernelConfig = KernelConfig(),
        remat: Remat = "none",
    ):
        self.cfg = cfg
        self.precision = precision = precision or Precision.default()
        self.remat = remat
        how: dict[str, Any] = {"precision": precision, "kernels": kernels}

        def layers(count: int, experts: bool):
            one = nnx.eval_shape(lambda: Block(cfg, experts=experts, rngs=nnx.Rngs(0), **how))
            graph, state = nnx.split(one)
            filled = [(path, stacked(variable, count, rngs)) for path, variable in nnx.to_flat_state(state)]
            return nnx.merge(graph, nnx.from_flat_state(filled))

        self.embed, self.head = embedding_and_head(cfg, rngs, precision)
        if cfg.first_k_dense_replace:
            self.dense_layers = layers(cfg.first_k_dense_replace, experts=False)
        if cfg.num_moe_layers:
            self.moe_layers = layers(cfg.num_moe_layers, experts=True)
        self.norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        if cfg.num_nextn_predict_layers:
            self.mtp = MTP(cfg, rngs=rngs, **how)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token. Segment ids part the documents of a row (0 is padding); positions default to the
        place in the row, so give them for packed documents."""
        h_BTD, _ = self.hidden(tokens, segment_ids, positions)
        return self.logits(h_BTD)

    def hidden(
        self, tokens, segment_ids=None, positions=None, replay: Int[Array, "B T l K"] | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Hidden states after the final norm, and the expert layers' routing, stacked. `replay` names the experts of
        each token in each expert layer, −1 for the router's choice: routing replay (arXiv 2507.18071, section 5.3)."""
        context = _sequence_info(tokens, segment_ids, positions)
        x_BTD, stats = self.embedding(tokens), None
        if self.cfg.first_k_dense_replace:
            x_BTD, _ = self._scan(self.dense_layers, x_BTD, context)
        if self.cfg.num_moe_layers:
            replay_lBTK = None if replay is None else jnp.moveaxis(replay, 2, 0)
            x_BTD, stats = self._scan(self.moe_layers, x_BTD, context, replay_lBTK)
        return self.norm(x_BTD), stats

    def mtp_hidden(self, h_BTD, next_tokens, segment_ids=None, positions=None):
        """Hidden states that predict the token after `next_tokens`, and the module's routing."""
        context = _sequence_info(next_tokens, segment_ids, positions)

        def run(h_BTD, embedding_BTD):
            return self.mtp(h_BTD, embedding_BTD, context)

        return _REMAT[self.remat](run)(h_BTD, self.mtp_embedding(next_tokens))

    @property
    def mtp_head(self) -> nnx.Param:
        """The head that goes with `mtp_hidden`."""
        return self.head if self.cfg.mtp_shares_embedding else self.mtp.head

    def mtp_embedding(self, tokens_BT) -> Float[Array, "B T D"]:
        embed = self.embed if self.cfg.mtp_shares_embedding else self.mtp.embed
        return lookup(embed[...].astype(self.precision.compute), tokens_BT)

    def extend(
        self,
        tokens: Int[Array, "b T"],
        cache_LBSW: Num[Array, "L B S W"],
        start: Int[Array, "b"],
        slots: Int[Array, "b"] | None = None,
        form: Form = "absorbed",
    ) -> tuple[Float[Array, "b T D"], Num[Array, "L B S W"], Int[Array, "l b T K"] | None]:
        """New tokens from place `start` of their slots on (all slots in order by default), over the latent cache.

        Returns hidden states after the final norm, the cache with the new entries, and the experts chosen in each
        expert layer. A row whose tokens do not fit into its slot leaves the cache alone.
        """
        reach = self.reach(tokens, start, slots, form)
        x_bTD, experts = self._rows(self.embed, tokens), None
        if self.cfg.first_k_dense_replace:
            x_bTD, cache_LBSW, _ = _extend(self.dense_layers, x_bTD, cache_LBSW, 0, reach)
        if self.cfg.num_moe_layers:
            first = self.cfg.first_k_dense_replace
            x_bTD, cache_LBSW, experts = _extend(self.moe_layers, x_bTD, cache_LBSW, first, reach)
        return self.norm(x_bTD), cache_LBSW, experts

    def mtp_extend(self, h_bTD, next_tokens, cache_LBSW, start, slots=None, form: Form = "absorbed"):
        """`mtp_hidden` of new tokens over the cache, whose last layer is the prediction module's."""
        reach = self.reach(next_tokens, start, slots, form)
        x_bTD = self._rows(self.embed if self.cfg.mtp_shares_embedding else self.mtp.embed, next_tokens)
        return self.mtp.extend(h_bTD, x_bTD, cache_LBSW, self.cfg.num_hidden_layers, reach)

    def _rows(self, embed: nnx.Param, tokens_bT) -> Float[Array, "b T D"]:
        return constrain_decode_activations(embed[...].astype(self.precision.compute)[tokens_bT])

    def reach(self, tokens_bT, start_b, slots_b, form: Form) -> AttentionMetadata:
        positions_bT = start_b[:, None] + jnp.arange(tokens_bT.shape[1])
        every_slot = slots_b is None
        slots_b = jnp.arange(len(start_b)) if every_slot else slots_b
        return AttentionMetadata(slots_b, positions_bT, rotary(self.cfg, positions_bT), every_slot, form)

    def embedding(self, tokens_BT) -> Float[Array, "B T D"]:
        return lookup(self.embed[...].astype(self.precision.compute), tokens_BT)

    def logits(self, h_BTD, head: nnx.Param | None = None) -> Float[Array, "B T V"]:
        """Of the model's head, or of the prediction module's `mtp_head`."""
        head_DV = (head or self.head)[...].astype(self.precision.compute)
        logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, head_DV, preferred_element_type=jnp.float32)
        return logits_BTV.astype(self.precision.output)

    def _scan(self, layers: Block, x_BTD, context: SequenceInfo, replay_lBTK=None):
        graph, state = nnx.split(layers)

        def body(x_BTD, layer):
            layer_state, replay_BTK = layer
            return nnx.merge(graph, layer_state)(x_BTD, context._replace(replay_BTK=replay_BTK))

        return jax.lax.scan(_REMAT[self.remat](body), x_BTD, (state, replay_lBTK))


def unstack_layers(model: Transformer) -> Transformer:
    """The model with a list of layers in place of each stack: `extend` then runs them one by one. XLA:CPU would copy
    every layer's weights out of the stack, each time that it runs."""
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)
    for name in ("dense_layers", "moe_layers"):
        if hasattr(model, name):
            graph, state = nnx.split(getattr(model, name))
            count = len(jax.tree.leaves(state)[0])
            one = jax.jit(lambda state, i: jax.tree.map(lambda x: x[i], state))
            setattr(model, name, nnx.List([nnx.merge(graph, one(state, i)) for i in range(count)]))
    return model


def _extend(layers, x_bTD, cache_LBSW, first: int, reach: AttentionMetadata):
    """A stack of layers, or a list of them, one after the other: the cache is handed on, never copied."""
    if isinstance(layers, nnx.List):
        experts = []
        for number, block in enumerate(layers, first):
            x_bTD, cache_LBSW, chosen = block.extend(x_bTD, cache_LBSW, number, reach)
            experts.append(chosen)
        return x_bTD, cache_LBSW, None if experts[0] is None else jnp.stack(experts)
    # A kernel's operand has to be whole: experts, cut out of their stack for it, would be copied.
    graph, whole, state = nnx.split(layers, lambda _, weight: "experts" in weight.get_metadata("axes"), ...)

    def body(carry, layer):
        place, layer_state = layer
        block = nnx.merge(graph, whole, layer_state)
        x_bTD, cache_LBSW, experts = block.extend(*carry, first + place, reach, place if block.experts else None)
        return (x_bTD, cache_LBSW), experts

    places = jnp.arange(len(jax.tree.leaves(state)[0]))
    (x_bTD, cache_LBSW), experts = jax.lax.scan(body, (x_bTD, cache_LBSW), (places, state))
    return x_bTD, cache_LBSW, experts


def lookup(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the embedding. Under a mesh the table stays where it is: a device looks up its part of every row of the
    tokens that share its `fsdp` axis, and the parts are exchanged, N · D values where the table has V · D."""
    require_auto_axes(tokens_BT)
    mesh = token_mesh(tokens_BT.shape)
    if mesh is None:
        return table_VD[tokens_BT]
    V, D = table_VD.shape
    vocab = "tensor" if V % mesh.shape["tensor"] == 0 else None
    embed = "fsdp" if D % mesh.shape["fsdp"] == 0 else None

    def local(table_vd, tokens_bt):
        if embed:
            tokens_bt = jax.lax.all_gather(tokens_bt, embed, tiled=True)
        if vocab:
            tokens_bt -= jax.lax.axis_index(vocab) * len(table_vd)
        x_btd = table_vd.at[tokens_bt].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        if vocab:
            x_btd = jax.lax.psum(x_btd, vocab)
        return jax.lax.all_to_all(x_btd, embed, split_axis=0, concat_axis=2, tiled=True) if embed else x_btd

    return jax.shard_map(local, in_specs=(P(vocab, embed), P(*BATCH_SPEC)), out_specs=P(*BATCH_SPEC), check_vma=False)(
        table_VD, tokens_BT
    )


def _sequence_info(tokens_BT, segment_ids, positions) -> SequenceInfo:
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return SequenceInfo(segment_ids, positions)
