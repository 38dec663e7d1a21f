"""Multi-token prediction (MTP): one more layer, for a second training loss and for draft tokens when sampling."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.nn.block import Block, SequenceInfo
from mla_moe.nn.kv_cache import AttentionMetadata, KVCache, NewTokens
from mla_moe.nn.layers import RMSNorm, embedding_and_head
from mla_moe.nn.moe import RouterStats
from mla_moe.nn.param import Precision, matrix
from mla_moe.parallel.sharded_einsum import Einsum, plain_einsum, sharded_einsum


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
            self.embed, self.head = embedding_and_head(cfg, rngs, precision)
        self.precision = precision

    def __call__(
        self, h_BTD: Float[Array, "B T D"], next_embedding_BTD: Float[Array, "B T D"], sequences: SequenceInfo
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """From the model's final-normed `h_i` and the embedding of token i+1 to the hidden state that predicts i+2."""
        x_BTD, stats = self.block(self._project(h_BTD, next_embedding_BTD, sharded_einsum), sequences)
        assert stats is not None  # the block has experts
        return self.norm(x_BTD), stats

    def extend(
        self,
        h_bTD: NewTokens,
        next_embedding_bTD: NewTokens,
        cache_LBSW: KVCache,
        layer: int,
        metadata: AttentionMetadata,
    ) -> tuple[NewTokens, KVCache]:
        """The same for prefill and decode, over layer `layer` of the latent cache."""
        x_bTD = self._project(h_bTD, next_embedding_bTD, plain_einsum)
        x_bTD, cache_LBSW, _ = self.block.extend(x_bTD, cache_LBSW, layer, metadata)
        return self.norm(x_bTD), cache_LBSW

    def _project(
        self, h_BTD: Float[Array, "B T D"], next_embedding_BTD: Float[Array, "B T D"], einsum: Einsum
    ) -> Float[Array, "B T D"]:
        both = jnp.concatenate([self.embedding_norm(next_embedding_BTD), self.hidden_norm(h_BTD)], axis=-1)
        return einsum("BTd,dD->BTD", both, self.project, self.precision.compute)
