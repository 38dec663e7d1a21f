"""What a model costs before any of it exists: parameters, cache bytes, FLOPs. Counted from shapes."""

import math
from typing import NamedTuple

from mla_moe.config import ModelConfig
from mla_moe.nn.abstract_model import AbstractModel


class ParameterCount(NamedTuple):
    total: int
    """All of them with the router's biases, without the multi-token-prediction module."""
    active: int
    """Those that one token meets: its chosen experts in place of all."""
    mtp: int
    """In the multi-token-prediction module, which shares embedding and head."""


def count_parameters(cfg: ModelConfig) -> ParameterCount:
    total = active = mtp = 0
    for path, variable in AbstractModel(cfg).variables.items():
        size = math.prod(variable.get_value().shape)
        if path.startswith("mtp/"):
            mtp += size
            continue
        total += size
        chosen = "experts" in variable.get_metadata("axes")
        active += size * cfg.num_experts_per_tok // cfg.n_routed_experts if chosen else size
    return ParameterCount(total, active, mtp)


def kv_cache_bytes_per_token(cfg: ModelConfig, item_bytes: int = 2) -> int:
    """Bytes a token takes in the latent cache, over all layers."""
    return (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * cfg.num_hidden_layers * item_bytes


def mha_kv_cache_bytes_per_token(cfg: ModelConfig, item_bytes: int = 2) -> int:
    """The same for multi-head attention with as many heads of the value's width."""
    return 2 * cfg.num_attention_heads * cfg.v_head_dim * cfg.num_hidden_layers * item_bytes


def train_flops_per_token(cfg: ModelConfig, length: int) -> float:
    """Useful FLOPs of forward and backward: 6 per active weight in a matrix product, and causal attention over
    `length` tokens. Recomputation is not counted, nor is the embedding, which is a lookup."""
    count = count_parameters(cfg)
    weights = count.active - cfg.vocab_size * cfg.hidden_size
    layers = cfg.num_hidden_layers
    if cfg.num_nextn_predict_layers:
        experts = 3 * cfg.hidden_size * cfg.moe_intermediate_size
        idle = experts * (cfg.n_routed_experts - cfg.num_experts_per_tok)
        embedding = cfg.vocab_size * cfg.hidden_size
        # The head runs a second time, be it the model's or, counted with the module's embedding, its own.
        weights += count.mtp - idle + (embedding if cfg.mtp_shares_embedding else -embedding)
        layers += cfg.num_nextn_predict_layers
    width = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
    attention = 2 * cfg.num_attention_heads * width * (length + 1) / 2
    return 6 * weights + 3 * layers * attention
