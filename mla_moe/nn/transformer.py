"""The language model: embedding, dense layers, MoE layers, final norm, output head and MTP module; and its loss."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn import loss
from mla_moe.nn.block import REMAT, Block, Remat, SequenceInfo, extend_layers, run_layers, stack_layers
from mla_moe.nn.kv_cache import AttentionMetadata, KVCache, NewTokens
from mla_moe.nn.layers import RMSNorm, embedding_and_head, embedding_lookup
from mla_moe.nn.loss import Batch, LossSums
from mla_moe.nn.moe import RouterStats
from mla_moe.nn.mtp import MTP
from mla_moe.nn.param import Precision
from mla_moe.nn.rope import rotary
from mla_moe.ops.cached_attention import Form
from mla_moe.parallel.sharding import constrain_decode_activations


class Transformer(nnx.Module):
    """A DeepSeek-family language model: `int32[B, T] -> float32[B, T, V]`.

    Equal layers are stacked and run under a scan. `remat` sets what the backward pass recomputes of each layer: nothing
    (`none`), everything but matrix products (`dots`), or everything (`full`).
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

        def layers(count: int, experts: bool) -> Block:
            block = partial(Block, cfg, experts=experts, precision=precision, kernels=kernels)
            return stack_layers(nnx.eval_shape(lambda: block(rngs=nnx.Rngs(0))), count, rngs)

        self.embed, self.head = embedding_and_head(cfg, rngs, precision)
        if cfg.first_k_dense_replace:
            self.dense_layers = layers(cfg.first_k_dense_replace, experts=False)
        if cfg.num_moe_layers:
            self.moe_layers = layers(cfg.num_moe_layers, experts=True)
        self.norm = RMSNorm("embed", cfg.hidden_size, cfg.rms_norm_eps, precision)
        if cfg.num_nextn_predict_layers:
            self.mtp = MTP(cfg, rngs=rngs, precision=precision, kernels=kernels)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token. Segment ids separate the documents of a packed sequence (0 is padding); positions
        default to 0, 1, 2, …, so give them too for packed sequences."""
        h_BTD, _ = self.hidden(tokens, segment_ids, positions)
        return self.logits(h_BTD)

    def loss_sums(self, batch: Batch, *, chunk: int, mtp: bool) -> LossSums:
        """The losses of a microbatch, summed over its tokens: next-token cross-entropy, with `mtp` that of the MTP
        module, and the sequence-wise auxiliary load-balancing loss; with the router's statistics. `chunk` is how many
        tokens of each sequence have logits at one time."""
        sequences = batch["segment_ids"], batch["positions"]
        h_BTD, stats = self.hidden(batch["tokens"], *sequences)
        weights_BT = loss.target_mask(batch).astype(jnp.float32)
        nats = loss.cross_entropy(h_BTD, self._head(), batch["targets"], weights_BT, chunk=chunk)
        loads = [] if stats is None else [stats.load_E]
        aux_loss = jnp.float32(0) if stats is None else stats.aux_loss.sum()
        dropped = jnp.int32(0) if stats is None else stats.dropped.sum()
        mtp_nats = jnp.float32(0)
        if mtp:
            # The gradients of the two uses of the head one after the other: each is as large as the head, in float32.
            h_BTD, nats = jax.lax.optimization_barrier((h_BTD, nats))
            h_BTD, stats = self.mtp_hidden(h_BTD, batch["targets"], *sequences)
            targets_BT = loss.shift_left(batch["targets"])
            weights_BT = loss.mtp_target_mask(batch).astype(jnp.float32)
            mtp_nats = loss.cross_entropy(h_BTD, self._head(self.mtp_head), targets_BT, weights_BT, chunk=chunk)
            loads.append(stats.load_E[None])
            aux_loss += stats.aux_loss
            dropped += stats.dropped
        load_LE = jnp.concatenate(loads) if loads else jnp.zeros((0, self.cfg.n_routed_experts), jnp.int32)
        return LossSums(nats, mtp_nats, aux_loss, load_LE, dropped)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        replay: Int[Array, "B T l K"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Hidden states after the final norm, and the router statistics of the MoE layers, stacked. Routing replay
        (arXiv 2507.18071, section 5.3): `replay` gives each token's experts in each MoE layer, −1 for the router's
        choice."""
        sequences = _sequence_info(tokens, segment_ids, positions)
        x_BTD, stats = self.embedding(tokens), None
        if self.cfg.first_k_dense_replace:
            x_BTD, _ = run_layers(self.dense_layers, x_BTD, sequences, None, self.remat)
        if self.cfg.num_moe_layers:
            replay_lBTK = None if replay is None else jnp.moveaxis(replay, 2, 0)
            x_BTD, stats = run_layers(self.moe_layers, x_BTD, sequences, replay_lBTK, self.remat)
        return self.norm(x_BTD), stats

    def mtp_hidden(
        self,
        h_BTD: Float[Array, "B T D"],
        next_tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """From `hidden` and the next tokens the hidden states that predict the tokens after them, and the router
        statistics of the MTP module."""
        sequences = _sequence_info(next_tokens, segment_ids, positions)

        def run(h_BTD: Array, embedding_BTD: Array) -> tuple[Array, RouterStats]:
            return self.mtp(h_BTD, embedding_BTD, sequences)

        return REMAT[self.remat](run)(h_BTD, embedding_lookup(self._cast(self.mtp_embed), next_tokens))

    def embedding(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of tokens, in the compute dtype."""
        return embedding_lookup(self._cast(self.embed), tokens_BT)

    def logits(self, h_BTD: Float[Array, "B T D"], head: nnx.Param | None = None) -> Float[Array, "B T V"]:
        """Logits of hidden states. `head` is the model's, or `mtp_head` for hidden states of the MTP module."""
        logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, self._head(head), preferred_element_type=jnp.float32)
        return logits_BTV.astype(self.precision.output)

    def token_logprobs(
        self, h_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"], *, chunk: int, temperature: float = 1.0
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Log-probability of each target and entropy: `nn.loss.token_logprobs` with the model's head."""
        return loss.token_logprobs(h_BTD, self._head(), targets_BT, chunk=chunk, temperature=temperature)

    @property
    def mtp_embed(self) -> nnx.Param:
        """The embedding of the MTP module."""
        return self.embed if self.cfg.mtp_shares_embedding else self.mtp.embed

    @property
    def mtp_head(self) -> nnx.Param:
        """The output head of the MTP module."""
        return self.head if self.cfg.mtp_shares_embedding else self.mtp.head

    def extend(
        self,
        tokens: Int[Array, "b T"],
        cache_LBSW: KVCache,
        start: Int[Array, "b"],
        slots: Int[Array, "b"] | None = None,
        form: Form = "absorbed",
    ) -> tuple[NewTokens, KVCache, Int[Array, "l b T K"] | None]:
        """Prefill or decode: run new tokens at positions `start`, `start + 1`, … of their sequence slots, over the KV
        cache. `slots` defaults to all slots in order; `form` is how attention reads the latent cache
        (`ops.cached_attention`).

        Returns hidden states after the final norm, the cache with the new entries, and the selected experts of each MoE
        layer. Tokens that do not fit into their slot leave the cache unchanged.
        """
        metadata = self._attention_metadata(tokens, start, slots, form)
        x_bTD, experts = self._decode_embedding(self.embed, tokens), None
        if self.cfg.first_k_dense_replace:
            x_bTD, cache_LBSW, _ = extend_layers(self.dense_layers, x_bTD, cache_LBSW, 0, metadata)
        if self.cfg.num_moe_layers:
            first_layer = self.cfg.first_k_dense_replace
            x_bTD, cache_LBSW, experts = extend_layers(self.moe_layers, x_bTD, cache_LBSW, first_layer, metadata)
        return self.norm(x_bTD), cache_LBSW, experts

    def mtp_extend(
        self,
        h_bTD: NewTokens,
        next_tokens: Int[Array, "b T"],
        cache_LBSW: KVCache,
        start: Int[Array, "b"],
        slots: Int[Array, "b"] | None = None,
        form: Form = "absorbed",
    ) -> tuple[NewTokens, KVCache]:
        """`mtp_hidden` over the KV cache, whose last layer is that of the MTP module: for draft tokens."""
        metadata = self._attention_metadata(next_tokens, start, slots, form)
        x_bTD = self._decode_embedding(self.mtp_embed, next_tokens)
        return self.mtp.extend(h_bTD, x_bTD, cache_LBSW, self.cfg.num_hidden_layers, metadata)

    def _attention_metadata(
        self, tokens_bT: Int[Array, "b T"], start_b: Int[Array, "b"], slots_b: Int[Array, "b"] | None, form: Form
    ) -> AttentionMetadata:
        positions_bT = start_b[:, None] + jnp.arange(tokens_bT.shape[1])
        all_slots = slots_b is None
        slots_b = jnp.arange(len(start_b)) if all_slots else slots_b
        return AttentionMetadata(slots_b, positions_bT, rotary(self.cfg, positions_bT), all_slots, form)

    def _decode_embedding(self, embed: nnx.Param, tokens_bT: Int[Array, "b T"]) -> NewTokens:
        return constrain_decode_activations(self._cast(embed)[tokens_bT])

    def _cast(self, weight: nnx.Param) -> Array:
        return weight[...].astype(self.precision.compute)

    def _head(self, head: nnx.Param | None = None) -> Float[Array, "D V"]:
        return self._cast(self.head if head is None else head)


def unstack_layers(model: Transformer) -> Transformer:
    """The model with a list of layers in place of each stack, which `extend` runs one by one: in a scan XLA:CPU would
    copy every layer's weights out of the stack at each step."""
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)
    for name in ("dense_layers", "moe_layers"):
        if hasattr(model, name):
            graph, state = nnx.split(getattr(model, name))
            count = len(jax.tree.leaves(state)[0])
            layer = jax.jit(lambda state, i: jax.tree.map(lambda x: x[i], state))
            setattr(model, name, nnx.List([nnx.merge(graph, layer(state, i)) for i in range(count)]))
    return model


def _sequence_info(
    tokens_BT: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None, positions: Int[Array, "B T"] | None
) -> SequenceInfo:
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return SequenceInfo(segment_ids, positions)
