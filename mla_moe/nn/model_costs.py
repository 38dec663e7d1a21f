"""What a model costs, from shapes alone: parameters total and active, KV-cache bytes and training FLOPs per token."""

import functools
import math
from typing import NamedTuple

from mla_moe.config import ModelConfig
from mla_moe.nn.abstract_model import AbstractModel


class ParameterCount(NamedTuple):
    total: int
    """All parameters and router biases, without the MTP module."""
    active: int
    """Parameters used per token: of the routed experts `num_experts_per_tok`; with zero-computation experts fewer, the
    mean if the router selects all as often."""
    mtp: int
    """Parameters of the MTP module, without embedding and head if it shares the model's."""


@functools.cache  # it traces the model
def count_parameters(cfg: ModelConfig) -> ParameterCount:
    """Total and active parameters, and those of the MTP module."""
    total = active = mtp = 0
    for path, variable in AbstractModel(cfg).variables.items():
        size = math.prod(variable.get_value().shape)
        if path.startswith("mtp/"):
            mtp += size
            continue
        total += size
        routed = "experts" in variable.get_metadata("out_sharding")
        active += size * cfg.num_experts_per_tok // cfg.moe.router_width if routed else size
    return ParameterCount(total, active, mtp)


def active_matmul_weights(cfg: ModelConfig) -> int:
    """Weights that a token is multiplied by: the active parameters without the embedding, which is a lookup, unless it
    is the output head too."""
    lookup = 0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size
    return count_parameters(cfg).active - lookup


def kv_cache_bytes_per_token(cfg: ModelConfig, item_bytes: int = 2) -> int:
    """Bytes of the latent KV cache per token, over all layers, with the keys of indexers."""
    index = 0 if cfg.index_topk is None else cfg.index_head_dim
    return (cfg.kv_lora_rank + cfg.qk_rope_head_dim + index) * cfg.num_hidden_layers * item_bytes


def mha_kv_cache_bytes_per_token(cfg: ModelConfig, item_bytes: int = 2) -> int:
    """KV-cache bytes per token of multi-head attention (MHA) with as many heads of width `v_head_dim`."""
    return 2 * cfg.num_attention_heads * cfg.v_head_dim * cfg.num_hidden_layers * item_bytes


def train_flops_per_token(cfg: ModelConfig, length: int, *, frozen: bool = False) -> float:
    """Model FLOPs per token of forward and backward pass: 6 per active weight of a matrix product, and causal attention
    over `length` tokens, with an indexer over those that it selects. Indexers have no backward pass. Rematerialisation
    does not count, nor does the embedding, which is a lookup.

    Weights that are `frozen`, as with LoRA, have no gradient, which is 2 of the 6; FLOPs of adapters do not count.
    """
    count, embedding = count_parameters(cfg), cfg.vocab_size * cfg.hidden_size
    weights, layers = active_matmul_weights(cfg), cfg.num_hidden_layers
    if cfg.num_nextn_predict_layers:
        expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
        inactive = expert * (cfg.n_routed_experts - cfg.num_experts_per_tok)
        # The MTP module runs a head too: the model's, or its own, which `count.mtp` has together with its embedding.
        weights += count.mtp - inactive + (embedding if cfg.mtp_shares_embedding else -embedding)
        layers += cfg.num_nextn_predict_layers
    width = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
    keys = min(cfg.index_topk or length, length)  # of the last tokens; the first have 1, 2, …
    attention = 2 * cfg.num_attention_heads * width * keys * (1 - (keys - 1) / (2 * length))
    flops = (4 if frozen else 6) * weights + 3 * layers * attention
    if cfg.index_topk is None:
        return flops
    H, I = cfg.index_n_heads, cfg.index_head_dim  # noqa: E741
    indexers = cfg.shared_indexers.count(False) + cfg.num_nextn_predict_layers
    matrices = (cfg.q_lora_rank or 0) * H * I + cfg.hidden_size * (H + I)
    scores = 2 * H * I * (length + 1) / 2 if length > cfg.index_topk else 0
    return flops + indexers * (scores - 4 * matrices)
